"""A plan as text of at most 100 columns."""

import textwrap

from minisft.config.values import as_toml
from minisft.init.toml_text import render
from minisft.plan.changes import Fit
from minisft.plan.estimate import MARGIN, Estimate
from minisft.plan.offload import CPU_MEMORY, LINK
from minisft.units import digits, duration, size, thousands

WIDTH = 100
MEANS = {  # what a component is, beside its number
    "weights": "of the model, and of adapters",
    "copies": "of the matrices, in the dtype of the products",
    "gradients": "",
    "moments": "of the optimizer",
    "activations": "kept for the backward pass",
    "loss": "a chunk of logits and their gradients",
    "working": "temporary tensors of the pass",
    "reference": "of preference tuning",
    "gathered": "blocks that are whole for a while, and the root",
    "save": "the copy of a checkpoint that is written in the background",
    "allocator": "freed memory that the C library keeps",
    "context": "",
}


def report(e: Estimate) -> str:
    lines = [*_run(e), "", *_memory(e)]
    if e.fits != "yes":
        lines += ["", *_changes(e)]
    options = {"subsequent_indent": " " * 11, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, WIDTH, **options) for line in [*lines, "", *_time(e)])


def _run(e: Estimate) -> list[str]:
    work, config, place = e.work, e.config, e.hardware.place
    train = config.train
    trained = f"{e.trained / e.parameters:.2%} of them trained" if e.trained < e.parameters else "all trained"
    lines = [f"model      {e.model.model_type}, {thousands(e.parameters)} parameters, {trained}"]
    if work.tokens is None:
        lines.append(f"data       {work.source}; every micro-batch is taken to be full")
    else:
        about = "" if work.source == "the token cache" else "about "
        lines.append(
            f"data       {about}{work.units:,.0f} {work.unit}, {thousands(work.tokens)} tokens an epoch, "
            f"{work.targets_share:.0%} of them trained ({work.source})"
        )
    if work.fill is not None:
        lines.append(
            f"packing    {about}{work.packs:,.0f} packs of {config.data.max_length:,} tokens, {work.fill:.1%} full"
        )
    window = f"{train.per_device_train_batch_size} x {train.gradient_accumulation_steps} accumulated"
    window += f" x {place.ranks} ranks" if place.ranks > 1 else ""
    steps = "unknown" if work.steps is None else f"{work.steps:,}"
    per_epoch = "" if work.steps_per_epoch is None else f", {work.steps_per_epoch:,} an epoch"
    tokens = work.tokens_of_step(config, place.ranks)
    lines.append(f"steps      {steps}{per_epoch}; a step: {window} = {thousands(tokens)} tokens in the mean")
    parts = ", ".join(f"{part} {thousands(flops)}" for part, flops in e.flops.items())
    lines.append(f"FLOPs      {thousands(sum(e.flops.values()))} a step: {parts}")
    return lines


def _memory(e: Estimate) -> list[str]:
    batch, memory = e.batch, e.memory
    rank = "a rank" if e.hardware.place.ranks > 1 else "the process"
    lines = [
        f"memory of {rank} {memory.moment}, with the largest micro-batch of {batch.tokens:,} tokens and "
        f"{batch.targets:,} targets"
    ]
    for name, value in memory.parts.items():
        means = MEANS[name]
        if name == "context":
            means = "CUDA and its libraries, assumed" if e.hardware.place.is_gpu else "Python and PyTorch"
        lines.append(f"  {name:<13}{size(value):>9}  {means}".rstrip())
    verdict = {
        "yes": "it fits",
        "perhaps": f"it may not fit, as the prediction may be off by {MARGIN:.0%}",
        "no": "it does not fit",
    }[e.fits]
    lines.append(
        f"  {'in all':<13}{size(memory.total):>9}  of {size(e.hardware.memory)} ({e.hardware.name}): {verdict}"
    )
    if e.offload is not None:
        parts = ", ".join(f"{name} {size(value)}" for name, value in e.offload.memory.items())
        lines.append(f"memory of the CPU, {rank}: {parts}, in all {size(sum(e.offload.memory.values()))}")
    return lines


def _changes(e: Estimate) -> list[str]:
    best, single = e.changes()
    if best is None:
        lines = ["no combination of changes fits: a smaller model, a smaller max_length, or more memory"]
    else:
        after = f"{size(best.memory.total)} of {size(e.hardware.memory)}"
        lines = [f"the cheapest change that fits ({after}); paste it over these keys:", ""]
        lines += [f"    {line}".rstrip() for line in render([], best.keys, {}).strip("\n").split("\n")]
        lines += ["", *(f"  {change.why}" for change in best.changes)]
    return [*lines, "", "each change by itself:", *map(_of_change, single)]


def _of_change(fit: Fit) -> str:
    keys = ", ".join(f"{key.rpartition('.')[2]} = {as_toml(value)}" for key, value in fit.keys.items())
    return f"  {size(fit.memory.total):>9}  {keys}: {fit.changes[0].why}"


def _time(e: Estimate) -> list[str]:
    card = e.hardware.card
    if card is None or e.seconds_a_step is None:
        return ["time       not known: name a card (--card), or measure a step on this machine (--measure)"]
    rate = f"at {e.mfu:.0%} (--mfu, an assumption) of the {thousands(card.matmul)} FLOP/s of {card.name}"
    text = f"time       {digits(e.seconds_a_step, 3)} s a step {rate}"
    if e.hours is not None:
        text += f", {duration(e.hours * 3600)} in all"
    lines = [f"{text}; loading, evaluation and saving are not in it"]
    if e.offload is not None:
        lines.append(
            f"offload    {digits(e.offload.seconds, 3)} s of a step: {size(e.offload.link)} over a link of {size(LINK)}/s, "
            f"{size(e.offload.update)} of the update at {size(CPU_MEMORY)}/s of the CPU, both assumptions"
        )
    if e.cost is not None and e.hours is not None:
        hours = f"{digits(e.hours * e.hardware.place.ranks, 3)} GPU hours"
        lines.append(f"cost       {digits(e.cost, 3)} for {hours} at {e.price:g} each")
    return lines
