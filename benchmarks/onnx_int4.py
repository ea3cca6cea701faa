"""Size and latency of int4 ONNX files in onnxruntime, relative to the float32 file of the same model.

Run: python benchmarks/onnx_int4.py MODEL_FOLDER [--rounds 40] [--quick]      (10 minutes on two busy cores; --quick: 5)

Every file is written by the ONNX exporter and timed with the session settings of the receipt. All sessions take turns within a round, so
that a busy machine slows them alike; the table has each file's median over rounds, and the median of its per-round ratio to the unfused
float file (below 1 is faster). glibc is told to keep freed memory first (`qtrain.malloc`): pages that are returned are faulted in again at
every run, which costs more than the difference that is measured.

Weights are int4 signed_absmax (all Linear but the classifier), embeddings int8 per row, and int4 in groups of 64 where the name says so.
"a8" quantizes activations to int8 in the groups of the weight (accuracy_level 4).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from exporters.base import ExportJob
from exporters.onnx import OnnxExport
from exporters.onnx.runtime import interleaved, open_session, random_inputs, threads
from qtrain.grids.affine import Affine
from qtrain.malloc import tune_malloc
from qtrain.prepare import convert, prepare

LENGTH = 64


@dataclass(frozen=True)
class Case:
    """One file to write."""

    weights: str = "float"
    group: int = 0
    activations: bool = False
    fuse: bool = True
    embedding: str = "int8"

    @property
    def name(self) -> str:
        parts = [self.weights] + ([f"g{self.group}"] if self.group else []) + ["a8"] * self.activations
        return " ".join([*parts, *(["int4 embeddings"] if self.embedding == "int4" else []), "fused" if self.fuse else "unfused"])


def cases(quick: bool) -> list[Case]:
    """Float first, unfused, since ratios are to that."""
    found = [Case(fuse=False), Case(fuse=True)]
    for group in (32,) if quick else (32, 64, 128):
        for fuse in (False, True):
            found += [Case(w, group, False, fuse) for w in ("matmul_nbits", "dequantize_linear", "unpack")]
            found.append(Case("matmul_nbits", group, True, fuse))
    return [*found, Case("matmul_nbits", 64, embedding="int4"), Case("unpack", 64, embedding="int4")]


def build(float_model: nn.Module, case: Case) -> nn.Module:
    """A converted copy of the model."""
    model = copy.deepcopy(float_model)
    if case.weights == "float":
        return model
    modules = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)) and n != "classifier"}
    embedding = Affine(bits=8, granularity="channel") if case.embedding == "int8" else Affine(bits=4, rule="signed_absmax", group_size=64)
    activation = Affine(bits=8, rule="absmax_mlas", group_size=case.group) if case.activations else None
    prepare(model, modules, Affine(bits=4, rule="signed_absmax", group_size=case.group), embedding, activation)
    return convert(model)


def write(float_model: nn.Module, case: Case, folder: Path) -> Path:
    """The file, written by the exporter (no receipt: tests make those)."""
    from exporters.onnx.write import Settings, write_model

    inputs = {"input_ids": torch.randint(0, 1000, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    if case.weights == "float":
        written = write_model(float_model, path, inputs, Settings(512, 21, case.fuse), {}, {})
        assert not written.fallback, written.fallback
        return path
    model = build(float_model, case)
    empty = torch.zeros(0, 2)
    job = ExportJob(model, inputs, [], empty, lambda x, y: {}, folder, max_length=512, vocab_size=1000)
    artefact = OnnxExport(weights=case.weights, fuse=case.fuse).write(job, folder)
    assert not artefact.fallbacks, artefact.fallbacks
    return artefact.path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of a transformers sequence classifier, or encoder")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="groups of 32 only")
    given = parser.parse_args()
    tune_malloc()
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    float_model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2).eval()
    with tempfile.TemporaryDirectory() as temporary:
        paths = {}
        for i, case in enumerate(cases(given.quick)):
            paths[case.name] = write(float_model, case, Path(temporary) / str(i))
            print(f"wrote {case.name}: {paths[case.name].stat().st_size / 1e6:.1f} MB", flush=True)
        sessions = {name: open_session(path) for name, path in paths.items()}
        example = {"input_ids": torch.zeros(2, 2, dtype=torch.int64), "attention_mask": torch.ones(2, 2, dtype=torch.int64)}
        times = {b: interleaved(sessions, random_inputs(example, b, LENGTH, 30000), given.rounds) for b in (1, 8)}
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    print_table(sizes, times)


def print_table(sizes: dict[str, int], times: dict[int, dict[str, list[float]]]) -> None:
    """Markdown; ratios are to the first row."""
    first = next(iter(sizes))
    print(f"\n{threads()} threads, medians of {len(times[1][first])} interleaved runs, sequence length {LENGTH}\n")
    print("| file | MB | float / file | batch 1, ms | ratio | batch 8, ms | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, size in sizes.items():
        cells = [name, f"{size / 1e6:.1f}", f"{sizes[first] / size:.2f}"]
        for batch in (1, 8):
            ratios = [a / b for a, b in zip(times[batch][name], times[batch][first], strict=True)]
            cells += [f"{median(times[batch][name]):.2f}", f"{median(ratios):.2f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
