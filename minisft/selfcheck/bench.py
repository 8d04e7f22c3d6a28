"""What the checks of `minisft selfcheck` share: a run that is made once, and the form of an answer."""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from minisft import runtime
from minisft.config.sections import Config
from minisft.data.cache import Documents
from minisft.data.loader import Loader
from minisft.model.lora import adapters
from minisft.preference.losses import ACROSS_THE_BATCH
from minisft.prepare.run import Run, prepare
from minisft.selfcheck.measure import Step, engine_step, first_documents, in_fp32, one_by_one

# Sums of fp32 numbers in another order: an element is off by a few ulp (6e-8) a layer, and the gradient of a norm, whose terms
# nearly cancel, loses a digit more. Measured: 2e-6 at most for 30 layers.
FP32 = 2e-5


class Skipped(Exception):
    """A check does not apply here; the text says why."""


@dataclass(frozen=True)
class Outcome:
    """What a check found: the largest error, its bar (0: every bit), and where that error is."""

    error: float
    bar: float
    where: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bar


@dataclass
class Bench:
    """What the checks share. The run is made once, and used up by the last of them."""

    config: Config
    words: list[str]  # the command line, for the check that starts processes
    folder: Path  # for whatever is written
    num_rows: int
    run: Run | None = None
    by_rows: Step | None = None  # the step with every document alone, in fp32

    def prepared(self) -> Run:
        if self.run is None:
            self.run = prepare(self.config, runtime.pick_device(self.config.train.device))
            for adapter in adapters(self.run.model) if self.run.model.lora is not None else ():
                move_adapter(adapter)
            if has_noise(self.run):
                self.run.model.eval()
        return self.run

    def forget(self) -> None:
        """Free the run, so that another one has room."""
        self.run = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def documents(self) -> Documents:
        return first_documents(self.prepared().train, self.num_rows)

    def alone(self) -> Step:
        """The reference of the equalities of the mathematics."""
        if self.by_rows is None:
            with in_fp32(self.prepared()) as run:
                self.by_rows = engine_step(run, self.config.train, self.rows(run))
        return self.by_rows

    def rows(self, run: Run) -> Loader:
        """Each document a row of its own: a micro-batch each or, where the loss depends on that, one for all of them."""
        documents = self.documents()
        return one_by_one(run.train, documents, documents.num_units if split_matters(self.config) else 1)


def move_adapter(adapter: torch.nn.Module) -> None:
    """A new adapter does nothing (B is zero), and what does nothing is not seen to be wrong."""
    generator = torch.Generator().manual_seed(0)
    for name, p in adapter.named_parameters():
        if name.endswith("lora_B"):
            noise = torch.randn(p.shape, generator=generator) * 0.01
            p.data += noise.to(p)


def has_noise(run: Run) -> bool:
    """Whether training draws random numbers: then two layouts of a batch draw others."""
    model = run.model
    names = ("attention_dropout", "mlp_dropout", "dropout")
    rates = [getattr(module, name, 0.0) for module in model.modules() for name in names]
    rates += [model.neftune_alpha, model.config.embedding_dropout, *(m.p for m in model.modules() if hasattr(m, "p"))]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def split_matters(config: Config) -> str:
    """Why another split into micro-batches is another objective; "" as a rule."""
    if config.train.loss_normalization == "micro_batch":
        return 'loss_normalization = "micro_batch" depends on the split, on purpose'
    losses = set(config.dpo.loss_type) if config.trainer_type == "dpo" else set()
    if across := sorted(losses & {"kto", *ACROSS_THE_BATCH}):
        return f"{', '.join(across)} takes a mean over a micro-batch, which depends on the split, on purpose"
    return ""
