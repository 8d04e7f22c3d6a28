"""The loop. `run` trains a model from a configuration, `take_steps` goes through steps 1 to 8, `train_step` is 4 to 7 of them.

The parts of a run are made by prepare/run.py before the first step, so that whatever can fail fails early. The loop does not
know which trainer it serves: an objective is two functions, `weight` and `loss` (sft.py).

Data order, dropout and noise are pure functions of (seed, step). A run that was stopped, killed or moved therefore resumes
exactly where its last checkpoint was: nothing is replayed, and there is no generator state to save or to lose.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from minisft import best, console, ranks, runtime, schedule, signals
from minisft.atomic_folder import lock_folder
from minisft.bad_steps import handle_bad_step
from minisft.begin import open_loggers, require_unchanged, start_control, start_output, start_saver
from minisft.checkpoint import checkpoint_bytes, step_folder
from minisft.config.sections import Config, TrainSection
from minisft.config.stages import has_samples
from minisft.control import Control, Request
from minisft.data.batch import Batch
from minisft.errors import STOPPED, Stopped, warn
from minisft.evaluation import evaluate
from minisft.export import checkpoint_contents, is_exported, other_bytes
from minisft.finish import Result, finish, is_complete
from minisft.ledger import Ledger
from minisft.loggers import Loggers
from minisft.metrics import ROW_LOSSES, Sums, eval_name, peak_memory
from minisft.micro_batch import forward_backward
from minisft.optimizers import evaluation_weights
from minisft.out_of_memory import OutOfMemory, evaluation_error, halve, memory_error, try_largest
from minisft.parallel import (
    complete_in_backward,
    is_sharded,
    needs_others,
    part_with_gradient,
    parts_with_gradients,
    share_of,
    sum_gradients,
    total_norm,
    waiting,
)
from minisft.prepare.run import Run, prepare
from minisft.replicas import GradientSum
from minisft.resume import require_same_state, resume, rewind, training_state
from minisft.runtime import copy_back
from minisft.samples import complete
from minisft.saver import Saver
from minisft.schedule import lr_factor
from minisft.signals import StopSignal
from minisft.spikes import Recent
from minisft.update import (
    ZeroUpdates,
    clip_and_update,
    gradient_norms,
    gradients,
    is_accepted,
    make_gradients,
    unscale,
    update_in_backward,
)


@dataclass(frozen=True)
class StepResult:
    updated: bool  # False: weights and moments are untouched, on every rank
    is_bad: bool  # the loss or a gradient is not finite, or a spike
    loss: float  # of the step: over all micro-batches and ranks
    grad_norm: float
    stop: bool  # some rank was asked to stop
    asked: Request  # by control.toml
    num_tokens: int  # over all ranks
    stats: Sums  # metrics of the step
    ran_out: OutOfMemory | None = None  # of memory, on some rank: nothing else happened
    rows: tuple = ()  # with log.ledger: (documents, losses) of this rank's micro-batches, on the host


def run(config: Config, origins: dict[str, str], signal: StopSignal) -> Result:
    """Train as `config` says. origins: where each value came from, recorded in the output folder.

    Raises UserError for whatever the user can mend, before the first step where that can be known, and Stopped for a signal
    before it.
    """
    signal.end_at_once(signals.BEFORE_STEPS)  # also one that was noted in the stage before
    with ExitStack() as stack:
        folder = Path(config.output_dir)
        device = runtime.pick_device(config.train.device)
        stack.enter_context(ranks.process_group(device))
        is_main = ranks.rank() == 0
        if is_main:
            stack.enter_context(lock_folder(folder))
        prepared = prepare(config, device)
        progress, total_steps = prepared.progress, prepared.total_steps
        saved = resume(config, prepared, folder / "checkpoints")
        require_same_state(config, prepared)
        is_finished = is_complete(config, prepared) and ranks.from_first_rank(is_exported(prepared, folder))
        if not is_complete(config, prepared):
            try_largest(config, prepared)
        control = None
        if is_main:
            control = start_control(config, prepared, folder)
            print(console.wrap(prepared.summary), flush=True)
        if is_finished:
            require_unchanged(config, folder, saved)
            if has_samples(config):
                if is_main:
                    print(console.finished_already(folder, progress.step))
                return Result(folder, folder / "model", progress.step)
        loggers = ledger = None
        if is_main:
            loggers = start_output(config, origins, folder, prepared, saved)
            stack.callback(lambda: loggers.close())  # those of the end
        has_bar = config.log.progress_bar and is_main
        bar = stack.enter_context(console.ProgressBar(progress.step, total_steps, has_bar, signal.lose_reader))
        ranks.expect_steps()
        saver = stack.enter_context(start_saver(config, prepared, folder))
        if config.log.ledger and prepared.train.context[0] == 0:  # of the ranks that share a batch the first
            ledger = stack.enter_context(closing(Ledger(folder, ranks.rank(), progress.step)))
        while True:
            with closing(prepared.train.steps(progress.step, total_steps, ahead=device.type == "cuda")) as steps:
                values = take_steps(config, prepared, steps, folder, saver, loggers, bar, signal, control, ledger)
            if not isinstance(values, Path):
                break
            saved = rewind(config, prepared, values)  # a spike made the run go back to this checkpoint
            bar.back_to(progress.step)
            if ledger:
                ledger.back_to(progress.step)
            if loggers and control:
                control.back_to(progress.step)
                loggers.close()
                loggers = open_loggers(config, folder, saved)
        bar.close()
        return finish(config, prepared, folder, loggers, bar, values, signal, control)


def take_steps(
    config: Config,
    run: Run,
    steps: Iterator[list[Batch]],
    folder: Path,
    saver: Saver,
    loggers: Loggers | None,
    bar: console.ProgressBar,
    signal: StopSignal,
    control: Control | None,
    ledger: Ledger | None = None,
) -> dict[str, float] | Path:
    """The loop: steps until the run is done, or asked to stop. Returns the last value of everything logged; or the checkpoint to
    go back to, where on_spike = "rewind".

    steps: the micro-batches of each step that is to be taken. loggers, control: None on all ranks but the first; ledger: None
    without log.ledger. Raises UserError where memory runs out, or a step is not finite, or a spike, and the policy is to stop.
    """
    progress, total_steps = run.progress, run.total_steps
    saved_at = progress.step  # a resumed run was saved at this step already
    stop, asked, failure = False, Request(), None
    values, seconds, waited, tokens = {}, 0.0, 0.0, 0

    while True:
        stop = stop or asked_alone(signal)

        # ---- 1. evaluate and sample if due; a run that is stopped before the end of it evaluates after it is resumed
        if is_evaluation_due(config, run, asked.evaluate) and not stop and failure is None:
            signal.note("giving up this evaluation, which the next start makes, saving, then stopping")
            with OutOfMemory(ends=needs_others(run.model)) as ran_out:
                try:
                    scores = evaluate_sets(config, run, signal)
                except Stopped:
                    stop = True
                else:
                    values, progress.evaluated_at = values | scores, progress.step
                    if loggers:
                        loggers.log(progress.step, scores)
                        bar.evaluated(progress.step, scores)
            if ran_out.message:
                failure, stop = evaluation_error(config, run, ran_out), True

        is_sampling_due = run.sample_steps is not None and progress.step % run.sample_steps == 0
        if is_sampling_due and progress.step != progress.sampled_at and not stop and failure is None:
            signal.note("sampling, saving, then stopping")
            sample(config, run, loggers, bar)

        # ---- 2. save if due, asked for, the best, or last
        signal.note("stopping once a checkpoint is written")
        saver.publish_if_ready()
        done = stop or is_complete(config, run)
        is_due = asked.save or run.save_steps is not None and progress.step % run.save_steps == 0
        if progress.step > saved_at and (is_due or done or progress.best.step == progress.step):
            if ledger:
                ledger.sync()
            saved_at = progress.step
            save(config, run, saver, loggers, is_last=done)
        if done or saved_at == progress.step and asked_alone(signal):
            break

        # ---- 3. the step's micro-batches, a pure function of (seed, data, epoch, step); for a GPU they are made in advance
        began = time.perf_counter()
        signal.note("saving at the end of a step, then stopping")
        batches = next(steps)
        waited += time.perf_counter() - began

        # ---- 4 to 7. N, forward and backward, finite check, update
        is_logged = (progress.step + 1) % config.log.logging_steps == 0 or progress.step + 1 == total_steps
        request = control.before_step(progress.step + 1) if control else Request()
        result = take_step(config, run, batches, signal, is_logged, request)
        asked, stop = result.asked, result.stop or result.asked.stop
        if result.ran_out is not None:
            failure, stop = memory_error(config, run, result.ran_out, f"step {progress.step + 1}"), True
            if config.train.optimizer_in_backward:
                raise failure  # some weights are updated already
            continue  # after a save of the step before this one
        if result.is_bad:
            saver.finish()  # the run may go back to it
            outcome = handle_bad_step(run, config.train, batches, folder, result.loss, result.grad_norm)
            if isinstance(outcome, Path):
                return outcome
            if outcome:
                if config.train.optimizer_in_backward:
                    raise outcome  # before the weights, some of which are spoiled, are saved
                failure, stop = outcome, True
                continue  # after a save of the step before this one
        progress.step += 1
        if ledger:
            ledger.write(progress.step, result.rows, run.train.documents.numbers)
        if result.updated:
            progress.skips_in_a_row = 0
        if progress.step not in progress.spikes.left_out and math.isfinite(result.loss + result.grad_norm):
            progress.recent.add(result.loss, result.grad_norm)
        if run.reference is not None:
            run.reference.follow(progress.step)
        progress.num_tokens += result.num_tokens
        progress.sums.merge(result.stats)
        if config.data.packing:
            capacity = run.train.num_packs(run.train.at(progress.step - 1)[1]) * run.train.plan.max_length
            progress.sums.add({"packing_fill": (result.num_tokens, capacity)})

        # ---- 8. log the window: one division, one device sync
        seconds, tokens = seconds + time.perf_counter() - began, tokens + result.num_tokens
        if is_logged:
            window = progress.sums.means() | progress_values(run)
            timings = {"tokens_per_second": tokens / seconds, "data_wait_fraction": waited / seconds}
            timings["peak_memory_gib"] = peak_memory(run.device)
            values, seconds, waited, tokens = values | window, 0.0, 0.0, 0
            if loggers:
                loggers.log(progress.step, window, timings)
                bar.log(progress.step, window, timings["tokens_per_second"])
        bar.update()

    saver.finish(is_last=True)
    if failure:
        raise failure
    return values


def take_step(
    config: Config, run: Run, batches: list[Batch], signal: StopSignal, is_logged: bool, request: Request
) -> StepResult:
    """`train_step`; where memory runs out and on_oom = "split", again from its start, with smaller micro-batches."""
    result = train_step(run, config.train, batches, signal.received is not None, is_logged, request)
    while result.ran_out is not None and halve(run, config.train, result.ran_out):
        batches = run.train.step(*run.train.at(run.progress.step))
        result = train_step(run, config.train, batches, signal.received is not None, is_logged, request)
    return result


def train_step(
    run: Run,
    train: TrainSection,
    batches: list[Batch],
    stop_asked: bool = False,
    is_logged: bool = False,
    request: Request = Request(),  # noqa: B008 - frozen
) -> StepResult:
    """One optimizer step over this rank's micro-batches. is_logged: count the zero updates too. request: of this rank.

    The loss of the step is the sum of weight x nll over all micro-batches and ranks, divided by N, the sum of their
    weights over the same.
    """
    optimizer, progress, scale = run.optimizer, run.progress, run.progress.loss_scale.scale

    # ---- 4. N of the whole step, over all ranks, known before the first forward pass; and the learning rate
    weights = [run.weight(batch) for batch in batches]
    totals = [sum(weights), len(batches), sum(batch.num_tokens for batch in batches), float(stop_asked)]
    totals = ranks.sum_numbers_over_ranks(totals + request.numbers())
    (total_weight, num_batches, num_tokens, num_stops), asked = totals[:4], Request.of(*totals[4:])
    if asked.learning_rate:
        progress.lr_scale = asked.learning_rate / train.learning_rate
    factor = lr_factor(step=progress.step, **run.schedule) * progress.plateau.factor * progress.lr_scale
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor

    # ---- 5. forward, loss, backward: the gradients of the micro-batches add up in fp32
    for name, first_step in run.first_steps.items():  # parameters that train from a later step on
        run.model.get_parameter(name).requires_grad_(progress.step >= first_step)
        if progress.step == first_step:  # a norm of more parameters is not comparable with those before
            progress.recent = Recent()
    runtime.seed_step(train.seed, progress.step)
    stats, losses, rows = Sums(run.device), [], []
    in_backward = train.optimizer_in_backward
    zero_updates = ZeroUpdates(run.measured if is_logged and factor else set(), share_of)
    # On a CPU gradients keep their place: new ones each step would lie between activations, and their holes cost 0.09 GB of 2.0.
    keeps_gradients = run.device.type == "cpu" and not in_backward and not is_sharded(run.model)
    ran_out, updates = OutOfMemory(ends=needs_others(run.model)), nullcontext({})
    if in_backward:
        updates = update_in_backward(complete_in_backward(run.model), optimizer, zero_updates, part_with_gradient)
    gradient_sum = GradientSum(run.model, ranks.world_size() > 1 and not is_sharded(run.model))
    with ran_out, waiting(run.model), updates as norm_of:
        if keeps_gradients:
            make_gradients(run.model)
        for batch, weight in zip(batches, weights):
            ran_out.batch = batch
            # "micro_batch" is the mean of the micro-batches' means, as older trainers have it
            n = total_weight if train.loss_normalization == "tokens" else weight * num_batches
            work = batch.to(run.device), scale / max(n, 1e-12)
            if run.graphs is not None:
                loss, metrics = run.graphs(*work)
            else:
                with gradient_sum if batch is batches[-1] else nullcontext():
                    loss, metrics = forward_backward(run.loss, run.model, run.precision, *work)
            losses.append(loss)
            if ROW_LOSSES in metrics:
                rows.append((batch.row_owners, copy_back(metrics.pop(ROW_LOSSES)[0])))
            stats.add(metrics)
    gradient_sum.finish()  # also where memory ran out: the other ranks wait for this one's gradients
    if ranks.any_rank(bool(ran_out.message)):
        optimizer.zero_grad(set_to_none=True)
        return StepResult(False, False, math.nan, math.nan, num_stops > 0, asked, 0, stats, ran_out)

    # ---- 6. the gradient's norm; what it and the loss must not exceed, on which all ranks agree
    grads = sum_gradients(run.model) if is_sharded(run.model) else gradients(run.model)
    unscale(grads, scale)
    norm_of |= zip(parts_with_gradients(run.model), gradient_norms(grads))
    norm = total_norm(run.model, norm_of, run.device)
    stats.add({"grad_norm": (norm, 1.0)})
    sums = ranks.sum_over_ranks(torch.stack([torch.stack(losses).sum(), norm]))
    units = max(total_weight, 1e-12), ranks.world_size()  # of which sums are the sums
    is_left_out = progress.step + 1 in progress.spikes.left_out
    highest = (-math.inf, -math.inf) if is_left_out else progress.recent.limits(train.spike_threshold)
    limits = [limit * unit for limit, unit in zip(highest, units)]

    # ---- 7. clip, update what is not updated yet
    refusing = None if in_backward or train.on_spike == "warn" and not is_left_out else limits
    with zero_updates.counted():
        updated, sums = clip_and_update(optimizer, grads, norm, train.max_grad_norm, sums, refusing)
    if updated:
        stats.add(zero_updates.metrics())
    if run.precision == "fp16":
        progress.loss_scale.update(overflow=not is_accepted(sums))
    optimizer.zero_grad(set_to_none=run.graphs is None and not keeps_gradients)
    is_bad = not (is_left_out or is_accepted(sums, limits))
    loss, grad_norm = (value / unit for value, unit in zip(sums.tolist(), units))
    # they have arrived: their copies were queued before that of the sums
    rows = tuple((owners.numpy(), values[: len(owners)].numpy()) for owners, values in rows)
    return StepResult(updated, is_bad, loss, grad_norm, num_stops > 0, asked, int(num_tokens), stats, rows=rows)


# ---- during the run ---------------------------------------------------------------------------------------------


def asked_alone(signal: StopSignal) -> bool:
    """Whether a run of one rank is asked to stop. Several ranks must agree, which they do at the start of each step."""
    return signal.received is not None and ranks.world_size() == 1


def raise_if_any_asked(signal: StopSignal) -> None:
    if ranks.any_rank(signal.received is not None):
        raise Stopped("stopped by a signal", STOPPED)


def is_evaluation_due(config: Config, run: Run, is_asked: bool) -> bool:
    """After every eval_steps steps, at the end and where it is asked for, once each; with eval_on_start before the first step."""
    step = run.progress.step
    if not run.evals or step == run.progress.evaluated_at:
        return False
    if step and is_asked:
        return True
    if run.eval_steps is None:
        return False
    return step % run.eval_steps == 0 or step == run.total_steps if step else config.evaluate.eval_on_start


def evaluate_sets(config: Config, run: Run, signal: StopSignal) -> dict[str, float]:
    """The means of every evaluation set, as eval_<name>_loss. The first set's loss moves the plateau of the schedule, and one
    metric is compared with the best so far. Raises Stopped on all ranks, and changes nothing, where one is asked to stop."""
    progress, section, means = run.progress, config.evaluate, {}
    with evaluation_weights(run.optimizer):
        for name, loader in run.evals.items():
            poll = partial(raise_if_any_asked, signal)
            means[name] = evaluate(run.model, loader, run.loss, run.device, run.precision, poll)
    scores = {eval_name(name, key): mean for name, of_set in means.items() for key, mean in of_set.items()}
    # An evaluation that is due only because the run ends must not move the plateau: with more epochs it would not have
    # happened, and a run that is resumed to train longer would differ.
    is_regular = run.eval_steps is not None and progress.step % run.eval_steps == 0
    if is_regular:
        first = next(iter(means.values()))
        progress.plateau = schedule.after_evaluation(progress.plateau, first["loss"], progress.step, **run.schedule)
    if run.best_metric and progress.step > 0:
        progress.best = best.after_evaluation(
            progress.best,
            scores.get(run.best_metric, math.nan),
            progress.step,
            greater_is_better=best.is_greater_better(run.best_metric, section.greater_is_better),
            threshold=section.early_stopping_threshold,
            counts=is_regular,
        )
    return scores


def sample(config: Config, run: Run, loggers: Loggers | None, bar: console.ProgressBar) -> None:
    """Complete some prompts, as many at once as in a batch of an evaluation; the first rank shows the answers. Nothing of the
    training changes: the most likely tokens are taken, without a random number."""
    run.progress.sampled_at = run.progress.step
    if not run.sample_prompts or loggers is None and not is_sharded(run.model):
        return
    section = config.evaluate
    with OutOfMemory(ends=is_sharded(run.model)) as ran_out, evaluation_weights(run.optimizer):
        samples = complete(
            run.model,
            run.tokenizer,
            run.sample_prompts,
            max_new_tokens=section.max_new_tokens,
            precision=run.precision,
            batch_size=section.per_device_eval_batch_size,
        )
    if ran_out.message:
        warn(f"no samples of step {run.progress.step}: {ran_out.message}")
    elif loggers:
        rows = [{"prompt": s.prompt.text, "answer": s.prompt.answer, "output": s.output} for s in samples]
        loggers.samples(run.progress.step, rows)
        bar.say(console.sample_lines(run.progress.step, run.total_steps, samples))


def save(config: Config, run: Run, saver: Saver, loggers: Loggers | None, is_last: bool) -> None:
    """Save the checkpoint of this step, or begin to. is_last: as `Saver.save` has it."""
    state = training_state(config, run)  # all ranks add their sums
    saver.save(
        run.progress.step,
        checkpoint_contents(run, {"step": run.progress.step, **state, **(loggers.position() if loggers else {})}),
        needed=checkpoint_bytes(run.model, run.optimizer) + other_bytes(run),
        pinned=[step_folder(saver.folder, run.progress.best.step)],
        is_last=is_last,
    )


def progress_values(run: Run) -> dict[str, float]:
    """Where the run is: logged values that are not sums over the window."""
    progress = run.progress
    counts = {"nonfinite_steps": progress.nonfinite_steps, "spikes": progress.spikes.count}
    unusual = {name: count for name, count in counts.items() if count}
    unusual |= {"micro_batch_size": run.train.micro_batch_size} if run.train.micro_batch_size else {}
    unusual |= {"loss_scale": progress.loss_scale.scale} if run.precision == "fp16" else {}
    return {
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        **run.train.epoch(progress.step),
        "num_tokens": progress.num_tokens,
        **unusual,
    }
