"""`minisft selfcheck`: it passes for runs of every kind, and each check fails once what it guards is broken."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_dpo_run import write_pairs
from test_shared_turns import keys as turn_keys
from test_shared_turns import thinking_rows, thinking_tokenizer
from tiny import settings, train

from minisft import checkpoint, sft
from minisft.__main__ import main
from minisft.commands import selfcheck
from minisft.config.load import load
from minisft.config.values import as_toml
from minisft.data import loader
from minisft.kernels.common import chosen_backend
from minisft.model import decoder, lora
from minisft.selfcheck import checks, files, naive
from minisft.selfcheck.bench import Bench
from minisft.selfcheck.checks import CHECKS

PROCESSES = ("several ranks = one",)  # of those that start processes the normal tests see the comparison only
SLOW_IMPORT = ("exported = in transformers",)
QUICK = [name for name in CHECKS if name not in PROCESSES + SLOW_IMPORT]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("selfcheck")
    write_pairs(folder / "pairs.jsonl")
    train(folder, output_dir=str(folder / "first"), **{"train.max_steps": 4})
    thinking_tokenizer().save(folder / "thinking")
    (folder / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in thinking_rows()))
    return folder


def options(home: Path, kind: str) -> dict:
    base = {"model.config": None, "model.model_name_or_path": str(home / "first" / "model")}
    dpo = {"trainer_type": "dpo", "data.train_data": str(home / "pairs.jsonl"), "train.learning_rate": 1e-3}
    dpo |= {"train.num_train_epochs": 2}  # of one step each
    lora_keys = {**base, "lora.r": 4}
    own = {"model.tokenizer_name_or_path": str(home / "thinking"), "data.train_data": str(home / "turns.jsonl")}
    turns = turn_keys() | own | {"data.packing": True}
    stream = {"data.stream": True, "data.stream_rows": 20, "train.max_steps": 20}
    return {
        "sft": {"data.packing": True},
        "bf16": {"train.precision": "bf16", "model.gradient_checkpointing": True},
        "bf16 weights": {"train.weights_dtype": "bf16", "train.precision": "bf16"},
        "lora": lora_keys,
        "qlora": {**lora_keys, "model.load_in_4bit": True},
        "dpo": {**base, **dpo, "data.packing": True, "dpo.share_prompt": True},
        "dpo lora": {**lora_keys, **dpo, "dpo.loss_type": ["sigmoid", "sft"], "dpo.ld_alpha": 0.5},
        "kto": {**base, **dpo, "dpo.loss_type": "kto"},
        "turns": turns,
        "windows": turns | {"model.config": turns["model.config"] | {"model_type": "mistral", "sliding_window": 150}},
        "stream": {**stream, "train.lr_scheduler_type": "constant", "data.packing": True},
    }[kind]


@pytest.fixture
def bench(home, tmp_path):
    def make(kind: str = "sft", rows: int = 8, **more) -> Bench:
        config, _ = load({}, settings(home, **options(home, kind) | more), origin="test")
        return Bench(selfcheck.quiet(config), [], tmp_path, rows)

    return make


def failures(bench: Bench, names=QUICK) -> list[str]:
    rows = {name: selfcheck.run_check(CHECKS[name], bench) for name in names}
    return [f"{name}: {row}" for name, row in rows.items() if row["result"] == "FAILED"]


@pytest.mark.parametrize("kind", ["sft", "qlora", "dpo"])
def test_runs_pass(bench, kind):
    assert failures(bench(kind)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "bf16 weights", "lora", "dpo lora", "kto", "turns", "windows", "stream"])
def test_more_runs_pass(bench, kind):
    assert failures(bench(kind), [*QUICK, *SLOW_IMPORT]) == []


SHARED = ("packed = one by one", "documents are isolated")


@pytest.mark.parametrize("rows", [1, 8])
def test_documents_share_what_those_of_the_run_do(bench, rows):
    made = bench("turns", rows)
    found = checks.packing(made)
    assert found.passed and int(found.where.split("; ")[1].split()[0]) > 0
    documents = made.documents()
    assert documents.turns is None and len(documents) >= rows


def test_the_first_chunk_of_a_stream_is_checked(bench):
    assert (
        failures(bench("stream"), ["a step = the definition", "packed = one by one", "resumed = uninterrupted"]) == []
    )


def test_documents_that_come_twice_in_an_epoch(bench, home):
    source = {"path": str(home / "turns.jsonl"), "weight": 2}
    assert failures(bench("turns", 30, **{"data.train_data": [source]}), SHARED) == []


def test_trees_are_no_longer_than_the_windows(bench, monkeypatch):
    assert failures(bench("windows", 30), SHARED) == []
    monkeypatch.setattr(checks, "longest_tree", lambda config: None)
    assert failures(bench("windows", 30), SHARED)


# ---- what is broken is seen ---------------------------------------------------------------------------------------


def one_document(cu_seqlens, num_tokens):
    return torch.zeros(num_tokens, dtype=torch.int32), torch.full((num_tokens,), num_tokens, dtype=torch.int32)


def test_documents_that_see_each_other_are_found(bench, monkeypatch):
    monkeypatch.setattr(loader, "document_bounds", one_document)
    told = failures(bench(), ["packed = one by one", "documents are isolated"])
    assert len(told) == 2


@pytest.mark.parametrize("kind", ["turns", "dpo"])
def test_answers_that_see_the_answer_before_them_are_found(bench, monkeypatch, kind):
    """Documents that share a beginning, where the keys of one that has ended are still seen."""
    bounds = loader.tree_bounds
    monkeypatch.setattr(loader, "tree_bounds", lambda begin, first, end: bounds(begin, first, end.copy()))
    assert len(failures(bench(kind), SHARED)) == 2


def test_positions_that_do_not_begin_anew_are_found(bench, monkeypatch):
    make = loader.make_batch

    def shifted(*arguments, **options):
        batch = make(*arguments, **options)
        return replace(batch, position_ids=torch.arange(len(batch.input_ids), dtype=torch.int32) // 2)

    monkeypatch.setattr(loader, "make_batch", shifted)
    assert failures(bench(), ["a step = the definition"]) and failures(bench(), ["packed = one by one"])


def test_a_loss_that_is_divided_by_the_micro_batches_is_found(bench, monkeypatch):
    monkeypatch.setattr(sft, "weight", lambda batch: 1.0)
    assert failures(bench(), ["a step = the definition"]) and failures(bench(), ["accumulation: any split"])


def test_one_target_that_is_not_trained_is_found(bench, monkeypatch):
    loss = sft.loss

    def without_the_first(model, batch, *arguments, **options):
        return loss(model, replace(batch, targets=batch.targets.index_fill(0, torch.tensor([0]), -100)), *arguments)

    monkeypatch.setattr(sft, "loss", without_the_first)
    assert failures(bench(), ["a step = the definition"])


def test_a_kernel_that_is_slightly_wrong_is_found(bench, monkeypatch):
    right = checks.engine_step

    def step(run, *arguments):
        found = right(run, *arguments)
        if chosen_backend() != "reference":
            name = list(found.grads)[3]
            found.grads[name] *= 1.001
        return found

    monkeypatch.setattr(checks, "engine_step", step)
    told = failures(bench(), ["kernels = reference formulas"])
    assert len(told) == 1


def test_a_block_that_is_run_again_with_other_inputs_is_found(bench, monkeypatch):
    again = decoder.checkpoint
    monkeypatch.setattr(decoder, "checkpoint", lambda f, x, *rest, **o: again(f, x * (1 + 1e-6), *rest, **o))
    assert failures(bench(), ["checkpointing on = off"])


def test_an_adapter_that_cannot_be_switched_off_is_found(bench, monkeypatch):
    monkeypatch.setattr(lora, "adapters", lambda model: [])
    assert failures(bench("lora"), ["adapter off = base"])


def test_a_merge_with_another_scale_is_found(bench, monkeypatch):
    delta = lora.LoraLinear.delta
    monkeypatch.setattr(lora.LoraLinear, "delta", lambda self: delta(self) * 1.01)
    assert failures(bench("lora"), ["adapter merged = adapter"])


def test_one_bit_of_the_exported_file_is_found(bench, monkeypatch):
    read = files.load_model

    def spoilt(*arguments, **options):
        model = read(*arguments, **options)
        model.layers[1].mlp.down_proj.weight.data[0, 0] *= 1 + 2**-20
        return model

    monkeypatch.setattr(files, "load_model", spoilt)
    assert failures(bench(), ["exported = in memory"])


def test_moments_that_are_lost_in_a_checkpoint_are_found(bench, monkeypatch):
    monkeypatch.setattr(checkpoint, "_load_optimizer", lambda *arguments: None)
    assert failures(bench(), ["resumed = uninterrupted"])


def test_gradients_that_the_ranks_do_not_sum_are_found(bench, monkeypatch):
    """The steps of one rank, and of one of two, whose sum is missing, in place of the processes."""
    made = bench()
    alone = made.alone()
    half = replace(alone, grads={name: grad / 2 for name, grad in alone.grads.items()})
    monkeypatch.setattr(checks, "ranks_step", lambda bench, count, device: alone)
    assert failures(made, PROCESSES) == []
    monkeypatch.setattr(checks, "ranks_step", lambda bench, count, device: {1: alone, 2: half}[count])
    assert failures(made, PROCESSES)


@pytest.mark.slow  # a process that imports transformers
def test_logits_of_transformers_that_differ_are_found(bench, monkeypatch):
    write = files.write_whole

    def spoilt(model, *arguments):
        model.layers[1].mlp.down_proj.weight.data[0, 0] += 0.1
        lines = write(model, *arguments)
        model.layers[1].mlp.down_proj.weight.data[0, 0] -= 0.1
        return lines

    monkeypatch.setattr(files, "write_whole", spoilt)
    assert failures(bench(), SLOW_IMPORT)


SEVERAL = {
    "ddp": ({}, "2 ranks"),
    "fsdp2": ({"parallel.strategy": "fsdp2", "train.precision": "bf16"}, "2 ranks by fsdp2"),
    "hsdp": ({"parallel.strategy": "hsdp", "parallel.replicas": 3}, "4 ranks by hsdp"),
    "context": ({"parallel.context_parallel": 4}, "2 ranks, split documents"),
}


@pytest.mark.slow  # three to five processes that import torch
@pytest.mark.parametrize("kind", SEVERAL)
def test_several_processes_take_the_step_of_one(kind, home, tmp_path, capsys):
    keys, told = SEVERAL[kind]
    values = settings(home, output_dir=str(tmp_path / "out"), **keys)
    (tmp_path / "run.toml").write_text("".join(f"{key} = {as_toml(value)}\n" for key, value in values.items()))
    assert main(["selfcheck", str(tmp_path / "run.toml"), "--only", "rank"]) == 0
    assert f"; {told}\n" in capsys.readouterr().out


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def file(home, tmp_path):
    def write(kind: str = "sft") -> str:
        values = settings(home, **options(home, kind), output_dir=str(tmp_path / "out"))
        values = {key: value for key, value in values.items() if value is not None}
        (tmp_path / "run.toml").write_text("".join(f"{key} = {as_toml(value)}\n" for key, value in values.items()))
        return str(tmp_path / "run.toml")

    return write


def test_the_table_its_exit_codes_and_the_untouched_output_folder(file, tmp_path, capsys, monkeypatch):
    words = ["selfcheck", file(), "--only", "split", "--only", "adapter off"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "accumulation: any split" in shown and "passed" in shown and "no adapter: all weights train" in shown
    assert "1 passed, 1 skipped, 0 failed" in shown and max(map(len, shown.splitlines())) <= 100
    assert {path.name for path in tmp_path.iterdir()} == {"run.toml", "token_cache"}
    monkeypatch.setattr(sft, "weight", lambda batch: 1.0)
    assert main([*words, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"] and [row["result"] for row in found["checks"]] == ["FAILED", "skipped"]


@pytest.mark.parametrize("words", [["--rows", "0"], ["--only", "nothing"], ["--naive=0"], ["--rowz", "3"]])
def test_mistakes_on_the_command_line_are_told(file, words, capsys):
    assert main(["selfcheck", file(), *words]) == 2
    assert "minisft: error" in capsys.readouterr().err


def test_a_stream_is_compared_with_the_naive_loop_in_its_first_chunk(file, capsys):
    assert main(["selfcheck", file("stream"), "--naive", "9"]) == 0
    shown = capsys.readouterr().out
    assert "first chunk" in shown and 1 < shown.count("e-0") < 9


@pytest.mark.parametrize("kind", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_the_naive_loop_has_the_losses_of_the_run(file, kind, capsys, monkeypatch):
    words = ["selfcheck", file(kind), "--naive", "2", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["steps"]) == 2 and found["largest"] < 1e-5
    assert found["steps"][0]["minisft"] != found["steps"][1]["minisft"]
    monkeypatch.setattr(naive, "lr_factor", lambda **options: 0.5)
    assert main(words) == 1


def test_a_new_adapter_is_moved_so_that_it_shows_what_is_wrong_with_it(bench):
    run = bench("lora").prepared()
    assert all(p.any() for name, p in run.model.named_parameters() if name.endswith("lora_B"))
