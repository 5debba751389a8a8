"""Where large tensors live while a model trains: in the heap, whose pages are kept.

glibc maps every block above 32 MiB anew, and gives it back when it is freed: the kernel then clears and hands out all
of its pages again in every step, for each gradient of a large table. With two million users a step of LightGCN took 0.7
of the time without that, but half as much memory again, so the largest tensors stay as they were.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
USUAL = 32 << 20  # above which glibc maps, at most, by itself
LARGE = 256 << 20  # above which it still does here: holes of such a size in the heap would cost too much memory
MOST = 2**31 - 1  # what an int holds


@contextmanager
def kept_pages() -> Iterator[None]:
    """Freed memory stays with the process inside, for the next step, and is given back after; on glibc alone.

    An epoch of FREEDOM with a trained table of 4,480 columns takes half the time so. A setting of the process: within
    another ``kept_pages`` it ends with the inner one.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(MMAP, LARGE)
    libc.mallopt(TRIM, MOST)
    try:
        yield
    finally:
        libc.mallopt(MMAP, USUAL)
        libc.mallopt(TRIM, 2 * USUAL)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
    except (OSError, TypeError):  # Windows has no such handle
        return None
