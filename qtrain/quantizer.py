"""What a run asks of every quantizer, and the answers of one that has nothing special to say.

Three families derive from it: `qtrain.scheme.Scheme` (layers of ours), `qtrain.pt2e.GraphScheme` (torch's graph flows) and
`qtrain.frozen.FrozenBase` (layers of other libraries, for adapters to train beside). Options that a family has are fields of its
dataclass; here stand what the options are where it has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qtrain.targets import select

if TYPE_CHECKING:
    from torch import nn


class Quantizer:
    """Chooses grid values for the weights of a model: `transform`, `prepare`, `calibrate`, `convert`, in this order."""

    exact: bool = True
    """Whether `convert` changes no bit of any output; where torch or another library rounds or sums anew, the run reports by how much."""
    trains: bool = False
    """Whether the run trains the prepared model; such a quantizer has a `fit: qtrain.fit.Fit` option."""
    loads: bool = False
    """Whether transformers can put weights into its layers as it reads them (`settings`, `settle`), for baseline=false."""
    registered_name: str = ""

    weight: Any = None
    embedding: Any = None
    activation: Any = None
    smoothquant: float | None = None
    equalize: bool = False
    bias_correction: bool = False
    imatrix: Any = False
    include: list[str]
    keep_float: Any

    def __post_init__(self) -> None:
        self.fallbacks: list[dict[str, str]] = []
        """What could not be done as asked: [{"name", "why"}]."""
        self.details: dict[str, Any] = {}
        """What was done to the model, for run.json."""
        self.importance: dict[str, Any] = {}
        """Module name -> `qtrain.importance.Importance`, where `imatrix` measured it."""
        given = [self.keep_float] if isinstance(self.keep_float, str) else list(self.keep_float)
        self.keep_float = [pattern for pattern in given if not pattern.startswith("auto:")]
        self.automatic = _automatic(given)
        """How many of the most harmful layers are to stay in float."""
        if self.smoothquant is not None and not 0 <= self.smoothquant <= 1:
            raise ValueError(f"quantizer.smoothquant is {self.smoothquant}; it is from 0 to 1. Set quantizer.smoothquant=0.5, or null.")

    def refuse_automatic(self, why: str, instead: str) -> None:
        """Raise for keep_float=auto:N, which tries layers one by one.

        Raises:
            ValueError: saying ``why`` this quantizer cannot, and which finds the names ``instead``.
        """
        if self.automatic:
            raise ValueError(
                f"quantizer.keep_float has auto:{self.automatic}; {why} cannot be tried one by one, as auto:N does. Find the names with "
                f"quantizer={instead} quantizer.keep_float=auto:N, and list them here"
            )

    @property
    def static(self) -> bool:
        """Whether activations have static ranges."""
        return False

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is read."""
        return self.static or self.bias_correction or self.smoothquant is not None or self.imatrix is True

    @property
    def moves_weights(self) -> bool:
        """Whether float weights change, so that the float model has to be kept apart."""
        return self.trains or self.smoothquant is not None or self.equalize or self.bias_correction

    def transform(self, model: nn.Module, calibration: list[dict[str, Any]], keep_float: list[str]) -> nn.Module:
        """What is to happen to the float model first: smoothing, equalization. The result computes what ``model`` computed.

        Args:
            calibration: keyword inputs of ``model``.
        """
        if self.smoothquant is not None:
            from qtrain.smoothing import smooth

            chosen, _ = select(model, self.include, [*self.keep_float, *keep_float])
            rows = smooth(model, chosen, calibration, self.smoothquant, self.weight, self.activation)
            self.details["smoothing"] = rows
            if all("skipped" in row for row in rows):
                why = f"each of the {len(rows)} groups of Linear layers would have been rounded worse; see smoothing in run.json"
                self.fallbacks.append({"name": f"smoothquant={self.smoothquant}", "why": why})
        if self.equalize:
            from qtrain.equalization import equalize

            model = equalize(model)
        return model

    def weight_grids(self, model: nn.Module, keep_float: list[str]) -> dict[str, Any]:
        """The grid that each module's weight is going to be on, by name; see `prepare` for the arguments and errors."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, keep_float: list[str], example: dict[str, Any] | None = None) -> tuple[nn.Module, list[str]]:
        """Put ``model`` on the grid, so that it computes with what `convert` will hold.

        Args:
            keep_float: patterns of modules that the model's family keeps in float.
            example: keyword inputs, for methods that trace with them.

        Returns:
            The prepared model, and the names of the Linear, Embedding and convolution modules left in float.

        Raises:
            ValueError: if a pattern matches nothing, or a module does not fit its grid.
        """
        raise NotImplementedError

    def calibrate(self, model: nn.Module, batches: Iterable[dict[str, Any]]) -> nn.Module:
        """Find what has to be measured on data; nothing, where there is nothing.

        Args:
            batches: keyword inputs of ``model``.
        """
        return model

    def convert(self, model: nn.Module) -> nn.Module:
        """Layers that hold integer codes."""
        raise NotImplementedError

    def trial(self, model: nn.Module, keep_float: list[str], example: dict[str, Any] | None = None) -> nn.Module:
        """``model`` converted with one row of each weight, in place, to see in a moment what would fail; see `prepare`."""
        from qtrain.prepare import one_row

        prepared, _ = self.prepare(model, keep_float, example)
        return self.convert(one_row(prepared))

    def callbacks(self) -> list[Any]:
        """Lightning callbacks for the stage that trains the prepared model."""
        return []


def _automatic(patterns: list[str]) -> int:
    """N of the pattern `auto:N`, or 0.

    Raises:
        ValueError: if N is no positive integer.
    """
    for pattern in patterns:
        if pattern.startswith("auto:"):
            count = pattern.removeprefix("auto:")
            if not count.isdigit() or int(count) < 1:
                raise ValueError(
                    f"quantizer.keep_float has {pattern!r}; N of auto:N is a positive integer. Set quantizer.keep_float=auto:3, say."
                )
            return int(count)
    return 0
