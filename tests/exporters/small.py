"""A small model with an embedding and two Linear layers, quantized and ready to export; what the exporter tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporters.base import ExportJob
from qtrain.grids.base import Grid
from qtrain.prepare import convert, prepare
from qtrain.targets import select

VOCABULARY = 37


class Small(nn.Module):
    """Masked mean of embeddings, two Linear layers; logits [batch, 3]."""

    def __init__(self, width: int = 96, hidden: int = 45, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.inner = nn.Linear(width, hidden, bias=False)
        self.classifier = nn.Linear(hidden, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embedding(input_ids) * attention_mask.unsqueeze(-1)
        x = x.sum(1) / attention_mask.sum(1, keepdim=True).clamp(min=1)
        return {"logits": self.classifier(F.relu(self.inner(x)))}


def quantized(
    model: nn.Module, weight: Grid, embedding: Grid | None = None, activation: Grid | None = None, static: bool = False
) -> nn.Module:
    """Convert everything but the classifier, in place."""
    modules, _ = select(model.eval(), ["*"], ["classifier"])
    prepare(model, modules, weight, embedding, activation, static)
    return convert(model)


def batches(count: int = 3, seed: int = 0) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Batches of several sizes and lengths, with padding."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        size, length = 4 + i, 9 - 2 * i
        mask = torch.ones(size, length, dtype=torch.int64)
        mask[0, length // 2 :] = 0
        ids = torch.randint(0, VOCABULARY, (size, length), generator=generator)
        found.append(({"input_ids": ids, "attention_mask": mask}, torch.randint(0, 3, (size,), generator=generator)))
    return found


def logits_of(model: nn.Module, data: list[tuple[dict[str, Tensor], Tensor]]) -> Tensor:
    """[N, C] on ``data``."""
    with torch.no_grad():
        return torch.cat([model(**inputs)["logits"] for inputs, _ in data])


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """A metric."""
    return {"accuracy": float((logits.argmax(-1) == labels).double().mean())}


def job(model: nn.Module, folder: Path, **given: Any) -> ExportJob:
    """What a run gives an exporter."""
    data = batches()
    values: dict[str, Any] = {
        "model": model,
        "example_inputs": data[0][0],
        "batches": data,
        "training_logits": logits_of(model, data),
        "metrics": accuracy,
        "folder": folder,
        "max_length": 64,
        "vocab_size": VOCABULARY,
    }
    return ExportJob(**{**values, **given})
