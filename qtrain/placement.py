"""Where a model is: on one device, to which it can be moved, or spread over several by transformers (`device_map`), where it stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_spread(model: nn.Module) -> bool:
    """Whether its layers are on several devices."""
    placed: Any = getattr(model, "hf_device_map", None) or {}
    return len(set(map(str, placed.values()))) > 1


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` on ``device``, moved in place where it is elsewhere; one that is spread stays where it is."""
    elsewhere = any(t.device.type != device.type for t in [*model.parameters(), *model.buffers()])
    return model.to(device) if elsewhere and not is_spread(model) else model


def forget_places(model: nn.Module) -> None:
    """Take off, in place, what transformers put on a model to carry values between its devices."""
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    model.__dict__.pop("hf_device_map", None)


def gathered(model: nn.Module) -> nn.Module:
    """``model`` on the CPU, in place; of one that was spread, nothing is left of that."""
    if hasattr(model, "hf_device_map"):
        forget_places(model)
    return model.cpu()
