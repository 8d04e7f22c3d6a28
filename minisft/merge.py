"""An adapter is added to its base, and the change of the logits is measured.

Each adapted matrix becomes W + s B A, added in fp32 and rounded once to the dtype that is written. If the run kept its base in 4
or 8 bits (quantization_config.json beside the adapter says so), W is the dequantised matrix that the adapter was trained on, and
not that of the base's files.

A merge can go wrong silently: the wrong base, an adapter that was never trained, a narrow dtype that rounds the adapter away. So
both models first process the same rows (held-out rows if the run's data is still there), and the largest difference of their
logits is reported. The merge is refused if the difference is too large, or if the adapter changes nothing.
"""

from dataclasses import replace
from pathlib import Path

import torch

from minisft.config.load import RESOLVED_NAME, load
from minisft.errors import MODEL, UserError
from minisft.model.decoder import Decoder
from minisft.model.lora import adapter_disabled, changed_by_merge, merge_adapter
from minisft.prepare.data import prepare_data
from minisft.prepare.options import prepare_tokenizer

# Largest error of the merged model's logits in fp32, relative to their norm: the same sums in another order.
TOLERANCE = 1e-5
PROBE_TOKENS = 512


def probe(model: Decoder, run: Path) -> tuple[str, tuple]:
    """(what the tokens are, inputs for both models): rows of the run's data if it is still there, else random tokens."""
    for folder in (run, run.parent):
        if (folder / RESOLVED_NAME).exists() and (folder / "checkpoints").exists():
            try:
                config = replace(load(folder / RESOLVED_NAME)[0], output_dir=str(folder), verbose=False)
                train, held_out, _ = prepare_data(config, prepare_tokenizer(config)[0])
            except UserError:  # the data is elsewhere now
                break
            batch = next(iter(held_out.values()), train).step(0, 0)[0]
            length = min(batch.num_tokens, PROBE_TOKENS)
            end = batch.end[:length].clamp(max=length)
            name = "tokens of held-out rows" if held_out else "tokens of training rows"
            return name, (batch.input_ids[:length], batch.position_ids[:length], batch.start[:length], end)
    length = min(PROBE_TOKENS, model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length, dtype=torch.int32)
    return "random tokens", (tokens, positions, torch.zeros_like(positions), torch.full_like(positions, length))


def merge(model: Decoder, dtype: torch.dtype, folder: Path, run: Path) -> list[str]:
    """Merge in place; returns lines about the change of the logits. Raises UserError if the merged model is not the adapted one,
    or the adapter changes nothing."""
    rows, inputs = probe(model, run)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model.logits(model(*inputs)).float()

    adapted = logits()
    with adapter_disabled(model):
        base = logits()
    changed = relative(adapted, base)
    if changed == 0:
        hint = "the adapter was never trained, or it belongs to another model"
        raise UserError(f"{folder}: the adapter changes nothing", hint=hint, exit_code=MODEL)
    changing = tuple(f"{name}." for name in changed_by_merge(model))
    merge_adapter(model)
    merged = logits()
    error = relative(merged, adapted)
    if not error <= TOLERANCE:
        raise UserError(
            f"{folder}: the merged model is not the adapted one: its logits differ by {error:.1e} (at most {TOLERANCE:g})",
            hint="please report this; the adapter itself is untouched",
            exit_code=MODEL,
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(changing):  # the others are copied from the base as they are
                parameter.copy_(parameter.to(dtype))
    rounded = logits()
    lines = [
        f"merged     on {len(inputs[0])} {rows} the logits of adapter and merged model differ by at most "
        f"{(merged - adapted).abs().max():.1e} ({error:.1e} of their norm); the adapter moves them by {changed:.1e}"
    ]
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        lines.append(f"rounded    to {name} they differ by {relative(rounded, adapted):.1e} of their norm")
    if relative(rounded, adapted) >= changed:
        raise UserError(
            f"{folder}: rounded to {dtype}, the merged weights lose what the adapter learnt: {lines[-1]}",
            hint="--dtype fp32, or keep the adapter apart",
            exit_code=MODEL,
        )
    return lines


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """norm(a - b) / norm(b)"""
    return ((a - b).norm() / b.norm()).item()
