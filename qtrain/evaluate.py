"""Numbers about models: logits over a split, accuracy, loss, agreement with the float model, SQNR per layer, sizes.

Every stage is measured on the same batches in the same order, in float32, so that stages can be compared to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.console import progress
from qtrain.grids.base import QuantizedTensor
from qtrain.layers import quantized_layers

Batch = tuple[dict[str, Tensor], Tensor]
"""Keyword inputs, and labels."""


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, or what transformers models return."""
    return output if isinstance(output, Tensor) else output.logits


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[Batch], what: str = "evaluating") -> Tensor:
    """Logits of all examples, float32 on the CPU, [N, C], in the order of ``batches``."""
    model.eval()
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    rows = [logits_of(model(**{k: v.to(device) for k, v in inputs.items()})).float().cpu() for inputs, _ in progress(batches, what)]
    return torch.cat(rows)


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy (a fraction) and mean cross-entropy (nats); logits [N, C], labels [N]."""
    return {
        "accuracy": float((logits.argmax(-1) == labels).double().mean()),
        "loss": float(F.cross_entropy(logits.double(), labels)),
    }


def compare_to_float(logits: Tensor, float_logits: Tensor) -> dict[str, float]:
    """Agreement (share of equal arg-max) and KL(float || this) in nats."""
    target = F.log_softmax(float_logits.double(), -1)
    return {
        "agreement": float((logits.argmax(-1) == float_logits.argmax(-1)).double().mean()),
        "kl": float(F.kl_div(F.log_softmax(logits.double(), -1), target, reduction="batchmean", log_target=True)),
    }


def sqnr_db(w: Tensor, q: Tensor) -> float:
    """Signal to quantization noise, 10 log10(sum w^2 / sum (w - q)^2), decibels; infinite where equal."""
    return decibels(float(w.double().square().sum()), float((w.double() - q.double()).square().sum()))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise."""
    return 10 * math.log10(max(signal, 1e-300) / noise) if noise else math.inf


def layer_table(model: nn.Module, weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One row per quantized layer: name, grid, shape, SQNR against the float weight of that name, and the grid of its input."""
    rows = []
    for name, layer in quantized_layers(model):
        q: QuantizedTensor = layer.quantized
        name = name.removesuffix(".base_layer")  # beside an adapter
        row: dict[str, Any] = {"name": name, "grid": q.grid.describe(), "shape": list(q.shape)}
        if f"{name}.weight" in weights:  # of a base that was read straight into its codes there is none
            row["sqnr_db"] = _finite(sqnr_db(weights[f"{name}.weight"].to(q.codes.device), q.decode()))
        activation = getattr(layer, "activation_fake", None) or getattr(layer, "source", None)
        if activation is not None:
            row["activation_grid"] = activation.grid.describe()
        rows.append(row)
    return rows


def _finite(value: float) -> float | None:
    return value if value != float("inf") else None


def sizes(model: nn.Module, float_model: nn.Module) -> dict[str, int]:
    """Bytes of the float parameters, and of codes plus scales (packed) plus what stayed in float."""
    float_bytes = sum(p.numel() * p.element_size() for p in float_model.parameters())
    distinct = {layer.codes.data_ptr(): layer for _, layer in quantized_layers(model)}  # tied weights are stored once
    packed = sum(layer.quantized.nbytes() for layer in distinct.values())
    rest = sum(p.numel() * p.element_size() for p in model.parameters())
    biases = sum(b.numel() * 4 for _, layer in quantized_layers(model) if isinstance(b := getattr(layer, "bias", None), Tensor))
    return {"float_bytes": float_bytes, "quantized_bytes": packed + rest + biases}
