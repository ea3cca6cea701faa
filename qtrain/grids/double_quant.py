"""Double quantization: the float32 scales of a block format, themselves in 8 bits (QLoRA: Dettmers et al. 2023, arXiv 2305.14314).

A scale per block of 64 weights costs half a bit per weight; in 8 bits it costs an eighth:

    offset = mean(absmax)                                       float32, one per tensor: absmax is positive, the map below has two signs
    nested_absmax = max |absmax - offset|                       float32, one per 256 scales
    code = nearest of the map to (absmax - offset) / nested_absmax        uint8, one per scale
    absmax' = map[code] * nested_absmax + offset                what the runtime computes, float32, two roundings

The map is bitsandbytes' signed dynamic type (Dettmers 2015, arXiv 1511.04561): 0, 1, and ± 10^(e - 6) times the midpoints of 2^e equal
parts of [0.1, 1], for e = 0 … 6; 256 values, the smallest 5.5e-7. A scale far below the mean has an absolute error of the order of the
mean's, so the scale of a block of zeros comes back as a small number of either sign.

**To the bit.** Everything is bitsandbytes 0.50's rule on the CPU, whose kernel does not search the map: it looks (code of v) up in a table
of 65,536, v to the nearest of them, whose entries are the map's nearest values (of two equally near ones the lower). One code in five
hundred therefore is the neighbour of the nearest, codes within ± 1e-5 of zero do not occur, and CUDA's kernel, which searches, differs
there. The index is 65535 * (v + 1) / 2 + 0.5 with one rounding (its compiler fuses), cut off; float64 gives the same number here.
The map's intervals are torch.linspace's, which fuses too where the processor can; on one that cannot (x86 before AVX2), bitsandbytes'
own map differs from this one in 42 last bits. The mean is torch's: over more than 32,768 scales its last bit depends on the number of
threads, in bitsandbytes as here; it is chosen once and stored.

Shapes: B blocks (scales), N = ceil(B / 256) nested blocks.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qtrain.grids.base import Params
else:
    torch = lazy_import("torch")

NESTED_BLOCK = 256
"""Scales that share one nested scale."""
BITS = {"absmax": 8, "nested_absmax": 32, "nested_offset": 32}
"""Parameters and their bits per element in a file; bitsandbytes' checkpoints have them under the same names."""

_ENTRIES = 65536


def compress(absmax_B: Tensor) -> Params:
    """absmax uint8 [B], nested_absmax float32 [N] and nested_offset float32 [] for scales ``absmax_B``, float32."""
    offset = absmax_B.mean() if len(absmax_B) else absmax_B.new_zeros(())
    x_NS = torch.nn.functional.pad(absmax_B - offset, (0, -len(absmax_B) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested_N1 = x_NS.abs().amax(-1, keepdim=True)
    codes = look_up(x_NS * (1.0 / nested_N1)).reshape(-1)[: len(absmax_B)]
    return {"absmax": codes, "nested_absmax": nested_N1.squeeze(-1), "nested_offset": offset}


def look_up(x: Tensor) -> Tensor:
    """Codes of ``x``, float32, cut off at -1 and 1: uint8, same shape; 0 for NaN, that is 0 / 0 of scales that are all equal."""
    v = (x.clamp(-1.0, 1.0) + 1.0) * 0.5
    index = (v.double() * (_ENTRIES - 1) + 0.5).float().nan_to_num_(0.0).long()
    return torch.from_numpy(_table()).to(x.device)[index]


def expand(params: Params) -> Tensor:
    """The scales that the runtime computes, float32 [B]."""
    codes = params["absmax"]
    values = torch.from_numpy(dynamic_map()).to(codes.device)[codes.long()]
    return values * params["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: len(codes)] + params["nested_offset"]


@cache
def dynamic_map() -> Any:
    """The 256 values by code, a float32 numpy array in ascending order."""
    import numpy as np

    values = [np.array([0.0, 1.0], np.float32)]
    for e in range(7):
        edges = _linspace(2**e + 1)
        middles = np.float32(10.0 ** (e - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


def _linspace(count: int) -> Any:
    """torch.linspace(0.1, 1, count) of float32: counted from the nearer end, product and sum rounded once."""
    import numpy as np

    start, end = np.float32(0.1), np.float32(1)
    step = np.float64((end - start) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, np.float64(start) + step * i, np.float64(end) - step * (count - 1 - i)).astype(np.float32)


@cache
def _table() -> Any:
    """Code of each of 65,536 equidistant values of [-1, 1], a uint8 numpy array."""
    import numpy as np

    values = dynamic_map()
    x = (np.arange(_ENTRIES) / (_ENTRIES - 1) * 2 - 1).astype(np.float32)
    upper = np.searchsorted(values, x).clip(1, len(values) - 1)
    nearer = values[upper] - x < x - values[upper - 1]
    return np.where(nearer, upper, upper - 1).astype(np.uint8)
