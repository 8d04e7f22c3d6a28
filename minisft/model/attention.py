"""Self-attention over the flat token stream, and the cache that makes generation cheap.

Each token of a document attends to itself and to the tokens before it in the same document (`start` and `end` say
which; see data/batch.py). Several query heads may share a key-value head (grouped-query attention, Ainslie et al. 2023,
arXiv:2305.13245): a smaller cache and less traffic.

Families add more: a sliding window (a token sees the newest w only), a soft cap on the scores, a norm of queries
and keys, a clamp on q, k and v, layers without rotary embedding, a gate on the output. Each is one switch of the config, and
all of them go through the kernels' contracts, so that every backend has them.
"""

import torch
from torch import Tensor, nn

from minisft.kernels.flash_attention import flash_attention, flash_attention_with_kvcache
from minisft.kernels.rope import rope
from minisft.model.context import Context
from minisft.model.layers import HeadLayerNorm, LayerNorm, RMSNorm, project, project_onto
from minisft.model.model_config import QK_LAYER_NORMS, ModelConfig
from minisft.model.recompute import dropped


class KVCache:
    """Keys and values of the tokens so far, one row a document: per layer of attention [B, max_length, Hkv, Dh], a view of memory
    in which the tokens of a head are side by side, so that a step multiplies them without a copy. The other kinds of layers
    keep what they need of the past in `states`: tensors whose first dimension is B.

    The first forward fills it from a flat stream of B documents; every later one brings one token a row, that is B
    documents of one token each. In both cases token t goes to row (documents begun up to t) - 1, slot position_ids[t].
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.states: dict[int, tuple[Tensor, ...]] = {}

    def place(self, position_ids: Tensor, start: Tensor, end: Tensor) -> None:
        """Call once a forward, before the layers: finds row and slot of every token."""
        index = torch.arange(len(start), device=start.device)
        self.is_filled = len(self.layers) + len(self.states) > 0
        self.row, self.slot = (start == index).cumsum(0) - 1, position_ids.long()  # [T]
        self.lengths = position_ids[end == index + 1].int() + 1  # [B], with the new tokens
        self.longest = int(self.lengths.max())

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v [T, Hkv, Dh] of the new tokens; returns all of them so far, [B, longest, Hkv, Dh]."""
        if layer not in self.layers:
            num_heads, head_dim = k.shape[1:]
            shape = (len(self.lengths), num_heads, self.max_length, head_dim)
            self.layers[layer] = k.new_zeros(shape).transpose(1, 2), v.new_zeros(shape).transpose(1, 2)
        keys, values = self.layers[layer]
        keys[self.row, self.slot], values[self.row, self.slot] = k, v
        return keys[:, : self.longest], values[:, : self.longest]

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these (int64 indices)."""
        for layer, pair in self.layers.items():
            self.layers[layer] = tuple(part.transpose(1, 2)[rows].transpose(1, 2) for part in pair)
        self.states = {layer: tuple(state[rows] for state in states) for layer, states in self.states.items()}


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.context: Context | None = None  # where documents are split over ranks (parallel.py)
        scale = config.attention_scale / (layer + 1 if config.attention_scale_by_layer else 1)
        self.options = {"scale": scale, "window": config.windows[layer], "softcap": config.attention_softcap}
        self.dropout = config.attention_dropout
        self.clip_qkv, self.qk_norm, self.interleaved = config.clip_qkv, config.qk_norm, config.rope_interleaved
        self.norm_after_rope = config.qk_norm_after_rope
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.is_gated = config.attention_gate
        self.q_proj = nn.Linear(config.hidden_size, q_size * (1 + self.is_gated), bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        if config.qk_norm in ("head", "full"):
            self.q_norm = RMSNorm(config, config.head_dim if config.qk_norm == "head" else q_size)
            self.k_norm = RMSNorm(config, config.head_dim if config.qk_norm == "head" else kv_size)
        elif config.qk_norm == "layer":
            self.q_norm, self.k_norm = LayerNorm(config, config.head_dim), LayerNorm(config, config.head_dim)
        elif config.qk_norm in QK_LAYER_NORMS:
            self.q_norm, self.k_norm = (HeadLayerNorm(config, n) for n in (config.num_heads, config.num_kv_heads))

    def forward(
        self,
        x: Tensor,  # [T, D]
        start: Tensor,
        end: Tensor,
        cos_sin: tuple[Tensor, ...] | None,  # rope_table; None: the layer has no rotary embedding
        kv_cache: KVCache | None = None,
        hints: dict | None = None,  # arguments of flash_attention that change nothing but its speed
        add_to: Tensor | None = None,  # as in project_onto
    ) -> Tensor | None:
        with dropped(x):
            q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        if self.clip_qkv is not None:
            q, k, v = (t.clamp(-self.clip_qkv, self.clip_qkv) for t in (q, k, v))
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.unflatten(-1, (-1, self.head_dim * (1 + self.is_gated)))  # [T, Hq, Dh], for gated ones [T, Hq, 2 Dh]
        q, gate = q.chunk(2, dim=-1) if self.is_gated else (q, None)
        k = k.unflatten(-1, (-1, self.head_dim))  # [T, Hkv, Dh]
        v = v.unflatten(-1, (-1, self.head_dim))
        if self.qk_norm in QK_LAYER_NORMS:
            q, k = self.q_norm(q), self.k_norm(k)
        is_piece = len(start) < len(end)  # of a stream that is split over ranks
        is_whole = kv_cache is None and not is_piece  # else the keys go to the cache, or to other ranks, turned
        rotary, q, k = self._turn(q, k, cos_sin, is_whole)

        keys, values = (k, v) if kv_cache is None else kv_cache.append(self.layer, k, v)
        if kv_cache is not None and kv_cache.is_filled:
            out = flash_attention_with_kvcache(q, keys, values, kv_cache.lengths, **self.options)
        else:
            options = self.options | {"dropout": self.dropout if self.training else 0.0} | (hints or {})
            attend = self.context.attend if is_piece else flash_attention
            # nobody else reads q and k: products and norms keep their inputs, and attention turns them only if they are whole
            out = attend(q, k, v, start, end, rotary=rotary, may_overwrite=True, **options)
        if gate is not None:
            out = out * gate.sigmoid()
        return project_onto(add_to, out.flatten(-2), self.o_proj)  # [T, D]

    def _turn(
        self, q: Tensor, k: Tensor, cos_sin: tuple[Tensor, ...] | None, may_be_left: bool
    ) -> tuple[dict, Tensor, Tensor]:
        """The RMSNorm of each head, the rotary embedding and the factor of the queries: (rotary, q, k).

        Norms before the rotary embedding are one op with it. It may be left to attention, as `rotary`, if nothing comes after it.
        """
        if cos_sin is None:
            return {}, *((self.q_norm(q), self.k_norm(k)) if self.qk_norm == "head" else (q, k))
        cos, sin, *factors = cos_sin
        rotary = {"cos": cos, "sin": sin, "interleaved": self.interleaved}
        norms_follow = self.qk_norm == "head" and self.norm_after_rope
        if self.qk_norm == "head" and not norms_follow:
            rotary |= {f"{n}_norm": (m.weight, m.eps, m.offset) for n, m in (("q", self.q_norm), ("k", self.k_norm))}
        if may_be_left and not factors and not norms_follow:
            return rotary, q, k
        q, k = rope(q, k, **rotary)
        for factor in factors:
            q = q * factor[:, None, None].to(q.dtype)
        return {}, *((self.q_norm(q), self.k_norm(k)) if norms_follow else (q, k))
