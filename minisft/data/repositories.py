"""Data sets of the hub by their name: which files of a repository are the rows, and where they are once downloaded.

No library reads a data set's own description here (that would need YAML, and sometimes its code): files are chosen by
their names, by rules that are few enough to say, and where they do not decide, the error lists what there is.

1. `data_files` of the source: globs or names, inside `data_dir` where that is given. Nothing else is looked at.
2. Else the files in `data_dir` (or anywhere) whose path names the split: train.jsonl, data/train-00000-of-00002.parquet,
   main/train-00000-of-00001.parquet, train/0000.parquet. Of several formats the first of FORMATS that has any is taken.
   `name` picks one of several configurations: the folder main/ there, as in load_dataset(path, name).
3. Else, for the split "train", the one readable file of the repository that names no split.
4. Else the same rules in the branch refs/convert/parquet, where the hub keeps converted copies: name/train/0000.parquet.

Code in a repository is never run, and files that are not chosen are not downloaded.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from minisft import hub
from minisft.data.sources import Source
from minisft.errors import DATA, UserError

FORMATS = (".parquet", ".jsonl", ".json", ".csv", ".txt")
CONVERTED = "refs/convert/parquet"
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "README.txt", "LICENSE.txt", "requirements.txt", "state.json")


def locate(source: Source, *, local_files_only: bool = False) -> Source:
    """The source with its files: unchanged where it is local, else downloaded, with the commit that they came from.

    Raises UserError (exit code DATA).
    """
    if source.files or not hub.is_repository_name(source.path):
        return source
    revision = source.revision or None
    listed, commit = hub.list_dataset(source.path, revision, local_files_only=local_files_only)
    files, why = choose_files(listed, source)
    if not files and revision is None and not source.data_files:
        converted, converted_commit = _converted(source.path, local_files_only)
        if converted:
            files, why = choose_files(converted, source)
            commit = converted_commit
    if not files:
        raise UserError(f"{source.path}: {why}", hint=_hint(listed), exit_code=DATA)
    paths = hub.download_dataset(source.path, commit, files, local_files_only=local_files_only)
    return replace(source, files=tuple(str(path) for path in paths), commit=commit)


def _converted(repo: str, local_files_only: bool) -> tuple[list[str], str]:
    try:
        return hub.list_dataset(repo, CONVERTED, local_files_only=local_files_only)
    except UserError:
        return [], ""


def _hint(listed: list[str]) -> str:
    shown = ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")
    return (
        f"name files by data_files, a configuration by name, a split by split; the repository has {shown or 'no file'}"
    )


def choose_files(listed: Iterable[str], source: Source) -> tuple[list[str], str]:
    """(the files of a repository that hold the rows of `source`, what is wrong where there are none).

    Raises UserError where several configurations or nothing but another split fit.
    """
    folder = f"{source.data_dir.strip('/')}/" if source.data_dir else ""
    inside = [file for file in sorted(listed) if file.startswith(folder)]
    if source.data_files:
        patterns = [folder + pattern for pattern in source.data_files]
        for pattern in patterns:
            if not any(fnmatchcase(file, pattern) for file in inside):
                return [], f"no file matches {pattern!r}"
        return [file for file in inside if any(fnmatchcase(file, pattern) for pattern in patterns)], ""

    readable = [
        f for f in inside if f.endswith(FORMATS) and PurePosixPath(f).name not in NOT_DATA and not f.startswith(".")
    ]
    if not readable:
        return [], f"no file of a format that can be read ({' '.join(FORMATS)})"
    splits = {file: split_of(file) for file in readable}
    wanted = SPLITS.get(source.split_name, source.split_name)
    files = [file for file, split in splits.items() if split == wanted]
    if not files and wanted == "train" and len(readable) == 1 and splits[readable[0]] is None:
        files = readable
    if not files:
        there = sorted({split for split in splits.values() if split})
        return [], f"no file of the split {source.split_name!r}" + (f"; there are {', '.join(there)}" if there else "")
    kind = next(kind for kind in FORMATS if any(file.endswith(kind) for file in files))
    files = [file for file in files if file.endswith(kind)]

    configurations: dict[str, list[str]] = {}
    for file in files:
        configurations.setdefault(_configuration(file, folder), []).append(file)
    if len(configurations) == 1 and (not source.name or "" in configurations or source.name in configurations):
        return files, ""
    if source.name in configurations:
        return configurations[source.name], ""
    names = ", ".join(sorted(name for name in configurations if name)) or "none"
    raise UserError(
        f"{source.path}: {f'no configuration {source.name!r}' if source.name else 'several configurations'}; there are {names}",
        hint='pick one, as in {path = "owner/name", name = "main"}',
        exit_code=DATA,
    )


def split_of(file: str) -> str | None:
    """The split that a path names, by its file or its nearest folder: "train" for data/train-00000-of-00002.parquet."""
    path = PurePosixPath(file)
    for part in (path.name.removesuffix(path.suffix), *reversed(path.parts[:-1])):
        words = re.split(r"[-_.]", part)
        for word in (part, words[0], words[-1]):
            if word.lower() in SPLITS:
                return SPLITS[word.lower()]
    return None


def _configuration(file: str, folder: str) -> str:
    """The folder that holds a file, without those that name a split or mean nothing."""
    parts = [part for part in PurePosixPath(file.removeprefix(folder)).parts[:-1]]
    return "/".join(part for part in parts if part not in SPLITS and part != "data")
