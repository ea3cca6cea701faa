"""bitsandbytes' layers in a model: put there by transformers' own function, and read back as codes of our grids.

The 4-bit types are the grids nf4 and fp4 to the bit (`qtrain/grids/codebook.py`). LLM.int8() has int8 codes and the
absmax of each row, float32; as a grid that is int8 per channel with scale absmax / 127, where bitsandbytes multiplies by its float32
1 / 127 (the last bit may differ).
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import nn

from qtrain.console import progress
from qtrain.grids.base import QuantizedTensor, require_finite
from qtrain.grids.params4bit import from_params4bit
from qtrain.layers import QuantizedLinear
from qtrain.prepare import replace
from qtrain.registry import get

COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MARKS = ("is_loaded_in_4bit", "is_loaded_in_8bit")
"""Attributes by which transformers and peft know a model of bitsandbytes."""


def settings(options: Any, skip: list[str] | None = None) -> Any:
    """transformers' `BitsAndBytesConfig` of `qtrain.quantizers.bnb.Bnb`.

    Args:
        skip: patterns of modules that stay in float, where transformers itself swaps them.

    Raises:
        ValueError: if bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(f"quantizer=bnb needs the package bitsandbytes ({error}). Install it: pip install bitsandbytes") from error
    import transformers

    make: Any = transformers.BitsAndBytesConfig
    if options.type == "int8":
        return make(load_in_8bit=True, llm_int8_threshold=options.threshold, llm_int8_skip_modules=skip)
    return make(
        load_in_4bit=True,
        llm_int8_skip_modules=skip,
        bnb_4bit_quant_type=options.type,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=compute_dtype(options.compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, options.quant_storage),
    )


def exactly(name: str) -> str:
    """The pattern by which transformers leaves out this module and no other; a plain name would also be the end of longer ones."""
    return f"^{re.escape(name)}$"


def compute_dtype(name: str) -> torch.dtype:
    """The type of products: `auto` is bfloat16 where CUDA has it, else float32."""
    if name != "auto":
        return COMPUTE[name]
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


@torch.no_grad()
def swap(model: nn.Module, linear: dict[str, Any], options: Any) -> list[str]:
    """Put bitsandbytes' layers in place of ``linear``, quantized where the weights are.

    Returns:
        Names of layers that bitsandbytes would decode wrongly here, in whose place are ours with the same codes: on CPUs with AVX-512,
        version 0.50 takes the wrong scales where a row is a multiple of 16 but not of the block.

    Raises:
        ValueError: if a weight is not finite.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config = settings(options)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # that int8 casts its inputs to float16, at every product
    others = [exactly(name) for name, module in model.named_modules() if type(module) is nn.Linear and name not in linear]
    replace_with_bnb_linear(model, modules_to_not_convert=others, quantization_config=config)
    wrong = []
    for name, module in progress(linear.items(), f"quantizing to {options.type}"):
        require_finite(module.weight, f"the weight of {name}")
        layer: Any = model.get_submodule(name)
        empty = {key: value for key, value in vars(layer.weight).items() if key not in ("SCB", "CB")}
        kind = type(layer.weight)
        device = module.weight.device
        weight = module.weight.detach().to("cpu" if options.type == "int8" else device)  # int8 is rounded on the way to a device
        layer.weight = kind(weight.contiguous(), requires_grad=False, **empty).to(device)
        layer.bias = module.bias
        layer.train(module.training)
        wrong += settled(model, name, layer)
    _mark(model, config, options.type)
    return wrong


def settled(model: nn.Module, name: str, layer: Any) -> list[str]:
    """Make a layer with codes compute with them: bitsandbytes' own, or ours in its place; returns the name where it is ours.

    Raises:
        ValueError: if a scale is not finite, as that of a weight with a value that is not.
    """
    layer.support_avx512bf16_for_cpu = False  # see qtrain/quantizers/bnb.py
    q = codes_of(layer)
    for part in q.params.values():
        require_finite(part.float(), f"the scale of {name}")
    if is_int8(layer) or decodes_rightly(layer, q):
        return []
    replace(model, name, QuantizedLinear(q, layer.bias))
    return [name]


@torch.no_grad()
def settle(model: nn.Module) -> list[str]:
    """`settled` for every layer of a model that transformers has loaded with bitsandbytes' layers."""
    layers = [(name, module) for name, module in model.named_modules() if is_bnb(module)]
    return [wrong for name, layer in progress(layers, "checking codes") for wrong in settled(model, name, layer)]


def decodes_rightly(layer: Any, q: QuantizedTensor) -> bool:
    """Whether bitsandbytes computes with the numbers that a layer's codes and scales ``q`` mean."""
    import bitsandbytes

    decoded = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return torch.equal(decoded, q.decode().to(decoded.dtype))


def _mark(model: Any, config: Any, kind: str) -> None:
    """What transformers and peft look at."""
    setattr(model, MARKS[kind == "int8"], True)
    if hasattr(model, "config"):
        model.config.quantization_config = config


def unmark(model: Any) -> None:
    """Undo what `swap` wrote onto a model whose layers are ours again."""
    for attribute in (*MARKS, "hf_quantizer", "quantization_method", "is_quantized"):
        if attribute in vars(model):
            delattr(model, attribute)
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        del model.config.quantization_config


def is_int8(module: nn.Module) -> bool:
    """Whether it is a layer of LLM.int8()."""
    return type(module._parameters.get("weight")).__name__ == "Int8Params"


def is_bnb(module: nn.Module) -> bool:
    """Whether it is a layer of bitsandbytes."""
    return type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params")


def codes_of(layer: Any) -> QuantizedTensor:
    """Codes, scales and grid of a layer of bitsandbytes; nothing is rounded."""
    if type(layer.weight).__name__ == "Params4bit":
        return from_params4bit(layer.weight)
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    codes = layer.weight.CB if getattr(layer.weight, "CB", None) is not None else layer.weight.data
    grid = get("grid", "affine")(bits=8, granularity="channel", rule="absmax")
    return QuantizedTensor(grid, codes.to(torch.int8), {"scale": (scales.float() / 127).reshape(-1, 1)})
