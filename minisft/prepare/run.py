"""From a configuration to the parts of a run, in the order in which they can fail.

Reading the data (prepare/data.py) needs no GPU and finds most mistakes, so it comes first; the model follows, then the
optimizer. Nothing here takes a step. Each part gives lines for the summary that is printed before the first step: the data
and the model that were found, the parameters that train, and the arithmetic of the steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from minisft import dpo, ranks, runtime, sft
from minisft.best import Best, best_metric, is_greater_better
from minisft.config.sections import Config
from minisft.data.loader import Loader, make_batch
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.generation import check_prompts
from minisft.heap import keep_freed_memory
from minisft.metrics import Sums, eval_name, names_of
from minisft.micro_batch import Graphs, forward_backward
from minisft.model.decoder import Decoder
from minisft.model.model_config import ModelConfig
from minisft.model.quantized import named_weights
from minisft.model.start import Start
from minisft.parallel import no_backward
from minisft.parameters import describe_trained
from minisft.plan.memory import MicroBatch, Place, describe, predict, shards_of
from minisft.preference.reference import Reference
from minisft.prepare.data import prepare_data, titled
from minisft.prepare.dpo import prepare_dpo
from minisft.prepare.kernels import describe_kernels, graph_round_to, pick_kernels, use_graphs
from minisft.prepare.model import find_longest_tree, prepare_model
from minisft.prepare.optimizer import describe_optimizer, prepare_optimizer
from minisft.prepare.options import format_options, prepare_tokenizer
from minisft.samples import Prompt, prompts_of, read_prompts
from minisft.schedule import Plateau, num_warmup_steps, total_steps
from minisft.spikes import Recent, Spikes
from minisft.update import LossScale


@dataclass
class Progress:
    """What changes while a run trains, besides its weights and moments. A checkpoint stores it."""

    sums: Sums  # the open log window
    loss_scale: LossScale
    plateau: Plateau = Plateau()
    best: Best = Best()
    step: int = 0  # optimizer steps taken
    evaluated_at: int = -1  # after how many steps the last evaluation was made; -1: there was none
    sampled_at: int = -1  # the same of the last samples
    num_tokens: int = 0  # over all ranks
    lr_scale: float = 1.0  # of all learning rates: another peak that control.toml asked for, over the configured one
    nonfinite_steps: int = 0  # that were skipped
    skips_in_a_row: int = 0  # steps that were not finite, or spikes
    spikes: Spikes = field(default_factory=Spikes)
    recent: Recent = field(default_factory=Recent)  # losses and norms, with which the next ones are compared


@dataclass(frozen=True)
class Run:
    """The parts of a run, which stay the same objects from the first step to the last."""

    progress: Progress
    device: torch.device
    precision: str  # of the matrix products: "bf16", "fp16" or "fp32"
    tokenizer: Tokenizer
    model: Decoder
    optimizer: torch.optim.Optimizer
    train: Loader
    evals: dict[str, Loader]  # evaluation sets by name; "" where there is one without a name
    eval_steps: int | None  # evaluate after so many steps; None: never
    save_steps: int | None  # save after so many steps; None: at the end only
    best_metric: str | None  # name of the metric whose best value is kept; None: of none
    prompts: list[Prompt]  # to be completed at the end
    sample_steps: int | None  # complete some prompts after so many steps; None: never
    sample_prompts: list[Prompt]
    weight: Callable  # the objective: see sft.py
    loss: Callable
    graphs: Graphs | None  # forward and backward of micro-batches as CUDA graphs; None: op by op
    reference: Reference | None  # of preference tuning
    schedule: dict  # arguments of lr_factor
    summary: list[str]  # printed before the first step
    prompting: dict  # how a question becomes a prompt, for the exported folder
    start: Start | None  # the model that it started from; None: random weights
    first_steps: dict[str, int]  # of the parameters that do not train from the start, by name
    measured: set[nn.Parameter]  # parameters whose zero updates are counted

    @property
    def total_steps(self) -> int:
        return self.schedule["total_steps"]


def prepare(config: Config, device: torch.device) -> Run:
    """Everything that a run needs. Raises UserError for whatever the user can mend."""
    if config.trainer_type == "dpo" and config.dpo.disable_dropout:
        config = replace(config, lora=replace(config.lora, lora_dropout=0.0))
    train = config.train
    precision = runtime.pick_precision(train, device)
    if device.type == "cpu":
        keep_freed_memory()
    if train.deterministic:
        runtime.use_deterministic_algorithms()
    pick_kernels(config.model.kernels, device)

    tokenizer, tokenizer_line = prepare_tokenizer(config)
    loader, evals, data_lines = prepare_data(config, tokenizer, partial(find_longest_tree, config, tokenizer))
    prompts = prepare_prompts(config, tokenizer)
    sample_prompts = prepare_sample_prompts(config, tokenizer, prompts, loader, evals)
    highest_id = partial(max_token_id, [loader, *evals.values()])
    model, model_lines, start = prepare_model(config, tokenizer, highest_id, device)
    if config.data.max_length is None and model.config.learned_positions:
        require_positions(model.config, [loader, *evals.values()])
    for key, some in (("generate_data", prompts), ("sample_steps", sample_prompts)):
        ids = [prompt.ids for prompt in some]
        check_prompts(model, ids, config.evaluate.max_new_tokens, name=f"evaluate.{key}: prompt")
    if loader.stream is not None:
        loader.stream.vocab_size = model.config.vocab_size
    lengths = loader.documents.lengths.astype(float)
    model.mean_length = (lengths**2).sum() / lengths.sum()  # over tokens, not over documents
    trained = prepare_optimizer(config, model)
    if config.trainer_type == "dpo":
        preference = prepare_dpo(config, model, trained.parameters, loader, evals, device, precision)
        weight, loss, loader, evals = dpo.weight, preference.loss, preference.train, preference.evals
        reference, preference_lines = preference.reference, preference.lines
    else:
        options = {"label_smoothing": train.label_smoothing, "z_loss": train.z_loss, "keep_rows": config.log.ledger}
        weight, loss = sft.weight, partial(sft.loss, **options)
        reference, preference_lines = None, []
    schedule = prepare_schedule(config, loader)
    graphs = None
    if use_graphs(config, model, device):
        graphs = Graphs(partial(forward_backward, loss, model, precision), sft.metric_weights, trained.parameters)
        loader = replace(loader, round_to=graph_round_to(loader))

    summary = [
        f"trainer    {config.trainer_type} on {device.type}, {precision}"
        + (f", {ranks.world_size()} ranks" if ranks.world_size() > 1 else ""),
        *(["           " + runtime.EMULATED] if runtime.is_emulated(precision, device) else []),
        tokenizer_line,
        *data_lines,
        *model_lines,
        f"optimizer  {describe_optimizer(train, trained.parameters)}",
    ]
    if config.verbose or trained.first_steps or not all(p.requires_grad for p in model.parameters()):
        table = describe_trained(named_weights(model), train.unfreeze, schedule["total_steps"])
        summary += titled("trains", table)
    summary += [
        *preference_lines,
        f"kernels    {describe_kernels(model, device)}" + (", as CUDA graphs" if graphs else ""),
        f"steps      {describe_steps(config, loader, schedule)}",
        f"predicted  {describe_memory(config, model, loader, device, precision)}",
    ]
    return Run(
        progress=Progress(Sums(device), LossScale(scale=2.0**16 if precision == "fp16" else 1.0)),
        device=device,
        precision=precision,
        tokenizer=tokenizer,
        model=model,
        optimizer=trained.optimizer,
        train=loader,
        evals=evals,
        eval_steps=interval(config.evaluate.eval_steps, loader),
        save_steps=interval(config.checkpoint.save_steps, loader),
        best_metric=prepare_best_metric(config, model, evals, loss, device, precision),
        prompts=prompts,
        sample_steps=interval(config.evaluate.sample_steps, loader),
        sample_prompts=sample_prompts,
        weight=weight,
        loss=loss,
        graphs=graphs,
        reference=reference,
        schedule=schedule,
        summary=summary,
        prompting={
            # how a question became a prompt in the training data: "chat", "instruction" or "plain"
            "prompt": loader.documents.cache.manifest["sources"][0]["prompt"],
            "chat_template_kwargs": config.model.chat_template_kwargs,
            "control_tokens": config.data.control_tokens,
            "max_length": config.data.max_length,  # some rotary tables depend on it
        },
        start=start,
        first_steps=trained.first_steps,
        measured=trained.measured,
    )


def prepare_prompts(config: Config, tokenizer: Tokenizer) -> list[Prompt]:
    """The held-out prompts of evaluate.generate_data."""
    if not config.evaluate.generate_data:
        return []
    return read_prompts(
        config.evaluate.generate_data,
        tokenizer,
        options=format_options(config),
        field_map=config.data.field_map,
        group_field=config.evaluate.generate_group_field,
    )


def prepare_sample_prompts(
    config: Config, tokenizer: Tokenizer, prompts: list[Prompt], loader: Loader, evals: dict[str, Loader]
) -> list[Prompt]:
    """The prompts that are completed every evaluate.sample_steps: some of generate_data, of the first evaluation set, or of the
    training data."""
    number = config.evaluate.generate_samples_shown
    if config.evaluate.sample_steps == "never" or number == 0:
        return []
    if not prompts:
        return prompts_of(next(iter(evals.values()), loader).documents, tokenizer, number)
    return [prompts[i] for i in np.linspace(0, len(prompts) - 1, min(number, len(prompts))).astype(int)]


def max_token_id(loaders: list[Loader]) -> int:
    """The highest token id of the data; reads all of the caches."""
    return max(int(loader.documents.cache.ids.max()) for loader in loaders)


def require_positions(c: ModelConfig, loaders: list[Loader]) -> None:
    """UserError where documents that no data.max_length cuts are longer than the learned positions, or may be."""
    longest, limit = max(int(loader.documents.lengths.max()) for loader in loaders), c.max_position_embeddings
    is_stream = loaders[0].stream is not None
    if longest > limit or is_stream:
        what = "documents of a stream may have any length" if is_stream else f"a document has {longest:,} tokens"
        problem = f'data.max_length = "none": {what}, and the model has {limit:,} positions'
        raise UserError(problem, hint=f"set data.max_length = {limit}, or less")


def prepare_best_metric(
    config: Config, model: Decoder, evals: dict[str, Loader], loss: Callable, device: torch.device, precision: str
) -> str | None:
    """The name of the metric whose best value is kept, if one is. Raises UserError for a name that evaluations do not have."""
    section = config.evaluate
    if not (section.metric_for_best_model or section.load_best_model_at_end or section.early_stopping_patience):
        return None
    known = []
    for name, loader in evals.items():
        with no_backward(model), runtime.autocast(device, precision):
            # a batch of filler trains nothing, and has the names of all metrics
            filler = make_batch(loader.documents, loader.packs(0), [], round_to=loader.round_to).to(device)
            known += [eval_name(name, key) for key in names_of(loss(model, filler, 1.0)[1])]
    metric = best_metric(section.metric_for_best_model, known)
    is_greater_better(metric, section.greater_is_better)
    return metric


# ---- arithmetic -------------------------------------------------------------------------------------------------


def interval(steps: int | str, loader: Loader) -> int | None:
    """eval_steps, save_steps or sample_steps as a number; None for "never"."""
    if steps == "epoch":
        return loader.steps_per_epoch
    return None if steps == "never" else int(steps)


def prepare_schedule(config: Config, loader: Loader) -> dict:
    """The arguments of lr_factor besides the step."""
    train = config.train
    steps = total_steps(loader.steps_per_epoch, train.num_train_epochs, train.max_steps)
    return {
        "name": train.lr_scheduler_type,
        "total_steps": steps,
        "warmup_steps": num_warmup_steps(steps, train.warmup_steps, train.warmup_ratio),
        "min_factor": train.min_lr / train.learning_rate if train.learning_rate else 0.0,
        **train.lr_scheduler_kwargs,
    }


def describe_memory(config: Config, model: Decoder, loader: Loader, device: torch.device, precision: str) -> str:
    """What a step will take at most, by the formulas of plan/memory.py: with the longest packs, or rows, in one micro-batch.

    No epoch is dealt for it: the packs of the first step may be those of a later one, where a run resumes.
    """
    if config.data.packing:
        tokens = min(loader.batch_size * loader.plan.max_length, loader.plan.num_tokens)
    else:
        lengths, number = loader.documents.unit_lengths, min(loader.batch_size, loader.plan.num_packs)
        tokens = int(np.partition(lengths, -number)[-number:].sum())
    number, shards = ranks.world_size(), shards_of(config, ranks.world_size())
    place = Place(device.type == "cuda", number, shards, torch.get_num_threads(), precision)
    return f"at most {describe(predict(config, model.config, MicroBatch(tokens, tokens), place))}"


def describe_steps(config: Config, loader: Loader, schedule: dict) -> str:
    """total steps = ceil(packs or rows / packs per step) x epochs, with the numbers."""
    train, unit = config.train, "packs" if config.data.packing else loader.documents.unit
    window = f"{train.per_device_train_batch_size} x {train.gradient_accumulation_steps} accumulated"
    if loader.context[1] > 1:
        window += f" x {loader.world_size} groups of {loader.context[1]} ranks"
    elif loader.world_size > 1:
        window += f" x {loader.world_size} ranks"
    text = f"{loader.plan.num_packs:,} {unit} / ({window}) = {loader.steps_per_epoch:,}"
    text += "" if loader.stream else " a pass"
    if loader.stream is not None:
        text += f" of this chunk; max_steps = {train.max_steps:,}"
    elif train.max_steps > 0:
        text += f"; max_steps = {train.max_steps:,}, that is {train.max_steps / loader.steps_per_epoch:.2f} passes"
    else:
        text += f", x {train.num_train_epochs:g} epochs = {schedule['total_steps']:,} steps"
    warmup = schedule["warmup_steps"]
    return text + (f", {warmup:,} of them warm-up" if warmup else "")
