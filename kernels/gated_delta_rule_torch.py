"""The torch path of gated_delta_rule: the recurrence by chunks of CHUNK tokens, as batched matrix products.

The lesson, the contract and the public ops are in gated_delta_rule.py, and so are the names of the chunk's matrices.

A chunk lies inside one document, which is cut from its own first token; neighbouring short documents share a chunk and a mask
hides them from each other. The chunks of one document are a chain: each needs the state that the one before it left. Chains of
several documents are walked together, first all first chunks, then all second ones, as many at a time as keep the states in a
core's cache (BATCH numbers): a long document of many heads goes alone, small heads go many at a time. Only what touches the
state is computed step by step, the rest for all chunks of the batch at once.

The backward pass saves the inputs only. It walks each batch of chains once more and keeps what it needs, then back.

The running sum G of g, and its gradient, are in fp64: differences of G become exponents, and behind a strong decay fp32 has too
few digits left for them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minisft.kernels.common import once_differentiable

CHUNK = C = 64
BATCH = 2**18  # numbers in the states that are walked together


class Chains(NamedTuple):
    """Some chains, cut into N chunks: all first ones, then all second ones, ... Those of longer chains come first."""

    numbers: list[int]  # of the chains
    rows: Tensor  # int64 [N, C]: the tokens of each chunk; a ragged end repeats its last one
    inside: Tensor | None  # bool [N, C], False for the repeated ones; None where there are none
    lower: Tensor  # bool [N or 1, 1, C, C]: does token j <= i belong to i's document?
    steps: list[tuple[int, int, int]]  # (first chunk, how many, how many of them have a chunk behind them) of each step


def plan(start: Tensor, state_size: int, join: bool) -> list[Chains]:
    """Cuts the documents into chunks.

    join: whether short neighbours share a chunk; without it chain n is document n.
    """
    on_host = start.cpu()
    firsts, counts = torch.unique_consecutive(on_host, return_counts=True)
    chains = []  # [a, b]: the tokens of each
    for a, count in zip(firsts.tolist(), counts.tolist()):
        if join and chains and a + count - chains[-1][0] <= C:
            chains[-1][1] = a + count
        else:
            chains.append([a, a + count])

    # Longest first: at every step those that go on are the first ones.
    order = sorted(range(len(chains)), key=lambda n: chains[n][0] - chains[n][1])
    size, tokens = max(1, BATCH // state_size), torch.arange(C)
    triangle = torch.ones(C, C, dtype=torch.bool).tril()
    batches = []
    for numbers in [order[i : i + size] for i in range(0, len(order), size)]:
        bounds, chunks, steps = torch.tensor([chains[n] for n in numbers]), [], []
        while len(bounds):
            chunks.append(bounds)
            first = sum(steps[-1][:2]) if steps else 0
            bounds = bounds[bounds[:, 0] + C < bounds[:, 1]] + torch.tensor([C, 0])
            steps.append((first, len(chunks[-1]), len(bounds)))
        chunks = torch.cat(chunks)  # [N, 2]
        rows = chunks[:, :1] + tokens
        inside = rows < chunks[:, 1:]
        rows = torch.minimum(rows, chunks[:, 1:] - 1)
        documents, lower = on_host[rows], triangle[None]
        if (documents != documents[:, :1]).any():
            lower = lower & (documents[:, :, None] == documents[:, None, :])
        inside = None if inside.all() else inside.to(start.device)
        batches.append(Chains(numbers, rows.to(start.device), inside, lower[:, None].to(start.device), steps))
    return batches


def _take(x: Tensor, chains: Chains, dtype: torch.dtype) -> Tensor:
    """[T, H, D] -> [N, H, C, D], [T, H] -> [N, H, C]; zeros beyond a ragged end, where nothing then adds to anything."""
    x = x[chains.rows]
    if chains.inside is not None:
        x[~chains.inside] = 0
    return x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)


def _put(out: Tensor, chains: Chains, x: Tensor) -> None:
    """x [N, H, C, D] to where `_take` would find it, in the dtype of out."""
    x = x.transpose(1, 2).to(out.dtype)
    if chains.inside is None:
        out[chains.rows] = x
    else:
        out[chains.rows[chains.inside]] = x[chains.inside]


def _heads(x: Tensor, group: int) -> Tensor:
    """[N, Hk, ...] -> [N, Hv, ...]"""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


class _Chunks:
    """What a batch of chains computes from its inputs, before and during the walk forward."""

    def __init__(self, inputs, chains: Chains, scale: float, eps: float | None):
        q, k, v, g, beta = inputs
        dtype, self.chains, self.scale, self.group = (
            torch.promote_types(q.dtype, torch.float32),
            chains,
            scale,
            v.shape[1] // k.shape[1],
        )
        self.qk = torch.cat([_take(q, chains, dtype), _take(k, chains, dtype)], dim=2)  # [N, Hk, 2C, Dk]: q over k
        self.rnorm = None
        if eps is not None:
            self.rnorm = torch.linalg.vector_norm(self.qk, dim=-1, keepdim=True).square_().add_(eps).rsqrt_()
            self.qk *= self.rnorm
        self.unknown = _take(v, chains, dtype)  # [N, Hv, C, Dv]: v, minus what the state knows after the walk
        self.beta = _take(beta, chains, dtype)[..., None]
        # A product with the mask and not cumsum: it adds zeros for other documents, whatever they hold.
        self.G = chains.lower.double() @ _take(g, chains, torch.float64)[..., None]  # [N, Hv, C, 1]
        self.fade = self.G.exp().to(dtype)
        self.left = (
            (self.G[:, :, -1:] - self.G).to(dtype).clamp_(max=0).exp_()
        )  # means nothing where documents share a chunk

        products = self.qk @ self.qk[:, :, C:].transpose(-1, -2)  # [N, Hk, 2C, C]: q k^T over k k^T
        self.decay = (self.G - self.G.transpose(-1, -2)).masked_fill_(~chains.lower, -torch.inf).to(dtype).exp_()
        self.kk = _heads(products[:, :, C:], self.group) * self.decay  # [N, Hv, C, C]
        self.P = (_heads(products[:, :, :C], self.group) * self.decay).mul_(scale)
        eye = torch.eye(C, dtype=dtype, device=q.device).expand(self.kk.shape)
        # Only what is below the diagonal is read.
        self.T = torch.linalg.solve_triangular(self.kk * self.beta, eye, upper=False, unitriangular=True)
        self.qk_wide = _heads(self.qk, self.group)
        self.new = torch.empty_like(self.unknown)
        self.states = []  # with which the chunks of each step begin; None: zeros


def _walk(chunks: _Chunks, all_ends: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The walk forward: the output [N, Hv, C, Dv], and with all_ends the states behind the chunks of each step."""
    out, ends, state = torch.zeros_like(chunks.new), [], None
    for first, n, following in chunks.chains.steps:
        here = slice(first, first + n)
        fade = chunks.fade[here]
        if state is not None:
            read = chunks.qk_wide[here] @ state  # [n, Hv, 2C, Dv]
            torch.mul(read[:, :, :C], fade * chunks.scale, out=out[here])
            chunks.unknown[here].addcmul_(read[:, :, C:], fade, value=-1)
        chunks.states.append(state)
        new = torch.matmul(chunks.T[here], chunks.unknown[here] * chunks.beta[here], out=chunks.new[here])
        count = n if all_ends else following
        if count:
            k = chunks.qk_wide[first : first + count, :, C:]
            added = k.transpose(-1, -2) @ (new[:count] * chunks.left[first : first + count])  # [count, Hv, Dk, Dv]
            end = added if state is None else added.addcmul_(state[:count], fade[:count, :, -1:])
            ends.append(end)
            state = end[:following]
    out += chunks.P @ chunks.new
    return out, ends


class GatedDeltaRuleTorch(torch.autograd.Function):
    """Saves its inputs."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, start, scale, eps, return_state):
        ctx.save_for_backward(q, k, v, g, beta, start)
        ctx.options = scale, eps
        (_, Hv, Dv), Dk = v.shape, q.shape[2]
        batches = plan(start, Hv * Dk * Dv, join=not return_state)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        documents = sum(len(chains.numbers) for chains in batches) if return_state else 0
        states = v.new_empty(documents, Hv, Dk, Dv, dtype=torch.promote_types(q.dtype, torch.float32))
        for chains in batches:
            o, ends = _walk(_Chunks((q, k, v, g, beta), chains, scale, eps), all_ends=return_state)
            _put(out, chains, o)
            if return_state:
                for end in ends:  # a chain that is longer is written again, and the last state stays
                    states[chains.numbers[: len(end)]] = end
        ctx.mark_non_differentiable(states)
        return out, states

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        *inputs, start = ctx.saved_tensors
        q, _, v, *_ = inputs
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        for chains in plan(start, v.shape[1] * q.shape[2] * v.shape[2], join=True):
            chunks = _Chunks(inputs, chains, *ctx.options)
            _walk(chunks)
            _back(chunks, dout, grads)
        return *grads, None, None, None, None


def _back(chunks: _Chunks, dout: Tensor, grads: list[Tensor]) -> None:
    """The walk back, and the gradients of q, k, v, g and beta into grads."""
    chains, scale, group, beta, wide = chunks.chains, chunks.scale, chunks.group, chunks.beta, chunks.qk_wide
    dtype, k = wide.dtype, wide[:, :, C:]
    N, Hk, _, Dk = chunks.qk.shape
    do = _take(dout, chains, dtype)
    dnew = chunks.P.transpose(-1, -2) @ do
    both = torch.cat([do, dnew], dim=2)  # [N, Hv, 2C, Dv]: of the output, and of beta * unknown when the walk is there
    dqk = torch.zeros_like(wide)
    dG = torch.zeros(wide.shape[0], wide.shape[1], C, dtype=torch.float64, device=wide.device)
    dstate = None
    for (first, n, following), state in zip(reversed(chains.steps), reversed(chunks.states)):
        here, goes_on = slice(first, first + n), slice(first, first + following)
        if following:
            dnew[goes_on].addcmul_(k[goes_on] @ dstate, chunks.left[goes_on])
            through = (chunks.new[goes_on] * chunks.left[goes_on]) @ dstate.transpose(-1, -2)  # [following, Hv, C, Dk]
            dqk[goes_on, :, C:] += through
            share = (through * k[goes_on]).sum(-1, dtype=torch.float64)
            dG[goes_on] -= share
            dG[goes_on, :, -1] += share.sum(-1)
        both[here, :, C:] = chunks.T[here].transpose(-1, -2) @ dnew[here]
        if state is not None:
            fade = chunks.fade[here]
            scaled = both[here] * torch.cat([fade * scale, -fade * beta[here]], dim=2)
            through = scaled @ state.transpose(-1, -2)  # [n, Hv, 2C, Dk]
            dqk[here] += through
            dG[here] += (through * wide[here]).sum(-1).view(n, -1, 2, C).sum(2)
            before = wide[here].transpose(-1, -2) @ scaled  # [n, Hv, Dk, Dv]
            if following:
                last = fade[:following, :, -1:]
                dG[goes_on, :, -1:] += (dstate * state[:following]).sum((-1, -2))[..., None] * last[..., 0]
                before[:following].addcmul_(dstate, last)
            dstate = before

    dbeta = (both[:, :, C:] * chunks.unknown).sum(-1)
    _put(grads[2], chains, both[:, :, C:] * beta)
    dP, dA = (both @ chunks.new.transpose(-1, -2)).split(C, dim=2)
    dA = dA.tril(-1).neg_()
    dkk = dA * chunks.kk
    dbeta += dkk.sum(-1)
    # In fp64: what a pair adds to the later token and takes from the earlier one must cancel before both, in every digit.
    pairs = torch.addcmul(dP * chunks.P, dkk, beta).tril_(-1).double()  # the gradient of every G_i - G_j
    dG += pairs.sum(-1) - pairs.sum(-2)
    dP = (dP * chunks.decay).mul_(scale)
    dA.mul_(chunks.decay).mul_(beta)
    dqk += torch.cat([dP, dA + dA.transpose(-1, -2)], dim=2) @ k
    dqk[:, :, C:] += dP.transpose(-1, -2) @ wide[:, :, :C]

    dqk = dqk.view(N, Hk, group, 2 * C, Dk).sum(2) if group > 1 else dqk
    if chunks.rnorm is not None:
        dqk = dqk.addcmul_(chunks.qk, (chunks.qk * dqk).sum(-1, keepdim=True), value=-1).mul_(chunks.rnorm)
    for out, gradient in zip(grads[:2], dqk.split(C, dim=2)):
        _put(out, chains, gradient)
    dg = chains.lower.transpose(-1, -2).double() @ dG[..., None]
    for out, gradient in zip(grads[3:], (dg, dbeta[..., None])):
        _put(out[..., None], chains, gradient)
