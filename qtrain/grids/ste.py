"""The straight-through estimator as autograd functions (not registered: this file may import torch).

`straight_through` serves every grid whose scales are a function of the weights. `learned_step` is LSQ
(Esser et al. 2020, arXiv 1902.08153, equations 1-5): the scale is a parameter with a gradient of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        if mask is not None:
            ctx.save_for_backward(mask)
        ctx.masked = mask is not None
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        (g,) = grad
        return (g * ctx.saved_tensors[0] if ctx.masked else g), None, None


def straight_through(w: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``values`` (to the bit), with the gradient of ``w`` where ``mask`` is true (everywhere if it is None)."""
    result: Tensor = _StraightThrough.apply(w, values, mask)  # type: ignore[no-untyped-call]
    return result


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RGS: Tensor, scale_RG1: Tensor, low: int, high: int) -> Tensor:  # noqa: D102
        v = x_RGS * (1.0 / scale_RG1)
        codes = v.round().clamp_(low, high)
        ctx.save_for_backward(v, codes)
        ctx.low, ctx.high = low, high
        return codes * scale_RG1

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: D102
        (g,) = grad
        v, codes = ctx.saved_tensors
        rounded = v.round()
        inside = (rounded >= ctx.low) & (rounded <= ctx.high)
        step = torch.where(inside, codes - v, codes)  # equation 3: round(v) - v inside, the bound outside
        grad_scale = (g * step).sum(-1, keepdim=True) / (g.shape[-1] * ctx.high) ** 0.5  # section 2.2: 1/sqrt(N * Q_P)
        return g * inside, grad_scale, None, None


def learned_step(x_RGS: Tensor, scale_RG1: Tensor, low: int, high: int) -> Tensor:
    """LSQ fake-quant.

    Args:
        x_RGS: values, float32, cut into groups of S that share a scale.
        scale_RG1: positive scales, already rounded to their stored type.
        low, high: smallest and largest code.

    Returns:
        codes * scale, shape [R, G, S]; gradients reach both inputs.
    """
    result: Tensor = _LearnedStep.apply(x_RGS, scale_RG1, low, high)  # type: ignore[no-untyped-call]
    return result
