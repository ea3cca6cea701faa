"""torchao's own QAT flow, for users who come from it: `quantize_(model, QATConfig(base, step="prepare" | "convert"))`.

torchao's fake-quantizers train and torchao's tensors convert; qtrain reads the integer codes and scales out of those tensors, so that
every exporter packs them as it packs its own. The base is `IntxWeightOnlyConfig`, made from the `weight` and `embedding` grids:

    grid  int<b> per group or channel, rule absmax_half, float32 scales    ==    torchao MappingType.SYMMETRIC, the only one its QAT has

Both give the same bits (tests/numerics compares them). What it cannot do that `quantizer=qat` can: other rules (at 2 and 3 bits absmax_half
wastes codes), stored scale types, activation grids of onnxruntime, frozen or learned scales, distillation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.fit import Distill, Fit
from qtrain.lazy import lazy_import
from qtrain.registry import register
from qtrain.scheme import Scheme
from qtrain.targets import select

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy_import("torch")


@register("quantizer", "torchao_qat")
@dataclass
class TorchaoQat(Scheme):
    """torchao's QATConfig prepare/convert flow; needs rule=absmax_half, the grid it has."""

    fit: Fit = field(default_factory=Fit)
    """How it trains."""
    distill: Distill = field(default_factory=Distill)
    """Distillation from the float model."""

    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("weight", "embedding"):
            self._refuse(key, getattr(self, key))
        if self.activation is not None:
            raise ValueError(
                "quantizer=torchao_qat trains weights only; set grid@quantizer.activation=null, or quantizer=qat for activations"
            )

    @staticmethod
    def _refuse(key: str, grid: Any) -> None:
        if grid is None:
            return
        given = (getattr(grid, "rule", grid.registered_name), getattr(grid, "granularity", ""), getattr(grid, "scale_dtype", ""))
        if given[0] != "absmax_half" or given[1] not in ("group", "channel") or given[2] != "float32" or grid.remainder != "error":
            raise ValueError(
                "torchao's QAT has one grid: rule=absmax_half granularity=group or channel, scale_dtype=float32 remainder=error; "
                f"given quantizer.{key} "
                f"{grid.describe()}. Set quantizer.{key}.rule=absmax_half, or quantizer=qat for every other grid"
            )

    def prepare(self, model: nn.Module, keep_float: list[str], example: dict[str, Any] | None = None) -> tuple[nn.Module, list[str]]:
        """torchao's prepare step, on the selected modules; see `Scheme.prepare`."""
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        from qtrain.torchao_tensors import unpacked

        chosen, kept = select(model, self.include, [*self.keep_float, *keep_float])
        for kind, grid in self._kinds():
            names = {n for n, m in chosen.items() if isinstance(m, kind)}
            if grid is None:
                kept += sorted(names)
                continue
            for name in sorted(names):
                why = grid.check_shape(tuple(chosen[name].weight.shape))  # type: ignore[arg-type]
                if why:
                    raise ValueError(f"{name}: {why}, or quantizer.keep_float=[{name}]")
                if type(chosen[name]).forward is not kind.forward:
                    raise ValueError(
                        f"{name}: {type(chosen[name]).__name__} has a forward of its own, and torchao's fake-quantized {kind.__name__} "
                        f"computes a plain {kind.__name__}'s. Set quantizer=qat, or quantizer.keep_float=[{name}]"
                    )
            quantize_(model, QATConfig(unpacked(grid), step="prepare"), filter_fn=lambda _, name, names=names: name in names)
        return model, sorted(kept)

    def convert(self, model: nn.Module) -> nn.Module:
        """torchao's convert step; its codes move into qtrain's layers."""
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig
        from torchao.quantization.qat.embedding import FakeQuantizedEmbedding
        from torchao.quantization.qat.linear import FakeQuantizedLinear

        from qtrain.grids.base import require_finite
        from qtrain.prepare import replace
        from qtrain.torchao_tensors import unpacked

        fakes = {n: m for n, m in model.named_modules() if isinstance(m, (FakeQuantizedLinear, FakeQuantizedEmbedding))}
        for name, module in fakes.items():
            require_finite(module.weight.detach(), f"the weight of {name}")
        for kind, grid in self._kinds():
            names = {n for n, m in fakes.items() if isinstance(m, kind)}
            if grid is not None:
                quantize_(model, QATConfig(unpacked(grid), step="convert"), filter_fn=lambda _, name, names=names: name in names)
        for name in fakes:
            replace(model, name, self._with_codes(model.get_submodule(name)))
        return model.eval()

    def _with_codes(self, module: Any) -> nn.Module:
        from qtrain.layers import QuantizedEmbedding, QuantizedLinear
        from qtrain.torchao_tensors import symmetric

        if isinstance(module, torch.nn.Embedding):
            return QuantizedEmbedding(symmetric(module.weight, self.embedding))
        return QuantizedLinear(symmetric(module.weight, self.weight), module.bias)

    def _kinds(self) -> list[tuple[Any, Any]]:
        return [(torch.nn.Linear, self.weight), (torch.nn.Embedding, self.embedding)]
