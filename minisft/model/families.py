"""Hugging Face's config.json and tensor names, translated: the one file that knows model families by name.

The decoder is one program with switches. A family is a setting of those switches (`ModelConfig`), a set of class
defaults for the keys that its config.json may leave out, and a table from the tensor names in its files to ours. Our
names are Llama's without the leading "model.". To add a family: its defaults, a reader, and its tensor names.

config.json comes in two dialects. transformers 4 writes `rope_theta` and `rope_scaling` at the top level and
`torch_dtype`; transformers 5 writes one `rope_parameters` table and `dtype`. Both are read; where both speak, the newer
one wins, as in transformers. A key that would change the maths in a way that is not implemented is refused by name: a
model that loads but computes something else is the worst outcome.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from minisft.errors import MODEL, UserError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base frequency and how it is stretched for longer contexts (see rope.py)."""

    theta: float = 10000.0
    kind: str = "default"  # "default" | "linear" | "llama3"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # the last three are llama3's
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The switches of the decoder. `hf` is config.json as it was read, so that saving keeps every key."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: str  # "rms" | "layer"
    norm_eps: float
    mlp: str  # "glu": down(silu(gate) * up) | "plain": down(act(up))
    activation: str  # "silu" | "gelu" | "gelu_tanh"
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rope: Rope | None  # None: learned positions, added to the embeddings
    attention_scale: float  # the factor of q.k before the softmax
    attention_scale_by_layer: bool  # divide it by (layer + 1) as well
    tie_word_embeddings: bool
    embedding_dropout: float
    attention_dropout: float
    residual_dropout: float
    initializer_range: float
    depth_scaled_init: bool  # the projections into the residual stream start at 1 / sqrt(2 * num_layers) of the others
    hf: dict = field(repr=False, compare=False)


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint file: our parameters `names`, stacked along dim 0, then transposed if so."""

    names: tuple[str, ...]
    transposed: bool = False


# Values that transformers gives to keys that config.json leaves out. They are part of the format.
DEFAULTS = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    },
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}

# transformers accepts the general name of these keys too.
SYNONYMS = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Keys that change the maths in ways that are not implemented, with the value that changes nothing. null, false, 0 and
# empty change nothing either.
OTHER_MATHS = {
    "add_cross_attention": False,
    "alibi": False,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "embedding_multiplier": 1.0,
    "final_logit_softcapping": None,
    "is_encoder_decoder": False,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "no_rope_layers": None,
    "num_experts": None,
    "num_local_experts": None,
    "partial_rotary_factor": 1.0,
    "position_embedding_type": "rope",
    "qk_layernorm": False,
    "quantization_config": None,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1.0,
    "rope_interleaved": False,
    "sliding_window": None,
    "text_config": None,
    "use_bidirectional_attention": False,
    "use_qk_norm": False,
}


def from_hf(hf: dict) -> ModelConfig:
    """Reads the dict of a config.json, of either dialect; keys that it leaves out take the family's class defaults.

    Raises UserError (exit code MODEL) for a family, a key or a value that is not supported, naming it.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in READERS:
        raise UserError(
            f"config.json: model_type {model_type!r} is not supported",
            hint=f"supported: {', '.join(READERS)}",
            exit_code=MODEL,
        )
    synonyms = SYNONYMS.get(model_type, {})
    hf = {synonyms.get(key, key): value for key, value in hf.items()}
    values = DEFAULTS[model_type] | {key: value for key, value in hf.items() if value is not None}
    _refuse_other_maths(values)
    return READERS[model_type](values, hf)


def to_hf(config: ModelConfig, dtype: str) -> dict:
    """The config.json of a model whose weights are stored as `dtype` ("float32" ...): what was read, plus the defaults
    that it left out, so that readers with other defaults agree."""
    defaults = DEFAULTS[config.model_type]
    hf = defaults | {key: value for key, value in config.hf.items() if value is not None or key not in defaults}
    hf["architectures"] = hf.get("architectures") or [ARCHITECTURES[config.model_type]]
    hf["vocab_size"] = config.vocab_size
    hf["torch_dtype" if "torch_dtype" in hf else "dtype"] = dtype
    return hf


def stored_tensors(config: ModelConfig, names: Iterable[str]) -> dict[str, Stored]:
    """Tensor name in a Hugging Face file -> how it is made of our parameters `names`. Every parameter occurs once."""
    return TENSORS[config.model_type](names)


# ---------------------------------------------------------------- Llama: SmolLM, TinyLlama, Yi, Vicuna and many others


def _read_llama(values: dict, hf: dict) -> ModelConfig:
    hidden, heads = _size(values, "hidden_size"), _size(values, "num_attention_heads")
    if "head_dim" not in values:
        _check(hidden % heads == 0, f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        values["head_dim"] = hidden // heads
    head_dim = _size(values, "head_dim")
    kv_heads = _size({"num_key_value_heads": heads} | values, "num_key_value_heads")
    _check(heads % kv_heads == 0, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    _check(head_dim % 2 == 0, f"head_dim {head_dim} is odd, and rotary embeddings turn pairs")
    return ModelConfig(
        model_type="llama",
        vocab_size=_size(values, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(values, "intermediate_size"),
        num_layers=_size(values, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_size(values, "max_position_embeddings"),
        norm="rms",
        norm_eps=_number(values, "rms_norm_eps"),
        mlp="glu",
        activation=_activation(values, "hidden_act", ("silu", "swish")),
        qkv_bias=_flag(values, "attention_bias"),
        o_bias=_flag(values, "attention_bias"),
        mlp_bias=_flag(values, "mlp_bias"),
        rope=_read_rope(values),
        attention_scale=head_dim**-0.5,
        attention_scale_by_layer=False,
        tie_word_embeddings=_flag(values, "tie_word_embeddings"),
        embedding_dropout=0.0,
        attention_dropout=_probability(values, "attention_dropout"),
        residual_dropout=0.0,
        initializer_range=_number(values, "initializer_range"),
        depth_scaled_init=False,
        hf=hf,
    )


def _read_rope(values: dict) -> Rope:
    old, new = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}
    _check(isinstance(old, dict) and isinstance(new, dict), "rope_scaling and rope_parameters must be objects")
    table = {key: value for key, value in (old | new).items() if value is not None}
    kind = table.get("rope_type") or table.get("type") or "default"
    theta = _number({"rope_theta": 10000.0} | values | table, "rope_theta")
    _check(table.get("partial_rotary_factor") in (None, 1, 1.0), "partial_rotary_factor is not implemented for llama")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, _number(table, "factor"))
    _check(kind == "llama3", f"rope type {kind!r} is not implemented; implemented: default, linear, llama3")
    # The original context length may stand beside the table or in it, and is the model's own when nobody says.
    keys = ("max_position_embeddings", "original_max_position_embeddings")
    lengths = [values[keys[0]], table.get(keys[1]), values.get(keys[1])]
    original = [length for length in lengths if length is not None][-1]
    low, high = _number(table, "low_freq_factor"), _number(table, "high_freq_factor")
    _check(low < high, f"rope: low_freq_factor {low} must be less than high_freq_factor {high}")
    return Rope(theta, kind, _number(table, "factor"), low, high, _size({keys[1]: original}, keys[1]))


def _llama_tensors(names: Iterable[str]) -> dict[str, Stored]:
    return {name if name.startswith("lm_head.") else f"model.{name}": Stored((name,)) for name in names}


# ---------------------------------------------------------------- GPT-2


def _read_gpt2(values: dict, hf: dict) -> ModelConfig:
    hidden, heads = _size(values, "n_embd"), _size(values, "n_head")
    _check(hidden % heads == 0, f"n_embd {hidden} is not a multiple of n_head {heads}")
    return ModelConfig(
        model_type="gpt2",
        vocab_size=_size(values, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size({"n_inner": 4 * hidden} | values, "n_inner"),
        num_layers=_size(values, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=_size(values, "n_positions"),
        norm="layer",
        norm_eps=_number(values, "layer_norm_epsilon"),
        mlp="plain",
        activation=_activation(values, "activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu")),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        rope=None,
        attention_scale=(hidden // heads) ** -0.5 if _flag(values, "scale_attn_weights") else 1.0,
        attention_scale_by_layer=_flag(values, "scale_attn_by_inverse_layer_idx"),
        tie_word_embeddings=_flag(values, "tie_word_embeddings"),
        embedding_dropout=_probability(values, "embd_pdrop"),
        attention_dropout=_probability(values, "attn_pdrop"),
        residual_dropout=_probability(values, "resid_pdrop"),
        initializer_range=_number(values, "initializer_range"),
        depth_scaled_init=True,
        hf=hf,
    )


GPT2_MODULES = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def _gpt2_tensors(names: Iterable[str]) -> dict[str, Stored]:
    """GPT-2 keeps q, k and v in one matrix, and every projection as [in, out] (its class is called Conv1D)."""
    tensors = {}
    for name in names:
        path, leaf = name.rsplit(".", 1)
        layer, module = "", path
        if path.startswith("layers."):
            _, number, module = path.split(".", 2)
            layer = f"h.{number}."
        if module in ("self_attn.k_proj", "self_attn.v_proj"):
            continue  # stacked with q_proj
        ours = tuple(name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj"))
        parts = ours if module == "self_attn.q_proj" else (name,)
        stored = name if module == "lm_head" else f"transformer.{layer}{GPT2_MODULES[module]}.{leaf}"
        tensors[stored] = Stored(parts, transposed=leaf == "weight" and module.endswith("_proj"))
    return tensors


READERS = {"llama": _read_llama, "gpt2": _read_gpt2}
TENSORS = {"llama": _llama_tensors, "gpt2": _gpt2_tensors}

# ---------------------------------------------------------------- checked values


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(f"config.json: {message}", exit_code=MODEL)


def _size(values: dict, key: str) -> int:
    value = values[key]
    _check(type(value) is int and value > 0, f"{key} = {value!r}, expected a positive whole number")
    return value


def _number(values: dict, key: str) -> float:
    value = values.get(key)
    _check(type(value) in (int, float) and 0 < value < float("inf"), f"{key} = {value!r}, expected a positive number")
    return float(value)


def _probability(values: dict, key: str) -> float:
    value = values[key]
    _check(type(value) in (int, float) and 0 <= value < 1, f"{key} = {value!r}, expected a number from 0 up to 1")
    return float(value)


def _flag(values: dict, key: str) -> bool:
    _check(type(values[key]) is bool, f"{key} = {values[key]!r}, expected true or false")
    return values[key]


def _activation(values: dict, key: str, supported: tuple[str, ...]) -> str:
    _check(values[key] in supported, f"{key} = {values[key]!r} is not implemented; implemented: {', '.join(supported)}")
    return ACTIVATIONS[values[key]]


def _refuse_other_maths(values: dict) -> None:
    wrong = [key for key, neutral in OTHER_MATHS.items() if values.get(key) and values[key] != neutral]
    layer_types = values.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        wrong.append("layer_types")
    if wrong:
        settings = ", ".join(f"{key} = {str(values[key])[:40]}" for key in wrong)
        raise UserError(
            f"config.json: {values['model_type']} with {settings} is not implemented",
            hint="the model would load and compute something else, so it is refused; supported are plain "
            + " and ".join(READERS),
            exit_code=MODEL,
        )
