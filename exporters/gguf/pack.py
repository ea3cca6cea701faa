"""Which ggml type holds the codes of a layer, and the bytes they become.

Nothing is rounded here: what a type cannot hold exactly is refused. A layer on grid `ggml` has its type already. A layer on grid `affine`
fits a type of 32-blocks if its codes and scales do (value by value, the same float32 product):

    symmetric             code * scale                   q4_0 for 2 to 4 bits, q5_0 for 5, q8_0 for 6 to 8
    with zero points      (code - zero point) * scale    q4_1 for 4 bits, q5_1 for 5, where every -(zero point) * scale is a float16 number;
                                                         otherwise the difference as a code: q5_0 for 2 to 4 bits, q8_0 for 5 to 7

Groups are whole multiples of 32 values (a row, with one scale per row or tensor, is one), scales are float16 numbers: scale_dtype=float16.

Shapes: R rows, I values per row, B blocks per row, b bytes per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporters.base import PackedLayer
from qtrain.grids.affine import Affine
from qtrain.grids.base import QuantizedTensor
from qtrain.grids.ggml import Ggml, GgmlActivation

SYMMETRIC = {2: "q4_0", 3: "q4_0", 4: "q4_0", 5: "q5_0", 6: "q8_0", 7: "q8_0", 8: "q8_0"}
"""Bits of a grid -> the smallest type whose codes are at least as wide."""
WITH_MIN = {4: ("q4_1", 8), 5: ("q5_1", 16)}
"""Bits -> type with a min, and what its unsigned codes have more."""
DIFFERENCES = {2: "q5_0", 3: "q5_0", 4: "q5_0", 5: "q8_0", 6: "q8_0", 7: "q8_0"}
"""Bits -> type that holds code minus zero point."""
BLOCK = 32
PIECE = 1 << 22
"""Values that are packed at once."""

FLOAT_ONLY = ("token_types.weight",)
"""Tensors that llama.cpp adds to activations, where it has no kernel for blocks."""


class Refused(ValueError):
    """GGUF cannot hold this layer; the message says why and what to type."""


@dataclass(frozen=True)
class Packed:
    """A layer's weight as a file has it."""

    type: str
    """Lower-case name of a ggml type."""
    q: QuantizedTensor
    """On grid `ggml` of that type."""


def refusal(layer: PackedLayer, tensor: str = "") -> str:
    """Why GGUF cannot hold a converted layer, the nearest that it can, and what to type; empty where it can."""
    try:
        plan(layer, tensor)
    except Refused as why:
        return str(why)
    return ""


def plan(layer: PackedLayer, tensor: str = "") -> Packed:
    """The type of one converted layer, and its codes on that type's grid.

    Args:
        tensor: its GGUF name.

    Raises:
        Refused: if no type holds it exactly, with the nearest and what would be lost.
    """
    q, key = layer.quantized, "quantizer.embedding" if layer.kind == "embedding" else "quantizer.weight"
    if layer.kind not in ("linear", "embedding"):
        raise Refused(f"llama.cpp's graphs have no quantized {layer.kind}; leave it in float: quantizer.keep_float=[NAME]")
    if getattr(layer, "inverse_smoothing", None) is not None:
        raise Refused(
            "its input is scaled per channel, and llama.cpp multiplies nothing before a product; use quantizer=rtn, or fold the scales"
        )
    if tensor in FLOAT_ONLY:
        raise Refused(
            "llama.cpp adds it to activations and reads it as float; leave it in float: quantizer.keep_float=['*token_type_embeddings']"
        )
    activation = getattr(layer, "activation_fake", None)
    if activation is not None and not isinstance(activation.grid, GgmlActivation):
        raise Refused(
            f"its input is on {activation.grid.describe()}, and llama.cpp rounds inputs by a rule of its own; "
            "the nearest is grid@quantizer.activation=ggml_activation, or quantizer.activation=null"
        )
    if isinstance(q.grid, Ggml):
        return Packed(q.grid.type, q)
    if isinstance(q.grid, Affine):
        return _affine(q, q.grid, key)
    nearest = next(t for t in ("q4_0", "q5_0", "q8_0") if q.grid.code_bits <= int(t[1]) or t == "q8_0")
    raise Refused(
        f"GGUF holds ggml's types only, not {q.grid.describe()}; the nearest is grid@{key}=ggml {key}.type={nearest}, "
        "whose values are others: train or calibrate on it"
    )


def pack(packed: Packed, rows: Tensor | None = None) -> Tensor:
    """The bytes of the file, uint8 [R, bytes per row], for all rows or those of index ``rows``; packed in pieces."""
    q = packed.q
    grid: Any = q.grid
    count = len(q.codes) if rows is None else len(rows)
    out = torch.empty((count, grid.row_bytes(q.shape[-1])), dtype=torch.uint8)
    step = max(1, PIECE // q.shape[-1])
    for start in range(0, count, step):
        piece: Any = slice(start, start + step) if rows is None else rows[start : start + step].to(q.codes.device)
        part = QuantizedTensor(grid, q.codes[piece], {name: value[piece] for name, value in q.params.items()})
        out[start : start + step] = grid.pack(part).cpu()
    return out


def _affine(q: QuantizedTensor, grid: Affine, key: str) -> Packed:
    nearest = SYMMETRIC[grid.bits] if grid.symmetric else WITH_MIN.get(grid.bits, ("q8_0",))[0]
    other = f"the nearest is grid@{key}=ggml {key}.type={nearest}"
    columns = q.shape[-1]
    group = grid.group_size if grid.granularity == "group" and grid.group_size < columns else columns
    if group % BLOCK or columns % BLOCK:
        raise Refused(
            f"ggml's blocks have {BLOCK} values, which do not divide groups of {group} in rows of {columns}; set {key}.group_size=32"
        )
    scale_RB = _per_block(q.params["scale"].float(), q.shape, group)
    if not bool((scale_RB.half().float() == scale_RB).all()):
        off = float(((scale_RB.half().float() - scale_RB) / scale_RB).abs().max())
        raise Refused(
            f"GGUF stores float16 scales, and {grid.describe()} has {grid.scale_dtype} ones: rounding them would change values by up to "
            f"{off:.1g} of themselves. Set {key}.scale_dtype=float16"
        )
    if "zero_point" not in q.params:
        return Packed(SYMMETRIC[grid.bits], QuantizedTensor(Ggml(SYMMETRIC[grid.bits]), q.codes, {"scale": scale_RB}))
    zero_RB = _per_block(q.params["zero_point"].float(), q.shape, group)
    if grid.bits in WITH_MIN:
        kind, offset = WITH_MIN[grid.bits]
        min_RB = -(zero_RB + offset) * scale_RB
        if bool((min_RB.half().float() == min_RB).all()):
            return Packed(kind, QuantizedTensor(Ggml(kind), q.codes + offset, {"scale": scale_RB, "min": min_RB + 0.0}))
    if grid.bits not in DIFFERENCES:
        raise Refused(f"no ggml type has 8-bit codes with a zero point; {other}, or {key}.rule=absmax")
    kind = DIFFERENCES[grid.bits]
    codes = (q.codes.reshape(*zero_RB.shape, BLOCK) - zero_RB.unsqueeze(-1).to(torch.int8)).reshape(q.shape)
    return Packed(kind, QuantizedTensor(Ggml(kind), codes, {"scale": scale_RB}))


def _per_block(x: Tensor, shape: tuple[int, ...], group: int) -> Tensor:
    """A parameter of groups, channels or the tensor for each block of 32: [R, B]."""
    rows, blocks = shape[0], shape[-1] // BLOCK
    return x.repeat_interleave(group // BLOCK, -1).expand(rows, blocks).contiguous()
