"""Hugging Face's config.json, translated: the one file that knows model families by name.

A family is a short function that sets the switches of ModelConfig where they are not Llama's, and the defaults that its
class in transformers gives to keys that config.json leaves out (class_defaults.py). To add one: both, an entry in
FAMILIES, and one in tensor_names.py where its files name things otherwise.

config.json comes in two dialects. transformers 4 writes `rope_theta` and `rope_scaling` at the top level and
`torch_dtype`; transformers 5 writes one `rope_parameters` table, `dtype` and `layer_types`. Both are read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from minisft.model import class_defaults
from minisft.model.config_keys import (
    flag,
    number,
    optional_number,
    probability,
    refuse_other_maths,
    require,
    size,
)
from minisft.model.family_parts import (
    BIASES,
    FULL,
    LAYER_NORM,
    MIXER_TYPES,
    SLIDING,
    check_head_dim,
    decoder_config,
    delta_sizes,
    head_dim_of,
    layer_types_of,
    mixers_of,
    num_layers_of,
    residual_dropout,
    same_window,
    windows_of,
)
from minisft.model.model_config import ModelConfig
from minisft.model.rope_config import read_rope, read_rope_by_kind

NULL_IS_A_VALUE = {
    *("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads", "head_dim")
}
VISION_KEYS = (
    *("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"),
    *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    *("multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "vision_feature_layer"),
)
# models that see or hear -> the families of their text part; the first if it has no model_type
WRAPPERS = {"gemma3": ("gemma3_text",), "qwen3_5": ("qwen3_5_text",), "mistral3": ("mistral", "ministral3")}
FLAT_ROPE_KEYS = ("rope_theta", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")


def from_hf(hf: dict, *, max_length: int | None = None) -> ModelConfig:
    """Reads the dict of a config.json, of either dialect; keys that it leaves out take the family's class defaults.

    max_length: the longest text of the run, for the two kinds of rotary embedding that depend on it (rope_config.py);
    None: within the original context. `notes` of the result says what was decided.
    Raises UserError (exit code MODEL) for a family, a key or a value that is not supported, naming it.
    """
    model_type: Any = hf.get("model_type")
    notes = []
    if isinstance(model_type, str) and model_type in WRAPPERS:
        hf = _text_part(hf)
        notes.append(f"of {model_type} the text part is trained, {hf['model_type']}")
        model_type = hf["model_type"]
    known = isinstance(model_type, str) and model_type in FAMILIES
    require(known, f"model_type {model_type!r} is not supported", f"supported: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    if model_type == "gpt2":
        hf = {GPT2_NAMES.get(key, key): value for key, value in hf.items()}
    values = {key: value for key, value in _complete(hf, family).items() if value is not None}
    refuse_other_maths(values, family.defaults)
    config = family.read(values, max_length)
    ropes = dict.fromkeys(rope for rope in config.ropes if rope is not None)
    notes += [rope.note for rope in ropes if rope.note]
    return replace(config, stored_vocab_size=config.vocab_size, notes=tuple(notes), hf=hf)


def to_hf(config: ModelConfig, dtype: str) -> dict:
    """The config.json of a model whose weights are stored as `dtype` ("float32" ...): the keys that were read, plus the
    defaults of those that were missing, so that readers with other defaults agree."""
    family = FAMILIES[config.model_type]
    hf = _complete(config.hf, family)
    if config.hf.get("rope_parameters"):  # the newer dialect has them in that table
        hf = {key: value for key, value in hf.items() if key in config.hf or key not in FLAT_ROPE_KEYS}
    hf.pop("quantization_config", None)  # of the files that were read; save_model adds its own
    hf["architectures"] = hf.get("architectures") or [family.architecture]
    hf["vocab_size"] = config.vocab_size
    hf["torch_dtype" if "torch_dtype" in hf else "dtype"] = dtype
    return hf


def _complete(hf: dict, family: "Family") -> dict:
    """`hf` with defaults for keys that are missing, or null where null only means "default"."""
    null_means_default = family.defaults.keys() - NULL_IS_A_VALUE - family.null_values
    return family.defaults | {
        key: value for key, value in hf.items() if value is not None or key not in null_means_default
    }


def _text_part(hf: dict) -> dict:
    """The config of the language model inside that of a model which also sees or hears."""
    text: Any = hf.get("text_config")
    hint = "use the config.json that came with the weights"
    require(isinstance(text, dict), f"{hf['model_type']} has no text_config", hint)
    families: tuple[str, ...] = WRAPPERS[hf["model_type"]]
    family = text.get("model_type", families[0])
    require(
        family in list(families), f"{hf['model_type']} with a text_config of {str(family)[:40]!r} is not implemented"
    )
    rest = {k: v for k, v in hf.items() if k not in (*VISION_KEYS, "text_config", "architectures")}
    tied = {
        key: hf[key] for key in ("tie_word_embeddings",) if hf.get(key) is not None
    }  # of the head, which is outside
    return rest | text | tied | {"model_type": family}


# ---------------------------------------------------------------- families: the switches that are not Llama's


def _llama(v, max_length):
    return decoder_config(v, max_length)


def _mistral(v, max_length):
    return decoder_config(v, max_length, windows=same_window(v))


def _ministral3(v, max_length):
    """Queries are multiplied by a factor that grows with their position, as in Llama 4."""
    if not {"rope_scaling", "rope_parameters"} & v.keys():
        v = v | {"rope_parameters": class_defaults.MINISTRAL3_ROPE}
    rope = {"more_keys": ("llama_4_scaling_beta", "max_position_embeddings")}
    config = decoder_config(v, max_length, rope=rope, windows=same_window(v))
    kind = config.ropes[0].kind
    require(kind == "yarn", f"rope type {kind!r} is not implemented for ministral3")
    return config


def _qwen2(v, max_length):
    return decoder_config(v, max_length, qkv_bias=True, o_bias=False, windows=_qwen_windows(v))


def _qwen3(v, max_length):
    return decoder_config(v, max_length, qk_norm="head", windows=_qwen_windows(v))


def _qwen_windows(v):
    if not flag(v, "use_sliding_window"):
        v = v | {"sliding_window": None}
    first = v["max_window_layers"]
    require(
        type(first) is int and 0 <= first < 2**31, f"max_window_layers = {str(first)[:40]!r}, expected a whole number"
    )
    return windows_of(v, layer_types_of(v, lambda i: v.get("sliding_window") is not None and i >= first))


def _smollm3(v, max_length):
    """Every fourth layer has no rotary embedding; where windows are used, those are the layers that slide."""
    layers, interval = num_layers_of(v), size(v, "no_rope_layer_interval")
    turns = v.get(
        "no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)]
    )  # the name is inverted: 1 = rope
    fits = isinstance(turns, list) and len(turns) >= layers and all(turn in (0, 1) for turn in turns)
    require(fits, f"no_rope_layers = {str(turns)[:60]}: expected a 0 or 1 for each of {layers} layers")
    if not flag(v, "use_sliding_window"):
        v = v | {"sliding_window": None}
    types = layer_types_of(v, lambda i: v.get("sliding_window") is not None and not turns[i])
    rope = read_rope(v, head_dim_of(v), max_length)
    ropes = tuple(rope if turn else None for turn in turns[:layers])
    return decoder_config(v, max_length, ropes=ropes, windows=windows_of(v, types))


def _gemma(v, max_length, **switches):
    # The first files have "gelu" and mean its tanh approximation, which transformers 5 knows too; later files have it twice.
    if v.get("hidden_act") == "gelu":
        v = v | {"hidden_act": "gelu_pytorch_tanh"}
    other = v.get("hidden_activation", "gelu_pytorch_tanh")
    require(other == "gelu_pytorch_tanh", f"hidden_activation = {other!r} is not implemented for {v['model_type']}")
    scale = size(v, "hidden_size") ** 0.5
    return decoder_config(v, max_length, norm_offset=1.0, norm_in_fp32=True, embedding_multiplier=scale, **switches)


def _gemma2(v, max_length):
    return _gemma(
        v,
        max_length,
        act="hidden_activation",
        block="sandwich",
        attention_scale=number(v, "query_pre_attn_scalar") ** -0.5,
        attention_softcap=optional_number(v, "attn_logit_softcapping"),
        logit_softcap=optional_number(v, "final_logit_softcapping"),
        windows=windows_of(v, layer_types_of(v, lambda i: i % 2 == 0)),
    )


def _gemma3(v, max_length):
    require(v.get("attn_logit_softcapping") is None, "attn_logit_softcapping is not implemented for gemma3_text")
    pattern = size(v, "sliding_window_pattern")
    types = layer_types_of(v, lambda i: (i + 1) % pattern != 0)
    ropes = read_rope_by_kind(v, head_dim_of(v), max_length, {FULL: "rope_theta", SLIDING: "rope_local_base_freq"})
    return _gemma(
        v,
        max_length,
        act="hidden_activation",
        block="sandwich",
        qk_norm="head",
        attention_scale=number(v, "query_pre_attn_scalar") ** -0.5,
        logit_softcap=optional_number(v, "final_logit_softcapping"),
        windows=windows_of(v, types),
        ropes=tuple(ropes[t] for t in types),
    )


def _qwen3_5(v, max_length):
    interval = size(v, "full_attention_interval")
    default = [FULL if (i + 1) % interval == 0 else MIXER_TYPES["delta"] for i in range(num_layers_of(v))]
    return decoder_config(
        v,
        max_length,
        rope={"partial_key": "partial_rotary_factor", "more_keys": ("mrope_section", "mrope_interleaved")},
        qk_norm="head",
        attention_gate=True,
        norm_offset=1.0,
        norm_in_fp32=True,
        mixers=mixers_of(v, "delta", default),
        delta_norm_eps=number(v, "rms_norm_eps"),
        **delta_sizes(v),
    )


def _olmo_hybrid(v, max_length):
    """Attention layers are OLMo 2's, without rotary embedding where theta is null; the others are pre blocks."""
    heads, layers = size(v, "num_attention_heads"), num_layers_of(v)
    v = {"linear_num_key_heads": heads, "linear_num_value_heads": heads} | v
    v = {"linear_key_head_dim": int(0.75 * size(v, "hidden_size") / size(v, "linear_num_key_heads"))} | v
    v = {"linear_value_head_dim": 2 * size(v, "linear_key_head_dim")} | v
    default = [FULL if i % 4 == 3 else MIXER_TYPES["delta"] for i in range(layers)]
    if FULL not in default:
        default[-1] = FULL
    table = v.get("rope_parameters", {})
    theta = table["rope_theta"] if isinstance(table, dict) and "rope_theta" in table else v.get("rope_theta")
    return _olmo2(
        v,
        max_length,
        ropes=(None if theta is None else read_rope(v, head_dim_of(v), max_length),) * layers,
        mixers=mixers_of(v, "delta", default),
        delta_beta_scale=2.0 if flag(v, "linear_allow_neg_eigval") else 1.0,
        delta_norm_eps=1e-5,  # written into its class
        **delta_sizes(v),
    )


def _lfm2(v, max_length):
    layers = num_layers_of(v)
    attends = v.get("full_attn_idxs", list(range(layers)))
    fits = isinstance(attends, list) and all(type(i) is int and 0 <= i < layers for i in attends)
    require(fits, f"full_attn_idxs = {str(attends)[:40]}: expected numbers of layers, 0 to {layers - 1}")
    width = size(v, "block_ff_dim" if "block_ff_dim" in v else "intermediate_size", 2**24)
    if flag(v, "block_auto_adjust_ff_dim"):
        unit, factor = size(v, "block_multiple_of"), v.get("block_ffn_dim_multiplier")
        width = int(2 * width / 3)
        width = unit * -(-(width if factor is None else int(number(v, "block_ffn_dim_multiplier") * width)) // unit)
    return decoder_config(
        v | {"intermediate_size": width, "tie_word_embeddings": v.get("tie_embedding", v["tie_word_embeddings"])},
        max_length,
        eps="norm_eps",
        qk_norm="head",
        mixers=mixers_of(v, "conv", [FULL if i in attends else MIXER_TYPES["conv"] for i in range(layers)]),
        conv_size=size(v, "conv_L_cache", 2**10),
        conv_bias=flag(v, "conv_bias"),
    )


def _phi3(v, max_length):
    aliases = {"su": "longrope", "yarn": "longrope"}  # what it was called before it was published
    rope = {"partial_key": "partial_rotary_factor", "aliases": aliases}
    config = decoder_config(v, max_length, rope=rope, windows=same_window(v), **residual_dropout(v, "resid_pdrop"))
    kind = config.ropes[0].kind
    require(kind in ("default", "longrope"), f"rope type {kind!r} is not implemented for phi3")
    return config


def _olmo(v, max_length):
    v = v | {"eps": 1e-5}  # written into its class
    clip = optional_number(v, "clip_qkv")
    return decoder_config(v, max_length, eps="eps", norm="layer", norm_weight=False, clip_qkv=clip, rope_in_fp32=True)


def _olmo2(v, max_length, **switches):
    return decoder_config(v, max_length, block="post", norm_in_fp32=True, qk_norm="full", rope_in_fp32=True, **switches)


def _olmo3(v, max_length):
    types = layer_types_of(v, lambda i: (i + 1) % 4 != 0)
    ropes = read_rope_by_kind(v, head_dim_of(v), max_length, {FULL: "rope_theta", SLIDING: "rope_theta"})
    return _olmo2(v, max_length, windows=windows_of(v, types), ropes=tuple(ropes[t] for t in types))


def _granite(v, max_length):
    return decoder_config(
        v,
        max_length,
        block="scaled",
        embedding_multiplier=number(v, "embedding_multiplier"),
        residual_multiplier=number(v, "residual_multiplier"),
        attention_scale=number(v, "attention_multiplier"),
        logit_scale=1 / number(v, "logits_scaling"),
    )


def _starcoder2(v, max_length):
    return decoder_config(
        v,
        max_length,
        eps="norm_epsilon",
        mlp="plain",
        windows=same_window(v),
        embedding_dropout=probability(v, "embedding_dropout"),
        **LAYER_NORM,
        **dict.fromkeys(BIASES, flag(v, "use_bias")),
        **residual_dropout(v, "residual_dropout"),
    )


def _gpt_neox(v, max_length):
    check_head_dim(v)
    return decoder_config(
        v,
        max_length,
        eps="layer_norm_eps",
        rope={"theta_key": "rotary_emb_base", "partial_key": "rotary_pct"},
        block="parallel" if flag(v, "use_parallel_residual") else "pre",
        mlp_has_norm=True,
        sum_branches_first=True,
        mlp="plain",
        mlp_bias=True,
        embedding_dropout=probability(v, "hidden_dropout"),
        **LAYER_NORM,
        **residual_dropout(v, "hidden_dropout"),
    )


# transformers knows these keys by both names.
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def _gpt2(v, max_length):
    v = v | {general: v[own] for general, own in GPT2_NAMES.items()}
    v = v | {"intermediate_size": v.get("n_inner", 4 * size(v, "n_embd"))}
    return decoder_config(
        v,
        max_length,
        eps="layer_norm_epsilon",
        act="activation_function",
        learned_positions=True,
        ropes=(None,) * num_layers_of(v),
        mlp="plain",
        attention_scale=head_dim_of(v) ** -0.5 if flag(v, "scale_attn_weights") else 1.0,
        attention_scale_by_layer=flag(v, "scale_attn_by_inverse_layer_idx"),
        embedding_dropout=probability(v, "embd_pdrop"),
        attention_dropout=probability(v, "attn_pdrop"),
        depth_scaled_init=True,
        **LAYER_NORM,
        **BIASES,
        **residual_dropout(v, "resid_pdrop"),
    )


def _stablelm(v, max_length):
    check_head_dim(v)
    return decoder_config(
        v,
        max_length,
        eps="layer_norm_eps",
        rope={"partial_key": "partial_rotary_factor"},
        block="parallel" if flag(v, "use_parallel_residual") else "pre",
        qkv_bias=flag(v, "use_qkv_bias"),
        o_bias=False,
        qk_norm="layer_apart" if flag(v, "qk_layernorm") else "none",
        mlp_output_dropout=probability(v, "hidden_dropout"),
        **LAYER_NORM,
    )


def _cohere(v, max_length, **switches):
    return decoder_config(
        v,
        max_length,
        eps="layer_norm_eps",
        norm="layer",
        block="parallel",
        rope_interleaved=True,
        rope_in_fp32=True,
        qk_norm="layer_by_head" if flag(v, "use_qk_norm") else "none",
        logit_scale=number(v, "logit_scale"),
        **switches,
    )


def _cohere2(v, max_length):
    """Layers that slide have a rotary embedding, those that see everything have none."""
    check_head_dim(v)
    positions = v["position_embedding_type"]
    require(
        positions in ("rope_gptj", "rope"), f"position_embedding_type = {positions!r} is not implemented for cohere2"
    )
    pattern = size(v, "sliding_window_pattern")
    types = layer_types_of(v, lambda i: (i + 1) % pattern != 0)
    rope = read_rope(v, head_dim_of(v), max_length)
    ropes = tuple(rope if t == SLIDING else None for t in types)
    return _cohere(v, max_length, ropes=ropes, windows=windows_of(v, types))


def _phi(v, max_length):
    require(not flag(v, "tie_word_embeddings"), "phi with tie_word_embeddings = true is not implemented")
    return decoder_config(
        v,
        max_length,
        eps="layer_norm_eps",
        rope={"partial_key": "partial_rotary_factor"},
        block="parallel",
        sum_branches_first=True,
        mlp="plain",
        qk_norm="layer" if flag(v, "qk_layernorm") else "none",
        head_bias=True,
        embedding_dropout=probability(v, "embd_pdrop"),
        **LAYER_NORM,
        **BIASES,
        **residual_dropout(v, "resid_pdrop"),
    )


def _seed_oss(v, max_length):
    o_bias = flag(v, "attention_out_bias")
    return decoder_config(v, max_length, o_bias=o_bias, **residual_dropout(v, "residual_dropout"))


def _ernie4_5(v, max_length):
    biases = dict.fromkeys(BIASES, flag(v, "use_bias"))
    # Its class has no dropout, whatever the key says.
    return decoder_config(v, max_length, rope_interleaved=True, rope_in_fp32=True, attention_dropout=0.0, **biases)


def _glm(v, max_length, **switches):
    rope = {"partial_key": "partial_rotary_factor"}
    return decoder_config(v, max_length, rope=rope, rope_interleaved=True, o_bias=False, mlp_bias=False, **switches)


def _glm4(v, max_length):
    return _glm(v, max_length, block="sandwich")


def _hunyuan_v1_dense(v, max_length):
    require(flag(v, "use_qk_norm"), "use_qk_norm = false is not implemented for hunyuan_v1_dense")  # nor in its class
    return decoder_config(v, max_length, rope={"more_keys": ("alpha",)}, qk_norm="head", qk_norm_after_rope=True)


def _exaone4(v, max_length):
    """Where some layers slide, those that do not have no rotary embedding."""
    has_windows = v.get("sliding_window") is not None and size(v, "sliding_window") > 0
    types = layer_types_of(v, lambda i: has_windows and (i + 1) % size(v, "sliding_window_pattern") != 0)
    rope = read_rope(v, head_dim_of(v), max_length)
    ropes = tuple(rope if t == SLIDING or not has_windows else None for t in types)
    biases = dict.fromkeys(BIASES, False)
    return decoder_config(
        v, max_length, block="post", qk_norm="head", ropes=ropes, windows=windows_of(v, types), **biases
    )


def _nemotron(v, max_length):
    rope = {"partial_key": "partial_rotary_factor"}
    return decoder_config(v, max_length, eps="norm_eps", rope=rope, mlp="plain", norm_offset=1.0, **LAYER_NORM)


@dataclass(frozen=True)
class Family:
    architecture: str  # its class in transformers
    defaults: dict
    read: Callable[[dict, int | None], ModelConfig]  # (config.json with the defaults, max_length)
    null_values: frozenset[str] = frozenset()  # keys whose null does not mean "default", beside NULL_IS_A_VALUE


FAMILIES = {
    "llama": Family("LlamaForCausalLM", class_defaults.LLAMA, _llama),
    "mistral": Family("MistralForCausalLM", class_defaults.MISTRAL, _mistral),
    "ministral3": Family("Ministral3ForCausalLM", class_defaults.MINISTRAL3, _ministral3),
    "qwen2": Family("Qwen2ForCausalLM", class_defaults.QWEN2, _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", class_defaults.QWEN3, _qwen3),
    "smollm3": Family("SmolLM3ForCausalLM", class_defaults.SMOLLM3, _smollm3),
    "gemma": Family("GemmaForCausalLM", class_defaults.GEMMA, _gemma),
    "gemma2": Family("Gemma2ForCausalLM", class_defaults.GEMMA2, _gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", class_defaults.GEMMA3, _gemma3),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", class_defaults.QWEN3_5, _qwen3_5),
    "olmo_hybrid": Family("OlmoHybridForCausalLM", class_defaults.OLMO_HYBRID, _olmo_hybrid, frozenset({"rope_theta"})),
    "lfm2": Family("Lfm2ForCausalLM", class_defaults.LFM2, _lfm2),
    "phi3": Family("Phi3ForCausalLM", class_defaults.PHI3, _phi3),
    "olmo": Family("OlmoForCausalLM", class_defaults.OLMO, _olmo),
    "olmo2": Family("Olmo2ForCausalLM", class_defaults.OLMO2, _olmo2),
    "olmo3": Family("Olmo3ForCausalLM", class_defaults.OLMO3, _olmo3),
    "granite": Family("GraniteForCausalLM", class_defaults.GRANITE, _granite),
    "starcoder2": Family("Starcoder2ForCausalLM", class_defaults.STARCODER2, _starcoder2),
    "gpt_neox": Family("GPTNeoXForCausalLM", class_defaults.GPT_NEOX, _gpt_neox),
    "gpt2": Family("GPT2LMHeadModel", class_defaults.GPT2, _gpt2),
    "stablelm": Family("StableLmForCausalLM", class_defaults.STABLELM, _stablelm),
    "cohere": Family("CohereForCausalLM", class_defaults.COHERE, _cohere),
    "cohere2": Family("Cohere2ForCausalLM", class_defaults.COHERE2, _cohere2),
    "phi": Family("PhiForCausalLM", class_defaults.PHI, _phi),
    "seed_oss": Family("SeedOssForCausalLM", class_defaults.SEED_OSS, _seed_oss),
    "ernie4_5": Family("Ernie4_5ForCausalLM", class_defaults.ERNIE4_5, _ernie4_5),
    "hunyuan_v1_dense": Family("HunYuanDenseV1ForCausalLM", class_defaults.HUNYUAN_V1_DENSE, _hunyuan_v1_dense),
    "nemotron": Family("NemotronForCausalLM", class_defaults.NEMOTRON, _nemotron),
    "exaone4": Family("Exaone4ForCausalLM", class_defaults.EXAONE4, _exaone4),
    "glm": Family("GlmForCausalLM", class_defaults.GLM, _glm),
    "glm4": Family("Glm4ForCausalLM", class_defaults.GLM, _glm4),
}
