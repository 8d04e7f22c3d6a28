"""How near is a step of AdamW to the speed of memory?

    python -m benchmarks.bench_adamw [--device cpu|cuda] [--quick] [--out DIR]

The parameters are those of some Llama layers. At least a step must read weight, gradient and two moments and write all but
the gradient: 28 bytes a parameter in fp32, 22 with weights and gradients in bf16 (rounded stochastically), 10 with moments
in 8 bits. The clip factor is a tensor; PyTorch's step gets it as its inverse gradient scale.
"""

import torch

from benchmarks.compare import Case, main, ours
from minisft.kernels.adamw import adamw_

OPTIONS = dict(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
STATE_BLOCKSIZE = 256  # of the 8-bit moments


def bytes_moved(n: int, weight_bytes: int, bits: int) -> dict:
    moments = 4 * 4 if bits == 32 else 4 * (1 + 4 / STATE_BLOCKSIZE)  # two, read and written
    return {"forward": (n * (3 * weight_bytes + moments), 0)}


def shapes(layers: int, D: int) -> list[tuple[int, ...]]:
    """Of Llama layers with a quarter as many key heads as query heads."""
    return layers * [(D, D), (D // 4, D), (D // 4, D), (D, D), (4 * D, D), (4 * D, D), (D, 4 * D), (D,), (D,)]


def step(params, grads, exp_avgs, exp_avg_sqs, clip):
    seed = 7 if params[0].dtype == torch.bfloat16 else None
    adamw_(params, grads, exp_avgs, exp_avg_sqs, step=10, clip=clip, stochastic_rounding_seed=seed, **OPTIONS)
    return params


def torch_optim(**how):
    def make():
        from torch.optim.adamw import adamw

        steps = []  # a tensor for each parameter, in which it counts

        def run(params, grads, exp_avgs, exp_avg_sqs, clip):
            if not steps:
                steps.extend(torch.full((), 9.0, device=w.device) for w in params)
            if "fused" in how:
                how["grad_scale"] = 1 / clip
            else:
                torch._foreach_mul_(grads, clip)
            adamw(params, grads, exp_avgs, exp_avg_sqs, [], steps, **how, **OPTIONS, amsgrad=False, maximize=False)
            return params

        return run

    return make


def cases(device: str, quick: bool) -> list[Case]:
    gpu, found = device == "cuda", []
    all_shapes = shapes(1, 64) if quick else shapes(8, 2048) if gpu else shapes(2, 1024)
    n = sum(torch.Size(shape).numel() for shape in all_shapes)
    for label, dtype, bits in [("fp32", torch.float32, 32), ("bf16", torch.bfloat16, 32), ("bf16", torch.bfloat16, 8)]:

        def inputs(dtype=dtype, bits=bits):
            def moments(square):
                if bits == 32:
                    values = [torch.randn(shape) * 1e-3 for shape in all_shapes]
                    return [x * x for x in values] if square else values
                codes = [torch.randint(1, 255, shape, dtype=torch.uint8) for shape in all_shapes]
                return [(c, torch.rand(-(-c.numel() // STATE_BLOCKSIZE)) * (1e-6 if square else 1e-3)) for c in codes]

            params = [(torch.randn(shape) * 0.02).to(dtype) for shape in all_shapes]
            grads = [(torch.randn(shape) * 1e-3).to(dtype) for shape in all_shapes]
            return [params, grads, moments(False), moments(True), torch.tensor(0.5)]

        contenders = ours(device, step)
        if gpu and dtype == torch.float32:
            contenders |= {"torch, fused": torch_optim(fused=True), "torch, foreach": torch_optim(foreach=True)}
        name = f"{n / 1e6:.0f} M {label}, moments in {bits} bits, {len(all_shapes)} tensors"
        found.append(Case("adamw", name, inputs, contenders, bytes_moved(n, dtype.itemsize, bits)))
    return found


if __name__ == "__main__":
    main(__doc__, cases)
