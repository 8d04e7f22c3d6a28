"""After a step that is not finite, or a spike of the loss: count it, write its rows down, and do what the policy says.

The policies are train.on_nonfinite and train.on_spike. Each rank writes a file, `spike-step-XXXXXXXX-rank-R.jsonl` or
`nonfinite-step-...`: a line about the step, then one for each document that it trained, the highest loss first. These losses come
from a forward pass of their own, without dropout and noise, so that steps without a problem cost nothing.
"""

import math
from itertools import groupby
from pathlib import Path

import numpy as np

from minisft import ranks
from minisft.atomic_folder import verify_folder
from minisft.checkpoint import checkpoints, step_folder, step_of
from minisft.config.sections import TrainSection
from minisft.data.audit import place_of, stretches
from minisft.data.batch import Batch
from minisft.errors import NONFINITE, UserError, is_out_of_memory, warn
from minisft.evaluation import target_stats
from minisft.log_files import write_report
from minisft.out_of_memory import rows_of
from minisft.parallel import needs_others, no_backward
from minisft.prepare.run import Run

MAX_REPORTS = 10  # steps of a run; further ones are only counted


def handle_bad_step(
    run: Run, train: TrainSection, batches: list[Batch], folder: Path, loss: float, grad_norm: float
) -> UserError | Path | None:
    """The error to stop with, the checkpoint to go back to, or None to continue. All ranks call it and get the same.

    loss, grad_norm: of the step, over all ranks. folder: the output folder. An fp16 overflow is no failure, it lowers the loss
    scale; but a scale that sinks below 1 is.
    """
    progress, step = run.progress, run.progress.step + 1  # the number that the log shows
    is_spike = math.isfinite(loss + grad_norm)
    if not is_spike and run.precision == "fp16" and progress.loss_scale.scale >= 1.0:
        return None
    progress.spikes.count += is_spike
    progress.nonfinite_steps += not is_spike
    is_reported = progress.spikes.count + progress.nonfinite_steps <= MAX_REPORTS
    action, result, back = choose(run, train, folder, is_spike)

    problem = "the loss or a gradient is not finite"
    if is_spike:
        problem = progress.recent.describe(loss, grad_norm, train.spike_threshold)
    path = folder / f"{'spike' if is_spike else 'nonfinite'}-step-{step:08d}-rank-{ranks.rank()}.jsonl"
    if is_reported or action == "stop":
        about = {"step": step, "problem": problem, "action": action, "loss": loss, "grad_norm": grad_norm}
        if is_spike:
            about |= dict(zip(("loss_z_score", "grad_norm_z_score"), progress.recent.z_scores(loss, grad_norm)))
        is_updated = action == "warn" or train.optimizer_in_backward
        about["weights"] = f"{'after' if is_updated else 'before'} the update of this step"  # those of the rows' losses
        write_report(path, [about, *describe_rows(run, batches)])
        if action != "stop" and ranks.rank() == 0:
            warn(f"step {step}: {problem}; {result}. Its rows: {path}")
    if action != "stop":
        return back

    places = rows_of(run, batches)
    more = f" and {len(places) - 8} more" if len(places) > 8 else ""
    hint = f"all of them are in {path}. Look at these rows; try a lower learning_rate"
    hint += "" if is_spike else " or precision = 'fp32'"
    if action == (train.on_spike if is_spike else train.on_nonfinite):
        key = "on_spike" if is_spike else "on_nonfinite"
        hint += f"; {key} = 'skip' leaves such steps out and counts them"
    else:
        hint += "; max_skips_in_a_row, max_skips_share and max_rewinds are the limits"
    return UserError(
        f"step {step}: {problem}; {result}. Its rows: {', '.join(places[:8])}{more}", hint=hint, exit_code=NONFINITE
    )


def choose(run: Run, train: TrainSection, folder: Path, is_spike: bool) -> tuple[str, str, Path | None]:
    """("warn" | "skip" | "rewind" | "stop", the same in words, the checkpoint to go back to). Counts what is done."""
    progress, spikes, step = run.progress, run.progress.spikes, run.progress.step + 1
    policy = train.on_spike if is_spike else train.on_nonfinite
    refused = "the update was refused"
    if policy == "warn":
        return "warn", "the update was made", None
    if policy == "rewind":
        if spikes.rewinds >= train.max_rewinds:
            return "stop", f"{refused}, and the run went back {spikes.rewinds} times already", None
        spikes.left_out.append(step)
        if back := checkpoint_before(folder / "checkpoints", progress.step - train.rewind_steps):
            spikes.rewinds += 1
            return "rewind", f"back to {back}, and these rows train nothing from now on", back
        policy = "skip"  # there is no checkpoint yet
    if policy == "skip":
        spikes.skipped += is_spike
        progress.skips_in_a_row += 1
        num_skipped, in_a_row = progress.nonfinite_steps + spikes.skipped, progress.skips_in_a_row
        is_too_often = num_skipped >= train.max_skips_in_a_row and num_skipped > train.max_skips_share * step
        if in_a_row <= train.max_skips_in_a_row and not is_too_often:
            return "skip", refused, None
        refused += (
            f", as were {num_skipped - 1} before it, {in_a_row} in a row now, and such a run trains little or nothing"
        )
    elif train.optimizer_in_backward:
        refused = "its updates were made in the backward pass, so the run stops without saving them"
    return "stop", refused, None


def checkpoint_before(folder: Path, last: int) -> Path | None:
    """The newest whole checkpoint of step `last` or before; rank 0 chooses for all."""
    found = 0
    if ranks.rank() == 0:
        steps = {step_of(path): path for path in checkpoints(folder) if step_of(path) <= last}
        found = next((step for step in sorted(steps, reverse=True) if verify_folder(steps[step]) is None), 0)
    (step,) = ranks.sum_numbers_over_ranks([found])
    return step_folder(folder, int(step)) if step else None


# ---- the rows of a step -----------------------------------------------------------------------------------------


def describe_rows(run: Run, batches: list[Batch]) -> list[dict]:
    """The documents with targets in these batches, this rank's micro-batches of a step. The highest mean loss comes first.

    Of a document that is in several pieces, the loss is that of the pieces in this step, and the text that of the whole.
    """
    documents, cache = run.train.documents, run.train.documents.cache
    rows = []
    for d, losses in row_losses(run, batches).items():
        piece = int((documents.index == d).argmax())
        start, end = int(documents.start[piece]), int(documents.end[piece])
        parts = groupby(
            stretches(cache, d, start, end, run.tokenizer, limit=end - int(cache.offsets[d])),
            key=lambda part: part.state,
        )
        rows.append(
            {
                "row": place_of(cache, d),
                "source": cache.sources[cache.source[d]].label,
                "loss": float(losses.mean()),
                "trained_tokens": len(losses),
                "text": [[state, "".join(part.text for part in alike)] for state, alike in parts],
            }
        )
    return sorted(rows, key=lambda row: -row["loss"] if math.isfinite(row["loss"]) else -math.inf)


def row_losses(run: Run, batches: list[Batch]) -> dict[int, np.ndarray]:
    """Document in the cache -> -log p of each of its targets, by the weights as they are; NaN if there is no memory for it."""
    training, found = run.model.training, {}
    run.model.eval()
    for batch in batches:
        nll = np.full(batch.num_targets, np.nan, dtype=np.float32)
        try:
            with no_backward(run.model):
                stats = target_stats(run.model, batch.to(run.device), run.precision)
            nll = stats.nll[: batch.num_targets].cpu().numpy()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or needs_others(run.model):
                raise
        of_document = batch.row_document[: batch.num_targets].numpy()
        for d in np.unique(of_document).tolist():
            found[d] = np.append(found.get(d, nll[:0]), nll[of_document == d])
    run.model.train(training)
    return found
