"""`python -m minisft export RUN OUT --merge`: write a trained adapter and its base as one plain model.

RUN is a run's output folder or an adapter folder, ours or PEFT's; OUT a new folder that transformers, vLLM and the rest
load. Each adapted matrix becomes W + s B A, added in fp32 and rounded once to the dtype that is written. If the run kept its
base in 4 or 8 bits (quantization_config.json beside the adapter says so), W is the dequantised matrix that the adapter was
trained on, and not that of the base's files.

A merge can go wrong silently: the wrong base, an adapter that was never trained, a narrow dtype that rounds the adapter
away. So both models first process the same rows (held-out rows if the run's data is still there), and the largest difference
of their logits is reported. The merge is refused if the difference is too large, or if the adapter changes nothing.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.config.sections import KEYS
from minisft.config.values import choices
from minisft.errors import MODEL, UserError
from minisft.files import checked_path

if TYPE_CHECKING:
    import torch

    from minisft.model.decoder import Decoder

# Largest error of the merged model's logits in fp32, relative to their norm: the same sums in another order.
TOLERANCE = 1e-5
PROBE_TOKENS = 512


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="minisft export", description="Merge a trained adapter into its base model.")
    parser.add_argument("run", help="the output folder of a run, or an adapter folder")
    parser.add_argument("out", help="a new folder for the model")
    parser.add_argument("--merge", action="store_true", required=True, help="write base and adapter as one model")
    parser.add_argument(
        "--dtype", choices=choices(KEYS["checkpoint.save_dtype"].type), default="bf16", help="of the written weights"
    )
    arguments = parser.parse_args(argv)
    run, out = Path(checked_path(arguments.run, "the run")), Path(checked_path(arguments.out, "the new folder"))
    if os.path.lexists(out):
        raise UserError(f"{out} exists", hint="name a new folder")

    from minisft.atomic_folder import MANIFEST, atomic_folder, read_manifest, remove_leftovers
    from minisft.console import wrap
    from minisft.data.tokenizer import load_tokenizer
    from minisft.export import model_bytes, room_for, write_whole
    from minisft.model.adapter_files import CONFIG_FILE, load_adapted, model_folder
    from minisft.model.start import find_start
    from minisft.runtime import DTYPES
    from minisft.strict_json import read_json

    folder = model_folder(run)
    if not (folder / CONFIG_FILE).exists():
        hint = "a run without [lora] wrote a whole model: use it as it is"
        raise UserError(f"{folder} holds no adapter (no {CONFIG_FILE})", hint=hint, exit_code=MODEL)
    remove_leftovers(out.parent)  # of an export that was killed

    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else {}
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    base = find_start(folder).folder
    model = load_adapted(folder, max_length=manifest.get("max_length"))
    print(wrap(merge(model, DTYPES[arguments.dtype], folder, run)))
    if (folder / "generation_config.json").exists():
        model.generation_config = read_json(folder / "generation_config.json")
    asked = {key: manifest[key] for key in ("prompt", "chat_template_kwargs", "max_length") if key in manifest}
    dtype = DTYPES[arguments.dtype]
    needed, hint = model_bytes(model, tokenizer, dtype, base), "free some space, or choose another folder"
    with room_for(out, needed, hint=hint), atomic_folder(out, asked) as temporary:
        lines = write_whole(model, tokenizer, temporary, dtype, base)
    print(wrap([*(f"exported   {line}" for line in lines), f"written to {out}"]))
    return 0


def probe(model: "Decoder", run: Path) -> tuple[str, tuple]:
    """(what the tokens are, inputs for both models): rows of the run's data if it is still there, else random tokens."""
    import torch

    from minisft.config.load import RESOLVED_NAME, load
    from minisft.prepare.data import prepare_data
    from minisft.prepare.options import prepare_tokenizer

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


def merge(model: "Decoder", dtype: "torch.dtype", folder: Path, run: Path) -> list[str]:
    """Merge in place; returns lines about the change of the logits. Raises UserError if the merged model is not the adapted one,
    or the adapter changes nothing."""
    import torch

    from minisft.model.lora import adapter_disabled, changed_by_merge, merge_adapter

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


def relative(a: "torch.Tensor", b: "torch.Tensor") -> float:
    """norm(a - b) / norm(b)"""
    return ((a - b).norm() / b.norm()).item()
