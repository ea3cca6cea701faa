"""How the codes of one layer are laid out in an ONNX file: which operator holds them, in how many bits, in blocks of what size.

Everything here is exact: codes are moved, padded and bit-packed, scales are repeated, nothing is rounded. What an operator cannot hold
is refused with the nearest grid that it can.

    grid                                   MatMulNBits, GatherBlockQuantized              others
    bits 2 / 3, 4 / 5 to 8                 2 / 4 / 8 bit container                        int4 / int4 / int8
    group of S values                      blocks of the largest power of two from        blocks of S
                                           16 to 256 that divides S, scale repeated
    channel, token, tensor (a whole row)   the block that pads the row least              one scale per row; blocks in
                                                                                          DequantizeLinear
    zero point                             uint8, packed like the codes                   int4 or int8

MatMulNBits and GatherBlockQuantized store unsigned codes, code + 2^(container bits - 1), several per byte, low bits first; their default
zero point is that same offset (onnxruntime, docs/ContribOperators.md).

Shapes: O output features or rows, K values per row, N blocks per row, B bytes per block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from exporters.base import PackedLayer
from qtrain.grids.affine import Affine
from qtrain.grids.base import QuantizedTensor

BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes that both com.microsoft operators and MLAS have kernels for."""

NO_INT8_KERNEL_2_BITS = (16, 256)
"""Blocks of 2-bit codes for which accuracy_level 4 silently computes in float (onnxruntime 1.31; the receipt would find it)."""


@dataclass(frozen=True)
class Layout:
    """Where the codes of one layer go."""

    op: str
    """MatMulNBits, DequantizeLinear, Unpack (Cast and Mul), GatherBlockQuantized, or Gather (8-bit rows)."""
    bits: int
    """Bits per code in the file: 2, 4 or 8."""
    block: int
    """Consecutive values of a row that share a written scale."""
    accuracy_level: int = 0
    """Of MatMulNBits: 0 computes in float32, 4 quantizes each block of the input to int8."""


class Refused(ValueError):
    """The runtime cannot hold this layer; the message says why and what to type."""


def plan(layer: PackedLayer, weights: str) -> Layout:
    """The layout of one layer under the option ``weights``.

    Raises:
        Refused: if no operator holds its grid, or its activation grid.
    """
    grid = layer.quantized.grid
    key = "quantizer.embedding" if layer.kind == "embedding" else "quantizer.weight"
    if not isinstance(grid, Affine):
        nearest = f"affine with {grid.code_bits} bits: set grid@{key}=affine"
        raise Refused(f"ONNX operators hold integers times a scale; the nearest is {nearest}")
    if layer.kind == "embedding":
        return _plan_embedding(layer.quantized, grid, key)
    if weights == "auto":
        weights = _fastest(layer, grid)
    activation = _activation_block(layer, weights)
    return _plan_linear(layer.quantized, grid, key, weights, activation)


def _fastest(layer: PackedLayer, grid: Affine) -> str:
    """The storage that onnxruntime runs fastest with the same numbers (benchmarks/onnx_int4.py).

    Unpacked weights are at float32's speed from few tokens to many. MatMulNBits is the only one with int8 activations, and the only one
    with a container of 2 bits; at hundreds of tokens per call it is some 8 % slower than float32.
    """
    group = _group(grid, layer.quantized.shape[-1])
    two_bits = grid.bits == 2 and (group is None or group % BLOCKS[-1] == 0)
    return "matmul_nbits" if two_bits or getattr(layer, "activation_fake", None) is not None else "unpack"


def _plan_linear(q: QuantizedTensor, grid: Affine, key: str, weights: str, activation: int | None) -> Layout:
    columns, group = q.shape[-1], _group(grid, q.shape[-1])
    bits = _container(grid.bits)
    if weights == "unpack":
        return Layout("Unpack", max(bits, 4), group or columns)
    block = _block(group, columns, activation)
    if weights == "dequantize_linear":
        return Layout("DequantizeLinear", max(bits, 4), block or group or columns)
    if block is None and activation is not None:
        fits = _nearest_group(group or columns, group or columns) or 16
        raise Refused(
            f"its input is quantized in groups of {activation}, which must divide the weight's group of {group}; "
            f"set {key}.group_size={activation}, or quantizer.activation.group_size={fits}"
        )
    if block is None:
        raise Refused(
            f"MatMulNBits holds groups that are a multiple of 16 values, not {group}; {_nearest(group or columns, columns, key)} "
            "(or export.onnx.weights=unpack, which holds any group)"
        )
    if activation is not None and bits == 2 and block in NO_INT8_KERNEL_2_BITS:
        near = 32 if block == 16 else 128
        raise Refused(
            f"MatMulNBits has no int8 kernel for 2-bit codes in blocks of {block} and would compute in float; "
            f"the nearest is {key}.group_size={near} quantizer.activation.group_size={near}, or {key}.bits=4"
        )
    return Layout("MatMulNBits", bits, block, 0 if activation is None else 4)


def _plan_embedding(q: QuantizedTensor, grid: Affine, key: str) -> Layout:
    columns, group = q.shape[-1], _group(grid, q.shape[-1])
    bits = _container(grid.bits)
    if group is None and bits == 8:
        return Layout("Gather", 8, columns)
    block = _block(group, columns, None)
    if block is None:
        nearest = _nearest(group or columns, columns, key)
        raise Refused(f"GatherBlockQuantized holds groups that are a multiple of 16 values, not {group}; {nearest}")
    return Layout("GatherBlockQuantized", bits, block)


def _activation_block(layer: PackedLayer, weights: str) -> int | None:
    """Values per int8 block of the layer's input, or None where it stays in float.

    Raises:
        Refused: if onnxruntime would compute the input on another grid.
    """
    fake = getattr(layer, "activation_fake", None)
    if fake is None:
        return None
    nearest = (
        "the nearest is MatMulNBits at accuracy_level 4: set export.onnx.weights=matmul_nbits quantizer.activation_range=dynamic "
        "quantizer.activation.bits=8 quantizer.activation.rule=absmax_mlas quantizer.activation.granularity=group "
        "quantizer.activation.group_size="
    )
    grid = fake.grid
    size = grid.group_size if isinstance(grid, Affine) and grid.granularity == "group" else 32
    fits = size if size in BLOCKS else 32
    what = f"its input is on {grid.describe()}{' with a static range' if fake.observer is not None else ''}"
    if weights != "matmul_nbits":
        raise Refused(f"{what}, which weights={weights} would compute in float; {nearest}{fits}")
    mlas = isinstance(grid, Affine) and grid.rule == "absmax_mlas" and grid.granularity == "group" and size == fits
    if not mlas or fake.observer is not None:
        raise Refused(f"{what}, which onnxruntime does not compute beside packed weights; {nearest}{fits}, or quantizer.activation=null")
    return size


def _container(bits: int) -> int:
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def _group(grid: Affine, columns: int) -> int | None:
    """Values per group, or None where the whole row shares a scale."""
    return grid.group_size if grid.granularity == "group" and grid.group_size < columns else None


def _block(group: int | None, columns: int, only: int | None) -> int | None:
    """The largest block that divides ``group``; for a whole row the one that pads it least."""
    blocks = [b for b in BLOCKS if only in (None, b)]
    if group is not None:
        return next((b for b in blocks if group % b == 0), None)
    return min(blocks, key=lambda b: (-(-columns // b) * b, -b))


def _nearest_group(group: int, columns: int) -> int | None:
    fitting = [b for b in BLOCKS if columns % b == 0]
    return min(fitting, key=lambda b: abs(math.log2(b / group)), default=None)


def _nearest(group: int, columns: int, key: str) -> str:
    size = _nearest_group(group, columns)
    if size is None:
        return f"the nearest that fits rows of {columns} is one scale per row: set {key}.granularity=channel"
    return f"the nearest is groups of {size}: set {key}.group_size={size}"


def signed_codes(q: QuantizedTensor) -> np.ndarray[Any, Any]:
    """Codes int8 [O, K] on the CPU."""
    return q.codes.detach().cpu().contiguous().numpy()


def block_params(q: QuantizedTensor, block: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Scales float32 [O, N] and zero points int8 [O, N] (None if symmetric): one per block, repeated from the grid's groups."""
    grid, (rows, columns) = q.grid, q.shape
    assert isinstance(grid, Affine)
    starts = torch.arange(0, columns, block)
    index = starts // (_group(grid, columns) or columns)

    def spread(x_RG: torch.Tensor) -> np.ndarray[Any, Any]:
        x_RG = x_RG.detach().cpu().reshape(-1, x_RG.shape[-1])
        return x_RG.expand(rows, -1)[:, index].contiguous().numpy()

    zero = q.params.get("zero_point")
    return spread(q.params["scale"].float()), None if zero is None else spread(zero)


def pack(values: np.ndarray[Any, Any], bits: int, length: int) -> np.ndarray[Any, Any]:
    """Signed codes [O, K], padded with zeros to ``length`` per row, as unsigned codes, low bits first: uint8 [O, length * bits / 8]."""
    offset, per_byte = 1 << (bits - 1), 8 // bits
    assert length % per_byte == 0
    unsigned = np.full((len(values), length), offset, np.uint8)
    unsigned[:, : values.shape[1]] = (values.astype(np.int16) + offset).astype(np.uint8)
    if bits == 8:
        return unsigned
    parts = unsigned.reshape(len(values), -1, per_byte)
    packed = np.zeros(parts.shape[:2], np.uint8)
    for i in range(per_byte):
        packed |= parts[:, :, i] << (bits * i)
    return packed
