"""Dynamic INT8: weights are rounded once, activations get their scale from each input at run time; no data, no training.

    weight        code = clamp(round(w / s_w))                  s_w per output channel
    activation    code = clamp(round(x / s_x) + z_x)            s_x and z_x from the minimum and maximum of this very tensor

The activation grid is the runtime's: `int8_activation` (one scale per tensor) is ONNX's DynamicQuantizeLinear, in front of MatMulInteger
or ConvInteger. With granularity=token each row has a scale of its own, which is finer, and which vLLM and torchao have but onnxruntime
has not.

More faithful than static ranges, since no input can leave its range; slower, since every input is read once more to find it. One scale
per tensor means that an example's result depends, by a rounding step, on what else is in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qtrain.registry import register
from qtrain.scheme import Scheme, int8_grids


@register("quantizer", "ptq_dynamic")
@dataclass
class PtqDynamic(Scheme):
    """Dynamic INT8: weights per channel, activations with ranges from each input."""

    defaults: list[Any] = field(default_factory=int8_grids)
