"""What a model is for, and so how it is trained, run and judged: one class per task, the rest of a run is the same for all.

    classification   logits [N, C] of examples; accuracy, loss
    language         next-token distributions of a text; perplexity, loss (`qtrain/language_task.py`)
    embedding        one vector per text; cosine to the float model's (`qtrain/embedding_task.py`)

A model's config names its task. Everything is measured on the same batches in the same order, so that stages compare to the bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.evaluate import Batch, classification_metrics, compare_to_float, logits_of, predict
from qtrain.receipt import nmse

MODULES = {"classification": "qtrain.tasks", "language": "qtrain.language_task", "embedding": "qtrain.embedding_task"}
"""Where each task's class lives: `TASK` there."""


class Task(ABC):
    """How a model of one kind is trained and judged. Outputs are the task's own value; stages only hand them on."""

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    """What it can be judged by on the validation split; the first is what a run returns unless `optimize` says otherwise."""
    lost: ClassVar[str]
    """Name of what a layer costs in the first of them: how far it drops, or rises."""
    needs_reference: ClassVar[bool] = False
    """Whether metrics exist only beside the float model's outputs."""

    def check(self, model: nn.Module, batches: list[Batch]) -> None:  # noqa: B027 (most tasks have nothing to check)
        """Raise ValueError, naming the remedy, if ``model`` cannot be judged on ``batches``."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, teacher: nn.Module | None, weight: float, temperature: float) -> Tensor:
        """Training loss of one batch, a scalar: (1 - weight) * own loss + weight * T^2 * KL(teacher || model) at temperature T."""

    def count(self, batch: Batch) -> int:
        """What the loss of a batch is a mean over: its examples, unless the task says otherwise."""
        return len(batch[1])

    @abstractmethod
    def validate(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], int]:
        """`validation_loss` and others of one batch, and how many examples they are means over."""

    @abstractmethod
    def predict(self, model: nn.Module, batches: list[Batch], what: str) -> Any:
        """Outputs on ``batches`` in order; ``what`` is shown beside the progress bar."""

    @abstractmethod
    def measure(self, outputs: Any, batches: list[Batch], reference: Any = None) -> dict[str, float]:
        """Metrics of outputs; with the float model's outputs as ``reference``, also agreement and KL to it."""

    @abstractmethod
    def difference(self, before: Any, after: Any) -> dict[str, Any]:
        """{"logits": how many were compared, "bit_exact", "nmse", "max_abs"} of two outputs on the same batches."""

    def comparison(self, outputs: Any, batches: list[Batch], reference: Any) -> Any:
        """What an exporter gives a runtime's results to where they do not fit into one tensor; None where they do."""
        return None


def task(name: str) -> Task:
    """The task called ``name``."""
    found: Task = import_module(MODULES[name]).TASK
    return found


class Classification(Task):
    """One class per example."""

    name = "classification"
    metrics = ("accuracy", "loss")
    lost = "accuracy_drop"

    def loss(self, model: nn.Module, batch: Batch, teacher: nn.Module | None, weight: float, temperature: float) -> Tensor:
        """Cross-entropy; the teacher distils logits (Hinton et al. 2015)."""
        inputs, labels = batch
        logits = logits_of(model(**inputs)).float()
        loss = F.cross_entropy(logits, labels)
        if teacher is None:
            return loss
        with torch.no_grad():
            target = F.log_softmax(logits_of(teacher(**inputs)).float() / temperature, -1)
        student = F.log_softmax(logits / temperature, -1)
        distillation = F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2
        return (1 - weight) * loss + weight * distillation

    def validate(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], int]:
        """Loss and accuracy."""
        inputs, labels = batch
        logits = logits_of(model(**inputs)).float()
        accuracy = (logits.argmax(-1) == labels).float().mean()
        return {"validation_loss": F.cross_entropy(logits, labels), "validation_accuracy": accuracy}, len(labels)

    def predict(self, model: nn.Module, batches: list[Batch], what: str) -> Tensor:
        """Logits [N, C], float32 on the CPU."""
        return predict(model, batches, what)

    def measure(self, outputs: Tensor, batches: list[Batch], reference: Tensor | None = None) -> dict[str, float]:
        """Accuracy, loss; agreement and KL."""
        metrics = classification_metrics(outputs, torch.cat([labels for _, labels in batches]))
        return metrics if reference is None else metrics | compare_to_float(outputs, reference)

    def difference(self, before: Tensor, after: Tensor) -> dict[str, Any]:
        """Of logits."""
        worst = float((after - before).abs().max())
        return {"logits": after.numel(), "bit_exact": torch.equal(before, after), "nmse": nmse(before, after), "max_abs": worst}


TASK = Classification()
