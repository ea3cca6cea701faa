"""Codes of bitsandbytes' 4-bit layers as `QuantizedTensor`, and back, without rounding anything again.

    q = from_params4bit(linear.weight)                     of a Linear4bit, or any layer that holds Params4bit
    linear.weight = to_params4bit(q, torch.bfloat16)
    q = from_quant_state(data, state)                      of quantize_4bit's two results, or QuantState.from_dict of a checkpoint
    data, state = to_quant_state(q)

What bitsandbytes has, and what it is here (`codebook.py`, `double_quant.py`):

    data          [(n + 1) // 2, 1], uint8 or another type's bytes (quant_storage)       codes, by `Codebook.unpack`
    absmax        float32 [B], or uint8 [B] where double-quantized                       params["absmax"]
    state2.absmax float32 [ceil(B / 256)]                                                params["nested_absmax"]
    offset        float32 []                                                             params["nested_offset"]
    code, state2.code                                                                    the grid's; checked to be these to the bit
    dtype         of the weight that was quantized, and of what is decoded               an argument: grids decode to float32

bitsandbytes makes the map of its double quantization anew on each machine: without fused multiply-add it differs in last bits, and older
versions overwrote its first value with -1 when they quantized on a CPU. Codes of another map, or of other nested blocks than 256, are
refused, unless ``expand`` asks for scales as the float32 numbers that they decode to: the same weight in 0.37 bits more.

bitsandbytes is imported where it is asked to make something, never to load this file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qtrain.grids import double_quant
from qtrain.grids.base import QuantizedTensor
from qtrain.grids.codebook import Codebook, Fp4, Nf4
from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

GRIDS: dict[str, type[Codebook]] = {"nf4": Nf4, "fp4": Fp4}
"""bitsandbytes' quant_type -> grid."""


def from_params4bit(weight: Any, expand: bool = False) -> QuantizedTensor:
    """The codes of a `bitsandbytes.nn.Params4bit`.

    Args:
        expand: keep double-quantized scales as the float32 numbers that they decode to.

    Raises:
        ValueError: if it was not quantized yet, or not as the grid has it.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ValueError(
            "a weight of bitsandbytes has no codes yet: it is rounded when it first moves to a device. Call layer.to('cpu') (or 'cuda') "
            "first, or load the checkpoint with its quant_state"
        )
    return from_quant_state(weight.data, state, expand)


def from_quant_state(data: Tensor, state: Any, expand: bool = False) -> QuantizedTensor:
    """The codes that ``data`` and a `bitsandbytes.functional.QuantState` hold; see `from_params4bit`."""
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked a weight for its CPU kernels, which rounds its scales to bfloat16 (in the first evaluation on a "
            "processor with AVX512-BF16). Read its codes before, or set layer.support_avx512bf16_for_cpu = False"
        )
    if state.quant_type not in GRIDS:
        raise ValueError(f"quant_type is {state.quant_type!r}; the grids here are {', '.join(GRIDS)}. Quantize with quant_type='nf4'")
    nested = state.state2 is not None and not expand
    grid = GRIDS[state.quant_type](block_size=state.blocksize, double_quant=nested)
    if state.code is not None and not _same(state.code, grid.tables(data.device).by_code):
        raise ValueError(f"the code of a quant state is not {state.quant_type}'s: {state.code.tolist()}. Quantize the float weight again")
    if nested:
        _check_nested(state.state2)
        params = {"absmax": state.absmax, "nested_absmax": state.state2.absmax, "nested_offset": state.offset.reshape(())}
    else:
        params = {"absmax": state.absmax.float() if state.state2 is None else _expanded(state)}
    return grid.unpack(data.contiguous().view(torch.uint8), tuple(state.shape), params)


def to_quant_state(q: QuantizedTensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Any]:
    """bitsandbytes' bytes, uint8 [(n + 1) // 2, 1], and quant state of ``q``.

    Args:
        dtype: float32 (the default), float16 or bfloat16: what bitsandbytes decodes to.

    Raises:
        ValueError: if bitsandbytes has no such grid.
    """
    make = importlib.import_module("bitsandbytes.functional").QuantState
    grid: Any = q.grid
    kind = next((name for name, cls in GRIDS.items() if type(grid) is cls), None)
    if kind is None:
        nearest = "nf4" if isinstance(grid, Codebook) or grid.code_bits <= 4 else "int8, of quantizer=bnb quantizer.type=int8"
        raise ValueError(
            f"bitsandbytes' 4-bit layers hold nf4 and fp4, not {grid.describe()}; the nearest is grid@quantizer.weight={nearest}"
        )
    state2 = None
    if grid.double_quant:
        code = torch.from_numpy(double_quant.dynamic_map().copy()).to(q.codes.device)
        state2 = make(absmax=q.params["nested_absmax"], blocksize=double_quant.NESTED_BLOCK, code=code, dtype=torch.float32)
    state = make(
        absmax=q.params["absmax"],
        shape=torch.Size(q.shape),
        code=grid.tables(q.codes.device).by_code.clone(),
        blocksize=grid.block_size,
        quant_type=kind,
        dtype=dtype or torch.float32,
        offset=q.params.get("nested_offset"),
        state2=state2,
    )
    return grid.pack(q), state


def to_params4bit(q: QuantizedTensor, dtype: torch.dtype | None = None, quant_storage: torch.dtype | None = None) -> Any:
    """A `bitsandbytes.nn.Params4bit` of ``q``, quantized already.

    Args:
        dtype: see `to_quant_state`.
        quant_storage: type of the tensor that holds the bytes; uint8 by default.

    Raises:
        ValueError: if bitsandbytes has no such grid, or the bytes are no whole number of elements of ``quant_storage``.
    """
    data, state = to_quant_state(q, dtype)
    storage = quant_storage or torch.uint8
    if data.numel() % storage.itemsize:
        raise ValueError(
            f"{data.numel()} bytes of codes are no whole number of {str(storage).removeprefix('torch.')} elements. "
            "Set quantizer.quant_storage=uint8"
        )
    return importlib.import_module("bitsandbytes.nn").Params4bit(
        data.reshape(-1).view(storage).unsqueeze(1),
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=storage,
        bnb_quantized=True,
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float(), b.to(a.device))


def _check_nested(state2: Any) -> None:
    found = []
    if state2.blocksize != double_quant.NESTED_BLOCK:
        found.append(f"its scales are quantized in blocks of {state2.blocksize}, not {double_quant.NESTED_BLOCK}")
    if not _same(state2.code, torch.from_numpy(double_quant.dynamic_map())):
        found.append("the 8-bit map of its scales is another (of another machine or version of bitsandbytes)")
    if found:
        raise ValueError(f"{' and '.join(found)}; pass expand=True to keep its scales as the float32 numbers that they decode to")


def _expanded(state: Any) -> Tensor:
    """Scales that any map and block size decode to, float32 [B]: two roundings, as everywhere."""
    nested = state.state2
    values = nested.code.to(state.absmax.device).float()[state.absmax.long()]
    return values * nested.absmax.repeat_interleave(nested.blocksize)[: len(values)] + state.offset
