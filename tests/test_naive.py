"""examples/naive.py, a whole run in one file, has the engine's rows and its losses."""

from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from minisft.config.load import load
from minisft.examples import naive
from minisft.loop import train_step
from minisft.prepare.run import prepare

# fp32 sums in another order differ by a few ulp (6e-8) times a small factor; the bound of the house for equal maths.
TOLERANCE = 1e-6


def quickstart(folder, num_rows=None, **overrides):
    """(config, run) in fp32, with its files in the folder. num_rows: of the data; None = all."""
    keys = {"train.precision": "fp32", "train.device": "cpu", "output_dir": str(folder / "out"), **overrides}
    config, _ = load(naive.QUICKSTART, keys)
    if num_rows:
        lines = Path(config.data.train_data).read_text().splitlines(keepends=True)
        (folder / "rows.jsonl").write_text("".join(lines[:num_rows]))
        config, _ = load(naive.QUICKSTART, {**keys, "data.train_data": str(folder / "rows.jsonl")})
    return config, prepare(config, torch.device("cpu"))


def losses(config, run):
    """(the engine's, the naive run's) of one step after the other."""
    for step, loss in enumerate(naive.train(config, run)):  # copies the weights before the engine changes them
        result = train_step(run, config.train, run.train.step(*divmod(step, run.train.steps_per_epoch)))
        run.progress.step += 1
        yield result.loss, loss


def test_the_naive_run_has_the_losses_of_the_engine(tmp_path):
    """A short run: warm-up, decay, two micro-batches, and a last step of a pass that has fewer rows."""
    split = {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 2}
    config, run = quickstart(tmp_path, 120, **split, **{"train.warmup_steps": 2})
    assert run.train.plan.num_packs % 2 == 1 and run.total_steps == 6
    engines, naives = zip(*losses(config, run))
    assert naives == pytest.approx(engines, rel=TOLERANCE)
    assert len(naives) == run.total_steps and naives[-1] < naives[0] - 1  # it has learnt something


@pytest.mark.slow
def test_every_step_of_the_quickstart(tmp_path):
    """Each from the engine's weights: over 516 updates AdamW would make more of the last bits in which two runs differ."""
    config, run = quickstart(tmp_path)
    for step in range(run.total_steps):
        batches = run.train.step(*divmod(step, run.train.steps_per_epoch))
        model = partial(naive.llama, dict(run.model.named_parameters()), config.model.config)
        with torch.no_grad():
            loss = naive.loss_sum(model, naive.rows_of(batches[0])).item() / batches[0].num_targets
        result = train_step(run, config.train, batches)
        run.progress.step += 1
        # absolute where the loss is small: logits near 10 are rounded to 1e-6, however likely the target is
        assert loss == pytest.approx(result.loss, rel=TOLERANCE, abs=TOLERANCE), step
    assert run.progress.step == 516 and result.loss < 0.1


def test_it_reads_the_rows_that_the_engine_trains_on(tmp_path):
    config, run = quickstart(tmp_path, 120)
    tokenizer = Tokenizer.from_file(f"{config.model.tokenizer_name_or_path}/tokenizer.json")
    rows = naive.read_rows(Path(config.data.train_data), tokenizer, run.tokenizer.eos_token_id)
    seen = []
    for step in range(run.train.steps_per_epoch):
        for batch in run.train.step(0, step):
            assert [rows[i] for i in naive.numbers_of(batch)] == naive.rows_of(batch)
            seen += naive.numbers_of(batch)
    assert len(set(seen)) == len(seen) == len(run.train.documents)
