"""The embedding: PyTorch's values and gradients, and a gradient that is added where one lies."""

import pytest
import torch
from tolerance import run_with_gradients

from minisft.kernels.embedding import embedding, embedding_ref


@pytest.mark.parametrize("shape", [(7,), (2, 5), (0,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_the_reference(shape, dtype):
    ids = torch.randint(4, shape)  # some repeat
    weight = torch.randn(9, 3).to(dtype).requires_grad_()
    ours, expected = (run_with_gradients(op, [ids, weight]) for op in (embedding, embedding_ref))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "ids", [[[4, 0], [4, 8]], [[8] * 40], [[]], 3], ids=["some repeat", "one token", "none", "a number"]
)
def test_a_gradient_that_is_there_is_added_to_in_place(ids):
    ids = torch.tensor(ids, dtype=torch.int64)
    weight, dy = torch.nn.Parameter(torch.randn(9, 3)), torch.randn(*ids.shape, 3)
    weight.grad = torch.randn(9, 3)
    memory, before = weight.grad.data_ptr(), weight.grad.clone()
    embedding(ids, weight).backward(dy)
    assert weight.grad.data_ptr() == memory
    (gradient,) = torch.autograd.grad(embedding_ref(ids, weight), weight, dy)
    assert torch.equal(weight.grad, before + gradient)


def test_the_gradient_of_bf16_weights_is_summed_in_fp32():
    """It comes rounded to bf16 from its backward pass, whether it is the first one or not."""
    weight = torch.nn.Parameter(torch.randn(9, 3).bfloat16())
    weight.grad_dtype = torch.float32
    ids, dy = torch.tensor([4, 0, 4]), torch.randn(3, 3).bfloat16()
    for _ in range(2):
        embedding(ids, weight).backward(dy)
    (gradient,) = torch.autograd.grad(embedding_ref(ids, weight), weight, dy)
    assert weight.grad.dtype == torch.float32 and torch.equal(weight.grad, 2 * gradient.float())
