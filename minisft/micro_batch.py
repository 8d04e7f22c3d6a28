"""Forward and backward pass of one micro-batch: op by op, or all of them as one CUDA graph.

`forward_backward` is what a step does with each of its micro-batches. On a GPU the host queues some forty kernels a layer, and
each takes it about ten microseconds: for small models or short micro-batches longer than the GPU works on it. `Graphs` records
these kernels once and starts them again with one call, for every micro-batch of the same shapes.

What a graph needs, and where it comes from:

- the same shapes: T and M of a batch are filled up to few sizes (the loader's round_to);
- the same memory: a batch is one buffer (data/batch.py), which is copied over the one that was recorded; the gradients are set to
  zero instead of being dropped; the copies of the weights (kernels/copies.py) stay where they are;
- no wait for the device, and nothing that the host decides by numbers: losses, norms and attention here never do.

A graph that computed something else would go unnoticed. So each one is compared with the plain form when it is new, by its
loss and by its gradient: backward is linear in grad_scale, so a replay with -grad_scale must take back what the plain form added.
If it does not, or cannot be recorded, a warning says so and the run goes on op by op.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from minisft import runtime
from minisft.data.batch import Batch
from minisft.errors import warn
from minisft.kernels.copies import kept_copy, refresh_copies
from minisft.metrics import Metrics
from minisft.model.decoder import Decoder
from minisft.update import gradient_norms

WARM_UP = 2  # micro-batches of some shapes that run op by op first: kernels are compiled, buffers made
MOST_GRAPHS = 16  # shapes; all of them share their memory
LARGEST_DIFFERENCE = 1e-2  # of two gradients, relative: bf16 sums in another order differ by a tenth of it


def forward_backward(
    loss_of: Callable, model: Decoder, precision: str, batch: Batch, grad_scale: float | Tensor
) -> tuple[Tensor, Metrics]:
    """The loss and the metrics of a batch on the device; adds grad_scale times the loss's gradient to the parameters'."""
    with runtime.autocast(batch.input_ids.device, precision):
        loss, metrics = loss_of(model, batch, grad_scale)
    loss.backward()
    return loss.detach(), metrics


@dataclass(frozen=True)
class Graph:
    """The recorded kernels of micro-batches of some shapes, and the tensors that they read and write."""

    batch: Batch
    scale: Tensor  # fp32 []
    copies: list[Tensor | None]  # of the weights, in their order
    loss: Tensor
    metrics: Metrics  # their numbers are those of the batch that was recorded
    replay: Callable[[], None]


class Graphs:
    """`forward_backward` by recorded kernels. plainly: the same op by op.

    weights_of: the numbers of the metrics, which the host knows. record: takes a function without arguments; returns what it
    returned, and a function that does the same again, into the same tensors.
    """

    def __init__(
        self,
        plainly: Callable[[Batch, float | Tensor], tuple[Tensor, Metrics]],
        weights_of: Callable[[Batch], dict],
        parameters: Iterable[nn.Parameter],
        record: Callable | None = None,
    ):
        self.plainly, self.weights_of, self.parameters = plainly, weights_of, list(parameters)
        self.record = record or partial(record_on_gpu, torch.cuda.graph_pool_handle())
        self.graphs: dict[tuple, Graph] = {}
        self.times: Counter[tuple] = Counter()  # that shapes occurred without a graph
        self.failed = False

    def __call__(self, batch: Batch, grad_scale: float) -> tuple[Tensor, Metrics]:
        shapes = batch.shapes()
        graph = self.graphs.get(shapes)
        if graph is not None and self._is_current(graph):
            return self._replay(graph, batch, grad_scale)
        self.times[shapes] += 1
        is_due = self.times[shapes] > WARM_UP and len(self.graphs) < MOST_GRAPHS and not self.failed
        if not is_due or self._gradient_norm() != 0:  # the comparison begins with gradients of zero
            return self.plainly(batch, grad_scale)
        return self._begin(batch, grad_scale)

    def forget(self) -> None:
        """Drop all graphs, and with them their memory."""
        self.graphs.clear()
        self.times.clear()

    def _begin(self, batch: Batch, grad_scale: float) -> tuple[Tensor, Metrics]:
        """Record a graph and compare it. The result is the graph's, or the plain one where it is not used."""
        loss, _ = self.plainly(batch, grad_scale)
        size = self._gradient_norm()
        graph, problem = None, ""
        try:
            graph = self._record(batch)
        except RuntimeError as error:  # a kernel cannot be recorded, or there is too little memory
            problem = str(error).partition("\n")[0]
        if graph is None:  # outside of the handler, in which the error keeps what it had allocated
            return self._give_up(problem, batch, grad_scale)
        self._replay(graph, batch, -grad_scale)
        difference = self._gradient_norm()
        self._clear_gradients()
        result = self._replay(graph, batch, grad_scale)
        if not (difference <= LARGEST_DIFFERENCE * size and torch.isclose(result[0], loss, rtol=1e-4)):
            problem = f"it differs from the plain form by {difference:.2g} in a gradient of {size:.2g}, its loss is "
            return self._give_up(f"{problem}{result[0]:.6g} and not {loss:.6g}", batch, grad_scale)
        self.graphs[batch.shapes()] = graph
        return result

    def _record(self, batch: Batch) -> Graph:
        refresh_copies(self.parameters)
        copies = [kept_copy(p) for p in self.parameters]
        static, scale = batch.over(batch.buffer.clone()), torch.zeros((), device=batch.buffer.device)
        (loss, metrics), replay = self.record(lambda: self.plainly(static, scale))
        return Graph(static, scale, copies, loss, metrics, replay)

    def _is_current(self, graph: Graph) -> bool:
        """Whether the copies of the weights are still where they were; brings their values up to date."""
        refresh_copies(self.parameters)
        return all(kept_copy(p) is copy for p, copy in zip(self.parameters, graph.copies))

    def _replay(self, graph: Graph, batch: Batch, grad_scale: float) -> tuple[Tensor, Metrics]:
        graph.batch.buffer.copy_(batch.buffer)
        graph.scale.fill_(grad_scale)
        graph.replay()
        weights = self.weights_of(batch)
        metrics = {name: (value.clone(), weights.get(name, number)) for name, (value, number) in graph.metrics.items()}
        return graph.loss.clone(), metrics

    def _give_up(self, problem: str, batch: Batch, grad_scale: float) -> tuple[Tensor, Metrics]:
        warn(f"no CUDA graph is used: {problem}")
        self.failed = True
        self.graphs.clear()
        self._clear_gradients()
        return self.plainly(batch, grad_scale)

    def _gradient_norm(self) -> float:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradient_norms(grads)).item() if grads else 0.0

    def _clear_gradients(self) -> None:
        torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])


def record_on_gpu(pool: tuple[int, int], function: Callable) -> tuple:
    """What `function` returns, and a function that runs its kernels again. Recording runs none of them.

    The loader's thread may pin memory meanwhile, which is no part of the graph ("thread_local").
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return result, graph.replay
