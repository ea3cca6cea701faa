"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438), then static INT8.

    x' = x / s        w' = w * s        s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)        j: input channels

Some channels of a transformer's activations are a hundred times larger than the rest, and one scale per tensor gives the rest few codes.
Dividing them by s and multiplying the weights, which have a scale per output channel, computes the same and is easier to round. Where
the activation comes out of a LayerNorm that only such layers read, 1 / s goes into its weight and bias and costs nothing; elsewhere (a
post-norm encoder such as BERT adds the same values to its residual) the layer multiplies its input by 1 / s.

The smoothing itself is `quantizer.smoothquant=ALPHA`, which every quantizer takes; this one is `ptq_static` with ALPHA = 0.5. The
arithmetic is in `qtrain/smoothing.py`; layers that would be rounded worse by it are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qtrain.registry import register
from qtrain.scheme import Scheme, int8_grids


@register("quantizer", "smoothquant")
@dataclass
class SmoothQuant(Scheme):
    """Static INT8 after outliers of activations were moved into weights."""

    defaults: list[Any] = field(default_factory=int8_grids)
    activation_range: str = "static"
    observer: str = "percentile"
    smoothquant: float | None = 0.5
