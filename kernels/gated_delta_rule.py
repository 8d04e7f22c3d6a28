"""Gated delta rule: linear attention whose memory is one matrix a head (Gated DeltaNet; Qwen3.5, OLMo hybrid).

What it computes, for one value head; S is [Dk, Dv] and zero before a document's first token

        S <- e^g S + k (beta (v - (e^g S)^T k))^T        o = S^T q

    A token lets the memory fade (g <= 0 is the logarithm of the decay), asks what it holds under its key, and writes beta
    times the difference to its value. q and k are divided by their norm first, q is multiplied by `scale`. Each key head
    serves Hv / Hk value heads side by side.

Paper: Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule".
"""

import torch
from torch import Tensor

from minisft.kernels.common import backend_for
from minisft.kernels.gated_delta_rule_torch import GatedDeltaRuleTorch

EPS = 1e-6  # added to the squared norm of q and k


def gated_delta_rule_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence, token by token. Arguments as in `gated_delta_rule`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    firsts, lasts = set(start.tolist()), set((end - 1).tolist())
    zeros = q.new_zeros(1, v.shape[1], q.shape[2], v.shape[2], dtype=dtype)
    state, outputs, states = zeros, [v[:0]], [zeros[:0]]
    for t in range(len(q)):
        if t in firsts:
            state = zeros
        one_token = (x[t : t + 1] for x in (q, k, v, g, beta))
        out, state = _step(*one_token, state, scale, normalize)
        outputs.append(out)
        if t in lasts:
            states.append(state)
    out = torch.cat(outputs)
    return (out, torch.cat(states).detach()) if return_state else out


def _step(q, k, v, g, beta, state, scale, normalize):
    """A token of each row: q, k [B, Hk, Dk], v [B, Hv, Dv], g, beta [B, Hv], state [B, Hv, Dk, Dv] -> out, new state."""
    group = v.shape[1] // k.shape[1]
    q, k = (_normed(x.to(state.dtype), normalize).repeat_interleave(group, dim=1) for x in (q, k))  # [B, Hv, Dk]
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    state = state * g.to(state.dtype).exp()[..., None, None]
    known = torch.einsum("bhkv,bhk->bhv", state, k)
    correction = beta.to(state.dtype)[..., None] * (v.to(state.dtype) - known)
    state = state + k[..., None] * correction[..., None, :]
    return torch.einsum("bhkv,bhk->bhv", state, q).to(v.dtype), state


def _normed(x: Tensor, normalize: bool) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) if normalize else x


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The gated delta rule inside the documents of a flat stream.

    q, k: [T, Hk, Dk]. v: [T, Hv, Dv] with Hv a multiple of Hk; value head h reads key head h // (Hv / Hk). bf16, fp16,
        fp32 or fp64, the same for all three.
    g: [T, Hv], the logarithm of the decay, at most 0. beta: [T, Hv]. Both fp32, or in the dtype of q.
    start, end: int [T]: the first token of each token's document, and the one behind its last. Whole documents side by side;
        a document that shares a prefix with its neighbour has no state of its own and is refused.
    scale: multiplies q; None = Dk ** -0.5. normalize: divide q and k by their norms first.
    return_state: also return the state after each document's last token, from which `gated_delta_rule_step` continues. It
        has no gradient. The number of documents is read on the host.

    Returns [T, Hv, Dv] in the dtype of v, with return_state also [B, Hv, Dk, Dv] in fp32 for the B documents. A document's
    output and gradients do not depend on the content of other documents, not even in the last bit.
    Raises ValueError where shapes or dtypes do not fit; shared prefixes are found on the CPU only.
    """
    _check(q, k, v, g, beta)
    if not start.shape == end.shape == q.shape[:1] or start.is_floating_point() or end.is_floating_point():
        raise ValueError(
            f"gated_delta_rule: start {tuple(start.shape)} {start.dtype} and end {tuple(end.shape)} {end.dtype}: "
            f"expected {len(q)} integers each"
        )
    if not start.is_cuda:
        _check_documents(start, end)
    with torch.autocast(q.device.type, enabled=False):
        backend = backend_for("gated_delta_rule", q)
        if backend == "reference":
            options = dict(scale=scale, normalize=normalize, return_state=return_state)
            return gated_delta_rule_ref(q, k, v, g, beta, start, end, **options)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        eps = EPS if normalize else None
        out, states = GatedDeltaRuleTorch.apply(q, k, v, g, beta, start, scale, eps, return_state)
        return (out, states) if return_state else out


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """One new token a row: a step of generation. Not differentiable.

    q, k: [B, Hk, Dk]. v: [B, Hv, Dv]. g, beta: [B, Hv]. state: [B, Hv, Dk, Dv], fp32. The rest as in `gated_delta_rule`.

    Returns the output [B, Hv, Dv] in the dtype of v, and the new state. Raises ValueError where shapes do not fit.
    """
    _check(q, k, v, g, beta)
    if state.shape != (*v.shape[:2], q.shape[2], v.shape[2]):
        raise ValueError(f"gated_delta_rule_step: state {tuple(state.shape)} does not fit q, v {q.shape, v.shape}")
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return _step(q, k, v, g, beta, state, scale, normalize)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    tensors = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in zip("qkv", (q, k, v)))
    fits = q.ndim == v.ndim == 3 and q.shape == k.shape and len(q) == len(v) and q.dtype == k.dtype == v.dtype
    if not fits or v.shape[1] % k.shape[1]:
        raise ValueError(
            f"gated_delta_rule: {tensors}: expected [T, Hk, Dk], [T, Hk, Dk], [T, Hv, Dv] of one dtype, Hv a multiple of Hk"
        )
    if not g.shape == beta.shape == v.shape[:2]:
        raise ValueError(
            f"gated_delta_rule: g {tuple(g.shape)}, beta {tuple(beta.shape)}: expected {tuple(v.shape[:2])}"
        )


def _check_documents(start: Tensor, end: Tensor) -> None:
    """Raises ValueError unless start and end are those of whole documents side by side."""
    firsts, counts = torch.unique_consecutive(start, return_counts=True)
    stops = counts.cumsum(0)
    if not (torch.equal(firsts.long(), stops - counts) and torch.equal(end.long(), stops.repeat_interleave(counts))):
        raise ValueError(
            "gated_delta_rule: start and end are not those of whole documents side by side (shared prompts?)"
        )
