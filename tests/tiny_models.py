"""config.json of a tiny model of every family, with its switches set: windows shorter than the texts of the tests,
layers of several kinds. Shared by the tests of the model."""

import torch
from torch import Tensor

from minisft.data.batch import document_bounds
from minisft.model.class_defaults import MINISTRAL3_ROPE
from minisft.model.decoder import Decoder
from minisft.model.families import FAMILIES, from_hf
from minisft.model.load import build_model, init_weights

SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large, so that attention is far from uniform and every term shows
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 53, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}

DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16}

CONFIGS = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 9},
    "ministral3": GROUPED | {"head_dim": 8, "rope_scaling": MINISTRAL3_ROPE | {"original_max_position_embeddings": 16}},
    "qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": GROUPED | {"head_dim": 16},
    "smollm3": GROUPED | {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 9},
    "gemma": GROUPED | {"head_dim": 16},
    "gemma2": GROUPED | {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 3.0},
    "gemma3_text": GROUPED | {"head_dim": 16, "sliding_window": 9, "sliding_window_pattern": 2},
    "qwen3_5_text": GROUPED | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]} | DELTA,
    "olmo_hybrid": GROUPED | {"rope_theta": None} | DELTA,
    "lfm2": GROUPED | {"full_attn_idxs": [1], "block_multiple_of": 8},
    "phi3": GROUPED | {"sliding_window": 9},
    "olmo": GROUPED | {"clip_qkv": 0.5},
    "olmo2": GROUPED,
    "olmo3": GROUPED | {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": GROUPED | {"embedding_multiplier": 12.0, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    "starcoder2": GROUPED | {"sliding_window": 9},
    "gpt_neox": SIZES,
    "gpt2": GPT2,
    "stablelm": GROUPED | {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "qk_layernorm": True},
    "cohere": GROUPED | {"use_qk_norm": True},
    "cohere2": GROUPED | {"sliding_window": 9, "sliding_window_pattern": 2},
    "phi": GROUPED | {"qk_layernorm": True},
    "seed_oss": GROUPED | {"head_dim": 16},
    "glm": GROUPED | {"head_dim": 16},
    "glm4": GROUPED | {"head_dim": 16},
    "hunyuan_v1_dense": GROUPED | {"head_dim": 16},
    "exaone4": GROUPED | {"sliding_window": 9, "sliding_window_pattern": 2},
    "nemotron": GROUPED,
    "ernie4_5": GROUPED | {"head_dim": 16, "use_bias": True},
}
CONFIGS = {family: {"model_type": family} | values for family, values in CONFIGS.items()}
assert CONFIGS.keys() == FAMILIES.keys()


def tiny(config: dict | str, seed: int = 0) -> Decoder:
    """A model with random weights, biases and norms too, which would otherwise start at 0 and 1 and hide mistakes."""
    model = build_model(from_hf(CONFIGS[config] if isinstance(config, str) else config), "cpu")
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def stream(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """position_ids, start, end of documents side by side."""
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    start, end = document_bounds(cu_seqlens, sum(lengths))
    return torch.arange(sum(lengths), dtype=torch.int32) - start, start, end
