"""Every optimizer against a plain transcription of its update rule, or torch's own; groups, resume, bad input."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from tiny import logged, parts, relative_error, settings, train
from torch import nn

from minisft.config.sections import TrainSection
from minisft.errors import UserError
from minisft.optimizers import OPTIMIZERS, Adafactor, build_optimizer, evaluation_weights, orthogonal
from minisft.parameters import parameter_groups

ROOT = Path(__file__).resolve().parents[1]
LR, DECAY, BETAS, EPS, STEPS = 0.03, 0.1, (0.9, 0.98), 1e-8, 7


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 6, bias=False)])
        self.norm = nn.LayerNorm(6)


def gradient(t: int, p: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * t + p.numel())
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * (1 + 3 * (t == 4))


def stepped(name: str, steps: int = STEPS, decay: float = DECAY, **options) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model().double()  # in fp64, so that only the rule is compared
    groups = parameter_groups(model, learning_rate=LR, weight_decay=decay)
    optimizer = build_optimizer(name, groups, betas=BETAS, eps=EPS, **options)
    for t in range(steps):
        for p in model.parameters():
            p.grad = gradient(t, p)
        optimizer.step()
    return model, optimizer


# ---- the rules, written down plainly, one tensor at a time: rule(w, gradients, weight decay, is a matrix of a layer) -> w


def sgd_rule(w, grads, decay, _, momentum=0.0):
    m = torch.zeros_like(w)
    for g in grads:
        m = momentum * m + g
        w = w - LR * (m + decay * w)
    return w


def lion_rule(w, grads, decay, _):
    m, (b1, b2) = torch.zeros_like(w), BETAS
    for g in grads:
        w = w - LR * (torch.sign(b1 * m + (1 - b1) * g) + decay * w)
        m = b2 * m + (1 - b2) * g
    return w


def adamw_rule(w, grads, decay, _):
    m, v, (b1, b2) = torch.zeros_like(w), torch.zeros_like(w), BETAS
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - LR * (m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + EPS) + decay * w)
    return w


def stable_adamw_rule(w, grads, decay, _):
    m, v, (b1, b2) = torch.zeros_like(w), torch.zeros_like(w), BETAS
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        mean, square = m / (1 - b1**t), v / (1 - b2**t)
        r = (g**2 / torch.maximum(square, torch.tensor(EPS**2))).mean().sqrt().item()
        w = w - LR * decay * w - LR / max(1.0, r) * mean / (square.sqrt() + EPS)
    return w


def schedule_free_rule(w, grads, decay, _):
    """In x and z, as the paper has it; y is what a parameter holds."""
    x, z, v, (b1, b2) = w, w, torch.zeros_like(w), BETAS
    for t, g in enumerate(grads, 1):
        y = b1 * x + (1 - b1) * z
        v = b2 * v + (1 - b2) * g * g
        z = z - LR * (g / ((v / (1 - b2**t)).sqrt() + EPS) + decay * y)
        x = (1 - 1 / t) * x + z / t
    return b1 * x + (1 - b1) * z


def muon_rule(w, grads, decay, is_matrix):
    if not is_matrix:
        return adamw_rule(w, grads, decay, False)
    m = torch.zeros_like(w)
    for g in grads:
        m = 0.95 * m + g
        w = w - LR * (0.2 * math.sqrt(max(w.shape)) * orthogonal(g + 0.95 * m) + decay * w)
    return w


def adafactor_rule(w, grads, decay, _):
    rows = columns = v = 0.0
    for t, g in enumerate(grads, 1):
        b2 = 1 - t**-0.8
        alpha = max(1e-3, w.norm().item() / math.sqrt(w.numel())) * min(LR, 1 / math.sqrt(t))
        if w.ndim == 2:
            rows = b2 * rows + (1 - b2) * g.square().mean(1, keepdim=True)
            columns = b2 * columns + (1 - b2) * g.square().mean(0, keepdim=True)
            square = rows @ columns / rows.mean()
        else:
            square = v = b2 * v + (1 - b2) * g.square()
        u = g / square.sqrt()
        u = u / max(1.0, u.norm().item() / math.sqrt(u.numel()))
        w = w * (1 - LR * decay) - alpha * u
    return w


RULES = {
    "sgd": sgd_rule,
    "lion": lion_rule,
    "adamw": adamw_rule,
    "adamw_minisft": adamw_rule,
    "adamw_8bit": adamw_rule,  # of tensors this small; test_optim_memory.py has larger ones
    "stable_adamw": stable_adamw_rule,
    "schedule_free_adamw": schedule_free_rule,
    "adafactor": adafactor_rule,
    "muon": muon_rule,
}


TO_FP32 = ("adamw", "adamw_minisft", "adamw_8bit", "adafactor")  # torch's kernels have some scalars in fp32


def test_the_configuration_names_them_all():
    assert set(get_args(get_type_hints(TrainSection)["optim"])) == set(OPTIMIZERS) == set(RULES)


def test_adafactor_is_torchs():
    """Matrices, vectors and convolutions; also from a state that torch's has written."""
    shapes, fixed = [(8, 5), (7,), (1, 6), (6, 1, 4)], torch.Generator().manual_seed(0)
    weights = [0.1 * torch.randn(shape, generator=fixed) for shape in shapes]
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    rate = {"lr": 1e-2, "weight_decay": 0.1}
    mine, torchs = Adafactor([{"params": ours, **rate}], BETAS, EPS), torch.optim.Adafactor(theirs, **rate)
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
        for a, b in zip(ours, theirs):
            assert relative_error(a, b) <= 1e-6
        if step == 3:  # matrices and vectors go on from its vectors
            for a, b in zip(ours[:3], theirs):
                mine.state[a] = {key: value.clone() for key, value in torchs.state[b].items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_transcription_of_its_rule(name):
    torch.manual_seed(0)
    first, (model, _) = Model().double(), stepped(name)
    for (key, w), p in zip(first.named_parameters(), model.parameters()):
        w = w.detach()
        is_matrix = w.ndim == 2 and key.startswith("layers.")
        expected = RULES[name](w, [gradient(t, w) for t in range(STEPS)], DECAY if w.ndim == 2 else 0.0, is_matrix)
        # fp64 sums in another order
        assert relative_error(p.detach(), expected) <= (1e-7 if name in TO_FP32 else 1e-12), key


def test_sgd_with_momentum_is_torchs():
    torch.manual_seed(0)
    theirs = Model().double()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=LR, momentum=0.9)
    for t in range(STEPS):
        for p in theirs.parameters():
            p.grad = gradient(t, p)
        optimizer.step()
    ours, _ = stepped("sgd", decay=0.0, momentum=0.9)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q)


def test_muon_is_torchs():
    torch.manual_seed(0)
    theirs = Model().double()
    matrices = [layer.weight for layer in theirs.layers]
    optimizer = torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for t in range(STEPS):
        for p in theirs.parameters():
            p.grad = gradient(t, p)
        optimizer.step()
    ours, _ = stepped("muon")
    for layer, matrix in zip(ours.layers, matrices):
        assert (
            relative_error(layer.weight.detach(), matrix.detach()) <= 2e-2
        )  # bf16 products of numbers scaled otherwise


def test_orthogonal_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in [(8, 8), (6, 30), (30, 6)]:
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert 0.5 < values.min() and values.max() < 1.3


def test_a_parameter_that_starts_later_starts_as_if_alone():
    """Its moments and its bias correction count its own updates."""
    for name in ("stable_adamw", "schedule_free_adamw", "muon", "adamw", "adamw_minisft", "lion"):
        late, alone = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(3).double())
        early = nn.Parameter(torch.ones(3).double())

        def make(*params, name=name):
            group = {"params": list(params), "peak_lr": LR, "weight_decay": 0.0, "matrices": False, "embedding": False}
            return build_optimizer(name, [group], betas=BETAS, eps=EPS)

        together, single = make(early, late), make(alone)
        for t in range(6):
            early.grad = gradient(t, early)
            late.grad = gradient(t, late) if t >= 3 else None
            together.step()
        for t in range(3, 6):
            alone.grad = gradient(t, alone)
            single.step()
        assert relative_error(late.detach(), alone.detach()) <= 1e-12, name


def test_schedule_free_evaluates_at_the_mean():
    model, optimizer = stepped("schedule_free_adamw")
    training = [p.detach().clone() for p in model.parameters()]
    with evaluation_weights(optimizer):
        for p, y in zip(model.parameters(), training):
            z = optimizer.state[p]["z"]
            assert relative_error(0.9 * p.detach() + 0.1 * z, y) <= 1e-12
    assert all(torch.equal(p, y) for p, y in zip(model.parameters(), training))


# ---- groups -------------------------------------------------------------------------------------------------------


def test_groups_by_rate_decay_and_kind():
    model = Model()
    model.norm.bias.requires_grad_(False)
    rates, decays = {"embed": 0.5}, {r"layers\.1": 0.0}
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.1, learning_rates=rates, weight_decays=decays)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["peak_lr"], g["weight_decay"], g["matrices"]) for g in groups for p in g["params"]}
    assert found == {
        "embed_tokens.weight": (0.5, 0.1, False),
        "layers.0.weight": (1.0, 0.1, True),
        "layers.0.bias": (1.0, 0.0, False),
        "layers.1.weight": (1.0, 0.0, True),
        "norm.weight": (1.0, 0.0, False),
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(learning_rates={"head": 1.0}), "'head' matches no parameter that trains"),
        (dict(weight_decays={"(": 0.1}), r"'\(' is not a regular expression"),
    ],
)
def test_names_that_are_found_nowhere_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        parameter_groups(Model(), learning_rate=1.0, weight_decay=0.0, **options)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"train.optim_args": {"momentum": 0.9}}, "momentum = 0.9"),
        ({"train.optim": "sgd", "train.optim_args": {"momentum": 1.5}}, "momentum = 1.5"),
        ({"train.optim": "schedule_free_adamw"}, "averages the weights instead"),
        ({"train.learning_rates": {"embed": "fast"}}, "values are each a number"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        parts(tmp_path, **overrides)


# ---- in a run -----------------------------------------------------------------------------------------------------

RATES = {"sgd": 1.0, "lion": 1e-3, "adafactor": 1e-1}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optim")
    settings(folder)
    return folder


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learns_and_resumes_to_the_same_bytes(home, tmp_path, name):
    keys = {
        "train.optim": name,
        "train.learning_rate": RATES.get(name, 1e-2),
        "train.lr_scheduler_type": "constant",
        "train.max_steps": 6,
        "checkpoint.save_steps": 3,
        "data.cache_dir": str(home / "cache"),
    }
    whole = train(home, output_dir=str(tmp_path / "whole"), **keys)
    losses = logged(tmp_path / "whole")
    assert losses[-1] < losses[0]
    half = tmp_path / "whole" / "checkpoints" / "step-00000003"
    again = train(home, output_dir=str(tmp_path / "again"), **keys, **{"checkpoint.resume": str(half)})
    one, other = ((r.model_dir / "model.safetensors").read_bytes() for r in (whole, again))
    assert one == other


def test_training_imports_no_compiler():
    """A new process that fills a model and takes a step has neither torch's compiler nor what that imports."""
    code = """
import sys
import torch
from tiny_models import CONFIGS, stream
from minisft.model.families import from_hf
from minisft.model.load import build_model, init_weights
from minisft.optimizers import build_optimizer
from minisft.parameters import parameter_groups
model = build_model(from_hf(CONFIGS["llama"]), "cpu")
init_weights(model, 0)
groups = parameter_groups(model, learning_rate=0.1, weight_decay=0.1)
for name in ("adamw", "adamw_minisft", "adafactor"):
    optimizer = build_optimizer(name, groups, betas=(0.9, 0.98), eps=1e-8)
    model(torch.zeros(6, dtype=torch.long), *stream([6])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print(*{"torch._dynamo", "sympy", "triton"} & sys.modules.keys())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
