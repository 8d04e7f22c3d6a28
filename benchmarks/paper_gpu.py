"""A GPU that exists on paper: code runs on it without memory and without arithmetic, and every launch is written down.

    with PaperGPU(CARDS["H200"]) as gpu:
        x = torch.empty(4096, 4096, device=gpu.device)
        x @ x
    gpu.launches  # one: mm, 201 MB, 137 GFLOP

Its tensors are PyTorch's fake tensors: shapes, dtypes and devices, no numbers. Tensors of the host are real. What runs is the
code that runs on a GPU, branches on `is_cuda` included. Triton kernels end in a stand-in for JITFunction.run.

A launch is an op of ATen that needs a kernel, a Triton kernel, or a copy between host and device. Views and allocations are
none. An op counts once; on a GPU a sort, or an op on a long list of tensors (`_foreach_norm`), takes several.
Its bytes are those of its arguments and of its results, each once, as if caches held what is read again. Its FLOPs are those
of matrix products and of attention.

A wait is a place where the host stands still until the device has come to it: the code asks for a value (`item`, `tolist`,
`bool`), waits for an event or a stream, or copies and does not let that happen later (`non_blocking`, and memory that is
pinned). All numbers that come from the device are 0, which a step reads as "all is finite, nothing is clipped".

How it works. PyTorch without CUDA has no autograd for CUDA tensors, not even for fake ones. So PyTorch's C++ takes them for
CPU tensors, whose dispatch, autograd and autocast to bf16 are the same, and only Python sees "cuda:0". What the two say of
devices is translated: where C++ asks for one, in `to`, and in the name that autocast is given.
"""

import sys
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType, SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from benchmarks.harness import ROOT
from minisft.cards import Card
from minisft.kernels import common
from minisft.kernels.copies import kept_copy

ALLOCATIONS = set("empty empty_like empty_strided new_empty new_empty_strided _unsafe_view lift_fresh".split())
FILLS = set("fill_ zero_ zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full".split())
GATHERS = {"embedding", "index_select", "gather", "index"}  # read as much of their first argument as they write
SCATTERS = {
    "scatter_": 1,
    "index_add_": 2,
}  # write, or read and write, a number of their first argument for each of the last
ASKS_DEVICE = torch.ops.prim.device.default  # how C++ asks a fake tensor
ENGINE = "_engine_run_backward"  # below it runs autograd's engine


@dataclass(frozen=True)
class Launch:
    name: str  # of the op, or of the Triton kernel
    # files of minisft that called it, the innermost first: ("kernels/rope", "model/attention", ...)
    rooms: tuple[str, ...]
    phase: str  # "forward", "backward" or "update"
    bytes: float
    flops: float = 0
    shape: tuple[int, int, int] | None = None  # m, n, k of a product [m, k] [k, n]
    is_copy: bool = False  # between host and device


@cache
def _fake_mode() -> FakeTensorMode:
    """One for the whole process: kernels keep small tensors from one call to the next, and fake tensors belong to their mode."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class PaperGPU(TorchDispatchMode):
    """Use as a context manager, one at a time in a process.

    launches: in order. waits: "minisft/loop.py:219 asks for a value" -> how often. phase: of launches outside of the
    backward pass; "update" after one, unless it is set again. Raises RuntimeError where kernels cannot be launched.
    """

    device = torch.device("cuda", 0)

    def __init__(self, card: Card, pairs: float = 0):
        """pairs: of a query and a key that it sees, in each head of attention. No tensor without numbers knows them."""
        super().__init__()
        if common.INTERPRET or common.TensorDescriptor is None:
            raise RuntimeError(
                "the kernels were imported without Triton or for its interpreter: import paper_gpu first"
            )
        self.card, self.pairs = card, pairs
        self.launches: list[Launch] = []
        self.waits: Counter[str] = Counter()
        self.phase = "forward"
        self.addressed: list[Tensor] = []  # tensors whose address was taken since the last launch of a Triton kernel
        self.is_moving = False  # to another device
        self.stack = ExitStack()

    # ---- what PyTorch says of this GPU

    def __enter__(self):
        mode = _fake_mode()
        for owner, replaced in self._replaced().items():
            for name, value in replaced.items():
                self.stack.enter_context(mock.patch.object(owner, name, value))
        handlers = mock.patch.dict(fake_tensor._DISPATCH_META_HANDLERS, {ASKS_DEVICE: _device_for_c})
        self.stack.enter_context(handlers)
        common._arch.cache_clear()  # of another card
        self.stack.callback(common._arch.cache_clear)
        self.stack.enter_context(mode)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.stack.close()

    def _replaced(self) -> dict[object, dict[str, object]]:
        """owner -> what replaces its attributes while the GPU is there."""
        gpu, c_tensor, c_to, c_dispatch = self, torch.tensor, Tensor.to, FakeTensor.__torch_dispatch__
        c_autocast, c_is_enabled, c_dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
        c_subclass = Tensor._make_subclass

        def to(x, *args, copy=False, **kwargs):
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
            if device is None or device.type == x.device.type:
                return c_to(x, dtype or x.dtype, copy=copy)
            gpu.is_moving = True
            try:
                return torch.ops.aten._to_copy(x, dtype=dtype, device=device, non_blocking=non_blocking)
            finally:
                gpu.is_moving = False

        def tensor(data, *, device=None, pin_memory=False, **kwargs):
            x = c_tensor(data, **kwargs)
            x.is_pinned_on_paper = pin_memory
            return x if device is None else x.to(device)

        def as_tensor(data, dtype=None, device=None):
            x = data if isinstance(data, Tensor) else c_tensor(data, dtype=dtype)
            return x.to(device=device or x.device, dtype=dtype)

        def tolist(x):
            value = gpu._value(x)  # one wait for all of them
            for size in reversed(x.shape):
                value = [value] * size
            return value

        def data_ptr(x):
            gpu.addressed.append(x)
            return 4096  # aligned, as all memory of PyTorch

        def fake_dispatch(cls, func, types, args=(), kwargs=None):
            return _device_for_c(args) if func is ASKS_DEVICE else c_dispatch(func, types, args, kwargs or {})

        def make_subclass(*args, device_for_backend_keys=None, **kwargs):
            return c_subclass(*args, device_for_backend_keys=torch.device("cpu"), **kwargs)

        major, minor = gpu.card.capability
        properties = SimpleNamespace(multi_processor_count=gpu.card.num_sms, major=major, minor=minor)
        event = SimpleNamespace(synchronize=lambda: gpu._wait("waits for an event"), query=lambda: True)
        stream = SimpleNamespace(
            cuda_stream=0,
            synchronize=lambda: gpu._wait("waits for a stream"),
            record_event=lambda event=event: event,
            wait_event=lambda event: None,
        )
        return {
            torch.cuda: dict(
                is_available=lambda: True,
                current_device=lambda: 0,
                get_device_capability=lambda device=None: gpu.card.capability,
                get_device_properties=lambda device=None: properties,
                synchronize=lambda device=None: gpu._wait("waits for the device"),
                current_stream=lambda device=None: stream,
            ),
            torch: dict(
                autocast=lambda device_type, *args, **options: c_autocast("cpu", *args, **options),
                is_autocast_enabled=lambda device_type="cuda": c_is_enabled("cpu"),
                get_autocast_dtype=lambda device_type: c_dtype("cpu"),
                tensor=tensor,
                as_tensor=as_tensor,
            ),
            Tensor: dict(_make_subclass=staticmethod(make_subclass), to=to, cpu=lambda x: x.to("cpu")),
            FakeTensor: dict(
                is_cuda=property(lambda x: x.device.type == "cuda"),
                tolist=tolist,
                data_ptr=data_ptr,
                __torch_dispatch__=classmethod(fake_dispatch),
            ),
            fake_tensor: dict(init_gpu_context=lambda device: None),  # would allocate on a real one
            _foreach_utils: dict(_foreach_supported_types=[Tensor, FakeTensor]),
            JITFunction: dict(run=lambda kernel, *args, **kwargs: gpu._triton(kernel, args, kwargs)),
        }

    # ---- what happens on it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is ASKS_DEVICE:
            return torch.device("cpu")
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        inputs = _tensors((args, [value for key, value in kwargs.items() if key != "out"]))
        if name.startswith("_foreach_"):
            _require_one_device(args)  # fake tensors do not look
        if name == "is_pinned":
            return getattr(args[0], "is_pinned_on_paper", False)
        if name == "_local_scalar_dense" and args[0].is_cuda:
            return self._value(args[0])
        if name == "_to_copy" and args[0].is_cuda and not self.is_moving:
            kwargs.pop("device", None)  # C++ named it, and means that of the tensor
            if kwargs.get("dtype") in (None, args[0].dtype):
                return torch.ops.aten.alias(args[0])
        pins = bool(kwargs.pop("pin_memory", False)) or name == "_pin_memory"
        target = torch.device(kwargs.get("device") or "cpu")
        if (name.endswith("_like") or name.startswith("new_")) and kwargs.get("device") == torch.device("cpu"):
            with unset_fake_temporarily():  # memory of the host, like a tensor of the device
                args = torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:]
            inputs = []
        on_host = not any(x.is_cuda for x in inputs) and target.type == "cpu"
        to_host = name == "_to_copy" and self.is_moving and target.type == "cpu"
        to_host |= name == "copy_" and not args[0].is_cuda and args[1].is_cuda
        with unset_fake_temporarily() if on_host or to_host else nullcontext():
            if name == "_pin_memory":
                out = args[0].clone()
            elif name == "_to_copy" and self.is_moving:
                out = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=target)
            elif kwargs.get("out") is not None:
                out = kwargs["out"]  # has its shape, and not every product has a meta kernel
            else:
                out = args[0] if to_host else func(*args, **kwargs)
            if to_host:
                out.zero_()
        if pins:
            out.is_pinned_on_paper = True
        if on_host or func.is_view or name in ALLOCATIONS or name == "copy_" and args[0] is args[1]:
            return out
        outputs = _tensors(out)
        host = [x for x in (*inputs, *outputs) if not x.is_cuda]
        is_copy = name in ("_to_copy", "copy_") and len(host) > 0
        if is_copy:
            later = kwargs.get("non_blocking", False) or args[2:] == (True,)
            if not (later and getattr(host[0], "is_pinned_on_paper", False)):
                self._wait(f"copies {'to' if to_host else 'from'} the host")
        shape = _product(name, args)
        flops = 2 * shape[0] * shape[1] * shape[2] if shape else 0
        num_bytes = _nbytes(outputs[0]) if is_copy else _traffic(name, args, inputs, outputs)
        self._note(name, num_bytes, flops, shape, is_copy)
        return out

    def _value(self, x: Tensor) -> bool | int | float:
        """What code gets that asks for a number of the device."""
        self._wait("asks for a value")
        return False if x.dtype == torch.bool else 0.0 if x.is_floating_point() else 0

    def _triton(self, kernel: JITFunction, args: tuple, kwargs: dict) -> None:
        tensors = [getattr(x, "base", x) for x in (*args, *kwargs.values())]  # base: of a descriptor
        name, flops, others = kernel.fn.__name__.strip("_"), 0, []
        if {"q", "k"} <= kwargs.keys():
            heads, head_dim = getattr(kwargs["q"], "base", kwargs["q"]).shape[1:]
            flops = 2 * _attention_products(kwargs) * self.pairs * heads * head_dim
        if (
            "adamw" in name
        ):  # has its tensors in a table of addresses: gradients are read, copies for products are written
            weights = [x for x in self.addressed if x.is_leaf]
            once = {id(x) for weight in weights for x in (weight.grad, kept_copy(weight))}
            others = [x for x in self.addressed for _ in range(1 if id(x) in once else 2)]
        num_bytes = sum(_nbytes(x) for x in (*tensors, *others) if isinstance(x, Tensor))
        if name == "scale_kernel":
            num_bytes = 4  # the factor is 1, nothing else is read
        self._note(name, num_bytes, flops)
        self.addressed.clear()

    def _note(self, name, num_bytes, flops=0, shape=None, is_copy=False) -> None:
        rooms, _, in_engine = _place()
        if in_engine:
            self.phase = "update"  # of what follows
        phase = "backward" if in_engine else "forward" if rooms[:1] == ("data/batch",) else self.phase
        self.launches.append(Launch(name, rooms, phase, num_bytes, flops, shape, is_copy))

    def _wait(self, why: str) -> None:
        _, where, _ = _place()
        self.waits[f"{where} {why}"] += 1


def _require_one_device(args: tuple) -> None:
    """RuntimeError where tensors of two devices meet: the i-th of each list, and what belongs to all."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and isinstance(arg[0], Tensor)]
    for together in zip(*lists):
        if len({x.device for x in (*together, *args) if isinstance(x, Tensor)}) > 1:
            raise RuntimeError("a list has tensors of two devices for one result")


def _device_for_c(args: tuple) -> torch.device:
    return torch.device("meta" if args[0].fake_mode.in_kernel_invocation else "cpu")


def _place() -> tuple[tuple[str, ...], str, bool]:
    """(rooms of minisft on the stack, the innermost first; file:line in that one; whether autograd's engine is running)"""
    rooms, where, in_engine = [], "", False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        room = _room(file)
        if room and not rooms:
            where = f"{file.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        if room and room not in rooms:
            rooms.append(room)
        in_engine |= frame.f_code.co_name == ENGINE
        frame = frame.f_back
    return tuple(rooms), where, in_engine


@cache
def _room(file: str) -> str:
    """ "kernels/rope" of a file of ours, "optimizers" of torch's; "" of other files."""
    path = Path(file)
    if "torch/optim/" in path.as_posix():
        return "optimizers"
    if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] not in ("minisft", "kernels"):
        return ""
    return path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("minisft/")


def _tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _nbytes(x: Tensor) -> int:
    """Of its different elements: an expanded tensor has fewer than its shape says."""
    count = 1
    for size, stride in zip(x.shape, x.stride()):
        count *= size if stride else 1
    return count * x.element_size()


def _traffic(name: str, args: tuple, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an op of ATen reads and writes."""
    read, written = sum(map(_nbytes, inputs)), sum(map(_nbytes, outputs))
    if name in FILLS:
        return written
    if name in GATHERS:
        return read - _nbytes(args[0]) + 2 * written
    if name in SCATTERS:
        return read - _nbytes(args[0]) + SCATTERS[name] * _nbytes(args[3])
    if name == "_fused_adamw_":
        return 2 * read - sum(map(_nbytes, args[1]))  # gradients are only read
    if name.startswith("_foreach") and name.endswith("_"):
        return read + sum(map(_nbytes, args[0]))  # in place, returns nothing
    return read + written


def _product(name: str, args: tuple) -> tuple[int, int, int] | None:
    """(m, n, k) of a matrix product; None of other ops. Batches are stacked."""
    if name.rstrip("_") not in ("mm", "addmm", "bmm", "baddbmm"):
        return None
    a, b = _tensors(args)[-2:]  # of addmm the first is what is added
    batch = a.shape[0] if a.ndim == 3 else 1
    return batch * a.shape[-2], b.shape[-1], a.shape[-1]


def _attention_products(kwargs: dict) -> int:
    """How many products of tiles an attention kernel makes for each pair of tiles, by its arguments.

    Forward: q k^T and p v. Backward: q k^T again, dout v^T, and one for each of dq, dk and dv.
    """
    if "dout" not in kwargs:
        return 2
    return 2 + 2 * ("dk_ptr" in kwargs) + (kwargs.get("dq") is not None or "dq_ptr" in kwargs)
