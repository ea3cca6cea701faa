"""Safetensors files, written tensor by tensor: the header first, then each tensor's bytes, which are made, written and forgotten.

The `safetensors` package wants all tensors of a file at once; the format is simple enough to be written without (its README):

    8 bytes       length N of the header, little-endian
    N bytes       json: name -> {dtype, shape, data_offsets: [begin, end]}, `__metadata__`; padded with spaces to 8 bytes
    the rest      tensors, without gaps; wider types first, so that each is aligned to its own

Past `most` bytes a folder is in shards, `model-00001-of-0000N.safetensors` and an index, as transformers writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.transformers_folder.contents import Entry

NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SINGLE, SHARD, INDEX = "model.safetensors", "model-{:05d}-of-{:05d}.safetensors", "model.safetensors.index.json"


def write_weights(folder: Path, entries: list[Entry], most: int | None, tell: Callable[[str], None]) -> list[Path]:
    """Write all entries into ``folder``; returns the files.

    Args:
        most: bytes of one file; None for a single one.
        tell: is told how far it has come, for the user to see.
    """
    shards = _shards(entries, most)
    names = [SINGLE] if len(shards) == 1 else [SHARD.format(i + 1, len(shards)) for i in range(len(shards))]
    total = sum(e.nbytes for e in entries)
    done = 0
    for name, shard in zip(names, shards, strict=True):
        tell(f"writing {name}, {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")
        write_file(folder / name, shard)
        done += sum(e.nbytes for e in shard)
    files = [folder / name for name in names]
    if len(shards) == 1:
        return files
    where = {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [*files, folder / INDEX]


def write_file(path: Path, entries: list[Entry]) -> None:
    """One safetensors file."""
    ordered = sorted(entries, key=lambda e: -e.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            data = entry.data()
            assert data.dtype == entry.dtype and tuple(data.shape) == entry.shape, f"{entry.name} is {data.dtype} {list(data.shape)}"
            file.write(as_bytes(data))
            del data  # before the next one is made


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major, little-endian."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _shards(entries: list[Entry], most: int | None) -> list[list[Entry]]:
    """Cut so that no file is larger than ``most``, unless it holds a single tensor."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and most is not None and size + entry.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards
