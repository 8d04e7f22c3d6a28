"""The config.json of a GGUF file's model. A key of the file that would change the maths and is not read here is refused."""

import math
from functools import partial

from minisft.errors import MODEL, UserError
from minisft.gguf.file import GgufFile, dequantized
from minisft.model.model_config import Rope

# architecture -> model_type
ARCHITECTURES = {
    "llama": "llama",  # Llama, SmolLM 1 and 2, Mistral without windows, ...
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
NO_MATHS = ("vocab_size", "attention.causal", "tensor_data_layout")  # the first is the number of rows of the embedding
WINDOWS = ("gemma2", "gemma3")  # architectures whose windows this file says enough about
# llama.cpp scales queries by the width of the model, not of a head, in the models with so many blocks (the 27B ones)
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
LOCAL_THETA = 10000.0  # of the sliding layers of Gemma 3, unless the file has another
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(file: GgufFile) -> dict:
    """The keys of config.json. Raises UserError (exit code MODEL) for an architecture or a key that is not supported."""
    architecture = file.architecture
    if architecture not in ARCHITECTURES:
        _refuse(file, f"the architecture {architecture!r} is not read from GGUF", f"read: {', '.join(ARCHITECTURES)}")
    own = file.own()
    config = {"model_type": ARCHITECTURES[architecture]}
    for key, name in KEYS.items():
        if key in own:
            config[name] = own.pop(key)
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "max_position_embeddings",
    ):
        if type(config.get(key)) is not int:
            _refuse(file, f"its metadata has no {key}, or a list where one number is expected")
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    head_dim = config["head_dim"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.pop(key, head_dim) != head_dim:
            _refuse(file, f"{architecture}.{key} differs from the {head_dim} features of a head")
    if config["model_type"] in ("qwen2",):  # its class has no such key: always hidden_size / heads
        del config["head_dim"]
    _read_family(file, architecture, own, config, head_dim)
    _read_rope(file, own, config, head_dim)
    unknown = sorted(own.keys() - set(NO_MATHS))
    if unknown:
        _refuse(file, f"{', '.join(f'{architecture}.{key}' for key in unknown[:5])} is not implemented")
    config["vocab_size"] = int(file.tensors["token_embd.weight"].shape[1])
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := file.values.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            config[f"{ours}_token_id"] = token
    return config


def generation_config_of(file: GgufFile) -> dict:
    """The tokens that end an answer: end of text and end of turn."""
    ends = [file.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    return {"eos_token_id": ends} if ends else {}


def _read_family(file: GgufFile, architecture: str, own: dict, config: dict, head_dim: int) -> None:
    """What a family reads beside the common keys. Moves it from `own` to `config`."""
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture in WINDOWS:
        config["sliding_window"] = own.pop("attention.sliding_window", None)
        if (slides := own.pop("attention.sliding_window_pattern", None)) is not None:
            config["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
        by_width = config["num_hidden_layers"] == SCALED_BY_WIDTH[architecture]
        width = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = width if by_width else head_dim
    if architecture == "gemma2":
        config["attn_logit_softcapping"] = own.pop("attn_logit_softcapping", None)
        config["final_logit_softcapping"] = own.pop("final_logit_softcapping", None)
    if architecture == "gemma3":
        config["final_logit_softcapping"] = own.pop("final_logit_softcapping", None)
        config["sliding_window_pattern"] = 6  # written into llama.cpp
        config["rope_local_base_freq"] = own.pop("rope.freq_base_swa", LOCAL_THETA)


def _read_rope(file: GgufFile, own: dict, config: dict, head_dim: int) -> None:
    kind, factor = own.pop("rope.scaling.type", "none"), own.pop("rope.scaling.factor", None)
    original = own.pop("rope.scaling.original_context_length", None)
    own.pop("rope.scaling.finetuned", None)
    if kind == "linear" or (kind == "none" and factor not in (None, 1.0)):
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        config["rope_scaling"] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif kind != "none":
        _refuse(file, f"the rotary embedding {kind!r} is not read from GGUF")
    if "rope_freqs.weight" in file.tensors:  # Llama 3.1 and later: a divisor for each frequency, made of two numbers
        divisors = dequantized(file.tensors["rope_freqs.weight"]).tolist()
        for factor in (8.0, 32.0, 4.0, 16.0):
            rope = Rope(head_dim, config.get("rope_theta", 10000.0), "llama3", factor)
            expected = llama3_divisors(rope)
            if len(divisors) == len(expected) and all(map(partial(math.isclose, rel_tol=1e-4), divisors, expected)):
                config["rope_scaling"] = LLAMA3 | {"factor": factor}
                return
        _refuse(file, "its rope_freqs are not those of Llama 3")


def llama3_divisors(rope: Rope) -> list[float]:
    """What divides each frequency: 1 for fast pairs, `factor` for slow ones, blended between."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    divisors = []
    for pair in range(0, rope.dim, 2):
        turns = rope.original_max_position_embeddings * rope.theta ** (-pair / rope.dim) / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - keep) / rope.factor + keep))
    return divisors


def _refuse(file: GgufFile, problem: str, hint: str = "start from the model's Hugging Face folder instead") -> None:
    raise UserError(f"{file.path}: {problem}", hint=hint, exit_code=MODEL)
