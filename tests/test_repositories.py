"""Which files of a repository are the rows: layouts of real data sets, and what is refused because it would be a guess."""

import pytest

from minisft.data.repositories import choose_files
from minisft.data.sources import COMPRESSED, READERS, parse_source
from minisft.errors import DATA, UserError
from minisft.hub import is_repository_name

LAYOUTS = {
    "one file": ["README.md", "alpaca_data.json", "dataset_infos.json"],
    "shards": ["data/train-00000-of-00002-a3ecf92756993583.parquet", "data/train-00001-of-00002-6aa8d9a9b2b5b5b5.parquet",
               "data/test-00000-of-00001.parquet"],
    "configurations": ["main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet",
                       "socratic/train-00000-of-00001.parquet"],
    "default": ["default/train/0000.parquet", "default/train/0001.parquet", "other/train/0000.parquet",
                "other/creative/0000.parquet"],
    "partial": ["default/partial-train/0000.parquet", "default/test/0000.parquet"],
    "two kinds": ["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet",
                  "data/test_sft-00000-of-00001.parquet"],
    "exact and near": ["train.jsonl", "train_extra.jsonl", "dev.jsonl"],
    "near": ["gsm8k_train.jsonl", "gsm8k_test.jsonl", "trainer.jsonl"],
    "formats": ["train.csv", "train.parquet", "train.jsonl", "test.csv"],
    "folders": ["train/a.jsonl", "train/b.jsonl", "validation/a.jsonl", ".hidden/train.jsonl"],
    "parts": ["data/part-00000-of-00002.jsonl", "data/part-00001-of-00002.jsonl"],
    "unnamed": ["a.jsonl", "b.jsonl"],
    "root and folder": ["train.jsonl", "french/train.jsonl", "german/test.jsonl"],
    "script": ["name.py", "data/train.jsonl"],
    "packed": ["train-00000-of-00002.jsonl.gz", "train-00001-of-00002.jsonl.gz", "test.TSV", "dev.ndjson", "dev.ndjson.zst",
               "train.parquet.gz", "main/eval/a.csv.zst"],
    "nothing": ["images.zip", "train.arrow", "README.md", "LICENSE.txt"],
}  # fmt: skip


def choose(layout, configs=None, **source):
    listed = LAYOUTS[layout] if isinstance(layout, str) else layout
    return choose_files(listed, parse_source({"path": "owner/name", **source}), configs)


@pytest.mark.parametrize(
    "layout, source, expected",
    [
        ("one file", {}, ["alpaca_data.json"]),
        ("one file", {"name": "a label"}, ["alpaca_data.json"]),
        ("shards", {}, LAYOUTS["shards"][:2]),
        ("shards", {"split": "test[:5]"}, LAYOUTS["shards"][2:]),
        ("configurations", {"name": "socratic"}, LAYOUTS["configurations"][2:]),
        ("configurations", {"split": "test"}, LAYOUTS["configurations"][1:2]),  # only one configuration has it
        ("configurations", {"data_dir": "main"}, LAYOUTS["configurations"][:1]),
        ("default", {}, LAYOUTS["default"][:2]),
        ("default", {"name": "other", "split": "creative"}, LAYOUTS["default"][3:]),
        ("partial", {"split": "partial-train"}, LAYOUTS["partial"][:1]),
        ("two kinds", {"split": "train_sft[:10%]"}, LAYOUTS["two kinds"][:1]),
        ("two kinds", {"split": "test"}, LAYOUTS["two kinds"][2:]),
        ("exact and near", {}, ["train.jsonl"]),
        ("exact and near", {"split": "train_extra"}, ["train_extra.jsonl"]),
        ("exact and near", {"split": "validation"}, ["dev.jsonl"]),
        ("near", {}, ["gsm8k_train.jsonl"]),
        ("formats", {}, ["train.jsonl"]),
        ("formats", {"split": "test"}, ["test.csv"]),
        ("formats", {"data_files": "train.csv"}, ["train.csv"]),
        ("folders", {}, ["train/a.jsonl", "train/b.jsonl"]),
        ("folders", {"split": "validation"}, ["validation/a.jsonl"]),
        ("folders", {"data_files": ["**/b.jsonl", "train/*.jsonl"]}, ["train/b.jsonl", "train/a.jsonl"]),
        ("parts", {}, LAYOUTS["parts"]),
        ("packed", {"name": "a label", "data_dir": ""}, LAYOUTS["packed"][:2]),
        ("packed", {"split": "validation"}, ["dev.ndjson"]),
        ("packed", {"split": "test", "name": "main"}, ["main/eval/a.csv.zst"]),
        ("packed", {"data_files": "test.TSV"}, ["test.TSV"]),
        ("unnamed", {"data_files": "*.jsonl"}, ["a.jsonl", "b.jsonl"]),
        ("root and folder", {"name": "french"}, ["french/train.jsonl"]),
        ("root and folder", {"data_files": "train.jsonl"}, ["train.jsonl"]),
        ("script", {}, []),
        ("script", {"data_files": "data/*"}, ["data/train.jsonl"]),
        ("nothing", {}, []),
        ("nothing", {"data_dir": "elsewhere"}, []),
    ],
)  # fmt: skip
def test_files_are_chosen(layout, source, expected):
    assert choose(layout, **source) == expected
    assert choose(list(reversed(LAYOUTS[layout])), **source) == expected  # whatever the order of the listing


@pytest.mark.parametrize("packed", ["", *COMPRESSED])
def test_what_is_read_here_is_read_there(packed):
    for suffix in READERS:
        file = f"train{suffix}{packed}"
        assert choose([file]) == ([] if file.startswith("train.parquet.") else [file])
        assert not is_repository_name(f"folder/{file}")  # a file, also where it does not exist


@pytest.mark.parametrize(
    "layout, source, message",
    [
        ("configurations", {}, "several configurations and no name; there are main, socratic"),
        ("configurations", {"name": "french"}, "no configuration 'french'; there are main, socratic"),
        (
            "configurations",
            {"name": "socratic", "split": "test"},
            "no split 'test'; by their names, files are of train",
        ),
        ("shards", {"split": "validation"}, "no split 'validation'; by their names, files are of test, train"),
        ("partial", {}, "files are of partial-train, test"),
        ("two kinds", {}, "no split 'train'; by their names, files are of test_sft, train_gen, train_sft"),
        ("unnamed", {}, "no split 'train'; by their names, files are of a, b"),
        ("one file", {"split": "test"}, "no split 'test'"),
        ("root and folder", {}, "there are french, one outside of folders"),
        ("folders", {"data_files": ["train/*", "test/*"]}, "no file matches 'test/\\*'"),
        ("folders", {"data_files": "*.jsonl"}, "no file matches"),  # a star stays in its folder
        ("folders", {"data_files": "train/a.jsonl", "split": "test"}, "data_files have no other split"),
        ("script", {"data_files": "name.py"}, "name.py: not a file of rows"),
        ("nothing", {"data_files": "*.arrow"}, "train.arrow: not a file of rows"),
        ("packed", {"data_files": "*.parquet.gz"}, "train.parquet.gz: not a file of rows"),
    ],
)
def test_what_would_be_a_guess_is_refused(layout, source, message):
    with pytest.raises(UserError, match=message) as caught:
        choose(layout, **source)
    assert caught.value.exit_code == DATA and "its files: " in caught.value.hint


FILES = ["old/train.jsonl", "en.jsonl", "fr/a.csv", "fr/b.csv", "raw/train.arrow", "x/train.jsonl", "x/test.jsonl"]
CONFIGS = [
    {"config_name": "en", "data_files": "en.jsonl", "default": True},
    {
        "config_name": "fr",
        "data_files": [{"split": "train", "path": "fr/*"}, {"split": "test", "path": ["x/test.jsonl"]}],
    },
    {"config_name": "raw", "data_files": [{"split": "train", "path": "raw/*"}]},
    {"config_name": "x", "data_dir": "x"},
    {"config_name": "mixed", "data_files": ["en.jsonl", "gone/*"]},
    {"config_name": "odd", "data_files": "fr/a.csv", "sep": "\t"},
]


def test_declared_configurations():
    assert choose(FILES, CONFIGS) == ["en.jsonl"]
    assert choose(FILES, CONFIGS[1:2]) == ["fr/a.csv", "fr/b.csv"]
    assert choose(FILES, CONFIGS, name="fr") == ["fr/a.csv", "fr/b.csv"]
    assert choose(FILES, CONFIGS, name="fr", split="test") == ["x/test.jsonl"]
    assert choose(FILES, CONFIGS, name="raw") == []  # nothing there can be read: the converted branch may have it
    assert choose(FILES, CONFIGS, name="x", split="test") == ["x/test.jsonl"]
    assert choose(FILES, CONFIGS, data_files="old/train.jsonl") == ["old/train.jsonl"]  # the user's word comes first


@pytest.mark.parametrize(
    "configs, source, message",
    [
        (CONFIGS, {"name": "german"}, "no configuration 'german'; there are en, fr"),
        (CONFIGS[1:3], {}, "several configurations and no name"),
        (CONFIGS, {"name": "fr", "split": "dev"}, "no split 'dev'; there are test, train"),
        (CONFIGS, {"name": "mixed"}, "no file matches 'gone/\\*'"),
        (CONFIGS, {"name": "odd"}, "a special way of reading \\(sep = "),
        ("text", {}, "declares configs in a way unknown"),
        ([{"data_files": "en.jsonl"}], {}, "declares configs in a way unknown"),
        ([{"config_name": "default", "data_files": [{"path": 7}]}], {}, "declares configs in a way unknown"),
    ],
)
def test_declared_configurations_that_are_refused(configs, source, message):
    with pytest.raises(UserError, match=message):
        choose(FILES, configs, **source)
