"""llama-quantize as a function, in a process of its own: the alternative that the GGUF benchmarks compare with.

Needs llama-cpp-python (`pip install llama-cpp-python`, which compiles llama.cpp), or LLAMA_LIBRARY=/path/to/libllama.so of any build that
has `llama_model_quantize`. The child process reports its own seconds and its own peak memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exporters.gguf.contents import FILE_TYPES


class Parameters(ctypes.Structure):
    """llama_model_quantize_params of llama.h."""

    _fields_ = [
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
        ("reserved", ctypes.c_char * 256),
    ]


class Importance(ctypes.Structure):
    """llama_model_imatrix_data of llama.h."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t)]


def library() -> Path | None:
    """The shared object, or None where there is none."""
    if os.environ.get("LLAMA_LIBRARY"):
        return Path(os.environ["LLAMA_LIBRARY"])
    spec = find_spec("llama_cpp")
    return Path(spec.origin).parent / "lib" / "libllama.so" if spec and spec.origin else None


def llama_quantize(source: Path, target: Path, mix: str, imatrix: Path | None = None, threads: int = 1) -> dict[str, float]:
    """Quantize a GGUF file; {"seconds", "peak_bytes"} of the process that did.

    Raises:
        RuntimeError: if there is no library, or it failed.
    """
    found = library()
    if found is None:
        raise RuntimeError("there is no llama_model_quantize: pip install llama-cpp-python, or set LLAMA_LIBRARY=/path/to/libllama.so")
    command = [
        sys.executable,
        "-m",
        "benchmarks._llama_quantize",
        str(found),
        str(source),
        str(target),
        mix,
        str(imatrix or ""),
        str(threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    report: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def main() -> None:
    """What the child process does."""
    path, source, target, mix, imatrix, threads = sys.argv[1:]
    llama = ctypes.CDLL(path)
    llama.llama_model_quantize_default_params.restype = Parameters
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    llama.llama_backend_init()
    parameters: Any = llama.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype, parameters.allow_requantize = int(threads), FILE_TYPES[mix], True
    kept = []
    if imatrix:
        from qtrain.imatrix import read

        entries = read(Path(imatrix)).entries
        rows: Any = (Importance * (len(entries) + 1))()
        for row, (name, entry) in zip(rows, entries.items(), strict=False):
            values = entry.importance().reshape(-1).copy()
            kept.append(values)
            row.name, row.size = name.encode(), values.size
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = ctypes.cast(rows, ctypes.c_void_p)
    started = time.perf_counter()
    status = llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"llama_model_quantize failed with {status}")
    print(json.dumps({"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
