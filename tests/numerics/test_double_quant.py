"""Double quantization of scales: the map, the look-up and the two roundings are bitsandbytes' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain.grids import double_quant

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def dynamic_map() -> Tensor:
    return torch.from_numpy(double_quant.dynamic_map())


def test_the_map_is_bitsandbytes_own(bnb: Any) -> None:
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("without fused multiply-add bitsandbytes makes another map")
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


def test_the_map_is_what_the_paper_describes() -> None:
    values = dynamic_map().double()
    assert values.dtype == torch.float64 and len(values) == 256 and bool((values.diff() > 0).all())
    assert {0.0, 1.0} <= set(values.tolist())
    rest = values[(values != 0) & (values != 1)]
    assert torch.equal(rest, -rest.flip(0))
    for e in range(7):
        step = 0.9 / 2**e
        expected = 10.0 ** (e - 6) * (0.1 + step * (torch.arange(2**e).double() + 0.5))
        assert bool((torch.cdist(expected[:, None], values[:, None]).amin(1) < 1e-7 * 10.0 ** (e - 6)).all())


def their_codes(bnb: Any, v: Tensor) -> Tensor:
    """bitsandbytes' codes of ``v`` in [-1, 1], each block led by a 1."""
    blocks = torch.nn.functional.pad(v, (0, -len(v) % 255)).reshape(-1, 255)
    codes, state = bnb.quantize_blockwise(torch.cat([torch.ones(len(blocks), 1), blocks], 1).reshape(-1), blocksize=256)
    assert bool((state.absmax == 1).all())
    return codes.reshape(-1, 256)[:, 1:].reshape(-1)[: len(v)]


def test_every_entry_of_the_look_up_and_its_edges_are_bitsandbytes(bnb: Any) -> None:
    middles = torch.arange(65536).double() / 65535 * 2 - 1
    edges = ((torch.arange(65535).double() + 0.5) / 65535 * 2 - 1).float()
    around = [torch.nextafter(edges, edges + s).clamp(-1, 1) for s in (-1, 0, 1)]
    tiny = torch.randn(50000, generator=torch.Generator().manual_seed(0)) * 10 ** -torch.linspace(1, 9, 50000)
    v = torch.cat([middles.float(), *around, tiny.clamp(-1, 1)])
    assert torch.equal(double_quant.look_up(v), their_codes(bnb, v))


def test_codes_are_the_nearest_or_its_neighbour_and_differ_from_the_nearest_rarely() -> None:
    v = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    nearest = (v[:, None] - dynamic_map()).abs().argmin(1)
    codes = double_quant.look_up(v).long()
    assert bool(((codes - nearest).abs() <= 1).all()) and 1e-4 < float((codes != nearest).double().mean()) < 5e-3


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 1200), st.sampled_from(["normal", "equal", "zeros", "subnormal", "one large"]), st.integers(0, 99))
def test_scales_are_bitsandbytes(bnb: Any, count: int, kind: str, seed: int) -> None:
    absmax = torch.randn(count, generator=torch.Generator().manual_seed(seed)).abs()
    if kind == "equal":
        absmax[:] = absmax[0]
    elif kind == "zeros":
        absmax.zero_()
    elif kind == "subnormal":
        absmax *= 1e-39
    elif kind == "one large":
        absmax[count // 2] = 1e6
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    params = double_quant.compress(absmax)
    assert params["absmax"].dtype == torch.uint8 and list(params) == list(double_quant.BITS)
    assert torch.equal(params["absmax"], codes) and torch.equal(params["nested_absmax"], state.absmax)
    assert torch.equal(params["nested_offset"], offset) and params["nested_offset"].shape == ()
    assert torch.equal(double_quant.expand(params), bnb.dequantize_blockwise(codes, state) + offset)
    if kind == "subnormal":
        return
    error = (double_quant.expand(params) - absmax).abs()
    assert bool((error <= 0.008 * params["nested_absmax"].repeat_interleave(256)[:count] + 1e-6 * absmax.max()).all())


def test_no_scales_are_no_scales() -> None:
    params = double_quant.compress(torch.empty(0))
    assert [tuple(p.shape) for p in params.values()] == [(0,), (0,), ()] and double_quant.expand(params).shape == (0,)
