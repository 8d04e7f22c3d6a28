"""Where the rows of a TRL file are. There are three forms: TRL's `dataset_name`, TRL's list `datasets`, and the mixtures of
the alignment handbook, whose recipes are TRL files with keys of their own:

    dataset_mixer: {owner/name: 1.0}             with dataset_splits: [train_sft, test_sft] and dataset_configs
    dataset_mixture: {datasets: [{id: owner/name, config: ..., split: ..., weight: 0.5}], seed: 0}
"""

from minisft.hub import is_repository_name
from minisft.importers.translation import (
    TRANSLATED,
    Translation,
    as_list,
    as_number,
    loaded_files,
    local_split,
    source,
)

NO_COLUMNS = "fields that no format names are never read"


def sources(t: Translation) -> None:
    """data.train_data and data.eval_data; the first of the forms that the file has wins."""
    wants_eval = t.on("eval_strategy") or t.on("evaluation_strategy")
    _one_dataset(t, wants_eval)
    for prefix, names in (("datasets", {}), ("dataset_mixture.datasets", {"id": "path", "config": "name"})):
        _mixture(t, prefix, names)
    _mixer(t, wants_eval)
    if "dataset_mixture.seed" in t.left:
        t.nothing("dataset_mixture.seed", "train.seed is for everything", harmless=True)
    if "dataset_mixture.test_split_size" in t.left:
        t.into("dataset_mixture.test_split_size", "data.eval_fraction")


def _set(t: Translation, ours: str, found: list, origin: str) -> None:
    if found and ours not in t.values:
        t.values[ours] = found if len(found) > 1 else found[0]
        t.origins[ours] = origin


def _one_dataset(t: Translation, wants_eval: bool) -> None:
    name, config = t.get("dataset_name"), t.get("dataset_config")
    split, test = t.get("dataset_train_split", "train"), t.get("dataset_test_split", "test")
    if isinstance(name, str):
        t.into("dataset_name", "data.train_data", source(name, name=config, split=local_split(name, split)))
        has_test = wants_eval and is_repository_name(name)
        if has_test:
            _set(t, "data.eval_data", [source(name, name=config, split=test)], f"dataset_name, split {test}")
        for key in ("dataset_config", "dataset_train_split"):
            if key in t.left:
                t.take(key, TRANSLATED, "data.train_data")
        if "dataset_test_split" in t.left:
            if has_test:
                t.take("dataset_test_split", TRANSLATED, "data.eval_data")
            elif not wants_eval:
                t.nothing("dataset_test_split", "eval_strategy is off", harmless=True)
            else:
                t.nothing("dataset_test_split", f"{name} has no splits")
        if wants_eval and not has_test:
            t.difference(
                f"no evaluation: {name} has no splits; name data.eval_data, or hold rows out by data.eval_fraction"
            )
    for key in ("dataset_config", "dataset_train_split", "dataset_test_split"):
        if key in t.left:
            t.nothing(key, "there is no dataset_name", harmless=True)


def _mixture(t: Translation, prefix: str, names: dict[str, str]) -> None:
    """A list of tables. names: {their name of a field: ours}."""
    found, i = [], 0
    while any(key.startswith(f"{prefix}[{i}].") for key in t.left):
        written = {key.partition("].")[2]: key for key in t.left if key.startswith(f"{prefix}[{i}].")}
        keys = {names.get(name, name): key for name, key in written.items()}
        entries = {name: t.left[keys[name]] for name in ("name", "data_dir") if name in keys}
        split = t.left.get(keys.get("split", ""))
        if (weight := as_number(t.left.get(keys.get("weight", "")))) is not None and 0 < weight < 1:
            entries["weight"] = weight
        paths, entries["data_files"] = loaded_files(
            t.left.get(keys.get("path", "")), as_list(t.left.get(keys.get("data_files", "")))
        )
        found += [source(str(path), split=local_split(path, split), **entries) for path in paths if path]
        for name, key in keys.items():
            if name == "fraction":
                if t.get(key) is not None:
                    why = "a share of the mixture there; here all rows are taken: cut them by a slice, split = "
                    t.nothing(key, why + '"train[:20%]"')
                else:
                    t.nothing(key, "empty", harmless=True)
            elif name == "columns" or name.startswith("columns."):
                t.nothing(key, NO_COLUMNS, harmless=True)
            elif name in ("path", "name", "split", "data_dir", "data_files", "weight"):
                t.take(key, TRANSLATED, "data.train_data")
            else:
                t.nothing(key, "a source of rows has no such option")
        i += 1
    _set(t, "data.train_data", found, prefix)


def _mixer(t: Translation, wants_eval: bool) -> None:
    """The handbook's older way: the first part of each data set's training splits, and all of its test splits."""
    parts = {key: as_number(t.left[key]) for key in t.left if key.startswith("dataset_mixer.")}
    splits = [str(split) for split in as_list(t.get("dataset_splits"))] or ["train", "test"]
    configs = as_list(t.get("dataset_configs"))
    train, test = [], []
    for i, (key, part) in enumerate(parts.items()):
        path, name = key.partition(".")[2], configs[i] if i < len(configs) else None
        slice = f"[:{round(100 * part)}%]" if part is not None and part < 1 else ""
        has_splits = is_repository_name(path)
        if not has_splits:
            t.difference(f"{path} has no splits: all of it is trained on, none evaluated")
        train += [
            source(path, name=name, split=local_split(path, split + slice)) for split in splits if "train" in split
        ]
        test += [source(path, name=name, split=split) for split in splits if "test" in split and has_splits]
        t.take(key, TRANSLATED, "data.train_data")
    _set(t, "data.train_data", train, "dataset_mixer")
    if wants_eval:
        _set(t, "data.eval_data", test, "dataset_mixer, dataset_splits")
    for key in ("dataset_splits", "dataset_configs"):
        if key in t.left and parts:
            t.take(key, TRANSLATED, "data.train_data" + (" and data.eval_data" if wants_eval else ""))
