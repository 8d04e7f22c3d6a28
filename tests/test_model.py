"""The decoder over packed documents: nothing leaks, nothing changes with the packing, checkpointing changes nothing.
The switches that families add, each by a property of its own."""

from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIGS, stream, tiny
from torch import Tensor

from minisft.kernels import linear
from minisft.kernels.common import use_backend
from minisft.kernels.linear_cross_entropy import linear_cross_entropy
from minisft.model.attention import KVCache
from minisft.model.decoder import BLOCKS, Decoder
from minisft.model.families import FAMILIES, from_hf

# One of every kind of block, norm and MLP, with and without windows, caps, clamps, norms of q and k, rotary embeddings.
KINDS = ["llama", "gpt2", "smollm3", "gemma2", "gemma3_text", "olmo", "olmo3", "granite", "gpt_neox", "cohere", "phi"]
KINDS += ["stablelm", "hunyuan_v1_dense", "nemotron"]
LENGTHS = [5, 1, 150, 17]  # a one-token document, one longer than an attention block


@pytest.fixture(params=KINDS)
def model(request) -> Decoder:
    return tiny(request.param)


@pytest.fixture(params=["reference", "torch", "as on a GPU"])
def backend(request, monkeypatch):
    """As on a GPU: products add to the residual stream in place, layers with the same input are one product."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(linear, "sums_in_fp32", lambda x: True)
    with use_backend("torch" if request.param == "as on a GPU" else request.param):
        yield


def test_kinds_are_all_kinds():
    configs = [from_hf(CONFIGS[family]) for family in KINDS]
    everywhere = [from_hf(CONFIGS[family]) for family in FAMILIES]
    assert {config.block for config in configs} == BLOCKS.keys()
    for switch in (
        "norm",
        "norm_bias",
        "norm_offset",
        "mlp",
        "qk_norm",
        "qk_norm_after_rope",
        "activation",
        "rope_interleaved",
        "learned_positions",
        "head_bias",
    ):
        assert {getattr(c, switch) for c in configs} == {getattr(c, switch) for c in everywhere}, switch


@torch.no_grad()
def test_documents_do_not_see_each_other(model, backend):
    """Bitwise: the same layout, so the same operations in the same order, on the same numbers."""
    model.eval()
    ids, layout = torch.randint(53, (sum(LENGTHS),)), stream(LENGTHS)
    hidden = model(ids, *layout)
    for i, length in enumerate(LENGTHS):
        own = slice(sum(LENGTHS[:i]), sum(LENGTHS[:i]) + length)
        others = torch.randint(53, ids.shape)
        others[own] = ids[own]
        assert torch.equal(model(others, *layout)[own], hidden[own])
        assert not torch.equal(model(others, *layout), hidden)


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_ones(model, backend):
    model.eval()
    ids, layout = torch.randint(53, (150,)), stream([150])
    changed = ids.clone()
    changed[140:] = (ids[140:] + 1) % 53
    assert torch.equal(model(changed, *layout)[:140], model(ids, *layout)[:140])


@pytest.mark.covers(1)  # the hidden states of each kind with each backend: test_golden.py
def test_packed_equals_one_by_one(model, backend):
    """fp32; the matrix products have other shapes, so their sums may run in another order."""
    model.eval()
    ids = torch.randint(53, (sum(LENGTHS),))
    packed = model(ids, *stream(LENGTHS))
    alone = torch.cat([model(part, *stream([len(part)])) for part in ids.split(LENGTHS)])
    assert (packed - alone).norm() <= 1e-6 * alone.norm()
    probe = torch.randn_like(packed)
    for one, other in zip(gradients(model, packed, probe), gradients(model, alone, probe)):
        assert (one - other).norm() <= 1e-5 * other.norm()  # sums over all tokens, in another order


def gradients(model: Decoder, hidden: Tensor, probe: Tensor) -> list[Tensor]:
    """Gradients of sum(hidden * probe) for every parameter except k biases, where they are zero but for rounding."""
    parameters = [p for name, p in model.named_parameters() if not name.endswith("k_proj.bias")]
    return torch.autograd.grad((hidden * probe).sum(), parameters, retain_graph=True, materialize_grads=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "phi"])
def test_checkpointing_changes_nothing(family, backend, autocast):
    """Bitwise, with dropout and NEFTune on: the blocks are run again from the same random state."""
    dropout = {} if family == "gpt2" else {"attention_dropout": 0.1}  # GPT-2 has some by default
    model = tiny(CONFIGS[family] | dropout)
    model.neftune_alpha = 5.0
    ids, layout, probe = torch.randint(53, (sum(LENGTHS),)), stream(LENGTHS), torch.randn(sum(LENGTHS), 32)
    stream_dtypes = set()
    model.layers[-1].register_forward_hook(lambda _module, _inputs, outputs: stream_dtypes.add(outputs[0].dtype))

    def run(checkpointing: bool) -> list[Tensor]:
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            hidden = model(ids, *layout)
        assert hidden.dtype == (torch.bfloat16 if autocast else torch.float32)  # what the product with the head reads
        return [hidden, *gradients(model, hidden, probe), torch.rand(3)]  # and the random state afterwards

    for plain, checkpointed in zip(run(False), run(True)):
        assert torch.equal(plain, checkpointed)
    assert stream_dtypes == {torch.float32}  # the residual stream, whatever the layers compute in


# ---------------------------------------------------------------- dropout and noise


DROPOUTS = {
    "attention_dropout": [family for family in FAMILIES if family not in ("gpt2", "ernie4_5")],
    "resid_pdrop": ["gpt2", "phi3", "phi"],
    "embd_pdrop": ["gpt2", "phi"],
    "attn_pdrop": ["gpt2"],
    "hidden_dropout": ["gpt_neox", "stablelm"],
    "residual_dropout": ["starcoder2", "seed_oss"],
    "embedding_dropout": ["starcoder2"],
}
WITHOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "residual_dropout"), 0.0)


@pytest.mark.parametrize("key, family", [(key, family) for key, families in DROPOUTS.items() for family in families])
def test_dropout_is_for_training_only(key, family):
    config = CONFIGS[family] | WITHOUT
    ids, layout = torch.randint(53, (17,)), stream([17])
    without, model = tiny(config), tiny(config | {key: 0.5})
    assert torch.equal(without(ids, *layout), without(ids, *layout))
    assert not torch.equal(model(ids, *layout), model(ids, *layout))
    model.eval()
    assert torch.equal(model(ids, *layout), without(ids, *layout))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_neftune_scales_with_the_document(family):
    model = tiny(CONFIGS[family] | WITHOUT)
    lengths, alpha = [4, 36, 160], 5.0
    model.embed_tokens.weight.data.zero_()
    if model.config.learned_positions:
        model.embed_positions.weight.data.zero_()
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ids, layout = torch.zeros(sum(lengths), dtype=torch.long), stream(lengths)

    model(ids, *layout)  # alpha is 0
    model.neftune_alpha = alpha
    model(ids, *layout)
    model.eval()(ids, *layout)
    without, noise, evaluation = seen
    assert without.count_nonzero() == evaluation.count_nonzero() == 0
    for part, length in zip(noise.split(lengths), lengths):
        limit = alpha / (length * 32) ** 0.5
        assert part.abs().max() <= limit * (1 + 1e-6)  # rounding of the product
        # A uniform number in +-limit has the standard deviation limit / sqrt(3); the smallest sample has 128 of them,
        # and the estimate's own deviation is below 4 % there.
        assert part.std() == pytest.approx(limit / 3**0.5, rel=0.16)
        assert part.mean() == pytest.approx(0, abs=4 * limit / (3 * part.numel()) ** 0.5)


# ---------------------------------------------------------------- windows, caps, multipliers


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_none(backend):
    model, ids = tiny("mistral").eval(), torch.randint(53, (40,))

    def hidden(window: int | None, lengths: list[int]) -> Tensor:
        for layer in model.layers:
            layer.self_attn.options["window"] = window
        return model(ids, *stream(lengths))

    for lengths in ([40], [20, 20], [3, 37]):
        assert torch.equal(hidden(max(lengths), lengths), hidden(None, lengths))
        assert not torch.equal(hidden(max(lengths) - 1, lengths), hidden(None, lengths))


@torch.no_grad()
def test_how_far_a_token_reaches_through_windows(backend):
    """Window w counts the token itself, so two layers carry a change 2 (w - 1) tokens ahead, and not one further."""
    model = tiny("mistral").eval()
    ids, layout = torch.randint(53, (60,)), stream([60])
    changed = ids.clone()
    changed[10] = (ids[10] + 1) % 53
    differs = (model(changed, *layout) != model(ids, *layout)).any(-1)
    assert differs.nonzero()[:, 0].tolist() == list(range(10, 10 + 2 * (9 - 1) + 1))


@pytest.mark.covers(1)
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_is_the_whole_forward(family, backend):
    """Rows of different lengths that grow past the windows, in fp64; the sums of one row run in another order. Gated DeltaNet
    rounds its decays to fp32, and a last digit more or less of fp64 may round them otherwise."""
    model = tiny(family).eval().double()
    tolerance = 1e-7 if "delta" in model.config.mixers else 1e-12
    texts, prompts = [torch.randint(53, (length,)) for length in (14, 22, 30)], [1, 9, 17]
    whole = [model(text, *stream([len(text)])) for text in texts]
    cache = KVCache(40)
    ids = torch.cat([text[:n] for text, n in zip(texts, prompts)])
    hidden = model(ids, *stream(prompts), kv_cache=cache)[torch.tensor(prompts).cumsum(0) - 1]
    index = torch.arange(3, dtype=torch.int32)
    for step in range(13):
        expected = torch.stack([rows[n - 1 + step] for rows, n in zip(whole, prompts)])
        assert (hidden - expected).norm() <= tolerance * expected.norm(), step
        ids = torch.stack([text[n + step] for text, n in zip(texts, prompts)])
        positions = torch.tensor([n + step for n in prompts], dtype=torch.int32)
        hidden = model(ids, positions, index, index + 1, kv_cache=cache)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi"])
def test_the_loss_has_the_head_of_logits(family, backend):
    """Bias, scale and cap; fp32, a few roundings apart."""
    model = tiny(family)
    hidden, targets = 3 * torch.randn(20, 32), torch.randint(53, (20,))
    head = {"bias": model.head_bias, "softcap": model.config.logit_softcap, "logit_scale": model.config.logit_scale}
    nll = linear_cross_entropy(hidden, model.head_weight, targets, reduction="none", **head)
    expected = torch.nn.functional.cross_entropy(model.logits(hidden), targets, reduction="none")
    assert (nll - expected).norm() <= 1e-6 * expected.norm()
    plain = torch.nn.functional.cross_entropy(hidden @ model.head_weight.T, targets, reduction="none")
    assert (family == "llama") == torch.allclose(expected, plain, rtol=1e-3)


@torch.no_grad()
def test_gemma_rounds_its_embedding_multiplier():
    model = tiny("gemma").to(torch.bfloat16)
    config = replace(model.config, embedding_multiplier=3072**0.5)  # 55.4256 is 55.5 in bf16
    seen = []
    model.config = config
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ids = torch.arange(9)
    model(ids, *stream([9]))
    assert torch.equal(seen[0], model.embed_tokens.weight[:9] * 55.5)


# ---------------------------------------------------------------- head


def test_head(model):
    hidden = torch.randn(3, 32)
    assert model.head_weight.shape == (53, 32)
    tied = model.config.tie_word_embeddings
    assert (model.head_weight is model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in dict(model.named_parameters())) == (not tied)
    assert (model.head_bias is not None) == model.config.head_bias == ("lm_head.bias" in dict(model.named_parameters()))
    logits = model.logits(hidden)
    assert logits.shape == (3, 53) and torch.equal(logits.argmax(-1), model.logits(hidden[None])[0].argmax(-1))
    cap = model.config.logit_softcap
    assert cap is None or model.logits(1e4 * hidden).abs().max() <= cap


def test_angles_do_not_follow_the_dtype_of_the_model(model):
    assert not list(model.buffers())
