"""Gradient checkpointing: the same gradients, where all is trained, where little is, and on the grid; blocks are computed twice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtrain.fit import Fit, check
from qtrain.grids.affine import Affine
from qtrain.language_task import TASK
from qtrain.layers import fake_activations
from qtrain.neftune import noisy_embeddings
from qtrain.prepare import prepare
from qtrain.recompute import recomputed
from tests.tiny_fit import language_fit, small_llama

CPU = torch.device("cpu")


def batch() -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids}, ids


class Low(nn.Module):
    """A low-rank addition to a frozen Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(base.out_features)
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(self.dropout(x)))


def some_trained(model: Any) -> Any:
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Low(layer.self_attn.q_proj)
        layer.mlp.down_proj = Low(layer.mlp.down_proj)
    return model


def on_grid(model: Any) -> Any:
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    prepare(model, linears, Affine(bits=4, group_size=16), activation=Affine(bits=8, granularity="token"))
    return model


def gradients(model: Any, recompute: bool) -> tuple[dict[str, Tensor], int]:
    """Of every trained parameter, and how often the first block's MLP was computed."""
    calls: list[int] = []
    model.train()
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # the second time, the end is not reached
    torch.manual_seed(5)
    with noisy_embeddings(model, 5.0, "finetune"):
        if recompute:
            with recomputed(model, "finetune"):
                TASK.loss(model, batch(), None, 0.0, 1.0).backward()
        else:
            TASK.loss(model, batch(), None, 0.0, 1.0).backward()
    handle.remove()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(calls)


@pytest.mark.parametrize("made", [lambda m: m, some_trained, on_grid], ids=["all trained", "some trained", "on the grid"])
@pytest.mark.usefixtures("one_thread")
def test_gradients_are_those_without_and_blocks_are_computed_twice(made: Any) -> None:
    expected, once = gradients(made(small_llama()), False)
    got, twice = gradients(made(small_llama()), True)
    assert (once, twice) == (1, 2)
    assert expected.keys() == got.keys() and len(got) >= 8
    assert any(float(g.abs().max()) > 0 for g in got.values())
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_nothing_is_left_behind() -> None:
    model = some_trained(small_llama())
    with recomputed(model, "finetune"):
        assert model.is_gradient_checkpointing
        assert not model.get_input_embeddings()._forward_hooks  # which would make embeddings ask for gradients
    assert not model.is_gradient_checkpointing
    with pytest.raises(RuntimeError, match="stop"), recomputed(model, "finetune"):
        raise RuntimeError("stop")
    assert not model.is_gradient_checkpointing


@pytest.mark.usefixtures("one_thread")
def test_a_stage_that_computes_twice_trains_to_the_same_weights(tmp_path: Path) -> None:
    plain, checkpointed = some_trained(small_llama()), some_trained(small_llama())
    language_fit(plain, tmp_path)
    language_fit(checkpointed, tmp_path, gradient_checkpointing=True)
    moved = dict(some_trained(small_llama()).named_parameters())
    for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, moved[name]) != a.requires_grad
    assert not checkpointed.is_gradient_checkpointing


def test_a_model_that_cannot_is_refused_when_a_run_loads() -> None:
    optimizer = {"_target_": "torch.optim.AdamW", "_partial_": True}
    config = SimpleNamespace(
        finetune=Fit(), quantizer=SimpleNamespace(fit=Fit(gradient_checkpointing=True)), adapter=None, optimizer=optimizer
    )
    check(config, small_llama(), CPU)
    with pytest.raises(ValueError, match=r"Linear cannot.*Set quantizer.fit.gradient_checkpointing=false"):
        check(config, nn.Linear(2, 2), CPU)


def test_ranges_that_would_move_between_the_two_are_refused() -> None:
    model = small_llama()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    prepare(model, linears, Affine(bits=4, group_size=16), activation=Affine(), static=True, observer={"kind": "moving_average"})
    assert any(True for _ in fake_activations(model))
    with pytest.raises(ValueError, match=r"follows what it sees.*Set quantizer.observer=minmax"), recomputed(model, "quantizer.fit"):
        pass
