"""The interpreter that the kernels are tested in: what `make_fast` replaces still checks what Triton checks."""

import importlib
from importlib.util import find_spec

import pytest
import torch

from minisft.kernels import common

if find_spec("triton") is None or not common.INTERPRET:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

tl = importlib.import_module("triton.language")
InterpretedFunction = importlib.import_module("triton.runtime.interpreter").InterpretedFunction


def _arithmetic(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "sub":
        out = x - y
    else:
        out = x * y
    tl.store(out_ptr + i, out)


def run(x: torch.Tensor, y: torch.Tensor, operation: str) -> torch.Tensor:
    out = torch.empty_like(x)
    InterpretedFunction(_arithmetic)[(1,)](x, y, out, operation, len(x))
    return out


@pytest.mark.parametrize("operation, x, y", [("add", 2**31 - 1, 1), ("sub", -(2**31), 1), ("mul", 2**16 + 1, 2**16)])
def test_32_bits_wrap_as_on_a_gpu_and_64_do_not(operation, x, y):
    """adamw draws its random numbers so."""
    x, y = torch.tensor([3, x]), torch.tensor([4, y])
    exact = getattr(torch, operation)(x, y)
    assert torch.equal(run(x, y, operation), exact)
    narrow = run(x.int(), y.int(), operation)
    assert narrow[0] == exact[0] and narrow[1] != exact[1] and (narrow[1].long() - exact[1]) % 2**32 == 0


@pytest.mark.parametrize("length", [3, 12])
def test_a_block_has_a_power_of_two_of_elements(length):
    x = torch.ones(length)
    for _ in range(2):  # nothing is remembered of what was refused
        with pytest.raises(Exception, match="power of 2"):
            run(x, x, "add")


def _outer_sum(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + rows)
    total = 1 + (x[:, None] if AXIS else x) + columns.to(tl.float32) * 2
    tl.store(out_ptr + rows[:, None] * COLUMNS + columns, total)


def test_shapes_are_joined_as_numpy_joins_them_or_refused():
    x, out = torch.randn(4), torch.empty(4, 8)
    for _ in range(2):  # the second time from what is remembered
        InterpretedFunction(_outer_sum)[(1,)](x, out, 4, 8, 1)
        assert torch.equal(out, (1 + x[:, None]) + torch.arange(8.0) * 2)
        with pytest.raises(Exception, match="incompatible dimensions"):
            InterpretedFunction(_outer_sum)[(1,)](x, out, 4, 8, 0)


def test_bf16_is_rounded_to_the_nearest_as_torch_rounds():
    x, y = torch.randn(2, 1024).bfloat16()
    for operation in ("add", "sub", "mul"):
        assert torch.equal(run(x, y, operation), getattr(torch, operation)(x, y))
