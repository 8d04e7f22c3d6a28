"""Sharded training: every rank keeps some rows of every matrix, with their gradients and moments (FSDP2, torch's fully_shard).

    memory of a rank     (weights + gradients + moments) / ranks, two blocks as whole tensors, and embedding and head
    messages of a step   for every micro-batch: the weights of each block are gathered in its forward and again in its backward,
                         and its gradients are summed (all-gather, all-gather, reduce-scatter)

Each block is a group of its own; embedding and head are the root's group. The root stays whole from its forward to its backward,
because the loss reads the head's weight in between. Vectors (norms, biases) and adapters are not sharded: every rank has all
of them, and their gradients are summed after the backward. The loss of a step is sum / N with N known before, so gradients are
summed over the ranks, and nothing is divided.

The optimizer sees plain tensors. `part_of` is this rank's rows as a parameter of their own, in the same memory, so an update
that works number by number is the same code; the others ask parts.py. `sum_gradients` gives these parts their gradients, and
`total_norm` adds up one number of each rank. Only this file and the rooms that read and write weights (model/shards.py) see a
DTensor.

With `offload` these rows, their gradients and their moments are in the memory of the CPU, and an optimizer has parameters on two
devices: tensors of each are worked on apart.

A forward pass without a backward leaves the root whole, and a later update would change the rows but not these whole weights.
So all such passes are made inside `no_backward`. FSDP2 does not notice another `.data` either: values are changed in place.

Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277. ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from minisft import ranks
from minisft.data.pieces import pieces_of
from minisft.kernels.copies import never_keep_copy
from minisft.model import shards
from minisft.model.attention import Attention
from minisft.model.context import Context
from minisft.model.decoder import Decoder
from minisft.model.quantized import QuantWeight, named_weights, quant_weights
from minisft.model.row_files import Rows
from minisft.optimizers import OF_BLOCKS, STATE_BLOCKSIZE
from minisft.parts import Cut
from minisft.update import by_device

SHARDS_INTEGERS = torch.__version__ >= "2.12"  # FSDP2 of 2.11 wants a gradient of every parameter
T = TypeVar("T")


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called with this model."""
    return hasattr(model, "reshard")


def needs_others(model: Decoder) -> bool:
    """Whether other ranks take part in a training pass: they have weights, or tokens of the same documents."""
    return is_sharded(model) or model.context is not None


def split_documents(model: Decoder, device: torch.device, count: int) -> None:
    """Let each `count` ranks share their batches, as data/pieces.py deals them: ranks 0 to count - 1, and so on."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (ranks.world_size() // count, count), mesh_dim_names=("data", "context"))
    pieces = tuple(pieces_of(index, count) for index in range(count))
    context = Context(mesh.get_group("context"), ranks.rank() % count, pieces)
    for module in model.modules():
        if isinstance(module, Decoder | Attention):
            module.context = context


def shard(
    model: Decoder,
    device: torch.device,
    *,
    replicas: int = 1,
    reshard: bool = True,
    dtype: torch.dtype | None = None,
    offload: bool = False,
    keep: Callable[[str, nn.Parameter, int], bool] = lambda name, p, size: False,
) -> None:
    """Keep this rank's rows of every matrix of the model, in place. It may be on the meta device, without memory.

    replicas: groups of ranks that each have the whole model. reshard: free a block's whole weights after its forward, and gather
    them again for its backward. dtype: in which the blocks are gathered, that of autocast, which would round them to it anyway;
    gradients are summed in fp32. None: as they are. offload: the rows of this rank and their gradients are in the memory of the
    CPU; whole weights, vectors and adapters are on the device. keep(name, parameter, ranks of a group): whether every rank keeps
    all of it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    shape = (replicas, ranks.world_size() // replicas) if replicas > 1 else (ranks.world_size(),)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    quantised = list(quant_weights(model).values())
    for weight in quantised:
        weight.make_shardable()
    parts = {p for weight in quantised for p in weight.parameters()}
    adds = model.lora is not None
    whole = {p for p in model.parameters() if p not in parts and (p.ndim == 1 or adds and p.requires_grad)}
    whole |= {p for name, p in model.named_parameters() if p.ndim > 1 and keep(name, p, shape[-1])}
    if quantised:
        dtype = None  # scales are gathered as they are: in 16 bits they would give other matrices
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32, cast_forward_inputs=False
    )
    homes = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    options = {"mesh": mesh, "offload_policy": homes, "ignored_params": whole}
    for block in model.layers:
        block.products_add = False  # FSDP2 hands views of x from block to block, which must not change in place
        fully_shard(block, reshard_after_forward=reshard, mp_policy=policy, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a divided sum is no op of gloo
    if not any(p.is_meta for p in whole):
        for p in whole:  # fully_shard has moved the others
            p.data = p.data.to(device)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def settle(model: Decoder) -> None:
    """Call once the sharded model has its weights: FSDP2 finds their memory, and `part_of` is fixed from then on.

    Where weights are gathered or kept in 16 bits, the gradients of their matrices are fp32 all the same.
    """
    narrow = (torch.bfloat16, torch.float16)
    for group in _groups(model):
        names = [name for name, p in group.named_parameters() if shards.is_shard(p)]
        group.unshard()
        for p in map(group.get_parameter, names):
            never_keep_copy(p)  # it is gathered into the same memory every time, and does not count as changed
            if p.requires_grad and p.dtype in narrow:
                p.grad_dtype = torch.float32
        group.reshard()
    rounded = [p for p in model.parameters() if shards.is_shard(p) and p.requires_grad and p.dtype in narrow]
    if not rounded:
        return
    for p in rounded:
        p.grad_dtype = torch.float32
    model._get_fsdp_state()._lazy_init()  # as the first forward would; no public name says in which dtype sums are kept
    for group in _groups(model):
        if (parameters := group._get_fsdp_state()._fsdp_param_group) is not None:
            parameters._orig_dtype = torch.float32


def _groups(model: nn.Module) -> list:
    return [module for module in model.modules() if hasattr(module, "reshard")]


def part_of(p: nn.Parameter) -> nn.Parameter:
    """The rows of a sharded parameter that are here, as a parameter, always the same one; of any other the parameter itself."""
    if not shards.is_shard(p):
        return p
    if not hasattr(p, "part"):
        mesh, dim = p.device_mesh, p.device_mesh.ndim - 1  # replicas before it have the same rows
        p.part = nn.Parameter(shards.local(p), requires_grad=p.is_floating_point())
        p.part.cut = Cut(p.shape, mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim))
    return p.part


def describe(model: Decoder) -> str:
    """A line about what this rank has of the model."""
    weights = named_weights(model).values()
    here, whole = sum(map(_numel_here, weights)), sum(weight.numel() for weight in weights)
    return f"sharded: this rank keeps {here / 1e6:,.2f} M of {whole / 1e6:,.2f} M parameters"


def _numel_here(weight: nn.Parameter | QuantWeight) -> float:
    if isinstance(weight, QuantWeight):
        return weight.numel() * shards.local(weight.data).numel() / weight.data.numel()
    return shards.local(weight).numel()


# ---- a step -------------------------------------------------------------------------------------------------------


def complete_in_backward(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train and whose gradient, when autograd's hook of it is called, is summed over the ranks: of sharded
    weights FSDP2 calls it after its sum. The gradients of whole vectors are summed after the backward."""
    return [p for p in model.parameters() if p.requires_grad and (shards.is_shard(p) or not is_sharded(model))]


def take_gradient(p: nn.Parameter) -> nn.Parameter:
    """`part_of` the parameter, which has its gradient from now on, if there is one."""
    part = part_of(p)
    if part is not p and p.grad is not None:
        part.grad, p.grad = shards.local(p.grad), None
    return part


@contextlib.contextmanager
def part_with_gradient(p: nn.Parameter) -> Iterator[nn.Parameter]:
    """`take_gradient` for an update inside the backward; after the block nothing needs the gradient.

    Between replicas FSDP2 keeps the sums of every block until the backward ends, each block's in one piece of memory. This frees
    it after the last of its parts, which come in the order in which they lie there.
    """
    part = take_gradient(p)
    grad = part.grad
    yield part
    if part is not p and p.device_mesh.ndim == 2 and grad is not None:
        memory, end = grad.untyped_storage(), grad.storage_offset() + part.cut.numel_each
        if end * grad.itemsize == memory.nbytes():
            if grad.is_cuda:
                grad.record_stream(torch.cuda.current_stream())  # in which it was read; it was allocated in another
            memory.resize_(0)


def parts_with_gradients(model: nn.Module) -> list[nn.Parameter]:
    return [part for p in model.parameters() if (part := part_of(p)).grad is not None]


def sum_gradients(model: nn.Module) -> list[Tensor]:
    """The gradients of the parts that train, summed over the ranks, in the order of the model's parameters."""
    parts = [take_gradient(p) for p in model.parameters()]  # FSDP2 has summed those of cut matrices in the backward
    ranks.sum_gradients([part.grad for part in parts if part.grad is not None and not hasattr(part, "cut")])
    return [part.grad for part in parts if part.grad is not None]


def total_norm(model: nn.Module, norm_of: dict[Tensor, Tensor], device: torch.device) -> Tensor:
    """The norm of the whole gradient, fp32 [] on the device. norm_of: {part: the norm of its gradient, after the sum}."""
    parts = [part for p in model.parameters() if (part := part_of(p)) in norm_of]
    norms = [norm_of[part] for part in parts]
    if not is_sharded(model):
        return torch.nn.utils.get_total_norm(norms)
    share = {norm: share_of(part) for norm, part in zip(norms, parts)}
    sums = []
    for here in by_device(norms):
        shares = torch.tensor([share[norm] for norm in here], dtype=torch.float64, device=here[0].device)
        sums.append((torch.stack(here).double().square() * shares).sum().to(device))
    return ranks.sum_over_ranks(torch.stack(sums).sum()).sqrt().float()


def share_of(part: nn.Parameter) -> float:
    """1 / the number of ranks that have these numbers too, and this one: of a whole parameter all, with replicas several have the
    same rows. What is multiplied by it may be summed over the ranks."""
    return (part.cut.size if hasattr(part, "cut") else 1) / ranks.world_size()


def waiting(model: Decoder) -> contextlib.AbstractContextManager:
    """Around passes: they may wait for the other ranks."""
    return ranks.waiting() if needs_others(model) else contextlib.nullcontext()


# ---- passes without a backward ------------------------------------------------------------------------------------


def reshard(model: nn.Module) -> None:
    """Free all gathered weights."""
    for group in _groups(model) if is_sharded(model) else ():
        group.reshard()


@contextlib.contextmanager
def no_backward(model: Decoder) -> Iterator[None]:
    """torch.no_grad, after which no whole weights are left. All ranks are in it together, and make the same passes."""
    try:
        with waiting(model), torch.no_grad():
            yield
    finally:
        reshard(model)


# ---- whole tensors ------------------------------------------------------------------------------------------------


def on_first_rank(model: Decoder, work: Callable[[], T]) -> T | None:
    """work() on the first rank, which has the result; None on all others. All ranks call it.

    Inside, `model.whole` gives whole tensors: the first rank asks for one, and every rank gives its rows.
    """
    if not is_sharded(model):
        return work() if ranks.rank() == 0 else None
    parameters = dict(model.named_parameters())

    def gather(name: str) -> Tensor:
        with ranks.waiting():
            return shards.whole(parameters[name])

    def ask(name: str) -> Tensor:
        ranks.from_first_rank(name)
        return gather(name)

    if ranks.rank() == 0:
        model.gather = ask
        try:
            return work()
        finally:
            model.gather = None
            ranks.from_first_rank(None)
    while (wanted := ranks.from_first_rank(None)) is not None:
        gather(wanted)
    return None


def items_here(p: nn.Parameter, key: str | None, x: Tensor) -> tuple[int, int] | None:
    """(the first item, the items of the whole tensor) along dim 0 of what this rank has of a parameter, x, or, with a key, of a
    tensor x of its state; None where every rank has all of it."""
    if not (count := _items_each(p, key, x)):
        return None
    total = -(-p.numel() // STATE_BLOCKSIZE) if key in OF_BLOCKS else p.shape[0]
    return min(part_of(p).cut.rank * count, total), total


def _items_each(p: nn.Parameter, key: str | None, x: Tensor) -> int:
    """How many items along dim 0 a rank has of a parameter (key: None) or of a tensor x of its state; 0: all of them."""
    if part_of(p) is p:
        return 0
    if key in OF_BLOCKS:
        return _blocks_each(p)
    return shards.rows_each(p) if x.shape == part_of(p).shape else 0


def _blocks_each(p: nn.Parameter) -> int:
    """Of 8-bit moments; the cut does not run through one."""
    return shards.rows_each(p) * p.shape[1:].numel() // STATE_BLOCKSIZE


def state_here(p: nn.Parameter, key: str, whole: Rows) -> Tensor:
    """What belongs to the rows of this rank of a whole tensor of a parameter's state."""
    if part_of(p) is p:
        return whole[:]
    if key in OF_BLOCKS:
        first = p.part.cut.rank * _blocks_each(p)
        return whole[first : first + _blocks_each(p)]
    return whole[shards.rows_here(p)] if whole.shape == list(p.shape) else whole[:]
