"""The heap of a run on a CPU: a step needs the memory again that the step before it freed.

By itself glibc gives the free end of its heap back to the system, and what is larger than 32 MB as soon as it is freed. So each
step faults tens of thousands of pages in again, which the system clears one by one. Pages have 4 KB besides: a walk through a
tensor of 5 MB translates 1,200 addresses. `keep_freed_memory` lets the heap keep what was freed, and grow into pages of 2 MB.

A tensor starts at a multiple of 64 bytes. glibc cuts it out of a piece that is 96 bytes larger, and frees what is left before
and behind it. Small objects that live long find these leftovers in glibc's caches of small pieces. The place of a tensor that is
freed between two of them is 96 bytes too small for the next tensor of its size: a quarter of a gigabyte was lost in this way
(docs/notes.md). Without the caches leftovers and tensor become one piece again. They can be turned off only when a process
starts, so the command line starts itself again (`start_without_caches`).
"""

import ctypes
import os
import sys
from pathlib import Path

from minisft.memory import memory_bytes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
MADV_HUGEPAGE = 14  # sys/mman.h
HUGE_PAGE = 2**21
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
COMMANDS = ("minisft.train", "minisft.__main__", "minisft")  # python -m the first two, and the installed script

_is_done = False


def keep_freed_memory() -> None:
    """From now on the heap keeps what is freed in it. Call before the first large tensor; a second call changes nothing. Nothing
    changes either where the C library is not glibc, or where the user has chosen an allocator or settings of it."""
    global _is_done
    if _is_done or not _is_left_to_us() or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return
    _is_done = True
    libc.mallopt(M_MMAP_MAX, 0)  # large tensors too come from the heap
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never given back
    # Ask for huge pages in all that the heap may grow into. These are addresses: no memory is taken before it is written.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    counts_addresses = OVERCOMMIT.exists() and OVERCOMMIT.read_text().startswith("2")
    size = memory_bytes() // 2
    start = None if counts_addresses else libc.malloc(size)
    if start is None:  # as where there is a limit on addresses (ulimit -v)
        return
    first = -(-start // HUGE_PAGE) * HUGE_PAGE
    libc.madvise(first, start + size - first, MADV_HUGEPAGE)  # an error where the system has none
    libc.free(start)


def start_without_caches() -> None:
    """If this process is a command of ours on a machine without a GPU, start it again with TUNABLES: same id, same arguments.
    Call before it has read or written anything. Nothing happens in the second start, or where the user has chosen as above."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    name = spec.name if spec else Path(file or "").name
    has_gpu = any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")))
    if name in COMMANDS and not has_gpu and _is_left_to_us() and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": TUNABLES})


def _is_left_to_us() -> bool:
    """Whether the allocator may be glibc's and nobody has chosen settings of it, or another one."""
    theirs = any(name.startswith(("MALLOC_", "LD_PRELOAD")) for name in os.environ)
    return sys.platform == "linux" and not theirs and os.environ.get("GLIBC_TUNABLES", TUNABLES) == TUNABLES
