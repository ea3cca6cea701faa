"""Embeddings that multiply the row they look up by a constant: Gemma's, BART's, M2M-100's, Pegasus', …

    y = weight[ids] * embed_scale            in transformers the classes are called ...ScaledWordEmbedding; Gemma's scale is sqrt(width)

The scale is no part of the weight: the row is rounded as it is, then multiplied, and files hold the row (llama.cpp's graphs multiply too).
A class is known by what it computes, not by its name: `multiplies` gives a copy of it other weights and another scale, and looks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "embed_scale"
"""Attribute that holds the scale: a number, or a buffer."""


def scale_of(embedding: nn.Embedding) -> float | Tensor | None:
    """What the rows of ``embedding`` are multiplied by; None where its forward is torch's own, which does not multiply."""
    return None if type(embedding).forward is nn.Embedding.forward else getattr(embedding, NAME)


def scaled(rows: Tensor, scale: float | Tensor | None) -> Tensor:
    """``rows`` times ``scale``, in the dtype of ``rows``; as they are where there is none."""
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


@torch.no_grad()
def multiplies(embedding: nn.Embedding) -> bool:
    """Whether ``embedding`` (on any device, `meta` too) looks rows up, multiplies them by its `embed_scale`, and does nothing else."""
    given = getattr(embedding, NAME, None)
    if not isinstance(given, (int, float, Tensor)) or isinstance(given, nn.Parameter) or list(embedding.children()):
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(8, embedding.embedding_dim, generator=generator, device="cpu").to(embedding.weight.dtype)
    scale = torch.rand(given.shape, generator=generator, device="cpu").to(given.dtype) + 1 if isinstance(given, Tensor) else 1.7
    twin: Any = copy.copy(embedding)
    twin.__dict__ |= {"_parameters": {"weight": nn.Parameter(rows)}, "_buffers": dict(embedding._buffers), "padding_idx": None}
    setattr(twin, NAME, scale)
    ids = torch.tensor([[0, 7, 3], [3, 1, 5]], device="cpu")
    for twin.training in (True, False):
        try:
            found = twin(ids)
        except Exception:  # a forward of another signature, or that reads what only this module has, may raise anything
            return False
        expected = scaled(F.embedding(ids, rows), scale)
        if not isinstance(found, Tensor) or found.dtype != expected.dtype or not torch.equal(found, expected):
            return False
    return True
