"""NF4 and FP4 layers as bitsandbytes keeps them in a transformers folder: the codes of training, two to a byte, and their scales.

    weight                                  uint8 [O * I / 2, 1]
    weight.absmax                           float32 [B], or with double quantization uint8 [B]
    weight.quant_map                        float32 [16], the codebook
    weight.nested_absmax, nested_quant_map  float32 [B / 256] and [256], of double quantization
    weight.quant_state.bitsandbytes__nf4    json as uint8: block size, dtype, shape, and the mean of the scales

They are what transformers itself writes of a model that it loaded with `BitsAndBytesConfig(load_in_4bit=True)`, byte for byte, so plain
`from_pretrained` loads them, and so do peft, vLLM and others. The dtype in the quant state is that of `dequantize_4bit`'s result; products
are computed in `bnb_4bit_compute_dtype`. Both are the folder's; the numbers that are multiplied are the codebook's times the scales.

What bitsandbytes has no layer for is written as decoded values: embeddings, a head that is its embedding, nf3 and nf2. So are rows that
the block size does not divide, since its decoder for AVX-512 reads the scales of other rows there (0.50). `llm_int8_skip_modules` names all
Linear layers that stay float; transformers takes these names for patterns and suffixes, so one that would hit another layer is anchored.

Sources: bitsandbytes/functional.py (QuantState.as_dict), nn/modules.py; transformers/integrations/bitsandbytes.py, quantizers_utils.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from exporters.transformers_folder.contents import Entry, layers_of, ties
from qtrain.grids.base import QuantizedTensor
from qtrain.grids.double_quant import NESTED_BLOCK, dynamic_map

TYPES = ("nf4", "fp4")


def packable(model: nn.Module) -> dict[str, Any]:
    """Layers that bitsandbytes can hold, by name."""
    tied = {name.removesuffix(".weight") for name in ties(model)}
    return {name: layer for name, layer in layers_of(model).items() if name not in tied and _fits(layer)}


def _fits(layer: Any) -> bool:
    grid = layer.quantized.grid
    return layer.kind == "linear" and grid.registered_name in TYPES and layer.quantized.shape[1] % grid.block_size == 0


def require_bitsandbytes() -> None:
    """Raise where bitsandbytes, which loads such a folder, is not installed.

    Raises:
        ValueError: saying what to type.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "export=transformers writes nf4 and fp4 layers for bitsandbytes, and makes its receipt there; it is not installed. Run "
            "pip install bitsandbytes, or set export.transformers.bitsandbytes=false export.transformers.dtype=float32 for their values"
        )


def four_bit_entries(name: str, q: QuantizedTensor, dtype: str) -> list[Entry]:
    """The tensors of one layer, under ``name``.weight."""
    grid: Any = q.grid
    size = q.codes.numel() // 2
    found = [Entry(f"{name}.weight", torch.uint8, (size, 1), lambda: grid.pack(q).cpu())]
    state: dict[str, Any] = {"quant_type": grid.registered_name, "blocksize": grid.block_size, "dtype": dtype, "shape": list(q.shape)}
    tensors = {"absmax": q.params["absmax"], "quant_map": torch.tensor(grid.codebook)}
    if grid.double_quant:
        offset = float(q.params["nested_offset"])
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {"nested_absmax": q.params["nested_absmax"], "nested_quant_map": torch.from_numpy(dynamic_map())}
    tensors[f"quant_state.bitsandbytes__{grid.registered_name}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return found + [_entry(f"{name}.weight.{part}", value) for part, value in tensors.items()]


def _entry(name: str, value: Tensor) -> Entry:
    return Entry(name, value.dtype, tuple(value.shape), lambda: value.cpu())


def settings(model: Any, packed: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`quantization_config` of config.json: transformers' own, with the names of the layers that stay float."""
    from transformers import BitsAndBytesConfig

    grids = Counter((layer.quantized.grid.registered_name, layer.quantized.grid.double_quant) for layer in packed.values())
    kind, double = grids.most_common(1)[0][0]  # each layer's own quant state decides
    make: Any = BitsAndBytesConfig
    found = make(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped(model, set(packed)),
    ).to_dict()
    return dict(found)


def skipped(model: nn.Module, packed: set[str]) -> list[str]:
    """Names of the Linear layers that stay float, as patterns that hit none of ``packed``.

    Raises:
        ValueError: if transformers keeps one of ``packed`` in float32 whatever the config says.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = list(getattr(model, "_keep_in_fp32_modules", None) or [])
    forced = [name for name in packed if not should_convert_module(name, kept)]
    if forced:
        raise ValueError(
            f"transformers keeps {forced[0]} of {type(model).__name__} and {len(forced) - 1} more in float32, so they cannot be 4-bit. "
            f"Set quantizer.keep_float=['{forced[0]}'], or export.transformers.bitsandbytes=false"
        )
    linear = [name for name, module in model.named_modules() if _is_linear(module) and name not in packed]
    return [n if all(should_convert_module(p, [n]) for p in packed) else f"^{re.escape(n)}$" for n in linear]


def _is_linear(module: Any) -> bool:
    """Whether transformers would put a layer of bitsandbytes in place of what this is in the folder."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or getattr(module, "kind", "") == "linear"
