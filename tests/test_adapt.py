"""A trained model learns something new: in all its weights, in adapters, in adapters beside 4-bit weights. `pytest -m slow`.

The quickstart's model learns four of its five kinds of task; then each method teaches it the fifth, to reverse a word, whose
instruction it has never seen. On one thread of a busy machine: the base two minutes, each method one.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny import relative_error

from minisft.data.tokenizer import load_tokenizer
from minisft.model.decoder import Decoder
from minisft.model.load import load_model
from minisft.model.lora import adapter_disabled, merge_adapter
from minisft.model.quantized import Quantization
from minisft.model.start import load_adapted
from minisft.train import run

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NEW = "reverse"
LORA = {"lora.r": 16, "lora.lora_alpha": 32.0, "train.num_train_epochs": 8.0}  # the other settings are the quickstart's
METHODS = {
    "full": {"train.num_train_epochs": 6.0},
    "lora": LORA,
    "qlora": LORA | {"model.load_in_4bit": True},
}


def teach(folder: Path, name: str, kinds: str, **keys) -> tuple[Path, float]:
    """Train with the quickstart's settings on rows whose kind is `kinds` ("old" or "new"): (model folder, exact match)."""
    files = {}
    for part in ("train", "held_out"):
        rows = [json.loads(line) for line in (CONFIGS / "quickstart" / f"{part}.jsonl").read_text().splitlines()]
        rows = [row for row in rows if (row["kind"] == NEW) == (kinds == "new")]
        files[part] = folder / f"{part}-{kinds}.jsonl"
        files[part].write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(
        CONFIGS / "quickstart.toml",
        output_dir=str(folder / name),
        train_data=str(files["train"]),
        generate_data=str(files["held_out"]),
        eval_fraction=0.0,
        report_to=[],
        progress_bar=False,
        **keys,
    )
    return result.model_dir, result.metrics["eval_exact_match"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[Path, float]:
    return teach(tmp_path_factory.mktemp("adapt"), "base", "old")


@pytest.fixture(scope="module")
def adapted(base):
    """A function: name of a method -> (model folder, exact match on the new kind), trained once."""
    model = {"model.config": None, "model.model_name_or_path": str(base[0]), "tokenizer_name_or_path": None}
    made = {}

    def of(method: str) -> tuple[Path, float]:
        if method not in made:
            made[method] = teach(base[0].parents[1], method, "new", **model, **METHODS[method])
        return made[method]

    return of


def logits(model: Decoder, folder: Path) -> torch.Tensor:
    """The logits of every token of the held-out prompts of all kinds and their answers, as one stream of documents."""
    tokenizer, rows = load_tokenizer(folder), (CONFIGS / "quickstart" / "held_out.jsonl").read_text().splitlines()
    documents = [tokenizer.encode(row["prompt"] + row["completion"]) for row in map(json.loads, rows)]
    lengths = torch.tensor([len(ids) for ids in documents])
    last = lengths.cumsum(0)
    start, end = (bound.repeat_interleave(lengths).int() for bound in (last - lengths, last))
    positions = torch.arange(len(start), dtype=torch.int32) - start
    with torch.no_grad():
        return model.logits(model(torch.tensor(sum(documents, [])), positions, start, end))


def test_the_base_knows_the_old_kinds(base):
    assert base[1] >= 0.85  # 92 %; it misses some of the words that it is to sort


def test_the_base_does_not_know_the_new_one(base, adapted):
    """Otherwise there would be nothing to teach. The score is that of one step at a rate that changes nothing."""
    model = {"model.config": None, "model.model_name_or_path": str(base[0]), "tokenizer_name_or_path": None}
    untaught = teach(base[0].parents[1], "untaught", "new", **model, max_steps=1, learning_rate=1e-12)
    assert untaught[1] <= 0.2


@pytest.mark.parametrize("method", METHODS)
def test_each_method_teaches_it(adapted, method):
    assert adapted(method)[1] >= 0.9


@pytest.mark.parametrize("method, quantization", [("lora", None), ("qlora", Quantization("nf4", True))])
def test_without_its_adapter_it_is_the_base_bitwise(base, adapted, method, quantization):
    folder, _ = adapted(method)
    model, plain = load_adapted(folder), load_model(base[0], quantization=quantization).eval()
    with_adapter = logits(model, folder)
    with adapter_disabled(model):
        assert torch.equal(logits(model, folder), logits(plain, folder))
    assert relative_error(with_adapter, logits(plain, folder)) > 0.1
    assert torch.equal(with_adapter, logits(model, folder))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_merged_is_unmerged(adapted, method):
    folder, _ = adapted(method)
    model = load_adapted(folder)
    unmerged = logits(model, folder)
    assert relative_error(logits(merge_adapter(model), folder), unmerged) <= 1e-5  # fp32
