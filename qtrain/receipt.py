"""The receipt: proof, made in the real runtime, that a written file computes what training computed.

An exporter writes a file, reads it back with its runtime (onnxruntime, llama.cpp, …) and compares three things:

    tensors    every packed tensor, decoded by the runtime, against training's decode(codes): bit for bit, no tolerance
    layers     where activations are quantized, the product of each layer with one input: the runtime computes on training's grid
    logits     the whole test split: nmse = sum((training - runtime)^2) / sum(training^2) in float64, and top-1 agreement
    metric     what the user reads (accuracy, loss, …), computed from either side's logits

The tensors are exact because codes are copied, not rounded again. The logits are not: a runtime adds the products of a matrix
multiplication in another order, so float32 results differ by about 1e-6 relative (nmse 1e-12).

Where *activations* are quantized, such a difference now and then moves a value across a rounding boundary; one flip is 1/127 of the
largest value of its group, and flips in one layer cause flips in the next. PyTorch alone shows this: a BERT of 6 layers with int8
activations gives logits that differ by an nmse of 1e-4 to 7e-4 (classifier not yet trained) when its examples come one by one instead
of in batches of 8, and onnxruntime differs by 5e-4 to 2.4e-3. The logits of those models have tolerances of their own
(`activation_…`), and each layer is compared by itself on equal input, where nothing has added up yet: there a flip is worth 1e-8, and a
runtime that leaves the activation in float is off by 2e-5.

Nothing here imports torch at load time: `Tolerances` is part of the configuration, which `--help` lists.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_import("torch")

Latency = dict[str, dict[str, float]]
"""Which model ("float", "quantized") -> shape ("1x64": batch x length) -> median milliseconds."""


@dataclass
class Tolerances:
    """How far the runtime may be from training before an artefact is refused. Packed tensors have none: they are bit-exact."""

    logits_nmse: float = 1e-4
    """Largest squared error of the logits relative to their energy, float64."""
    top1_agreement: float = 0.995
    """Least share of test examples on which both sides have the same arg-max."""
    metric: float = 0.002
    """Largest absolute difference of any metric, in the metric's unit."""
    perplexity: float = 0.005
    """Largest difference of perplexity, as a share of training's."""
    activation_logits_nmse: float = 1e-2
    """Instead of logits_nmse where activations are quantized."""
    activation_top1_agreement: float = 0.98
    """Instead of top1_agreement where activations are quantized."""
    activation_metric: float = 0.01
    """Instead of metric where activations are quantized."""
    layer_nmse: float = 1e-6
    """Largest error of one layer's product with an input on training's activation grid."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            share = name.endswith("top1_agreement")
            if not 0 <= value <= (1 if share else math.inf):
                valid, example = ("a share from 0 to 1", 0.99) if share else ("0 or more", 0.001)
                raise ValueError(f"tolerances.{name} is {value}; it must be {valid}. Set export.EXPORTER.tolerances.{name}={example}, say.")

    def of(self, metric: str, value: float) -> float:
        """Largest difference of a metric whose training's value is ``value``."""
        if metric == "perplexity":
            return self.perplexity * value
        # where both sides name the same class for a share a of examples, their agreement with a third differs by at most 1 - a
        return max(self.metric, 1 - self.top1_agreement) if metric == "agreement" else self.metric

    def for_activations(self) -> Tolerances:
        """The tolerances of a model whose activations the runtime quantizes."""
        return replace(
            self,
            logits_nmse=self.activation_logits_nmse,
            top1_agreement=self.activation_top1_agreement,
            metric=self.activation_metric,
        )


@dataclass
class Receipt:
    """What was compared, and how it came out. `passed` is the absence of failures."""

    tensors: int = 0
    """Packed tensors that training has."""
    tensors_bit_exact: int = 0
    """How many of them the runtime decodes to the same values."""
    layers: int = 0
    """Layers with quantized activations, each compared on one input."""
    layers_nmse: float = 0.0
    """The largest error among them."""
    logits_nmse: float = math.nan
    logits_max_abs: float = math.nan
    top1_agreement: float = math.nan
    """Share of examples, 0 to 1."""
    metric: dict[str, dict[str, float]] = field(default_factory=dict)
    """Name -> {"training": value, "runtime": value}."""
    latency_ms: Latency = field(default_factory=dict)
    tokens_per_s: Latency = field(default_factory=dict)
    """Of language models: "float", "quantized" -> "prompt", "generate" -> tokens per second, medians."""
    float_bytes: int | None = None
    """Size of the float artefact beside it, bytes; None where there is none."""
    fused: dict[str, int] = field(default_factory=dict)
    """Fused operators in the written graph, by name."""
    checks: dict[str, str] = field(default_factory=dict)
    """Further checks by name: "passed: what it showed", "failed: why", or "not run: why"; never "passed" for what did not run."""
    failures: list[str] = field(default_factory=list)
    fallbacks: list[dict[str, str]] = field(default_factory=list)
    """[{"name", "why"}]: what was asked for and could not be done (law 4)."""

    @property
    def passed(self) -> bool:
        """Whether the artefact may have its final name."""
        return not self.failures

    def add_tensor(self, name: str, training: Tensor, runtime: Tensor | None) -> None:
        """Count one packed tensor, float32 [...] on both sides; None where the file does not hold it."""
        self.tensors += 1
        if runtime is None:
            self.failures.append(f"tensor {name} is not in the file")
        elif runtime.shape != training.shape:
            self.failures.append(f"tensor {name} has shape {list(runtime.shape)} in the file, training has {list(training.shape)}")
        elif wrong := differing(training, runtime):
            self.failures.append(f"tensor {name} decodes differently in {wrong} of {training.numel()} values")
        else:
            self.tensors_bit_exact += 1

    def add_layer(self, name: str, training: Tensor, runtime: Tensor, tolerances: Tolerances) -> None:
        """Compare the product of one layer with one input, float32 [..., O] on both sides."""
        self.layers += 1
        error = nmse(training, runtime)
        self.layers_nmse = max(self.layers_nmse, error) if error == error else error
        if not error <= tolerances.layer_nmse:
            self.failures.append(
                f"{name} differs by nmse {error:.3g} on one input, the tolerance {tolerances.layer_nmse:.3g}: "
                "this runtime does not quantize its activations as training did"
            )

    def add_logits(self, training: Tensor, runtime: Tensor, tolerances: Tolerances) -> None:
        """Compare logits [N, C]."""
        if training.shape != runtime.shape:
            self.failures.append(f"the runtime's logits have shape {list(runtime.shape)}, training's {list(training.shape)}")
            return
        self.add_agreement(nmse(training, runtime), max_abs(training, runtime), top1_agreement(training, runtime), tolerances)

    def add_agreement(self, error: float, worst: float, top1: float, tolerances: Tolerances) -> None:
        """What a comparison of logits showed: NMSE, the largest difference, and the share of equal arg-max."""
        self.logits_nmse, self.logits_max_abs, self.top1_agreement = error, worst, top1
        if not self.logits_nmse <= tolerances.logits_nmse:  # also true for NaN
            self.failures.append(f"logits_nmse is {self.logits_nmse:.3g}, the tolerance {tolerances.logits_nmse:.3g}")
        if not self.top1_agreement >= tolerances.top1_agreement:
            self.failures.append(f"top1_agreement is {self.top1_agreement:.4f}, the tolerance {tolerances.top1_agreement:.4f}")

    def add_metrics(self, training: dict[str, float], runtime: dict[str, float], tolerances: Tolerances) -> None:
        """Compare metrics by name."""
        for name, value in training.items():
            other = runtime.get(name, math.nan)
            self.metric[name] = {"training": value, "runtime": other}
            most = tolerances.of(name, value)
            if not abs(value - other) <= most:
                what = f"{name} is {other:.6g} in the runtime and {value:.6g} in training"
                self.failures.append(f"{what}, the tolerance {most:.3g}")

    def add_check(self, name: str, said: str) -> None:
        """Write down a check that said "passed: …", "failed: …" or "not run: …"; one that failed fails the receipt."""
        self.checks[name] = said
        if said.startswith("failed"):
            self.failures.append(f"{name} {said}")

    def json(self) -> dict[str, Any]:
        """Json-ready values, as `run.json` holds them; numbers that are not finite become None."""
        return _finite({**asdict(self), "passed": self.passed})


def differing(a: Tensor, b: Tensor) -> int:
    """How many float32 values of two tensors of one shape differ.

    Equal bits are equal, and so are 0.0 and -0.0: a code of 0 under a negative scale is -0.0 in some runtimes and 0.0 in others, and no
    product or sum that follows tells them apart. NaN equals only a NaN of the same bits.
    """
    a, b = a.detach().cpu().float().contiguous(), b.detach().cpu().float().contiguous()
    return int(((a.view(torch.int32) != b.view(torch.int32)) & (a != b)).sum())


def nmse(reference: Tensor, other: Tensor) -> float:
    """sum((reference - other)^2) / sum(reference^2) in float64; 0 where both are all zero."""
    x, y = reference.detach().cpu().double(), other.detach().cpu().double()
    error, energy = float((x - y).square().sum()), float(x.square().sum())
    if energy == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / energy


def max_abs(reference: Tensor, other: Tensor) -> float:
    """Largest absolute difference, float64."""
    if not reference.numel():
        return 0.0
    return float((reference.detach().cpu().double() - other.detach().cpu().double()).abs().max())


def top1_agreement(reference: Tensor, other: Tensor) -> float:
    """Share of rows of [N, C] with the same arg-max; 1 where there are none."""
    if not len(reference):
        return 1.0
    return float((reference.detach().cpu().argmax(-1) == other.detach().cpu().argmax(-1)).double().mean())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
