"""torchao's weight-only tensors in a model, and their codes on our grids: nothing is rounded again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qtrain.console import progress
from qtrain.grids.base import QuantizedTensor, require_finite


@torch.no_grad()
def swap(model: nn.Module, linear: dict[str, Any], options: Any) -> None:
    """Put torchao's tensors in place of the weights of ``linear``, on the GPU where there is one.

    Raises:
        ValueError: if a weight is not finite, or a group does not divide its rows.
    """
    from torchao.quantization import quantize_

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = settings(options)
    for name, module in progress(linear.items(), f"quantizing to {options.type}"):
        require_finite(module.weight, f"the weight of {name}")
        why = options.weight.check_shape(tuple(module.weight.shape))
        if why:
            raise ValueError(f"{name}: {why}, or leave it in float: quantizer.keep_float=[{name}]")
        module.weight = nn.Parameter(module.weight.detach().to(device), requires_grad=False)  # float weights may be shared with others
        quantize_(module, config)


def settings(options: Any) -> Any:
    """torchao's config of `qtrain.quantizers.torchao_base.Torchao`."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if options.type == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    types: Any = torch  # whose stubs lack int4
    return IntxWeightOnlyConfig(weight_dtype=types.int4, granularity=PerGroup(options.group_size))


def is_torchao(module: nn.Module) -> bool:
    """Whether its weight is a tensor of torchao."""
    return type(module._parameters.get("weight")).__module__.startswith("torchao.")


def codes_of(layer: Any) -> QuantizedTensor:
    """Codes, scales and grid of a layer with a symmetric integer tensor of torchao.

    Raises:
        ValueError: if the tensor has zero points.
    """
    from qtrain.registry import get

    weight = layer.weight
    zero = getattr(weight, "zero_point", None)
    if zero is not None and bool(zero.any()):
        raise ValueError(
            "a weight of torchao has zero points, and qtrain's base grids are symmetric. Set quantizer=torchao quantizer.type=int8"
        )
    size = int(weight.block_size[1])
    affine = get("grid", "affine")
    if size == weight.shape[1] and type(weight).__name__ == "Int8Tensor":
        grid = affine(bits=8, granularity="channel", rule="absmax_half")
    else:
        grid = affine(bits=4, granularity="group", group_size=size, rule="absmax_half")
    return QuantizedTensor(grid, weight.qdata.detach().clone(), {"scale": weight.scale.detach().float().clone()})
