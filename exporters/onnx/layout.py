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

What a layer's input is on decides which operators can compute it:

    input                          Linear                                      convolution
    float                          `weights`                                   Unpack
    static, on the graph's edge    QDQ: QGemm, MatMulIntegerToFloat            QDQ: QLinearConv; Unpack where its output is in float
    static, its own                QDQ: MatMulIntegerToFloat                   Unpack: onnxruntime has no integer kernel with float output
    dynamic, one scale             MatMulInteger                               Unpack: ConvInteger is 6 times slower than Conv
    dynamic, in groups             MatMulNBits at accuracy_level 4             refused

Unpack on a quantized input computes in float32 with the same numbers (QuantizeLinear, DequantizeLinear, Conv).

Shapes: O output features or rows, K values per row, N blocks per row, B bytes per block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from exporters.base import PackedLayer
from exporters.onnx.profile import PROFILES, SATURATES_ABOVE, Profile
from qtrain.grids.affine import Affine
from qtrain.grids.base import QuantizedTensor

BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes that both com.microsoft operators and MLAS have kernels for."""

NO_INT8_KERNEL_2_BITS = (16, 256)
"""Blocks of 2-bit codes for which accuracy_level 4 silently computes in float (onnxruntime 1.31; the receipt would find it)."""

STATIC_RULES = ("minmax_onnx", "absmax_onnx")
"""Rules that round x / scale with a division, as QuantizeLinear does."""


@dataclass(frozen=True)
class Layout:
    """Where the codes of one layer go."""

    op: str
    """MatMulNBits, DequantizeLinear, Unpack (Cast and Mul), QDQ (int8, for an integer product), MatMulInteger, GatherBlockQuantized, or
    Gather (8-bit rows)."""
    bits: int
    """Bits per code in the file: 2, 4 or 8."""
    block: int
    """Consecutive values of a row that share a written scale."""
    accuracy_level: int = 0
    """Of MatMulNBits: 0 computes in float32, 4 quantizes each block of the input to int8."""
    input: str = "float"
    """What the layer reads: float, edge (quantized before it), static or dynamic (quantized by itself)."""


class Refused(ValueError):
    """The runtime cannot hold this layer; the message says why and what to type."""


def plan(layer: PackedLayer, weights: str, profile: Profile = PROFILES["x86"]) -> Layout:
    """The layout of one layer under the options ``weights`` and ``profile``.

    Raises:
        Refused: if no operator holds its grid, or its activation grid.
    """
    grid = layer.quantized.grid
    key = "quantizer.embedding" if layer.kind == "embedding" else "quantizer.weight"
    if not isinstance(grid, Affine):
        nearest = f"affine with {grid.code_bits} bits: set grid@{key}=affine"
        raise Refused(f"ONNX operators hold integers times a scale; the nearest is {nearest}")
    if layer.kind == "embedding":
        return _plan_embedding(layer.quantized, grid, key, profile)
    reads = _input(layer)
    if reads in ("static", "dynamic") and _in_groups(layer):
        reads = "blocks"
    if reads == "blocks" and layer.kind == "linear":
        return _plan_blocks(layer, grid, key, weights, profile)
    if reads != "float":
        _check_activation(layer, reads, weights, profile)
    if layer.kind == "conv":
        return _plan_conv(layer, grid, key, reads, profile)
    if reads == "float":
        return _plan_linear(layer.quantized, grid, key, _fastest(layer, grid) if weights == "auto" else weights, None, profile)
    if _group(grid, layer.quantized.shape[-1]) is not None:
        raise Refused(
            f"an integer product has one scale per output feature, and the weight has groups of {grid.group_size}; "
            f"the nearest is {key}.granularity=channel, or quantizer.activation=null"
        )
    if profile.saturates:
        _check_saturation(layer.quantized, key)
    return Layout("MatMulInteger" if reads == "dynamic" else "QDQ", 8, layer.quantized.shape[-1], input=reads)


def plan_activation(activation: Any) -> None:
    """Check that QuantizeLinear and DequantizeLinear compute a static activation.

    Raises:
        Refused: if not, with the nearest that they do.
    """
    grid, nearest = activation.grid, []
    if not isinstance(grid, Affine):
        raise Refused("QuantizeLinear rounds to integers; the nearest is grid@quantizer.activation=int8_activation")
    if grid.granularity != "tensor":
        nearest.append("quantizer.activation.granularity=tensor")
    if grid.bits != 8:
        nearest.append("quantizer.activation.bits=8")
    if grid.rule not in STATIC_RULES:
        nearest.append(f"quantizer.activation.rule={'absmax_onnx' if grid.symmetric else 'minmax_onnx'}")
    if nearest:
        raise Refused(
            f"QuantizeLinear has one scale per tensor, 8 bits and divides by the scale, which {grid.describe()} does not; "
            f"the nearest is {' '.join(nearest)}"
        )


def _input(layer: PackedLayer) -> str:
    """float, edge, static or dynamic."""
    fake = getattr(layer, "activation_fake", None)
    if fake is not None:
        return "static" if hasattr(fake, "params") else "dynamic"
    return "edge" if getattr(layer, "source", None) is not None else "float"


def _in_groups(layer: PackedLayer) -> bool:
    """Whether MatMulNBits is the nearest for the layer's own activation: it, or the weight, is in groups."""
    grid, columns = layer.quantized.grid, layer.quantized.shape[-1]
    activation = layer.activation_fake.grid  # type: ignore[attr-defined]
    grouped = isinstance(grid, Affine) and layer.kind == "linear" and _group(grid, columns) is not None
    return grouped or not isinstance(activation, Affine) or activation.granularity == "group" or activation.rule == "absmax_mlas"


def _check_activation(layer: PackedLayer, reads: str, weights: str, profile: Profile) -> None:
    """Refuse activations of an integer product that onnxruntime has not; those on edges are checked where they stand."""
    fake: Any = getattr(layer, "activation_fake", None)
    grid: Any = None if fake is None else fake.grid
    if weights not in ("auto", "dequantize_linear"):
        what = f"on {grid.describe()}" if grid is not None else "quantized on the graph's edge"
        raise Refused(f"its input is {what}, which weights={weights} would compute in float; the nearest is export.onnx.weights=auto")
    if reads == "static":
        try:
            plan_activation(fake)
        except Refused as why:
            raise Refused(f"its input: {why}, or quantizer.activation=null") from None
    if reads != "dynamic":
        return
    if profile.fixed:
        raise Refused(
            "its input has a dynamic range, and no mobile provider has DynamicQuantizeLinear; set quantizer.activation_range=static"
        )
    if grid.granularity != "tensor" or grid.rule != "minmax_onnx" or grid.bits != 8:
        raise Refused(
            f"its input is on {grid.describe()} with a dynamic range, and onnxruntime's DynamicQuantizeLinear has one scale and zero point "
            "for the whole tensor; the nearest is grid@quantizer.activation=int8_activation (8 bits, granularity=tensor, rule=minmax_onnx)"
        )


def _check_saturation(q: QuantizedTensor, key: str) -> None:
    largest = int(q.codes.to(torch.int16).abs().max()) if q.codes.numel() else 0
    if largest > SATURATES_ABOVE or "zero_point" in q.params:
        raise Refused(
            f"profile=x86_avx2 is for processors whose products saturate when weights have codes beyond {SATURATES_ABOVE} or zero points "
            f"(here codes up to {largest}); set {key}.bits=7 {key}.rule=absmax, or export.onnx.profile=x86 for those with VNNI"
        )


def _plan_conv(layer: PackedLayer, grid: Affine, key: str, reads: str, profile: Profile) -> Layout:
    columns = math.prod(layer.quantized.shape[1:])
    if grid.granularity not in ("channel", "tensor"):
        raise Refused(
            f"a convolution's weight has one scale per output channel, not per {grid.granularity}; the nearest is {key}.granularity=channel"
        )
    if reads == "blocks":
        raise Refused(
            "a convolution's input has one scale per tensor; the nearest is "
            "quantizer.activation.granularity=tensor quantizer.activation.rule=minmax_onnx"
        )
    bias_on_grid = getattr(layer, "bias", None) is None or getattr(layer, "bias_codes", None) is not None
    if reads == "edge" and bias_on_grid:
        if not grid.symmetric:
            raise Refused(f"QLinearConv has one zero point for all output channels; the nearest is {key}.rule=absmax")
        if profile.saturates:
            _check_saturation(layer.quantized, key)
        return Layout("QDQ", 8, columns, input=reads)
    bits = _container(grid.bits)
    return Layout("Unpack", max(bits, 4), columns, input=reads)


def _plan_blocks(layer: PackedLayer, grid: Affine, key: str, weights: str, profile: Profile) -> Layout:
    weights = "matmul_nbits" if weights == "auto" else weights
    activation = _activation_block(layer, weights)
    return _plan_linear(layer.quantized, grid, key, weights, activation, profile)


def _fastest(layer: PackedLayer, grid: Affine) -> str:
    """The storage that onnxruntime runs fastest with the same numbers (benchmarks/onnx_int4.py).

    Unpacked weights are at float32's speed from few tokens to many. MatMulNBits is the only one with int8 activations, and the only one
    with a container of 2 bits; at hundreds of tokens per call it is some 8 % slower than float32.
    """
    group = _group(grid, layer.quantized.shape[-1])
    two_bits = grid.bits == 2 and (group is None or group % BLOCKS[-1] == 0)
    return "matmul_nbits" if two_bits else "unpack"


def _plan_linear(q: QuantizedTensor, grid: Affine, key: str, weights: str, activation: int | None, profile: Profile) -> Layout:
    columns, group = q.shape[-1], _group(grid, q.shape[-1])
    bits = _container(grid.bits)
    if weights == "matmul_nbits" and not profile.contrib:
        raise Refused(_standard_only("MatMulNBits", profile, f"{key}.bits=4 quantizer.activation=null export.onnx.weights=unpack"))
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


def _standard_only(op: str, profile: Profile, nearest: str) -> str:
    return f"profile={profile.name} holds standard operators only, not com.microsoft.{op}; the nearest is {nearest}"


def _plan_embedding(q: QuantizedTensor, grid: Affine, key: str, profile: Profile) -> Layout:
    columns, group = q.shape[-1], _group(grid, q.shape[-1])
    bits = _container(grid.bits)
    if group is None and bits == 8:
        return Layout("Gather", 8, columns)
    if not profile.contrib:
        raise Refused(_standard_only("GatherBlockQuantized", profile, f"{key}.bits=8 {key}.granularity=channel"))
    block = _block(group, columns, None)
    if block is None:
        nearest = _nearest(group or columns, columns, key)
        raise Refused(f"GatherBlockQuantized holds groups that are a multiple of 16 values, not {group}; {nearest}")
    return Layout("GatherBlockQuantized", bits, block)


def _activation_block(layer: PackedLayer, weights: str) -> int:
    """Values per int8 block of the layer's input.

    Raises:
        Refused: if onnxruntime would compute the input on another grid.
    """
    fake: Any = layer.activation_fake  # type: ignore[attr-defined]
    nearest = (
        "the nearest is MatMulNBits at accuracy_level 4: set export.onnx.weights=matmul_nbits quantizer.activation_range=dynamic "
        "quantizer.activation.bits=8 quantizer.activation.rule=absmax_mlas quantizer.activation.granularity=group "
        "quantizer.activation.group_size="
    )
    grid = fake.grid
    size = grid.group_size if isinstance(grid, Affine) and grid.granularity == "group" else 32
    fits = size if size in BLOCKS else 32
    static = hasattr(fake, "params")
    what = f"its input is on {grid.describe()}{' with a static range' if static else ''}"
    if weights != "matmul_nbits":
        raise Refused(f"{what}, which weights={weights} would compute in float; {nearest}{fits}")
    mlas = isinstance(grid, Affine) and grid.rule == "absmax_mlas" and grid.granularity == "group" and size == fits
    if not mlas or static:
        raise Refused(
            f"{what}, which onnxruntime does not compute beside weights in groups; {nearest}{fits}, "
            "or quantizer.weight.granularity=channel grid@quantizer.activation=int8_activation, or quantizer.activation=null"
        )
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
    """Codes int8 in their own shape, on the CPU."""
    return q.codes.detach().cpu().contiguous().numpy()


def block_params(q: QuantizedTensor, block: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Scales float32 [O, N] and zero points int8 [O, N] (None if symmetric): one per block, repeated from the grid's groups."""
    grid, rows, columns = q.grid, q.shape[0], math.prod(q.shape[1:])
    assert isinstance(grid, Affine)
    starts = torch.arange(0, columns, block)
    index = starts // ((_group(grid, columns) if len(q.shape) == 2 else None) or columns)

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
