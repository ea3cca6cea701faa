"""The grid of one block type: a tensor's rows cut into blocks, in pieces that fit the cache, with shapes and values checked.

R is the product of a tensor's leading dimensions, B the number of blocks along its last one; blocks never span two rows, so a parameter's
dim 0 is R, and rows may be taken out one by one (embeddings) or be permuted together with their parameters (the exporter).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod
from typing import TYPE_CHECKING

from qtrain.grids.base import Grid, Params, QuantizedTensor, require_finite
from qtrain.grids.ggml.block_type import BlockType
from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


@dataclass
class BlockGrid(Grid):
    """A grid whose rows are blocks of one `BlockType`."""

    @property
    @abstractmethod
    def block_type(self) -> BlockType:
        """The format."""

    @property
    def block(self) -> int:
        """Values per block."""
        return self.block_type.block

    @property
    def block_bytes(self) -> int:
        """Bytes per block in a file."""
        return self.block_type.block_bytes

    @property
    def searches(self) -> bool:
        return self.block_type.searches

    @property
    def code_bits(self) -> int:
        return self.block_type.code_bits

    def param_bits(self, name: str) -> int:
        return self.block_type.param_bits[name]

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of ``n`` values.

        Raises:
            ValueError: if blocks do not divide it.
        """
        self._refuse_shape((n,))
        return n // self.block * self.block_bytes

    def choose(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Stored parameters: float32 holding float16 values, and int8 sub-scales, dim 0 being R."""
        x = self._blocks(w)
        weights = self._importance(x, importance)
        return self._joined([self.block_type.choose(x[rows].float(), weights) for rows in self._pieces(x)])

    def encode(self, w: Tensor, params: Params | None = None, importance: Tensor | None = None) -> QuantizedTensor:
        """Codes int8 (int16 for 16-bit floats) in the shape of ``w``, and the stored parameters.

        Without ``params`` by ggml's own rule, with ``importance`` by its weighted search; with ``params`` the nearest codes on those.

        Raises:
            ValueError: if ``w`` is not finite, blocks do not divide its rows, or a scale overflows float16.
        """
        x = self._blocks(w)
        weights = self._importance(x, importance)
        codes = torch.empty(x.shape, dtype=self._code_dtype, device=x.device)
        used = []
        for rows in self._pieces(x):
            piece = x[rows].float()
            if not isfinite(float(piece.sum())):  # a sum costs a sixtieth of isfinite().all(); it may overflow, so ask again
                require_finite(w, "the tensor to quantize")
            codes[rows], stored = self.block_type.encode(piece, self._some(params, rows), weights)
            self._refuse_overflow(codes[rows], stored)
            used.append(stored)
        return QuantizedTensor(self, codes.reshape(w.shape), self._joined(used) if params is None else params)

    def decode(self, q: QuantizedTensor) -> Tensor:
        """What ggml's dequantize_row functions compute, float32."""
        codes = self._blocks(q.codes)
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows in self._pieces(codes):
            out[rows] = self.block_type.decode(codes[rows], self._some(q.params, rows) or {})
        return out.reshape(q.shape)

    def round_trip(self, w: Tensor, params: Params | None = None) -> tuple[Tensor, Tensor | None]:
        """decode(encode(w)), piece by piece; see `Grid.round_trip`. The values have the dtype of ``w``."""
        x = self._blocks(w)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        mask: Tensor | None = None
        for rows in self._pieces(x):
            values, inside = self.block_type.round_trip(x[rows].float(), self._some(params, rows))
            out[rows] = values
            if inside is not None:
                mask = torch.empty(x.shape, dtype=torch.bool, device=x.device) if mask is None else mask
                mask[rows] = inside
        return out.reshape(w.shape), None if mask is None else mask.reshape(w.shape)

    def pack(self, q: QuantizedTensor) -> Tensor:
        """The bytes of a file, uint8 [R, bytes per row]."""
        codes = self._blocks(q.codes)
        data = torch.empty((*codes.shape[:2], self.block_bytes), dtype=torch.uint8, device=codes.device)
        for rows in self._pieces(codes):
            data[rows] = self.block_type.pack(codes[rows], self._some(q.params, rows) or {})
        return data.reshape(len(codes), codes.shape[1] * self.block_bytes)

    def unpack(self, data: Tensor, shape: tuple[int, ...]) -> QuantizedTensor:
        """Undo `pack`.

        Args:
            data: uint8 [R, bytes per row].
            shape: of the tensor that was packed.

        Raises:
            ValueError: if the bytes are not those of such a tensor.
        """
        self._refuse_shape(shape)
        rows, columns = prod(shape[:-1]), shape[-1] if shape else 1
        if data.dtype != torch.uint8 or tuple(data.shape) != (rows, self.row_bytes(columns)):
            raise ValueError(
                f"a tensor of shape {list(shape)} of type {self.block_type.name} has uint8 bytes of shape "
                f"[{rows}, {self.row_bytes(columns)}], given {str(data.dtype).removeprefix('torch.')} {list(data.shape)}"
            )
        blocks = data.reshape(rows, columns // self.block, self.block_bytes)
        codes = torch.empty((*blocks.shape[:2], self.block), dtype=self._code_dtype, device=data.device)
        params = []
        for piece in self._pieces(codes):
            codes[piece], stored = self.block_type.unpack(blocks[piece])
            params.append(stored)
        return QuantizedTensor(self, codes.reshape(shape), self._joined(params))

    # -- internals ---------------------------------------------------------------------------------------------------

    @property
    def _code_dtype(self) -> torch.dtype:
        return torch.int16 if self.code_bits == 16 else torch.int8

    def _blocks(self, w: Tensor) -> Tensor:
        """``w`` as [R, B, S], its own dtype."""
        self._refuse_shape(tuple(w.shape))
        w = w.detach()
        columns = w.shape[-1] if w.ndim else 1
        return w.reshape(prod(w.shape[:-1]), columns // self.block, self.block)

    def _pieces(self, x: Tensor) -> Iterator[slice]:
        """Slices of rows of about `BlockType.piece` values; one empty slice where there is no row."""
        step = max(1, self.block_type.piece // max(1, x.shape[1] * x.shape[2]))
        for start in range(0, max(len(x), 1), step):
            yield slice(start, start + step)

    def _importance(self, x: Tensor, importance: Tensor | None) -> Tensor | None:
        """``importance`` as [B, S]."""
        if importance is None:
            return None
        if importance.shape != (x.shape[1] * x.shape[2],):
            raise ValueError(
                f"importance has one number for each of the {x.shape[1] * x.shape[2]} input channels, given shape "
                f"{list(importance.shape)}; collect it from the model that is quantized"
            )
        return importance.detach().to(x.device, torch.float32).reshape(x.shape[1:])

    def _some(self, params: Params | None, rows: slice) -> Params | None:
        return None if params is None else {name: p[rows] for name, p in params.items()}

    def _joined(self, pieces: list[Params]) -> Params:
        return {name: torch.cat([p[name] for p in pieces]) for name in self.block_type.param_bits}

    def _refuse_overflow(self, codes: Tensor, params: Params) -> None:
        numbers = [p for p in params.values() if p.is_floating_point()] or [self.block_type.decode(codes, params)]
        if any(not isfinite(float(n.sum())) and not bool(n.isfinite().all()) for n in numbers):
            what, remedy = ("scale", "") if params else ("value", ", or set type=bf16, which has float32's range")
            raise ValueError(
                f"a {what} overflows the 16-bit float in which {self.describe()} stores it; "
                f"leave the module in float: keep_float=[NAME]{remedy}"
            )

    def _refuse_shape(self, shape: tuple[int, ...]) -> None:
        why = self.check_shape(shape)
        if why:
            raise ValueError(f"a tensor of shape {list(shape)} does not fit the grid: {why}")
