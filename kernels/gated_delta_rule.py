"""Gated delta rule: linear attention whose memory is one matrix a head (Gated DeltaNet; Qwen3.5, OLMo hybrid).

What it computes, for one value head; the state S is [Dk, Dv] and zero before a document's first token

        S <- e^g S + k (beta (v - (e^g S)^T k))^T        o = S^T q

    The state fades (g <= 0 is the logarithm of the decay). Then the token's value, minus what the state holds under its key,
    is written under that key, times beta. q and k are divided by their norms first, and q is multiplied by `scale`. Each key
    head serves Hv / Hk value heads side by side.

By chunks
    Token by token this is one small product after another. Within a chunk of C tokens, with G the running sum of g, all tokens
    can be computed at once; K, Q and V are the chunk's rows, S what the chunk begins with, and i, j tokens of one document

        A_ij = beta_i e^(G_i - G_j) k_i.k_j  for j < i        P_ij = scale e^(G_i - G_j) q_i.k_j  for j <= i
        unknown = V - e^G K S                                 new = (I + A)^-1 beta unknown
        O = scale e^G Q S + P new                             S <- e^(G_C) S + (e^(G_C - G) K)^T new

    A row of `new` is what its token writes, given what the tokens before it wrote. I + A is lower triangular with ones on the
    diagonal: its inverse is found by elimination, in blocks. Powers of A, which vanish at C, would give it too, but where keys
    are alike they are huge before they vanish. Only S goes from chunk to chunk. Exponents are never above 0: the largest decay
    and the longest chunk cannot overflow.

Backward, with dS' the gradient of the state behind the chunk

        dnew = P^T dO + e^(G_C - G) K dS'                     R = (I + A)^-T dnew        dV = beta R
        dP = dO new^T                                         dA = -R new^T, below the diagonal
        dS = e^(G_C) dS' + scale (e^G Q)^T dO - (e^G K)^T dV

    and from dP, dA, dS and dS' those of q, k, beta and G. dg_t is the sum of dG_i over i >= t: what a pair i, j gives to G_i it
    takes from G_j, and for t <= j the two must cancel.

What is saved
    The inputs. Inverses, new values and states are computed again in the backward pass: for heads of 128 the state of a chunk
    of 64 tokens takes 64 KB in fp32, its q, k and v in bf16 take 48 KB.

Documents
    The torch path cuts each document into chunks from its own first token. The kernels take chunks of the stream wherever
    documents begin, so that their grid depends on T alone; masks keep the documents of a chunk apart. Both reset the state.

The kernels
    Forward: inverses, a program a chunk and head; the walk of S, a program a document, head and block of values; outputs, a
    program a chunk, head and block. Backward: these two first, then P^T dO, the walk of dS, and the gradients in three steps,
    because all of them at once need more registers than there are. No atomics: results repeat bitwise.

fp32 (fp64 for fp64 inputs): norms, exponentials, all products and sums. The kernels multiply in TF32 if q is bf16 or fp16. G and
dG are summed in fp64 by the torch path, and by the kernels for fp32 inputs.

Paper: Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule".
"""

import torch
from torch import Tensor

from minisft.kernels.common import INTERPRETER, arch_of, backend_for, cdiv, next_power_of_2, once_differentiable
from minisft.kernels.gated_delta_rule_kernels import (
    _gated_delta_rule_bwd_inside_kernel,
    _gated_delta_rule_bwd_keys_kernel,
    _gated_delta_rule_bwd_local_kernel,
    _gated_delta_rule_bwd_state_kernel,
    _gated_delta_rule_bwd_values_kernel,
    _gated_delta_rule_inverse_kernel,
    _gated_delta_rule_output_kernel,
    _gated_delta_rule_state_kernel,
)
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


# Tokens of a chunk, by architecture. 64 fit the shared memory and the registers of Hopper and of the large Blackwell; in full
# fp32, where there are no tensor cores, 16 fit.
CHUNK = {INTERPRETER: 16, "fp32": 16, 80: 32, 86: 32, 89: 32, 90: 64, 100: 64, 120: 32}
CONFIGS = {
    "_gated_delta_rule_inverse_kernel": {INTERPRETER: {}, "else": dict(num_warps=4, num_stages=2)},
    "_gated_delta_rule_state_kernel": {
        INTERPRETER: dict(BLOCK_V=16),
        100: dict(BLOCK_V=32, num_warps=8, num_stages=1),
        "fp32": dict(BLOCK_V=16, num_warps=8, num_stages=1),
        "else": dict(BLOCK_V=32, num_warps=8, num_stages=2),
    },
    "_gated_delta_rule_output_kernel": {
        INTERPRETER: dict(BLOCK_V=16),
        "else": dict(BLOCK_V=64, num_warps=4, num_stages=2),
    },
    "_gated_delta_rule_bwd_local_kernel": {
        INTERPRETER: dict(BLOCK_V=16),
        "else": dict(BLOCK_V=64, num_warps=4, num_stages=2),
    },
    "_gated_delta_rule_bwd_state_kernel": {
        INTERPRETER: dict(BLOCK_V=16),
        "fp32": dict(BLOCK_V=16, num_warps=8, num_stages=1),
        "else": dict(BLOCK_V=32, num_warps=8, num_stages=1),
    },
    "_gated_delta_rule_bwd_values_kernel": {
        INTERPRETER: dict(BLOCK_V=16),
        80: dict(BLOCK_V=16, num_warps=4, num_stages=1),  # here and on 120, 32 values would spill
        120: dict(BLOCK_V=16, num_warps=4, num_stages=1),
        "fp32": dict(BLOCK_V=16, num_warps=8, num_stages=1),
        "else": dict(BLOCK_V=32, num_warps=8, num_stages=1),
    },
    "_gated_delta_rule_bwd_inside_kernel": {INTERPRETER: {}, "else": dict(num_warps=8, num_stages=2)},
    "_gated_delta_rule_bwd_keys_kernel": {
        INTERPRETER: dict(BLOCK_V=16),
        "else": dict(BLOCK_V=32, num_warps=8, num_stages=1),
    },
}


class _GatedDeltaRuleTriton(torch.autograd.Function):
    """Saves its inputs; the backward pass computes inverses, new values and states once more."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, start, end, scale, eps):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        inputs = dict(zip(("q", "k", "v", "g", "beta", "start", "end"), (q, k, v, g, beta, start, end)))
        inputs |= {name: inputs[name].contiguous() for name in ("g", "beta", "start", "end")}
        ctx.save_for_backward(*inputs.values())
        ctx.options = scale, eps
        out = v.new_empty(v.shape)
        launch = _launcher(inputs, scale, eps)
        launch(_gated_delta_rule_output_kernel, **_states(inputs, launch), out=out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        inputs = dict(zip(("q", "k", "v", "g", "beta", "start", "end"), ctx.saved_tensors))
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        launch = _launcher(inputs, *ctx.options)
        group = v.shape[1] // k.shape[1]
        dout = dout.contiguous()
        tensors = _states(inputs, launch) | dict(dout=dout, dnew=v.new_empty(v.shape, dtype=torch.float32))
        launch(_gated_delta_rule_bwd_local_kernel, **tensors)
        tensors["dstates"] = torch.empty_like(tensors["states"])
        launch(_gated_delta_rule_bwd_state_kernel, **tensors)
        tensors |= dict(dqk=torch.empty_like(tensors["inverse"]), dkk=torch.empty_like(tensors["inverse"]))
        tensors |= dict(dG=torch.empty_like(tensors["G"]), dbeta_sum=v.new_empty(v.shape[:2], dtype=torch.float32))
        dv, dg, dbeta = v.new_empty(v.shape), torch.empty_like(inputs["g"]), torch.empty_like(inputs["beta"])
        launch(_gated_delta_rule_bwd_values_kernel, **tensors, dv=dv)
        launch(_gated_delta_rule_bwd_inside_kernel, **tensors, dbeta=dbeta)
        dq, dk = v.new_empty(2, *v.shape[:2], q.shape[2], dtype=q.dtype if group == 1 else torch.float32)
        launch(_gated_delta_rule_bwd_keys_kernel, **tensors, dq=dq, dk=dk, dg=dg)
        if group > 1:
            dq, dk = (x.unflatten(1, (-1, group)).sum(2).to(q.dtype) for x in (dq, dk))
        return dq, dk, dv, dg, dbeta, None, None, None, None


def _launcher(inputs: dict, scale: float, eps: float | None):
    """A function that launches a kernel with those of the tensors and numbers that it takes."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    (T, Hv, Dv), (_, Hk, Dk) = v.shape, k.shape
    arch, wide = arch_of(q), q.dtype == torch.float32
    kind = "fp32" if wide and arch != INTERPRETER else arch
    chunk = CHUNK[kind]
    numbers = dict(T=T, group=Hv // Hk, scale=scale, eps=eps or 0.0, HV=Hv, D=Dk, DV=Dv, NORMALIZE=eps is not None)
    numbers |= dict(PRECISION="ieee" if wide else "tf32", CHUNK=chunk, BLOCK_K=max(16, next_power_of_2(Dk)))
    for name in ("q", "k", "v"):
        numbers |= {f"stride_{name}": inputs[name].stride(0), f"stride_{name}_head": inputs[name].stride(1)}

    def launch(kernel, **tensors):
        table = CONFIGS[kernel.fn.__name__]
        config = table[kind if kind in table else "else"]
        arguments = {f"{name}_ptr": x for name, x in (inputs | tensors).items()} | numbers
        grid = (cdiv(T, chunk), Hv)
        if "BLOCK_V" in config and kernel not in (
            _gated_delta_rule_bwd_values_kernel,
            _gated_delta_rule_bwd_keys_kernel,
        ):
            grid = *grid, cdiv(Dv, config["BLOCK_V"])
        kernel[grid](**{name: value for name, value in arguments.items() if name in kernel.arg_names}, **config)

    launch.cells = cdiv(T, chunk), Hv, chunk
    return launch


def _states(inputs: dict, launch) -> dict:
    """The inverse of each chunk, the new values and the states with which chunks begin."""
    v, (chunks, Hv, size) = inputs["v"], launch.cells
    inverse = v.new_empty(chunks, Hv, size, size, dtype=torch.float32)
    new = v.new_empty(v.shape, dtype=torch.float32)
    states = v.new_empty(chunks, Hv, inputs["k"].shape[2], v.shape[2], dtype=torch.float32)
    G = v.new_empty(v.shape[:2], dtype=torch.float64 if v.dtype == torch.float32 else torch.float32)
    tensors = dict(inverse=inverse, G=G, new=new, states=states)
    launch(_gated_delta_rule_inverse_kernel, **tensors)
    launch(_gated_delta_rule_state_kernel, **tensors)
    return tensors


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
    g: [T, Hv], the logarithm of the decay, finite and at most 0. beta: [T, Hv]. Both fp32, or in the dtype of q.
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
        if backend == "triton" and not return_state:
            return _GatedDeltaRuleTriton.apply(q, k, v, g, beta, start, end, scale, eps)
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
    if not fits or not k.shape[1] or v.shape[1] % k.shape[1]:
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
