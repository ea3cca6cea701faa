"""`baseline=false`: weights go from their file straight into the layers of another library, and there never is a float model.

A 70B model is 140 GB in bfloat16 and 36 GB in NF4. transformers rounds each weight as it reads it and, with `model.device_map`, puts it
where there is room. What a float model would have told is then missing: its metrics, agreement and KL, the distance of each layer's
weight to its rounded one. What a merge needs of it is its structure alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qtrain.foreign import is_foreign
from qtrain.record import Record
from qtrain.targets import always_float


def check(config: Any) -> None:
    """Refuse what cannot do without a float model.

    Raises:
        ValueError: naming it, and what to type.
    """
    if config.baseline:
        if getattr(config.model, "device_map", None) is not None:
            raise ValueError(
                f"model.device_map={config.model.device_map} spreads weights over devices as they are read, which the float model of "
                "baseline=true is not. Set baseline=false, or model.device_map=null"
            )
        return
    if str(getattr(config.model, "path", "")).endswith(".gguf"):
        raise ValueError(
            f"baseline=false reads the weights of a transformers folder one by one, and model.path={config.model.path} is a GGUF file, "
            "which transformers decodes whole. Set baseline=true, or model.path=/a/folder"
        )
    refused = [] if config.quantizer.loads else [f"quantizer={config.quantizer.registered_name}"]
    refused += [] if hasattr(config.model, "build_quantized") else [f"model={config.model.registered_name}"]
    refused += ["adapter=null"] if config.adapter is None else []
    refused += ["adapter.init=loftq"] if getattr(config.adapter, "init", None) == "loftq" else []
    refused += ["analyze=true"] if config.analyze else []
    refused += [f"finetune.epochs={config.finetune.epochs}"] if config.finetune.epochs else []
    if refused:
        raise ValueError(
            f"baseline=false reads weights straight into bitsandbytes' layers, so there is no float model for {', '.join(refused)}. Set "
            "model=causal_lm quantizer=bnb adapter=lora adapter.init=zero analyze=false finetune.epochs=0, or baseline=true"
        )


def load(config: Any, record: Record) -> nn.Module:
    """The base, its layers those of the quantizer's library.

    Raises:
        ValueError: if the weights cannot be read, are not finite, or other layers were swapped than the options say.
    """
    scheme, empty = config.quantizer, config.model.empty()
    wanted, kept = scheme.chosen(empty, always_float(config, empty))
    skip = [name for name in kept if isinstance(empty.get_submodule(name), nn.Linear)]
    model: nn.Module = config.model.build_quantized(scheme.settings(skip))
    found = {name for name, module in model.named_modules() if is_foreign(module)}
    if found != wanted.keys():
        different = sorted(found ^ wanted.keys())
        raise ValueError(
            f"transformers put other layers on {scheme.type} than quantizer.include and keep_float name: {len(different)} differ, the "
            f"first {different[0]}. Set baseline=true, which swaps them by name"
        )
    scheme.settle(model)
    record.data["kept_float"] = kept
    record.fallbacks(scheme.fallbacks)
    scheme.fallbacks = []
    return model
