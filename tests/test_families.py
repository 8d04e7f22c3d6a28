"""Every family computes what transformers computes, reads its config.json, and saves what transformers loads."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from minisft.errors import MODEL, UserError
from minisft.kernels.common import use_backend
from minisft.model.families import DEFAULTS, from_hf, stored_tensors
from minisft.model.load import load_model, read_config
from minisft.model.save import save_model

# Large initial weights, so that attention is far from uniform and every term shows in the logits.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 101,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
CASES = {
    "llama": LLAMA,
    "llama, biases, head_dim, tied": LLAMA
    | {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True},
    "llama, llama3 rope, transformers 4": LLAMA
    | {"rope_theta": 500.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
    "llama, linear rope, transformers 5": LLAMA
    | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "gpt2": GPT2,
    "gpt2, untied, n_inner, inverse layer scale, erf gelu": GPT2
    | {
        "tie_word_embeddings": False,
        "n_inner": 72,
        "scale_attn_by_inverse_layer_idx": True,
        "activation_function": "gelu",
    },
}


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import warns of its own deprecations
        import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def hf_config(transformers, values: dict):
    return transformers.AutoConfig.for_model(**values)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request, transformers, tmp_path_factory):
    """A random model of transformers, and the folder that it saved itself to."""
    torch.manual_seed(0)
    config = hf_config(transformers, request.param)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases would be 1 and 0, and a mistake in them would not show
                parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return model, folder


INPUT_IDS = torch.randint(101, (33,), generator=torch.Generator().manual_seed(1))


def logits(model) -> Tensor:
    """Of one document [T]."""
    index = torch.arange(len(INPUT_IDS), dtype=torch.int32)
    zero = torch.zeros_like(index)
    return model.logits(model(INPUT_IDS, index, zero, zero + len(index)))


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# The reference repeats transformers' operations, so only the order of sums in a matrix product differs (GPT-2's stacked
# q, k, v). The torch path sums attention in another order, in fp32.
@pytest.mark.parametrize("backend, tolerance", [("reference", 1e-6), ("torch", 1e-5)])
def test_logits(pair, backend, tolerance):
    hf, folder = pair
    with torch.no_grad(), use_backend(backend):
        assert relative_error(logits(load_model(folder)), hf(INPUT_IDS[None]).logits[0]) <= tolerance


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients(pair, backend):
    hf, folder = pair
    model = load_model(folder)
    hf.zero_grad()
    torch.nn.functional.cross_entropy(hf(INPUT_IDS[None]).logits[0, :-1], INPUT_IDS[1:]).backward()
    with use_backend(backend):
        torch.nn.functional.cross_entropy(logits(model)[:-1], INPUT_IDS[1:]).backward()
    ours, theirs = dict(model.named_parameters()), dict(hf.named_parameters())
    for name, stored in stored_tensors(model.config, ours).items():
        grad = torch.cat([ours[part].grad for part in stored.names])
        grad = grad.t() if stored.transposed else grad
        # A bias of k has no gradient in exact arithmetic (softmax ignores a constant): only rounding is left there.
        scale = max(theirs[name].grad.norm(), 1e-3)
        assert (grad - theirs[name].grad).norm() <= 1e-4 * scale, name  # fp32 through three layers and back


def test_autocast_is_as_exact_as_in_transformers(pair):
    hf, folder = pair
    model = load_model(folder)
    with torch.no_grad():
        truth = hf(INPUT_IDS[None]).logits[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = hf(INPUT_IDS[None]).logits[0].float()
            ours = logits(model).float()
    # Both errors are sums of random roundings to bf16; 1.25 leaves room for their luck at this small size.
    assert relative_error(ours, truth) <= 1.25 * relative_error(theirs, truth)


def tensors(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def test_saved_model_is_the_one_of_transformers(pair, transformers, tmp_path):
    hf, folder = pair
    save_model(load_model(folder), tmp_path)
    ours, theirs = tensors(tmp_path), tensors(folder)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info  # nothing missing, unexpected or mismatched
    with torch.no_grad():
        assert torch.equal(again(INPUT_IDS[None]).logits, hf(INPUT_IDS[None]).logits)
    # Every key of the original config.json is still there with its value.
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    assert after | before == after
    assert read_config(tmp_path) == read_config(folder)


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())
def test_dialects_agree(transformers, values):
    """What the user wrote, which leaves out defaults, and what transformers 5 writes for it."""
    assert from_hf(values) == from_hf(hf_config(transformers, values).to_dict())


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_class_defaults(transformers, model_type):
    assert from_hf({"model_type": model_type}) == from_hf(hf_config(transformers, {"model_type": model_type}).to_dict())


def test_rope_dialects():
    newer = LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 9.0, "original_max_position_embeddings": 16}}
    older = LLAMA | {"rope_theta": 9.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}}
    oldest = LLAMA | {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert from_hf(newer) == from_hf(older)
    assert from_hf(newer | {"rope_theta": 5.0}) == from_hf(newer)  # the newer table wins
    assert from_hf(oldest).rope.kind == "linear"
    assert from_hf(LLAMA | {"rope_scaling": LLAMA3}).rope.original_max_position_embeddings == 64  # the model's own
    assert from_hf(LLAMA | {"rope_scaling": None, "head_dim": None}) == from_hf(LLAMA)  # null is left out


def test_gpt2_general_names():
    general = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
    values = {key: value for key, value in GPT2.items() if key not in ("n_embd", "n_layer", "n_head", "n_positions")}
    assert from_hf(values | general) == from_hf(GPT2)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "mamba"}, "llama, gpt2"),
        ({"model_type": None}, "llama, gpt2"),
        ({"model_type": ["llama"]}, "llama, gpt2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_size": 50}, "50"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "3"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"attention_bias": "no"}, "attention_bias"),
        ({"attention_dropout": 1.5}, "attention_dropout"),
    ],
)
def test_refused(change, named):
    with pytest.raises(UserError) as caught:
        from_hf(LLAMA | change)
    assert named in str(caught.value) and caught.value.exit_code == MODEL


def test_neutral_values_are_accepted():
    neutral = {"quantization_config": None, "logits_scaling": 1.0, "num_experts": 0, "sliding_window": None}
    neutral |= {"rope_interleaved": False, "layer_types": ["full_attention"] * 3}
    assert from_hf(LLAMA | neutral) == from_hf(LLAMA)
