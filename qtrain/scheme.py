"""Scheme: the common part of the quantizers whose layers are ours: modules on grids, by fake-quant and then by codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtrain.lazy import lazy_import
from qtrain.quantizer import Quantizer
from qtrain.targets import select

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy_import("torch")

OBSERVERS = ("minmax", "moving_average", "percentile", "histogram_mse", "histogram_kl")
"""Collectors of `qtrain/observers.py`, which imports torch and so is not asked here."""


def int8_grids() -> list[Any]:
    """Hydra defaults of a quantizer whose weights, embeddings and activations are INT8 unless the user says otherwise."""
    return ["_self_", {"/grid@weight": "int8"}, {"/grid@embedding": "int8"}, {"/grid@activation": "int8_activation"}]


@dataclass
class Scheme(Quantizer):
    """Which modules go on which grids, and how they get there."""

    defaults: list[Any] = field(
        default_factory=lambda: ["_self_", {"/grid@weight": "affine"}, {"/grid@embedding": None}, {"/grid@activation": None}]
    )
    weight: Any = None
    """Grid of Linear and convolution weights (`grid@quantizer.weight=NAME`; its options follow: quantizer.weight.bits=3)."""
    embedding: Any = None
    """Grid of Embedding weights; null leaves embeddings in float."""
    activation: Any = None
    """Grid of the inputs of layers (and, in convolutional networks, of additions and poolings); null (the default) leaves them in float."""
    activation_range: str = "dynamic"
    """dynamic (scale from each input) or static (range found by calibration and in training, then fixed)."""
    observer: str = "moving_average"
    """How calibration finds a static range: minmax, moving_average (which goes on in training), percentile, histogram_mse, histogram_kl."""
    percentile: float = 99.99
    """Of observer=percentile: share of values inside the range, per cent."""
    smoothquant: float | None = None
    """Strength alpha, 0 to 1, with which outliers of activations move into weights first (Xiao et al. 2022); null for not at all."""
    equalize: bool = False
    """Equalize the ranges of consecutive convolutions first (Nagel et al. 2019); folds batch-norms."""
    bias_correction: bool = False
    """Correct biases for the mean error that rounding makes on the calibration data (Nagel et al. 2019)."""
    imatrix: Any = False
    """Weigh rounding errors by the mean squared activation of each input channel: true to measure it, or llama.cpp's imatrix file."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of modules to quantize."""
    keep_float: Any = field(default_factory=list)
    """Patterns of modules to leave in float, besides those of the model family; `auto:N` among them (or alone) is the N most harmful."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_range not in ("dynamic", "static"):
            raise ValueError(f"quantizer.activation_range is {self.activation_range!r}; valid: dynamic, static")
        if self.activation is None and self.activation_range == "static":
            raise ValueError(
                "quantizer.activation_range=static has no activation grid to fix; choose one: grid@quantizer.activation=int8_activation, "
                "or set quantizer.activation_range=dynamic"
            )
        if getattr(self.activation, "weights_only", False):
            raise ValueError(
                f"{self.activation.describe()} is a grid of weights: its blocks run over the whole tensor, so an activation would depend "
                "on the batch it is in. Set grid@quantizer.activation=int8_activation, or quantizer.activation=null"
            )
        granularity = getattr(self.activation, "granularity", "tensor")
        if self.activation is not None and self.activation_range == "static" and granularity != "tensor":
            raise ValueError(
                f"a static activation range has one scale per tensor, given quantizer.activation.granularity={granularity}; "
                "set quantizer.activation.granularity=tensor or quantizer.activation_range=dynamic"
            )
        if self.observer not in OBSERVERS:
            raise ValueError(f"quantizer.observer is {self.observer!r}; valid: {', '.join(OBSERVERS)}. Set quantizer.observer=minmax, say.")
        if not 50 < self.percentile <= 100:
            raise ValueError(
                f"quantizer.percentile is {self.percentile}; it is above 50 and at most 100. Set quantizer.percentile=99.99, say."
            )
        if isinstance(self.imatrix, str) and not Path(self.imatrix).is_file():
            raise ValueError(
                f"quantizer.imatrix={self.imatrix} is no file; valid: true (measure it on the calibration text), false, or a file that "
                "llama-imatrix or qtrain wrote. Set quantizer.imatrix=true"
            )
        if hasattr(self.embedding, "assign") or hasattr(self.activation, "assign"):
            raise ValueError(
                "a mix such as q4_k_m is for all weights, embeddings included. Set grid@quantizer.weight=q4_k_m and leave "
                "grid@quantizer.embedding alone; activations have grid@quantizer.activation=ggml_activation"
            )

    @property
    def static(self) -> bool:
        """Whether activations have static ranges."""
        return self.activation is not None and self.activation_range == "static"

    def _chosen(self, model: nn.Module, keep_float: list[str]) -> tuple[dict[str, nn.Module], list[str], Any, list[dict[str, str]]]:
        """The modules to quantize, the names of the others, the weights' grid (of a mix, that of each module by name), and fallbacks."""
        if not hasattr(self.weight, "assign"):
            return *select(model, self.include, [*self.keep_float, *keep_float]), self.weight, []
        chosen, kept = select(model, self.include, self.keep_float)  # a mix names a type for every tensor, the output head's too
        return chosen, kept, *self.weight.assign(model, chosen, bool(self.imatrix))

    def weight_grids(self, model: nn.Module, keep_float: list[str]) -> dict[str, Any]:
        """See `Quantizer.weight_grids`; embeddings are in it where a mix gives them a type."""
        chosen, _, weight, _ = self._chosen(model, keep_float)
        if isinstance(weight, dict):
            return weight
        return {name: weight for name, module in chosen.items() if not isinstance(module, torch.nn.Embedding)}

    def prepare(self, model: nn.Module, keep_float: list[str], example: dict[str, Any] | None = None) -> tuple[nn.Module, list[str]]:
        """Fake-quantize ``model``, in place where it needs no graph; see `Quantizer.prepare`."""
        from qtrain import graph
        from qtrain.prepare import prepare

        chosen, kept, weight, notes = self._chosen(model, keep_float)
        self.fallbacks += notes
        observer = {"kind": self.observer, "percentile": self.percentile}
        held: dict[str, Any] = {}
        edges = False
        if graph.has_convolutions(model):
            try:
                model = graph.trace(model)
            except graph.Untraceable as error:
                why = f"{error}. Batch-norms stay apart, and each layer quantizes its own input; additions and poolings run in float"
                self.fallbacks.append({"name": type(model).__name__, "why": why})
            else:
                chosen = _called(model, chosen)
                held = self._batch_norms(model, chosen)
                edges = self.static
        activation = None if edges else self.activation
        grids = (weight, self.embedding, activation, self.static)
        swapped = prepare(model, chosen, *grids, observer=observer, batch_norms=held)
        if edges:
            graph.put_on_edges(model, self.activation, observer)  # type: ignore[arg-type]
        return model, sorted([*kept, *(name for name in chosen if name not in swapped)])

    def _batch_norms(self, model: Any, chosen: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Fold batch-norms; where training is to move them, take them out of the graph for the convolutions to hold."""
        from qtrain import graph

        pairs = graph.batch_norms(model)
        held = {n: b for n, b in pairs.items() if self.trains and n in chosen and isinstance(chosen[n], (torch.nn.Conv1d, torch.nn.Conv2d))}
        graph.fold_batch_norms(model, {n: b for n, b in pairs.items() if n not in held})
        modules = {n: model.get_submodule(b) for n, b in held.items()}
        graph.remove_nodes(model, set(held.values()))
        return modules

    def calibrate(self, model: nn.Module, batches: Iterable[dict[str, Any]]) -> nn.Module:
        """Find static ranges and importances, correct biases where asked, and search the scales that are searched.

        Args:
            batches: keyword inputs of ``model``.

        Raises:
            ValueError: if there is no data, or an activation is not finite or constant, naming it.
        """
        from qtrain.prepare import choose_once

        batches = list(batches)
        if self.static or self.bias_correction:
            from qtrain.activations import calibrate

            calibrate(model, batches)
        if self.bias_correction:
            from qtrain.equalization import correct_biases

            self.details["bias_correction"] = correct_biases(model, batches)
        if self.imatrix:
            from qtrain.importance import weigh

            self.importance = weigh(model, batches, self.imatrix)
        choose_once(model)
        return model

    def convert(self, model: nn.Module) -> nn.Module:
        """Integer codes instead of fake-quant, in place; changes no bit of any output."""
        from qtrain.prepare import convert

        return convert(model)


def _called(graph: nn.Module, chosen: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The chosen modules in the graph.

    Raises:
        ValueError: if the model never calls one.
    """
    present = dict(graph.named_modules())
    unused = [name for name in chosen if name not in present]
    if unused:
        raise ValueError(
            f"{len(unused)} modules are never called by the model, the first {unused[0]}, so there is nothing to quantize. Leave them in "
            f"float: quantizer.keep_float=[{','.join(unused[:3])}]"
        )
    return {name: present[name] for name in chosen}
