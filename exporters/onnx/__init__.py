"""ONNX files for onnxruntime: weights of 2 to 8 bits, activations in float or int8, in the operators that compute with them, checked in
onnxruntime itself.

**Float activations.** Linear weights have three storages (`weights`), all with the same numbers:

    matmul_nbits        com.microsoft.MatMulNBits: computes from the packed codes; smallest in memory
    dequantize_linear   standard opset 21 (DequantizeLinear with blocks, int4): any ONNX runtime reads it
    unpack              int4 constants that onnxruntime unpacks to float32 when it loads the file: float32 speed and memory, small file
    auto                unpack, but matmul_nbits for 2-bit codes (unpack has no container below 4)

benchmarks/README.md has what was measured: matmul_nbits is the fastest at a few tokens per call and takes a third of float32's memory,
unpack is never slower than float32; all compute the same numbers. Embeddings are row-wise int8 (Gather, Cast, Mul) or
com.microsoft.GatherBlockQuantized (4 bits and fewer, or grouped). Convolutions are unpacked.

**Static INT8** (int8_activation, range known): QuantizeLinear and DequantizeLinear around Conv, Gemm, MatMul, Add, pooling: the form that
onnxruntime fuses to QLinearConv, QGemm, MatMulIntegerToFloat, QLinearAdd, … when it loads the file, and that other runtimes read. With
`fuse` transformers get com.microsoft's QAttention and MatMulIntegerToFloat directly, which is a fifth faster; `fuse=false` is standard.

**Dynamic INT8** (int8_activation, range from each input): DynamicQuantizeLinear and MatMulInteger, which onnxruntime fuses to
DynamicQuantizeMatMul. Convolutions compute in float32 on the same numbers: ConvInteger is 6 times slower than Conv.
In groups (absmax_mlas, in the groups of the weight): MatMulNBits at accuracy_level 4, which MLAS computes bit for bit.

Every other activation grid is refused, with the nearest. `profile` says for which processors the file is (`exporters/onnx/profile.py`).

**How to load the file.** Set `session.qdq_matmulnbits_accuracy_level=0`: onnxruntime's default session turns DequantizeLinear + MatMul
into MatMulNBits at accuracy_level 4, that is, it quantizes activations that training left in float. The receipt is made with that
setting, the file's metadata names it (`qtrain.session_config`), and a README beside the file shows it. Files with matmul_nbits, and those
with INT8 activations, compute the same with or without it.

What it cannot do: 16-bit float graphs; dynamic ranges per token; tied weights are written once per use. accuracy_level 4 needs a CPU with
AVX2 or newer (or Arm dot product); on others onnxruntime computes those layers in float32. An id outside an embedding's table gives
zeros with GatherBlockQuantized, where Gather and torch raise.

Sources: onnxruntime docs/ContribOperators.md (MatMulNBits, GatherBlockQuantized, QAttention), mlas/lib/sqnbitgemm*.cpp,
core/optimizer/qdq_transformer; ONNX DequantizeLinear-21, DynamicQuantizeLinear-11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporters.base import (
    Artefact,
    Exporter,
    ExportJob,
    Inputs,
    packed_activations,
    packed_layers,
    packed_weights,
    quantizes_activations,
    standalone_activations,
)
from exporters.onnx.profile import PROFILES
from qtrain.receipt import Latency
from qtrain.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

STORAGES = ("auto", "matmul_nbits", "dequantize_linear", "unpack")
OPSETS = (21, 22, 23)

README = """\
# {name}

`model.onnx` holds {what} weights. Load it in onnxruntime so that it computes what the receipt (`receipt.json`) was made with:

```python
import onnxruntime

options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # keep activations in float32
session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
```

{held}{note} {profile}
"""
HELD = {"QDQ": "QuantizeLinear and DequantizeLinear (int8)", "Unpack": "constants that are unpacked at load"}
PROFILE_NOTES = {
    "x86": "For x86-64 processors with VNNI or AMX. On older ones 8-bit products saturate unless `session.x64quantprecision` is `1`.",
    "x86_avx2": "For x86-64 processors from AVX2 on: the codes of weights are small enough for products that saturate.",
    "arm": "For 64-bit Arm processors: activations are int8.",
    "mobile": "For NNAPI, Core ML, QNN or XNNPACK: standard operators, fixed shapes.",
}
DQ_NOTE = " Without that entry onnxruntime quantizes the activations of every layer to int8 by itself, which training did not."


@register("export", "onnx")
@dataclass
class OnnxExport(Exporter):
    """An ONNX file for onnxruntime: int2 to int8 weights, float or int8 activations."""

    floats: ClassVar[bool] = True

    opset: int = 21
    """ONNX operator set: 21 (IR version 10), 22 or 23."""
    profile: str = "x86"
    """Processors that the file is for: x86 (with VNNI), x86_avx2 (older; 7-bit weights), arm, mobile (standard operators, fixed shapes)."""
    weights: str = "auto"
    """How Linear weights are stored: auto, matmul_nbits (least memory), dequantize_linear (most runtimes), unpack (float32 speed)."""
    fuse: bool | None = None
    """Use onnxruntime's own operators (attention, bias + GELU, integer products) where they compute the same; null: not for mobile."""
    batch: int = 0
    """Fixed batch size of the file, examples; 0 leaves it open."""
    length: int = 0
    """Fixed sequence length of the file, tokens; 0 leaves it open."""
    float: bool = True
    """Also write float.onnx, where the float model is given, and time the two side by side."""
    latency_batches: list[int] = field(default_factory=lambda: [1, 8])
    """Batch sizes to time, examples."""
    latency_length: int = 64
    """Sequence length to time, tokens; at most the model's."""
    latency_repeats: int = 30
    """Timed runs per batch size and model; the median counts. 0 times nothing."""

    def __post_init__(self) -> None:
        if self.weights not in STORAGES:
            raise ValueError(f"export.onnx.weights is {self.weights!r}; valid: {', '.join(STORAGES)}. Set export.onnx.weights=unpack, say.")
        if self.profile not in PROFILES:
            raise ValueError(f"export.onnx.profile is {self.profile!r}; valid: {', '.join(PROFILES)}. Set export.onnx.profile=x86, say.")
        if self.opset not in OPSETS:
            valid = ", ".join(map(str, OPSETS))
            raise ValueError(f"export.onnx.opset is {self.opset}; valid: {valid} (int4 needs 21). Set export.onnx.opset=21, say.")
        if self.latency_length < 1 or self.latency_repeats < 0 or min(self.latency_batches, default=1) < 1:
            raise ValueError(
                f"export.onnx.latency_length={self.latency_length}, latency_batches={list(self.latency_batches)} and "
                f"latency_repeats={self.latency_repeats} must be at least 1, 1 and 0. Set export.onnx.latency_repeats=0 to time nothing."
            )
        if self.batch < 0 or self.length < 0 or (self.length and not self.batch):
            raise ValueError(
                f"export.onnx.batch={self.batch} and length={self.length} must be 0 (open) or more; a length needs a batch. "
                "Set export.onnx.batch=1 export.onnx.length=128, say."
            )
        profile = PROFILES[self.profile]
        if profile.fixed and not self.batch:
            raise ValueError(
                f"export.onnx.profile={self.profile} is for providers that take no dynamic axes, and export.onnx.batch is 0 (open). "
                "Set export.onnx.batch=1, and export.onnx.length=128 for text, say."
            )
        if self.fuse and not profile.contrib:
            raise ValueError(
                f"export.onnx.fuse=true writes operators of com.microsoft, profile={self.profile} holds none. Set export.onnx.fuse=false."
            )

    @property
    def runtime_version(self) -> str:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"

    def refusals(self, model: nn.Module) -> list[str]:
        import torch
        from torch import nn

        from exporters.onnx.layout import Refused, plan, plan_activation

        found = []
        for name, layer in packed_layers(model).items():
            try:
                plan(layer, self.weights, PROFILES[self.profile])
            except Refused as why:
                found.append(f"{name} ({layer.quantized.grid.describe()}): {why}")
        for name, activation in standalone_activations(model).items():
            try:
                plan_activation(activation)
            except Refused as why:
                found.append(f"{name} ({activation.grid.describe()}): {why}")
        half = [n for n, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)]
        if half:
            dtype = model.get_parameter(half[0]).dtype
            found.append(f"{half[0]} and {len(half) - 1} more are {dtype}; the nearest that the graph holds is float32: model.float()")
        tokens = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) or getattr(m, "kind", "") == "embedding"]
        if tokens and self.batch and not self.length:
            found.append(
                f"{tokens[0]} reads sequences, whose length is open though export.onnx.batch is fixed; set export.onnx.length=128, say"
            )
        return found

    def write(self, job: ExportJob, folder: Path) -> Artefact:
        """Write model.onnx, README.md and, where asked for, float.onnx."""
        import qtrain
        from exporters.onnx.layout import plan
        from exporters.onnx.runtime import fixed_example
        from exporters.onnx.write import Settings, metadata_of, write_model

        profile = PROFILES[self.profile]
        layers = packed_layers(job.model)
        layouts = {name: plan(layer, self.weights, profile) for name, layer in layers.items()}
        metadata = {**metadata_of(layers, job.metadata, qtrain.__version__, job.model), "qtrain.profile": self.profile}
        path = folder / "model.onnx"
        example = fixed_example(job.example_inputs, self.batch, self.length) if self.batch else job.example_inputs
        fuse = profile.contrib if self.fuse is None else self.fuse
        settings = Settings(job.max_length, self.opset, fuse, profile, bool(self.batch))
        model = write_model(job.model, path, example, settings, layouts, metadata)
        artefact = Artefact(path, model.files, fused=model.fused)
        if model.fallback:
            artefact.fallbacks.append({"name": path.name, "why": model.fallback})
        if self.float and job.float_model is not None and layers:
            artefact.float_path = folder / "float.onnx"
            plain = write_model(job.float_model, artefact.float_path, example, settings, {}, job.metadata)
            artefact.float_files = plain.files
            if plain.fallback:
                artefact.fallbacks.append({"name": "float.onnx", "why": plain.fallback})
        ops = sorted({HELD.get(layout.op, layout.op) for layout in layouts.values()})
        held = f"Quantized weights are held by: {', '.join(ops)}." if ops else "Nothing is quantized."
        note = DQ_NOTE if any(layout.op == "DequantizeLinear" for layout in layouts.values()) else ""
        name = job.metadata.get("recipe", "quantized model")
        about = PROFILE_NOTES[self.profile] if self.profile == "mobile" or quantizes_activations(job.model) else ""
        (folder / "README.md").write_text(
            README.format(name=name, what="quantized" if ops else "float32", held=held, note=note, profile=about).rstrip() + "\n"
        )
        return artefact

    def packed(self, model: nn.Module) -> dict[str, Callable[[], Tensor]]:
        """Weights and static activations."""
        return {**packed_weights(model), **packed_activations(model)}

    def tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        from exporters.onnx import decode

        return decode.tensors(path)

    def activations(self, path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        from exporters.onnx import decode

        return decode.activations(path, inputs)

    def products(self, path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        from exporters.onnx import decode

        return decode.products(path, inputs)

    def session(self, path: Path) -> Any:
        """An `onnxruntime.InferenceSession` with the settings above."""
        from exporters.onnx import runtime

        return runtime.open_session(path)

    def logits(self, path: Path, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
        from exporters.onnx import runtime

        return runtime.logits(path, batches)

    def latency(self, artefact: Artefact, job: ExportJob) -> Latency:
        from exporters.onnx import runtime

        if not self.latency_repeats:
            return {}
        paths = {"quantized": artefact.path} if artefact.float_path is None else {"float": artefact.float_path, "quantized": artefact.path}
        batches = [self.batch] if self.batch else list(self.latency_batches)
        length = self.length or min(self.latency_length, job.max_length)
        return runtime.latency(paths, batches, length, self.latency_repeats, job.example_inputs, job.vocab_size)
