"""Which implementation an op runs, and what the user is told when it is not the fast one."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from tolerance import relative_error

from minisft.config.sections import KEYS
from minisft.config.values import choices
from minisft.errors import UserError
from minisft.kernels import common
from minisft.kernels.causal_conv1d import causal_conv1d
from minisft.kernels.common import backend_for, use_backend
from minisft.kernels.cross_entropy import cross_entropy
from minisft.kernels.embedding import embedding
from minisft.kernels.flash_attention import flash_attention
from minisft.kernels.gated_delta_rule import gated_delta_rule
from minisft.kernels.glu import geglu, swiglu
from minisft.kernels.layer_norm import layer_norm
from minisft.kernels.linear import linears
from minisft.kernels.linear_cross_entropy import linear_cross_entropy
from minisft.kernels.lora import Adapter, lora_linears
from minisft.kernels.rms_norm import add_rms_norm, rms_norm
from minisft.kernels.rope import rope
from minisft.model.families import FAMILIES
from minisft.prepare.kernels import describe_kernels
from minisft.prepare.run import pick_kernels

X = torch.ones(2, 16)


def test_the_configuration_offers_every_backend():
    """Two lists, because kernels know nothing of the configuration, and that knows no torch."""
    assert choices(KEYS["model.kernels"].type) == common.BACKENDS


class OnGPU:
    """Stands for a tensor on the current GPU."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A function that gives this process one GPU of a compute capability."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def set_capability(*capability):
        common._arch.cache_clear()
        common._warn.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield set_capability
    common._arch.cache_clear()
    common._warn.cache_clear()


def in_new_process(code: str) -> str:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    ).stdout.strip()


def test_a_block_ends_where_it_began():
    with use_backend("reference"):
        with use_backend("torch"):
            assert backend_for("rms_norm", X) == "torch"
        assert backend_for("rms_norm", X) == "reference"
    with pytest.raises(ValueError, match="'cuda': expected one of auto, triton, torch, reference"):
        use_backend("cuda")


def test_auto_never_takes_triton_on_a_cpu_whatever_the_interpreter_says():
    with use_backend("auto"):
        assert backend_for("rms_norm", X) == "torch"


def test_the_kernels_import_without_triton_and_do_not_load_it_for_a_cpu():
    code = "import sys, minisft.kernels.rms_norm; print('triton' in sys.modules); "
    again = "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('minisft')]; "
    without = "from importlib import util; find = util.find_spec; util.find_spec = lambda name: None; "
    check = "import torch; from minisft.kernels.rms_norm import rms_norm as norm; "
    check += "print(norm(torch.ones(2), torch.ones(2), 0).round())"
    loads, result = in_new_process(code + again + without + check).splitlines()
    assert (torch.cuda.is_available() or loads == "False") and result == "tensor([1., 1.])"


@pytest.mark.parametrize(
    "capability, arch",
    {(8, 0): 80, (8, 6): 86, (8, 7): 80, (8, 9): 89, (9, 0): 90, (10, 0): 100, (10, 3): 100, (12, 1): 120}.items(),
    ids=str,
)
def test_every_card_takes_the_configurations_of_its_architecture(gpu, capability, arch):
    gpu(*capability)
    assert common.arch_of(OnGPU) == arch
    with warnings.catch_warnings(), use_backend("auto"):
        warnings.simplefilter("error")
        assert backend_for("rms_norm", OnGPU) == "triton"


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (11, 0)], ids=str)
def test_a_card_without_configurations_falls_back_with_one_warning(gpu, capability):
    gpu(*capability)
    with use_backend("auto"), pytest.warns(UserWarning, match=r"torch path .*capability \d+\.\d") as heard:
        backends = {backend_for(op, OnGPU) for op in common.TRITON_OPS for _ in range(2)}
    assert backends == {"torch"} and len(heard) == 1
    with use_backend("triton"), pytest.raises(ValueError, match="capability .*: the kernels need 8.0; use 'auto'"):
        backend_for("rms_norm", OnGPU)


def test_arguments_without_a_kernel_fall_back_with_one_warning_each(gpu):
    gpu(9, 0)
    with use_backend("auto"), pytest.warns(UserWarning, match="rms_norm: 9 legs") as heard:
        assert {backend_for("rms_norm", OnGPU, "9 legs") for _ in range(3)} == {"torch"}
    assert len(heard) == 1


def test_tensors_on_another_gpu_than_the_current_one_are_not_launched_on(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with use_backend("auto"), pytest.warns(UserWarning, match="on cuda:0, the current device is cuda:1"):
        assert backend_for("rms_norm", OnGPU) == "torch"


@pytest.mark.usefixtures("triton_kernels")
def test_float64_is_for_the_other_backends():
    with pytest.raises(ValueError, match="the kernels do not know float64"):
        rms_norm(X.double(), X[0].double(), 1e-5)


def test_asking_for_triton_without_a_gpu_is_a_users_mistake(monkeypatch):
    monkeypatch.setattr(common, "INTERPRET", False)
    with use_backend("auto"), pytest.raises(UserError, match="the kernels need a GPU") as mistake:
        pick_kernels("triton", torch.device("cpu"))
    assert "auto" in mistake.value.hint and mistake.value.exit_code == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ops_of_every_family_have_a_backend(family):
    with use_backend("torch"):
        assert describe_kernels(tiny(family), torch.device("cpu")) == "torch"


# ---- second derivatives ---------------------------------------------------------------------------------------------


def second_derivatives(op, dtype):
    """Of all inputs, from the squares of the gradients of the sum of what comes out: nothing from above has a graph."""
    start, end = torch.zeros(5, dtype=torch.int32), torch.full((5,), 5, dtype=torch.int32)
    ids, angle = torch.tensor([1, 2, 1, 0, 3]), torch.arange(40.0).view(5, 8)

    def heads(x):
        return x.view(5, 2, 16)

    ops = {
        "rms_norm": lambda x, y, w: rms_norm(x, w[0], 1e-5),
        "add_rms_norm": lambda x, y, w: sum(add_rms_norm(x, y, w[0], 1e-5)),
        "layer_norm": lambda x, y, w: layer_norm(x, w[0], w[1], 1e-5),
        "swiglu": lambda x, y, w: swiglu(x, y),
        "geglu": lambda x, y, w: geglu(x, y),
        "rope": lambda x, y, w: torch.cat(rope(heads(x), heads(y), angle.cos(), angle.sin())) ** 2,
        "flash_attention": lambda x, y, w: flash_attention(heads(x), heads(y), heads(x), start, end),
        "causal_conv1d": lambda x, y, w: causal_conv1d(x, w[:3].T, w[3], start, activation="silu"),
        "gated_delta_rule": lambda x, y, w: gated_delta_rule(
            *map(heads, (x, y, x)), -(x[:, :2] ** 2), y[:, :2], start, end
        ),
        "cross_entropy": lambda x, y, w: cross_entropy(x, ids),
        "linear_cross_entropy": lambda x, y, w: linear_cross_entropy(x, w, ids),
        "losses_of_rows": lambda x, y, w: linear_cross_entropy(x, w, ids, reduction="none"),
        "linears": lambda x, y, w: linears(x, (w, None))[0],
        "lora_linears": lambda x, y, w: lora_linears(x, [(w.detach(), None)], [Adapter(0, y[:2], w[:, :2], 2.0)])[0],
        "embedding": lambda x, y, w: embedding(ids, w) ** 2,
    }
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(n, 32, generator=generator).to(dtype).requires_grad_() for n in (5, 5, 7)]
    gradients = torch.autograd.grad(
        ops[op](*(x * 1 for x in inputs)).sum(), inputs, create_graph=True, allow_unused=True
    )
    seconds = torch.autograd.grad(sum((g**2).sum() for g in gradients if g is not None), inputs, allow_unused=True)
    return [torch.zeros_like(x) if s is None else s for s, x in zip(seconds, inputs)]


HAVE_SECOND = {("torch", "rope"), ("torch", "geglu"), ("torch", "layer_norm")}  # the last one in fp32
OPS = """
    rms_norm add_rms_norm layer_norm swiglu geglu rope flash_attention causal_conv1d gated_delta_rule cross_entropy
    linear_cross_entropy losses_of_rows linears lora_linears embedding
""".split()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_derivative_is_right_or_refused(backend, dtype, op, request):
    """Under a loss PyTorch's own decorator refuses none, and they would be zero."""
    if backend == "triton":
        request.getfixturevalue("triton_kernels")
    with use_backend(backend):
        if (backend, op) in HAVE_SECOND and (op != "layer_norm" or dtype == torch.float32):
            ours = second_derivatives(op, dtype)
            with use_backend("reference"):
                formula = second_derivatives(op, dtype)
            assert all(relative_error(s, f) < 20 * torch.finfo(dtype).eps for s, f in zip(ours, formula))
        else:
            with pytest.raises(RuntimeError, match="no second derivative .* use_backend"):
                second_derivatives(op, dtype)
    with use_backend("reference"):
        assert all(s.isfinite().all() for s in second_derivatives(op, dtype))
