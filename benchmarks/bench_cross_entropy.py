"""How near is the cross-entropy of existing logits to the speed of memory?

    python -m benchmarks.bench_cross_entropy [--device cpu|cuda] [--quick] [--out DIR]

At least it must read the logits; backward, read them again and write their gradient. A quarter of the rows is not scored.
Libraries that make the gradient in the forward, over the logits, need less: theirs are compared by "both".
"""

import torch
import torch.nn.functional as F

from benchmarks.compare import Case, main, normal, ours
from minisft.kernels.cross_entropy import cross_entropy


def bytes_moved(T: int, V: int, itemsize: int) -> dict:
    return {"forward": (T * V * itemsize, 0), "backward": (2 * T * V * itemsize, 0)}


def usual():
    return lambda logits, labels: F.cross_entropy(logits.float(), labels, reduction="sum")


def liger():
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def run(logits, labels):
        return LigerCrossEntropyFunction.apply(logits, labels, None, -100, 0.0, 0.0, "sum")[0]

    return run


def cases(device: str, quick: bool) -> list[Case]:
    gpu, bf16, fp32 = device == "cuda", torch.bfloat16, torch.float32
    sizes = [(8192, 128256, bf16), (8192, 50257, bf16)] if gpu else [(1024, 49152, bf16), (1024, 49152, fp32)]
    found = []
    for T, V, dtype in [(32, V // 128, dtype) for _, V, dtype in sizes] if quick else sizes:

        def inputs(T=T, V=V, dtype=dtype):
            labels = torch.randint(V, (T,))
            labels[::4] = -100
            return [normal(T, V, dtype=dtype), labels]

        contenders = ours(device, lambda x, labels: cross_entropy(x, labels, shift=False, reduction="sum"))
        contenders |= {"F.cross_entropy, fp32": usual, "liger": liger} if gpu else {}
        name = f"{T} x {V} {'bf16' if dtype == bf16 else 'fp32'}"
        found.append(Case("cross_entropy", name, inputs, contenders, bytes_moved(T, V, dtype.itemsize)))
    return found


if __name__ == "__main__":
    main(__doc__, cases)
