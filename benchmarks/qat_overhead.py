"""What QAT costs over plain fine-tuning: seconds per step and peak memory, beside torchao's QAT.

    python -m benchmarks.qat_overhead                 time, interleaved in one process
    python -m benchmarks.qat_overhead --memory        peak resident memory, one child process each

Same model (all-MiniLM-L6-v2 as a classifier), same batches of 32 x 32 tokens, same optimizer (fused AdamW), float32 and bf16 autocast.
All Linear layers but the classifier are on the grid, int4 in groups of 32; "+ embeddings" puts the embedding rows on int8 as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import nn

from benchmarks._common import interleaved, machine, markdown, median_ratio
from qtrain import registry
from qtrain.grids.affine import Affine
from qtrain.malloc import tune_malloc
from qtrain.peak import peak_rss_bytes
from qtrain.quantizers.qat import Qat
from qtrain.quantizers.torchao_qat import TorchaoQat

BATCH, LENGTH = 32, 32


def variants() -> dict[str, object]:
    """Name -> quantizer, or None for plain fine-tuning."""
    int8_rows = Affine(bits=8, rule="absmax_half", granularity="channel")
    return {
        "plain": None,
        "qtrain QAT": Qat(weight=Affine(rule="signed_absmax")),
        "qtrain QAT, torchao's grid": Qat(weight=Affine(rule="absmax_half")),
        "torchao QAT": TorchaoQat(weight=Affine(rule="absmax_half")),
        "qtrain QAT + embeddings": Qat(weight=Affine(rule="signed_absmax"), embedding=Affine(bits=8, granularity="channel")),
        "torchao QAT + embeddings": TorchaoQat(weight=Affine(rule="absmax_half"), embedding=int8_rows),
        "qtrain QAT + int8 activations": Qat(
            weight=Affine(rule="signed_absmax"), activation=Affine(bits=8, rule="absmax_mlas", granularity="group", group_size=32)
        ),
    }


def float_model() -> tuple[nn.Module, list[str]]:
    """The sample model and the modules its family keeps in float."""
    family = registry.get("model", "sequence_classification")()
    model = family.build(2, 0)
    return model, family.always_float(model)


def stepper(model: nn.Module, quantizer: object, keep: list[str], bf16: bool) -> Callable[[], None]:
    """A training step on a copy of ``model``."""
    model = copy.deepcopy(model).train()
    if quantizer is not None:
        quantizer.prepare(model, keep)  # type: ignore[attr-defined]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(1000, 30000, (BATCH, LENGTH), generator=generator) for _ in range(4)]
    labels = torch.randint(0, 2, (BATCH,), generator=generator)
    state = {"i": 0}

    def step() -> None:
        ids = batches[state["i"] % len(batches)]
        state["i"] += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_time(rounds: int, bf16: bool) -> str:
    """Table of seconds per step and ratios to plain."""
    model, keep = float_model()
    steps = {name: stepper(model, quantizer, keep, bf16) for name, quantizer in variants().items()}
    times = interleaved(steps, rounds)
    rows = [(n, statistics.median(t), median_ratio(times, n, "plain"), median_ratio(times, n, "torchao QAT")) for n, t in times.items()]
    return markdown([f"{'bf16 autocast' if bf16 else 'float32'}", "s/step", "x plain", "x torchao QAT"], rows)


def measure_memory_here(name: str) -> int:
    """Peak resident bytes after a few float32 steps; run in a process of its own."""
    model, keep = float_model()
    step = stepper(model, variants()[name], keep, bf16=False)
    del model
    for _ in range(6):
        step()
    return peak_rss_bytes()


def measure_memory() -> str:
    """Table of peak memory, each variant in a process of its own."""
    peaks = {}
    for name in variants():
        done = subprocess.run([sys.executable, "-m", "benchmarks.qat_overhead", "--only", name], capture_output=True, text=True, check=True)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])
    rows = [(n, peak / 1e9, peak / peaks["plain"]) for n, peak in peaks.items()]
    return markdown(["float32", "peak RSS, GB", "x plain"], rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", help="one variant's peak memory, in bytes")
    args = parser.parse_args()
    tune_malloc()
    if args.only:
        print(measure_memory_here(args.only))
    elif args.memory:
        print(machine(), measure_memory(), sep="\n\n")
    else:
        print(machine(), measure_time(args.rounds, bf16=False), measure_time(args.rounds, bf16=True), sep="\n\n")


if __name__ == "__main__":
    main()
