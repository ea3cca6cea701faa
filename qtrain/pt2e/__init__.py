"""torch's graph flows (torchao's PT2E, and the older prepare_fx), ending in qtrain's layers: what their quantizers share.

    float model -> torch.export -> prepare_pt2e: torch's quantizer says which operators and values get a grid, and puts observers there
                -> calibration (and, for qat_graph, training) -> convert_pt2e -> `lowering.py` -> QuantizedLinear, QuantizedConv, …

The grid is the quantizer's, and there are no options for it:

    backend   weights                            activations          values on a grid
    x86       int8 per channel, absmax / 127.5   uint8, asymmetric    inputs of linear, conv, and of what oneDNN fuses with them
    arm       int8 per tensor, absmax / 127.5    int8, asymmetric     inputs of linear and conv
    xnnpack   int8 per channel, absmax / 127     int8, asymmetric     all of them: outputs, additions and poolings too

x86 and arm are torch.compile's backends, where a convolution and the addition behind it are one operator, so that the value between them
stays in float; onnxruntime has no such operator and runs that convolution in float. backend=xnnpack suits it better. A reduced range of
activations (7 bits, for CPUs without VNNI) is not used: such CPUs need fewer bits in the *weights* (quantizer=ptq_static,
quantizer.weight.bits=7). No scale is below 2^-12 (6.1e-5 in training), as torch has it: channels of tiny weights get few codes.

Embeddings, which torch's quantizers leave in float, get the grid `embedding`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qtrain.lazy import lazy_import
from qtrain.quantizer import Quantizer
from qtrain.targets import select

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy_import("torch")

BACKENDS = ("x86", "arm", "xnnpack")
EAGER = {False: "ptq_static", True: "qat"}
"""The quantizer that needs no graph, by whether it trains."""


@dataclass
class GraphScheme(Quantizer):
    """Quantizers that trace the model: what torch's own quantizers decide, and which modules they may have."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"/grid@embedding": "int8"}])
    backend: str = "x86"
    """Whose operators: x86 (torch.compile on Intel and AMD CPUs), arm (torch.compile on ARM CPUs), xnnpack (mobile; also onnxruntime)."""
    embedding: Any = None
    """Grid of Embedding weights; null leaves embeddings in float."""
    smoothquant: float | None = None
    """Strength alpha, 0 to 1, with which outliers of activations move into weights first (Xiao et al. 2022); null for not at all."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of modules to quantize."""
    keep_float: Any = field(default_factory=list)
    """Patterns of modules to leave in float, besides those of the model family."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend not in BACKENDS:
            raise ValueError(f"quantizer.backend is {self.backend!r}; valid: {', '.join(BACKENDS)}. Set quantizer.backend=x86, say.")
        self.refuse_automatic("layers of torch's graph flows", instead=EAGER[self.trains])
        if self.smoothquant is not None and self.backend == "xnnpack":
            raise ValueError(
                "quantizer.backend=xnnpack puts the factors of smoothquant themselves on a grid, and most of them at zero. Set "
                "quantizer.backend=x86, or quantizer.smoothquant=null"
            )

    @property
    def static(self) -> bool:
        """Activations have static ranges."""
        return True

    def weight_grids(self, model: nn.Module, keep_float: list[str]) -> dict[str, Any]:
        """There are none by name: torch decides in the graph.

        Raises:
            ValueError: always; an adapter asks for them.
        """
        raise ValueError(
            f"quantizer={self.registered_name} traces the model into a graph, which has no layers for an adapter to go beside. Set "
            "quantizer=qat (trained on the deployed grid), quantizer=bnb or quantizer=rtn, or adapter=null"
        )

    def prepare(self, model: nn.Module, keep_float: list[str], example: dict[str, Any] | None = None) -> tuple[nn.Module, list[str]]:
        """Trace ``model`` and put torch's observers (or fake-quantizers) into the graph.

        Args:
            keep_float: patterns of modules that the model's family keeps in float.
            example: keyword inputs to trace with, 2 or more examples.

        Returns:
            The prepared graph, and the names of the Linear, Embedding and convolution modules left in float.

        Raises:
            ValueError: if a pattern matches nothing, or the model cannot be traced.
        """
        if example is None:
            raise ValueError("torch.export traces the model with an example; give keyword inputs of two examples")
        chosen, kept = select(model, self.include, [*self.keep_float, *keep_float])
        self._check_embeddings(chosen)
        return self._observed(model, example, chosen, kept)

    def _observed(
        self, model: nn.Module, example: dict[str, Any], chosen: dict[str, nn.Module], kept: list[str]
    ) -> tuple[nn.Module, list[str]]:
        """See `prepare`; ``chosen`` modules by name, and the names of the others."""
        from qtrain.pt2e import exported, observed

        if self.backend == "xnnpack" and not observed.xnnpack_module().__name__.startswith("executorch"):
            why = (
                "executorch is not installed; torchao's copy of its quantizer, which is deprecated, takes its place. pip install executorch"
            )
            self.fallbacks.append({"name": "quantizer.backend=xnnpack", "why": why})
        graph = exported.export(model, example, training=self.trains, instead=EAGER[self.trains])
        found = observed.embeddings(graph, chosen) if self.embedding is not None else []
        prepared = observed.put_observers(graph.train(self.trains), self.backend, self.trains, kept, instead=EAGER[self.trains])
        prepared.meta["embeddings"] = found
        missing = observed.left_out(prepared, chosen, self.backend)
        self.fallbacks += missing
        in_float = [name for name, module in chosen.items() if isinstance(module, torch.nn.Embedding) and name not in found]
        return prepared.eval(), sorted([*kept, *in_float, *(note["name"] for note in missing)])

    def _observed_by_fx(
        self, model: nn.Module, example: dict[str, Any], chosen: dict[str, nn.Module], kept: list[str]
    ) -> tuple[nn.Module, list[str]]:
        """As `_observed`, by prepare_fx."""
        from qtrain.pt2e import observed

        observed.require_convolutions(model)
        why = "deprecated in torch, which will remove it; quantizer.flow=pt2e (torch.export and torchao) replaces it"
        self.fallbacks.append({"name": "quantizer.flow=fx", "why": why})
        prepared = observed.put_legacy_observers(model, example, self.backend, kept)
        missing = observed.left_out(prepared, chosen, self.backend)
        self.fallbacks += missing
        in_float = [name for name, module in chosen.items() if isinstance(module, torch.nn.Embedding)]
        return prepared, sorted([*kept, *in_float, *(note["name"] for note in missing)])

    def _converted_by_fx(self, model: Any) -> nn.Module:
        """torch.ao's convert step, and qtrain's layers in place of its modules."""
        from qtrain.pt2e.exported import quiet
        from qtrain.pt2e.lowering import lower_fx
        from qtrain.pt2e.observed import convert_legacy

        with quiet():
            return self._finished(*lower_fx(convert_legacy(model)))

    def _check_embeddings(self, chosen: dict[str, nn.Module]) -> None:
        for name, module in chosen.items():
            if self.embedding is not None and isinstance(module, torch.nn.Embedding):
                why = self.embedding.check_shape(tuple(module.weight.shape))
                if why:
                    raise ValueError(f"{name}: {why}, or quantizer.keep_float=[{name}]")

    def calibrate(self, model: nn.Module, batches: Iterable[dict[str, Any]]) -> nn.Module:
        """Run ``batches`` (keyword inputs) through the observers.

        Raises:
            ValueError: if there is no data, or an activation is not finite or constant, naming the layer that reads it and the batch.
        """
        from qtrain.pt2e import observed

        if model.meta.get("embeddings"):  # type: ignore[union-attr, operator]
            observed.put_embeddings(model, model.meta["embeddings"], self.embedding)  # type: ignore[arg-type, index]
        observed.observe(model, batches)  # type: ignore[arg-type]
        return model

    def convert(self, model: nn.Module) -> nn.Module:
        """torch's convert step, and qtrain's layers in place of its operators.

        The result has `float_weights`: {NAME.weight: the float weight that was rounded}.
        """
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        from qtrain.pt2e.exported import quiet
        from qtrain.pt2e.graph_qat import fold_batch_norms, keep_scales
        from qtrain.pt2e.lowering import lower_pt2e

        model.eval()
        fold_batch_norms(model)  # type: ignore[arg-type]
        if self.trains:
            keep_scales(model)
        with quiet(), torch.no_grad():
            reference = convert_pt2e(model, fold_quantize=False)
        lowered, notes = lower_pt2e(reference)
        return self._finished(lowered, notes)

    def _finished(self, lowered: Any, notes: list[dict[str, str]]) -> nn.Module:
        from qtrain.layers import fake_layers
        from qtrain.prepare import convert

        self.fallbacks += notes
        lowered.float_weights |= {f"{name}.weight": layer.weight.detach() for name, layer in fake_layers(lowered)}
        return convert(lowered)


def schedule(freeze_step: int | None, freeze_batch_norm_step: int | None) -> Any:
    """A Lightning callback that freezes an `Exported` graph from these optimizer steps on; resumed runs do the same."""
    from lightning.pytorch import Callback

    class Freeze(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            step = trainer.global_step
            pl_module.model.freeze(
                ranges=freeze_step is not None and step >= freeze_step,
                batch_norms=freeze_batch_norm_step is not None and step >= freeze_batch_norm_step,
            )

    return Freeze()
