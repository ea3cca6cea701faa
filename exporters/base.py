"""What an exporter is: something that packs codes, and proves in its runtime that the file computes what training computed.

    refusals      which layers the runtime cannot hold, why, and the nearest that it can
    write         the files, from integer codes and their parameters; never from float weights that have codes (law 1)
    tensors       every packed tensor as the runtime decodes it, from the file read back from disk
    activations   what single activations make of a given input: bit for bit what training's do
    products      what single layers make of a given input: the proof that they compute with what they hold
    logits        the runtime's logits on the test split
    latency       milliseconds, side by side with the float model where there is one

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

from qtrain.grids.base import QuantizedTensor
from qtrain.lazy import lazy_import
from qtrain.receipt import Latency, Receipt, Tolerances, differing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy_import("torch")

Inputs = dict[str, "Tensor"]
"""Keyword inputs of a model, each [batch, ...]."""


class PackedLayer(Protocol):
    """What an exporter reads from a converted layer."""

    kind: str
    """"linear" (codes [O, I]), "conv" (codes [O, I / groups, *kernel]) or "embedding" (codes [V, D]).

    A convolution has `stride`, `padding`, `dilation`, `groups`. The first two have an optional `bias` [O]; `bias_codes` (int32 [O]), steps
    of s_x * s_w, where the activation before the layer is static and stands on an edge (`source`); and `activation_fake`, where the layer
    quantizes its own input.
    """

    @property
    def quantized(self) -> QuantizedTensor:
        """Codes, parameters and grid."""


@dataclass
class LowRank:
    """An adapter that stays beside the model: y = W x + s * B (A x)."""

    folder: Path
    """As peft wrote it."""
    layers: dict[str, tuple[Tensor, Tensor]]
    """Layer -> A [r, I], B [O, r]."""
    rank: int
    scaling: float
    """s."""
    model: nn.Module
    """The model with its adapter, as it was trained."""


@dataclass
class ExportJob:
    """What an exporter is given."""

    model: nn.Module
    """Converted and in evaluation mode, on any device; float parameters in float32."""
    example_inputs: Inputs
    """Inputs to trace with: at least 2 examples, since a dimension of 1 would be taken for a constant."""
    batches: list[tuple[Inputs, Tensor]]
    """The whole test split: inputs and labels."""
    training_logits: Any
    """[N, C], float32: what `model` computes on `batches`, in order; for other tasks their own outputs, which `comparison` compares."""
    metrics: Callable[[Tensor, Tensor], dict[str, float]]
    """(logits [N, C], labels [N]) -> metrics by name."""
    folder: Path
    """Where artefacts go; the exporter makes `<folder>/<target>/`."""
    max_length: int
    """Longest sequence that the model takes, tokens; 0 for models that take none."""
    vocab_size: int
    """Token ids are below this; 0 for models that take none."""
    float_model: nn.Module | None = None
    """The model before quantization; where given, a float artefact is written and timed beside the quantized one."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Text to store in the artefact (recipe, …)."""
    task: str = "classification"
    """What the model is for: one of `Exporter.tasks`."""
    processor: Any = None
    """The tokenizer, or the images' specification."""
    comparison: Any = None
    """Where logits of the whole test split do not fit into one tensor: `sequences` (token ids of each), `add(sequence, start, logits)` for
    the runtime's logits at positions start, start + 1, …, and `result()` (`qtrain/language_task.py`)."""
    tell: Callable[[str], None] = print
    """Shows the user how far the export has come; set by `Exporter.export`."""
    importance: dict[str, Any] = field(default_factory=dict)
    """Module name -> importance of its input channels (`sum_of_squares` float32 [I], `tokens`), where calibration measured it."""
    adapter: LowRank | None = None
    """What stays beside `model`, where base and adapter are deployed as two things; outputs and metrics are then of both together."""

    @property
    def whole(self) -> nn.Module:
        """What computes the outputs: the model, with its adapter where one stays beside it."""
        return self.model if self.adapter is None else self.adapter.model


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
    adapter_path: Path | None = None
    """The adapter beside it."""
    fused: dict[str, int] = field(default_factory=dict)
    fallbacks: list[dict[str, str]] = field(default_factory=list)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The ``count`` tokens, at most, that a language model of transformers finds likeliest after ``prompt``, one after the other."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0)
    after: list[int] = written[0, len(prompt) :].tolist()
    return after


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
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    """What models it can export are for."""
    streams: ClassVar[bool] = False
    """Whether it reads one layer's codes after the other, so that a model may make them as they are read (`qtrain/streaming.py`)."""
    floats: ClassVar[bool] = False
    """Whether it also writes a model without any quantized layer."""
    widest: ClassVar[dict[str, Any]] = {}
    """Options under which it holds most grids, where those are not the usual ones."""

    tolerances: Tolerances = field(default_factory=Tolerances)
    """How far the runtime may be from training."""

    @property
    @abstractmethod
    def runtime_version(self) -> str:
        """Name and version of the runtime that makes the receipt: `onnxruntime 1.31.0`."""

    @abstractmethod
    def refusals(self, model: nn.Module) -> list[str]:
        """One message per layer that the runtime cannot hold: name, grid, why, the nearest that fits and the override to type."""

    @abstractmethod
    def write(self, job: ExportJob, folder: Path) -> Artefact:
        """Write all files of the artefact into ``folder``, which exists and is empty."""

    @abstractmethod
    def tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Names and values, float32, decoded by the runtime from the file; one at a time (law 5).

        All those of `packed`, and as many of `packed_biases` and `packed_activations` as the file holds.
        """

    def packed(self, model: nn.Module) -> dict[str, Callable[[], Tensor]]:
        """What the file must hold, to the last bit: name -> a function that gives training's value, float32 on the CPU."""
        return packed_weights(model)

    def activations(self, path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        """Activation names and their values on the grid, float32 as x, that the runtime computes for each x in ``inputs`` by the file.

        An exporter leaves out those that its runtime quantizes only inside a product.
        """
        return iter(())

    @abstractmethod
    def products(self, path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        """Layer names and products (no bias) computed by the runtime from the file, for each layer's x in ``inputs``.

        Called for layers that quantize their own input, with x in float32 (the runtime quantizes it): [R, I] -> [R, O], or
        [N, I, *spatial] -> [N, O, *spatial] for convolutions.
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
            job.tell = lambda text: status(f"{self.registered_name}: {text}")
            artefact = self.write(job, work)
            status(f"{self.registered_name}: receipt from {self.runtime_version}")
            receipt = self._receipt(job, artefact)
            entry = {
                "target": self.registered_name,
                "path": str(final / artefact.path.relative_to(work)),
                "bytes": sum(f.stat().st_size for f in artefact.files),
                "runtime": self.runtime_version,
                "receipt": receipt.json(),
            }
            if not receipt.passed:
                raise ReceiptFailed(entry, f"Widen export.{self.registered_name}.tolerances.* only if you know why they differ.")
            (work / "receipt.json").write_text(json.dumps(entry, indent=1) + "\n")
        return entry

    def preflight(self, model: nn.Module, task: str, processor: Any) -> None:
        """What would fail after minutes, found in seconds; ``model`` is a converted trial, whose weights may have one row only.

        Raises:
            ValueError: if this exporter cannot hold such a model, a layer of it, or its tokenizer.
        """
        if task not in self.tasks:
            raise ValueError(
                f"export={self.registered_name} is for models of {' or '.join(self.tasks)}, and this one is of {task}. "
                f"Set {'export=[gguf]' if task in ('language', 'embedding') else 'export=[onnx]'}, or export=[] for none"
            )
        self.refuse(model)

    def refuse_adapter(self, variant: str, others: list[str], model: nn.Module, names: list[str]) -> None:
        """Raise if this exporter cannot write an adapter beside its base.

        Args:
            variant: lora, rslora or dora.
            others: options by which more than A and B is trained.
            model: the float model, with or without storage.
            names: its layers with an adapter.

        Raises:
            ValueError: if so.
        """
        raise ValueError(
            f"adapter.merge=apart keeps base and adapter two things, and export={self.registered_name} writes one model. Set "
            "adapter.merge=float, or export=[] (the adapter's folder is written in any case); export=[gguf] and [transformers] write both"
        )

    def refuse(self, model: nn.Module) -> None:
        """Check, before anything is written or trained, that ``model`` is converted and that the runtime can hold it.

        Raises:
            ValueError: if not, naming the layers.
        """
        observed = {n for n, m in model.named_modules() if hasattr(m, "grid") and getattr(m, "observer", None) is not None}
        unconverted = [n for n, m in model.named_modules() if hasattr(m, "weight_fake") or n in observed]
        if unconverted:
            raise ValueError(
                f"{len(unconverted)} layers are still fake-quantized, the first {unconverted[0]}; "
                "an exporter packs codes: give it qtrain.prepare.convert(model)"
            )
        layers = packed_layers(model)
        if not layers and not self.floats:
            raise ValueError(
                f"the model given to export={self.registered_name} has no quantized layer; an exporter packs codes and never quantizes. "
                "Choose a quantizer first: quantizer=rtn, say."
            )
        refused = self.refusals(model)
        if refused:
            shown = "\n  ".join(refused[:5]) + (f"\n  and {len(refused) - 5} more" if len(refused) > 5 else "")
            count = len(layers) + len(standalone_activations(model))
            raise ValueError(f"export={self.registered_name} cannot hold {len(refused)} of {count} quantized layers:\n  {shown}")

    def _receipt(self, job: ExportJob, artefact: Artefact) -> Receipt:
        receipt = Receipt(fused=artefact.fused, fallbacks=artefact.fallbacks)
        receipt.float_bytes = sum(f.stat().st_size for f in artefact.float_files) or None
        expected, known = self.packed(job.model), {**packed_biases(job.model), **packed_activations(job.model)}
        for name, value in self.tensors(artefact.path):
            if name in expected or name in known:
                receipt.add_tensor(name, (expected.pop(name, None) or known[name])(), value)
            else:
                receipt.failures.append(f"the file holds {name}, which is no quantized layer of the model")
        for name, decode in expected.items():
            receipt.add_tensor(name, decode(), None)
        with torch.no_grad():
            self._check_activations(job, artefact, receipt)
            self._check_products(job, artefact, receipt)
        self.compare(job, artefact, receipt)
        if receipt.passed:
            receipt.latency_ms = self.latency(artefact, job)
        return receipt

    def compare(self, job: ExportJob, artefact: Artefact, receipt: Receipt) -> None:
        """Compare the runtime's logits and metrics on the test split with training's."""
        tolerances = self.tolerances.for_activations() if quantizes_activations(job.model) else self.tolerances
        logits = self.logits(artefact.path, job.batches)
        receipt.add_logits(job.training_logits, logits, tolerances)
        labels = torch.cat([y.cpu() for _, y in job.batches])
        if logits.shape == job.training_logits.shape:
            receipt.add_metrics(job.metrics(job.training_logits.cpu(), labels), job.metrics(logits, labels), tolerances)

    def _check_activations(self, job: ExportJob, artefact: Artefact, receipt: Receipt) -> None:
        """Each activation by itself, on values that a wrong scale, zero point or rounding would change: no bit may differ."""
        modules = activation_modules(job.model)
        inputs = {name: probe(module) for name, module in modules.items()}
        for name, value in self.activations(artefact.path, inputs) if inputs else ():
            device = next((t.device for t in modules[name].buffers()), torch.device("cpu"))
            training = modules[name](inputs[name].to(device))
            wrong = differing(training, value) if training.shape == value.shape else training.numel()
            if wrong:
                receipt.failures.append(
                    f"activation {name} comes out differently in {wrong} of {training.numel()} values: "
                    "this runtime does not round, clip or scale as training did"
                )

    def _check_products(self, job: ExportJob, artefact: Artefact, receipt: Receipt) -> None:
        layers: dict[str, Any] = {n: m for n, m in packed_layers(job.model).items() if getattr(m, "activation_fake", None) is not None}
        generator = torch.Generator().manual_seed(0)
        inputs = {n: torch.randn(_input_shape(layer), generator=generator) for n, layer in layers.items()}
        for name, product in self.products(artefact.path, inputs) if layers else ():
            layer = layers[name]
            x = inputs[name].to(layer.quantized.codes.device)
            if getattr(layer, "inverse_smoothing", None) is not None:
                x = x * layer.inverse_smoothing
            x, w = layer.activation_fake(x), layer.quantized.decode()
            training = _convolve(layer, x, w) if layer.kind == "conv" else torch.nn.functional.linear(x, w)
            receipt.add_layer(name, training, product, self.tolerances)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Converted layers by name; one that the model uses under several names is listed under the first."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "quantized") and hasattr(m, "kind")}  # type: ignore[misc]


def activation_modules(model: nn.Module) -> dict[str, Any]:
    """Activations on a grid by name, inside layers and on edges; those that are shared are listed under their first name."""
    inside = {id(a) for layer in packed_layers(model).values() if (a := getattr(layer, "activation_fake", None)) is not None}
    return {n: m for n, m in model.named_modules() if id(m) in inside or getattr(m, "kind", "") == "activation"}


def standalone_activations(model: nn.Module) -> dict[str, Any]:
    """Static activations on the edges of the model's graph, by name."""
    inside = {id(a) for layer in packed_layers(model).values() if (a := getattr(layer, "activation_fake", None)) is not None}
    return {n: m for n, m in activation_modules(model).items() if id(m) not in inside}


def quantizes_activations(model: nn.Module) -> bool:
    """Whether any activation is on a grid."""
    return bool(activation_modules(model))


def packed_weights(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Layer name -> its decoded weight, in the shape of its codes."""
    return {n: lambda layer=layer: layer.quantized.decode().cpu() for n, layer in packed_layers(model).items()}  # type: ignore[misc]


def packed_biases(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """`<layer>.bias` -> its decoded int32 bias [O], for layers that have one."""
    layers = {n: m for n, m in packed_layers(model).items() if getattr(m, "bias_codes", None) is not None}
    return {f"{n}.bias": lambda layer=layer: layer.bias.float().cpu() for n, layer in layers.items()}  # type: ignore[misc]


def packed_activations(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Name of a static activation -> the values of all its codes, lowest first, which show its scale and its zero point."""
    static = {n: m for n, m in activation_modules(model).items() if hasattr(m, "params")}
    return {n: lambda module=module: code_values(module) for n, module in static.items()}  # type: ignore[misc]


def code_values(activation: Any) -> Tensor:
    """The values of all codes of a static activation with one scale, lowest code first: float32 [2^bits]."""
    grid = activation.grid
    params = {n: p.cpu() for n, p in activation.params.items()}
    codes = torch.arange(-(2 ** (grid.code_bits - 1)), 2 ** (grid.code_bits - 1)).to(torch.int8)
    return grid.decode(QuantizedTensor(grid, codes.unsqueeze(0), params))[0]


def probe(activation: Any) -> Tensor:
    """Values [8, K] that show whether another implementation of ``activation`` is the same function.

    Random ones; and for a static activation zeros of both signs, halves between codes and values far outside the range.
    """
    generator = torch.Generator().manual_seed(0)
    if not hasattr(activation, "params"):
        return torch.randn(8, 256, generator=generator)
    values = code_values(activation)
    step = (values[1:] - values[:-1]).abs().amax()
    ends = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.finfo(torch.float32).tiny])
    halves = values + 0.5 * step
    x = torch.cat([torch.randn(779, generator=generator) * values.abs().amax(), values, halves, values - 0.5 * step, ends])
    return x[: len(x) // 8 * 8].reshape(8, -1)


def _convolve(layer: Any, x: Tensor, w: Tensor) -> Tensor:
    """conv1d or conv2d, by the shape of ``w``, without bias."""
    convolution = torch.nn.functional.conv1d if w.ndim == 3 else torch.nn.functional.conv2d
    return convolution(x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def _input_shape(layer: Any) -> tuple[int, ...]:
    """Of an input to try ``layer`` with: [8, I] or [2, I, 8, …]."""
    shape = layer.quantized.shape
    if layer.kind != "conv":
        return (8, shape[1])
    return (2, shape[1] * layer.groups, *(max(8, d * (k - 1) + 1) for k, d in zip(shape[2:], layer.dilation, strict=True)))


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
