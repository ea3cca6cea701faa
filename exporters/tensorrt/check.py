"""What can be shown about a file without a GPU, each check by name: "passed: ..." for what ran, "not run: <why>" for what did not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from exporters.base import Inputs
from exporters.tensorrt import reference, rtx
from exporters.tensorrt.precision import normalize
from exporters.tensorrt.rtx import Profile
from exporters.tensorrt.rules import RULES, Dims, lint

PARITY_EXAMPLES = 512
"""Examples of the test split on which the float16 graph is compared; whole batches."""


@dataclass
class Checks:
    """Results by name, and what is wrong."""

    results: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    advice: list[dict[str, str]] = field(default_factory=list)
    """[{"name", "why"}]: places that TensorRT will not run as fast as it could."""

    def passed(self, name: str, what: str) -> None:
        """Record a check that ran and passed."""
        self.results[name] = f"passed: {what}"

    def failed(self, name: str, why: str) -> None:
        """Record one that failed."""
        self.results[name] = f"failed: {why}"
        self.failures.append(f"{name}: {why}")

    def not_run(self, name: str, why: str) -> None:
        """Record one that did not run."""
        self.results[name] = f"not run: {why}"


def check_file(path: Path, dims: Dims, profile: Profile, compile_too: bool, checks: Checks) -> None:
    """onnx's checker, strict shape inference, TensorRT's rules, and the parser and builder of TensorRT for RTX where it is installed."""
    _onnx_checker(path, checks)
    _shape_inference(path, checks)
    _lint(path, dims, checks)
    if compile_too:
        _compile(path, profile, checks)
    else:
        checks.not_run("rtx_compile", "export.tensorrt.runtime=onnxruntime")


def _onnx_checker(path: Path, checks: Checks) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        checks.failed("onnx_checker", _first_line(error))
    else:
        checks.passed("onnx_checker", f"onnx {onnx.__version__}, full_check")


def _shape_inference(path: Path, checks: Checks) -> None:
    with TemporaryDirectory() as folder:
        try:
            onnx.shape_inference.infer_shapes_path(str(path), f"{folder}/out.onnx", check_type=True, strict_mode=True, data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            checks.failed("shape_inference", _first_line(error))
        else:
            checks.passed("shape_inference", "strict, with types")


def _lint(path: Path, dims: Dims, checks: Checks) -> None:
    model = ir.load(path)
    normalize(model)
    findings = lint(model, dims)
    broken = [f for f in findings if f.required]
    grouped: dict[str, list[str]] = {}
    for finding in findings:
        if not finding.required:
            grouped.setdefault(f"TensorRT ({finding.rule}): {finding.message}", []).append(finding.node)
    checks.advice += [{"name": _names(nodes), "why": why} for why, nodes in grouped.items()]
    if broken:
        shown = "; ".join(map(str, broken[:3])) + (f"; and {len(broken) - 3} more" if len(broken) > 3 else "")
        checks.failed("qdq_lint", shown)
    else:
        checks.passed("qdq_lint", f"{len(RULES)} rules" + (f"; places with advice: {len(findings)}" if findings else ""))


def _compile(path: Path, profile: Profile, checks: Checks) -> None:
    trt = rtx.compiler()
    if trt is None:
        checks.not_run("rtx_compile", "no package tensorrt_rtx (pip install tensorrt-rtx-cu13); it compiles without a GPU")
        return
    version = f"TensorRT for RTX {trt.__version__}"
    try:
        plan, int8 = rtx.compile_ahead(trt, path, profile)
    except rtx.Rejected as error:
        checks.failed("rtx_compile", f"{version} does not take the file: {error}. Set export.tensorrt.runtime=onnxruntime to leave it out")
    else:
        what = f"{version} compiled it ahead of time for {', '.join(rtx.TARGETS)} ({len(plan):,} bytes), {int8} products on int8"
        checks.passed("rtx_compile", f"{what}; it was not run")


def check_parity(
    path: Path,
    single: ir.Model,
    batches: list[tuple[Inputs, Tensor]],
    training: Tensor,
    activations: bool,
    rtol: float,
    atol: float,
    checks: Checks,
) -> None:
    """Compare logits of the file, with every float16 tensor rounded, with float32: |half - single| <= atol + rtol * |single|.

    Args:
        single: the float32 graph that the file was made from.
        training: logits on ``batches``.
        activations: whether activations have codes; both graphs are then compared without those (see `reference`).
    """
    chosen = reference.first_examples(batches, PARITY_EXAMPLES)
    count = sum(len(y) for _, y in chosen)
    half = ir.load(path)
    normalize(half)
    if activations:
        half = reference.without_activation_codes(half)
        expected = reference.logits(reference.without_activation_codes(single), chosen)
        against = "float32 in onnxruntime, both without the activations' codes"
    else:
        expected = training[:count].detach().cpu().float()
        against = "training"
    logits = reference.logits(reference.rounded(half), chosen)
    error = (logits - expected).abs()
    beyond = int((~(error <= atol + rtol * expected.abs())).sum())
    worst = float(error.max()) if error.numel() else 0.0
    what = f"largest difference {worst:.2g} from {against}, {count} examples, every float16 tensor rounded"
    if beyond or not torch.isfinite(logits).all():
        checks.failed(
            "fp16_parity",
            f"{beyond} of {error.numel()} logits are beyond rtol={rtol:g} and atol={atol:g}; {what}. "
            "Set export.tensorrt.data_max=64, say, to keep more in float32, or export.tensorrt.precision=fp32",
        )
    else:
        checks.passed("fp16_parity", f"rtol={rtol:g}, atol={atol:g}; {what}")


def _names(nodes: list[str]) -> str:
    shown = ", ".join(nodes[:3])
    return shown if len(nodes) <= 3 else f"{shown} and {len(nodes) - 3} more"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
