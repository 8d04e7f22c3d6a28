"""quantize: the formats of bitsandbytes, bit by bit, and what they lose."""

from dataclasses import fields

import pytest
import torch

from minisft.kernels import quantize as module
from minisft.kernels.common import use_backend
from minisft.kernels.quantize import (
    FP4,
    NF4,
    dequantize_fp4,
    dequantize_int8,
    dequantize_nf4,
    dynamic_table,
    quantize_fp4,
    quantize_int8,
    quantize_nf4,
)

FOUR_BITS = {"nf4": (NF4, quantize_nf4, dequantize_nf4), "fp4": (FP4, quantize_fp4, dequantize_fp4)}
SHAPES = [(1,), (3, 3), (64,), (65,), (7, 33), (5, 13, 2), (300, 64), (301, 67)]  # the last two cross 256 scales


def same(a, b):
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, f.name


@pytest.mark.parametrize("quant_type", FOUR_BITS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_to_the_bit(quant_type, double_quant, shape):
    _, quantize, dequantize = FOUR_BITS[quant_type]
    w = torch.randn(shape).bfloat16()
    fast = quantize(w, double_quant=double_quant)
    with use_backend("reference"):
        naive = quantize(w, double_quant=double_quant)
        expected = dequantize(naive)
    same(fast, naive)
    assert torch.equal(dequantize(fast), expected)
    assert expected.shape == shape and expected.dtype == w.dtype
    assert fast.packed.shape == ((w.numel() + 1) // 2, 1) and fast.absmax.shape == (-(-w.numel() // 64),)


@pytest.mark.parametrize("quant_type", FOUR_BITS)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_each_number_becomes_the_nearest_value(quant_type, blocksize):
    table, quantize, dequantize = FOUR_BITS[quant_type]
    w = torch.randn(50, 100)
    got = dequantize(quantize(w, blocksize, double_quant=False))
    for block, back in zip(w.flatten().split(blocksize), got.flatten().split(blocksize)):
        values = torch.tensor(table) * block.abs().max()
        nearest = (block[:, None] - values).abs().amin(-1)
        # Equal but for the rounding of the division and the multiplication, 2^-24 each.
        torch.testing.assert_close((block - back).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("quant_type", FOUR_BITS)
def test_values_of_the_table_survive(quant_type):
    """A block that holds the table times a power of two comes back as it was, and in the documented order."""
    table, quantize, dequantize = FOUR_BITS[quant_type]
    w = torch.tensor(table) * 4
    q = quantize(w, double_quant=False)
    assert torch.equal(dequantize(q), w)
    if quant_type == "nf4":  # even elements are in the high nibble
        assert q.packed[:, 0].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
        assert q.absmax.tolist() == [4]


def test_tables():
    assert list(NF4) == sorted(NF4) and NF4[0] == -1 and NF4[7] == 0 and NF4[15] == 1
    assert [round(12 * x, 6) for x in FP4[:8]] == [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert [-x for x in FP4[8:]] == list(FP4[:8])
    table = dynamic_table()
    assert len(table.unique()) == 256 and torch.equal(table, table.sort().values)
    assert table[-1] == 1 and (table == 0).sum() == 1
    assert torch.equal(-table[:127].flip(0), table[128:-1])  # symmetric but for 0 and 1


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_ties(backend):
    """Exactly on a midpoint: down in NF4, towards zero in FP4."""
    nf4, fp4 = torch.tensor(NF4), torch.tensor(FP4[:8]).sort().values
    with use_backend(backend):
        w = torch.cat([torch.ones(1), (nf4[1:] + nf4[:-1]) / 2])
        index = quantize_nf4(w, double_quant=False).packed[:, 0].long()
        assert torch.stack([index >> 4, index & 15], 1).flatten()[1:].tolist() == list(range(15))
        ties = (fp4[1:] + fp4[:-1]) / 2
        w = torch.cat([torch.ones(2), ties, -ties])
        assert torch.equal(dequantize_fp4(quantize_fp4(w, double_quant=False))[2:], torch.cat([fp4[:-1], -fp4[:-1]]))


def test_fp4_keeps_the_sign_of_what_becomes_zero():
    q = quantize_fp4(torch.tensor([1.0, 0.001, -0.001, 0.0]), double_quant=False)
    assert q.packed[:, 0].tolist() == [0x30, 0x80]


@pytest.mark.parametrize("quant_type", FOUR_BITS)
def test_an_odd_last_element_is_padded_with_zero(quant_type):
    _, quantize, _ = FOUR_BITS[quant_type]
    odd, even = quantize(torch.tensor([1.0, 0.5, 1.0])), quantize(torch.tensor([1.0, 0.5, 1.0, 0.0]))
    assert torch.equal(odd.packed, even.packed)


@pytest.mark.parametrize("quant_type", FOUR_BITS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_zeros_and_a_constant(quant_type, double_quant):
    _, quantize, dequantize = FOUR_BITS[quant_type]
    for value in (0.0, -2.5):
        w = torch.full((100,), value)
        torch.testing.assert_close(dequantize(quantize(w, double_quant=double_quant)), w)


def test_double_quantisation_changes_little():
    """Each scale is off by at most half of the dynamic table's widest gap, times the largest deviation from the mean."""
    w = torch.randn(200, 256)
    plain, nested = quantize_nf4(w, double_quant=False), quantize_nf4(w)
    assert torch.equal(plain.packed, nested.packed) and nested.absmax.dtype == torch.uint8
    deviation = (plain.absmax - plain.absmax.mean()).abs().max()
    # The widest gap is the one below 1; table values are at most 1, so the weights are off by no more than the scales.
    bound = deviation * dynamic_table().diff().max() / 2 + 1e-6
    assert (dequantize_nf4(plain) - dequantize_nf4(nested)).abs().max() <= bound


def test_normal_weights_lose_less_in_nf4():
    """That is what its table is for."""
    w = torch.randn(256, 256)
    loss = {
        name: (dequantize(quantize(w)) - w).norm() / w.norm() for name, (_, quantize, dequantize) in FOUR_BITS.items()
    }
    assert loss["nf4"] < loss["fp4"]
    # 16 values over +-2.5 standard deviations: an error uniform in a gap of 0.3 is about 0.3 / sqrt(12) = 0.09.
    assert 0.05 < loss["nf4"] < 0.12


def test_bits_per_weight():
    q = quantize_nf4(torch.randn(1024, 1024))
    size = q.packed.nbytes + q.absmax.nbytes + q.nested_absmax.nbytes
    assert 8 * size / 1024**2 == 4 + 8 / 64 + 32 / (64 * 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_dtypes(dtype):
    w = torch.randn(8, 32, dtype=dtype)
    for quantize, dequantize in ((quantize_nf4, dequantize_nf4), (quantize_int8, dequantize_int8)):
        q = quantize(w)
        assert dequantize(q).dtype == dtype
        assert torch.equal(dequantize(q, torch.float32).to(dtype), dequantize(q))  # rounded last, once


def test_int8(monkeypatch):
    monkeypatch.setattr(module, "STRETCH", 70)  # two rows at a time
    w = torch.randn(20, 33)
    w[3] = 0
    q = quantize_int8(w)
    back = dequantize_int8(q)
    with use_backend("reference"):
        same(quantize_int8(w), q)
        assert torch.equal(dequantize_int8(q), back)
    assert q.values.dtype == torch.int8 and q.values.abs().amax(-1).tolist() == [127 * (i != 3) for i in range(20)]
    assert torch.equal(q.absmax, w.abs().amax(-1)) and (back[3] == 0).all()
    # Half a step of the row's scale, and two roundings of fp32.
    assert ((back - w).abs() <= q.absmax[:, None] * (0.5 / 127 + 1e-6)).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="blocksize 63: expected one of 32, 64"):
        quantize_nf4(torch.ones(64), blocksize=63)
    for bad in (torch.ones(4, dtype=torch.int64), torch.ones(0)):
        with pytest.raises(ValueError, match="expected floating numbers"):
            quantize_fp4(bad)
    with pytest.raises(ValueError, match=r"\(4,\): expected floating numbers \[rows, columns\]"):
        quantize_int8(torch.ones(4))
    with pytest.raises(ValueError, match="use dequantize_fp4"):
        dequantize_nf4(quantize_fp4(torch.ones(4)))
    with pytest.raises(ValueError, match="use dequantize_nf4"):
        dequantize_fp4(quantize_nf4(torch.ones(4)))
