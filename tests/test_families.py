"""config.json of every family: both dialects, class defaults, what is refused, and the names of its tensors.

That each family computes what transformers computes is tested in test_golden.py.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, tiny

from minisft.errors import MODEL, UserError
from minisft.model.families import FAMILIES, NULL_IS_A_VALUE, from_hf, to_hf
from minisft.model.model_config import Rope, with_vocab_size
from minisft.model.tensor_names import Stored, stored_tensors

LLAMA = CONFIGS["llama"]
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ORIGINAL = "original_max_position_embeddings"
each_family = pytest.mark.parametrize("family", FAMILIES)


def rope(hf: dict, **options) -> Rope:
    """The rotary embedding of the first layer."""
    return from_hf(hf, **options).ropes[0]


# ---------------------------------------------------------------- what a key that is left out means


@each_family
def test_class_defaults(family):
    """class_defaults.json is AutoConfig.for_model(family).to_dict() of transformers 5.23, what shapes models."""
    recorded = json.loads((Path(__file__).parent / "class_defaults.json").read_text())
    assert from_hf({"model_type": family}) == from_hf(recorded[family])


@each_family
def test_null_is_left_out(family):
    nulls = dict.fromkeys(FAMILIES[family].defaults.keys() - NULL_IS_A_VALUE - FAMILIES[family].null_values)
    nulls |= dict.fromkeys(("rope_scaling", "rope_parameters", "layer_types", "quantization_config"))
    assert from_hf({"model_type": family} | nulls) == from_hf({"model_type": family})


def test_null_that_says_something():
    assert from_hf(CONFIGS["mistral"] | {"sliding_window": None}).windows == (None, None)
    assert from_hf(CONFIGS["mistral"] | {"num_key_value_heads": None}).num_kv_heads == 4
    assert from_hf(CONFIGS["seed_oss"] | {"head_dim": None}).head_dim == 8
    capless = CONFIGS["gemma2"] | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    assert from_hf(capless).attention_softcap is None and from_hf(capless).logit_softcap is None
    assert from_hf(CONFIGS["gemma2"]).logit_softcap == 30.0


@each_family
def test_what_is_written_is_read_as_the_same_model(family):
    config = from_hf(CONFIGS[family])
    written = to_hf(config, "float32")
    assert from_hf(json.loads(json.dumps(written))) == config
    assert written | CONFIGS[family] == written  # keys that were there are still there
    assert written["architectures"] == [FAMILIES[family].architecture] and written["dtype"] == "float32"
    larger = to_hf(with_vocab_size(config, 60), "bfloat16")
    assert {key: larger[key] for key in written if larger[key] != written[key]} == {
        "vocab_size": 60,
        "dtype": "bfloat16",
    }


def test_gpt2_general_names():
    general = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
    own = ("n_embd", "n_layer", "n_head", "n_positions")
    values = {key: value for key, value in CONFIGS["gpt2"].items() if key not in own}
    assert from_hf(values | general) == from_hf(CONFIGS["gpt2"])


# ---------------------------------------------------------------- layers of several kinds


@pytest.mark.parametrize(
    "family, change, windows",
    [
        ("mistral", {}, (9, 9)),
        ("phi3", {"sliding_window": None}, (None, None)),
        ("qwen2", {}, (None, 9)),
        ("qwen2", {"max_window_layers": 0}, (9, 9)),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, (9, None)),
        ("qwen2", {"use_sliding_window": False}, (None, None)),
        ("qwen3", {"sliding_window": 32768}, (None, None)),  # published files say so and mean no window
        ("smollm3", {}, (None, 9)),
        ("gemma2", {"num_hidden_layers": 3}, (9, None, 9)),
        ("gemma3_text", {"num_hidden_layers": 7, "sliding_window_pattern": None}, (9, 9, 9, 9, 9, None, 9)),
        ("olmo3", {"num_hidden_layers": 5, "layer_types": None}, (9, 9, 9, None, 9)),
        ("exaone4", {"num_hidden_layers": 5, "sliding_window_pattern": None}, (9, 9, 9, None, 9)),
        ("exaone4", {"sliding_window": None}, (None, None)),
        ("cohere2", {"num_hidden_layers": 5, "sliding_window_pattern": None}, (9, 9, 9, None, 9)),
    ],
)
def test_windows(family, change, windows):
    assert from_hf(CONFIGS[family] | change).windows == windows


def test_ropes_by_layer():
    assert from_hf(CONFIGS["smollm3"]).ropes == (Rope(8, 2e6), None)  # the list is called no_rope_layers, and 1 = rope
    every_fourth = from_hf(CONFIGS["smollm3"] | {"num_hidden_layers": 5, "no_rope_layers": None})
    assert [r is None for r in every_fourth.ropes] == [False, False, False, True, False]
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert from_hf(CONFIGS["gemma3_text"] | scaled).ropes == (Rope(16, 1e4), Rope(16, 1e6, "linear", 8.0))
    assert from_hf(CONFIGS["olmo3"] | scaled).ropes == (Rope(8, 5e5), Rope(8, 5e5, "linear", 8.0))
    assert from_hf(CONFIGS["gpt2"]).ropes == (None, None)
    assert from_hf(CONFIGS["cohere2"]).ropes == from_hf(CONFIGS["exaone4"]).ropes == (Rope(8, 1e4), None)
    assert from_hf(CONFIGS["exaone4"] | {"sliding_window": None}).ropes == (Rope(8, 1e4),) * 2
    only_full = {
        "layer_types": ["full_attention"] * 2,
        "sliding_window_pattern": "LLLG",
    }  # the pattern is not read then
    assert from_hf(CONFIGS["exaone4"] | only_full).ropes == (None, None)


# ---------------------------------------------------------------- rotary embeddings


def test_rope_dialects():
    newer = LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 9.0, ORIGINAL: 16}}
    older = LLAMA | {"rope_theta": 9.0, "rope_scaling": LLAMA3 | {ORIGINAL: 16}}
    oldest = LLAMA | {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert from_hf(newer) == from_hf(older) == from_hf(older | newer)
    assert from_hf(newer | {"rope_theta": 5.0}) == from_hf(newer)  # the table wins over the top level
    assert rope(oldest) == Rope(8, 9.0, "linear", 2.0)
    assert rope(LLAMA | {"rope_scaling": LLAMA3}).original_max_position_embeddings == 256  # the model's own
    assert rope(newer | {ORIGINAL: 32}).original_max_position_embeddings == 32  # outside wins over inside


@pytest.mark.parametrize("family, theta_of_sliding", [("gemma3_text", "rope_local_base_freq"), ("olmo3", "rope_theta")])
def test_nested_rope_dialects(family, theta_of_sliding):
    tables = {"full_attention": YARN | {"rope_theta": 7e5}, "sliding_attention": {"rope_theta": 7e5}}
    older = {"rope_theta": 7e5, theta_of_sliding: 7e5, "rope_scaling": YARN}
    assert from_hf(CONFIGS[family] | {"rope_parameters": tables}) == from_hf(CONFIGS[family] | older)
    assert from_hf(CONFIGS[family] | {"rope_parameters": dict.fromkeys(tables)}) == from_hf(CONFIGS[family])


def test_partial_rotation():
    assert rope(CONFIGS["gpt_neox"]).dim == 2 and rope(CONFIGS["phi"]).dim == 4
    assert rope(CONFIGS["gpt_neox"] | {"rotary_pct": 0.5, "rotary_emb_base": 9.0}) == Rope(4, 9.0)
    newer = {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5, "rope_type": "default"}}
    assert rope(CONFIGS["gpt_neox"] | newer) == Rope(4, 9.0)
    assert rope(CONFIGS["phi3"] | {"partial_rotary_factor": 0.5}).dim == 4


def test_yarn_attention_factor():
    def factor(**keys):
        return rope(LLAMA | {"rope_scaling": YARN | keys}).attention_factor

    assert factor() == pytest.approx(1.1386294)  # 0.1 ln 4 + 1
    assert factor(attention_factor=1.5) == 1.5
    assert factor(mscale=0.7, mscale_all_dim=0.7) == 1.0
    assert factor(mscale=0.7) == factor()  # both or neither
    assert factor(factor=None) == factor()  # 256 / 64


def test_longrope_is_decided_by_the_run():
    """max_length says which list, not the batch; transformers would switch in the middle of training."""
    hf = CONFIGS["phi3"] | {ORIGINAL: 64, "rope_scaling": LONG}
    short, long = rope(hf), rope(hf, max_length=65)
    assert short.pair_factors == (1.0, 1.5, 2.0, 2.5) and long.pair_factors == (2.0, 3.0, 4.0, 5.0)
    assert rope(hf, max_length=64) == short
    assert short.attention_factor == long.attention_factor == pytest.approx((1 + 1 / 3) ** 0.5)  # log 4 / log 64
    assert from_hf(hf).notes == ("longrope: the factors for texts of up to 64 tokens",)
    assert from_hf(hf, max_length=65).notes == ("longrope: the factors for texts of more than 64 tokens",)
    for name in ("su", "yarn"):  # older Phi-3 files
        assert rope(hf | {"rope_scaling": LONG | {"rope_type": None, "type": name}}) == short


def test_ministral3_factors_of_queries():
    table = {"type": "yarn", "rope_theta": 1e6, "factor": 16.0, ORIGINAL: 16384, "mscale": 1.0, "mscale_all_dim": 1.0}
    table |= {"max_position_embeddings": 262144, "llama_4_scaling_beta": 0.1}
    default = {"model_type": "ministral3"}
    assert rope(default) == rope(default | {"rope_parameters": table}) and rope(default).query_beta == 0.1
    assert rope(default | {"rope_scaling": table | {"llama_4_scaling_beta": 0.0}}).query_beta == 0
    zero = rope(default | {"rope_parameters": table | {"mscale_all_dim": 0.0}})  # as if there were none
    assert zero.attention_factor == pytest.approx(1 + 0.1 * math.log(16)) and rope(default).attention_factor == 1


def test_dynamic_is_decided_by_the_run():
    hf = LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert rope(hf).theta == rope(hf, max_length=256).theta == 10000.0
    assert rope(hf, max_length=512).theta == pytest.approx(10000.0 * 3 ** (8 / 6))
    assert "512 tokens" in from_hf(hf, max_length=512).notes[0]
    fixed = CONFIGS["hunyuan_v1_dense"] | {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 9.0}}
    assert rope(fixed) == rope(fixed, max_length=512) == Rope(16, 10000.0 * 9 ** (16 / 14))
    assert from_hf(LLAMA, max_length=512) == from_hf(LLAMA) and from_hf(LLAMA).notes == ()


# ---------------------------------------------------------------- what is refused, by name


@pytest.mark.parametrize(
    "family, change, named",
    [
        ("llama", {"model_type": "mamba"}, "llama, mistral"),
        ("llama", {"model_type": None}, "llama, mistral"),
        ("llama", {"model_type": ["llama"]}, "llama, mistral"),
        ("llama", {"quantization_config": {"bits": 4}}, "bf16, fp16 or fp32"),
        ("mistral", {"num_local_experts": 8}, "mixtures of experts"),
        ("llama", {"sliding_window": 4096}, "sliding_window"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"logits_scaling": 8.0}, "logits_scaling"),
        ("llama", {"use_parallel_residual": True}, "use_parallel_residual"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("qwen2", {"layer_types": ["full_attention"]}, "each of 2 layers"),
        ("qwen2", {"layer_types": "full_attention"}, "layer_types"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False}, "no sliding_window"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers"),
        ("gemma2", {"sliding_window": None}, "no sliding_window"),
        ("mistral", {"sliding_window": 0}, "sliding_window = '0'"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
        ("llama", {"hidden_act": "relu"}, "relu"),
        ("phi", {"hidden_act": "silu"}, "silu"),
        ("nemotron", {"hidden_act": "silu"}, "silu"),
        ("llama", {"hidden_act": "relu2"}, "relu2"),
        ("gemma", {"hidden_activation": "silu"}, "hidden_activation"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("qwen3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("llama", {"qk_layernorm": True}, "qk_layernorm"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm"),
        ("cohere2", {"use_qk_norm": True}, "use_qk_norm"),
        ("exaone4", {"sliding_window_pattern": "LLLG"}, "sliding_window_pattern"),
        ("exaone4", {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "no sliding_window"),
        ("hunyuan_v1_dense", {"use_qk_norm": False}, "use_qk_norm"),
        ("hunyuan_v1_dense", {"use_cla": True}, "use_cla"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0, "alpha": 9.0}}, "alpha"),
        ("cohere2", {"sliding_window": None}, "no sliding_window"),
        ("cohere2", {"head_dim": 16}, "head_dim"),
        ("cohere2", {"position_embedding_type": "alibi"}, "position_embedding_type"),
        ("stablelm", {"head_dim": 16}, "head_dim"),
        ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("llama", {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "ntk"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": True}}, "factor"),
        ("llama", {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling"),
        ("llama", {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}}, "differ in factor"),
        ("llama", {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 2}}, "beta_slow"),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ("llama", {"rope_scaling": LONG | {"short_factor": [1.0]}}, "short_factor must be a list of 4"),
        ("llama", {"rope_scaling": LONG | {"long_factor": [1.0, 2.0, 3.0, -1.0]}}, "long_factor"),
        ("llama", {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}, "full_attention"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 9.0}}, "one table for each"),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear' is not implemented for phi3"),
        ("ministral3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear' is not implemented"),
        ("ministral3", {"rope_scaling": YARN | {"llama_4_scaling_beta": -1}}, "llama_4_scaling_beta"),
        ("mistral", {"rope_scaling": YARN | {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
        ("phi", {"partial_rotary_factor": 0.4}, "head_dim"),  # int(8 * 0.4) = 3 features do not make pairs
        ("phi", {"partial_rotary_factor": 2.0}, "more than a whole head"),
        ("llama", {"hidden_size": 50}, "50"),
        ("llama", {"hidden_size": "48"}, "hidden_size"),
        ("llama", {"num_hidden_layers": -1}, "num_hidden_layers"),
        ("llama", {"num_hidden_layers": 10**6}, "out of range"),
        ("llama", {"num_key_value_heads": 3}, "3"),
        ("llama", {"head_dim": 15}, "head_dim"),
        ("llama", {"rms_norm_eps": True}, "rms_norm_eps"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("granite", {"attention_multiplier": 10**400}, "attention_multiplier"),
        ("llama", {"attention_bias": "no"}, "attention_bias"),
        ("llama", {"attention_dropout": 1.5}, "attention_dropout"),
    ],
)
def test_refused(family, change, named):
    with pytest.raises(UserError) as caught:
        from_hf(CONFIGS[family] | change)
    assert named in str(caught.value) and caught.value.exit_code == MODEL


def test_neutral_values_are_accepted():
    neutral = {"quantization_config": None, "logits_scaling": 1.0, "num_experts": 0, "sliding_window": None}
    neutral |= {"rope_interleaved": False, "layer_types": ["full_attention"] * 2, "partial_rotary_factor": 1.0}
    assert from_hf(LLAMA | neutral) == from_hf(LLAMA)


def test_ernie_has_no_dropout():
    """Its class in transformers does not read the key."""
    assert from_hf(CONFIGS["ernie4_5"] | {"attention_dropout": 0.1}).attention_dropout == 0


def test_gemma_v1_means_the_tanh_approximation():
    assert from_hf(CONFIGS["gemma"] | {"hidden_act": "gelu"}).activation == "gelu_tanh"


def test_gemma3_that_sees_is_read_as_its_text_part():
    text = CONFIGS["gemma3_text"]
    seeing = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"hidden_size": 8},
        "eos_token_id": [1, 106],
    }
    config = from_hf(seeing)
    assert config == from_hf(text) and "the text part is trained" in config.notes[0]
    written = to_hf(config, "float32")
    assert written["model_type"] == "gemma3_text" and written["eos_token_id"] == [1, 106]
    assert "vision_config" not in written
    with pytest.raises(UserError, match="text_config"):
        from_hf({"model_type": "gemma3"})


@pytest.mark.parametrize("family", ["mistral", "ministral3"])
def test_mistral3_that_sees_is_read_as_its_text_part(family):
    seeing = {"model_type": "mistral3", "vision_config": {"hidden_size": 8}, "text_config": CONFIGS[family]}
    assert from_hf(seeing) == from_hf(CONFIGS[family])
    assert to_hf(from_hf(seeing), "float32")["model_type"] == family
    unnamed = {key: value for key, value in CONFIGS["mistral"].items() if key != "model_type"}
    assert from_hf(seeing | {"text_config": unnamed}) == from_hf(CONFIGS["mistral"])
    for other in ("llama", None, ["mistral"]):
        with pytest.raises(UserError, match="mistral3 with a text_config of"):
            from_hf(seeing | {"text_config": CONFIGS[family] | {"model_type": other}})


# ---------------------------------------------------------------- tensors


@each_family
def test_every_parameter_is_stored_once(family):
    parameters = dict(tiny(family).named_parameters())
    tensors = stored_tensors(from_hf(CONFIGS[family]), parameters)
    assert sorted(name for stored in tensors.values() for name in stored.names) == sorted(parameters)
    for stored in tensors.values():
        parts = [parameters[name] for name in stored.names]
        tensor = stored.join(parts)
        assert list(tensor.shape) == stored.shape(parts)
        assert all(map(torch.equal, stored.split(tensor, [len(part) for part in parts]), parts))


def test_layouts():
    q, k, v = (torch.arange(4.0) + 10 * i for i in range(3))  # two heads of two features
    assert Stored(("q", "k", "v")).join([q, k, v]).tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    by_head = Stored(("q", "k", "v"), num_heads=2).join([q, k, v])
    assert by_head.tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]
    assert Stored(("q",), transposed=True).join([torch.ones(3, 2)]).shape == (2, 3)
    assert Stored(("q",), row_length=2).join([q]).tolist() == [[0, 1], [2, 3]]
