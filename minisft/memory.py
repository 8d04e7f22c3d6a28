"""How much memory the machine has."""

import os
from pathlib import Path

from minisft.errors import MEMORY, UserError
from minisft.units import size

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # version 2, 1


def memory_bytes() -> int:
    """The memory of this machine, or of the container (cgroup) that the program runs in if that is less."""
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):
        sizes = [16_000_000_000]
    for path in CGROUP_LIMITS:
        try:
            sizes.append(int(path.read_text()))
        except (OSError, ValueError):  # absent, or "max"
            pass
    return min(sizes)


def require_memory(needed: int, there: int, what: str, hint: str) -> None:
    """Raises UserError (exit code MEMORY) for what cannot fit, before the memory is taken: on Linux a program that takes too
    much is killed without a word. needed, there: bytes."""
    if needed > there:
        problem = f"{what} needs {size(needed)}, and there are {size(there)} of memory"
        raise UserError(problem, hint=hint, exit_code=MEMORY)
