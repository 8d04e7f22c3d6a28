"""`python -m minisft init`: write a configuration that is ready to run, from a few answers or from another trainer's file.

    minisft init                                     asks; every answer is an option too
    minisft init --trainer sft --model Qwen/Qwen3-0.6B --data rows.jsonl --method lora --hardware 24gb --yes
    minisft init --from-trl sft.yaml run.toml        also --from-axolotl, --from-llamafactory, --from-stages

The proposal is a file of configs/ with your data, if there is one for that model, trainer, method and hardware; otherwise
init/propose.py computes it. Nothing is written before the last answer, and no file is replaced without --force.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisft.config.load import MODEL_FILES
from minisft.config.sections import KEYS
from minisft.errors import UserError, shortened
from minisft.files import checked_path
from minisft.gguf.file import is_gguf
from minisft.hub import is_repository_name
from minisft.importers import axolotl, llamafactory, trl
from minisft.importers import stages as stage_files
from minisft.importers.translation import DIFFERENCE, NO_COUNTERPART, TRANSLATED, Note, Translation
from minisft.importers.yaml_file import read_yaml
from minisft.init import propose, toml_text
from minisft.init.detect import (
    adapter_config,
    cpu_gigabytes,
    detected_hardware,
    first_row,
    has_template,
    look_at,
    measure,
    model_size,
    predictor,
    ready_config,
    rebased,
)

READERS = {"trl": trl, "axolotl": axolotl, "llamafactory": llamafactory, "stages": stage_files}
WIDTH = 100  # of what is printed about another trainer's file
SIGNS = {  # keys that files of the others do not have
    "trl": "use_peft dataset_name dataset_mixer dataset_mixture max_seq_length dataset_text_field torch_dtype",
    "axolotl": "base_model datasets adapter dataset_prepared_path sequence_len micro_batch_size evals_per_epoch saves_per_epoch",
    "llamafactory": "finetuning_type stage dataset template cutoff_len dataset_dir plot_loss overwrite_cache",
}
SHORTEST = 256  # tokens of a document; a method that does not fit even with these is refused


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    source = next((name for name in READERS if getattr(arguments, f"from_{name}")), None)
    asking = sys.stdin is not None and sys.stdin.isatty() and not arguments.yes and source is None
    if arguments.file and arguments.output:
        raise UserError(f"{arguments.file} and --output {arguments.output}", hint="name the file once")
    lines, problem, devices = [], None, 1
    try:
        if source:
            path, text, lines, problem = _imported(arguments, source)
        else:
            path, text, devices = _proposed(_answers(arguments, asking))
            if asking:
                print(f"\n{text}")
                if not _yes(f"Write this to {path}?", default=True):
                    print("nothing was written")
                    return 0
        toml_text.write(path, text, force=arguments.force)
    except EOFError:
        print("\nminisft: nothing was written", file=sys.stderr)
        return 130
    if not asking and not source:
        print(text)
    for line in lines:
        print("\n".join(toml_text.wrapped(line, WIDTH)))
    print(f"\nwritten to {path}")
    if problem:
        told = f"to be corrected before it runs: {problem}".split("\n")
        print("\n".join(part for line in told for part in toml_text.wrapped(line, WIDTH)))
    print(f"next: {_start(path, devices)}")
    start = arguments.start
    if asking and not start:
        try:
            start = _yes("Start it now?", default=False)
        except EOFError:
            start = False
    if start and problem:
        raise UserError(f"not started: {problem.message}", hint=problem.hint, exit_code=problem.exit_code)
    if start:
        sys.stdout.flush()
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={devices}"] if devices > 1 else []
        os.execv(sys.executable, [sys.executable, *launcher, "-m", "minisft", "train", str(path)])
    return 0


def _start(path: Path, devices: int) -> str:
    """The command that trains."""
    program = f"torchrun --nproc-per-node {devices}" if devices > 1 else "python"
    return f"{program} -m minisft train {shlex.quote(str(path))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minisft init",
        description="Write a configuration: from answers in a terminal, from options, or from another trainer's file.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", nargs="?", help="the file to write, as --output")
    add("--trainer", choices=propose.TRAINERS, help="supervised fine-tuning, preference tuning, or both in two stages")
    add("--model", help="a local folder or a Hugging Face repository")
    add("--data", help="file or glob of rows, or a repository; with sft+dpo, those of the first stage")
    add("--preference-data", help="with sft+dpo, the rows of the second stage")
    explained = "rows for evaluation, with sft+dpo in the second stage; by default 2 %% of the rows are held out"
    add("--eval-data", help=explained)
    explained = "train all weights, adapters, or adapters beside 4-bit weights; by default the first that fits"
    add("--method", choices=propose.METHODS, help=explained)
    add("--hardware", help="cpu, 24gb, 8x80gb ...; detected by default")
    add("--max-length", type=int, help="tokens of a document (1024)")
    add("--epochs", type=float, help="passes over the data (3, dpo 1)")
    add("--output", help="the file to write")
    add("-y", "--yes", action="store_true", help="ask nothing, take the proposed answers")
    add("--force", action="store_true", help="replace the file")
    add("--start", action="store_true", help="train at once")
    others = parser.add_mutually_exclusive_group()
    for name, module in READERS.items():
        others.add_argument(f"--from-{name}", metavar="FILE", help=f"read {module.NAME}: YAML or JSON")
    return parser


# ------------------------------------------------------------------------------------------------- questions


def _answers(a: argparse.Namespace, asking: bool) -> argparse.Namespace:
    """The options, completed by questions. Raises UserError if one is missing and no question may be asked."""
    if a.max_length is not None and a.max_length < 2:
        raise UserError(f"--max-length {a.max_length}", hint="at least 2 tokens")
    if a.epochs is not None and not 0 < a.epochs < float("inf"):
        raise UserError(f"--epochs {a.epochs}", hint="a number above 0")
    if a.preference_data and a.trainer in ("sft", "dpo"):
        raise UserError(
            f"--preference-data with --trainer {a.trainer}", hint="it is for sft+dpo; name the rows by --data"
        )
    return _asked(a) if asking else _without_questions(a)


def _without_questions(a: argparse.Namespace) -> argparse.Namespace:
    needed = ["model", "data"] + (["preference_data"] if a.trainer == "sft+dpo" else [])
    missing = [f"--{name.replace('_', '-')}" for name in needed if not getattr(a, name)]
    if missing:
        raise UserError(
            f"not given: {', '.join(missing)}",
            hint="minisft init --trainer sft --model FOLDER --data ROWS.jsonl --method full --hardware 24gb --yes; in a "
            "terminal, without --yes, minisft asks",
        )
    _model(a.model)
    a.trainer, a.hardware = a.trainer or "sft", a.hardware or detected_hardware()
    a.method = a.method or _usual_method(a)
    for path, stage in _data_of(a):
        print(f"{path}: {look_at(path, stage, a.model)[1]}")
    return a


def _asked(a: argparse.Namespace) -> argparse.Namespace:
    """Asks for what the options do not say. Later questions depend on earlier answers."""
    ask, trainers, methods = _ask, propose.TRAINERS, propose.METHODS
    explained = "sft learns answers, dpo learns which of two answers is better, sft+dpo does both one after the other"
    a.trainer = a.trainer or ask("What to train", explained, "sft", _one_of(trainers))
    explained = "a local folder or a Hugging Face repository, as in Qwen/Qwen3-0.6B"
    a.model = _model(a.model) if a.model else ask("Model", explained, None, _model)
    a.data = _asked_data(a, "data", "Training data", a.trainer.partition("+")[0])
    if a.trainer == "sft+dpo":
        a.preference_data = _asked_data(a, "preference_data", "Preference data, of the second stage", "dpo")

    def hardware(text: str) -> str:
        propose.parse_hardware(text, cpu_gigabytes())
        return text

    def method(text: str) -> str:
        _settings(a, _one_of(methods)(text), a.max_length or SHORTEST)
        return text.lower()

    def length(text: str) -> int:
        _settings(a, a.method, _length(text))
        return int(text)

    def file(text: str) -> str:
        checked_path(text, "the file")
        toml_text.refuse_to_replace(Path(text), force=a.force)
        return text

    explained = "cpu, or the memory of a GPU, as in 24gb, or 8x80gb"
    a.hardware = a.hardware or ask("Hardware", explained, detected_hardware(), hardware)
    explained = "full trains all weights; lora trains thin matrices beside them; qlora does so beside 4-bit weights"
    a.method = a.method or ask("Method", explained, _usual_method(a), method)
    if ready := _ready(a, a.method, a.max_length):
        print(f"\nthe settings are those of {ready[0]}")
    elif a.max_length is None:
        measured = _measured(a, a.data)
        usual = str(measured.max_length if measured else propose.USUAL_LENGTH)
        a.max_length = ask("Longest document", "in tokens; longer ones are cut and counted", usual, length)
    usual = f"{a.model.rstrip('/').rpartition('/')[2].lower()}-{a.trainer.replace('+', '-')}-{a.method}.toml"
    a.output = a.output or a.file or ask("File", "the configuration that is written", usual, file)
    return a


def _asked_data(a: argparse.Namespace, option: str, question: str, trainer: str) -> str:
    explained = "a file or glob of rows (.jsonl .json .csv .tsv .txt .parquet), or a Hugging Face repository"

    def looked(path: str) -> str:
        print(f"  {look_at(path, trainer, a.model)[1]}")
        return path

    given = getattr(a, option)
    return looked(given) if given else _ask(question, explained, None, looked)


def _data_of(a: argparse.Namespace) -> list[tuple[str, str]]:
    return [(a.data, a.trainer.partition("+")[0])] + ([(a.preference_data, "dpo")] if a.trainer == "sft+dpo" else [])


def _ask(question: str, explained: str, default: str | None, parse: Callable[[str], Any]) -> Any:
    """Ask until the answer is valid. parse: the text -> the answer; raises UserError."""
    print(f"\n{question}: {explained}")
    while True:
        text = input(f"  [{default}] " if default else "  > ").strip() or default
        if text:
            try:
                return parse(text)
            except UserError as error:
                print(f"  {error.message}; {error.hint}" if error.hint else f"  {error.message}")


def _yes(question: str, *, default: bool) -> bool:
    text = input(f"\n{question} [{'Y/n' if default else 'y/N'}] ").strip().lower()
    return default if not text else text in ("y", "yes")


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise UserError(f"{text}: one of {', '.join(choices)}")
        return text.lower()

    return parse


def _length(text: str) -> int:
    if not text.isdecimal() or len(text) > 15 or int(text) < 2:
        raise UserError(f"{shortened(text, 60)}: a whole number of tokens, at least 2")
    return int(text)


def _model(text: str) -> str:
    folder = checked_path(text, "the model")
    if is_gguf(folder):
        return text
    if not os.path.isdir(folder) and (not is_repository_name(text) or text.lower().endswith(".gguf")):
        raise UserError(f"{text} is no folder, no GGUF file and no repository", hint="as in openai-community/gpt2")
    if os.path.isdir(folder) and not any(os.path.isfile(os.path.join(folder, name)) for name in MODEL_FILES):
        raise UserError(f"{text} holds no model", hint="name a folder with config.json or adapter_config.json in it")
    return text


# ------------------------------------------------------------------------------------------------- a proposal


def _ready(a: argparse.Namespace, method: str, max_length: int | None) -> tuple[str, dict[str, Any]] | None:
    """The file of configs/ for these answers (init/detect.py)."""
    if a.trainer == "sft+dpo":
        return None
    return ready_config(a.model, a.trainer, method, propose.parse_hardware(a.hardware, cpu_gigabytes()), max_length)


def _settings(a: argparse.Namespace, method: str, max_length: int | None) -> list[propose.Proposal]:
    """The settings of each stage. Raises UserError if they do not fit the memory."""
    if ready := _ready(a, method, max_length):
        name, values = ready
        values |= {"data.max_length": max_length} if max_length else {}
        values |= {"train.num_train_epochs": a.epochs} if a.epochs else {}
        return [propose.Proposal(values, {}, [f"the settings are those of {name}"])]
    hardware = propose.parse_hardware(a.hardware, cpu_gigabytes())
    arguments = method, model_size(a.model), hardware, max_length, a.epochs
    predict = predictor(a.model, hardware)
    return [propose.propose(trainer, *arguments, _measured(a, data), predict) for data, trainer in _data_of(a)]


def _measured(a: argparse.Namespace, data: str) -> propose.Rows | None:
    """`measure`, once for each data set."""
    measured = vars(a).setdefault("measured", {})
    if data not in measured:
        measured[data] = measure(data)
    return measured[data]


def _usual_method(a: argparse.Namespace) -> str:
    """All weights of a model below 2 B parameters, adapters beside a larger one; 4 bits where nothing else fits."""
    size = model_size(a.model)
    for method in propose.METHODS[size is not None and size.parameters >= 2e9 :]:
        try:
            _settings(a, method, a.max_length)
            return method
        except UserError:
            pass
    return propose.METHODS[-1]


def _proposed(a: argparse.Namespace) -> tuple[Path, str, int]:
    """(the file, its text, the number of devices). The text is a configuration that loads."""
    path = Path(checked_path(a.output or a.file or "run.toml", "the file"))
    a.output = str(path)
    hardware = propose.parse_hardware(a.hardware, cpu_gigabytes())
    size = model_size(a.model)
    header = [f"Written by: {_command(a)}", ""]
    parts = []
    for (data, trainer), made in zip(_data_of(a), _settings(a, a.method, a.max_length)):
        model = {"model.model_name_or_path": rebased(a.model, path.parent)}
        if "lora.r" in made.values and (adapter := adapter_config(a.model)):
            made.values["lora.r"] = adapter.get("r", made.values["lora.r"])  # it is trained further
            made.values.pop("lora.lora_alpha")
        row_format, _ = look_at(data, trainer, a.model)
        if row_format is not None and row_format.turns and not has_template(a.model):
            model["model.chat_template"] = "chatml"
        rows = {"data.train_data": rebased(data, path.parent)}
        if a.eval_data and trainer == a.trainer.partition("+")[2] or a.eval_data and "+" not in a.trainer:
            look_at(a.eval_data, trainer, a.model)
            rows["data.eval_data"] = rebased(a.eval_data, path.parent)
        elif (number := getattr(_measured(a, data), "number", None)) is None or number > 1:
            rows["data.eval_fraction"] = (
                0.02 if number is None or number >= 500 else max(0.1, round(1 / number + 0.005, 2))
            )
        parts.append((trainer, made.values | model | rows, made.remarks, made.arithmetic))
    header += [
        f"Model: {size or 'of unknown size'}. Hardware: {hardware}. init/propose.py has the rules behind these numbers."
    ]
    for trainer, _, _, arithmetic in parts:
        header += [f"  {trainer}: {line}" if len(parts) > 1 else f"  {line}" for line in arithmetic]
    header += ["", f"Start it: {_start(path, hardware.devices)}"]
    text = toml_text.configuration(
        header, [(name, values, remarks) for name, values, remarks, _ in parts], f"output/{path.stem}"
    )
    toml_text.refuse_broken(text, path)
    return path, text, hardware.devices


def _command(a: argparse.Namespace) -> str:
    names = (
        "trainer",
        "model",
        "data",
        "preference_data",
        "eval_data",
        "method",
        "hardware",
        "max_length",
        "epochs",
        "output",
    )
    given = [(name, getattr(a, name)) for name in names if getattr(a, name, None) is not None]
    return " ".join(
        ["minisft init", *(f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given)]
    )


# ------------------------------------------------------------------------------------------------- from elsewhere


def _imported(arguments: argparse.Namespace, name: str) -> tuple[Path, str, list[str], UserError | None]:
    """(the file, its text, lines to print, the error that keeps it from running)."""
    module, given = READERS[name], Path(getattr(arguments, f"from_{name}"))
    checked_path(given, f"--from-{name}")
    unused = [n for n in ("method", "hardware", "preference_data") if getattr(arguments, n)]
    unused += ["trainer"] if arguments.trainer and (name != "trl" or "+" in arguments.trainer) else []
    if unused:
        hint = "sft or dpo" if unused[0] == "trainer" and name == "trl" else "the file says it"
        raise UserError(f"--{unused[0].replace('_', '-')} with --from-{name}", hint=hint)
    path = Path(checked_path(arguments.output or arguments.file or f"{given.stem}.toml", "the file"))
    table = read_yaml(given)
    _refuse_other_trainer(table, name, given)
    if name == "stages":
        parts = stage_files.read(table, first_row)
    elif name == "llamafactory":
        parts = [("", llamafactory.read(table, None, first_row, given.parent))]
    else:
        parts = [("", module.read(table, arguments.trainer, first_row))]
    chosen = {"model": "model.model_name_or_path", "data": "data.train_data", "eval_data": "data.eval_data",
              "max_length": "data.max_length", "epochs": "train.num_train_epochs"}  # fmt: skip
    tables: list[toml_text.StageKeys] = []
    for i, (stage, t) in enumerate(parts):
        for option, key in chosen.items():
            if (value := getattr(arguments, option)) is not None and not (
                i and option in ("model", "data", "eval_data")
            ):
                t.values[key], t.origins[key] = value, f"--{option.replace('_', '-')}"
        rebase = {
            key: rebased(v, path.parent) if KEYS[key].metadata.get("is_path") in ("data", "model") else v
            for key, v in t.values.items()
        }
        tables.append((stage, rebase, t.origins))
    told = _told(parts)
    header = [f"Read from {module.NAME}: {given}", *told, "", f"Start it: {_start(path, 1)}"]
    common = table.get("output_dir") if name == "stages" else None
    for _, values, _ in tables:
        if common is not None and values.get("output_dir") == common:
            del values["output_dir"]  # then the stages are numbered
    text = toml_text.configuration(header, tables, common or f"output/{path.stem}")
    try:
        toml_text.refuse_broken(text, path)
        problem = None
    except UserError as error:
        problem = error
    lists = [line for stage, t in parts for line in _list(TRANSLATED, stage, t)]
    return path, text, [*lists, *told], problem


def _refuse_other_trainer(table: dict, name: str, given: Path) -> None:
    """Read as another trainer's, a file would be translated with the wrong defaults, and its own keys would be left out."""
    found = {trainer: [key for key in keys.split() if key in table] for trainer, keys in SIGNS.items()}
    likely = max(found, key=lambda trainer: len(found[trainer]))
    if name in SIGNS and not found[name] and len(found[likely]) >= 2:
        keys, theirs, its = ", ".join(found[likely][:3]), READERS[likely].NAME, READERS[name].NAME
        hint = f"minisft init --from-{likely} {shlex.quote(str(given))}"
        raise UserError(f"{given}: {keys} are keys of {theirs}, not of {its}", hint=hint)


def _told(parts: list[tuple[str, Translation]]) -> list[str]:
    return [line for kind in (DIFFERENCE, NO_COUNTERPART) for stage, t in parts for line in _list(kind, stage, t)]


def _list(kind: str, stage: str, t: Translation) -> list[str]:
    """One of the three lists, as lines; notes without effect are grouped by their reason."""
    notes = [note for note in t.notes if note.kind == kind]
    if not notes:
        return []
    titles = {TRANSLATED: "Translated", DIFFERENCE: "Differences", NO_COUNTERPART: "Without a counterpart"}
    lines = ["", f"{titles[kind]}{f' ({stage})' if stage else ''}:"]
    lines += [f"  {note.text}" for note in notes if not note.harmless]
    reasons: dict[str, list[str]] = {}
    for note in notes:
        if note.harmless:
            reasons.setdefault(note.text.partition(": ")[2], []).append(_written(note))
    return lines + [f"  no effect on the result: {', '.join(keys)} ({why})" for why, keys in reasons.items()]


def _written(note: Note) -> str:
    return note.text.partition(": ")[0]
