"""Gated DeltaNet: linear attention, in three of four layers of Qwen3.5 and OLMo hybrid (Yang et al. 2024, arXiv:2412.06464).

    q, k, v = silu(conv(W x))     a short causal convolution of each channel
    beta = sigmoid(W_b x)         how much of its value a token writes, a number a head
    g = -exp(A_log) softplus(W_a x + dt_bias)     the logarithm of the decay
    y = W_o (norm(delta_rule(q, k, v, g, beta)) * silu(W_g x))

What a token sees of the past is one matrix a head, whatever the length. Matrix and convolution start anew at every
document: packed or alone, a document gives the same numbers. During generation the cache keeps the matrix, and the last inputs
of the convolution, instead of keys and values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update, conv_state
from minisft.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from minisft.kernels.glu import swiglu
from minisft.kernels.rms_norm import rms_norm
from minisft.model.attention import KVCache
from minisft.model.layers import project, project_onto
from minisft.model.model_config import ModelConfig
from minisft.model.recompute import droppable, dropped


class GatedDeltaNet(nn.Module):
    recompute = False  # in the backward: see recompute.py

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.beta_scale, self.norm_eps = layer, config.delta_beta_scale, config.delta_norm_eps
        self.key_dim, self.value_dim = config.delta_key_dim, config.delta_value_dim
        hidden, heads = config.hidden_size, config.delta_num_value_heads
        q_size = k_size = config.delta_num_key_heads * self.key_dim
        v_size = heads * self.value_dim
        self.q_proj = nn.Linear(hidden, q_size, bias=False)
        self.k_proj = nn.Linear(hidden, k_size, bias=False)
        self.v_proj = nn.Linear(hidden, v_size, bias=False)
        self.a_proj = nn.Linear(hidden, heads, bias=False)
        self.b_proj = nn.Linear(hidden, heads, bias=False)
        self.g_proj = nn.Linear(hidden, v_size, bias=False)
        self.o_proj = nn.Linear(v_size, hidden, bias=False)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (  # their weights only, [C, 1, K]
            nn.Conv1d(size, size, config.conv_size, groups=size, bias=False) for size in (q_size, k_size, v_size)
        )
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.o_norm = nn.Module()  # of each head; the only norm of such a model whose weight has no offset
        self.o_norm.weight = nn.Parameter(torch.ones(self.value_dim))

    def forward(
        self,
        x: Tensor,
        start: Tensor,
        end: Tensor,
        _cos_sin,
        kv_cache: KVCache | None = None,
        _hints=None,
        add_to: Tensor | None = None,
    ) -> Tensor | None:
        """x [T, D] -> [T, D]; the arguments are those of Attention."""
        with dropped(x):
            readers = self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.a_proj, self.b_proj
            *inputs, gate, a, b = project(x, *readers)
        beta = b.sigmoid() * self.beta_scale  # [T, Hv]
        g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())  # [T, Hv]
        weights = [conv.weight[:, 0] for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]  # [C, K] each

        if kv_cache is not None and kv_cache.is_filled:
            states, memory = kv_cache.states[self.layer][:-1], kv_cache.states[self.layer][-1]
            pairs = [causal_conv1d_update(*args, activation="silu") for args in zip(inputs, states, weights)]
            q, k, v = self._heads([out for out, _ in pairs])
            out, memory = gated_delta_rule_step(q, k, v, g, beta, memory)
            kv_cache.states[self.layer] = (*[state for _, state in pairs], memory)
        else:
            q, k, v = self._heads(
                [causal_conv1d(part, weight, None, start, activation="silu") for part, weight in zip(inputs, weights)]
            )
            if kv_cache is None:
                out = gated_delta_rule(q, k, v, g, beta, start, end)
            else:
                out, memory = gated_delta_rule(q, k, v, g, beta, start, end, return_state=True)
                size = weights[0].shape[1]
                kv_cache.states[self.layer] = (*[conv_state(part, start, end, size) for part in inputs], memory)
        y = self._unit(gate, out)
        with dropped(droppable(y, self._unit, gate, out) if self.recompute else y):
            return project_onto(add_to, y, self.o_proj)

    def _unit(self, gate: Tensor, out: Tensor) -> Tensor:
        """gate [T, Hv Dv], out [T, Hv, Dv] -> [T, Hv Dv]: the norm of each head, and its gate."""
        return swiglu(gate, rms_norm(out, self.o_norm.weight, self.norm_eps).flatten(-2))

    def _heads(self, parts: list[Tensor]) -> list[Tensor]:
        return [part.unflatten(-1, (-1, dim)) for part, dim in zip(parts, (self.key_dim, self.key_dim, self.value_dim))]
