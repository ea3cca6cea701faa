"""glibc's thresholds: raised once, not raised when asked not to, and freed memory goes back between stages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
import psutil, torch
from qtrain.malloc import release, tune_malloc
print(tune_malloc())
before = psutil.Process().memory_info().rss
x = torch.ones(64 << 20)
del x
kept = psutil.Process().memory_info().rss - before
release()
print(kept, psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these")
@pytest.mark.parametrize("switch", ["1", "0"])
def test_freed_memory_is_kept_until_it_is_released(switch: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], env={"QTRAIN_MALLOC": switch}, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    kept, left = map(int, second.split())
    assert first == str(switch == "1")
    assert (kept > 200e6) == (switch == "1")  # 256 MiB stay in the process only when thresholds are raised
    assert left < 50e6
