"""gated_delta_rule on the torch path: against the recurrence, document by document, and step by step."""

import pytest
import torch
from tolerance import assert_close_to_truth, bounds_of, padded_with_nan, run_with_gradients

from minisft.kernels.common import use_backend
from minisft.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_ref, gated_delta_rule_step

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32, torch.float32],
    "all bf16": torch.bfloat16,
}
# Chunks have 64 tokens; short neighbours share one.
LAYOUTS = {
    "around a chunk": [1, 63, 64, 65, 129, 1, 1, 1],
    "one long": [200],
    "many short": [3, 5, 40, 2, 1, 30, 31, 20, 1],
    "one token": [1],
}
HEADS = {"16": (2, 2, 16, 16), "groups, odd": (2, 4, 12, 20), "wide values": (1, 3, 5, 33)}


def inputs_of(tokens: int, Hk: int, Hv: int, Dk: int, Dv: int, decay: float = 1.0) -> list[torch.Tensor]:
    """q, k, v, g, beta, cut out of NaN."""
    shapes = [(tokens, Hk, Dk), (tokens, Hk, Dk), (tokens, Hv, Dv)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors += [-decay * torch.rand(tokens, Hv), torch.rand(tokens, Hv)]
    return [padded_with_nan(x).requires_grad_() for x in tensors]


def hold_to_the_recurrence(lengths, inputs, dtype, **options):
    start, end = bounds_of(lengths)
    # A gradient of a single token has few numbers, each a sum in which most cancels: the order of the summands shows.
    floor = 1e-5 if lengths == [1] and dtype == torch.float32 else None
    return assert_close_to_truth(
        lambda *tensors: gated_delta_rule(*tensors, start, end, **options),
        lambda *tensors: gated_delta_rule_ref(*tensors, start, end, **options),
        inputs,
        dtype,
        floor=floor,
    )


@pytest.mark.covers(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_recurrence(layout, dtype):
    lengths = LAYOUTS[layout]
    hold_to_the_recurrence(lengths, inputs_of(sum(lengths), *HEADS["groups, odd"]), DTYPES[dtype])


@pytest.mark.parametrize("heads", HEADS)
def test_sizes_of_heads(heads):
    hold_to_the_recurrence([100, 30], inputs_of(130, *HEADS[heads]), torch.float32)


@pytest.mark.parametrize("options", [dict(scale=2.0), dict(normalize=False, scale=0.1)], ids=str)
def test_options(options):
    inputs = inputs_of(100, 2, 2, 8, 8)
    if not options.get("normalize", True):  # longer keys than 1 make the recurrence itself unstable
        inputs[1] = padded_with_nan(0.3 * inputs[1].detach()).requires_grad_()
    hold_to_the_recurrence([70, 30], inputs, torch.float32, **options)


def test_options_reach_the_formula():
    q, k, v, g, beta = (x.detach() for x in inputs_of(1, 1, 1, 4, 4))
    start, end = bounds_of([1])
    expected = beta[..., None] * (q * k).sum(-1, keepdim=True) * v  # one token: o = (k (beta v)^T)^T q
    for backend in ("torch", "reference"):
        with use_backend(backend):
            out = gated_delta_rule(q, k, v, g, beta, start, end, scale=3.0, normalize=False)
            normed = gated_delta_rule(5 * q, 7 * k, v, g, beta, start, end)
        torch.testing.assert_close(out, 3 * expected)
        torch.testing.assert_close(normed, expected / q.norm() / k.norm() / 2)  # scale 4 ** -0.5


@pytest.mark.covers(1)
@pytest.mark.parametrize("decay", [0.0, 30.0, 300.0])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_decay_and_strong_decay(decay, dtype):
    """exp of a sum of 64 times 300 would overflow where it is taken of the wrong sign."""
    hold_to_the_recurrence([130, 65], inputs_of(195, 1, 2, 8, 8, decay), DTYPES[dtype])


def test_a_strong_decay_among_weak_ones():
    """Behind the strong one the sum of g is large, its differences are small."""
    inputs = inputs_of(140, 1, 2, 8, 8, 0.01)
    with torch.no_grad():
        inputs[3][10] = -3000.0
    hold_to_the_recurrence([140], inputs, torch.float32)


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0])
def test_the_ends_of_beta(value):
    """2 is the largest where a model allows negative eigenvalues."""
    inputs = inputs_of(100, 2, 2, 16, 8)
    with torch.no_grad():
        inputs[4].fill_(value)
        inputs[1][50:60] = inputs[1][50]  # one key again and again: what is written replaces what was there
    hold_to_the_recurrence([100], inputs, torch.float32)


def test_gradcheck():
    start, end = bounds_of([2, 66, 1])
    inputs = [x.detach().double().requires_grad_() for x in inputs_of(69, 1, 2, 2, 1)]
    assert torch.autograd.gradcheck(lambda *tensors: gated_delta_rule(*tensors, start, end), inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("other", [0, 1, 2, 3])
def test_a_document_does_not_see_its_neighbours(other, backend):
    lengths = [20, 100, 7, 30]
    start, end = bounds_of(lengths)
    inputs = inputs_of(157, 1, 2, 8, 4)
    changed = [x.detach().clone() for x in inputs]
    own = start == sum(lengths[:other])
    for x, factor in zip(changed, (1e4, -1e4, 1e4, 30, -1)):
        x[own] *= factor
    with use_backend(backend):
        results = []
        for tensors in (inputs, changed):
            op = lambda *x: gated_delta_rule(*x, start, end)  # noqa: E731
            results.append(run_with_gradients(op, [x.detach().requires_grad_() for x in tensors]))
            _, state = gated_delta_rule(*tensors, start, end, return_state=True)
            results[-1]["state"] = state
    for name in results[0]:
        rest = torch.arange(4) != other if name == "state" else ~own
        assert torch.equal(results[0][name][rest], results[1][name][rest]), name
        assert not torch.equal(results[0][name], results[1][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_one_by_one(dtype):
    lengths, inputs = [70, 1, 129, 64], [x.detach().to(dtype) for x in inputs_of(264, 1, 2, 8, 8)]
    packed, states = gated_delta_rule(*inputs, *bounds_of(lengths), return_state=True)
    for tokens, state, n in zip(torch.arange(264).split(lengths), states, lengths):
        alone, own_state = gated_delta_rule(*(x[tokens] for x in inputs), *bounds_of([n]), return_state=True)
        torch.testing.assert_close(packed[tokens], alone)
        torch.testing.assert_close(own_state[0], state)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_continue_a_prefill(dtype, backend):
    """Three documents to their last four tokens, then these one by one, give the longer prefill."""
    inputs = [x.detach().to(dtype) for x in inputs_of(150, 2, 4, 16, 8)]
    documents = torch.arange(150).split([70, 12, 68])
    with use_backend(backend):
        whole, last = gated_delta_rule(*inputs, *bounds_of([70, 12, 68]), return_state=True)
        tokens = torch.cat([document[:-4] for document in documents])
        out, state = gated_delta_rule(*(x[tokens] for x in inputs), *bounds_of([66, 8, 64]), return_state=True)
        assert state.dtype == torch.float32 and not state.requires_grad
        torch.testing.assert_close(out, whole[tokens])
        for i in range(-4, 0):
            tokens = torch.stack([document[i] for document in documents])
            out, state = gated_delta_rule_step(*(x[tokens] for x in inputs), state)
            torch.testing.assert_close(out, whole[tokens])
    torch.testing.assert_close(state, last)


def test_the_state_does_not_change_the_output():
    inputs, bounds = inputs_of(80, 1, 2, 8, 8), bounds_of([3, 70, 7])
    plain = run_with_gradients(lambda *x: gated_delta_rule(*x, *bounds), inputs)
    with_state = run_with_gradients(lambda *x: gated_delta_rule(*x, *bounds, return_state=True)[0], inputs)
    for name in plain:
        torch.testing.assert_close(plain[name], with_state[name])


def test_no_tokens():
    q, k, v, g, beta = (torch.empty(0, *shape, requires_grad=True) for shape in [(2, 8), (2, 8), (4, 8), (4,), (4,)])
    nothing = torch.empty(0, dtype=torch.int32)
    for backend in ("torch", "reference"):
        with use_backend(backend):
            out, state = gated_delta_rule(q, k, v, g, beta, nothing, nothing, return_state=True)
        assert out.shape == (0, 4, 8) and state.shape == (0, 4, 8, 8)


def test_what_does_not_fit_is_refused():
    q, k, v, g, beta = (x.detach() for x in inputs_of(6, 2, 4, 8, 8))
    start, end = bounds_of([4, 2])
    for wrong, message in [
        (dict(q=q[:, :1]), "expected"),
        (dict(v=v.double()), "one dtype"),
        (dict(v=v[:, :3], g=g[:, :3], beta=beta[:, :3]), "multiple"),
        (dict(q=q[:, :0], k=k[:, :0]), "multiple"),
        (dict(g=g[:5]), "g "),
        (dict(start=start.float()), "integers"),
        (dict(end=torch.tensor([6, 6, 4, 4, 6, 6])), "shared prompts"),
        (dict(start=torch.zeros(6, dtype=torch.int32)), "shared prompts"),
    ]:
        arguments = dict(q=q, k=k, v=v, g=g, beta=beta, start=start, end=end) | wrong
        with pytest.raises(ValueError, match=message):
            gated_delta_rule(**arguments)
    with pytest.raises(ValueError, match="state"):
        gated_delta_rule_step(q, k, v, g, beta, torch.zeros(6, 4, 8, 7))


def test_as_transformers_document_by_document():
    """Qwen3.5's own function knows one document; what it gives one by one, the packed row gives at once."""
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    lengths, inputs = [70, 1, 130], inputs_of(201, 2, 4, 16, 8)
    ours = run_with_gradients(lambda *x: gated_delta_rule(*x, *bounds_of(lengths)), inputs)

    def theirs(*tensors):
        documents = zip(*(x.split(lengths) for x in tensors))
        function = modeling.torch_chunk_gated_delta_rule
        return torch.cat([function(*(x[None] for x in one), use_qk_l2norm_in_kernel=True)[0][0] for one in documents])

    for name, expected in run_with_gradients(theirs, inputs).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)  # both in fp32, summed in other orders
