"""torchao's weight-only tensors as a frozen base for LoRA: int8 per row, or int4 in groups.

    int8    Int8WeightOnlyConfig: absmax / 127.5 per row                          the grid affine int8 per channel, rule absmax_half
    int4    IntxWeightOnlyConfig(int4, groups): absmax / 7.5 per group            the grid affine int4 per group, rule absmax_half

peft trains beside both. torchao's Int4WeightOnlyConfig packs for CUDA kernels that peft refuses; int4 here is the unpacked form, a byte per
weight, which runs on any device and so saves no memory over int8: it is for training beside the numbers of int4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtrain.frozen import FrozenBase
from qtrain.registry import get, register

if TYPE_CHECKING:
    from torch import nn

TYPES = ("int8", "int4")


@register("quantizer", "torchao")
@dataclass
class Torchao(FrozenBase):
    """torchao's int8 or int4 weight-only layers: a frozen base for LoRA."""

    type: str = "int8"
    """int8 (per row) or int4 (per group)."""
    group_size: int = 32
    """Of int4: weights of a row that share a scale."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.type not in TYPES:
            raise ValueError(f"quantizer.type is {self.type!r}; valid: {', '.join(TYPES)}. Set quantizer.type=int8")
        if self.group_size < 1:
            raise ValueError(f"quantizer.group_size is {self.group_size}; at least 1. Set quantizer.group_size=32")
        affine = get("grid", "affine")
        if self.type == "int8":
            self.weight = affine(bits=8, granularity="channel", rule="absmax_half")
        else:
            self.weight = affine(bits=4, granularity="group", group_size=self.group_size, rule="absmax_half")

    def swap(self, model: nn.Module, linear: dict[str, Any]) -> None:
        """torchao's tensors in place of the weights of ``linear``."""
        from qtrain.torchao_tensors import swap

        swap(model, linear, self)
