"""README's support matrix, generated from the registries, so that it cannot be out of date: a test regenerates it.

python -m qtrain.matrix README.md            write it between the markers
python -m qtrain.matrix --check README.md    fail if it would change
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtrain import registry
from qtrain.activations import FakeActivation, QuantizedActivation
from qtrain.grids.affine import Affine, Int8, Int8Activation
from qtrain.grids.base import Grid
from qtrain.grids.codebook import Fp4, Nf2, Nf3, Nf4
from qtrain.grids.ggml import TYPES, Ggml
from qtrain.grids.ggml.activation import GgmlActivation
from qtrain.layers import Geometry, QuantizedConv, QuantizedEmbedding, QuantizedLinear

START, END = "<!-- support matrix: python -m qtrain.matrix README.md -->", "<!-- end of support matrix -->"

CASES: list[tuple[str, str, Grid, Grid | None, bool]] = [
    *[(f"INT{b} weights, group 32", "linear", Affine(bits=b, rule="signed_absmax"), None, False) for b in range(2, 9)],
    ("INT4 weights, group 128, absmax", "linear", Affine(group_size=128), None, False),
    ("INT4 weights, group 128, asymmetric", "linear", Affine(rule="minmax", group_size=128), None, False),
    ("INT4 weights, per channel", "linear", Affine(granularity="channel"), None, False),
    ("INT4 weights, group 24", "linear", Affine(group_size=24), None, False),
    (
        "INT4 weights + INT8 activations of MLAS, group 32",
        "linear",
        Affine(rule="signed_absmax"),
        Affine(bits=8, rule="absmax_mlas"),
        False,
    ),
    ("INT4 weights + INT8 activations per token", "linear", Affine(), Affine(bits=8, granularity="token"), False),
    *[
        (f"INT{bits} weights per channel + {title} INT8 activations, {name}", kind, Int8(bits=bits), Int8Activation(rule=rule), static)
        for kind, name in (("linear", "Linear"), ("conv", "convolution"))
        for bits, title, rule, static in (
            (8, "static", "minmax_onnx", True),
            (8, "static symmetric", "absmax_onnx", True),
            (4, "static", "minmax_onnx", True),
            (8, "dynamic", "minmax_onnx", False),
        )
    ],
    *[(f"ggml's {kind.upper()}", "linear", Ggml(type=kind), None, False) for kind in TYPES],
    ("ggml's Q4_0 + the 8-bit inputs of llama.cpp's kernels", "linear", Ggml(type="q4_0"), GgmlActivation(), False),
    ("INT4 weights, group 32, float16 scales", "linear", Affine(rule="signed_absmax", scale_dtype="float16"), None, False),
    ("bitsandbytes' NF4, double-quantized scales", "linear", Nf4(), None, False),
    ("bitsandbytes' NF4, float32 scales", "linear", Nf4(double_quant=False), None, False),
    ("bitsandbytes' FP4, double-quantized scales", "linear", Fp4(), None, False),
    *[(f"normal floats of {g.code_bits} bits", "linear", g, None, False) for g in (Nf3(), Nf2())],
    ("ggml's Q6_K embeddings", "embedding", Ggml(type="q6_k"), None, False),
    ("INT8 embedding rows", "embedding", Affine(bits=8, granularity="channel"), None, False),
    ("INT4 embeddings, group 64", "embedding", Affine(rule="signed_absmax", group_size=64), None, False),
]
"""What is asked of every exporter: a title, the kind of layer, its weight grid, its activation grid, and whether its range is static."""


def layer(kind: str, weight: Grid, activation: Grid | None, static: bool) -> nn.Module:
    """A model of one converted layer, 768 wide (a convolution: 768 channels, 1 x 1)."""
    q = weight.encode(torch.linspace(-1, 1, 768 * 32).reshape(32, 768, *([1, 1] if kind == "conv" else [])))
    if kind == "embedding":
        return nn.Sequential(QuantizedEmbedding(q))
    reads: FakeActivation | QuantizedActivation | None = None
    if activation is not None:
        reads = QuantizedActivation(activation, activation.choose(torch.linspace(-1, 2, 9))) if static else FakeActivation(activation)
    if kind == "conv":
        return nn.Sequential(QuantizedConv(q, None, Geometry((1, 1), (0, 0), (1, 1), 1), reads))
    return nn.Sequential(QuantizedLinear(q, None, reads))


def exporter_table() -> str:
    """Grid x exporter: yes, the options that it takes, or no."""
    exporters = registry.entries("export")
    lines = ["| grid | " + " | ".join(f"`export=[{e.name}]`" for e in exporters) + " |", "|---" * (len(exporters) + 1) + "|"]
    for title, kind, weight, activation, static in CASES:
        model = layer(kind, weight, activation, static)
        cells = [_held(e.cls, model) for e in exporters]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _held(exporter: Any, model: nn.Module) -> str:
    """Whether an exporter holds ``model``: as it is, with its widest options, or not."""
    if not exporter().refusals(model):
        return "yes"
    widest = exporter.widest
    return ", ".join(f"`{k}={v}`" for k, v in widest.items()) if widest and not exporter(**widest).refusals(model) else "no"


def options_table() -> str:
    """Every registered option with its line."""
    lines = ["| option | what |", "|---|---|"]
    for group in registry.PACKAGES:
        lines += [f"| `{group}={entry.name}` | {entry.summary} |" for entry in registry.entries(group)]
    return "\n".join(lines)


def generate() -> str:
    """The text between the markers."""
    return f"{START}\n\n{options_table()}\n\n{exporter_table()}\n\n{END}"


def replaced(text: str) -> str:
    """``text`` with a fresh matrix.

    Raises:
        ValueError: if the markers are missing.
    """
    if START not in text or END not in text:
        raise ValueError(f"the file has no support matrix; put these two lines where it belongs:\n{START}\n{END}")
    head, _, rest = text.partition(START)
    return head + generate() + rest.partition(END)[2]


def main() -> None:
    """Write or check the file named on the command line."""
    path = Path(sys.argv[-1])
    old = path.read_text()
    new = replaced(old)
    if "--check" in sys.argv:
        sys.exit(0 if old == new else f"{path}: the support matrix is out of date; run python -m qtrain.matrix {path}")
    path.write_text(new)


if __name__ == "__main__":
    main()
