"""An adapter beside a GGUF file: A and B of each layer as llama.cpp's `--lora`, and Ollama's ADAPTER, read them.

The format is that of llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp:

    general.type = "adapter", adapter.type = "lora", adapter.lora.alpha     the product is scaled by alpha / r
    <tensor>.lora_a   [r, I]        <tensor>.lora_b   [O, r]                beside the tensor of that name in the model's file

Rows of B are rows of the weight, so what the architecture does to those is done to them. Both are written in float32: they are small, and
the receipt compares them bit for bit. llama.cpp has no DoRA, no trained biases, and no whole modules in such a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from exporters.base import ExportJob, LowRank
from exporters.gguf.architectures import architecture
from exporters.gguf.contents import placed
from exporters.gguf.graph import Transform

VARIANTS = ("lora", "rslora")


def refuse(variant: str, others: list[str], model: Any, names: list[str]) -> None:
    """Raise for what such a file cannot hold.

    Raises:
        ValueError: for DoRA, for ``others``, what is trained beside A and B, and for layers without a tensor of their own.
    """
    given = [f"adapter.variant={variant}"] if variant not in VARIANTS else []
    if given or others:
        raise ValueError(
            f"export=gguf with adapter.merge=apart writes an adapter as llama.cpp reads it, A and B of Linear layers alone, without "
            f"{', '.join([*given, *others])}. Set adapter.merge=float, or adapter.variant=lora adapter.bias=none adapter.modules_to_save=[]"
        )
    places(model, names)


def places(model: Any, layers: list[str]) -> dict[str, tuple[str, Transform]]:
    """Layer -> its tensor in the model's file, and what is done to the rows.

    Raises:
        ValueError: if one has no tensor of its own.
    """
    known = placed(model)
    missing = [name for name in layers if f"{name}.weight" not in known]
    if missing:
        raise ValueError(
            f"the file has no tensor of its own for {missing[0]}, so an adapter cannot stand beside it. Leave it out of "
            "adapter.target_modules, or set adapter.merge=float"
        )
    return {name: known[f"{name}.weight"] for name in layers}


def tensors(model: Any, adapter: LowRank) -> dict[str, Tensor]:
    """Name in the file -> float32 tensor; see `places` for what is refused."""
    found = {}
    known = places(model, list(adapter.layers))
    for name, (a_rI, b_Or) in adapter.layers.items():
        tensor, transform = known[name]
        found[f"{tensor}.lora_a"] = a_rI.float().cpu()
        found[f"{tensor}.lora_b"] = transform.apply(b_Or.float().cpu())
    return found


def write(path: Path, job: ExportJob) -> None:
    """Write the adapter's file."""
    adapter, config = job.adapter, job.model.config
    assert adapter is not None
    writer = gguf.GGUFWriter(path, architecture(config.get_text_config()).name)  # type: ignore[operator,union-attr]
    writer.add_type("adapter")
    writer.add_name(path.stem)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapter.scaling * adapter.rank)
    for name, value in tensors(job.model, adapter).items():
        writer.add_tensor(name, np.ascontiguousarray(value.numpy()))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def compare(path: Path, job: ExportJob) -> str:
    """Whether the file holds A and B as they were trained: "passed: …" or "failed: …"."""
    assert job.adapter is not None
    expected = tensors(job.model, job.adapter)
    held = {t.name: torch.from_numpy(np.array(t.data)).reshape(*reversed(t.shape.tolist())) for t in gguf.GGUFReader(path).tensors}
    wrong = [name for name, value in expected.items() if name not in held or not torch.equal(held[name], value)]
    if wrong or len(held) != len(expected):
        return f"failed: {len(wrong)} of {len(expected)} tensors of {path.name} are not as trained, the first {(wrong or sorted(held))[0]}"
    return f"passed: A and B of {len(job.adapter.layers)} layers are as trained, to the bit; llama.cpp computes with them beside the base"
