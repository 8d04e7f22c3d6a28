"""A model as a folder for llama.cpp and Ollama: one GGUF file and a Modelfile. And the proof that the file is the model."""

from functools import partial
from pathlib import Path

import torch

from minisft.data.chat.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer, load_tokenizer
from minisft.errors import MODEL, UserError
from minisft.generation import stop_ids
from minisft.gguf.config import ARCHITECTURES as READ
from minisft.gguf.file import open_gguf
from minisft.gguf.write import Source, write_gguf
from minisft.gguf.write_tokenizer import Vocabulary
from minisft.merge import TOLERANCE, relative
from minisft.model.decoder import Decoder
from minisft.model.load import load_weights
from minisft.model.save import whole_tensor
from minisft.model.tensor_names import stored_tensors
from minisft.ollama import modelfile
from minisft.strict_json import parse_json

PROBES = (  # texts whose tokens are compared
    "Some words, 12345 of them: it's 3.14!\n\n\tx=y[i]+2;\r\n",
    "na\u00efve caf\u00e9  \u65e5\u672c\u8a9e \U0001f600 \u0410\u0431\u0432",
    "HTTPServer don't WON'T we'll 1,000,000",
    " a leading space",
)


def write_gguf_folder(model: Decoder, tokenizer: Tokenizer, folder: Path, kind: str, name: str) -> list[str]:
    """Write model-KIND.gguf and Modelfile into a folder that exists. Returns lines for the user.

    Raises UserError (exit code MODEL) for what llama.cpp does not compute (gguf/write.py), and if the tokenizer that is read
    back from the file gives other tokens.
    """
    require_library()
    stops = sorted(stop_ids(model, tokenizer))
    path = folder / f"model-{kind}.gguf"
    parameters = dict(model.named_parameters())
    sources = [
        Source(
            key, tuple(stored.shape([parameters[part] for part in stored.names])), partial(whole_tensor, model, stored)
        )
        for key, stored in stored_tensors(model.config, parameters).items()
    ]
    vocabulary = vocabulary_of(tokenizer, stops)
    lines = write_gguf(path, model.config, sources, vocabulary, kind, name)
    _compare_tokens(tokenizer, path, vocabulary.template)
    texts = [tokenizer.backend.id_to_token(stop) for stop in stops]
    bos = tokenizer.special_tokens.get("bos_token", "") if vocabulary.adds_bos else ""
    text, more = modelfile(path.name, tokenizer.template, bos, [t for t in texts if t], model.generation_config)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return lines + more


def vocabulary_of(tokenizer: Tokenizer, stops: list[int]) -> Vocabulary:
    special = {name: tokenizer._id(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    # llama.cpp puts the space before a text and after every special token. Where a tokenizer puts it at the start of a text
    # only, prompts of chats, which begin with a special token, have none.
    has_template = tokenizer.template is not None
    puts_space = tokenizer.has_space_after_special if has_template else tokenizer.has_prefix_space
    bos, eos = special["bos"], special["eos"]
    for ids, known, where in ((tokenizer.prefix_ids, bos, "before"), (tokenizer.suffix_ids, eos, "after")):
        if ids not in ([], [known]):
            problem = (
                f"no GGUF file is written: the tokenizer puts {ids} {where} a text, GGUF has place for {known} alone"
            )
            raise UserError(problem, hint="write Hugging Face files instead (without --gguf)", exit_code=MODEL)
    return Vocabulary(
        json=parse_json(tokenizer.files["tokenizer.json"], "tokenizer.json"),
        special={name: number for name, number in special.items() if number is not None},
        ends=tuple(stops),
        adds_bos=bool(tokenizer.prefix_ids),
        adds_eos=bool(tokenizer.suffix_ids),
        puts_space=puts_space,
        template=_with_variables(tokenizer.template),
        tool_template=_with_variables(tokenizer.tool_template),
    )


def _with_variables(template: ChatTemplate | None) -> str | None:
    """The text of a template that sees the run's chat_template_kwargs, which a reader of the file does not have."""
    if template is None:
        return None
    values = ((name, value.replace("null", "none")) for name, value in template.variables)
    return "".join(f"{{%- set {n} = {n} if {n} is defined else {v} %}}" for n, v in values) + template.text


def require_library() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        hint = "install it: pip install 'minisft[gguf]'"
        raise UserError("writing GGUF needs the library gguf", hint=hint, exit_code=MODEL) from None


def _compare_tokens(tokenizer: Tokenizer, path: Path, template: str | None) -> None:
    again = load_tokenizer(path)
    front = next(iter(tokenizer.special_tokens.values()), "") if template is not None else ""
    # Metaspace puts no second space before one; llama.cpp, like SentencePiece, does.
    for text in PROBES[: -1 if tokenizer.has_prefix_space else None]:
        ours, theirs = tokenizer.encode(front + text), again.encode(front + text)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            raise UserError(
                f"no GGUF file is written: its tokenizer makes other tokens of {text[:40]!r}, from token {at} on",
                hint="please report this; without --gguf the tokenizer is written as it is",
                exit_code=MODEL,
            )


def compare_logits(model: Decoder, path: Path, rows: str, inputs: tuple) -> list[str]:
    """A line for the user: how far the weights of the file move the logits of these inputs. The model has these weights
    afterwards. Empty for an architecture that minisft does not start from. Raises UserError (exit code MODEL) if an f32 file is
    another model."""
    if open_gguf(path).architecture not in READ:
        return []
    with torch.no_grad():
        ours = model.logits(model(*inputs)).float()
        load_weights(model, path)
        error = relative(model.logits(model(*inputs)).float(), ours)
    kind = path.stem.rpartition("-")[2]
    if not error <= (TOLERANCE if kind == "f32" else 1.0):
        raise UserError(
            f"the model in {path.name} is another one: its logits differ by {error:.1e} of their norm",
            hint="please report this" if kind == "f32" else "choose a kind with more bits, --gguf q8_0 or bf16",
            exit_code=MODEL,
        )
    return [f"read back, the logits of {len(inputs[0])} {rows} differ by {error:.1e} of their norm"]
