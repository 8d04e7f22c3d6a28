"""The launch configurations of flash_attention: tiles, warps and stages, and what else could be tried.

The registers and the shared memory of one program decide how many of them a multiprocessor runs at a time, and both are
known from compiling alone (tests/compiled_kernels.csv). Which choice is fastest is not: CANDIDATES has what
`benchmarks/bench_flash_attention.py --sweep` times against the entries of CONFIGS.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from minisft.kernels.common import INTERPRETER, arch_of, smallest_fit

# By architecture (86 is that of 99 KB, INTERPRETER has tiles so small that small tests have many), then by head dim: the
# first entry that is large enough. Hopper has two sizes of tiles. Short documents waste less in small ones; a softcap and
# dropout need the registers that these leave free. maxnreg=128 lets two programs of 8 warps share 65,536 registers.
CONFIGS = {
    "_flash_attention_fwd_kernel": {
        INTERPRETER: {
            64: dict(BLOCK_M=32, BLOCK_N=16, TMA=False),
            128: dict(BLOCK_M=16, BLOCK_N=32, TMA=True),
            256: dict(BLOCK_M=16, BLOCK_N=16, TMA=False),
        },
        80: {
            64: dict(BLOCK_M=128, BLOCK_N=64, TMA=False, num_warps=4, num_stages=3),
            128: dict(BLOCK_M=128, BLOCK_N=64, TMA=False, num_warps=8, num_stages=3),
            256: dict(BLOCK_M=64, BLOCK_N=32, TMA=False, num_warps=8, num_stages=2),
        },
        86: {
            64: dict(BLOCK_M=64, BLOCK_N=64, TMA=False, num_warps=4, num_stages=2),
            128: dict(BLOCK_M=64, BLOCK_N=32, TMA=False, num_warps=4, num_stages=2),
            256: dict(BLOCK_M=64, BLOCK_N=32, TMA=False, num_warps=8, num_stages=2),
        },
        90: {
            64: {
                "small": dict(BLOCK_M=64, BLOCK_N=64, TMA=True, num_warps=4, num_stages=3),
                "large": dict(BLOCK_M=128, BLOCK_N=64, TMA=True, num_warps=8, num_stages=3, maxnreg=128),
            },
            96: dict(BLOCK_M=128, BLOCK_N=64, TMA=False, num_warps=8, num_stages=3),
            128: {
                "small": dict(BLOCK_M=64, BLOCK_N=64, TMA=True, num_warps=4, num_stages=3),
                "large": dict(BLOCK_M=128, BLOCK_N=64, TMA=True, num_warps=8, num_stages=2, maxnreg=128),
            },
            256: dict(BLOCK_M=128, BLOCK_N=64, TMA=True, num_warps=8, num_stages=2),
        },
        100: {
            64: dict(BLOCK_M=128, BLOCK_N=64, TMA=True, num_warps=8, num_stages=3),
            96: dict(BLOCK_M=128, BLOCK_N=64, TMA=False, num_warps=8, num_stages=3),
            128: dict(BLOCK_M=128, BLOCK_N=64, TMA=True, num_warps=8, num_stages=3),
            256: dict(BLOCK_M=128, BLOCK_N=32, TMA=True, num_warps=8, num_stages=2),
        },
        "fp32": dict(BLOCK_M=32, BLOCK_N=32, TMA=False, num_warps=4, num_stages=1),
    },
    "_flash_attention_delta_kernel": dict(BLOCK_M=32, num_warps=4),
    "_flash_attention_bwd_kv_kernel": {
        "one pass": {
            INTERPRETER: {
                64: dict(BLOCK_M=16, BLOCK_N=32, TMA=False),
                128: dict(BLOCK_M=32, BLOCK_N=16, TMA=False),
            },
            90: {
                64: {
                    "small": dict(BLOCK_M=64, BLOCK_N=64, TMA=True, num_warps=4, num_stages=2),
                    "large": dict(BLOCK_M=64, BLOCK_N=128, TMA=True, num_warps=8, num_stages=2),
                },
                128: {
                    "small": dict(BLOCK_M=64, BLOCK_N=64, TMA=True, num_warps=8, num_stages=2),
                    "large": dict(BLOCK_M=64, BLOCK_N=128, TMA=True, num_warps=8, num_stages=2),
                },
            },
            100: {  # its accumulators lie in a memory of their own, of 512 columns, and not in registers
                64: dict(BLOCK_M=64, BLOCK_N=128, TMA=True, num_warps=8, num_stages=2),
                128: dict(BLOCK_M=64, BLOCK_N=64, TMA=True, num_warps=8, num_stages=2),
            },
        },
        "split": {
            INTERPRETER: {
                64: dict(BLOCK_M=32, BLOCK_N=16, TMA=False),
                128: dict(BLOCK_M=16, BLOCK_N=32, TMA=True),
                256: dict(BLOCK_M=16, BLOCK_N=16, TMA=False),
            },
            80: {
                64: dict(BLOCK_M=64, BLOCK_N=64, TMA=False, num_warps=4, num_stages=2),
                128: dict(BLOCK_M=32, BLOCK_N=64, TMA=False, num_warps=8, num_stages=2),
                256: dict(BLOCK_M=32, BLOCK_N=32, TMA=False, num_warps=8, num_stages=1),
            },
            86: {
                64: dict(BLOCK_M=64, BLOCK_N=64, TMA=False, num_warps=4, num_stages=2),
                128: dict(BLOCK_M=32, BLOCK_N=64, TMA=False, num_warps=8, num_stages=2),
                256: dict(BLOCK_M=32, BLOCK_N=32, TMA=False, num_warps=8, num_stages=1),
            },
            90: {
                64: dict(BLOCK_M=64, BLOCK_N=128, TMA=True, num_warps=8, num_stages=2),
                96: dict(BLOCK_M=64, BLOCK_N=64, TMA=False, num_warps=8, num_stages=2),
                128: dict(BLOCK_M=64, BLOCK_N=64, TMA=True, num_warps=8, num_stages=2),
                256: dict(BLOCK_M=32, BLOCK_N=64, TMA=True, num_warps=8, num_stages=2),
            },
            "fp32": dict(BLOCK_M=32, BLOCK_N=32, TMA=False, num_warps=4, num_stages=1),
        },
    },
    "_flash_attention_bwd_q_kernel": {
        INTERPRETER: {
            64: dict(BLOCK_M=16, BLOCK_N=32, TMA=False),
            128: dict(BLOCK_M=32, BLOCK_N=16, TMA=True),
            256: dict(BLOCK_M=16, BLOCK_N=16, TMA=False),
        },
        80: {
            64: dict(BLOCK_M=128, BLOCK_N=32, TMA=False, num_warps=8, num_stages=2),
            128: dict(BLOCK_M=64, BLOCK_N=64, TMA=False, num_warps=8, num_stages=2),
            256: dict(BLOCK_M=32, BLOCK_N=32, TMA=False, num_warps=4, num_stages=1),
        },
        86: {
            64: dict(BLOCK_M=64, BLOCK_N=64, TMA=False, num_warps=4, num_stages=2),
            128: dict(BLOCK_M=64, BLOCK_N=64, TMA=False, num_warps=8, num_stages=2),
            256: dict(BLOCK_M=32, BLOCK_N=32, TMA=False, num_warps=4, num_stages=1),
        },
        90: {
            64: dict(BLOCK_M=128, BLOCK_N=64, TMA=True, num_warps=8, num_stages=2),
            96: dict(BLOCK_M=128, BLOCK_N=64, TMA=False, num_warps=8, num_stages=2),
            128: dict(BLOCK_M=128, BLOCK_N=64, TMA=True, num_warps=8, num_stages=2),
            256: dict(BLOCK_M=64, BLOCK_N=32, TMA=True, num_warps=4, num_stages=2),
        },
        "fp32": dict(BLOCK_M=32, BLOCK_N=32, TMA=False, num_warps=4, num_stages=1),
    },
}
# What the sweep times in the place of an entry of CONFIGS: keys that lead to it -> configurations.
CANDIDATES = {
    ("_flash_attention_fwd_kernel", 86, 64): [
        dict(BLOCK_M=128, BLOCK_N=64, TMA=False, num_warps=8, num_stages=2),
        dict(BLOCK_M=64, BLOCK_N=32, TMA=False, num_warps=4, num_stages=3),
    ],
    ("_flash_attention_fwd_kernel", 86, 128): [
        dict(BLOCK_M=128, BLOCK_N=32, TMA=False, num_warps=8, num_stages=3),
        dict(BLOCK_M=64, BLOCK_N=64, TMA=False, num_warps=4, num_stages=1),
    ],
    ("_flash_attention_fwd_kernel", 90, 64, "large"): [
        dict(BLOCK_M=128, BLOCK_N=64, TMA=True, num_warps=4, num_stages=3),
        dict(BLOCK_M=128, BLOCK_N=128, TMA=True, num_warps=8, num_stages=2),
        dict(BLOCK_M=64, BLOCK_N=128, TMA=True, num_warps=4, num_stages=2),
        dict(BLOCK_M=64, BLOCK_N=64, TMA=True, num_warps=4, num_stages=3),
    ],
    ("_flash_attention_fwd_kernel", 90, 128, "large"): [
        dict(BLOCK_M=128, BLOCK_N=64, TMA=True, num_warps=8, num_stages=3),
        dict(BLOCK_M=128, BLOCK_N=128, TMA=True, num_warps=8, num_stages=2),
        dict(BLOCK_M=128, BLOCK_N=32, TMA=True, num_warps=8, num_stages=4, maxnreg=128),
        dict(BLOCK_M=64, BLOCK_N=64, TMA=True, num_warps=4, num_stages=2),
    ],
    ("_flash_attention_bwd_kv_kernel", "one pass", 90, 64, "large"): [
        dict(BLOCK_M=128, BLOCK_N=128, TMA=True, num_warps=8, num_stages=2),
        dict(BLOCK_M=64, BLOCK_N=128, TMA=True, num_warps=8, num_stages=3),
        dict(BLOCK_M=64, BLOCK_N=64, TMA=True, num_warps=4, num_stages=2),
        dict(BLOCK_M=64, BLOCK_N=64, TMA=True, num_warps=8, num_stages=2),
    ],
    ("_flash_attention_bwd_kv_kernel", "one pass", 90, 128, "large"): [
        dict(BLOCK_M=64, BLOCK_N=64, TMA=True, num_warps=8, num_stages=2),
        dict(BLOCK_M=64, BLOCK_N=64, TMA=True, num_warps=4, num_stages=2),
    ],
}
SAME_AS = {89: 86, 100: 90, 120: 86}  # architectures without entries of their own
SHORT = 400  # tokens: documents of a smaller mean length get the small tiles


def config_for(table: dict, q: Tensor, small: bool) -> dict | None:
    """The launch configuration for q, None where there is none."""
    arch = arch_of(q)
    if q.dtype == torch.float32 and arch != INTERPRETER:
        return table.get("fp32")
    by_head_dim = table.get(arch) or table.get(SAME_AS.get(arch), {})
    if max(by_head_dim, default=0) < q.shape[-1]:
        return None
    entry = smallest_fit(by_head_dim, q.shape[-1])
    return entry if "BLOCK_M" in entry else entry["small" if small else "large"]


@contextmanager
def candidate(path: tuple, config: dict) -> Iterator[None]:
    """Launches with `config` in the place that the keys of path lead to in CONFIGS."""
    *keys, last = path
    table = CONFIGS
    for key in keys:
        table = table[key]
    kept, table[last] = table[last], config
    try:
        yield
    finally:
        table[last] = kept
