"""Stages: the list is read and checked whole, run one by one, and goes on wherever it was stopped."""

import json
import signal
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
from test_ranks import free_port, join
from test_resume import assert_same, outcome, stop_after
from tiny import logged, settings, start, weights

from minisft import finish, loop, ranks
from minisft import train as command
from minisft.commands import audit
from minisft.config.load import load
from minisft.config.sections import DpoSection, config_to_dict
from minisft.config.stages import load_stages
from minisft.config.values import as_toml
from minisft.errors import CONFIG, DATA, MODEL, STOPPED, UserError, run_command
from minisft.train import main, run

LORA = "lora.r = 4\nlora.lora_alpha = 8.0\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Rows and a tokenizer, shared by the runs of this file."""
    folder = tmp_path_factory.mktemp("stages")
    settings(folder)
    return folder


@pytest.fixture
def common(home, tmp_path) -> str:
    """The keys of a tiny run as TOML, for the stages to have in common; output in tmp_path/out."""
    keys = settings(home, output_dir=str(tmp_path / "out"), **{"train.num_train_epochs": 1})
    keys["data.cache_dir"] = str(home / "cache")
    return "".join(f"{key} = {as_toml(value)}\n" for key, value in keys.items())


@pytest.fixture
def write(tmp_path, common):
    """write(first=..., second=..., more=...) -> a file with two stages, each a file of these lines."""

    def write(first: str = "", second: str = "train.seed = 7\n", more: str = "", names: str = "first second") -> Path:
        for name, text in zip(("first", "second"), (first, second)):
            (tmp_path / f"{name}.toml").write_text(text)
        path = tmp_path / "stages.toml"
        path.write_text(f"stages = {as_toml([f'{name}.toml' for name in names.split()])}\n{common}{more}")
        return path

    return write


def adapter(out: Path) -> bytes:
    return (out / "model" / "adapter_model.safetensors").read_bytes()


def refused(*arguments, code: int = CONFIG, **overrides) -> UserError:
    with pytest.raises(UserError) as caught:
        run(*arguments, **overrides)
    assert caught.value.exit_code == code
    return caught.value


# ---- what a list means ------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_each_stage_has_the_common_keys_then_its_own_then_the_command_line(write, tmp_path):
    (tmp_path / "base.toml").write_text("train.seed = 1\ntrain.warmup_steps = 1\ntrain.learning_rate = 0.5\n")
    path = write('extends = "base.toml"\ntrain.seed = 2\n', "train.seed = 3\n")
    first, second = (stage.config for stage in load_stages(path, {"warmup_steps": 9}))
    assert (first.train.seed, second.train.seed) == (2, 3)
    assert (first.train.learning_rate, second.train.learning_rate) == (0.5, 0.01)  # 0.01 is the common one
    assert first.train.warmup_steps == second.train.warmup_steps == 9
    assert first.data == second.data and first.data.max_length == 64


def test_common_keys_of_dpo_are_for_the_stages_that_read_them(write):
    path = write("", 'trainer_type = "dpo"\n', more="[dpo]\nld_alpha = 0.7\n")
    first, second = (stage.config for stage in load_stages(path, {"dpo.beta": 0.2}))
    assert first.dpo == DpoSection() and (second.dpo.ld_alpha, second.dpo.beta) == (0.7, 0.2)
    error = refused(write("dpo.beta = 0.2\n", 'trainer_type = "dpo"\n'))
    assert "stage 1 of 2 (first.toml)" in error.message and 'trainer_type = "sft"' in error.message


def test_where_they_start_and_write(write, tmp_path):
    out, path = tmp_path / "out", write()
    first, second = load_stages(path)
    assert (first.title, second.title) == ("stage 1 of 2: first.toml", "stage 2 of 2: second.toml")
    assert first.config.output_dir == f"{out}/1-first" and second.config.output_dir == f"{out}/2-second"
    assert first.config.model.config and first.config.model.model_name_or_path is None
    model = second.config.model
    assert (model.model_name_or_path, model.config, model.tokenizer_name_or_path) == (
        f"{out}/1-first/model",
        None,
        None,
    )
    assert "stage before" in second.origins["model.model_name_or_path"]
    assert first.origins["output_dir"] == f"{path}, numbered"


def test_a_stage_may_start_elsewhere_and_write_elsewhere(write, tmp_path):
    other = 'output_dir = "elsewhere"\nmodel.config = "none"\nmodel.model_name_or_path = "a/b"\n'
    first, second = load_stages(write("", other))
    assert second.config.model.model_name_or_path == "a/b" and second.previous is None
    assert second.config.model.tokenizer_name_or_path == first.config.model.tokenizer_name_or_path  # the common one
    assert second.config.output_dir == "elsewhere"


def test_the_command_lines_folder_is_that_of_all_and_its_model_the_firsts(write):
    path = write("", 'output_dir = "elsewhere"\n')
    overrides = {"output_dir": "runs/x", "model_name_or_path": "a/b", "model.config": "none"}
    first, second = (stage.config for stage in load_stages(path, overrides))
    assert (first.output_dir, second.output_dir) == ("runs/x/1-first", "runs/x/2-second")
    assert first.model.model_name_or_path == "a/b"
    assert second.model.model_name_or_path.endswith("runs/x/1-first/model")


def test_files_tables_and_dicts_say_the_same(write, tmp_path, common, monkeypatch):
    path = write("train.seed = 5\n", "train.seed = 7\n")
    tables = tmp_path / "tables.toml"
    tables.write_text(f"{common}[[stages]]\nextends = 'first.toml'\n[[stages]]\n[stages.train]\nseed = 7\n")
    mixed = tmp_path / "mixed.toml"
    mixed.write_text(f"stages = ['first.toml', {{train = {{seed = 7}}, output_dir = 'x'}}]\n{common}")
    expected = [stage.config.train for stage in load_stages(path)]
    monkeypatch.chdir(tmp_path)
    keys = dict(line.split(" = ", 1) for line in common.splitlines() if line.startswith("output_dir"))
    as_dict = {"stages": ["first.toml", {"train": {"seed": 7}}], "extends": "common.toml"}
    (tmp_path / "common.toml").write_text(common)
    for source in (tables, mixed, as_dict):
        stages = load_stages(source)
        assert [stage.config.train for stage in stages] == expected
    assert [Path(s.config.output_dir).name for s in load_stages(tables)] == ["1-sft", "2-sft"]
    assert load_stages(mixed)[1].config.output_dir == "x" and keys
    assert load_stages(as_dict)[0].config.output_dir == f"{tmp_path}/out/1-first"


def test_a_file_that_extends_a_list_has_the_list(write, tmp_path):
    write()
    (tmp_path / "more.toml").write_text('extends = "stages.toml"\ntrain.warmup_steps = 4\n')
    assert [s.config.train.warmup_steps for s in load_stages(tmp_path / "more.toml")] == [4, 4]


def test_a_file_without_stages_is_one_run(tmp_path, common):
    path = tmp_path / "one.toml"
    path.write_text(common)
    (stage,) = load_stages(path)
    assert (stage.config, stage.origins) == load(path) and stage.title == ""


# ---- what is refused, before anything runs ----------------------------------------------------------------------


@pytest.mark.parametrize("stages", ["[]", '"first.toml"', "{}", "3"])
def test_no_list(tmp_path, common, stages):
    path = tmp_path / "stages.toml"
    path.write_text(f"stages = {stages}\n{common}")
    assert "expected a list of stages" in refused(path).message


@pytest.mark.parametrize("item", ["3", "[]", "true"])
def test_no_stage(tmp_path, common, item):
    (tmp_path / "first.toml").write_text("")
    path = tmp_path / "stages.toml"
    path.write_text(f"stages = ['first.toml', {item}]\n{common}")
    assert "stage 2 of 2" in refused(path).message


@pytest.mark.parametrize(
    ("second", "said", "code"),
    [
        ("train.leaning_rate = 1\n", "unknown key train.leaning_rate", CONFIG),
        ("train.seed = 'x'\n", "expected a whole number", CONFIG),
        ("train.min_lr = 1.0\n", "the end is above the peak", CONFIG),
        ("data.train_data = 'missing.jsonl'\n", "missing.jsonl", DATA),
        ("evaluate.generate_data = 'missing.jsonl'\n", "missing.jsonl", DATA),
        ("model.config = 'none'\nmodel.model_name_or_path = '/no/where'\n", "'/no/where' is no folder", MODEL),
        ("model.config = 'none'\nmodel.model_name_or_path = '.'\n", "'.' holds no model", MODEL),
        ("model.tokenizer_name_or_path = './nowhere'\n", "model.tokenizer_name_or_path = './nowhere'", MODEL),
        ("extends = 'missing.toml'\n", "missing.toml", CONFIG),
        ("extends = 'second.toml'\n", "in a circle", CONFIG),
        ("extends = 'stages.toml'\n", "lists stages itself", CONFIG),
        ("stages = ['first.toml']\n", "lists stages itself", CONFIG),
        ("train = 3\n", "expected a table", CONFIG),
        ("not toml\n", "not a TOML file", CONFIG),
    ],
)  # fmt: skip
def test_a_mistake_in_the_second_stage_is_told_before_the_first_begins(write, tmp_path, second, said, code):
    message = refused(write("", second), code=code).message
    assert said in message and message.startswith("stage 2 of 2") and "second.toml" in message
    assert not (tmp_path / "out").exists()


def test_a_missing_stage_and_a_list_in_itself(write):
    assert "third.toml" in refused(write(names="first third")).message
    assert "lists stages itself" in refused(write(names="first stages")).message


def test_two_stages_in_one_folder(write):
    message = refused(write("output_dir = 'x'\n", "output_dir = './x'\n")).message
    assert "is the folder of stage 1 of 2: first.toml too" in message


def test_a_checkpoint_belongs_to_one_stage(write, tmp_path):
    path = write(more='checkpoint.resume = "runs/x/checkpoints/step-00000003"\n')
    assert "is a checkpoint of one stage" in refused(path).message
    assert "is a checkpoint of one stage" in refused(write(), resume="x").message
    write("checkpoint.resume = 'x'\n")
    assert load_stages(tmp_path / "stages.toml")[0].config.checkpoint.resume == "x"


def test_where_one_run_is_wanted_a_list_is_told(write):
    with pytest.raises(UserError, match="lists stages, which are several runs"):
        load(write())


# ---- running ----------------------------------------------------------------------------------------------------

PAIRS = {"full, full": ("", ""), "full, lora": ("", LORA), "lora, lora": (LORA, LORA), "lora, full": (LORA, "")}


@pytest.fixture(scope="module")
def trained(home) -> Path:
    """A model to put adapters beside."""
    run({}, **settings(home, output_dir=str(home / "base"), **{"train.num_train_epochs": 1}))
    return home / "base" / "model"


def by_hand(common_file: Path, out: Path, *stages: tuple[str, dict]) -> list[Path]:
    """The same stages as runs of their own, each told where to start."""
    folders = []
    for number, (lines, keys) in enumerate(stages):
        folder = out / f"hand-{number}"
        file = out / f"hand-{number}.toml"
        file.write_text(f'extends = "{common_file}"\n{lines}')
        if folders:
            keys = keys | {"model.model_name_or_path": str(folders[-1] / "model"), "model.config": "none"}
            keys |= {"model.tokenizer_name_or_path": "none"}
        assert run(file, **keys, output_dir=str(folder)).exit_code == 0
        folders.append(folder)
    return folders


@pytest.mark.parametrize("pair", PAIRS)
def test_stages_are_the_runs_by_hand_bit_for_bit(write, tmp_path, common, trained, pair):
    first, second = PAIRS[pair]
    begin = f'model.config = "none"\nmodel.model_name_or_path = "{trained}"\ntrain.max_steps = 2\n' + first
    second += "train.seed = 7\ntrain.max_steps = 2\n"
    result = run(write(begin, second))
    (tmp_path / "common.toml").write_text(common)
    hand = by_hand(tmp_path / "common.toml", tmp_path, (begin, {}), (second, {}))
    outs = tmp_path / "out" / "1-first", tmp_path / "out" / "2-second"
    for one, other, lora in zip(outs, hand, PAIRS[pair]):
        assert logged(one) == logged(other)
        assert (adapter(one) == adapter(other)) if lora else (weights(one) == weights(other))
    assert result.output_dir == tmp_path / "out" / "2-second" and result.step == 2
    if PAIRS[pair][1]:
        config = json.loads((result.model_dir / "adapter_config.json").read_text())
        base = trained if first else tmp_path / "out" / "1-first" / "model"
        assert config["base_model_name_or_path"] == str(base)


def test_each_says_what_it_is_and_runs_alone_by_its_resolved_configuration(write, tmp_path, capsys):
    path = write()
    assert main([str(path)]) == 0
    said = capsys.readouterr().out
    for line in ("stage 1 of 2: first.toml -> ", "stage 2 of 2: second.toml -> ", "all stages are done:"):
        assert f"\n{line}" in said
    out = tmp_path / "out" / "2-second"
    resolved = load(out / "config.toml")[0]
    assert config_to_dict(resolved) == config_to_dict(load_stages(path)[1].config)
    before = (out / "model" / "manifest.json").read_bytes()
    assert main([str(out / "config.toml")]) == 0
    assert "finished already, at step 8" in capsys.readouterr().out
    assert (out / "model" / "manifest.json").read_bytes() == before


def test_stopped_in_the_second_it_ends_in_the_same_bytes(write, tmp_path, trained, monkeypatch):
    begin = f'model.config = "none"\nmodel.model_name_or_path = "{trained}"\ntrain.max_steps = 2\n' + LORA
    path = write(begin, LORA + "train.seed = 7\n")
    assert run(path, output_dir=str(tmp_path / "whole")).exit_code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5, signal.SIGTERM)  # the first stage has 2 steps
        assert main([str(path)]) == STOPPED
    out = tmp_path / "out"
    assert (out / "1-first" / "model").exists() and not (out / "2-second" / "model").exists()
    assert main([str(path)]) == 0
    for name in ("1-first", "2-second"):
        whole = tmp_path / "whole" / name
        assert logged(out / name) == logged(whole)
        assert adapter(out / name) == adapter(whole)


def test_killed_in_the_second_it_ends_in_the_same_bytes(home, write, tmp_path):
    path = write("train.max_steps = 2\n", "train.num_train_epochs = 3\ncheckpoint.save_steps = 4\n")
    assert run(path, output_dir=str(tmp_path / "whole")).exit_code == 0
    process = start(run_quietly, str(path))
    while process.is_alive() and len(list(tmp_path.glob("out/2-second/checkpoints/step-*"))) < 2:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "out/2-second/model").exists()
    assert run(path).exit_code == 0
    one, other = (outcome(tmp_path / name / "2-second") for name in ("out", "whole"))
    assert_same(one, other)


def run_quietly(path: str, output: str = "/dev/null", **environment: str) -> None:
    """The command, for a process of its own."""
    import os

    os.environ |= environment
    sys.stdout = sys.stderr = open(output, "w")
    sys.exit(run_command(lambda: main([path])))


def test_a_signal_while_a_stage_is_written_ends_the_command_before_the_next(write, tmp_path, monkeypatch, capsys):
    path, honest = write(), finish.export_model

    def export_model(*arguments):
        signal.raise_signal(signal.SIGTERM)
        honest(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finish, "export_model", export_model)
        assert main([str(path)]) == STOPPED
    assert "stopped after stage 1 of 2" in capsys.readouterr().out
    assert (tmp_path / "out/1-first/model").exists() and not (tmp_path / "out/2-second").exists()
    assert main([str(path)]) == 0


# ---- what is finished -------------------------------------------------------------------------------------------


def test_finished_stages_are_skipped_without_model_and_data(home, write, tmp_path, monkeypatch, capsys):
    path = write("", f"evaluate.generate_data = '{home}/rows.jsonl[:2]'\n")
    assert run(path).step == 8
    samples = tmp_path / "out/2-second/samples.jsonl"
    samples.unlink()  # as if killed before
    assert "eval_exact_match" in run(path).metrics and samples.exists()
    capsys.readouterr()
    monkeypatch.setattr(loop, "run", lambda *arguments: pytest.fail("it runs"))
    began = time.perf_counter()
    result = run(path, **{"log.logging_steps": 3, "save_steps": 7})  # what changes no result
    assert time.perf_counter() - began < 0.5  # measured: 0.01 s, and a stage of this size takes as long as the bound
    assert result.step == 8 and result.model_dir == tmp_path / "out/2-second/model" and result.exit_code == 0
    assert capsys.readouterr().out.count("finished, at step 8") == 2


def test_a_changed_first_stage(write, tmp_path, capsys):
    """It is refused or trained further as a run is; a second stage that began from another model is never resumed."""
    few = "train.per_device_train_batch_size = 32\n"  # 2 steps

    def write_first(lines=""):
        return write(few + lines, few + "train.seed = 7\n")

    out, path = tmp_path / "out", write_first()
    run(path)
    before = weights(out / "1-first")

    # a finished run stays as it is
    message = refused(write_first("train.learning_rate = 0.5\n")).message
    assert "1-first is finished, at step 2, with another configuration: train.learning_rate 0.01 -> 0.5" in message
    assert weights(out / "1-first") == before

    # trained anew to the same weights: nothing has changed for the second
    run(out / "1-first" / "config.toml", resume="never")
    capsys.readouterr()
    run(write_first())
    assert capsys.readouterr().out.count("finished, at step 2") == 2

    # damaged: written again
    (out / "1-first" / "model" / "model.safetensors").write_bytes(b"half")
    run(path)
    assert weights(out / "1-first") == before

    # trained on
    longer = write_first("train.num_train_epochs = 2\n")
    message = refused(longer).message
    assert f"{out}/2-second/checkpoints/step-00000002 cannot be resumed" in message
    assert "started from another model" in message
    assert run(out / "1-first" / "config.toml").step == 4  # the first is as it was asked for
    assert run(longer, resume="never").exit_code == 0


# ---- one process ------------------------------------------------------------------------------------------------


def test_the_model_of_a_stage_is_gone_before_the_next_is_made(write, monkeypatch):
    alive, honest = [], loop.prepare

    def prepare(*arguments):
        assert [model for model in alive if model() is not None] == []
        parts = honest(*arguments)
        alive.extend(map(weakref.ref, (parts.model, parts.optimizer)))
        return parts

    monkeypatch.setattr(loop, "prepare", prepare)
    assert run(write(), **{"log.report_to": []}).exit_code == 0
    assert len(alive) == 4


def test_two_ranks_go_through_both_stages_in_one_group(write, tmp_path):
    path = write(*["train.per_device_train_batch_size = 4\ntrain.max_steps = 3\n"] * 2)
    assert run(path, output_dir=str(tmp_path / "one"), **{"train.per_device_train_batch_size": 8}).exit_code == 0
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        start(partial(run_quietly, **ranks, RANK=str(i), LOCAL_RANK=str(i)), str(path), str(tmp_path / f"said-{i}"))
        for i in (0, 1)
    ]
    assert join(processes) == (0, 0), (tmp_path / "said-0").read_text() + (tmp_path / "said-1").read_text()
    assert "stage 2 of 2: second.toml" in (tmp_path / "said-0").read_text()
    assert (tmp_path / "said-1").read_text() == ""
    for name in ("1-first", "2-second"):
        losses = logged(tmp_path / "one" / name)
        assert logged(tmp_path / "out" / name) == pytest.approx(losses, rel=1e-4)  # Adam amplifies the last bits


@pytest.mark.quick
def test_one_stage_is_a_list_too(write, tmp_path):
    path = write(names="first")
    assert run(path).output_dir == tmp_path / "out" / "1-first"
    assert command.run(path, max_steps=9).step == 9
    assert ranks.world_size() == 1


def test_audit_reads_the_data_of_every_stage(write, capsys):
    path = write(second="data.max_length = 32\n")
    assert audit.main([str(path)]) in (0, DATA)  # the rows are random letters
    said = capsys.readouterr().out
    assert "== stage 1 of 2: first.toml" in said and "== stage 2 of 2: second.toml" in said
    with pytest.raises(UserError, match="--json with 2 stages"):
        audit.main([str(path), "--json"])
