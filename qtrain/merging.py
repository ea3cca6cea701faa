"""Adapters taken out of a model again: merged into float weights, merged inside the rounded ones, or left aside.

`merged_weight` is W + s * B A in the order of operations of peft's own `merge(safe_merge=True)`, so that plain peft, given the float base
and the folder `adapter/`, comes to the same bits. It is never computed under autocast: the deployed weight has the type of the base's.

Shapes: W [O, I], DoRA's magnitude m [O].
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from qtrain.bnb import unmark
from qtrain.foreign import codes_of, is_foreign
from qtrain.layers import QuantizedLayer
from qtrain.placement import forget_places
from qtrain.prepare import copy_of, replace

NAME = "default"
"""peft's name of the one adapter."""


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> peft's layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, peft_layer.LoraLayer)}


def merged_weight(layer: Any, w_OI: Tensor) -> Tensor:
    """The weight that a peft layer stands for, of the base's float weight: W + s * B A, scaled to the magnitudes of DoRA."""
    with torch.autocast(w_OI.device.type, enabled=False):
        delta_OI = layer.get_delta_weight(NAME)
        variant = layer.lora_variant.get(NAME)
        if variant is None:
            return w_OI + delta_OI.to(w_OI.dtype)
        magnitude = layer.lora_magnitude_vector[NAME]
        norm_O = magnitude.get_weight_norm(w_OI, delta_OI, scaling=1).detach()  # constant in the gradient: the paper's section 4.3
        return ((magnitude.weight / norm_O).view(-1, 1) * (w_OI + delta_OI)).to(w_OI.dtype)


def base_weight(layer: nn.Module) -> Tensor:
    """The float weight [O, I] that a base layer computes with, decoded where it is quantized."""
    if isinstance(layer, QuantizedLayer):
        return layer.quantized.decode()
    if is_foreign(layer):
        return codes_of(layer).decode()
    weight: Any = layer.weight
    return weight.detach()  # type: ignore[no-any-return]


@torch.no_grad()
def merged_inside(model: nn.Module) -> nn.Module:
    """A fake-quantized model with its adapters merged (`LoraInside`); it shares all other tensors with ``model``."""
    twin = copy_of(model)
    for name, layer in lora_layers(twin).items():
        base = layer.get_base_layer()
        base.weight, base.inside = nn.Parameter(merged_weight(layer, base.weight), requires_grad=False), None
        replace(twin, name, base)
    _unwrap(twin)
    return twin.requires_grad_(False).eval()


@torch.no_grad()
def merged_float(model: nn.Module, float_model: nn.Module | None = None) -> nn.Module:
    """A float model of the decoded base with its adapters merged.

    Args:
        model: the base with its adapters.
        float_model: what the base was made of; gives the classes of its modules, and shares what was not quantized. None where there is
            none (`qtrain/direct.py`): the merged model is then on the CPU, and shares nothing.
    """
    twin = copy_of(float_model) if float_model is not None else frame(model)
    decoded: dict[int, nn.Parameter] = {}  # tied weights stay one
    for name, module in list(model.named_modules()):
        if isinstance(module, peft_layer.LoraLayer):
            base: Any = module.get_base_layer()
            weight = nn.Parameter(merged_weight(module, base_weight(base)), requires_grad=False)
        elif isinstance(module, ModulesToSaveWrapper):
            if float_model is not None:  # else the frame has a copy of it
                replace(twin, name, module.modules_to_save[NAME])
            continue
        elif is_quantized(module) and not name.endswith(".base_layer"):
            base = module
            key = id(module.codes if isinstance(module, QuantizedLayer) else module.weight)
            if key not in decoded:
                decoded[key] = nn.Parameter(base_weight(module), requires_grad=False)
            weight = decoded[key]
        else:
            continue
        target: Any = twin.get_submodule(name)
        place: Any = {"dtype": target.weight.dtype} | ({"device": "cpu"} if float_model is None else {})
        placed = weight.to(**place)
        target.weight = weight if placed is weight else nn.Parameter(placed, requires_grad=False)
        if getattr(base, "bias", None) is not None:
            target.bias = nn.Parameter(base.bias.detach().to(**place), requires_grad=False)
    own = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():  # biases that were trained outside of the layers above
        if parameter.requires_grad and name in own:
            own[name].data = parameter.detach().to(own[name].device, own[name].dtype).clone()
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            twin.get_submodule(name).load_state_dict(module.state_dict())
    return twin.requires_grad_(False).eval()


def base_of(model: Any) -> nn.Module:
    """The base alone; shares its tensors with ``model``."""
    twin = copy_of(model)
    for name, layer in lora_layers(twin).items():
        replace(twin, name, layer.get_base_layer())
    _unwrap(twin, trained=False)
    return twin.eval()


def frame(model: Any) -> nn.Module:
    """The modules of a base with its adapters, on the CPU, with Linear layers without storage where codes or adapters are."""
    dtype = model.get_input_embeddings().weight.dtype
    twin: Any = copy_of(model)
    forget_places(twin)
    for name, layer in list(model.named_modules()):
        if name.endswith(".base_layer") or not (isinstance(layer, peft_layer.LoraLayer) or is_quantized(layer)):
            continue
        base: Any = layer.get_base_layer() if isinstance(layer, peft_layer.LoraLayer) else layer
        bias = getattr(base, "bias", None) is not None
        replace(twin, name, nn.Linear(base.in_features, base.out_features, bias=bias, device="meta", dtype=dtype))
    _unwrap(twin)
    unmark(twin)
    cpu: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in twin.modules():
        for key, p in module._parameters.items():
            if p is None or p.is_meta:
                continue
            if id(p) not in cpu:
                cpu[id(p)] = nn.Parameter(p.detach().cpu().clone(), requires_grad=False)
            module._parameters[key] = cpu[id(p)]
        for key, b in module._buffers.items():
            module._buffers[key] = None if b is None else b.detach().cpu().clone()
    return twin  # type: ignore[no-any-return]


def is_quantized(module: nn.Module) -> bool:
    """Whether a module holds codes, ours or those of bitsandbytes."""
    return isinstance(module, QuantizedLayer) or is_foreign(module)


def _unwrap(model: nn.Module, trained: bool = True) -> None:
    """Take peft's marks off, and put modules that were trained whole, or, unless ``trained``, those that they were made of, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            replace(model, name, module.modules_to_save[NAME] if trained else module.original_module)
    for attribute in ("peft_config", "_hf_peft_config_loaded", "peft_type", "base_sha256"):
        if attribute in vars(model):
            delattr(model, attribute)
