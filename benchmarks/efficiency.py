"""How many GPUs are worth it? The time of a step on 8 to 1,024 GPUs, predicted from bytes, link speeds and FLOPs.

    python -m benchmarks.efficiency                         # the tables of docs/scaling.md
    python -m benchmarks.efficiency --write                 # into docs/scaling.md
    python -m benchmarks.efficiency --card A100 --network ethernet --mfu 0.5

Nothing of it was measured. It is a model with these parts:

    compute     FLOPs of a micro-batch (plan/flops.py) over mfu x the card's matmul rate (cards.py), layer by layer
    message     an all-gather or reduce-scatter of S bytes over n ranks on m nodes takes the longest of: its bytes inside a
                node, S (n-1)/n over the link of a GPU; its bytes between nodes, S (m-1)/m over all network cards of a node;
                and, added to that, n - 1 hops of a ring. An all-reduce is one of each, or has the few hops of a tree
    overlap     a layer takes the longer of its compute and its messages; those of the root (embedding, head) are not hidden
                hsdp: the sums between nodes use the network while the gathers use the links inside a node
                ddp: the sums have the last backward of a step to hide behind
    links       80 % of what their names say

Efficiency is tokens/s of a GPU over those of one GPU that keeps everything and sends nothing. The tokens of a GPU stay the same,
so the batch grows with the GPUs (weak scaling). What is not in it: slow nodes, other jobs on the network, saving, the loader.

Rings: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations". Trees: Sanders, Speck and
Träff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan".
"""

import argparse
from dataclasses import dataclass
from math import ceil, log2, prod

from benchmarks.harness import ROOT, number, table
from minisft.cards import CARDS, Card
from minisft.model.families import from_hf
from minisft.model.model_config import ModelConfig
from minisft.plan.estimate import MFU
from minisft.plan.flops import forward_of_blocks, products
from minisft.plan.shapes import Shapes, layer_of, parameter_shapes
from minisft.replicas import BUCKET_BYTES

GPUS_A_NODE = 8
REACHED = 0.8  # of a link's nominal rate: an assumption
# Bytes/s in one direction of a GPU's link to the others of its node: half of NVLink 4's 900 and NVLink 3's 600 GB/s, PCIe 4.
LINKS = {"H200": 450e9, "H100": 450e9, "A100": 300e9, "L40S": 32e9, "4090": 32e9}
LINK_HOP, NETWORK_HOP = 3e-6, 10e-6  # seconds of a hop, assumed
DOCUMENT = "docs/scaling.md"
BEGIN, END = "<!-- efficiency: begin -->", "<!-- efficiency: end -->"


@dataclass(frozen=True)
class Network:
    """Between nodes."""

    name: str
    rate: float  # bytes/s of a node in one direction, over all of its network cards


NETWORKS = {
    "infiniband": Network("eight cards of 400 Gb/s a node", 8 * 50e9),
    "ethernet": Network("one card of 100 Gb/s a node", 12.5e9),
}


@dataclass(frozen=True)
class Cluster:
    card: Card
    network: Network
    gpus: int
    mfu: float = MFU

    @property
    def nodes(self) -> int:
        return ceil(self.gpus / GPUS_A_NODE)

    def one_way(self, num_bytes: float, ranks: int, nodes: int) -> float:
        """Seconds of an all-gather, or a reduce-scatter, whose whole is num_bytes."""
        return self._bytes(num_bytes, ranks, nodes) + (ranks - 1) * (NETWORK_HOP if nodes > 1 else LINK_HOP)

    def all_reduce(self, num_bytes: float, ranks: int, nodes: int) -> float:
        ring = (ranks - 1) * (NETWORK_HOP if nodes > 1 else LINK_HOP)
        tree = (ranks // nodes - 1) * LINK_HOP + ceil(log2(nodes)) * NETWORK_HOP
        return 2 * (self._bytes(num_bytes, ranks, nodes) + min(ring, tree))

    def _bytes(self, num_bytes: float, ranks: int, nodes: int) -> float:
        inside = num_bytes * (ranks - 1) / ranks / (REACHED * LINKS[self.card.name])
        between = num_bytes * (nodes - 1) / nodes / (REACHED * self.network.rate)
        return max(inside, between)


@dataclass(frozen=True)
class Job:
    """A step: `accumulation` micro-batches of `tokens` tokens on each GPU."""

    model: ModelConfig
    strategy: str  # "ddp", "fsdp2", "hsdp"
    tokens: int = 8192
    accumulation: int = 1
    checkpointing: bool = True
    document: int = 1024  # tokens of a document, for attention
    reshard: bool = True

    def flops(self) -> tuple[float, float, float]:
        """Of a micro-batch: (forward of all layers, their backward, the head)."""
        shapes = parameter_shapes(self.model)
        sizes = {"tokens": self.tokens, "pairs": self.tokens * (self.document + 1) / 2}
        parts = products(self.model, shapes, shapes, targets=self.tokens, **sizes)
        forward = forward_of_blocks(self.model, shapes, **sizes)
        layers = parts["matmuls"] + parts["attention"]
        return forward, layers - forward + (forward if self.checkpointing else 0), parts["linear cross-entropy"]

    def sizes(self) -> tuple[float, float]:
        """Numbers in (a block, embedding and head)."""
        shapes: Shapes = parameter_shapes(self.model)
        blocks = sum(prod(shape) for name, shape in shapes.items() if layer_of(name) is not None)
        return blocks / self.model.num_layers, sum(prod(s) for name, s in shapes.items() if layer_of(name) is None)


def seconds(job: Job, cluster: Cluster) -> tuple[float, float]:
    """(of a step, of the same step without messages)."""
    rate = cluster.mfu * cluster.card.matmul
    forward, backward, head = (flops / rate for flops in job.flops())
    layers = job.model.num_layers
    alone = job.accumulation * (forward + backward + head)
    block, root = job.sizes()
    if job.strategy == "ddp":

        def summed(num_bytes: float) -> float:
            buckets = ceil(num_bytes / BUCKET_BYTES)
            return buckets * cluster.all_reduce(num_bytes / buckets, cluster.gpus, cluster.nodes)

        return alone + max(0.0, summed(4 * layers * block) - backward) + summed(4 * root), alone
    ranks, nodes = (cluster.gpus, cluster.nodes) if job.strategy == "fsdp2" else (min(cluster.gpus, GPUS_A_NODE), 1)
    replicas = cluster.gpus // ranks

    def replicated(num_bytes: float) -> float:
        """Each rank of a node sums its part with the same part of the other nodes; together they use all network cards."""
        if replicas == 1:
            return 0.0
        bytes_of_node = 2 * num_bytes * (replicas - 1) / replicas
        return bytes_of_node / (REACHED * cluster.network.rate) + 2 * ceil(log2(replicas)) * NETWORK_HOP

    gather, reduce = cluster.one_way(2 * block, ranks, nodes), cluster.one_way(4 * block, ranks, nodes)
    again = gather if job.reshard else 0.0
    of_layers = max(forward, layers * gather)
    of_layers += max(backward, layers * (again + reduce), layers * replicated(4 * block))
    of_root = 2 * cluster.one_way(4 * root, ranks, nodes) + replicated(4 * root)
    return job.accumulation * (of_layers + head + of_root), alone


def between_nodes(job: Job, nodes: int) -> float:
    """Bytes that the network cards of a node send in a step."""
    block, root = job.sizes()
    whole, share = job.model.num_layers * block, (nodes - 1) / nodes
    if job.strategy == "ddp":
        return 2 * share * 4 * (whole + root)
    if job.strategy == "hsdp":
        return job.accumulation * 2 * share * 4 * (whole + root)
    gathers = 2 if job.reshard else 1
    return job.accumulation * share * (whole * (2 * gathers + 4) + root * 8)


def llama(**sizes) -> ModelConfig:
    return from_hf({"model_type": "llama", "max_position_embeddings": 8192, **sizes})


MODELS = {
    "Llama-3.2-1B": llama(
        **dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16),
        **dict(num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    ),
    "Llama-3.1-8B": llama(
        **dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
        **dict(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False),
    ),
    "Llama-3.1-70B": llama(
        **dict(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80),
        **dict(num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False),
    ),
}
CASES = (  # model, strategy, tokens of a micro-batch, micro-batches of a step
    ("Llama-3.2-1B", "ddp", 8192, 1),
    ("Llama-3.2-1B", "ddp", 8192, 4),
    ("Llama-3.1-8B", "fsdp2", 8192, 1),
    ("Llama-3.1-8B", "hsdp", 8192, 1),
    ("Llama-3.1-8B", "fsdp2", 2048, 1),
    ("Llama-3.1-8B", "hsdp", 2048, 1),
    ("Llama-3.1-70B", "fsdp2", 8192, 1),
)
NUMBERS = (8, 16, 32, 64, 128, 256, 512, 1024)


def efficiency(job: Job, cluster: Cluster) -> float:
    whole, alone = seconds(job, cluster)
    return alone / whole


def tables(card: Card, networks: list[Network], mfu: float) -> str:
    """Markdown: an efficiency for each case, network and number of GPUs."""
    parts = []
    for network in networks:
        lines = []
        for name, strategy, tokens, accumulation in CASES:
            job = Job(MODELS[name], strategy, tokens, accumulation, checkpointing=name != "Llama-3.2-1B")
            found = [efficiency(job, Cluster(card, network, gpus, mfu)) for gpus in NUMBERS]
            work = f"{accumulation} x {tokens:,}" if accumulation > 1 else f"{tokens:,}"
            head = [name, strategy, work, number(between_nodes(job, 8) / 1e9)]
            lines.append(head + [f"{100 * value:.0f}" for value in found])
        head = ["model", "strategy", "tokens of a GPU", "GB that one of 8 nodes sends", *map(str, NUMBERS)]
        about = f"Efficiency in %, by number of GPUs: {card.name}, {network.name}, {mfu:.0%} of the matmul rate"
        parts.append(f"{about}\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--network", choices=NETWORKS, help="only this one")
    parser.add_argument("--mfu", type=float, default=MFU, help="share of the card's matmul rate without messages")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT}")
    options = parser.parse_args()
    networks = [NETWORKS[options.network]] if options.network else list(NETWORKS.values())
    text = tables(CARDS[options.card], networks, options.mfu)
    if options.write:
        path = ROOT / DOCUMENT
        before, rest = path.read_text().split(BEGIN)
        path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    print(text)


if __name__ == "__main__":
    main()
