"""Norms and MLPs: the layers that work on each token alone. A config chooses from NORMS and MLPS."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.kernels.embedding import embedding
from minisft.kernels.glu import geglu, swiglu
from minisft.kernels.layer_norm import layer_norm
from minisft.kernels.linear import add_linear, linears, may_add_to
from minisft.kernels.rms_norm import add_rms_norm, rms_norm
from minisft.model.model_config import ModelConfig
from minisft.model.recompute import droppable, dropped

GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # our names of the activation -> PyTorch's of its approximation


class RMSNorm(nn.Module):
    """x / rms(x) * weight. Gemma's files hold weight - 1 (offset 1); Gemma and OLMo 2 round once, after the weight."""

    def __init__(self, config: ModelConfig, size: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size or config.hidden_size))
        self.eps, self.offset, self.in_fp32 = config.norm_eps, config.norm_offset, config.norm_in_fp32

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: of the products that read the result; None = it has the dtype of x, and no product reads it."""
        return rms_norm(x, self.weight, self.eps, **self._options(dtype))

    def add(self, branch: Tensor | None, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """norm(x + branch) in dtype, and x + branch, in one pass where there is a kernel for it. branch None: x has it."""
        return add_rms_norm(branch, x, self.weight, self.eps, **self._options(dtype))

    def _options(self, dtype: torch.dtype | None) -> dict:
        keep = "x" if dtype is None else "y"  # products keep what they read
        return {"offset": self.offset, "upcast_weight": self.in_fp32, "dtype": dtype, "keep": keep}


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

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: of the result; None = that of x."""
        y = self._norm(x, dtype)
        return droppable(y, self._norm, x, dtype) if self.recompute else y

    def _norm(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        y = layer_norm(x, self.weight + self.offset if self.offset else self.weight, self.bias, self.eps)
        return y if dtype is None else y.to(dtype)

    def add(self, branch: Tensor | None, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """norm(x + branch) in dtype, and x + branch. branch None: x has it."""
        x = x if branch is None else x + branch
        return self(x, dtype), x


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


class Embedding(nn.Embedding):
    """A row of the weight for each token; its gradient is that of kernels/embedding.py."""

    def reset_parameters(self) -> None:
        """Nothing where there is no memory yet (load.py): PyTorch would import its compiler for that, 150 MB."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU or GeGLU (Shazeer 2020, arXiv:2002.05202)."""

    recompute = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor, add_to: Tensor | None = None) -> Tensor | None:
        """add_to: as in `project_onto`."""
        with dropped(x):
            gate, up = project(x, self.gate_proj, self.up_proj)
        y = self._unit(gate, up)
        with dropped(droppable(y, self._unit, gate, up) if self.recompute else y):
            return project_onto(add_to, y, self.down_proj)

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

    def forward(self, x: Tensor, add_to: Tensor | None = None) -> Tensor | None:
        """add_to: as in `project_onto`."""
        with dropped(x):
            (up,) = project(x, self.up_proj)
        y = self._unit(up)
        with dropped(droppable(y, self._unit, up) if self.recompute else y):
            return project_onto(add_to, y, self.down_proj)

    def _unit(self, up: Tensor) -> Tensor:
        if self.activation == "relu2":
            return F.relu(up).square()
        return F.gelu(up, approximate=GELU[self.activation])


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
MLPS = {"glu": GatedMLP, "plain": PlainMLP}


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's if it is on. What several linear layers read is made in it at once;
    otherwise each would cast, and keep its own copy for the backward."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def project(x: Tensor, *modules: nn.Module) -> list[Tensor]:
    """The linear layers of one input x [..., in] -> [..., out] each. Plain ones are one op, and so are those of which some have
    adapters (lora.py); quantised ones are modules of their own."""
    if all(type(module) is nn.Linear for module in modules):
        return linears(x, *((module.weight, module.bias) for module in modules))
    for module in modules:
        if hasattr(module, "together"):
            return module.together(x, modules)
    return [project(x, m)[0] if type(m) is nn.Linear else m(x) for m in modules]


def project_onto(x: Tensor | None, y: Tensor, module: nn.Module) -> Tensor | None:
    """The last product of a sublayer, module(y) [T, D]; or None, if it was added in place to the residual stream x [T, D].
    x None: it may not be."""
    if x is not None and may_add_to(x):
        if type(module) is nn.Linear and module.bias is None:
            return add_linear(x, y, module.weight)
        if hasattr(module, "adds_to") and module.adds_to(x, y):
            return None
    return project(y, module)[0]
