"""Adapters: the base untouched, PEFT's files in both directions, merging."""

import json
import os

import pytest
import torch
from tiny_models import CONFIGS, stream, tiny
from tolerance import relative_error

from minisft.errors import UserError
from minisft.model.adapter_files import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from minisft.model.load import build_model, give_memory, load_model, load_weights, place_quantized, read_config
from minisft.model.lora import (
    LoraLinear,
    adapter_disabled,
    adapter_sites,
    adapters,
    apply_lora,
    merge_adapter,
    place_adapters,
    start_adapters,
)
from minisft.model.lora_options import ALL_LINEAR, LoraOptions, is_target
from minisft.model.quantized import Quantization
from minisft.model.save import save_model
from minisft.model.start import find_start, load_adapted
from minisft.plan.shapes import adapters_of

# Plain, windows with norms of heads, stacked, stacked head by head, stacked and transposed.
FAMILIES = ("llama", "gemma3_text", "phi3", "gpt_neox", "gpt2")
WITH_HYBRIDS = (*FAMILIES, "qwen3_5_text", "olmo_hybrid", "lfm2")
KINDS = {"lora": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True)}
LENGTHS = [7, 1, 12]


def forward(model):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(53, (sum(LENGTHS),), generator=generator)
    return model.logits(model(input_ids, *stream(LENGTHS)))


def randomise(model, seed=3):
    """Changes the adapter as training would: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def adapted(family="llama", **options):
    model = tiny(family).eval()
    apply_lora(model, LoraOptions(**({"r": 4, "lora_alpha": 6.0} | options)), seed=5)
    return model


@pytest.mark.covers(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_an_untrained_adapter_changes_nothing(family, kind):
    base, model = tiny(family).eval(), adapted(family, **KINDS[kind])
    # DoRA divides by the norm that it multiplies by: rounded, not exact
    assert relative_error(forward(model), forward(base)) <= (1e-6 if kind == "dora" else 0)


@pytest.mark.covers(1)
@pytest.mark.parametrize("quantization", [None, Quantization("nf4", True), Quantization("int8")], ids=str)
@pytest.mark.parametrize("family", WITH_HYBRIDS)
def test_adapters_that_are_placed_before_the_weights_are_read_are_the_same(family, quantization, tmp_path):
    """Bit for bit; and a parameter of several layers stays one, though each module gets memory of its own."""
    save_model(tiny(family), tmp_path)
    options = LoraOptions(
        r=4, use_dora=True, init_lora_weights="pissa", trainable_token_indices={"embed_tokens": (3, 5)}
    )
    expected = load_model(tmp_path, quantization=quantization)
    apply_lora(expected, options, seed=5)
    model = build_model(read_config(tmp_path))
    place_quantized(model, tmp_path, quantization)
    place_adapters(model, options)
    load_weights(give_memory(model, "cpu"), tmp_path)
    start_adapters(model, seed=5)
    named, wanted = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (model, expected))
    assert [*named] == [*wanted] and all(torch.equal(named[name], wanted[name]) for name in wanted)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_trains_and_the_base_stays_as_it_is(family):
    base, model = tiny(family).eval(), adapted(family)
    randomise(model)
    forward(model).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in base.named_parameters())
    assert not torch.allclose(forward(model), forward(base))
    with adapter_disabled(model):
        assert torch.equal(forward(model), forward(base))
    assert not torch.allclose(forward(model), forward(base))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", WITH_HYBRIDS)
def test_merged_equals_unmerged(family, kind):
    model = adapted(family, **KINDS[kind])
    randomise(model)
    with torch.no_grad():
        unmerged, merged = forward(model), forward(merge_adapter(model))
    assert relative_error(merged, unmerged) <= 1e-5  # the product W + s B A is rounded once more
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in tiny(family).named_parameters()}


@pytest.mark.covers(1)
@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", WITH_HYBRIDS)
def test_peft_reads_ours(family, kind, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = adapted(family, **KINDS[kind])
    save_model(model_without_adapter(family), tmp_path / "base")
    randomise(model)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager", pad_token_id=0
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert relative_error(theirs_of(theirs), forward(model)) <= 1e-5  # attention sums in another order


@pytest.mark.covers(1)
@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", WITH_HYBRIDS)
def test_ours_reads_peft(family, kind, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = model_without_adapter(family)
    save_model(base, tmp_path / "base")
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager", pad_token_id=0
    )
    patterns = dict(rank_pattern={r".*\.1\..*": 2}, alpha_pattern={r"layers\.0.*": 3.0})
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **patterns, **KINDS[kind]
    )
    theirs = peft.get_peft_model(hf, config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(base, tmp_path / "adapter")
    assert relative_error(forward(ours), theirs_of(theirs)) <= 1e-5
    save_adapter(ours, tmp_path / "again", base=str(tmp_path / "base"))
    assert (tmp_path / "again" / WEIGHTS_FILE).stat().st_size == (tmp_path / "adapter" / WEIGHTS_FILE).stat().st_size


def model_without_adapter(family):
    return tiny(family).eval()


def theirs_of(model):
    """The logits of a transformers model, document by document."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(53, (sum(LENGTHS),), generator=generator)
    with torch.no_grad():
        return torch.cat([model(document[None]).logits[0] for document in input_ids.split(LENGTHS)])


def test_modules_to_save_train_whole_and_come_back(tmp_path):
    options = dict(target_modules=("q_proj", "v_proj"), modules_to_save=("embed_tokens", "lm_head"))
    base, model = tiny("llama").eval(), adapted(**options)
    randomise(model)
    assert model.embed_tokens.weight.requires_grad and model.lm_head.weight.requires_grad
    with adapter_disabled(model):
        assert torch.equal(forward(model), forward(base))
    save_adapter(model, tmp_path)
    again = load_adapter(tiny("llama").eval(), tmp_path)
    assert torch.equal(forward(again), forward(model))
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["modules_to_save"] == ["embed_tokens", "lm_head"]


def test_targets_ranks_and_layers():
    model = adapted(
        target_modules=("q_proj", "mlp.up_proj"),
        layers_to_transform=(1,),
        rank_pattern={"up_proj": 2},
        r=8,
        lora_alpha=4.0,
    )
    found = {n: (len(m.lora_A), m.scale) for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert found == {"layers.1.self_attn.q_proj": (8, 0.5), "layers.1.mlp.up_proj": (2, 2.0)}
    by_expression = adapted(target_modules=r"model\.layers\.0\..*(k|v)_proj")
    names = [n for n, m in by_expression.named_modules() if isinstance(m, LoraLinear)]
    assert names == ["layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_layers_mean_the_same_whether_modules_are_named_or_all(family):
    """In the model, in the plan, and in what PEFT reads."""
    model = tiny(family)
    every = tuple({site.rpartition(".")[2] for site in adapter_sites(model)})
    for layers in (None, (0,), (1,)):
        both = [LoraOptions(r=4, target_modules=targets, layers_to_transform=layers) for targets in (every, ALL_LINEAR)]
        named, everywhere = ([site for site in adapter_sites(model) if is_target(site, options)] for options in both)
        assert named == everywhere and len(named) * (1 if layers is None else 2) == len(adapter_sites(model))
        assert adapters_of(model.config, both[0]) == adapters_of(model.config, both[1])


def test_the_plan_refuses_the_names_that_the_run_refuses():
    model = tiny("llama")
    for targets in (("q_proj", "c_attn"), "q_proj", "q_proj,v_proj"):
        options = LoraOptions(r=4, target_modules=targets)
        with pytest.raises(UserError) as of_plan:
            adapters_of(model.config, options)
        with pytest.raises(UserError) as of_run:
            place_adapters(model, options)
        assert str(of_plan.value) == str(of_run.value)
        assert ('names are a list, as in ["' in of_run.value.hint) == isinstance(targets, str)


def test_the_parts_of_a_stack_share_what_reads_the_input():
    attention = adapted("phi3").layers[0].self_attn
    assert attention.q_proj.lora_A is attention.k_proj.lora_A is attention.v_proj.lora_A
    assert adapted("llama").layers[0].self_attn.q_proj.lora_A is not adapted("llama").layers[0].self_attn.k_proj.lora_A


def test_dropout_only_reaches_the_adapter():
    model = adapted(lora_dropout=0.5)
    randomise(model)
    model.train()
    assert not torch.equal(forward(model), forward(model))
    with adapter_disabled(model):
        assert torch.equal(forward(model), forward(model))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(target_modules=("q_proj", "c_attn")), "no linear layer is named c_attn"),
        (dict(target_modules="nothing"), "no linear layer is named nothing"),
        (dict(target_modules=("q_proj",), layers_to_transform=(7,)), r"named .*q_proj.* in layers \[7\]"),
        (dict(modules_to_save=("wte",)), "no module is named wte"),
        (dict(init_lora_weights="zeros"), "init_lora_weights = 'zeros'"),
    ],
)
def test_names_that_fit_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message) as mistake:
        adapted(**options)
    assert mistake.value.hint


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"r": None}, "TypeError"),
        ({"r": 3}, "not the tensors that this model's adapter has"),
        ({"r": 10**30}, "r = 1000000000000000000000000000000 is out of range"),
        ({"r": "4"}, "r = 4 is out of range or of another kind"),
        ({"lora_alpha": [1]}, "lora_alpha"),
        ({"lora_dropout": 2}, "lora_dropout"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"(": 1}}, "error: missing"),
        ({"alpha_pattern": {"q_proj": [[]]}}, "alpha_pattern"),
        ({"target_modules": [7]}, "target_modules"),
        ({"target_modules": "(("}, "error: missing"),
        ({"target_modules": "a{99999999999}"}, "OverflowError"),
        ({"layers_to_transform": [10**30]}, "layers_to_transform"),
        ({"modules_to_save": [None]}, "modules_to_save"),
        ({"trainable_token_indices": 1}, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed_tokens": [10**30]}}, "trainable_token_indices"),
        ({"target_modules": ["q_proj"]}, "not the tensors that this model's adapter has: base_model"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(change, message, tmp_path):
    save_adapter(adapted(), tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as mistake:
        load_adapter(tiny("llama"), tmp_path)
    assert mistake.value.exit_code == 66


def test_a_damaged_adapter_is_a_users_mistake(tmp_path):
    save_adapter(adapted(), tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_adapter(tiny("llama"), tmp_path)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: a pipe"):
            load_adapter(tiny("llama"), tmp_path)


@pytest.mark.parametrize("base", ["a" * 5000, "a\0b", "~nobody1/a", "/" * 5000, "../" * 2000, "a b"])
def test_a_base_that_is_no_path_is_told(tmp_path, base):
    save_adapter(adapted(), tmp_path, base=base)
    with pytest.raises(UserError) as mistake:
        load_adapted(tmp_path)
    assert mistake.value.exit_code == 66 and len(str(mistake.value)) < 12_000
    with pytest.raises(UserError):
        find_start(tmp_path)


# ---- PiSSA, and rows of new tokens -------------------------------------------------------------------------------------

PISSA = {
    "exact": dict(init_lora_weights="pissa"),
    "about, rsLoRA": dict(init_lora_weights="pissa_niter_4", use_rslora=True),
}
IDS = (2, 50)


def rows_of(family):
    """trainable_token_indices of the embedding and, where it is another matrix, of the head."""
    tied = tiny(family).config.tie_word_embeddings
    return {name: IDS for name in (["embed_tokens"] if tied else ["embed_tokens", "lm_head"])}


@pytest.mark.parametrize("kind", PISSA)
@pytest.mark.parametrize("family", FAMILIES)
def test_pissa_begins_as_the_base_at_its_largest_directions(family, kind):
    base, model = tiny(family).eval(), adapted(family, **PISSA[kind])
    assert torch.equal(forward(model), forward(base))
    for site, stored in adapter_sites(model).items():
        parts = [model.get_submodule(name.removesuffix(".weight")) for name in stored.names]
        weight = torch.cat([part.weight for part in parts]).double()
        largest = torch.cat([part.scale * part.lora_B @ part.lora_A for part in parts]).double()
        U, S, Vh = torch.linalg.svd(weight)
        # The approximate decomposition mixes directions of like values, as all of a random matrix are: little is lost.
        expected, left = (U[:, :4] * S[:4]) @ Vh[:4], (weight - largest).norm()
        assert left <= S[4:].norm() * (1 + (1e-5 if kind == "exact" else 0.05)), site
        assert kind != "exact" or relative_error(largest, expected) < 1e-4  # 1e-7 over a gap of a thousandth


@pytest.mark.covers(1)
@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [*PISSA, "token rows"])
def test_peft_reads_pissa_and_token_rows(family, kind, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = adapted(family, **PISSA.get(kind, dict(trainable_token_indices=rows_of(family))))
    save_model(model_without_adapter(family), tmp_path / "base")
    randomise(model)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager", pad_token_id=0
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert relative_error(theirs_of(theirs), forward(model)) <= 1e-5
    again = load_adapter(model_without_adapter(family), tmp_path / "adapter").eval()
    assert relative_error(forward(again), forward(model)) <= 1e-6  # of PiSSA one product where there were two
    with torch.no_grad():
        assert relative_error(forward(merge_adapter(again)), forward(model)) <= 1e-5


@pytest.mark.covers(1)
@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["list", "dict"])
def test_ours_reads_pefts_token_rows(family, form, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = model_without_adapter(family)
    save_model(base, tmp_path / "base")
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager", pad_token_id=0
    )
    names = {"gpt_neox": ("embed_in", "lm_head"), "gpt2": ("wte", "lm_head")}.get(family, ("embed_tokens", "lm_head"))
    indices = list(IDS) if form == "list" else {name: list(IDS) for name in names[: len(rows_of(family))]}
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", trainable_token_indices=indices)
    theirs = peft.get_peft_model(hf, config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    assert relative_error(forward(load_adapter(base, tmp_path / "adapter")), theirs_of(theirs)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_rows_of_these_tokens_change(family):
    base, model = tiny(family).eval(), adapted(family, trainable_token_indices=rows_of(family))
    assert torch.equal(forward(model), forward(base))
    forward(model).square().sum().backward()
    for name in rows_of(family):
        assert model.get_submodule(name).rows.grad.shape == (2, base.config.hidden_size)
        assert model.get_submodule(name).weight.grad is None
    randomise(model)
    with adapter_disabled(model):
        assert torch.equal(forward(model), forward(base))
    merged = merge_adapter(model)
    for name in rows_of(family):
        changed = (merged.get_submodule(name).weight != base.get_submodule(name).weight).any(1).nonzero()[:, 0]
        assert changed.tolist() == list(IDS)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(r=17, init_lora_weights="pissa"), "r = 17, but a matrix is"),
        (dict(trainable_token_indices={"embed_tokens": (2, 2)}), "each id"),
        (dict(trainable_token_indices={"embed_tokens": (53,)}), "53 rows"),
        (dict(trainable_token_indices={"norm": (1,)}), "norm is no module"),
        (dict(trainable_token_indices={"lm_head": (1,)}, modules_to_save=("lm_head",)), "lm_head is no module"),
    ],
)
def test_bad_pissa_and_token_rows(options, words):
    with pytest.raises(UserError) as mistake:
        adapted("llama", **options)
    assert words in f"{mistake.value} {mistake.value.hint}"
