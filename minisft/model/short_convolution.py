"""The layers of LFM2 that are not attention: a gated causal convolution over the last few tokens of the document.

    B, C, h = split(W_in x)        y = W_out (C * conv(B * h))

The convolution starts anew at every document. During generation the cache keeps its last inputs.
"""

from torch import Tensor, nn

from minisft.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update, conv_state
from minisft.model.attention import KVCache
from minisft.model.layers import project, project_onto
from minisft.model.model_config import ModelConfig
from minisft.model.recompute import dropped


class ShortConvolution(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, size, bias = layer, config.hidden_size, config.conv_bias
        self.in_proj = nn.Linear(size, 3 * size, bias=bias)
        self.conv = nn.Conv1d(size, size, config.conv_size, groups=size, bias=bias)  # its parameters only
        self.out_proj = nn.Linear(size, size, bias=bias)

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
            before, after, h = project(x, self.in_proj)[0].chunk(3, dim=-1)  # [T, D] each
        h, weight = before * h, self.conv.weight[:, 0]  # [D, K]
        if kv_cache is not None and kv_cache.is_filled:
            (state,) = kv_cache.states[self.layer]
            out, state = causal_conv1d_update(h, state, weight, self.conv.bias)
            kv_cache.states[self.layer] = (state,)
        else:
            out = causal_conv1d(h, weight, self.conv.bias, start)
            if kv_cache is not None:
                kv_cache.states[self.layer] = (conv_state(h, start, end, weight.shape[1]),)
        return project_onto(add_to, after * out, self.out_proj)
