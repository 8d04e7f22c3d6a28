"""`minisft init`: what it asks, proposes and writes."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from minisft import memory
from minisft.__main__ import main
from minisft.commands import init
from minisft.config.load import load
from minisft.config.sections import config_to_dict
from minisft.config.stages import load_stages
from minisft.errors import SAVE, UserError, run_command
from minisft.init import detect
from minisft.init.propose import METHODS, Hardware, parse_hardware, propose, size_from_config, size_from_name
from minisft.train import run

ROOT = Path(__file__).parents[1]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with rows, and a folder that looks like a model of 0.4 B."""
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    (tmp_path / "turns.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    (tmp_path / "small").mkdir()
    config = {"hidden_size": 1024, "num_hidden_layers": 14, "vocab_size": 151936, "num_attention_heads": 16}
    config |= {"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "tie_word_embeddings": True}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    return tmp_path


def options(**changed: str | None) -> list[str]:
    given = {"model": "small", "data": "rows.jsonl", "hardware": "24gb", "method": "full", "output": "a.toml"} | changed
    return ["--yes", *(word for k, v in given.items() if v is not None for word in (f"--{k.replace('_', '-')}", v))]


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hardware", ["cpu", "8gb", "16gb", "24gb", "48gb", "80gb", "8x80gb"])
@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_every_answer_gives_a_file_that_loads(folder, capsys, monkeypatch, trainer, method, hardware):
    monkeypatch.setattr(init, "cpu_gigabytes", lambda: 32.0)
    data = "pairs.jsonl" if trainer == "dpo" else "rows.jsonl"
    assert init.main(options(trainer=trainer, method=method, hardware=hardware, data=data)) == 0
    config, _ = load("a.toml")
    assert (config.trainer_type, config.data.train_data) == (trainer, str(folder / data))
    assert (config.lora.r is None, config.model.load_in_4bit) == (method == "full", method == "qlora")
    expected = {"sft": {"full": 2e-5}, "dpo": {"full": 1e-6}}[trainer].get(method, 2e-4 if trainer == "sft" else 5e-6)
    assert config.train.learning_rate == expected
    text = (folder / "a.toml").read_text()
    assert text.startswith("# Written by: minisft init") and "a step: " in text and "(estimated)" in text
    assert text in capsys.readouterr().out


def test_two_stages(folder, capsys, monkeypatch):
    monkeypatch.setattr(init, "measure", lambda data: None)
    assert init.main(options(trainer="sft+dpo", preference_data="pairs.jsonl")) == 0
    sft, dpo = (stage.config for stage in load_stages("a.toml"))
    assert (sft.trainer_type, dpo.trainer_type) == ("sft", "dpo")
    assert sft.model.model_name_or_path == str(folder / "small")
    assert dpo.model.model_name_or_path == str(folder / "output/a/1-sft/model")
    assert (sft.train.learning_rate, dpo.train.learning_rate) == (2e-5, 1e-6)
    assert init.main([*options(trainer="sft+dpo", preference_data="pairs.jsonl", hardware="8x80gb"), "--force"]) == 0
    common, first, second = (folder / "a.toml").read_text().split("[[stages]]")
    key = "per_device_train_batch_size = 4 # "  # of packs and of pairs: the same number, and not the same thing
    assert f"\n{key}" not in common and f"{key}packs" in first and f"{key}pairs" in second


def test_a_ready_configuration_is_copied_without_its_data(folder, monkeypatch):
    monkeypatch.setattr(init, "measure", lambda data: None)
    (folder / "ready").mkdir()
    (folder / "ready" / "base.toml").write_text("[train]\nlearning_rate = 3e-5\n")
    text = '# Hardware: one GPU with 24 GB.\nextends = "base.toml"\noutput_dir = "x"\n'
    text += '[model]\nmodel_name_or_path = "acme/SMALL"\n[data]\ntrain_data = "acme/rows"\nformat = "text"\n'
    (folder / "ready" / "small.toml").write_text(text + "max_length = 77\n")
    (folder / "ready" / "small-long.toml").write_text(text + "max_length = 7777\n")
    (folder / "ready" / "stages.toml").write_text('stages = ["small.toml"]\n')
    monkeypatch.setattr(detect, "READY", folder / "ready")
    assert init.main(options()) == 0
    config, _ = load("a.toml")
    assert (config.train.learning_rate, config.data.max_length, config.data.format) == (3e-5, 77, "auto")
    assert (config.output_dir, config.data.train_data) == ("output/a", str(folder / "rows.jsonl"))
    assert "small.toml, for one GPU with 24 GB" in (folder / "a.toml").read_text()

    def length(**changed: str) -> int:
        assert init.main([*options(**changed), "--force"]) == 0
        return load("a.toml")[0].data.max_length

    assert length(hardware="80gb") == 77 and length(max_length="50") == 50
    assert length(max_length="78") == 78 and "small-long.toml" in (folder / "a.toml").read_text()
    # none for this method, less memory, several devices
    assert length(method="lora") == length(hardware="16gb") == length(hardware="8x80gb") == 1024
    assert length(hardware="cpu") == 1024


def test_the_plain_configuration_of_a_model_comes_before_its_variants():
    name, values = detect.ready_config("HuggingFaceTB/SmolLM3-3B-Base", "sft", "full", Hardware(80.0))
    assert name.startswith("configs/smollm3-3b-sft.toml") and values["data.max_length"] == 8192


@pytest.mark.parametrize("trainer", ["sft", "dpo"])
@pytest.mark.parametrize("number, words", [(40, 10), (600, 60), (20_000, 600)])
def test_the_data_decides_the_length_and_the_number_of_steps(folder, trainer, number, words):
    """A run has 50 steps if there are rows for them, and logs, evaluates and saves within it."""
    text = "word " * words
    row = {"prompt": text, "completion": "b"} if trainer == "sft" else {"prompt": "a", "chosen": text, "rejected": "c"}
    (folder / "many.jsonl").write_text((json.dumps(row) + "\n") * number)
    assert init.main([*options(trainer=trainer, data="many.jsonl", hardware="80gb"), "--force"]) == 0
    config, _ = load("a.toml")
    train, tokens = config.train, 5 * words / 4
    assert tokens < config.data.max_length <= max(128, 4 * tokens)  # no row is cut, and no room is wasted
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    units = number if trainer == "dpo" else number * tokens / config.data.max_length
    steps = units * train.num_train_epochs / step
    assert steps >= 45 or step == 1  # the characters of the other fields are not counted here
    assert max(config.log.logging_steps, config.evaluate.eval_steps, config.checkpoint.save_steps) <= max(1, steps)
    assert number * config.data.eval_fraction >= 1
    header = (folder / "a.toml").read_text()
    assert f"about {number:,} rows" in header


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    (tmp_path / "limit").write_text("3000000000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (tmp_path / "none", tmp_path / "absent", tmp_path / "limit"))
    assert detect.cpu_gigabytes() == 3.0


def test_a_model_of_several_devices_is_started_on_them(folder, capsys, monkeypatch):
    called = []
    monkeypatch.setattr(os, "execv", lambda *arguments: called.append(arguments[1][1:]))
    assert init.main([*options(hardware="8x80gb"), "--start"]) == 0
    command = "torchrun --nproc-per-node 8 -m minisft train a.toml"
    assert f"# Start it: {command}" in (folder / "a.toml").read_text() and f"next: {command}" in capsys.readouterr().out
    assert called == [["-m", "torch.distributed.run", "--nproc-per-node=8", "-m", "minisft", "train", "a.toml"]]
    # with less than a device's memory it says that each holds the whole model
    with pytest.raises(UserError, match="needs about [0-9]+ GB a device; given: 8 x 24 GB"):
        init.main([*options(model="acme/base-8b", hardware="8x24gb"), "--force"])


def test_without_a_method_the_one_that_fits_is_taken(folder):
    for hardware, model, lora, quantised in (
        ("24gb", "small", False, False),
        ("80gb", "acme/base-8b", True, False),
        ("16gb", "acme/base-8b", True, True),
    ):
        assert init.main([*options(model=model, method=None, hardware=hardware), "--force"]) == 0
        config, _ = load("a.toml")
        assert (config.lora.r is not None, config.model.load_in_4bit) == (lora, quantised), hardware


def test_the_file_may_lie_elsewhere(folder):
    assert init.main(options(output="sub/a.toml")) == 0
    os.chdir("/")
    config, _ = load(folder / "sub" / "a.toml")
    assert (config.model.model_name_or_path, config.data.train_data) == (
        str(folder / "small"),
        str(folder / "rows.jsonl"),
    )


def test_a_runs_output_is_a_model(folder):
    (folder / "run").mkdir()
    (folder / "small" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "small").rename(folder / "run" / "model")
    assert init.main(options(model="run", data="turns.jsonl")) == 0
    assert load("a.toml")[0].model.chat_template is None
    assert "Model: 376 M parameters" in (folder / "a.toml").read_text()


def test_an_adapter_goes_on_with_its_rank_and_is_as_large_as_its_base(folder):
    (folder / "peft").mkdir()
    (folder / "small" / "chat_template.jinja").write_text("{{ messages }}")
    written = {"r": 5, "lora_alpha": 3, "base_model_name_or_path": "small"}
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(written))
    assert init.main(options(model="peft", method="lora", data="turns.jsonl")) == 0
    config, origins = load("a.toml")
    assert config.lora.r == 5 and origins["lora.lora_alpha"] == "default" and config.model.chat_template is None
    assert "Model: 376 M parameters" in (folder / "a.toml").read_text()
    assert init.main([*options(model="peft", method="full"), "--force"]) == 0 and load("a.toml")[0].lora.r is None


def test_conversations_of_a_model_without_a_template_get_one(folder, capsys):
    assert init.main(options(data="turns.jsonl")) == 0
    assert load("a.toml")[0].model.chat_template == "chatml"
    assert "no chat template" in capsys.readouterr().out
    (folder / "small" / "chat_template.jinja").write_text("{{ messages }}")
    assert init.main([*options(data="turns.jsonl"), "--force"]) == 0
    assert load("a.toml")[0].model.chat_template is None


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"data": "no.jsonl"}, "no file matches no.jsonl"),
        ({"data": None, "model": None}, "not given: --model, --data"),
        ({"trainer": "sft+dpo"}, "not given: --preference-data"),
        ({"trainer": "dpo"}, "two answers to a prompt"),
        ({"hardware": "big"}, "hardware 'big'"),
        ({"hardware": "0gb"}, "hardware '0gb'"),
        ({"max_length": "1"}, "--max-length 1"),
        ({"epochs": "0"}, "--epochs 0"),
        ({"epochs": "nan"}, "--epochs nan"),
        ({"model": "acme/base-70b", "hardware": "24gb"}, "needs about 62"),
        ({"eval_data": "no.jsonl"}, "no file matches no.jsonl"),
        ({"preference_data": "pairs.jsonl", "trainer": "sft"}, "it is for sft"),
        ({"model": "./nowhere"}, "./nowhere is no folder, no GGUF file and no repository"),
        ({"model": "gpt2"}, "as in openai-community/gpt2"),
        ({"model": "."}, ". holds no model"),
        ({"trainer": "dpo", "data": "rows.jsonl"}, "rows.jsonl: the fields prompt, completion are those of no format"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(folder, changed, told):
    before = sorted(os.listdir())
    with pytest.raises(UserError) as raised:
        init.main(options(**changed))
    assert told in str(raised.value) and sorted(os.listdir()) == before


def test_bad_rows_are_told(folder):
    for text in ("", "{broken\n", '{"a": 1}\n'):
        Path("bad.jsonl").write_text(text)
        with pytest.raises(UserError):
            init.main(options(data="bad.jsonl"))
    assert not Path("a.toml").exists()


def test_a_file_is_replaced_by_force_only(folder):
    Path("a.toml").write_text("mine")
    with pytest.raises(UserError, match="a.toml exists"):
        init.main(options())
    assert Path("a.toml").read_text() == "mine"
    assert init.main([*options(), "--force"]) == 0 and Path("a.toml").read_text() != "mine"
    with pytest.raises(UserError, match="exists"):
        init.main([*options(output="small"), "--force"])
    with pytest.raises(UserError, match="a.toml/b.toml cannot be written: ") as raised:  # a file, and no folder
        init.main(options(output="a.toml/b.toml"))
    assert raised.value.exit_code == SAVE
    assert [name for name in os.listdir() if name.startswith(".")] == []


def test_start_hands_over_to_train(folder, monkeypatch):
    called = []
    monkeypatch.setattr(os, "execv", lambda *arguments: called.append(arguments))
    assert init.main([*options(), "--start"]) == 0
    assert called == [(sys.executable, [sys.executable, "-m", "minisft", "train", "a.toml"])]
    Path("t.yaml").write_text("learning_rate: 1e-5")
    with pytest.raises(UserError, match="not started: .*model_name_or_path is not set"):
        init.main(["--from-trl", "t.yaml", "--start"])
    assert len(called) == 1 and Path("t.toml").exists()  # written, to be completed by hand


def test_options_that_an_imported_file_says_itself(folder):
    Path("t.yaml").write_text("learning_rate: 1e-5")
    with pytest.raises(UserError, match="--method with --from-trl"):
        init.main(["--from-trl", "t.yaml", "--method", "lora"])
    for name, trainer, hint in (("axolotl", "sft", "the file says it"), ("trl", "sft+dpo", "sft or dpo")):
        with pytest.raises(UserError, match=f"--trainer with --from-{name}\n  {hint}"):
            init.main([f"--from-{name}", "t.yaml", "--trainer", trainer])
    with pytest.raises(UserError, match="name the file once"):
        init.main(["--from-trl", "t.yaml", "a.toml", "--output", "b.toml"])
    assert init.main(["--from-trl", "t.yaml", "--model", "small", "--data", "rows.jsonl", "--max-length", "99"]) == 0
    config, _ = load("t.toml")
    assert (config.model.model_name_or_path, config.data.max_length) == (str(folder / "small"), 99)


def test_the_proposal_trains(tmp_path, monkeypatch):
    """From quickstart's own rows and a tiny model to two steps."""
    monkeypatch.chdir(tmp_path)
    first = {"max_steps": 1, "train.device": "cpu", "report_to": []}
    config = tiny.MODEL | {"vocab_size": 264, "max_position_embeddings": 512}
    shutil.copytree(ROOT / "configs" / "quickstart" / "tokenizer", "tokenizer")
    rows = (ROOT / "configs" / "quickstart" / "train.jsonl").read_text().splitlines()[:300]
    Path("rows.jsonl").write_text("\n".join(rows))
    run({"model": {"config": config, "tokenizer_name_or_path": "tokenizer"}, "data": {"train_data": "rows.jsonl"}},
        output_dir="base", **first)  # fmt: skip
    arguments = [
        "--yes",
        "--model",
        "base/model",
        "--data",
        "rows.jsonl",
        "--hardware",
        "cpu",
        "--max-length",
        "128",
        "a.toml",
    ]
    assert init.main(arguments) == 0
    result = run("a.toml", max_steps=2, progress_bar=False, **{"train.device": "cpu", "log.report_to": []})
    assert result.exit_code == 0 and (tmp_path / "output/a/model").exists()


# ------------------------------------------------------------------------------------------------- questions


def converse(folder: Path, answers: list[str], *, interrupt: bool = False) -> tuple[int, str]:
    """Run `minisft init` on a pseudo-terminal: each answer is typed when a prompt waits for it. (exit code, all output)"""
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": "/nowhere"}
    process = subprocess.Popen(
        [sys.executable, "-m", "minisft", "init"], cwd=folder, stdin=slave, stdout=slave, stderr=slave, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who runs the tests may ignore it
    )  # fmt: skip
    os.close(slave)
    output, seen, pending = "", 0, list(answers)
    end, next_signal = time.monotonic() + 30, 0.0
    try:
        while time.monotonic() < end:
            if select.select([master], [], [], 0.05)[0]:
                try:
                    output += os.read(master, 65536).decode()
                except OSError:  # the other end is closed
                    break
            waiting = output[seen:].endswith(("] ", "> "))
            if waiting and pending:
                seen = len(output)
                os.write(master, pending.pop(0).encode())
            elif waiting and interrupt and time.monotonic() > next_signal:
                next_signal = time.monotonic() + 1  # one that comes just before input() reads is seen at the next only
                process.send_signal(signal.SIGINT)
        return process.wait(10), output
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_a_conversation(folder):
    answers = [
        "spam\n",
        "\n",
        "small\n",
        "no.jsonl\n",
        "rows.jsonl\n",
        "4gb\n",  # too little for all weights
        "full\n",
        "lora\n",
        "999999\n",
        "many\n",
        "256\n",
        "rows.jsonl\n",
        "mine.toml\n",
    ]
    code, output = converse(folder, [*answers, "\n", "n\n"])
    assert code == 0, output
    config, _ = load(folder / "mine.toml")
    assert (config.lora.r, config.data.max_length, config.train.learning_rate) == (16, 256, 2e-4)
    for told in (
        "one of sft, dpo, sft+dpo",
        "no file matches no.jsonl",
        "prompt_completion, as text",
        "a whole number of",
        "sft full with 256 tokens needs about 5 GB a device; given: 4 GB",
        "sft lora with 999999 tokens needs about",
        "rows.jsonl exists",
    ):
        assert told in output
    assert "Traceback" not in output and "Start it now?" in output


@pytest.mark.parametrize(("last", "interrupt"), [("\x04", False), ("", True), ("\n", None)])
def test_leaving_writes_nothing(folder, last, interrupt):
    answers = ["\n", "small\n", "rows.jsonl\n"]
    before = sorted(os.listdir(folder))
    if interrupt is None:  # everything is answered, and then "no"
        answers, last = [*answers, "cpu\n", "\n", "\n", "\n"], "n\n"
    code, output = converse(folder, [*answers, last] if last else answers, interrupt=bool(interrupt))
    assert code == (0 if interrupt is None else 130) and "Traceback" not in output, output
    assert sorted(os.listdir(folder)) == before


def test_without_a_terminal_nothing_is_asked(folder):
    done = subprocess.run(
        [sys.executable, "-m", "minisft", "init"], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and "not given: --model, --data" in done.stderr and "Traceback" not in done.stderr


def test_help_is_quick_and_without_torch(capsys):
    with pytest.raises(SystemExit) as left:
        run_command(lambda: init.main(["--help"]))
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert all(f"--from-{name}" in out for name in init.READERS)


# ------------------------------------------------------------------------------------------------- the rules


def test_sizes():
    qwen = {"hidden_size": 1024, "num_hidden_layers": 28, "vocab_size": 151936, "num_attention_heads": 16, "head_dim": 128,
            "num_key_value_heads": 8, "intermediate_size": 3072, "tie_word_embeddings": True}  # fmt: skip
    assert size_from_config(qwen).parameters == pytest.approx(596e6, rel=0.01)
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
    assert size_from_config(gpt2).parameters == pytest.approx(124e6, rel=0.02)
    for name, millions in (("Qwen/Qwen2.5-0.5B-Instruct", 500), ("a/SmolLM2-135M", 135), ("x/mistral-7b-v0.3", 7000),
                           ("openai/gpt2", 124), ("a/Llama-3.2-1B", 1000)):  # fmt: skip
        assert size_from_name(name).parameters == millions * 1e6
    assert size_from_name("acme/model") is None and size_from_config({}) is None
    assert parse_hardware("8 x 80GB", 1) == Hardware(80.0, 8) and parse_hardware("cpu", 9).is_cpu


@pytest.mark.parametrize("trainer", ["sft", "dpo"])
@pytest.mark.parametrize("method", METHODS)
def test_more_memory_never_asks_for_more_savings(trainer, method):
    """The tokens (pairs) of a step stay; a micro-batch only grows; a bigger machine never needs what a smaller one does not."""
    steps, batches, savings = set(), [], []
    for gigabytes in (16, 24, 48, 80, 141):
        try:
            values = propose(trainer, method, size_from_name("a/b-1b"), Hardware(gigabytes), max_length=1024).values
        except UserError:
            assert not batches
            continue
        batch, accumulation = values["train.per_device_train_batch_size"], values["train.gradient_accumulation_steps"]
        steps.add(batch * accumulation)
        batches.append(batch)
        savings.append((values.get("train.optim", "") == "adamw_8bit", values.get("train.weights_dtype") == "bf16"))
    assert steps == {32} and savings == sorted(savings, reverse=True) and batches[-1] >= 8


@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_what_is_proposed_for_a_card_fits_it_by_the_plan(tmp_path, capsys, trainer):
    """Without weights: a config.json and a tokenizer do. A larger card never has smaller micro-batches."""
    from minisft.data.tokenizer import train_tokenizer

    shape = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    shape |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    train_tokenizer([], vocab_size=259).save(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 2048}))
    answer = {"completion": "b" * 300} if trainer == "sft" else {"chosen": "b" * 300, "rejected": "c" * 300}
    (tmp_path / "rows.jsonl").write_text((json.dumps({"prompt": "a" * 60, **answer}) + "\n") * 400)
    options = [
        "--trainer",
        trainer,
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--yes",
    ]
    sizes = []
    for gigabytes in (2, 4, 24):
        path = str(tmp_path / f"{gigabytes}.toml")
        assert main(["init", *options, "--hardware", f"{gigabytes}gb", "--output", path]) == 0
        assert "`minisft plan`" in capsys.readouterr().out
        assert main(["plan", path, "--gpus", "1", "--gpu-memory", f"{gigabytes}GB", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["memory"]["fits"] == "yes"
        values = config_to_dict(load(path)[0])
        sizes.append((values["lora.r"] is None, values["train.per_device_train_batch_size"]))
    assert sizes[0] < sizes[-1] and [whole for whole, _ in sizes] == sorted(whole for whole, _ in sizes)
