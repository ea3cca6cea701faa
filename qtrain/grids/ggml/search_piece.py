"""One piece of the search for scales (`search.py`): its buffers, the passes over it, and the fits of scale, or scale and min.

Everything is float32 but the fit of step 3. A candidate's error in step 1 comes from its sums, S(xx) - ..., which cancel where a block is
nearly constant, so the plain range stands unless another one is better by more than that noise; from step 2 on errors are sums of
squared differences. Sums of 16 or 32 numbers may differ in the last bit with the number of threads, on other devices, and with the
number of rows that are quantized together, and with them, rarely, a choice between scales that are equally good.

Layout: a piece of 2^17 values per thread is transposed, one sub-block per column (s values of a sub-block, N sub-blocks), so that sums
over a sub-block are sums of rows, and every pass runs along the memory, within the L2 cache: 0.1 ns a value where a sum along the last
dimension takes 0.4. Numbers of sub-blocks are [P, n]: P super-blocks, n sub-blocks in each, N = P * n; of super-blocks, [P, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

BUFFERS = 5
"""Of the size of a piece, that a search with weights has."""
_NOISE = 2e-6
"""Share of S(xx) by which an error that comes from sums may be wrong: a few dozen units in the last place."""
_LEAST = 2.0**-24
"""Smallest positive float16."""
_TINY, _LARGE = 1e-38, 1e30


class Search(ABC):
    """A piece with a sub-block per column, the buffers that passes over it write to, and the best stored numbers so far."""

    ranges: tuple[tuple[float, ...], tuple[float, ...]]
    """Ranges to try: the largest value gets the largest code plus this, before it is rounded and clamped. The second ones are for
    importance, with which the best range may be far from the plain one: a large value that matters little is clipped."""
    sums: int
    """How many sums a fit needs."""
    rounds: int
    """How often steps 3 and 4 are done."""
    supers: list[Tensor]
    """Super-scale (and super-min), float16 values, [P, 1]."""
    subs: list[Tensor]
    """Sub-scales (and sub-mins), whole numbers, [P, n]."""
    error: Tensor
    """Error of each sub-block on those, [P, n]."""

    def __init__(self, x_PV: Tensor, w_PV: Tensor | None, size: int, low: int, high: int, space: Tensor) -> None:
        self.low, self.high = low, high
        self.shape = (len(x_PV), x_PV.shape[1] // size)
        columns = self.shape[0] * self.shape[1]
        buffers = space[: BUFFERS * x_PV.numel()].view(BUFFERS, size, columns)
        self.x, self.codes, self.v, self.wx = buffers[:4]
        self.x.copy_(x_PV.reshape(columns, size).t())
        self.w = None if w_PV is None else buffers[4].copy_(w_PV.reshape(columns, size).t())
        self.moments = x_PV.new_empty(self.sums, columns)

    @abstractmethod
    def candidates(self, wide: bool) -> tuple[Tensor, ...]:
        """Step 1: real-valued scale (and min) of the best range, [P, n]."""

    @abstractmethod
    def first(self, *real: Tensor) -> None:
        """Step 2: set ``supers`` and ``subs``."""

    @abstractmethod
    def refit(self, *sums: Tensor) -> None:
        """Step 3, on the sums of a fit."""

    @abstractmethod
    def refine(self, *sums: Tensor) -> None:
        """Step 4, on the same."""

    @abstractmethod
    def encode(self, supers: list[Tensor], subs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Nearest codes into ``codes``; returns the values they stand for, [s, N], and the step, [N]. No code matters where it is 0."""

    @abstractmethod
    def sum_codes(self, out: Tensor) -> None:
        """The sums of a fit to ``codes``, [sums, N]."""

    def store(self, wide: bool, sub_low: int, sub_high: int) -> list[Tensor]:
        """Steps 1 to 4, with the ``wide`` ranges or the others: super-scale (and super-min) [P], sub-scales (and sub-mins) [P, n]."""
        self.sub_low, self.sub_high = sub_low, sub_high
        self.first(*self.candidates(wide))
        self.error = self.measure(self.supers, self.subs)
        for _ in range(self.rounds):
            sums = self.fit_sums()
            self.refit(*sums)
            self.refine(*sums)
        return [s.squeeze(-1) for s in self.supers] + self.subs

    def measure(self, supers: list[Tensor], subs: list[Tensor]) -> Tensor:
        """Error of each sub-block, [P, n]."""
        values, step = self.encode(supers, subs)
        v = torch.addcmul(values, self.codes, step, value=-1, out=self.v)
        v.mul_(v if self.w is None else torch.mul(v, self.w, out=self.codes))
        return v.sum(0).view(self.shape)

    def fit_sums(self) -> list[Tensor]:
        """The sums of a fit to the codes of the best numbers so far, [P, n]."""
        self.encode(self.supers, self.subs)
        self.sum_codes(self.moments)
        return [m.view(self.shape) for m in self.moments]

    def try_supers(self, *supers: Tensor) -> None:
        """Take these super-scales where the super-block's error falls."""
        error = self.measure(list(supers), self.subs)
        better = error.sum(1, keepdim=True) < self.error.sum(1, keepdim=True)
        self.error = torch.where(better, error, self.error)
        self.supers = [torch.where(better, new, old) for new, old in zip(supers, self.supers, strict=True)]

    def try_subs(self, *subs: Tensor) -> None:
        """Take these sub-scales where the sub-block's error falls."""
        error = self.measure(self.supers, list(subs))
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.subs = [torch.where(better, new, old) for new, old in zip(subs, self.subs, strict=True)]

    def whole(self, real: Tensor, unit: Tensor, least: int) -> Tensor:
        """``real`` in units of a super-scale, rounded to what a sub-scale can be."""
        return (real * _inverse(unit)).round_().clamp_(least, self.sub_high)

    def weighted_codes(self) -> Tensor:
        return self.codes if self.w is None else torch.mul(self.w, self.codes, out=self.v)


class Symmetric(Search):
    """x ~ scale * code, codes from -n to n - 1, scales of either sign. Sums: S(xl), S(ll)."""

    ranges = ((0.0, -0.8, 0.8), (0.0, -2.4, -1.6, -0.8, 0.8, 1.6, 2.4))
    sums, rounds = 2, 1

    def candidates(self, wide: bool) -> tuple[Tensor, ...]:
        self.wx = self.x if self.w is None else torch.mul(self.w, self.x, out=self.wx)
        sxx = torch.mul(self.wx, self.x, out=self.v).sum(0)
        highest, lowest = self.x.amax(0), self.x.amin(0)
        inverse = _inverse(torch.where(highest > -lowest, highest, lowest))
        ranges = self.ranges[wide]
        goals = [self.low - r for r in ranges] + [self.high + r for r in ranges]
        sums = self.x.new_empty(len(goals), 2, len(inverse))
        for goal, out in zip(goals, sums, strict=True):
            torch.mul(self.x, inverse * goal, out=self.codes).round_().clamp_(self.low, self.high)
            self.sum_codes(out)
        sxl, sll = sums.unbind(1)
        scales = sxl / sll.clamp_min(_TINY)
        (scale,) = _pick((scales * sxl).neg_(), sxx, scales)
        return (scale.view(self.shape),)

    def first(self, *real: Tensor) -> None:
        (scale,) = real
        peak = scale.gather(1, scale.abs().argmax(1, keepdim=True))
        self.supers = [_half(peak / self.sub_low, peak)]
        self.subs = [self.whole(scale, self.supers[0], self.sub_low)]

    def refit(self, *sums: Tensor) -> None:
        sxl, sll = sums
        sub = self.subs[0]
        scale = (sub * sxl).sum(1, keepdim=True) / (sub * sub * sll).sum(1, keepdim=True).clamp_min_(_TINY)
        self.try_supers(_half(scale, self.supers[0]))

    def refine(self, *sums: Tensor) -> None:
        sxl, sll = sums
        self.try_subs(self.whole(sxl / sll.clamp_min(_TINY), self.supers[0], self.sub_low))
        for by in (-1, 1):
            self.try_subs((self.subs[0] + by).clamp_(self.sub_low, self.sub_high))

    def encode(self, supers: list[Tensor], subs: list[Tensor]) -> tuple[Tensor, Tensor]:
        step = (supers[0] * subs[0]).view(-1)
        torch.mul(self.x, _inverse(step), out=self.codes).round_().clamp_(self.low, self.high)
        return self.x, step

    def sum_codes(self, out: Tensor) -> None:
        torch.sum(torch.mul(self.wx, self.codes, out=self.v), 0, out=out[0])
        torch.sum(torch.mul(self.weighted_codes(), self.codes, out=self.v), 0, out=out[1])


class WithMin(Search):
    """x ~ scale * code - min, codes from 0, scale and min at least 0. Sums: S(l), S(ll), S(ul).

    Sums and fits are of u = x - low, low the smallest value or 0: a block far from zero would lose its digits otherwise.
    """

    ranges = ((0.0, -0.8, -0.4, 0.4, 0.8), (0.0, -0.8, -0.4, 0.4, 0.8, 1.4, 2.0))
    sums, rounds = 3, 2

    def candidates(self, wide: bool) -> tuple[Tensor, ...]:
        self.lowest = self.x.amin(0).clamp_max_(0.0)
        span = self.x.amax(0).sub_(self.lowest)
        u = self.x.sub_(self.lowest)
        self.wx = u if self.w is None else torch.mul(self.w, u, out=self.wx)
        self.s1 = torch.full_like(span, len(u)) if self.w is None else self.w.sum(0)
        self.su = self.wx.sum(0)
        suu = torch.mul(self.wx, u, out=self.v).sum(0)
        inverse = _inverse(span)
        ranges = self.ranges[wide]
        sums = u.new_empty(len(ranges), 3, len(span))
        for r, out in zip(ranges, sums, strict=True):
            torch.mul(u, inverse * (self.high + r), out=self.codes).round_().clamp_max_(self.high)
            self.sum_codes(out)
        sl, sll, sul = sums.unbind(1)
        scale, offset = self.fit(sl, sll, sul)
        error = scale * (scale * sll - 2 * sul + 2 * offset * sl) + offset * (offset * self.s1 - 2 * self.su)
        scale, offset = _pick(error, suu, scale, offset)
        return scale.view(self.shape), offset.add_(self.lowest).neg_().view(self.shape)

    def fit(self, sl: Tensor, sll: Tensor, sul: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset of least error of u ~ scale * code + offset, the min not negative."""
        det = self.s1 * sll - sl * sl
        singular = det <= 1e-6 * self.s1 * sll
        offset = ((sll * self.su - sl * sul) / det.masked_fill(singular, 1.0)).masked_fill_(singular, 0.0)
        offset = torch.minimum(offset, -self.lowest)
        return (sul - offset * sl).div_(sll.clamp_min(_TINY)).clamp_min_(0.0), offset

    def first(self, *real: Tensor) -> None:
        self.supers = [_half(peak / self.sub_high, peak) for peak in (r.amax(1, keepdim=True) for r in real)]
        self.subs = [self.whole(r, unit, 0) for r, unit in zip(real, self.supers, strict=True)]

    def refit(self, *sums: Tensor) -> None:
        """Two numbers to 256 values; then the scale once more for the min as it is stored."""
        sl, sll, sul = sums
        (scale, least), (sub, sub_min), lowest = self.supers, self.subs, self.lowest.view(self.shape)
        s1, sx = self.s1.view(self.shape), self.su.view(self.shape) + lowest * self.s1.view(self.shape)
        a11, a12, a22 = _total(sub * sub * sll), _total(sub * sub_min * sl), _total(sub_min * sub_min * s1)
        b1, b2 = _total(sub * (sul + lowest * sl)), _total(sub_min * sx)
        det = a11 * a22 - a12 * a12
        fitted = (a12 * b1 - a11 * b2) / det
        usable = (det > 1e-9 * a11 * a22) & (fitted > 0)
        least = torch.where(usable, _half(fitted.float(), least), least)
        scale = torch.where(a11 > 0, _half(((b1 + a12 * least) / a11).float(), scale), scale).clamp_min_(0.0)
        self.try_supers(scale, least)

    def refine(self, *sums: Tensor) -> None:
        sl, sll, sul = sums
        _, offset = self.fit(*self.moments)
        lowest, unit = self.lowest.view(self.shape), self.supers[1]
        real = -(offset.view(self.shape) + lowest) * _inverse(unit)
        nearest = real.round().clamp_(0, self.sub_high)
        for sub_min in (nearest, (nearest + torch.sign(real - nearest)).clamp_(0, self.sub_high)):
            scale = (sul + (unit * sub_min + lowest) * sl) / sll.clamp_min(_TINY)
            self.try_subs(self.whole(scale, self.supers[0], 0), sub_min)
        for by in (-1, 1):
            self.try_subs((self.subs[0] + by).clamp_(0, self.sub_high), self.subs[1])

    def encode(self, supers: list[Tensor], subs: list[Tensor]) -> tuple[Tensor, Tensor]:
        step, least = (unit * sub for unit, sub in zip(supers, subs, strict=True))
        torch.add(self.x, least.view(-1) + self.lowest, out=self.v)
        torch.mul(self.v, _inverse(step.view(-1)), out=self.codes).round_().clamp_(self.low, self.high)
        return self.v, step.view(-1)

    def sum_codes(self, out: Tensor) -> None:
        weighted = self.weighted_codes()
        torch.sum(weighted, 0, out=out[0])
        torch.sum(torch.mul(weighted, self.codes, out=self.v), 0, out=out[1])
        torch.sum(torch.mul(self.wx, self.codes, out=self.v), 0, out=out[2])


def _pick(error: Tensor, total: Tensor, *of: Tensor) -> list[Tensor]:
    """Of each tensor [K, N] the entries of least ``error`` [K, N]; those of the first row unless others are better than noise.

    (An argmin over dim 0 would cost three times as much. Rows may tie, with different codes: what is taken of one is of one row.)
    """
    least = error.amin(0)
    first, others = least >= error[0] - _NOISE * total, error != least
    taken = []
    for tensor in of:
        best = tensor.masked_fill(others, -torch.inf).amax(0)
        others |= tensor != best
        taken.append(torch.where(first, tensor[0], best))
    return taken


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and something large instead of infinity."""
    return x.reciprocal().clamp_(-_LARGE, _LARGE)


def _half(x: Tensor, real: Tensor) -> Tensor:
    """``x`` rounded to float16, as float32; not to 0 where ``real`` is not."""
    stored = x.half().float()
    return torch.where((stored == 0) & (real != 0), torch.copysign(stored.new_full((), _LEAST), x), stored)


def _total(x: Tensor) -> Tensor:
    """Sums over super-blocks, [P, 1]; float64, for the fit of two numbers is a small difference of large ones."""
    return x.sum(1, keepdim=True, dtype=torch.float64)
