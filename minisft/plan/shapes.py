"""The parameters of a model by name and shape, from its config.json alone: no weights, no torch.

The names are those of `Decoder` (model/decoder.py), which makes the same tensors; tests/test_plan.py compares the two for
every family.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from minisft.model.lora_options import LoraOptions, is_target, refuse_targets_without_layer, scale_of
from minisft.model.model_config import QK_LAYER_NORMS, ModelConfig
from minisft.model.tensor_names import stored_tensors

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Adapter:
    """One site of LoRA: A [r, in] is shared by the matrices that the files stack, each of which has its own B [out, r]."""

    matrices: tuple[str, ...]  # names of the frozen weights
    rank: int
    num_inputs: int
    num_outputs: tuple[int, ...]  # of each matrix

    @property
    def num_parameters(self) -> int:
        return self.rank * (self.num_inputs + sum(self.num_outputs))


def parameter_shapes(c: ModelConfig) -> Shapes:
    """Name -> shape of every parameter, in no particular order. Tied embedding and head are one, embed_tokens.weight."""
    shapes: Shapes = {"embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    if c.learned_positions:
        shapes["embed_positions.weight"] = (c.max_position_embeddings, c.hidden_size)
    for layer, mixer in enumerate(c.mixers):
        block = c.block if mixer == "attention" else "pre"
        parts = [*_norms_of_block(c, block), *MIXERS[mixer](c), *_mlp(c)]
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in parts}
    shapes |= dict(_norm(c, "norm", c.hidden_size))
    if not c.tie_word_embeddings:
        shapes |= dict(_linear("lm_head", c.vocab_size, c.hidden_size, c.head_bias))
    return shapes


def layer_of(name: str) -> int | None:
    """The layer of a parameter; None for embedding, last norm and head."""
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def is_matrix_of_a_layer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is the weight of a linear layer inside a block."""
    return name.startswith("layers.") and len(shape) == 2


def adapters_of(c: ModelConfig, options: LoraOptions) -> list[Adapter]:
    """The adapters that `apply_lora` makes. UserError for names that it refuses."""
    shapes = parameter_shapes(c)
    linears = [name for name, shape in shapes.items() if is_matrix_of_a_layer(name, shape)]
    sites = {name.removesuffix(".weight"): stored for name, stored in stored_tensors(c, linears).items()}
    refuse_targets_without_layer(list(sites), options)
    found = []
    for site, stored in sites.items():
        if is_target(site, options):
            outputs = tuple(shapes[part][0] for part in stored.names)
            found.append(Adapter(stored.names, scale_of(site, options)[0], shapes[stored.names[0]][1], outputs))
    return found


def count(shapes: Shapes) -> int:
    """Numbers in all of these tensors."""
    return sum(map(prod, shapes.values()))


# ---- the parts of a block -----------------------------------------------------------------------------------------


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(c: ModelConfig, name: str, size: int, bias: bool | None = None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """RMSNorm always has a weight."""
    if c.norm == "rms" or c.norm_weight:
        yield f"{name}.weight", (size,)
    if c.norm == "layer" and (c.norm_bias if bias is None else bias):
        yield f"{name}.bias", (size,)


def _norms_of_block(c: ModelConfig, block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    names = {
        "pre": ("input_layernorm", "post_attention_layernorm"),
        "scaled": ("input_layernorm", "post_attention_layernorm"),
        "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "sandwich": (
            *("input_layernorm", "post_attention_layernorm"),
            *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
        "parallel": ("input_layernorm", *(["post_attention_layernorm"] if c.mlp_has_norm else [])),
    }[block]
    for name in names:
        yield from _norm(c, name, c.hidden_size)


def _attention(c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    Q, K, D, at = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size, "self_attn"
    yield from _linear(f"{at}.q_proj", Q * (1 + c.attention_gate), D, c.qkv_bias)
    yield from _linear(f"{at}.k_proj", K, D, c.qkv_bias)
    yield from _linear(f"{at}.v_proj", K, D, c.qkv_bias)
    yield from _linear(f"{at}.o_proj", D, Q, c.o_bias)
    for name, heads in (("q_norm", c.num_heads), ("k_norm", c.num_kv_heads)):
        if c.qk_norm in ("head", "full"):
            yield f"{at}.{name}.weight", (c.head_dim * (heads if c.qk_norm == "full" else 1),)
        elif c.qk_norm == "layer":
            yield from _norm(c, f"{at}.{name}", c.head_dim)
        elif c.qk_norm == "layer_apart":
            for head in range(heads):
                yield from _norm(c, f"{at}.{name}.norms.{head}", c.head_dim, bias=False)
        elif c.qk_norm in QK_LAYER_NORMS:
            yield f"{at}.{name}.weight", (heads * c.head_dim,)


def _delta(c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, heads, at = c.hidden_size, c.delta_num_value_heads, "linear_attn"
    K, V = c.delta_num_key_heads * c.delta_key_dim, heads * c.delta_value_dim
    for name, rows in (("q", K), ("k", K), ("v", V), ("a", heads), ("b", heads), ("g", V)):
        yield from _linear(f"{at}.{name}_proj", rows, D, False)
    yield from _linear(f"{at}.o_proj", D, V, False)
    for name, rows in (("q", K), ("k", K), ("v", V)):
        yield f"{at}.{name}_conv1d.weight", (rows, 1, c.conv_size)
    yield f"{at}.A_log", (heads,)
    yield f"{at}.dt_bias", (heads,)
    yield f"{at}.o_norm.weight", (c.delta_value_dim,)


def _conv(c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    D = c.hidden_size
    yield from _linear("conv.in_proj", 3 * D, D, c.conv_bias)
    yield "conv.conv.weight", (D, 1, c.conv_size)
    if c.conv_bias:
        yield "conv.conv.bias", (D,)
    yield from _linear("conv.out_proj", D, D, c.conv_bias)


def _mlp(c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in ("gate_proj", "up_proj") if c.mlp == "glu" else ("up_proj",):
        yield from _linear(f"mlp.{name}", c.intermediate_size, c.hidden_size, c.mlp_bias)
    yield from _linear("mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias)


MIXERS = {"attention": _attention, "delta": _delta, "conv": _conv}
