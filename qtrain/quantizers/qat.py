"""Quantization-aware training: the forward pass computes on the grid, the gradient passes straight through.

    forward    y = linear(x, decode(encode(w)))
    backward   dL/dw = dL/d decode(encode(w)) where the code was not clipped, 0 where it was (Jacob et al. 2018, arXiv 1712.05877)

so the float weight that the optimizer moves is pulled to where its *rounded* value serves the loss. The grid is the runtime's: what is
trained is what is packed, and convert() changes no bit. Options:

    start_step      train in float first, fake-quant from this step on; evaluation is on the grid throughout
    freeze_step     scales (and activation ranges) stay fixed from this step on, the weights go on moving
    search_every    grids whose scales are found by a search (llama.cpp's K-types) search again every so many steps, not in each
    learn_scale     scales become parameters (LSQ: Esser et al. 2020, arXiv 1902.08153), initialised by the grid's rule
    distill         the float model teaches: logit distillation (Hinton et al. 2015, arXiv 1503.02531) with a weight of its own

Convolutions hold the batch-norm behind them (`qtrain/layers.py`), whose statistics move until `freeze_batch_norm_step`. Static activation
ranges are calibrated first, follow the batches in training (observer=moving_average) and are fixed from `freeze_step` on; any other
observer fixes them at calibration.

Unlike torchao's QATConfig flow, which trains on absmax/7.5 whatever the runtime will use, the rule, the stored type of the scale and the
grid of the activations are the deployment's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.fit import Distill, Fit
from qtrain.registry import register
from qtrain.scheme import Scheme

if TYPE_CHECKING:
    from torch import nn


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
    freeze_batch_norm_step: int | None = None
    """Optimizer step from which batch-norm statistics stay fixed; null for freeze_step (0 trains with folded batch-norms)."""
    search_every: int = 100
    """Optimizer steps between searches for the scales of grids that search them (K-types); 0 keeps those found before training."""
    learn_scale: bool = False
    """Train the scales of Linear and convolution weights too (LSQ)."""
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
        if self.search_every < 0:
            raise ValueError(f"search_every is {self.search_every}; at least 0. Set quantizer.search_every=100, say")
        late = self.freeze_step is not None and self.freeze_batch_norm_step is not None and self.freeze_batch_norm_step > self.freeze_step
        if late or (self.freeze_batch_norm_step or 0) < 0:
            raise ValueError(
                f"freeze_batch_norm_step is {self.freeze_batch_norm_step} and freeze_step {self.freeze_step}; a batch-norm is part of the "
                "weight whose scale is frozen, so 0 <= freeze_batch_norm_step <= freeze_step. Set quantizer.freeze_batch_norm_step=null"
            )

    def prepare(self, model: nn.Module, keep_float: list[str], example: dict[str, Any] | None = None) -> tuple[nn.Module, list[str]]:
        """See `Scheme.prepare`; with learn_scale, the scales of Linear and convolution weights become parameters."""
        from qtrain.layers import FakeEmbedding, fake_layers

        model, kept = super().prepare(model, keep_float, example)
        if self.learn_scale:
            for _, layer in fake_layers(model):
                if not isinstance(layer, FakeEmbedding):  # an embedding's rows keep the rule: most rows have no gradient in most steps
                    layer.weight_fake.learn_scale(layer.folded()[0].detach())
        return model, kept

    def callbacks(self) -> list[Any]:
        """The schedule of fake-quant."""
        from qtrain.callbacks import FakeQuantSchedule

        frozen = self.freeze_step if self.freeze_batch_norm_step is None else self.freeze_batch_norm_step
        return [FakeQuantSchedule(self.start_step, self.freeze_step, frozen, self.search_every)]
