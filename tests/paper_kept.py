"""What the Triton kernels' forward pass keeps for the backward, counted on the GPU that exists on paper, beside the formulas of
minisft/plan/activations.py: prints {family: [[saved, formula] ...]}, bytes a token, as JSON.

Triton's interpreter cannot be on in this process, so tests/test_plan.py starts it as one of its own.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton  # noqa: F401  before the kernels are imported: they use Triton where the program has imported it
from tiny_models import CONFIGS, stream
from torch import nn

from benchmarks.paper_gpu import PaperGPU
from minisft import runtime
from minisft.cards import CARDS
from minisft.model.decoder import Decoder
from minisft.model.families import from_hf
from minisft.model.lora import LoraLinear, apply_lora
from minisft.model.lora_options import LoraOptions
from minisft.model.model_config import ModelConfig, without_dropout
from minisft.plan.activations import Precision, Site, kept_by_block, kept_outside, shared_by_layers


def shape_of(family: str) -> ModelConfig:
    """Heads of 16 features, which the kernels of attention take. Without dropout, whose mask on paper is that of a CPU."""
    sizes = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64}
    sizes |= {"head_dim": 16} if "head_dim" in CONFIGS[family] else {}
    return without_dropout(from_hf(CONFIGS[family] | sizes))


def saved(gpu: PaperGPU, model: Decoder, tokens: int) -> int:
    """Bytes of the floating tensors that the forward pass keeps, each storage once, weights left out; and of its result."""
    kept = {}

    def pack(x):
        if x.is_floating_point() and x.is_cuda:
            kept[x.untyped_storage()._cdata] = x
        return x

    positions, start, end = (x.to(gpu.device) for x in stream([tokens]))
    ids = torch.zeros(tokens, dtype=torch.long).to(gpu.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), runtime.autocast(gpu.device, "bf16"):
        hidden = model(ids, positions, start, end, shared=False)
    kept[hidden.untyped_storage()._cdata] = hidden
    for p in model.parameters():  # the first forward pass moves those of bf16 side by side
        kept.pop(p.untyped_storage()._cdata, None)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def sites_in(block: nn.Module, use_dora: bool = False) -> list[Site]:
    modules = {name: module for name, module in block.named_modules() if isinstance(module, LoraLinear)}
    firsts = {m.lora_A: name for name, m in reversed(modules.items())}  # of those that share A
    ranks = {name: 4 if firsts[m.lora_A] == name else 0 for name, m in modules.items()}
    return [Site(n, *reversed(m.weight.shape), ranks[n], False, use_dora, False) for n, m in modules.items()]


def both(shape: ModelConfig, weights: torch.dtype, selective: bool, lora: dict | None = None) -> tuple[float, float]:
    """(saved, formula). lora: options of adapters."""
    with PaperGPU(CARDS["H200"]) as gpu:
        torch.set_default_dtype(weights)
        with gpu.device:
            model = Decoder(shape).train()
        torch.set_default_dtype(torch.float32)
        sites = [None] * shape.num_layers
        if lora is not None:
            apply_lora(model, LoraOptions(r=4, **lora))
            model.embed_tokens.requires_grad_(True)  # else the first block keeps less
            sites = [sites_in(block, **lora) for block in model.layers]
        model.recompute_cheap_ops(selective)
        few, many = saved(gpu, model, 64), saved(gpu, model, 128)
    p = Precision(weights.itemsize, 2)
    options = {"is_gpu": True, "selective": selective}
    blocks = [kept_by_block(shape, i, p, sites=sites[i], **options) for i in range(shape.num_layers)]
    formula = sum(blocks) + kept_outside(shape, p, is_gpu=True) + shared_by_layers(shape, p)
    return (many - few) / 64, formula


def main() -> None:
    cases = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
    cases += [(torch.float32, False, {}), (torch.bfloat16, False, {}), (torch.float32, False, {"use_dora": True})]
    print(json.dumps({family: [both(shape_of(family), *case) for case in cases] for family in CONFIGS}))


if __name__ == "__main__":
    main()
