"""Models, tokenizers and data sets by repository, from a local server that speaks the hub's API: real files and mishaps.

huggingface_hub reads its settings when it is imported, so a Python of its own plays the user: `client.resolve(...)` and
the like call the function there and bring back what it returns, or the UserError.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, serve
from tiny import settings, write_rows

from minisft.config.load import load
from minisft.data.repositories import locate
from minisft.data.sources import parse_source
from minisft.data.tokenizer import load_tokenizer, train_tokenizer
from minisft.errors import DATA, MODEL, UserError
from minisft.model.families import from_hf
from minisft.model.load import build_model, init_weights, load_model
from minisft.model.save import save_model
from minisft.prepare.run import prepare

CLIENT = """
import json, os, sys
from minisft.errors import UserError
from minisft.hub import resolve
from minisft.data.repositories import locate
from minisft.data.sources import parse_source, read_rows

def rows(source, local_files_only=False):
    found = locate(parse_source(source), local_files_only=local_files_only)
    return {"rows": [row.data.get("i") for row in read_rows(found)], "commit": found.commit, "origin": found.origin}

for line in sys.stdin:
    name, arguments, options, os.environ["HF_TOKEN"] = json.loads(line)
    try:
        answer = {"resolve": resolve, "rows": rows}[name](*arguments, **options)
    except UserError as error:
        answer = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    print(json.dumps(answer, default=str), flush=True)
"""
CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
NEVER = (".py", ".bin", ".md5", ".gguf")


class Client:
    """minisft in another process, with settings that point to the server."""

    def __init__(self, hub, home, **settings):
        environment = {
            k: v for k, v in os.environ.items() if not k.upper().startswith("HF_") and "PROXY" not in k.upper()
        }
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | settings
        command = [sys.executable, "-c", CLIENT]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def _call(self, name, *arguments, token="", **options):
        self.process.stdin.write(json.dumps([name, arguments, options, token]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def resolve(self, repo, revision=None, kind="model", **options):
        return self._call("resolve", repo, revision, kind, **options)

    def rows(self, source, **options):
        return self._call("rows", source, **options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def hub():
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub, home):
    with Client(hub, home) as client:
        yield client


@pytest.fixture(autouse=True)
def _fresh_log(request):
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").log.clear()


def folder_of(folder, files):
    """A folder with these files: {path: bytes, text, or a list of row numbers}."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, (list, range)) and path.suffix == ".parquet":
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pyarrow.table({"i": list(content)}), path)
        elif isinstance(content, (list, range)):
            path.write_text("".join(json.dumps({"i": i}) + "\n" for i in content))
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture(scope="module")
def model(hub, tmp_path_factory):
    """owner/model: weights, tokenizer, and much that nobody should download. Returns (folder, commit)."""
    folder = tmp_path_factory.mktemp("model")
    model = build_model(from_hf(CONFIG), "cpu")
    init_weights(model, 0)
    save_model(model, folder)
    train_tokenizer(["Hello"], 300).save(folder)
    names = ("modeling.py", "pytorch_model.bin", "original/model.safetensors", "onnx/config.json", "model.gguf")
    folder_of(folder, dict.fromkeys(names, "not for us"))
    return folder, hub.add("models", "owner/model", folder)


# ------------------------------------------------------------------------------------------------- models, tokenizers


@pytest.mark.quick
def test_a_model_and_its_tokenizer_by_name(hub, client, home, model):
    folder, commit = model
    for revision in (None, "main", commit):
        for kind in ("model", "tokenizer"):
            found, at = client.resolve("owner/model", revision, kind)
            assert at == commit and found.endswith(f"/snapshots/{commit}")
    there, ids = load_model(found), torch.arange(8)
    positions, start, end = torch.arange(8, dtype=torch.int32), torch.zeros(8).int(), torch.full((8,), 8).int()
    outputs = [m(ids, positions, start, end) for m in (there, load_model(folder))]
    assert torch.equal(*outputs)
    assert load_tokenizer(found).encode("Hello") == load_tokenizer(folder).encode("Hello")
    fetched = hub.downloads()
    assert len(set(fetched)) >= 4 and not [name for name in fetched if name.endswith(NEVER)]
    assert not [line for line in hub.log if "original" in line or "onnx" in line]

    hub.log.clear()
    assert client.resolve("owner/model", None, "model", local_files_only=True) == [found, commit]
    assert client.resolve("owner/model", commit, "tokenizer", local_files_only=True) == [found, commit]
    assert hub.log == []


def test_offline_mode_takes_what_is_there_and_asks_nobody(hub, client, home, model, tmp_path):
    folder_of(tmp_path, {"train.jsonl": range(5)})
    hub.add("datasets", "owner/offline", tmp_path)
    found, there = client.resolve("owner/model"), client.rows("owner/offline")
    hub.log.clear()
    with Client(hub, home, HF_HUB_OFFLINE="1") as offline:
        assert offline.resolve("owner/model") == found
        assert offline.rows("owner/offline") == there
        for answer in (offline.resolve("owner/never"), offline.rows("owner/never")):
            assert "owner/never" in answer["error"] and "local cache" in answer["error"]
    assert hub.log == []
    with Client(hub, home, HF_ENDPOINT="http://127.0.0.1:9") as unreached:  # nobody listens there
        assert unreached.resolve("owner/model") == found  # all of it is there
        for answer in (unreached.resolve("owner/never"), unreached.rows("owner/offline")):
            assert "could not be downloaded" in answer["error"] and "local_files_only" in answer["hint"]
        assert unreached.rows("owner/offline", local_files_only=True) == there


def test_a_branch_that_moves_and_the_old_commit(hub, client, model, tmp_path):
    folder, commit = model
    other = folder_of(tmp_path, {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})
    config = json.loads((other / "config.json").read_text()) | {"rope_theta": 5e5}
    (other / "config.json").write_text(json.dumps(config))
    tag = hub.add("models", "owner/model", other, revision="v2/tag")
    assert tag != commit and client.resolve("owner/model", "v2/tag")[1] == tag
    assert client.resolve("owner/model", tag)[1] == tag and client.resolve("owner/model", "main")[1] == commit


def test_a_broken_connection_is_resumed(hub, client, model, tmp_path):
    folder, _ = model
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub.add("models", "owner/shaky", folder_of(tmp_path, files))
    hub.break_off[str(tmp_path / "model.safetensors")] = 1
    answer = client.resolve("owner/shaky")
    if isinstance(answer, dict):  # older versions of huggingface_hub leave the second attempt to the user
        assert "try again" in answer["hint"]
        answer = client.resolve("owner/shaky")
    found, _ = answer
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert load_model(found).config.vocab_size == CONFIG["vocab_size"]
    assert hub.downloads().count("model.safetensors") >= 2


def test_half_a_download_is_no_model_and_the_next_call_completes_it(hub, client, model, tmp_path):
    folder, _ = model
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub.add("models", "owner/half", folder_of(tmp_path, files))
    weights = str(tmp_path / "model.safetensors")
    hub.break_off[weights] = 1
    hub.fail.add(weights)
    answer = client.resolve("owner/half")
    assert "owner/half could not be downloaded" in answer["error"] and "try again" in answer["hint"]
    assert answer["exit_code"] == MODEL
    assert "local cache" in client.resolve("owner/half", local_files_only=True)["error"]
    hub.fail.clear()
    hub.log.clear()
    found, _ = client.resolve("owner/half")
    assert load_model(found) and "config.json" not in hub.downloads()  # that one had arrived


def test_a_snapshot_without_a_shard_is_refused(hub, client, home, tmp_path):
    """A snapshot as older versions of huggingface_hub return it, or after somebody has tidied up the cache."""
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shards = dict.fromkeys(index["weight_map"].values(), b"bytes")
    files = {"config.json": "{}", "model.safetensors.index.json": json.dumps(index)} | shards
    hub.add("models", "owner/shards", folder_of(tmp_path, files))
    found, commit = client.resolve("owner/shards")
    os.remove(os.path.join(found, "model-00002-of-00002.safetensors"))
    Path(found, "../../trees", f"{commit}.json").unlink(missing_ok=True)  # its own list, in newer versions
    with Client(hub, home, HF_HUB_OFFLINE="1") as offline:
        answer = offline.resolve("owner/shards")
    assert "only a part of it, without model-00002-of-00002.safetensors" in answer["error"]
    assert client.resolve("owner/shards") == [found, commit]


def test_repositories_without_what_we_read(hub, client, tmp_path):
    lacking = {
        "pickled": ("model", ["config.json", "pytorch_model.bin"], "only as pytorch_model.bin", "save_pretrained"),
        "gguf": ("model", ["config.json", "model.gguf"], "has no model.safetensors; it has config.json", "safetensors"),
        "adapter": ("model", ["adapter_model.safetensors"], "has no config.json, model.safetensors", "whole model"),
        "pieces": ("tokenizer", ["tokenizer.model"], "no tokenizer.json; it has tokenizer.model", "save_pretrained"),
    }
    for name, (kind, files, message, hint) in lacking.items():
        hub.add("models", f"owner/{name}", folder_of(tmp_path / name, dict.fromkeys(files, "{}")))
        answer = client.resolve(f"owner/{name}", None, kind)
        assert message in answer["error"] and hint in answer["hint"] and answer["exit_code"] == MODEL
    assert not [name for name in hub.downloads() if name.endswith((".bin", ".gguf", ".model"))]


def test_mishaps_are_told(hub, client, model, tmp_path):
    folder_of(tmp_path, {"config.json": "{}", "train.jsonl": range(3)})
    for name in ("gated", "private", "forbidden"):
        for type in ("models", "datasets"):
            hub.add(type, f"owner/{name}", tmp_path, access=name)
    hub.add("datasets", "owner/lines", tmp_path)
    cases = [
        ("owner/nothing", None, "", "no hub repository 'owner/nothing'", "check the name"),
        ("owner/nothing", None, TOKEN, "no hub repository 'owner/nothing'", "check the name"),
        ("owner/private", None, "", "no hub repository 'owner/private'", "set HF_TOKEN"),
        ("owner/gated", None, TOKEN, "owner/gated is gated", "accept its terms on https://huggingface.co/"),
        ("owner/forbidden", None, TOKEN, "does not let this token read it", "a new token"),
        ("owner/private", None, "hf_wrong", "the hub refuses the token", "unset HF_TOKEN"),
        ("owner/lines", "v9", "", "no revision 'v9'", "a branch, a tag or a full commit"),
    ]
    hub.add("models", "owner/lines", tmp_path)
    for repo, revision, token, message, hint in cases:
        for exit_code, answer in (
            (MODEL, client.resolve(repo, revision, token=token)),
            (DATA, client.rows({"path": repo, "revision": revision or ""}, token=token)),
        ):
            assert message in answer["error"] and hint in answer["hint"], (repo, token, answer)
            assert answer["exit_code"] == exit_code and "Traceback" not in answer["error"]
    assert client.rows("owner/private", token=TOKEN)["rows"] == [0, 1, 2]
    answer = client.rows({"path": "owner/never", "revision": "v1"}, local_files_only=True)
    assert "owner/never at v1" in answer["error"] and "connection" in answer["hint"]


# ------------------------------------------------------------------------------------------------- data sets


def test_rows_of_a_repository(hub, client, tmp_path):
    files = {"train.jsonl": range(10), "data/test.jsonl": range(20, 23), "load.py": "raise SystemExit", "x.bin": b"x"}
    commit = hub.add("datasets", "owner/rows", folder_of(tmp_path / "new", files))
    old = hub.add("datasets", "owner/rows", folder_of(tmp_path / "old", {"train.jsonl": [99]}), revision="v0")
    cases = [
        ("owner/rows", list(range(10)), commit),
        ("owner/rows[:30%]", [0, 1, 2], commit),
        ({"path": "owner/rows", "split": "train[-2:]", "name": "a label"}, [8, 9], commit),
        ({"path": "owner/rows", "split": "test[1:]"}, [21, 22], commit),
        ({"path": "owner/rows", "revision": commit}, list(range(10)), commit),
        ({"path": "owner/rows", "revision": "v0"}, [99], old),
        ({"path": "owner/rows", "data_dir": "data", "data_files": "*.jsonl"}, [20, 21, 22], commit),
        ({"path": "owner/rows", "data_files": ["data/test.jsonl", "train.jsonl"]}, [20, 21, 22, *range(10)], commit),
    ]
    for source, rows, at in cases:
        answer = client.rows(source)
        assert (answer["rows"], answer["commit"]) == (rows, at), source
    assert client.rows("owner/rows")["origin"] == f"{commit}: train.jsonl"
    assert set(hub.downloads()) == {"train.jsonl", "test.jsonl"}
    hub.log.clear()
    for source, rows, at in cases:
        answer = client.rows(source, local_files_only=True)
        assert (answer["rows"], answer["commit"]) == (rows, at), source
    assert client.rows({"path": "owner/rows", "revision": commit})["rows"] == list(range(10))
    assert hub.log == []  # the last one without local_files_only: the files of a commit never change


def test_parquet_splits_and_configurations(hub, client, tmp_path):
    files = {
        "main/train-00000-of-00002.parquet": range(6),
        "main/train-00001-of-00002.parquet": range(6, 10),
        "main/test-00000-of-00001.parquet": range(50, 53),
        "socratic/train-00000-of-00001.parquet": [70],
    }
    hub.add("datasets", "owner/table", folder_of(tmp_path, files))
    assert client.rows({"path": "owner/table", "name": "main"})["rows"] == list(range(10))
    assert client.rows({"path": "owner/table", "name": "main", "split": "train[4:8]"})["rows"] == [4, 5, 6, 7]
    assert client.rows({"path": "owner/table", "name": "main", "split": "test"})["rows"] == [50, 51, 52]
    assert client.rows({"path": "owner/table", "name": "socratic"})["rows"] == [70]
    assert "there are main, socratic" in client.rows("owner/table")["error"]


def test_a_data_set_that_a_script_made_is_read_from_the_converted_branch(hub, client, tmp_path):
    files = {"script.py": "raise SystemExit", "README.md": "no yaml", "data/train.jsonl": [1]}
    commit = hub.add("datasets", "owner/script", folder_of(tmp_path / "main", files))
    assert "no converted copy" in client.rows("owner/script")["error"]
    files = {
        "default/train/0000.parquet": range(4),
        "default/train/0001.parquet": range(4, 6),
        "x/train/0.parquet": [9],
    }
    converted = hub.add("datasets", "owner/script", folder_of(tmp_path / "c", files), revision="refs/convert/parquet")
    found = client.rows("owner/script")
    assert found["rows"] == list(range(6)) and found["commit"] == converted != commit
    assert client.rows("owner/script", local_files_only=True) == found
    assert client.rows({"path": "owner/script", "revision": "refs/convert/parquet", "name": "x"})["rows"] == [9]
    assert "only where no revision" in client.rows({"path": "owner/script", "revision": "main"})["error"]
    assert "script.py" not in hub.downloads()


def test_what_the_readme_declares_comes_before_names(hub, client, tmp_path):
    card = """---
license: mit
configs:
- config_name: default
  data_files:
  - {split: train, path: "v2/*.jsonl"}
  - {split: extra, path: [v1/train.jsonl, v1/b.jsonl]}
---
# A data set
"""
    files = {"README.md": card, "v1/train.jsonl": [1], "v1/b.jsonl": [2], "v2/a.jsonl": [3], "v2/c.jsonl": [4]}
    commit = hub.add("datasets", "owner/card", folder_of(tmp_path / "a", files))
    assert client.rows("owner/card")["rows"] == [3, 4]
    assert client.rows({"path": "owner/card", "split": "extra[1:]"})["rows"] == [2]
    assert client.rows({"path": "owner/card", "data_dir": "v1"})["rows"] == [1]
    assert "no split 'test'; there are extra, train" in client.rows({"path": "owner/card", "split": "test"})["error"]
    hub.log.clear()
    assert client.rows({"path": "owner/card", "revision": commit})["rows"] == [3, 4] and hub.log == []
    broken = {"README.md": "---\nconfigs: [\n---\n", "train.jsonl": [1]}
    hub.add("datasets", "owner/broken", folder_of(tmp_path / "b", broken))
    answer = client.rows("owner/broken")
    assert "README.md cannot be read" in answer["error"] and "data_files" in answer["hint"]
    assert client.rows({"path": "owner/broken", "data_files": "train.jsonl"})["rows"] == [1]


def test_half_a_data_set_is_not_taken_for_all(hub, client, tmp_path):
    files = {"data/train-00000-of-00002.jsonl": range(3), "data/train-00001-of-00002.jsonl": range(3, 6)}
    hub.add("datasets", "owner/two", folder_of(tmp_path, files))
    second = str(tmp_path / "data/train-00001-of-00002.jsonl")
    hub.break_off[second] = 1
    hub.fail.add(second)
    answer = client.rows("owner/two")
    assert "could not be downloaded" in answer["error"] and answer["exit_code"] == DATA
    assert "local cache" in client.rows("owner/two", local_files_only=True)["error"]
    hub.fail.clear()
    hub.log.clear()
    assert client.rows("owner/two")["rows"] == list(range(6))
    assert hub.downloads() == ["train-00001-of-00002.jsonl"]


# ------------------------------------------------------------------------------------------------- a run


def test_a_run_from_repositories_records_their_commits(hub, client, home, model, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl")
    commit = hub.add("datasets", "owner/prompts", tmp_path / "data")
    for kind in ("model", "tokenizer"):
        client.resolve("owner/model", "main", kind)
    client.rows("owner/prompts")
    hub.log.clear()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    keys = settings(tmp_path) | {"model.model_name_or_path": "owner/model", "model.local_files_only": True}
    del keys["model.config"], keys["model.tokenizer_name_or_path"]
    keys["data.train_data"] = {"path": "owner/prompts", "split": "train[:50%]"}
    config, _ = load({}, keys)
    run = prepare(config, torch.device("cpu"))
    assert len(run.train.documents) == 32 and hub.log == []
    assert run.train.documents.cache.manifest["sources"][0]["commit"] == commit
    summary = "\n".join(run.summary)
    assert commit in summary and model[1] in summary


# ------------------------------------------------------------------------------------------------- what is a repository


def test_local_sources_never_ask(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path, {"owner/name/a.jsonl": [1], "a.jsonl": [1]})
    for path in ("a.jsonl", "owner/name", "owner/missing.jsonl", "owner/missing.parquet", "./owner/x", "a/b/c", "*/x"):
        source = parse_source(path)
        assert locate(source) is source
    for key, value in (("revision", "v1"), ("data_dir", "x"), ("data_files", ["y"])):
        with pytest.raises(UserError, match=f"{key} is given for"):
            parse_source({"path": "a.jsonl", key: value})
    with pytest.raises(UserError, match=r"data_files = \[1\]"):
        parse_source({"path": "a/b", "data_files": [1]})
