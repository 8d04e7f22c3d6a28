"""`python -m minisft generate FOLDER --prompt "..."`: answer prompts with a trained model.

FOLDER is a run's output folder or a model folder (a checkpoint, any Hugging Face folder of a supported family). Without
--prompt, each line of standard input is a prompt. The prompt is formatted as the training prompts were: as a user's turn of
the chat template, as an instruction, or unchanged. In a folder that no run wrote, the chat template is used if there is one.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.atomic_folder import MANIFEST
from minisft.data.rows import RowError
from minisft.errors import UserError
from minisft.files import checked_path
from minisft.strict_json import read_json

if TYPE_CHECKING:
    from minisft.data.tokenizer import Tokenizer


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="minisft generate", description="Answer prompts with a trained model.")
    parser.add_argument("folder", help="a model folder, or the output folder of a run")
    parser.add_argument("--prompt", action="append", help="may be repeated; without it, the lines of stdin")
    parser.add_argument("--plain", action="store_true", help="use the prompt unchanged; \\n is a newline")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args(argv)
    folder = Path(checked_path(arguments.folder, "the folder"))

    import torch

    from minisft.data.tokenizer import load_tokenizer
    from minisft.generation import generate, stop_ids
    from minisft.model.adapter_files import load_adapted, model_folder
    from minisft.model.load import load_model

    folder = model_folder(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}  # written by the run
    load = load_model if (folder / "config.json").exists() else load_adapted
    model = load(folder, device=device, max_length=trained.get("max_length"))
    tokenizer = load_tokenizer(folder, chat_template_kwargs=trained.get("chat_template_kwargs"))
    layout = trained.get("prompt", "plain" if tokenizer.template is None else "chat")
    layout = "plain" if arguments.plain else layout
    prompts = arguments.prompt or (line.rstrip("\n") for line in sys.stdin)
    is_escaped = trained.get("control_tokens") == "escape" and not arguments.plain
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
            ids = prompt_ids(tokenizer, prompt, layout, is_escaped)
        except UnicodeEncodeError:
            raise UserError(f"the prompt {prompt[:100]!r} is not UTF-8 text") from None
        except RowError as error:
            raise UserError(f"the prompt {prompt[:100]!r}: {error}") from None
        (output,) = generate(
            model,
            [ids],
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            stop_ids=stop_ids(model, tokenizer),
            seed=arguments.seed,
        )
        print(tokenizer.decode(output), flush=True)
    return 0


def prompt_ids(tokenizer: "Tokenizer", prompt: str, layout: str, is_escaped: bool = False) -> list[int]:
    """The tokens of a prompt, exactly as in training. is_escaped: special tokens that are written in it are text."""
    from minisft.data.encoding import encode_prompt
    from minisft.data.formats import Example, whole
    from minisft.data.kinds import USER
    from minisft.data.prompts import plain_prompt

    if layout == "chat":
        asked = Example(messages=[{"role": "user", "content": prompt}])
    else:
        text = plain_prompt(prompt) if layout == "instruction" else prompt.replace("\\n", "\n")
        asked = Example((whole(text, USER),))
    return encode_prompt(tokenizer, asked, layout=layout, control_tokens="escape" if is_escaped else "allow")[1]
