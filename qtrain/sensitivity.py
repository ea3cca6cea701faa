"""Which layers cost the most: each one alone on its grid, everything else in float.

For each layer that the quantizer would put on a grid, the validation split is run with that layer's weight and input rounded and all
else in float, and compared with the float model:

    sqnr_db         of the layer's output, 10 log10(sum y^2 / sum (y - y_q)^2), y in float from the same float input
    kl, agreement   of the logits with the float model's
    the task's      accuracy and loss, or perplexity and loss; accuracy_drop or perplexity_rise is what was lost against the float model

Rows are sorted by kl. Accuracy is what one wants to keep, but of a few hundred examples a single layer flips none or two or three, so that
most layers would tie; SQNR is precise but blind to what later layers make of an error. KL(float || this) sees every logit.

In a traced network the value that a layer reads is rounded on the graph's edge, where others (the residual) read it too. Here it is rounded
for the layer alone, since the others stay when the layer is kept in float. What this cannot see: errors of several layers add up, and
may amplify each other. Bias correction is left out, since it would shift the biases of layers that are to be in float.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from qtrain.activations import FakeActivation
from qtrain.console import console, progress
from qtrain.evaluate import Batch, decibels
from qtrain.layers import FakeLayer, fake_layers, in_float
from qtrain.record import Record
from qtrain.report import ANALYSIS_ROWS, analysis_cells, analysis_head
from qtrain.smoothing import hooks
from qtrain.tasks import TASK, Task


def analyze(
    scheme: Any,
    model: nn.Module,
    keep_float: list[str],
    calibration: list[dict[str, Tensor]],
    validation_batches: list[Batch],
    examples: int,
    task: Task = TASK,
) -> list[dict[str, Any]]:
    """Measure each layer alone; ``scheme`` and ``model`` (the float model) stay as they are.

    Args:
        scheme: the quantizer, a `qtrain.quantizer.Quantizer`.
        keep_float: patterns of modules that the model's family keeps in float.
        calibration: keyword inputs, for static ranges.
        validation_batches: (keyword inputs, labels).
        examples: how many of them to use, at most.

    Returns:
        Rows for run.json, the most harmful first: {"name", "grid", "sqnr_db" (None where exact), "accuracy", "accuracy_drop", "loss",
        "agreement", "kl"}; perplexity and perplexity_rise for language models; a number that is not finite is None.

    Raises:
        ValueError: if the quantizer has no layers that can be switched one by one, or there is no data.
    """
    batches = first(validation_batches, examples)
    if not batches:
        raise ValueError(
            "there are no validation examples to analyze layers with; set data.validation_fraction=0.1, say, or analyze=false and "
            "quantizer.keep_float without auto:N"
        )
    scheme = copy.deepcopy(scheme)
    scheme.bias_correction = False
    example = {name: value[:2] for name, value in batches[0][0].items()}
    prepared, _ = scheme.prepare(copy.deepcopy(model), keep_float, example)
    layers = list(fake_layers(prepared))
    if not layers:
        name = getattr(scheme, "registered_name", "") or type(scheme).__name__
        raise ValueError(
            f"quantizer={name} has no layers that could be put on their grids one by one, as analyze=true and quantizer.keep_float=auto:N "
            "do. Set quantizer=ptq_static (or qat), which rounds the same layers, for the analysis; or set analyze=false and name the "
            "modules in quantizer.keep_float"
        )
    if scheme.needs_data:
        scheme.calibrate(prepared, calibration)
    prepared.eval()
    main, lost = task.metrics[0], task.lost
    sign = 1 if lost.endswith("drop") else -1
    rows = []
    with torch.inference_mode(), in_float(prepared):
        float_outputs = task.predict(prepared, batches, "analyzing the float model")
        float_metrics = task.measure(float_outputs, batches)
        for name, layer in progress(layers, "analyzing layers"):
            with Alone(layer) as alone:
                outputs = task.predict(prepared, batches, "")
                metrics = task.measure(outputs, batches, float_outputs)
            row = {"sqnr_db": alone.sqnr_db(), **metrics, lost: sign * (float_metrics[main] - metrics[main])}
            finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
            rows.append({"name": name, "grid": layer.weight_fake.grid.describe(), **finite})
    return sorted(rows, key=lambda row: math.inf if row["kl"] is None else row["kl"], reverse=True)


class Alone:
    """Puts one layer of a model that computes in float on its grid, with the value that it reads, and measures the error of its output."""

    def __init__(self, layer: FakeLayer) -> None:
        self.layer = layer
        self.signal = self.noise = 0.0
        own = [layer.activation_fake, layer.source]
        self.switches: list[Any] = [layer, *(a for a in own if a is not None)]
        self.x: Tensor = torch.empty(0)

    def __enter__(self) -> Alone:
        self.hooks = hooks()
        registered = self.hooks.__enter__()
        registered.append(self.layer.register_forward_pre_hook(self._before))
        registered.append(self.layer.register_forward_hook(self._after))
        if self.layer.source is not None:
            registered.append(self.layer.source.register_forward_hook(lambda _, args, __: args[0]))
        self._bypass(False)
        return self

    def __exit__(self, *_: object) -> None:
        self._bypass(True)
        self.hooks.__exit__(None, None, None)

    def sqnr_db(self) -> float:
        """Signal to noise of the output, decibels; infinite where nothing was lost."""
        return decibels(self.signal, self.noise)

    def _bypass(self, bypassed: bool) -> None:
        for switch in self.switches:
            switch.bypassed = bypassed

    def _before(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        self.x = args[0]
        source: FakeActivation | None = self.layer.source
        return args if source is None else (source.grid.fake(self.x, source.static_params()),)

    def _after(self, layer: Any, _: Any, y_q: Tensor) -> None:
        layer.bypassed = True
        y = layer.forward(self.x)  # not layer(x), which would come back here
        layer.bypassed = False
        self.signal += float(y.square().sum(dtype=torch.float64))
        self.noise += float((y - y_q).square().sum(dtype=torch.float64))


def first(batches: list[Batch], examples: int) -> list[Batch]:
    """The first ``examples`` examples of ``batches``."""
    taken = []
    for inputs, labels in batches:
        if examples <= 0:
            break
        taken.append(({name: value[:examples] for name, value in inputs.items()}, labels[:examples]))
        examples -= len(labels)
    return taken


def print_analysis(rows: list[dict[str, Any]]) -> None:
    """The most harmful layers, as a table."""
    table = Table(title="each layer alone on its grid, the most harmful first", title_justify="left")
    for i, head in enumerate(analysis_head(rows)):
        table.add_column(head, justify="right" if i > 1 else "left")
    for row in rows[:ANALYSIS_ROWS]:
        table.add_row(*analysis_cells(row))
    console.print(table)
    if len(rows) > ANALYSIS_ROWS:
        console.print(f"and {len(rows) - ANALYSIS_ROWS} more in run.json", style="dim")


def keep_most_harmful(rows: list[dict[str, Any]], count: int, record: Record) -> list[str]:
    """Names of the ``count`` most harmful layers of ``rows``, as `quantizer.keep_float=auto:COUNT` asks; noted in the record.

    Raises:
        ValueError: if that would leave nothing on a grid.
    """
    if not count:
        return []
    if count >= len(rows):
        raise ValueError(
            f"quantizer.keep_float=auto:{count} keeps {count} layers in float, and there are only {len(rows)} to quantize; valid: auto:1 "
            f"to auto:{len(rows) - 1}. Set quantizer.keep_float=auto:{max(1, len(rows) // 10)}, say"
        )
    names = [row["name"] for row in rows[:count]]
    record.note(f"auto:{count} keeps in float, as the most harmful: {', '.join(names)}")
    return names
