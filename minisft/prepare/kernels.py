"""Which backend computes the ops of a model: Triton, torch or the references."""

import torch

from minisft.config.sections import Config
from minisft.data.loader import Loader
from minisft.errors import CONFIG, UserError
from minisft.kernels.common import backend_for, cdiv, use_backend
from minisft.kernels.flash_attention import unsupported
from minisft.model.decoder import Decoder
from minisft.model.model_config import without_dropout
from minisft.model.quantized import quantization_of
from minisft.parallel import needs_others


def pick_kernels(name: str, device: torch.device) -> None:
    """Set the backend of all ops. Raises UserError for "triton" where it cannot run."""
    use_backend(name)
    backend_of("rms_norm", device)


def backend_of(op: str, device: torch.device, cannot: str = "") -> str:
    """`backend_for`, with a UserError for "triton" where it cannot run."""
    try:
        return backend_for(op, torch.empty(0, device=device), cannot)
    except ValueError as error:
        raise UserError(f"kernels: {error}", hint='"auto" takes Triton where it can run', exit_code=CONFIG) from error


def use_graphs(config: Config, model: Decoder, device: torch.device) -> bool:
    """Whether the micro-batches are CUDA graphs. Raises UserError for train.cuda_graph = true where they cannot be."""
    train = config.train
    problems = {
        "there is no GPU": device.type != "cuda",
        f"trainer_type = {config.trainer_type!r} reads the reference's weights or another model": config.trainer_type
        != "sft",
        "dropout and NEFTune draw other numbers every time": (
            without_dropout(model.config) != model.config or config.lora.lora_dropout > 0 or model.neftune_alpha > 0
        ),
        "gradient_checkpointing = true restores the state of the random numbers": model.gradient_checkpointing,
        "optimizer_in_backward changes the weights in between": train.optimizer_in_backward,
        "unfreeze changes what is trained": bool(train.unfreeze),
        "schedule_free_adamw evaluates other weights": train.optim == "schedule_free_adamw",
        "weights, or keys and values, are gathered from other ranks": needs_others(model),
    }
    problem = next((problem for problem, holds in problems.items() if holds), None)
    if train.cuda_graph is True and problem:
        raise UserError(
            f"train.cuda_graph = true: {problem}", hint='"auto" takes graphs where they can be', exit_code=CONFIG
        )
    return train.cuda_graph is not False and problem is None


def graph_round_to(loader: Loader) -> int:
    """Tokens and targets are filled up to a multiple of a sixteenth of a full micro-batch: few shapes, and 3 % of filler in
    the mean, less where packs are full."""
    capacity = loader.batch_size * loader.plan.max_length
    return max(loader.round_to, cdiv(capacity, 16 * loader.round_to) * loader.round_to)


def describe_kernels(model: Decoder, device: torch.device) -> str:
    """The backend of the model's ops: "triton", or "triton, but torch for layer_norm". Warns where a GPU has no kernel.

    Raises UserError for "triton" where an op of this model has no kernel.
    """
    config, quantization = model.config, quantization_of(model)
    gate = "swiglu" if config.activation == "silu" else "geglu"
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
