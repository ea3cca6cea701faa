"""Which modules are quantized: include patterns, keep_float patterns, and no silence.

Patterns are shell globs over module names as `model.named_modules()` gives them (`*.attention.*`, `bert.pooler.dense`).
A pattern that matches no module is an error (law 4), since it is a typing mistake or the wrong model.
"""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def select(model: nn.Module, include: list[str], keep_float: list[str]) -> tuple[dict[str, nn.Module], list[str]]:
    """The Linear, Embedding and convolution modules to quantize, by name, and the names of those kept in float.

    Raises:
        ValueError: if a pattern matches none of them, or nothing is left to quantize.
    """
    from qtrain.prepare import SWAPPABLE

    candidates: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, SWAPPABLE)}
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no Linear, Embedding or convolution, so there is nothing to quantize. Set model=NAME")
    kinds = " and ".join(sorted({type(m).__name__ for m in candidates.values()}))
    for key, patterns in (("include", include), ("keep_float", keep_float)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                close = difflib.get_close_matches(pattern, list(candidates), n=3, cutoff=0.3) or list(candidates)[:3]
                raise ValueError(
                    f"quantizer.{key} pattern {pattern!r} matches none of the {len(candidates)} {kinds} modules; "
                    f"the nearest are {', '.join(close)}. Set quantizer.{key}=['{close[0] if close else '*'}'], say."
                )
    kept = [n for n in candidates if _matches(n, keep_float)]
    chosen = {n: m for n, m in candidates.items() if _matches(n, include) and n not in kept}
    if not chosen:
        raise ValueError(f"include={include} without keep_float={keep_float} leaves nothing to quantize. Set quantizer.keep_float=[]")
    return chosen, [n for n in candidates if n not in chosen]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


def inside(model: nn.Module, ends: list[str]) -> list[str]:
    """Names of the modules that are trained whole where an adapter's `modules_to_save` are ``ends``, and of those in them.

    As peft takes it: a name that ends in one of ``ends``, if only with its last letters.
    """

    def is_inside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[: i + 1]).endswith(tuple(ends)) for i in range(len(parts)))

    return [name for name, _ in model.named_modules() if name and ends and is_inside(name)]


def always_float(config: Any, model: nn.Module) -> list[str]:
    """Names of the modules that no base quantizes: the family's own, and what an adapter's run trains whole.

    Args:
        config: `qtrain.config.Config`.
    """
    from qtrain.prepare import SWAPPABLE

    whole = inside(model, config.adapter.modules_to_save) if config.adapter is not None else []
    heads: list[str] = config.model.always_float(model)
    return [*heads, *(n for n in whole if n not in heads and isinstance(model.get_submodule(n), SWAPPABLE))]
