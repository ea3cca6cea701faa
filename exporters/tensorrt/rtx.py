"""TensorRT for RTX, from pip: a second way to run the file on a GPU, and a way to compile it without one.

    run        onnxruntime with the plugin of onnxruntime-ep-nv-tensorrt-rtx-cu13: NvTensorRTRTXExecutionProvider, on an RTX GPU (Ampere or
               newer). The session refuses to fall back to the CPU, so that what passes ran on the GPU.
    compile    package tensorrt-rtx-cu13: NVIDIA's ONNX parser and builder make an engine for given GPU architectures ahead of time, on the
               CPU, with no driver. That proves that TensorRT's parser reads the file and that strongly typed kernels exist for it; it
               computes nothing.

Compiling was tried with 1.7.1 (tests do it where the package is installed). Running was never tried, for want of a GPU; it follows the
packages' own documentation (onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0: registration, provider options) and onnxruntime's of plugin
execution providers.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from exporters.tensorrt.engine import has_gpu

PLUGIN, PLUGIN_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13"
COMPILERS = ("tensorrt_rtx", "tensorrt_rtx_bindings")
"""Modules that hold the builder: the package's front, or the bindings alone."""
TARGETS = ("SM86", "SM89", "SM120")
"""Architectures to compile for: RTX 30, 40 and 50."""

Profile = dict[str, dict[str, list[int]]]
"""Input -> {"min", "opt", "max"} -> shape."""


def unavailable() -> str:
    """Why the file cannot be run by TensorRT for RTX here; empty where it can."""
    missing = [] if importlib.util.find_spec(PLUGIN) else [f"no package {PLUGIN_PACKAGE}"]
    if not has_gpu():
        missing.append("no CUDA GPU")
    return " and ".join(missing)


def open_session(path: Path, profile: Profile) -> Any:
    """An `onnxruntime.InferenceSession` on the GPU.

    Raises:
        RuntimeError: if the plugin finds no GPU that it supports.
    """
    import onnxruntime

    plugin = importlib.import_module(PLUGIN)
    name = plugin.get_ep_name()
    if not any(d.ep_name == name for d in onnxruntime.get_ep_devices()):
        onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == name]
    if not devices:
        raise RuntimeError(f"{name} finds no GPU that it supports (RTX 30 or newer)")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices[:1], provider_options(profile))
    return onnxruntime.InferenceSession(str(path), options)


class Runner:
    """A session with the interface of `build_engine.Engine`."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name."""
        names = [o.name for o in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {i.name: inputs[i.name] for i in self.session.get_inputs()}), strict=True))


def provider_options(profile: Profile) -> dict[str, str]:
    """Options of the execution provider: the optimization profile."""

    def shapes(which: str) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, given[which]))}" for name, given in profile.items())

    return {f"nv_profile_{which}_shapes": shapes(which) for which in ("min", "opt", "max")} if profile else {}


def compiler() -> ModuleType | None:
    """TensorRT for RTX's builder, where it is installed."""
    for name in COMPILERS:
        if importlib.util.find_spec(name):
            return importlib.import_module(name)
    return None


class Rejected(ValueError):
    """TensorRT's parser or builder does not take the file."""


def compile_ahead(trt: Any, path: Path, profile: Profile, targets: tuple[str, ...] = TARGETS) -> tuple[bytes, int]:
    """The engine for ``targets``, made on the CPU, and how many of its products read int8.

    Raises:
        Rejected: with the reasons of the parser or the builder.
    """
    messages: list[str] = []
    layers: list[str] = []
    logger = _logger(trt, messages, layers)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        reasons = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise Rejected("its ONNX parser: " + "; ".join(reasons or messages))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the log lists the layers
    known = [t for t in targets if t in trt.ComputeCapability.__members__]
    config.num_compute_capabilities = len(known)
    for i, target in enumerate(known):
        config.set_compute_capability(trt.ComputeCapability.__members__[target], i)
    shapes = builder.create_optimization_profile()
    for name, given in profile.items():
        shapes.set_shape(name, tuple(given["min"]), tuple(given["opt"]), tuple(given["max"]))
    if profile and config.add_optimization_profile(shapes) < 0:
        raise Rejected(f"its builder refuses the profile {profile}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Rejected("its builder: " + ("; ".join(messages) or "no reason given"))
    return bytes(plan), sum(int8_products(text) for text in layers[:1])


def int8_products(layers: str) -> int:
    """How many convolutions and matrix products in the builder's list of layers read an int8 tensor."""
    products = re.findall(r"LayerType: (?:gemm|correlation|runtime_fusion|fc), Inputs: (.*?), Constants:", layers)
    return sum("Datatype: Int8" in inputs for inputs in products)


def _logger(trt: Any, messages: list[str], layers: list[str]) -> Any:
    class Errors(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors and the list of layers, prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                messages.append(message)
            elif message.startswith("Layers:"):
                layers.append(message)

    return Errors()
