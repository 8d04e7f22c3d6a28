"""The Triton kernels on a real GPU: `pytest -m gpu`. Without one, everything here is skipped.

The interpreter shows that the kernels compute the right thing; what it cannot show is here: the compiled code on the sizes
of real models, races, waits for the GPU, memory, offsets beyond 2^31, and replay in a CUDA graph.

`GPU_TESTS_ON=cpu pytest -m gpu -k ...` runs what needs no CUDA on the CPU, in the interpreter: a look at the tests themselves.
It takes seconds to minutes a test.
"""

import gc
import math
import os
import warnings

import pytest
import torch
from tolerance import (
    assert_close_to_truth,
    bounds_of,
    padded_with_nan,
    relative_error,
    run_with_gradients,
    shared_prompts,
)

from minisft.kernels.adamw import adamw_
from minisft.kernels.causal_conv1d import causal_conv1d, causal_conv1d_ref
from minisft.kernels.common import use_backend
from minisft.kernels.copies import keep_copies
from minisft.kernels.cross_entropy import cross_entropy, cross_entropy_ref
from minisft.kernels.flash_attention import flash_attention, flash_attention_ref
from minisft.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_ref
from minisft.kernels.glu import geglu, geglu_ref, swiglu, swiglu_ref
from minisft.kernels.layer_norm import layer_norm, layer_norm_ref
from minisft.kernels.linear import add_linear
from minisft.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from minisft.kernels.lora import lora_linears, lora_linears_ref
from minisft.kernels.quantize import (
    dequantize_fp4,
    dequantize_int8,
    dequantize_nf4,
    quantize_fp4,
    quantize_int8,
    quantize_nf4,
)
from minisft.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from minisft.kernels.rope import rope, rope_ref

# What other packages of the machine warn of is no failure of ours.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HALVES = {name: DTYPES[name] for name in ("fp16", "bf16")}
PACKED = [100, 1, 63, 205, 2, 37, 300, 1, 64, 128, 122, *[1] * 37]  # boundaries inside of tiles and on their edges
LOSS_OPTIONS = dict(softcap=20.0, label_smoothing=0.1, z_loss=1e-3)
GB = 1e9


@pytest.fixture(autouse=True)
def _on_a_gpu():
    if DEVICE == "cuda":
        need_cuda()
    with use_backend("triton"):  # an op that its kernel cannot serve raises
        yield
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def leaf(*shape, scale=1.0):
    """Random numbers cut out of a buffer of NaN."""
    return padded_with_nan(torch.randn(*shape, device=DEVICE) * scale).requires_grad_()


def need_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")


def need_memory(gigabytes: float) -> None:
    need_cuda()
    free = torch.cuda.mem_get_info()[0] / GB
    if free < gigabytes:
        pytest.skip(f"{free:.0f} GB of GPU memory are free, {gigabytes} needed")


def table(tokens, rotated):
    angles = torch.arange(tokens, device=DEVICE)[:, None] * 1e4 ** -(
        torch.arange(0, rotated, 2, device=DEVICE) / rotated
    )
    return angles.cos(), angles.sin()


def rope_case(op, interleaved=False, norms=False):
    """rope as a function of q, k (and two weights); the table has the dtype of q."""

    def run(q, k, *weights):
        cos, sin = (x.to(q.dtype) for x in table(len(q), q.shape[-1]))
        pair = [(w, 1e-6, 0.0) for w in weights] if norms else [None, None]
        return op(q, k, cos, sin, interleaved=interleaved, q_norm=pair[0], k_norm=pair[1])

    return run


def targets_of(rows, vocabulary):
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    targets[::5] = -100
    return targets


def loss_case(op, vocabulary, **options):
    def run(logits):
        generator = torch.Generator(DEVICE).manual_seed(0)
        labels = torch.randint(vocabulary, logits.shape[:1], generator=generator, device=DEVICE)
        labels[::5] = -100
        return op(logits, labels, shift=False, reduction="none", **options)

    return run


def linear_loss_case(op, vocabulary, reduction, **options):
    def run(hidden, weight):
        generator = torch.Generator(DEVICE).manual_seed(0)
        targets = torch.randint(vocabulary, (len(hidden),), generator=generator, device=DEVICE)
        targets[::5] = -100
        rows = torch.randint(len(hidden), (len(hidden),), generator=generator, device=DEVICE)
        return op(hidden, weight, targets, rows=rows, grad_scale=1 / 37, reduction=reduction, **options)

    return run


def with_stats(op):
    def run(*arguments, **options):
        loss, stats = op(*arguments, **options, return_stats="all")
        return loss, stats.entropy, stats.mean_logit, stats.log_sum_sq_probs

    return run


# name -> (our op, the formula, shapes of its inputs)
CASES = {
    "rms_norm 4096": (lambda *a: rms_norm(*a, 1e-5), lambda *a: rms_norm_ref(*a, 1e-5), [(300, 4096), (4096,)]),
    "rms_norm 576": (lambda *a: rms_norm(*a, 1e-5), lambda *a: rms_norm_ref(*a, 1e-5), [(77, 576), (576,)]),
    "rms_norm 16384": (lambda *a: rms_norm(*a, 1e-5), lambda *a: rms_norm_ref(*a, 1e-5), [(33, 16384), (16384,)]),
    "rms_norm of gemma": (
        lambda *a: rms_norm(*a, 1e-6, offset=1.0, upcast_weight=True),
        lambda *a: rms_norm_ref(*a, 1e-6, offset=1.0, upcast_weight=True),
        [(300, 2304), (2304,)],
    ),
    "add_rms_norm": (
        lambda *a: add_rms_norm(*a, 1e-5),
        lambda *a: add_rms_norm_ref(*a, 1e-5),
        [(300, 2048), (300, 2048), (2048,)],
    ),
    "layer_norm": (
        lambda *a: layer_norm(*a, 1e-5),
        lambda *a: layer_norm_ref(*a, 1e-5),
        [(300, 2560), (2560,), (2560,)],
    ),
    "rope": (rope_case(rope), rope_case(rope_ref), [(500, 32, 128), (500, 8, 128)]),
    "rope 80": (rope_case(rope), rope_case(rope_ref), [(77, 9, 80), (77, 3, 80)]),
    "rope, interleaved": (rope_case(rope, True), rope_case(rope_ref, True), [(500, 32, 64), (500, 8, 64)]),
    "rope with norms": (
        rope_case(rope, norms=True),
        rope_case(rope_ref, norms=True),
        [(500, 16, 128), (500, 8, 128), (128,), (128,)],
    ),
    "swiglu": (swiglu, swiglu_ref, [(300, 5632), (300, 5632)]),
    "swiglu, fused": (swiglu, swiglu_ref, [(300, 2 * 8192)]),
    "geglu": (geglu, geglu_ref, [(300, 9216), (300, 9216)]),
    "geglu with erf": (
        lambda g, u: geglu(g, u, "none"),
        lambda g, u: geglu_ref(g, u, "none"),
        [(77, 3072), (77, 3072)],
    ),
    "cross_entropy 50257": (loss_case(cross_entropy, 50257), loss_case(cross_entropy_ref, 50257), [(64, 50257)]),
    "cross_entropy 151936": (loss_case(cross_entropy, 151936), loss_case(cross_entropy_ref, 151936), [(64, 151936)]),
    "cross_entropy, options": (
        loss_case(cross_entropy, 32000, **LOSS_OPTIONS),
        loss_case(cross_entropy_ref, 32000, **LOSS_OPTIONS),
        [(64, 32000)],
    ),
    "linear_cross_entropy, none": (
        linear_loss_case(linear_cross_entropy, 50257, "none"),
        linear_loss_case(linear_cross_entropy_ref, 50257, "none"),
        [(300, 576), (50257, 576)],
    ),
    "linear_cross_entropy, options": (
        linear_loss_case(linear_cross_entropy, 32000, "none", logit_scale=0.5, **LOSS_OPTIONS),
        linear_loss_case(linear_cross_entropy_ref, 32000, "none", logit_scale=0.5, **LOSS_OPTIONS),
        [(300, 512), (32000, 512)],
    ),
    "linear_cross_entropy, stats": (
        linear_loss_case(with_stats(linear_cross_entropy), 50257, "none", logit_scale=0.5, **LOSS_OPTIONS),
        linear_loss_case(with_stats(linear_cross_entropy_ref), 50257, "none", logit_scale=0.5, **LOSS_OPTIONS),
        [(300, 576), (50257, 576)],
    ),
}


def inputs_of(name):
    shapes = CASES[name][2]
    scale = shapes[-1][-1] ** -0.5 if name.startswith("linear") else 1.0  # logits of size one
    return [leaf(*shape, scale=scale if i else 1.0) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_against_the_formula(name, dtype, poisoned_memory):
    ours, formula, _ = CASES[name]
    assert_close_to_truth(ours, formula, inputs_of(name), dtype)


@pytest.mark.parametrize("name", CASES)
def test_repeats_bitwise(name):
    inputs = [x.detach().bfloat16().requires_grad_() for x in inputs_of(name)]
    first, again = (run_with_gradients(CASES[name][0], inputs) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("vocabulary", [50257, 32001])
def test_rows_of_logits_that_begin_anywhere(vocabulary, dtype, poisoned_memory):
    """One after the other, without padding; those of CASES lie in a wider buffer."""
    ours, formula = (loss_case(op, vocabulary) for op in (cross_entropy, cross_entropy_ref))
    logits = torch.randn(64, vocabulary, device=DEVICE, requires_grad=True)
    assert_close_to_truth(ours, formula, [logits], dtype)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_the_summed_linear_loss(dtype):
    ours, formula = (linear_loss_case(op, 50257, "sum") for op in (linear_cross_entropy, linear_cross_entropy_ref))
    # The sum is one number, in which the errors of the rows may happen to cancel: its floor is one rounding of the dtype.
    floor = torch.finfo(dtype).eps / 2
    assert_close_to_truth(ours, formula, [leaf(300, 576), leaf(50257, 576, scale=576**-0.5)], dtype, floor=floor)


@pytest.mark.parametrize("vocabulary", [32000, 50257, 151936])
def test_statistics_of_flat_and_peaked_rows(vocabulary):
    """Beside a gradient: log sum p^2 runs from -log V to 0, whichever block of the row the peak is in, never NaN."""
    rises = torch.tensor([0.0, 12.0, 80.0, 80.0, 80.0, 1e4], device=DEVICE)
    peaks = torch.tensor([0, 7, 0, vocabulary // 2, vocabulary - 1, 70], device=DEVICE)
    weight = torch.zeros(vocabulary, 6, device=DEVICE)
    weight[peaks, torch.arange(6, device=DEVICE)] = rises
    p, mean = weight.double().T.softmax(-1), weight.double().mean(0)
    hidden, targets = torch.eye(6, device=DEVICE), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    _, stats = linear_cross_entropy(hidden, weight.requires_grad_(), targets, return_stats="all")
    # Both are differences of logarithms below 24, in fp32.
    torch.testing.assert_close(stats.log_sum_sq_probs, p.square().sum(-1).log().float(), rtol=0, atol=4e-6)
    torch.testing.assert_close(stats.mean_logit, mean.float(), rtol=1e-6, atol=0)
    assert (stats.log_sum_sq_probs <= 0).all() and (stats.log_sum_sq_probs[2:] == 0).all()


# ---- attention ---------------------------------------------------------------------------------------------------

ATTENTION = {  # name -> (query heads, key heads, head dim, options)
    **{f"head dim {dim}": (4, 2, dim, {}) for dim in (16, 32, 64, 80, 96, 128, 256)},
    "8 heads, 1 key head": (8, 1, 64, {}),
    "window": (4, 2, 128, dict(window=70)),
    "softcap": (4, 2, 128, dict(softcap=5.0)),
    "short documents, 64": (4, 2, 64, dict(mean_length=50.0)),
    "short documents, 128": (4, 2, 128, dict(mean_length=50.0)),
}


def attention(op, bounds, **options):
    if op is flash_attention_ref:
        options = {
            key: value for key, value in options.items() if key not in ("mean_length", "deterministic", "shared")
        }
    return lambda q, k, v: op(q, k, v, *bounds, **options)


def attention_inputs(lengths, heads, kv_heads, head_dim, dtype=torch.float32):
    T = sum(lengths)
    q, k, v = (leaf(T, n, head_dim).detach().to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads))
    return [q, k, v], [bound.to(DEVICE) for bound in bounds_of(lengths)]


@pytest.mark.parametrize("deterministic", [False, True], ids=["one pass", "deterministic"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_against_the_formula(name, dtype, deterministic, poisoned_memory):
    if dtype == torch.float32 and name not in ("head dim 64", "head dim 128", "window"):
        pytest.skip("fp32 has one configuration for all head dims")
    heads, kv_heads, head_dim, options = ATTENTION[name]
    inputs, bounds = attention_inputs(PACKED, heads, kv_heads, head_dim)
    ours = attention(flash_attention, bounds, deterministic=deterministic, shared=False, **options)
    assert_close_to_truth(ours, attention(flash_attention_ref, bounds, **options), inputs, dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_whole_documents_with_and_without_a_list_of_tiles(head_dim):
    inputs, bounds = attention_inputs(PACKED, 4, 2, head_dim, torch.bfloat16)
    plain, listed = (
        run_with_gradients(attention(flash_attention, bounds, deterministic=True, shared=shared), inputs)
        for shared in (False, True)
    )
    for key in plain:  # the same tiles in the same order, by two programs that the compiler may round apart
        assert relative_error(listed[key], plain[key]) < 2**-9, key


@pytest.mark.parametrize("deterministic", [False, True], ids=["one pass", "deterministic"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", [{}, dict(softcap=5.0), dict(mean_length=50.0)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_pairs_that_share_their_prompt(head_dim, options, dtype, deterministic, poisoned_memory):
    """The same as their answers one by one, each with a copy of the prompt, whose gradients add up."""
    if dtype == torch.float32 and (options or head_dim != 64):
        pytest.skip("fp32 has one configuration for all head dims")
    prompts, answers = [1, 63, 130, 300], [1, 5, 64, 129]
    pairs = [(p, n, answers[(i + j) % 4]) for i, p in enumerate(prompts) for j, n in enumerate(answers)]
    items = [item for i, pair in enumerate(pairs) for item in (pair, [(17,), (1,), (140,), (70,)][i % 4])]
    *bounds, copies, where, alone = shared_prompts(items)
    bounds, copies, where = [bound.to(DEVICE) for bound in bounds], copies.to(DEVICE), where.to(DEVICE)
    one_by_one = attention(flash_attention_ref, [bound.to(DEVICE) for bound in bounds_of(alone)], **options)
    inputs = [leaf(len(where), heads, head_dim) for heads in (2, 1, 1)]
    assert_close_to_truth(
        attention(flash_attention, bounds, deterministic=deterministic, **options),
        lambda q, k, v: one_by_one(q[copies], k[copies], v[copies])[where],
        inputs,
        dtype,
    )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_over_one_long_document(head_dim):
    inputs, bounds = attention_inputs([4096], 2, 1, head_dim)
    ours, formula = (attention(op, bounds) for op in (flash_attention, flash_attention_ref))
    assert_close_to_truth(ours, formula, inputs, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_attention_repeats_bitwise_if_asked(head_dim):
    """The one-pass gradient, whose sums come in any order, differs by rounding only."""
    inputs, bounds = attention_inputs([1000, 24, 2048, 1024], 8, 2, head_dim, torch.bfloat16)
    repeatable = attention(flash_attention, bounds, deterministic=True)
    first, *others = (run_with_gradients(repeatable, inputs) for _ in range(3))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    for _ in range(3):
        quick = run_with_gradients(attention(flash_attention, bounds), inputs)
        assert torch.equal(quick["output 0"], first["output 0"])
        for key in first:  # 2^-8 is one rounding to bf16, which the sums' order may turn
            assert relative_error(quick[key], first[key]) < 2**-8, key


def assert_each_is_close(results, expected):
    """Every number by itself: a few that were read before they were written would be lost in a norm."""
    for key, value in expected.items():
        # Two programs round apart, by less than 1 % of the usual size; what is stale is off by as much as it is.
        torch.testing.assert_close(results[key], value, rtol=2**-4, atol=float(value.float().std()) * 2**-4, msg=key)


@pytest.mark.parametrize("deterministic", [False, True], ids=["one pass", "deterministic"])
@pytest.mark.parametrize("how", ["halves", "interleaved", "norms", "short documents"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_a_rotary_embedding_inside_of_attention(head_dim, how, deterministic, poisoned_memory):
    """Threads write what others read: q before the first product, dk after the last."""
    inputs, bounds = attention_inputs(PACKED, 8, 2, head_dim, torch.bfloat16)
    angle = torch.arange(sum(PACKED), device=DEVICE)[:, None] * 10.0 ** -torch.linspace(
        0, 4, head_dim // 2, device=DEVICE
    )
    rotary = dict(cos=angle.cos(), sin=angle.sin(), interleaved=how == "interleaved")
    if how == "norms":
        inputs += [leaf(head_dim).detach().bfloat16().requires_grad_() for _ in "qk"]
    options = dict(deterministic=deterministic, shared=False, mean_length=50.0 if how == "short documents" else None)

    def run(is_inside):
        def call(q, k, v, *weights):
            turn = rotary | {f"{name}_norm": (weight, 1e-6, 0.0) for name, weight in zip("qk", weights)}
            if is_inside:
                copies = q.clone(), k.clone()  # to be turned where they lie
                return flash_attention(*copies, v, *bounds, rotary=turn, may_overwrite=True, **options)
            return flash_attention(*rope(q, k, **turn), v, *bounds, **options)

        return run_with_gradients(call, inputs)

    assert_each_is_close(run(True), run(False))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_layers_of_attention_one_after_another(head_dim):
    """dq is added to what the kernel of the layer above has set to zero; the middle layer has other shapes and finds nothing."""
    inputs, bounds = attention_inputs([300, 24, 188], 8, 2, head_dim, torch.bfloat16)

    def layers(deterministic):
        def call(q, k, v):
            attend = attention(flash_attention, bounds, deterministic=deterministic)
            q = q + attend(q, k, v)
            q = q + attend(q, k, v)
            q = q + attend(q[:, :4], k, v).repeat(1, 2, 1)
            q = q + attend(q, k, v)
            return q + attend(q, k, v)

        return run_with_gradients(call, inputs)

    repeatable = layers(True)
    for _ in range(2):
        assert_each_is_close(layers(False), repeatable)


@pytest.mark.parametrize("deterministic", [False, True], ids=["one pass", "deterministic"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_nothing_leaks_between_documents(head_dim, deterministic):
    inputs, bounds = attention_inputs(PACKED, 4, 2, head_dim, torch.bfloat16)
    ours = attention(flash_attention, bounds, deterministic=deterministic)
    before = run_with_gradients(ours, inputs)
    a, b = sum(PACKED[:3]), sum(PACKED[:4])  # the document that changes
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[a:b] = torch.randn_like(x[a:b]) * 30
    after = run_with_gradients(ours, [x.requires_grad_() for x in changed])
    others = torch.ones(sum(PACKED), dtype=torch.bool, device=DEVICE)
    others[a:b] = False
    for key in before:
        if not deterministic and key == "gradient of input 0":  # of q: sums whose order changes from run to run
            assert relative_error(after[key][others], before[key][others]) < 2**-8
        else:
            assert torch.equal(after[key][others], before[key][others]), key

    leaves = [x.detach().requires_grad_() for x in inputs]  # a gradient for this document alone reaches no other
    for gradient in torch.autograd.grad(ours(*leaves)[a:b].float().sum(), leaves):
        assert not gradient[others].any() and gradient[a:b].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_short_convolution(dtype, poisoned_memory):
    start, _ = (bound.to(DEVICE) for bound in bounds_of(PACKED))
    assert_close_to_truth(
        lambda x, weight: causal_conv1d(x, weight, None, start, activation="silu"),
        lambda x, weight: causal_conv1d_ref(x, weight, None, start, activation="silu"),
        [leaf(len(start), 6144), leaf(6144, 4)],
        DTYPES[dtype],
    )


@pytest.mark.parametrize("heads", [(2, 4, 128, 128), (1, 2, 96, 192)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_gated_delta_rule(dtype, heads, poisoned_memory):
    """Beside bf16, g and beta are fp32, and so are their gradients: of products in TF32, which has 11 bits."""
    (Hk, Hv, Dk, Dv), (start, end) = heads, (bound.to(DEVICE) for bound in bounds_of([1, 63, 64, 65, 150, *[1] * 9]))
    q, k, v = (leaf(len(start), *shape) for shape in [(Hk, Dk), (Hk, Dk), (Hv, Dv)])
    g, beta = ((factor * leaf(len(start), Hv).detach().sigmoid()).requires_grad_() for factor in (-0.5, 1.0))
    inputs, wide = [q, k, v, g, beta], dtype == "fp32"
    assert_close_to_truth(
        lambda *tensors: gated_delta_rule(*tensors, start, end),
        lambda *tensors: gated_delta_rule_ref(*tensors, start, end),
        inputs,
        [DTYPES[dtype]] * 3 + [torch.float32] * 2,
        floor=2e-6 if wide else 3e-3,  # fp32: sums of 128 numbers in other orders, through the chunks
    )
    results = []
    for factor in (1.0, 1e4):  # the third document changes
        other = [x.detach().clone() for x in inputs]
        other[2][64:128] *= factor
        results.append(
            run_with_gradients(lambda *x: gated_delta_rule(*x, start, end), [x.requires_grad_() for x in other])
        )
    own = (start == 64).cpu()
    assert all(torch.equal(results[0][name].cpu()[~own], results[1][name].cpu()[~own]) for name in results[0])


def test_packed_equals_one_by_one():
    inputs, bounds = attention_inputs(PACKED, 4, 2, 128, torch.bfloat16)
    packed = run_with_gradients(attention(flash_attention, bounds, deterministic=True), inputs)
    first = 0
    for length in PACKED[:11]:
        some = slice(first, first + length)
        alone, own = attention_inputs([length], 4, 2, 128, torch.bfloat16)
        alone = [x[some].detach().requires_grad_() for x in inputs]
        out = flash_attention(*alone, *own, deterministic=True)
        # Other tiles, other order of sums: one rounding to bf16.
        assert relative_error(out, packed["output 0"][some]) < 2**-8
        first += length


def test_one_graph_serves_every_packing():
    """The grids depend on the number of tokens alone, and no kernel asks the host anything."""
    need_cuda()
    inputs, bounds = attention_inputs([400, 624], 8, 2, 128, torch.bfloat16)
    others, other_bounds = attention_inputs([1, 63, 700, 60, 200], 8, 2, 128, torch.bfloat16)
    upstream = torch.randn_like(inputs[0])

    def step(leaves, bounds):
        out = flash_attention(*leaves, *bounds, deterministic=True)
        return out, *torch.autograd.grad(out, leaves, upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled and warmed up before anything is captured
        step(inputs, bounds)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(inputs, bounds)
    with torch.no_grad():
        for mine, new in zip([*inputs, *bounds], [*others, *other_bounds]):
            mine.copy_(new)
    graph.replay()
    for replayed, expected in zip(results, step(others, other_bounds)):
        assert torch.equal(replayed, expected)


# ---- what only a GPU can show --------------------------------------------------------------------------------------


def forward_and_backward(name):
    """(call, inputs) of one of CASES or of the attention."""
    if name.startswith("attention"):
        inputs, bounds = attention_inputs(PACKED, 4, 2, 128, torch.bfloat16)
        return attention(flash_attention, bounds, deterministic="deterministic" in name), inputs
    return CASES[name][0], [x.detach().bfloat16().requires_grad_() for x in inputs_of(name)]


@pytest.mark.parametrize("name", [*CASES, "attention", "attention, deterministic"])
def test_nobody_waits_for_the_gpu(name):
    need_cuda()
    call, inputs = forward_and_backward(name)

    def step():
        outputs = call(*inputs)
        outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
        torch.autograd.grad(outputs, inputs, [x.detach() for x in outputs])

    step()  # what is loaded and compiled at a first call may wait
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_linear_loss_takes_the_memory_of_one_chunk():
    """4,096 rows of a vocabulary of 128,256: 1.3 GB beside the gradients and one fp32 gradient of the weight."""
    need_memory(12)
    T, D, V = 4096, 4096, 128256
    hidden = torch.randn(T, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(V, D, device=DEVICE, dtype=torch.bfloat16) / 64).requires_grad_()
    targets = torch.randint(V, (T,), device=DEVICE)
    for _ in range(2):  # the first call allocates cuBLAS's workspace
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = linear_cross_entropy(hidden, weight, targets)
        gradients = torch.autograd.grad(loss, [hidden, weight])
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
    returned = sum(x.nbytes for x in gradients)
    assert extra - returned - 4 * V * D <= 1.3 * GB, f"{extra / GB:.2f} GB, {returned / GB:.2f} of it returned"
    assert 11 < loss.item() / T < 13  # log V = 11.8 and half the variance of the logits


def test_offsets_beyond_two_to_the_31():
    """The last rows of a tensor with more elements than an int32 counts are computed like the same rows alone."""
    need_memory(32)
    T, V = 2**31 // 128256 + 64, 128256
    logits = torch.randn(T, V, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.randint(V, (T,), device=DEVICE)

    def both(logits, labels):
        logits = logits.detach().requires_grad_()
        losses = cross_entropy(logits, labels, shift=False, reduction="none")
        return losses.detach(), *torch.autograd.grad(losses.sum(), logits)

    tail = slice(T - 16, T)
    for whole, alone in zip(both(logits, labels), both(logits[tail].clone(), labels[tail])):
        assert torch.equal(whole[tail], alone)


@pytest.mark.parametrize("name", ["swiglu", "rms_norm", "layer_norm", "rope"])
def test_offsets_beyond_two_to_the_31_of_the_elementwise_ops(name):
    need_memory(40)
    D = 4096
    T = 2**31 // D + 64
    x = torch.randn(T, D, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(D, device=DEVICE, dtype=torch.bfloat16)

    def call(x):
        x = x.detach().requires_grad_()
        if name == "rope":
            heads = x.view(len(x), 32, 128)
            cos, sin = (t[-1:].expand(len(x), -1).contiguous().bfloat16() for t in table(100, 128))
            y = rope(heads, heads[:, :8], cos, sin)[0].reshape(x.shape)
        else:
            y = {
                "swiglu": lambda: swiglu(x, x),
                "rms_norm": lambda: rms_norm(x, weight, 1e-5),
                "layer_norm": lambda: layer_norm(x, weight, weight, 1e-5),
            }[name]()
        return y.detach(), *torch.autograd.grad(y, x, x.detach())

    tail = slice(T - 16, T)
    for whole, alone in zip(call(x), call(x[tail].clone())):
        assert torch.equal(whole[tail], alone)


@pytest.mark.parametrize("double_quant", [False, True], ids=["fp32 scales", "8-bit scales"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_four_bits_are_those_of_the_torch_path(kind, dtype, double_quant):
    """The reference is bit-compatible with bitsandbytes."""
    quantize, dequantize = {"nf4": (quantize_nf4, dequantize_nf4), "fp4": (quantize_fp4, dequantize_fp4)}[kind]
    w = (torch.randn(1031, 1027, device=DEVICE) * 0.02).to(dtype)  # blocks cross the rows, and the last one is ragged
    ours = quantize(w, double_quant=double_quant)
    with use_backend("torch"):
        theirs = quantize(w, double_quant=double_quant)
        back = dequantize(theirs)
    assert torch.equal(ours.packed, theirs.packed)
    if not double_quant:  # the mean of the scales may be summed in another order
        assert torch.equal(ours.absmax, theirs.absmax)
    assert torch.equal(dequantize(theirs), back)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_eight_bits_are_those_of_the_torch_path(dtype):
    w = (torch.randn(777, 4096, device=DEVICE) * 0.02).to(dtype)
    ours = quantize_int8(w)
    with use_backend("torch"):
        theirs = quantize_int8(w)
        back = dequantize_int8(theirs)
    assert torch.equal(ours.values, theirs.values) and torch.equal(ours.absmax, theirs.absmax)
    assert torch.equal(dequantize_int8(theirs), back)


# ---- the optimizer -------------------------------------------------------------------------------------------------


def adamw_arguments(dtype, is_8bit):
    """(params, grads, first moments, second moments), drawn anew at every call."""
    sizes = [(1,), (257,), (2 * 16384 + 5,), (300, 1024), (16, 64)]
    params = [torch.randn(size, device=DEVICE).to(dtype) for size in sizes]
    grads = [torch.randn(size, device=DEVICE).to(dtype) for size in sizes]

    def zeros(w):
        if not is_8bit:
            return torch.zeros_like(w, dtype=torch.float32)
        return torch.zeros_like(w, dtype=torch.uint8), torch.zeros(-(-w.numel() // 256), device=DEVICE)

    return params, grads, [zeros(w) for w in params], [zeros(w) for w in params]


def adamw_step(params, grads, m, v, step, clip):
    seed = 5 if params[0].dtype == torch.bfloat16 else None
    options = dict(
        lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, clip=clip, stochastic_rounding_seed=seed
    )
    adamw_(params, grads, m, v, step=step, **options)


def flat(states):
    parts = [part for state in states for part in (state if isinstance(state, tuple) else (state,))]
    return torch.cat([part.flatten().float() for part in parts])


@pytest.mark.parametrize("is_8bit", [False, True], ids=["fp32 moments", "8-bit moments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16, by chance"])
def test_adamw_is_that_of_the_formula(dtype, is_8bit):
    clip = torch.tensor(0.7, device=DEVICE)

    def run(backend):
        torch.manual_seed(0)
        arguments = adamw_arguments(dtype, is_8bit)
        with use_backend(backend):
            for step in (1, 2):
                adamw_step(*arguments, step, clip)
        return arguments

    (ours, _, *moments), (naive, _, *expected) = run("triton"), run("reference")
    for mine, theirs in zip(moments, expected):
        if is_8bit:  # a last bit may turn the code of a number that lies between two
            assert (flat(mine) != flat(theirs)).float().mean() <= 1e-3
        else:
            assert relative_error(flat(mine), flat(theirs)) <= 2e-7
    if dtype == torch.float32:
        assert relative_error(flat(ours), flat(naive)) <= (1e-4 if is_8bit else 2e-7)
    else:
        assert (flat(ours) != flat(naive)).float().mean() <= 1e-3


def test_nobody_waits_for_the_gpu_in_the_optimizer():
    need_cuda()
    arguments, clip = adamw_arguments(torch.bfloat16, True), torch.tensor(0.7, device=DEVICE)
    adamw_step(*arguments, 1, clip)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        adamw_step(*arguments, 2, clip)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", HALVES)
def test_a_product_adds_to_a_sum_in_fp32(dtype):
    """In place, and without rounding what it adds to its own dtype, 4e-3 of it in bf16."""
    total, x, weight = (torch.randn(*shape, device=DEVICE) for shape in ((1000, 576), (1000, 1536), (576, 1536)))
    x, weight = x.to(DTYPES[dtype]), weight.to(DTYPES[dtype])
    expected = total.double() + x.double() @ weight.double().T
    add_linear(total, x, weight)
    assert relative_error(total, expected) < 1e-5


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("is_dropped", [False, True], ids=["", "dropped"])
def test_adapters_beside_frozen_layers(rank, is_dropped):
    """Parts of joint results and of joint gradients are written in place, in bf16 and in fp32."""
    from test_lora_linears import make

    x, layers, factors, adapters = make("all", torch.float32, rank=rank)
    x, *factors = (t.detach().to(DEVICE).requires_grad_() for t in (x, *factors))
    layers = [(W.to(DEVICE), None) for W, _ in layers]

    def run(op, x, layers, factors, like=None):
        def values(x, *factors):
            chosen = adapters(*factors)
            return op(x, layers, chosen, dropped=[2 * x] * len(chosen) if is_dropped else [])

        return run_with_gradients(values, [x, *factors], like=like)

    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        naive = run(lora_linears_ref, x, layers, factors)
        with keep_copies():
            ours = run(lora_linears, x, layers, factors, like=naive)
    wide = lambda t: t.detach().to(torch.bfloat16).double()  # noqa: E731
    inputs = wide(x).requires_grad_(), [(wide(W), None) for W, _ in layers], [wide(f).requires_grad_() for f in factors]
    for name, truth in run(lora_linears_ref, *inputs, like=naive).items():
        assert relative_error(ours[name], truth) <= 2 * relative_error(naive[name], truth) + 1e-4, name


# ---- a step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"lora.r": 4}], ids=["full", "LoRA"])
@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_nobody_waits_for_the_gpu_in_a_step(tmp_path, trainer, keys):
    """But for its verdict, which is an event and no wait for all that was queued."""
    need_cuda()
    from test_dpo_run import write_pairs
    from tiny import MODEL, parts, train

    from minisft.loop import train_step

    shape, first = {"model.config": MODEL | {"head_dim": 16}}, str(tmp_path / "first")
    train(tmp_path, output_dir=first, **shape, **{"train.max_steps": 1})
    keys = keys | {"model.config": None, "model.model_name_or_path": f"{first}/model", "train.device": DEVICE}
    if trainer == "dpo":
        keys |= {"trainer_type": "dpo", "data.train_data": str(write_pairs(tmp_path / "pairs.jsonl"))}
    run, config = parts(tmp_path, **keys, **{"train.precision": "bf16"})
    steps = run.train.steps(0, 2, ahead=True)
    assert train_step(run, config.train, next(steps)).updated
    batches = next(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        assert train_step(run, config.train, batches).updated
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "lion"])
def test_refused_steps_leave_no_trace_in_the_optimizer(tmp_path, optimizer):
    """As in test_loop.py: AdamW's kernel finds out on the GPU."""
    from tiny import MODEL, parts, with_spoilt_loss

    from minisft.loop import train_step

    options = {"train.device": DEVICE, "train.deterministic": True, "model.config": MODEL | {"head_dim": 16}}
    spoil = {0: lambda total: total * math.inf, 2: lambda total: total + math.nan}  # the second has good gradients
    results = []
    for refused in (spoil, {}):
        run, config = parts(tmp_path, **options, **{"train.optim": optimizer, "train.on_nonfinite": "skip"})
        for step in sorted({*refused, 1, 3}):
            run.progress.step = step
            ready = with_spoilt_loss(run, spoil[step]) if step in refused else run
            assert train_step(ready, config.train, run.train.step(0, step)).updated == (step not in refused)
        results.append([run.model.state_dict(), *run.optimizer.state_dict()["state"].values()])
    for one, other in zip(*results, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "cohere", "gpt2"])
def test_a_whole_model_by_the_kernels_is_that_of_the_formulas(family):
    """Loss and every gradient of a tiny model over packed documents, in fp32, with activations that are kept and recomputed."""
    from tiny_models import CONFIGS, tiny

    from minisft.data.batch import document_bounds

    lengths, no_dropout = [5, 40, 1, 83, 31], dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    model = tiny(CONFIGS[family] | (no_dropout if family == "gpt2" else {})).to(DEVICE)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    start, end = (bound.to(DEVICE) for bound in document_bounds(cu, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths]).int().to(DEVICE)
    ids, targets = (torch.randint(53, (sum(lengths),)).to(DEVICE) for _ in range(2))

    def run(backend, whole=False, cheap=False):
        model.zero_grad()
        model.gradient_checkpointing = whole
        model.recompute_cheap_ops(cheap)
        with use_backend(backend):
            hidden = model(ids, positions, start, end)
            options = dict(
                bias=model.head_bias, softcap=model.config.logit_softcap, logit_scale=model.config.logit_scale
            )
            loss = linear_cross_entropy(hidden, model.head_weight, targets, **options)
            loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **gradients}

    formula = run("reference")
    for how in ({}, {"whole": True}, {"cheap": True}):
        ours = run("auto", **how)
        assert ours.keys() == formula.keys()
        for name in ours:
            if name.endswith(
                "k_proj.bias"
            ):  # adds the same to all scores of a query: its gradient is zero but for rounding
                continue
            # fp32 through two layers: the reference itself is some 1e-6 from fp64 (tests of the families on the CPU).
            assert relative_error(ours[name], formula[name]) < 2e-5, (how, name)
