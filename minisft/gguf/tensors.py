"""The weights of a GGUF file, dequantised one by one, in the layout of Hugging Face's files."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from minisft.errors import MODEL, UserError
from minisft.gguf.file import GgufFile, dequantized

if TYPE_CHECKING:
    from gguf import ReaderTensor

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PLACE = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<leaf>weight|bias)")
NOT_WEIGHTS = ("rope_freqs.weight",)  # config.py reads them


@dataclass(frozen=True)
class GgufTensor:
    """Stands for a FileTensor of weight_files.py."""

    path: Path
    name: str
    shape: list[int]
    dtype: str  # the one that read() gives
    stored: "ReaderTensor"
    num_permuted_heads: int = 0  # llama.cpp interleaves the halves of each head of q and k of Llama
    offset: float = 0.0  # llama.cpp adds 1 to the norms of Gemma

    def read(self) -> torch.Tensor:
        """fp32"""
        values = dequantized(self.stored)
        if self.num_permuted_heads:
            pairs = values.reshape(self.num_permuted_heads, -1, 2, *values.shape[1:])  # [H, Dh/2, 2, ...]
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        if self.offset:
            values = values - np.float32(self.offset)
        return torch.from_numpy(np.ascontiguousarray(values))


def gguf_tensors(file: GgufFile) -> dict[str, GgufTensor]:
    """{name without prefix: tensor}, as weight_files.read_headers returns it. Raises UserError (exit code MODEL) for a tensor
    that no part of the model stands for."""
    names = NAMES | (SANDWICH if file.architecture in ("gemma2", "gemma3") else {})
    ours, own, found = {theirs: name for name, theirs in names.items()}, file.own(), {}
    num_heads = own["attention.head_count"]
    heads = {"self_attn.q_proj": num_heads, "self_attn.k_proj": own.get("attention.head_count_kv", num_heads)}
    for name, stored in file.tensors.items():
        if name in NOT_WEIGHTS:
            continue
        place = PLACE.fullmatch(name)
        if place is None or place["module"] not in ours:
            problem, hint = f"{file.path}: the tensor {name} is not implemented", "start from the Hugging Face folder"
            raise UserError(problem, hint=hint, exit_code=MODEL)
        module, layer = ours[place["module"]], f"layers.{place['layer']}." if place["layer"] else ""
        is_norm = place["module"].endswith("norm")
        found[f"{layer}{module}.{place['leaf']}"] = GgufTensor(
            path=file.path,
            name=name,
            shape=[int(size) for size in reversed(stored.shape)],
            dtype="F32",
            stored=stored,
            num_permuted_heads=heads.get(module, 0) if file.architecture == "llama" else 0,
            offset=1.0 if file.architecture.startswith("gemma") and is_norm else 0.0,
        )
    return found
