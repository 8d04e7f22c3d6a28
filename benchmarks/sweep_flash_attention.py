"""Which tiles, warps and stages of attention are fastest on this GPU?

    python -m benchmarks.sweep_flash_attention [--quick] [--out DIR] [--seconds S] [--only "fwd_kernel head dim 128"]

Each case is an entry of CONFIGS (kernels/flash_attention_configs.py), its contenders are that entry ("as it is") and those
of CANDIDATES for this GPU, one after the other in every round: a row of kernels_cuda.csv for each. Head counts, FLOPs and
documents as in bench_flash_attention. Whoever finds a better one writes it into CONFIGS.
"""

from collections.abc import Callable

import torch

from benchmarks.bench_flash_attention import attend, document_lengths, flops, inputs_of
from benchmarks.compare import Case, backend, main
from minisft.kernels.common import arch_of
from minisft.kernels.flash_attention_configs import CANDIDATES, CONFIGS

LAYOUTS = [("one document of 4096", 4096, 4096), ("packed, mean length 1024", 16384, 1024)]  # name, tokens, mean


def contender(path: tuple, config: dict) -> Callable[[], Callable]:
    """Attention with `config` in the place that path names, until another contender puts its own there: the backward of a
    round follows its forward."""
    table = CONFIGS
    for key in path[:-1]:
        table = table[key]

    def run(*inputs):
        table[path[-1]] = config
        return attend(*inputs)

    return backend("triton", run)


def cases(device: str, quick: bool, candidates: dict | None = None) -> list[Case]:
    """candidates: instead of those of CANDIDATES for this device, for tests."""
    arch, found = arch_of(torch.empty(0, device=device)), []
    if candidates is None:
        candidates = {path: configs for path, configs in CANDIDATES.items() if arch in path}
    for path, configs in candidates.items():
        now = CONFIGS
        for key in path:
            now = now[key]
        contenders = {"as it is": contender(path, now)}
        contenders |= {" ".join(f"{k}={v}" for k, v in c.items()): contender(path, c) for c in configs}
        head_dim = next(key for key in path if key in (64, 128))
        for layout, T, mean in LAYOUTS:
            Hq, Hkv = 2048 // head_dim, 512 // head_dim
            if quick:
                T, mean, Hq, Hkv = 96, 96 if T == mean else 40, 2, 1
            lengths = document_lengths(T, mean)

            def inputs(lengths=lengths, sizes=(Hq, Hkv, head_dim)):
                return inputs_of(lengths, *sizes, torch.bfloat16)

            name = f"{path[0].strip('_')} head dim {head_dim}, {layout} tokens, {Hq} + {Hkv} heads"
            found.append(Case("flash_attention sweep", name, inputs, contenders, flops(lengths, Hq, head_dim)))
    return found


if __name__ == "__main__":
    main(__doc__, cases)
