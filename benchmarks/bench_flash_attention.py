"""How fast is attention over packed documents, and over one long one?

    python -m benchmarks.bench_flash_attention [--device cpu|cuda] [--quick] [--out DIR] [--only packed | --only document]

FLOPs as the field counts them: a document of L tokens costs 4 L^2 / 2 Hq Dh forward (two products over the causal half), and
2.5 times that backward (five products). Packed: documents of lognormal length, 32 query and 8 key heads. One document: as
many key as query heads, Hq Dh = 2048, as in the charts of the FlashAttention papers.

"torch varlen" is FlashAttention 2 as PyTorch has it, "flex" FlexAttention compiled with a mask of the documents, whose making
is timed in a case of its own, "flash" and "cudnn" are backends of scaled_dot_product_attention, which know one document
only. Attention with its rotary embedding is one op of ours, and, "apart", two.
"""

import inspect

import torch
import torch.nn.functional as F

from benchmarks.compare import Case, backend, main, normal, ours
from minisft.kernels.flash_attention import flash_attention
from minisft.kernels.rope import rope


def flops(lengths: list[int], Hq: int, Dh: int) -> dict:
    forward = sum(4 * L * L / 2 for L in lengths) * Hq * Dh
    return {"forward": (0, forward), "backward": (0, 2.5 * forward)}


def document_lengths(T: int, mean: int, seed: int = 0) -> list[int]:
    """Lognormal lengths that add up to T."""
    generator = torch.Generator("cpu").manual_seed(seed)
    raw = torch.randn(max(1, round(T / mean)), generator=generator, device="cpu").mul(0.7).exp()
    cuts = (raw.cumsum(0) / raw.sum() * T).round().long().tolist()
    return [b - a for a, b in zip([0, *cuts], cuts) if b > a]


def attend(q, k, v, start, end, cu, longest, mean_length):
    return flash_attention(q, k, v, start, end, mean_length=mean_length, shared=False)


def repeatable(q, k, v, start, end, cu, longest, mean_length):
    return flash_attention(q, k, v, start, end, mean_length=mean_length, shared=False, deterministic=True)


def with_rope(q, k, v, start, end, mean_length, cos, sin):
    rotary = {"cos": cos, "sin": sin}
    return flash_attention(q, k, v, start, end, mean_length=mean_length, shared=False, rotary=rotary)


def apart(q, k, v, start, end, mean_length, cos, sin):
    return flash_attention(*rope(q, k, cos, sin), v, start, end, mean_length=mean_length, shared=False)


def torch_varlen():
    from torch.nn.attention.varlen import varlen_attn

    signature = inspect.signature(varlen_attn)
    print(f"varlen_attn{signature}")
    options = {"window_size": (-1, 0)} if "window_size" in signature.parameters else {"is_causal": True}
    if "enable_gqa" in signature.parameters:
        options["enable_gqa"] = True
    return lambda q, k, v, start, end, cu, longest, _: varlen_attn(q, k, v, cu, cu, longest, longest, **options)


def document_mask(start, compiled):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b, h, query, key):
        return (start[query] == start[key]) & (query >= key)

    make = torch.compile(create_block_mask) if compiled else create_block_mask
    return make(visible, None, None, len(start), len(start), device=start.device)


def flex():
    from torch.nn.attention.flex_attention import flex_attention

    compiled, masks = torch.compile(flex_attention, dynamic=False), []

    def run(q, k, v, start, *_):
        if not masks:
            masks.append(document_mask(start, compiled=False))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, Dh]
        out = compiled(q, k, v, block_mask=masks[0], enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    return run


def flex_mask():
    return lambda start: document_mask(start, compiled=True).kv_indices


def dense(name: str):
    def make():
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def run(q, k, v, *_):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, Dh]
            with sdpa_kernel(SDPBackend[name]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)

        return run

    return make


def inputs_of(lengths: list[int], Hq: int, Hkv: int, Dh: int, dtype: torch.dtype) -> list:
    """q, k, v, start, end, cu_seqlens, and what the host knows: the longest and the mean length over the tokens."""
    T, counts = sum(lengths), torch.tensor(lengths)
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu[1:] = counts.cumsum(0)
    start, end = (bound.repeat_interleave(counts, output_size=T) for bound in (cu[:-1], cu[1:]))
    q, k, v = (normal(T, heads, Dh, dtype=dtype) for heads in (Hq, Hkv, Hkv))
    return [q, k, v, start, end, cu, max(lengths), sum(L * L for L in lengths) / T]


def cases(device: str, quick: bool) -> list[Case]:
    gpu, bf16, fp32 = device == "cuda", torch.bfloat16, torch.float32
    peers, found = {}, []
    if gpu:
        peers = {"triton, deterministic": backend("triton", repeatable), "torch varlen": torch_varlen}
        layouts = [("packed", 16384, mean, 32, 8, Dh, bf16) for Dh in (128, 64) for mean in (300, 1024, 2048)]
        layouts += [("one document", T, T, 2048 // Dh, 2048 // Dh, Dh, bf16) for Dh in (128, 64) for T in (8192, 16384)]
    else:
        layouts = [("packed", 2048, mean, 9, 3, 64, dtype) for mean, dtype in [(150, bf16), (500, bf16), (500, fp32)]]
        layouts += [("one document", 2048, 2048, 9, 3, 64, bf16)]
    for kind, T, mean, Hq, Hkv, Dh, dtype in layouts:
        with_table = gpu and mean == 2048
        if quick:
            T, mean, Hq, Hkv, Dh = 96, 96 if T == mean else 30, 2, 1 if Hq > Hkv else 2, 32
        lengths = document_lengths(T, mean)
        dense_peers = {"flash": dense("FLASH_ATTENTION"), "cudnn": dense("CUDNN_ATTENTION")}
        contenders = ours(device, attend, eager=T <= 4096) | peers
        if gpu and mean not in (300, 2048):  # its compiling takes long
            contenders |= {"flex": flex}
        if gpu and T == mean:
            contenders |= dense_peers
        size = f"mean length {T / len(lengths):.0f}, " if kind == "packed" else ""
        name = f"{kind}, head dim {Dh}, {size}{T} tokens, {Hq} + {Hkv} heads, {'bf16' if dtype == bf16 else 'fp32'}"

        def inputs(lengths=lengths, Hq=Hq, Hkv=Hkv, Dh=Dh, dtype=dtype):
            return inputs_of(lengths, Hq, Hkv, Dh, dtype)

        found.append(Case("flash_attention", name, inputs, contenders, flops(lengths, Hq, Dh)))
        if with_table:

            def inputs_with_table(inputs=inputs, T=T, Dh=Dh):
                q, k, v, start, end, _, _, mean_length = inputs()
                angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(Dh // 2) / (Dh // 2))  # [T, Dh / 2]
                return [q, k, v, start, end, mean_length, angles.cos(), angles.sin()]

            pair = {"one op": backend("triton", with_rope), "apart": backend("triton", apart)}
            found.append(Case("flash_attention and rope", name, inputs_with_table, pair, flops(lengths, Hq, Dh)))
    if gpu:
        lengths = document_lengths(96 if quick else 16384, 30 if quick else 1024)
        start = inputs_of(lengths, 1, 1, 1, bf16)[3].tolist()
        inputs = lambda: [torch.tensor(start)]  # noqa: E731
        name = f"packed, {len(start)} tokens: making FlexAttention's mask"
        found.append(Case("flex mask", name, inputs, {"flex": flex_mask}, {"forward": (0, 0)}))
    return found


if __name__ == "__main__":
    main(__doc__, cases)
