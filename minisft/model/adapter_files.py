"""An adapter as PEFT writes it: adapter_config.json, which names the base model, and adapter_model.safetensors.

    base_model.model.<module as in the base's files>.lora_A.weight      [r, in]
                                                     .lora_B.weight      [out, r]
                                                     .lora_magnitude_vector   [out]        (DoRA)
    base_model.model.<module>.weight                                     of modules_to_save
                             .token_adapter.trainable_tokens_delta       [n, D], the rows of trainable_token_indices

PiSSA's is written as a plain adapter of rank 2 r, A over A0 and B beside -B0; lora_alpha is raised to keep the scale.

The adapter is exact only on the base that it was trained on, which the config names. If that base was quantised,
quantization_config.json says how, because PEFT's config has no field for it. Without that file the base is used as it is stored.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisft.errors import MODEL, UserError, shortened
from minisft.files import require_file, without_model
from minisft.gguf.file import is_gguf
from minisft.model.decoder import Decoder
from minisft.model.lora import LoraLinear, adapter_options, adapter_sites, apply_lora
from minisft.model.lora_options import ALL_LINEAR, LoraOptions, is_target
from minisft.model.quantized import write_record
from minisft.model.tensor_files import TensorFile, entry_of, in_usual_order
from minisft.model.tensor_names import LLAMA, NAMES, Stored, stored_tensors
from minisft.strict_json import read_json, write_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A_LEAF, B_LEAF, M_LEAF = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
# Options of PEFT that are not implemented here, with the values that switch them off. Other values are refused by name.
NOT_COMPUTED = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "layers_pattern": (None, "", []),
    "exclude_modules": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    # Other initialisations change the base's weights. PEFT writes True after converting such an adapter to a plain one.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def _numbers(kind: type, low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (kind, int) and low <= value <= high


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _table_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


RANK, ALPHA, LAYER, TOKEN = (
    _numbers(int, 1, 2**16),
    _numbers(float, 0, 1e6),
    _numbers(int, 0, 10_000),
    _numbers(int, 0, 2**31 - 1),
)
SHAPES = {  # the keys that are read, unless they are null: what they may be, with the bounds of the section [lora]
    "r": (RANK,),
    "rank_pattern": (_table_of(RANK),),
    "lora_alpha": (ALPHA,),
    "alpha_pattern": (_table_of(ALPHA),),
    "lora_dropout": (_numbers(float, 0, 1),),
    "target_modules": (_is_text, _list_of(_is_text)),
    "modules_to_save": (_list_of(_is_text),),
    "layers_to_transform": (LAYER, _list_of(LAYER)),
    "trainable_token_indices": (_list_of(TOKEN), _table_of(_list_of(TOKEN))),
}


def model_folder(folder: Path) -> Path:
    """The folder itself or, for a run's output folder, the `model` in it; a GGUF file is one too. Raises UserError if there is
    no model."""
    if is_gguf(folder):
        return folder
    files = ("config.json", CONFIG_FILE)
    for path in (folder / "model", folder):
        if any((path / file).exists() for file in files):
            return path
    problem, hint = without_model(
        folder, f"name a folder with {files[0]} or {files[1]} in it, or a run's output folder"
    )
    raise UserError(f"{folder} {problem}", hint=hint, exit_code=MODEL)


def save_adapter(model: Decoder, folder: Path | str, *, base: str | None = None, revision: str | None = None) -> None:
    """Write the adapter of `model` (apply_lora) into `folder`, which is created if missing. base: path or repository of the
    model that it was trained on. Not atomic: the caller writes into an atomic folder. Raises OSError if writing fails."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapter_file(model).write(folder)
    save_adapter_config(model, folder, base=base, revision=revision)


def adapter_file(model: Decoder) -> TensorFile:
    """The weights of the adapter."""
    entries = [
        entry_of(key, tensor.dtype, tensor.shape, tensor.detach) for key, tensor in adapter_tensors(model).items()
    ]
    return TensorFile(WEIGHTS_FILE, in_usual_order(entries), {"format": "pt"})


def save_adapter_config(model: Decoder, folder: Path, *, base: str | None, revision: str | None) -> None:
    """What `save_adapter` writes beside the weights."""
    options = adapter_options(model)
    targets = options.target_modules
    if targets == ALL_LINEAR:
        targets = {site.rpartition(".")[2] for site in adapter_sites(model)}
    options = options.plain()
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
        "trainable_token_indices": _token_indices(model),
        "bias": "none",
        "fan_in_fan_out": NAMES.get(model.config.model_type, LLAMA).transposed,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    write_json(folder / CONFIG_FILE, dict(sorted(config.items())))
    write_record(model, folder)


def load_adapter(model: Decoder, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """Put the adapter of a folder (ours or PEFT's) on a base model: frozen weights, trainable adapters.

    Raises UserError (exit code MODEL), with names, if the adapter is of another kind, uses an option that is not
    implemented here, or has other tensors than an adapter of this model.
    """
    folder = Path(folder)
    options = read_options(model, folder)
    apply_lora(model, options, dtype=dtype)
    load_adapter_weights(model, folder)
    return model


def base_of(folder: Path) -> tuple[str, str | None]:
    """(path or repository, revision) of the base that an adapter folder names. Raises UserError if it names none."""
    config = _read_config(folder)
    base, revision = (config.get(key) for key in ("base_model_name_or_path", "revision"))
    if not base or not isinstance(base, str) or not isinstance(revision, str | None):
        path = folder / CONFIG_FILE
        raise UserError(f"{path} names no base model", hint="set base_model_name_or_path in it", exit_code=MODEL)
    return base, revision


def least_vocab_size(folder: Path) -> int:
    """The smallest vocabulary the base model must have for this adapter; 0 if the adapter trains no token rows."""
    return max((i for ids in _by_module(_read_config(folder)).values() for i in ids), default=-1) + 1


def load_adapter_weights(model: Decoder, folder: Path | str) -> None:
    """Load the weights of an adapter that `model` has already. Raises UserError (exit code MODEL) if names or shapes differ."""
    path, wanted = Path(folder) / WEIGHTS_FILE, adapter_tensors(model)
    require_file(path, exit_code=MODEL)  # safe_open would wait for a pipe
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
            rows = [part.weight.shape[0] for part in parts]
            A, B = (found[f"{PREFIX}{site}.{leaf}"] for leaf in (A_LEAF, B_LEAF))
            for part, values in zip(parts, stored.split(B, rows)):
                part.set_factors(A, values)
            if adapter_options(model).use_dora:
                for part, values in zip(parts, stored.split(found[f"{PREFIX}{site}.{M_LEAF}"], rows)):
                    part.magnitude.copy_(values)
        for name, key in _token_rows(model).items():
            model.get_parameter(f"{name}.rows").copy_(found[key])
        for name, stored in _saved_modules(model).items():
            parameters = [model.get_parameter(part) for part in stored.names]
            for parameter, values in zip(parameters, stored.split(found[PREFIX + name], [len(p) for p in parameters])):
                parameter.copy_(values)


def read_options(model: Decoder, folder: Path) -> LoraOptions:
    """The adapter_config.json of a folder. Raises UserError (exit code MODEL) for options that are not implemented."""
    path, config = folder / CONFIG_FILE, _read_config(folder)
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise UserError(f"{path}: peft_type is {kind!r}", hint="only LORA adapters are read", exit_code=MODEL)
    for key, allowed in NOT_COMPUTED.items():
        if config.get(key, allowed[0]) not in allowed:
            hint = "merge the adapter into its base with PEFT, and train from there"
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported", hint=hint, exit_code=MODEL)
    targets = config.get("target_modules")
    ours = {theirs: name for name, theirs in _file_names(model).items()}
    try:
        patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
        for pattern in [*patterns, targets] if isinstance(targets, str) else patterns:
            re.compile(pattern)
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
            trainable_token_indices={ours.get(k, k): tuple(map(int, ids)) for k, ids in _by_module(config).items()},
        )
    except (KeyError, TypeError, ValueError, OverflowError, re.error) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}", hint="is it PEFT's?", exit_code=MODEL) from error


def _read_config(folder: Path) -> dict:
    config = read_json(folder / CONFIG_FILE, exit_code=MODEL)
    if not isinstance(config, dict):
        problem = f"{folder / CONFIG_FILE}: expected an object, found {type(config).__name__}"
        raise UserError(problem, hint="is it PEFT's?", exit_code=MODEL)
    for key, shapes in SHAPES.items():
        if config.get(key) is not None and not any(fits(config[key]) for fits in shapes):
            problem = (
                f"{folder / CONFIG_FILE}: {key} = {shortened(str(config[key]), 60)} is out of range or of another kind"
            )
            raise UserError(problem, hint="is it PEFT's?", exit_code=MODEL)
    return config


def _by_module(config: dict) -> dict[str, list[int]]:
    """trainable_token_indices of a PEFT config: a list means the embedding."""
    value = config.get("trainable_token_indices") or {}
    return value if isinstance(value, dict) else {"embed_tokens": value}


def _token_indices(model: Decoder) -> dict[str, list[int]] | list[int] | None:
    """The same for writing: by PEFT's names, or for a tied embedding a plain list, which covers the head too."""
    indices = {name: list(ids) for name, ids in adapter_options(model).trainable_token_indices.items()}
    if model.config.tie_word_embeddings and indices:
        return indices["embed_tokens"]
    return {_file_names(model)[name]: ids for name, ids in indices.items()} or None


def _layers(value: int | list | None) -> tuple[int, ...] | None:
    return None if value is None else (value,) if isinstance(value, int) else tuple(value)


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """Every tensor of the adapter file, by its name there."""
    tensors = {}
    for site, stored in _targets(model).items():
        parts = _linears(model, stored)
        factors = [part.factors() for part in parts]
        tensors[f"{PREFIX}{site}.{A_LEAF}"] = factors[0][0].detach()
        tensors[f"{PREFIX}{site}.{B_LEAF}"] = stored.join([B.detach() for _, B in factors])
        if adapter_options(model).use_dora:
            tensors[f"{PREFIX}{site}.{M_LEAF}"] = stored.join([part.magnitude.detach() for part in parts])
    for name, key in _token_rows(model).items():
        tensors[key] = model.get_parameter(f"{name}.rows").detach()
    for name, stored in _saved_modules(model).items():
        tensors[PREFIX + name] = stored.join([model.get_parameter(part).detach() for part in stored.names])
    return tensors


def _targets(model: Decoder) -> dict[str, Stored]:
    """The adapted sites. A and B are [r, in] and [out, r] also where a family's files transpose its weights."""
    options, sites = adapter_options(model), adapter_sites(model).items()
    return {site: replace(stored, transposed=False) for site, stored in sites if is_target(site, options)}


def _linears(model: Decoder, stored: Stored) -> list[LoraLinear]:
    return [model.get_submodule(name.removesuffix(".weight")) for name in stored.names]


def _token_rows(model: Decoder) -> dict[str, str]:
    """Our name of a module with trainable rows -> the name of their tensor in the file."""
    stored = _stored(model, [f"{name}.weight" for name in adapter_options(model).trainable_token_indices])
    modules = {s.names[0].removesuffix(".weight"): name.removesuffix(".weight") for name, s in stored.items()}
    return {name: f"{PREFIX}{theirs}.token_adapter.trainable_tokens_delta" for name, theirs in modules.items()}


def _saved_modules(model: Decoder) -> dict[str, Stored]:
    modules = adapter_options(model).modules_to_save
    names = [name for name, _ in model.named_parameters() if name.partition(".")[0] in modules]
    return _stored(model, names)


def _stored(model: Decoder, names: list[str]) -> dict[str, Stored]:
    """`stored_tensors` by the names of transformers' modules. Only GPT-NeoX's head has another name in the files."""
    stored = stored_tensors(model.config, names)
    return {re.sub(r"^embed_out\.", "lm_head.", name): parts for name, parts in stored.items()}


def _file_names(model: Decoder) -> dict[str, str]:
    """Our names of the modules outside the layers -> those in the family's files."""
    names = [name for name, _ in model.named_parameters() if not name.startswith("layers.")]
    return {s.names[0].partition(".")[0]: name.split(".")[-2] for name, s in _stored(model, names).items()}
