"""torchao's weight-only tensors in a model, and their codes on our grids: nothing is rounded again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qtrain.console import progress
from qtrain.grids.base import QuantizedTensor, require_finite
from qtrain.registry import get


@torch.no_grad()
def swap(model: nn.Module, linear: dict[str, Any], options: Any) -> None:
    """Put torchao's tensors in place of the weights of ``linear``, where they are.

    Raises:
        ValueError: if a weight is not finite, or a group does not divide its rows.
    """
    from torchao.quantization import quantize_

    config = settings(options.weight)
    for name, module in progress(linear.items(), f"quantizing to {options.type}"):
        require_finite(module.weight, f"the weight of {name}")
        why = options.weight.check_shape(tuple(module.weight.shape))
        if why:
            raise ValueError(f"{name}: {why}, or leave it in float: quantizer.keep_float=[{name}]")
        module.weight = nn.Parameter(module.weight.detach(), requires_grad=False)  # float weights may be shared with others
        quantize_(module, config)


def settings(grid: Any) -> Any:
    """torchao's config for one of our grids: int8 packed tensors per row, or integers in bytes per group."""
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False) if grid.granularity == "channel" else unpacked(grid)


def unpacked(grid: Any) -> Any:
    """torchao's config of integers in bytes, which it has for any number of bits, per row or group."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    granularity = PerGroup(grid.group_size) if grid.granularity == "group" else PerAxis(0)
    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{grid.bits}"), granularity=granularity)


def is_torchao(module: nn.Module) -> bool:
    """Whether its weight is a tensor of torchao."""
    return type(module._parameters.get("weight")).__module__.startswith("torchao.")


def codes_of(layer: Any) -> QuantizedTensor:
    """Codes, scales and grid of a layer with a symmetric integer tensor of torchao; codes are shared with it."""
    weight = layer.weight
    size = int(weight.block_size[1])
    if type(weight).__name__ == "Int8Tensor":
        grid = get("grid", "affine")(bits=8, granularity="channel", rule="absmax_half")
    else:
        grid = get("grid", "affine")(bits=4, granularity="group", group_size=size, rule="absmax_half")
    return symmetric(weight, grid)


def symmetric(weight: Any, grid: Any) -> QuantizedTensor:
    """The codes of a tensor of torchao on ``grid``.

    Raises:
        ValueError: if it has zero points.
    """
    zero = getattr(weight, "zero_point", None)
    if zero is not None and bool(zero.any()):
        raise ValueError(
            "a weight of torchao has zero points, and the grids that torchao trains on are symmetric. Set quantizer=torchao "
            "quantizer.type=int8"
        )
    return QuantizedTensor(grid, weight.qdata.detach(), {"scale": weight.scale.detach().float()})
