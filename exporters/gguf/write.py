"""The GGUF file: written tensor by tensor, and read back from the disk by the gguf package alone.

Names, shapes and offsets are written first; then each entry makes its bytes, they are written and forgotten, so that there is never more
than one tensor's bytes beside the model. Past `split_bytes` the file is in shards NAME-00001-of-0000N.gguf, of which llama.cpp loads the
first. Files are written in place: the caller stages the folder.

`read_back` knows from the file which tensors come from which layers (`qtrain.modules`), decodes their bytes with `gguf.quants.dequantize`,
not with the grids that made them, and undoes what `exporters.gguf.architectures` did to their rows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.gguf_writer import SHARD_NAME_FORMAT
from torch import Tensor

from exporters.gguf.architectures import by_name
from exporters.gguf.contents import MODULES, Entry, entries, file_type, modules, tied_head
from exporters.gguf.rope import Key
from qtrain.gguf_names import TOKEN_EMBEDDING

__all__ = ["Entry", "entries", "read_back", "read_types", "shards", "tied_head", "write"]

PIECE = 1 << 22
"""Values that are decoded at once."""
Tell = Callable[[str], None] | None
TOKENS = "tokenizer.ggml.tokens"
ARCHITECTURE = "general.architecture"


def write(path: Path, metadata: list[Key], entries: list[Entry], split_bytes: int | None = None, tell: Tell = None) -> list[Path]:
    """Write the file, or its shards, and return their paths, the one to load first.

    Args:
        metadata: key, value, and the name of a GGUF type (uint32, float32, bool, string, array) or gguf's own enum member; with
            `general.architecture`. What follows from the tensors (file type, `qtrain.modules`) is added.
        split_bytes: start another shard before the tensors of one exceed this.
        tell: is told how far it has come, for the user to see.

    Raises:
        ValueError: if metadata and tensors contradict each other, or a weight is not finite or does not fit its float type.
    """
    keys = _unique([*metadata, *_of_tensors(metadata, entries)])
    _check_vocabulary(keys, entries)
    writer = gguf.GGUFWriter(path, keys.pop(ARCHITECTURE)[0], split_max_size=split_bytes or 0)
    for key, (value, value_type) in keys.items():
        writer.add_key_value(key, value, value_type)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.type.upper()]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=kind)
    paths = writer.format_shard_names(Path(path))
    try:
        writer.write_header_to_file(Path(path))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(e.nbytes for e in entries)
        for entry in entries:
            if tell is not None:
                tell(f"writing {path.name}, {done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({done / total:.0%})")
            data = entry.data()
            assert data.nbytes == entry.nbytes, f"{entry.name} has {data.nbytes} bytes, not {entry.nbytes}"
            writer.write_tensor_data(data)
            del data  # before the next one is made
            done += entry.nbytes
    finally:
        writer.close()
    return paths


def read_back(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Converted layers of a file of ours: module name and weight, float32 [O, I] as the gguf package decodes it; one at a time.

    Args:
        path: the file, or the first of its shards.
    """
    readers = _readers(path)
    arch = by_name(_value(readers[0], ARCHITECTURE))
    heads, kv = (_value(readers[0], f"{arch.name}.attention.{key}") for key in ("head_count", "head_count_kv"))
    held = json.loads(_value(readers[0], MODULES))
    for reader in readers:
        for tensor in reader.tensors:
            if tensor.name in held:
                values = arch.transform(tensor.name, heads, kv).undo(_decode(tensor))
                for module, start, end in held[tensor.name]:
                    yield module, values[start:end]


def read_types(path: Path) -> dict[str, str]:
    """GGUF name -> type of every tensor of the file and its shards, lower case."""
    return {t.name: t.tensor_type.name.lower() for reader in _readers(path) for t in reader.tensors}


def shards(path: Path) -> list[Path]:
    """The files of which ``path`` is the first."""
    return _shards(path, _Reader(path))


def _shards(path: Path, first: Any) -> list[Path]:
    field = first.get_field("split.count")
    if field is None:
        return [path]
    count = int(field.contents())
    stem = path.stem.removesuffix(f"-00001-of-{count:05d}")
    return [path.with_name(SHARD_NAME_FORMAT.format(stem, i + 1, count)) for i in range(count)]


def _readers(path: Path) -> list[Any]:
    first = _Reader(path)
    return [first, *(_Reader(p) for p in _shards(path, first)[1:])]


class _Reader(gguf.GGUFReader):
    """gguf's reader, which steps over arrays in the metadata: it takes seconds to make objects of a vocabulary's tokens and merges."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        data: Any = self.data
        kind, count = struct.unpack_from("<IQ", data, orig_offs)
        end = orig_offs + struct.calcsize("<IQ")
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(count):
                end += 8 + struct.unpack_from("<Q", data, end)[0]
        else:
            end += count * np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(kind)]).itemsize
        return end - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]


def _decode(tensor: Any) -> Tensor:
    """float32, in torch's order of dimensions; decoded in pieces of whole rows."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    rows = tensor.data.reshape(shape[0] if len(shape) > 1 else 1, -1)
    out = np.empty((len(rows), shape[-1]), np.float32)
    step = max(1, PIECE // shape[-1])
    for start in range(0, len(rows), step):
        out[start : start + step] = gguf.quants.dequantize(rows[start : start + step], tensor.tensor_type)
    return torch.from_numpy(out.reshape(shape))


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the file has no {key}; it was not written by qtrain")
    return field.contents()


def _of_tensors(metadata: list[Key], entries: list[Entry]) -> list[Key]:
    mix = next((value for key, value, _ in metadata if key == "qtrain.mix"), None)
    return [
        ("general.quantization_version", gguf.GGML_QUANT_VERSION, "uint32"),
        ("general.file_type", file_type(entries, mix), "uint32"),
        (MODULES, modules(entries), "string"),
    ]


def _unique(metadata: list[Key]) -> dict[str, tuple[Any, Any]]:
    """Key -> value and gguf's type.

    Raises:
        ValueError: for a key that is given twice, with different values.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key, value, kind in metadata:
        member = gguf.GGUFValueType[kind.upper()] if isinstance(kind, str) else kind
        if found.setdefault(key, (value, member))[0] != value:
            raise ValueError(f"the metadata has {key} twice: {found[key][0]!r} and {value!r}")
    return found


def _check_vocabulary(keys: dict[str, tuple[Any, Any]], entries: list[Entry]) -> None:
    """llama.cpp wants a token for every row of the embedding."""
    rows = next((e.shape[0] for e in entries if e.name == TOKEN_EMBEDDING), None)
    tokens = keys.get(TOKENS, (None,))[0]
    if rows is not None and tokens is not None and len(tokens) != rows:
        raise ValueError(
            f"the tokenizer has {len(tokens)} tokens and the model's embedding {rows} rows; "
            + (
                "pad the vocabulary with unused tokens"
                if len(tokens) < rows
                else "the model cannot read them all: choose its own tokenizer"
            )
        )
