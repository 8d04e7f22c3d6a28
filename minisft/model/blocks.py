"""The blocks that differ from Llama's: in the places of the norms, or with attention and MLP side by side.

    pre (decoder.py)   x += attention(norm(x));        x += mlp(norm(x))
    scaled             x += r attention(norm(x));      x += r mlp(norm(x))            Granite, a constant r < 1
    post               x += norm(attention(x));        x += norm(mlp(x))              OLMo 2 and 3
    sandwich           x += norm(attention(norm(x)));  x += norm(mlp(norm(x)))        Gemma 2 and 3
    parallel           x += attention(norm(x)) + mlp(norm'(x))                     GPT-NeoX, Phi, Cohere, some StableLM

The norms have the names that most files give them, which do not always match their place: the `post_attention_layernorm`
of a pre block is the norm before the MLP.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from minisft.model.attention import Attention
from minisft.model.layers import MLPS, NORMS, compute_dtype
from minisft.model.model_config import ModelConfig


class ScaledBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = NORMS[config.norm](config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, branch: Tensor | None, *where) -> tuple[Tensor, Tensor]:
        """x, branch [T, D]; `where`: the other arguments of attention, as in decoder.Block."""
        normed, x = self.input_layernorm.add(branch, x, compute_dtype(x))
        attended = self.self_attn(normed, *where)
        normed, x = self.post_attention_layernorm.add(attended * self.multiplier, x, compute_dtype(x))
        return x, self.mlp(normed) * self.multiplier


class PostNormBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.post_feedforward_layernorm = NORMS[config.norm](config)

    def forward(self, x: Tensor, branch: Tensor | None, *where) -> tuple[Tensor, Tensor]:
        x = x if branch is None else x + branch
        x = x + self.post_attention_layernorm(self.self_attn(x.to(compute_dtype(x)), *where))
        return x, self.post_feedforward_layernorm(self.mlp(x.to(compute_dtype(x))))


class SandwichBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = NORMS[config.norm](config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = NORMS[config.norm](config)
        self.pre_feedforward_layernorm = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.post_feedforward_layernorm = NORMS[config.norm](config)

    def forward(self, x: Tensor, branch: Tensor | None, *where) -> tuple[Tensor, Tensor]:
        normed, x = self.input_layernorm.add(branch, x, compute_dtype(x))
        attended = self.post_attention_layernorm(self.self_attn(normed, *where))
        normed, x = self.pre_feedforward_layernorm.add(attended, x, compute_dtype(x))
        return x, self.post_feedforward_layernorm(self.mlp(normed))


class ParallelBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = NORMS[config.norm](config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = NORMS[config.norm](config) if config.mlp_has_norm else None
        self.mlp = MLPS[config.mlp](config)
        self.dropouts = config.attention_output_dropout, config.mlp_output_dropout
        self.sum_branches_first = config.sum_branches_first

    def forward(self, x: Tensor, branch: Tensor | None, *where) -> tuple[Tensor, Tensor]:
        normed, x = self.input_layernorm.add(branch, x, compute_dtype(x))
        attended = F.dropout(self.self_attn(normed, *where), self.dropouts[0], self.training)
        if self.post_attention_layernorm is not None:
            normed = self.post_attention_layernorm(x, compute_dtype(x))
        processed = F.dropout(self.mlp(normed), self.dropouts[1], self.training)
        return (x, attended + processed) if self.sum_branches_first else (x + attended, processed)


OTHER_BLOCKS = {"scaled": ScaledBlock, "post": PostNormBlock, "sandwich": SandwichBlock, "parallel": ParallelBlock}
