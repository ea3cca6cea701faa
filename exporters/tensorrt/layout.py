"""Which grids TensorRT holds, and how their codes lie in the file; everything else is refused with the nearest that it holds.

    weights       DequantizeLinear(codes, scales) and nothing before it: TensorRT knows a quantized constant only there
        int8      2 to 8 bits in an int8 container, symmetric, scales > 0, one per tensor or per output channel (embeddings: per row)
        int4      4 bits or fewer, of a Linear with float activations, in blocks of 64 or 128 inputs: TensorRT's weight-only mode
    activations   QuantizeLinear + DequantizeLinear, 8 bits, symmetric, static, one scale per tensor, codes round(x / scale)
    bias          float

The codes are copied, scales are repeated where a group is longer than a block, nothing is rounded.

Sources: NVIDIA TensorRT documentation, "Working with Quantized Types" and "Explicit Quantization"; the checks of its ONNX parser
(onnx-tensorrt, onnxOpImporters.cpp, QuantDequantLinearHelper); TensorRT-RTX 1.7.1, whose builder refuses int8 constants anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from exporters.base import PackedLayer
from exporters.onnx.layout import Refused
from qtrain.grids.affine import Affine

BLOCKS = (128, 64)
"""Sizes of TensorRT's int4 blocks."""


@dataclass(frozen=True)
class Layout:
    """Where the codes of one layer go."""

    bits: int = 8
    """Bits of the container: 8 or 4."""
    block: int = 0
    """Consecutive inputs that share a written scale; 0 where the scale is per tensor or channel."""


def plan(layer: PackedLayer) -> Layout:
    """The layout of one layer.

    Raises:
        Refused: if TensorRT cannot hold its grid, or the grid of its input.
    """
    grid, key = layer.quantized.grid, "quantizer.embedding" if layer.kind == "embedding" else "quantizer.weight"
    if not isinstance(grid, Affine):
        raise Refused(f"TensorRT holds integers times a scale; the nearest is grid@{key}=affine {key}.granularity=channel")
    if not grid.symmetric:
        raise Refused(f"TensorRT has no zero points; the nearest is {key}.rule=absmax")
    if grid.rule in ("signed_absmax", "mse"):
        raise Refused(f"scales of rule {grid.rule} have a sign, and TensorRT's are positive; the nearest is {key}.rule=absmax")
    activation = getattr(layer, "activation_fake", None)
    if activation is not None and (why := refused_activation(activation)):
        raise Refused(f"its input: {why}")
    on_codes = activation is not None or getattr(layer, "source", None) is not None
    grouped = _grouped(layer, grid)
    block = _block(layer, grid) if layer.kind == "linear" and grid.bits <= 4 and not on_codes else 0
    if block:
        return Layout(4, block)
    if not grouped:
        return Layout()
    if layer.kind != "linear":
        raise Refused(f"TensorRT has groups in the weights of Linears only; the nearest is {key}.granularity=channel")
    if grid.bits > 4:
        raise Refused(f"TensorRT has groups of 4-bit codes, not of {grid.bits}-bit ones; the nearest is {key}.granularity=channel")
    if on_codes:
        raise Refused(
            f"TensorRT multiplies grouped weights with float activations only; the nearest is {key}.granularity=channel, "
            "or quantizer.activation=null"
        )
    columns = layer.quantized.shape[1]
    fits = next((b for b in reversed(BLOCKS) if columns % b == 0), None)
    nearest = f"{key}.group_size={fits}" if fits else f"{key}.granularity=channel (64 does not divide rows of {columns})"
    raise Refused(f"TensorRT's int4 blocks have 64 or 128 values, not {grid.group_size}; the nearest is {nearest}")


def _block(layer: PackedLayer, grid: Affine) -> int:
    """The largest int4 block that a Linear's scales are constant in, 0 if there is none."""
    columns = layer.quantized.shape[1]
    size = grid.group_size if _grouped(layer, grid) else columns
    return next((b for b in BLOCKS if size % b == 0 and columns % b == 0), 0)


def _grouped(layer: PackedLayer, grid: Affine) -> bool:
    if grid.granularity in ("tensor", "channel"):
        return False
    shape = layer.quantized.shape
    if grid.granularity == "token":
        return len(shape) > 2
    return grid.group_size < shape[-1] or len(shape) > 2


def refused_activation(activation: Any) -> str:
    """Why TensorRT cannot compute this activation, and the nearest that it can; empty where it can."""
    grid, nearest = activation.grid, []
    if not isinstance(grid, Affine):
        return "TensorRT quantizes activations to integers; the nearest is grid@quantizer.activation=affine quantizer.activation.bits=8"
    dynamic = not hasattr(activation, "params") and getattr(activation, "observer", None) is None
    if dynamic:
        nearest.append("quantizer.activation_range=static")
    if grid.granularity != "tensor":
        nearest.append("quantizer.activation.granularity=tensor")
    if grid.bits != 8:
        nearest.append("quantizer.activation.bits=8")
    if grid.rule != "absmax_onnx":
        nearest.append("quantizer.activation.rule=absmax_onnx")
    if not nearest:
        return ""
    what = f"{grid.describe()}{' with a scale found at run time' if dynamic else ''}"
    return f"TensorRT has one fixed scale per tensor, 8 bits and no zero point, not {what}; the nearest is {' '.join(nearest)}"
