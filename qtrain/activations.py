"""Activations on a grid: fake-quantized in training, with scales that are dynamic, observed or fixed.

    FakeActivation        dynamic (the grid derives a scale from each input: per token, per tensor, per group along the last axis), or
                          static: an `Observer` knows the range, and one scale per tensor follows from it
    QuantizedActivation   what a static one becomes when the model is converted: the scale (and zero point) as buffers

Either stands inside a layer, on its input, or (in a traced convolutional network) on an edge of the graph, between two operators. A
range is found in two ways, and both may be combined:

    calibration   `calibrate` runs batches through the model while every activation passes through in float; a collector by name
                  (`qtrain/observers.py`) turns what it saw into a range
    training      with observer=moving_average the range goes on following each batch's minimum and maximum (Jacob et al. 2018,
                  arXiv 1712.05877, section 3.1) until it is frozen
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from qtrain.console import console
from qtrain.grids.base import Grid, Params


class NotFinite(ValueError):
    """An activation holds NaN or infinities."""


class Observer(nn.Module):
    """Knows the range of one activation, and the static parameters that follow from it."""

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, grid: Grid, kind: str = "moving_average", momentum: float = 0.01, percentile: float = 99.99) -> None:
        """``kind`` names the collector of calibration; only moving_average goes on in training, with ``momentum`` for the new batch."""
        super().__init__()
        self.grid = grid
        self.kind = kind
        self.momentum = momentum
        self.percentile = percentile
        self.frozen = False
        """True once the range is fixed; training then leaves it alone."""
        self.collector: Any = None
        """While a calibration pass is under way: what sees the batches."""
        self.name = "activation"
        self.layer = ""
        """Name of the module and of the layer that reads it, for messages."""
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Fold one batch in.

        Raises:
            NotFinite: in calibration, if the batch is not finite.
        """
        if not x.numel():
            return
        if self.collector is not None:
            try:
                self.collector.observe(x)
            except ValueError as error:
                raise NotFinite(
                    f"the activation {self.name} is not finite ({error}). Look at the data and the model; or leave the layer in float: "
                    f"quantizer.keep_float=['{self.layer or self.name}']"
                ) from error
        else:
            self._follow(x)
        self.seen += 1

    def _follow(self, x: Tensor) -> None:
        # the first 1/momentum batches are averaged evenly: else the first of them would be all that a short training sees
        low, high = x.detach().float().aminmax()
        weight = max(self.momentum, 1.0 / (int(self.seen) + 1))
        self.low.lerp_(low, weight)
        self.high.lerp_(high, weight)

    def start(self, name: str) -> None:
        """Begin a calibration pass; what was seen before is forgotten."""
        from qtrain import observers

        self.name, self.layer = name, self.layer or name.removesuffix(".activation_fake")
        self.seen.zero_()
        self.collector = observers.make(self.kind, grid=self.grid, percentile=self.percentile, momentum=self.momentum)

    def finish(self) -> None:
        """End it: the range is known.

        Raises:
            ValueError: if all that was seen is one value.
        """
        collector, self.collector = self.collector, None
        if int(self.seen) == 0:
            return
        low, high = collector.range()
        if float(low) == float(high):
            raise ValueError(
                f"the activation {self.name} was {float(low):g} in all calibration examples: a constant has no range to quantize, and a "
                f"layer that sees nothing else is broken or unused. Leave it in float: quantizer.keep_float=['{self.layer or self.name}']"
            )
        self.low.copy_(low)
        self.high.copy_(high)

    def params(self) -> Params:
        """Scale (and zero point) for the range seen so far.

        Raises:
            ValueError: if no batch was seen.
        """
        if int(self.seen) == 0:
            raise ValueError(
                "a static activation grid has seen no data; train or calibrate before evaluating, or set quantizer.activation_range=dynamic"
            )
        return self.grid.choose(torch.stack([self.low, self.high]))


class FakeActivation(nn.Module):
    """Fake-quantizes an activation, dynamically or with an `Observer`."""

    def __init__(self, grid: Grid, observer: Observer | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.observer = observer
        self.enabled = True
        """False while training is to run in float; evaluation is always on the grid."""
        self.bypassed = False
        """True while the model is to compute in float here, whatever the mode (sensitivity analysis)."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape and dtype of ``x``."""
        observer = self.observer
        if observer is not None and observer.collector is not None:
            observer.observe(x)
            return x
        if self.bypassed:
            return x
        if observer is not None and self.training and not observer.frozen and observer.kind == "moving_average":
            observer.observe(x)
        if self.training and not self.enabled:
            return x
        return self.grid.fake(x, None if observer is None else observer.params())

    def static_params(self) -> Params | None:
        """Scale (and zero point) where the range is known, None where it is dynamic or not known yet."""
        observer = self.observer
        return None if observer is None or observer.collector is not None or int(observer.seen) == 0 else observer.params()

    def converted(self) -> FakeActivation | QuantizedActivation:
        """What takes its place in a converted model."""
        return self if self.observer is None else QuantizedActivation(self.grid, self.observer.params())


class QuantizedActivation(nn.Module):
    """An activation on a static grid, after conversion: the same numbers as `FakeActivation` in evaluation."""

    kind = "activation"
    observer = None

    def __init__(self, grid: Grid, params: Params) -> None:
        super().__init__()
        self.grid = grid
        self.param_names = list(params)
        for name, value in params.items():
            self.register_buffer(name, value.detach().clone())

    @property
    def params(self) -> Params:
        """scale float32 [1, 1]; zero_point int8 [1, 1] for asymmetric rules."""
        return {name: getattr(self, name) for name in self.param_names}

    def static_params(self) -> Params | None:
        """`params`."""
        return self.params

    def forward(self, x: Tensor) -> Tensor:
        """Shape and dtype of ``x``."""
        return self.grid.fake(x, self.params)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> int:
    """Run ``batches`` (keyword inputs of ``model``) through it in evaluation mode, so that static activation ranges are known.

    Activations pass through in float meanwhile; weights are on their grids.

    Returns:
        Number of examples seen.

    Raises:
        ValueError: if there is no batch, or an activation is not finite or constant, naming the module and the batch.
    """
    observers = {n.removesuffix(".observer"): m for n, m in model.named_modules() if isinstance(m, Observer)}
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    model.eval()
    number = examples = 0
    try:
        for name, observer in observers.items():
            observer.start(name)
        batches = list(batches)
        shown = track(batches, description="calibrating", console=console, transient=True, disable=not console.is_terminal)
        for batch in shown:
            model(**{name: value.to(device) for name, value in batch.items()})
            examples += len(next(iter(batch.values())))
            number += 1
        if observers and not examples:
            raise ValueError("there is no calibration data; set data.calibration_examples=256, say, or quantizer.activation_range=dynamic")
        for observer in observers.values():
            observer.finish()
    except NotFinite as error:
        raise ValueError(f"calibration batch {number}: {error}") from error
    finally:
        for observer in observers.values():
            observer.collector = None
    return examples
