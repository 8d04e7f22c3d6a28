"""The Triton kernels of gated_delta_rule, in the interpreter: against the recurrence, in poisoned memory, repeated."""

import pytest
from test_gated_delta_rule import DTYPES, hold_to_the_recurrence, inputs_of

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")
# Chunks have 16 tokens here, wherever documents begin.
LAYOUTS = {
    "around a chunk": [1, 15, 16, 17, 33, 1, 1],
    "one long": [50],
    "many short": [3, 5, 2, 1, 7, 1, 1, 2, 9],
    "on edges": [16, 32],
    "through an edge": [15, 2, 31, 20],
    "one token": [1],
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_recurrence(layout, dtype):
    lengths = LAYOUTS[layout]
    hold_to_the_recurrence(lengths, inputs_of(sum(lengths), 1, 1, 8, 20), DTYPES[dtype])
