"""What an exporter is: something that packs codes, and proves in its runtime that the file computes what training computed.

    refusals   which layers the runtime cannot hold, why, and the nearest that it can
    write      the files, from integer codes and their parameters; never from float weights that have codes (law 1)
    tensors    every packed tensor as the runtime decodes it, from the file read back from disk
    products   what single layers make of a given input: the proof that activations are quantized as in training
    logits     the runtime's logits on the test split
    latency    milliseconds, side by side with the float model where there is one

`export` is common to all and puts these in order: it refuses before it writes; it writes into `.<target>.partial` beside the final
folder; it makes the receipt; and only when that passes does the folder get its final name, with `receipt.json` inside (law 3). An
exception, a failed receipt, a full disk or Ctrl-C leaves no file of this export behind; an artefact of an earlier export stays until
a new one passes. A new runtime is one new file or folder with a dataclass that derives from `Exporter`.

This file knows a converted layer by what it has (`kind`, `quantized`), so that it needs no import of the layers themselves.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qtrain.lazy import lazy_import
from qtrain.receipt import Latency, Receipt, Tolerances

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qtrain.grids.base import QuantizedTensor
else:
    torch = lazy_import("torch")

Inputs = dict[str, "Tensor"]
"""Keyword inputs of a model, each [batch, ...]."""


class PackedLayer(Protocol):
    """What an exporter reads from a converted layer."""

    kind: str
    """"linear" (codes [O, I], optional `bias` [O] and `activation_fake`) or "embedding" (codes [V, D])."""

    @property
    def quantized(self) -> QuantizedTensor:
        """Codes, parameters and grid."""


@dataclass
class ExportJob:
    """What an exporter is given."""

    model: nn.Module
    """Converted and in evaluation mode, on any device; float parameters in float32."""
    example_inputs: Inputs
    """Inputs to trace with: at least 2 examples, since a dimension of 1 would be taken for a constant."""
    batches: list[tuple[Inputs, Tensor]]
    """The whole test split: inputs and labels."""
    training_logits: Tensor
    """[N, C], float32: what `model` computes on `batches`, in order."""
    metrics: Callable[[Tensor, Tensor], dict[str, float]]
    """(logits [N, C], labels [N]) -> metrics by name."""
    folder: Path
    """Where artefacts go; the exporter makes `<folder>/<target>/`."""
    max_length: int
    """Longest sequence that the model takes, tokens."""
    vocab_size: int
    """Token ids are below this."""
    float_model: nn.Module | None = None
    """The model before quantization; where given, a float artefact is written and timed beside the quantized one."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Text to store in the artefact (recipe, …)."""


@dataclass
class Artefact:
    """What `Exporter.write` wrote."""

    path: Path
    """The file that a user loads."""
    files: list[Path]
    """All files that `path` needs, itself included; their sizes add up to the artefact's bytes."""
    float_path: Path | None = None
    """The float model's file, where one was written."""
    float_files: list[Path] = field(default_factory=list)
    fused: dict[str, int] = field(default_factory=dict)
    fallbacks: list[dict[str, str]] = field(default_factory=list)


class ReceiptFailed(ValueError):
    """The runtime does not compute what training computed; no artefact was left."""

    def __init__(self, entry: dict[str, Any], override: str) -> None:
        self.entry = entry
        """The entry for `exports` of run.json, with `passed` false and the failures."""
        failures = entry["receipt"]["failures"]
        shown = "\n  ".join(failures[:8]) + (f"\n  and {len(failures) - 8} more" if len(failures) > 8 else "")
        what = f"the {entry['target']} file does not compute in {entry['runtime']} what training computed; nothing was kept"
        super().__init__(f"{what}:\n  {shown}\n{override}")


@dataclass
class Exporter(ABC):
    """Packs a converted model for one runtime. Subclasses are dataclasses, registered with `@register("export", NAME)`."""

    registered_name: ClassVar[str] = ""

    tolerances: Tolerances = field(default_factory=Tolerances)
    """How far the runtime may be from training."""

    @property
    @abstractmethod
    def runtime(self) -> str:
        """Name and version of the runtime that makes the receipt: `onnxruntime 1.31.0`."""

    @abstractmethod
    def refusals(self, model: nn.Module) -> list[str]:
        """One message per layer that the runtime cannot hold: name, grid, why, the nearest that fits and the override to type."""

    @abstractmethod
    def write(self, job: ExportJob, folder: Path) -> Artefact:
        """Write all files of the artefact into ``folder``, which exists and is empty."""

    @abstractmethod
    def tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Layer names and weights, float32 in the shape of the codes, decoded by the runtime from the file; one at a time (law 5)."""

    @abstractmethod
    def products(self, path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        """Layer names and x @ weight.T [R, O] (no bias) computed by the runtime from the file, for each layer's x [R, I] in ``inputs``.

        Called for layers whose activations are quantized, with x in float32: the runtime quantizes it.
        """

    @abstractmethod
    def session(self, path: Path) -> Any:
        """The runtime with the file loaded, computing exactly as a deployment should."""

    @abstractmethod
    def logits(self, path: Path, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
        """The runtime's logits on ``batches`` in order, float32 [N, C]."""

    @abstractmethod
    def latency(self, artefact: Artefact, job: ExportJob) -> Latency:
        """Median milliseconds of the artefact, and of the float one where it was written."""

    def export(self, job: ExportJob) -> dict[str, Any]:
        """Refuse, write, make the receipt, and give the artefact its final name.

        Returns:
            One entry of run.json's `exports`: target, path, bytes, runtime, receipt.

        Raises:
            ValueError: if the runtime cannot hold a layer, naming all of them.
            ReceiptFailed: if the file does not compute what training computed; it carries the entry.
        """
        self.refuse(job.model)
        final = Path(job.folder) / self.registered_name
        with staged(final) as work, _status(f"{self.registered_name}: packing") as status:
            artefact = self.write(job, work)
            status(f"{self.registered_name}: receipt from {self.runtime}")
            receipt = self._receipt(job, artefact)
            entry = {
                "target": self.registered_name,
                "path": str(final / artefact.path.relative_to(work)),
                "bytes": sum(f.stat().st_size for f in artefact.files),
                "runtime": self.runtime,
                "receipt": receipt.json(),
            }
            if not receipt.passed:
                raise ReceiptFailed(entry, f"Widen export.{self.registered_name}.tolerances.* only if you know why they differ.")
            (work / "receipt.json").write_text(json.dumps(entry, indent=1) + "\n")
        return entry

    def refuse(self, model: nn.Module) -> None:
        """Check, before anything is written or trained, that ``model`` is converted and that the runtime can hold it.

        Raises:
            ValueError: if not, naming the layers.
        """
        unconverted = [n for n, m in model.named_modules() if hasattr(m, "weight_fake")]
        if unconverted:
            raise ValueError(
                f"{len(unconverted)} layers are still fake-quantized, the first {unconverted[0]}; "
                "an exporter packs codes: give it qtrain.prepare.convert(model)"
            )
        layers = packed_layers(model)
        if not layers:
            raise ValueError(
                f"the model given to export={self.registered_name} has no quantized layer; an exporter packs codes and never quantizes. "
                "Choose a quantizer first: quantizer=rtn, say."
            )
        refused = self.refusals(model)
        if refused:
            shown = "\n  ".join(refused[:5]) + (f"\n  and {len(refused) - 5} more" if len(refused) > 5 else "")
            raise ValueError(f"export={self.registered_name} cannot hold {len(refused)} of {len(layers)} quantized layers:\n  {shown}")

    def _receipt(self, job: ExportJob, artefact: Artefact) -> Receipt:
        receipt = Receipt(fused=artefact.fused, fallbacks=artefact.fallbacks)
        receipt.float_bytes = sum(f.stat().st_size for f in artefact.float_files) or None
        layers = packed_layers(job.model)
        for name, value in self.tensors(artefact.path):
            if name in layers:
                receipt.add_tensor(name, layers.pop(name).quantized.decode(), value)
            else:
                receipt.failures.append(f"the file holds {name}, which is no quantized layer of the model")
        for name, layer in layers.items():
            receipt.add_tensor(name, layer.quantized.decode(), None)
        self._check_activations(job, artefact, receipt)
        tolerances = self.tolerances.for_activations() if quantizes_activations(job.model) else self.tolerances
        logits = self.logits(artefact.path, job.batches)
        receipt.add_logits(job.training_logits, logits, tolerances)
        labels = torch.cat([y.cpu() for _, y in job.batches])
        if logits.shape == job.training_logits.shape:
            receipt.add_metrics(job.metrics(job.training_logits.cpu(), labels), job.metrics(logits, labels), tolerances)
        if receipt.passed:
            receipt.latency_ms = self.latency(artefact, job)
        return receipt

    def _check_activations(self, job: ExportJob, artefact: Artefact, receipt: Receipt) -> None:
        layers = {n: layer for n, layer in packed_layers(job.model).items() if getattr(layer, "activation_fake", None) is not None}
        generator = torch.Generator().manual_seed(0)
        inputs = {n: torch.randn(8, layer.quantized.shape[1], generator=generator) for n, layer in layers.items()}
        with torch.no_grad():
            for name, product in self.products(artefact.path, inputs) if layers else ():
                q = layers[name].quantized
                x = layers[name].activation_fake(inputs[name].to(q.codes.device))  # type: ignore[attr-defined]
                receipt.add_layer(name, torch.nn.functional.linear(x, q.decode()), product, self.tolerances)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Converted layers by name; one that the model uses under several names is listed under the first."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "quantized") and hasattr(m, "kind")}  # type: ignore[misc]


def quantizes_activations(model: nn.Module) -> bool:
    """Whether any converted layer quantizes its input."""
    return any(getattr(layer, "activation_fake", None) is not None for layer in packed_layers(model).values())


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """An empty folder beside ``final`` that takes its name when the block ends, and is removed when the block raises."""
    work = final.with_name(f".{final.name}.partial")
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    try:
        work.mkdir(parents=True)
        yield work
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        work.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if old.exists() and not final.exists():
            old.rename(final)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _status(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on the error stream while the block runs; call what it yields to change the text."""
    from rich.console import Console

    with Console(stderr=True).status(text) as status:
        yield lambda new: status.update(new)
