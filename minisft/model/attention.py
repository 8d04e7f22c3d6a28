"""Self-attention over the flat token stream, and the cache that makes generation cheap.

Each token of a document attends to itself and to the tokens before it in the same document (`start` and `end` say
which; see data/batch.py). Several query heads may share a key-value head (grouped-query attention, Ainslie et al. 2023,
arXiv:2305.13245): a smaller cache and less traffic.
"""

import torch
from torch import Tensor, nn

from minisft.kernels.flash_attention import flash_attention, flash_attention_with_kvcache
from minisft.kernels.rope import rope
from minisft.model.families import ModelConfig


class KVCache:
    """Keys and values of the tokens so far, one row a document: per layer [B, max_length, Hkv, Dh].

    The first forward fills it from a flat stream of B documents; every later one brings one token a row, that is B
    documents of one token each. In both cases token t goes to row (documents begun up to t) - 1, slot position_ids[t].
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.layers: list[tuple[Tensor, Tensor]] = []

    def place(self, position_ids: Tensor, start: Tensor, end: Tensor) -> None:
        """Call once a forward, before the layers: finds row and slot of every token."""
        index = torch.arange(len(start), device=start.device)
        self.is_filled = len(self.layers) > 0
        self.row, self.slot = (start == index).cumsum(0) - 1, position_ids.long()  # [T]
        self.lengths = position_ids[end == index + 1].int() + 1  # [B], with the new tokens
        self.longest = int(self.lengths.max())

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v [T, Hkv, Dh] of the new tokens; returns all of them so far, [B, longest, Hkv, Dh]."""
        if layer == len(self.layers):
            shape = (len(self.lengths), self.max_length, *k.shape[1:])
            self.layers.append((k.new_zeros(shape), v.new_zeros(shape)))
        keys, values = self.layers[layer]
        keys[self.row, self.slot], values[self.row, self.slot] = k, v
        return keys[:, : self.longest], values[:, : self.longest]

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these (int64 indices)."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.scale = config.attention_scale / (layer + 1 if config.attention_scale_by_layer else 1)
        self.dropout = config.attention_dropout
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)

    def forward(
        self,
        x: Tensor,  # [T, D]
        start: Tensor,
        end: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,  # None: no rotary embedding
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, Hq, Dh]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, Hkv, Dh]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if cos_sin is not None:
            q, k = rope(q, k, *cos_sin)
        if kv_cache is not None:
            keys, values = kv_cache.append(self.layer, k, v)
        if kv_cache is not None and kv_cache.is_filled:
            out = flash_attention_with_kvcache(q, keys, values, kv_cache.lengths, scale=self.scale)
        else:
            dropout = self.dropout if self.training else 0.0
            out = flash_attention(q, k, v, start, end, scale=self.scale, dropout=dropout)
        return self.o_proj(out.flatten(-2))  # [T, D]
