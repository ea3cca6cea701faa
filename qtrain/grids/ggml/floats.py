"""The 16-bit floats that GGUF files hold: blocks of one value, whose code is its bits.

f16 is IEEE float16, bf16 the upper half of a float32; both are rounded to nearest even, as ggml's conversions are (on CPUs with
AVX512-BF16 ggml makes zeros of bfloat16's denormals, below 1.2e-38).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from qtrain.grids.base import Params
from qtrain.grids.ggml.block_type import BlockType
from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


class Float(BlockType):
    """A 16-bit float: codes are its bits, int16, and there are no parameters."""

    dtype: ClassVar[str]
    """torch's name of it."""
    block, block_bytes, code_bits = 1, 2, 16
    low, high, offset = -(2**15), 2**15 - 1, 0
    param_bits: ClassVar[dict[str, int]] = {}

    def choose(self, x_RBS: Tensor, importance_BS: Tensor | None = None) -> Params:
        return {}

    def encode(self, x_RBS: Tensor, params: Params | None = None, importance_BS: Tensor | None = None) -> tuple[Tensor, Params]:
        return x_RBS.to(getattr(torch, self.dtype)).view(torch.int16), {}

    def decode(self, codes_RBS: Tensor, params: Params) -> Tensor:
        return codes_RBS.view(getattr(torch, self.dtype)).float()

    def round_trip(self, x_RBS: Tensor, params: Params | None = None) -> tuple[Tensor, Tensor | None]:
        return x_RBS.to(getattr(torch, self.dtype)).float(), None

    def pack(self, codes_RBS: Tensor, params: Params) -> Tensor:
        return codes_RBS.contiguous().view(torch.uint8)

    def unpack(self, data_RBb: Tensor) -> tuple[Tensor, Params]:
        return data_RBb.contiguous().view(torch.int16), {}


class F16(Float):
    """IEEE float16."""

    name, dtype = "f16", "float16"
    survives: ClassVar[tuple[str, ...]] = ("float32", "float16")


class BF16(Float):
    """bfloat16: the upper half of a float32, rounded to nearest even."""

    name, dtype = "bf16", "bfloat16"
    survives: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")


TYPES: dict[str, BlockType] = {t.name: t for t in (F16(), BF16())}
