"""What a grid is: the set of numbers a runtime can represent, and the rule by which it gets its scales.

Training, calibration, every algorithm and every exporter use the same `Grid` object, so that the weight that was trained is
the weight that is deployed. A grid has three operations and one promise:

    choose(w)          -> params       how the scales (and zero points, mins, ...) follow from the values
    encode(w, params)  -> codes        which integer each value gets
    decode(q)          -> values       what the runtime computes from codes and params, to the last bit

    fake(w) == decode(encode(w))       the fake-quant of training is this function, bit for bit, with a straight-through
                                       gradient (Bengio et al. 2013, arXiv 1308.3432)

Scales are rounded to the type in which the runtime stores them before any code is chosen, so decode never sees a scale that the
file cannot hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

Params = dict[str, "Tensor"]
"""Named parameter tensors that a grid defines: a scale; a scale and a zero point; 6-bit scales under a float16 super-scale."""


@dataclass
class QuantizedTensor:
    """A tensor on a grid: integer codes plus the grid's parameter tensors. Nothing else is needed to write it to a file."""

    grid: Grid
    codes: Tensor
    """int8 (int16 for 16-bit floats), in the shape of the tensor that was encoded."""
    params: Params = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def decode(self) -> Tensor:
        """The values that the runtime computes, float32, shape of ``codes``."""
        return self.grid.decode(self)

    def nbytes(self) -> int:
        """Size of codes and parameters when packed without padding, bytes."""
        params = sum(p.numel() * self.grid.param_bits(name) for name, p in self.params.items())
        return (self.codes.numel() * self.grid.code_bits + params + 7) // 8


class Grid(ABC):
    """Which numbers a runtime can represent. Subclasses are dataclasses whose fields are the options of the grid."""

    registered_name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    """Raised when the same options begin to mean other bits; checkpoints store it."""
    weights_only: ClassVar[bool] = False
    """Whether activations cannot be on it: its blocks run over the whole tensor, so that a value depends on the batch it is in."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits per code in a packed file."""

    @abstractmethod
    def param_bits(self, name: str) -> int:
        """Bits per element of parameter ``name`` in a packed file."""

    @property
    def searches(self) -> bool:
        """Whether `choose` is a costly search, which post-training quantizers do once, keeping the parameters."""
        return False

    @abstractmethod
    def choose(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Scales (and whatever else the grid has) for ``w``, already rounded to their stored type, as float32.

        Args:
            w: values.
            importance: mean squared activation of each input channel, float32, one per value of ``w``'s last dimension: what a grid that
                searches for its scales weights squared errors with. Grids with a rule in closed form ignore it.
        """

    @abstractmethod
    def encode(self, w: Tensor, params: Params | None = None) -> QuantizedTensor:
        """Codes for ``w``; with ``params`` given, on those scales.

        Raises:
            ValueError: if ``w`` is not finite, or its shape does not fit the grid.
        """

    @abstractmethod
    def decode(self, q: QuantizedTensor) -> Tensor:
        """What the runtime computes from codes and params, float32."""

    @abstractmethod
    def round_trip(self, w: Tensor, params: Params | None = None) -> tuple[Tensor, Tensor | None]:
        """decode(encode(w)) in one pass without storing codes, and the mask of values that were not clipped.

        Returns:
            values, float32, shape of ``w``; and a bool mask of the same shape, or None where nothing can be clipped.
        """

    @abstractmethod
    def check_shape(self, shape: tuple[int, ...]) -> str | None:
        """Why a tensor of this shape does not fit the grid, or None if it does."""

    def spans_rows(self, shape: tuple[int, ...]) -> bool:
        """Whether a row (an index of dim 0) of a tensor of this shape has parameters that depend on other rows."""
        return False

    def take(self, q: QuantizedTensor, rows: Tensor | slice) -> QuantizedTensor | None:
        """Rows of ``q`` as a tensor of their own that decodes to the same bits, or None where they cannot be taken out.

        Args:
            rows: indices of dim 0, int64 [R], or a slice.
        """
        if self.spans_rows(q.shape) or any(len(p) != len(q.codes) for p in q.params.values()):
            return None
        return QuantizedTensor(self, q.codes[rows], {name: p[rows] for name, p in q.params.items()})

    def check_dtype(self, dtype: torch.dtype) -> str | None:
        """Why values of this grid that are kept in ``dtype`` have other codes or scales when they are encoded again; None if they have the
        same, or the grid does not know."""
        return None

    def fake(self, w: Tensor, params: Params | None = None) -> Tensor:
        """Fake-quantize: forward is decode(encode(w)) to the bit; the gradient passes straight through where nothing was clipped."""
        from qtrain.grids.ste import straight_through

        with torch.no_grad():
            values, mask = self.round_trip(w, params)
        return straight_through(w, values, mask)

    def spec(self) -> dict[str, Any]:
        """Name, version and options, as json-ready values: what a checkpoint stores."""
        options = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {"grid": self.registered_name, "version": self.version, **options}

    @abstractmethod
    def describe(self) -> str:
        """One short name for tables: `int4 g32 absmax`."""


def from_spec(spec: dict[str, Any]) -> Grid:
    """Rebuild a grid from `Grid.spec()`.

    Raises:
        ValueError: if the grid is unknown or was stored by another version of its rule.
    """
    from qtrain import registry

    options = dict(spec)
    cls = registry.get("grid", options.pop("grid"))
    stored = options.pop("version")
    if stored != cls.version:  # type: ignore[attr-defined]
        raise ValueError(
            f"the checkpoint holds version {stored} of grid {cls.registered_name}; this qtrain has version {cls.version}. "  # type: ignore[attr-defined]
            "Load it with the qtrain version named in its checkpoint.json, or quantize again."
        )
    return cls(**options)


def require_finite(w: Tensor, what: str) -> None:
    """Raise if ``w`` holds NaN or infinities.

    Raises:
        ValueError: naming ``what``, the count and the first position.
    """
    finite = torch.isfinite(w)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    raise ValueError(
        f"{what} has {len(bad)} values that are not finite, the first at index {bad[0].tolist()}; a grid holds finite numbers only. "
        "Train with a lower learning rate (finetune.learning_rate=1e-5), or leave the module in float: keep_float=[NAME]"
    )
