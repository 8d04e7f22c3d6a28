"""The checks of what is written and read: the exported folder, and adapters beside, off and merged."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minisft import runtime
from minisft.data.loader import Loader
from minisft.errors import UserError
from minisft.export import export_dtype, write_model, write_whole
from minisft.model.load import load_model
from minisft.model.lora import adapter_disabled, changed_by_merge, merge_adapter
from minisft.model.start import load_adapted
from minisft.prepare.model import quantization_for
from minisft.prepare.run import Run
from minisft.runtime import DTYPES
from minisft.selfcheck.bench import FP32, Bench, Outcome, Skipped
from minisft.selfcheck.measure import in_fp32, largest, one_by_one, relative

PROBE_TOKENS = 512  # whose logits are compared
# A program: FOLDER of a model, FILE of token ids [n] by name, FILE for their logits [n, V].
BY_TRANSFORMERS = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, given, found = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
with torch.no_grad():
    logits = {name: model(ids[None]).logits[0].contiguous() for name, ids in load_file(given).items()}
save_file(logits, found)
"""


def probe(run: Run, loader: Loader | None = None) -> tuple[Tensor, ...]:
    """Tokens of the first rows of a loader, or of the run, as arguments of the model."""
    batch = (loader or run.train).step(0, 0)[0]
    n = min(batch.num_tokens, PROBE_TOKENS)
    inputs = batch.input_ids[:n], batch.position_ids[:n], batch.start[:n], batch.end[:n].clamp(max=n)
    return tuple(x.to(run.device) for x in inputs)


def logits(model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    training = model.training
    with torch.no_grad():
        values = model.eval().logits(model(*inputs)).float()
    model.train(training)
    return values


def exported(bench: Bench) -> Outcome:
    """The exported folder, read again, is the model in the dtype that it was written in, to the last bit of every logit."""
    run, folder, dtype = bench.prepared(), bench.folder / "export", export_dtype(bench.config)
    folder.mkdir()
    write_model(run, folder, dtype, run.start.folder if run.start else None)
    max_length = bench.config.data.max_length
    with in_fp32(run) as exact:
        if run.model.lora is None:
            again = load_model(folder, device=run.device, max_length=max_length)
            kept = {p: p.data for p in exact.model.parameters()}
            for p in kept:
                p.data = p.data.to(dtype).float()
            ours = logits(exact.model, probe(run))
            for p, data in kept.items():
                p.data = data
        else:
            again, ours = (
                load_adapted(folder, device=run.device, max_length=max_length),
                logits(exact.model, probe(run)),
            )
            if bench.config.train.weights_dtype == "bf16":  # that of the frozen base
                for name, p in again.named_parameters():
                    p.data = p.data.to(torch.bfloat16).float() if "lora_" not in name else p.data
        theirs = logits(again, probe(run))
    del again
    return Outcome(relative(theirs, ours), 0.0, "logits")


def by_transformers(bench: Bench) -> Outcome:
    """transformers, where it is installed, has our logits from the files that we write (an adapter is merged first)."""
    if find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    run, folder = bench.prepared(), bench.folder / "transformers"
    if run.model.lora is not None:
        merge_adapter(run.model)
    folder.mkdir()
    with in_fp32(run) as exact:
        write_whole(exact.model, run.tokenizer, folder, torch.float32, run.start.folder if run.start else None)
        alone = bench.documents()  # which share nothing: transformers reads each from its beginning
        inputs = probe(run, one_by_one(run.train, alone, alone.num_units))
        ours = logits(exact.model, inputs)
    documents = {f"tokens {a} to {b}": slice(a, b) for a, b in stretches(inputs[2].tolist())}
    theirs = logits_by_transformers(folder, {name: inputs[0].cpu()[rows] for name, rows in documents.items()})
    error, where = largest({name: relative(theirs[name], ours.cpu()[rows]) for name, rows in documents.items()})
    return Outcome(error, 1e-5, f"logits of {where}")


def stretches(start: list[int]) -> list[tuple[int, int]]:
    """(first token, end) of each document, from where the document of every token begins."""
    first = sorted(set(start))
    return list(zip(first, [*first[1:], len(start)]))


def logits_by_transformers(folder: Path, documents: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name: logits fp32 [n, V]} of token ids int64 [n]. In a process of its own: nothing of transformers comes into this one."""
    given, found = (folder.with_name(f"{name}.safetensors") for name in ("ids", "logits"))
    save_file({name: ids.contiguous() for name, ids in documents.items()}, given)
    command = [sys.executable, "-c", BY_TRANSFORMERS, str(folder), str(given), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError("transformers cannot run the exported folder: " + " | ".join(done.stderr.splitlines()[-3:]))
    return load_file(found)


def adapter_off(bench: Bench) -> Outcome:
    """With its adapter switched off, the model is the base, to the last bit of every logit."""
    run = bench.prepared()
    if run.model.lora is None:
        raise Skipped("no adapter: all weights train")
    base = load_model(
        run.start.folder,
        dtype=DTYPES[bench.config.train.weights_dtype],
        device=run.device,
        max_length=bench.config.data.max_length,
        quantization=quantization_for(bench.config.model, run.start),
        least_vocab_size=run.model.config.vocab_size,
    )
    inputs = probe(run)
    with runtime.autocast(run.device, run.precision), adapter_disabled(run.model):
        off = logits(run.model, inputs)
    with runtime.autocast(run.device, run.precision):
        return Outcome(relative(off, logits(base, inputs)), 0.0, "logits")


def adapter_merged(bench: Bench) -> Outcome:
    """The merged model has the logits of base and adapter, in fp32."""
    run = bench.prepared()
    if run.model.lora is None:
        raise Skipped("no adapter: all weights train")
    with in_fp32(run) as exact:
        inputs = probe(run)
        adapted = logits(exact.model, inputs)
        with adapter_disabled(exact.model):
            if relative(logits(exact.model, inputs), adapted) < 10 * FP32:
                raise UserError("the adapter hardly moves the logits, so that a merge shows nothing")
        changed_by_merge(exact.model)
        merge_adapter(exact.model)
        return Outcome(relative(logits(exact.model, inputs), adapted), FP32, "logits")
