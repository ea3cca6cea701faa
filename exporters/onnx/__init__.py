"""ONNX files for onnxruntime on the CPU: low-bit weights in the operators that compute with them, checked in onnxruntime itself.

Linear weights have three storages (`weights`), all with the same numbers:

    matmul_nbits        com.microsoft.MatMulNBits: computes from the packed codes; smallest in memory
    dequantize_linear   standard opset 21 (DequantizeLinear with blocks, int4): any ONNX runtime reads it
    unpack              int4 constants that onnxruntime unpacks to float32 when it loads the file: float32 speed and memory, small file
    auto                unpack, but matmul_nbits for 2-bit codes (unpack has no container below 4) and where activations are quantized

benchmarks/README.md has what was measured: matmul_nbits is the fastest at a few tokens per call and takes a third of float32's memory,
unpack is never slower than float32; all compute the same numbers.

Embeddings are row-wise int8 (Gather, Cast, Mul) or com.microsoft.GatherBlockQuantized (4 bits and fewer, or grouped). Activations stay
in float32 unless training had them on the int8 grid of MatMulNBits at accuracy_level 4 (affine, absmax_mlas, dynamic, in the groups of
the weight): that grid is what MLAS computes, bit for bit; any other activation grid is refused, since the runtime has none such.

**How to load the file.** Set `session.qdq_matmulnbits_accuracy_level=0`: onnxruntime's default session turns DequantizeLinear + MatMul
into MatMulNBits at accuracy_level 4, that is, it quantizes activations that training left in float. The receipt is made with that
setting, the file's metadata names it (`qtrain.session_config`), and a README beside the file shows it. Files with matmul_nbits compute
the same with or without it.

What it cannot do: 16-bit float graphs; static activation ranges; tied weights are written once per use. accuracy_level 4 needs a CPU with
AVX2 or newer (or Arm dot product); on others onnxruntime computes those layers in float32. An id outside an embedding's table gives
zeros with GatherBlockQuantized, where Gather and torch raise.

Sources: onnxruntime docs/ContribOperators.md (MatMulNBits, GatherBlockQuantized) and mlas/lib/sqnbitgemm*.cpp; ONNX DequantizeLinear-21.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.base import Artefact, Exporter, ExportJob, Inputs, packed_layers
from qtrain.receipt import Latency
from qtrain.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

STORAGES = ("auto", "matmul_nbits", "dequantize_linear", "unpack")
OPSETS = (21, 22, 23)

README = """\
# {name}

`model.onnx` holds quantized weights. Load it in onnxruntime so that it computes what the receipt (`receipt.json`) was made with:

```python
import onnxruntime

options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # keep activations in float32
session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
```

Quantized weights are held by: {held}.{note}
"""
DQ_NOTE = " Without that entry onnxruntime quantizes the activations of every layer to int8 by itself, which training did not."


@register("export", "onnx")
@dataclass
class OnnxExport(Exporter):
    """An ONNX file for onnxruntime: int2 to int8 weights, float or int8 activations."""

    opset: int = 21
    """ONNX operator set: 21 (IR version 10), 22 or 23."""
    weights: str = "auto"
    """How Linear weights are stored: auto, matmul_nbits (least memory), dequantize_linear (most runtimes), unpack (float32 speed)."""
    fuse: bool = True
    """Fuse attention, skip + layer norm and bias + GELU into onnxruntime's operators where the result computes the same."""
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
        if self.opset not in OPSETS:
            valid = ", ".join(map(str, OPSETS))
            raise ValueError(f"export.onnx.opset is {self.opset}; valid: {valid} (int4 needs 21). Set export.onnx.opset=21, say.")
        if self.latency_length < 1 or self.latency_repeats < 0 or min(self.latency_batches, default=1) < 1:
            raise ValueError(
                f"export.onnx.latency_length={self.latency_length}, latency_batches={list(self.latency_batches)} and "
                f"latency_repeats={self.latency_repeats} must be at least 1, 1 and 0. Set export.onnx.latency_repeats=0 to time nothing."
            )

    @property
    def runtime(self) -> str:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"

    def refusals(self, model: nn.Module) -> list[str]:
        import torch

        from exporters.onnx.layout import Refused, plan

        found = []
        for name, layer in packed_layers(model).items():
            try:
                plan(layer, self.weights)
            except Refused as why:
                found.append(f"{name} ({layer.quantized.grid.describe()}): {why}")
        half = [n for n, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)]
        if half:
            dtype = model.get_parameter(half[0]).dtype
            found.append(f"{half[0]} and {len(half) - 1} more are {dtype}; the nearest that the graph holds is float32: model.float()")
        return found

    def write(self, job: ExportJob, folder: Path) -> Artefact:
        """Write model.onnx, README.md and, where asked for, float.onnx."""
        import qtrain
        from exporters.onnx.layout import plan
        from exporters.onnx.write import metadata_of, write_model

        layers = packed_layers(job.model)
        layouts = {name: plan(layer, self.weights) for name, layer in layers.items()}
        metadata = metadata_of(layers, job.metadata, qtrain.__version__)
        path = folder / "model.onnx"
        common = (job.example_inputs, job.max_length, self.opset, self.fuse)
        model = write_model(job.model, path, *common, layouts, metadata)
        artefact = Artefact(path, model.files, fused=model.fused)
        if model.fallback:
            artefact.fallbacks.append({"name": path.name, "why": model.fallback})
        if self.float and job.float_model is not None:
            artefact.float_path = folder / "float.onnx"
            plain = write_model(job.float_model, artefact.float_path, *common, {}, job.metadata)
            artefact.float_files = plain.files
            if plain.fallback:
                artefact.fallbacks.append({"name": "float.onnx", "why": plain.fallback})
        held = sorted({layout.op for layout in layouts.values()})
        note = DQ_NOTE if "DequantizeLinear" in held else ""
        name = job.metadata.get("recipe", "quantized model")
        (folder / "README.md").write_text(README.format(name=name, held=", ".join(held), note=note))
        return artefact

    def tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        from exporters.onnx import runtime

        return runtime.tensors(path)

    def products(self, path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        from exporters.onnx import runtime

        return runtime.products(path, inputs)

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
        length = min(self.latency_length, job.max_length)
        return runtime.latency(paths, list(self.latency_batches), length, self.latency_repeats, job.example_inputs, job.vocab_size)
