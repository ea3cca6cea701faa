"""Static INT8 by torch's graph flow: the model is traced, and torch's own quantizers say which operators and values get a grid.

    pt2e   torch.export -> prepare_pt2e -> calibrate -> convert_pt2e (torchao)
    fx     prepare_fx -> calibrate -> convert_fx (torch.ao), for convolutional networks; deprecated, pt2e replaces it

For comparison with `ptq_static`, and for models whose grid is to be that of torch.compile's x86 or ARM backends, or of XNNPACK. The result
is lowered to qtrain's layers (`qtrain/pt2e/lowering.py`) with torch's codes and scales, so that every exporter packs it; activations are
rounded as the runtimes do it (divided by the scale, where torch multiplies by its inverse).

Ranges come from torch's histogram observer (least squared error over 2048 bins); grids are in `qtrain/pt2e/__init__.py`. What it cannot
do: models whose Python decides by values, other grids, other observers; `ptq_static` swaps layers and needs no graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtrain.pt2e import GraphScheme
from qtrain.registry import register

if TYPE_CHECKING:
    from torch import nn

FLOWS = ("pt2e", "fx")


@register("quantizer", "ptq_graph")
@dataclass
class PtqGraph(GraphScheme):
    """Static INT8 by torch's graph flow (PT2E, or the older prepare_fx)."""

    flow: str = "pt2e"
    """pt2e (torch.export and torchao), or fx (torch.ao's older flow, for convolutional networks; deprecated)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flow not in FLOWS:
            raise ValueError(f"quantizer.flow is {self.flow!r}; valid: {', '.join(FLOWS)}. Set quantizer.flow=pt2e, say.")
        if self.flow == "fx" and self.backend == "xnnpack":
            raise ValueError("quantizer.flow=fx has the backends x86 and arm, given quantizer.backend=xnnpack. Set quantizer.backend=x86")

    def _observed(
        self, model: nn.Module, example: dict[str, Any], chosen: dict[str, nn.Module], kept: list[str]
    ) -> tuple[nn.Module, list[str]]:
        observe = self._observed_by_fx if self.flow == "fx" else super()._observed
        return observe(model, example, chosen, kept)

    def calibrate(self, model: nn.Module, batches: Iterable[dict[str, Any]]) -> nn.Module:
        """Run ``batches`` (keyword inputs) through torch's observers, convert with torch, and lower to qtrain's layers.

        Raises:
            ValueError: if there is no data, or an activation is not finite or constant, naming the layer that reads it and the batch.
        """
        model = super().calibrate(model, batches)
        return self._converted_by_fx(model) if self.flow == "fx" else super().convert(model)

    def convert(self, model: nn.Module) -> nn.Module:
        """Nothing: `calibrate` has done it, since torch's own rounding of activations is not the runtime's."""
        return model
