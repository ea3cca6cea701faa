"""Makes ggml/*.npz: what llama.cpp itself makes of a few hundred hard values, for every block type.

    pip install xllamacpp gguf numpy          # 2026.10.11549 was used: its shared object exports ggml_quantize_chunk
    python tests/golden/make_ggml.py

values.npz holds `x` (float32, 512 values a row: two super-blocks), `importance` (mean squared activation of 512 channels) and `kinds`, what
each row is. TYPE.npz holds `bytes` and `weighted_bytes`, the rows as llama-quantize writes them without and with that importance, and
`crc` and `weighted_crc`, CRC-32 of the float32 values (little-endian, row after row) that llama.cpp's dequantize_row_TYPE reads in them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import zlib
from pathlib import Path

import gguf
import numpy as np

HERE = Path(__file__).resolve().parent / "ggml"
TYPES = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
COLUMNS = 512
KINDS = ["normal", "normal", "heavy tails", "heavy tails", "one outlier", "nearly constant", "constant", "negative", "tiny", "zero"]


def llama_cpp() -> ctypes.CDLL:
    """llama.cpp's shared object, in the wheel xllamacpp.

    Raises:
        FileNotFoundError: if the wheel is not installed.
    """
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise FileNotFoundError("xllamacpp is not installed: pip install xllamacpp")
    library = ctypes.CDLL(str(next(Path(found.origin).parent.glob("*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return library


def quantize(library: ctypes.CDLL, name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """What llama-quantize writes for the rows of ``x``, uint8 [R, bytes per row]."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    x = np.ascontiguousarray(x, np.float32)
    out = np.zeros((len(x), x.shape[1] // block * block_bytes), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    address = None if weights is None else weights.ctypes.data
    written = library.ggml_quantize_chunk(int(kind), x.ctypes.data, out.ctypes.data, 0, *x.shape, address)
    assert written == out.size
    return out


def dequantize(library: ctypes.CDLL, name: str, data: np.ndarray, columns: int) -> np.ndarray:
    """What llama.cpp reads in those bytes, float32 [R, columns]."""
    function = getattr(library, f"dequantize_row_{name.replace('_k', '_K')}")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    out = np.zeros((len(data), columns), np.float32)
    function(np.ascontiguousarray(data).ctypes.data, out.ctypes.data, out.size)
    return out


def values() -> tuple[np.ndarray, np.ndarray]:
    """Rows of `KINDS`, and the importance of their columns."""
    random = np.random.default_rng(3)
    x = 0.05 * random.standard_normal((len(KINDS), COLUMNS))
    for row, kind in zip(x, KINDS, strict=True):
        if kind == "heavy tails":
            row /= np.sqrt(random.random(COLUMNS)).clip(0.03)
        elif kind == "one outlier":
            row[77] = -3.0
        elif kind == "nearly constant":
            row[:] = 0.5 + 1e-3 * row
        elif kind == "constant":
            row[:] = 0.37
        elif kind == "negative":
            row[:] = -np.abs(row)
        elif kind == "tiny":
            row *= 2e-5
        elif kind == "zero":
            row[:] = 0
    return x.astype(np.float32), (random.random(COLUMNS) ** 3 + 1e-3).astype(np.float32)


def main() -> None:
    library = llama_cpp()
    x, importance = values()
    HERE.mkdir(exist_ok=True)
    np.savez_compressed(HERE / "values.npz", x=x, importance=importance, kinds=np.array(KINDS))
    for name in TYPES:
        plain, weighted = quantize(library, name, x), quantize(library, name, x, importance)
        crc, weighted_crc = (zlib.crc32(dequantize(library, name, data, COLUMNS).tobytes()) for data in (plain, weighted))
        np.savez_compressed(HERE / f"{name}.npz", bytes=plain, weighted_bytes=weighted, crc=crc, weighted_crc=weighted_crc)


if __name__ == "__main__":
    main()
