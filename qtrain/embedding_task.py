"""Sentence embeddings: one unit vector per text, judged by how close it stays to the float model's.

    e = pool(last hidden states) / |pool(last hidden states)|           pool: mean over tokens, or the first token (`model.pooling`)

    cosine      mean over texts of e . e_float
    agreement   share of texts whose nearest other text is the one it was in float: what a search would return first

There are no labels, so every metric is relative to the float model, and training is distillation from it: 1 - cosine. Any dataset of
texts serves; its labels are not read.

Shapes: N texts, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.console import progress
from qtrain.evaluate import Batch
from qtrain.receipt import max_abs, nmse
from qtrain.tasks import Task


def embed(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Unit vectors [N, D], float32."""
    states: Tensor = model(**inputs).last_hidden_state.float()
    if model.pooling == "cls":
        return F.normalize(states[:, 0], dim=-1)
    mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def nearest(vectors_ND: Tensor) -> Tensor:
    """For each vector the index of the nearest other one, int64 [N]; rows at a time, so that memory stays bounded."""
    found = []
    for start in range(0, len(vectors_ND), 1024):
        rows = vectors_ND[start : start + 1024]
        similar = rows @ vectors_ND.T
        similar[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = -2.0
        found.append(similar.argmax(-1))
    return torch.cat(found)


def closeness(vectors: Tensor, reference: Tensor) -> dict[str, float]:
    """Cosine and agreement with the float model's vectors."""
    cosine = float((vectors.double() * reference.double()).sum(-1).mean())
    return {"cosine": cosine, "agreement": float((nearest(vectors) == nearest(reference)).double().mean())}


class Comparison:
    """A runtime's vectors against training's, added one by one (`exporters/base.py`)."""

    def __init__(self, outputs: Tensor, batches: list[Batch], reference: Tensor) -> None:
        self.outputs, self.reference = outputs, reference
        self.sequences: list[list[int]] = [
            ids[mask.bool()].tolist()
            for inputs, _ in batches
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        """Token ids, without padding."""
        self.runtime = torch.zeros_like(outputs)

    def add(self, sequence: int, start: int, vectors: Any) -> None:
        """The runtime's vector [1, D] of a sequence, of any length; ``start`` is 0."""
        vector = torch.as_tensor(vectors, dtype=torch.float32)
        if vector.shape[-1] != self.outputs.shape[-1]:
            raise ValueError(f"the runtime gives vectors of {vector.shape[-1]} values, training of {self.outputs.shape[-1]}")
        self.runtime[sequence] = F.normalize(vector, dim=-1)[0]

    def result(self) -> dict[str, Any]:
        """As `qtrain.language_task.Comparison.result`; the arg-max of a vector is its nearest other."""
        return {
            "tokens": sum(map(len, self.sequences)),
            "nmse": nmse(self.outputs, self.runtime),
            "max_abs": max_abs(self.outputs, self.runtime),
            "top1_agreement": float((nearest(self.outputs) == nearest(self.runtime)).double().mean()),
            "training": closeness(self.outputs, self.reference),
            "runtime": closeness(self.runtime, self.reference),
        }


class Embedding(Task):
    """One vector per text."""

    name = "embedding"
    metrics = ("cosine",)
    lost = "cosine_drop"
    needs_reference = True

    def check(self, model: nn.Module, batches: list[Batch]) -> None:
        """Raise where there are too few texts to be anyone's neighbour.

        Raises:
            ValueError: for fewer than three.
        """
        texts = sum(len(labels) for _, labels in batches)
        if texts < 3:
            raise ValueError(
                f"the test split has {texts} texts; neighbours need at least 3. Set data.limit=null, or data.test=FILE to more texts"
            )

    def loss(self, model: nn.Module, batch: Batch, teacher: nn.Module | None, weight: float, temperature: float) -> Tensor:
        """1 - cosine to the teacher's vector.

        Raises:
            ValueError: without a teacher.
        """
        if teacher is None:
            raise ValueError(
                "an embedding model has no labels to learn from: it can only be distilled. Set finetune.epochs=0, and for "
                "quantizer=qat quantizer.distill.weight=1"
            )
        inputs, _ = batch
        with torch.no_grad():
            target = embed(teacher, inputs)
        return (1 - (embed(model, inputs) * target).sum(-1)).mean()

    def validate(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], int]:
        """Nothing: there are no labels, and the run measures the distance to the float model after training."""
        return {}, len(batch[1])

    @torch.inference_mode()
    def predict(self, model: nn.Module, batches: list[Batch], what: str) -> Tensor:
        """Unit vectors [N, D], float32 on the CPU."""
        model.eval()
        device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
        rows = [embed(model, {n: v.to(device) for n, v in inputs.items()}).cpu() for inputs, _ in progress(batches, what)]
        return torch.cat(rows)

    def measure(self, outputs: Tensor, batches: list[Batch], reference: Tensor | None = None) -> dict[str, float]:
        """Cosine and agreement; the float model's own are 1."""
        return closeness(outputs, outputs if reference is None else reference)

    def difference(self, before: Tensor, after: Tensor) -> dict[str, Any]:
        """Of the vectors."""
        return {
            "logits": after.numel(),
            "bit_exact": torch.equal(before, after),
            "nmse": nmse(before, after),
            "max_abs": max_abs(before, after),
        }

    def comparison(self, outputs: Tensor, batches: list[Batch], reference: Tensor) -> Comparison:
        """See `Comparison`."""
        return Comparison(outputs, batches, reference)


TASK = Embedding()
