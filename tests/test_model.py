"""The decoder over packed documents: nothing leaks, nothing changes with the packing, checkpointing changes nothing."""

import pytest
import torch
from torch import Tensor

from minisft.data.batch import document_bounds
from minisft.kernels.common import use_backend
from minisft.model.decoder import Decoder
from minisft.model.families import Rope, from_hf
from minisft.model.load import build_model, init_weights
from minisft.model.rope import inverse_frequencies

CONFIGS = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_dropout": 0.1,
        "initializer_range": 0.3,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 53,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.3,
    },
}
LENGTHS = [5, 1, 150, 17]  # a one-token document, one longer than an attention block


@pytest.fixture(params=CONFIGS)
def model(request) -> Decoder:
    model = build_model(from_hf(CONFIGS[request.param]), "cpu")
    init_weights(model, seed=0)
    return model


@pytest.fixture(params=["reference", "torch"])
def backend(request):
    with use_backend(request.param):
        yield


def stream(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """position_ids, start, end of documents side by side."""
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    start, end = document_bounds(cu_seqlens, sum(lengths))
    return torch.arange(sum(lengths), dtype=torch.int32) - start, start, end


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
    """Of sum(hidden * probe), for every parameter; without those of k biases, which are zero but for rounding."""
    parameters = [p for name, p in model.named_parameters() if not name.endswith("k_proj.bias")]
    return torch.autograd.grad((hidden * probe).sum(), parameters, retain_graph=True, materialize_grads=True)


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_nothing(model, backend, autocast):
    """Bitwise, with dropout and NEFTune on: the blocks are run again from the same random state."""
    model.neftune_alpha = 5.0
    ids, layout, probe = torch.randint(53, (sum(LENGTHS),)), stream(LENGTHS), torch.randn(sum(LENGTHS), 32)

    def run(checkpointing: bool) -> list[Tensor]:
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            hidden = model(ids, *layout)
        assert hidden.dtype == torch.float32  # the residual stream, whatever the layers compute in
        return [hidden, *gradients(model, hidden, probe), torch.rand(3)]  # and the random state afterwards

    for plain, checkpointed in zip(run(False), run(True)):
        assert torch.equal(plain, checkpointed)


def test_dropout_is_for_training_only(model, backend):
    ids, layout = torch.randint(53, (17,)), stream([17])
    assert not torch.equal(model(ids, *layout), model(ids, *layout))
    model.eval()
    assert torch.equal(model(ids, *layout), model(ids, *layout))


@torch.no_grad()
def test_neftune_scales_with_the_document(model):
    lengths, alpha = [4, 36, 160], 5.0
    model.embed_tokens.weight.data.zero_()
    model.config = from_hf(model.config.hf | {"embd_pdrop": 0.0})
    if model.config.rope is None:
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


def test_angles_do_not_follow_the_dtype_of_the_model(model):
    assert not list(model.buffers())
    assert inverse_frequencies(Rope(), 64).dtype == torch.float32


def test_llama3_blends_between_kept_and_stretched():
    plain = inverse_frequencies(Rope(), 64)
    llama3 = Rope(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    ratio = inverse_frequencies(llama3, 64) / plain
    turns = 8192 * plain / (2 * torch.pi)
    assert torch.all(ratio[turns >= 4] == 1) and torch.all(ratio[turns <= 1] == 1 / 8)
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) > 2 and torch.all((between > 1 / 8) & (between < 1))


def test_head(model):
    hidden = torch.randn(3, 32)
    assert model.head_weight.shape == (53, 32)
    assert torch.equal(model.logits(hidden), hidden @ model.head_weight.T)
    tied = model.config.tie_word_embeddings
    assert (model.head_weight is model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in dict(model.named_parameters())) == (not tied)
