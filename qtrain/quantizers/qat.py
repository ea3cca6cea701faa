"""Quantization-aware training: the forward pass computes on the grid, the gradient passes straight through.

    forward    y = linear(x, decode(encode(w)))
    backward   dL/dw = dL/d decode(encode(w)) where the code was not clipped, 0 where it was (Jacob et al. 2018, arXiv 1712.05877)

so the float weight that the optimizer moves is pulled to where its *rounded* value serves the loss. The grid is the runtime's: what is
trained is what is packed, and convert() changes no bit. Options:

    start_step      train in float first, fake-quant from this step on; evaluation is on the grid throughout
    freeze_step     scales (and activation ranges) stay fixed from this step on, the weights go on moving
    learn_scale     scales become parameters (LSQ: Esser et al. 2020, arXiv 1902.08153), initialised by the grid's rule
    distill         the float model teaches: logit distillation (Hinton et al. 2015, arXiv 1503.02531) with a weight of its own

Unlike torchao's QATConfig flow, which trains on absmax/7.5 whatever the runtime will use, the rule, the stored type of the scale and the
grid of the activations are the deployment's. It does not fold batch-norms and does not touch convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.fit import Fit
from qtrain.registry import register
from qtrain.targets import Scheme

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Distill:
    """Distillation from the float model."""

    weight: float = 0.0
    """Share of the distillation loss, 0 (off) to 1 (nothing else)."""
    temperature: float = 2.0
    """Softens both distributions; above 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1 or self.temperature <= 0:
            raise ValueError(
                f"distill.weight is {self.weight} and distill.temperature {self.temperature}; "
                "the weight is from 0 to 1, the temperature above 0. "
                "Set quantizer.distill.weight=0.5 quantizer.distill.temperature=2, say."
            )


@register("quantizer", "qat")
@dataclass
class Qat(Scheme):
    """Quantization-aware training with a straight-through estimator or learned scales."""

    fit: Fit = field(default_factory=Fit)
    """How it trains."""
    start_step: int = 0
    """Optimizer step from which training runs on the grid."""
    freeze_step: int | None = None
    """Optimizer step from which scales stay fixed; null for never."""
    learn_scale: bool = False
    """Train the scales of Linear weights too (LSQ)."""
    distill: Distill = field(default_factory=Distill)
    """Distillation from the float model."""

    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_step < 0 or (self.freeze_step is not None and self.freeze_step < self.start_step):
            raise ValueError(
                f"start_step is {self.start_step} and freeze_step {self.freeze_step}; 0 <= start_step <= freeze_step. "
                "Set quantizer.start_step=0 quantizer.freeze_step=null, say."
            )

    def prepare(self, model: nn.Module, keep_float: list[str]) -> list[str]:
        """See `Scheme.prepare`; with learn_scale, the scales of Linear weights become parameters."""
        from qtrain.layers import FakeLinear, fake_layers

        kept = super().prepare(model, keep_float)
        if self.learn_scale:
            for _, layer in fake_layers(model):
                if isinstance(layer, FakeLinear):  # an embedding's rows keep the rule: most rows have no gradient in most steps
                    layer.weight_fake.learn_scale(layer.weight.detach())
        return kept

    def callbacks(self) -> list[Any]:
        """The schedule of fake-quant."""
        from qtrain.callbacks import FakeQuantSchedule

        return [FakeQuantSchedule(self.start_step, self.freeze_step)]
