"""Quantize and export a language model tensor by tensor, for models that do not fit into memory as floats (`stream=true`).

    the usual run     float model -> evaluated -> fake-quantized -> evaluated -> codes -> file          needs the model, and its codes
    a streamed run    file -> one tensor -> codes -> bytes -> file -> the next tensor                   needs one tensor

The model is a skeleton without storage (torch's `meta` device), so that names, shapes, patterns, mixes and fall-backs are the usual run's.
Each layer to be quantized holds a `StreamedTensor`, which reads its weight from the safetensors files and encodes it when an exporter
asks for its codes, and forgets both when the next one is asked for. Vectors are loaded as they are.

What this cannot do: train, calibrate (an imatrix file may be given), or compare with PyTorch's logits, since PyTorch never runs the model.
The receipt compares every tensor to the last bit (encoding it again), and measures perplexity in the runtime, of the quantized file and
of the float file beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qtrain.evaluate import Batch, decibels
from qtrain.grids.base import Grid, Params, QuantizedTensor, require_finite
from qtrain.language_task import IGNORED, Score
from qtrain.layers import FakeEmbedding, fake_layers
from qtrain.prepare import prepare, replace

PIECE = 1 << 20
"""Values that are decoded at once."""
INDEX = "model.safetensors.index.json"


class Weights:
    """Tensors of a transformers folder by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        """``folder`` holds model.safetensors, or its shards and their index.

        Raises:
            ValueError: if it holds neither.
        """
        index = folder / INDEX
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"stream=true reads weights from safetensors files, and {folder} has no {missing[0]}. Set stream=false, or model.path to a "
                "folder that save_pretrained wrote"
            )
        self._where: dict[str, Path] = {}
        for name in files:
            with safe_open(folder / name, "pt") as file:
                self._where |= dict.fromkeys(file.keys(), folder / name)

    def __call__(self, name: str) -> Tensor:
        """The tensor, float32.

        Raises:
            ValueError: if there is none, or it is not finite.
        """
        stored = next((n for n in (name, name.removeprefix("model."), f"model.{name}") if n in self._where), None)
        if stored is None:
            raise ValueError(f"the safetensors files have no {name}; set stream=false, which loads the model as transformers does")
        with safe_open(self._where[stored], "pt") as file:
            w: Tensor = file.get_tensor(stored).float()
        require_finite(w, f"the weight {name}")
        return w


@dataclass(eq=False)
class StreamedTensor:
    """Stands for a `QuantizedTensor` that is encoded when it is read; only the one read last is held."""

    name: str
    grid: Grid
    shape: tuple[int, ...]
    load: Callable[[str], Tensor]
    held: list[tuple[StreamedTensor, QuantizedTensor]]
    """Of the whole model: the one tensor that is in memory."""
    importance: Tensor | None = None
    sqnr_db: float | None = None
    """Known once it was encoded; None if nothing was lost."""

    def _encoded(self) -> QuantizedTensor:
        if not self.held or self.held[0][0] is not self:
            self.held.clear()
            w = self.load(f"{self.name}.weight")
            if tuple(w.shape) != self.shape:
                raise ValueError(f"the weight of {self.name} has shape {list(w.shape)} in the file and {list(self.shape)} by config.json")
            params = None if self.importance is None else self.grid.choose(w, self.importance)
            q = self.grid.encode(w, params)
            self.sqnr_db = _sqnr_db(w, q)
            self.held.append((self, q))
        return self.held[0][1]

    @property
    def codes(self) -> Tensor:
        """As of `QuantizedTensor`."""
        return self._encoded().codes

    @property
    def params(self) -> Params:
        """As of `QuantizedTensor`."""
        return self._encoded().params

    def decode(self) -> Tensor:
        """As of `QuantizedTensor`."""
        return self._encoded().decode()


def _sqnr_db(w: Tensor, q: QuantizedTensor) -> float | None:
    """As `qtrain.evaluate.sqnr_db`, some rows at a time; None where nothing was lost."""
    signal = noise = 0.0
    whole = None
    step = max(1, PIECE // w.shape[-1])
    for start in range(0, len(w), step):
        rows = slice(start, start + step)
        part = q.grid.take(q, rows)
        if part is None and whole is None:
            whole = q.decode()
        values = part.decode() if part is not None else whole[rows]  # type: ignore[index]
        signal += float(w[rows].square().sum(dtype=torch.float64))
        noise += float((w[rows] - values).square().sum(dtype=torch.float64))
    return decibels(signal, noise) if noise else None


class StreamedLayer(nn.Module):
    """What exporters see of a layer: a kind, a bias, and codes that are made when they are read."""

    activation_fake = None

    def __init__(self, kind: str, quantized: StreamedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.kind = kind
        self.quantized = quantized
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


def streamed(skeleton: Any, weights: Weights) -> nn.Module:
    """Turn a fake-quantized skeleton into one whose layers read, encode and forget their weights, in place.

    Raises:
        ValueError: if a weight is missing, of another shape or not finite.
    """
    held: list[tuple[StreamedTensor, QuantizedTensor]] = []
    made: dict[Any, StreamedTensor] = {}
    tied = _is_tied(skeleton)
    names = dict(skeleton.named_modules())
    embedding = next(n for n, m in names.items() if m is skeleton.get_input_embeddings())
    for name, layer in list(fake_layers(skeleton)):
        source = embedding if tied and layer is skeleton.get_output_embeddings() else name
        grid, importance = layer.weight_fake.grid, layer.weight_fake.importance
        key = (source, repr(grid))
        if key not in made:
            made[key] = StreamedTensor(source, grid, tuple(layer.weight.shape), weights, held, importance)
        bias = None if layer.bias is None else weights(f"{name}.bias")
        replace(skeleton, name, StreamedLayer("embedding" if isinstance(layer, FakeEmbedding) else "linear", made[key], bias))
    for name, module in skeleton.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                loaded = weights(f"{name}.{leaf}" if name else leaf)
                module._parameters[leaf] = nn.Parameter(loaded, requires_grad=False)
    model: nn.Module = skeleton.eval()
    return model


def halved(skeleton: nn.Module) -> nn.Module:
    """Put every matrix of a skeleton on the grid of float16: the float file that a quantized one is compared with. In place."""
    from qtrain.grids.ggml import Ggml

    chosen: dict[str, nn.Module] = {n: m for n, m in skeleton.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    prepare(skeleton, chosen, Ggml(type="f16"), Ggml(type="f16"))
    return skeleton


def _is_tied(model: Any) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)


@dataclass
class RuntimeOnly:
    """As `qtrain.language_task.Comparison`, for a runtime that has nothing to be compared with: perplexity alone."""

    batches: list[Batch]
    sequences: list[list[int]] = field(init=False)
    runtime: Score = field(default_factory=Score)
    float_metrics: dict[str, float] = field(default_factory=dict)
    """The runtime's metrics of the float file, where there is one."""

    def __post_init__(self) -> None:
        self.sequences, self._labels = [], []
        for inputs, labels in self.batches:
            for ids, row in zip(inputs["input_ids"], labels, strict=True):
                scored = (row != IGNORED).nonzero().flatten()
                if len(scored) and int(scored[-1]) > 0:
                    self.sequences.append(ids[: int(scored[-1])].tolist())
                    self._labels.append(row)

    def add(self, sequence: int, start: int, logits: Any) -> None:
        """Score the runtime's logits at positions start, start + 1, … of a sequence."""
        runtime = torch.as_tensor(logits)
        following = self._labels[sequence][start + 1 : start + 1 + len(runtime)]
        wanted = following != IGNORED
        if bool(wanted.any()):
            self.runtime.add(runtime[: len(following)][wanted], following[wanted])

    def result(self) -> dict[str, Any]:
        """As `Comparison.result`, with None for what was not compared."""
        return {"tokens": self.runtime.tokens, "nmse": None, "training": {}, "runtime": self.runtime.metrics()}

    def fresh(self) -> RuntimeOnly:
        """Another one, of the same text, for the float file."""
        return RuntimeOnly(self.batches)


def rows(layers: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
    """`quantized` of run.json, once every layer was encoded."""
    return [
        {"name": n, "grid": m.quantized.grid.describe(), "shape": list(m.quantized.shape), "sqnr_db": m.quantized.sqnr_db}
        for n, m in layers
    ]
