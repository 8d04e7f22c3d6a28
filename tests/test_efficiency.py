"""The prediction of docs/scaling.md: its limits, and that the table is the program's."""

from dataclasses import replace

import pytest

from benchmarks import efficiency as e
from minisft.cards import CARDS

H100 = CARDS["H100"]


def cluster(gpus: int, network: str = "infiniband", **options) -> e.Cluster:
    return e.Cluster(H100, e.NETWORKS[network], gpus, **options)


def test_the_document_has_the_table_of_the_program():
    text = (e.ROOT / e.DOCUMENT).read_text().partition(e.BEGIN)[2].partition(e.END)[0]
    assert text.strip() == e.tables(H100, list(e.NETWORKS.values()), e.MFU)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "hsdp"])
def test_messages_only_cost(strategy):
    """Never above 1; no messages on one GPU; a faster network or more work between messages never hurts."""
    job = e.Job(e.MODELS["Llama-3.1-8B"], strategy)
    assert e.efficiency(job, cluster(1)) == pytest.approx(1)
    for gpus in (8, 64, 1024):
        fast, slow = (e.efficiency(job, cluster(gpus, name)) for name in ("infiniband", "ethernet"))
        assert slow <= fast < 1
        assert e.efficiency(replace(job, tokens=4 * job.tokens), cluster(gpus)) > fast
        assert e.efficiency(job, cluster(gpus, mfu=0.8)) < fast


def test_bytes_between_nodes():
    """8 bytes a number whatever the strategy: two gathers in bf16 and a sum in fp32, or an all-reduce in fp32."""
    model = e.MODELS["Llama-3.1-8B"]
    jobs = [e.Job(model, strategy) for strategy in ("ddp", "fsdp2", "hsdp")]
    assert [e.between_nodes(job, 1) for job in jobs] == [0, 0, 0]
    for job in jobs:  # 8.03 billion numbers, vectors included
        assert e.between_nodes(job, 2) == pytest.approx(0.5 * 8 * 8_030_261_248, rel=1e-12)
    ddp, fsdp2, hsdp = (e.between_nodes(replace(job, accumulation=4), 2) for job in jobs)
    assert fsdp2 == hsdp == pytest.approx(4 * ddp)
    assert e.between_nodes(replace(jobs[1], reshard=False), 2) < ddp


def test_a_case_by_hand():
    """The gradients of 1.24 billion numbers over two nodes: 4.94 GB, half of it through the cards of each node, twice; while the
    backward of the layers' 0.97 billion numbers goes on."""
    job = e.Job(e.MODELS["Llama-3.2-1B"], "ddp", checkpointing=False)
    whole, alone = e.seconds(job, cluster(16, "ethernet"))
    rate, attention = 0.4 * H100.matmul, 16 * 8192 * 1025 / 2 * 2048
    backward = (4 * 8192 * 0.973e9 + 10 * attention) / rate
    hops = 2 * (7 * 3e-6 + 10e-6)  # of a message of 16 MB, through a tree
    messages = 2 * 0.5 * 4.943e9 / (0.8 * 12.5e9) + 295 * hops
    assert whole - alone == pytest.approx(messages - backward, rel=0.01)
    assert alone == pytest.approx((6 * 8192 * 1.236e9 + 14 * attention) / rate, rel=0.01)  # 6 a number and token
    fast, _ = e.seconds(job, cluster(16))  # only the embedding's 0.26 billion numbers are waited for
    assert fast - alone == pytest.approx(2 * (15 / 16) * 4 * 0.263e9 / (0.8 * 450e9) + 63 * hops, rel=0.01)
