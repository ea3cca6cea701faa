"""LoftQ: the sum of base and adapter is nearer to the weight than rounding, and the base rounds to what was chosen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qtrain import registry
from qtrain.loftq import alternate, low_rank, start_near


def grid(name: str) -> Any:
    return registry.get("grid", "ggml")(type=name) if name.startswith("q") else registry.get("grid", name)()


def heavy(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp()


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 80), st.integers(8, 80), st.integers(1, 8), st.integers(0, 99))
def test_the_low_rank_product_is_nearly_the_best_there_is(rows: int, columns: int, rank: int, seed: int) -> None:
    x = heavy(rows, columns, seed)
    a, b = low_rank(x, rank)
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    best = (x.double() - (u[:, :rank] * s[:rank]) @ v[:rank]).square().sum()
    ours = (x.double() - (b @ a).double()).square().sum()
    assert ours <= best * 1.05 + 1e-6 * x.double().square().sum()


def test_a_matrix_of_that_rank_comes_back() -> None:
    x = heavy(40, 3) @ heavy(3, 50, 1)
    a, b = low_rank(x, 3)
    torch.testing.assert_close(b @ a, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf3", "nf2", "q4_0", "q2_k"])
def test_every_round_counts_and_the_sum_is_nearer_than_rounding(name: str) -> None:
    w, g = heavy(64, 256), grid(name)
    rounded = lambda x: g.encode(x).decode()  # noqa: E731
    errors = []
    for rounds in (1, 5):
        target, (a, b) = alternate(w, rounded, 8, rounds)
        errors.append(float((w - rounded(target) - b @ a).norm()))
    plain = float((w - rounded(w)).norm())
    assert errors[0] < plain and errors[1] <= errors[0]


def test_the_prepared_base_and_the_adapter_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96, bias=False), nn.Linear(96, 64))
    before = copy.deepcopy(model)
    g = grid("nf2")
    found = start_near(model, {"0": g}, rank=8, scaling=2.0, rounds=3)
    assert set(found) == {"0"} and torch.equal(model[1].weight, before[1].weight)
    a, b = found["0"]
    sum_ = g.encode(model[0].weight).decode() + 2.0 * b @ a
    plain = g.encode(before[0].weight).decode()
    assert (before[0].weight - sum_).norm() < 0.95 * (before[0].weight - plain).norm()
    assert a.shape == (8, 128) and b.shape == (96, 8)


def test_it_does_not_depend_on_the_generator_and_leaves_it_alone() -> None:
    w = heavy(32, 64)
    torch.manual_seed(1)
    first = low_rank(w, 4)
    state = torch.get_rng_state()
    second = low_rank(w, 4)
    assert torch.equal(first[0], second[0]) and torch.equal(state, torch.get_rng_state())


def test_a_weight_that_is_not_finite_is_refused() -> None:
    w = heavy(32, 64)
    w[0, 0] = float("nan")
    with pytest.raises((ValueError, RuntimeError)):
        alternate(w, lambda x: x.round(), 4, 2)
