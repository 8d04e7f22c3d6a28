"""A trained model that answers: how a question becomes its prompt, and the options of sampling, for the commands that ask it."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.atomic_folder import MANIFEST
from minisft.data.rows import RowError
from minisft.errors import UserError
from minisft.strict_json import read_json

if TYPE_CHECKING:
    from minisft.data.tokenizer import Tokenizer
    from minisft.model.decoder import Decoder


@dataclass
class Answerer:
    """A model, and how a question becomes a prompt for it."""

    model: "Decoder"
    tokenizer: "Tokenizer"
    layout: str  # "chat", "instruction" or "plain", as in RowFormat.prompt
    is_escaped: bool  # special tokens that are written in a prompt are text

    def ids_of(self, messages: list[dict]) -> list[int]:
        """The tokens of a conversation that ends with a question. Raises UserError for one that is no prompt."""
        prompt = messages[-1]["content"]
        try:
            prompt.encode("utf-8")
            return prompt_ids(self.tokenizer, messages, self.layout, self.is_escaped)
        except UnicodeEncodeError:
            raise UserError(f"the prompt {prompt[:100]!r} is not UTF-8 text") from None
        except RowError as error:
            raise UserError(f"the prompt {prompt[:100]!r}: {error}") from None

    def complete(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[str]:
        """The answers to a batch of prompts."""
        from minisft.generation import generate, stop_ids

        stops = stop_ids(self.model, self.tokenizer)
        return [self.tokenizer.decode(ids) for ids in generate(self.model, prompts, stop_ids=stops, **sampling)]


def trained_as(folder: Path) -> dict[str, Any]:
    """What a run has written about its prompts, in the manifest of its model or in a checkpoint; {} for a folder of others."""
    written = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    state = folder / "trainer_state.json"
    return written | (read_json(state).get("prompting", {}) if state.exists() else {})


def open_model(folder: Path, *, chat_template: str | None = None) -> Answerer:
    """The model of a run's output folder, of an adapter or of a model folder, on the GPU if there is one. chat_template: in place
    of the folder's, as in `load_tokenizer`."""
    import torch

    from minisft.data.tokenizer import load_tokenizer
    from minisft.join import use_exported_weights
    from minisft.model.adapter_files import CONFIG_FILE, model_folder
    from minisft.model.load import load_model
    from minisft.model.start import load_adapted

    folder = model_folder(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = trained_as(folder)
    is_adapter = (folder / CONFIG_FILE).exists() and not (folder / "config.json").exists()
    model = (load_adapted if is_adapter else load_model)(folder, device=device, max_length=trained.get("max_length"))
    use_exported_weights(model, folder)
    kwargs = trained.get("chat_template_kwargs")
    tokenizer = load_tokenizer(folder, chat_template=chat_template, chat_template_kwargs=kwargs)
    layout = trained.get("prompt", "plain" if tokenizer.template is None else "chat")
    return Answerer(model, tokenizer, layout, trained.get("control_tokens") == "escape")


def prompt_ids(tokenizer: "Tokenizer", messages: list[dict], layout: str, is_escaped: bool = False) -> list[int]:
    """The tokens of a conversation that ends with a question, exactly as in training. Without a chat template the question stands
    alone. layout, is_escaped: as in `Answerer`. Raises RowError."""
    from minisft.data.encoding import encode_prompt
    from minisft.data.formats import Example, whole
    from minisft.data.kinds import USER
    from minisft.data.prompts import plain_prompt

    if layout == "chat":
        asked = Example(messages=messages)
    else:
        prompt = messages[-1]["content"]
        text = plain_prompt(prompt) if layout == "instruction" else prompt.replace("\\n", "\n")
        asked = Example((whole(text, USER),))
    return encode_prompt(tokenizer, asked, layout=layout, control_tokens="escape" if is_escaped else "allow")[1]


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int = 128) -> None:
    """The options that `sampling` reads."""
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--seed", type=int)


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of generation.generate."""
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}


def system_turn(text: str | None) -> list[dict]:
    return [{"role": "system", "content": text}] if text else []
