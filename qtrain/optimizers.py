"""Optimizers: what `optimizer=adamw_auto` takes on each device, and which ones a device cannot run.

bitsandbytes' 8-bit AdamW (Dettmers et al. 2022, arXiv 2110.02861) keeps the two moments of a weight in 2 bytes instead of 8, those of
tensors below 4,096 values in float32; the paged form lets the driver move them to the CPU's memory while the GPU has no room. Version
0.50 runs both on a CPU too, but the page is then none, and a step takes about 50 times as long as torch's fused AdamW (21.7 ms against
0.4 ms of 0.9 million weights): they are refused there.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from qtrain.console import console

CUDA_ONLY = "bitsandbytes."
"""Packages whose optimizers need CUDA."""


def require_device(optimizer: dict[str, Any], device: torch.device) -> None:
    """Refuse an optimizer that ``device`` cannot run.

    Args:
        optimizer: the config node, with its `_target_`.

    Raises:
        ValueError: naming another.
    """
    target = str(optimizer.get("_target_", ""))
    if target.startswith(CUDA_ONLY) and device.type != "cuda":
        raise ValueError(
            f"optimizer is {target}, which needs CUDA, and this run trains on the {device.type.upper()}; valid here: adamw, adamw_auto, "
            "sgd. Set optimizer=adamw_auto (8 bits where there is CUDA, plain AdamW elsewhere) or optimizer=adamw; with a GPU, set "
            "trainer.accelerator=gpu"
        )


def adamw_auto(
    params: Iterable[dict[str, Any]],
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Paged 8-bit AdamW on CUDA where bitsandbytes is installed, torch's AdamW elsewhere; says which.

    Args:
        params: parameter groups, on the device that trains.
        fused: of torch's AdamW.
    """
    groups = list(params)
    device = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": eps}
    installed = _installed("bitsandbytes")
    if device.type == "cuda" and installed:
        optim: Any = import_module("bitsandbytes.optim")
        _say(f"paged 8-bit AdamW of bitsandbytes {installed}")
        made: torch.optim.Optimizer = optim.PagedAdamW8bit(groups, **options)
        return made
    why = "bitsandbytes is not installed" if device.type == "cuda" else f"training is on the {device.type.upper()}"
    _say(f"{'fused ' if fused else ''}AdamW of torch: {why}")
    return torch.optim.AdamW(groups, fused=fused, **options)


def moment_bytes(optimizer: dict[str, Any]) -> int:
    """Bytes that the moments of a trained parameter take: 2 of the 8-bit AdamW, 8 of the others at most.

    Args:
        optimizer: the config node, with its `_target_`.
    """
    target = str(optimizer.get("_target_", ""))
    automatic = target.endswith(f".{adamw_auto.__name__}") and torch.cuda.is_available() and _installed("bitsandbytes") is not None
    return 2 if automatic or target.endswith("8bit") else 8


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _say(what: str) -> None:
    console.print(f"  optimizer: {what}", style="dim", highlight=False)
