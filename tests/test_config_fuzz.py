"""A config.json with anything in it either gives the model that it describes or a UserError: never another exception,
and never quietly another model."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from minisft.errors import MODEL, UserError
from minisft.model.families import FAMILIES, NULL_IS_A_VALUE, from_hf
from minisft.model.load import build_model

CONFIGS = json.loads((Path(__file__).parent / "golden" / "configs.json").read_text())["configs"]
each_variant = pytest.mark.parametrize("variant", CONFIGS)

# No key of a config.json means any of these, whatever it is called.
NEVER = [float("nan"), float("inf"), -float("inf"), -3, -0.5, 1e300, "", "text", "\udc80", [[]], {"a": {}}]
JUNK = [*NEVER, 10**400, None, 0, 1, 7, 0.5, 3.0, True, False, [], [0], ["full_attention"], {}, {"rope_type": "yarn"}]


def outcome(hf, max_length=None):
    """The ModelConfig, or None where it is refused in the way that a user can read."""
    try:
        return from_hf(hf, max_length=max_length)
    except UserError as error:
        assert error.exit_code == MODEL and len(str(error)) < 2000


def places(table, path=()):
    """The path of every key, of those in nested tables too."""
    for key, value in table.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def changed(hf, path, value):
    """A copy with another value there."""
    key, *rest = path
    return hf | {key: changed(hf[key], rest, value) if rest else value}


def without(hf, path):
    """A copy without that key."""
    key, *rest = path
    return hf | {key: without(hf[key], rest)} if rest else {k: v for k, v in hf.items() if k != key}


def each_place(variant):
    for dialect in ("v4", "v5"):
        hf = CONFIGS[variant][dialect]
        yield from ((hf, path) for path in places(hf))


@each_variant
def test_a_value_of_the_wrong_kind_is_refused_or_means_nothing(variant):
    for number, (hf, path) in enumerate(each_place(variant)):
        config = outcome(hf)
        for value in NEVER[number % 4 :: 4]:  # of each key one quarter here, the others in other variants
            assert outcome(changed(hf, path, value)) in (None, config), (path, value)


@each_variant
def test_any_value_anywhere_gives_a_model_or_an_error(variant):
    for number, (hf, path) in enumerate(each_place(variant)):
        for value in JUNK[number % 4 :: 4]:
            outcome(changed(hf, path, value), max_length=40)


@each_variant
def test_missing_keys(variant):
    """A null is a key that is left out, but for those where null says something else than the default."""
    for hf, path in each_place(variant):
        missing = outcome(without(hf, path))
        if path[-1] not in NULL_IS_A_VALUE | FAMILIES[hf["model_type"]].null_values:
            assert outcome(changed(hf, path, None)) == missing, path
    assert outcome(without(hf, ("model_type",))) is None


HARMLESS = {
    "use_cache": False,
    "output_attentions": True,
    "auto_map": {"AutoModel": "modeling_x.X"},
    "_name_or_path": "/somewhere",
    "pretraining_tp": 2,
    "transformers_version": None,
    "eos_token_id": [2, 3],
    "task_specific_params": {"text-generation": {"do_sample": True}},
    "a key of tomorrow": 1,
}


@each_variant
def test_keys_without_maths_change_nothing(variant):
    for hf in CONFIGS[variant].values():
        assert outcome(hf | HARMLESS) == outcome(hf)


@each_variant
def test_the_dict_is_left_as_it_was(variant):
    for hf in CONFIGS[variant].values():
        before = copy.deepcopy(hf)
        assert outcome(hf).hf == hf == before


# Each would make transformers, or the code that published the model, compute something else.
OTHER_MATHS = [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ({"num_local_experts": 8, "num_experts_per_tok": 2}, "num_local_experts"),
    ({"num_experts": 4}, "num_experts"),
    ({"n_routed_experts": 64}, "n_routed_experts"),
    ({"kv_lora_rank": 512}, "kv_lora_rank"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ({"add_cross_attention": True}, "add_cross_attention"),
    ({"alibi": True}, "alibi"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"attention_chunk_size": 8192}, "attention_chunk_size"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": "full_attention"}, "layer_types"),
    ({"hidden_act": "relu6", "activation_function": "relu6", "hidden_activation": "relu6"}, "relu6"),
]


@pytest.mark.parametrize("change, named", OTHER_MATHS, ids=[str(change)[:50] for change, _ in OTHER_MATHS])
def test_keys_with_other_maths_are_refused_by_name(change, named):
    for variant, dialects in CONFIGS.items():
        for hf in dialects.values():
            with pytest.raises(UserError, match=named) as caught:
                from_hf(hf | change)
            assert caught.value.exit_code == MODEL, variant


# What one family computes and another does not: refused there, never left out.
FOREIGN = [
    ({"sliding_window": 8}, ("llama", "gemma", "olmo", "olmo2", "granite", "gpt2", "stablelm", "cohere", "phi")),
    ({"attn_logit_softcapping": 50.0}, ("llama", "qwen3", "gemma", "gemma3_text", "gpt2", "cohere")),
    ({"final_logit_softcapping": 30.0}, ("llama", "mistral", "gemma", "olmo3", "gpt2")),
    ({"layer_types": ["linear_attention", "full_attention"]}, ("llama", "qwen3", "cohere2", "exaone4", "lfm2")),
    ({"qk_layernorm": True}, ("llama", "qwen3", "cohere", "cohere2", "gpt2")),
    ({"use_qk_norm": True}, ("llama", "qwen3", "stablelm", "cohere2", "phi", "gpt2")),
    ({"use_cla": True}, ("llama", "hunyuan_v1_dense")),
    ({"clip_qkv": 8.0}, ("llama", "olmo2", "phi3", "gpt_neox_parallel")),
    ({"embedding_multiplier": 12.0}, ("llama", "olmo", "gemma")),
    ({"residual_multiplier": 0.2}, ("llama", "cohere")),
    ({"logits_scaling": 8.0}, ("llama", "cohere")),
    ({"logit_scale": 0.1}, ("llama", "granite")),
    ({"attention_multiplier": 0.1}, ("llama", "gemma2")),
    ({"query_pre_attn_scalar": 100}, ("llama", "gemma")),
    ({"partial_rotary_factor": 0.5}, ("llama", "mistral", "olmo2", "starcoder2")),
    ({"no_rope_layers": [1, 0]}, ("llama", "qwen2")),
    ({"use_parallel_residual": True}, ("llama", "phi3")),
]


@pytest.mark.parametrize("change, variants", FOREIGN, ids=[str(change) for change, _ in FOREIGN])
def test_what_another_family_computes_is_refused(change, variants):
    for variant in variants:
        for hf in CONFIGS[variant].values():
            with pytest.raises(UserError, match=next(iter(change))):
                from_hf(hf | change)


ROPES = [
    "linear",
    ["linear"],
    {"rope_type": "ntk"},
    {"rope_type": ["linear"]},
    {"rope_type": "default", "mrope_section": [1, 1, 2]},
    {"rope_type": "linear"},
    {"rope_type": "linear", "factor": "2"},
    {"rope_type": "linear", "factor": 0},
    {"rope_type": "dynamic", "factor": -2.0},
    {"rope_type": "llama3", "factor": 8.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 32},
    {"rope_type": "yarn", "factor": 4.0, "truncate": "no"},
    {"rope_type": "yarn", "factor": 4.0, "mscale": "1", "mscale_all_dim": 1.0},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4},
    {"rope_type": "longrope", "short_factor": [1.0] * 4},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 0]},
    {"full_attention": {"rope_type": "default"}, "chunked_attention": {"rope_type": "default"}},
]


@pytest.mark.parametrize("table", ROPES, ids=str)
def test_broken_rope_tables(table):
    for variant in ("llama", "mistral", "gemma3_text", "olmo3"):
        for dialect, key in (("v4", "rope_scaling"), ("v5", "rope_parameters")):
            with pytest.raises(UserError):
                from_hf(CONFIGS[variant][dialect] | {key: table})


def test_many_changes_at_once():
    """500 configs with one to four values swapped for others, of the same config or not: what is read can be built."""
    rng = np.random.default_rng(0)
    variants = [hf for dialects in CONFIGS.values() for hf in dialects.values()]
    accepted = 0
    for _ in range(500):
        hf = variants[rng.integers(len(variants))]
        other = variants[rng.integers(len(variants))]
        for _ in range(rng.integers(1, 5)):
            paths = list(places(hf))
            path = paths[rng.integers(len(paths))]
            key = list(other)[rng.integers(len(other))]
            kind = rng.integers(4)
            if kind == 0:
                hf = without(hf, path) if path != ("model_type",) else hf
            elif kind == 1:
                hf = changed(hf, path, JUNK[rng.integers(len(JUNK))])
            elif kind == 2:
                hf = changed(hf, (key,), other[key])
            else:
                hf = changed(hf, path, other[key])
        config = outcome(hf, max_length=[None, 40, 10**6][rng.integers(3)])
        if config is not None and config.num_layers <= 4:
            accepted += 1
            build_model(config)  # on meta: takes no memory
    assert 50 < accepted < 450  # both outcomes are tried
