"""Micro-batches as CUDA graphs, with a stand-in that records on a CPU: what a replay reads and writes, and when none is used."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import MODEL, parts

from minisft import micro_batch, sft
from minisft.errors import UserError
from minisft.loop import train_step
from minisft.micro_batch import WARM_UP, Graphs, forward_backward

ONE_LAYER = MODEL | {"num_hidden_layers": 1}
OPTIONS = {
    "model.config": ONE_LAYER,
    "train.precision": "bf16",
    "train.gradient_accumulation_steps": 3,
    "train.per_device_train_batch_size": 2,
}


class Recorder:
    """As CUDA graphs: recording changes nothing, a replay works on the same tensors and has no new ones."""

    def __init__(self, model, wrong=1.0):
        self.model, self.wrong, self.num_replays = model, wrong, 0

    def __call__(self, function):
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        before = [p.grad.clone() for p in parameters]
        loss, metrics = function()
        metrics = {
            name: (value.clone(), 0.0) for name, (value, _) in metrics.items()
        }  # numbers of another batch are wrong
        for p, grad in zip(parameters, before):
            p.grad.copy_(grad)
        addresses = [p.grad.data_ptr() for p in parameters]

        def replay():
            assert [p.grad.data_ptr() for p in parameters] == addresses
            self.num_replays += 1
            new_loss, new_metrics = function()
            loss.copy_(new_loss * self.wrong)
            for name, (value, _) in metrics.items():
                value.copy_(new_metrics[name][0])

        return (loss, metrics), replay


def with_graphs(run, recorder=None, plainly=None):
    plainly = plainly or partial(forward_backward, run.loss, run.model, run.precision)
    recorder = recorder or Recorder(run.model)
    return replace(run, graphs=Graphs(plainly, sft.metric_weights, run.model.parameters(), recorder)), recorder


def steps(run, config, n):
    """The weights and the metrics after every step."""
    for step in range(n):
        result = train_step(run, config.train, run.train.step(*divmod(step, run.train.steps_per_epoch)))
        run.progress.step += 1
        yield [p.detach().clone() for p in run.model.parameters()], result.stats.means()


@pytest.mark.parametrize("optim", ["adamw", "adamw_minisft", "lion", "muon"])
def test_steps_are_the_same_with_and_without(tmp_path, optim):
    """To the last bit on a CPU, whichever optimizer changes the weights and their copies; metrics have their batch's numbers."""
    options = OPTIONS | {"train.optim": optim}
    (plain, config), (run, _) = parts(tmp_path, **options), parts(tmp_path, **options)
    run, recorder = with_graphs(run)
    for (weights, means), (expected, expected_means) in zip(steps(run, config, 5), steps(plain, config, 5)):
        assert all(map(torch.equal, weights, expected)) and means == expected_means
    graphs = run.graphs
    assert graphs.graphs and not graphs.failed
    # the micro-batches that had a graph, one comparison for each graph, and its own first result
    assert recorder.num_replays == 15 - sum(graphs.times.values()) + 2 * len(graphs.graphs)


def test_few_shapes_have_graphs(tmp_path, monkeypatch):
    """Two steps in turn, whose first micro-batches have different shapes: each occurs often enough, and one gets a graph."""
    monkeypatch.setattr(micro_batch, "MOST_GRAPHS", 1)
    run, config = parts(tmp_path, **OPTIONS, **{"data.packing": False})
    run, _ = with_graphs(replace(run, train=replace(run.train, round_to=1)))
    for step in range(2 * (WARM_UP + 1)):
        train_step(run, config.train, run.train.step(0, step % 2))
    assert len(run.graphs.times) > 2 and not run.graphs.failed
    (shapes,) = run.graphs.graphs
    assert run.graphs.times[shapes] == WARM_UP + 1


@pytest.mark.parametrize("problem", ["raises", "another loss", "another gradient"])
def test_a_graph_that_is_not_the_plain_form_is_not_used(tmp_path, problem, capsys):
    (plain, config), (run, _) = parts(tmp_path, **OPTIONS), parts(tmp_path, **OPTIONS)
    recorder = Recorder(run.model, wrong=1.01 if problem == "another loss" else 1.0)
    if problem == "another gradient":  # of one that does not read the scale
        honest = recorder

        def recorder(function):
            result, _ = honest(function)
            return result, partial(run.model.norm.weight.grad.add_, 1.0)

    elif problem == "raises":

        def recorder(function):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    run, _ = with_graphs(run, recorder)
    for (weights, means), (expected, expected_means) in zip(steps(run, config, 4), steps(plain, config, 4)):
        assert all(map(torch.equal, weights, expected)) and means == expected_means
    assert run.graphs.failed and not run.graphs.graphs
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "CUDA graph" in line]
    assert ("not permitted" in warning) == (problem == "raises") and "more" not in warning


def test_copies_that_have_moved_are_noticed(tmp_path):
    """Whoever puts a new copy in the place of the recorded one gets a new graph."""
    run, config = parts(tmp_path, **OPTIONS)
    run, _ = with_graphs(run)
    before = len(list(steps(run, config, 4))) and dict(run.graphs.graphs)
    for p in run.model.parameters():
        if hasattr(p, "_copy"):
            p._copy = p._copy._replace(values=p._copy.values.clone())
    run.progress.step = 0
    list(steps(run, config, 4))
    assert before and all(run.graphs.graphs[shapes] is not graph for shapes, graph in before.items())


def test_where_graphs_cannot_be(tmp_path):
    run, _ = parts(tmp_path)
    assert run.graphs is None and not any("CUDA graph" in line for line in run.summary)
    with pytest.raises(UserError, match="no GPU"):
        parts(tmp_path, **{"train.cuda_graph": True})
