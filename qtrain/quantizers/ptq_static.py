"""Static INT8: every activation gets one scale, found on calibration data and then fixed; no training.

    weight        code = clamp(round(w / s_w))             s_w per output channel
    activation    code = clamp(round(x / s_x) + z_x)       s_x and z_x per tensor, from the range that an observer saw
    runtime       y = s_x * s_w * sum((code_x - z_x) * code_w) + b        integer products, one scaling per output channel

The fastest INT8: at run time nothing is measured. It is as good as its ranges, so it depends on the calibration data
(`data.calibration_examples`, training examples, never the test split) and on the observer (`quantizer.observer`):

    minmax           everything ever seen fits; outliers cost resolution
    moving_average   a smoothed minmax, as training has it
    percentile       `quantizer.percentile` of the values fit
    histogram_mse    least squared error
    histogram_kl     least information lost (Migacz 2017, TensorRT's entropy calibration)

Transformers quantize the input of each layer; convolutional networks are traced, their batch-norms folded, and additions, poolings and
ReLUs quantized with them (`qtrain/graph.py`). What it cannot do: recover accuracy that rounding lost, which `quantizer=qat` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qtrain.registry import register
from qtrain.scheme import Scheme, int8_grids


@register("quantizer", "ptq_static")
@dataclass
class PtqStatic(Scheme):
    """Static INT8: weights per channel, activations with ranges from calibration."""

    defaults: list[Any] = field(default_factory=int8_grids)
    activation_range: str = "static"
    observer: str = "percentile"
