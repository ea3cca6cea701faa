"""NEFTune: uniform noise on the input embeddings while training (Jain et al. 2023, arXiv 2310.05914).

    x' = x + alpha / sqrt(L d) * u        u ~ U(-1, 1), drawn anew for every value of every step

x [B, L, d] is what the embedding gives: B sequences, L tokens, d wide. Its expected length, alpha / sqrt(3) per sequence, depends neither
on the length nor on the width. The paper fine-tunes 7B models on instructions with alpha = 5, 10 or 15 and finds answers better, if
longer; it keeps a model from learning a small set of answers by heart. Evaluation has no noise, and neither has a teacher.

The noise is drawn from torch's global generator, as dropout's is, whose state the checkpoints of a stage hold: a resumed run draws what
the uninterrupted one would have drawn. L is the length of the batch, padding included, as in transformers and trl; packed sequences
have none. A forward hook adds it for as long as the stage trains, so that no weight, checkpoint or exported file knows of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def input_embedding(model: Any, option: str) -> nn.Module:
    """The module that gives the input embeddings.

    Args:
        option: where the stage's options are: `finetune`.

    Raises:
        ValueError: if the model has none.
    """
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model that is not transformers', or has several embeddings
        found = None
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"{option}.neftune_alpha adds noise to input embeddings, and {type(model).__name__} names none (get_input_embeddings); valid "
            f"for it: null. Set {option}.neftune_alpha=null"
        )
    return found


@contextmanager
def noisy_embeddings(model: Any, alpha: float, option: str) -> Iterator[None]:
    """Noise of strength ``alpha`` on the input embeddings wherever they are in training mode.

    Raises:
        ValueError: see `input_embedding`.
    """

    def add(embedding: nn.Module, _: Any, x_BLd: Tensor) -> Tensor:
        if not embedding.training:
            return x_BLd
        return x_BLd + torch.empty_like(x_BLd).uniform_(-1, 1) * (alpha / math.sqrt(x_BLd.shape[-2] * x_BLd.shape[-1]))

    handle = input_embedding(model, option).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
