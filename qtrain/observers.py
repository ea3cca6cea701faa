"""Ranges of activations for static calibration, by name: what a collector sees of a few batches, and the range it then answers with.

A static activation grid has one range per tensor, found before deployment from a handful of batches. What lies beyond it is clipped, and a
wide one has coarse steps; the collectors differ in how they trade the two:

    minmax          every value that was seen                                                        torchao's MinMaxObserver
    moving_average  mean of the batches' minima and maxima (Jacob et al. 2018, arXiv 1712.05877)     torchao's, with even weights at first
    percentile      the middle `percentile` per cent of the values                                   ours: torchao has none
    histogram_mse   the least squared error of the codes that the grid would have                    ours: torchao's is often far from it
    histogram_kl    the least relative entropy (Migacz 2017, GTC S7310: TensorRT's calibration)      ours: torchao has none

All are per tensor. A range need not hold zero: the grid widens it. On a symmetric grid the last three search thresholds on |x| and answer
(-t, t); on an asymmetric one the two ends move on their own (percentile, histogram_mse), or are (-t, t) cut to what was seen (histogram_kl,
as in onnxruntime). Where all values seen are one number c, the range is (c, c).

**The histogram** (of the last three) is signed. Its bins are 2^k wide, one edge is zero, and k is the least with which the largest
magnitude seen fits; a batch that does not fit merges bins in pairs. floor(x / 2^k) is exact in float32 (short of underflow), and so is
merging: the counts (int64) follow from the values alone, whatever the order of the batches, where they were cut, the device or the
threads. The largest magnitude is `bins` to 2 * `bins` bins from zero; a collector takes 32 * `bins` bytes. onnxruntime fixes the width at
the first batch and appends bins without bound; torchao spreads old bins over new ones, and its float32 counts of one batch stop at 2^24.

Exact zeros (from a ReLU, or padding) are codes of every grid and cost the two searches nothing, so both leave them out. onnxruntime counts
them in: one bin is then so high that the entropy search clips far too much.

Cost: one pass for the ends, which also finds NaN, and one for the histogram, in pieces that fit in the L2 cache.
`python -m benchmarks.observers` times it beside torchao.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtrain.grids.base import Grid

_PIECE = 1 << 17
"""Values per piece of the histogram's pass on a CPU: they and their int32 bin numbers stay in the L2 cache."""
_PIECE_ELSEWHERE = 1 << 24
_RANGES = 512
"""Ranges of the entropy search per piece: a megabyte for each intermediate."""
_LEAST_COUNT = 1e-4
"""Count of a level that holds nothing, which makes divergences finite; onnxruntime smooths with the same number."""


class Collector(ABC):
    """Sees batches of one activation and answers with its range."""

    def __init__(self, grid: Grid, percentile: float = 99.99, momentum: float = 0.01, bins: int = 2048) -> None:
        """``percentile`` in per cent, ``momentum`` the share of a new batch, ``bins`` per sign; each collector reads its own."""
        self.bits = grid.code_bits
        self.symmetric = bool(getattr(grid, "symmetric", False))
        self.percentile, self.momentum, self.bins = percentile, momentum, bins
        self.low, self.high = math.inf, -math.inf
        """Ends of what was seen, both float32 numbers."""

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Fold in one batch, of any shape, float type and device; an empty one is ignored.

        Raises:
            ValueError: if values are not finite in float32, saying how many. Nothing was folded in then.
        """
        x = x.detach()
        if not x.numel():
            return
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            x = x.float()
        low, high = (float(end) for end in x.aminmax())  # NaN if any value is
        if not (math.isfinite(low) and math.isfinite(high)):
            nans, infinities = int(x.isnan().sum()), int(x.isinf().sum())
            raise ValueError(f"{nans + infinities:,} of {x.numel():,} values are not finite: {nans:,} NaN, {infinities:,} infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.fold(x, low, high)

    def range(self) -> tuple[Tensor, Tensor]:
        """The range, low <= high: two float32 scalars on the CPU.

        Raises:
            ValueError: if no value was seen.
        """
        if self.low > self.high:
            raise ValueError("no data seen: there is no range before `observe` was given a batch that is not empty")
        low, high = (self.low, self.high) if self.low == self.high else self.choose()
        return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)

    @abstractmethod
    def fold(self, x: Tensor, low: float, high: float) -> None:
        """Take in a batch that is finite and not empty; ``low`` and ``high`` are its ends."""

    @abstractmethod
    def choose(self) -> tuple[float, float]:
        """The range, where more than one value was seen."""


class MinMax(Collector):
    """Everything that was seen: never clips, and one outlier makes every step coarse. torchao's `MinMaxObserver`."""

    def __init__(self, grid: Grid, percentile: float = 99.99, momentum: float = 0.01, bins: int = 2048) -> None:
        super().__init__(grid, percentile, momentum, bins)
        self.observer = self.torchao()

    def torchao(self) -> Any:
        """The observer to feed. Importing torchao takes seconds, so only a collector that uses it does."""
        from torchao.quantization.pt2e.observer import MinMaxObserver

        return MinMaxObserver()

    def fold(self, x: Tensor, low: float, high: float) -> None:
        self.observer(torch.tensor([low, high]))  # the two ends are all it would look for, in a second pass

    def choose(self) -> tuple[float, float]:
        return float(self.observer.min_val), float(self.observer.max_val)


class MovingAverage(MinMax):
    """Average of each batch's minimum and maximum; a new batch weighs ``momentum``, but the first 1 / momentum batches weigh the same.

    torchao's `MovingAverageMinMaxObserver`, told before each batch what it weighs. Its own schedule starts at the first batch and then
    moves by 0.01: of 8 batches of calibration, the first would decide 93 % and every other 1 %.
    """

    def __init__(self, grid: Grid, percentile: float = 99.99, momentum: float = 0.01, bins: int = 2048) -> None:
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum is {momentum}; a new batch weighs more than 0 and at most 1: momentum=0.01, say")
        super().__init__(grid, percentile, momentum, bins)
        self.batches = 0

    def torchao(self) -> Any:
        from torchao.quantization.pt2e.observer import MovingAverageMinMaxObserver

        return MovingAverageMinMaxObserver()

    def fold(self, x: Tensor, low: float, high: float) -> None:
        self.batches += 1
        self.observer.averaging_constant = max(self.momentum, 1.0 / self.batches)
        super().fold(x, low, high)


class Histogram(Collector):
    """Counts in bins that are a power of two wide; the head of this file says why."""

    counts_zeros: ClassVar[bool] = True

    def __init__(self, grid: Grid, percentile: float = 99.99, momentum: float = 0.01, bins: int = 2048) -> None:
        super().__init__(grid, percentile, momentum, bins)
        if bins < 2**self.bits:
            raise ValueError(f"bins is {bins}; a grid of {self.bits} bits needs at least {2**self.bits} of them: bins=2048, say")
        self.half = 2 * bins
        """Bins on either side of zero; even, so that pairs do not straddle it."""
        self.width = 0.0
        """Of a bin: a power of two, or 0 while all values seen are zero."""
        self.counts = torch.zeros(2 * self.half, dtype=torch.int64)
        """Values per bin, on the CPU: bin i covers [(i - half) * width, (i - half + 1) * width)."""
        self.zeros = 0
        """How many of bin ``half`` are exactly 0, where the collector wants to know."""

    def fold(self, x: Tensor, low: float, high: float) -> None:
        self._fit(max(-low, high))
        if not self.width:
            self.counts[self.half] += x.numel()
            self.zeros += x.numel()
            return
        flat, size = x.reshape(-1), _PIECE if x.device.type == "cpu" else _PIECE_ELSEWHERE
        for start in range(0, len(flat), size):
            piece = flat[start : start + size]
            bins = piece.float().mul(1.0 / self.width).floor_().add_(self.half).to(torch.int32)
            self.counts += torch.bincount(bins, minlength=2 * self.half).cpu()
            if self.counts_zeros:
                self.zeros += piece.numel() - int(piece.count_nonzero())

    def _fit(self, magnitude: float) -> None:
        """Merge bins until ``magnitude`` < half * width."""
        if not magnitude:
            return
        least = 2.0 ** max(math.frexp(magnitude / self.half)[1], -126)
        if not self.width:
            self.width = least  # zeros, if there are any, are in the right bin
        while self.width < least:
            self.width *= 2.0
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts.zero_()
            self.counts[self.half // 2 : self.half // 2 + self.half] = pairs

    @property
    def magnitude(self) -> float:
        """The largest |x| seen."""
        return max(-self.low, self.high)

    def nonzero(self) -> Tensor:
        """Counts without exact zeros, float64 [2 * half]."""
        counts = self.counts.double()
        counts[self.half] -= self.zeros
        return counts

    def folded(self, counts: Tensor) -> Tensor:
        """Counts of |x|, [half]: bin i covers [i * width, (i + 1) * width)."""
        return counts[self.half :] + counts[: self.half].flip(0)


class Percentile(Histogram):
    """The smallest range of whole bins that holds the middle ``percentile`` per cent of the values: as many are cut off at either end.

    On a symmetric grid t is that percentile of |x|. It is onnxruntime's `compute_percentile`, but for the upper end, where that returns the
    lower edge of the bin and this the upper: at least ``percentile`` per cent of the values are inside.
    """

    counts_zeros = False

    def __init__(self, grid: Grid, percentile: float = 99.99, momentum: float = 0.01, bins: int = 2048) -> None:
        if not 0.0 < percentile <= 100.0:
            raise ValueError(
                f"percentile is {percentile}; the share of values to keep, above 0 and at most 100. Set quantizer.percentile=99.99, say."
            )
        super().__init__(grid, percentile, momentum, bins)

    def choose(self) -> tuple[float, float]:
        share = self.percentile / 100.0
        if self.symmetric:
            t = min(_bins_holding(self.folded(self.counts), share) * self.width, self.magnitude)
            return -t, t
        share = 0.5 + share / 2.0
        above, below = _bins_holding(self.counts.flip(0), share), _bins_holding(self.counts, share)
        return max((self.half - above) * self.width, self.low), min((below - self.half) * self.width, self.high)


def _bins_holding(counts: Tensor, share: float) -> int:
    """How many leading bins hold at least ``share`` of all values."""
    cumulative = counts.cumsum(0)
    total = int(cumulative[-1])
    rank = min(max(math.ceil(share * total - 1e-6), 1), total)  # less rounding: 0.07 * 100 is 7.000000000000001
    return int(torch.searchsorted(cumulative, rank)) + 1


class HistogramMse(Histogram):
    """The range whose codes have the least squared error, the values of a bin taken as spread evenly over it.

    A range means codes at q_1 < ... < q_n, s apart: scale, rounded zero point and number of codes are the grid's. Let F(b) count the values
    below b, and b_k be halfway between q_k and q_k+1; then, summed by parts,

        sum of (x - q(x))^2  =  sum of (x - q_n)^2  -  2 s * sum over k < n of G(b_k)        G(b) = integral of F up to b

    so that a range costs n - 1 look-ups in G, which is a quadratic in each bin, and thousands of ranges are tried at once. Either end moves
    from what was seen down to 1/1024 of it, in steps of 19 % first and then ever finer around the best. On every distribution of the tests
    the error over the data themselves is within 3 % of the best of an exhaustive search, or better.

    Why not torchao's (measured by `python -m benchmarks.observers`). `HistogramObserver` moves the ends inwards by quantiles and stops at
    the first move that does not help: normal values with an outlier at -80 and one at 25 get 3.2 x the least error, twice that of minmax.
    It searches as though every grid were asymmetric, and had all the codes of its dtype: up to 1.3 x on a symmetric grid of 8 bits, 2.4 x
    on one of 7. It takes one and a half times as long. `AffineQuantizedMSEObserver` makes 100 passes over a batch, tries symmetric ranges
    only, and forgets all batches but one.
    """

    _COARSE, _FINE, _ROUNDS = 41, 9, 3

    def choose(self) -> tuple[float, float]:
        low, high = (-self.magnitude, self.magnitude) if self.symmetric else (min(self.low, 0.0), max(self.high, 0.0))
        spread = _Spread(self)
        step = 1024.0 ** (1.0 / (self._COARSE - 1))
        f_low = f_high = step ** -torch.arange(self._COARSE, dtype=torch.float64)
        one = f_low[:1]
        best = one.expand(2)
        for i in range(1 + self._ROUNDS):
            if i:
                fine = step ** torch.linspace(-1.0, 1.0, self._FINE, dtype=torch.float64)
                f_low, f_high = (best[0] * fine).clamp_max(1.0), (best[1] * fine).clamp_max(1.0)
                step **= 2.0 / (self._FINE - 1)
            pairs = (
                torch.stack([f_high, f_high], 1) if self.symmetric else torch.cartesian_prod(f_low if low else one, f_high if high else one)
            )
            best = pairs[spread.squared_error(low * pairs[:, 0], high * pairs[:, 1]).argmin()]
        return low * float(best[0]), high * float(best[1])


class _Spread:
    """The values of a histogram, each bin's spread evenly over it, or over the part of it that is within what was seen; without zeros."""

    def __init__(self, histogram: Histogram) -> None:
        self.histogram = h = histogram
        counts = h.nonzero()
        edges = ((torch.arange(2 * h.half + 1, dtype=torch.float64) - h.half) * h.width).clamp(h.low, h.high)
        width = edges.diff()
        zero = counts.new_zeros(1)
        self.left = edges[:-1]
        self.below = torch.cat([zero, counts.cumsum(0)])[:-1]
        """F at the left edge of each bin."""
        self.integral = torch.cat([zero, ((self.below + counts / 2) * width).cumsum(0)])[:-1]
        """G there."""
        self.curve = torch.where(width > 0, counts / (2 * width), 0.0)
        self.count = float(counts.sum())
        self.sum = float((counts * (edges[1:] + edges[:-1])).sum()) / 2
        self.squares = float((counts * (edges[1:].square() + edges[1:] * edges[:-1] + edges[:-1].square())).sum()) / 3

    def g(self, b: Tensor) -> Tensor:
        """G, float64 in the shape of ``b``."""
        h = self.histogram
        x = b.clamp(h.low, h.high)
        bins = (x / h.width).floor_().to(torch.int64).add_(h.half)
        d = x - self.left[bins]
        return self.integral[bins] + d * (self.below[bins] + d * self.curve[bins]) + self.count * (b - x).clamp_min_(0.0)

    def squared_error(self, low: Tensor, high: Tensor) -> Tensor:
        """Summed squared error of the codes over each range [low, high] that holds zero; all float64 [R]."""
        first, last = -(2 ** (self.histogram.bits - 1)), 2 ** (self.histogram.bits - 1) - 1
        if self.histogram.symmetric:
            scale, zero_point = high / last, torch.zeros_like(high)
        else:
            scale = (high - low) / (last - first)
            zero_point = (first - (low / scale).round_()).clamp_(first, last)
        halfway_RK = (torch.arange(first, last, dtype=torch.float64) + 0.5 - zero_point.unsqueeze(1)) * scale.unsqueeze(1)
        q = (last - zero_point) * scale
        return self.squares - 2 * q * self.sum + q.square() * self.count - 2 * scale * self.g(halfway_RK).sum(1)


class HistogramKl(Histogram):
    """The range whose levels keep most of the histogram's information: least KL(P || Q) (Migacz 2017, "8-bit inference with TensorRT").

    For each threshold t, a whole number of bins: P is the histogram up to t, with all that lies beyond added to the last bin; Q is the
    histogram up to t merged into as many levels as the grid has codes (of a symmetric grid: codes from zero up, and the histogram of |x|),
    each level then spread evenly over those of its bins in which P has values. The threshold of the least divergence wins, of equal ones
    the widest.

    Where the number of bins is no multiple of the levels, bin i of n is in level floor(i * levels / n): all levels are equally wide, to a
    bin. onnxruntime gives the remainder to the last level but does not spread that level over it, and its candidates, 2 i + 1 bins, always
    have one if the levels are even: the bin that took the outliers on the right then has next to nothing in Q, and clipping looks dear.
    With an odd number of levels some candidates leave none; there the divergences are equal and so is the best candidate, and the
    thresholds are a step between such candidates apart, or less.

    Divergences follow from cumulative sums of h, of h log h and of bins in use, looked up at the edges of the levels; all thresholds
    are tried at once. The curve is flat where values are few: thresholds from different samples of the same data differ by tenths. And it
    is blind to how far away the values are that it clips: on outliers that matter, the squared error is many times that of histogram_mse.
    """

    def choose(self) -> tuple[float, float]:
        counts, magnitude = self.nonzero(), self.magnitude
        t = torch.arange(1, int(magnitude / self.width) + 2)
        if self.symmetric:
            counts, levels = self.folded(counts), 2 ** (self.bits - 1)
            starts, stops = torch.zeros_like(t), t
        else:
            levels = 2**self.bits
            starts = (self.half - t).clamp_min(self.half + math.floor(min(self.low, 0.0) / self.width))
            stops = (self.half + t).clamp_max(self.half + math.floor(max(self.high, 0.0) / self.width) + 1)
        enough = stops - starts >= levels
        if not bool(enough.any()):  # only below 1e-34, where bins would be narrower than float32 can express
            return (-magnitude, magnitude) if self.symmetric else (self.low, self.high)
        t, divergence = t[enough], divergences(counts, starts[enough], stops[enough], levels)
        widest = int((divergence <= divergence.min() + 1e-12).nonzero()[-1])
        threshold = min(float(t[widest]) * self.width, magnitude)
        return (-threshold, threshold) if self.symmetric else (max(-threshold, self.low), min(threshold, self.high))


def divergences(counts: Tensor, starts: Tensor, stops: Tensor, levels: int) -> Tensor:
    """KL(P || Q) in nats for each range of bins [start, stop) of a histogram, as in `HistogramKl`.

    Args:
        counts: values per bin, float64 [B], some of them positive.
        starts, stops: int64 [R]; each range has at least ``levels`` bins.
        levels: how many equally wide ones Q has.

    Returns:
        float64 [R].
    """
    zero = counts.new_zeros(1)
    sums = torch.cat([zero, counts.cumsum(0)])
    used = torch.cat([zero, (counts > 0).double().cumsum(0)])
    logs = torch.cat([zero, torch.xlogy(counts, counts).cumsum(0)])
    total = sums[-1]
    parts = []
    for first_range in range(0, len(starts), _RANGES):
        a, b = starts[first_range : first_range + _RANGES], stops[first_range : first_range + _RANGES]
        edges_RL = a.unsqueeze(1) + (torch.arange(levels + 1) * (b - a).unsqueeze(1) + levels - 1) // levels
        merged_RL, used_RL = sums[edges_RL].diff(dim=1), used[edges_RL].diff(dim=1)
        first, last, below, above = counts[a], counts[b - 1], sums[a], total - sums[b]
        p_log_p = logs[b] - logs[a] - torch.xlogy(first, first) - torch.xlogy(last, last)
        p_log_p += torch.xlogy(first + below, first + below) + torch.xlogy(last + above, last + above)
        p_RL = merged_RL.clone()
        p_RL[:, 0] += below
        p_RL[:, -1] += above
        used_RL[:, 0] += ((first == 0) & (below > 0)).double()
        used_RL[:, -1] += ((last == 0) & (above > 0)).double()
        q_RL = (merged_RL / used_RL.clamp_min(1.0)).clamp_min(_LEAST_COUNT)
        kept = (sums[b] - sums[a]).clamp_min(_LEAST_COUNT)
        parts.append((p_log_p - torch.xlogy(p_RL, q_RL).sum(1)) / total - total.log() + kept.log())
    return torch.cat(parts)


OBSERVERS: dict[str, type[Collector]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "histogram_mse": HistogramMse,
    "histogram_kl": HistogramKl,
}
"""Collectors by name."""


def make(name: str, *, grid: Grid, percentile: float = 99.99, momentum: float = 0.01, bins: int = 2048) -> Collector:
    """A fresh collector for one activation that will be on ``grid``.

    Args:
        name: one of `OBSERVERS`.
        grid: decides the number of codes, and whether ranges are symmetric.
        percentile: per cent of the values to keep (percentile).
        momentum: what a new batch weighs after the first 1 / momentum (moving_average).
        bins: least number of bins from zero to the largest magnitude (percentile, histogram_mse, histogram_kl).

    Raises:
        ValueError: if there is no such collector, or an option that it reads is out of range.
    """
    if name not in OBSERVERS:
        raise ValueError(f"the observer is {name!r}; valid: {', '.join(OBSERVERS)}. Set quantizer.observer=moving_average, say.")
    return OBSERVERS[name](grid, percentile, momentum, bins)
