"""Calls that launch every configuration of quantize and adamw, for the compile test.

No configuration depends on the architecture: all are compiled for sm_90, one of each kernel for sm_86, which has
the instructions of 80 and the memory of 120.
"""

import torch

from minisft.kernels.adamw import adamw_
from minisft.kernels.copies import keep_copies, weight_as
from minisft.kernels.quantize import (
    dequantize_fp4,
    dequantize_int8,
    dequantize_nf4,
    quantize_fp4,
    quantize_int8,
    quantize_nf4,
)


def quantize_cases(arch: int) -> None:
    if arch not in (86, 90):
        return
    w = torch.empty(64, 512, dtype=torch.bfloat16)
    dequantize_nf4(quantize_nf4(w))
    dequantize_int8(quantize_int8(w))
    if arch == 90:
        dequantize_fp4(quantize_fp4(w, double_quant=False))


def adamw_cases(arch: int) -> None:
    if arch not in (86, 90):
        return
    options = dict(step=2, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, clip=torch.tensor(1.0))
    for dtype, seed in [(torch.bfloat16, 1), (torch.float32, None)] if arch == 90 else [(torch.bfloat16, 1)]:
        w, g = torch.zeros(64, 512, dtype=dtype), torch.zeros(64, 512, dtype=dtype)
        wide = [w.float(), w.float()]
        narrow = [(torch.zeros(64, 512, dtype=torch.uint8), torch.zeros(128)) for _ in range(2)]
        for m, v in (wide, narrow):
            adamw_([w], [g], [m], [v], **options, stochastic_rounding_seed=seed)
        if dtype == torch.float32:
            with keep_copies():
                weight_as(w, torch.bfloat16)
            adamw_([w], [g], [wide[0]], [wide[1]], **options)
