"""Gradients accumulated over small batches are those of one large batch, whatever each of them has to score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from qtrain.fit import Fit, train
from qtrain.language import IGNORED
from qtrain.language_task import TASK
from qtrain.module import Module
from tests.tiny_fit import TRAINER, small_llama


class Uneven(LightningDataModule):
    """Six sequences, of which the first have few scored tokens, the last many."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 512, (6, 24), generator=generator)
        self.labels = self.ids.clone()
        for row, scored in enumerate((2, 20, 5, 1, 17, 9)):
            self.labels[row, : 24 - scored] = IGNORED

    def train_dataloader(self) -> Any:
        rows = [({"input_ids": self.ids[i : i + self.size]}, self.labels[i : i + self.size]) for i in range(0, 6, self.size)]
        return DataLoader(rows, batch_size=None, shuffle=False)  # type: ignore[arg-type]


def trained(folder: Path, size: int, accumulate: int, clip: float | None) -> dict[str, torch.Tensor]:
    model, fit = small_llama(), Fit(epochs=1, learning_rate=0.5, schedule="constant", warmup=0.0)
    module = Module(model, fit, torch.optim.SGD, task=TASK)
    node = TRAINER | {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    train(module, Uneven(size), fit, stage="float", folder=folder, trainer=node, logger=None, callbacks=[], resume=False)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("size", "accumulate", "alike"), [(1, 3, 3), (1, 4, None), (2, 3, 6)])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_small_batches_add_up_to_a_large_one(tmp_path: Path, size: int, accumulate: int, alike: int | None, clip: float | None) -> None:
    """(1, 4): six batches make one window of four, and one of the two that are left."""
    found = trained(tmp_path / "small", size, accumulate, clip)
    if alike is not None:
        expected = trained(tmp_path / "large", alike, 1, clip)
        for name, p in found.items():
            torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-6)
        return
    model, data = small_llama().train(), Uneven(1)
    for rows in (slice(0, 4), slice(4, 6)):
        TASK.loss(model, ({"input_ids": data.ids[rows]}, data.labels[rows]), None, 0.0, 1.0).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
        model.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-4, atol=1e-6)
