"""Trackers against the real libraries, on this machine and without a network; and trackers that fail or hang."""

import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minisft import loggers, trackers
from minisft.loggers import Loggers

ROWS = [
    {"prompt": "one *line*\nand another", "answer": "<b>", "output": "</pre> `x`"},
    {"prompt": "p", "answer": "", "output": ""},
]
CONFIG = {
    "train.seed": 3,
    "train.learning_rate": 1e-4,
    "lora.r": None,
    "log.report_to": ("a", "b"),
    "data.packing": True,
}
CONFIG |= {
    f"more.{i}": "x" * i for i in range(0, 1500, 10)
}  # more keys, and longer values, than a server takes at once
EXPECTED = {  # after a run that logged steps 1 to 3, was killed after a checkpoint at 2, and resumed
    "train/loss": [(1, 1.0), (2, 0.5), (3, 8.0)],
    "train/losses/source a[:10%]": [(1, 2.0), (2, 2.0), (3, 2.0)],
    "eval/loss": [(2, 0.25)],
    "train/tokens_per_second": [(1, 5.0), (2, 5.0), (3, 5.0)],
}


def run_and_resume(folder: Path, name: str) -> None:
    def log(run: Loggers, step: int, loss: float) -> None:
        run.log(step, {"loss": loss, "losses/source a[:10%]": 2.0}, {"tokens_per_second": 5.0})

    first = Loggers(folder, [name], "my run", CONFIG)
    log(first, 1, 1.0)
    log(first, 2, 0.5)
    first.log(2, {"eval_loss": 0.25})
    first.samples(2, ROWS)
    position = json.loads(json.dumps({"step": 2, **first.position()}))
    if name == "tensorboard":  # the others keep what a killed run had sent
        log(first, 3, 4.0)
    first.close()
    second = Loggers(folder, [name], "my run", CONFIG, position)
    log(second, 3, 8.0)
    second.samples(3, ROWS[1:])
    second.close()
    samples = [json.loads(line) for line in (folder / "step_samples.jsonl").read_text().splitlines()]
    assert samples == [{"step": step, **row} for step, row in [(2, ROWS[0]), (2, ROWS[1]), (3, ROWS[1])]]


# ---- the real libraries -----------------------------------------------------------------------------------------


def test_tensorboard(tmp_path):
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    run_and_resume(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == EXPECTED
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("samples/text_summary")]
    assert texts == [(2, trackers.as_markdown(ROWS)), (3, trackers.as_markdown(ROWS[1:]))]
    assert "    </pre> `x`" in texts[0][1].split("\n")
    start = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    assert values.keys() == CONFIG.keys() and values["train.learning_rate"].number_value == 1e-4
    assert values["lora.r"].string_value == "None" and values["data.packing"].number_value == 1
    compared = events.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    names = {info.name.tag for info in plugin_data_pb2.HParamsPluginData.FromString(compared).experiment.metric_infos}
    assert {"train/loss", "eval/loss"} <= names


def wandb_records(path: Path):
    """The records of an offline run. The file is a log of LevelDB: blocks of 32 KiB, chunks with a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_and_resume(tmp_path, "wandb")
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # the same run
    records = [record for file in files for record in wandb_records(file)]
    run = next(record.run for record in records if record.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert run.display_name == "my run" and config["train.learning_rate"] == 1e-4 and config["data.packing"] is True
    found, tables = {}, []
    for record in records:
        if record.HasField("history"):
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            tables += [(items["samples/nrows"], items["samples/ncols"])] if "samples/nrows" in items else []
            for name in items.keys() & EXPECTED.keys():
                found.setdefault(name, []).append((items["step"], items[name]))
    assert found == EXPECTED
    assert tables == [(2, 3), (1, 3)]
    pages = [path.read_text() for path in (tmp_path / "wandb").rglob("*.html")]
    assert len(pages) == 2 and any("&lt;b&gt;" in page for page in pages)


def trackio_runs(folder: Path) -> list:
    """[name, config, logged rows] of every run in a folder of Trackio, read by a process of its own."""
    program = """
import json
from trackio.sqlite_storage import SQLiteStorage as store
names = [run["name"] for run in store.get_run_records("minisft")]
print(json.dumps([[n, store.get_run_config("minisft", n), store.get_logs("minisft", n)] for n in names], default=str))
"""
    said = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TRACKIO_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(said.stdout.splitlines()[-1])


def check_trackio(runs: list) -> None:
    ((name, config, rows),) = runs
    assert name.startswith("my run-") and config["train.learning_rate"] == 1e-4
    found = {tag: [(int(row["step"]), row[tag]) for row in rows if tag in row] for tag in EXPECTED}
    assert found == EXPECTED
    texts = [row["samples"]["_value"] for row in rows if "samples" in row]
    assert texts == [trackers.as_markdown(ROWS), trackers.as_markdown(ROWS[1:])]


@pytest.fixture
def trackio_folder(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    import trackio.sqlite_storage
    import trackio.utils

    folder = tmp_path / "trackio"
    folder.mkdir()
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", folder)  # read from the environment when it was imported
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_trackio_on_this_machine(tmp_path, trackio_folder):
    run_and_resume(tmp_path, "trackio")
    check_trackio(trackio_runs(trackio_folder))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_trackio_on_a_server(tmp_path, trackio_folder, monkeypatch):
    of_server = tmp_path / "server"
    of_server.mkdir()
    program = (
        "import sys, trackio; trackio.show(open_browser=False, block_thread=False, server_port=7899); sys.stdin.read()"
    )
    environment = os.environ | {"TRACKIO_DIR": str(of_server), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        line = next(line for line in server.stdout if "write_token=" in line)
        monkeypatch.setenv("TRACKIO_SERVER_URL", next(word for word in line.split() if "write_token=" in word))
        run_and_resume(tmp_path, "trackio")
    finally:
        server.communicate("")
    check_trackio(trackio_runs(of_server))
    assert not (trackio_folder / "minisft.db").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("store", ["database", "files"])
def test_mlflow(tmp_path, monkeypatch, store):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db" if store == "database" else (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    run_and_resume(tmp_path, "mlflow")
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(["0"])
    assert run.info.run_name == "my run" and run.info.status == "FINISHED"
    assert run.data.params.keys() == CONFIG.keys() and run.data.params["train.learning_rate"] == "0.0001"
    for name, values in EXPECTED.items():
        history = client.get_metric_history(run.info.run_id, name.replace("[:10%]", "_:10__"))
        assert [(metric.step, metric.value) for metric in history] == values
    paths = [file.path for file in client.list_artifacts(run.info.run_id, "samples")]
    assert paths == ["samples/step-00000002.md", "samples/step-00000003.md"]
    assert Path(client.download_artifacts(run.info.run_id, paths[0])).read_text() == trackers.as_markdown(ROWS)


# ---- trackers that fail or hang ---------------------------------------------------------------------------------


class Hanging(ModuleType):
    """A library whose function `where` blocks until the test is over."""

    def __init__(self, where: str, released: threading.Event):
        super().__init__("hanging")
        self.where, self.released, self.calls = where, released, []
        self.id = "r1"

    def __getattr__(self, function):
        def call(*args, **kwargs):
            self.calls.append(function)
            if function == self.where:
                self.released.wait(60)
            return self

        return call


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_neither_stops_nor_slows_the_run(tmp_path, monkeypatch, capsys, where):
    released = threading.Event()
    library = Hanging(where, released)
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(trackers.Sender.flush, "__defaults__", (0.1,))
    try:
        run = Loggers(tmp_path, ["wandb", "tensorboard"], "run", {})
        began = time.monotonic()
        for step in range(500):
            run.log(step, {"loss": float(step)})
        logged = time.monotonic() - began
        for _ in range(50):  # checkpoints: the first waits for it
            run.position()
        run.close()
        took = time.monotonic() - began
    finally:
        released.set()
    # 500 values in the time of a few milliseconds each at most; then 0.1 and 0.2 s of waiting, not 50 x 0.1
    assert logged < 10 and took - logged < 4
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 500
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert len(events.Scalars("train/loss")) == 500  # the other one has all
    assert capsys.readouterr().err.count("wandb has not finished") == 1


def test_a_tracker_that_hangs_does_not_fill_the_memory(monkeypatch, capsys):
    released, closed = threading.Event(), []
    monkeypatch.setattr(trackers, "MOST_WAITING", 100)
    sender = trackers.Sender(
        "slow", lambda: trackers.Tracker(lambda *_: released.wait(60), print, lambda: closed.append(1))
    )
    for step in range(300):
        sender.log(step, {"loss": math.nan})
    assert sender.calls.qsize() == 100 and capsys.readouterr().err.count("slow hangs") == 1
    released.set()
    sender.close()
    sender.join(10)
    assert capsys.readouterr().err == ""


def test_what_was_logged_is_passed_on_before_a_checkpoint_is_written(tmp_path, monkeypatch):
    library = Hanging("nothing", threading.Event())
    monkeypatch.setitem(sys.modules, "wandb", library)
    run = Loggers(tmp_path, ["wandb"], "run", {})
    for step in range(20):
        run.log(step, {"loss": 1.0})
    run.position()
    assert library.calls.count("log") == 20
    run.close()
    assert library.calls[-1] == "finish"
