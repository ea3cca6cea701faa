"""What calibration with each observer costs, and how near the searched ranges come to the least squared error, beside torchao's.

    python -m benchmarks.observers                    both tables, one thread
    python -m benchmarks.observers --batches 2        a quarter of the batches

Time is for a MiniLM's static calibration: 36 activations (30 of [64, 64, 384], 6 of [64, 64, 1536]) x 8 batches, half of them GELU outputs.
Error is summed over 200,000 values, on the codes that the grid then has; 1.00 is the best of an exhaustive search of the ends.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._common import machine, markdown
from qtrain import observers
from qtrain.grids.affine import Affine

SHAPES = [(64, 64, 384)] * 30 + [(64, 64, 1536)] * 6


def grid(bits: int = 8, symmetric: bool = False) -> Affine:
    """What activations are quantized to."""
    return Affine(bits, "absmax_onnx" if symmetric else "minmax_onnx", "tensor")


def torchao_histogram(bits: int = 8) -> Callable[[Tensor], object]:
    """torchao's L2 observer with that many codes."""
    from torchao.quantization.pt2e.observer import HistogramObserver

    return HistogramObserver(dtype=torch.qint8, quant_min=-(2 ** (bits - 1)), quant_max=2 ** (bits - 1) - 1, eps=1e-30)


def measure_time(batches: int) -> str:
    """Table of seconds to see all batches and to find all ranges."""
    generator = torch.Generator().manual_seed(0)
    normal = {s: torch.randn(s, generator=generator) for s in set(SHAPES)}
    inputs = [torch.nn.functional.gelu(normal[s]) if i % 2 else normal[s] for i, s in enumerate(SHAPES)]
    growth = torch.rand(batches, generator=generator) + 0.5  # the ranges differ from batch to batch
    rows = []
    for name in [*observers.OBSERVERS, "torchao HistogramObserver"]:
        ours = name in observers.OBSERVERS
        collectors = [observers.make(name, grid=grid()) if ours else torchao_histogram() for _ in inputs]
        seeing = 0.0
        for factor in growth:
            for collector, x in zip(collectors, inputs, strict=True):
                batch = x * factor
                started = time.perf_counter()
                collector.observe(batch) if ours else collector(batch)
                seeing += time.perf_counter() - started
        started = time.perf_counter()
        for collector in collectors:
            collector.range() if ours else collector.calculate_qparams()
        rows.append((name, seeing, time.perf_counter() - started))
    return markdown([f"{len(SHAPES)} activations x {batches} batches", "seeing, s", "ranges, s"], rows)


def distributions(count: int = 200_000) -> dict[str, Tensor]:
    """What activations look like."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(count, generator=generator)

    outliers, pair = normal(), normal()
    outliers[:20] = 30.0
    pair[:2] = torch.tensor([-80.0, 25.0])
    return {
        "normal": normal(),
        "ReLU": normal().relu(),
        "GELU": torch.nn.functional.gelu(1.5 * normal()),
        "Student t, 3": normal() / torch.stack([normal(), normal(), normal()]).square().mean(0).sqrt(),
        "log-normal": normal().exp(),
        "normal, 20 at 30": outliers,
        "normal, -80 and 25": pair,
    }


def squared_error(x: Tensor, low: float, high: float, bits: int, symmetric: bool) -> float:
    """Of the grid's codes over that range."""
    on = grid(bits, symmetric)
    return float((on.fake(x, on.choose(torch.tensor([low, high]))).double() - x.double()).square().sum())


def least_error(x: Tensor, bits: int, symmetric: bool) -> float:
    """Best of an exhaustive search: one end and then the other, three times; or a threshold."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    shrinks = [2.0 ** (-i / 24) for i in range(24 * 6)]
    if symmetric:
        return min(squared_error(x, -max(-low, high) * f, max(-low, high) * f, bits, True) for f in shrinks)
    f_low = f_high = 1.0
    least = 0.0
    for _ in range(3):
        _, f_high = min((squared_error(x, low * f_low, high * f, bits, False), f) for f in shrinks)
        least, f_low = min((squared_error(x, low * f, high * f_high, bits, False), f) for f in (shrinks if low else [1.0]))
    return least


def measure_error() -> str:
    """Table of squared errors, relative to the least."""
    rows = []
    for (bits, symmetric), (name, x) in itertools.product([(8, False), (8, True), (7, False), (7, True)], distributions().items()):
        least = least_error(x, bits, symmetric)
        row: list[object] = [f"{bits} bits, {'' if symmetric else 'a'}symmetric: {name}"]
        theirs = torchao_histogram(bits)
        for batch in x.split(25_000):
            theirs(batch)
        low, high = theirs._non_linear_param_search()  # type: ignore[attr-defined]
        row.append(squared_error(x, float(low), float(high), bits, symmetric) / least)
        for observer in ("histogram_mse", "histogram_kl", "percentile", "minmax"):
            collector = observers.make(observer, grid=grid(bits, symmetric))
            for batch in x.split(25_000):
                collector.observe(batch)
            low, high = collector.range()
            row.append(squared_error(x, float(low), float(high), bits, symmetric) / least)
        rows.append(row)
    return markdown(["squared error", "torchao HistogramObserver", "histogram_mse", "histogram_kl", "percentile", "minmax"], rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), measure_time(args.batches), measure_error(), sep="\n\n")


if __name__ == "__main__":
    main()
