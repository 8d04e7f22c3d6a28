"""Which backend computes the ops of a model: Triton, torch or the references."""

import torch

from minisft.errors import CONFIG, UserError
from minisft.kernels.common import backend_for, use_backend
from minisft.kernels.flash_attention import unsupported
from minisft.model.decoder import Decoder
from minisft.model.quantized import quantization_of


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
