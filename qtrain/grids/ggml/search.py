"""The search for scales: least (weighted) squared error on the numbers that a block can store.

    error = sum over values of weight * (x - value(nearest code))^2

A scale that minimises it is not the range divided by the number of codes: a range a little smaller or larger, then fitted, does
better. For given codes l the best scale, or scale and min, is a linear least-squares fit over the block, S(..) = sum of weight * ..:

    x ~ scale * l            scale = S(xl) / S(ll)
    x ~ scale * l - min      scale = (S(1) S(xl) - S(x) S(l)) / (S(1) S(ll) - S(l)^2), min likewise, and at least 0

llama.cpp (make_qx_quants, make_q3_quants, make_qkx2_quants, make_qkx3_quants, make_qp_quants in ggml-quants.c) tries 16 to 37 ranges
per sub-block, fits each, keeps the best, rounds the fitted scales to 4, 6 or 8 bits under a float16 super-scale, and takes the nearest
codes. What that rounding costs is lost. Here (`super_block`):

    1. candidates    fewer ranges than llama.cpp's, the same fit; a symmetric block also with a scale of the other sign
    2. store         super-scale (and super-min) from the largest sub-block, as llama.cpp; sub-scales rounded to what is left
    3. refit         for the codes and sub-scales so far, the super-scale (and super-min) of least error: 1 or 2 numbers, 256 values
    4. refine        each sub-block tries its two nearest sub-mins, each with the sub-scale that fits it best, then the sub-scales
                     next to what it has; every trial takes its nearest codes, and its error is measured, not estimated

3 and 4 are done once for symmetric types and twice for those with a min, and nothing is kept unless the error of what is *stored*
falls. A float16 super-scale that rounds badly is so repaired by the sub-scales above it; one too small for float16 becomes its least
positive number, where llama.cpp stores zeros.

Weights: none without importance, so that the error is the weight's squared error, but for q3_k: sqrt(2 * mean square + x^2), with which
stories15M and SmolLM2-135M lost 5 % less (KL divergence) than without; q4_k and q2_k lost more with it. (llama.cpp weighs by |x|, x^2
or rms + |x|; its own files lost 4 to 13 % more in q3_k, 5 % more in q4_k, 29 % more in q2_k.)
With importance, the mean squared activation of each input channel, the error is that of the layer's output if channels are independent
(llama.cpp multiplies by sqrt(2 * mean square + x^2) besides). The importance is divided by its mean, and a thousandth is added, so that a
channel that calibration never saw is not given up.

What is done to one piece is in `search_piece.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qtrain.grids.base import Params
from qtrain.grids.ggml.search_piece import BUFFERS, Search, Symmetric, WithMin

if TYPE_CHECKING:
    from qtrain.grids.ggml.superblocks import SuperBlock

_PIECE = 1 << 17
"""Values per piece and thread: 512 KiB a buffer, of which a search has three, with weights five."""
_UNSEEN = 1e-3
"""Added to an importance of mean 1."""


def super_block(x_RBS: Tensor, importance_BS: Tensor | None, kind: SuperBlock) -> Params:
    """Stored parameters of a K-type for ``x_RBS``, in the order and shapes of the type.

    Args:
        x_RBS: float32 values, finite.
        importance_BS: mean squared activation of the input channels, float32, or None.
        kind: says how many codes and sub-scales there are.
    """
    rows, blocks, size = x_RBS.shape
    x = x_RBS.reshape(rows * blocks, size)
    importance = None if importance_BS is None else _normalised(importance_BS)
    step = max(1, _PIECE * torch.get_num_threads() // size)
    space = x.new_empty(BUFFERS * min(step, max(len(x), 1)) * size)
    found = []
    for start in range(0, max(len(x), 1), step):
        piece = x[start : start + step]
        weights = by_magnitude(piece) if kind.by_magnitude and importance is None else None
        if importance is not None:
            weights = importance[torch.arange(start, start + len(piece), device=x.device) % blocks]
        search = (WithMin if kind.has_min else Symmetric)(piece, weights, kind.sub, kind.low, kind.high, space)
        found.append(search.store(importance is not None, kind.sub_low, kind.sub_high))
    joined = [torch.cat(parts) for parts in zip(*found, strict=True)]
    stored = {}
    for name, value in zip(kind.param_bits, joined, strict=True):
        dtype = torch.int8 if name.startswith("sub_") else torch.float32
        stored[name] = value.reshape(rows, blocks * value.shape[1:].numel()).to(dtype)
    return stored


def symmetric_scale(x_RBS: Tensor, weight_RBS: Tensor, levels: int) -> Tensor:
    """Scale [R, B] of least weighted error for codes from -levels to levels - 1 (q4_0: 8), not rounded; its sign is part of it."""
    return _plain(Symmetric, x_RBS, weight_RBS, -levels, levels - 1)[0]


def scale_and_min(x_RBS: Tensor, weight_RBS: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and min [R, B] of least weighted error for values code * scale + min, codes from 0 to ``top``; not rounded, min at most 0."""
    scale, least = _plain(WithMin, x_RBS, weight_RBS, 0, top)
    return scale, -least


def _plain(cls: type[Search], x_RBS: Tensor, weight_RBS: Tensor, low: int, high: int) -> tuple[Tensor, ...]:
    """Steps 1 of the search alone: no super-blocks."""
    rows, blocks, size = x_RBS.shape
    x, weights = x_RBS.reshape(-1, size), weight_RBS.reshape(-1, size)
    search = cls(x, weights, size, low, high, x.new_empty(BUFFERS * x.numel()))
    return tuple(part.view(rows, blocks) for part in search.candidates(wide=True))


def by_magnitude(x_PV: Tensor) -> Tensor:
    """sqrt(2 * mean square of the super-block + x^2): weights for a type of few codes where there is no importance."""
    squares = x_PV * x_PV
    return squares.add_(squares.mean(1, keepdim=True).mul_(2)).sqrt_()


def _normalised(importance_BS: Tensor) -> Tensor | None:
    """Importance with mean 1, and something for every channel; None if it is all zeros."""
    mean = importance_BS.mean()
    return None if not bool(mean > 0) else (importance_BS / mean).add_(_UNSEEN)
