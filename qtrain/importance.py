"""Importance of input channels: where a weight meets large activations, its rounding error costs more.

    E[(y - y_q)^2] = sum_i (w_i - q_i)^2 E[x_i^2] + cross terms          for y = sum_i w_i x_i

Dropping the cross terms, the weight of an error is the mean squared activation of its input channel. llama.cpp calls these an importance
matrix ("imatrix", `tools/imatrix/imatrix.cpp`), measures them over a calibration text, and hands them to the searches for scales; so does
qtrain (`grid.choose(w, importance)`), and exporters write them in llama.cpp's format.

What is kept per layer is one sum per input channel, whatever the length of the text. The token embedding has none, and nor has an output
head that is tied to it: the same codes serve rows that are looked up, whose error no activation weighs (llama.cpp leaves both out too).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtrain import gguf_names, imatrix
from qtrain.console import progress
from qtrain.layers import FakeEmbedding, FakeLayer, FakeLinear, fake_layers, in_float


@dataclass
class Importance:
    """What calibration saw at the input of one layer."""

    sum_of_squares: Tensor
    """float32 [I], over all tokens."""
    tokens: int

    def mean(self) -> Tensor:
        """Mean squared activation, float32 [I]; 1 everywhere if there was no token."""
        return self.sum_of_squares / self.tokens if self.tokens else torch.ones_like(self.sum_of_squares)


def weigh(model: nn.Module, batches: Iterable[dict[str, Tensor]], source: Any) -> dict[str, Importance]:
    """Measure importances of a fake-quantized model, or read them, and give each layer its own.

    Args:
        batches: keyword inputs of ``model``.
        source: True to measure, or the path of a file in llama.cpp's imatrix format.

    Returns:
        Module name -> importance.

    Raises:
        ValueError: if there is no calibration data, an activation is not finite, or the file is of another model.
    """
    layers = {n: layer for n, layer in fake_layers(model) if isinstance(layer, FakeLinear) and not _tied(model, layer)}
    found = from_file(Path(source), model, layers) if isinstance(source, str) else measure(model, layers, batches)
    for name, layer in layers.items():
        if name in found:
            layer.weight_fake.importance = found[name].mean().to(layer.weight.device)
    return found


def measure(model: nn.Module, layers: dict[str, FakeLinear], batches: Iterable[dict[str, Tensor]]) -> dict[str, Importance]:
    """Run ``model`` in float over ``batches`` and sum the squares of what each layer reads.

    Raises:
        ValueError: if there is no data, or an activation is not finite, naming the layer.
    """
    found = {n: Importance(torch.zeros(layer.in_features), 0) for n, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(_summing(found[n])) for n, layer in layers.items()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        with torch.inference_mode(), in_float(model):
            for inputs in progress(batches, "measuring importances"):
                model(**{n: v.to(device) for n, v in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    if not any(i.tokens for i in found.values()):
        raise ValueError(
            "quantizer.imatrix=true has no calibration text to measure on; set data.calibration=FILE, or quantizer.imatrix=false"
        )
    for name, importance in found.items():
        if not bool(torch.isfinite(importance.sum_of_squares).all()):
            raise ValueError(
                f"the input of {name} is not finite on the calibration text; set model.dtype=float32, or quantizer.imatrix=false"
            )
    return found


def from_file(path: Path, model: nn.Module, layers: dict[str, FakeLinear]) -> dict[str, Importance]:
    """Importances of a file in one of llama.cpp's formats, as far as ``model`` has its tensors.

    Raises:
        ValueError: if it is no such file, or of another model.
    """
    entries = imatrix.read(path).entries
    names = gguf_names.tensor_names(model.config, [f"{name}.weight" for name in layers], gguf_names.tied(model))
    found = {}
    for name, layer in layers.items():
        entry = entries.get(names.get(f"{name}.weight", ""))
        if entry is None:
            continue
        sums = torch.from_numpy(entry.sums_EI.astype("float32").reshape(-1))
        if len(sums) != layer.in_features:
            raise ValueError(
                f"quantizer.imatrix={path} has {len(sums)} channels for {name}, which has {layer.in_features}: it is of another model. "
                "Set quantizer.imatrix=true to measure one"
            )
        found[name] = Importance(sums, int(entry.counts_E.sum()))
    if not found:
        raise ValueError(
            f"quantizer.imatrix={path} has none of the model's {len(layers)} layers: it is of another model. Set quantizer.imatrix=true"
        )
    return found


def _summing(importance: Importance) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        importance.sum_of_squares += x.float().square().sum(0).cpu()
        importance.tokens += len(x)

    return hook


def _tied(model: nn.Module, layer: FakeLayer) -> bool:
    return any(isinstance(m, FakeEmbedding) and m.weight is layer.weight for m in model.modules())
