"""quantize on the Triton kernels, in the interpreter: the same bits as the reference."""

from dataclasses import replace

import pytest
import torch
from test_quantize import FOUR_BITS, SHAPES, same
from tolerance import padded_with_nan

from minisft.kernels import common
from minisft.kernels.common import use_backend
from minisft.kernels.quantize import (
    BLOCKSIZES,
    FP4,
    NF4,
    _stretches,
    dequantize_fp4,
    dequantize_int8,
    dequantize_nf4,
    quantize_fp4,
    quantize_int8,
    quantize_nf4,
)

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_4bit(quant_type, w, blocksize=64, double_quant=True):
    """Both directions against the reference, to the bit."""
    _, quantize, dequantize = FOUR_BITS[quant_type]
    q = quantize(w, blocksize, double_quant)
    with use_backend("reference"):
        naive = quantize(w, blocksize, double_quant)
    same(q, naive)
    for dtype in DTYPES:
        with use_backend("reference"):
            expected = dequantize(naive, dtype)
        back = dequantize(q, dtype)
        assert torch.equal(back, expected) and back.dtype == dtype and back.shape == w.shape


@pytest.mark.covers(2)
@pytest.mark.parametrize("quant_type", FOUR_BITS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 4097)], ids=str)  # the last: over the end of a program
def test_4_bits_equal_the_reference(quant_type, double_quant, shape):
    check_4bit(quant_type, torch.randn(shape), double_quant=double_quant)


@pytest.mark.parametrize("quant_type", FOUR_BITS)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(quant_type, blocksize):
    check_4bit(quant_type, torch.randn(3 * blocksize - 5), blocksize)


@pytest.mark.parametrize("quant_type", FOUR_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_strides_and_neighbours(quant_type, dtype):
    """A transposed view, and one out of a buffer of NaN: its rows, and nothing around them."""
    w = torch.randn(30, 77, dtype=dtype)
    check_4bit(quant_type, w.T)
    check_4bit(quant_type, padded_with_nan(w))


@pytest.mark.parametrize("quant_type", FOUR_BITS)
def test_what_lies_beside_the_packed_bytes_is_not_read(quant_type):
    """Bytes and scales cut out of buffers that hold something else, at odd addresses."""
    _, quantize, dequantize = FOUR_BITS[quant_type]
    q = quantize(torch.randn(999), double_quant=False)
    packed = torch.full((len(q.packed) + 5, 1), 255, dtype=torch.uint8)
    packed[3:-2] = q.packed
    absmax = torch.full((len(q.absmax) + 2,), float("nan"))
    absmax[1:-1] = q.absmax
    assert torch.equal(dequantize(replace(q, packed=packed[3:-2], absmax=absmax[1:-1])), dequantize(q))


@pytest.mark.parametrize("quant_type", FOUR_BITS)
def test_every_value_of_the_table_and_every_tie(quant_type):
    """Ties, and their neighbours in fp32, in a block whose absmax is 1."""
    table = torch.tensor(NF4 if quant_type == "nf4" else FP4).sort().values
    ties = (table[1:] + table[:-1]) / 2
    near = [torch.nextafter(ties, torch.full_like(ties, to)) for to in (-1.0, 1.0)]
    check_4bit(quant_type, torch.cat([table, ties, *near]), 64, double_quant=False)


@pytest.mark.parametrize("quant_type", FOUR_BITS)
def test_the_lookup_of_an_index(quant_type):
    """No stretch has two midpoints, and none lies so near to an edge that the rounding of 14 x matters."""
    table = torch.tensor(NF4 if quant_type == "nf4" else FP4[:8]).sort().values
    midpoints = (table[1:] + table[:-1]) / 2
    assert len((14 * midpoints).round().unique()) == len(midpoints)
    assert (14 * midpoints - (14 * midpoints).round()).abs().max() < 0.49
    below, midpoint = _stretches(quant_type, torch.device("cpu"))
    assert sorted(midpoint[midpoint.isfinite()].tolist()) == midpoints.tolist()
    stretch = torch.arange(-14, 15)
    assert torch.equal(below[stretch], (midpoints < (stretch[:, None] - 0.5) / 14).sum(1).int())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on the way to fp16
@pytest.mark.parametrize("quant_type", FOUR_BITS)
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1e-30, 1e30], ids=str)
def test_tiny_and_huge_blocks(quant_type, scale):
    check_4bit(quant_type, torch.randn(130) * scale, double_quant=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_block_with_a_broken_number_is_broken_and_no_other(bad):
    w = torch.randn(4, 64)
    w[2, 5] = bad
    back = dequantize_nf4(quantize_nf4(w, double_quant=False))
    assert back.isfinite().all(-1).tolist() == [True, True, False, True]
    if bad != bad:
        assert back[2].isnan().all() and quantize_int8(w).absmax.isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("shape", [(1, 1), (20, 33), (3, 2048), (2, 5001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bits_equal_the_reference(shape, dtype):
    w = padded_with_nan(torch.randn(shape, dtype=dtype))
    w[-1] = 0
    w[0, 0] = 1e-42
    q = quantize_int8(w)
    with use_backend("reference"):
        same(quantize_int8(w), q)
    for to in DTYPES:
        with use_backend("reference"):
            expected = dequantize_int8(q, to)
        assert torch.equal(dequantize_int8(q, to), expected)


def test_8_bits_round_a_half_to_even():
    w = torch.cat([torch.tensor([127.0]), torch.arange(-126.5, 127)])[None]
    assert torch.equal(quantize_int8(w).values[0], torch.round(w[0]).to(torch.int8))


@pytest.mark.parametrize("double_quant", [False, True])
def test_scales_need_not_lie_side_by_side(double_quant):
    """As where several weights' scales are columns of one tensor."""
    apart = lambda x: x if x is None or not x.ndim else x.repeat_interleave(2)[::2]  # noqa: E731
    for q, dequantize in (
        (quantize_nf4(torch.randn(20, 33), double_quant=double_quant), dequantize_nf4),
        (quantize_int8(torch.randn(20, 33)), dequantize_int8),
    ):
        names = [name for name in ("absmax", "nested_absmax", "nested_table") if hasattr(q, name)]
        strided = replace(q, **{name: apart(getattr(q, name)) for name in names})
        assert not strided.absmax.is_contiguous() and torch.equal(dequantize(strided), dequantize(q))


def test_float64_is_for_torch():
    w = torch.randn(64, dtype=torch.float64)
    for quantize, dequantize in ((quantize_nf4, dequantize_nf4), (quantize_fp4, dequantize_fp4)):
        with pytest.raises(ValueError, match="do not know float64"):
            quantize(w)
        with pytest.raises(ValueError, match="a result in float64"):
            dequantize(quantize(w.float()), torch.float64)
    with pytest.raises(ValueError, match="a result in float64"):
        dequantize_int8(quantize_int8(w.float()[None]), torch.float64)


def test_the_kernels_were_run(monkeypatch):
    """All of the above would hold on the torch path as well."""
    monkeypatch.setattr(common, "TRITON_OPS", frozenset())
    with pytest.raises(ValueError, match="quantize_nf4 has no Triton kernel"):
        quantize_nf4(torch.ones(4))
