"""The scripts beside the model, and the code that builds and runs engines, on stand-ins: there is no GPU in CI, and none was ever used."""

from __future__ import annotations

import ctypes
import json
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from exporters.base import ReceiptFailed
from exporters.tensorrt import TensorrtExport, build_engine, engine, rtx, scripts

from .small import Small, job, quantized
from .test_tensorrt_rules import linear

SETTINGS: dict[str, Any] = {
    "onnx": "model.onnx",
    "output": "out",
    "profile": {"x": {"min": [1, 64], "opt": [8, 64], "max": [32, 64]}},
    "workspace_gib": 1.5,
    "timing_cache": "timing.cache",
    "logits_nmse": 1e-4,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, its reference and all that lies beside it."""
    import onnx

    onnx.save(linear().model(), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    logits = torch.from_numpy(onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"x": x})[0])
    scripts.write_beside(tmp_path, SETTINGS, ({"x": torch.from_numpy(x)}, logits, logits), "net", "fp16")
    return tmp_path


# -- scripts ---------------------------------------------------------------------------------------------------------


def test_all_files_lie_beside_the_model(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert names == {"model.onnx", "engine.json", "build_engine.sh", "build_engine.py", "reference.npz", "README.md"}
    assert os.access(folder / "build_engine.sh", os.X_OK)
    assert json.loads((folder / "engine.json").read_text()) == SETTINGS
    assert (folder / "build_engine.py").read_text() == Path(build_engine.__file__).read_text()


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_the_shell_script_is_valid(shell: str, folder: Path) -> None:
    assert subprocess.run([shell, "-n", folder / "build_engine.sh"], check=False).returncode == 0


def test_the_shell_script_calls_trtexec_and_says_when_nothing_was_compared(folder: Path, tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    trtexec = bin_folder / "trtexec"
    trtexec.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > arguments\ntouch model.engine\n')
    trtexec.chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}:/usr/bin:/bin"}
    done = subprocess.run(["sh", folder / "build_engine.sh", "--verbose"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "not compared" in done.stderr
    assert (folder / "arguments").read_text().split("\n")[:-1] == [
        "--onnx=model.onnx",
        "--minShapes=x:1x64",
        "--optShapes=x:8x64",
        "--maxShapes=x:32x64",
        "--stronglyTyped",
        "--memPoolSize=workspace:1536",
        "--timingCacheFile=timing.cache",
        "--saveEngine=model.engine",
        "--verbose",
    ]


def test_a_failing_trtexec_fails_the_script(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "trtexec").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "trtexec").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert subprocess.run(["sh", folder / "build_engine.sh"], env=environment, check=False).returncode == 3


def test_names_are_quoted_and_no_profile_or_cache_is_fine() -> None:
    text = scripts.shell_script({**SETTINGS, "profile": {"a b": SETTINGS["profile"]["x"]}, "timing_cache": ""})
    assert "'--minShapes=a b:1x64'" in text and "timingCacheFile" not in text
    assert "Shapes" not in scripts.shell_script({**SETTINGS, "profile": {}})


def test_the_reference_fits_the_profile() -> None:
    assert scripts.reference_rows(4, 1, 32) == [0, 1, 2, 3]
    assert scripts.reference_rows(64, 1, 3) == [0, 1, 2]
    assert scripts.reference_rows(2, 5, 32) == [0, 1, 0, 1, 0]


def test_build_engine_stands_alone_and_says_what_is_missing(folder: Path) -> None:
    py_compile.compile(str(folder / "build_engine.py"), doraise=True)
    source = (folder / "build_engine.py").read_text()
    assert "exporters" not in source and "qtrain" not in source and "torch" not in source
    run = f"runpy.run_path({str(folder / 'build_engine.py')!r}, run_name='__main__')"
    code = f"import sys, runpy; sys.modules['tensorrt'] = None; sys.argv = ['build_engine.py']; {run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install tensorrt-cu13" in done.stderr


# -- building and running, on a stand-in for TensorRT that computes with onnxruntime ------------------------------------------


class FakeCuda:
    """Host memory in place of a GPU's."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}

    def call(self, name: str, *arguments: Any) -> None:
        if name == "cudaFree":
            del self.memory[arguments[0].value]
        if name == "cudaStreamCreate":
            arguments[0]._obj.value = 7

    def allocate(self, size: int) -> ctypes.c_void_p:
        buffer = ctypes.create_string_buffer(max(size, 1))
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        return ctypes.c_void_p(address)

    def copy(self, to: Any, source: Any, size: int, kind: int) -> None:
        ctypes.memmove(to, source, size)


class Fake:
    """The parts of TensorRT's Python API that are used, recording what they are given."""

    __version__ = "11.4.0"
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")

    def __init__(self) -> None:
        self.log: dict[str, Any] = {}
        self.parses = self.builds = True
        self.noise = 0.0

    def nptype(self, dtype: Any) -> Any:
        return dtype

    def Builder(self, logger: Any) -> Any:
        profile = SimpleNamespace(set_shape=lambda name, *shapes: self.log.setdefault("profile", {}).update({name: shapes}))
        cache = SimpleNamespace(serialize=lambda: b"timings")
        config = SimpleNamespace(
            set_memory_pool_limit=lambda pool, size: self.log.update(pool=pool, size=size),
            add_optimization_profile=lambda p: 0,
            create_timing_cache=lambda data: self.log.update(cache=data),
            set_timing_cache=lambda c, ignore: True,
            get_timing_cache=lambda: cache,
        )
        return SimpleNamespace(
            create_network=lambda flags: self.log.update(flags=flags),
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: profile,
            build_serialized_network=lambda network, config: self.log["model"] if self.builds else None,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse(path: str) -> bool:
            self.log["model"] = Path(path).read_bytes()
            return self.parses

        return SimpleNamespace(parse_from_file=parse, num_errors=1, get_error=lambda i: "In node 3 (importFoo): no Foo")

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: _FakeEngine(plan, self.noise) if plan != b"other" else None)


class _FakeEngine:
    def __init__(self, plan: bytes, noise: float) -> None:
        self.session, self.noise = onnxruntime.InferenceSession(plan), noise
        self.values = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self.values)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def get_tensor_name(self, i: int) -> str:
        return self.values[i].name

    def get_tensor_mode(self, name: str) -> str:
        return "in" if any(v.name == name for v in self.session.get_inputs()) else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return np.float32

    def create_execution_context(self) -> Any:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= 32

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shapes["x"][0], 32)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        x = np.ctypeslib.as_array((ctypes.c_float * int(np.prod(self.shapes["x"]))).from_address(self.addresses["x"])).reshape(
            self.shapes["x"]
        )
        out = self.session.run(None, {"x": x})[0] * (1 + self.noise)
        ctypes.memmove(self.addresses["out"], out.ctypes.data, out.nbytes)
        return True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    trt = Fake()
    module = ModuleType("tensorrt")
    for name in (
        "__version__",
        "NetworkDefinitionCreationFlag",
        "MemoryPoolType",
        "TensorIOMode",
        "nptype",
        "Builder",
        "OnnxParser",
        "Runtime",
    ):
        setattr(module, name, getattr(trt, name))
    module.Logger = type("Logger", (), {"WARNING": 2, "__init__": lambda self, severity: None})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(build_engine, "Cuda", FakeCuda)
    return trt


def test_the_engine_is_strongly_typed_with_profile_workspace_and_timing_cache(fake: Fake, folder: Path) -> None:
    result = engine.build_and_compare(folder, SETTINGS)
    assert fake.log["flags"] == 1 << 1 and fake.log["pool"] == "workspace" and fake.log["size"] == int(1.5 * 2**30)
    assert fake.log["profile"] == {"x": ((1, 64), (8, 64), (32, 64))} and fake.log["cache"] == b""
    assert (folder / "timing.cache").read_bytes() == b"timings" and (folder / "model.engine").exists()
    assert result["passed"] and result["nmse"] < 1e-12 and result["examples"] == 8 and result["version"] == "11.4.0"
    engine.build_and_compare(folder, SETTINGS)
    assert fake.log["cache"] == b"timings"


def test_an_engine_that_computes_something_else_does_not_pass(fake: Fake, folder: Path) -> None:
    fake.noise = 0.1
    result = engine.build_and_compare(folder, SETTINGS)
    assert not result["passed"] and result["nmse"] == pytest.approx(0.01, rel=1e-3)


def test_reasons_of_parser_and_builder_are_passed_on(fake: Fake, folder: Path) -> None:
    fake.builds = False
    with pytest.raises(RuntimeError, match="builds no engine"):
        engine.build_and_compare(folder, SETTINGS)
    fake.parses = False
    with pytest.raises(RuntimeError, match="no Foo"):
        engine.build_and_compare(folder, SETTINGS)


def test_a_shape_outside_the_profile_and_a_foreign_engine_are_refused(fake: Fake, folder: Path) -> None:
    plan = (folder / "model.onnx").read_bytes()
    with pytest.raises(RuntimeError, match=r"does not hold x of shape \(33, 64\)"):
        build_engine.Engine(fake, plan, None).run({"x": np.zeros((33, 64), np.float32)})
    with pytest.raises(RuntimeError, match="another GPU or version"):
        build_engine.Engine(fake, b"other", None)


def test_device_memory_is_freed(fake: Fake, folder: Path) -> None:
    runner = build_engine.Engine(fake, (folder / "model.onnx").read_bytes(), None)
    runner.run({"x": np.zeros((2, 64), np.float32)})
    assert runner.cuda.memory == {}


def test_the_cuda_runtime_is_found_beside_the_packages_or_named_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert build_engine.find_cuda_runtime() == str(library)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(RuntimeError, match="libcudart"):
        build_engine.find_cuda_runtime()


# -- what the exporter makes of it -------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> torch.nn.Module:
    from qtrain.grids.affine import Affine

    return quantized(Small(), Affine(bits=8, granularity="channel"))


@pytest.mark.parametrize(("runtime", "package"), [("tensorrt", "tensorrt-cu13"), ("rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13")])
def test_a_runtime_that_needs_a_gpu_is_refused_before_anything_is_written(
    runtime: str, package: str, model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "has_gpu", lambda: False)
    monkeypatch.setattr(rtx, "has_gpu", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"no package .*{package}.* and no CUDA GPU\. Set export\.tensorrt\.runtime=auto"):
        TensorrtExport(runtime=runtime).export(job(model, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_was_not_built_is_never_passed(model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "unavailable", lambda: "no CUDA GPU")
    monkeypatch.setattr(rtx, "unavailable", lambda: "no CUDA GPU")
    checks = TensorrtExport().export(job(model, tmp_path))["receipt"]["checks"]
    assert checks["engine"] == "not built: no CUDA GPU" and checks["rtx"] == "not run: no CUDA GPU"
    assert not (tmp_path / "tensorrt" / "model.engine").exists()
    checks = TensorrtExport(runtime="onnxruntime").export(job(model, tmp_path))["receipt"]["checks"]
    assert checks["engine"].startswith("not built") and "rtx" not in checks


def test_a_built_engine_is_in_the_receipt_and_one_that_differs_leaves_nothing(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {"examples": 4, "nmse": 1e-7, "max_abs": 1e-3, "top1_agreement": 1.0, "passed": True, "version": "11.4.0"}
    monkeypatch.setattr(engine, "unavailable", lambda: "")
    monkeypatch.setattr(engine, "build_and_compare", lambda folder, settings: result)
    assert TensorrtExport().export(job(model, tmp_path))["receipt"]["checks"]["engine"].startswith("passed: TensorRT 11.4.0, nmse 1e-07")
    shutil.rmtree(tmp_path / "tensorrt")
    result.update(nmse=0.5, passed=False)
    with pytest.raises(ReceiptFailed, match=r"engine: TensorRT 11\.4\.0, nmse 0\.5"):
        TensorrtExport().export(job(model, tmp_path))
    assert list(tmp_path.iterdir()) == []

    def broken(folder: Path, settings: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(engine, "build_and_compare", broken)
    with pytest.raises(ReceiptFailed, match="engine: no kernel"):
        TensorrtExport(runtime="auto").export(job(model, tmp_path))
    assert list(tmp_path.iterdir()) == []


# -- TensorRT for RTX --------------------------------------------------------------------------------------------------------


class FakeSession:
    """What `rtx.open_session` returns, on the CPU."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path))
        self.get_inputs, self.get_outputs, self.run = self.session.get_inputs, self.session.get_outputs, self.session.run


def test_rtx_runs_the_file_and_is_compared(model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "unavailable", lambda: "")
    monkeypatch.setattr(rtx, "open_session", lambda path, profile: FakeSession(path))
    checks = TensorrtExport(runtime="rtx").export(job(model, tmp_path))["receipt"]["checks"]
    assert checks["rtx"].startswith("passed: nmse") and checks["engine"].startswith("not built")
    shutil.rmtree(tmp_path / "tensorrt")

    def fails(path: Path, profile: Any) -> Any:
        raise RuntimeError("finds no GPU")

    monkeypatch.setattr(rtx, "open_session", fails)
    with pytest.raises(ReceiptFailed, match="finds no GPU"):
        TensorrtExport(runtime="rtx").export(job(model, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_profile_is_in_the_plugin_s_form() -> None:
    profile = {"ids": {"min": [1, 1], "opt": [8, 64], "max": [32, 512]}, "mask": {"min": [1, 1], "opt": [8, 64], "max": [32, 512]}}
    assert rtx.provider_options(profile) == {
        "nv_profile_min_shapes": "ids:1x1,mask:1x1",
        "nv_profile_opt_shapes": "ids:8x64,mask:8x64",
        "nv_profile_max_shapes": "ids:32x512,mask:32x512",
    }
    assert rtx.provider_options({}) == {}


def test_the_plugin_is_registered_once_and_never_falls_back_to_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[str, str]] = []
    options: list[Any] = []
    device = SimpleNamespace(ep_name="NvTensorRTRTXExecutionProvider")
    plugin = ModuleType(rtx.PLUGIN)
    plugin.get_ep_name = lambda: device.ep_name  # type: ignore[attr-defined]
    plugin.get_library_path = lambda: "/lib/plugin.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, rtx.PLUGIN, plugin)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *given: registered.append(given))
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [device] if registered else [])

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_provider_for_devices(self, devices: Any, given: dict[str, str]) -> None:
            options.append((devices, given, self.get_session_config_entry("session.disable_cpu_ep_fallback")))

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, given: "session")
    for _ in range(2):
        assert rtx.open_session(folder / "model.onnx", SETTINGS["profile"]) == "session"
    assert registered == [(device.ep_name, "/lib/plugin.so")]
    assert options[0][0] == [device] and options[0][1]["nv_profile_max_shapes"] == "x:32x64" and options[0][2] == "1"


def test_no_supported_gpu_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = ModuleType(rtx.PLUGIN)
    plugin.get_ep_name, plugin.get_library_path = (lambda: "NvTensorRTRTXExecutionProvider"), (lambda: "x")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, rtx.PLUGIN, plugin)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *given: None)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", list)
    with pytest.raises(RuntimeError, match="RTX 30 or newer"):
        rtx.open_session(folder / "model.onnx", {})


def test_int8_products_are_counted_in_the_builder_s_list_of_layers() -> None:
    """Lines as TensorRT for RTX 1.7.1 prints them."""

    def line(kind: str, dtype: str) -> str:
        tensor = f"{{ Name: t, Dimensions: [8,64], Strides: [64,1], StrideOrder: [1,0], Datatype: {dtype}, Format: (Linear) Row major }}"
        return f"Name: n, LayerType: {kind}, Inputs: [ {tensor}], Constants: [ {tensor}], Outputs: [ {tensor}], TacticName: , StreamId: 0"

    text = "\n".join(["Layers:", line("kgen", "Int8"), line("gemm", "Int8"), line("correlation", "Int8"), line("gemm", "Half")])
    assert rtx.int8_products(text) == 2


def test_compiling_needs_no_gpu(folder: Path) -> None:
    trt = rtx.compiler()
    if trt is None:
        pytest.skip("TensorRT for RTX is not installed (pip install tensorrt-rtx-cu13)")
    plan, int8 = rtx.compile_ahead(trt, folder / "model.onnx", SETTINGS["profile"])
    assert len(plan) > 10_000 and int8 == 1


def test_the_build_script_s_calls_are_those_of_nvidia_s_builder(folder: Path) -> None:
    """TensorRT for RTX has TensorRT's Python API; told which GPU to build for, its builder needs none."""
    trt = rtx.compiler()
    if trt is None:
        pytest.skip("TensorRT for RTX is not installed (pip install tensorrt-rtx-cu13)")

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.builder = trt.Builder(logger)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.builder, name)

        def create_builder_config(self) -> Any:
            config = self.builder.create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.SM89, 0)
            return config

    api = SimpleNamespace(**{n: getattr(trt, n) for n in dir(trt)} | {"Builder": Builder})
    plan = build_engine.build(api, folder / "model.onnx", SETTINGS, trt.Logger(trt.Logger.ERROR))
    assert len(plan) > 10_000 and (folder / "timing.cache").stat().st_size > 0
    assert all(trt.nptype(getattr(trt, name)) for name in ("int64", "float32", "float16", "int32"))


# -- with a GPU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_an_engine_on_a_gpu(model: torch.nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    entry = TensorrtExport(runtime="tensorrt").export(job(model, tmp_path))
    assert entry["receipt"]["checks"]["engine"].startswith("passed") and (tmp_path / "tensorrt" / "model.engine").exists()
    assert subprocess.run([sys.executable, tmp_path / "tensorrt" / "build_engine.py"], check=False).returncode == 0


@pytest.mark.gpu
def test_rtx_on_a_gpu(model: torch.nn.Module, tmp_path: Path) -> None:
    pytest.importorskip(rtx.PLUGIN)
    entry = TensorrtExport(runtime="rtx").export(job(model, tmp_path))
    assert entry["receipt"]["checks"]["rtx"].startswith("passed")
