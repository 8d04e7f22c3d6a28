"""The record of a run: what went into it, by hash, so that two runs can be compared and one can be repeated.

<output_dir>/record.json has an entry for each start of the run, the first one and every resume:

    step        how many steps were taken before it
    base        the model that it started from: its commit, or the hash of its files; the adapter on it
    tokenizer, template    hashes of the files, and of the chat template's text
    data        the hash of every file, and of the tokens that were made of them
    code        hashes of minisft's and of its kernels' files
    versions, machine      packages, Python, CUDA; processor, cards, threads, ranks

Nothing is read twice for it. Data files were hashed for the token cache, our own model folders have a manifest with hashes,
and the files of the hub are named by theirs. Only the weights of other local folders are hashed here, once: a resume takes
the hash from the record if size and time of the file are the same.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minisft import ranks
from minisft.atomic_folder import MANIFEST, read_manifest, write_file
from minisft.checkpoint import checkpoints, step_of
from minisft.config.load import RESOLVED_NAME, load
from minisft.config.sections import Config, source_list
from minisft.data.cache import Documents, TokenCache
from minisft.data.chunks import read_formats, read_places
from minisft.data.tokenizer import Tokenizer
from minisft.errors import DATA, UserError, warn
from minisft.model.start import Start
from minisft.prepare.data import Chunks, open_documents
from minisft.prepare.options import prepare_tokenizer
from minisft.prepare.run import Run
from minisft.strict_json import dump_json, read_json

NAME = "record.json"
PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors", "jinja2", "huggingface-hub")
WEIGHTS = ("*.safetensors", "*.gguf", "*.json")
PACKAGE = Path(__file__).parent
CONTENT_HASH = re.compile(r"[0-9a-f]{64}")  # a file of the hub's local cache has its sha256 for a name


def add_start(run: Run, folder: Path, is_resumed: bool) -> None:
    """Add this start to folder/record.json; a run that begins anew has a new one. A record that cannot be made is a warning."""
    try:
        earlier = read_record(folder) if is_resumed else []
        entry = describe(run, earlier)
        write_file(folder / NAME, dump_json({"format": 1, "starts": [*earlier, entry]}).decode() + "\n")
    except (UserError, OSError) as error:
        warn(f"{folder / NAME} could not be written: {error}")


def read_record(folder: Path) -> list[dict]:
    """The starts of a run, oldest first; [] where there is no record. Raises UserError for a file that is none."""
    path = folder / NAME
    if not path.exists():
        return []
    starts = read_json(path).get("starts")
    if not isinstance(starts, list) or not all(isinstance(entry, dict) for entry in starts):
        raise UserError(f"{path} is no record of a run", hint="remove it: the next start writes another one")
    return starts


def read_config(folder: Path) -> Config:
    """The configuration of the run in an output folder."""
    return load(folder / RESOLVED_NAME, {"output_dir": str(folder)}, origin="command line")[0]


def trained_stream(folder: Path) -> Chunks | None:
    """The stream that the run in an output folder was trained on; None where its data was read as a whole. Raises UserError where
    a repository has another commit now, or a line before the chunk of the newest checkpoint is another one."""
    config = read_config(folder)
    if not config.data.stream:
        return None
    stream, starts = Chunks(config, prepare_tokenizer(config)[0]), read_record(folder)
    commits = starts[-1]["data"]["train"].get("commits", {}) if starts else {}
    for source in stream.sources:
        if (was := commits.get(source.label, source.commit)) != source.commit:
            problem = f"{source.path} is at commit {source.commit[:12]}, and this run was trained on {was[:12]}"
            raise UserError(problem, hint="revision = names a commit in config.toml", exit_code=DATA)
    newest = max(checkpoints(folder / "checkpoints"), key=step_of, default=None)
    if newest is not None and (position := read_json(newest / "trainer_state.json").get("stream")):
        stream.require_unchanged(read_places(position["begin"]))
        stream.formats |= read_formats(position.get("formats", {}))
    return stream


def trained_documents(folder: Path) -> tuple[Documents, Tokenizer]:
    """The training documents of the run in an output folder, from its token cache, and its tokenizer. Raises UserError where the
    data is not what was trained any more. Of a stream no cache has all of it: see trained_stream."""
    config = read_config(folder)
    tokenizer, _ = prepare_tokenizer(config)
    documents, _ = open_documents(source_list(config.data.train_data), config, tokenizer, config.data.packing)
    starts = read_record(folder)
    if starts and starts[-1]["data"]["train"]["tokens"] != documents.cache.fingerprint:
        hint = "put back the files that the run was trained on; `minisft diff` compares two runs"
        raise UserError("the training data is not what this run was trained on", hint=hint, exit_code=DATA)
    return documents, tokenizer


def flat(entry: dict, before: str = "") -> dict[str, Any]:
    """{"versions torch": ...} of the nested tables of a start, to compare it with another. Files of data go by their names: the
    folder is no difference, contents are. When a file was written is none either."""
    found = {}
    for key, value in entry.items():
        if key == "time" and before.startswith("base"):
            continue
        if isinstance(value, dict):
            if key == "files" and before.startswith("data"):
                found |= {f"{before}file {Path(path).name}": digest for path, digest in value.items()}
            else:
                found |= flat(value, f"{before}{key} ")
        else:
            found[before + key] = value
    return found


def describe(run: Run, earlier: list[dict]) -> dict[str, Any]:
    """The entry of a start. earlier: those of this run before it."""
    template = run.tokenizer.template
    sets = {"train": run.train, **{f"eval {name}".strip(): loader for name, loader in run.evals.items()}}
    return {
        "step": run.progress.step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "base": describe_base(run.start, earlier),
        "tokenizer": hash_of({name: sha(data) for name, data in run.tokenizer.files.items()}),
        "template": sha(template.text.encode()) if template is not None else None,
        "data": {name: describe_data(loader.documents.cache) for name, loader in sets.items()},
        "code": code(),
        "versions": versions(),
        "machine": machine(run.device),
    }


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_of(table: dict[str, Any]) -> str:
    return sha(dump_json(table))


def hash_files(folder: Path, pattern: str) -> str:
    """One hash of some files, by their names and contents."""
    paths = sorted(path for path in folder.glob(pattern) if "__pycache__" not in path.parts)
    return hash_of({path.relative_to(folder).as_posix(): sha(path.read_bytes()) for path in paths})


@cache  # later runs of this process have the same modules, whatever the files have become
def code() -> dict[str, str]:
    import minisft.kernels.common

    kernels = Path(minisft.kernels.common.__file__).parent
    return {"minisft": hash_files(PACKAGE, "**/*.py"), "kernels": hash_files(kernels, "*.py")}


# ---- the model and the data ---------------------------------------------------------------------------------------


def describe_base(start: Start | None, earlier: list[dict]) -> dict[str, Any]:
    if start is None:
        return {"name": "random weights"}
    files = {} if start.commit else file_hashes(start.folder, known_hashes(earlier))
    adapter = file_hashes(start.adapter, {}) if start.adapter else {}
    found = {"name": start.name, "commit": start.commit, "files": files, "adapter": adapter}
    return {key: value for key, value in found.items() if value}


def known_hashes(earlier: list[dict]) -> dict[str, dict]:
    return earlier[-1].get("base", {}).get("files", {}) if earlier else {}


def file_hashes(path: Path, known: dict[str, dict]) -> dict[str, dict]:
    """{name: {sha256, bytes, time}} of a model's files. known: of an earlier start."""
    if path.is_file():
        files = [path]
    elif (path / MANIFEST).exists():
        return {name: {"sha256": entry["sha256"]} for name, entry in read_manifest(path)["files"].items()}
    else:
        files = sorted({file for pattern in WEIGHTS for file in path.glob(pattern) if file.is_file()})

    def describe_file(file: Path) -> dict[str, Any]:
        status = os.stat(file)
        entry = {"bytes": status.st_size, "time": status.st_mtime_ns}
        before = known.get(file.name, {})
        if "sha256" in before and {key: before.get(key) for key in entry} == entry:
            return before
        target = Path(os.path.realpath(file)).name
        if CONTENT_HASH.fullmatch(target):
            return {"sha256": target, **entry}
        with open(file, "rb") as stream:
            return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), **entry}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing does not hold the interpreter
        return {file.name: entry for file, entry in zip(files, threads.map(describe_file, files))}


def describe_data(cache: TokenCache) -> dict[str, Any]:
    """The hash of each file is that of the hashes of its blocks, which the token cache is named by."""
    commits = {source.label: source.commit for source in cache.sources if source.commit}
    return {"tokens": cache.fingerprint, "files": cache.file_hashes, **({"commits": commits} if commits else {})}


# ---- versions and machine -----------------------------------------------------------------------------------------


@cache  # each is parsed from a file of its package's metadata
def versions() -> dict[str, str]:
    found = {"minisft": sys.modules["minisft"].__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}


def machine(device: torch.device) -> dict[str, Any]:
    """What rounding and order of sums may depend on."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "ranks": ranks.world_size(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    driver = Path("/proc/driver/nvidia/version")
    if device.type == "cuda" and driver.exists():
        found["driver"] = driver.read_text().partition("\n")[0]
    return found


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
