"""FLOPs of a step by formula. A multiplication with an addition is two.

    matmuls                2 a weight and token: forward, for the gradient of the input, and for that of the weight if it trains
    linear cross-entropy   the same of the head, for each target
    attention              2 products of q and k forward and 5 backward, for each pair of a query and a key that it sees
    again                  what gradient checkpointing computes once more in the backward pass, and the reference of preference
                           tuning: a forward pass each

Norms, gated units, convolutions and the recurrence of a delta rule are not in it: they are bound by memory, or small.
benchmarks/step_on_paper.py takes the first three for the floor of a step.
"""

from collections.abc import Container
from math import prod

from minisft.model.model_config import ModelConfig
from minisft.plan.shapes import Shapes, is_matrix_of_a_layer


def products(
    c: ModelConfig, shapes: Shapes, trained: Container[str], *, tokens: int, targets: int, pairs: float
) -> dict[str, float]:
    """FLOPs of the first three of these. shapes: of all parameters by name, adapters included; trained: the names of those with
    a gradient. pairs: of a query and a key, over all documents, for one head."""
    matmuls = sum(
        2 * tokens * prod(shape) * (3 if name in trained else 2)
        for name, shape in shapes.items()
        if is_matrix_of_a_layer(name, shape)
    )
    head = "embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    layers = sum(mixer == "attention" for mixer in c.mixers)
    return {
        "matmuls": float(matmuls),
        "linear cross-entropy": 2.0 * targets * c.vocab_size * c.hidden_size * (3 if head in trained else 2),
        "attention": layers * (2 + 5) * 2 * pairs * c.num_heads * c.head_dim,
    }


def forward_of_blocks(c: ModelConfig, shapes: Shapes, *, tokens: int, pairs: float) -> float:
    """FLOPs of the blocks' forward pass."""
    matrices = sum(prod(shape) for name, shape in shapes.items() if is_matrix_of_a_layer(name, shape))
    layers = sum(mixer == "attention" for mixer in c.mixers)
    return 2.0 * tokens * matrices + layers * 2 * 2 * pairs * c.num_heads * c.head_dim
