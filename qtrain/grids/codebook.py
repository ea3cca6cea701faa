"""Codebooks: a code is an index into a short list of values, scaled by the largest magnitude of its block.

    absmax_b = max |w| over block b                    float32; or 8 bits, by double quantization (`double_quant.py`)
    code     = nearest of the codebook to w / absmax_b
    value    = codebook[code] * absmax_b               float32, one rounding

    nf4     16 values, quantiles of a normal distribution (QLoRA: Dettmers et al. 2023, arXiv 2305.14314): bitsandbytes' constants
    fp4     16 values of a sign, two bits of exponent and one of mantissa: bitsandbytes' FP4, not OCP's E2M1, whose 0.5 is 0.0625 here
    nf3 nf2 8 and 4 values by QLoRA's construction; qtrain's own, no other runtime has them (LoftQ at 2 and 3 bits)

**Normal float of k bits** (QLoRA's section 3, equation 4). With d = (1 / 2^(k+1) + 1 / (2^(k+1) - 2)) / 2 and the quantile function Q of
the normal distribution: 2^(k-1) values Q(p), p in equal steps from 1 - d down towards 1/2; an exact zero; 2^(k-1) - 1 values -Q(p), p
likewise; all divided by Q(1 - d). One more value is positive than negative, so nf2 is -1, 0, 0.436, 1. LoftQ's own code keeps k = 4's d for
every k (-1, 0, 0.338, 1); on normal weights in blocks of 64 that has 0.5 % less squared error at 2 bits and 4 % more at 3.

**Blocks run over the flattened tensor**, as bitsandbytes' do: they cross rows where a row is no multiple of the block size, and the last
one may be short. No shape is refused. A row's scales may belong to its neighbours too (`spans_rows`).

**To the bit, bitsandbytes 0.50 on the CPU** (`quantize_4bit`, `dequantize_4bit`), for float32, float16 and bfloat16 weights, which are all
rounded as float32. Its rule, with its corners:

    w / absmax is w * (1 / absmax), each rounded, absmax at least 1e-38; in a short last block a division, and absmax stored so
    thresholds are the float32 midpoints of neighbours in ascending order; a value that meets one gets the lower of the two
    FP4 has two zeros: code 8 for what is above zero, code 0 for zero and below; both decode to +0
    a code that pads the last byte is that of zero (NF4: 7)

Its CUDA kernels have NF4's thresholds too, but differ, by their source: FP4's are decimals up to 4e-7 off, an FP4 tie goes to the smaller
magnitude, FP4's code 8 is below zero and decodes to -0, short blocks are multiplied, and a block of zeros has code 0, which is -1 in NF4.
Codes from there decode here to the same floats (but for the sign of FP4's zero); nothing that has codes is ever rounded again. A weight
of another dtype decodes to it by one more rounding: decode(q).to(dtype), as `dequantize_4bit` does for quant_state.dtype.

bitsandbytes' CPU decoder is wrong where the processor has AVX-512 and a row is a multiple of 16 but not of the block size: it takes
floor(row / block_size) scales per row. What is here is its decoder of every other processor, and of CUDA. (And where the processor has
AVX512-BF16, it makes zeros of bfloat16's denormals, below 1.2e-38.)

Defaults are those of bitsandbytes' layers, Linear4bit and Params4bit, and of the QLoRA paper: blocks of 64, double quantization. (Its
function quantize_4bit and transformers' BitsAndBytesConfig leave the latter off.) It costs 4.127 bits per weight instead of 4.5.

How: a value's bucket among 4,097 holds one threshold at most, so a code takes one comparison and two look-ups, whatever the codebook.

Shapes: n values, B = ceil(n / S) blocks of S. Parameters: absmax float32 [B]; with double quantization absmax uint8 [B], nested_absmax
float32 [ceil(B / 256)], nested_offset float32 [].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, gcd, prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from qtrain.grids import double_quant
from qtrain.grids.base import Grid, Params, QuantizedTensor, require_finite
from qtrain.lazy import lazy_import
from qtrain.registry import register

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Those that bitsandbytes has."""

_LEAST = 1e-38
"""What bitsandbytes divides by at least."""
_STEPS = 2048
"""Buckets per unit of w / absmax."""
_PIECE = 1 << 17
"""Values per piece, so that the passes over it stay in the cache."""


class Tables(NamedTuple):
    """What codes are looked up in. A bucket k has slots 2k and 2k + 1, below and above its threshold."""

    threshold: Tensor
    """float32 [buckets]; infinite where a bucket has none."""
    codes: Tensor
    """int8, by slot."""
    values: Tensor
    """float32, by slot."""
    by_code: Tensor
    """float32, by code."""


@dataclass
class Codebook(Grid):
    """Indices into a list of values, in blocks that share a scale."""

    codebook: ClassVar[tuple[float, ...]] = (0.0,)
    """The values by code, float32 numbers; the largest magnitude is 1."""
    weights_only: ClassVar[bool] = True

    block_size: int = 64
    """Values that share a scale, counted over the flattened weight: 32, 64, 128, 256, 512, 1024, 2048 or 4096."""
    double_quant: bool = True
    """Keep the scales in 8 bits (QLoRA's double quantization) instead of float32."""

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"block_size is {self.block_size}; valid: {', '.join(map(str, BLOCK_SIZES))}. Set quantizer.weight.block_size=64, say "
                "(or under quantizer.embedding, whichever it is)."
            )

    @property
    def code_bits(self) -> int:
        return (len(self.codebook) - 1).bit_length()

    def param_bits(self, name: str) -> int:
        return double_quant.BITS[name] if self.double_quant else 32

    def describe(self) -> str:
        return f"{self.registered_name} b{self.block_size}{' double-quantized' if self.double_quant else ''}"

    def check_shape(self, shape: tuple[int, ...]) -> str | None:
        return None

    def check_dtype(self, dtype: torch.dtype) -> str | None:
        """A block's largest magnitude decodes to absmax (above 1e-38), so float32 values give both back; but not the mean of absmax."""
        if self.double_quant:
            return f"the scales of {self.registered_name} are in 8 bits around their mean, which decoded values do not show: keep the codes"
        if dtype != torch.float32:
            return f"{str(dtype).removeprefix('torch.')} does not hold the float32 scales of {self.registered_name}: save float32"
        return None

    def spans_rows(self, shape: tuple[int, ...]) -> bool:
        """Whether a row cannot be encoded by itself: a block crosses rows, or all scales share a mean."""
        return self.double_quant or prod(shape[1:]) % self.block_size != 0

    def choose(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """The stored scales of ``w``, by shape and dtype those of the module's docstring. ``importance`` is ignored."""
        return self._store(self._absmax(w.detach().reshape(-1)))

    def encode(self, w: Tensor, params: Params | None = None) -> QuantizedTensor:
        """Codes int8, 0 to 2^bits - 1, in the shape of ``w``.

        Without ``params`` codes come from absmax before it is stored in 8 bits, as bitsandbytes has it; with them, from the stored scales.

        Raises:
            ValueError: if ``w`` is not finite, or the mean of its scales overflows.
        """
        flat = w.detach().reshape(-1)
        absmax = self._absmax(flat)
        if not bool(absmax.isfinite().all()):
            require_finite(w, "the tensor to quantize")
        stored = self._store(absmax) if params is None else params
        if self.double_quant and not bool(stored["nested_offset"].isfinite()):
            raise ValueError(
                "the mean of the scales overflows float32, so that they cannot be double-quantized: set quantizer.weight.double_quant=false"
            )
        scale = absmax if params is None else self.scales(params)
        codes = torch.empty(flat.shape, dtype=torch.int8, device=flat.device)
        tables = self.tables(flat.device)
        for values, blocks in self._pieces(len(flat)):
            x = _normalized(flat[values], scale[blocks], self.block_size)
            codes[values] = tables.codes.index_select(0, _slots(x, tables))
        return QuantizedTensor(self, codes.reshape(w.shape), stored)

    def decode(self, q: QuantizedTensor) -> Tensor:
        """codebook[code] * absmax, float32."""
        codes, scale, by_code = q.codes.reshape(-1), self.scales(q.params), self.tables(q.codes.device).by_code
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for values, blocks in self._pieces(len(codes)):
            out[values] = _scaled(by_code.index_select(0, codes[values].int()), scale[blocks])
        return out.reshape(q.shape)

    def round_trip(self, w: Tensor, params: Params | None = None) -> tuple[Tensor, Tensor | None]:
        """decode(encode(w)), piece by piece; see `Grid.round_trip`. The values have the dtype of ``w``.

        Its own absmax clips nothing; with ``params`` what is more than half a step beyond the first or last value is clipped.
        """
        flat = w.detach().reshape(-1)
        absmax = self._absmax(flat) if params is None else self.scales(params)
        stored = self.scales(self._store(absmax)) if params is None else absmax
        out, tables = torch.empty_like(flat), self.tables(flat.device)
        inside = None if params is None else torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
        for values, blocks in self._pieces(len(flat)):
            x = _normalized(flat[values], absmax[blocks], self.block_size)
            if inside is not None:
                inside[values] = self._inside(x)
            out[values] = _scaled(tables.values.index_select(0, _slots(x, tables)), stored[blocks])
        return out.reshape(w.shape), None if inside is None else inside.reshape(w.shape)

    def scales(self, params: Params) -> Tensor:
        """absmax of each block as the runtime computes it, float32 [B]."""
        return double_quant.expand(params) if self.double_quant else params["absmax"]

    def take(self, q: QuantizedTensor, rows: Tensor | slice) -> QuantizedTensor | None:
        """See `Grid.take`; the rows have float32 scales. None where a block crosses rows."""
        if q.codes.ndim < 2 or not len(q.codes) or q.codes[0].numel() % self.block_size:
            return None
        absmax = self.scales(q.params).reshape(len(q.codes), -1)[rows].reshape(-1)
        return QuantizedTensor(replace(self, double_quant=False), q.codes[rows], {"absmax": absmax})

    def pack(self, q: QuantizedTensor) -> Tensor:
        """The codes as bytes, uint8 [bytes, 1]: the first code in the highest bits, whole groups of 2 (4 bits), 8 (3) or 4 (2) codes.

        For nf4 and fp4 these are bitsandbytes' bytes, and the parameters are the parts of its quant state.
        """
        count, size, dtype = self._groups
        codes = torch.nn.functional.pad(q.codes.reshape(-1).to(dtype), (0, -q.codes.numel() % count), value=self.codebook.index(0.0))
        words = torch.zeros(len(codes) // count, dtype=dtype, device=codes.device)
        for code in codes.reshape(-1, count).unbind(-1):
            words = words << self.code_bits | code
        return torch.stack([words >> 8 * (size - 1 - i) & 255 for i in range(size)], -1).to(torch.uint8).reshape(-1, 1)

    def unpack(self, data: Tensor, shape: tuple[int, ...], params: Params) -> QuantizedTensor:
        """Undo `pack`.

        Args:
            data: uint8, in any shape.
            shape: of the tensor that was packed.
            params: its parameters.

        Raises:
            ValueError: if there are more or fewer bytes or scales than such a tensor has.
        """
        count, size, dtype = self._groups
        n = prod(shape)
        expected = {"bytes": ceil(n / count) * size, **{name: prod(s) for name, s in self._param_shapes(n).items()}}
        given = {"bytes": data.numel(), **{name: p.numel() for name, p in params.items()}}
        if data.dtype != torch.uint8 or given != expected:
            raise ValueError(
                f"a tensor of shape {list(shape)} on {self.describe()} has uint8 bytes and parameters of {expected} elements, "
                f"given {str(data.dtype).removeprefix('torch.')} and {given}"
            )
        words = torch.zeros(ceil(n / count), dtype=dtype, device=data.device)
        for byte in data.reshape(-1, size).unbind(-1):
            words = words << 8 | byte if size > 1 else byte
        low = (1 << self.code_bits) - 1
        codes = torch.stack([words >> self.code_bits * (count - 1 - i) & low for i in range(count)], -1)
        return QuantizedTensor(self, codes.to(torch.int8).reshape(-1)[:n].reshape(shape), params)

    def tables(self, device: torch.device) -> Tables:
        """What codes are looked up in, on ``device``."""
        return Tables(*(torch.from_numpy(a).to(device) for a in _arrays(self.codebook)))

    # -- internals ---------------------------------------------------------------------------------------------------

    @property
    def _groups(self) -> tuple[int, int, torch.dtype]:
        """Codes in the smallest whole number of bytes, that number, and a type that holds them."""
        count = 8 // gcd(8, self.code_bits)
        size = count * self.code_bits // 8
        return count, size, torch.uint8 if size == 1 else torch.int32

    def _param_shapes(self, n: int) -> dict[str, tuple[int, ...]]:
        blocks = ceil(n / self.block_size)
        nested = {"nested_absmax": (ceil(blocks / double_quant.NESTED_BLOCK),), "nested_offset": ()} if self.double_quant else {}
        return {"absmax": (blocks,), **nested}

    def _store(self, absmax: Tensor) -> Params:
        return double_quant.compress(absmax) if self.double_quant else {"absmax": absmax}

    def _pieces(self, n: int) -> Iterator[tuple[slice, slice]]:
        """Slices of n values, and of their blocks; a short last block comes by itself."""
        full = n // self.block_size
        step = max(1, _PIECE // self.block_size)
        for start in range(0, full, step):
            blocks = slice(start, min(start + step, full))
            yield slice(blocks.start * self.block_size, blocks.stop * self.block_size), blocks
        if n % self.block_size:
            yield slice(full * self.block_size, n), slice(full, full + 1)

    def _absmax(self, flat: Tensor) -> Tensor:
        """Largest magnitude of each block, float32 [B]."""
        found = [flat.new_empty(0, dtype=torch.float32)]
        for values, blocks in self._pieces(len(flat)):
            found.append(flat[values].float().reshape(blocks.stop - blocks.start, -1).abs().amax(-1))
        if len(flat) % self.block_size:
            found[-1] = found[-1].clamp_min(_LEAST)
        return torch.cat(found)

    def _inside(self, x: Tensor) -> Tensor:
        first, second, *_, before, last = sorted(self.codebook)
        return ((x >= first - (second - first) / 2) & (x <= last + (last - before) / 2)).reshape(-1)


def _normalized(flat: Tensor, scale_B: Tensor, block_size: int) -> Tensor:
    """w / absmax as bitsandbytes rounds it, float32 [B, S], in memory of its own; a short block is divided."""
    x = flat.float().reshape(len(scale_B), -1)
    by = torch.where(scale_B.abs() < _LEAST, _LEAST, scale_B).unsqueeze(-1)
    return x * (1.0 / by) if x.shape[1] == block_size else x / by


def _slots(x: Tensor, tables: Tables) -> Tensor:
    """Slot of each of ``x`` [B, S], int32 [B * S]; overwrites ``x``. NaN, which encode refuses, gets one too: training is to see it."""
    x = x.reshape(-1).clamp_(-1.0, 1.0)
    bucket = (x * _STEPS).add_(_STEPS).to(torch.int32).clamp_(0, 2 * _STEPS)
    above = x > tables.threshold.index_select(0, bucket)
    return bucket.mul_(2).add_(above)


def _scaled(values: Tensor, scale_B: Tensor) -> Tensor:
    """``values`` [n] times the scales of their blocks, [n]."""
    return values.reshape(len(scale_B), -1).mul_(scale_B.unsqueeze(-1)).reshape(-1)


@cache
def _arrays(codebook: tuple[float, ...]) -> Any:
    """The fields of `Tables` as numpy arrays: made once, whatever mode torch is in (inference, fake tensors) when they are first needed."""
    import numpy as np

    values = np.array(codebook, np.float32)
    order = np.argsort(values, kind="stable")  # of FP4's zeros code 0 is the lower
    ascending = values[order]
    bounds = (ascending[:-1] + ascending[1:]) / np.float32(2)
    bucket = (bounds * np.float32(_STEPS) + np.float32(_STEPS)).astype(np.int64)
    assert len(np.unique(bucket)) == len(bucket), "two thresholds in a bucket"
    threshold = np.full(2 * _STEPS + 1, np.inf, np.float32)
    threshold[bucket] = bounds
    below = np.searchsorted(bucket, np.arange(len(threshold)))  # how many thresholds are in earlier buckets
    slots = np.stack([below, np.minimum(below + 1, len(values) - 1)], -1).reshape(-1)
    return threshold, order[slots].astype(np.int8), ascending[slots], values


@register("grid", "nf4")
@dataclass
class Nf4(Codebook):
    """4-bit normal float: the 16 values and the blocks of bitsandbytes (QLoRA)."""

    codebook: ClassVar[tuple[float, ...]] = (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )


@register("grid", "fp4")
@dataclass
class Fp4(Codebook):
    """4-bit float of bitsandbytes: a sign, two bits of exponent, one of mantissa."""

    codebook: ClassVar[tuple[float, ...]] = tuple(
        sign * x / 12 + 0.0 for sign in (1, -1) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    )


@register("grid", "nf3")
@dataclass
class Nf3(Codebook):
    """3-bit normal float by QLoRA's construction; qtrain's own."""

    codebook: ClassVar[tuple[float, ...]] = (
        -1.0,
        -0.5350227355957031,
        -0.24693143367767334,
        0.0,
        0.1833374798297882,
        0.38199394941329956,
        0.6229857206344604,
        1.0,
    )


@register("grid", "nf2")
@dataclass
class Nf2(Codebook):
    """2-bit normal float by QLoRA's construction; qtrain's own."""

    codebook: ClassVar[tuple[float, ...]] = (
        -1.0,
        0.0,
        0.4358181655406952,
        1.0,
    )
