"""The model card: README.md of an exported model, with the header that the Hugging Face hub reads.

It tells what the model was made of, how, and what came out. It holds names of repositories and of files, numbers, and choices by
name, and never a path, an address or a text of the user's: the values that are shown are listed here, and are numbers, truth
values and names of our own. It is a function of the run, so that a resumed run writes the same bytes.
"""

import re
import sys
from pathlib import Path, PurePath
from typing import Any

import yaml

from minisft import record
from minisft.config.sections import KEYS, Config
from minisft.data.sources import Source
from minisft.hub import may_be_repository
from minisft.model.start import Start
from minisft.prepare.run import Run

RECIPE = (  # keys whose values are shown where they are set or matter to everyone
    "train.learning_rate", "train.lr_scheduler_type", "train.warmup_steps", "train.warmup_ratio", "train.num_train_epochs",
    "train.max_steps", "train.per_device_train_batch_size", "train.gradient_accumulation_steps", "train.optim",
    "train.weight_decay", "train.max_grad_norm", "train.precision", "train.weights_dtype", "train.label_smoothing",
    "train.neftune_noise_alpha", "train.seed", "data.max_length", "data.packing", "data.packing_strategy",
    "data.truncation", "data.completion_only_loss", "data.assistant_only_loss", "model.load_in_4bit", "model.load_in_8bit",
    "lora.r", "lora.lora_alpha", "lora.lora_dropout", "lora.use_rslora", "lora.use_dora", "lora.init_lora_weights",
)  # fmt: skip
OF_DPO = ("dpo.loss_type", "dpo.beta", "dpo.f_divergence_type", "dpo.sync_ref_model")
ALWAYS = RECIPE[:2] + (
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.optim",
    "train.seed",
)
PACKAGES = ("minisft", "python", "torch", "tokenizers", "safetensors", "triton")
MAX_POINTS = 12  # rows of the table of the curve
VERSION = sys.modules["minisft"].__version__  # the package is above this room
ADAPTER = "an adapter (LoRA) for "  # what the card of an adapter says, and that of a merged model does not
COLUMNS = ("step", "loss", "mean_token_accuracy", "grad_norm", "learning_rate")


def write_card(folder: Path, config: Config, run: Run, rows: list[dict[str, float]]) -> None:
    """README.md of an exported model. rows: the metrics of the run."""
    (folder / "README.md").write_text(card_of(config, run, rows), encoding="utf-8")


def card_of(config: Config, run: Run, rows: list[dict[str, float]]) -> str:
    sources = run.train.documents.cache.sources
    base, is_adapter = base_name(run.start), run.model.lora is not None
    name = cell(PurePath(config.output_dir).name or "model")
    kind = "preference tuning" if config.trainer_type == "dpo" else "supervised fine-tuning"
    what = f"{ADAPTER}{link(base)}" if is_adapter else f"a fine-tuned version of {link(base)}"
    if base is None:
        what = "trained from random weights"
    parts = [
        f"# {name}",
        f"This model is {what}, made by {kind} with minisft {VERSION}.",
        "## Data",
        data_table(sources, run),
        "## Recipe",
        recipe_table(config, run),
        "## Training",
        curve_table(rows),
    ]
    if evaluated := evaluation_table(rows):
        parts += ["## Evaluation", evaluated]
    parts += ["## Versions", versions()]
    header = header_of(run, sources, base, is_adapter, config.trainer_type, license_of(run.start))
    return "\n\n".join([header, *(part for part in parts if part)]) + "\n"


def header_of(
    run: Run, sources: tuple[Source, ...], base: str | None, is_adapter: bool, trainer: str, license: str | None
) -> str:
    values: dict[str, Any] = {}
    if is_hub_name(base):
        values |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    if datasets := list(dict.fromkeys(source.path for source in sources if source.commit)):
        values["datasets"] = datasets
    if license:
        values["license"] = license
    values["library_name"] = "peft" if is_adapter else "transformers"
    values["pipeline_tag"] = "text-generation"
    values["tags"] = ["minisft", trainer, *(["lora"] if is_adapter else [])]
    if run.tokenizer.template is not None:
        values["tags"].append("conversational")
    return with_header(values, "").rstrip("\n")


def with_header(values: dict[str, Any], text: str) -> str:
    return "---\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True) + f"---\n{text}"


def card_of_whole(card: str, values: dict[str, Any]) -> str:
    """The card of the same model in another form, which holds an adapter no longer apart. values: of its header."""
    card = re.sub(
        rf"^(This model is ){re.escape(ADAPTER)}(.*?), made by ",
        r"\1\2 with an adapter (LoRA) merged into it, made by ",
        card,
        count=1,
        flags=re.MULTILINE,
    )
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if not found:
        return card
    header = yaml.safe_load(found[1])
    header = (header if isinstance(header, dict) else {}) | values
    if "base_model" not in header:
        header.pop("base_model_relation", None)
    return with_header(header, card[found.end() :])


def base_name(start: Start | None) -> str | None:
    """What to call the model that a run started from: its repository, or the last part of its folder's name."""
    if start is None:
        return None
    return start.name if start.commit or is_hub_name(start.name) else PurePath(start.name).name or "model"


def is_hub_name(name: str | None) -> bool:
    return bool(name) and name.count("/") == 1 and may_be_repository(name) and not Path(name).exists()


def license_of(start: Start | None) -> str | None:
    """That of the base model, where its card is beside it."""
    path = start.folder / "README.md" if start is not None else None
    if path is None or not path.is_file():
        return None
    found = re.match(
        r"---\n.*?^license: *([\w.-]+) *$", path.read_text("utf-8", errors="replace"), re.DOTALL | re.MULTILINE
    )
    return found[1] if found else None


# ---- tables -------------------------------------------------------------------------------------------------------


def data_table(sources: tuple[Source, ...], run: Run) -> str:
    rows = [("source", "split", "revision", "passes an epoch")]
    for source in sources:
        name = link(source.path, "datasets/") if source.commit else f"`{cell(PurePath(source.path).name)}`"
        rows.append((name, cell(source.split), source.commit[:12], f"{source.weight:g}"))
    documents = run.train.documents
    tokens = int(documents.lengths.sum())
    return table(rows) + f"\n\n{len(documents):,} documents with {tokens:,} tokens an epoch."


def recipe_table(config: Config, run: Run) -> str:
    rows = [("key", "value")]
    for key in RECIPE + (OF_DPO if config.trainer_type == "dpo" else ()):
        section, _, field = key.partition(".")
        value = getattr(getattr(config, section), field)
        if value != KEYS[key].default or key in ALWAYS:
            value = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            rows.append((f"`{field}`", f"{value:g}" if isinstance(value, float) else str(value)))
    rows.append(("steps", f"{run.progress.step:,}"))
    rows.append(("tokens", f"{run.progress.num_tokens:,}"))
    rows.append(("trained parameters", f"{sum(p.numel() for p in run.model.parameters() if p.requires_grad):,}"))
    return table(rows)


def curve_table(rows: list[dict[str, float]]) -> str:
    logged = [row for row in rows if "loss" in row]
    if not logged:
        return ""
    last = len(logged) - 1
    points = sorted({round(i * last / (MAX_POINTS - 1)) for i in range(MAX_POINTS)})
    names = [name for name in COLUMNS if name in logged[-1]]
    return table([tuple(names), *(tuple(number(logged[i].get(name)) for name in names) for i in points)])


def evaluation_table(rows: list[dict[str, float]]) -> str:
    """The last value of everything that was evaluated."""
    values = {name: (row["step"], value) for row in rows for name, value in row.items() if name.startswith("eval_")}
    if not values:
        return ""
    return table(
        [("metric", "step", "value"), *((f"`{name}`", number(s), number(v)) for name, (s, v) in values.items())]
    )


def versions() -> str:
    found = record.versions()
    return ", ".join(f"{name} {found[name]}" for name in PACKAGES if name in found)


def table(rows: list[tuple[str, ...]]) -> str:
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rest))


def cell(text: str) -> str:
    """A name in a table: no end of a cell, a line or code."""
    return re.sub(r"[|`\s<>]+", " ", text).strip()


def link(name: str | None, kind: str = "") -> str:
    text = cell(name or "")
    return f"[{text}](https://huggingface.co/{kind}{name})" if is_hub_name(name) else f"`{text}`"


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
