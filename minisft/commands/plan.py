"""`minisft plan CONFIG.toml`: what a run will do and need, before anything is rented.

Steps, tokens and FLOPs, the memory of a rank by component, whether it fits, else the cheapest change that makes it fit, time and
cost. It reads config.json, the tokenizer and the token cache, or the first rows of the data; no weights. The exit code is 71
where the run does not fit.
"""

import json
import os
import re
import sys
from dataclasses import replace
from typing import Any

from minisft.errors import MEMORY, UserError
from minisft.heap import start_without_caches

USAGE = """\
usage: minisft plan CONFIG.toml [--gpus N] [--gpu-memory 80GB] [--card h100] [--price 2.5]
                    [--mfu 0.4] [--measure] [--json] [--KEY VALUE ...]

Tell how many steps, tokens and FLOPs the run of CONFIG.toml has, what memory a rank needs by component,
whether it fits, and what to change if it does not. If the file has stages, each of them.

  --gpus N          GPUs, one rank each; without this and the next two: this machine
  --gpu-memory X    memory of one, as in 80GB; without it that of the card
  --card NAME       {cards}: its memory and its rate
  --price X         of a GPU and hour, for the cost
  --mfu X           share of the card's matmul rate that the run reaches, 0.4 if not given
  --measure         take one real step on this machine, and compare
  --json            print the plan as JSON

Other options are keys of the configuration, as for `minisft train`. The exit code is 71 if the run does
not fit.
"""
OPTIONS = ("gpus", "gpu_memory", "card", "price", "mfu")
FLAGS = ("measure", "json")
UNITS = {"gb": 1e9, "gib": 2**30, "mb": 1e6, "tb": 1e12}


def main(argv: list[str]) -> int:
    from minisft.cards import CARDS

    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE.format(cards=", ".join(name.lower() for name in CARDS)), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    from minisft.config.command_line import parse_arguments, take_options
    from minisft.config.stages import load_stages
    from minisft.plan.report import report

    texts, rest = take_options(argv, OPTIONS, FLAGS)
    options = {key: text if text is True else _value(key, text[-1]) for key, text in texts.items()}
    if "measure" in options:  # as a run starts
        start_without_caches()
    stages = load_stages(*parse_arguments(rest))
    if len(stages) > 1 and (alone := [f"--{name}" for name in FLAGS if options.get(name)]):
        raise UserError(f"command line: {alone[0]} with {len(stages)} stages", hint="name the file of one stage")
    codes = []
    for stage in stages:
        found = _plan(stage, options)
        if "json" in options:
            print(json.dumps(found.to_dict() | _measured(found, options), indent=2))
        else:
            print(f"== {stage.title}\n{report(found)}" if stage.title else report(found))
            for line in _measured(found, options).get("lines", []):
                print(line)
        codes.append(MEMORY if found.fits == "no" else 0)
    return max(codes)


def _value(key: str, text: str) -> Any:
    from minisft.cards import CARDS

    name = f"--{key.replace('_', '-')}"
    if key == "card":
        found = next((card for card in CARDS.values() if card.name.lower() == text.lower()), None)
        if found is None:
            hint = f"known are {', '.join(n.lower() for n in CARDS)}; for others give --gpu-memory alone"
            raise UserError(f"command line: {name} {text!r}", hint=hint)
        return found
    if key == "gpu_memory":
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)?", text.strip().lower())
        if not match or (match[2] or "gb") not in UNITS or not float(match[1]):
            raise UserError(f"command line: {name} {text!r}", hint="the memory of one GPU, as in 80GB")
        return float(match[1]) * UNITS[match[2] or "gb"]
    try:
        number = int(text) if key == "gpus" else float(text)
    except ValueError:
        number = -1
    limits = {"gpus": (1, 2**20), "price": (0, 1e6), "mfu": (1e-3, 1)}[key]
    if not limits[0] <= number <= limits[1]:
        what = "a whole number of at least 1" if key == "gpus" else f"a number from {limits[0]:g} to {limits[1]:g}"
        raise UserError(f"command line: {name} {text!r}: expected {what}", hint="see minisft plan --help")
    return number


def _plan(stage: Any, options: dict[str, Any]) -> Any:
    """The `Estimate` of a stage. One that starts from the model of a stage before has the shape of that one's."""
    from minisft.config.sections import ModelSection
    from minisft.plan.estimate import MFU, estimate
    from minisft.plan.inputs import read_model
    from minisft.plan.work import measure
    from minisft.prepare.options import prepare_tokenizer

    first, config = stage, stage.config
    while first.previous is not None:
        first = first.previous
    if first is not stage:
        start: ModelSection = first.config.model
        names = ("model_name_or_path", "config", "revision", "tokenizer_name_or_path")
        config = replace(config, model=replace(config.model, **{name: getattr(start, name) for name in names}))
    hardware = hardware_of(config, options)
    tokenizer, _ = prepare_tokenizer(config)
    model = read_model(config, tokenizer)
    work = measure(config, tokenizer, hardware.place.ranks)
    return estimate(config, model, work, hardware, mfu=options.get("mfu", MFU), price=options.get("price"))


def hardware_of(config: Any, options: dict[str, Any]) -> Any:
    """The `Hardware` that the options name, or this machine's."""
    from minisft.init.detect import detected_hardware
    from minisft.init.propose import parse_hardware
    from minisft.memory import memory_bytes
    from minisft.plan.estimate import Hardware
    from minisft.plan.memory import Place, shards_of

    card, gpus, memory = (options.get(key) for key in ("card", "gpus", "gpu_memory"))
    if card is None and gpus is None and memory is None:
        found = parse_hardware("cpu" if config.train.device == "cpu" else detected_hardware(), memory_bytes() / 1e9)
        if found.is_cpu:
            given = re.match(r" *(\d{1,6})", os.environ.get("OMP_NUM_THREADS", ""))  # "4,2" counts for nested loops too
            threads = int(given[1]) if given and int(given[1]) else os.cpu_count() or 1
            place = Place(False, threads=threads, precision=_precision(config, False))
            return Hardware(place, float(memory_bytes()), "this CPU")
        gpus, memory, name = found.devices, found.gigabytes * 1e9, "this machine's GPU"
    else:
        name = "GPU" if card is None else card.name
    if memory is None:
        if card is None:
            raise UserError("command line: --gpus needs the memory of one", hint="--gpu-memory 80GB, or --card h100")
        memory = card.memory
    gpus = gpus or 1
    place = Place(True, gpus, shards_of(config, gpus), precision=_precision(config, True))
    return Hardware(place, memory, f"{gpus} x {name}" if gpus > 1 else f"one {name}", card)


def _precision(config: Any, is_gpu: bool) -> str:
    precision = config.train.precision
    if config.train.weights_dtype == "bf16" or precision == "auto" and is_gpu:
        return "bf16"
    if precision == "auto":
        from minisft.runtime import cpu_has_bf16

        return "bf16" if cpu_has_bf16() else "fp32"
    return precision


def _measured(found: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What --measure adds: numbers for JSON, lines for text."""
    if "measure" not in options:
        return {}
    from minisft.plan.estimate import Hardware
    from minisft.plan.measure import measure_step
    from minisft.plan.memory import predict
    from minisft.units import digits, size

    hardware: Hardware = hardware_of(found.config, {})
    measured = measure_step(found.config)
    predicted = predict(found.config, found.model, measured.batch, hardware.place)
    total = predicted.total - (predicted.parts["context"] if hardware.place.is_gpu else 0)
    lines = [
        f"measured   {size(measured.bytes)} at the peak of a step with micro-batches of {measured.batch.tokens:,} tokens on "
        f"{hardware.name},",
        f"           predicted {size(total)}: {total / measured.bytes - 1:+.1%}",
        f"           {digits(measured.seconds, 3)} s, {measured.tokens / measured.seconds:,.0f} tokens/s",
    ]
    if "json" not in options:
        return {"lines": lines}
    numbers = {"bytes": measured.bytes, "predicted": total, "seconds": measured.seconds, "tokens": measured.tokens}
    return {"measured": numbers}
