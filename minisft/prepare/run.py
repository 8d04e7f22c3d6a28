"""From a configuration to the parts of a run, in the order in which they can fail.

Reading the data (prepare/data.py) needs no GPU and finds most mistakes, so it comes first; the model follows, then the
optimizer. Nothing here takes a step. Each part gives lines for the summary that is printed before the first step: what was
found, what will be trained, and the arithmetic of the steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from minisft import dpo, ranks, runtime, sft
from minisft.config.sections import Config, TrainSection
from minisft.data.loader import Loader
from minisft.data.tokenizer import Tokenizer
from minisft.errors import CONFIG, UserError
from minisft.kernels.common import backend_for, use_backend
from minisft.kernels.flash_attention import unsupported
from minisft.model.quantized import named_weights, quantization_of
from minisft.model.start import Start
from minisft.parameters import choose_trainable, describe_trained, parameter_groups
from minisft.preference.reference import Reference
from minisft.prepare.data import format_options, prepare_data, prepare_tokenizer, titled
from minisft.prepare.dpo import prepare_dpo
from minisft.prepare.model import prepare_model
from minisft.samples import Prompt, read_prompts
from minisft.schedule import Plateau, num_warmup_steps, total_steps
from minisft.update import LossScale, build_optimizer, sum_gradients_in_fp32

OBJECTIVES = {"sft": sft, "dpo": dpo}


@dataclass
class Run:
    """The parts of a run. The last five fields change while it trains, and the weights and moments."""

    device: torch.device
    precision: str
    tokenizer: Tokenizer
    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: Loader
    evals: dict[str, Loader]  # evaluation sets by name; "" where there is one without a name
    prompts: list[Prompt]  # to be completed at the end
    weight: Callable  # the objective: see sft.py
    loss: Callable
    schedule: dict  # arguments of lr_factor
    summary: list[str]  # printed before the first step
    prompting: dict  # how the model is to be asked later, for the exported folder
    start: Start | None  # what it started from; None: random weights
    measured: set[nn.Parameter]  # parameters whose zero updates are counted
    loss_scale: LossScale
    first_steps: dict[str, int]  # of the parameters that do not train from the start
    reference: Reference | None = None  # of preference tuning
    plateau: Plateau = Plateau()
    step: int = 0
    num_tokens: int = 0  # seen so far, over all ranks
    nonfinite_steps: int = 0

    @property
    def prompt_layout(self) -> str:
        return self.prompting["prompt"]

    @property
    def total_steps(self) -> int:
        return self.schedule["total_steps"]


def prepare(config: Config, device: torch.device) -> Run:
    """Everything that a run needs. Raises UserError for whatever the user can mend."""
    is_dpo = config.trainer_type == "dpo"
    if is_dpo and config.dpo.disable_dropout:
        config = replace(config, lora=replace(config.lora, lora_dropout=0.0))
    train = config.train
    precision = "bf16" if train.weights_dtype == "bf16" else runtime.pick_precision(train.precision, device)
    if train.deterministic:
        runtime.use_deterministic_algorithms()
    pick_kernels(config.model.kernels, device)

    tokenizer, tokenizer_line = prepare_tokenizer(config)
    loader, evals, data_lines = prepare_data(config, tokenizer)
    prompts = []
    if config.evaluate.generate_data:
        prompts = read_prompts(
            config.evaluate.generate_data,
            tokenizer,
            options=format_options(config),
            field_map=config.data.field_map,
            group_field=config.evaluate.generate_group_field,
        )
    caches = [loader.documents.cache, *(held_out.documents.cache for held_out in evals.values())]
    highest_id = lambda: max(int(cache.ids.max()) for cache in caches)  # noqa: E731
    model, model_lines, start = prepare_model(config, tokenizer, highest_id, device)
    lengths = loader.documents.lengths.astype(float)
    model.mean_length = (lengths**2).sum() / lengths.sum()  # over tokens, not over documents
    first_steps = choose_trainable(model, trainable=train.trainable, frozen=train.frozen, unfreeze=train.unfreeze)
    groups = parameter_groups(
        model,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        learning_rates=train.learning_rates,
        weight_decays=train.weight_decays,
        lora_plus_ratio=config.lora.loraplus_lr_ratio,
    )
    betas = train.adam_beta1, train.adam_beta2
    optimizer = build_optimizer(
        train.optim,
        groups,
        betas=betas,
        eps=train.adam_epsilon,
        offload=train.offload_optimizer,
        rounding_seed=train.seed if train.stochastic_rounding else None,
        **train.optim_args,
    )
    if train.optimizer_in_backward and ranks.world_size() > 1:
        hint = "the ranks sum their gradients once all are there; set optimizer_in_backward = false"
        raise UserError(f"train.optimizer_in_backward on {ranks.world_size()} ranks", hint=hint)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    if train.gradient_accumulation_steps > 1 or ranks.world_size() > 1:
        sum_gradients_in_fp32(trained)
    if (wanted := config.log.zero_update_fraction) is None:
        measured = {p for p in trained if p.dtype == torch.bfloat16}
    else:
        measured = trained if wanted else set()
    objective = OBJECTIVES[config.trainer_type]
    if is_dpo:
        preference = prepare_dpo(config, model, trained, loader, evals, device, precision)
        loss, loader, evals = preference.loss, preference.train, preference.evals
        reference, preference_lines = preference.reference, preference.lines
    else:
        loss = partial(objective.loss, label_smoothing=train.label_smoothing, z_loss=train.z_loss)
        reference, preference_lines = None, []
    steps = total_steps(loader.steps_per_epoch, train.num_train_epochs, train.max_steps)
    schedule = {
        "name": train.lr_scheduler_type,
        "total_steps": steps,
        "warmup_steps": num_warmup_steps(steps, train.warmup_steps, train.warmup_ratio),
        "min_factor": train.min_lr / train.learning_rate if train.learning_rate else 0.0,
        **train.lr_scheduler_kwargs,
    }
    show_trained = config.verbose or first_steps or not all(p.requires_grad for p in model.parameters())
    where = f"{device.type}, {precision}" + (f", {ranks.world_size()} ranks" if ranks.world_size() > 1 else "")
    return Run(
        device=device,
        precision=precision,
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        train=loader,
        evals=evals,
        prompts=prompts,
        weight=objective.weight,
        loss=loss,
        schedule=schedule,
        summary=[
            f"trainer    {config.trainer_type} on {where}",
            tokenizer_line,
            *data_lines,
            *model_lines,
            f"optimizer  {describe_optimizer(train, trained)}",
            *(titled("trains", describe_trained(named_weights(model), train.unfreeze, steps)) if show_trained else []),
            *preference_lines,
            f"kernels    {describe_kernels(model, device)}",
            f"steps      {describe_steps(config, loader, schedule)}",
        ],
        prompting={
            # how a question became a prompt in the training data: "chat", "instruction" or "plain"
            "prompt": loader.documents.cache.manifest["sources"][0]["prompt"],
            "chat_template_kwargs": config.model.chat_template_kwargs,
            "max_length": config.data.max_length,  # some rotary tables depend on it
        },
        start=start,
        measured=measured,
        loss_scale=LossScale(scale=2.0**16 if precision == "fp16" else 1.0),
        first_steps=first_steps,
        reference=reference,
    )


def pick_kernels(name: str, device: torch.device) -> None:
    """Set the backend of all ops. Raises UserError where Triton is asked for and cannot run."""
    use_backend(name)
    backend_of("rms_norm", device)


def backend_of(op: str, device: torch.device, cannot: str = "") -> str:
    """`backend_for`, with a UserError where Triton is asked for and cannot run."""
    try:
        return backend_for(op, torch.empty(0, device=device), cannot)
    except ValueError as error:
        raise UserError(f"kernels: {error}", hint='"auto" takes Triton where it can run', exit_code=CONFIG) from error


def describe_kernels(model: nn.Module, device: torch.device) -> str:
    """The backend of the model's ops: "triton", or "triton, but torch for layer_norm". Warns where a GPU has no kernel.

    Raises UserError where Triton is asked for and has none for this model.
    """
    config, quantization = model.config, quantization_of(model)
    gate = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu"}[config.activation]
    uses = {
        "flash_attention": True,
        "linear_cross_entropy": True,
        f"{config.norm}_norm": True,
        "rope": any(config.ropes),
        gate: config.mlp == "glu",
    }
    if quantization is not None:
        uses[f"dequantize_{quantization.quant_type}"] = True
    cannot = {"flash_attention": unsupported(config.head_dim)}
    backends = {op: backend_of(op, device, cannot.get(op, "")) for op, used in uses.items() if used}
    most = max(backends.values(), key=list(backends.values()).count)
    others = [f"{backend} for {op}" for op, backend in backends.items() if backend != most]
    return most + (f", but {', '.join(others)}" if others else "")


def describe_optimizer(train: TrainSection, trained: set[nn.Parameter]) -> str:
    """Its name, and what is special about it."""
    notes = [train.optim]
    if train.offload_optimizer:
        notes.append("moments in CPU memory")
    if train.optimizer_in_backward:
        notes.append("updates in the backward pass")
    if any(p.dtype == torch.bfloat16 for p in trained):
        how = "by chance" if train.stochastic_rounding else "to the nearest"
        grads = {"bf16" if p.grad_dtype == torch.bfloat16 else "fp32" for p in trained if p.dtype == torch.bfloat16}
        notes.append(f"weights in bf16, rounded {how}, their gradients in {grads.pop()}")
    return ", ".join(notes)


# ---- arithmetic -------------------------------------------------------------------------------------------------


def describe_steps(config: Config, loader: Loader, schedule: dict) -> str:
    """total steps = ceil(packs or rows / packs per step) x epochs, with the numbers."""
    train, unit = config.train, "packs" if config.data.packing else loader.documents.cache.unit
    window = f"{train.per_device_train_batch_size} x {train.gradient_accumulation_steps} accumulated"
    if loader.world_size > 1:
        window += f" x {loader.world_size} ranks"
    text = f"{loader.plan.num_packs:,} {unit} / ({window}) = {loader.steps_per_epoch:,} a pass"
    if train.max_steps > 0:
        text += f"; max_steps = {train.max_steps:,}, that is {train.max_steps / loader.steps_per_epoch:.2f} passes"
    else:
        text += f", x {train.num_train_epochs:g} epochs = {schedule['total_steps']:,} steps"
    warmup = schedule["warmup_steps"]
    return text + (f", {warmup:,} of them warm-up" if warmup else "")
