"""Reading the keys of a config.json with care: types, ranges, and what is not implemented.

A key that would change the maths in a way that is not implemented is refused by name: a model that loads but computes
something else is the worst outcome. All errors are UserErrors with exit code MODEL.
"""

from typing import Any

from minisft.errors import MODEL, UserError

# Keys that change the maths, with the value that changes nothing (null, false, 0 and empty never do). A family whose
# class has the key reads it; in all other families any other value is refused.
OTHER_MATHS = {
    "add_cross_attention": False,
    "alibi": False,
    "attention_chunk_size": None,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "attn_temperature_tuning": False,
    "clip_qkv": None,
    "cross_attention_hidden_size": None,
    "embedding_multiplier": 1.0,
    "final_logit_softcapping": None,
    "hidden_size_per_layer_input": None,
    "is_encoder_decoder": False,
    "kv_lora_rank": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "moe_intermediate_size": None,
    "n_routed_experts": None,
    "no_rope_layers": None,
    "num_experts": None,
    "num_kv_shared_layers": None,
    "num_local_experts": None,
    "partial_rotary_factor": 1.0,
    "position_embedding_type": "rope",
    "qk_layernorm": False,
    "quantization_config": None,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1.0,
    "rope_interleaved": False,
    "rotary_pct": 1.0,
    "sliding_window": None,
    "text_config": None,
    "use_alibi": False,
    "use_bidirectional_attention": False,
    "use_cla": False,
    "use_parallel_residual": False,
    "use_qk_norm": False,
    "vision_config": None,
}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}


def require(holds: bool, message: str, hint: str = "") -> None:
    if not holds:
        raise UserError(f"config.json: {message}", hint=hint, exit_code=MODEL)


def size(values: dict, key: str, limit: int = 2**31) -> int:
    value: Any = values.get(key)
    require(type(value) is int and value > 0, f"{key} = {str(value)[:40]!r}, expected a positive whole number")
    require(value < limit, f"{key} = {str(value)[:40]} is out of range")
    return value


def number(values: dict, key: str) -> float:
    value: Any = values.get(key)
    require(is_number(value) and value > 0, f"{key} = {str(value)[:40]!r}, expected a positive number")
    return float(value)


def optional_number(values: dict, key: str) -> float | None:
    return None if values.get(key) is None else number(values, key)


def probability(values: dict, key: str) -> float:
    """A dropout rate; 0 if the family has no such key."""
    value: Any = values.get(key, 0.0)
    require(is_number(value) and 0 <= value < 1, f"{key} = {value!r}, expected a number from 0 up to 1")
    return float(value)


def flag(values: dict, key: str) -> bool:
    """False if the family has no such key."""
    value = values.get(key, False)
    require(type(value) is bool, f"{key} = {value!r}, expected true or false")
    return value


def activation(values: dict, key: str, supported: tuple[str, ...] = tuple(ACTIVATIONS)) -> str:
    value: Any = values.get(key)
    known = isinstance(value, str) and value in supported
    require(known, f"{key} = {value!r} is not implemented; implemented: {', '.join(supported)}")
    return ACTIVATIONS[value]


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # not NaN, and far from overflow


def refuse_other_maths(values: dict, known: dict) -> None:
    """Refuse keys of OTHER_MATHS that are set and that are not among `known`, the keys of the family's class."""
    quantization = values.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "bitsandbytes":
        values = values | {"quantization_config": None}  # load.py reads such weights
    wrong = [
        f"{key} = {str(values[key])[:40]}"
        for key, neutral in OTHER_MATHS.items()
        if key not in known and values.get(key) and values[key] != neutral
    ]
    hint = "the model would load and compute something else, so it is refused"
    if values.get("quantization_config"):
        hint = "quantised weights are read as bitsandbytes stores them, and else in bf16, fp16 or fp32: use the model that "
        hint += "these were made from"
    elif any(part in setting for part in ("expert", "moe") for setting in wrong):
        hint = "mixtures of experts are not supported: use a dense model"
    require(not wrong, f"{values['model_type']} with {', '.join(wrong)} is not implemented", hint)
