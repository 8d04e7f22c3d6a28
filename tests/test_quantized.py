"""Quantised layers, streaming into them, and the files of bitsandbytes in both directions."""

import ctypes
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import start
from tiny_models import CONFIGS, stream, tiny
from torch import nn

from benchmarks.harness import extra_memory
from minisft.config.sections import KEYS
from minisft.config.values import choices
from minisft.errors import UserError
from minisft.kernels.quantize import TABLES, dequantize_fp4, quantize_fp4, quantize_int8, quantize_nf4
from minisft.model.families import from_hf
from minisft.model.load import build_model, load_model, read_config
from minisft.model.lora import adapter_sites
from minisft.model.quantized import (
    DEQUANTIZE,
    QUANTIZE,
    Quantization,
    QuantLinear,
    QuantWeight,
    describe_quantized,
    named_weights,
    quant_weights,
)
from minisft.model.save import save_model

KINDS = [
    Quantization("nf4", True),
    Quantization("nf4", False),
    Quantization("fp4", True),
    Quantization("fp4", False),
    Quantization("int8"),
]
NESTED, INT8 = KINDS[0], KINDS[4]
# Plain, heads with norms, stacked, stacked head by head, stacked and transposed; whole blocks of 64 in every row.
FAMILIES = {
    family: CONFIGS[family] | {"hidden_size": 64, "intermediate_size": 128, "n_embd": 64}
    for family in ("llama", "gemma3_text", "phi3", "gpt_neox", "gpt2")
}
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
each_family = pytest.mark.parametrize("family", FAMILIES)


def test_the_types_are_the_same_everywhere():
    """The kernels have a table for each 4-bit type, the layers its functions, and the configuration its name."""
    assert choices(KEYS["model.bnb_4bit_quant_type"].type) == tuple(TABLES) == tuple(QUANTIZE)
    assert tuple(DEQUANTIZE) == (*QUANTIZE, "int8")


def quantized(values: torch.Tensor, kind: Quantization):
    if kind.quant_type == "int8":
        return quantize_int8(values)
    return {"nf4": quantize_nf4, "fp4": quantize_fp4}[kind.quant_type](values, 64, kind.double_quant)


def layer(kind: Quantization, out_features=33, in_features=70, bias=True) -> QuantLinear:
    base = nn.Linear(in_features, out_features, bias)
    made = QuantLinear(base, kind)
    made.weight.fill(base.weight.detach())
    return made


def forward(model):
    input_ids = torch.randint(53, (20,), generator=torch.Generator().manual_seed(1))
    return model.logits(model(input_ids, *stream([7, 1, 12])))


# ---- the layer ----------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_a_linear_layer_with_the_dequantised_weight(kind, dtype):
    ours = layer(kind)
    weight = ours.weight.dequantize(dtype)
    x = torch.randn(9, 70, dtype=dtype, requires_grad=True)
    dy = torch.randn(9, 33, dtype=dtype)
    y, expected = ours(x), F.linear(x, weight, ours.bias.to(dtype))
    assert torch.equal(y, expected)
    parameters = x, ours.bias
    for got, wanted in zip(torch.autograd.grad(y, parameters, dy), torch.autograd.grad(expected, parameters, dy)):
        assert torch.equal(got, wanted)


@each_kind
def test_under_autocast_it_multiplies_in_autocast_s_dtype(kind):
    ours, plain = layer(kind), nn.Linear(70, 33)
    with torch.no_grad():
        plain.weight.copy_(ours.weight.dequantize(torch.float32))
        plain.bias.copy_(ours.bias)
    one, other = torch.randn(9, 70, requires_grad=True), None
    other = one.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(one), plain(other)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(one.grad, other.grad) and torch.equal(ours.bias.grad, plain.bias.grad)


@each_kind
def test_nothing_of_its_size_is_kept_for_the_backward(kind):
    ours, kept = layer(kind, 300, 200), []
    x = torch.randn(2, 200, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(x)
    assert not any(t.numel() >= 300 * 200 // 2 for t in kept)
    assert not any(torch.is_tensor(value) and value.numel() > 600 for value in vars(y.grad_fn).values())


@each_kind
def test_it_is_moved_but_never_cast(kind):
    ours = layer(kind)
    before = [buffer.clone() for buffer in ours.weight.buffers()]
    ours.to(torch.bfloat16).half().float()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, ours.weight.buffers()))
    assert {name for name, _ in ours.named_parameters()} == {"bias"}


@pytest.mark.parametrize("kind, low, high", [(NESTED, 0.5158, 0.517), (KINDS[1], 0.562, 0.563), (INT8, 1.0, 1.005)])
def test_bytes_of_a_parameter(kind, low, high):
    weight = layer(kind, 1024, 1024, bias=False).weight
    assert low <= weight.nbytes / weight.numel() <= high


# ---- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.covers(1)
@each_kind
@each_family
def test_layers_are_quantised_as_they_are_read(family, kind, tmp_path):
    model = tiny(FAMILIES[family])
    save_model(model, tmp_path, dtype=torch.bfloat16)
    plain, loaded = load_model(tmp_path), load_model(tmp_path, quantization=kind)
    weights = quant_weights(loaded)
    sites = {name for stored in adapter_sites(plain).values() for name in stored.names}
    assert weights.keys() == sites and sites
    for name, parameter in plain.named_parameters():
        if name not in weights:
            assert torch.equal(parameter, loaded.get_parameter(name)), name
            continue
        expected = layer(kind, *parameter.shape, bias=False).weight
        expected.set(quantized(parameter.detach().bfloat16(), kind))
        for buffer, values in expected.named_buffers():
            assert torch.equal(weights[name].get_buffer(buffer), values), name
        assert weights[name].quantization == kind and weights[name].dtype == torch.bfloat16
    assert f"{sum(w.numel() for w in weights.values()) / 1e6:,.1f} M parameters" in describe_quantized(loaded)
    assert torch.isfinite(forward(loaded)).all()


def test_a_value_that_is_not_finite_is_told(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    save_model(model, tmp_path)
    for kind in KINDS:
        with pytest.raises(UserError, match=r"NaN or infinite values as torch.float32 in model.layers.1.mlp.up_proj"):
            load_model(tmp_path, quantization=kind)


def measure_loading(folder: str) -> None:
    """Writes how far memory rose while the model was loaded, what it takes, and its largest matrix in fp32, in MiB."""
    torch.set_num_threads(1)
    # M_MMAP_THRESHOLD: what is freed goes back at once, so that what is in use is measured and not the heap's holes
    ctypes.CDLL(None).mallopt(-3, 2**16)
    build_model(read_config(folder)), quantize_nf4(torch.randn(64))  # what torch imports only now
    model, extra = extra_memory(lambda: load_model(folder, quantization=NESTED))
    weights = named_weights(model).values()
    size, largest = sum(w.nbytes for w in weights), 4 * max(w.numel() for w in weights)
    Path(folder, "measured").write_text(json.dumps([extra, size / 2**20, largest / 2**20]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_full_model_never_stands_in_memory(tmp_path):
    """21 million parameters in matrices: 85 MB in fp32, 42 MB in the file."""
    config = from_hf(CONFIGS["llama"] | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 3})
    model = build_model(config, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    process = start(measure_loading, str(tmp_path))
    process.join(60)
    extra, size, largest = json.loads((tmp_path / "measured").read_text())
    assert size < 12
    # A matrix in fp32, divided by its scales, and its indices, in 4 bytes and in 1
    assert extra < size + 5 * largest + 2


# ---- the files of bitsandbytes ------------------------------------------------------------------------------------


def bnb():
    return pytest.importorskip("bitsandbytes").functional


def theirs(name: str, weight: torch.Tensor, kind: Quantization) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(what bitsandbytes saves for a weight, what it dequantises that to, in fp32)"""
    if kind.quant_type == "int8":
        values, scales, _ = bnb().int8_vectorwise_quant(weight.half())
        form, module = torch.tensor(0, dtype=torch.uint8), name.removesuffix(".weight")
        tensors = {name: values, f"{module}.SCB": scales, f"{module}.weight_format": form}
        return tensors, bnb().int8_vectorwise_dequant(values, scales)
    options = dict(quant_type=kind.quant_type, compress_statistics=kind.double_quant)
    packed, state = bnb().quantize_4bit(weight, **options)
    tensors = {name: packed} | {f"{name}.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}
    state.dtype = torch.float32
    return tensors, bnb().dequantize_4bit(packed, state)


def as_near(ours: torch.Tensor, others: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether two FP4 packings are equally good. There are two zeros and there are ties; how they are handled differs
    between their kernels for CUDA, which are ours, and those for the CPU."""
    q, weight = quantize_fp4(weight, 64, double_quant=False), weight.float()
    one, other = ((dequantize_fp4(replace(q, packed=p), torch.float32) - weight).abs() for p in (ours, others))
    return torch.allclose(one, other, rtol=0, atol=1e-6)  # fp32 of numbers of magnitude 1


def nearer(ours: torch.Tensor, others: torch.Tensor, weight: torch.Tensor, tensors: dict, name: str) -> bool:
    """Whether a scale differs only where ours is nearer: on a CPU theirs is found through a coarser table, which one in
    a thousand times takes the neighbour of the nearest."""
    absmax = torch.stack([block.abs().max() for block in weight.float().flatten().split(64)])
    nested = tensors[f"{name}.nested_absmax"].repeat_interleave(256)[: len(absmax)]
    table, scaled = tensors[f"{name}.nested_quant_map"], (absmax - absmax.mean()) * (1 / nested)
    differs = ours != others
    distances = [(scaled - table[index.int()]).abs()[differs] for index in (ours, others)]
    return differs.float().mean() <= 0.1 and (distances[0] <= distances[1]).all().item()


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_our_files_are_theirs_byte_by_byte(kind, dtype, tmp_path):
    """Every plain family, with hidden size 32, so that blocks cross rows."""
    save_model(tiny("llama"), tmp_path / "plain", dtype=torch.float16)  # the same numbers in all three dtypes
    tensors = {name: t.to(dtype) for name, t in load_file(tmp_path / "plain" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    save_model(load_model(tmp_path / "plain", quantization=kind), tmp_path / "ours", dtype=dtype)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    for name, tensor in tensors.items():
        expected = theirs(name, tensor, kind)[0] if name.endswith("_proj.weight") else {name: tensor}
        for part, wanted in expected.items():
            got = ours.pop(part)
            assert got.dtype == wanted.dtype and got.shape == wanted.shape, part
            if part == f"{name}.absmax" and kind.double_quant:
                assert nearer(got, wanted, tensor, expected, name), part
                continue
            if kind.quant_type == "fp4" and part == name and wanted.dtype == torch.uint8:
                assert as_near(got, wanted, tensor), part
                continue
            assert torch.equal(got, wanted), part
    assert not ours


@each_kind
def test_bitsandbytes_reads_ours(kind, tmp_path):
    """Rows of whole blocks: on a CPU it reads no others right."""
    save_model(tiny(FAMILIES["llama"]), tmp_path / "plain", dtype=torch.bfloat16)
    model = load_model(tmp_path / "plain", quantization=kind)
    save_model(model, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    for name, weight in quant_weights(model).items():
        if kind.quant_type == "int8":
            theirs = bnb().int8_vectorwise_dequant(
                tensors[f"model.{name}"], tensors[f"model.{name}".replace("weight", "SCB")]
            )
        else:
            parts = {k: v for k, v in tensors.items() if k.startswith(f"model.{name}.")}
            state = bnb().QuantState.from_dict(parts, torch.device("cpu"))
            theirs = bnb().dequantize_4bit(tensors[f"model.{name}"], state)
        assert torch.equal(theirs, weight.dequantize(theirs.dtype)), name


@pytest.mark.covers(1)
@each_kind
@each_family
def test_we_read_theirs(family, kind, tmp_path):
    """A folder as transformers writes it: what the family stacks is quantised as one matrix, and never transposed."""
    model = tiny(FAMILIES[family])
    save_model(model, tmp_path, dtype=torch.float16)
    tensors, sites = load_file(tmp_path / "model.safetensors"), adapter_sites(model)
    expected = {}
    for site, stored in sites.items():
        weight = tensors.pop(f"{site}.weight")
        weight = (weight.t() if stored.transposed else weight).contiguous()
        parts, values = theirs(f"{site}.weight", weight, kind)
        tensors |= parts
        rows = [len(model.get_parameter(name)) for name in stored.names]
        expected |= dict(zip(stored.names, replace(stored, transposed=False).split(values, rows)))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": kind.to_config()}))

    loaded = load_model(tmp_path)
    weights = quant_weights(loaded)
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(weights[name].dequantize(torch.float32), values), name
    # and written again: once as it was read, from then on byte by byte
    for folder in ("once", "twice"):
        save_model(loaded, tmp_path / folder)
        again = load_model(tmp_path / folder)
        assert torch.equal(forward(again), forward(loaded))
        loaded = again
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("once", "twice")]
    assert files[0] == files[1]


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("kind", [NESTED, INT8], ids=str)
def test_transformers_reads_ours(family, kind, tmp_path):
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    save_model(tiny(FAMILIES[family]), tmp_path / "plain")
    ours = load_model(tmp_path / "plain", quantization=kind)
    save_model(ours, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", pad_token_id=0, dtype=torch.float32
    )
    weights = {
        name: m.weight for name, m in theirs.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")
    }
    sites = adapter_sites(ours)
    assert weights.keys() == sites.keys()
    for site, stored in sites.items():
        values = replace(stored, transposed=False).join(
            [quant_weights(ours)[name].dequantize() for name in stored.names]
        )
        if kind == INT8:
            assert torch.equal(bnb().int8_vectorwise_dequant(weights[site].data, weights[site].SCB), values)
        else:
            assert torch.equal(bnb().dequantize_4bit(weights[site].data, weights[site].quant_state), values)


def test_layers_that_were_left_out_stay_plain(tmp_path):
    """Some folders keep a few layers in 16 bits."""
    save_model(tiny("llama"), tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = {name: tensors.pop(name)} | {
        k: v
        for other, t in tensors.items()
        for k, v in (theirs(other, t, NESTED)[0] if "_proj" in other else {other: t}).items()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_model(tmp_path, quantization=NESTED)
    assert isinstance(model.layers[1].mlp.down_proj, nn.Linear) and len(quant_weights(model)) == 13
    save_model(model, tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert kept == ["lm_head", "model.layers.1.mlp.down_proj"]


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tensors and config.json of a quantised folder of either width."""
    made, home = {}, tmp_path_factory.mktemp("quantised")
    save_model(tiny("llama"), home / "plain", dtype=torch.bfloat16)
    for kind in (NESTED, KINDS[3], INT8):
        save_model(load_model(home / "plain", quantization=kind), home / kind.quant_type)
        made[kind.quant_type] = load_file(home / kind.quant_type / "model.safetensors"), home / kind.quant_type
    return made


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "kind, part, change, message",
    [
        ("nf4", ".weight.absmax", None, "absmax is missing"),
        ("nf4", ".weight.absmax", lambda t: t[:-1], r"absmax is torch.uint8 \[15\], expected torch.uint8 \[16\]"),
        ("nf4", ".weight.nested_absmax", None, "absmax is torch.uint8"),
        ("nf4", ".weight.nested_quant_map", lambda t: t * 2, "not the dynamic table"),
        ("nf4", ".weight.quant_map", lambda t: t.flip(0), "not the table of nf4"),
        ("nf4", ".weight.nested_absmax", lambda t: t * float("nan"), "NaN or infinite"),
        ("nf4", ".weight.quant_state.bitsandbytes__nf4", None, "its parts are absmax, nested_absmax"),
        ("nf4", ".weight.quant_state.bitsandbytes__nf4", lambda t: t[:-3], "quant_state is damaged"),
        ("nf4", ".weight", lambda t: t[:-1], r"weight is torch.uint8 \[511, 1\]"),
        ("nf4", ".weight", None, "1 missing"),
        ("fp4", ".weight.absmax", lambda t: t.half(), "absmax is torch.float16"),
        ("int8", ".SCB", lambda t: t[:-1], "SCB is torch.float32"),
        ("int8", ".SCB", None, "its parts are weight_format"),
        ("int8", ".weight", lambda t: t.t().contiguous()[:-1], "weight is torch.int8"),
        ("int8", ".weight_format", lambda t: t + 1, "weight_format is not 0"),
    ],
)
def test_damaged_parts_are_told(folders, tmp_path, kind, part, change, message):
    tensors, home = dict(folders[kind][0]), folders[kind][1]
    tensor = tensors.pop(Q + part)
    if change is not None:
        tensors[Q + part] = change(tensor).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((home / "config.json").read_text())
    with pytest.raises(UserError, match=message) as mistake:
        load_model(tmp_path)
    assert mistake.value.exit_code == 66


@pytest.mark.parametrize(
    "change", [{"blocksize": 63}, {"shape": [32, 33]}, {"quant_type": "fp4"}, {"nested_blocksize": 64}, {"dtype": "x"}]
)
def test_a_state_of_another_matrix_is_refused(folders, tmp_path, change):
    tensors, home = dict(folders["nf4"][0]), folders["nf4"][1]
    name = Q + ".weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist())) | change
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((home / "config.json").read_text())
    with pytest.raises(UserError, match="quant_state is"):
        load_model(tmp_path)


def test_bytes_may_be_stored_as_another_dtype(folders, tmp_path):
    tensors, home = dict(folders["nf4"][0]), folders["nf4"][1]
    tensors[Q + ".weight"] = tensors[Q + ".weight"].flatten().view(torch.bfloat16)[:, None]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((home / "config.json").read_text())
    assert torch.equal(forward(load_model(tmp_path)), forward(load_model(home)))


def test_another_kind_than_the_stored_one_is_refused(folders):
    with pytest.raises(UserError, match="quantised already, as nf4; int8 is requested") as mistake:
        load_model(folders["nf4"][1], quantization=INT8)
    assert "leave load_in_4bit" in mistake.value.hint


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", None, 4])
def test_other_methods_are_refused_by_name(folders, tmp_path, method):
    config = json.loads((folders["nf4"][1] / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantization_config = .*" + str(method)) as mistake:
        load_model(tmp_path)
    assert "bitsandbytes" in mistake.value.hint


def test_blocks_that_cross_rows_cannot_be_stacked(tmp_path):
    save_model(tiny("phi3"), tmp_path / "plain")
    model = load_model(tmp_path / "plain", quantization=NESTED)
    with pytest.raises(UserError, match="cannot be written in 4 bits: 32 columns are not whole blocks of 64"):
        save_model(model, tmp_path / "ours")


def test_shards_hold_what_they_say(folders, tmp_path):
    model = load_model(folders["nf4"][1])
    save_model(model, tmp_path, max_shard_bytes=9000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["weight_map"].keys() == folders["nf4"][0].keys()
    assert torch.equal(forward(load_model(tmp_path)), forward(model))
    assert all(isinstance(weight, QuantWeight) for weight in quant_weights(model).values())
