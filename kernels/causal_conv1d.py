"""Short causal convolution: every channel mixes the newest K tokens of its own document (Qwen3.5, OLMo hybrid, LFM2).

What it computes, for token t and channel c, with the first token of t's document at start[t]

        y[t, c] = act(bias[c] + sum over j < K, t - j >= start[t], of weight[c, K - 1 - j] * x[t - j, c])

    weight[c, K - 1] meets the token itself, weight[c, 0] the oldest one, as in the files of the checkpoints. Before a
    document's first token there are zeros, not the end of the neighbour: a packed row gives what its documents give one by one.

Backward, with du = dy * act'(u) and u what act is applied to

        dx[t] = sum over j of weight[K - 1 - j] * du[t + j]  where t + j is in the same document
        dweight[K - 1 - j] = sum over t of du[t] * x[t - j]  where t - j is              dbias = sum over t of du[t]

What is saved
    x, the weight, the bias and `start`. u is computed again in the backward pass: K multiplications an element.

Bytes moved, per element in bf16: fused 4 forward (read x, write y), 6 backward (read x and dy, write dx).

fp32 (fp64 for fp64 inputs): the sums and the activation; y is rounded once.
"""

import torch
from torch import Tensor

from minisft.kernels.common import backend_for

ACTIVATIONS = (None, "silu")


def causal_conv1d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, *, activation: str | None = None
) -> Tensor:
    """The formula. Arguments as in `causal_conv1d`."""
    kernel_size = weight.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    token = torch.arange(len(x), device=x.device)
    u = torch.zeros_like(wide) if bias is None else bias.to(wide.dtype).expand_as(wide)
    for j in range(kernel_size):
        inside = (token - j >= start)[:, None]
        u = u + torch.where(inside, wide[(token - j).clamp(min=0)], 0) * weight[:, kernel_size - 1 - j].to(wide.dtype)
    return (torch.nn.functional.silu(u) if activation == "silu" else u).to(x.dtype)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, *, activation: str | None = None
) -> Tensor:
    """Depthwise causal convolution inside the documents of a flat stream.

    x: [T, C], bf16, fp16, fp32 or fp64. weight: [C, K]. bias: [C] or None. Both in the dtype of x or in fp32.
    start: int [T]: the first token of each token's document, as in a batch. activation: None or "silu".

    Returns [T, C] in the dtype of x. A document's output and gradients do not depend on the content of other documents, not
    even in the last bit. Raises ValueError where shapes, dtypes or the activation do not fit.
    """
    _check(x, weight, bias, activation)
    if start.shape != x.shape[:1] or start.is_floating_point():
        raise ValueError(f"causal_conv1d: start {tuple(start.shape)} {start.dtype}: expected {len(x)} integers")
    with torch.autocast(x.device.type, enabled=False):
        backend_for("causal_conv1d", x)
        return causal_conv1d_ref(x, weight, bias, start, activation=activation)


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """One new token a row: a step of generation. Not differentiable.

    x: [B, C], the new inputs. state: [B, C, K - 1], each row's last inputs, the newest last (`conv_state`). weight, bias,
    activation: as in `causal_conv1d`.

    Returns the output [B, C] in the dtype of x, and the new state. Raises ValueError where shapes do not fit.
    """
    _check(x, weight, bias, activation)
    if state.shape != (*x.shape, weight.shape[1] - 1):
        raise ValueError(
            f"causal_conv1d_update: state {tuple(state.shape)} does not fit x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        newest = torch.cat([state, x[:, :, None].to(state.dtype)], dim=2)  # [B, C, K]
        u = (newest.to(wide) * weight.to(wide)).sum(2)
        if bias is not None:
            u += bias.to(wide)
        return (torch.nn.functional.silu(u) if activation == "silu" else u).to(x.dtype), newest[:, :, 1:]


def conv_state(x: Tensor, start: Tensor, end: Tensor, K: int) -> Tensor:
    """The last K - 1 inputs of every document, from which `causal_conv1d_update` continues.

    x: [T, C]. start, end: int [T], of whole documents side by side.

    Returns [B, C, K - 1] in the dtype of x, a row for each of the B documents, the newest input last; zeros where a
    document is shorter. The number of documents is read on the host.
    """
    token = torch.arange(len(x), device=x.device)
    last = (token == end - 1).nonzero()[:, 0]  # [B]
    rows = last[:, None] - torch.arange(K - 2, -1, -1, device=x.device)  # [B, K - 1]
    inside = rows >= start[last][:, None]
    return torch.where(inside[:, :, None], x[rows.clamp(min=0)], 0).transpose(1, 2)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    fits = x.ndim == weight.ndim == 2 and len(weight) == x.shape[1] and weight.shape[1] >= 1
    if not fits or (bias is not None and bias.shape != x.shape[1:]):
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"causal_conv1d: {shapes}: expected [T, C], [C, K] and [C]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d: activation {activation!r}: expected None or 'silu'")
