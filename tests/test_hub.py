"""Models, tokenizers and data sets from a hub: a local server that speaks its API, real files, real mishaps.

huggingface_hub reads its settings when it is imported, so every scene is played by a Python of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minisft.data.repositories import choose_files, locate, split_of
from minisft.data.sources import Source, list_files, parse_source, read_rows
from minisft.data.tokenizer import train_tokenizer
from minisft.errors import DATA, UserError
from minisft.model.families import from_hf
from minisft.model.load import build_model, init_weights
from minisft.model.save import save_model
from tests.hub_server import HubServer, commit_of

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [{"question": f"{i}?", "answer": str(i)} for i in range(10)]
CONFIG = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
          "num_attention_heads": 2}  # fmt: skip


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def repository(root: Path, name: str, files: dict[str, bytes], revision: str = "main") -> Path:
    folder = root / name / revision
    for file, data in {**files, ".revision": b""}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    return folder


def parquet_bytes(rows) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    model = build_model(from_hf(CONFIG), "cpu")
    init_weights(model, 0)
    extra = {"run.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "original/model.safetensors": b"other"}
    save_model(model, repository(root, "models/owner/model", extra))
    train_tokenizer(["Hello"], 300).save(root / "models/owner/model/main")
    repository(root, "models/owner/gated-model", {"config.json": b"{}"})
    repository(root, "models/owner/private-model", {"config.json": b"{}"})
    repository(root, "models/owner/pickled", {"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": b"x"})
    lines = {"train.jsonl": jsonl(ROWS), "data/test.jsonl": jsonl(ROWS[:3]), "load.py": b"raise SystemExit"}
    repository(root, "datasets/owner/lines", lines)
    repository(root, "datasets/owner/lines", {"train.jsonl": jsonl(ROWS[:1])}, revision="v0")
    table = {"data/train-00000-of-00002.parquet": parquet_bytes(ROWS[:6]), "README.md": b"---\n"}
    table |= {"data/train-00001-of-00002.parquet": parquet_bytes(ROWS[6:]), "data/train.jsonl": b"not this one"}
    repository(root, "datasets/owner/table", table)
    repository(root, "datasets/owner/script", {"script.py": b"raise SystemExit", "README.md": b""})
    converted = {
        "main/train/0000.parquet": parquet_bytes(ROWS[:4]),
        "extra/train/0000.parquet": parquet_bytes(ROWS[:2]),
    }
    repository(root, "datasets/owner/script", converted, revision="refs/convert/parquet")
    server = HubServer(root)
    yield server
    server.close()


def play(hub, home: Path, script: str, **environment) -> dict:
    """Run a scene in a Python of its own; it prints JSON."""
    helpers = """
import json, sys
from minisft.errors import UserError
from minisft.hub import resolve
from minisft.data.sources import parse_source, read_rows
from minisft.data.repositories import locate
def attempt(function, *args, **options):
    try:
        return function(*args, **options)
    except UserError as error:
        return {"error": error.message, "hint": error.hint, "code": error.exit_code}
def rows(source, **options):
    found = attempt(locate, parse_source(source), **options)
    return found if isinstance(found, dict) else [[row.data for row in read_rows(found)], found.commit]
out = {}
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.getcwd()}
    clean |= {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    } | environment
    done = subprocess.run(
        [sys.executable, "-c", helpers + script + "\nprint(json.dumps(out, default=str))"],
        env=clean, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_model_tokenizer_and_data_by_name_then_again_without_a_network(hub, tmp_path):
    hub.log.clear()
    script = """
from minisft.model.load import load_model
from minisft.data.tokenizer import load_tokenizer
out["resolved"] = resolve("owner/model", None, "model", local_files_only=LOCAL)
out["parameters"] = sum(p.numel() for p in load_model("owner/model").parameters()) if not LOCAL else None
out["ids"] = load_tokenizer("owner/model", local_files_only=LOCAL).encode("Hello")
out["lines"] = rows("owner/lines", local_files_only=LOCAL)
out["old"] = rows({"path": "owner/lines", "revision": "v0"}, local_files_only=LOCAL)
out["test"] = rows({"path": "owner/lines", "split": "test[:2]"}, local_files_only=LOCAL)
out["named"] = rows({"path": "owner/lines", "data_dir": "data", "data_files": "*.jsonl"}, local_files_only=LOCAL)
out["table"] = rows("owner/table[4:8]", local_files_only=LOCAL)
out["main"] = rows({"path": "owner/script", "name": "main"}, local_files_only=LOCAL)
"""
    online = play(hub, tmp_path, script.replace("LOCAL", "False"))
    commit = commit_of("owner/model", "main")
    assert online["resolved"][1] == commit and online["resolved"][0].endswith(f"snapshots/{commit}")
    assert online["parameters"] > 10_000 and online["ids"]
    assert online["lines"] == [ROWS, commit_of("owner/lines", "main")]
    assert online["old"] == [ROWS[:1], commit_of("owner/lines", "v0")]
    assert online["test"][0] == ROWS[:2] and online["named"][0] == ROWS[:3]
    assert online["table"] == [ROWS[4:8], commit_of("owner/table", "main")]
    assert online["main"] == [ROWS[:4], commit_of("owner/script", "refs/convert/parquet")]
    fetched = {path.rpartition("/")[2] for method, path in hub.log if "/resolve/" in path}
    assert not {name for name in fetched if name.endswith((".py", ".bin", ".md"))}
    assert not any("original/" in path or path.endswith("data/train.jsonl") for _, path in hub.log)

    hub.log.clear()
    offline = play(hub, tmp_path, script.replace("LOCAL", "True"))
    assert hub.log == [] and {**offline, "parameters": 0} == {**online, "parameters": 0}
    pinned = f'out["lines"] = rows({{"path": "owner/lines", "revision": "{commit_of("owner/lines", "main")}"}})'
    assert play(hub, tmp_path, pinned, HF_HUB_OFFLINE="1")["lines"] == online["lines"] and hub.log == []


def test_mishaps_are_told(hub, tmp_path):
    said = play(
        hub,
        tmp_path,
        """
out["no repository"] = attempt(resolve, "owner/nothing", None, "model")
out["no revision"] = attempt(resolve, "owner/model", "v9", "model")
out["gated"] = attempt(resolve, "owner/gated-model", None, "model")
out["private"] = attempt(resolve, "owner/private-model", None, "model")
out["local only"] = attempt(resolve, "owner/model", None, "tokenizer", local_files_only=True)
out["no data"] = rows("owner/nothing")
out["data, no revision"] = rows({"path": "owner/lines", "revision": "v9"})
out["data, local only"] = rows("owner/table", local_files_only=True)
out["no split"] = rows({"path": "owner/lines", "split": "validation"})
out["configurations"] = rows("owner/script")
out["no configuration"] = rows({"path": "owner/script", "name": "other"})
out["no file"] = rows({"path": "owner/lines", "data_files": ["train.jsonl", "more/*.csv"]})
from minisft.model.load import load_model
out["pickled"] = attempt(load_model, "owner/pickled")
""",
    )
    expected = {
        "no repository": ("no hub repository 'owner/nothing'", "HF_TOKEN"),
        "no revision": ("no revision 'v9'", "a branch, a tag"),
        "gated": ("owner/gated-model is gated", "accept its terms"),
        "private": ("no hub repository 'owner/private-model'", "private: set HF_TOKEN"),
        "local only": ("not in the local cache", "hf download owner/model"),
        "no data": ("no hub repository 'owner/nothing'", ""),
        "data, no revision": ("no revision 'v9'", ""),
        "data, local only": ("not in the local cache", "with a connection"),
        "no split": ("no file of the split 'validation'; there are test, train", "data/test.jsonl"),
        "configurations": ("several configurations; there are extra, main", "name ="),
        "no configuration": ("no configuration 'other'; there are extra, main", ""),
        "no file": ("no file matches 'more/*.csv'", "train.jsonl"),
        "pickled": ("no model.safetensors", "save_pretrained"),
    }
    for name, (message, hint) in expected.items():
        assert message in said[name]["error"] and hint in said[name]["hint"], (name, said[name])
    assert said["no split"]["code"] == DATA
    wrong = play(hub, tmp_path / "b", 'out["x"] = attempt(resolve, "owner/model", None, "model")', HF_TOKEN="bad")
    assert "refuses the token" in wrong["x"]["error"]
    right = play(hub, tmp_path / "c", 'out["x"] = resolve("owner/private-model", None, "model")', HF_TOKEN="good")
    assert right["x"][1] == commit_of("owner/private-model", "main")


def test_an_interrupted_download_is_no_data_set_and_the_next_start_completes_it(hub, tmp_path):
    hub.cut_once = {"train-00001-of-00002.parquet"}
    script = 'out["x"] = rows("owner/table")'
    first = play(hub, tmp_path, script)["x"]
    if isinstance(first, dict):  # huggingface_hub may try again by itself, and then has it all
        assert "could not be downloaded" in first["error"] and "what has arrived is kept" in first["hint"]
        offline = play(hub, tmp_path, 'out["x"] = rows("owner/table", local_files_only=True)')["x"]
        assert "not in the local cache" in offline["error"]  # half of the rows are not taken for all
    assert play(hub, tmp_path, script)["x"][0] == ROWS
    assert hub.cut_once == set()


# ------------------------------------------------------------------------------------------------- choosing files


@pytest.mark.parametrize(
    "file, split",
    [
        ("train.jsonl", "train"), ("data/train-00000-of-00002.parquet", "train"), ("main/test/0000.parquet", "test"),
        ("validation.csv", "validation"), ("dev.json", "validation"), ("gsm8k_train.jsonl", "train"), ("rows.jsonl", None),
        ("trainer.jsonl", None), ("my-test.json", "test"), ("socratic/test-00000-of-00001.parquet", "test"),
    ],
)  # fmt: skip
def test_the_split_of_a_path(file, split):
    assert split_of(file) == split


def test_choosing_never_mixes():
    listed = ["main/train.parquet", "main/test.parquet", "socratic/train.parquet", "train.csv", "README.md", "x.py"]
    for name in ("main", "socratic"):
        assert choose_files(listed, Source("a/b", name=name))[0] == [f"{name}/train.parquet"]
    assert choose_files(["rows.jsonl", "dataset_infos.json"], Source("a/b"))[0] == ["rows.jsonl"]
    assert choose_files(["a.jsonl", "b.jsonl"], Source("a/b"))[0] == []
    assert choose_files(["rows.jsonl"], Source("a/b", split="test"))[0] == []
    assert choose_files(["x/train.jsonl", "y/train.jsonl"], Source("a/b", data_dir="x"))[0] == ["x/train.jsonl"]


def test_local_sources_are_left_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    source = parse_source(str(tmp_path / "a.jsonl"))
    assert locate(source) is source
    for key, value in (("revision", "v1"), ("data_dir", "x"), ("data_files", ["y"])):
        with pytest.raises(UserError, match=f"{key} is given for"):
            parse_source({"path": str(tmp_path / "a.jsonl"), key: value})
    with pytest.raises(UserError, match="data_files = \\[1\\]"):
        parse_source({"path": "a/b", "data_files": [1]})


# ------------------------------------------------------------------------------------------------- Parquet


def test_parquet_rows_are_json_values(tmp_path):
    import datetime
    import decimal

    rows = [
        {"text": "\u00e4", "n": 1, "x": 0.5, "b": True, "list": [{"role": "user"}], "day": datetime.date(2024, 1, 2)},
        {"text": None, "n": None, "x": None, "b": None, "list": [], "day": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [row.data for row in read_rows(parse_source(str(tmp_path / "a.parquet")))]
    assert read == [{**rows[0], "day": "2024-01-02"}, rows[1]]
    bad = [{"text": "a", "price": decimal.Decimal("1.50")}, {"text": "b", "price": None}]
    parquet.write_table(pyarrow.Table.from_pylist(bad), tmp_path / "b.parquet")
    first, second = read_rows(parse_source(str(tmp_path / "b.parquet")))
    assert (first.reason, first.line) == ("not a JSON value", 1) and "column 'price'" in first.detail
    assert second.data == {"text": "b", "price": None}


def test_parquet_slices_and_damage(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"n": n} for n in range(2000)]), path, row_group_size=300)
    assert [row.data["n"] for row in read_rows(parse_source(f"{path}[-3:]"))] == [1997, 1998, 1999]
    assert [row.data["n"] for row in read_rows(parse_source(f"{path}[50%:1002]"))] == [1000, 1001]
    assert [row.line for row in read_rows(parse_source(f"{path}[:2]"))] == [1, 2]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        list(read_rows(parse_source(str(path))))
    path.write_bytes(b"{}")
    with pytest.raises(UserError, match="does not begin with PAR1"):
        list_files(parse_source(str(path)))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    parquet.write_table(pyarrow.Table.from_pylist([{"n": 1}]), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError) as caught:
        list(read_rows(parse_source(str(tmp_path / "a.parquet"))))
    assert 'pip install "minisft[parquet]"' in caught.value.hint
