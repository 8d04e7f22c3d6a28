"""The parts that only a run of preference tuning has: its loss and its reference."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from minisft import dpo, ranks, runtime
from minisft.config.sections import Config
from minisft.data.cache import Documents
from minisft.data.loader import Loader
from minisft.errors import CONFIG, MODEL, UserError
from minisft.model.adapter_files import least_vocab_size, load_adapter
from minisft.model.decoder import Decoder
from minisft.model.load import load_model
from minisft.model.lora import adapters
from minisft.model.quantized import read_record
from minisft.model.start import find_start
from minisft.preference.losses import WITHOUT_REFERENCE, LossOptions
from minisft.preference.reference import Reference, cache_logps, check_layout, check_start, copy_of, fingerprint
from minisft.prepare.data import titled
from minisft.prepare.options import cache_folder
from minisft.units import size


@dataclass(frozen=True)
class Preference:
    """The loss with its options, the reference, the loaders (with cached log-probabilities), lines of the summary."""

    loss: partial
    reference: Reference | None
    train: Loader
    evals: dict[str, Loader]
    lines: list[str]


def prepare_dpo(
    config: Config, model: Decoder, trained: set[nn.Parameter], train: Loader, evals: dict[str, Loader],
    device: torch.device, precision: str,
) -> Preference:  # fmt: skip
    """Everything that depends on the policy as it starts, so it must run before a checkpoint is loaded.

    Raises UserError where the options do not fit the model, and where policy and reference differ before the first step.
    """
    section = config.dpo
    for loader in (train, *evals.values()):
        refuse_sharing(model, loader.documents)
    if train.stream is not None:
        train.stream.check = partial(refuse_sharing, model)
    objective = objective_of(config)
    first = train.step(0, 0)[0].to(device)
    check_layout(model, first, train, precision)
    if set(objective.losses) <= set(WITHOUT_REFERENCE):
        lines = [
            describe_loss(objective),
            "without a reference: a reward is beta times the mean log-probability of a token",
        ]
        loss = partial(dpo.loss, objective=objective, reference=None, keep_rows=config.log.ledger)
        return Preference(loss, None, train, evals, titled("preference", lines))

    live = live_reference(config, model, trained, device)
    reference, how = live, live.kind
    if live.kind == "adapter off":
        how = "the model without its new adapters"
    elif live.kind == "copy" and not live.copies:
        how = "the policy as it starts"
    elif live.kind == "copy":
        how = f"a copy of the trained weights, {size(sum(value.nbytes for _, value in live.copies.values()))}"
        if section.sync_ref_model:
            how += f", which becomes {section.ref_model_mixup_alpha:g} of the policy every {section.ref_model_sync_steps} steps"
    elif live.kind == "model":
        how = f"{section.ref_model_name_or_path}"
    if section.precompute_ref_log_probs:
        train, evals, found = cached(config, model, trained, live, train, evals, device, precision)
        how = f"{how}; its log-probabilities are {found}"
        reference, first = Reference("cached"), train.step(0, 0)[0].to(device)
    lines = [describe_loss(objective), f"reference: {how}"]
    if live.kind != "model":
        has_dropout = not section.disable_dropout
        check_start(model, first, reference, precision, section.ld_alpha, has_dropout)
        shown = f"{len(first.answers.weight):,} {train.documents.cache.unit}"
        lines.append(f"checked: of the first {shown} every margin is 0, the loss of sigmoid ln 2")
    loss = partial(dpo.loss, objective=objective, reference=reference, keep_rows=config.log.ledger)
    return Preference(loss, reference, train, evals, titled("preference", lines))


def objective_of(config: Config) -> dpo.Objective:
    section = config.dpo
    return dpo.Objective(
        losses=dict(zip(section.loss_type, section.loss_weights or [1.0] * len(section.loss_type))),
        options=LossOptions(
            beta=section.beta,
            label_smoothing=config.train.label_smoothing,
            discopop_tau=section.discopop_tau,
            simpo_gamma=section.simpo_gamma,
            f_divergence=section.f_divergence_type,
            alpha=section.f_alpha_divergence_coef,
        ),
        ld_alpha=section.ld_alpha,
        use_weighting=section.use_weighting,
        desirable_weight=section.desirable_weight,
        undesirable_weight=section.undesirable_weight,
    )


def describe_loss(objective: dpo.Objective) -> str:
    terms = [name if weight == 1 else f"{weight:g} {name}" for name, weight in objective.losses.items()]
    o = objective.options
    margin = f", simpo's margin gamma / beta {o.simpo_gamma / o.beta:.3g} nats a token (its paper: 0.1 to 0.8)"
    return f"{' + '.join(terms)}, beta {o.beta:g}{margin if 'simpo' in objective.losses else ''}"


def live_reference(config: Config, model: Decoder, trained: set[nn.Parameter], device: torch.device) -> Reference:
    """The cheapest reference that serves any batch."""
    section = config.dpo
    if section.ref_model_name_or_path is not None:
        start = find_start(section.ref_model_name_or_path, local_files_only=config.model.local_files_only)
        adapter = start.adapter
        other = load_model(
            start.folder,
            dtype=runtime.DTYPES[config.train.weights_dtype],
            device=device,
            max_length=config.data.max_length,
            quantization=None if adapter is None else read_record(adapter),
            least_vocab_size=0 if adapter is None else least_vocab_size(adapter),
        )
        if adapter is not None:
            load_adapter(other, adapter).eval()
        other.requires_grad_(False)
        if other.config.vocab_size != model.config.vocab_size:
            raise UserError(
                f"{section.ref_model_name_or_path} has a vocabulary of {other.config.vocab_size:,}, the policy one of "
                f"{model.config.vocab_size:,}",
                hint="a reference reads the same tokens: take a model with the same tokenizer",
                exit_code=MODEL,
            )
        return Reference("model", model=other)
    if model.lora is not None and model.adapter_is_new and not section.sync_ref_model:
        return Reference("adapter off")
    if section.precompute_ref_log_probs:
        return Reference("copy")  # an empty copy: it is asked only now, before the policy's first step
    steps = section.ref_model_sync_steps if section.sync_ref_model else None
    return Reference(
        "copy", copies=copy_of(model, trained), sync_steps=steps, mixup_alpha=section.ref_model_mixup_alpha
    )


def cached(
    config: Config, model: Decoder, trained: set[nn.Parameter], live: Reference, train: Loader,
    evals: dict[str, Loader], device: torch.device, precision: str,
) -> tuple[Loader, dict[str, Loader], str]:  # fmt: skip
    """The loaders with the reference's log-probabilities, and whether these were found on disk."""
    section = config.dpo
    asked = live.model if live.kind == "model" else model
    is_off = live.kind == "adapter off"
    added = {p for adapter in adapters(asked) for p in adapter.parameters()} & trained if is_off else set()
    options = None if is_off else repr(asked.lora)  # the same matrices at another scale are another model
    key = [fingerprint(asked, without=added), options, precision, section.ld_alpha, config.model.kernels]

    def compute(batch):
        with runtime.autocast(device, precision):
            return live.logps(model, batch, section.ld_alpha)

    show = config.log.progress_bar and ranks.rank() == 0
    size = section.precompute_ref_batch_size or config.evaluate.per_device_eval_batch_size
    arguments = compute, key, cache_folder(config), device, size, show
    train, found = cache_logps(train, *arguments)
    evals = {name: cache_logps(loader, *arguments)[0] for name, loader in evals.items()}
    return train, evals, f"{found} in {cache_folder(config)}"


def refuse_sharing(model: Decoder, documents: Documents) -> None:
    """Two answers cannot share a prompt where a layer carries a state through it, which has one future. And a sliding window
    counts keys from the query backwards: across the chosen answer it would reach less of the prompt."""
    if documents.shared is None:
        return
    if model.config.has_states:
        raise UserError(
            f"dpo.share_prompt with {model.config.model_type}, whose layers remember one past a document",
            hint="set share_prompt = false",
            exit_code=CONFIG,
        )
    longest, windows = int(documents.unit_lengths.max()), [w for w in model.config.windows if w is not None]
    if windows and min(windows) < longest:
        raise UserError(
            f"dpo.share_prompt with a model whose layers see {min(windows):,} tokens back, and pairs of {longest:,} tokens",
            hint="set share_prompt = false",
            exit_code=CONFIG,
        )
