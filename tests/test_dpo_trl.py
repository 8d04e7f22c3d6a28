"""Preference tuning against TRL's DPOTrainer, where it can be imported: the same loss, gradients and metrics of the same pairs.

Both are asked at a policy that is not the reference. That the losses are those of their papers is tested in
test_preference_losses.py; here all of the way from the tokens to the gradients is compared with somebody else's. Where the two
differ on purpose, a test says so.
"""

import pytest
import torch
from safetensors.torch import load_file
from test_dpo import make_pairs
from tiny import MODEL, relative_error, settings
from tiny_models import tiny

from benchmarks import bench_dpo
from minisft import dpo
from minisft.data.kinds import TRAINED
from minisft.data.loader import make_batch
from minisft.data.packing import pack
from minisft.model.load import load_model
from minisft.model.save import save_model
from minisft.preference.losses import LossOptions
from minisft.preference.reference import Reference

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
NUM_PAIRS, BETA, TAU = 6, 0.3, 1.0  # a small tau of discopop would enlarge rounding
# TRL's head and everything after it are fp32 whatever the model is, so a logp of -20 is off by some 1e-6. In fp32 ours is too.
TOLERANCE = {"float64": 1e-6, "float32": 2e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy, and a reference that is near it, in files that both read; a tokenizer."""
    folder = tmp_path_factory.mktemp("trl")
    settings(folder)
    model = tiny(MODEL | {"initializer_range": 0.2})
    save_model(model, folder / "reference")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_model(model, folder / "policy")
    return folder


@pytest.fixture(scope="module")
def documents():
    return make_pairs(NUM_PAIRS, longest=4)


@pytest.fixture(scope="module", params=TOLERANCE)
def trainer(request, folder):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset

    dtype = getattr(torch, request.param)
    models = [AutoModelForCausalLM.from_pretrained(folder / n, dtype=dtype) for n in ("policy", "reference")]
    return Tokenised(
        *models,
        args=DPOConfig(
            output_dir=str(folder / "out"),
            beta=BETA,
            discopop_tau=TAU,
            use_weighting=True,  # so that its head makes what this needs; `theirs` sets it
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]}]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
    )


def theirs(trainer, documents, monkeypatch, losses, options):
    """(loss, gradients by name, metrics)"""
    named = {"use_weighting": False, "loss_types": list(losses), "loss_weights": list(losses.values())}
    for name, value in (named | options).items():
        monkeypatch.setattr(trainer, name, value)
    rows = []
    for pair in range(NUM_PAIRS):
        row = {}
        for document, side in ((2 * pair, "chosen"), (2 * pair + 1, "rejected")):
            span = slice(documents.start[document], documents.end[document])
            ids, answer = documents.cache.ids[span].tolist(), (documents.cache.kinds[span] >= TRAINED).argmax()
            row |= {"prompt_ids": ids[:answer], f"{side}_ids": ids[answer:]}
        rows.append(row)
    trainer.model.train().zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    return loss.detach(), gradients, {name: values[0] for name, values in trainer._metrics["train"].items()}


def ours(folder, dtype, documents, losses, options, gradients_folder):
    """The same of dpo.loss."""
    options = {"beta": BETA, "discopop_tau": TAU} | options
    own = {OURS[name]: options.pop(name) for name in OURS if name in options}
    options |= {name: own.pop(name) for name in ("f_divergence", "alpha") if name in own}
    objective = dpo.Objective(losses, LossOptions(**options), **own)
    policy, other = (load_model(folder / name, dtype=dtype) for name in ("policy", "reference"))
    batch = make_batch(documents, pack(documents.unit_lengths, 60, "none"), range(NUM_PAIRS), round_to=8)
    total, stats = dpo.loss(
        policy, batch, 1 / NUM_PAIRS, objective=objective, reference=Reference("model", model=other)
    )
    total.backward()
    for parameter in policy.parameters():
        parameter.data = parameter.grad
    save_model(policy, gradients_folder)  # so they get the names of the files
    metrics = {name: float(value) / float(weight) for name, (value, weight) in stats.items()}
    return total.detach() / NUM_PAIRS, load_file(gradients_folder / "model.safetensors"), metrics


OURS = {
    "ld_alpha": "ld_alpha",
    "use_weighting": "use_weighting",
    "f_divergence_type": "f_divergence",
    "f_alpha_divergence_coef": "alpha",
}
MIXTURE = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
CASES = {
    **{name: ({name: 1.0}, {}) for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "nca_pair", "bco_pair")},
    **{name: ({name: 1.0}, {}) for name in ("sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop")},
    "sft": ({"sft": 1.0}, {}),
    "exo_pair": ({"exo_pair": 1.0}, {"label_smoothing": 0.1}),
    "robust": ({"robust": 1.0}, {"label_smoothing": 0.1}),
    "aot, smoothed": ({"aot": 1.0}, {"label_smoothing": 0.1}),
    "mixture": (MIXTURE, {}),
    # WPO of hinge or sft ends in an error there: the weights are multiplied in place (TRL 1.16)
    "WPO": ({"sigmoid": 1.0}, {"use_weighting": True}),
    "WPO of a mixture": ({"sigmoid": 0.7, "ipo": 0.5}, {"use_weighting": True}),
    "LD-DPO": ({"sigmoid": 1.0}, {"ld_alpha": 0.4}),
    "LD-DPO 0, ipo": ({"ipo": 1.0}, {"ld_alpha": 0.0}),
    "LD-DPO with WPO": ({"sigmoid": 1.0}, {"ld_alpha": 0.4, "use_weighting": True}),
    "forward KL": ({"sigmoid": 1.0}, {"f_divergence_type": "forward_kl"}),
    "Jensen-Shannon": ({"sigmoid_norm": 1.0}, {"f_divergence_type": "js_divergence"}),
    "Jensen-Shannon, hinge": ({"hinge": 1.0}, {"f_divergence_type": "js_divergence"}),
    "alpha": ({"sigmoid": 1.0}, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
    "alpha 1, ipo": ({"ipo": 1.0}, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
}


def whole(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.covers(1)
@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics(case, trainer, folder, documents, tmp_path, monkeypatch):
    losses, options = CASES[case]
    dtype = trainer.model.dtype
    loss, gradients, metrics = ours(folder, dtype, documents, losses, options, tmp_path)
    expected, their_gradients, their_metrics = theirs(trainer, documents, monkeypatch, losses, options)
    tolerance = TOLERANCE[str(dtype).rpartition(".")[2]]
    assert relative_error(loss, expected) < tolerance
    assert gradients.keys() == their_gradients.keys()
    assert relative_error(whole(gradients), whole(their_gradients)) < tolerance
    for name, value in their_metrics.items():
        if name != "num_tokens":  # of the whole run; ours is the loop's
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name  # differences of fp32 sums


def test_where_smoothing_of_sigmoid_is_ours_alone(trainer, folder, documents, tmp_path, monkeypatch):
    """-(1 - e) log s(x) - e log s(-x) is Mitchell's conservative DPO. TRL's sigmoid reads no label_smoothing."""
    smoothed = {"label_smoothing": 0.1}
    (plain, *_), (their_plain, *_) = (
        theirs(trainer, documents, monkeypatch, {"sigmoid": 1.0}, o) for o in ({}, smoothed)
    )
    loss, _, metrics = ours(folder, trainer.model.dtype, documents, {"sigmoid": 1.0}, smoothed, tmp_path)
    assert plain == their_plain
    # -log s(-x) = -log s(x) + x, so what e adds is e times the mean margin
    assert float(loss) == pytest.approx(float(plain) + 0.1 * metrics["rewards/margins"], rel=1e-5)


def test_the_benchmark_trains_the_same(tmp_path):
    """Steps of both trainers as benchmarks/bench_dpo.py takes them: the same tokens, and the same loss after a step."""
    where = {"folder": str(tmp_path), "size": "quick", "device": "cpu"}
    bench_dpo.make_inputs(**where)
    answers = {}
    for engine, _, reference in [("minisft", "", "copy"), ("trl", "", "copy"), ("trl", "", "cached")]:
        answer = getattr(bench_dpo, engine)(layout="unpacked", reference=reference, **where)
        answers[engine, "unpacked", reference] = [answer | {"peak_mb": 0.0}]
    one, other, _ = ([(s["tokens"], s["pairs"]) for s in a[0]["steps"]] for a in answers.values())
    assert one == other
    (line,) = bench_dpo.compare_losses(answers, bench_dpo.SIZES["quick"]["tolerance"])
    assert "the same" in line and answers["minisft", "unpacked", "copy"][0]["steps"][1]["loss"] < 0.69
