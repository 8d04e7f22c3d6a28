"""An adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors, beside which the base model is named.

    base_model.model.<module as in the base's files>.lora_A.weight      [r, in]
                                                     .lora_B.weight      [out, r]
                                                     .lora_magnitude_vector   [out]        (DoRA)
    base_model.model.<module>.weight                                     of modules_to_save

The adapter is exact only beside the base that it was trained on; the config says which that was.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minisft.errors import MODEL, UserError
from minisft.files import read_json, write_json
from minisft.model.decoder import Decoder
from minisft.model.load import load_model
from minisft.model.lora import (
    ALL_LINEAR,
    LoraLinear,
    LoraOptions,
    adapter_sites,
    apply_lora,
    is_target,
)
from minisft.model.tensor_names import LLAMA, NAMES, Stored, stored_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What PEFT can write and we do not compute; other values than these are refused by name.
NOT_COMPUTED = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "layers_pattern": (None, "", []),
    "exclude_modules": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
}


def model_folder(folder: Path) -> Path:
    """The folder itself or, of a run's output folder, the model in it. Raises UserError where there is none."""
    files = ("config.json", CONFIG_FILE)
    for path in (folder / "model", folder):
        if any((path / file).exists() for file in files):
            return path
    raise UserError(f"{folder} holds no model (no {files[0]})", hint="name <output_dir>/model", exit_code=MODEL)


def save_adapter(model: Decoder, folder: Path | str, *, base: str | None = None, revision: str | None = None) -> None:
    """Write the adapter of `model` (apply_lora) into `folder`, made if need be. base: path or repository of the model
    that it was trained on. Not atomic: the caller writes into an atomic folder. Raises OSError when the disk does."""
    folder, options = Path(folder), model.lora
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.contiguous().cpu() for key, tensor in _adapter_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    targets = options.target_modules
    if targets == ALL_LINEAR:
        targets = {site.rpartition(".")[2] for site in adapter_sites(model)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": options.r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "layers_to_transform": None if options.layers_to_transform is None else list(options.layers_to_transform),
        "layers_pattern": None,
        "rank_pattern": options.rank_pattern,
        "alpha_pattern": options.alpha_pattern,
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
        "modules_to_save": sorted(_file_names(model)[name] for name in options.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": NAMES.get(model.config.model_type, LLAMA).transposed,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    write_json(folder / CONFIG_FILE, dict(sorted(config.items())))


def load_adapter(model: Decoder, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """Put the adapter of a folder (ours or PEFT's) on a base model: frozen weights, trainable adapters.

    Raises UserError (exit code MODEL), with names, where the adapter is of another kind, asks for what is not computed
    here, or its tensors are not those that this model would have.
    """
    folder = Path(folder)
    options = read_options(model, folder)
    apply_lora(model, options, dtype=dtype)
    load_adapter_weights(model, folder)
    return model


def load_adapted(folder: Path | str, *, device: torch.device | str = "cpu", max_length: int | None = None) -> Decoder:
    """The base model that an adapter folder names, with the adapter, in eval mode.

    Raises UserError (exit code MODEL) where the folder names no base, or as load_model and load_adapter.
    """
    path = Path(folder) / CONFIG_FILE
    config = read_json(path, exit_code=MODEL)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base:
        raise UserError(f"{path} names no base model", hint="set base_model_name_or_path in it", exit_code=MODEL)
    model = load_model(base, revision=config.get("revision"), device=device, max_length=max_length)
    return load_adapter(model, folder).eval()


def load_adapter_weights(model: Decoder, folder: Path | str) -> None:
    """Fill the adapter that `model` has already. Raises UserError (exit code MODEL) where names or shapes differ."""
    path, wanted = Path(folder) / WEIGHTS_FILE, _adapter_tensors(model)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})", exit_code=MODEL) from error
    differing = sorted(wanted.keys() ^ found.keys())
    differing += [name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape]
    if differing:
        few = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        hint = "the adapter belongs to another base model, or its config to another adapter"
        raise UserError(f"{path}: not the tensors that this model's adapter has: {few}", hint=hint, exit_code=MODEL)
    with torch.no_grad():
        for site, stored in _targets(model).items():
            parts = _linears(model, stored)
            parts[0].lora_A.copy_(found[f"{PREFIX}{site}.lora_A.weight"])
            for leaf, attribute in LEAVES.items():
                if f"{PREFIX}{site}.{leaf}" in found:
                    rows = [len(part.weight) for part in parts]
                    for part, values in zip(parts, stored.split(found[f"{PREFIX}{site}.{leaf}"], rows)):
                        getattr(part, attribute).copy_(values)
        for name, stored in _saved_modules(model).items():
            parameters = [model.get_parameter(part) for part in stored.names]
            for parameter, values in zip(parameters, stored.split(found[PREFIX + name], [len(p) for p in parameters])):
                parameter.copy_(values)


def read_options(model: Decoder, folder: Path) -> LoraOptions:
    """The adapter_config.json of a folder. Raises UserError (exit code MODEL) for what is not computed here."""
    path = folder / CONFIG_FILE
    config = read_json(path, exit_code=MODEL)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{path}: peft_type is {kind!r}", hint="only LORA adapters are read", exit_code=MODEL)
    for key, allowed in NOT_COMPUTED.items():
        if config.get(key, allowed[0]) not in allowed:
            hint = "merge the adapter into its base with PEFT, and train from there"
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported", hint=hint, exit_code=MODEL)
    targets = config.get("target_modules")
    ours = {theirs: name for name, theirs in _file_names(model).items()}
    try:
        return LoraOptions(
            r=int(config["r"]),
            lora_alpha=float(config["lora_alpha"]),
            lora_dropout=float(config.get("lora_dropout") or 0.0),
            target_modules=targets if isinstance(targets, str) else tuple(targets),
            layers_to_transform=_layers(config.get("layers_to_transform")),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            use_rslora=bool(config.get("use_rslora")),
            use_dora=bool(config.get("use_dora")),
            modules_to_save=tuple(ours.get(name, name) for name in config.get("modules_to_save") or ()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}", hint="is it PEFT's?", exit_code=MODEL) from error


def _layers(value: int | list | None) -> tuple[int, ...] | None:
    return None if value is None else (value,) if isinstance(value, int) else tuple(value)


# Parameters of an adapter that have a row for every output feature: leaf in the file -> attribute of LoraLinear.
LEAVES = {"lora_B.weight": "lora_B", "lora_magnitude_vector": "magnitude"}


def _adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """Every tensor of the adapter file, by its name there."""
    tensors = {}
    for site, stored in _targets(model).items():
        parts = _linears(model, stored)
        tensors[f"{PREFIX}{site}.lora_A.weight"] = parts[0].lora_A.detach()
        for leaf, attribute in LEAVES.items():
            values = [getattr(part, attribute) for part in parts]
            if values[0] is not None:
                tensors[f"{PREFIX}{site}.{leaf}"] = stored.join([value.detach() for value in values])
    for name, stored in _saved_modules(model).items():
        tensors[PREFIX + name] = stored.join([model.get_parameter(part).detach() for part in stored.names])
    return tensors


def _targets(model: Decoder) -> dict[str, Stored]:
    """The adapted sites. A and B are [r, in] and [out, r] also where a family's files transpose its weights."""
    sites = adapter_sites(model).items()
    return {site: replace(stored, transposed=False) for site, stored in sites if is_target(site, model.lora)}


def _linears(model: Decoder, stored: Stored) -> list[LoraLinear]:
    return [model.get_submodule(name.removesuffix(".weight")) for name in stored.names]


def _saved_modules(model: Decoder) -> dict[str, Stored]:
    names = [name for name, _ in model.named_parameters() if name.partition(".")[0] in model.lora.modules_to_save]
    return stored_tensors(model.config, names)


def _file_names(model: Decoder) -> dict[str, str]:
    """Our names of the modules outside the layers -> those in the family's files."""
    names = [name for name, _ in model.named_parameters() if not name.startswith("layers.")]
    stored = stored_tensors(model.config, names)
    return {s.names[0].partition(".")[0]: name.split(".")[-2] for name, s in stored.items()}
