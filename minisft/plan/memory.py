"""Memory of a training step before it is taken, by component, on one rank: formulas of config.json and the configuration.

    weights       4 bytes a number, 2 with weights_dtype = "bf16", 0.516 where a frozen matrix is in NF4
    copies        2 bytes for each number of a matrix that bf16 autocast multiplies with (kernels/copies.py keeps them)
    gradients     4 bytes a trained number; 2 for bf16 weights where nothing adds up. A CPU, and a CUDA graph, keep them all the
                  time; else they grow in the backward pass, while the activations shrink
    moments       8 bytes a trained number with AdamW, 2.03 in 8 bits; optimizers.py has the others
    activations   activations.py, for each token of the largest micro-batch
    loss          a chunk of logits, and the gradients that the loss makes of its hidden states and of the head
    working       what one block's backward allocates beside what it kept; one dequantised matrix; or temporary tensors of the
                  update
    reference     preference tuning of all weights: a copy of the trained numbers
    allocator     a CPU: freed memory that the C library keeps for later
    context       a CPU: Python, PyTorch and what a run imports. A GPU: the CUDA context and the libraries' workspaces

A step has four moments that may be its peak: in the loss, where the backward pass begins, where it ends, and the update.
The answer is the largest, with its components.

With strategy "fsdp2" weights, gradients and moments are divided by the ranks; two blocks, the root (embedding, last norm, head)
and their gradients are whole for a while. Adapters and norms are on every rank. With cpu_offload the rest is in the memory of the
CPU (offload.py).
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from math import ceil, prod

from minisft.config.sections import Config
from minisft.model.lora_options import LoraOptions
from minisft.model.model_config import ModelConfig
from minisft.plan.activations import (
    Precision,
    Site,
    input_of_block,
    kept_by_block,
    kept_outside,
    shared_by_layers,
)
from minisft.plan.shapes import (
    Adapter,
    Shapes,
    adapters_of,
    count,
    is_matrix_of_a_layer,
    layer_of,
    parameter_shapes,
)
from minisft.preference.losses import WITHOUT_REFERENCE
from minisft.prepare.options import ranks_sharing_a_batch
from minisft.units import size

SMALLEST_IN_8_BITS, BLOCK_OF_8_BITS = 4096, 256  # as in optimizers.py and kernels/adamw_formats.py
BYTES_OF_4_BITS, BYTES_OF_DOUBLE = (
    0.5 + 4 / 64,
    0.5 + 1 / 64 + 4 / (64 * 256),
)  # kernels/quantize.py: blocks of 64, then of 256
# Rows of logits, twice as many on a CPU if they take no more than its bytes: kernels/linear_cross_entropy*.py
CPU_CHUNK, CPU_CHUNK_BYTES, GPU_CHUNK, GPU_CHUNK_BYTES = 512, 2**20 * 100, 4096, 1_250_000_000
CPU_CACHE_BYTES = 2**21  # of exponentials and what they are computed from, a thread (with AMX half of it)
# Resident memory of a process that has imported a run and PyTorch's CPU build, measured with PyTorch 2.13 (docs/plan.md).
PYTHON_AND_TORCH = 250e6
COMPILER = 175e6  # PyTorch's, with SymPy and Triton, where torch's checkpointing or DTensor import it
# What the C library (glibc) holds of memory that was freed, on a CPU (docs/plan.md): with it the peaks of 12 runs were met.
# With sharded weights, whose buffers come and go in many sizes and threads, 0.40 and 0.42 GB, measured before heap.py.
ALLOCATOR, ALLOCATOR_SHARDED = 150e6, 400e6
CUDA_CONTEXT = 700e6  # assumed, no GPU was measured: a context of about 0.5 GB, and cuBLAS's workspaces


@dataclass(frozen=True)
class MicroBatch:
    """The largest one of a run."""

    tokens: int
    targets: int


@dataclass(frozen=True)
class Place:
    """Where the run will train."""

    is_gpu: bool
    ranks: int = 1
    shards: int = 1  # ranks that share one copy of the weights: parallel.strategy
    threads: int = 1  # of a CPU
    precision: str = "bf16"  # of the matrix products: "bf16", "fp16" or "fp32"


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the peak of a step, by component, and when that is."""

    moment: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Parameters:
    """What there is and what trains."""

    model: Shapes
    adapters: list[Adapter]
    trained: set[str]  # names of the model's own parameters that train
    token_rows: int = 0

    @property
    def num_adapter(self) -> int:
        return sum(adapter.num_parameters for adapter in self.adapters)

    @property
    def num_trained(self) -> int:
        return self.num_adapter + sum(prod(self.model[name]) for name in self.trained)

    @property
    def first_trained_layer(self) -> int:
        """Layers below keep nothing for a backward pass that never comes."""
        names = [*self.trained, *(adapter.matrices[0] for adapter in self.adapters)]
        if any(name.startswith("embed_") for name in names):
            return 0
        layers = [layer for name in names if (layer := layer_of(name)) is not None]
        return min(layers, default=10**9)


def lora_options(config: Config) -> LoraOptions:
    section = config.lora
    return LoraOptions(
        r=section.r or 1,
        target_modules=section.target_modules,
        layers_to_transform=section.layers_to_transform,
        rank_pattern=section.rank_pattern,
        use_dora=section.use_dora,
        init_lora_weights=section.init_lora_weights,
        lora_dropout=section.lora_dropout,
        modules_to_save=section.modules_to_save,
    )


def parameters_of(config: Config, c: ModelConfig) -> Parameters:
    """As prepare/model.py and parameters.py make and choose them."""
    shapes = parameter_shapes(c)
    if config.lora.r is not None:
        whole = {name for name in shapes if name.partition(".")[0] in config.lora.modules_to_save}
        return Parameters(shapes, adapters_of(c, lora_options(config)), whole)
    chosen, frozen = config.train.trainable, config.train.frozen

    def trains(name: str) -> bool:
        return (not chosen or any(re.search(p, name) for p in chosen)) and not any(re.search(p, name) for p in frozen)

    return Parameters(shapes, [], {name for name in shapes if trains(name)})


def precision_of(config: Config, place: Place) -> Precision:
    if config.train.weights_dtype == "bf16":
        return Precision(2, 2)
    return Precision(4, 4 if place.precision == "fp32" else 2)


def shards_of(config: Config, ranks: int) -> int:
    """How many ranks share one copy of the weights."""
    section = config.parallel
    return {"fsdp2": ranks, "hsdp": max(1, ranks // section.replicas)}.get(section.strategy, 1)


# ---- what stays from step to step ---------------------------------------------------------------------------------


def weight_bytes(config: Config, p: Parameters) -> float:
    """Of the model and its adapters."""
    each, total = (2 if config.train.weights_dtype == "bf16" else 4), 4.0 * p.num_adapter
    times = 2 if lora_options(config).is_pissa else 1  # with the copies of where it started
    quantised = bytes_of_quantised(config)
    for name, shape in p.model.items():
        in_layer = is_matrix_of_a_layer(name, shape)
        total += prod(shape) * (quantised if quantised is not None and in_layer else each)
        if config.lora.r is not None and name in p.trained:
            total += prod(shape) * each  # modules_to_save: the base's values, kept beside
    return total + 4.0 * (times - 1) * p.num_adapter


def bytes_of_quantised(config: Config) -> float | None:
    """Of a number in a quantised matrix; None: none are."""
    if config.model.load_in_8bit:
        return 1.0
    if config.model.load_in_4bit:
        return BYTES_OF_DOUBLE if config.model.bnb_4bit_use_double_quant else BYTES_OF_4_BITS
    return None


def copy_bytes(config: Config, c: ModelConfig, p: Parameters, precision: Precision) -> float:
    """Of the matrices in the dtype of the products, the head's too."""
    if not precision.casts:
        return 0.0
    head = "embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    quantised = bytes_of_quantised(config) is not None
    numbers = sum(prod(s) for name, s in p.model.items() if is_matrix_of_a_layer(name, s) and not quantised)
    return 2.0 * (numbers + prod(p.model[head]) + p.num_adapter)


def gradient_size(config: Config, place: Place) -> int:
    """Bytes of a number of the gradient of a weight (an adapter's has 4)."""
    adds_up = config.train.gradient_accumulation_steps > 1 or place.ranks > 1
    return 2 if config.train.weights_dtype == "bf16" and config.lora.r is None and not adds_up else 4


def moment_bytes(config: Config, p: Parameters) -> float:
    """The state of the optimizer, as optimizers.state_bytes counts it."""
    optim, width = config.train.optim, 2 if config.train.weights_dtype == "bf16" else 4
    momentum = config.train.optim_args.get("momentum", {"muon": 0.95}.get(optim, 0.0))

    def of(name: str, shape: tuple[int, ...], width: int) -> float:
        n = prod(shape)
        if optim == "adamw_8bit" and n >= SMALLEST_IN_8_BITS and not name.startswith("embed_"):
            return 2 * (n + 4 * ceil(n / BLOCK_OF_8_BITS))
        if optim == "adafactor":
            return width * (n if len(shape) < 2 else n // shape[-1] + n // shape[-2])
        if optim == "sgd":
            return width * n if momentum else 0
        if optim == "lion" or optim == "muon" and is_matrix_of_a_layer(name, shape):
            return width * n
        return 8 * n

    total = sum(of(name, p.model[name], width) for name in p.trained)
    for adapter in p.adapters:
        matrices = [(adapter.rank, adapter.num_inputs), *((out, adapter.rank) for out in adapter.num_outputs)]
        total += sum(of("layers.0.adapter", shape, 4) for shape in matrices)
    return total


def update_bytes(config: Config, p: Parameters) -> float:
    """Temporary tensors of the optimizer's step, and the copies that zero updates are counted by."""
    n, width = p.num_trained, 2 if config.train.weights_dtype == "bf16" else 4
    times = {"lion": 1, "muon": 1, "schedule_free_adamw": 2}.get(config.train.optim, 0)
    counted = config.log.zero_update_fraction
    if counted is None:
        counted = config.train.weights_dtype == "bf16" and config.lora.r is None
    return 4.0 * n * times + (width * n if counted else 0)


def gradients_at_once(p: Parameters) -> int:
    """The most numbers of a group that FSDP2 sums at a time: a block, or the root."""
    groups = Counter()
    for name in p.trained:
        groups[layer_of(name)] += prod(p.model[name])
    return max(groups.values(), default=0)


def reference_bytes(config: Config, p: Parameters) -> float:
    """Of preference tuning: a copy of what trains; with new adapters, or cached log-probabilities, none."""
    dpo, width = config.dpo, 2 if config.train.weights_dtype == "bf16" else 4
    if config.trainer_type != "dpo" or dpo.precompute_ref_log_probs or set(dpo.loss_type) <= set(WITHOUT_REFERENCE):
        return 0.0
    if dpo.ref_model_name_or_path is not None:
        return float(width * count(p.model))
    return 0.0 if config.lora.r is not None else float(width * p.num_trained)


# ---- what a micro-batch takes -------------------------------------------------------------------------------------


def sites_of_layers(config: Config, p: Parameters) -> dict[int, list[Site]]:
    options, found = lora_options(config), {}
    for adapter in p.adapters:
        rank = adapter.rank * (2 if options.is_pissa else 1)
        drops, dora = config.lora.lora_dropout > 0, config.lora.use_dora
        for i, (name, num_outputs) in enumerate(zip(adapter.matrices, adapter.num_outputs)):
            module = ".".join(name.split(".")[-3:-1])
            site = Site(module, adapter.num_inputs, num_outputs, rank, drops, dora, options.is_pissa)
            if i > 0 and not options.is_pissa and not (dora and drops):  # one A reads one input for all
                site = replace(site, rank=0, dropout=False)
            found.setdefault(layer_of(name), []).append(site)
    return found


def activation_bytes(
    config: Config, c: ModelConfig, p: Parameters, precision: Precision, is_gpu: bool, sharing: int = 1
) -> tuple[float, float]:
    """Bytes a token: (kept from the forward pass to the backward, of one block while it is computed again or else 0).

    sharing: ranks that share a batch: each keeps the keys and values of all tokens.
    """
    others = precision.product * 2 * c.num_kv_heads * c.head_dim * (sharing - 1)
    section, sites = config.model, sites_of_layers(config, p)
    selective = section.gradient_checkpointing == "selective"
    total = kept_outside(c, precision, is_gpu=is_gpu) + shared_by_layers(c, precision)
    again, quantised = 0.0, bytes_of_quantised(config) is not None
    for layer in range(min(p.first_trained_layer, c.num_layers), c.num_layers):
        options = {"selective": selective, "sites": sites.get(layer), "quantised": quantised}
        kept = kept_by_block(c, layer, precision, is_gpu=is_gpu, **options)
        kept += others
        if section.gradient_checkpointing is True and layer % section.gradient_checkpointing_every == 0:
            again = max(again, kept)
            total += 0 if section.offload_activations and is_gpu else input_of_block(c, precision)
        else:
            total += kept
    return total, again


def working_bytes(c: ModelConfig, precision: Precision) -> float:
    """Bytes a token that one block's backward allocates beside what was kept: the gradients inside the wider of its two halves,
    and of the stream."""
    Q, K = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    inside = max(2 * c.intermediate_size, 4 * Q + 4 * K)
    return precision.product * (inside + c.hidden_size) + precision.stream * c.hidden_size


@dataclass(frozen=True)
class LossBytes:
    kept: float  # from one call to the next
    inside: float  # while it runs, beside the gradient of the head
    after: float  # until the backward pass has read it
    head: float  # the gradient of the head, where it is a new tensor


def loss_bytes(
    c: ModelConfig, batch: MicroBatch, precision: Precision, place: Place, each: int, trains: bool
) -> LossBytes:
    """each: bytes of a number of the head's gradient; trains: whether it has one."""
    (V, D), e, T, M = (c.vocab_size, c.hidden_size), precision.product, batch.tokens, max(1, batch.targets)
    if not place.is_gpu:
        R = ceil(M / ceil(M / (CPU_CHUNK * (2 if 2 * CPU_CHUNK * V * e <= CPU_CHUNK_BYTES else 1))))
        r = min(R, place.threads * max(1, CPU_CACHE_BYTES // (8 * V)))
        kept = R * V * e + 2 * r * V * 4
        in_place = precision.stream == 4  # it is added to the gradient that is there
        inside = 4 * T * D + R * D * (2 * e + 4) + (0 if in_place or not trains else 4 * V * D)
        inside += min(2048, V) * D * e if e == 2 and trains else 0  # a block of rows of the product
        return LossBytes(kept, inside, T * D * e, 0.0)
    width = ceil(V / 64) * 64
    all_rows, spared = ceil(T / 128) * 128, 4 * V * D if trains and precision.stream != 4 else 0
    R = min(max(GPU_CHUNK, int(GPU_CHUNK_BYTES // (width * e)) // 128 * 128), all_rows)
    R = all_rows if all_rows * width * e <= GPU_CHUNK_BYTES + spared else R
    wide = 4 if M > R or precision.stream == 4 else 2
    inside = R * width * e + (M + T) * D * e + (V * D * (wide - each) if trains and wide > each else 0)
    return LossBytes(0.0, inside, T * D * e, V * D * each if trains else 0.0)


# ---- the peak -----------------------------------------------------------------------------------------------------


def predict(config: Config, c: ModelConfig, batch: MicroBatch, place: Place) -> Memory:
    """The peak of a step with this micro-batch."""
    p, precision = parameters_of(config, c), precision_of(config, place)
    sharing = ranks_sharing_a_batch(config, place.ranks)
    batch = MicroBatch(ceil(batch.tokens / sharing), ceil(batch.targets / sharing))
    train, T, in_backward = config.train, batch.tokens, config.train.optimizer_in_backward
    is_full = config.lora.r is None
    head = "embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    width = gradient_size(config, place)
    loss = loss_bytes(c, batch, precision, place, width, head in p.trained)
    gradients = 4.0 * p.num_adapter + width * (p.num_trained - p.num_adapter)
    is_whole_cpu, is_graph = not place.is_gpu and place.shards == 1, place.is_gpu and _may_be_graphs(config, c)
    keeps_gradients = not in_backward and (
        is_whole_cpu or train.gradient_accumulation_steps > 1 or is_graph and place.shards == 1
    )
    embedding = 0.0  # its gradient: rows that are added to that of the head in place, or a new tensor
    if place.is_gpu and "embed_tokens.weight" in p.trained and (c.tie_word_embeddings or keeps_gradients):
        adds_rows = precision.stream == 4 and not in_backward
        embedding = 4.0 * T * c.hidden_size if adds_rows else float(width * prod(p.model["embed_tokens.weight"]))

    weights, moments, of_update = weight_bytes(config, p), moment_bytes(config, p), update_bytes(config, p)
    copies, gathered = copy_bytes(config, c, p, precision), 0.0
    largest = width * max((prod(p.model[name]) for name in p.trained), default=0)
    if in_backward and place.shards == 1:
        gradients = float(largest)
    if place.shards > 1:
        frozen = weights - 4.0 * p.num_adapter
        weights = frozen / place.shards + 4.0 * p.num_adapter
        offloads = config.parallel.cpu_offload and place.is_gpu  # plan/offload.py has what is in the memory of the CPU
        vectors = sum(prod(shape) for shape in p.model.values() if len(shape) == 1)
        if is_full:
            moments, of_update = moments / place.shards, 0.0 if offloads else of_update / place.shards
            keeps_all = config.parallel.strategy == "hsdp" if offloads else not in_backward
            at_once = gradients_at_once(p) / place.shards + vectors  # vectors are summed after the backward
            gradients = gradients / place.shards if keeps_all else width * at_once
        blocks = [sum(prod(s) for n, s in p.model.items() if layer_of(n) == i) for i in range(c.num_layers)]
        in_root = sum(prod(s) for n, s in p.model.items() if layer_of(n) is None)
        whole_blocks = 2.0 * max(blocks) if config.parallel.reshard_after_forward else float(sum(blocks))
        gathered = (bytes_of_quantised(config) or precision.product) * whole_blocks + precision.stream * in_root
        if is_full:  # the gradient of a block, as it is and as it is summed
            gathered += (precision.product + 4.0) * max(blocks)
            loss = replace(loss, head=4.0 * prod(p.model[head]) if head in p.trained else 0.0)
            embedding = 4.0 * in_root
        copies = 2.0 * prod(p.model[head]) if precision.casts else 0.0
        if offloads:
            weights = 4.0 * p.num_adapter + precision.stream * vectors
            moments = 8.0 * vectors if is_full else moments
    saved = (weights if is_full else 4.0 * p.num_adapter) + moments  # the copies of a save in the background
    if train.offload_optimizer and place.is_gpu:
        moments = 0.0

    kept, again = activation_bytes(config, c, p, precision, place.is_gpu, sharing)
    working = T * working_bytes(c, precision)
    if bytes_of_quantised(config) is not None:
        matrices = [prod(s) for name, s in p.model.items() if is_matrix_of_a_layer(name, s)]
        working += precision.product * max(matrices)
    of_one_block = T * max(again, (kept - kept_outside(c, precision, is_gpu=place.is_gpu)) / c.num_layers)
    batch_bytes = 40.0 * T + 60.0 * batch.targets

    imports_compiler = config.model.gradient_checkpointing is True or place.shards > 1
    always = {
        "weights": weights,
        "copies": copies,
        "moments": moments,
        "reference": reference_bytes(config, p),
        "gathered": gathered,
        "save": saved if config.checkpoint.save_async and not place.is_gpu else 0.0,
        "context": CUDA_CONTEXT if place.is_gpu else PYTHON_AND_TORCH + (COMPILER if imports_compiler else 0.0),
    }
    whole, none = (gradients if keeps_gradients else 0.0), 0.0
    activations = T * kept + batch_bytes
    moments_of_a_step = {
        "in the loss": (whole + loss.head, activations, loss.kept + loss.inside, none),
        "where the backward pass begins": (
            whole + loss.head,
            activations + T * again,
            loss.kept + loss.after,
            working,
        ),
        "at the end of the backward pass": (gradients + embedding, of_one_block + batch_bytes, loss.kept, working),
        "in the update": (gradients, batch_bytes, loss.kept, of_update),
    }
    found = []
    for moment, parts in moments_of_a_step.items():
        named = dict(zip(("gradients", "activations", "loss", "working"), parts))
        order = ("weights", "copies", "gradients", "moments", "activations", "loss", "working")
        both = always | named
        if not place.is_gpu:  # at most a half of what comes and goes, or all of it
            moved = parts[1] + parts[2] + parts[3]
            alone = min(ALLOCATOR, 0.5 * moved)
            both["allocator"] = alone if place.shards == 1 else min(ALLOCATOR_SHARDED, moved + gathered)
        names = [*order, *(name for name in both if name not in order)]
        found.append(Memory(moment, {name: float(both[name]) for name in names if both[name] >= 1}))
    return max(found, key=lambda memory: memory.total)


def _may_be_graphs(config: Config, c: ModelConfig) -> bool:
    """Whether micro-batches may be CUDA graphs, which keep the gradients; prepare/kernels.py decides it."""
    train = config.train
    has_dropout = c.attention_dropout or c.attention_output_dropout or c.mlp_output_dropout or c.embedding_dropout
    others = has_dropout or config.lora.lora_dropout or train.neftune_noise_alpha or train.unfreeze
    is_other = config.trainer_type != "sft" or train.optim == "schedule_free_adamw"
    return train.cuda_graph is not False and not (
        others or is_other or config.model.gradient_checkpointing is True or train.optimizer_in_backward
    )


def describe(memory: Memory) -> str:
    """One line."""
    parts = ", ".join(f"{name} {size(value)}" for name, value in memory.parts.items())
    return f"{size(memory.total)} by formula, {memory.moment}: {parts}"
