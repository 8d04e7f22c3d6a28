"""Gradients of replicas are summed bucket by bucket while the backward pass goes on: the same sums, in one order on all ranks."""

import pytest
import torch
from torch import nn

from minisft import ranks, replicas
from minisft.replicas import GradientSum


class Sum:
    """Stands for a message to another rank that has the same gradients: it arrives when it is waited for."""

    def __init__(self, x, sent, log):
        self.x, self.log = x, log
        sent.append(x.clone())
        log.append("send")

    def wait(self):
        self.x.mul_(2)
        self.log.append("receive")


@pytest.fixture
def messages(monkeypatch):
    """(what was sent, the order of sending, receiving and the events that a test adds)"""
    sent, log = [], []
    monkeypatch.setattr(ranks, "start_sum", lambda x: Sum(x, sent, log))
    monkeypatch.setattr(replicas, "BUCKET_BYTES", 4 * 40)
    return sent, log


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)])


def backward(model: nn.Module, log: list, fails_at: int | None = None) -> None:
    def watch(module, *_):
        log.append("backward")
        if fails_at is not None and log.count("backward") == fails_at:
            raise MemoryError

    for layer in model:
        layer.register_full_backward_hook(watch)
    model(torch.ones(3, 6, requires_grad=True)).square().sum().backward()


def test_the_gradients_are_the_sums_and_most_are_sent_before_the_backward_pass_ends(messages):
    sent, log = messages
    model, alone = make(), make()
    backward(alone, [])
    backward(alone, [])  # a second micro-batch adds up
    model_sum = GradientSum(model, True)
    backward(model, [])
    with model_sum:
        backward(model, log)
    log.append("end")
    model_sum.finish()
    for p, q in zip(model.parameters(), alone.parameters()):
        assert torch.equal(p.grad, 2 * q.grad)
    assert log[: log.index("end")].count("send") == len(sent) == 6
    assert log.index("send") < len(log) - 1 - log[::-1].index("backward")
    waiting = 0
    for event in log:
        waiting += {"send": 1, "receive": -1}.get(event, 0)
        assert waiting <= replicas.IN_FLIGHT
    assert waiting == 0 and not model[0].weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("fails_at", range(1, 7))
def test_a_rank_whose_backward_pass_fails_sends_as_many_messages_of_the_same_sizes(messages, fails_at):
    sent, log = messages
    sizes = []
    for fails in (None, fails_at):
        sent.clear()
        log.clear()
        model = make()
        with_sum = GradientSum(model, True)
        try:
            with with_sum:
                backward(model, log, fails)
        except MemoryError:
            assert fails is not None
        with_sum.finish()
        sizes.append([len(x) for x in sent])
    assert sizes[0] == sizes[1] and sum(sizes[0]) == sum(p.numel() for p in model.parameters())


def test_a_gradient_that_is_not_there_counts_as_zeros_and_stays_away(messages):
    sent, _ = messages
    model = make()
    model[1].weight.requires_grad_(False)
    with (total := GradientSum(model, True)):
        model[3:](torch.ones(2, 6)).sum().backward()
    total.finish()
    assert model[0].weight.grad is None and model[1].weight.grad is None and model[4].weight.grad is not None
    assert sum(map(len, sent)) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_one_rank_sends_nothing(messages):
    model = make()
    with (total := GradientSum(model, False)):
        backward(model, [])
    total.finish()
    assert messages[0] == []
