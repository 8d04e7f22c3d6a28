"""What does this device reach at all? A copy in memory, and bf16 matrix products.

    python -m benchmarks.bench_ceilings [--device cpu|cuda] [--quick] [--out DIR]

The first two cases are the rates that `percent` compares with (compare.py), so they are at 100 % but for the noise. The
others are products of a Llama-3.2-1B: to and from the hidden units of its feed-forward layers for 16,384 tokens, and the logits
of 4,096.
"""

import torch

from benchmarks.compare import Case, main


def cases(device: str, quick: bool) -> list[Case]:
    n, elements = (8192, 2**29) if device == "cuda" else (512, 2**22)
    products = [(n, n, n), (16384, 2048, 8192), (16384, 8192, 2048), (4096, 2048, 128256)]
    if quick or device == "cpu":
        n, elements, products = 64, 2**12, [(64, 64, 64)]

    def copy_inputs():
        return [torch.randn(elements), torch.empty(elements)]

    copy = {"torch": lambda: lambda x, out: out.copy_(x)}
    found = [Case("copy", f"{elements / 2**20:g} M fp32", copy_inputs, copy, {"forward": (8 * elements, 0)})]
    for m, k, n in products:

        def inputs(m=m, k=k, n=n):
            return [torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()]

        product = {"torch": lambda: lambda a, b: a @ b.T}
        found.append(Case("matmul", f"{m} x {k} x {n} bf16", inputs, product, {"forward": (0, 2 * m * k * n)}))
    return found


if __name__ == "__main__":
    main(__doc__, cases)
