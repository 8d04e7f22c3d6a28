"""What `minisft init` detects: the hardware, the size of a model, the layout of rows, and a ready configuration.

Nothing here imports torch or uses the network.
"""

import os
import re
import shutil
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

from minisft.config.load import READY, load
from minisft.config.sections import Config, config_to_dict
from minisft.data.detect_format import detect_row_format
from minisft.data.row_format import FormatOptions, RowFormat
from minisft.data.rows import BadRow, Row, RowError
from minisft.data.sources import list_files, parse_source, read_rows
from minisft.errors import UserError
from minisft.gguf.config import config_of
from minisft.gguf.file import is_gguf, open_gguf
from minisft.hub import is_repository_name
from minisft.init.propose import Hardware, Predict, Rows, Size, size_from_config, size_from_name
from minisft.memory import memory_bytes
from minisft.strict_json import read_json

OF_THE_DATA = ("data.train_data", "data.eval_data", "data.format", "data.field_map", "data.dataset_text_field",
               "data.eval_fraction", "evaluate.generate_data", "evaluate.generate_group_field", "output_dir")  # fmt: skip
READY_FOR = re.compile(r"^# Hardware: ((?:one GPU|(\d+) GPUs) with (\d+) GB)", re.MULTILINE)  # in their headers


MOST_ROWS = 100_000  # are read to measure a data set; more are a long run in any case


def cpu_gigabytes() -> float:
    return memory_bytes() / 1e9


def detected_hardware() -> str:
    """The GPUs that nvidia-smi lists, as --hardware takes them; "cpu" where there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "cpu"
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
        sizes = [int(line) for line in done.stdout.split("\n") if line.strip().isdecimal()]
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    if done.returncode or not sizes:
        return "cpu"
    gigabytes = round(min(sizes) * 2**20 / 1e9)
    return f"{len(sizes)}x{gigabytes}gb" if len(sizes) > 1 else f"{gigabytes}gb"


def adapter_config(model: str) -> dict[str, Any] | None:
    """The adapter_config.json of a local adapter; None for any other model."""
    folder = folder_of(model)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return None
    return read_json(folder / "adapter_config.json")


def model_size(model: str) -> Size | None:
    """The size by the config.json of a local folder or by a GGUF file, else by the name; for an adapter, the size of its base."""
    if adapter := adapter_config(model):
        return model_size(str(adapter.get("base_model_name_or_path")))
    if is_gguf(model):
        return size_from_config(config_of(open_gguf(model)))
    path = folder_of(model) / "config.json"
    if path.is_file() and isinstance(hf := read_json(path), dict) and (size := size_from_config(hf)):
        return size
    return size_from_name(model)


def config_table(model: str) -> dict | None:
    """The config.json of a local model, of the base of a local adapter, or of a GGUF file; None for a repository."""
    if adapter := adapter_config(model):
        return config_table(str(adapter.get("base_model_name_or_path")))
    if is_gguf(model):
        return config_of(open_gguf(model))
    path = folder_of(model) / "config.json"
    table = read_json(path) if path.is_file() else None
    return table if isinstance(table, dict) else None


def predictor(model: str, hardware: Hardware) -> Predict | None:
    """What `minisft plan` predicts for a model on this hardware; None without a config.json, or with one that is not trained."""
    from minisft.model.families import from_hf
    from minisft.plan.changes import with_keys
    from minisft.plan.memory import MicroBatch, Place, describe, predict

    table = config_table(model)
    try:
        config = from_hf(table) if table is not None else None
    except UserError:
        return None
    if config is None:
        return None
    threads = os.cpu_count() or 1
    place = Place(
        not hardware.is_cpu, hardware.devices, threads=threads, precision="fp32" if hardware.is_cpu else "bf16"
    )

    def predicted(keys: dict[str, Any], tokens: int) -> tuple[float, str]:
        memory = predict(with_keys(Config(), keys), config, MicroBatch(tokens, tokens), place)
        return memory.total, describe(memory)

    return predicted


def folder_of(model: str) -> Path:
    """The folder of a local model: the one that is named or, for a run's output folder, the `model` in it."""
    path = Path(os.path.expanduser(model))
    return path / "model" if (path / "model").is_dir() else path


def has_template(model: str) -> bool:
    """Whether the tokenizer of a local folder has a chat template; assumed for a repository."""
    folder = folder_of(model)
    if (adapter := adapter_config(model)) and not (folder / "tokenizer_config.json").exists():
        return has_template(str(adapter.get("base_model_name_or_path")))
    if is_gguf(model):
        return "tokenizer.chat_template" in open_gguf(model).values
    if not folder.is_dir() or (folder / "chat_template.jinja").exists():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))


def first_row(source: Any) -> dict | None:
    """The first row of a local source; None if no row can be read."""
    entry: Any = source[0] if isinstance(source, list) and source else source
    try:
        parsed = parse_source(entry)
        if is_repository_name(parsed.path):
            return None
        list_files(parsed)
        row = next(iter(read_rows(parsed)), None)
    except UserError:
        return None
    return getattr(row, "data", None)


def measure(path: str) -> Rows | None:
    """The number and the lengths of the rows of a local source, by its first 100,000; None for a repository."""
    parsed = parse_source(path)
    if is_repository_name(parsed.path):
        return None
    lengths = sorted(characters(row.data) for row in islice(read_rows(parsed), MOST_ROWS) if isinstance(row, Row))
    return Rows(len(lengths), sum(lengths), lengths[int(0.99 * (len(lengths) - 1))]) if lengths else None


def characters(value: Any) -> int:
    """Of all strings in a row."""
    if isinstance(value, dict):
        return sum(map(characters, value.values()))
    if isinstance(value, list):
        return sum(map(characters, value))
    return len(value) if isinstance(value, str) else 0


def look_at(path: str, trainer: str, model: str) -> tuple[RowFormat | None, str]:
    """(format of the rows, None for a repository; the same in words). Raises UserError for unusable data."""
    parsed = parse_source(path)
    if is_repository_name(parsed.path):
        return None, "a repository: its rows are checked when the run starts"
    list_files(parsed)
    row = next(iter(read_rows(parsed)), None)
    if row is None:
        raise UserError(f"{path} has no rows", hint="one JSON object a line, as in .jsonl")
    if isinstance(row, BadRow):
        raise UserError(str(row), hint="mend the row")
    options = FormatOptions(answers="pairs" if trainer == "dpo" else "chosen")
    try:
        row_format = detect_row_format(row.data, "auto", options, True)
        if has_template(model):
            return row_format, str(row_format)
        if row_format.turns:
            return row_format, f"{row_format}; the tokenizer has no chat template: chatml is proposed"
        row_format = detect_row_format(row.data, "auto", options, False)
        return row_format, str(row_format)
    except RowError as error:
        raise UserError(f"{path}: {error}") from None
    except UserError as error:  # no format has these fields
        raise UserError(f"{path}: {error.message}", hint=error.hint, exit_code=error.exit_code) from None


def ready_config(
    model: str, trainer: str, method: str, hardware: Hardware, max_length: int | None = None
) -> tuple[str, dict[str, Any]] | None:
    """(name and hardware, the keys that it sets) of a file of configs/ for this model, trainer and method. None if there is
    none, or only one for more memory, another number of devices or a smaller max_length."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    for path in sorted(READY.glob("*.toml"), key=lambda path: (len(path.name), path.name)):  # -sft before -sft-long
        made_for = READY_FOR.search(path.read_text(encoding="utf-8"))
        if made_for is None or hardware.is_cpu:
            continue
        if int(made_for[2] or 1) != hardware.devices or int(made_for[3]) > hardware.gigabytes:
            continue
        try:
            config, origins = load(path)
        except UserError:  # one of several stages, or for another machine
            continue
        theirs = (config.model.model_name_or_path or "").rstrip("/").rpartition("/")[2].lower()
        quantised = config.model.load_in_4bit or config.model.load_in_8bit
        its_method = "full" if config.lora.r is None else "qlora" if quantised else "lora"
        is_too_short = (max_length or 0) > (config.data.max_length or 0)
        if (theirs, config.trainer_type, its_method) == (last, trainer, method) and not is_too_short:
            set_there = {k: v for k, v in config_to_dict(config).items() if not origins[k].startswith("default")}
            values = {k: v for k, v in set_there.items() if k not in OF_THE_DATA} | {"trainer_type": trainer}
            return f"configs/{path.name}, for {made_for[1]}", values
    return None


def rebased(value: Any, folder: Path) -> Any:
    """The value with its local paths relative to `folder`, where the configuration will be."""
    if isinstance(value, list):
        return [rebased(one, folder) for one in value]
    if isinstance(value, dict):
        return {k: rebased(v, folder) if k == "path" or "path" not in value else v for k, v in value.items()}
    if not isinstance(value, str) or os.path.isabs(value) or value.startswith("~"):
        return value
    name = value.partition("[")[0]
    there = os.path.exists(name) or any(letter in name for letter in "*?") and not is_repository_name(name)
    return os.path.relpath(value, folder) if there else value
