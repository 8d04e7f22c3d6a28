"""Records what transformers computes: logits and gradients of one tiny random model per variant of every family.

    python tests/golden/record.py [VARIANT ...]

writes tests/golden/VARIANT.safetensors, the golden values, and tests/golden/configs.json, the config.json of every
variant in three dialects and the versions that it was recorded with. It needs transformers (any 5.x); tests/
test_golden.py needs these files only. To add a family, add its variants below and record them.

The golden file of a variant holds `logits` [T, V] and, under the name that a tensor has in a checkpoint, its gradient of
`masked_loss`. fp32, eager attention, CPU, one thread. The weights are not stored: recipe.weight makes them from names.

The dialects of config.json:

    minimal   as written below: keys that have the class default are left out, and ropes are spelled as in version 4
    v4        everything spelled out as transformers 4 does: rope_theta and rope_scaling at the top, torch_dtype
    v5        what transformers 5 saves: one rope_parameters table, by layer type where a family has two; layer_types

All three must give the same logits and the same gradients in transformers itself, bit for bit.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from recipe import VOCAB_SIZE, input_ids, masked_loss, weight
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
WINDOW = 8

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # transformers gives the embedding of this token no gradient; we do not copy that
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_inner": 20,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# theta and original length are such that some of the four frequencies are kept, some blended, some stretched.
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.25, "original_max_position_embeddings": 16}
LONGROPE = {"type": "longrope", "short_factor": [1.1, 1.4, 1.9], "long_factor": [1.5, 3.0, 7.0]}

DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12}
# transformers 5.23 cuts OLMo hybrid's convolution into equal thirds when it saves; its own files have q, k and v apart.
EQUAL = {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_num_value_heads": 4, "linear_value_head_dim": 8}

VARIANTS = {
    "llama": GROUPED | {"model_type": "llama"},
    "llama_biases": GROUPED
    | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True},
    "llama_linear": GROUPED | {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama_dynamic": GROUPED
    | {
        "model_type": "llama",
        "max_position_embeddings": 32,  # the input is longer
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "llama_llama3": GROUPED
    | {
        "model_type": "llama",
        "rope_theta": 20.0,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32},
    },
    "llama_yarn": GROUPED | {"model_type": "llama", "rope_theta": 100.0, "rope_scaling": YARN},
    "mistral": SIZES | {"model_type": "mistral", "num_attention_heads": 8, "sliding_window": WINDOW},  # 8 key heads
    "mistral_full": GROUPED | {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6, "head_dim": 4},
    "ministral3": GROUPED
    | {
        "model_type": "ministral3",
        "head_dim": 8,
        "rope_theta": 100.0,
        "rope_scaling": YARN | {"llama_4_scaling_beta": 0.4, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "ministral3_plain": GROUPED  # beta and mscale_all_dim are 0: neither has an effect
    | {
        "model_type": "ministral3",
        "head_dim": 4,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
        "rope_theta": 100.0,
        "rope_scaling": YARN | {"llama_4_scaling_beta": 0.0, "mscale": 1.0, "mscale_all_dim": 0.0},
    },
    "qwen2": GROUPED | {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen2_window": GROUPED
    | {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": GROUPED | {"model_type": "qwen3", "head_dim": 16},
    "qwen3_yarn": GROUPED
    | {
        "model_type": "qwen3",
        "head_dim": 8,
        "attention_bias": True,
        "rope_theta": 100.0,
        "rope_scaling": YARN | {"truncate": False, "mscale": 1.0, "mscale_all_dim": 0.5},
    },
    "smollm3": SIZES | {"model_type": "smollm3", "num_attention_heads": 8, "num_hidden_layers": 4},  # 4 key heads
    "smollm3_window": GROUPED
    | {"model_type": "smollm3", "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": WINDOW},
    "gemma": GROUPED
    | {"model_type": "gemma", "head_dim": 16, "hidden_act": "gelu", "hidden_activation": None},  # as published
    "gemma2": SIZES
    | {
        "model_type": "gemma2",
        "num_attention_heads": 8,  # 4 key heads
        "head_dim": 8,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 12,
    },
    "gemma2_capped": GROUPED
    | {
        "model_type": "gemma2",
        "head_dim": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": False,
    },
    "gemma3_text": GROUPED
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 12,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": GROUPED | {"model_type": "phi3", "sliding_window": WINDOW},
    "phi3_longrope_short": GROUPED
    | {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "max_position_embeddings": 192,
        "original_max_position_embeddings": 48,
        "rope_scaling": LONGROPE,
    },
    "phi3_longrope_long": GROUPED
    | {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 32,  # the input is longer
        "rope_scaling": LONGROPE,
    },
    "olmo": GROUPED | {"model_type": "olmo", "clip_qkv": 1.0},
    "olmo2": GROUPED | {"model_type": "olmo2", "rope_theta": 5e5},
    "olmo3": GROUPED
    | {
        "model_type": "olmo3",
        "num_hidden_layers": 4,
        "sliding_window": WINDOW,
        "rope_scaling": YARN | {"attention_factor": 1.3},
    },
    "qwen3_5_text": GROUPED
    | {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }
    | DELTA,
    "qwen3_5_mixed": GROUPED
    | {
        "model_type": "qwen3_5_text",
        "layer_types": ["full_attention", "linear_attention"],
        "head_dim": 16,
        "attention_bias": True,
        "tie_word_embeddings": True,
    }
    | DELTA
    | {"linear_num_value_heads": 2},
    "olmo_hybrid": GROUPED
    | {"model_type": "olmo_hybrid", "num_hidden_layers": 4, "rope_theta": None}  # as the published files have it
    | DELTA
    | EQUAL,
    "olmo_hybrid_rope": GROUPED
    | {
        "model_type": "olmo_hybrid",
        "linear_allow_neg_eigval": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
    | EQUAL,
    "lfm2": GROUPED | {"model_type": "lfm2", "full_attn_idxs": [1], "block_multiple_of": 8},
    "lfm2_biases": GROUPED
    | {
        "model_type": "lfm2",
        "full_attn_idxs": [0],
        "conv_bias": True,
        "conv_L_cache": 4,
        "block_auto_adjust_ff_dim": False,
        "tie_word_embeddings": False,
    },
    "granite": GROUPED
    | {
        "model_type": "granite",
        "attention_bias": True,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.5,
    },
    "starcoder2": SIZES | {"model_type": "starcoder2", "sliding_window": WINDOW},  # 2 key heads
    "gpt_neox_parallel": SIZES | {"model_type": "gpt_neox"},
    "gpt_neox_sequential": SIZES
    | {"model_type": "gpt_neox", "use_parallel_residual": False, "rotary_pct": 0.5, "rotary_emb_base": 500.0},
    "gpt2": GPT2 | {"model_type": "gpt2"},
    "gpt2_untied": GPT2
    | {
        "model_type": "gpt2",
        "tie_word_embeddings": False,
        "scale_attn_by_inverse_layer_idx": True,
        "activation_function": "gelu",
    },
    "stablelm": GROUPED | {"model_type": "stablelm", "partial_rotary_factor": 0.5},
    "stablelm_parallel": GROUPED | {"model_type": "stablelm", "use_parallel_residual": True, "use_qkv_bias": True},
    "stablelm_qk_norm": GROUPED | {"model_type": "stablelm", "qk_layernorm": True},
    "cohere": GROUPED | {"model_type": "cohere"},
    "cohere_qk_norm": GROUPED | {"model_type": "cohere", "use_qk_norm": True, "tie_word_embeddings": False},
    "cohere2": GROUPED
    | {"model_type": "cohere2", "sliding_window": WINDOW, "sliding_window_pattern": 2, "logit_scale": 0.3},
    "phi": SIZES | {"model_type": "phi"},
    "phi_qk_norm": GROUPED | {"model_type": "phi", "qk_layernorm": True},
    "ernie4_5": SIZES | {"model_type": "ernie4_5", "head_dim": 8},  # 2 key heads
    "ernie4_5_biases": GROUPED
    | {"model_type": "ernie4_5", "head_dim": 8, "use_bias": True, "tie_word_embeddings": False, "rope_theta": 1e4},
    "glm": SIZES | {"model_type": "glm", "head_dim": 8},  # 2 key heads
    "glm4": SIZES | {"model_type": "glm4", "head_dim": 8, "partial_rotary_factor": 0.75, "attention_bias": False},
    "hunyuan_v1_dense": GROUPED
    | {"model_type": "hunyuan_v1_dense", "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    "hunyuan_v1_dense_alpha": GROUPED
    | {
        "model_type": "hunyuan_v1_dense",
        "head_dim": 8,
        "rope_scaling": {"type": "dynamic", "alpha": 20.0, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0},
    },
    "exaone4": GROUPED | {"model_type": "exaone4", "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "exaone4_full": GROUPED
    | {
        "model_type": "exaone4",
        "sliding_window": None,
        "sliding_window_pattern": None,
        "layer_types": ["full_attention"] * 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_theta": 20.0,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32},
    },
    "nemotron": GROUPED | {"model_type": "nemotron", "head_dim": 16},
    "nemotron_biases": GROUPED
    | {
        "model_type": "nemotron",
        "attention_bias": True,
        "mlp_bias": True,
        "partial_rotary_factor": 0.75,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
    },
    "seed_oss": GROUPED | {"model_type": "seed_oss", "head_dim": 16},
    "seed_oss_biases": GROUPED
    | {
        "model_type": "seed_oss",
        "head_dim": None,  # 8, not the class default
        "attention_bias": False,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
}


def read_config(transformers, hf: dict):
    """The configuration object of a model whose config.json is `hf`; the class changes the dict that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf))
        return transformers.AutoConfig.from_pretrained(folder)


def to_v5(transformers, minimal: dict) -> dict:
    """The config.json that transformers 5 writes for these settings."""
    with tempfile.TemporaryDirectory() as folder:
        config = read_config(transformers, minimal)
        config.save_pretrained(folder)
        v5 = json.loads((Path(folder) / "config.json").read_text())
    architecture = transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__
    return v5 | {"architectures": [architecture], "dtype": "float32"}


def to_v4(v5: dict, minimal: dict) -> dict:
    """The same settings in the spelling of transformers 4."""
    v4 = {key: value for key, value in v5.items() if key not in ("rope_parameters", "dtype", "_sliding_window_pattern")}
    v4 |= {"torch_dtype": "float32", "transformers_version": "4.57.1"}
    if "sliding_window_pattern" in minimal:
        v4["sliding_window_pattern"] = minimal["sliding_window_pattern"]
    if v5["model_type"] == "qwen2":  # version 5 clears the window where it is unused
        v4["sliding_window"] = minimal.get("sliding_window", 4096)
    if "layer_types" not in minimal:
        v4.pop("layer_types", None)  # written since 4.53 only
    tables = v5.get("rope_parameters")
    if tables is None:
        return v4
    table = dict(tables.get("full_attention", tables))
    v4["rope_theta"] = table.pop("rope_theta", None)
    if v5["model_type"] == "gemma3_text":
        v4["rope_local_base_freq"] = tables["sliding_attention"]["rope_theta"]
    partial = table.pop("partial_rotary_factor", None)
    if v5["model_type"] == "gpt_neox":
        v4 |= {"rotary_pct": partial, "rotary_emb_base": v4.pop("rope_theta")}
    elif partial is not None:
        v4["partial_rotary_factor"] = partial
    v4["rope_scaling"] = table if table["rope_type"] != "default" else None
    return v4


def tensor_shapes(transformers, hf: dict) -> dict[str, list[int]]:
    """Name and shape of every tensor in the file that transformers writes for this model."""
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(read_config(transformers, hf)).save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def golden_values(transformers, hf: dict, weights: dict) -> dict[str, torch.Tensor]:
    """Loads a folder with this config.json, runs it, and saves the gradients as if they were the weights: so they get
    the names and layouts of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "config.json").write_text(json.dumps(hf))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True, dtype=torch.float32
        )
        assert not any(info.values()), info
        logits = model.eval()(input_ids()[None]).logits[0]
        masked_loss(logits).backward()
        for parameter in model.parameters():
            parameter.data = parameter.grad
        model.save_pretrained(folder / "gradients")
        gradients = load_file(folder / "gradients" / "model.safetensors")
    assert gradients.keys() == weights.keys()
    return {"logits": logits.detach()} | gradients


def record(transformers, variant: str) -> dict[str, dict]:
    """Writes the golden file of a variant; returns its config.json in every dialect."""
    minimal = VARIANTS[variant]
    v5 = to_v5(transformers, minimal)
    dialects = {"minimal": minimal, "v4": to_v4(v5, minimal), "v5": v5}
    shapes = tensor_shapes(transformers, minimal)
    weights = {name: weight(variant, name, shape) for name, shape in shapes.items()}
    golden = golden_values(transformers, minimal, weights)
    for dialect in ("v4", "v5"):
        for name, tensor in golden_values(transformers, dialects[dialect], weights).items():
            assert torch.equal(tensor, golden[name]), f"{variant}: {name} differs in the dialect {dialect}"
    for name, tensor in golden.items():
        assert tensor.isfinite().all() and tensor.norm() > 0, f"{variant}: {name} is degenerate"
    save_file(golden, HERE / f"{variant}.safetensors")
    print(f"{variant:20} |logits| {golden['logits'].abs().max():6.2f}", len(shapes), "tensors")
    return dialects


def main(names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import warns of its own deprecations
        import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)

    file = HERE / "configs.json"
    configs = json.loads(file.read_text())["configs"] if names else {}
    configs |= {variant: record(transformers, variant) for variant in names or VARIANTS}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    index = {"recorded_with": versions, "configs": {variant: configs[variant] for variant in VARIANTS}}
    file.write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
