"""What the benchmarks share: interleaved medians, memory in a child process, markdown tables, and the machine's name."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch


def machine() -> str:
    """One line about where the numbers were measured."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds per call of each function, called in turn: what disturbs one disturbs all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + warmup):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if i >= warmup:
                times[name].append(time.perf_counter() - started)
    return times


def median_ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median of the per-round ratios name / base."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    lines += ["| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines)
