"""What two ways of taking the same step have in common: its loss and its gradient, and the measure of their difference."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from minisft.config.sections import TrainSection
from minisft.data.cache import Documents
from minisft.data.loader import Loader, plan_set
from minisft.loop import train_step
from minisft.parallel import part_of
from minisft.prepare.run import Run

SMALL = 1e-4  # a gradient whose norm is below this part of the whole is measured against that part of the whole


@dataclass(frozen=True)
class Step:
    """The loss of a step, and its gradient before clipping; of sharded weights the rows of this rank."""

    loss: float
    grads: dict[str, Tensor]  # fp32, on the host


class Recorder(torch.optim.Optimizer):
    """An optimizer that keeps the gradients of a step and changes nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__([dict(group) for group in optimizer.param_groups], {})
        self.grads: list[Tensor | None] = []

    @torch.no_grad()
    def step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        self.grads = [None if p.grad is None else p.grad.to("cpu", torch.float32, copy=True) for p in params]


def engine_step(run: Run, train: TrainSection, loader: Loader) -> Step:
    """The first step over `loader` as the loop takes it, without its update."""
    recorder = Recorder(run.optimizer)
    plain = replace(train, max_grad_norm=None, optimizer_in_backward=False, on_spike="warn")
    result = train_step(replace(run, optimizer=recorder, graphs=None), plain, loader.step(0, 0))
    if result.ran_out is not None:
        raise MemoryError(result.ran_out.message)
    params = [p for group in recorder.param_groups for p in group["params"]]
    grads = dict(zip(params, recorder.grads))
    here = {name: grads.get(part_of(p)) for name, p in run.model.named_parameters()}
    # none where the loss or a gradient is not finite
    return Step(result.loss, {name: grad for name, grad in here.items() if grad is not None})


def take_gradients(run: Run, loss: float) -> Step:
    """The gradients that a backward pass has left, which are cleared."""
    grads = {n: p.grad.to("cpu", torch.float32) for n, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad(set_to_none=True)
    return Step(loss, grads)


def difference(a: Step, b: Step) -> tuple[float, str]:
    """(largest relative error, where) of a beside b: of the loss, and of the gradient of each parameter."""
    if missing := sorted(a.grads.keys() ^ b.grads.keys()):
        return float("inf"), f"no gradient of {missing[0]}"
    norms = {name: grad.norm().item() for name, grad in b.grads.items()}
    whole = float(np.linalg.norm(list(norms.values()))) if norms else 0.0
    errors = {"loss": abs(a.loss - b.loss) / max(abs(b.loss), 1e-30)}
    for name, grad in b.grads.items():
        errors[name] = (a.grads[name] - grad).norm().item() / max(norms[name], SMALL * whole, 1e-30)
    return largest(errors)


def largest(errors: dict[str, float]) -> tuple[float, str]:
    """The worst of some errors, and its name; one that is NaN is the worst."""
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[worst] if errors[worst] == errors[worst] else float("inf"), worst


def relative(a: Tensor, b: Tensor) -> float:
    """norm(a - b) / norm(b) in fp64; inf where it is no number."""
    a, b = a.detach().double(), b.detach().double()
    error = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


@contextlib.contextmanager
def in_fp32(run: Run) -> Iterator[Run]:
    """The run with weights, matrix products and gradients in fp32 inside the block. The values of the weights stay the same."""
    run.model.zero_grad(set_to_none=True)  # a CPU keeps zeros there
    dtypes = {p: (p.dtype, p.grad_dtype) for p in run.model.parameters()}
    for p, (dtype, _) in dtypes.items():
        if dtype.is_floating_point:
            p.data, p.grad_dtype = p.data.float(), torch.float32
    try:
        yield replace(run, precision="fp32")
    finally:
        run.model.zero_grad(set_to_none=True)
        for p, (dtype, grad_dtype) in dtypes.items():
            p.data, p.grad_dtype = p.data.to(dtype), grad_dtype


def compare_tensors(a: Path, b: Path) -> tuple[int, str]:
    """(number of tensors, "" if all have the same bytes, else how many differ and by how much)"""
    if missing := [str(path) for path in (a, b) if not path.exists()]:
        return 0, f"missing: {', '.join(missing)}"
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(safe_open(path, framework="pt")) for path in (a, b))
        names = list(first.keys())
        if set(names) != set(second.keys()):
            return len(names), "other tensors"
        differences = {name: largest_difference(first.get_tensor(name), second.get_tensor(name)) for name in names}
    wrong = {name: difference for name, difference in differences.items() if difference is not None}
    if not wrong:
        return len(names), ""
    worst = max(wrong, key=lambda name: wrong[name])
    return len(names), f"{len(wrong):,} differ, by at most {wrong[worst]:.1e} ({worst})"


def largest_difference(a: Tensor, b: Tensor) -> float | None:
    """None if two tensors have the same bytes, else the largest difference of their elements."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return None
    return (a.double() - b.double()).abs().max().item()


# ---- rows of the run ----------------------------------------------------------------------------------------------


def first_documents(loader: Loader, number: int) -> Documents:
    """The documents, or pairs, that the run's first steps train, about so many, as they are without sharing. If any of the run
    share a beginning, some of these do."""
    packs, documents = loader.packs(loader.at(0)[0]), loader.documents
    units = list(dict.fromkeys(packs.document[: 4 * number].tolist()))  # packing may cut one into several pieces
    first, count = documents.pieces_of(packs.document)
    shares = documents.shared_by(first + count - 1) > 0
    if shares.any():  # the first of these, and then the others
        units = list(dict.fromkeys([int(packs.document[shares.argmax()]), *units]))
    chosen = np.zeros(len(documents) // documents.group, dtype=bool)
    for unit in units:
        piece, count = (x.item() for x in documents.pieces_of(np.array([unit])))
        chosen[piece // documents.group : (piece + count) // documents.group] = True
        if chosen.sum() >= number:
            break
    alone = replace(documents, turns=None, shared=None).take(chosen)
    if documents.turns is None:
        return alone
    order = alone.index.argsort(kind="stable")  # documents that come several times in an epoch are in several trees
    targets = None if alone.num_targets is None else alone.num_targets[order]
    cut = {name: getattr(alone, name)[order] for name in ("index", "start", "end")}
    return replace(alone, **cut, num_targets=targets)


def one_by_one(loader: Loader, documents: Documents, batch_size: int = 1, accumulation: int | None = None) -> Loader:
    """All documents in one step, each a row of its own; so many of them in a micro-batch."""
    documents, plan = plan_set(documents, strategy="none", max_length=None)
    accumulation = accumulation or -(-plan.num_packs // batch_size)
    return Loader(documents, plan, batch_size, accumulation, loader.seed, shuffle=False, round_to=loader.round_to)


def packed(loader: Loader, documents: Documents, share: dict) -> Loader:
    """All documents in packs, in one step. share: options of plan_set, by which the run shares beginnings."""
    longest = np.sort(documents.lengths.reshape(-1, documents.group).sum(1))[-2:].sum()
    limit = max(loader.plan.max_length, int(longest)) // documents.group + 1  # some pack has two
    documents, plan = plan_set(documents, strategy="bfd", max_length=limit, **share)
    return Loader(documents, plan, plan.num_packs, 1, loader.seed, shuffle=False, round_to=loader.round_to)
