"""Quantization-aware training by torch's graph flow: torch.export -> prepare_qat_pt2e -> train -> convert_pt2e (torchao).

    activations   fake-quantized with a moving average of each batch's minimum and maximum (weight 0.01 for the new batch)
    weights       the same, per channel (per tensor for backend=arm): the scale follows the weight with a delay of a hundred steps
    batch-norms   conv -> batch-norm is trained as one convolution with the weight w * gamma / sqrt(running variance + eps), rounded, whose
                  output is scaled back and normalized by the batch (Jacob et al. 2018, arXiv 1712.05877; Krishnamoorthi 2018)

The model is traced in training mode; dropout, attention's dropout and batch-norms follow train() and eval(), and ranges are followed in
training only (`qtrain/pt2e/exported.py`). Calibration gives the ranges to start from. Two schedules, in optimizer steps:

    freeze_step              scales and ranges stay fixed from here on
    freeze_batch_norm_step   statistics of batch-norms stay fixed from here on

**What convert changes.** Activations are rounded as the runtimes do it (divided by the scale), biases of convolutions become int32, and a
folded batch-norm sums in another order; codes and scales of weights stay those of training (`qtrain/pt2e/graph_qat.py`), which torch's own
convert would change. The run reports the difference (`convert_equals_prepare.nmse`) and exports what was converted. `quantizer=qat` has no
such difference, any grid, a float start and learned scales; this one is for comparison, and for torch's backends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from qtrain.fit import Fit
from qtrain.pt2e import GraphScheme
from qtrain.registry import register


@register("quantizer", "qat_graph")
@dataclass
class QatGraph(GraphScheme):
    """Quantization-aware training by torch's graph flow (PT2E)."""

    fit: Fit = field(default_factory=Fit)
    """How it trains."""
    freeze_step: int | None = None
    """Optimizer step from which scales and ranges stay fixed; null for never."""
    freeze_batch_norm_step: int | None = None
    """Optimizer step from which batch-norm statistics stay fixed; null for freeze_step."""

    exact: ClassVar[bool] = False
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        late = self.freeze_step is not None and self.freeze_batch_norm_step is not None and self.freeze_batch_norm_step > self.freeze_step
        if late or (self.freeze_step or 0) < 0 or (self.freeze_batch_norm_step or 0) < 0:
            raise ValueError(
                f"freeze_step is {self.freeze_step} and freeze_batch_norm_step {self.freeze_batch_norm_step}; a batch-norm is part of "
                "the weight whose scale is frozen, so 0 <= freeze_batch_norm_step <= freeze_step. Set quantizer.freeze_batch_norm_step=null"
            )

    def callbacks(self) -> list[Any]:
        """The schedule of what stays fixed."""
        from qtrain.pt2e import schedule

        return [schedule(self.freeze_step, self.freeze_step if self.freeze_batch_norm_step is None else self.freeze_batch_norm_step)]
