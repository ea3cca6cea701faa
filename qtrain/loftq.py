"""LoftQ: base and adapter chosen together, so that training starts near the float model (Li et al. 2023, arXiv 2310.08659).

LoRA begins with B = 0, so a model on 4 or fewer bits begins as far from the float model as rounding has put it. LoftQ alternates

    Q_t        = decode(encode(W - R_{t-1}))         R_0 = 0; the grid is the base's own, whatever it is
    R_t        = rank-r approximation of W - Q_t     by singular values: U_r S_r V_r

and starts from the base Q_t and the adapter s * B A = R_t, B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r. The error |W - Q_t - R_t|
(Frobenius) need not fall in every round, so the round with the least is taken; round 1 is plain rounding plus an adapter that makes up
for it. The base is another model than rounding W gives, which is why an adapter remembers the hash of its base.

The decomposition is a randomized one (Halko et al. 2011; `torch.svd_lowrank`) with a fixed seed: an adapter needs the first r of hundreds
of singular values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.console import progress

EXTRA = 8
"""Singular values beyond the rank that the randomized decomposition looks at."""

Start = tuple[Tensor, Tensor]
"""A [r, I], B [O, r]."""


def low_rank(x_OI: Tensor, rank: int) -> Start:
    """The best product B A [O, I] of rank r to ``x_OI``, nearly: A [r, I], B [O, r], of equal norms."""
    rank = min(rank, *x_OI.shape)
    with torch.random.fork_rng(devices=[x_OI.device] if x_OI.is_cuda else []):
        torch.manual_seed(0)
        u_Or, s_r, v_Ir = torch.svd_lowrank(x_OI, q=min(rank + EXTRA, *x_OI.shape), niter=4)
    root_r = s_r[:rank].sqrt()
    return (v_Ir[:, :rank] * root_r).T.contiguous(), (u_Or[:, :rank] * root_r).contiguous()


@torch.no_grad()
def alternate(w_OI: Tensor, rounded: Callable[[Tensor], Tensor], rank: int, rounds: int) -> tuple[Tensor, Start]:
    """The weight to round, float32 [O, I], and the A, B that make up for what rounding it loses.

    Args:
        rounded: decode(encode(.)) of the base's grid.
    """
    w = w_OI.float()
    residual, best, least = torch.zeros_like(w), None, math.inf
    for _ in range(rounds):
        target = w - residual
        left = w - rounded(target)
        a, b = low_rank(left, rank)
        residual = b @ a
        error = float((left - residual).square().sum())
        if error < least:
            best, least = (target, (a, b)), error
    if best is None:
        raise ValueError("a weight is not finite, so adapter.init=loftq cannot round it. Set model.path=/a/folder to a sound copy")
    return best


@torch.no_grad()
def start_near(model: nn.Module, grids: dict[str, Any], rank: int, scaling: float, rounds: int) -> dict[str, Start]:
    """Change the float weights that are going to be rounded, in place; returns A and B of each layer.

    Args:
        grids: the base's grid of each layer that gets an adapter.
        scaling: s of s * B A.
    """
    found = {}
    for name, grid in progress(grids.items(), "LoftQ"):
        weight: Any = model.get_submodule(name).weight

        def rounded(w: Tensor, grid: Any = grid, dtype: torch.dtype = weight.dtype) -> Tensor:
            values: Tensor = grid.encode(w.to(dtype).float()).decode()  # the base is made of what the weight's type keeps
            return values

        target, (a, b) = alternate(weight.detach(), rounded, rank, rounds)
        weight.copy_(target)
        found[name] = (a / math.sqrt(scaling), b / math.sqrt(scaling))
    return found
