"""A step on paper: what it counts, its floor, and how many launches and waits a step may have at most."""

import json
from operator import itemgetter
from pathlib import Path

import pytest
from tiny import run_anew, start

from minisft.kernels import common

HERE = Path(__file__).parent
LAYERS = {"SmolLM2-135M": 30, "SmolLM2-135M, LoRA": 30, "Qwen2.5-0.5B": 24, "Llama-3.2-1B": 16, "Llama-3.1-8B": 32}
# What a step has today. Lower a number when a step has fewer; a change that needs more has to say why.
MOST = {  # launches, waits
    "SmolLM2-135M": (815, 1),
    "Qwen2.5-0.5B": (748, 1),
    "Llama-3.2-1B": (475, 1),
    "Llama-3.1-8B": (923, 1),
    "SmolLM2-135M, LoRA": (1611, 1),
}
# Computed by hand from the shapes, when the kernels were planned: ms on an H200. The 8B then had fp32 weights, whose update
# moves 28 bytes a parameter and not 22.
PLANNED_FLOORS = {
    "SmolLM2-135M": 28.2,
    "Qwen2.5-0.5B": 81.5,
    "Llama-3.2-1B": 185,
    "Llama-3.1-8B": 564 - 8.03e9 * 6 / 4.3e9,
}


@pytest.fixture(scope="module")
def paper(tmp_path_factory) -> dict:
    """What paper_steps.py prints."""
    if not common.HAS_TRITON:
        pytest.skip("needs Triton")
    said = tmp_path_factory.mktemp("paper") / "said.json"
    done = start(run_anew, HERE / "paper_steps.py", said)
    done.join()
    assert done.exitcode == 0, said.read_text()[-4000:]
    return json.loads(said.read_text())


def at(steps: dict, layers: int, measure) -> float:
    """measure(step) of a model with so many layers, from those with one and with two."""
    one, two = measure(steps["1"]), measure(steps["2"])
    return one + (two - one) * (layers - 1)


def test_every_layer_adds_the_same(paper):
    steps = {layers: step["parts"]["all"] for layers, step in paper["steps"]["SmolLM2-135M"].items()}
    for column in ("launches", "bytes", "flops", "roofline_ms", "floor_ms", "ms"):
        assert at(steps, 4, itemgetter(column)) == pytest.approx(steps["4"][column], rel=1e-12)


@pytest.mark.parametrize("model", MOST)
def test_a_step_has_no_more_launches_and_waits_than_before(paper, model):
    steps, (launches, waits) = paper["steps"][model], MOST[model]
    assert at(steps, LAYERS[model], itemgetter("launches")) <= launches
    assert at(steps, LAYERS[model], lambda step: sum(step["waits"].values())) <= waits, steps["2"]["waits"]


def test_a_step_waits_for_its_verdict_and_for_nothing_else(paper):
    """Two micro-batches, whose rows or pairs have weights, or whose blocks run twice and keep their inputs on the host."""
    assert len(paper["waits"]) == 7
    for how, waits in paper["waits"].items():
        ((where, count),) = waits.items()
        assert "runtime.py" in where and "waits for an event" in where and count == 1, how


def test_activations_are_those_that_the_plan_counts(paper):
    """Bytes a token of a tiny Llama with two layers; test_plan.py has all families."""
    D, Q, K, F, heads, pairs = 64, 64, 32, 48, 4, 8
    norm = 2 * D + 4  # what it hands to the products, and rstd
    block = 2 * norm + 2 * (Q + 2 * K) + 2 * Q + 4 * heads + 3 * 2 * F
    for weights, width in (("torch.float32", 4), ("torch.bfloat16", 2)):  # of cos and sin
        assert paper["kept"][weights] == [2 * block + norm + 2 * pairs * width] * 2


@pytest.mark.parametrize("model", PLANNED_FLOORS)
def test_floors_are_those_that_were_planned(paper, model):
    floor = at(paper["steps"][model], LAYERS[model], lambda step: step["parts"]["all"]["floor_ms"])
    assert floor == pytest.approx(
        PLANNED_FLOORS[model], rel=0.03
    )  # the plan rounded, and counted T targets of T tokens


def test_every_product_is_counted(paper):
    """6 FLOPs for each weight and token, forward and backward; of the head, for each target; 7 products of attention. The
    loader fills the targets up to a multiple of 64: here there is one for each token."""
    T, documents, D, F, V, heads, kv_heads, head_dim = 16384, 8, 576, 1536, 49152, 9, 3, 64
    layer = 2 * D * heads * head_dim + 2 * D * kv_heads * head_dim + 3 * D * F
    pairs = documents * 2048 * 2049 / 2
    parts = paper["steps"]["SmolLM2-135M"]["2"]["parts"]
    assert parts["matmuls"]["flops"] == 6 * T * 2 * layer
    assert parts["linear cross-entropy"]["flops"] == 6 * T * V * D
    assert parts["attention"]["flops"] == 7 * 2 * pairs * heads * head_dim * 2
    for part in ("matmuls", "attention"):  # the floor counts them by itself
        assert parts[part]["floor_ms"] == pytest.approx(1e3 * parts[part]["flops"] / 788e12, rel=1e-9)
    assert parts["all"]["flops"] == sum(part["flops"] for name, part in parts.items() if name != "all")


def test_parts_move_at_least_their_floor_and_no_estimate_is_faster_than_the_card(paper):
    for model, steps in paper["steps"].items():
        assert steps["2"]["least"] > 1
        for name, part in steps["2"]["parts"].items():
            # attention turns q, and dk back, beside its products
            assert name == "rope" or part["roofline_ms"] >= part["floor_ms"] * (1 - 1e-9), (model, name)
            assert part["launches"] == part["forward"] + part["backward"] + part["update"]
        # the kernels of the gated unit move what must be moved, and no more
        assert steps["2"]["parts"]["glu"]["roofline_ms"] == pytest.approx(
            steps["2"]["parts"]["glu"]["floor_ms"], rel=1e-9
        )


def test_a_rotary_embedding_moves_k_and_dq_and_its_table_alone(paper):
    """Bytes a token of a layer: k is read and written in bf16, dq read in fp32 and written in bf16."""
    Q, K, pairs = 576, 192, 32
    one, two = (paper["steps"]["SmolLM2-135M"][layers]["parts"]["rope"]["bytes"] for layers in "12")
    assert two - one == 16384 * (4 * K + 6 * Q + 2 * 2 * 4 * pairs)


@pytest.mark.parametrize(
    "model, parameters, each",
    [
        # fp32 weights and their copies in bf16
        ("SmolLM2-135M", 49152 * 576 + 3 * 576 + 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536, 30),
        # bf16 weights and gradients
        ("Llama-3.1-8B", 2 * 128256 * 4096 + 3 * 4096 + 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336, 22),
    ],
)
def test_bytes_of_adamw(paper, model, parameters, each):
    """As kernels/adamw.py says; the rest is the table of addresses, 16 bytes for 16,384 numbers."""
    moved = paper["steps"][model]["1"]["parts"]["optimizer"]["bytes"]
    assert moved == pytest.approx(each * parameters, rel=1e-3)


def test_what_is_a_launch_and_what_a_wait(paper):
    found = {what: ([launch["name"] for launch in launches], waits) for what, launches, waits in paper["ops"]}
    assert found == {
        "allocate": ([], []),
        "view": ([], []),
        "linear": (["_to_copy", "_to_copy", "mm"], []),  # autocast
        "backward": (["mm", "_to_copy"], []),
        "copy from pageable memory": (["_to_copy"] * 3, ["copies from the host"] * 3),
        "copy from and to pinned memory": (["_to_copy", "copy_"], []),
        "copy and stay for it": (["_to_copy"] * 2, ["copies from the host", "copies to the host"]),
        "event": ([], ["waits for an event"]),
        "values": (["sum", "gt", "all"], ["asks for a value"] * 3),
    }


def test_bytes_flops_and_phases_of_a_linear_layer(paper):
    launches = {what: launches for what, launches, _ in paper["ops"]}
    cast, _, product = launches["linear"]
    assert cast == {"name": "_to_copy", "bytes": 16 * 32 * (4 + 2), "flops": 0, "phase": "forward"}
    sizes = {"bytes": 2 * (64 * 32 + 32 * 16 + 64 * 16), "flops": 2 * 64 * 32 * 16}
    assert product == {"name": "mm", "phase": "forward", **sizes}
    assert launches["backward"][0] == {"name": "mm", "phase": "backward", **sizes}
    assert launches["copy from pageable memory"][0]["bytes"] == 4 * 64


def test_an_update_never_mixes_rows_on_the_cpu_and_vectors_on_the_gpu(paper):
    assert len(paper["devices"]) == 10
    assert all(found == [] for found in paper["devices"].values()), paper["devices"]
