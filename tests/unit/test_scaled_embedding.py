"""Embeddings that multiply their rows: known by what they compute, and exact on a grid."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from qtrain.grids.affine import Affine
from qtrain.grids.base import Grid
from qtrain.grids.ggml import Ggml
from qtrain.layers import FakeEmbedding, QuantizedEmbedding, in_float
from qtrain.prepare import convert, prepare
from qtrain.quantizers.torchao_qat import TorchaoQat
from qtrain.scaled_embedding import multiplies

IDS = torch.tensor([[3, 0, 39], [7, 7, 1]])


class ByHalves(nn.Embedding):
    """Has a scale, and uses it otherwise."""

    embed_scale = 2.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale * 0.5


class OnlyInTraining(nn.Embedding):
    """Does something else in training."""

    embed_scale = 2.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale + (0.1 if self.training else 0.0)


class Learned(nn.Embedding):
    """Its scale is a parameter, which codes do not hold."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.embed_scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Unused(nn.Embedding):
    """A plain one, with a number of that name."""

    embed_scale = 3.0


def scaled(kind: str, width: int = 64) -> Any:
    torch.manual_seed(0)
    if kind == "gemma3":
        return Gemma3TextScaledWordEmbedding(40, width, 0, embed_scale=width**0.5)
    return BartScaledWordEmbedding(40, width, 1, embed_scale=11.3)


@pytest.mark.parametrize("kind", ["gemma3", "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_those_of_transformers_are_known(kind: str, dtype: torch.dtype) -> None:
    embedding = scaled(kind).to(dtype)
    before = copy.deepcopy(embedding.state_dict())
    assert multiplies(embedding) and embedding.training
    assert all(torch.equal(embedding.state_dict()[n], w) for n, w in before.items())
    with torch.device("meta"):
        assert multiplies(scaled(kind).to("meta"))


@pytest.mark.parametrize("cls", [ByHalves, OnlyInTraining, Learned])
def test_what_computes_anything_else_is_refused(cls: Any) -> None:
    model = nn.Sequential(cls(40, 64).eval())
    assert not multiplies(model[0])
    with pytest.raises(ValueError, match=f"{cls.__name__} has a forward of its own"):
        prepare(model, {"0": model[0]}, Ggml("q4_0"), Ggml("q4_0"))


def on_grid(embedding: nn.Embedding, grid: Grid) -> nn.Embedding:
    """With weights that the grid holds."""
    embedding.weight.data = grid.fake(embedding.weight.detach().float()).to(embedding.weight.dtype)
    return embedding


@pytest.mark.parametrize("kind", ["gemma3", "bart"])
@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        (Ggml("q4_0"), torch.float32),
        (Ggml("q8_0"), torch.float32),
        (Ggml("f16"), torch.float32),
        (Ggml("bf16"), torch.bfloat16),
        (Affine(bits=8, rule="signed_absmax", granularity="tensor"), torch.float32),
    ],
    ids=lambda v: v.describe() if isinstance(v, Grid) else str(v),
)
def test_on_weights_that_the_grid_holds_no_output_changes(kind: str, grid: Grid, dtype: torch.dtype) -> None:
    model = nn.Sequential(on_grid(scaled(kind).to(dtype), grid)).eval()
    expected = model(IDS)
    prepare(model, {"0": model[0]}, grid, grid)
    assert isinstance(model[0], FakeEmbedding) and torch.equal(model(IDS), expected)
    with in_float(model):
        assert torch.equal(model(IDS), expected)
    convert(model)
    assert isinstance(model[0], QuantizedEmbedding) and torch.equal(model(IDS), expected) and model(IDS).dtype == dtype


@pytest.mark.parametrize("kind", ["gemma3", "bart"])
def test_the_row_is_rounded_and_then_multiplied(kind: str) -> None:
    grid, embedding = Ggml("q4_0"), scaled(kind)
    rounded = on_grid(copy.deepcopy(embedding), grid)
    model = nn.Sequential(embedding)
    prepare(model, {"0": embedding}, grid, grid)
    y = model(IDS)
    assert torch.equal(y, rounded(IDS)) and not torch.equal(y, embedding(IDS))
    y.sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None and float(gradient[7, 0]) == pytest.approx(2 * float(embedding.embed_scale))  # type: ignore[arg-type]
    assert model.state_dict().keys() == {"0.weight"}
    assert torch.equal(convert(model)(IDS), y.detach())


def test_a_number_of_that_name_that_nothing_multiplies_by_is_ignored() -> None:
    model = nn.Sequential(on_grid(Unused(40, 64), Ggml("q8_0")))
    expected = model(IDS)
    prepare(model, {"0": model[0]}, Ggml("q8_0"), Ggml("q8_0"))
    assert torch.equal(model(IDS), expected) and torch.equal(convert(model)(IDS), expected)


def test_torchao_would_leave_the_scale_out() -> None:
    model = nn.Sequential(scaled("gemma3"), nn.Linear(64, 4))
    scheme = TorchaoQat(weight=Affine(rule="absmax_half"), embedding=Affine(rule="absmax_half"))
    with pytest.raises(ValueError, match=r"0: Gemma3TextScaledWordEmbedding has a forward of its own.*quantizer=qat.*keep_float=\[0\]"):
        scheme.prepare(model, [])
