"""The header of a GGUF file: metadata and where each tensor lies, in milliseconds, and whether the file is whole.

The `gguf` package reads a file too, in seconds where its vocabulary is large, and meets damage with whatever numpy says. Here every count,
length and offset is compared with the size of the file before the data is touched.

Layout (the specification is ggml/docs/gguf.md): magic, version, counts; key-value pairs; tensor infos (name, dimensions fastest first,
type, offset); padding to `general.alignment`; data. Only files of one part and of little-endian byte order are read.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
REMEDY = "Set model.path=/a/folder to the transformers folder that the file was made from"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    shape: tuple[int, ...]
    """In torch's order."""
    type: int
    """ggml's number."""
    offset: int
    """Bytes from the beginning of the data."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data."""

    path: Path
    metadata: dict[str, Any]
    """Scalars and strings by key; arrays of numbers as lists, arrays of strings as their length."""
    tensors: list[TensorInfo]
    data_start: int
    bytes: int
    """Of the whole file."""

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def get(self, key: str) -> Any:
        """A hyperparameter of the architecture, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")


class _Reader:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def count(self, width: int) -> int:
        """How many values of at least ``width`` bytes follow; a damaged count would be waited for."""
        found = int(self.number("<Q"))
        if found * width > len(self.data) - self.at:
            raise struct.error(f"{found} values reach past the end")
        return found

    def text(self) -> str:
        size = self.number("<Q")
        self.at += size
        if self.at > len(self.data):
            raise struct.error("a string reaches past the end")
        return self.data[self.at - size : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        kind = self.number("<I")
        if kind == _STRING:
            count = self.count(8)
            for _ in range(count):
                size = self.number("<Q")
                self.at += size
            return count
        code = _SCALARS[kind]
        width = struct.calcsize(code)
        count = self.count(width)
        self.at += count * width
        return list(struct.unpack_from(f"<{count}{code[1]}", self.data, self.at - count * width))


def read_header(path: Path) -> Header:
    """Everything but the data.

    Raises:
        ValueError: if the file is not a GGUF file, is cut short, is one part of several, or holds tensors that cannot be decoded.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with GGUF. {REMEDY}, or to another file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(path, _Reader(data))
            except (struct.error, KeyError, TypeError, UnicodeDecodeError, ArithmeticError) as e:
                raise ValueError(
                    f"the header of {path} is damaged ({type(e).__name__}: {e}): the file is cut short ({len(data):,} bytes) or not a GGUF "
                    f"file. Copy it again. {REMEDY}"
                ) from e
    _check(header)
    return header


def _parse(path: Path, reader: _Reader) -> Header:
    reader.at = 4
    version = reader.number("<I")
    if version not in (2, 3):
        raise ValueError(f"{path} is GGUF of version {version} (or big-endian); versions 2 and 3 can be read. {REMEDY}")
    tensors, pairs, metadata = reader.count(24), reader.count(13), {}
    for _ in range(pairs):
        key, kind = reader.text(), reader.number("<I")
        metadata[key] = reader.value(kind)
    metadata["general.architecture"]  # a GGUF file of a model has one
    infos = []
    for _ in range(tensors):
        name, dimensions = reader.text(), reader.number("<I")
        if dimensions > 4:
            raise struct.error(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(reader.number("<Q") for _ in range(dimensions))[::-1]
        infos.append(TensorInfo(name, shape, reader.number("<I"), reader.number("<Q")))
    alignment = metadata.get("general.alignment", 32)
    return Header(path, metadata, infos, -(-reader.at // alignment) * alignment, len(reader.data))


def _check(header: Header) -> None:
    sizes, path = import_gguf().GGML_QUANT_SIZES, header.path
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise ValueError(
            f"{path} is one of {parts} parts; a model is read from a single file. "
            f"Merge them first (llama-gguf-split --merge {path.name} whole.gguf). {REMEDY}"
        )
    unreadable = {t.name: _type_name(t.type) for t in header.tensors if not _readable(t.type)}
    if unreadable:
        name, kind = next(iter(unreadable.items()))
        raise ValueError(
            f"{len(unreadable)} tensors of {path} are of types that cannot be decoded, the first {name} of type {kind}; valid: "
            f"{', '.join(t.name for t in sizes if _readable(t.value))}. {REMEDY}"
        )
    kinds = {t.value: size for t, size in sizes.items()}
    for t in header.tensors:
        block, block_bytes = kinds[t.type]
        end = header.data_start + t.offset + prod(t.shape) // block * block_bytes
        if end > header.bytes:
            raise ValueError(
                f"{path} is cut short: it has {header.bytes:,} bytes, and tensor {t.name} ends at {end:,}. Copy it again. {REMEDY}"
            )


def _type_name(kind: int) -> str:
    names = {t.value: t.name for t in import_gguf().GGML_QUANT_SIZES}
    return names.get(kind, f"number {kind}")


def _readable(kind: int) -> bool:
    """Whether the `gguf` package can decode a type: one block of zeros is tried."""
    import numpy as np

    gguf = import_gguf()
    sizes = {t.value: (t, size) for t, size in gguf.GGML_QUANT_SIZES.items()}
    if kind not in sizes:
        return False
    quant, (_, block_bytes) = sizes[kind]
    if quant.name in ("F32", "F16"):
        return True
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), quant)
    except NotImplementedError:
        return False
    return True


def import_gguf() -> Any:
    """The `gguf` package.

    Raises:
        ValueError: if it, or accelerate, which transformers wants beside it, is not installed.
    """
    try:
        import accelerate  # noqa: F401
        import gguf
    except ImportError as e:
        raise ValueError(f"reading a GGUF file needs the packages gguf and accelerate ({e}). Type pip install 'qtrain[gguf]'") from e
    return gguf
