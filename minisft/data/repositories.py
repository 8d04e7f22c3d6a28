"""Data sets of the hub by their name: which files of a repository are the rows, and where they are once downloaded.

The first rule that applies decides. If none does, the error lists the files; nothing is guessed.

1. `data_files` of the source: names or globs (* stays in its folder, ** does not), inside `data_dir`. All are "train".
2. Without data_dir, `configs` in the YAML at the top of README.md: the files of each configuration by split.
3. The names of the files. The file, or else the nearest folder with such a name, is named after the split; the other
   folders (except data/) are the configuration:

       train.jsonl.gz   data/train-00000-of-00002.parquet   main/test-00000-of-00001.parquet   default/train/0000.parquet

   Exactly the split's name wins (train before train_extra), else the only name that has it as a word (gsm8k_train).
   valid, val and dev mean validation, eval means test. Rows have the suffixes of sources.py. If a split has files of several
   formats, the first of READERS is used, and plain files before packed ones. If all files have the same name without a split
   in it (alpaca_data.json), they are "train".
4. If no file can be read, or the data set is made by a script of the repository: the files that the hub has converted, in
   the branch refs/convert/parquet, by rule 3. Not if a `revision` is given, because the branch does not follow it.

`name` chooses one of several configurations, as in load_dataset(path, name); the default is the only one, or "default".
Code in a repository is never run, and only the chosen files and README.md are downloaded.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import PurePosixPath
from typing import Any

from minisft import hub
from minisft.data.sources import COMPRESSED, READERS, Source, file_kind
from minisft.errors import DATA, UserError

KINDS = [kind for kind in product(READERS, ("", *COMPRESSED)) if kind[0] != ".parquet" or not kind[1]]
SPLITS = {  # words in names of files and folders -> the split that they mean
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SHARD = re.compile(r"(^|[-_.])\d+(-of-\d+)?(-[0-9a-f]{16})?$")  # the end of train-00000-of-00002-a3ecf92756993583
NOT_ROWS = ("README.txt", "LICENSE.txt", "requirements.txt", "config.json", "state.json", "dataset_dict.json")
NOT_ROWS += ("dataset_info.json", "dataset_infos.json")
DECLARED_KEYS = {"config_name", "data_files", "data_dir", "default", "description", "version", "features"}


def locate(source: Source, *, local_files_only: bool = False, download: bool = True) -> Source:
    """The source with its files, which are downloaded, and their commit; a local source unchanged. download=False: with their
    names in the repository.

    Raises UserError (exit code DATA).
    """
    if source.files or not hub.is_repository_name(source.path):
        return source
    repo, local = source.path, local_files_only
    listed, commit = hub.list_dataset(repo, source.revision or None, local_files_only=local)
    configs = None
    if "README.md" in listed and not source.data_files and not source.data_dir:
        configs = hub.read_card(repo, commit, local_files_only=local).get("configs")
    files = choose_files(listed, source, configs)
    if not files:
        problem = "a script made it (scripts are not run)" if _script(listed, repo) else "it has no file of rows"
        if source.data_dir:
            raise _error(source, f"{problem} in {source.data_dir}", listed)
        if source.revision:
            raise _error(source, f"{problem}; the hub's converted copy is read only where no revision is given", listed)
        converted, commit = hub.list_dataset(repo, hub.CONVERTED, local_files_only=local)
        if not (files := choose_files(converted, source)):
            raise _error(source, f"{problem}, and the hub has no converted copy", listed)
    paths = hub.download_dataset(repo, commit, files, local_files_only=local) if download else files
    return replace(source, files=tuple(map(str, paths)), commit=commit)


def choose_files(listed: Iterable[str], source: Source, configs: Any = None) -> list[str]:
    """The files of a repository that hold the rows of `source`, by rules 1 to 3 above; none if rule 4 applies.

    listed: paths of all its files. configs: those of its README.md. Raises UserError.
    """
    listed = sorted(listed)
    if source.data_files:
        return _by_pattern(listed, source)
    if configs and not source.data_dir:
        return _declared(listed, source, configs)
    if _script(listed, source.path) and not source.data_dir:
        return []
    return _by_name(listed, source)


# ------------------------------------------------------------------------------------------------- the three rules


def _by_pattern(listed: list[str], source: Source) -> list[str]:
    if source.split_name != "train":
        raise _error(source, f"split = {source.split!r}, but data_files have no other split than train", listed)
    folder = f"{source.data_dir.strip('/')}/" if source.data_dir else ""
    return _matching(listed, [folder + pattern for pattern in source.data_files], source)


def _declared(listed: list[str], source: Source, configs: Any) -> list[str]:
    """Files by the `configs` of a README.md: a list of tables with config_name, data_files, perhaps data_dir, default."""
    try:
        default = next((c["config_name"] for c in configs if c.get("default")), "default")
        by_name = {c["config_name"]: c for c in configs}
        config = by_name[_pick(source, by_name, listed, default)]
        folder = f"{config['data_dir'].strip('/')}/" if config.get("data_dir") else ""
        splits: dict[str, list[str]] = {}
        for entry in _as_list(config.get("data_files", "**")):
            entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
            splits.setdefault(entry["split"], []).extend(folder + path for path in _as_list(entry["path"]))
    except (AttributeError, KeyError, TypeError):
        raise _error(
            source, f"its README.md declares configs in a way unknown here: {configs!r:.200}", listed
        ) from None
    if unknown := config.keys() - DECLARED_KEYS:
        what = ", ".join(f"{key} = {config[key]!r:.40}" for key in sorted(unknown))
        raise _error(source, f"its README.md asks for a special way of reading ({what})", listed)
    if "data_files" not in config:
        return _by_name([file for file in listed if file.startswith(folder)], replace(source, data_dir=folder))
    if source.split_name not in splits:
        raise _error(source, f"no split {source.split_name!r}; there are {', '.join(sorted(splits))}", listed)
    patterns = splits[source.split_name]
    if not any(_is_readable(file) for pattern in patterns for file in _glob(listed, pattern)):
        return []
    return _matching(listed, patterns, source)


def _by_name(listed: list[str], source: Source) -> list[str]:
    folder = f"{source.data_dir.strip('/')}/" if source.data_dir else ""
    found: dict[str, dict[str, list[str]]] = {}  # configuration -> split -> files
    for file in listed:
        if file.startswith(folder) and _is_readable(file):
            configuration, split = _configuration_and_split(file.removeprefix(folder))
            found.setdefault(configuration, {}).setdefault(split, []).append(file)
    if not found:
        return []
    if source.name and source.name in found:
        found = {source.name: found[source.name]}
    wanted = SPLITS.get(source.split_name, source.split_name)
    holding = {name: files for name, splits in found.items() if (files := _of_split(splits, wanted))}
    names = sorted({split for splits in found.values() for split in splits})
    if not holding and wanted == "train" and len(found) == len(names) == 1 and not _splits_in(names[0]):
        holding = {name: splits[names[0]] for name, splits in found.items()}
    if not holding:
        raise _error(source, f"no split {source.split_name!r}; by their names, files are of {', '.join(names)}", listed)
    files = holding[_pick(source, holding, listed, "default")]
    kind = next(kind for kind in KINDS if kind in map(file_kind, files))
    return [file for file in files if file_kind(file) == kind]


# ------------------------------------------------------------------------------------------------- names and patterns


def _configuration_and_split(file: str) -> tuple[str, str]:
    """("main", "train") for main/train-00000-of-00001.parquet. A file that names no split is a split of its own."""
    *folders, name = PurePosixPath(file).parts
    stem = SHARD.sub("", name[: -len("".join(file_kind(name)))])
    named = next((part for part in (stem, *reversed(folders)) if _splits_in(part)), None)
    if not stem and len(folders) >= 2:  # configuration/split/0000.parquet, whatever the split is called
        named = folders[-1]
    configuration = "/".join(part for part in folders if part not in (named, "data") and part not in SPLITS)
    label = named or stem or (folders[-1] if folders else "")
    return configuration, SPLITS.get(label, label)


def _splits_in(name: str) -> set[str]:
    """The splits that are a word of a name: {"train"} for gsm8k_train."""
    return {SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS}


def _of_split(splits: dict[str, list[str]], wanted: str) -> list[str]:
    if wanted in splits:
        return splits[wanted]
    near = [name for name in splits if wanted in _splits_in(name) and not name.startswith("partial-")]
    return splits[near[0]] if len(near) == 1 else []


def _pick(source: Source, names: Iterable[str], listed: list[str], default: str) -> str:
    """The configuration that the source means. If the repository has no configurations, `name` is only a label."""
    names = list(names)
    if source.name and source.name in names:
        return source.name
    if len(names) == 1 and (not source.name or names[0] in ("", "default")):
        return names[0]
    if not source.name and default in names:
        return default
    problem = f"no configuration {source.name!r}" if source.name else "several configurations and no name"
    shown = ", ".join(sorted(name or "one outside of folders" for name in names))
    raise _error(source, f"{problem}; there are {shown}", listed)


def _matching(listed: list[str], patterns: list[str], source: Source) -> list[str]:
    """The files of each pattern in turn, each file once. A glob skips files of other formats; a name must not be one."""
    files: dict[str, None] = {}
    for pattern in patterns:
        found = _glob(listed, pattern)
        readable = [file for file in found if _is_readable(file)]
        if not readable:
            what = f"{', '.join(found[:3])}: not a file of rows" if found else f"no file matches {pattern!r}"
            raise _error(
                source, f"{what}; what can be read ends in {' '.join(READERS)}, also {' '.join(COMPRESSED)}", listed
            )
        files |= dict.fromkeys(readable)
    return list(files)


def _is_readable(file: str) -> bool:
    path = PurePosixPath(file)
    is_hidden = any(part.startswith(".") for part in path.parts)
    return file_kind(file) in KINDS and path.name not in NOT_ROWS and not is_hidden


def _glob(listed: list[str], pattern: str) -> list[str]:
    parts = pattern.removeprefix("./").split("/")
    return [file for file in listed if file == pattern or _matches(file.split("/"), parts)]


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern or not parts:
        return not parts and not pattern
    if pattern[0] == "**":
        return _matches(parts, pattern[1:] or ["*"]) or _matches(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _script(listed: Iterable[str], repo: str) -> bool:
    return f"{repo.partition('/')[2]}.py" in listed


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _error(source: Source, problem: str, listed: list[str]) -> UserError:
    shown = [file for file in listed if not file.startswith(".")]
    files = ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
    hint = f"set name (the configuration), split, data_dir or data_files; its files: {files or 'none'}"
    return UserError(f"{source.path}: {problem}", hint=hint, exit_code=DATA)
