"""Which modules are quantized: include patterns, keep_float patterns, and no silence.

Patterns are shell globs over module names as `model.named_modules()` gives them (`*.attention.*`, `bert.pooler.dense`).
A pattern that matches no module is an error (law 4), since it is a typing mistake or the wrong model.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy_import("torch")


@dataclass
class Scheme:
    """Which modules go on which grids, and how they get there: the common part of every quantizer."""

    trains: ClassVar[bool] = False
    """Whether the run trains the prepared model; such a quantizer has a `fit: qtrain.fit.Fit` option."""

    defaults: list[Any] = field(
        default_factory=lambda: ["_self_", {"/grid@weight": "affine"}, {"/grid@embedding": None}, {"/grid@activation": None}]
    )
    weight: Any = None
    """Grid of Linear weights (`grid@quantizer.weight=NAME`; its options follow: quantizer.weight.bits=3)."""
    embedding: Any = None
    """Grid of Embedding weights; null leaves embeddings in float."""
    activation: Any = None
    """Grid of the inputs of Linear layers; null (the default) leaves them in float."""
    activation_range: str = "dynamic"
    """dynamic (scale from each input) or static (range tracked in training, then fixed)."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of modules to quantize."""
    keep_float: list[str] = field(default_factory=list)
    """Patterns of modules to leave in float, besides those that the model family keeps."""

    def __post_init__(self) -> None:
        if self.activation_range not in ("dynamic", "static"):
            raise ValueError(f"quantizer.activation_range is {self.activation_range!r}; valid: dynamic, static")
        if self.activation is None and self.activation_range == "static":
            raise ValueError(
                "quantizer.activation_range=static has no activation grid to fix; choose one: grid@quantizer.activation=affine "
                "quantizer.activation.bits=8 quantizer.activation.granularity=tensor, or set quantizer.activation_range=dynamic"
            )
        granularity = getattr(self.activation, "granularity", "tensor")
        if self.activation is not None and self.activation_range == "static" and granularity != "tensor":
            raise ValueError(
                f"a static activation range has one scale per tensor, given quantizer.activation.granularity={granularity}; "
                "set quantizer.activation.granularity=tensor or quantizer.activation_range=dynamic"
            )

    def prepare(self, model: nn.Module, keep_float: list[str]) -> list[str]:
        """Fake-quantize ``model`` in place.

        Args:
            keep_float: patterns of modules that the model's family keeps in float.

        Returns:
            Names of the Linear and Embedding modules left in float.

        Raises:
            ValueError: if a pattern matches nothing, or a module does not fit its grid.
        """
        from qtrain.layers import prepare

        chosen, kept = select(model, self.include, [*self.keep_float, *keep_float])
        swapped = prepare(model, chosen, self.weight, self.embedding, self.activation, self.activation_range == "static")
        return sorted([*kept, *(name for name in chosen if name not in swapped)])

    def convert(self, model: nn.Module) -> nn.Module:
        """Integer codes instead of fake-quant, in place; changes no bit of any output."""
        from qtrain.layers import convert

        return convert(model)

    def callbacks(self) -> list[Any]:
        """Lightning callbacks for the stage that trains the prepared model."""
        return []


def select(model: nn.Module, include: list[str], keep_float: list[str]) -> tuple[dict[str, nn.Module], list[str]]:
    """The Linear and Embedding modules to quantize, by name, and the names of those kept in float.

    Raises:
        ValueError: if a pattern matches no Linear or Embedding, or nothing is left to quantize.
    """
    candidates: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))}
    for key, patterns in (("include", include), ("keep_float", keep_float)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                close = difflib.get_close_matches(pattern, list(candidates), n=3, cutoff=0.3) or list(candidates)[:3]
                raise ValueError(
                    f"quantizer.{key} pattern {pattern!r} matches none of the {len(candidates)} Linear and Embedding modules; "
                    f"the nearest are {', '.join(close)}. Set quantizer.{key}=['{close[0] if close else '*'}'], say."
                )
    kept = [n for n in candidates if _matches(n, keep_float)]
    chosen = {n: m for n, m in candidates.items() if _matches(n, include) and n not in kept}
    if not chosen:
        raise ValueError(f"include={include} without keep_float={keep_float} leaves nothing to quantize. Set quantizer.keep_float=[]")
    return chosen, [n for n in candidates if n not in chosen]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)
