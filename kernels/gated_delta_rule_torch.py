"""The torch path of gated_delta_rule: the recurrence by chunks of CHUNK tokens, as batched matrix products.

The lesson, the contract and the public ops are in gated_delta_rule.py, and so are the names of the chunk's matrices.

A chunk lies inside one document, which is cut from its own first token; neighbouring short documents share a chunk and a mask
hides them from each other. The chunks of one document are a chain: each needs the state that the one before it left. Chains of
several documents are walked together, first all first chunks, then all second ones, as many at a time as keep the states in a
core's cache (BATCH numbers): a long document of many heads goes alone, small heads go many at a time.

The backward pass saves the inputs only. It walks each batch of chains once more and keeps what it needs, then back.

The running sum G of g, and its gradient, are in fp64: differences of G become exponents, and behind a strong decay fp32 has too
few digits left for them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
BATCH = 2**18  # numbers in the states that are walked together


class Chunks(NamedTuple):
    """n chunks, of as many documents, that are computed together. The first `next` of them have a chunk behind them."""

    rows: Tensor  # int64 [n, C]: their tokens; a ragged end repeats its last one
    inside: Tensor | None  # bool [n, C], False for the repeated ones; None where there are none
    lower: Tensor  # bool [n, 1, C, C]: does token j <= i belong to i's document?
    carried: bool  # is there a state from the chunk before?
    next: int


def plan(start: Tensor, state_size: int, join: bool) -> list[tuple[list[int], list[Chunks]]]:
    """Cuts the documents into chunks. Returns batches of chains: (numbers of the chains, their chunks step by step).

    join: whether short neighbours share a chunk; without it chain n is document n.
    """
    on_host = start.cpu()
    firsts, counts = torch.unique_consecutive(on_host, return_counts=True)
    chains = []  # [a, b]: the tokens of each
    for a, count in zip(firsts.tolist(), counts.tolist()):
        if join and chains and a + count - chains[-1][0] <= CHUNK:
            chains[-1][1] = a + count
        else:
            chains.append([a, a + count])

    # Longest first: at every step those that go on are the first ones.
    order = sorted(range(len(chains)), key=lambda n: chains[n][0] - chains[n][1])
    size = max(1, BATCH // state_size)
    tokens, triangle = torch.arange(CHUNK), torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    batches = []
    for some in [order[i : i + size] for i in range(0, len(order), size)]:
        bounds, steps = torch.tensor([chains[n] for n in some]), []
        while len(bounds):
            rows = bounds[:, :1] + tokens
            inside = rows < bounds[:, 1:]
            rows = torch.minimum(rows, bounds[:, 1:] - 1)
            lower = triangle.expand(len(bounds), -1, -1)
            if not steps and join:
                lower = lower & (on_host[rows][:, :, None] == on_host[rows][:, None, :])
            bounds = bounds + torch.tensor([CHUNK, 0])
            rest = int((bounds[:, 0] < bounds[:, 1]).sum())
            inside = None if inside.all() else inside.to(start.device)
            steps.append(Chunks(rows.to(start.device), inside, lower[:, None].to(start.device), bool(steps), rest))
            bounds = bounds[:rest]
        batches.append((some, steps))
    return batches


def _take(x: Tensor, chunks: Chunks, dtype: torch.dtype) -> Tensor:
    """[T, H, D] -> [n, H, C, D], [T, H] -> [n, H, C]; zeros beyond a ragged end, where nothing then adds to anything."""
    x = x[chunks.rows].to(dtype)
    if chunks.inside is not None:
        x = x.masked_fill(~chunks.inside.view(*chunks.rows.shape, *[1] * (x.ndim - 2)), 0)
    return x.transpose(1, 2).contiguous()


def _put(out: Tensor, chunks: Chunks, x: Tensor) -> None:
    """x [n, H, C, D] to where `_take` would find it, in the dtype of out."""
    x = x.transpose(1, 2)
    if chunks.inside is None:
        out[chunks.rows] = x.to(out.dtype)
    else:
        out[chunks.rows[chunks.inside]] = x[chunks.inside].to(out.dtype)


def _heads(x: Tensor, group: int) -> Tensor:
    """[n, Hk, ...] -> [n, Hv, ...]"""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _inputs(q, k, v, g, beta, chunks, eps):
    """The inputs of the chunks: [q; k] [n, Hk, 2C, Dk] normed, their 1 / norm, v [n, Hv, C, Dv], beta [n, Hv, C, 1], G."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    qk = torch.cat([_take(q, chunks, dtype), _take(k, chunks, dtype)], dim=2)
    rnorm = None
    if eps is not None:
        rnorm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).square_().add_(eps).rsqrt_()
        qk *= rnorm
    beta = _take(beta, chunks, dtype)[..., None]
    # A product with the mask and not cumsum: it adds zeros for other documents, whatever they hold.
    G = chunks.lower.double() @ _take(g, chunks, torch.float64)[..., None]  # [n, Hv, C, 1]
    return qk, rnorm, _take(v, chunks, dtype), beta, G


def _forward(qk, v, beta, G, state, chunks, scale, group):
    """What is computed inside the chunks, and what they read from the state and add to it; see gated_delta_rule.py."""
    C, dtype = CHUNK, qk.dtype
    products = qk @ qk[:, :, C:].transpose(-1, -2)  # [n, Hk, 2C, C]: q k^T over k k^T
    decay = (G - G.transpose(-1, -2)).masked_fill_(~chunks.lower, -torch.inf).to(dtype).exp_()  # [n, Hv, C, C]
    kk = _heads(products[:, :, C:], group) * decay
    P = _heads(products[:, :, :C], group) * decay * scale
    eye = torch.eye(C, dtype=dtype, device=qk.device).expand(kk.shape)
    # Only what is below the diagonal is read.
    T = torch.linalg.solve_triangular(kk * beta, eye, upper=False, unitriangular=True)
    qk = _heads(qk, group)
    fade = G.to(dtype).exp()
    out = None
    if chunks.carried:
        read = qk @ state  # [n, Hv, 2C, Dv]
        out = read[:, :, :C].mul_(fade * scale)
        v = torch.addcmul(v, read[:, :, C:], fade, value=-1)
    new = T @ (v * beta)
    out = P @ new if out is None else out.add_(P @ new)
    return out, new, v, kk, P, T, decay, fade


def _next_state(qk, new, G, fade, state, n, group):
    """The state behind the first n of the chunks."""
    left = (G[:n, :, -1:] - G[:n]).to(new.dtype).exp_()  # what is left of each token at the chunk's end
    added = _heads(qk[:n, :, CHUNK:], group).transpose(-1, -2) @ (new[:n] * left)  # [n, Hv, Dk, Dv]
    return added if state is None else added.addcmul_(state[:n], fade[:n, :, -1:])


class GatedDeltaRuleTorch(torch.autograd.Function):
    """Saves its inputs."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, start, scale, eps, return_state):
        T, Hv, Dv = v.shape
        group, state_size = Hv // k.shape[1], Hv * q.shape[2] * Dv
        ctx.save_for_backward(q, k, v, g, beta, start)
        ctx.options = scale, eps
        batches = plan(start, state_size, join=not return_state)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        dtype = torch.promote_types(q.dtype, torch.float32)
        states = (
            v.new_empty(sum(len(some) for some, _ in batches), Hv, q.shape[2], Dv, dtype=dtype)
            if return_state
            else None
        )
        for some, steps in batches:
            state = None
            for chunks in steps:
                qk, _, values, decayed, G = _inputs(q, k, v, g, beta, chunks, eps)
                o, new, _, _, _, _, _, fade = _forward(qk, values, decayed, G, state, chunks, scale, group)
                _put(out, chunks, o)
                n = len(chunks.rows) if return_state else chunks.next
                if n:
                    state = _next_state(qk, new, G, fade, state, n, group)
                    if return_state:
                        states[some[:n]] = state  # that of a chain which goes on is overwritten by a later one
                        state = state[: chunks.next]
        if return_state:
            ctx.mark_non_differentiable(states)
        return out, states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, _):
        q, k, v, g, beta, start = ctx.saved_tensors
        scale, eps = ctx.options
        group = v.shape[1] // k.shape[1]
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g, beta)]
        batches = plan(start, v.shape[1] * q.shape[2] * v.shape[2], join=True)
        for _, steps in batches:
            kept, state = [], None
            for chunks in steps:
                inputs = _inputs(q, k, v, g, beta, chunks, eps)
                qk, _, values, b, G = inputs
                _, *rest = _forward(qk, values, b, G, state, chunks, scale, group)
                kept.append((inputs, rest, state))
                if chunks.next:
                    state = _next_state(qk, rest[0], G, rest[-1], state, chunks.next, group)
            dstate = None
            for chunks in reversed(steps):
                dstate = _backward(kept.pop(), dout, dstate, chunks, grads, scale, group, eps is not None)
        return *grads, None, None, None, None


def _backward(kept, dout, dstate, chunks, grads, scale, group, normalize):
    """The gradients of the inputs of one step's chunks, into grads; returns that of the state that they began from."""
    (qk, rnorm, _, beta, G), (new, unknown, kk, P, T, decay, fade), state = kept
    C, m, dtype = CHUNK, chunks.next, qk.dtype
    n, Hk, _, Dk = qk.shape
    wide = _heads(qk, group)
    q, k = wide.split(C, dim=2)

    do = _take(dout, chunks, dtype)
    dnew = P.transpose(-1, -2) @ do
    if m:
        left = (G[:m, :, -1:] - G[:m]).to(dtype).exp_()
        dnew[:m].addcmul_(k[:m] @ dstate, left)
    both = torch.cat([do, T.transpose(-1, -2) @ dnew], dim=2)  # and the gradient of beta * unknown
    dbeta = (both[:, :, C:] * unknown).sum(-1)
    _put(grads[2], chunks, both[:, :, C:] * beta)

    dP, dA = (both @ new.transpose(-1, -2)).split(C, dim=2)
    dA = dA.tril(-1).neg_()
    dkk = dA * kk
    dbeta += dkk.sum(-1)
    pairs = torch.addcmul(dP * P, dkk, beta)  # the gradient of every G_i - G_j
    # In fp64: what a pair adds to the later token and takes from the earlier one must cancel before both, in every digit.
    pairs = pairs.tril_(-1).double()
    dG = pairs.sum(-1) - pairs.sum(-2)  # [n, Hv, C]
    dP = dP * decay * scale
    dA *= decay * beta
    dqk = torch.cat([dP, dA + dA.transpose(-1, -2)], dim=2) @ k  # [n, Hv, 2C, Dk]
    dqk[:, :, C:] += dP.transpose(-1, -2) @ q
    if m:
        through = (new[:m] * left) @ dstate.transpose(-1, -2)  # [m, Hv, C, Dk]
        dqk[:m, :, C:] += through
        through = (through * k[:m]).sum(-1, dtype=torch.float64)
        dG[:m] -= through
        dG[:m, :, -1] += through.sum(-1)
    if chunks.carried:
        both *= torch.cat([fade * scale, -fade * beta], dim=2)
        through = both @ state.transpose(-1, -2)
        dqk += through
        dG += (through * wide).sum(-1).view(n, -1, 2, C).sum(2)
        before = wide.transpose(-1, -2) @ both  # [n, Hv, Dk, Dv]
        if m:
            last = fade[:m, :, -1:]
            dG[:m, :, -1:] += (dstate * state[:m]).sum((-1, -2))[..., None] * last[..., 0]
            before[:m].addcmul_(dstate, last)

    dg = chunks.lower.transpose(-1, -2).double() @ dG[..., None]
    dqk = dqk.view(n, Hk, group, 2 * C, Dk).sum(2) if group > 1 else dqk
    if normalize:
        dqk = torch.addcmul(dqk, qk, (qk * dqk).sum(-1, keepdim=True), value=-1).mul_(rnorm)
    for out, gradient in zip(grads[:2], dqk.split(C, dim=2)):
        _put(out, chunks, gradient)
    for out, gradient in zip(grads[3:], (dg, dbeta[..., None])):
        _put(out[..., None], chunks, gradient)
    return before if chunks.carried else None
