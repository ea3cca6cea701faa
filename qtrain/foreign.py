"""Layers of other libraries in a model, bitsandbytes' and torchao's, read as codes of our grids."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

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


def parts(tensor: Any) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or those of a subclass such as torchao's."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


def convert(model: nn.Module) -> nn.Module:
    """Layers of ours in place of the others', in place."""
    for name, layer in progress([(n, m) for n, m in model.named_modules() if is_foreign(m)], "reading codes"):
        replace(model, name, QuantizedLinear(codes_of(layer), layer.bias))  # type: ignore[arg-type]
    bnb.unmark(model)
    return model.eval()
