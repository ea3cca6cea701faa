"""Round-to-nearest: each weight gets the grid's nearest value. No data, no training; the baseline of every other method.

    code = clamp(round(w / scale))        with the scale by the grid's own rule

Activations may be put on a grid too: dynamic ones need nothing, static ones a calibration pass, which the run makes.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtrain.registry import register
from qtrain.scheme import Scheme


@register("quantizer", "rtn")
@dataclass
class Rtn(Scheme):
    """Round to nearest: no data, no training."""
