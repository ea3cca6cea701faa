"""The engine itself, where this machine can make one: package `tensorrt` and a CUDA GPU. Built and run by `build_engine.py`'s functions.

Never run on hardware by its authors: there was no GPU. The calls are those of NVIDIA's documentation (TensorRT Python API 10.12 and 11),
and the names were found in the bindings of tensorrt-cu13 11.4.0. The builder's part ran on TensorRT for RTX 1.7.1, which has the same API
and builds without a GPU; the CUDA runtime's part ran up to its error that there is no driver; the rest ran on a stand-in for TensorRT.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from exporters.tensorrt import build_engine


def unavailable() -> str:
    """Why no engine can be built here; empty where one can."""
    missing = [] if importlib.util.find_spec("tensorrt") else ["no package tensorrt (pip install tensorrt-cu13)"]
    if not has_gpu():
        missing.append("no CUDA GPU")
    return " and ".join(missing)


def has_gpu() -> bool:
    """Whether there is a GPU that CUDA can use."""
    import torch

    return torch.cuda.is_available()


def build_and_compare(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Build the engine of ``folder``, run it on the reference inputs there, and compare; the engine is kept as model.engine.

    Returns:
        What `build_engine.compare` returns, and `version`.

    Raises:
        RuntimeError: with TensorRT's reasons.
    """
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    plan = build_engine.build(tensorrt, folder / settings["onnx"], settings, logger)
    (folder / "model.engine").write_bytes(plan)
    with np.load(folder / "reference.npz") as stored:
        result = build_engine.compare(build_engine.Engine(tensorrt, plan, logger), dict(stored), settings)
    return {**result, "version": tensorrt.__version__}
