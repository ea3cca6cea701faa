"""TensorRT: a strongly typed ONNX network in int8, float16 and float32, the engine where a GPU is, and what builds it elsewhere.

What is written, always:

    model.onnx                        opset 21; its types are the precisions (TensorRT 10.12 deprecated and 11 removed all other ways)
    build_engine.sh, build_engine.py  make the engine on the target machine, with trtexec or with TensorRT's Python package
    engine.json, reference.npz        optimization profile, workspace and timing cache; inputs and logits to compare the engine with
    model.engine                      where package `tensorrt` and a CUDA GPU are here

Int8 is explicit quantization: QuantizeLinear and DequantizeLinear pairs with float32 scales, symmetric, one scale per activation tensor,
one per output channel of a weight (`layout.py`). Those pairs and the products between them are typed float32, since scales are float32 in
training and rounding one to float16 would be another grid; TensorRT computes them on int8 all the same. A grid trained with
scale_dtype=float16 stays as exact, and lets weight-only layers decode in float16. Everything else is float16 unless its values do not fit
(`precision.py`), with the list of nodes that stay in float32 in the receipt.

What the receipt means. Without a GPU nothing of TensorRT computes anything: onnxruntime on the CPU computes what the file says. Each check
stands under `checks` with what it did, and what did not run says so:

    onnx_checker, shape_inference     the file is valid ONNX, strictly typed
    qdq_lint                          TensorRT's rules (`rules.py`)
    packed_tensors                    codes and scales on disk, decoded by onnxruntime, are training's to the bit
    fp16_parity                       logits with every float16 tensor rounded, against float32, at rtol = atol = 5e-3
    rtx_compile                       NVIDIA's own parser and builder took the file (package tensorrt-rtx-cu13, on the CPU), with how many
                                      products read int8; not run
    engine, rtx                       built, run and compared on a GPU; else "not built: <why>" and "not run: <why>"

**Never run on hardware**: the engine, `runtime=rtx`, and what both scripts do on a GPU; there was none. They follow NVIDIA's documentation;
the builder's calls ran on TensorRT for RTX's builder, which has the same API and needs no GPU. What TensorRT's kernels do differently from
the reference: they multiply by the reciprocal of a scale where ONNX divides, so that a value exactly between two codes may go to the other
one; and fused kernels round to float16 less often.

What it cannot do: asymmetric, dynamic, per-token or grouped activations; groups other than int4's 64 and 128; scales with a sign; dynamic
axes other than batch and sequence; opset 23's float32 scales on float16 tensors without casts (onnxruntime 1.31 does not run those).

Sources: NVIDIA TensorRT documentation ("Working with Quantized Types", "Explicit Quantization", "Strongly Typed Networks", "Migrating from
TensorRT 10.x to 11.x"), onnx-tensorrt's operators.md and importer, NVIDIA ModelOpt (AutoCast, int8 placement).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.base import (
    Artefact,
    Exporter,
    ExportJob,
    Inputs,
    activation_modules,
    packed_activations,
    packed_layers,
    packed_weights,
    quantizes_activations,
    standalone_activations,
)
from qtrain.receipt import Latency
from qtrain.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from exporters.tensorrt.check import Checks
    from qtrain.receipt import Receipt

OPSET = 21
PRECISIONS = ("fp16", "fp32")
RUNTIMES = ("auto", "tensorrt", "rtx", "onnxruntime")
MEASURED_EXAMPLES = 256
"""Examples of the test split on which the ranges of all values are measured."""
REFERENCE_EXAMPLES = 32
"""Examples in reference.npz at most."""


@dataclass
class TensorrtArtefact(Artefact):
    """What was written, and what was checked while it was."""

    checks: Checks = None  # type: ignore[assignment]
    settings: dict[str, Any] = field(default_factory=dict)
    """What engine.json holds."""


@register("export", "tensorrt")
@dataclass
class TensorrtExport(Exporter):
    """A strongly typed network for TensorRT: int8 on training's grids, float16 around them."""

    precision: str = "fp16"
    """Type of what has no codes: fp16 (float32 where float16 does not hold the values), or fp32."""
    data_max: float = 512.0
    """Nodes that see values beyond this stay in float32; float16 numbers above 512 are at least 0.5 apart."""
    rtol: float = 5e-3
    """Relative tolerance of each logit of the float16 network against float32."""
    atol: float = 5e-3
    """Absolute tolerance of each logit."""
    min_batch: int = 1
    """Smallest batch that the engine takes, examples."""
    opt_batch: int = 8
    """Batch that the engine is tuned for."""
    max_batch: int = 32
    """Largest batch."""
    min_length: int = 1
    """Shortest sequence that the engine takes, tokens; of models with a sequence axis."""
    opt_length: int | None = None
    """Sequence length that the engine is tuned for; null is 64, or the longest if that is less."""
    max_length: int | None = None
    """Longest sequence; null is the model's longest."""
    workspace_gib: float = 4.0
    """Memory that TensorRT may use for one layer while it builds, GiB."""
    timing_cache: str = "timing.cache"
    """File beside the model that keeps TensorRT's timings, so that a second build is quick; empty keeps none."""
    runtime: str = "auto"
    """auto (build and run what this machine can), tensorrt (demand it), rtx (demand TensorRT for RTX), onnxruntime (build nothing)."""

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("runtime", self.runtime, RUNTIMES)
        batches = (self.min_batch, self.opt_batch, self.max_batch)
        if not 1 <= batches[0] <= batches[1] <= batches[2]:
            raise ValueError(
                f"export.tensorrt.min_batch, opt_batch and max_batch are {', '.join(map(str, batches))}; they must be at least 1 "
                "and ascend. Set export.tensorrt.max_batch=32, say."
            )
        for name, least in {"data_max": 0.0, "workspace_gib": 0.0, "rtol": -1e-30, "atol": -1e-30}.items():
            value = getattr(self, name)
            if not value > least:
                valid, default = "positive" if least == 0 else "0 or more", type(self).__dataclass_fields__[name].default
                raise ValueError(f"export.tensorrt.{name} is {value}; it must be {valid}. Set export.tensorrt.{name}={default}, say.")
        if "/" in self.timing_cache or "\\" in self.timing_cache:
            raise ValueError(
                f"export.tensorrt.timing_cache is {self.timing_cache!r}; it names a file beside the model, without a folder. "
                "Set export.tensorrt.timing_cache=timing.cache, say, or '' for none."
            )

    # -- what the base class asks ------------------------------------------------------------------------------------

    @property
    def runtime_version(self) -> str:
        """What computes the receipt; see `checks` for the engine."""
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"

    def refuse(self, model: nn.Module) -> None:
        """As the base class does; and a runtime that needs a GPU is refused where there is none.

        Raises:
            ValueError: naming what is missing.
        """
        from exporters.tensorrt import engine, rtx

        missing = {"tensorrt": engine.unavailable, "rtx": rtx.unavailable}.get(self.runtime, lambda: "")()
        if missing:
            raise ValueError(
                f"export.tensorrt.runtime={self.runtime} builds and runs on this machine, which has {missing}. "
                "Set export.tensorrt.runtime=auto to write the network and the scripts that build its engine elsewhere"
            )
        super().refuse(model)

    def refusals(self, model: nn.Module) -> list[str]:
        import torch

        from exporters.onnx.layout import Refused
        from exporters.tensorrt.layout import plan, refused_activation

        found = []
        for name, layer in packed_layers(model).items():
            try:
                plan(layer)
            except Refused as why:
                found.append(f"{name} ({layer.quantized.grid.describe()}): {why}")
        for name, module in standalone_activations(model).items():
            if why := refused_activation(module):
                found.append(f"{name} ({module.grid.describe()}): {why}")
        half = [n for n, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)]
        if half:
            dtype = model.get_parameter(half[0]).dtype
            found.append(f"{half[0]} and {len(half) - 1} more are {dtype}; float16 is chosen here, from float32: model.float()")
        return found

    def write(self, job: ExportJob, folder: Path) -> TensorrtArtefact:
        """Write the network and what lies beside it, and check what needs no runtime."""
        from exporters.onnx.write import save
        from exporters.tensorrt import precision, reference
        from exporters.tensorrt.check import Checks, check_file, check_parity

        checks, fallbacks = Checks(), []
        graph = self._graph(job)
        ranges = self.ranges(graph, job.max_length)
        single = graph
        if self.precision == "fp16":
            single = graph.clone()
            measured = reference.measure(single, reference.first_examples(job.batches, MEASURED_EXAMPLES))
            report = precision.to_half(graph, measured, self.data_max)
            fallbacks += _kept(report.kept)
            checks.passed("precision", _summary(report))
        path = folder / "model.onnx"
        files = save(graph, path)
        settings = self._settings(job, path, _profile(graph, ranges))
        usual = {axis: sizes[1] for axis, sizes in ranges.items()}
        check_file(path, usual, settings["profile"], self.runtime != "onnxruntime", checks)
        if self.precision == "fp16":
            activations = quantizes_activations(job.model)
            check_parity(path, single, job.batches, job.training_logits, activations, self.rtol, self.atol, checks)
        else:
            checks.not_run("fp16_parity", "precision=fp32")
        self._write_beside(job, folder, settings)
        return TensorrtArtefact(path, files, fallbacks=fallbacks + checks.advice, checks=checks, settings=settings)

    def _graph(self, job: ExportJob) -> Any:
        """The float32 network with all codes in."""
        import qtrain
        from exporters.onnx import trace
        from exporters.onnx.write import metadata_of
        from exporters.tensorrt.layout import plan
        from exporters.tensorrt.lower import lower
        from exporters.tensorrt.precision import normalize

        layers = packed_layers(job.model)
        graph = trace.trace(job.model, job.example_inputs, job.max_length, OPSET)
        lower(graph, layers, activation_modules(job.model), {name: plan(layer) for name, layer in layers.items()})
        normalize(graph)
        metadata = metadata_of(layers, job.metadata, qtrain.__version__)
        metadata.pop("qtrain.session_config", None)  # of another runtime
        graph.producer_name = "qtrain"
        graph.metadata_props.clear()
        graph.metadata_props.update(metadata)
        return graph

    def _settings(self, job: ExportJob, path: Path, profile: dict[str, Any]) -> dict[str, Any]:
        """What engine.json holds."""
        tolerances = self.tolerances.for_activations() if quantizes_activations(job.model) else self.tolerances
        return {
            "onnx": path.name,
            "output": "logits",
            "profile": profile,
            "workspace_gib": self.workspace_gib,
            "timing_cache": self.timing_cache,
            "logits_nmse": tolerances.logits_nmse,
        }

    def _write_beside(self, job: ExportJob, folder: Path, settings: dict[str, Any]) -> None:
        from exporters.tensorrt import reference, scripts

        inputs, labels = job.batches[0]
        rows = scripts.reference_rows(len(labels), self.min_batch, min(REFERENCE_EXAMPLES, self.max_batch))
        inputs = {name: x[rows] for name, x in inputs.items()}
        computed = reference.logits(folder / settings["onnx"], [(inputs, labels[rows])])
        name = job.metadata.get("recipe", "quantized model")
        scripts.write_beside(folder, settings, (inputs, job.training_logits.cpu()[rows], computed), name, self.precision)

    def packed(self, model: nn.Module) -> dict[str, Callable[[], Tensor]]:
        return packed_weights(model) | packed_activations(model)

    def activations(self, path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        from exporters.tensorrt import reference

        return reference.activations(path, inputs)

    def tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        from exporters.tensorrt import reference

        return reference.tensors(path)

    def products(self, path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        from exporters.tensorrt import reference

        return reference.products(path, inputs)

    def session(self, path: Path) -> Any:
        """An `onnxruntime.InferenceSession` that computes what the file says."""
        from exporters.tensorrt import reference

        return reference.open_session(path)

    def logits(self, path: Path, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
        from exporters.tensorrt import reference

        return reference.logits(path, batches)

    def latency(self, artefact: Artefact, job: ExportJob) -> Latency:
        """None: the CPU's time says nothing about TensorRT's; trtexec prints the engine's."""
        return {}

    # -- shapes and receipt ------------------------------------------------------------------------------------------

    def lengths(self, longest: int) -> tuple[int, int, int]:
        """Shortest, tuned and longest sequence of a model that takes up to ``longest`` tokens.

        Raises:
            ValueError: if they do not ascend, or exceed the model's longest.
        """
        most = longest if self.max_length is None else self.max_length
        best = min(64, most) if self.opt_length is None else self.opt_length
        if not 1 <= self.min_length <= best <= most <= longest:
            raise ValueError(
                f"export.tensorrt.min_length, opt_length and max_length are {self.min_length}, {best} and {most}; they must be at least 1, "
                f"ascend and not exceed the model's {longest} tokens. Set export.tensorrt.max_length={longest}, say."
            )
        return self.min_length, best, most

    def ranges(self, graph: Any, longest: int) -> dict[str, tuple[int, int, int]]:
        """Smallest, usual and largest size of every dynamic axis of the inputs.

        Raises:
            ValueError: for a dynamic axis that is neither batch nor sequence, naming it.
        """
        found: dict[str, tuple[int, int, int]] = {}
        for value in graph.graph.inputs:
            for axis in (str(d.value) for d in value.shape if not isinstance(d, int)):
                if axis not in ("batch", "sequence"):
                    raise ValueError(
                        f"input {value.name} has the dynamic axis {axis}, and TensorRT needs a smallest, usual and largest size of each; "
                        "export.tensorrt has ranges for batch and sequence. Give inputs of one size on that axis"
                    )
                found[axis] = (self.min_batch, self.opt_batch, self.max_batch) if axis == "batch" else self.lengths(longest)
        return found

    def _receipt(self, job: ExportJob, artefact: Artefact) -> Receipt:
        assert isinstance(artefact, TensorrtArtefact)
        receipt = super()._receipt(job, artefact)
        checks = artefact.checks
        exact = f"{receipt.tensors_bit_exact} of {receipt.tensors} tensors are bit-exact"
        if receipt.tensors == receipt.tensors_bit_exact:
            checks.passed("packed_tensors", f"{exact}, decoded by onnxruntime")
        else:
            checks.results["packed_tensors"] = f"failed: {exact}"  # each is a failure of the receipt already
        if checks.failures or receipt.failures:
            checks.results["engine"] = "not built: other checks failed"
        else:
            self._engine(job, artefact)
        receipt.checks = checks.results
        receipt.failures += checks.failures
        return receipt

    def _engine(self, job: ExportJob, artefact: TensorrtArtefact) -> None:
        """Build and run the engine, or say why not."""
        from exporters.tensorrt import engine, rtx

        checks, folder = artefact.checks, artefact.path.parent
        if self.runtime == "onnxruntime":
            checks.results["engine"] = "not built: export.tensorrt.runtime=onnxruntime"
            return
        if self.runtime == "rtx":
            self._run_rtx(job, artefact)
            return
        if missing := engine.unavailable():
            checks.results["engine"] = f"not built: {missing}"
            if not (absent := rtx.unavailable()):
                self._run_rtx(job, artefact)
            else:
                checks.not_run("rtx", absent)
            return
        try:
            result = engine.build_and_compare(folder, artefact.settings)
        except (RuntimeError, ImportError) as error:
            checks.failed("engine", str(error))
            return
        what = (
            f"TensorRT {result['version']}, nmse {result['nmse']:.2g} against training on {result['examples']} examples, "
            f"largest difference {result['max_abs']:.2g}"
        )
        if result["passed"]:
            checks.passed("engine", what)
        else:
            checks.failed("engine", f"{what}; the tolerance is {artefact.settings['logits_nmse']:g}")

    def _run_rtx(self, job: ExportJob, artefact: TensorrtArtefact) -> None:
        """Run the file with TensorRT for RTX and compare."""
        import numpy as np

        from exporters.tensorrt import build_engine, rtx

        checks = artefact.checks
        checks.results.setdefault("engine", "not built: TensorRT for RTX makes its own when the file is loaded")
        try:
            session = rtx.open_session(artefact.path, artefact.settings["profile"])
            runner = rtx.Runner(session)
            with np.load(artefact.path.parent / "reference.npz") as stored:
                result = build_engine.compare(runner, dict(stored), artefact.settings)
        except Exception as error:  # whatever onnxruntime or the plugin raises
            checks.failed("rtx", f"TensorRT for RTX does not run the file: {error}")
            return
        what = f"nmse {result['nmse']:.2g} against training on {result['examples']} examples, largest difference {result['max_abs']:.2g}"
        (checks.passed if result["passed"] else checks.failed)("rtx", what)


def _profile(graph: Any, ranges: dict[str, tuple[int, int, int]]) -> dict[str, dict[str, list[int]]]:
    """min, opt and max shape of every input that has a dynamic axis."""
    found = {}
    for value in graph.graph.inputs:
        axes = [d if isinstance(d, int) else str(d.value) for d in value.shape]
        if any(isinstance(a, str) for a in axes):
            sizes = enumerate(("min", "opt", "max"))
            found[str(value.name)] = {which: [ranges[a][i] if isinstance(a, str) else a for a in axes] for i, which in sizes}
    return found


def _one_of(name: str, given: str, valid: tuple[str, ...]) -> None:
    if given not in valid:
        raise ValueError(f"export.tensorrt.{name} is {given!r}; valid: {', '.join(valid)}. Set export.tensorrt.{name}={valid[0]}, say.")


def _kept(kept: list[Any]) -> list[dict[str, str]]:
    """All nodes that stay in float32, one entry per operator and reason, with the largest magnitude among them."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for one in kept:
        groups.setdefault((one.op, one.why), []).append(one)
    found = []
    for (op, why), nodes in groups.items():
        largest = max((n.maximum for n in nodes if n.maximum is not None), default=None)
        seen = "" if largest is None else f" (largest magnitude {largest:.4g})"
        found.append({"name": ", ".join(n.node for n in nodes), "why": f"{op} stays in float32: {why}{seen}"})
    return found


def _summary(report: Any) -> str:
    lost = sum(report.underflow.values())
    text = f"{report.halves} nodes in float16, {len(report.kept)} kept in float32 for their values, {report.on_codes} on codes"
    text += f", {report.casts} casts"
    return text + (f"; {lost} constants of {len(report.underflow)} tensors become 0 in float16" if lost else "")
