"""The affine family: integers of 2 to 8 bits times a scale, with or without a zero point.

    code = clamp(round(w / scale) + zero_point, low, high)        value = (code - zero_point) * scale

round is half-to-even; w / scale is w * (1 / scale) in float32, as torchao computes it, unless the rule says otherwise. Codes are signed,
low = -2^(b-1) and high = 2^(b-1) - 1; a runtime with unsigned codes adds 2^(b-1) when it packs.

The rule, how a scale follows from the values it covers, is part of the grid (absmax = the largest |w|, b = bits):

    absmax         absmax / (2^(b-1) - 1)        never clips, leaves the lowest code unused
    absmax_half    absmax / (2^(b-1) - 0.5)      torchao's MappingType.SYMMETRIC; clips half a step at +absmax
    signed_absmax  w_max / -2^(b-1)              w_max is the signed value of largest |w|: it gets the lowest code; the scale may be
                                                 negative. The rule of ggml's Q4_0, all 2^b codes in use; clips half a step opposite
    minmax         (max - min) / (2^b - 1)       asymmetric, range widened to hold zero, zero point rounded; torchao's ASYMMETRIC
    mse            least squared error           symmetric: 27 shrinks of the signed_absmax range, the best one per group
    mse_minmax     least squared error           asymmetric: 27 shrinks of the minmax range
    absmax_mlas    absmax / 127, 8 bits          codes round(w * (127 / absmax)): MLAS's QuantizeARow_CompInt8, which onnxruntime's
                                                 MatMulNBits runs on activations at accuracy_level 4
    minmax_onnx    as minmax                     codes round(w / scale), divided: ONNX's QuantizeLinear and DynamicQuantizeLinear,
    absmax_onnx    as absmax                     which every QDQ runtime runs on activations (TensorRT has no zero points: absmax_onnx)

A scale is rounded to `scale_dtype` before codes are chosen, and is at least that type's smallest positive number (smallest *normal* one
for float32 and bfloat16), so all-zero and denormal groups decode to exact zeros and never divide by zero.

Shapes: R rows, G groups per row, S values per group. A tensor becomes x_RGS: `tensor` is (1, 1, all), `channel` is (dim 0, 1, rest),
`token` is (all but the last dim, 1, last dim), `group` is (all but the last dim, last dim / group_size, group_size).
Remainder rule for a row that group_size does not divide: `error` refuses it, `short` makes the last group shorter.

Unlike torchao this never pads silently, keeps sub-byte codes in int8 in memory, and works through a weight in pieces that fit in the
L2 cache: 10 M weights take about 7 ms on two cores, where one fused pass over all of them takes 33 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtrain.grids.base import Grid, Params, QuantizedTensor, require_finite
from qtrain.lazy import lazy_import
from qtrain.registry import register

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

SYMMETRIC_RULES = ("absmax", "absmax_half", "signed_absmax", "mse", "absmax_mlas", "absmax_onnx")
ASYMMETRIC_RULES = ("minmax", "mse_minmax", "minmax_onnx")
DIVIDES = ("minmax_onnx", "absmax_onnx")
"""Rules whose codes are round(w / scale) with a division, not a product with 1 / scale: the two differ by one where they meet a half."""
GRANULARITIES = ("tensor", "channel", "token", "group")
SCALE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
NEVER_CLIPS = ("absmax", "absmax_mlas", "absmax_onnx")
CLIPS_ABOVE_ONLY = ("absmax_half", "signed_absmax")
"""w / scale stays above low - 0.5 even after the scale was rounded to bfloat16, so one comparison makes the mask."""

_PIECE = 1 << 19
"""Values per piece: 2 MiB of float32, so that the handful of passes over it stay in the L2 cache."""
_ELSEWHERE = " (or under quantizer.embedding or quantizer.activation, whichever it is)"
_SHRINKS = [1.0 - 0.025 * i for i in range(27)]


@register("grid", "affine")
@dataclass
class Affine(Grid):
    """Integers of 2 to 8 bits times a scale, per tensor, channel, token or group."""

    bits: int = 4
    """Bits per code, 2 to 8."""
    rule: str = "absmax"
    """How scales follow from values: absmax, absmax_half, signed_absmax, minmax, mse, mse_minmax, absmax_mlas, minmax_onnx, absmax_onnx."""
    granularity: str = "group"
    """Which values share a scale: tensor, channel (dim 0), token (all but the last dim), group (of group_size along the last dim)."""
    group_size: int = 32
    """Values per group when granularity=group."""
    remainder: str = "error"
    """What to do with a row that group_size does not divide: error, or short (a shorter last group)."""
    scale_dtype: str = "float32"
    """Type in which the file stores scales: float32, float16, bfloat16."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; the affine grid has 2 to 8 bits. Set quantizer.weight.bits=4, say{_ELSEWHERE}.")
        _one_of("rule", self.rule, SYMMETRIC_RULES + ASYMMETRIC_RULES)
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("remainder", self.remainder, ("error", "short"))
        _one_of("scale_dtype", self.scale_dtype, tuple(SCALE_BITS))
        if self.granularity == "group" and self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size}; a group has at least 2 values. Set quantizer.weight.group_size=32, say{_ELSEWHERE}."
            )
        if self.rule == "absmax_mlas" and (self.bits != 8 or self.scale_dtype != "float32"):
            raise ValueError(
                f"rule=absmax_mlas has 8 bits and float32 scales, given bits={self.bits} scale_dtype={self.scale_dtype}; "
                "set bits=8 scale_dtype=float32, or another rule"
            )

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def symmetric(self) -> bool:
        """Whether zero has code 0 and there is no zero point."""
        return self.rule in SYMMETRIC_RULES

    @property
    def code_bits(self) -> int:
        return self.bits

    def param_bits(self, name: str) -> int:
        return SCALE_BITS[self.scale_dtype] if name == "scale" else self.bits

    def describe(self) -> str:
        where = f"g{self.group_size}" if self.granularity == "group" else f"per-{self.granularity}"
        stored = "" if self.scale_dtype == "float32" else f" {self.scale_dtype}"
        return f"int{self.bits} {where} {self.rule}{stored}"

    def check_shape(self, shape: tuple[int, ...]) -> str | None:
        if self.granularity == "group" and self.remainder == "error" and shape[-1] % self.group_size:
            divisors = [s for s in (16, 32, 64, 128, 256) if shape[-1] % s == 0]
            return (
                f"group_size {self.group_size} does not divide its rows of {shape[-1]} values; "
                f"set group_size to one that does ({', '.join(map(str, divisors)) or 'a divisor of ' + str(shape[-1])}), "
                "remainder=short, or granularity=channel"
            )
        return None

    def spans_rows(self, shape: tuple[int, ...]) -> bool:
        return self.granularity == "tensor"

    def choose(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Scales, and zero points for asymmetric rules; float32 and int8, shape [R, G]. ``importance`` is ignored: values count alike."""
        self._refuse_shape(tuple(w.shape))
        scale, _, zero = self._choose(self._view(w.detach()))
        return self._as_params(scale, zero)

    def encode(self, w: Tensor, params: Params | None = None) -> QuantizedTensor:
        """Codes int8 in the shape of ``w``; params scale float32 [R, G] and zero_point int8 [R, G] for asymmetric rules.

        Raises:
            ValueError: if ``w`` is not finite, the group size does not fit, or a scale overflows its stored type.
        """
        self._refuse_shape(tuple(w.shape))
        require_finite(w, "the tensor to quantize")
        x = self._view(w.detach())
        codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        scales, zeros = [], []
        for rows, scale, inverse, zero in self._pieces(x, params):
            codes[rows] = self._round(x[rows], inverse, zero).clamp_(self.low, self.high).to(torch.int8)
            scales.append(scale)
            zeros.append(zero)
        scale = torch.cat(scales)
        if not bool(torch.isfinite(scale).all()):
            wider = {"float16": "set scale_dtype=float32 or bfloat16", "bfloat16": "set scale_dtype=float32"}
            remedy = wider.get(self.scale_dtype, "leave the module in float: keep_float=[NAME]")
            raise ValueError(f"a scale overflows {self.scale_dtype}; {remedy}")
        zero_point = None if zeros[0] is None else torch.cat([z for z in zeros if z is not None])
        return QuantizedTensor(self, self._unview(codes, tuple(w.shape)).contiguous(), self._as_params(scale, zero_point))

    def decode(self, q: QuantizedTensor) -> Tensor:
        """(code - zero_point) * scale in float32."""
        x = self._view(q.codes)  # float32 copy
        if "zero_point" in q.params:
            x = x - q.params["zero_point"].float().unsqueeze(-1)
        return self._unview(x * q.params["scale"].unsqueeze(-1), q.shape)

    def round_trip(self, w: Tensor, params: Params | None = None) -> tuple[Tensor, Tensor | None]:
        """decode(encode(w)), piece by piece; see `Grid.round_trip`."""
        self._refuse_shape(tuple(w.shape))
        x = self._view(w)
        out = torch.empty_like(x)
        never = params is None and self.rule in NEVER_CLIPS and self.scale_dtype != "float16"  # float16's denormals round by a half
        mask = None if never else torch.empty(x.shape, dtype=torch.bool, device=x.device)
        for rows, scale, inverse, zero in self._pieces(x, params):
            v = self._round(x[rows], inverse, zero, out=out[rows])
            if mask is not None:
                torch.le(v, self.high, out=mask[rows])
                if params is not None or self.rule not in CLIPS_ABOVE_ONLY or self.scale_dtype == "float16":
                    mask[rows].logical_and_(v >= self.low)
            v.clamp_(self.low, self.high)
            if zero is None:
                v.add_(0.0)  # codes have no -0.0, so neither may this
            else:
                v.sub_(zero)
            v.mul_(scale)
        shape = tuple(w.shape)
        return self._unview(out, shape).to(w.dtype), None if mask is None else self._unview(mask, shape)

    def groups(self, w: Tensor) -> Tensor:
        """``w`` cut into the groups that share a scale: float32 [R, G, S], zero-padded where the last group is short; differentiable."""
        return self._view(w)

    def ungroup(self, x_RGS: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo `groups`."""
        return self._unview(x_RGS, shape)

    def store(self, scale: Tensor) -> Tensor:
        """Round a scale to its stored type and keep it away from zero; float32 in, float32 out."""
        if self.scale_dtype != "float32":
            scale = scale.to(getattr(torch, self.scale_dtype)).float()
        least = (
            torch.finfo(torch.float16).smallest_normal / 1024
            if self.scale_dtype == "float16"
            else torch.finfo(torch.float32).smallest_normal
        )
        if self.rule in ("signed_absmax", "mse"):  # these scales have a sign
            return torch.where(scale.abs() < least, torch.full_like(scale, least), scale)
        return scale.clamp_min(least)

    # -- internals ---------------------------------------------------------------------------------------------------

    def _pieces(self, x: Tensor, params: Params | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Row slices of about `_PIECE` values with their scale, what `_round` takes (see `_inverse`) and zero point, each [r, G, 1]."""
        step = max(1, _PIECE // max(1, x[0].numel())) if len(x) else 1
        for start in range(0, max(len(x), 1), step):
            rows = slice(start, start + step)
            if params is None:
                scale, inverse, zero = self._choose(x[rows])
            else:
                scale = params["scale"][rows].unsqueeze(-1)
                inverse = self._inverse(scale)
                zero = params["zero_point"][rows].unsqueeze(-1).float() if "zero_point" in params else None
            yield rows, scale, inverse, zero

    def _round(self, x: Tensor, inverse: Tensor, zero: Tensor | None, out: Tensor | None = None) -> Tensor:
        v = (torch.div if self.rule in DIVIDES else torch.mul)(x, inverse, out=out).round_()
        return v if zero is None else v.add_(zero)

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scale, inverse of the scale and zero point (None if symmetric), float32 [R, G, 1]."""
        if not x.numel():
            empty = x.new_ones((*x.shape[:2], 1))
            return empty, empty, None if self.symmetric else torch.zeros_like(empty)
        if not self.symmetric:
            return self._choose_asymmetric(x)
        if self.rule == "mse":
            scale = self._search_symmetric(x)
            return scale, 1.0 / scale, None
        if self.rule == "signed_absmax":
            scale = self.store(_divide(_signed_absmax(x), self.low))
            return scale, 1.0 / scale, None
        absmax = x.abs().amax(-1, keepdim=True)
        scale = self.store(_divide(absmax, self.high + 0.5 if self.rule == "absmax_half" else self.high))
        if self.rule == "absmax_mlas":
            inverse = absmax.new_full((), self.high) / absmax  # `127 / tensor` would be tensor.reciprocal() * 127
            return scale, torch.where(torch.isfinite(inverse), inverse, 0.0), None  # zero rows, and absmax < 3.7e-37
        return scale, self._inverse(scale), None

    def _choose_asymmetric(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lowest = x.amin(-1, keepdim=True).clamp_max_(0.0)
        highest = x.amax(-1, keepdim=True).clamp_min_(0.0)
        if self.rule != "mse_minmax":
            scale = self.store(_divide(highest - lowest, self.high - self.low))
            return scale, self._inverse(scale), self._zero_point(lowest, scale)

        def candidate(shrink: float) -> tuple[Tensor, Tensor]:
            scale = self.store(_divide((highest - lowest) * shrink, self.high - self.low))
            return scale, self._zero_point(lowest * shrink, scale)

        scale, zero = self._least_error(x, candidate)
        assert zero is not None
        return scale, 1.0 / scale, zero

    def _inverse(self, scale: Tensor) -> Tensor:
        """What `_round` multiplies by, or divides by."""
        return scale if self.rule in DIVIDES else 1.0 / scale

    def _zero_point(self, lowest: Tensor, scale: Tensor) -> Tensor:
        return (self.low - (lowest / scale).round_()).clamp_(self.low, self.high)

    def _search_symmetric(self, x: Tensor) -> Tensor:
        peak = _divide(_signed_absmax(x), self.low)
        scale, _ = self._least_error(x, lambda shrink: (self.store(peak * shrink), None))
        return scale

    def _least_error(self, x: Tensor, candidate) -> tuple[Tensor, Tensor | None]:  # type: ignore[no-untyped-def]
        """The candidate (scale, zero point) of least squared error, group by group."""
        best_scale, best_zero, best_error = None, None, None
        for shrink in _SHRINKS:
            scale, zero = candidate(shrink)
            v = self._round(x, 1.0 / scale, zero).clamp_(self.low, self.high)
            v = (v if zero is None else v.sub_(zero)).mul_(scale).sub_(x)
            error = v.square_().sum(-1, keepdim=True)
            if best_scale is None or best_error is None:
                best_scale, best_zero, best_error = scale, zero, error
                continue
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_zero = None if zero is None or best_zero is None else torch.where(better, zero, best_zero)
            best_error = torch.where(better, error, best_error)
        assert best_scale is not None
        return best_scale, best_zero

    def _as_params(self, scale: Tensor, zero: Tensor | None) -> Params:
        params = {"scale": scale.squeeze(-1)}
        if zero is not None:
            params["zero_point"] = zero.squeeze(-1).to(torch.int8)
        return params

    def _refuse_shape(self, shape: tuple[int, ...]) -> None:
        why = self.check_shape(shape) if shape else None
        if why:
            raise ValueError(f"a tensor of shape {list(shape)} does not fit the grid: {why}")

    def _rows(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """R, the values per row, and S."""
        count = 1
        for n in shape:
            count *= n
        if self.granularity == "tensor" or not shape:
            return 1, count, count
        per_row = count // max(shape[0], 1) if self.granularity == "channel" else shape[-1]
        rows = shape[0] if self.granularity == "channel" else count // max(shape[-1], 1)
        return rows, per_row, min(self.group_size, per_row) if self.granularity == "group" else per_row

    def _view(self, w: Tensor) -> Tensor:
        rows, per_row, size = self._rows(tuple(w.shape))
        x = w.float().reshape(rows, per_row)
        if size and per_row % size:  # only with remainder=short: zeros change neither absmax, nor min/max with zero, nor errors
            x = torch.nn.functional.pad(x, (0, size - per_row % size))
        return x.reshape(rows, x.shape[1] // size, size) if size else x.reshape(rows, 0, 1)

    def _unview(self, x_RGS: Tensor, shape: tuple[int, ...]) -> Tensor:
        rows, per_row, _ = self._rows(shape)
        return x_RGS.reshape(rows, x_RGS.shape[1] * x_RGS.shape[2])[:, :per_row].reshape(shape)


@register("grid", "int8")
@dataclass
class Int8(Affine):
    """Preset: INT8, one scale per output channel, symmetric: what every INT8 runtime has for weights."""

    bits: int = 8
    granularity: str = "channel"


@register("grid", "int8_activation")
@dataclass
class Int8Activation(Affine):
    """Preset: INT8, one scale and zero point per tensor, rounded as ONNX's QuantizeLinear rounds: for activations."""

    bits: int = 8
    rule: str = "minmax_onnx"
    granularity: str = "tensor"


def _divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once: on CUDA, torch divides by a Python number as x * (1 / by)."""
    return x / x.new_full((), by)


def _signed_absmax(x: Tensor) -> Tensor:
    """The value of largest magnitude with its sign, [R, G, 1]; of two equal magnitudes the negative one."""
    highest = x.amax(-1, keepdim=True)
    lowest = x.amin(-1, keepdim=True)
    return torch.where(highest > -lowest, highest, lowest)


def _one_of(field: str, given: str, valid: tuple[str, ...]) -> None:
    if given not in valid:
        raise ValueError(f"{field} is {given!r}; valid: {', '.join(valid)}. Set quantizer.weight.{field}={valid[0]}, say{_ELSEWHERE}.")
