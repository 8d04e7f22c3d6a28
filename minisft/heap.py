"""The heap of a run on a CPU: a step needs the memory again that the step before it freed.

By itself glibc gives the free end of its heap back to the system, and what is larger than 32 MB as soon as it is freed. So each
step faults tens of thousands of pages in again, which the system clears one by one. Pages have 4 KB besides: a walk through a
tensor of 5 MB translates 1,200 addresses. Here the heap keeps what was freed, and grows into pages of 2 MB.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
MADV_HUGEPAGE = 14  # sys/mman.h
HUGE_PAGE = 2**21
THEIRS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # how a user chooses an allocator, or its settings

_is_done = False


def keep_freed_memory() -> None:
    """From now on the heap keeps what is freed in it. Call before the first large tensor; a second call changes nothing. Nothing
    changes either where the C library is not glibc, or where variables of the environment choose otherwise."""
    global _is_done
    if _is_done or sys.platform != "linux" or any(name.startswith(THEIRS) for name in os.environ):
        return
    _is_done = True
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(M_MMAP_MAX, 0)  # large tensors too come from the heap
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never given back
    # Ask for huge pages in all that the heap may grow into. These are addresses: no memory is taken before it is written.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    start = libc.malloc(size)
    if start is None:  # a limit on addresses (ulimit -v)
        return
    first = -(-start // HUGE_PAGE) * HUGE_PAGE
    libc.madvise(first, start + size - first, MADV_HUGEPAGE)  # an error where the system has none
    libc.free(start)
