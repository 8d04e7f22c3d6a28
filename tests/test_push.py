"""`minisft export --push`, with the real client against a local server, and the model card.

huggingface_hub reads its settings when it is imported, so the command runs in a Python of its own. The server has no Xet storage,
which is switched off; then large files take the older way beside the commit.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hub_server import TOKEN, serve
from tiny import settings, train
from tiny_models import CONFIGS, tiny

from minisft.atomic_folder import verify_folder
from minisft.card import base_name, card_of_whole, license_of, with_header
from minisft.data.tokenizer import train_tokenizer
from minisft.errors import SAVE, UserError
from minisft.model.load import load_model
from minisft.model.save import save_model
from minisft.model.start import Start
from minisft.upload import check_for_paths

SECRET = "a-secret-in-the-configuration"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run whose configuration has what no card may show."""
    folder = tmp_path_factory.mktemp(SECRET)
    train(folder, **settings(folder, **{"train.max_steps": 4, "data.eval_fraction": 0.1, "log.report_to": []}))
    return folder / "out"


CLIENT = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from minisft.__main__ import main

for line in sys.stdin:
    words, os.environ["HF_TOKEN"] = json.loads(line)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(hub, a process that runs commands with the settings that point there)"""
    with serve() as hub:
        hub.uploads = tmp_path_factory.mktemp("hub")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(hub.uploads / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        with subprocess.Popen([sys.executable, "-c", CLIENT], **options) as process:
            yield hub, process
            process.stdin.close()


@pytest.fixture
def hub(served):
    hub = served[0]
    hub.repositories.clear()
    hub.large.clear()
    hub.log.clear()
    hub.refuse_puts = 0
    shutil.rmtree(hub.uploads)
    hub.uploads.mkdir()
    hub.process = served[1]
    return hub


def export(hub, *arguments: object, token: str = TOKEN) -> SimpleNamespace:
    hub.process.stdin.write(json.dumps([["export", *map(str, arguments)], token]) + "\n")
    hub.process.stdin.flush()
    code, out, err = json.loads(hub.process.stdout.readline())
    return SimpleNamespace(returncode=code, stdout=out, stderr=err)


def header_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


# ---------------------------------------------------------------- the card


def test_the_card_of_a_run(run):
    card = (run / "model" / "README.md").read_text()
    assert header_of(card) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["minisft", "sft"],
    }  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    for part in (
        "`rows.jsonl`",
        "`learning_rate` | 0.01",
        "| steps | 4 |",
        f"{losses[0]:.4g}",
        f"{losses[-1]:.4g}",
        "`eval_loss`",
    ):
        assert part in card, part
    assert torch.__version__ in card
    assert verify_folder(run / "model") is None  # it is part of the export


def test_no_path_or_secret_is_in_the_card(run):
    card = (run / "model" / "README.md").read_text()
    assert SECRET not in card and str(run.parent) not in card and str(Path.home()) not in card
    for line in (run / "config.toml").read_text().splitlines():
        if SECRET in line:
            break
    else:
        pytest.fail("the configuration of the test has no such path")


def test_names_that_end_a_cell_do_not_break_the_tables(tmp_path):
    keys = settings(tmp_path, **{"train.max_steps": 1})
    odd = tmp_path / "a|b`c.jsonl"
    odd.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    train(tmp_path, **keys | {"data.train_data": str(odd)})
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    (line,) = (line for line in card.splitlines() if "jsonl" in line)
    assert line.count("|") == 5 and line.count("`") == 2


def test_the_base_the_data_sets_and_the_license(tmp_path):
    start = Start("owner/base", None, tmp_path, "0" * 40, "0" * 40)
    assert base_name(start) == "owner/base"
    assert base_name(replace(start, name="/home/me/secret/base", commit=None)) == "base"
    assert base_name(None) is None and license_of(start) is None
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n")
    assert license_of(start) == "apache-2.0"
    card = with_header({"base_model": "a/b", "library_name": "peft"}, "text")
    changed = card_of_whole(card, {"library_name": "transformers", "base_model_relation": "finetune"})
    assert header_of(changed) == {
        "base_model": "a/b",
        "library_name": "transformers",
        "base_model_relation": "finetune",
    }
    assert changed.endswith("---\ntext")
    assert header_of(card_of_whole(with_header({}, ""), {"base_model_relation": "finetune"})) == {}


@pytest.mark.parametrize("base", ["`smol`", "[owner/base](https://huggingface.co/owner/base)"])
def test_the_card_of_a_merged_model_does_not_say_that_it_is_an_adapter(base):
    card = with_header({}, f"\n# run\n\nThis model is an adapter (LoRA) for {base}, made by preference tuning.\n")
    whole = card_of_whole(card, {"library_name": "transformers"})
    assert f"This model is {base} with an adapter (LoRA) merged into it, made by preference tuning.\n" in whole
    full = with_header({}, f"\nThis model is a fine-tuned version of {base}, made by preference tuning.\n")
    assert card_of_whole(full, {}) == full


# ---------------------------------------------------------------- uploads


def test_a_pushed_model_is_the_exported_one(run, hub, tmp_path):
    done = export(hub, run, tmp_path / "out", "--push", "me/model")
    assert done.returncode == 0, done.stderr
    assert hub.repositories["models", "me/model"].access == "private"
    there, here = hub.uploads / "me" / "model", tmp_path / "out"
    names = {path.name for path in here.iterdir()} - {"manifest.json"}
    assert {path.name for path in there.iterdir()} == names and "README.md" in names
    for name in names:
        assert (there / name).read_bytes() == (here / name).read_bytes()
    ours, theirs = load_model(run / "model"), load_model(there)
    assert all(torch.equal(p, theirs.get_parameter(name)) for name, p in ours.named_parameters())
    assert "/me/model/commit/" in done.stdout


def test_an_upload_that_broke_off_sends_only_the_rest(run, hub, tmp_path):
    hub.refuse_puts = 1
    command = (run, tmp_path / "out", "--push", "me/model")
    done = export(hub, *command)
    assert done.returncode == SAVE and "the same command again" in done.stderr and "Traceback" not in done.stderr
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    hub.log.clear()
    assert export(hub, *command).returncode == 0
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before  # it was not written again
    puts = [line for line in hub.log if line.startswith("PUT")]
    hub.log.clear()
    assert export(hub, *command).returncode == 0
    assert puts and not [line for line in hub.log if line.startswith("PUT")]


def test_another_export_in_that_folder_is_not_pushed(run, hub, tmp_path):
    assert export(hub, run, tmp_path / "out", "--gguf", "f32").returncode == 0
    done = export(hub, run, tmp_path / "out", "--push", "me/model")
    assert done.returncode == 2 and "is not this export" in done.stderr
    assert not [line for line in hub.log if "/commit/" in line]


def test_a_public_name_needs_the_option(run, hub, tmp_path):
    (hub.uploads / "me" / "known").mkdir(parents=True)
    hub.add("models", "me/known", hub.uploads / "me" / "known")
    done = export(hub, run, tmp_path / "out", "--push", "me/known")
    assert done.returncode == SAVE and "--public" in done.stderr
    assert not (tmp_path / "out").exists() and not list((hub.uploads / "me" / "known").iterdir())
    assert export(hub, run, tmp_path / "out", "--push", "me/known", "--public").returncode == 0
    assert export(hub, run, tmp_path / "new", "--push", "me/new", "--public").returncode == 0
    assert hub.repositories["models", "me/new"].access == "public"


@pytest.mark.parametrize(
    "options, token, named",
    [
        (["--push", "model"], TOKEN, "owner/name"),
        (["--push", "me/model"], "", "HF_TOKEN"),
        (["--push", "me/model"], "hf_wrong", "refuses the token"),
        (["--push", "others/model"], TOKEN, "refuses the token"),
        (["--public"], TOKEN, "--push owner/name"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(options, token, named, run, hub, tmp_path):
    done = export(hub, run, tmp_path / "out", *options, token=token)
    assert done.returncode in (2, SAVE) and named in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_base_on_this_machine_is_not_pushed(hub, tmp_path):
    """Others cannot load it, and its path is nobody's business."""
    tokenizer = train_tokenizer([], vocab_size=259)
    save_model(tiny(CONFIGS["llama"] | {"vocab_size": 259}), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    keys = settings(tmp_path, **{"train.max_steps": 2, "lora.r": 2, "model.config": None})
    keys |= {"model.model_name_or_path": str(tmp_path / "base"), "model.tokenizer_name_or_path": None}
    train(tmp_path, **keys)
    card = header_of((tmp_path / "out" / "model" / "README.md").read_text())
    assert card["library_name"] == "peft" and "base_model" not in card and "lora" in card["tags"]
    done = export(hub, tmp_path / "out", tmp_path / "a", "--push", "me/adapter")
    assert done.returncode == SAVE and "--merge" in done.stderr and "base_model_name_or_path" in done.stderr
    assert (
        export(hub, tmp_path / "out", tmp_path / "b", "--merge", "--dtype", "fp32", "--push", "me/merged").returncode
        == 0
    )
    assert header_of((hub.uploads / "me" / "merged" / "README.md").read_text())["library_name"] == "transformers"


def test_paths_are_looked_for_in_every_file_of_settings(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a": [{"_name_or_path": "/not/there"}, "a/b", "/"]}))
    check_for_paths(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"a": [{"_name_or_path": str(tmp_path)}]}))
    with pytest.raises(UserError, match="_name_or_path is a path of this machine"):
        check_for_paths(tmp_path)
