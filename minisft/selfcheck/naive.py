"""The definition of a step, as a person would write it: one document at a time through the model, all logits, torch's functions.

No packing, no shared beginnings, no fused loss, and N is counted as the documents come by. It is slow and takes the memory of
one document's logits. `minisft selfcheck` holds the engine's step to it, whatever the model; examples/naive.py has a whole run
in this manner, the model included.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft import runtime
from minisft.config.sections import Config
from minisft.data.kinds import CHOSEN, TRAINED
from minisft.data.loader import Loader
from minisft.errors import UserError
from minisft.kernels.common import use_backend
from minisft.model.decoder import Decoder
from minisft.preference.losses import kto_loss, ld_weights, make_pairs, mixture
from minisft.prepare.dpo import objective_of
from minisft.prepare.run import Run
from minisft.schedule import lr_factor


class Document(NamedTuple):
    """A document, or the piece of one that is in a pack."""

    ids: Tensor  # int64 [n]
    trained: Tensor  # bool [n]
    weights: Tensor  # fp32 [n]: how much each token counts, 0 where it is not trained
    number: int  # in the token cache

    @property
    def weight(self) -> float:
        """The mean weight of its targets: that of a pair, if this is its chosen answer."""
        return self.weights[1:][self.trained[1:]].mean().item()


def micro_batches(loader: Loader, step: int) -> list[list[Document]]:
    """The documents of each micro-batch of a step, in the order of the packs. Of one rank."""
    epoch, s = loader.at(step)
    packs, first = loader.packs(epoch), s * loader.packs_per_step
    last = first + loader.num_packs(s)
    chunks = [range(a, min(a + loader.batch_size, last)) for a in range(first, last, loader.batch_size)]
    return [[document for pack in chunk for document in documents_of(loader, packs, pack)] for chunk in chunks]


def documents_of(loader: Loader, packs, pack: int) -> Iterator[Document]:
    """The documents of a pack, each whole, also where they share a beginning there."""
    documents, cache = loader.documents, loader.documents.cache
    for place in range(packs.offsets[pack], packs.offsets[pack + 1]):
        first, count = (x.item() for x in documents.pieces_of(packs.document[place : place + 1]))
        for piece in range(first, first + count):
            start, end = int(documents.start[piece]), int(documents.end[piece])
            if count == 1:  # the only kind that packing may cut
                start, end = start + int(packs.start[place]), start + int(packs.end[place])
            trained = torch.from_numpy((cache.kinds[start:end] & TRAINED) != 0)
            weights = torch.ones(end - start)
            if cache.weights is not None:
                weights = torch.from_numpy(cache.weights[start:end].astype("float32"))
            ids = torch.from_numpy(cache.ids[start:end].astype("int64"))
            yield Document(ids, trained, weights.where(trained, 0.0), int(documents.index[piece]))


def logits_of(model: Decoder, document: Document) -> tuple[Tensor, Tensor, Tensor]:
    """logits fp64 [n - 1, V], targets and weights [n - 1] of a document alone: each token is predicted from those before it.

    fp64, because torch's soft-max on a CPU adds up the exponentials one after the other: with a vocabulary of 49,152 tokens the
    loss was off by 1e-5 in fp32, and a gradient that nearly cancels by 7e-4.
    """
    device, n = model.head_weight.device, len(document.ids)
    positions = torch.arange(n, dtype=torch.int32, device=device)
    start, end = torch.zeros_like(positions), torch.full_like(positions, n)
    hidden = model(document.ids.to(device), positions, start, end)
    return model.logits(hidden)[:-1].double(), document.ids[1:].to(device), document.weights[1:].to(device)


# ---- supervised fine-tuning ---------------------------------------------------------------------------------------


def sft_loss(config: Config, run: Run, documents: list[Document]) -> Iterator[tuple[Tensor, float]]:
    """(sum of weight x loss, sum of weights) of each document."""
    train = config.train
    for document in documents:
        logits, targets, weights = logits_of(run.model, document)
        loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=train.label_smoothing)
        if train.z_loss:
            loss = loss + train.z_loss * logits.logsumexp(-1).square()
        yield (weights * loss).sum(), weights.sum().item()


# ---- preference tuning --------------------------------------------------------------------------------------------


def answer_logp(config: Config, model: Decoder, document: Document, length: int) -> Tensor:
    """log p of the answer that a document trains. length: of the shorter answer of the pair."""
    logits, targets, _ = logits_of(model, document)
    logps = -F.cross_entropy(logits, targets, reduction="none")[document.trained[1:].to(logits.device)]
    if config.dpo.ld_alpha is not None:
        position = torch.arange(len(logps), device=logps.device)
        logps = logps * ld_weights(position, torch.full_like(position, length), config.dpo.ld_alpha)
    return logps.sum()


def dpo_loss(config: Config, run: Run, documents: list[Document]) -> Iterator[tuple[Tensor, float]]:
    """(sum of the losses, sum of the weights of the pairs) of a micro-batch, whose documents 2u and 2u + 1 are pair u."""
    objective, reference = objective_of(config), run.reference
    if objective.use_weighting:
        raise UserError("the naive loop does not know dpo.use_weighting")
    lengths = [int(document.trained[1:].sum()) for document in documents]
    shorter = [min(lengths[i], lengths[i ^ 1]) for i in range(len(documents))]

    def logps(model: Decoder) -> Tensor:
        return torch.stack([answer_logp(config, model, *one) for one in zip(documents, shorter)])

    policy = logps(run.model)
    if reference is None:
        ref = torch.zeros_like(policy)
    elif reference.kind == "cached":
        ref = torch.from_numpy(run.train.documents.ref_logps[[d.number for d in documents]]).to(policy.device)
    else:
        with torch.no_grad(), torch.autocast(run.device.type, enabled=False), reference.in_place(run.model) as model:
            with runtime.autocast(run.device, run.precision):
                ref = logps(model)
    weights = torch.tensor([document.weight for document in documents[0::2]], device=policy.device)
    if "kto" in objective.losses:
        kl = (policy - ref)[1::2].mean()
        roles = run.train.documents.cache.role[[d.number for d in documents[0::2]]]
        options = {"desirable_weight": objective.desirable_weight, "undesirable_weight": objective.undesirable_weight}
        is_desirable = torch.from_numpy(roles == CHOSEN).to(policy.device)
        losses, _ = kto_loss(policy[0::2], ref[0::2], is_desirable, kl, beta=objective.options.beta, **options)
    else:
        sizes = torch.tensor(lengths, dtype=policy.dtype, device=policy.device)
        pairs = make_pairs(
            policy[0::2], policy[1::2], ref[0::2], ref[1::2], sizes[0::2], sizes[1::2], objective.options
        )
        losses = mixture(pairs, objective.losses, objective.options)
    yield (losses * weights).sum(), weights.sum().item()


# ---- steps --------------------------------------------------------------------------------------------------------


def add_gradients(config: Config, run: Run, step: int) -> float:
    """Add the gradient of a step's loss to the parameters' .grad; returns the loss: one sum over the step, divided once."""
    loss_of = dpo_loss if config.trainer_type == "dpo" else sft_loss
    total, weight, batches = 0.0, 0.0, micro_batches(run.train, step)
    is_mean_of_means = config.train.loss_normalization == "micro_batch"
    with use_backend("reference"):
        for documents in batches:
            # N of this micro-batch, where each has the same say in the step
            own = sum(d.weights[1:].sum().item() for d in documents)
            if config.trainer_type == "dpo":
                own = sum(document.weight for document in documents[0::2])
            share = 1 / max(own * len(batches), 1e-12) if is_mean_of_means else 1.0
            with runtime.autocast(run.device, run.precision):
                for loss, n in loss_of(config, run, documents):
                    (loss * share).backward()
                    total, weight = total + loss.item(), weight + n
    if not is_mean_of_means:  # sums were added up: now that N is known, divide
        for p in run.model.parameters():
            if p.grad is not None:
                p.grad.div_(max(weight, 1e-12))
    return total / max(weight, 1e-12)


def train(config: Config, run: Run, steps: int) -> Iterator[float]:
    """Take some steps; yields the loss of each. AdamW is torch's own; any other optimizer is the engine's."""
    settings, optimizer = config.train, run.optimizer
    if settings.optim in ("adamw", "adamw_minisft", "adamw_8bit") and settings.weights_dtype == "fp32":
        groups = [
            {key: group[key] for key in ("params", "weight_decay", "peak_lr")} for group in optimizer.param_groups
        ]
        betas = settings.adam_beta1, settings.adam_beta2
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(step=step, **run.schedule)
        for name, first_step in run.first_steps.items():
            run.model.get_parameter(name).requires_grad_(step >= first_step)
        loss = add_gradients(config, run, step)
        trained = [p for p in run.model.parameters() if p.grad is not None]
        if settings.max_grad_norm and not settings.optimizer_in_backward:
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if run.reference is not None:
            run.reference.follow(step + 1)
        yield loss
