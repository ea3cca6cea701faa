"""FrozenBase: the common part of the quantizers whose layers are another library's, for adapters to train beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.lazy import lazy_import
from qtrain.quantizer import Quantizer
from qtrain.targets import select

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy_import("torch")


@dataclass
class FrozenBase(Quantizer):
    """What quantizers share whose layers are another library's: nothing trains, nothing is calibrated, adapters go beside them."""

    exact: ClassVar[bool] = False
    """Their products may be summed in another order than ours."""

    include: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of modules to quantize; embeddings and convolutions stay in float."""
    keep_float: Any = field(default_factory=list)
    """Patterns of modules to leave in float, besides those of the model family."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_automatic("layers of another library", instead="rtn")

    def swap(self, model: nn.Module, linear: dict[str, Any]) -> None:
        """Put the library's layers in place of ``linear``, in place."""
        raise NotImplementedError

    def weight_grids(self, model: nn.Module, keep_float: list[str]) -> dict[str, Any]:
        """See `Quantizer.weight_grids`."""
        return dict.fromkeys(self.chosen(model, keep_float)[0], self.weight)

    def chosen(self, model: nn.Module, keep_float: list[str]) -> tuple[dict[str, Any], list[str]]:
        """The Linear layers to quantize, and the names of the modules that stay in float."""
        chosen, kept = select(model, self.include, [*self.keep_float, *keep_float])
        linear: dict[str, Any] = {name: module for name, module in chosen.items() if type(module) is torch.nn.Linear}
        if not linear:
            raise ValueError(
                f"quantizer.include={self.include} names no Linear layer of {type(model).__name__}, and quantizer={self.registered_name} "
                "has no other. Set quantizer.include=['*']"
            )
        return linear, sorted([*kept, *(name for name in chosen if name not in linear)])

    def prepare(self, model: nn.Module, keep_float: list[str], example: dict[str, Any] | None = None) -> tuple[nn.Module, list[str]]:
        """Put the library's layers in place of the Linear ones, in place; see `Quantizer.prepare`.

        Raises:
            ValueError: if a pattern matches nothing, a weight is not finite, or the library is not installed.
        """
        linear, kept = self.chosen(model, keep_float)
        self.swap(model, linear)
        return model, kept

    def trial(self, model: nn.Module, keep_float: list[str], example: dict[str, Any] | None = None) -> nn.Module:
        """See `Quantizer.trial`; layers of ours on the same grid stand for the library's."""
        from qtrain.prepare import convert, one_row, prepare

        linear, _ = self.chosen(model, keep_float)
        prepare(model, linear, self.weight)
        return convert(one_row(model))

    def convert(self, model: nn.Module) -> nn.Module:
        """Layers of ours with the codes of the library's, in place."""
        from qtrain.foreign import convert

        return convert(model)
