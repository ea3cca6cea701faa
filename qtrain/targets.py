"""Which modules are quantized: include patterns, keep_float patterns, and no silence.

Patterns are shell globs over module names as `model.named_modules()` gives them (`*.attention.*`, `bert.pooler.dense`).
A pattern that matches no module is an error (law 4), since it is a typing mistake or the wrong model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy_import("torch")


def int8_grids() -> list[Any]:
    """Hydra defaults of a quantizer whose weights, embeddings and activations are INT8 unless the user says otherwise."""
    return ["_self_", {"/grid@weight": "int8"}, {"/grid@embedding": "int8"}, {"/grid@activation": "int8_activation"}]


@dataclass
class Scheme:
    """Which modules go on which grids, and how they get there: the common part of every quantizer."""

    exact: ClassVar[bool] = True
    """Whether `convert` changes no bit of any output; where torch's own flow rounds anew at convert, the run reports by how much."""
    trains: ClassVar[bool] = False
    """Whether the run trains the prepared model; such a quantizer has a `fit: qtrain.fit.Fit` option."""

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
        self.fallbacks: list[dict[str, str]] = []
        """What could not be done as asked: [{"name", "why"}]."""
        self.details: dict[str, Any] = {}
        """What was done to the model, for run.json."""
        self.importance: dict[str, Any] = {}
        """Module name -> `qtrain.importance.Importance`, where `imatrix` measured it."""
        self.keep_float = [self.keep_float] if isinstance(self.keep_float, str) else list(self.keep_float)
        self.automatic = _automatic(self.keep_float)
        """How many of the most harmful layers are to stay in float."""
        self.keep_float = [pattern for pattern in self.keep_float if not pattern.startswith("auto:")]
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
        if self.smoothquant is not None and not 0 <= self.smoothquant <= 1:
            raise ValueError(f"quantizer.smoothquant is {self.smoothquant}; it is from 0 to 1. Set quantizer.smoothquant=0.5, or null.")

    @property
    def static(self) -> bool:
        """Whether activations have static ranges."""
        return self.activation is not None and self.activation_range == "static"

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is read."""
        return self.static or self.bias_correction or self.smoothquant is not None or self.imatrix is True

    @property
    def moves_weights(self) -> bool:
        """Whether float weights change, so that the float model has to be kept apart."""
        return self.trains or self.smoothquant is not None or self.equalize or self.bias_correction

    def transform(self, model: nn.Module, calibration: list[dict[str, Any]], keep_float: list[str]) -> nn.Module:
        """What is to happen to the float model first: smoothing, equalization. The result computes what ``model`` computed.

        Args:
            calibration: keyword inputs of ``model``.
        """
        if self.smoothquant is not None:
            from qtrain.smoothing import smooth

            chosen, _ = select(model, self.include, [*self.keep_float, *keep_float])
            rows = smooth(model, chosen, calibration, self.smoothquant, self.weight, self.activation)
            self.details["smoothing"] = rows
            if all("skipped" in row for row in rows):
                why = f"each of the {len(rows)} groups of Linear layers would have been rounded worse; see smoothing in run.json"
                self.fallbacks.append({"name": f"smoothquant={self.smoothquant}", "why": why})
        if self.equalize:
            from qtrain.equalization import equalize

            model = equalize(model)
        return model

    def weight_grids(self, model: nn.Module, keep_float: list[str]) -> dict[str, Any]:
        """The grid that each module's weight is going to be on, by name.

        Raises:
            ValueError: if a pattern matches nothing.
        """
        mix = self.weight if hasattr(self.weight, "assign") else None
        chosen, _ = select(model, self.include, [*self.keep_float, *([] if mix else keep_float)])
        if mix is not None:
            return dict(mix.assign(model, chosen, bool(self.imatrix))[0])
        return {name: self.weight for name in chosen if not isinstance(chosen[name], torch.nn.Embedding)}

    def prepare(self, model: nn.Module, keep_float: list[str], example: dict[str, Any] | None = None) -> tuple[nn.Module, list[str]]:
        """Fake-quantize ``model``, in place where it needs no graph.

        Args:
            keep_float: patterns of modules that the model's family keeps in float.
            example: keyword inputs, for methods that trace with them.

        Returns:
            The prepared model, and the names of the Linear, Embedding and convolution modules left in float.

        Raises:
            ValueError: if a pattern matches nothing, or a module does not fit its grid.
        """
        from qtrain import graph
        from qtrain.prepare import prepare

        mix = self.weight if hasattr(self.weight, "assign") else None  # a mix names a type for every tensor, the output head's too
        chosen, kept = select(model, self.include, [*self.keep_float, *([] if mix else keep_float)])
        weight: Any = self.weight
        if mix is not None:
            weight, why = mix.assign(model, chosen, bool(self.imatrix))
            self.fallbacks += why
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

    def callbacks(self) -> list[Any]:
        """Lightning callbacks for the stage that trains the prepared model."""
        return []


@dataclass
class FrozenBase:
    """What quantizers share whose layers are another library's: nothing trains, nothing is calibrated, adapters go beside them."""

    exact: ClassVar[bool] = False
    """Their products may be summed in another order than ours."""
    trains: ClassVar[bool] = False
    static: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    moves_weights: ClassVar[bool] = False
    automatic: ClassVar[int] = 0
    activation: ClassVar[None] = None
    embedding: ClassVar[None] = None
    smoothquant: ClassVar[None] = None
    imatrix: ClassVar[bool] = False
    bias_correction: ClassVar[bool] = False
    equalize: ClassVar[bool] = False
    registered_name: ClassVar[str] = ""

    include: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of modules to quantize; embeddings and convolutions stay in float."""
    keep_float: Any = field(default_factory=list)
    """Patterns of modules to leave in float, besides those of the model family."""

    def __post_init__(self) -> None:
        self.fallbacks: list[dict[str, str]] = []
        """What could not be done as asked: [{"name", "why"}]."""
        self.details: dict[str, Any] = {}
        """What was done to the model, for run.json."""
        self.importance: dict[str, Any] = {}
        """Importances: none are measured."""
        self.keep_float = [self.keep_float] if isinstance(self.keep_float, str) else list(self.keep_float)
        if any(pattern.startswith("auto:") for pattern in self.keep_float):
            raise ValueError(
                f"quantizer.keep_float has {self.keep_float}; layers of another library cannot be tried one by one, as auto:N does. Find "
                "the names with quantizer=rtn quantizer.keep_float=auto:N, and list them here"
            )

    def swap(self, model: nn.Module, linear: dict[str, Any]) -> None:
        """Put the library's layers in place of ``linear``, in place."""
        raise NotImplementedError

    def weight_grids(self, model: nn.Module, keep_float: list[str]) -> dict[str, Any]:
        """See `Scheme.weight_grids`."""
        grid = self.weight  # type: ignore[attr-defined]
        return dict.fromkeys(self._chosen(model, keep_float)[0], grid)

    def _chosen(self, model: nn.Module, keep_float: list[str]) -> tuple[dict[str, Any], list[str]]:
        chosen, kept = select(model, self.include, [*self.keep_float, *keep_float])
        linear: dict[str, Any] = {name: module for name, module in chosen.items() if type(module) is torch.nn.Linear}
        if not linear:
            raise ValueError(
                f"quantizer.include={self.include} names no Linear layer of {type(model).__name__}, and quantizer={self.registered_name} "
                "has no other. Set quantizer.include=['*']"
            )
        return linear, sorted([*kept, *(name for name in chosen if name not in linear)])

    def transform(self, model: nn.Module, calibration: list[dict[str, Any]], keep_float: list[str]) -> nn.Module:
        """Nothing happens to the float model first."""
        return model

    def prepare(self, model: nn.Module, keep_float: list[str], example: dict[str, Any] | None = None) -> tuple[nn.Module, list[str]]:
        """Put the library's layers in place of the Linear ones, in place; see `Scheme.prepare`.

        Raises:
            ValueError: if a pattern matches nothing, a weight is not finite, or the library is not installed.
        """
        linear, kept = self._chosen(model, keep_float)
        self.swap(model, linear)
        return model, kept

    def calibrate(self, model: nn.Module, batches: Iterable[dict[str, Any]]) -> nn.Module:
        """There is nothing to calibrate."""
        return model

    def convert(self, model: nn.Module) -> nn.Module:
        """Layers of ours with the codes of the library's, in place."""
        from qtrain.foreign import convert

        return convert(model)

    def callbacks(self) -> list[Any]:
        """None."""
        return []


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


OBSERVERS = ("minmax", "moving_average", "percentile", "histogram_mse", "histogram_kl")
"""Collectors of `qtrain/observers.py`, which imports torch and so is not asked here."""


def _automatic(patterns: list[str]) -> int:
    """N of the pattern `auto:N`, or 0.

    Raises:
        ValueError: if N is no positive integer.
    """
    for pattern in patterns:
        if pattern.startswith("auto:"):
            count = pattern.removeprefix("auto:")
            if not count.isdigit() or int(count) < 1:
                raise ValueError(
                    f"quantizer.keep_float has {pattern!r}; N of auto:N is a positive integer. Set quantizer.keep_float=auto:3, say."
                )
            return int(count)
    return 0


def select(model: nn.Module, include: list[str], keep_float: list[str]) -> tuple[dict[str, nn.Module], list[str]]:
    """The Linear, Embedding and convolution modules to quantize, by name, and the names of those kept in float.

    Raises:
        ValueError: if a pattern matches none of them, or nothing is left to quantize.
    """
    from qtrain.prepare import SWAPPABLE

    candidates: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, SWAPPABLE)}
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no Linear, Embedding or convolution, so there is nothing to quantize. Set model=NAME")
    kinds = " and ".join(sorted({type(m).__name__ for m in candidates.values()}))
    for key, patterns in (("include", include), ("keep_float", keep_float)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                close = difflib.get_close_matches(pattern, list(candidates), n=3, cutoff=0.3) or list(candidates)[:3]
                raise ValueError(
                    f"quantizer.{key} pattern {pattern!r} matches none of the {len(candidates)} {kinds} modules; "
                    f"the nearest are {', '.join(close)}. Set quantizer.{key}=['{close[0] if close else '*'}'], say."
                )
    kept = [n for n in candidates if _matches(n, keep_float)]
    chosen = {n: m for n, m in candidates.items() if _matches(n, include) and n not in kept}
    if not chosen:
        raise ValueError(f"include={include} without keep_float={keep_float} leaves nothing to quantize. Set quantizer.keep_float=[]")
    return chosen, [n for n in candidates if n not in chosen]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)
