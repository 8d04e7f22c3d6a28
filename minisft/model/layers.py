"""Norms and MLPs: the layers that work on each token alone. A config chooses from NORMS and MLPS."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.kernels.glu import geglu, swiglu
from minisft.kernels.layer_norm import layer_norm
from minisft.kernels.rms_norm import add_rms_norm, rms_norm
from minisft.model.model_config import ModelConfig
from minisft.model.recompute import droppable, dropped

GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # our names of the activation -> PyTorch's of its approximation


class RMSNorm(nn.Module):
    """x / rms(x) * weight. Gemma's files hold weight - 1 (offset 1); Gemma and OLMo 2 round once, after the weight."""

    recompute = False  # in the backward: see recompute.py

    def __init__(self, config: ModelConfig, size: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size or config.hidden_size))
        self.eps, self.offset, self.in_fp32 = config.norm_eps, config.norm_offset, config.norm_in_fp32

    def forward(self, x: Tensor) -> Tensor:
        return droppable(self._norm(x), self._norm, x) if self.recompute else self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, offset=self.offset, upcast_weight=self.in_fp32)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x + residual) and x + residual, in one pass where there is a kernel for it."""
        options = {"offset": self.offset, "upcast_weight": self.in_fp32}
        y, total = add_rms_norm(x, residual, self.weight, self.eps, **options)
        return droppable(y, self._norm, total) if self.recompute else y, total


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias. Cohere has no bias, OLMo 1 neither of the two. Nemotron's files hold
    weight - 1 (offset 1)."""

    recompute = False

    def __init__(self, config: ModelConfig, size: int | None = None):
        super().__init__()
        size = size or config.hidden_size
        self.weight = nn.Parameter(torch.ones(size)) if config.norm_weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm_bias else None
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def forward(self, x: Tensor) -> Tensor:
        return droppable(self._norm(x), self._norm, x) if self.recompute else self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight + self.offset if self.offset else self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self(total), total


class HeadLayerNorm(nn.Module):
    """LayerNorm of each head with a weight for each head, without a bias. The weights are one vector (Cohere) or one module
    a head (StableLM), as in the files."""

    def __init__(self, config: ModelConfig, num_heads: int):
        super().__init__()
        self.eps, self.is_apart = config.norm_eps, config.qk_norm == "layer_apart"
        if self.is_apart:
            plain = replace(config, norm_bias=False)
            self.norms = nn.ModuleList(LayerNorm(plain, config.head_dim) for _ in range(num_heads))
        else:
            self.weight = nn.Parameter(torch.ones(num_heads * config.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, H, Dh]"""
        weight = torch.cat([norm.weight for norm in self.norms]) if self.is_apart else self.weight
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # rounded once, after the weight
        return (layer_norm(wide, None, None, self.eps) * weight.view(x.shape[1:])).to(x.dtype)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU or GeGLU (Shazeer 2020, arXiv:2002.05202)."""

    recompute = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        with dropped(x):
            gate, up = self.gate_proj(x), self.up_proj(x)
        y = self._unit(gate, up)
        with dropped(droppable(y, self._unit, gate, up) if self.recompute else y):
            return self.down_proj(y)

    def _unit(self, gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up) if self.activation == "silu" else geglu(gate, up, GELU[self.activation])


class PlainMLP(nn.Module):
    """down(act(up(x))), act a GELU or the squared ReLU (So et al. 2021, arXiv:2109.08668)."""

    recompute = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        with dropped(x):
            up = self.up_proj(x)
        y = self._unit(up)
        with dropped(droppable(y, self._unit, up) if self.recompute else y):
            return self.down_proj(y)

    def _unit(self, up: Tensor) -> Tensor:
        if self.activation == "relu2":
            return F.relu(up).square()
        return F.gelu(up, approximate=GELU[self.activation])


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
MLPS = {"glu": GatedMLP, "plain": PlainMLP}


def compute_dtype(x: Tensor) -> Tensor:
    """x in autocast's dtype if autocast is on. This is one copy for the two or three linear layers that read it; otherwise
    each would make its own and keep it for the backward."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x
    dtype, recipe = torch.get_autocast_dtype(kind), getattr(x, "recipe", None)
    return x.to(dtype) if recipe is None else droppable(x.to(dtype), lambda: recipe().to(dtype))
