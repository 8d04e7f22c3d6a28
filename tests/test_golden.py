"""Every family computes what transformers computes, from every dialect of config.json, and writes back what it read.

tests/golden holds what transformers computed once (record.py there); transformers itself is not needed here.
"""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from golden.recipe import LENGTH, input_ids, masked_loss, weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerance import bounds_of, relative_error

from minisft import sft
from minisft.kernels.common import use_backend
from minisft.model.attention import KVCache
from minisft.model.families import to_hf
from minisft.model.load import load_model, read_config
from minisft.model.save import save_model

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = json.loads((GOLDEN / "configs.json").read_text())["configs"]
each_variant = pytest.mark.parametrize("variant", CONFIGS)
each_dialect = pytest.mark.parametrize(
    "variant, dialect", [(variant, dialect) for variant, dialects in CONFIGS.items() for dialect in dialects]
)


@cache
def golden(variant):
    """logits [T, V] and the gradients by the names of a checkpoint."""
    gradients = load_file(GOLDEN / f"{variant}.safetensors")
    return gradients.pop("logits"), gradients


@cache
def weights(variant):
    return {name: weight(variant, name, gradient.shape) for name, gradient in golden(variant)[1].items()}


def write_folder(folder, variant, dialect):
    """What a user would download."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[variant][dialect]))
    save_file(weights(variant), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder):
    return load_model(folder, max_length=LENGTH)


@cache
def loaded(variant):
    """A model that nobody changes."""
    with TemporaryDirectory() as folder:
        return load(write_folder(Path(folder), variant, "v5"))


def hidden_states(model, lengths=(LENGTH,)):
    """Hidden states of the first sum(lengths) tokens of the input, in documents of these lengths: [T, D]."""
    start, end = bounds_of(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths]).int()
    return model(input_ids()[: len(start)], positions, start, end)


@each_variant
def test_logits(variant, tmp_path):
    """From one dialect: test_dialects_are_one_model holds the others to the same configuration. The reference repeats
    transformers' operations, so at most the order of a few sums differs. The fast path sums attention and norms in another
    order, in fp32; errors grow by some ten through four layers of gain above 1. The delta rule of transformers is summed by
    chunks, so there the reference, token by token, is as far away as the fast path."""
    model, expected = load(write_folder(tmp_path, variant, "minimal")), golden(variant)[0]
    with torch.no_grad():
        for backend, tolerance in (("reference", 1e-5 if "delta" in model.config.mixers else 1e-6), ("torch", 1e-5)):
            with use_backend(backend):
                assert relative_error(model.logits(hidden_states(model)), expected) <= tolerance, backend


def training_loss(model):
    """masked_loss as training computes it, by `sft.loss`, which never has the logits of all tokens."""
    ids, rows = input_ids(), torch.arange(10, LENGTH - 1)
    start, end = bounds_of([LENGTH])
    batch = SimpleNamespace(
        input_ids=ids,
        position_ids=torch.arange(LENGTH, dtype=torch.int32),
        start=start,
        end=end,
        loss_rows=rows,
        targets=ids[rows + 1],
        row_weights=None,
        sums_by_part=lambda *values: torch.stack([value.sum() for value in values])[None],
        parts=("all",),
        part_sizes=(len(rows),),
        num_targets=len(rows),
        total_weight=float(len(rows)),
        shared=False,
    )
    total, _ = sft.loss(model, batch, 1 / len(rows))
    return total / len(rows), total


@pytest.mark.covers(1)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@each_variant
def test_gradients(variant, backend, tmp_path):
    model, (logits, expected) = load(write_folder(tmp_path, variant, "v5")), golden(variant)
    with use_backend(backend):
        mean, total = training_loss(model)
        total.backward()
    assert relative_error(mean, masked_loss(logits)) < 1e-6  # one number, fp32
    for parameter in model.parameters():
        parameter.data = parameter.grad
    save_model(model, tmp_path / "gradients")  # so they get the names and the layout of the file
    gradients = load_file(tmp_path / "gradients" / "model.safetensors")
    assert gradients.keys() == expected.keys()
    # Some gradients are zero in exact arithmetic and only rounding is left: GPT-2's bias of k adds the same to all
    # scores of a row. So a tensor may also be off by fp32's 6e-8 times the norm of everything that was added up.
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm()
        assert error <= 1e-4 * expected[name].norm() + 1e-7 * whole, (name, error / expected[name].norm())


@each_variant
def test_files_are_written_back_as_they_were(variant, tmp_path):
    folder = write_folder(tmp_path, variant, "minimal")
    save_model(load(folder), tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == weights(variant).keys()
        for name, tensor in weights(variant).items():
            saved = file.get_tensor(name)
            assert saved.shape == tensor.shape and saved.numpy().tobytes() == tensor.numpy().tobytes(), name
    assert_kept(folder, tmp_path / "saved")


def assert_kept(folder, saved):
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, saved))
    said = {key: value for key, value in before.items() if value is not None}
    assert after | said == after  # every key is still there with its value
    assert read_config(saved) == read_config(folder)


@each_dialect
def test_every_key_of_a_configuration_is_written_back(variant, dialect, tmp_path):
    """By `to_hf`, as save_model does; the weights of a dialect are those of the others."""
    before, after = tmp_path / "before", tmp_path / "after"
    for folder, config in ((before, CONFIGS[variant][dialect]), (after, None)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config or to_hf(read_config(before), "float32")))
    assert_kept(before, after)


@each_variant
def test_dialects_are_one_model(variant, tmp_path):
    for max_length in (None, LENGTH):
        configs = []
        for hf in CONFIGS[variant].values():
            (tmp_path / "config.json").write_text(json.dumps(hf))
            configs.append(read_config(tmp_path, max_length=max_length))
        assert configs[0] == configs[1] == configs[2], max_length


@each_variant
def test_packed_is_one_by_one(variant):
    """Documents of 23, 1 and 16 tokens in one row, against the model on each alone."""
    model, lengths = loaded(variant), (23, 1, 16)
    for backend in ("reference", "torch"):
        with torch.no_grad(), use_backend(backend):
            packed = hidden_states(model, lengths).split(lengths)
            for ids, ours in zip(input_ids().split(lengths), packed):
                alone = model(ids, torch.arange(len(ids)).int(), *bounds_of([len(ids)]))
                # The same sums, but a matrix product of another height may round otherwise, in each of some 15 products. Layers
                # of the delta rule divide by norms that may be small: 7e-6 for the document of one token (1e-15 in fp64).
                assert relative_error(ours, alone) < (2e-5 if "delta" in model.config.mixers else 1e-6), backend


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("variant", ["llama", "qwen3_5_text", "olmo_hybrid", "lfm2"])
def test_a_document_does_not_feel_its_neighbours_in_the_last_bit(variant, backend):
    """Other tokens in the first and the last document: hidden states and gradients of the middle one stay as they were."""
    model, lengths, middle = loaded(variant), (11, 17, 12), slice(11, 28)
    embeddings, seen = model.embed_tokens.weight[input_ids()].detach(), []
    start, end = bounds_of(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths]).int()
    for scale in (1.0, 1e3):
        inputs = embeddings * scale
        inputs[middle] = embeddings[middle]
        inputs.requires_grad_()
        with use_backend(backend), mock.patch.object(model.embed_tokens, "forward", lambda ids, x=inputs: x):
            hidden = model(input_ids(), positions, start, end)
            hidden.square().sum().backward()
        seen.append((hidden[middle], inputs.grad[middle]))
    assert all(map(torch.equal, *seen))


@each_variant
def test_token_by_token_with_a_cache(variant):
    """A prompt of 5 tokens, then one token at a time across the edge of the windows, as generation does."""
    model, kv_cache, ids = loaded(variant), KVCache(LENGTH), input_ids()
    with torch.no_grad():
        whole = hidden_states(model)
        steps = [model(ids[:5], torch.arange(5).int(), *bounds_of([5]), kv_cache=kv_cache)]
        for t in range(5, 15):
            steps.append(model(ids[t : t + 1], torch.tensor([t]).int(), *bounds_of([1]), kv_cache=kv_cache))
    assert relative_error(torch.cat(steps), whole[:15]) < 1e-5  # the fast paths' tolerance of test_logits
