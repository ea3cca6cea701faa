"""ggml's super-blocks of 256 values: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, the "K-types".

A super-block is cut into sub-blocks of s values. Each sub-block has a small integer scale (and min); the super-block has float16 numbers
that turn those into real ones:

    with a min (q2_k q4_k q5_k)    value = (scale * sub_scale) * code - (min * sub_min)
    symmetric (q3_k q6_k)          value = (scale * sub_scale) * code

            s    codes      sub_scale     sub_min    bits per value
    q2_k   16    0..3       0..15         0..15      2.625
    q3_k   16    -4..3      -32..31                  3.4375
    q4_k   32    0..15      0..63         0..63      4.5
    q5_k   32    0..31      0..63         0..63      5.5
    q6_k   16    -32..31    -128..127                6.5625

The parentheses are the order of the float32 operations, one rounding each, in llama.cpp's dequantize_row_q*_K (ggml-quants.c) and in the
gguf package's dequantize, so decode equals both to the last bit. Codes on given scales are (x + min * sub_min) / (scale * sub_scale),
divided, rounded half to even and clamped: what quantize_row_q*_K does last. Where a sub-block's scale is zero every code means the same
value; llama.cpp writes whatever its search left there, we write code 0.

How scales are chosen is `search.py`. It differs from llama.cpp's search, and its error is lower; the format is the same.

Bytes of a super-block; h is float16, little-endian. "planes(bits) of n" means that byte j holds code j in its lowest bits, code j + n in
the next ones, and so on, and that this starts anew every 8 / bits * n codes:

    q2_k    sub_scale | sub_min << 4 [16], codes in planes(2) of 32 [64], h(scale), h(min)
    q3_k    bit 2 of code + 4 in planes(1) of 32 [32], its low bits in planes(2) of 32 [64], sub_scale + 32 [12], h(scale)
    q4_k    h(scale), h(min), sub_scale and sub_min [12], codes in planes(4) of 32 [128]
    q5_k    h(scale), h(min), sub_scale and sub_min [12], bit 4 of codes in planes(1) of 32 [32], low bits in planes(4) of 32 [128]
    q6_k    low bits of code + 32 in planes(4) of 64 [128], high bits in planes(2) of 32 [64], sub_scale [16], h(scale)

Shapes: R rows, B super-blocks per row, S = 256 values, N sub-blocks in a super-block, s values in a sub-block, b bytes. Parameters:
scale and min float32 [R, B], sub_scale and sub_min int8 [R, B * N].
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from qtrain.grids.base import Params
from qtrain.grids.ggml.block_type import BlockType
from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

SUPER = 256


class SuperBlock(BlockType):
    """What the K-types share."""

    block = SUPER
    searches = True
    piece = 1 << 18  # so that a search on two threads fills its own pieces (see search.py)
    sub: ClassVar[int]
    """Values per sub-block, s."""
    sub_low: ClassVar[int]
    """Smallest sub-scale; sub-mins begin at 0."""
    sub_high: ClassVar[int]
    """Largest sub-scale, and sub-min where there is one."""
    sub_offset: ClassVar[int] = 0
    """What the file's sub-scale has more than ours."""
    by_magnitude: ClassVar[bool] = False
    """Whether, without importance, the search weighs an error more where the value is large."""
    supers_first: ClassVar[bool] = False
    """Whether a block's bytes begin with its float16 numbers; they end with them otherwise."""

    @property
    def has_min(self) -> bool:
        """Whether values are counted from a min, with codes from 0."""
        return "min" in self.param_bits

    def choose(self, x_RBS: Tensor, importance_BS: Tensor | None = None) -> Params:
        """Scales of least (importance-weighted) squared error, found on the numbers that the file can hold; see `search.py`."""
        from qtrain.grids.ggml import search

        return search.super_block(x_RBS, importance_BS, self)

    def encode(self, x_RBS: Tensor, params: Params | None = None, importance_BS: Tensor | None = None) -> tuple[Tensor, Params]:
        params = self.choose(x_RBS, importance_BS) if params is None else params
        step, least = self._levels(x_RBS.shape[:2], params)
        codes = self._unrounded(x_RBS, step, least).round_().clamp_(self.low, self.high)
        return codes.to(torch.int8).view(x_RBS.shape), params

    def decode(self, codes_RBS: Tensor, params: Params) -> Tensor:
        step, least = self._levels(codes_RBS.shape[:2], params)
        values = codes_RBS.reshape(*step.shape[:3], self.sub).float()
        return self._value(values, step, least).view(codes_RBS.shape)

    def round_trip(self, x_RBS: Tensor, params: Params | None = None) -> tuple[Tensor, Tensor | None]:
        params = self.choose(x_RBS) if params is None else params
        step, least = self._levels(x_RBS.shape[:2], params)
        v = self._unrounded(x_RBS, step, least)
        mask = v.clamp(self.low - 0.5, self.high + 0.5) == v
        v.round_().clamp_(self.low, self.high).add_(0.0)  # codes have no -0.0, so neither may this
        return self._value(v, step, least).view(x_RBS.shape), mask.view(x_RBS.shape)

    def pack(self, codes_RBS: Tensor, params: Params) -> Tensor:
        shape = codes_RBS.shape[:2]
        codes = codes_RBS.add(self.offset).view(torch.uint8)
        subs = [
            params[name].add(self.sub_offset).view(torch.uint8).reshape(*shape, SUPER // self.sub)
            for name in self.param_bits
            if name.startswith("sub_")
        ]
        supers = [params[name].half().unsqueeze(-1).view(torch.uint8) for name in self.param_bits if not name.startswith("sub_")]
        body = [part.reshape(*shape, -1) for part in self._pack(codes, *subs)]
        return torch.cat([*supers, *body] if self.supers_first else [*body, *supers], dim=-1)

    def unpack(self, data_RBb: Tensor) -> tuple[Tensor, Params]:
        shape, names = data_RBb.shape[:2], list(self.param_bits)
        count = 2 * sum(not name.startswith("sub_") for name in names)
        head, tail = (count, self.block_bytes) if self.supers_first else (0, self.block_bytes - count)
        body, supers = data_RBb[..., head:tail], data_RBb[..., :head] if self.supers_first else data_RBb[..., tail:]
        codes, *subs = (part.reshape(*shape, -1) for part in self._unpack(body))
        halves = supers.contiguous().view(torch.float16).float().unbind(-1)
        stored = {name: value.contiguous() for name, value in zip(names, halves, strict=False)}
        stored |= {
            name: value.view(torch.int8).sub(self.sub_offset).reshape(shape[0], -1)
            for name, value in zip(names[len(halves) :], subs, strict=True)
        }
        return codes.view(torch.int8).sub_(self.offset), stored

    # -- internals ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def _pack(self, codes: Tensor, *subs: Tensor) -> list[Tensor]:
        """Parts of the bytes in order, without the float16 numbers, from uint8 codes [R, B, S] and sub-scales (and sub-mins) [R, B, N]."""

    @abstractmethod
    def _unpack(self, body: Tensor) -> list[Tensor]:
        """Undo `_pack`."""

    def _levels(self, rows_blocks: torch.Size, params: Params) -> tuple[Tensor, Tensor | None]:
        """What one code step is worth, and what is subtracted, float32 [R, B, N, 1]."""
        shape = (*rows_blocks, SUPER // self.sub)
        step = params["sub_scale"].reshape(shape).float().mul_(params["scale"].unsqueeze(-1)).unsqueeze(-1)
        if not self.has_min:
            return step, None
        return step, params["sub_min"].reshape(shape).float().mul_(params["min"].unsqueeze(-1)).unsqueeze(-1)

    def _unrounded(self, x_RBS: Tensor, step: Tensor, least: Tensor | None) -> Tensor:
        """Codes before rounding, [R, B, N, s]; 0 where the step is 0."""
        x = x_RBS.reshape(*step.shape[:3], self.sub)
        step = step.masked_fill(step == 0, torch.inf)
        return x / step if least is None else (x + least).div_(step)

    def _value(self, codes: Tensor, step: Tensor, least: Tensor | None) -> Tensor:
        codes.mul_(step)
        return codes if least is None else codes.sub_(least)


class Q2_K(SuperBlock):
    """2 bits in sub-blocks of 16 with 4-bit scales and mins."""

    name, block_bytes, code_bits = "q2_k", 84, 2
    low, high, offset = 0, 3, 0
    sub, sub_low, sub_high = 16, 0, 15
    param_bits: ClassVar[dict[str, int]] = {"scale": 16, "min": 16, "sub_scale": 4, "sub_min": 4}

    def _pack(self, codes: Tensor, *subs: Tensor) -> list[Tensor]:
        return [subs[0] | subs[1] << 4, _planes(codes, 2, 32)]

    def _unpack(self, body: Tensor) -> list[Tensor]:
        subs = body[..., :16]
        return [_codes(body[..., 16:], 2, 32), subs & 15, subs >> 4]


class Q3_K(SuperBlock):
    """3 bits in sub-blocks of 16 with signed 6-bit scales."""

    name, block_bytes, code_bits = "q3_k", 110, 3
    low, high, offset = -4, 3, 4
    sub, sub_low, sub_high, sub_offset = 16, -32, 31, 32
    by_magnitude = True
    param_bits: ClassVar[dict[str, int]] = {"scale": 16, "sub_scale": 6}

    def _pack(self, codes: Tensor, *subs: Tensor) -> list[Tensor]:
        return [_planes(codes >> 2, 1, 32), _planes(codes & 3, 2, 32), _planes(subs[0] & 15, 4, 8), _planes(subs[0] >> 4, 2, 4)]

    def _unpack(self, body: Tensor) -> list[Tensor]:
        codes = _codes(body[..., 32:96], 2, 32) | _codes(body[..., :32], 1, 32) << 2
        return [codes, _codes(body[..., 96:104], 4, 8) | _codes(body[..., 104:], 2, 4) << 4]


class Q4_K(SuperBlock):
    """4 bits in sub-blocks of 32 with 6-bit scales and mins."""

    name, block_bytes, code_bits = "q4_k", 144, 4
    low, high, offset = 0, 15, 0
    sub, sub_low, sub_high = 32, 0, 63
    supers_first = True
    param_bits: ClassVar[dict[str, int]] = {"scale": 16, "min": 16, "sub_scale": 6, "sub_min": 6}

    def _pack(self, codes: Tensor, *subs: Tensor) -> list[Tensor]:
        return [_six_bits(*subs), _planes(codes, 4, 32)]

    def _unpack(self, body: Tensor) -> list[Tensor]:
        return [_codes(body[..., 12:], 4, 32), *_from_six_bits(body[..., :12])]


class Q5_K(Q4_K):
    """5 bits in sub-blocks of 32 with 6-bit scales and mins."""

    name, block_bytes, code_bits = "q5_k", 176, 5
    high = 31

    def _pack(self, codes: Tensor, *subs: Tensor) -> list[Tensor]:
        return [_six_bits(*subs), _planes(codes >> 4, 1, 32), _planes(codes & 15, 4, 32)]

    def _unpack(self, body: Tensor) -> list[Tensor]:
        codes = _codes(body[..., 44:], 4, 32) | _codes(body[..., 12:44], 1, 32) << 4
        return [codes, *_from_six_bits(body[..., :12])]


class Q6_K(SuperBlock):
    """6 bits in sub-blocks of 16 with signed 8-bit scales."""

    name, block_bytes, code_bits = "q6_k", 210, 6
    low, high, offset = -32, 31, 32
    sub, sub_low, sub_high = 16, -128, 127
    param_bits: ClassVar[dict[str, int]] = {"scale": 16, "sub_scale": 8}

    def _pack(self, codes: Tensor, *subs: Tensor) -> list[Tensor]:
        return [_planes(codes & 15, 4, 64), _planes(codes >> 4, 2, 32), subs[0]]

    def _unpack(self, body: Tensor) -> list[Tensor]:
        return [_codes(body[..., :128], 4, 64) | _codes(body[..., 128:192], 2, 32) << 4, body[..., 192:]]


TYPES: dict[str, BlockType] = {t.name: t for t in (Q2_K(), Q3_K(), Q4_K(), Q5_K(), Q6_K())}


# -- bytes ---------------------------------------------------------------------------------------------------------------


def _planes(codes: Tensor, bits: int, length: int) -> Tensor:
    """Codes of ``bits`` bits, planes of ``length`` above each other: uint8 [R, B, n] -> [R, B, n * bits / 8]."""
    planes = codes.reshape(*codes.shape[:2], -1, 8 // bits, length)
    data = planes[..., 0, :].clone()
    for i in range(1, 8 // bits):
        data |= planes[..., i, :] << i * bits
    return data.flatten(2)


def _codes(data: Tensor, bits: int, length: int) -> Tensor:
    """Undo `_planes`."""
    planes = data.reshape(*data.shape[:2], -1, length)
    mask = (1 << bits) - 1
    return torch.stack([planes >> i * bits & mask for i in range(8 // bits)], dim=-2).flatten(2)


def _six_bits(scale: Tensor, least: Tensor) -> Tensor:
    """Eight 6-bit scales and mins in 12 bytes: the first four of each have the top bits of the last four in their own."""
    both = torch.stack((scale, least), dim=2)
    first, last = both[..., :4], both[..., 4:]  # [R, B, 2, 4]
    low = last & 15
    return torch.cat(((first | last >> 4 << 6).flatten(2), low[:, :, 0] | low[:, :, 1] << 4), dim=-1)


def _from_six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `_six_bits`."""
    first, low = data[..., :8].reshape(*data.shape[:2], 2, 4), data[..., 8:]
    last = torch.stack((low & 15, low >> 4), dim=2) | first >> 6 << 4
    scale, least = torch.cat((first & 63, last), dim=-1).unbind(2)
    return scale, least
