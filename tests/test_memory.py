"""What a block keeps for its backward: less if requested, and never a gradient that differs by a single bit."""

from itertools import product

import pytest
import torch
from test_loop import gradients_of_step
from test_model import CONFIGS, LENGTHS, gradients, stream, tiny
from tiny import parts, settings, train, weights
from torch.profiler import ProfilerActivity, profile

from minisft.errors import UserError
from minisft.model import recompute
from minisft.model.lora import apply_lora
from minisft.model.lora_options import LoraOptions
from minisft.model.recompute import Recipe, droppable, dropped

MODES = {
    "selective": {"model.gradient_checkpointing": "selective"},
    "full": {"model.gradient_checkpointing": True},
    "every other block": {"model.gradient_checkpointing": True, "model.gradient_checkpointing_every": 2},
    "offloaded": {"model.gradient_checkpointing": True, "model.offload_activations": True},
}


OTHERS = ["qwen3", "gemma2", "gpt2", "qwen3_5_text"]  # with kernels that Llama has not


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    settings(folder)
    return folder


# ---- the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.covers(1)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_selective_gives_the_same_gradients_bitwise(family, autocast):
    """Every family: all blocks, norms and MLPs; with NEFTune and dropout where they have it."""
    model = tiny(CONFIGS[family])
    model.neftune_alpha = 5.0
    ids, layout, probe = torch.randint(53, (sum(LENGTHS),)), stream(LENGTHS), torch.randn(sum(LENGTHS), 32)

    def run(selective: bool) -> list[torch.Tensor]:
        model.recompute_cheap_ops(selective)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            hidden = model(ids, *layout)
        return [hidden, *gradients(model, hidden, probe)]

    for plain, recomputed in zip(run(False), run(True)):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use", ["all weights", "adapters", "the upper half"])
def test_a_step_is_the_same_bitwise(home, mode, use):
    def step(**keys) -> list[torch.Tensor]:
        run, _ = parts(home, **keys)
        if use == "adapters":
            apply_lora(run.model, LoraOptions(r=4, lora_dropout=0.2, use_dora=True))
            for name, p in run.model.named_parameters():
                if name.endswith("lora_B"):
                    p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(p.numel()))
        if use == "the upper half":
            run.model.layers[0].requires_grad_(False)
            run.model.embed_tokens.requires_grad_(False)
        (batch,) = run.train.step(0, 0)
        torch.manual_seed(1)
        loss, _ = run.loss(run.model, batch, 1.0)
        loss.backward()
        return [loss.detach(), *(p.grad for p in run.model.parameters() if p.grad is not None)]

    for plain, other in zip(step(), step(**MODES[mode]), strict=True):
        assert torch.equal(plain, other)


def test_accumulated_packed_and_reference_steps_too(home):
    keys = {"train.gradient_accumulation_steps": 2, "train.per_device_train_batch_size": 2, "data.packing": True}
    for kernels in ("torch", "reference"):
        (loss, plain), (other, grads) = (
            gradients_of_step(home, **keys, **mode, **{"model.kernels": kernels}) for mode in ({}, MODES["selective"])
        )
        assert loss == other and all(torch.equal(grads[name], plain[name]) for name in plain)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(
    "family, autocast",
    [("llama", False), ("lfm2", True), ("adapters", True)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in product(OTHERS, (False, True))]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", True), ("lfm2", False), ("adapters", False))],
)
def test_the_triton_kernels_give_the_same_bits_too(family, autocast):
    """All kernels of a block. Where products add to the residual stream in place, what is kept of it must not change."""
    size = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64}
    model = tiny(CONFIGS["llama" if family == "adapters" else family] | size)
    if family == "adapters":
        apply_lora(model, LoraOptions(r=4, lora_dropout=0.2))
        for name, p in model.named_parameters():
            p.data += 0.1 * torch.randn_like(p) if name.endswith("lora_B") else 0  # which begins at zero
    trained = [p for p in model.parameters() if p.requires_grad]
    ids, layout, probe = torch.randint(53, (12,)), stream([7, 5]), torch.randn(12, 64)

    def run(whole: bool = False, every: int = 1, cheap: bool = False, offload: bool = False) -> list[torch.Tensor]:
        model.gradient_checkpointing, model.gradient_checkpointing_every = whole, every
        model.offload_activations = offload
        model.recompute_cheap_ops(cheap)
        torch.manual_seed(1)  # GPT-2 has dropout
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            hidden = model(ids, *layout)
        return [hidden, *torch.autograd.grad((hidden * probe).sum(), trained, materialize_grads=True)]

    kept = run()
    for how in (dict(cheap=True), dict(whole=True), dict(whole=True, every=2), dict(whole=True, offload=True)):
        for plain, recomputed in zip(kept, run(**how), strict=True):
            assert torch.equal(plain, recomputed), how


def test_whole_runs_end_in_the_same_bytes(home, tmp_path):
    def last(name: str, **keys) -> dict[str, bytes]:
        folder = tmp_path / name
        return weights(train(home, output_dir=str(folder), **keys, **{"train.max_steps": 4}).output_dir)

    plain = last("plain")
    assert all(last(name, **mode) == plain for name, mode in MODES.items())


# ---- less memory --------------------------------------------------------------------------------------------------


def kept_bytes(home, use_lora: bool = False, **keys) -> int:
    """What is allocated in the forward pass of a model and not freed until the backward."""
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_key_value_heads": 4}
    run, _ = parts(home, **keys, **{"model.config": {**settings(home)["model.config"], **shape}})
    if use_lora:
        apply_lora(run.model, LoraOptions(r=2))
    (batch,) = run.train.step(0, 0)
    everything = batch.input_ids, batch.position_ids, batch.start, batch.end
    run.model(*everything)  # what is made once: tables
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        hidden = run.model(*everything)
    assert hidden.requires_grad
    return sum(event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")


def test_what_is_kept(home):
    """In units of T x D x 4 bytes a block, in fp32, F = 3 D: the norm's output 1, q k v out 4, the second norm's output 1, gate
    up and their product 9. Selective leaves out 3; full all but the input."""
    run, _ = parts(home)
    (batch,) = run.train.step(0, 0)
    unit = len(batch.input_ids) * 64 * 4
    kept = {name: kept_bytes(home, **mode) / unit for name, mode in {"plain": {}, **MODES}.items()}
    # beside the units: what attention and the norms keep for each token, and the final norm
    assert 4 * 15 <= kept["plain"] <= 4 * 15 * 1.1 + 2
    assert kept["plain"] - kept["selective"] == pytest.approx(4 * 3, rel=0.02)
    assert 4 * 1 + 1 <= kept["full"] <= 4 * 1 + 4
    assert kept["full"] < kept["every other block"] < kept["plain"] - 4 * 15 / 2 + 4


def test_adapters_keep_less_too(home):
    assert kept_bytes(home, use_lora=True, **MODES["selective"]) < 0.85 * kept_bytes(home, use_lora=True)


def test_a_recipe_is_computed_once_for_all_who_saved_it_and_freed_after_the_last():
    calls = []

    def double(x):
        calls.append(1)
        return 2 * x

    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    y = droppable(double(x), double, x)
    with dropped(y):
        z = (y @ w).sum() + (y @ w.exp()).sum() + (y * y).sum()  # saved four times
    assert len(calls) == 1
    z.backward(retain_graph=True)
    assert len(calls) == 2
    first, x.grad, w.grad = (x.grad, w.grad), None, None
    z.backward()  # a second backward computes it once more
    assert len(calls) == 3 and torch.equal(x.grad, first[0]) and torch.equal(w.grad, first[1])
    expected = torch.autograd.grad((2 * x @ w).sum() + (2 * x @ w.exp()).sum() + (2 * x * 2 * x).sum(), [x, w])
    for grad, other in zip((x.grad, w.grad), expected):
        torch.testing.assert_close(grad, other)

    one = Recipe(lambda: torch.ones(2))
    one.num_saved = 2
    one.get()
    assert one.value is not None
    one.get()
    assert one.value is None


def test_what_is_not_droppable_is_kept_as_ever():
    x = torch.randn(3, 3, requires_grad=True)
    with torch.no_grad():
        assert not hasattr(droppable(x * 2, torch.mul, x, torch.tensor(2.0)), "recipe")
    with dropped(x):
        y = (x * x).sum()
    y.backward()
    assert torch.equal(x.grad, 2 * x.detach())


# ---- offloaded ----------------------------------------------------------------------------------------------------


def test_the_inputs_of_blocks_and_nothing_else_pass_through_the_cpu(home, monkeypatch):
    """Hooks that keep a copy under a number show what autograd hands over and takes back."""
    honest, packed, unpacked = recompute.saved_tensors_hooks, [], []

    def spy(pack, unpack):
        def pack_and_note(x):
            kept = pack(x)
            if isinstance(kept, tuple):
                assert kept[1].data_ptr() != x.data_ptr() and torch.equal(kept[1], x)
                packed.append(kept[1])
            return kept

        def unpack_and_note(kept):
            if isinstance(kept, tuple):
                unpacked.append(next(i for i, other in enumerate(packed) if other is kept[1]))
            return unpack(kept)

        return honest(pack_and_note, unpack_and_note)

    monkeypatch.setattr(recompute, "saved_tensors_hooks", spy)
    run, _ = parts(home, **MODES["offloaded"])
    (batch,) = run.train.step(0, 0)
    loss, _ = run.loss(run.model, batch, 1.0)
    assert [tuple(x.shape) for x in packed] == [(len(batch.input_ids), 32)] * 2 and unpacked == []
    assert torch.equal(packed[0], run.model.embed_tokens(batch.input_ids))
    loss.backward()
    assert unpacked == [1, 0]  # the last block's input is needed first


# ---- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"model.offload_activations": True}, "run again in the backward"),
        ({"model.gradient_checkpointing_every": 2}, "run again in the backward"),
        ({**MODES["selective"], "model.offload_activations": True}, "run again in the backward"),
        ({"model.gradient_checkpointing": "full"}, "gradient_checkpointing"),
        ({"model.gradient_checkpointing": True, "model.gradient_checkpointing_every": 0}, "at least 1"),
    ],
)
def test_keys_that_do_not_fit_are_refused(home, keys, message):
    with pytest.raises(UserError, match=message):
        parts(home, **keys)


def test_the_command_line_takes_both_forms():
    from minisft.config.command_line import parse_arguments

    name = "model.gradient_checkpointing"
    for words, value in [([], True), (["true"], True), (["false"], False), (["selective"], "selective")]:
        assert parse_arguments([f"--{name}", *words])[1] == {name: value}
    assert parse_arguments([f"--{name}=selective"])[1] == {name: "selective"}
    assert parse_arguments(["--use_gradient_checkpointing", "run.toml"]) == (
        "run.toml",
        {"use_gradient_checkpointing": True},
    )
