"""ggml's grids: the block types of llama.cpp's GGUF files, to the bit.

    Ggml(type="q4_0")                 weights; q4_0 q4_1 q5_0 q5_1 q8_0, q2_k q3_k q4_k q5_k q6_k, f16 bf16
    GgmlActivation(type="q8_0")       what llama.cpp's kernels make of a layer's input (`activation.py`)

    blocks.py         blocks of 32 values under a float16 scale (and min)
    floats.py         16-bit floats
    superblocks.py    the K-types: 256 values in sub-blocks, whose scales are 4- to 8-bit codes under float16 super-scales
    search.py         llama.cpp's weighted least-squares searches for scales, vectorised; search_piece.py its arithmetic
    block_grid.py     rows cut into blocks and pieces
    block_type.py     what a type is

`encode` without parameters gives the codes that llama.cpp's own quantizer gives (for K-types: codes at least as near to the weight),
`decode` the floats that its dequantize_row functions give, `pack` the bytes of the file. A GGUF that holds `pack(encode(w))` therefore
computes with the weight that training saw.

**Decoded values are not always a fixed point**: whether encode gives codes and scales back depends on the type in which they were saved.
`check_dtype` says so, and why:

    float32     Q4_0, Q5_0 and Q8_0 for every float16 scale; Q4_1 and Q5_1 too, but for blocks whose min is ten thousands of their scale
    float16     Q4_0 and Q5_0, whose peak is a power of two times the scale; but 0.7 % of Q8_0's scales change, and more of Q4_1's
    bfloat16    none: it keeps 8 bits of a value, so nearly every scale changes
    any         K-types search their scales anew: keep their codes, or their parameters, rather than decoded values

A run keeps codes, never decoded values. Where it has such values in a shorter type all the same it says so: weights of a 16-bit model
(`prepare.lost_by_dtype`), and those that a GGUF file was read into (`gguf_source.lost_by_dtype`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtrain.grids.ggml import blocks, floats, superblocks
from qtrain.grids.ggml.block_grid import BlockGrid
from qtrain.grids.ggml.block_type import BlockType
from qtrain.registry import register

if TYPE_CHECKING:
    import torch

TYPES: dict[str, BlockType] = {**blocks.TYPES, **superblocks.TYPES, **floats.TYPES}
"""By name."""

FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What llama-quantize takes instead for a row that 256 does not divide; where 32 does not either: f16."""


def fallback(name: str, columns: int) -> str:
    """The type that llama-quantize gives to rows of ``columns`` values where ``name`` is wanted."""
    for candidate in (name, FALLBACKS.get(name, name)):
        if columns % TYPES[candidate].block == 0:
            return candidate
    return "f16"


@register("grid", "ggml")
@dataclass
class Ggml(BlockGrid):
    """One of llama.cpp's block types: q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k f16 bf16."""

    type: str = "q4_0"
    """The block type, lower case."""

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(
                f"type is {self.type!r}; ggml's types here: {', '.join(TYPES)}. Set quantizer.weight.type=q4_0, say "
                "(or under quantizer.embedding, whichever it is)."
            )

    @property
    def block_type(self) -> BlockType:
        return TYPES[self.type]

    def describe(self) -> str:
        return f"ggml {self.type}"

    def check_shape(self, shape: tuple[int, ...]) -> str | None:
        columns = shape[-1] if shape else 1
        if columns % self.block == 0:
            return None
        other = fallback(self.type, columns)
        return (
            f"blocks of {self.block} values, which {self.type} has, do not divide its rows of {columns}; llama.cpp takes {other} for them. "
            f"Set type={other}, take a mix, which does so by itself (q4_k_m, q4_0, …), or keep_float=[NAME]"
        )

    def check_dtype(self, dtype: torch.dtype) -> str | None:
        """Why values of this grid that are saved in ``dtype`` and encoded again change, or None if codes and scales come back."""
        name = str(dtype).removeprefix("torch.")
        survives = self.block_type.survives
        if name in survives:
            return None
        if self.searches:
            return f"{self.type} searches its scales anew in decoded values: keep the codes, or encode on the stored parameters"
        held = "what the scales of {} can be read from" if self.block_type.param_bits else "every value of {}"
        return f"{name} does not hold {held.format(self.type)}: save {' or '.join(survives)}"


from qtrain.grids.ggml.activation import GgmlActivation  # noqa: E402

__all__ = ["FALLBACKS", "TYPES", "Ggml", "GgmlActivation", "fallback"]
