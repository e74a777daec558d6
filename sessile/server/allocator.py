"""The C library's allocator, set up for a process that reads and writes large bodies for weeks."""

import ctypes
import sys

BLOCK_BYTES = 64 << 10
"""From this size on, a block is mapped by itself and goes back to the system the moment it is freed."""

# Of mallopt(3) in glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_ARENAS = 2


def return_freed_memory() -> bool:
    """Let the memory of large blocks go back to the system; whether this C library can be told so.

    By itself glibc raises its threshold to the largest block that was ever freed, and from then on cuts bodies out of
    a heap that shrinks only from its end: one small block there keeps a burst's megabytes for ever. Other C libraries
    are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # The heap grows by less than a large block at a time: a block that fits into what is left there is not mapped.
    wanted = (
        (_MMAP_THRESHOLD, BLOCK_BYTES), (_TOP_PAD, BLOCK_BYTES // 2), (_TRIM_THRESHOLD, 2 * BLOCK_BYTES),
        (_ARENA_MAX, _ARENAS),
    )  # fmt: skip
    return all([mallopt(parameter, value) == 1 for parameter, value in wanted])
