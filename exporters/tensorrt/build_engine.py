#!/usr/bin/env python3
"""Build the TensorRT engine of the model beside this file, run it, and compare it with the reference outputs.

    python build_engine.py                   writes model.engine, prints the comparison, exits 1 if it is beyond the tolerance
    python build_engine.py --skip-check      builds only

Engines are made for one GPU and one TensorRT version, so this runs on the machine that will use the engine. It needs that GPU, numpy and
the package `tensorrt` 10.12 or newer (pip install tensorrt-cu13; strong typing is always on from 11.0). The CUDA runtime library comes with
that package. `engine.json` says what to build: optimization profile, workspace limit, timing cache, tolerance. `reference.npz` holds inputs
and the logits that training and onnxruntime computed from them.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
GIB = 1 << 30


# -- building --------------------------------------------------------------------------------------------------------


def build(trt: Any, model: Path, settings: dict[str, Any], logger: Any) -> bytes:
    """The serialized engine of an ONNX file, strongly typed.

    Raises:
        RuntimeError: with the parser's or the builder's reasons.
    """
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        reasons = "\n  ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeError(f"TensorRT {trt.__version__} does not read {model}:\n  {reasons}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(settings["workspace_gib"] * GIB))
    profile = builder.create_optimization_profile()
    for name, shapes in settings["profile"].items():
        profile.set_shape(name, tuple(shapes["min"]), tuple(shapes["opt"]), tuple(shapes["max"]))
    if settings["profile"] and config.add_optimization_profile(profile) < 0:
        raise RuntimeError(f"TensorRT {trt.__version__} does not take the optimization profile {settings['profile']}")
    cache_file = model.parent / settings["timing_cache"] if settings["timing_cache"] else None
    if cache_file is not None:
        cache = config.create_timing_cache(cache_file.read_bytes() if cache_file.exists() else b"")
        config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"TensorRT {trt.__version__} builds no engine from {model}; its log above says why")
    if cache_file is not None:
        cache_file.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


# -- running ---------------------------------------------------------------------------------------------------------


class Cuda:
    """The few calls of the CUDA runtime that inference needs."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(find_cuda_runtime())
        self.library.cudaGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the runtime.

        Raises:
            RuntimeError: with CUDA's message.
        """
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name}: {self.library.cudaGetErrorString(code).decode()}")

    def devices(self) -> int:
        """How many GPUs there are.

        Raises:
            RuntimeError: if there is no driver.
        """
        count = ctypes.c_int()
        self.call("cudaGetDeviceCount", ctypes.byref(count))
        return count.value

    def allocate(self, size: int) -> ctypes.c_void_p:
        """Device memory of ``size`` bytes, at least one."""
        pointer = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return pointer

    def copy(self, to: Any, source: Any, size: int, kind: int) -> None:
        """Copy ``size`` bytes."""
        self.call("cudaMemcpy", to, source, ctypes.c_size_t(size), ctypes.c_int(kind))


def find_cuda_runtime() -> str:
    """Path or name of libcudart: of the system, or of the wheels beside this Python's packages.

    Raises:
        RuntimeError: if there is none.
    """
    folders = [Path(p) for p in sys.path if p]
    names = ("libcudart.so*", "cudart64*.dll")
    patterns = [f"nvidia/{part}/{where}/{name}" for part in ("cu*", "cuda_runtime") for where in ("lib", "bin") for name in names]
    for folder in folders:
        for pattern in patterns:
            for found in sorted(folder.glob(pattern), reverse=True):
                return str(found)
    system = ctypes.util.find_library("cudart")
    if system is None:
        raise RuntimeError("the CUDA runtime library (libcudart) was not found; pip install nvidia-cuda-runtime, or install CUDA")
    return system


class Engine:
    """An engine on the first GPU."""

    def __init__(self, trt: Any, plan: bytes, logger: Any) -> None:
        self.trt, self.cuda = trt, Cuda()
        self.runtime = trt.Runtime(logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise RuntimeError(f"TensorRT {trt.__version__} cannot load the engine; it was built for another GPU or version")
        self.context = self.engine.create_execution_context()

    def run(self, inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name.

        Raises:
            RuntimeError: if a shape is outside the profile, or CUDA fails.
        """
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        given = {n for n in names if self.engine.get_tensor_mode(n) == self.trt.TensorIOMode.INPUT}
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for name in given:
            array = np.ascontiguousarray(inputs[name], dtype=self.trt.nptype(self.engine.get_tensor_dtype(name)))
            if not self.context.set_input_shape(name, array.shape):
                raise RuntimeError(f"the engine's profile does not hold {name} of shape {array.shape}; see engine.json")
            arrays[name] = array
        for name in names:
            if name not in given:
                shape = tuple(self.context.get_tensor_shape(name))
                arrays[name] = np.empty(shape, dtype=self.trt.nptype(self.engine.get_tensor_dtype(name)))
        pointers = {n: self.cuda.allocate(a.nbytes) for n, a in arrays.items()}
        try:
            self._execute(arrays, pointers, given)
        finally:
            for pointer in pointers.values():
                self.cuda.call("cudaFree", pointer)
        return {n: a for n, a in arrays.items() if n not in given}

    def _execute(self, arrays: dict[str, np.ndarray[Any, Any]], pointers: dict[str, ctypes.c_void_p], given: set[str]) -> None:
        stream = ctypes.c_void_p()
        self.cuda.call("cudaStreamCreate", ctypes.byref(stream))
        try:
            for name, array in arrays.items():
                self.context.set_tensor_address(name, int(pointers[name].value or 0))
                if name in given:
                    self.cuda.copy(pointers[name], array.ctypes.data_as(ctypes.c_void_p), array.nbytes, HOST_TO_DEVICE)
            if not self.context.execute_async_v3(int(stream.value or 0)):
                raise RuntimeError("TensorRT did not run the engine; its log above says why")
            self.cuda.call("cudaStreamSynchronize", stream)
            for name, array in arrays.items():
                if name not in given:
                    self.cuda.copy(array.ctypes.data_as(ctypes.c_void_p), pointers[name], array.nbytes, DEVICE_TO_HOST)
        finally:
            self.cuda.call("cudaStreamDestroy", stream)


# -- comparing -------------------------------------------------------------------------------------------------------


def compare(engine: Any, reference: dict[str, np.ndarray[Any, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """How far the engine's logits are from the reference.

    Returns:
        `examples`, `nmse` (against training), `max_abs` (against training), `top1_agreement`, `passed`.
    """
    inputs = {n.removeprefix("input."): a for n, a in reference.items() if n.startswith("input.")}
    logits = np.asarray(engine.run(inputs)[settings["output"]], dtype=np.float64)
    training = reference["training"].astype(np.float64)
    energy = float((training**2).sum())
    error = float(((logits - training) ** 2).sum()) / energy if energy else float(np.abs(logits).max(initial=0.0))
    return {
        "examples": len(training),
        "nmse": error,
        "max_abs": float(np.abs(logits - training).max(initial=0.0)),
        "top1_agreement": float((logits.argmax(-1) == training.argmax(-1)).mean()),
        "passed": bool(error <= settings["logits_nmse"]),
    }


def main() -> int:
    """Build, save, compare."""
    parser = argparse.ArgumentParser(description="Build and check the TensorRT engine of the model beside this file.")
    parser.add_argument("--skip-check", action="store_true", help="build only")
    parser.add_argument("--engine", type=Path, help="use this engine instead of building one")
    arguments = parser.parse_args()
    try:
        import tensorrt
    except ImportError:
        print("there is no package tensorrt; pip install tensorrt-cu13 (or -cu12, as the driver has it)", file=sys.stderr)
        return 2
    folder = Path(__file__).resolve().parent
    settings = json.loads((folder / "engine.json").read_text())
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    if arguments.engine:
        plan = arguments.engine.read_bytes()
    else:
        plan = build(tensorrt, folder / settings["onnx"], settings, logger)
        (folder / "model.engine").write_bytes(plan)
        print(f"wrote {folder / 'model.engine'} ({len(plan):,} bytes, TensorRT {tensorrt.__version__})")
    if arguments.skip_check:
        return 0
    with np.load(folder / "reference.npz") as stored:
        result = compare(Engine(tensorrt, plan, logger), dict(stored), settings)
    print(json.dumps({**result, "tolerance": settings["logits_nmse"]}, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
