"""ggml's blocks of 32 values: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

x is a block of 32 values of a row, d its scale and m its min; h() rounds to float16, to nearest even. ggml's own rule (the functions
quantize_row_*_ref of ggml-quants.c, which llama-quantize runs when it has no importance matrix):

    q4_0    d = peak / -8         code = min(15, trunc(x / d + 8.5)) - 8       value = code * h(d)
    q5_0    d = peak / -16        code = min(31, trunc(x / d + 16.5)) - 16     value = code * h(d)
    q8_0    d = absmax / 127      code = round(x / d)                          value = code * h(d)
    q4_1    d = (max - min) / 15  code = min(15, trunc((x - min) / d + 0.5))   value = code * h(d) + h(min)
    q5_1    d = (max - min) / 31  code = min(31, trunc((x - min) / d + 0.5))   value = code * h(d) + h(min)

peak is the first value of largest magnitude, with its sign; round is half away from zero; x / d is x * (1 / d). **Codes come from the
scale before it is rounded to float16**, values from the rounded one: that is what ggml does, and what every file of llama-quantize
holds. With given parameters (frozen, or found by a search) the codes are the nearest ones on the stored scale instead.

`choose` with importance searches for less weighted error (`search.py`, then scales fitted to codes and codes to scales) and keeps the
rule's scale where it finds none. llama.cpp's own search (quantize_row_*_impl) weighs errors by importance * sqrt(the row's mean square +
x^2), ours by importance alone, which is what reaches the layer's output: 1.5 to 4 % less of it is left. For q8_0 neither searches.

Everything is float32, one operation at a time, and so is llama.cpp's quantizer on x86; compilers that contract a * b + c (on ARM) may
differ in a code whose x / d lies on a half. Where |d| is below 2^-128, 1 / d is infinite and ggml's codes are undefined; ours are those
of zero, and h(d) is zero in any case.

Bytes: h(d), h(m) where there is one, [q5: the fifth bits of the 32 codes, little-endian], then the low four bits: byte j holds code j below
and code j + 16 above. q8_0: h(d), then 32 signed bytes.

Codes hold ggml's offset already: -8..7 for q4_0, -16..15 for q5_0, -127..127 for q8_0 (-128 is no code: llama.cpp's kernels negate
codes in 8 bits), 0..15 and 0..31 where there is a min.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from qtrain.grids.base import Params
from qtrain.grids.ggml.block_type import BlockType
from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

_FITS = 2
"""How often a search fits scales to codes and codes to scales."""
_ALMOST_HALF = 0.5 - 2.0**-25
"""The largest float32 below 0.5: trunc(v + this) is v rounded half away from zero, where v + 0.5 would round 0.49999997 up."""


class Block32(BlockType):
    """What the blocks of 32 share: codes through int8, so that `round_trip` is `decode` of `encode` by construction."""

    block = 32
    piece = 1 << 16  # 256 KiB: a search has ten buffers of them

    @abstractmethod
    def _rule(self, x: Tensor) -> tuple[Tensor, Tensor | None, Params]:
        """Of ggml's rule: 1 / d before d is rounded, the min before it is rounded (or None), [R, B, 1]; and the stored parameters."""

    @abstractmethod
    def _round(self, x: Tensor, inverse: Tensor, least: Tensor | None, given: bool, masked: bool) -> tuple[Tensor, Tensor | None]:
        """Codes int8 and, where ``masked`` and something may clip (on ``given`` parameters always), the mask of what did not."""

    def _search(self, x: Tensor, weight: Tensor, best: Params) -> Iterator[Params]:
        """Stored parameters to try one after the other; ``best`` are the best ones at any time, ``weight`` is [R, B, S]."""
        yield from ()

    def choose(self, x_RBS: Tensor, importance_BS: Tensor | None = None) -> Params:
        """Of ggml's rule; with importance those of a search, block by block where its weighted error is less."""
        best = self._rule(x_RBS)[2]
        if importance_BS is None:
            return best
        weight = search_weights(x_RBS, importance_BS)
        error = self._error(x_RBS, best, weight)
        for found in self._search(x_RBS, weight, best):
            new = self._error(x_RBS, found, weight)
            better = new < error
            for name, value in found.items():
                best[name].copy_(torch.where(better, value, best[name]))
            error = torch.where(better, new, error)
        return best

    def encode(self, x_RBS: Tensor, params: Params | None = None, importance_BS: Tensor | None = None) -> tuple[Tensor, Params]:
        if params is None and importance_BS is not None:
            params = self.choose(x_RBS, importance_BS)
        codes, params, _ = self._encode(x_RBS, params, masked=False)
        return codes, params

    def round_trip(self, x_RBS: Tensor, params: Params | None = None) -> tuple[Tensor, Tensor | None]:
        codes, params, mask = self._encode(x_RBS, params, masked=True)
        return self.decode(codes, params), mask

    def decode(self, codes_RBS: Tensor, params: Params) -> Tensor:
        x = codes_RBS.float().mul_(params["scale"].unsqueeze(-1))
        return x.add_(params["min"].unsqueeze(-1)) if "min" in params else x

    def _error(self, x: Tensor, params: Params, weight: Tensor) -> Tensor:
        """Weighted squared error of each block on these parameters, [R, B]."""
        return self.round_trip(x, params)[0].sub_(x).square_().mul_(weight).sum(-1)

    def _encode(self, x: Tensor, params: Params | None, masked: bool) -> tuple[Tensor, Params, Tensor | None]:
        if params is None:
            inverse, least, stored = self._rule(x)
        else:
            stored, inverse = params, _inverse(params["scale"].unsqueeze(-1))
            least = params["min"].unsqueeze(-1) if "min" in params else None
        codes, mask = self._round(x, inverse, least, params is not None, masked)
        return codes, stored, mask


class Nibbles(Block32):
    """q4 and q5: unsigned codes from 0 to `top` in the file, packed as half bytes and, for q5, a word of fifth bits."""

    top: ClassVar[int]
    """Largest code in the file."""
    peak_clips: ClassVar[bool]
    """Whether ggml's own rule clips: half a step opposite the peak."""

    def _search(self, x: Tensor, weight: Tensor, best: Params) -> Iterator[Params]:
        """For the codes of the best parameters so far, the fit of least weighted error: what is left is fitted, which cancels nothing."""
        for _ in range(_FITS):
            codes = self._encode(x, best, masked=False)[0]
            left = self.decode(codes, best).sub_(x).neg_()
            level, new = codes.float(), dict(best)
            if "min" in best:
                total = weight.sum(-1, keepdim=True)
                middle = (weight * level).sum(-1, keepdim=True) / total
                level.sub_(middle)
            weighted = weight * level
            step = (weighted * left).sum(-1) / (weighted * level).sum(-1).clamp_min_(1e-30)
            new["scale"] = half(best["scale"] + step)
            if "min" in best:
                new["min"] = half(best["min"] + (weight * left).sum(-1) / total.squeeze(-1) - step * middle.squeeze(-1))
            yield new

    def _round(self, x: Tensor, inverse: Tensor, least: Tensor | None, given: bool, masked: bool) -> tuple[Tensor, Tensor | None]:
        v = (x * inverse if least is None else (x - least).mul_(inverse)).add_(self.offset + 0.5)
        if given:  # anywhere; the rule's own are from 0 to top + 1, and int8 truncates
            v.floor_().clamp_(-1, self.top + 1)
        raw = v.to(torch.int8)
        codes = raw.clamp(0, self.top)
        mask = raw == codes if masked and (given or self.peak_clips) else None
        return codes.sub_(self.offset) if self.offset else codes, mask

    def pack(self, codes_RBS: Tensor, params: Params) -> Tensor:
        unsigned = (codes_RBS + self.offset).view(torch.uint8)
        data = unsigned.new_empty((*unsigned.shape[:-1], self.block_bytes))
        head = _put_halves(data, *(params[name] for name in self.param_bits))
        if self.top > 15:
            data[..., head : head + 4] = _pack_bits(unsigned >> 4)
            head += 4
            unsigned = unsigned & 15
        torch.bitwise_or(unsigned[..., :16], unsigned[..., 16:] << 4, out=data[..., head:])
        return data

    def unpack(self, data_RBb: Tensor) -> tuple[Tensor, Params]:
        params, head = _take_halves(data_RBb, *self.param_bits)
        low = data_RBb[..., -16:]
        codes = torch.cat((low & 15, low >> 4), -1).view(torch.int8)
        if self.top > 15:
            codes |= _unpack_bits(data_RBb[..., head : head + 4]).view(torch.int8) << 4
        return codes.sub_(self.offset) if self.offset else codes, params


class Symmetric(Nibbles):
    """q4_0 and q5_0: the peak gets the lowest code."""

    param_bits: ClassVar[dict[str, int]] = {"scale": 16}
    survives: ClassVar[tuple[str, ...]] = ("float32", "float16")
    peak_clips = True

    def _rule(self, x: Tensor) -> tuple[Tensor, Tensor | None, Params]:
        d = signed_peak(x).mul_(1 / self.low)  # a power of two: exact
        return _inverse(d), None, {"scale": half(d).squeeze(-1)}

    def _search(self, x: Tensor, weight: Tensor, best: Params) -> Iterator[Params]:
        from qtrain.grids.ggml import search

        yield {"scale": half(search.symmetric_scale(x, weight, -self.low))}
        yield from super()._search(x, weight, best)


class WithMin(Nibbles):
    """q4_1 and q5_1: the range from min to max."""

    param_bits: ClassVar[dict[str, int]] = {"scale": 16, "min": 16}
    survives: ClassVar[tuple[str, ...]] = ("float32",)
    peak_clips = False
    offset = 0
    low = 0

    def _rule(self, x: Tensor) -> tuple[Tensor, Tensor | None, Params]:
        least = _first_zero(x, x.amin(-1, keepdim=True))
        d = divide(x.amax(-1, keepdim=True) - least, self.top).add_(0.0)  # 0.0 - 0.0 is -0.0 for some signs
        return _inverse(d), least, {"scale": half(d).squeeze(-1), "min": half(least).squeeze(-1)}

    def _search(self, x: Tensor, weight: Tensor, best: Params) -> Iterator[Params]:
        from qtrain.grids.ggml import search

        scale, least = search.scale_and_min(x, weight, self.top)
        yield {"scale": half(scale), "min": half(least)}
        yield from super()._search(x, weight, best)


class Q4_0(Symmetric):
    """4 bits and a scale: 4.5 bits per value."""

    name, block_bytes, code_bits = "q4_0", 18, 4
    low, high, offset, top = -8, 7, 8, 15


class Q5_0(Symmetric):
    """5 bits and a scale: 5.5 bits per value."""

    name, block_bytes, code_bits = "q5_0", 22, 5
    low, high, offset, top = -16, 15, 16, 31


class Q4_1(WithMin):
    """4 bits, a scale and a min: 5 bits per value."""

    name, block_bytes, code_bits = "q4_1", 20, 4
    high = top = 15


class Q5_1(WithMin):
    """5 bits, a scale and a min: 6 bits per value."""

    name, block_bytes, code_bits = "q5_1", 24, 5
    high = top = 31


class Q8_0(Block32):
    """8 bits and a scale: 8.5 bits per value. llama.cpp has no weighted search for it, so importance changes nothing."""

    name, block_bytes, code_bits = "q8_0", 34, 8
    low, high, offset = -127, 127, 0
    param_bits: ClassVar[dict[str, int]] = {"scale": 16}
    survives: ClassVar[tuple[str, ...]] = ("float32",)

    def _rule(self, x: Tensor) -> tuple[Tensor, Tensor | None, Params]:
        d = divide(absmax(x), self.high)
        return _inverse(d), None, {"scale": half(d).squeeze(-1)}

    def _round(self, x: Tensor, inverse: Tensor, least: Tensor | None, given: bool, masked: bool) -> tuple[Tensor, Tensor | None]:
        v = x * inverse
        mask = None
        if given:
            mask = v.abs() <= self.high + 0.5 if masked else None
            v.clamp_(self.low, self.high)
        return self._to_codes(v), mask

    def _to_codes(self, v: Tensor) -> Tensor:
        """Round half away from zero."""
        return v.add_(torch.copysign(v.new_full((), _ALMOST_HALF), v)).to(torch.int8)

    def pack(self, codes_RBS: Tensor, params: Params) -> Tensor:
        data = torch.empty((*codes_RBS.shape[:-1], self.block_bytes), dtype=torch.uint8, device=codes_RBS.device)
        data[..., _put_halves(data, params["scale"]) :] = codes_RBS.view(torch.uint8)
        return data

    def unpack(self, data_RBb: Tensor) -> tuple[Tensor, Params]:
        params, head = _take_halves(data_RBb, "scale")
        return data_RBb[..., head:].contiguous().view(torch.int8), params


TYPES: dict[str, BlockType] = {t.name: t for t in (Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q8_0())}


# -- what scales follow from ---------------------------------------------------------------------------------------------


def absmax(x: Tensor) -> Tensor:
    """The largest magnitude, [R, B, 1]."""
    return torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_()).abs_()  # zeros without a sign


def signed_peak(x: Tensor) -> Tensor:
    """The first value of largest magnitude, with its sign, [R, B, 1]; 0.0 for zeros."""
    highest, lowest = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    balance = highest + lowest
    peak = torch.maximum(highest, lowest.neg_()).copysign_(balance)
    if not bool(balance.all()):  # some are zero: two peaks, or zeros only
        tied = balance == 0
        rows = x[tied.squeeze(-1)]
        peak[tied] = rows.gather(-1, rows.abs().argmax(-1, keepdim=True)).squeeze(-1) + 0.0
    return peak


def search_weights(x: Tensor, importance_BS: Tensor) -> Tensor:
    """Weights of squared errors, [R, B, S]: importance over its mean, and a thousandth, so that no channel counts nothing."""
    return (importance_BS / importance_BS.mean().clamp_min(1e-30)).add_(1e-3).expand_as(x)


def half(x: Tensor) -> Tensor:
    """Rounded to float16, as float32."""
    return x.half().float()


def divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once: on CUDA, torch divides by a Python number as x * (1 / by)."""
    return x / x.new_full((), by)


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where that is infinite."""
    return finite_or_zero(d.reciprocal())


def finite_or_zero(x: Tensor) -> Tensor:
    """``x``, changed in place: 0 where it is infinite."""
    return x.nan_to_num_(nan=torch.nan, posinf=0.0, neginf=0.0)


def _first_zero(x: Tensor, least: Tensor) -> Tensor:
    """``least``, and where it is a zero, the block's first zero: its sign is stored."""
    if not bool(least.all()):
        zero = least == 0
        rows = x[zero.squeeze(-1)]
        least[zero] = rows.gather(-1, rows.argmin(-1, keepdim=True)).squeeze(-1)
    return least


# -- bytes ---------------------------------------------------------------------------------------------------------------


def _put_halves(data: Tensor, *params: Tensor) -> int:
    """Write float16 numbers [R, B] to the front of each block; returns where they end."""
    for i, p in enumerate(params):
        data[..., 2 * i : 2 * i + 2] = p.half().unsqueeze(-1).view(torch.uint8)
    return 2 * len(params)


def _take_halves(data: Tensor, *names: str) -> tuple[Params, int]:
    """Undo `_put_halves`."""
    stored = data[..., : 2 * len(names)].contiguous().view(torch.float16).float()
    return {name: stored[..., i].contiguous() for i, name in enumerate(names)}, 2 * len(names)


def _pack_bits(bits: Tensor) -> Tensor:
    """32 zeros and ones as 4 bytes, the first in the lowest bit; uint8 [..., 32] -> [..., 4]."""
    eight = bits.contiguous().view(torch.int64)  # byte i of a word is at bit 8 i; times 2^(56 - 7 i) it arrives at bit 56 + i, alone
    return ((eight * 0x0102040810204080) >> 56).to(torch.uint8)


def _unpack_bits(data: Tensor) -> Tensor:
    """Undo `_pack_bits`."""
    eight = (data.to(torch.int64) * 0x0101010101010101) & -0x7FBFDFEFF7FBFDFF  # 0x8040201008040201: bit i of byte i
    return (((eight + 0x7F7F7F7F7F7F7F7F) >> 7) & 0x0101010101010101).view(torch.uint8)
