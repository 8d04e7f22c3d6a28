"""`python -m minisft export RUN OUT`: write a finished model where others run it.

RUN is a run's output folder, a checkpoint, a model folder or an adapter folder, ours or PEFT's; OUT a new folder.

    (nothing)       a copy of the finished model, for transformers, vLLM and the rest; of an adapter, as PEFT reads it;
                    of a checkpoint, or of a run that has not finished, what the run would have exported then (join.py)
    --merge         adapter and base as one model (merge.py)
    --gguf [KIND]   one GGUF file and a Modelfile, for llama.cpp and Ollama; an adapter is merged first

--push owner/name uploads OUT to the Hugging Face hub afterwards, if it was made of a finished model. Given again, it finds OUT
written, and sends what is missing.
"""

import argparse
import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.config.sections import KEYS
from minisft.config.values import choices
from minisft.errors import MODEL, UserError
from minisft.files import checked_path
from minisft.gguf.kinds import KINDS

if TYPE_CHECKING:
    from minisft.model.decoder import Decoder

NOT_IN_VLLM = ("use_dora", "modules_to_save", "trainable_token_indices")
IN_NEW_VLLM = ("rank_pattern", "alpha_pattern")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="minisft export", description="Write a finished model where others run it.")
    parser.add_argument("run", help="the output folder of a run, a checkpoint, a model folder or an adapter folder")
    parser.add_argument("out", help="a new folder for the model")
    parser.add_argument("--merge", action="store_true", help="write adapter and base as one model")
    parser.add_argument(
        "--dtype",
        choices=choices(KEYS["checkpoint.save_dtype"].type),
        help="of the written weights: with --merge bf16 unless given; of a checkpoint that of the run",
    )
    parser.add_argument(
        "--gguf", nargs="?", const="f16", type=str.lower, metavar="KIND",
        help=f"a GGUF file and an Ollama Modelfile; KIND is one of {', '.join(KINDS)} (f16)",
    )  # fmt: skip
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload OUT to this repository of the Hugging Face hub")
    parser.add_argument("--public", action="store_true", help="with --push: everyone may see it (else it is private)")
    arguments = parser.parse_args(argv)
    run, out = Path(checked_path(arguments.run, "the run")), Path(checked_path(arguments.out, "the new folder"))
    if arguments.gguf is not None and arguments.gguf not in KINDS:
        hint = f"kinds: {', '.join(KINDS)}; llama.cpp's llama-quantize makes others of an f16 file"
        raise UserError(f"--gguf {arguments.gguf}: this kind is not written", hint=hint)
    joins = not arguments.merge and arguments.gguf is None and is_checkpoint(run)
    if arguments.dtype and not joins and not (arguments.merge and arguments.gguf is None):
        hint = "give --merge too, or name a checkpoint; a GGUF file has --gguf KIND"
        raise UserError("--dtype is that of merged weights, or of a checkpoint's", hint=hint)
    if arguments.public and not arguments.push:
        raise UserError("--public is said of a repository", hint="give --push owner/name")
    if arguments.push and joins:
        hint = f"export it without --push; then push {out}, which is a model folder like any other"
        raise UserError(f"--push: {run} is no finished model", hint=hint)
    if not joins and is_checkpoint(run) and (run / "checkpoints").is_dir():
        option = "--merge" if arguments.merge else "--gguf"
        hint = f"name a folder of {run / 'checkpoints'}, or export it without {option} first"
        raise UserError(f"{option}: {run} has not finished", hint=hint, exit_code=MODEL)
    if os.path.lexists(out) and not arguments.push:
        raise UserError(f"{out} exists", hint="name a new folder")

    from minisft.atomic_folder import remove_leftovers
    from minisft.console import wrap
    from minisft.model.adapter_files import CONFIG_FILE, model_folder

    remove_leftovers(out.parent)  # of an export that was killed
    if joins:
        from minisft.join import join

        print(wrap([*(f"exported   {line}" for line in join(run, out, arguments.dtype)), f"written to {out}"]))
        return 0
    folder = model_folder(run)
    is_adapter = (folder / CONFIG_FILE).exists()
    if arguments.merge and not is_adapter:
        hint = "a run without [lora] wrote a whole model: leave --merge out, and it is copied"
        raise UserError(f"{folder} holds no adapter (no {CONFIG_FILE})", hint=hint, exit_code=MODEL)
    if arguments.push:
        from minisft.upload import prepare_repository, push

        prepare_repository(arguments.push, public=arguments.public)  # before hours of work
    form = f"gguf {arguments.gguf}" if arguments.gguf else f"merged {arguments.dtype}" if arguments.merge else "copy"
    if not is_written(out, folder, form):
        if arguments.gguf is not None:
            lines = export_gguf(folder, run, out, arguments.gguf, form)
        elif arguments.merge:
            lines = export_merged(folder, run, out, arguments.dtype or "bf16", form)
        else:
            lines = export_copy(folder, out, form)
        print(wrap([*(f"exported   {line}" for line in lines), f"written to {out}"]))
    if arguments.push:
        print(wrap([f"pushed     to {arguments.push}: {push(out, arguments.push)}"]))
    return 0


def is_written(out: Path, folder: Path, form: str) -> bool:
    """Whether OUT is there from an earlier export of the same model, whose upload did not end. Raises UserError if it is
    something else."""
    from minisft.atomic_folder import MANIFEST, read_manifest, verify_folder

    if not os.path.lexists(out):
        return False
    made = read_manifest(out).get("export") if (out / MANIFEST).is_file() else None
    if made is None or made != made_from(folder, form)["export"] or verify_folder(out) is not None:
        raise UserError(f"{out} exists, and is not this export", hint="name a new folder")
    return True


def made_from(folder: Path, form: str) -> dict:
    """What the manifest of an exported folder says of its origin."""
    from minisft.atomic_folder import contents_id

    return {"export": {"form": form, "of": contents_id(folder)}}


def is_checkpoint(run: Path) -> bool:
    """Whether the model is to be read from a checkpoint: it is one, or the folder of a run that has not finished."""
    return (run / "trainer_state.json").exists() or (run / "checkpoints").is_dir() and not (run / "model").exists()


def export_copy(folder: Path, out: Path, form: str) -> list[str]:
    """The files of a finished model or adapter. Returns lines for the user."""
    from minisft.atomic_folder import MANIFEST, atomic_folder, read_manifest, verify_folder
    from minisft.export import room_for
    from minisft.model.adapter_files import CONFIG_FILE, base_of
    from minisft.strict_json import read_json

    if folder.is_file():
        raise UserError(
            f"{folder} is a GGUF file already", hint="give the folder of a model, or copy the file", exit_code=MODEL
        )
    has_manifest = (folder / MANIFEST).exists()
    if has_manifest and (reason := verify_folder(folder)):
        raise UserError(f"{folder}: {reason}", hint="export the run again", exit_code=MODEL)
    manifest = read_manifest(folder) if has_manifest else {}
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_ours_or_hidden(path, folder)]
    needed = sum(path.stat().st_size for path in paths)
    with (
        room_for(out, needed),
        atomic_folder(out, _described(manifest) | made_from(folder, form)) as temporary,
    ):
        for path in paths:
            target = temporary / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    if not (folder / CONFIG_FILE).exists():
        return [f"{len(paths)} files of the finished model, unchanged"]
    lines = [f"the adapter, as PEFT reads it, beside its base {base_of(folder)[0]}; --merge writes both as one model"]
    config = read_json(folder / CONFIG_FILE)
    if unread := [key for key in NOT_IN_VLLM if config.get(key)]:
        lines.append(f"vLLM does not serve adapters with {', '.join(unread)}: --merge for it")
    if new := [key for key in IN_NEW_VLLM if config.get(key)]:
        lines.append(f"vLLM 0.32 reads {', '.join(new)}; older releases may not: --merge for them")
    return lines


def _is_ours_or_hidden(path: Path, folder: Path) -> bool:
    """The manifest, which is written anew, and what tools keep in hidden files and folders."""
    parts = path.relative_to(folder).parts
    return parts == ("manifest.json",) or any(part.startswith(".") for part in parts)


def _described(manifest: dict) -> dict:
    """What the commands that read a model folder know of the training."""
    kept = ("prompt", "chat_template_kwargs", "control_tokens", "max_length", "base")
    return {key: manifest[key] for key in kept if key in manifest}


def export_merged(folder: Path, run: Path, out: Path, dtype_name: str, form: str) -> list[str]:
    """An adapter and its base as one model. Returns lines for the user."""
    from minisft.atomic_folder import atomic_folder
    from minisft.export import model_bytes, room_for, write_whole
    from minisft.model.start import find_start
    from minisft.runtime import DTYPES

    dtype, base = DTYPES[dtype_name], find_start(folder).folder
    model, tokenizer, manifest = load_merged(folder, run, dtype_name)
    needed = model_bytes(model, tokenizer, dtype, base)
    described = _described(manifest) | made_from(folder, form)
    with room_for(out, needed), atomic_folder(out, described) as temporary:
        lines = write_whole(model, tokenizer, temporary, dtype, base)
        copy_card(folder, temporary, {"library_name": "transformers", "base_model_relation": "finetune"})
    return lines


def export_gguf(folder: Path, run: Path, out: Path, kind: str, form: str) -> list[str]:
    """A GGUF file and a Modelfile. Returns lines for the user."""
    from minisft.answers import trained_as
    from minisft.atomic_folder import atomic_folder
    from minisft.data.tokenizer import load_tokenizer
    from minisft.export import room_for
    from minisft.gguf.write import check_architecture
    from minisft.gguf_folder import compare_logits, require_library, write_gguf_folder
    from minisft.join import use_exported_weights
    from minisft.merge import probe
    from minisft.model.adapter_files import CONFIG_FILE
    from minisft.model.load import load_model, read_config

    require_library()
    if (folder / CONFIG_FILE).exists():
        model, tokenizer, manifest = load_merged(folder, run, "fp32")
    else:
        manifest = trained_as(folder)
        check_architecture(read_config(folder))  # before gigabytes are read
        model = load_model(folder, max_length=manifest.get("max_length"))
        use_exported_weights(model, folder)
        tokenizer = load_tokenizer(folder, chat_template_kwargs=manifest.get("chat_template_kwargs"))
    if tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer", hint="a GGUF file holds one: put tokenizer.json there", exit_code=MODEL
        )
    rows, inputs = probe(model, run)
    needed = sum(parameter.numel() for parameter in model.parameters()) * KINDS[kind] / 8 + 2**24
    with room_for(out, needed), atomic_folder(out, made_from(folder, form)) as temporary:
        lines = write_gguf_folder(model, tokenizer, temporary, kind, name_of(run))
        copy_card(folder, temporary, {"library_name": "gguf", "base_model_relation": "finetune"})
        (file,) = temporary.glob("*.gguf")
        lines += compare_logits(model, file, rows, inputs)
    command = shlex.join(["ollama", "create", name_of(run), "-f", str(out / "Modelfile")])
    return [*lines, f"{file.name} and Modelfile: {command}"]


def copy_card(folder: Path, out: Path, header: dict) -> None:
    """The model card, with other values in its header."""
    from minisft.card import card_of_whole

    path = folder / "README.md"
    if path.is_file():
        text = card_of_whole(path.read_text(encoding="utf-8", errors="replace"), header)
        (out / path.name).write_text(text, encoding="utf-8")


def name_of(run: Path) -> str:
    """What to call the model: the name of the run's output folder, or of the file."""
    path = run.resolve()
    return (path.parent.name if path.name == "model" else path.stem if path.is_file() else path.name) or "model"


def load_merged(folder: Path, run: Path, dtype_name: str) -> tuple:
    """(the merged model, the adapter's tokenizer or None, the adapter's manifest); prints what the merge did to the logits."""
    from minisft.answers import trained_as
    from minisft.console import wrap
    from minisft.data.tokenizer import load_tokenizer
    from minisft.join import use_exported_weights
    from minisft.merge import merge
    from minisft.model.start import load_adapted
    from minisft.runtime import DTYPES
    from minisft.strict_json import read_json

    manifest = trained_as(folder)
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder, chat_template_kwargs=manifest.get("chat_template_kwargs"))
    model: Decoder = load_adapted(folder, max_length=manifest.get("max_length"))
    use_exported_weights(model, folder)
    print(wrap(merge(model, DTYPES[dtype_name], folder, run)))
    if (folder / "generation_config.json").exists():
        model.generation_config = read_json(folder / "generation_config.json")
    return model, tokenizer, manifest
