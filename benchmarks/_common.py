"""What the benchmarks share: interleaved medians, memory in a child process, markdown tables, and the machine's name."""

from __future__ import annotations

import platform
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from qtrain import registry
from qtrain.config import data_dir, register_all
from qtrain.malloc import tune_malloc


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


def start() -> None:
    """What the command line does before it composes a configuration; prints the machine."""
    tune_malloc()
    register_all()
    registry.load_all()
    print(machine(), flush=True)


def composed(overrides: Sequence[str]) -> Any:
    """The configuration of a command line, as a node."""
    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        return compose("config", overrides=[*overrides, "logger=none"])


def text_options(parser: ArgumentParser, steps: int, learning_rate: float) -> None:
    """The options of benchmarks that train a language model."""
    for name in ("--model", "--test", "--train"):
        parser.add_argument(name, help="left out: the recipe's sample")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--overrides", nargs="*", default=[], help="further Hydra overrides of all runs")


def text_overrides(args: Any) -> list[str]:
    """Model, texts and further overrides of a command line with `text_options`."""
    given = {"model.path": args.model, "data.test": args.test, "data.train": args.train}
    found = [f"{key}={value}" for key, value in given.items() if value is not None]
    return [*found, *(["data.eval_tokens=null"] if args.test is not None else []), *args.overrides]
