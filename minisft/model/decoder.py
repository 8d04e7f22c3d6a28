"""The decoder: token ids in, hidden states out.

    embed -> num_layers x [ x += attention(norm(x));  x += mlp(norm(x)) ] -> norm

It works on the flat token stream [T], in which documents stand side by side (data/batch.py): no batch dimension, no
padding, no mask. Documents meet in attention only, and `start` and `end` keep them apart there; everything else works
on each token alone. The LM head is not part of the forward: the loss multiplies it only with the rows that are trained.

A pass over memory for each sum would cost as much as a norm. On a GPU a sublayer's last product adds to x as it writes
(layers.project_onto). Else the norm that reads x next adds, with x in its registers: a block returns x and its last branch apart.

That is Llama. Other families set switches of the config: blocks.py has their blocks, layers.py their norms and MLPs,
gated_delta_net.py and short_convolution.py what hybrids have in place of attention in most layers.

Precision. Under autocast the linear layers compute in bf16 from fp32 master weights, while the residual stream x and
the norms stay in fp32, as in transformers: a bf16 stream would round away whatever a layer adds below 2^-9 of x.
Measured against fp32 with 8 layers of hidden size 576, the hidden states are off by 0.9 %. A bf16 stream would save 5 %
of the time and be off by 1.1 %.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minisft.kernels.linear import may_add_to
from minisft.kernels.linear_cross_entropy import linear_cross_entropy
from minisft.model.attention import Attention, KVCache
from minisft.model.blocks import OTHER_BLOCKS
from minisft.model.context import Context
from minisft.model.gated_delta_net import GatedDeltaNet
from minisft.model.layers import MLPS, NORMS, Embedding, compute_dtype
from minisft.model.lora_options import LoraOptions
from minisft.model.model_config import ModelConfig
from minisft.model.recompute import offloaded
from minisft.model.rope import rope_table
from minisft.model.short_convolution import ShortConvolution
from minisft.model.token_rows import TokenRows

MIXERS = {  # what mixes the tokens -> its name in most files, and its class
    "attention": ("self_attn", Attention),
    "delta": ("linear_attn", GatedDeltaNet),
    "conv": ("conv", ShortConvolution),
}


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = NORMS[config.norm](config)
        self.mixer_name, mixer = MIXERS[config.mixers[layer]]
        self.add_module(self.mixer_name, mixer(config, layer))
        self.post_attention_layernorm = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.attention_dropout, self.mlp_dropout = config.attention_output_dropout, config.mlp_output_dropout
        # Whether products may add to x: no norm keeps it for its backward, and nothing comes between a product and its sum.
        self.products_add = config.norm == "rms" and not (self.attention_dropout or self.mlp_dropout)

    def forward(
        self,
        x: Tensor,  # [T, D]
        branch: Tensor | None,  # [T, D]: what the layer before adds to x; None: x has it
        start: Tensor,
        end: Tensor,
        cos_sin: tuple[Tensor, ...] | None,  # rope_table; None: the layer has no rotary embedding
        kv_cache: KVCache | None = None,
        hints: dict | None = None,  # for attention: what the host knows of the documents
    ) -> tuple[Tensor, Tensor | None]:
        """-> x, and the branch that the next norm adds to it; None: x has it"""
        normed, x = self.input_layernorm.add(branch, x, compute_dtype(x))
        where = start, end, cos_sin, kv_cache, hints
        attended = getattr(self, self.mixer_name)(normed, *where, add_to=x if self.products_add else None)
        if attended is not None:
            attended = F.dropout(attended, self.attention_dropout, self.training)
        normed, x = self.post_attention_layernorm.add(attended, x, compute_dtype(x))
        processed = self.mlp(normed, add_to=x if self.products_add else None)
        if processed is not None:
            processed = F.dropout(processed, self.mlp_dropout, self.training)
        return x, processed


def _on_copy(layer: nn.Module, x: Tensor, *others) -> tuple[Tensor, Tensor | None]:
    """The layer, which may add to a copy of x: x itself is kept to run it again."""
    return layer(x.clone(), *others)


BLOCKS = {"pre": Block} | OTHER_BLOCKS


class Decoder(nn.Module):
    """A causal language model without its head.

    Attributes to set from outside: `gradient_checkpointing` runs every `gradient_checkpointing_every`-th block again in the
    backward pass instead of keeping its activations; `offload_activations` keeps the inputs of these blocks in CPU memory;
    `recompute_cheap_ops` is the selective form (recompute.py explains all three).
    `neftune_alpha` adds noise to the embeddings in training (Jain et al. 2023, arXiv:2310.05914). `mean_length` is the mean
    length of the documents, if it is known: the attention kernel sizes its tiles by it, and nothing but the speed depends on it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing, self.gradient_checkpointing_every = False, 1
        self.offload_activations = False
        self.neftune_alpha = 0.0
        self.mean_length: float | None = None
        self.context: Context | None = None  # of ranks that share each batch (parallel.py)
        self.lora: LoraOptions | None = None  # of a model with adapters (lora.py)
        # whole values from elsewhere: of sharded weights, where the other ranks take part (parallel.py), or from files
        self.gather: Callable[[str], Tensor] | None = None
        # False for an adapter that was loaded: switching it off gives the base model, not the model that the run started from.
        self.adapter_is_new = True
        self.generation_config: dict = {}  # generation_config.json of the folder it was loaded from, kept for saving
        # No padding_idx, unlike transformers: it would keep one row, often that of EOS, from being trained.
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size)
        # Layers without attention are pre blocks in every family.
        blocks = [BLOCKS[config.block if mixer == "attention" else "pre"] for mixer in config.mixers]
        self.layers = nn.ModuleList(block(config, layer) for layer, block in enumerate(blocks))
        self.norm = NORMS[config.norm](config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        start: Tensor,
        end: Tensor,
        kv_cache: KVCache | None = None,
        shared: bool = True,
    ) -> Tensor:
        """input_ids int64 [T], position_ids, start, end int32 [T] (see Batch) -> hidden [T, D], after the final norm, in the
        dtype of matrix products. Where `end` is longer than the others, these are the tokens that this rank has of a stream.

        With a kv_cache the forward stores its keys and values there and attends to those already stored, as KVCache
        describes; without one the documents must be whole. shared: False where no two documents share tokens (Batch.shared).
        """
        x = self.embed_tokens(input_ids)  # [T, D]
        if self.config.embedding_multiplier != 1:
            x = x * torch.tensor(self.config.embedding_multiplier, dtype=x.dtype)
        if self.config.learned_positions:
            x = x + self.embed_positions(position_ids)
        if self.training and self.neftune_alpha:
            x = x + self._neftune_noise(x, end - start)
        x = F.dropout(x, self.config.embedding_dropout, self.training)

        dtype = torch.float32 if self.config.rope_in_fp32 else x.dtype
        tables = {rope: rope_table(rope, position_ids, dtype) for rope in set(self.config.ropes) if rope is not None}
        if kv_cache is not None:
            kv_cache.place(position_ids, start, end)
        branch, hints = None, {"mean_length": self.mean_length, "shared": shared}
        for number, (layer, rope) in enumerate(zip(self.layers, self.config.ropes)):
            where = start, end, None if rope is None else tables[rope], kv_cache, hints
            if self.gradient_checkpointing and self.training and number % self.gradient_checkpointing_every == 0:
                x, branch = x if branch is None else x + branch, None  # one tensor to keep instead of two
                run = partial(_on_copy, layer) if may_add_to(x) else layer
                with offloaded(x.shape) if self.offload_activations else nullcontext():
                    # keeps the RNG: the same dropout
                    x, branch = checkpoint(run, x, branch, *where, use_reentrant=False)
            else:
                x, branch = layer(x, branch, *where)
        return self.norm.add(branch, x, compute_dtype(x))[0]

    def recompute_cheap_ops(self, enabled: bool) -> None:
        """Compute the outputs of gated units and LayerNorms again in the backward (True), or keep them (False)."""
        for module in self.layers.modules():
            if hasattr(module, "recompute"):
                module.recompute = enabled

    def _neftune_noise(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Uniform in +-alpha / sqrt(L * D), L the length of the token's document: its expected norm is the same for
        every document, however they are packed."""
        limit = self.neftune_alpha * (lengths.float() * x.shape[-1]).rsqrt()  # [T]
        return torch.empty_like(x).uniform_(-1, 1) * limit[:, None].to(x.dtype)

    def cross_entropy(self, hidden: Tensor, targets: Tensor, rows: Tensor, **options: Any) -> Any:
        """`linear_cross_entropy` under the head of this model. options: its others."""
        return linear_cross_entropy(
            hidden,
            self.head_weight,
            targets,
            rows=rows,
            bias=self.head_bias,
            softcap=self.config.logit_softcap,
            logit_scale=self.config.logit_scale,
            **options,
        )

    def whole(self, name: str) -> Tensor:
        """The values of a parameter, detached; also where this process has only some rows of it and `gather` is set."""
        return self.get_parameter(name).detach() if self.gather is None else self.gather(name)

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the embedding itself where they are tied."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head.whole() if isinstance(head, TokenRows) else head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V], or None: few models have one."""
        return self.lm_head.bias if self.config.head_bias else None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> softcap(logit_scale * (W h + bias)) [..., V]. For people and for generation; the loss
        computes the same and never makes logits of all tokens."""
        logits = F.linear(hidden, self.head_weight, self.head_bias)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits.float() / self.config.logit_softcap)
        return logits
