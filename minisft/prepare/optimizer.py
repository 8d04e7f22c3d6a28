"""The optimizer of a run, over the parameters that train."""

from dataclasses import dataclass

import torch
from torch import nn

from minisft import ranks
from minisft.config.sections import Config, TrainSection
from minisft.errors import UserError
from minisft.model.decoder import Decoder
from minisft.optimizers import build_optimizer
from minisft.parallel import is_sharded, part_of
from minisft.parameters import choose_trainable, parameter_groups
from minisft.update import sum_gradients_in_fp32


@dataclass(frozen=True)
class Trained:
    """The optimizer and its parameters."""

    optimizer: torch.optim.Optimizer
    parameters: set[nn.Parameter]
    first_steps: dict[str, int]  # of the parameters that do not train from the start, by name
    measured: set[nn.Parameter]  # parameters whose zero updates are counted


def prepare_optimizer(config: Config, model: Decoder) -> Trained:
    """Freezes the parameters that never train. Raises UserError where options do not fit the model or the ranks."""
    train = config.train
    if train.optimizer_in_backward and ranks.world_size() > 1 and not is_sharded(model):
        hint = 'whole gradients are summed in buckets of many; set strategy = "fsdp2", or optimizer_in_backward = false'
        raise UserError(f"train.optimizer_in_backward on {ranks.world_size()} ranks", hint=hint)
    first_steps = choose_trainable(model, trainable=train.trainable, frozen=train.frozen, unfreeze=train.unfreeze)
    groups = parameter_groups(
        model,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        learning_rates=train.learning_rates,
        weight_decays=train.weight_decays,
        lora_plus_ratio=config.lora.loraplus_lr_ratio,
    )
    for group in groups:
        group["params"] = [part_of(p) for p in group["params"]]
    optimizer = build_optimizer(
        train.optim,
        groups,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        offload=train.offload_optimizer,
        rounding_seed=train.seed if train.stochastic_rounding else None,
        **train.optim_args,
    )
    parameters = {p for group in optimizer.param_groups for p in group["params"]}
    if train.gradient_accumulation_steps > 1 or ranks.world_size() > 1:
        sum_gradients_in_fp32(parameters)
    if config.log.zero_update_fraction is None:
        measured = {p for p in parameters if p.dtype == torch.bfloat16}
    else:
        measured = parameters if config.log.zero_update_fraction else set()
    return Trained(optimizer, parameters, first_steps, measured)


def describe_optimizer(train: TrainSection, trained: set[nn.Parameter]) -> str:
    """Its name, and how it differs from the plain one."""
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
