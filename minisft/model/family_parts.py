"""What the functions of families.py are made of: Llama's settings, and readings of config.json that families share."""

from collections.abc import Callable

from minisft.model.config_keys import activation, flag, number, probability, require, size
from minisft.model.model_config import ModelConfig
from minisft.model.rope_config import read_rope

FULL, SLIDING = "full_attention", "sliding_attention"
MIXER_TYPES = {"delta": "linear_attention", "conv": "conv"}  # of layers that are not attention
LAYER_NORM = {"norm": "layer", "norm_bias": True}
BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}


def decoder_config(
    v: dict,
    max_length: int | None,
    *,
    eps: str = "rms_norm_eps",
    act: str = "hidden_act",
    rope: dict | None = None,
    **switches,
) -> ModelConfig:
    """Llama's settings, changed by `switches`. v: config.json with the class defaults, without nulls. eps, act: the family's
    names of these two keys. rope: options of read_rope."""
    heads, layers, head_dim = size(v, "num_attention_heads", 2**16), num_layers_of(v), head_dim_of(v)
    kv_heads = heads if v.get("num_key_value_heads") is None else size(v, "num_key_value_heads", 2**16)
    require(heads % kv_heads == 0, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    llama = {
        "model_type": v["model_type"],
        "vocab_size": size(v, "vocab_size"),
        "hidden_size": size(v, "hidden_size", 2**24),
        "intermediate_size": size(v, "intermediate_size", 2**24),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": size(v, "max_position_embeddings"),
        "norm_eps": number(v, eps),
        "qkv_bias": flag(v, "attention_bias"),
        "o_bias": flag(v, "attention_bias"),
        "mlp_bias": flag(v, "mlp_bias"),
        "attention_scale": head_dim**-0.5,
        "windows": (None,) * layers,
        "mixers": ("attention",) * layers,
        "activation": activation(v, act),
        "tie_word_embeddings": flag(v, "tie_word_embeddings"),
        "attention_dropout": probability(v, "attention_dropout"),
        "initializer_range": number(v, "initializer_range"),
    }
    if "ropes" not in switches:
        llama["ropes"] = (read_rope(v, head_dim, max_length, **(rope or {})),) * layers
    config = ModelConfig(**llama | switches)
    other = "relu2" if config.mlp == "glu" else "silu"  # the activation of MLPs of the other kind only
    require(config.activation != other, f"{act} = {v[act]!r} is not implemented for this family")
    types = [
        MIXER_TYPES.get(mixer, FULL if window is None else SLIDING)
        for mixer, window in zip(config.mixers, config.windows)
    ]
    require(v.get("layer_types") in (None, types), f"layer_types is not what {v['model_type']} computes: {types}")
    return config


def num_layers_of(v: dict) -> int:
    return size(v, "num_hidden_layers", 10_000)


def head_dim_of(v: dict) -> int:
    if "head_dim" in v:
        return size(v, "head_dim", 2**16)
    hidden, heads = size(v, "hidden_size"), size(v, "num_attention_heads")
    require(hidden % heads == 0, f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return hidden // heads


def layer_types_of(v: dict, slides: Callable[[int], bool]) -> list[str]:
    """The layer_types of config.json; where it has none, layer i slides if the family's rule says so."""
    types = v.get("layer_types")
    if types is None:
        types = [SLIDING if slides(i) else FULL for i in range(num_layers_of(v))]
    fits = isinstance(types, list) and len(types) == num_layers_of(v) and all(t in (FULL, SLIDING) for t in types)
    require(
        fits, f"layer_types = {str(types)[:60]}: expected {FULL} or {SLIDING} for each of {num_layers_of(v)} layers"
    )
    return types


def windows_of(v: dict, types: list[str]) -> tuple[int | None, ...]:
    if SLIDING not in types:
        return (None,) * len(types)
    require(v.get("sliding_window") is not None, f"layer_types has {SLIDING}, but there is no sliding_window")
    window = size(v, "sliding_window")
    return tuple(window if t == SLIDING else None for t in types)


def same_window(v: dict) -> tuple[int | None, ...]:
    """On every layer, or on none where sliding_window is null."""
    return windows_of(v, [FULL if v.get("sliding_window") is None else SLIDING] * num_layers_of(v))


def mixers_of(v: dict, other: str, default: list[str]) -> tuple[str, ...]:
    """What mixes the tokens in each layer: attention, or `other`."""
    types = v.get("layer_types", default)
    names = {MIXER_TYPES[other]: other, FULL: "attention"}
    fits = isinstance(types, list) and len(types) == num_layers_of(v) and all(t in list(names) for t in types)
    require(
        fits, f"layer_types = {str(types)[:60]}: expected {' or '.join(names)} for each of {num_layers_of(v)} layers"
    )
    return tuple(names[t] for t in types)


def delta_sizes(v: dict) -> dict:
    keys, values = size(v, "linear_num_key_heads", 2**16), size(v, "linear_num_value_heads", 2**16)
    require(values % keys == 0, f"linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}")
    dims = size(v, "linear_key_head_dim", 2**16), size(v, "linear_value_head_dim", 2**16)
    names = ("delta_num_key_heads", "delta_num_value_heads", "delta_key_dim", "delta_value_dim", "conv_size")
    return dict(zip(names, (keys, values, *dims, size(v, "linear_conv_kernel_dim", 2**10))))


def residual_dropout(v: dict, key: str) -> dict:
    return dict.fromkeys(("attention_output_dropout", "mlp_output_dropout"), probability(v, key))


def check_head_dim(v: dict) -> None:
    """For classes that do not know the key head_dim."""
    own = size(v, "hidden_size") // size(v, "num_attention_heads")
    require(v.get("head_dim") in (None, own), f"head_dim {v.get('head_dim')} is not implemented for {v['model_type']}")
