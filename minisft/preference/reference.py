"""The reference of preference tuning: the model that the policy is compared with, in the cheapest form.

    adapter off    if the policy trains new adapters: without them it is the model that it started from. No memory.
    copy           a copy of the trained parameters, made before the first step. One more forward pass a step runs with
                   these values in the place of the trained ones. Frozen parameters are shared.
    model          another model, loaded beside the policy.
    cached         no reference during the training: the log-probabilities of all answers are computed before the first step
                   and kept on disk, by model and data. Half of the forward passes of every further epoch are saved.

TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656) lets the copy follow the policy: every k steps it becomes
alpha policy + (1 - alpha) copy.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from minisft import ranks, runtime
from minisft.atomic_folder import atomic_folder, not_written, remove_leftovers, verify_folder, waiting_lock
from minisft.data.batch import Batch
from minisft.data.loader import Loader, make_batch
from minisft.data.packing import pack
from minisft.errors import DATA, MODEL, UserError
from minisft.model.decoder import Decoder
from minisft.model.lora import adapter_disabled
from minisft.model.quantized import named_weights
from minisft.model.row_files import missing_file, read_rows
from minisft.model.shards import whole
from minisft.model.tensor_files import TensorFile, entry_of, in_usual_order
from minisft.parallel import is_sharded, no_backward, part_of, reshard
from minisft.parts import rows_of, wait_for_readers
from minisft.preference.answer_logps import answer_logps

VERSION = 1  # of the cached log-probabilities; raise it when the same input gives other numbers
COPY_FILE = "reference.safetensors"  # in a checkpoint, where the reference follows the policy

# The largest rounding error that is accepted in the log-probability of an n-token answer, divided by sqrt(n): token errors
# have random signs, so their sum grows like sqrt(n). A logit between 16 and 32 in bf16 is a multiple of 1/8.
ROUNDING = {"fp32": 1e-3, "bf16": 0.25, "fp16": 0.25}
NUM_ALONE = 6  # how many answers of the first batch are recomputed each in a batch of its own


@dataclass
class Reference:
    """The source of the log-probabilities under the reference."""

    kind: str  # "adapter off", "copy", "model", "cached"
    model: Decoder | None = None  # of kind "model"
    copies: dict[str, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)  # of kind "copy": by name
    sync_steps: int | None = None  # TR-DPO: the copy follows every so many steps
    mixup_alpha: float = 0.6

    def logps(self, policy: Decoder, batch: Batch, ld_alpha: float | None = None) -> Tensor:
        """fp32 [2U] of the answers of a batch, without gradient."""
        if self.kind == "cached":
            return batch.answers.ref_logps
        device, training = batch.input_ids.device.type, policy.training
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # autocast caches the casts of parameters by identity, and here the same parameters may hold other values
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            try:
                with self.in_place(policy) as model, no_backward(model):
                    logps, _ = answer_logps(model.eval(), batch, ld_alpha)
            finally:  # also where memory runs out: the step may be taken again
                policy.train(training)
        return logps

    @contextlib.contextmanager
    def in_place(self, policy: Decoder) -> Iterator[Decoder]:
        """Yields the reference, which may be the policy with other weights inside the block."""
        if self.kind == "adapter off":
            with adapter_disabled(policy) as model:
                yield model
        elif self.kind == "model":
            yield self.model
        else:
            reshard(policy)  # an evaluation has whole weights of the policy from the batch before
            self._swap(is_sharded(policy))
            try:
                yield policy
            finally:
                self._swap(is_sharded(policy))

    def _swap(self, by_copy: bool) -> None:
        """Exchange the values of policy and reference. by_copy: in place, as FSDP2 does not notice another `.data`."""
        wait_for_readers(parameter for parameter, _ in self.copies.values())
        for name, (parameter, value) in self.copies.items():
            if by_copy:
                kept = parameter.detach().clone()
                parameter.detach().copy_(value)
                value.copy_(kept)
            else:
                parameter.data, value = value, parameter.data
                self.copies[name] = parameter, value

    def follow(self, step: int) -> None:
        """TR-DPO: move the copy towards the policy if the number of optimizer steps is a multiple of sync_steps."""
        if self.sync_steps and step % self.sync_steps == 0:
            for parameter, value in self.copies.values():
                value.lerp_(parameter.data, self.mixup_alpha)

    def files(self) -> list[TensorFile]:
        """A copy that moves belongs to a checkpoint; every other reference is made again from the starting model."""
        entries = [entry_of(name, value.dtype, value.shape, value.detach) for name, (_, value) in self.copies.items()]
        return [TensorFile(COPY_FILE, in_usual_order(entries), None)]

    def load(self, folder: Path) -> None:
        """Read what `files` wrote. Raises UserError where only the checkpoint or only this run has a moving reference."""
        is_there = missing_file([path.name for path in folder.iterdir()], "reference") is None
        if is_there != bool(self.sync_steps):
            hint = "set dpo.sync_ref_model as it was, or choose a new output_dir"
            holds = "a" if is_there else "no"
            raise UserError(f"{folder} holds {holds} reference that follows the policy", hint=hint, exit_code=DATA)
        if not is_there:
            return
        found, _ = read_rows(folder, "reference")
        for name, (parameter, value) in self.copies.items():
            value.copy_(found[name][rows_of(parameter)])


def copy_of(model: Decoder, trained: Iterable[nn.Parameter]) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """The trained parameters by name, each with a copy of its value."""
    names = {part_of(parameter): name for name, parameter in model.named_parameters()}
    return {names[p]: (p, p.detach().clone()) for p in trained}


def check_start(
    policy: Decoder, batch: Batch, reference: Reference, precision: str, ld_alpha: float | None, has_dropout: bool
) -> None:
    """Before the first step policy and reference are the same, so every margin is 0 and the sigmoid loss is ln 2.

    An error that breaks this (dropout, another reference than was meant) shows here and not after days of training. Raises
    UserError. has_dropout: the policy trains with dropout, and is compared without.
    """
    training = policy.training
    with no_backward(policy), runtime.autocast(batch.input_ids.device, precision):
        logps, _ = answer_logps(policy.train(training and not has_dropout), batch, ld_alpha)
        ref_logps = reference.logps(policy, batch, ld_alpha)
    policy.train(training)
    difference = _difference(logps, ref_logps, batch.answers.length)
    if not difference <= ROUNDING[precision]:
        raise UserError(
            f"policy and reference differ before the first step: the log-probability of an answer of n tokens by "
            f"{difference:.1e} sqrt(n), where {ROUNDING[precision]:g} is rounding; the loss would not start at ln 2 = 0.6931",
            hint="with cached log-probabilities, delete them; otherwise this is an error of minisft: please report it",
            exit_code=MODEL,
        )


def check_layout(policy: Decoder, batch: Batch, loader: Loader, precision: str) -> None:
    """Check that some answers of the batch are as likely when each is alone with its prompt. Raises UserError.

    Policy and reference read the same batch, so an error of packing, of positions or of a shared prompt makes no difference
    between them, but it does here. The first document of a batch sees only itself.
    """
    documents = replace(loader.documents, shared=None)
    number = np.unique(np.linspace(0, len(batch.answers.role) - 1, min(NUM_ALONE, len(batch.answers.role)), dtype=int))
    most = max(ranks.gathered(len(number))) if is_sharded(policy) else len(number)  # passes that all ranks make
    training, alone = policy.training, []
    with no_backward(policy), runtime.autocast(batch.input_ids.device, precision):
        logps, _ = answer_logps(policy.eval(), batch)
        for answer in number.tolist():
            unit = [int((documents.index == batch.answers.document[i].item()).argmax()) for i in (answer, answer ^ 1)]
            pair = replace(documents, **{key: getattr(documents, key)[unit] for key in ("index", "start", "end")})
            packs = pack(pair.unit_lengths, int(pair.unit_lengths.sum()), "none")
            first = make_batch(pair, packs, [0], round_to=loader.round_to).to(batch.input_ids.device)
            alone.append(answer_logps(policy, first)[0][0])
        for _ in range(most - len(number)):
            answer_logps(policy, batch)
    policy.train(training)
    if alone:
        number = torch.from_numpy(number).to(logps.device)
        difference = _difference(logps[number], torch.stack(alone), batch.answers.length[number])
        if not difference <= ROUNDING[precision]:
            raise UserError(
                f"an answer of n tokens beside others has a log-probability that differs by {difference:.1e} sqrt(n) from the "
                f"one that it has alone, where {ROUNDING[precision]:g} is rounding",
                hint="this is an error of minisft: please report it; packing = false and share_prompt = false may avoid it",
                exit_code=MODEL,
            )


def _difference(logps: Tensor, others: Tensor, length: Tensor) -> float:
    """sqrt(sum of squared differences / sum of tokens) over the answers; 0 where there are none."""
    return ((logps - others).square().sum() / length.sum().clamp(min=1)).sqrt().item()


# ------------------------------------------------------------------------------------------------- cached on disk


def cache_logps(
    loader: Loader,
    compute: Callable[[Batch], Tensor],
    key: list,
    folder: Path,
    device: torch.device,
    batch_size: int,
    show_progress: bool,
) -> tuple[Loader, str]:
    """The loader with the log-probabilities of all its answers, and whether they were "found" or "computed".

    compute: batch -> fp32 [2U]. key: JSON values that identify model and precision; the data is added here. The ranks share
    the work and all have the result; rank 0 writes it. Raises UserError, before the work, where the folder cannot be written.
    """
    documents = loader.documents
    cuts = [hashlib.sha256(part.tobytes()).hexdigest() for part in (documents.index, documents.start, documents.end)]
    name = hashlib.sha256(json.dumps([VERSION, key, documents.cache.fingerprint, cuts]).encode()).hexdigest()[:32]
    path, num_documents = folder / f"reference-{name}", len(documents.cache.offsets) - 1
    found = path.exists() and verify_folder(path) is None
    (num_found,) = ranks.sum_numbers_over_ranks([float(found)])
    found = num_found == ranks.world_size()  # or all compute: another process may write it between two looks
    if found:
        ref_logps = np.fromfile(path / "logps.bin", dtype=np.float32)
    else:
        if ranks.rank() == 0:
            with _claimed(path):
                pass
        sums = torch.zeros(num_documents, dtype=torch.float64, device=device)
        once = replace(loader, batch_size=batch_size, accumulation=1, shuffle=False)
        bar = tqdm(range(once.steps_per_epoch), desc="reference", leave=False, disable=not show_progress)
        for step in bar:
            for batch in once.step(0, step):
                logps = compute(batch.to(device)).double()
                sums[batch.answers.document.to(device)] = logps  # a document that is repeated has one value
        is_mine = (sums != 0).double()
        sums, counts = ranks.sum_over_ranks(torch.stack([sums, is_mine]))
        ref_logps = (sums / counts.clamp(min=1)).float().cpu().numpy()
        if ranks.rank() == 0:
            _write(path, ref_logps)
    return replace(loader, documents=replace(documents, ref_logps=ref_logps)), "found" if found else "computed"


def _write(path: Path, ref_logps: np.ndarray) -> None:
    with _claimed(path):
        if verify_folder(path) is None:
            return  # another process has computed the same meanwhile, and others may be reading it
        remove_leftovers(path.parent)
        if os.path.lexists(path):
            shutil.rmtree(path)
        with atomic_folder(path, {"answers": int((ref_logps != 0).sum())}) as temporary:
            (temporary / "logps.bin").write_bytes(ref_logps)  # ndarray.tofile does not notice a full disk


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Hold the lock of a folder that is to be written. Raises UserError where it cannot be written."""
    try:
        with waiting_lock(path):
            yield
    except OSError as error:
        hint = "these are the cached log-probabilities: set cache_dir to a folder that can be written and has space"
        raise not_written(path, error, hint=hint) from None


def fingerprint(model: Decoder, without: Set[nn.Parameter] = frozenset()) -> str:
    """sha256 (hex) of a model: its configuration and its weights, except those of `without`. Of sharded weights one tensor after
    the other is gathered, so all ranks call it."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in sorted(named_weights(model).items()):
        if weight in without:
            continue
        tensors = [weight] if isinstance(weight, Tensor) else weight.parts()
        for tensor in map(whole, tensors):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())  # 0-dimensional ones have no view
    return digest.hexdigest()
