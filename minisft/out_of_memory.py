"""Running out of memory: found before the first step, told in one error, or answered by smaller micro-batches.

`try_largest` runs the largest micro-batch of a run, by tokens and by targets, forward and backward before the first step, beside
an optimizer state of full size. Afterwards weights, state and random numbers are what they were.

A step that runs out of memory has changed nothing, as its update comes last: its gradients are dropped. With
train.on_oom = "split" it is taken again from its start with micro-batches of half as many packs. The loss of a step is
sum / N with N known before the first forward pass, so the loss and the gradients are the same up to rounding. What a
micro-batch draws at random (dropout, NEFTune) is drawn anew for the smaller ones.

All ranks have micro-batches of one size, and stop or go on together.
"""

import gc
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisft import ranks
from minisft.config.sections import Config, TrainSection
from minisft.data.batch import Batch
from minisft.data.loader import Largest
from minisft.errors import MEMORY, UserError, is_out_of_memory, warn
from minisft.metrics import peak_memory
from minisft.micro_batch import forward_backward
from minisft.optimizers import AdamW
from minisft.parallel import complete_in_backward, needs_others, part_with_gradient, sum_gradients
from minisft.prepare.run import Run
from minisft.units import size
from minisft.update import only, sum_gradients_in_fp32

CLEARLY_LARGER = 1.5  # times the tokens or targets of the first step's largest micro-batch


@dataclass
class OutOfMemory:
    """A context in which running out of memory ends the block, and is noted instead of raised. Whatever the block had is
    free after it."""

    ends: bool = False  # raise it: with sharded weights the other ranks wait for this one in the middle of a pass
    batch: Batch | None = None  # on the host: the micro-batch that was being computed; None: the optimizer's step
    message: str = ""  # of the error; "" where there was enough

    def __enter__(self) -> "OutOfMemory":
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        if error is None or self.ends or not is_out_of_memory(error):
            return False
        self.message = f"{type(error).__name__}: {error}"
        return True


# ---- smaller micro-batches --------------------------------------------------------------------------------------


def halve(run: Run, train: TrainSection, ran_out: OutOfMemory) -> bool:
    """Micro-batches of half as many packs for the rest of the run, with a warning. False, and nothing happens, with
    on_oom = "stop", and where one pack is alone already. All ranks call it."""
    loader = run.train
    before = loader.micro_batch_size or loader.batch_size
    if train.on_oom == "stop" or before == 1:
        return False
    use_micro_batch_size(run, math.ceil(before / 2))
    if ran_out.message or ranks.rank() == 0:
        what = _describe(run, ran_out) if ran_out.message else "another rank ran out of memory"
        warn(f"step {run.progress.step + 1}: {what}; {describe_micro_batches(run)} for the rest of the run")
    return True


def use_micro_batch_size(run: Run, micro_batch_size: int) -> None:
    """So many packs in a micro-batch from the next step on, and what depends on it: there are no gradients now."""
    run.train.micro_batch_size = micro_batch_size
    run.optimizer.zero_grad(set_to_none=True)
    sum_gradients_in_fp32(_trained(run))  # as there are several micro-batches in a step now
    if run.graphs is not None:
        run.graphs.forget()  # their memory is that of larger micro-batches
    if run.device.type == "cuda":
        gc.collect()  # what an error left in circles
        torch.cuda.empty_cache()


def describe_micro_batches(run: Run) -> str:
    loader = run.train
    unit = loader.documents.unit if loader.plan.strategy == "none" else "packs"
    return f"micro-batches of {loader.micro_batch_size:,} {unit} instead of {loader.batch_size:,}"


# ---- before the first step --------------------------------------------------------------------------------------


def try_largest(config: Config, run: Run) -> None:
    """Try the largest micro-batches of the steps to come, and add the line "memory" to the summary, as train.memory_check says.

    Raises UserError (exit code MEMORY) where they do not fit, with on_oom = "split" where none of one pack does.
    """
    while largest := _to_try(config.train, run):
        batches = [run.train.make(micro_batch) for micro_batch in largest]
        ran_out = trial_step(run, config.train, batches)
        if not ranks.any_rank(bool(ran_out.message)):
            shown = " and ".join(f"{batch.num_tokens:,} tokens with {batch.num_targets:,} targets" for batch in batches)
            few = "micro-batch, " if len(batches) == 1 else "micro-batches, by tokens and by targets, "
            run.summary.append(f"memory     tried the largest {few}{shown}: at most {_peak(run)}")
            return
        is_in_update = ranks.any_rank(bool(ran_out.message) and ran_out.batch is None)
        if is_in_update or not halve(run, config.train, ran_out):
            raise memory_error(
                config, run, ran_out, f"before step {run.progress.step + 1}, trying the largest micro-batch"
            )


def _to_try(train: TrainSection, run: Run) -> list[Largest]:
    """One or two micro-batches; none where they are not to be tried.

    A CPU takes long for one. There the first step tries it by itself, unless a later one is much larger.
    """
    if train.memory_check is False:
        return []
    step = run.progress.step
    largest = run.train.largest(step, run.total_steps)
    if train.memory_check is True or run.device.type != "cpu":
        return largest
    first = run.train.largest(step, step + 1)
    for key in ("num_tokens", "num_targets"):
        here, there = (max(getattr(micro_batch, key) for micro_batch in found) for found in (first, largest))
        if there > CLEARLY_LARGER * here:
            return largest
    return []


def trial_step(run: Run, train: TrainSection, batches: Iterable[Batch]) -> OutOfMemory:
    """An update with gradients of zero, then forward and backward of each batch beside the state that the optimizer has now.
    Weights, state, random numbers and gradients are as before afterwards. All ranks call it with the same batches.

    An update is one that can be taken back exactly: the first one of a parameter, whose learning rate is 0 and whose
    state is deleted again, or one that `AdamW` refuses. Where another optimizer has its state already, from a
    checkpoint, there is none.
    """
    model, optimizer, params = run.model, run.optimizer, _trained(run)
    rates = [group["lr"] for group in optimizer.param_groups]
    had_state = set(optimizer.state)
    is_cuda = run.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(run.device)
    ran_out, hooks = OutOfMemory(ends=needs_others(model)), []
    with torch.random.fork_rng([run.device] if is_cuda else []), ran_out:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        if train.optimizer_in_backward:
            for group in list(optimizer.param_groups):
                for p in group["params"]:
                    with only(optimizer, p, group):
                        _update_by_nothing(optimizer, [p], had_state)
                    p.grad = None
            hooks = [p.register_post_accumulate_grad_hook(_drop) for p in complete_in_backward(model)]
        else:
            _update_by_nothing(optimizer, params, had_state)
        several = train.gradient_accumulation_steps > 1 or run.train.micro_batch_size is not None
        for batch in batches:
            ran_out.batch = batch
            # a later micro-batch of a step runs beside the gradients of those before it
            optimizer.zero_grad(set_to_none=is_cuda and not several and run.graphs is None)
            forward_backward(run.loss, model, run.precision, batch.to(run.device), 0.0)
    if not ranks.any_rank(bool(ran_out.message)):
        sum_gradients(model)

    for hook in hooks:
        hook.remove()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    for p in set(optimizer.state) - had_state:
        del optimizer.state[p]
    optimizer.zero_grad(set_to_none=True)
    return ran_out


def _update_by_nothing(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], had_state: set[Tensor]) -> None:
    """Step with gradients of zero and a learning rate of 0."""
    is_refused = isinstance(optimizer, AdamW)
    for p in params:
        if is_refused or p not in had_state:  # without a gradient there is no update
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype or p.dtype)
    if is_refused:
        optimizer.step(clip=torch.full((), math.nan, device=params[0].device))
        optimizer.take_back()
    else:
        optimizer.step()


def _drop(p: nn.Parameter) -> None:
    """Its gradient, as the update in the backward would."""
    with part_with_gradient(p) as part:
        part.grad = None


def _trained(run: Run) -> list[nn.Parameter]:
    return [p for group in run.optimizer.param_groups for p in group["params"]]


# ---- the error --------------------------------------------------------------------------------------------------


def memory_error(config: Config, run: Run, ran_out: OutOfMemory, where: str) -> UserError:
    """What to stop with after running out of memory on this rank or on another one. where: in the run, as in "step 12"."""
    if not ran_out.message:
        hint = "its message names the micro-batch, and what to lower"
        return UserError(f"{where}: another rank ran out of memory", hint=hint, exit_code=MEMORY)
    result = _describe(run, ran_out)
    if ran_out.batch is not None:
        rows = rows_of(run, [ran_out.batch])
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        result += f". Its rows: {', '.join(rows[:8])}{more}"
    if config.train.optimizer_in_backward and ran_out.batch is not None:
        result += ". Some of its updates were made in the backward pass already, so the run stops without saving them"
    hint = f"change one of these, then the same command resumes: {'; '.join(_ways(config, run, ran_out.batch))}"
    return UserError(f"{where}: {result}", hint=hint, exit_code=MEMORY)


def evaluation_error(config: Config, run: Run, ran_out: OutOfMemory) -> UserError:
    """What to stop with after running out of memory in an evaluation. With several ranks it is raised at once, without a save:
    the others are waiting for a sum of their evaluation."""
    rows = config.evaluate.per_device_eval_batch_size
    less = f"evaluate.per_device_eval_batch_size = {rows // 2}" if rows > 1 else "data.max_length"
    error = UserError(
        f"evaluation after step {run.progress.step}: {_describe(run, ran_out, 'in a batch of it')}",
        hint=f"lower this: {less}",
        exit_code=MEMORY,
    )
    if ranks.world_size() > 1:
        raise error
    return error


def rows_of(run: Run, batches: Iterable[Batch]) -> list[str]:
    """The places of the rows with a target in these micro-batches."""
    documents = torch.cat([batch.row_document[: batch.num_targets] for batch in batches]).unique().tolist()
    return list(dict.fromkeys(map(run.train.documents.cache.place, documents)))  # a row may have several


def _describe(run: Run, ran_out: OutOfMemory, place: str = "in the optimizer's step") -> str:
    """place: where it happened, if it was not in a micro-batch."""
    asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", ran_out.message, re.IGNORECASE)
    what = "out of memory"
    if asked:
        amount, unit = asked.groups()
        what += f" (asked for {size(int(amount)) if unit == 'bytes' else f'{amount} {unit}'} more)"
    if (batch := ran_out.batch) is not None:
        place = f"in a micro-batch of {batch.num_tokens:,} tokens with {batch.num_targets:,} targets"
    return f"{what} {place}; at most {_peak(run)}"


def _peak(run: Run) -> str:
    peak = f"{peak_memory(run.device):.2f} GiB were in use"
    if run.device.type == "cuda":
        return f"{peak} of {torch.cuda.get_device_properties(run.device).total_memory / 2**30:.2f}"
    return f"{peak}, Python and PyTorch included"


def _ways(config: Config, run: Run, batch: Batch | None) -> list[str]:
    """What to lower, and by how much: first what changes nothing but the time of a step."""
    model, train, loader, ways = config.model, config.train, run.train, []
    now, of_step = loader.micro_batch_size or loader.batch_size, loader.batch_size * loader.accumulation
    if batch is not None and now > 1 and not train.optimizer_in_backward:
        # the same packs a step, so that a resume goes on
        half = next(n for n in range(now // 2, 0, -1) if of_step % n == 0)
        split = ', or on_oom = "split"' if train.on_oom == "stop" else ""
        ways.append(f"per_device_train_batch_size = {half} with gradient_accumulation_steps = {of_step // half}{split}")
    if batch is not None:
        if not model.gradient_checkpointing:
            ways.append('gradient_checkpointing = "selective" (a fifth of the saving), or true')
        elif model.gradient_checkpointing == "selective":
            ways.append("gradient_checkpointing = true")
        ways.append(f"max_length, below the {batch.max_seqlen:,} tokens of its longest document")
    if config.lora.r is None:
        ways.append("lora.r = 16, which trains adapters instead of all weights")
        if train.optim in ("adamw", "adamw_minisft"):
            ways.append('optim = "adamw_8bit", a quarter of the moments')
    return ways
