"""Context parallelism, the model's half: attention over documents whose tokens are split over several ranks.

    a rank     its tokens' queries, and the keys and values of all tokens
    messages   a layer of attention: keys and values are gathered in its forward, their gradients are summed in its backward

Everything but attention works on each token alone, so nothing else changes. There each rank gathers the keys and values of
the others, and computes its own rows of the output. data/pieces.py says which tokens a rank has.

The sums of losses and the gradients of weights are taken over all ranks anyway, so they are those of whole documents, up to the
order of additions. Liu et al. 2023, "Ring Attention", arXiv:2310.01889, send keys and values round in a ring instead; gathering
them is Llama 3's way (arXiv:2407.21783, section 3.3.2): with grouped queries they are small.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minisft.kernels.flash_attention import flash_attention

# The second names are those before PyTorch 2.13.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Context:
    """The ranks that share a batch."""

    group: Any  # the process group
    index: int  # of this rank in it
    pieces: tuple[tuple[int, int], ...]  # of each rank: the two parts of the stream that it has, as numbers

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, **options: Any) -> Tensor:
        """`flash_attention` for the queries of this rank: q, k, v [t, H, Dh] and start [t] of its tokens, end [T] of all."""
        keys, values = _Gathered.apply(torch.stack([k, v], 1), self).unbind(1)  # [T, Hkv, Dh] each; one message
        length = len(q) // 2
        rows = []
        for piece, (q_part, start_part) in zip(self.pieces[self.index], zip(q.chunk(2), start.chunk(2))):
            rows.append(flash_attention(q_part, keys, values, start_part, end, q_offset=piece * length, **options))
        return torch.cat(rows)  # [t, Hq, Dh]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over these ranks. Each of them computes its loss from it, so the gradient is a sum over them too."""
        return _Summed.apply(x, self.group)

    def in_order(self, gathered: Tensor) -> Tensor:
        """[T, ...] as the ranks have them, one after the other -> in the order of the stream."""
        dealt = [piece for of_rank in self.pieces for piece in of_rank]
        parts = gathered.chunk(len(dealt))
        return torch.cat([parts[dealt.index(piece)] for piece in range(len(dealt))])

    def by_rank(self, whole: Tensor) -> Tensor:
        """The inverse of `in_order`."""
        parts = whole.chunk(2 * len(self.pieces))
        return torch.cat([parts[piece] for of_rank in self.pieces for piece in of_rank])


class _Gathered(torch.autograd.Function):
    """[t, ...] of each rank -> [T, ...]. Backward: the sum of all ranks' gradients, of which each has its tokens'."""

    @staticmethod
    def forward(ctx, x: Tensor, context: Context) -> Tensor:
        ctx.context = context
        gathered = x.new_empty(len(x) * len(context.pieces), *x.shape[1:])
        _gather(gathered, x.contiguous(), group=context.group)
        return context.in_order(gathered)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), context = grads, ctx.context
        mine = grad.new_empty(len(grad) // len(context.pieces), *grad.shape[1:])
        _scatter(mine, context.by_rank(grad), group=context.group)
        return mine, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group, total = group, x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
