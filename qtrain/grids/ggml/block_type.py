"""What a block type of ggml is: a fixed number of values of one row that share scales, and the bytes they become in a file.

Every type of `qtrain/grids/ggml/` is one instance of `BlockType`, listed in `TYPES` of the package. The grid (`block_grid.py`) cuts a
tensor's rows into pieces that fit the cache, checks shapes and finite values, and calls these methods on one piece at a time; a type
knows one format and nothing else.

Shapes: R rows, B blocks per row, S values per block (`block`), b bytes per block (`block_bytes`). Values x_RBS are float32, codes_RBS int8
(int16 for the 16-bit floats), signed where ggml subtracts an offset when it reads them. Parameters are named tensors whose dim 0 is R:
[R, B] where a block has one of them, [R, B * n] where it has n. Stored float16 numbers are held as float32 of the same value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from qtrain.grids.base import Params

if TYPE_CHECKING:
    from torch import Tensor


class BlockType(ABC):
    """One of ggml's block formats. Instances have no state."""

    name: ClassVar[str]
    """Lower-case name, as in `Ggml(type=...)`: q4_0."""
    block: ClassVar[int]
    """Values per block, S: 32, 256, or 1 for the 16-bit floats."""
    block_bytes: ClassVar[int]
    """Bytes per block in a file, b."""
    code_bits: ClassVar[int]
    """Bits per code in a file."""
    low: ClassVar[int]
    """Smallest code as we hold it (after ggml's offset)."""
    high: ClassVar[int]
    """Largest code as we hold it."""
    offset: ClassVar[int]
    """What the file's unsigned code has more than ours: 8 for q4_0, 0 where there is a min or the file's codes are signed."""
    param_bits: ClassVar[dict[str, int]]
    """Name of each parameter and its bits per element in a file; their order is the order in which `choose` returns them."""
    searches: ClassVar[bool] = False
    """Whether `choose` is a costly search even without importance."""
    survives: ClassVar[tuple[str, ...]] = ()
    """Names of torch's float types in which decoded values may be saved without loss: encode gives their codes and parameters back."""
    piece: ClassVar[int] = 1 << 17
    """Values per piece that the grid hands to one call, so that the passes over it stay in the cache."""

    @abstractmethod
    def choose(self, x_RBS: Tensor, importance_BS: Tensor | None = None) -> Params:
        """Stored parameters of ``x_RBS``: float32 scales and mins rounded to float16, int8 sub-scales, each [R, ...].

        Args:
            x_RBS: finite values.
            importance_BS: mean squared activation of each input channel, float32; None for ggml's own weights.
        """

    @abstractmethod
    def encode(self, x_RBS: Tensor, params: Params | None = None, importance_BS: Tensor | None = None) -> tuple[Tensor, Params]:
        """Codes [R, B, S] and the parameters they stand on.

        Without ``params``: ggml's own rule to the bit (some types take codes from the scale before it is rounded to float16).
        With ``params``: the nearest code on those stored scales; they come back unchanged.
        """

    @abstractmethod
    def decode(self, codes_RBS: Tensor, params: Params) -> Tensor:
        """Values [R, B, S], float32; the operations and their order are those of ggml's dequantize_row functions."""

    @abstractmethod
    def round_trip(self, x_RBS: Tensor, params: Params | None = None) -> tuple[Tensor, Tensor | None]:
        """decode(encode(x)) to the bit, and where the code before rounding was inside [low - 0.5, high + 0.5] (None: everywhere)."""

    @abstractmethod
    def pack(self, codes_RBS: Tensor, params: Params) -> Tensor:
        """The bytes of the file, uint8 [R, B, block_bytes]."""

    @abstractmethod
    def unpack(self, data_RBb: Tensor) -> tuple[Tensor, Params]:
        """Codes [R, B, S] and parameters from the bytes of a file, uint8 [R, B, block_bytes]: the inverse of `pack`."""

    def packed_bits(self) -> float:
        """Bits per value in a file, scales included."""
        return 8 * self.block_bytes / self.block
