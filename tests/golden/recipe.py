"""What the recorder and the test must agree on: the weights of the tiny models, their input, and the loss.

Nothing here is stored, everything follows from names. The numbers come from numpy's RandomState, whose stream is frozen
across versions, and from its uniform distribution, which uses no function of the C library: the same bits everywhere.
"""

import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH, VOCAB_SIZE = 40, 47  # longer than every window and every original context of the variants


def weight(variant: str, name: str, shape: list[int] | tuple[int, ...]) -> Tensor:
    """The fp32 values of the tensor `name` of a checkpoint.

    Norm weights are around 1 and biases around 0, but none is 1 or 0. Those of Nemotron, which multiplies by 1 + weight, are
    around 0: a gain of 2 a norm, which its squared ReLU squares, would amplify the oracle's own rounding to 1e-6. Matrices
    have a standard deviation of 0.25, with 32 inputs a gain of 1.4: attention is far from uniform, no unit is dead, and every
    term shows in the logits.
    """
    uniform = np.random.RandomState(zlib.crc32(f"{variant}/{name}".encode())).uniform(-1, 1, size=shape)
    if len(shape) == 2 and "norm" not in name:
        values = 0.43 * uniform
    else:
        values = 0.5 * uniform + (0 if name.endswith("bias") or variant.startswith("nemotron") else 1)
    return torch.from_numpy(values.astype(np.float32))


def input_ids() -> Tensor:
    """int64 [T]"""
    return torch.from_numpy(np.random.RandomState(0).randint(VOCAB_SIZE, size=LENGTH))


def masked_loss(logits: Tensor) -> Tensor:
    """Mean cross-entropy of predicting tokens 11 to 39, as if 0 to 10 were a prompt. logits: [T, V]."""
    return F.cross_entropy(logits[10:-1], input_ids()[11:])
