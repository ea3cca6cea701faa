"""Keep freed memory: the largest speed-up of CPU training on a small machine.

glibc returns every block above 128 KiB to the kernel when it is freed and maps it anew, zeroed, page by page, when it is
asked for again. A training step frees and allocates the same activations over and over, so on a small virtual machine most of
a naive step is page faults. Raising M_MMAP_THRESHOLD and M_TRIM_THRESHOLD keeps those pages in the process; peak memory does
not change within a stage, since what is kept is what was in use; between stages `release` gives it back, so that the peaks of
training and of export do not add up. `QTRAIN_MALLOC=0` turns it off. See mallopt(3), malloc_trim(3).
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
GIB = 1 << 30


def tune_malloc() -> bool:
    """Raise glibc's thresholds once for this process.

    Returns:
        Whether it was done: false without glibc, or with ``QTRAIN_MALLOC=0``.
    """
    if os.environ.get("QTRAIN_MALLOC", "1") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        libc = ctypes.CDLL(None)
        done = [libc.mallopt(M_MMAP_THRESHOLD, GIB), libc.mallopt(M_TRIM_THRESHOLD, 2 * GIB - 1)]
        return all(done)
    except (OSError, AttributeError):
        return False


def release() -> None:
    """Drop what the stage before left (optimizer states hang in reference cycles) and give its pages back to the kernel."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
