"""The straight-through estimator as autograd functions.

`straight_through` serves every grid whose scales are a function of the weights. `learned_step` is LSQ
(Esser et al. 2020, arXiv 1902.08153, equations 1-5): the scale is a parameter with a gradient of its own.

The registry imports every file of this package, and `--help` must not import torch: the functions are made when first called.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")


@cache
def _straight_through() -> Any:
    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
            if mask is not None:
                ctx.save_for_backward(mask)
            ctx.masked = mask is not None
            return values.view_as(values)

        @staticmethod
        def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
            (g,) = grad
            return (torch.where(ctx.saved_tensors[0], g, 0.0) if ctx.masked else g), None, None

    return StraightThrough


@cache
def _learned_step() -> Any:
    class LearnedStep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_RGS: Tensor, scale_RG1: Tensor, low: int, high: int) -> Tensor:
            v = x_RGS * (1.0 / scale_RG1)
            codes = v.round().clamp_(low, high)
            ctx.save_for_backward(v, codes)
            ctx.low, ctx.high = low, high
            return (codes + 0.0) * scale_RG1  # + 0.0: integer codes have no -0.0

        @staticmethod
        def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
            (g,) = grad
            v, codes = ctx.saved_tensors
            inside = (v > ctx.low) & (v < ctx.high)  # v itself, not round(v): that is `straight_through`'s mask
            step = torch.where(inside, codes - v, codes)  # equation 3: round(v) - v inside, the bound outside
            grad_scale = (g * step).sum(-1, keepdim=True) / (g.shape[-1] * ctx.high) ** 0.5  # section 2.2: 1/sqrt(N * Q_P)
            return g * inside, grad_scale, None, None  # equation 5

    return LearnedStep


def straight_through(w: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``values`` (to the bit), with the gradient of ``w`` where ``mask`` is true (everywhere if it is None)."""
    result: Tensor = _straight_through().apply(w, values, mask)
    return result


def learned_step(x_RGS: Tensor, scale_RG1: Tensor, low: int, high: int) -> Tensor:
    """LSQ fake-quant.

    Args:
        x_RGS: values, float32, cut into groups of S that share a scale.
        scale_RG1: scales other than zero, already rounded to their stored type.
        low, high: smallest and largest code.

    Returns:
        codes * scale, shape [R, G, S]; gradients reach both inputs.
    """
    result: Tensor = _learned_step().apply(x_RGS, scale_RG1, low, high)
    return result
