"""Layers of other libraries in a model, bitsandbytes' and torchao's, read as codes of our grids."""

from __future__ import annotations

from typing import Any

from torch import nn

from qtrain import bnb, torchao_tensors
from qtrain.console import progress
from qtrain.grids.base import QuantizedTensor
from qtrain.layers import QuantizedLinear
from qtrain.prepare import replace


def is_foreign(module: nn.Module) -> bool:
    """Whether its weight is held by another library."""
    return bnb.is_bnb(module) or torchao_tensors.is_torchao(module)


def codes_of(layer: nn.Module) -> QuantizedTensor:
    """Codes, scales and grid; nothing is rounded."""
    return bnb.codes_of(layer) if bnb.is_bnb(layer) else torchao_tensors.codes_of(layer)


def convert(model: nn.Module) -> nn.Module:
    """Layers of ours in place of the others', in place; shares nothing with them but the bias."""
    for name, layer in progress([(n, m) for n, m in model.named_modules() if is_foreign(m)], "reading codes"):
        replace(model, name, QuantizedLinear(codes_of(layer), layer.bias))  # type: ignore[arg-type]
    target: Any = model
    for attribute in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if attribute in vars(model):
            delattr(model, attribute)
    if getattr(getattr(target, "config", None), "quantization_config", None) is not None:
        del target.config.quantization_config
    return model.eval()
