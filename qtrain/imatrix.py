"""llama.cpp's importance matrix files: what `llama-imatrix` writes and `llama-quantize --imatrix` reads.

Per weight of a model, by its GGUF tensor name, the squared activations of each input channel, summed over tokens:

    in_sum2[e, i] = sum over tokens of x[i]^2        counts[e] = number of those tokens        importance = in_sum2 / counts

E experts (1 of a dense layer), I input channels. An expert that no token reached has importance 1 (tools/quantize/quantize.cpp).

Two formats (tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp):

    GGUF      general.type = "imatrix", imatrix.datasets (strings), imatrix.chunk_count and imatrix.chunk_size (uint32);
              float32 tensors NAME.in_sum2 [E, I] and NAME.counts [E, 1], in the order of their names
    legacy    (.dat) little-endian int32 number of entries; per entry int32 length, name, int32 calls, int32 E*I and as many float32
              importance * calls; then, in newer files, int32 chunks, int32 length, name of the text. Calls are chunks, not tokens, and
              experts are not told apart: an entry is one row of E*I values

Both are read; GGUF is written. llama-imatrix leaves out output.weight and token_embd.weight unless told otherwise; a file with them is
as valid. llama-quantize ignores names that the model has not, and quantizes tensors without an entry as if there were no matrix.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUMS, COUNTS = ".in_sum2", ".counts"

CHUNK = 512
"""Tokens per chunk in files of activations that were not measured in chunks; llama.cpp divides by it to report progress."""

LONGEST_NAME = 63 - len(SUMS)
"""Characters of a tensor's name that leave room for the suffix (GGML_MAX_NAME is 64 with its final zero)."""


@dataclass(frozen=True)
class Entry:
    """Of one weight."""

    sums_EI: NDArray[np.float32]
    """Sums of squared activations."""
    counts_E: NDArray[np.float32]
    """Tokens that were summed (whole numbers)."""

    def importance(self) -> NDArray[np.float32]:
        """float32 [E, I]: mean squared activations; 1 where no token came by. Divided in float32, as llama-quantize does."""
        counts_E1 = self.counts_E.astype(np.float32)[:, None]
        reached = counts_E1 > 0
        return np.where(reached, self.sums_EI / np.where(reached, counts_E1, 1), np.float32(1)).astype(np.float32)


@dataclass
class Imatrix:
    """A whole file."""

    entries: dict[str, Entry] = field(default_factory=dict)
    """By GGUF tensor name, such as blk.0.attn_q.weight."""
    datasets: list[str] = field(default_factory=list)
    """What the activations are of; llama-quantize writes the first one into the model."""
    chunk_count: int = 0
    """Calibration windows."""
    chunk_size: int = CHUNK
    """Tokens of a window; 0 where the file does not say."""

    def importance(self, name: str, columns: int) -> NDArray[np.float32] | None:
        """float32 [I] of a dense weight; null where the file has none.

        Raises:
            ValueError: if it is of another width than ``columns``.
        """
        if name not in self.entries:
            return None
        found = self.entries[name].importance().reshape(-1)
        if found.size != columns:
            raise ValueError(
                f"the importance matrix has {found.size} channels for {name}, which has {columns}: it is of another model; "
                "collect one for this model, or leave it out"
            )
        return found


def save(path: Path, model: Any, importance: Mapping[str, Any], dataset: str = "qtrain's calibration text") -> None:
    """Write what calibration measured at the inputs of ``model``'s layers.

    Args:
        model: a transformers model; its configuration says what GGUF calls the layers.
        importance: module name -> object with `sum_of_squares` (tensor, float32 [I]) and `tokens`; layers without tokens are left out.

    Raises:
        ValueError: as `write`, and for an architecture that has no GGUF names.
    """
    from qtrain.gguf_names import tensor_names, tied

    names = tensor_names(model.config, [f"{module}.weight" for module in importance], tied(model))
    entries, tokens = {}, 0
    for module, found in importance.items():
        if found.tokens and f"{module}.weight" in names:
            sums = found.sum_of_squares.detach().cpu().float().numpy()
            entries[names[f"{module}.weight"]] = Entry(sums[None], np.array([found.tokens], np.float32))
            tokens = max(tokens, int(found.tokens))
    write(path, Imatrix(entries, [dataset], -(-tokens // CHUNK)))


def write(path: Path, imatrix: Imatrix) -> None:
    """Write the GGUF format; ``path`` appears when it is complete.

    Raises:
        ValueError: for entries that llama.cpp would refuse or misread, by name.
    """
    import gguf

    if not imatrix.entries:
        raise ValueError("an importance matrix without entries is no file that llama.cpp reads; collect at least one weight's activations")
    for name, entry in imatrix.entries.items():
        _check(name, entry)
    staged = path.with_name(path.name + ".part")
    writer = _writer(gguf.GGUFWriter)(staged, "")
    try:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", imatrix.datasets or ["unnamed"])
        writer.add_uint32("imatrix.chunk_count", imatrix.chunk_count)
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size or CHUNK)
        for name, entry in sorted(imatrix.entries.items()):
            writer.add_tensor(name + SUMS, np.ascontiguousarray(entry.sums_EI, np.float32))
            writer.add_tensor(name + COUNTS, np.ascontiguousarray(entry.counts_E, np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def read(path: Path) -> Imatrix:
    """Read either format.

    Raises:
        ValueError: if it is neither, or damaged; the message says where.
    """
    data = path.read_bytes()
    return _read_gguf(path) if data[:4] == b"GGUF" else _Legacy(path, data).read()


def _writer(base: Any) -> Any:
    """gguf's writer, which would say which architecture the file is of: an importance matrix has none."""
    return type("ImatrixWriter", (base,), {"add_architecture": lambda self: None})


def _check(name: str, entry: Entry) -> None:
    wrong = ""
    if entry.sums_EI.ndim != 2 or entry.counts_E.shape != entry.sums_EI.shape[:1] or not entry.sums_EI.size:
        wrong = f"has sums {entry.sums_EI.shape} and counts {entry.counts_E.shape}; sums are [experts, channels] and counts [experts]"
    elif not np.isfinite(entry.sums_EI).all() or (entry.sums_EI < 0).any():
        wrong = "has sums of squares that are negative or not finite: look for NaN in the model's activations"
    elif not (entry.counts_E > 0).any() or (entry.counts_E < 0).any():
        wrong = "counts no tokens: leave it out"
    elif len(name.encode()) > LONGEST_NAME:
        wrong = f"is longer than {LONGEST_NAME} characters, which ggml's tensor names cannot hold"
    if wrong:
        raise ValueError(f"importance of {name} {wrong}")


def _read_gguf(path: Path) -> Imatrix:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: (tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors}
        keys = {name: found.contents() for name, found in reader.fields.items()}
    except Exception as error:  # the package has no error of its own for damaged files
        raise ValueError(f"{path} is a damaged GGUF file: {error}") from error
    if (kind := keys.get("general.type", "imatrix")) != "imatrix":
        raise ValueError(f"{path} is a GGUF file of type {kind}, not imatrix; name the file that llama-imatrix wrote")
    entries = {}
    for name in sorted({name.removesuffix(SUMS).removesuffix(COUNTS) for name in tensors}):
        pair = [tensors.get(name + suffix) for suffix in (SUMS, COUNTS)]
        if any(found is None or found[0] != gguf.GGMLQuantizationType.F32 for found in pair):
            raise ValueError(f"{path} is no importance matrix: {name} lacks float32 tensors {name}{SUMS} and {name}{COUNTS}")
        (_, sums), (_, counts) = [found for found in pair if found is not None]
        if not counts.size or sums.size % counts.size:
            raise ValueError(f"{path} is damaged: {name} has {sums.size} sums and {counts.size} counts")
        entries[name] = Entry(sums.reshape(counts.size, -1), np.rint(counts.reshape(-1)))
    if not entries:
        raise ValueError(f"{path} is no importance matrix: it has no tensors")
    count, size = (int(keys.get(f"imatrix.{key}", 0)) for key in ("chunk_count", "chunk_size"))
    return Imatrix(entries, list(keys.get("imatrix.datasets", [])), count, size)


class _Legacy:
    """The .dat format, read in order."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._at = path, data, 0

    def read(self) -> Imatrix:
        entries = {}
        for i in range(self._count("the number of entries")):
            name = self._bytes(self._count(f"the name of entry {i}"), f"the name of entry {i}").decode(errors="replace")
            (calls,) = struct.unpack("<i", self._bytes(4, f"the calls of {name}"))
            size = self._count(f"the size of {name}")
            sums = np.frombuffer(self._bytes(4 * size, f"the values of {name}"), "<f4").reshape(1, size)
            entries[name] = Entry(sums.astype(np.float32), np.array([max(calls, 1)], np.float32))
        found = Imatrix(entries, chunk_size=0)
        if len(self._data) - self._at >= 8:
            found.chunk_count, length = struct.unpack("<ii", self._bytes(8, "the number of chunks"))
            found.datasets = [self._bytes(max(length, 0), "the name of the text").decode(errors="replace")]
        return found

    def _count(self, what: str) -> int:
        (value,) = struct.unpack("<i", self._bytes(4, what))
        if value < 1:
            self._refuse(what, f"it is {value}")
        return int(value)

    def _bytes(self, size: int, what: str) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) < size:
            self._refuse(what, f"{size} bytes are needed and {len(taken)} are left")
        self._at += size
        return taken

    def _refuse(self, what: str, why: str) -> None:
        raise ValueError(
            f"{self._path} is neither a GGUF file nor a complete importance matrix of the older format: at byte {self._at}, {what}: {why}"
        )
