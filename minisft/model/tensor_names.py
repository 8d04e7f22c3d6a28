"""The tensors of Hugging Face files: their names, and how they are made of our parameters.

Our names are Llama's without the leading "model.". Some families name modules differently, stack several matrices into
one, transpose them, or interleave the rows of q, k and v by heads. To add a family that differs: one entry in NAMES.
"""

from __future__ import annotations  # Tensor is the name of a type only: `minisft plan` reads the names without torch

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minisft.model.model_config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: our parameters `names`, stacked along dim 0 or, with num_heads, interleaved head by head (the
    first head's rows of each, then the second head's), and then transposed if `transposed`. With row_length, a vector of
    ours is a matrix of such rows in the file."""

    names: tuple[str, ...]
    num_heads: int = 0
    transposed: bool = False
    row_length: int = 0

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our parameters -> the tensor of the file."""
        import torch

        if self.num_heads:
            heads = [part.unflatten(0, (self.num_heads, -1)) for part in parts]  # [H, Dh, ...]
            tensor = torch.stack(heads, dim=1).flatten(0, 2)
        else:
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.row_length:
            return tensor.unflatten(0, (-1, self.row_length))
        return tensor.t() if self.transposed else tensor

    def split(self, tensor: Tensor, rows: list[int]) -> list[Tensor]:
        """The tensor of the file -> our parameters. rows: how many each of them has."""
        if self.row_length:
            return [tensor.flatten()]
        tensor = tensor.t() if self.transposed else tensor
        if self.num_heads:
            heads = tensor.unflatten(0, (self.num_heads, len(rows), -1))  # [H, 3, Dh, ...]
            return [part.flatten(0, 1) for part in heads.unbind(1)]
        return list(tensor.split(rows)) if len(rows) > 1 else [tensor]

    def shape(self, parts: list[Tensor]) -> list[int]:
        """The shape of the tensor of the file."""
        shape = [sum(part.shape[0] for part in parts), *parts[0].shape[1:]]
        if self.row_length:
            return [shape[0] // self.row_length, self.row_length]
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True)
class Names:
    """How a family names its tensors, where it differs from Llama."""

    prefix: str = "model."  # of everything but the head
    modules: dict[str, str] = field(default_factory=dict)  # our module -> the file's
    stacked: dict[str, tuple[str, ...]] = field(default_factory=dict)  # the file's module -> ours
    by_head: bool = False  # stacked rows are interleaved head by head
    transposed: bool = False  # projections are kept as [in, out]
    aliases: dict[str, str] = field(default_factory=dict)  # a part of a name that files may have -> what is written


QK_LAYERNORMS = {f"self_attn.{name}_norm": f"self_attn.{name}_layernorm" for name in "qk"}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = Names()
GATE_UP = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
NAMES = {
    "phi3": Names(stacked={"self_attn.qkv_proj": QKV, **GATE_UP}),
    "hunyuan_v1_dense": Names(
        modules={"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"}
    ),
    "glm": Names(stacked=GATE_UP),
    "glm4": Names(
        modules={
            "post_attention_layernorm": "post_self_attn_layernorm",
            "pre_feedforward_layernorm": "post_attention_layernorm",
            "post_feedforward_layernorm": "post_mlp_layernorm",
        },
        stacked=GATE_UP,
    ),
    "starcoder2": Names(modules={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}),
    "stablelm": Names(modules=QK_LAYERNORMS),
    "phi": Names(
        modules={
            **QK_LAYERNORMS,
            "norm": "final_layernorm",
            "self_attn.o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        }
    ),
    "qwen3_5_text": Names(
        modules={
            "linear_attn.a_proj": "linear_attn.in_proj_a",
            "linear_attn.b_proj": "linear_attn.in_proj_b",
            "linear_attn.g_proj": "linear_attn.in_proj_z",
            "linear_attn.o_proj": "linear_attn.out_proj",
            "linear_attn.o_norm": "linear_attn.norm",
        },
        stacked={
            "linear_attn.in_proj_qkv": tuple(f"linear_attn.{part}_proj" for part in "qkv"),
            "linear_attn.conv1d": tuple(f"linear_attn.{part}_conv1d" for part in "qkv"),
        },
    ),
    "olmo_hybrid": Names(  # transformers renames the norms of its attention layers too; the published files do not
        modules={"input_layernorm": "attention_layer_norm", "post_attention_layernorm": "feedforward_layer_norm"},
        aliases={"input_layernorm": "attention_layer_norm", "post_attention_layernorm": "feedforward_layer_norm"},
    ),
    "lfm2": Names(
        modules={
            "norm": "embedding_norm",
            "input_layernorm": "operator_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "self_attn.q_norm": "self_attn.q_layernorm",
            "self_attn.k_norm": "self_attn.k_layernorm",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
        }
    ),
    "gpt_neox": Names(
        prefix="gpt_neox.",
        modules={
            "embed_tokens": "embed_in",
            "norm": "final_layer_norm",
            "lm_head": "embed_out",
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        stacked={"attention.query_key_value": QKV},
        by_head=True,
    ),
    "gpt2": Names(
        prefix="transformer.",
        modules={
            "embed_tokens": "wte",
            "embed_positions": "wpe",
            "layers": "h",
            "norm": "ln_f",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        stacked={"attn.c_attn": QKV},
        transposed=True,  # its class of projections is called Conv1D
    ),
}


def stored_tensors(config: ModelConfig, names: Iterable[str]) -> dict[str, Stored]:
    """Tensor name in a Hugging Face file -> how it is made of our parameters `names`. Every parameter occurs once."""
    family = NAMES.get(config.model_type, LLAMA)
    stacks = {ours[0]: (theirs, ours) for theirs, ours in family.stacked.items()}
    inside = {module for ours in family.stacked.values() for module in ours[1:]}  # stored with the first of their stack
    tensors = {}
    for name in names:
        path, leaf = name.rsplit(".", 1)
        layer, module = "", path
        if path.startswith("layers."):
            layers, number, module = path.split(".", 2)
            layer = f"{family.modules.get(layers, layers)}.{number}."
        if module in inside:
            continue
        theirs, ours = stacks.get(module, (module_name(config, module), (module,)))
        prefix = "" if module == "lm_head" else family.prefix
        tensors[f"{prefix}{layer}{theirs}.{leaf}"] = Stored(
            names=tuple(name.replace(module, part) for part in ours),
            num_heads=config.num_heads if family.by_head and len(ours) > 1 else 0,
            transposed=family.transposed and leaf == "weight" and module.endswith("_proj"),
            row_length=config.head_dim if config.qk_norm == "layer_by_head" and module in QK_LAYERNORMS else 0,
        )
    return tensors


def usual_name(config: ModelConfig, name: str) -> str:
    """The name that is written for a tensor which a file may have under another one."""
    aliases = NAMES.get(config.model_type, LLAMA).aliases
    return ".".join(aliases.get(part, part) for part in name.split(".")) if aliases else name


def module_name(config: ModelConfig, module: str) -> str:
    """What the files of the family call one of our modules, or a part of it."""
    modules = NAMES.get(config.model_type, LLAMA).modules
    whole, parts, number = module.partition(".norms.")
    return modules.get(whole, whole) + parts + number
