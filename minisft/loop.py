"""The loop. `run` trains a model from a configuration; what happens in a step can be read here from top to bottom.

What a run needs is made in prepare/run.py, before the first step, so that whatever can fail fails early. The loop does not know
which trainer it serves: an objective is two functions, `weight` and `loss` (sft.py).

Data order, dropout and noise are pure functions of (seed, step). A run that was stopped, killed or moved therefore goes on
exactly where its last checkpoint was: nothing is replayed, and there is no generator state to save or to lose.
"""

import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minisft import console, ranks, runtime
from minisft.atomic_folder import lock_folder, remove_leftovers
from minisft.checkpoint import (
    MAX_FAILED_SAVES,
    find_checkpoint,
    load_checkpoint,
    require_space_for_checkpoints,
    try_save,
)
from minisft.config.load import fingerprint, write_resolved
from minisft.config.sections import Config, TrainSection, config_to_dict
from minisft.data.batch import Batch
from minisft.errors import NONFINITE, STOPPED, UserError
from minisft.evaluate import evaluate
from minisft.export import export_model, is_exported, read_model, write_state
from minisft.loggers import Loggers
from minisft.metrics import Sums, peak_memory
from minisft.prepare.run import Run, prepare
from minisft.ranks import sum_gradients
from minisft.samples import complete
from minisft.schedule import Plateau, after_evaluation, lr_factor
from minisft.strict_json import read_json, write_json
from minisft.update import (
    LossScale,
    clip_and_update,
    copies,
    evaluation_weights,
    gradient_norms,
    gradients,
    update_in_backward,
    zero_updates,
)


@dataclass(frozen=True)
class Result:
    """What a run leaves behind."""

    output_dir: Path
    model_dir: Path | None  # the trained model as Hugging Face files; None where the run was stopped early
    step: int  # optimizer steps taken
    metrics: dict[str, float] = field(default_factory=dict)  # the last value of everything that was logged
    exit_code: int = 0  # 0 done, 75 stopped by a signal after saving
    signal: str | None = None  # the one that asked this process to stop, perhaps too late for a run that was done


@dataclass(frozen=True)
class StepResult:
    updated: bool  # False: a loss or gradient was not finite; weights and moments are untouched, on every rank
    stop: bool  # some rank was asked to stop
    num_tokens: int  # over all ranks
    stats: Sums  # what there is to log


def train_step(
    run: Run, train: TrainSection, batches: list[Batch], stop_asked: bool = False, is_logged: bool = False
) -> StepResult:
    """One optimizer step over this rank's micro-batches. is_logged: count the zero updates too.

    The loss of the step is the sum of weight x nll over all micro-batches and ranks, divided by N, the sum of their
    weights over the same.
    """
    # ---- 4. the learning rate, and N of the whole step, over all ranks, known before the first forward pass
    factor = lr_factor(step=run.step, **run.schedule) * run.plateau.factor
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    measured = run.measured if is_logged and factor else set()
    weights = [run.weight(batch) for batch in batches]
    totals = [sum(weights), len(batches), sum(batch.num_tokens for batch in batches)]
    total_weight, num_batches, num_tokens = ranks.sum_numbers_over_ranks(totals, run.device)

    # ---- 5. forward, loss, backward: the gradients of the micro-batches add up in fp32
    for name, first_step in run.first_steps.items():  # what trains from a later step on
        run.model.get_parameter(name).requires_grad_(run.step >= first_step)
    runtime.seed_step(train.seed, run.step)
    stats, losses = Sums(run.device), []
    in_backward = train.optimizer_in_backward
    with update_in_backward(run.optimizer, measured) if in_backward else nullcontext(({}, [])) as (norms, zeros):
        for batch, weight in zip(batches, weights):
            # "micro_batch" is the mean of the micro-batches' means, as older trainers have it
            n = total_weight if train.loss_normalization == "tokens" else weight * num_batches
            with runtime.autocast(run.device, run.precision):
                loss, pairs = run.loss(run.model, batch.to(run.device), run.loss_scale.scale / max(n, 1e-12))
            loss.backward()
            losses.append(loss.detach())
            stats.add(pairs)

    # ---- 6. the gradient's norm, and the finite check that all ranks agree on before any of them updates
    grads = gradients(run.model)
    sum_gradients(grads)
    if run.loss_scale.scale != 1.0:
        torch._foreach_mul_(grads, 1.0 / run.loss_scale.scale)
    norms = [norms[p] for p in run.model.parameters() if p in norms] if in_backward else gradient_norms(grads)
    norm = torch.nn.utils.get_total_norm(norms)
    stats.add({"grad_norm": (norm, 1.0)})
    is_bad = ~torch.isfinite(norm + torch.stack(losses).sum())
    verdict = torch.stack([is_bad.double(), torch.full_like(norm, stop_asked, dtype=torch.float64)])
    num_bad, num_stops = ranks.sum_over_ranks(verdict).tolist()

    # ---- 7. clip, update
    if not num_bad and not in_backward:
        before = copies(measured)
        clip_and_update(run.optimizer, grads, norm, train.max_grad_norm)
        zeros = zero_updates(before)
    if zeros:
        num_zeros, num_updates = torch.stack(zeros).sum(0).tolist()
        stats.add({"zero_update_fraction": (num_zeros, num_updates)} if num_updates else {})
    if run.precision == "fp16":
        run.loss_scale.update(overflow=num_bad > 0)
    run.optimizer.zero_grad(set_to_none=True)
    return StepResult(not num_bad, num_stops > 0, int(num_tokens), stats)


def run(config: Config, origins: dict[str, str]) -> Result:
    """Train as `config` says. origins: where each value came from, recorded in the output folder.

    Raises UserError for whatever the user can mend, before the first step where that can be known.
    """
    with ExitStack() as stack:
        folder = Path(config.output_dir)
        device = runtime.pick_device(config.train.device)
        stack.enter_context(ranks.process_group(device))
        is_main = ranks.rank() == 0
        if is_main:
            stack.enter_context(lock_folder(folder))
        signal = stack.enter_context(runtime.StopSignal())

        run = prepare(config, device)
        sums = Sums(device)  # of the open log window
        saved = resume(config, run, sums, folder / "checkpoints")
        if is_main:
            print("\n".join(run.summary), flush=True)
        if run.step >= run.total_steps and is_exported(run, folder):
            if is_main:
                print(console.finished_already(folder, run.step))
            return Result(folder, folder / "model", run.step)
        if is_main:
            loggers = start_output(config, origins, folder, run, saved)
            stack.callback(loggers.close)
        bar = stack.enter_context(console.ProgressBar(run.step, run.total_steps, config.log.progress_bar and is_main))
        evaluated_at = saved_at = run.step  # a resumed run has both behind it
        num_failed_saves, stop, failure = 0, False, None
        values, seconds, tokens = {}, 0.0, 0

        while True:
            done = stop or run.step >= run.total_steps

            # ---- 1. evaluate if due
            due = run.step % config.evaluate.eval_steps == 0 or run.step == run.total_steps
            if run.evals and (due and run.step > evaluated_at or config.evaluate.eval_on_start and run.step == 0):
                scores, losses, evaluated_at = {}, [], run.step
                for name, loader in run.evals.items():
                    with evaluation_weights(run.optimizer):
                        means = evaluate(run.model, loader, run.loss, run.device, run.precision)
                    losses.append(means["loss"])
                    scores |= {f"eval_{name}_{key}" if name else f"eval_{key}": mean for key, mean in means.items()}
                if run.step % config.evaluate.eval_steps == 0:  # not at the end of a run that may be prolonged
                    run.plateau = after_evaluation(run.plateau, losses[0], run.step, **run.schedule)
                values |= scores
                if is_main:
                    loggers.log(run.step, scores)
                    bar.say(console.console_line(run.step, scores))

            # ---- 2. save if due, asked for, or last
            if run.step > saved_at and (done or run.step % config.checkpoint.save_steps == 0):
                state, saved_at = training_state(config, run, sums), run.step
                if is_main:
                    num_failed_saves = try_save(
                        MAX_FAILED_SAVES - 1 if done else num_failed_saves,  # no later save makes up for the last
                        folder / "checkpoints",
                        run.step,
                        write_model=partial(write_state, run),
                        model=run.model,
                        optimizer=run.optimizer,
                        state={**state, **loggers.position()},
                        keep=config.checkpoint.save_total_limit,
                    )
            if done:
                break

            # ---- 3. the step's micro-batches, a pure function of (seed, data, epoch, step)
            began = time.perf_counter()
            epoch, step = divmod(run.step, run.train.steps_per_epoch)
            batches = run.train.step(epoch, step)

            # ---- 4 to 7. N, forward and backward, finite check, update
            is_logged = (run.step + 1) % config.log.logging_steps == 0 or run.step + 1 == run.total_steps
            result = train_step(run, config.train, batches, signal.received is not None, is_logged)
            stop = result.stop
            if not result.updated and (failure := handle_nonfinite(run, config.train, batches, folder)):
                if config.train.optimizer_in_backward:
                    raise failure  # before the weights, some of which are spoiled, are saved
                stop = True  # after a save of the step before this one
                continue
            run.step += 1
            if run.reference is not None:
                run.reference.follow(run.step)
            run.num_tokens += result.num_tokens
            sums.merge(result.stats)
            if config.data.packing:
                sums.add({"packing_fill": (result.num_tokens, run.train.num_packs(step) * run.train.plan.max_length)})

            # ---- 8. log the window: one division, one device sync
            seconds, tokens = seconds + time.perf_counter() - began, tokens + result.num_tokens
            if is_logged:
                window = sums.means() | progress(run)
                timings = {"tokens_per_second": tokens / seconds, "peak_memory_gib": peak_memory(device)}
                values, seconds, tokens = values | window, 0.0, 0
                bar.show(loss=window["loss"], lr=window["learning_rate"], tok_s=timings["tokens_per_second"])
                if is_main:
                    loggers.log(run.step, window, timings)
                    bar.log(console.console_line(run.step, window | timings))
            bar.update()

        if failure:
            raise failure
        bar.close()
        return finish(config, run, folder, values, signal)


# ---- the start --------------------------------------------------------------------------------------------------


def start_output(config: Config, origins: dict[str, str], folder: Path, run: Run, saved: dict | None) -> Loggers:
    """Tidy the output folder, see that checkpoints fit on its disk, record what the run is, open the logs."""
    for parent in (folder, folder / "checkpoints"):
        remove_leftovers(parent, locked=True)
    keep = config.checkpoint.save_total_limit
    require_space_for_checkpoints(folder / "checkpoints", run.model, run.optimizer, keep)
    write_resolved(config, origins, folder)
    (folder / "summary.txt").write_text("\n".join(run.summary) + "\n", encoding="utf-8")
    run_name = config.log.run_name or folder.resolve().name
    return Loggers(folder, list(config.log.report_to), run_name, config_to_dict(config), saved)


def resume(config: Config, run: Run, sums: Sums, folder: Path) -> dict | None:
    """Go on from the checkpoint that checkpoint.resume asks for, if there is one; returns its trainer_state."""
    path, skipped = find_checkpoint(folder, config.checkpoint.resume)
    run.summary += [f"skipped    {p}: {reason}" for p, reason in skipped]
    if path is None:
        return None
    was, now = read_json(path / "trainer_state.json").get("order", {}), data_order(config, run)
    if was != now:
        changed = ", ".join(
            f"{key} was {was.get(key)}, is {value}" for key, value in now.items() if was.get(key) != value
        )
        raise UserError(
            f"{path} cannot be resumed: tokens would be repeated and missed ({changed})",
            hint="go back to the data and the settings of that run, choose a new output_dir, or set resume = 'never'",
        )
    began, start = read_json(path / "trainer_state.json").get("started_from"), run.start
    if began and start and start.id and began != start.id:
        raise UserError(
            f"{path} cannot be resumed: that run started from another model than {start.adapter or start.name} is now "
            f"({began[:12]}, now {start.id[:12]})",
            hint="put the model back (model.revision names a commit), choose a new output_dir, or start this run over from "
            f"the model as it is now: resume = 'never', or move {config.output_dir} away",
        )
    optim, used = config.train.optim, read_json(path / "trainer_state.json").get("optim", config.train.optim)
    if optim != used and {optim, used} != {"adamw", "adamw_minisft"}:  # these two keep the same state
        hint = f"set optim = '{used}', or start a new run from the model of this one"
        raise UserError(f"{path} holds the state of {used}, but train.optim = '{optim}'", hint=hint)
    state = load_checkpoint(path, run.model, run.optimizer, read_model)
    if run.reference is not None:
        run.reference.load(path)
    run.step, run.num_tokens, run.nonfinite_steps = state["step"], state["num_tokens"], state["nonfinite_steps"]
    if state["precision"] == run.precision:
        run.loss_scale = LossScale(**state["loss_scale"])
    run.plateau = Plateau(**state.get("plateau", {}))
    sums.restore(state["sums"])
    run.summary.append(f"resumed    from {path}")
    return state


def training_state(config: Config, run: Run, sums: Sums) -> dict:
    """What a checkpoint holds besides weights and moments, as JSON. All ranks call it."""
    return {
        "num_tokens": run.num_tokens,
        "nonfinite_steps": run.nonfinite_steps,
        "precision": run.precision,
        "loss_scale": asdict(run.loss_scale),
        "plateau": asdict(run.plateau),
        "optim": config.train.optim,
        "started_from": run.start.id if run.start else None,
        "sums": sums.state(),
        "order": data_order(config, run),
    }


def data_order(config: Config, run: Run) -> dict:
    """What decides which tokens are in which step: a resumed run must have the same."""
    packing = config.data.packing_strategy if config.data.packing else "none"
    if config.data.packing and run.train.documents.shared is not None:
        packing += " of pairs that share a prompt"  # pairs of other lengths, in other packs
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
    }


# ---- during the run ---------------------------------------------------------------------------------------------


def progress(run: Run) -> dict[str, float]:
    """Where the run is: values to log that are no sums over the window."""
    skipped = {"nonfinite_steps": run.nonfinite_steps} if run.nonfinite_steps else {}
    return {
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "epoch": run.step / run.train.steps_per_epoch,
        "num_tokens": run.num_tokens,
        **skipped,
    }


def handle_nonfinite(run: Run, train: TrainSection, batches: list[Batch], folder: Path) -> UserError | None:
    """After a refused step: the error to stop with, or None to go on, as on_nonfinite says.

    An fp16 overflow is no failure, it lowers the loss scale; but a scale that sinks below 1 is.
    """
    if run.precision == "fp16" and run.loss_scale.scale >= 1.0:
        return None
    run.nonfinite_steps += 1
    if train.on_nonfinite == "skip":
        return None
    cache = run.train.documents.cache
    documents = torch.cat([batch.row_document[: batch.num_targets] for batch in batches]).unique().tolist()
    rows = list(dict.fromkeys(cache.place(document) for document in documents))  # a row may have several
    path = folder / f"nonfinite-step-{run.step:08d}-rank-{ranks.rank()}.json"
    write_json(path, {"step": run.step, "rows": rows})
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    result = "the update was refused"
    if train.optimizer_in_backward:
        result = "its updates were made in the backward pass, so the run stops without saving them"
    return UserError(
        f"step {run.step}: the loss or a gradient is not finite; {result}. Its rows: {', '.join(rows[:8])}{more}",
        hint=f"all of them are in {path}. Look at these rows; try a lower learning_rate or precision = 'fp32'; "
        "on_nonfinite = 'skip' leaves such steps out and counts them",
        exit_code=NONFINITE,
    )


def finish(config: Config, run: Run, folder: Path, values: dict, signal: runtime.StopSignal) -> Result:
    """Export the model, complete the held-out prompts, and say what there is now and what to do next."""
    is_main = ranks.rank() == 0
    if run.step < run.total_steps:
        if is_main:
            print(console.stopped(folder, run.step, run.total_steps, signal.received))
        return Result(folder, None, run.step, values, exit_code=STOPPED, signal=signal.received)
    if is_main:
        with evaluation_weights(run.optimizer):
            dtype = runtime.DTYPES[config.checkpoint.save_dtype or config.train.weights_dtype]
            export_model(run, folder, dtype, fingerprint(config))
            if run.prompts:
                length = config.evaluate.max_new_tokens
                samples = complete(
                    run.model, run.tokenizer, run.prompts, max_new_tokens=length, precision=run.precision
                )
                console.write_samples(folder / "samples.jsonl", samples)
                print(console.sample_report(samples, config.evaluate.generate_samples_shown))
                values["exact_match"] = sum(sample.correct for sample in samples) / len(samples)
        prompt = run.prompts[0].text if run.prompts and run.prompt_layout == "plain" else "..."
        print(console.closing(folder, config.log.report_to, prompt))
    return Result(folder, folder / "model", run.step, values, signal=signal.received)
