"""Resuming: a run continues exactly where its last checkpoint was, or refuses where it would be another run.

Data order, dropout and noise are pure functions of (seed, step), so nothing is replayed and no generator state is saved. A
checkpoint holds the weights, the moments and `Progress`; data_order() lists the settings that must not have changed.
"""

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisft.best import Best
from minisft.checkpoint import find_checkpoint, load_checkpoint
from minisft.config.load import deciding_values
from minisft.config.sections import Config
from minisft.errors import UserError
from minisft.export import read_model
from minisft.metrics import Sums
from minisft.model.shards import is_shard
from minisft.out_of_memory import describe_micro_batches, use_micro_batch_size
from minisft.prepare.run import Run
from minisft.ranks import from_first_rank, rank, require_agreement
from minisft.schedule import Plateau
from minisft.spikes import Recent, Spikes
from minisft.strict_json import read_json
from minisft.update import LossScale

# Keys that decide which tensors train. Where they differ and a checkpoint does not fit, they are why.
OF_TENSORS = ("lora.", "train.trainable", "train.frozen", "model.new_special_tokens", "model.config")
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of so many bytes


def resume(config: Config, run: Run, folder: Path) -> dict | None:
    """Continue from the checkpoint in `folder` that checkpoint.resume asks for; returns its trainer_state.

    None where there is none: then the run starts at step 0. Raises UserError where the checkpoint belongs to other data,
    another starting model or another optimizer.
    """
    path, skipped = _chosen_checkpoint(folder, config.checkpoint.resume)
    run.summary.extend(f"skipped    {p}: {reason}" for p, reason in skipped)
    if path is None:
        return None
    state = read_json(path / "trainer_state.json")
    go_to_chunk(run, state)
    require_same_run(config, run, path, state)
    try:
        state = restore(config, run, path)
    except UserError as error:
        changed = {k: values for k, values in changed_keys(config, state).items() if k.startswith(OF_TENSORS)}
        if not changed:
            raise
        told = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items())
        hint = "go back to these settings, or choose a new output_dir"
        if (model := folder.parent / "model").is_dir():
            hint += f"; {model} may be its start"
        raise UserError(f"{path} cannot be resumed: it has other tensors ({told})", hint=hint) from error
    progress = run.progress
    if run.train.stream is not None and progress.step < run.total_steps:
        run.train.stream.reach(run.train, progress.step)  # the checkpoint may be of the last step of a chunk
    run.summary.append(f"resumed    from {path}")
    run.summary.extend(
        f"changed since step {progress.step}: {key} {before} -> {now}"
        for key, (before, now) in changed_keys(config, state).items()
    )
    if progress.lr_scale != 1.0:
        run.summary.append(
            f"control    the learning rate is {progress.lr_scale:g} x train.learning_rate since control.toml"
        )
    if left_out := progress.spikes.left_out:
        run.summary.append(f"left out   the rows of these steps, which were spikes: {', '.join(map(str, left_out))}")
    return state


def go_to_chunk(run: Run, state: dict) -> None:
    """Open the chunk of the stream that a checkpoint was in."""
    if run.train.stream is not None and "stream" in state:
        run.train.stream.go_to(run.train, state["stream"], state["stream"]["first_step"])


def restore(config: Config, run: Run, path: Path) -> dict:
    """Bring weights, moments and progress back to what the checkpoint holds; returns its trainer_state."""
    state = load_checkpoint(path, run.model, run.optimizer, read_model)
    go_to_chunk(run, state)
    if run.reference is not None:
        run.reference.load(path)
    progress = run.progress
    progress.step, progress.num_tokens = state["step"], state["num_tokens"]
    # an earlier step where a signal came before the evaluation of this one ended
    progress.evaluated_at = state.get("evaluated_at", progress.step)
    progress.sampled_at = state.get("sampled_at", progress.step)
    progress.nonfinite_steps = state["nonfinite_steps"]
    progress.skips_in_a_row = state.get("skips_in_a_row", 0)
    progress.spikes = Spikes(**state.get("spikes", {}))
    progress.recent = Recent(**state.get("recent", {}))
    if "train.learning_rate" not in changed_keys(config, state):  # else the configured rate is the newer wish
        progress.lr_scale = state.get("lr_scale", 1.0)
    if state["precision"] == run.precision:
        progress.loss_scale = LossScale(**state["loss_scale"])
    progress.plateau = Plateau(**state.get("plateau", {}))
    smaller = state.get("micro_batch_size") or run.train.batch_size
    if config.train.on_oom == "split" and smaller < run.train.batch_size:
        use_micro_batch_size(run, smaller)
        run.summary.append(f"memory     {describe_micro_batches(run)}, as memory ran out before")
    best = dict(state.get("best", {}))
    if best.pop("metric", None) == run.best_metric:  # else its values are those of another metric
        progress.best = Best(**best)
    progress.sums = Sums(run.device)
    progress.sums.restore(state["sums"])
    return state


def rewind(config: Config, run: Run, path: Path) -> dict:
    """`restore` in the middle of a run; what was learnt about its spikes is kept."""
    spikes = run.progress.spikes
    state = restore(config, run, path)
    run.progress.spikes = spikes
    return state


def _chosen_checkpoint(folder: Path, resume: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """As find_checkpoint: the first rank looks and verifies, and the others take what it found."""
    found = None
    if rank() == 0:
        path, skipped = find_checkpoint(folder, resume)
        found = [path and str(path), [[str(p), reason] for p, reason in skipped]]
    path, skipped = from_first_rank(found)
    if path and not Path(path).is_dir():
        raise UserError(
            f"the first rank resumes from {path}, which is not here",
            hint="output_dir must be on a disk that all machines share",
        )
    return path and Path(path), [(Path(p), reason) for p, reason in skipped]


def require_same_run(config: Config, run: Run, path: Path, state: dict) -> None:
    """UserError where the checkpoint of `path`, with this trainer_state, is not one of this run."""
    was, now = state.get("order", {}), data_order(config, run)
    if was != now:
        changed = ", ".join(
            f"{key} was {_shown(was.get(key))}, is {_shown(value)}"
            for key, value in now.items()
            if was.get(key) != value
        )
        raise UserError(
            f"{path} cannot be resumed: tokens would be repeated and missed ({changed})",
            hint="go back to the data and the settings of that run, choose a new output_dir, or set resume = 'never'",
        )
    began, start = state.get("started_from"), run.start
    if began and start and start.id and began != start.id:
        raise UserError(
            f"{path} cannot be resumed: that run started from another model than {start.adapter or start.name} is now "
            f"({began[:12]}, now {start.id[:12]})",
            hint="put the model back (model.revision names a commit), choose a new output_dir, or start this run over from "
            f"the model as it is now: resume = 'never', or move {config.output_dir} away",
        )
    optim, used = config.train.optim, state.get("optim", config.train.optim)
    if optim != used and {optim, used} != {"adamw", "adamw_minisft"}:  # these two keep the same state
        hint = f"set optim = '{used}', or start a new run from the model of this one"
        raise UserError(f"{path} holds the state of {used}, but train.optim = '{optim}'", hint=hint)


def _shown(value: Any) -> str:
    """A value of `data_order`; the beginning of a hash."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def require_same_state(config: Config, run: Run) -> None:
    """UserError where the ranks are not at the same step with the same data, weights and configuration. All ranks call it."""
    bits = [
        p.detach().contiguous().view(-1).view(BITS[p.element_size()]).sum(dtype=torch.int64)
        for p in run.model.parameters()
        if not is_shard(p)  # the same on all ranks
    ]
    weights = sha256(repr(torch.stack(bits).tolist() if bits else []).encode()).hexdigest()
    order = data_order(config, run)
    require_agreement({**settings(config), **order, "step": run.progress.step, "weights": weights[:12]})


def settings(config: Config) -> dict[str, str]:
    """The deciding values, without the paths whose contents a checkpoint identifies by hash: the files may have moved."""
    by_hash = ("model.model_name_or_path", "model.tokenizer_name_or_path", "model.chat_template", "data.train_data")
    return {key: value for key, value in deciding_values(config).items() if key not in by_hash}


def changed_keys(config: Config, state: dict) -> dict[str, tuple[str, str]]:
    """{full name: (value in TOML when the checkpoint with this trainer_state was written, value now)} where they differ."""
    was = state.get("config", {})
    return {key: (was[key], now) for key, now in settings(config).items() if was.get(key, now) != now}


def training_state(config: Config, run: Run) -> dict:
    """The part of a checkpoint that is JSON: everything but weights and moments. All ranks call it."""
    progress, stream = run.progress, run.train.stream
    return {
        **({"stream": {**stream.position(), "first_step": run.train.first_step}} if stream is not None else {}),
        "num_tokens": progress.num_tokens,
        "evaluated_at": progress.evaluated_at,
        "sampled_at": progress.sampled_at,
        "nonfinite_steps": progress.nonfinite_steps,
        "skips_in_a_row": progress.skips_in_a_row,
        "spikes": asdict(progress.spikes),
        "recent": asdict(progress.recent),
        "lr_scale": progress.lr_scale,
        "micro_batch_size": run.train.micro_batch_size,
        "precision": run.precision,
        "loss_scale": asdict(progress.loss_scale),
        "plateau": asdict(progress.plateau),
        "best": {"metric": run.best_metric, **asdict(progress.best)},
        "optim": config.train.optim,
        "config": settings(config),
        "started_from": run.start.id if run.start else None,
        "base": run.start.base_id if run.start and run.model.lora else None,
        "prompting": run.prompting,
        "sums": progress.sums.state(),
        "order": data_order(config, run),
    }


def data_order(config: Config, run: Run) -> dict:
    """Everything that decides which tokens are in which step: a resumed run must have the same."""
    packing = config.data.packing_strategy if config.data.packing else "none"
    if config.data.packing and run.train.documents.shared is not None:
        packing += " of pairs that share a prompt"  # pairs of other lengths, in other packs
    if run.train.documents.turns is not None:
        packing += " of turns that share what comes before them"
    return {
        "data": run.train.documents.cache.fingerprint,
        "documents": len(run.train.documents),
        "weights": [source.weight for source in run.train.documents.cache.sources],
        "packing": packing,
        "max_length": config.data.max_length,
        "truncation": config.data.truncation,
        "packs": run.train.plan.num_packs,
        "packs a step": run.train.packs_per_step,
        "seed": config.train.seed,
        "shuffle": config.data.shuffle,
        "numpy": np.__version__.split(".")[0],  # its shuffles are stable within a major version
        **(run.train.stream.order() if run.train.stream is not None else {}),
    }
