"""What llama.cpp's CPU kernels make of a layer's input: whole numbers of 8 bits, block by block along the last dimension.

llama.cpp multiplies quantized weights with quantized activations. Which type they get follows from the weight's:

    q4_0 q5_0 q8_0             q8_0      blocks of 32, float16 scale
    q4_1 q5_1                  q8_1      the same codes and scale, and the sum of the codes (which no value depends on): q8_0 here
    q2_k q3_k q4_k q5_k q6_k   q8_k      blocks of 256, float32 scale
    f16 bf16                             the weight's own type: no integers

    q8_0    d = absmax / 127    code = round(x * (127 / absmax))    value = code * h(d)      h rounds to float16
    q8_k    i = -127 / peak     code = min(127, round(i * x))       value = code * (1 / i)   peak: first of largest magnitude, signed

round is half to even. This differs from the *weight* type q8_0 (`blocks.py`), which rounds x * (1 / d) half away from zero.

These are the functions quantize_row_q8_0 and quantize_row_q8_K of llama.cpp's x86 kernels with AVX or later (ggml-cpu/arch/x86/quants.c),
and of those that quantize four rows at once for re-packed weights (repack.cpp), which differ in one case: where a block's peak occurs
with both signs, their q8_k takes the positive one, which mirrors the block. Other builds: ARM NEON's q8_0 multiplies with 1 / d instead
of 127 / absmax, and a build without vector units rounds half away from zero; both change a code by one where a value meets a half to the
last bit. GPU back-ends quantize activations by rules of their own (CUDA: q8_1 with float16 scales), or not at all.

Rows that the block does not divide are refused: llama.cpp stores such weights as f16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qtrain.grids.base import Grid, Params
from qtrain.grids.ggml.block_grid import BlockGrid
from qtrain.grids.ggml.block_type import BlockType
from qtrain.grids.ggml.blocks import Q8_0, absmax, divide, finite_or_zero, half, signed_peak
from qtrain.lazy import lazy_import
from qtrain.registry import register

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


class Q8_0Activation(Q8_0):
    """q8_0 as the kernels make it."""

    def _rule(self, x: Tensor) -> tuple[Tensor, Tensor | None, Params]:
        peak = absmax(x)
        inverse = finite_or_zero(peak.new_full((), self.high) / peak)  # `127 / tensor` would be tensor.reciprocal() * 127
        return inverse, None, {"scale": half(divide(peak, self.high)).squeeze(-1)}

    def _to_codes(self, v: Tensor) -> Tensor:
        return v.round_().to(torch.int8)


class Q8_K(Q8_0Activation):
    """Blocks of 256 with a float32 scale; a block also stores the sums of its sixteens, which are no numbers of their own."""

    name, block, block_bytes = "q8_k", 256, 292
    param_bits: ClassVar[dict[str, int]] = {"scale": 32}
    survives: ClassVar[tuple[str, ...]] = ()

    def _rule(self, x: Tensor) -> tuple[Tensor, Tensor | None, Params]:
        peak = signed_peak(x)
        inverse = finite_or_zero(peak.new_full((), -self.high) / peak)
        return inverse, None, {"scale": finite_or_zero(inverse.reciprocal()).squeeze(-1)}

    def pack(self, codes_RBS: Tensor, params: Params) -> Tensor:
        scale = params["scale"].contiguous().unsqueeze(-1).view(torch.uint8)
        sums = codes_RBS.reshape(*codes_RBS.shape[:-1], 16, 16).sum(-1, dtype=torch.int16).view(torch.uint8)
        return torch.cat((scale, codes_RBS.view(torch.uint8), sums), -1)

    def unpack(self, data_RBb: Tensor) -> tuple[Tensor, Params]:
        scale = data_RBb[..., :4].contiguous().view(torch.float32).squeeze(-1)
        return data_RBb[..., 4:260].contiguous().view(torch.int8), {"scale": scale}


TYPES: dict[str, BlockType] = {t.name: t for t in (Q8_0Activation(), Q8_K())}


@register("grid", "ggml_activation")
@dataclass
class GgmlActivation(BlockGrid):
    """A layer's input as llama.cpp's CPU kernels quantize it: q8_0 (for q4_0 … q8_0) or q8_k (for the K-types)."""

    type: str = "q8_0"
    """q8_0 or q8_k; beside weights of ggml's own types each layer has the one that belongs to its weight (`beside`)."""

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(
                f"type is {self.type!r}; llama.cpp's activations are {' or '.join(TYPES)}. Set quantizer.activation.type=q8_0 for "
                "q4_0, q4_1, q5_0, q5_1 and q8_0 weights, q8_k for K-types."
            )

    @property
    def block_type(self) -> BlockType:
        return TYPES[self.type]

    @property
    def granularity(self) -> str:
        """Blocks have scales of their own, so the range cannot be static."""
        return "block"

    def beside(self, weight: Grid) -> GgmlActivation | None:
        """What llama.cpp makes of the input of a layer whose weight is on the grid ``weight``: by its type where it is one of ggml's, and
        nothing (None) beside 16-bit floats."""
        kind = getattr(weight, "type", None)
        if weight.registered_name != "ggml" or kind is None:
            return self
        return None if kind in ("f16", "bf16") else GgmlActivation("q8_k" if kind.endswith("_k") else "q8_0")

    def describe(self) -> str:
        return f"ggml {self.type} activation"

    def check_shape(self, shape: tuple[int, ...]) -> str | None:
        columns = shape[-1] if shape else 1
        if columns % self.block == 0:
            return None
        return (
            f"blocks of {self.block} values, which {self.type} activations have, do not divide rows of {columns}; llama.cpp stores the "
            f"weights of such layers as {'another type: set type=q8_0, or' if columns % 32 == 0 else 'f16: set'} keep_float=[NAME]"
        )
