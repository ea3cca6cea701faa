"""How much memory this process has needed at most, in all and during a part of a run.

Linux keeps the largest resident size (`VmHWM` of /proc/self/status), and forgets it when 5 is written to /proc/self/clear_refs; so a part
of a run can be measured by itself. Elsewhere only the whole is known. On CUDA torch's allocator keeps a peak of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_earlier = 0
"""The largest size before it was last forgotten, bytes."""


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far, bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(_earlier, int(peak if sys.platform == "darwin" else peak * 1024))


@contextmanager
def measured_peak() -> Iterator[dict[str, int]]:
    """Fills in, when the block ends: rss_before_bytes, rss_peak_bytes (on Linux), cuda_peak_bytes (where there is CUDA).

    Empty where nothing can be measured.
    """
    import torch

    global _earlier
    found: dict[str, int] = {}
    before = psutil.Process().memory_info().rss
    _earlier = peak_rss_bytes()
    resets = _forget()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        yield found
    finally:
        if resets:
            found |= {"rss_before_bytes": int(before), "rss_peak_bytes": _high_water()}
            _earlier = max(_earlier, found["rss_peak_bytes"])
        if torch.cuda.is_available():
            found["cuda_peak_bytes"] = int(torch.cuda.max_memory_allocated())


def _forget() -> bool:
    """Start a new largest resident size from here; whether that is possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    """Largest resident size since `_forget`, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
