"""ggml's super-blocks against llama.cpp itself (and golden files that it made), the gguf package, and definitions written here."""

import importlib.util
import zlib
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from qtrain.grids.base import Params, QuantizedTensor
from qtrain.grids.ggml import TYPES, Ggml, search, superblocks
from tests.golden import make_ggml

pytestmark = pytest.mark.usefixtures("one_thread")

K_TYPES = list(superblocks.TYPES)
WITH_MIN = ("q2_k", "q4_k", "q5_k")
GOLDEN = Path(make_ggml.__file__).parent / "ggml"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed) / torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)).sqrt().clamp_min(0.03)


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return dict(data)


def dequantize(data: Tensor, name: str) -> Tensor:
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[name.upper()]).copy())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def error(values: Tensor, w: Tensor, importance: Tensor | float = 1.0) -> Tensor:
    """Weighted squared error of each row, float64."""
    return ((values.double() - w.double()).square() * importance).sum(-1)


def theirs(name: str, w: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
    """What llama.cpp makes of ``w``."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    data = make_ggml.quantize(make_ggml.llama_cpp(), name, w.numpy(), None if importance is None else importance.numpy())
    return Ggml(name).unpack(torch.from_numpy(data), tuple(w.shape))


def steps(params: Params, name: str) -> Tensor:
    """What a code step is worth for every value, [R, columns]."""
    sub = params["sub_scale"].float().unflatten(1, (params["scale"].shape[1], -1)) * params["scale"].unsqueeze(-1)
    return sub.flatten(1).repeat_interleave(TYPES[name].sub, 1)  # type: ignore[attr-defined]


# -- bytes: what llama.cpp writes and reads, what the gguf package reads ---------------------------------------------------


@pytest.mark.parametrize("weighted", ["", "weighted_"])
@pytest.mark.parametrize("name", make_ggml.TYPES)
def test_golden_bytes_are_read_as_llama_cpp_reads_them(name: str, weighted: str) -> None:
    data, grid = golden(name), Ggml(name)
    packed = torch.from_numpy(data[f"{weighted}bytes"])
    q = grid.unpack(packed, (len(packed), make_ggml.COLUMNS))
    assert zlib.crc32(q.decode().numpy().tobytes()) == int(data[f"{weighted}crc"])
    assert torch.equal(grid.pack(q), packed)


@pytest.mark.parametrize("name", [n for n in make_ggml.TYPES if n not in K_TYPES])
def test_golden_bytes_of_plain_blocks_are_ours(name: str) -> None:
    grid = Ggml(name)
    assert torch.equal(grid.pack(grid.encode(torch.from_numpy(golden("values")["x"]))), torch.from_numpy(golden(name)["bytes"]))


@pytest.mark.parametrize("name", K_TYPES)
def test_on_llama_cpps_scales_our_codes_are_llama_cpps(name: str) -> None:
    """Where a step is zero all codes mean the same, and llama.cpp writes what its search left there."""
    w, grid = torch.from_numpy(golden("values")["x"]), Ggml(name)
    for key in ("bytes", "weighted_bytes"):
        q = grid.unpack(torch.from_numpy(golden(name)[key]), tuple(w.shape))
        codes, counts = grid.encode(w, q.params).codes, steps(q.params, name) != 0
        assert torch.equal(codes[counts], q.codes[counts]) and not bool(codes[~counts].any())


@pytest.mark.parametrize("name", K_TYPES)
def test_decode_is_the_gguf_packages_dequantize(name: str) -> None:
    grid = Ggml(name)
    for w in (torch.from_numpy(golden("values")["x"]), heavy(6, 768, seed=1) * 100):
        q = grid.encode(w)
        data = grid.pack(q)
        assert data.dtype == torch.uint8 and data.shape == (len(w), grid.row_bytes(w.shape[1])) and data.numel() == q.nbytes()
        assert same_bits(q.decode(), dequantize(data, name))
        again = grid.unpack(data, tuple(w.shape))
        assert torch.equal(again.codes, q.codes) and again.params.keys() == q.params.keys()
        assert all(torch.equal(again.params[n], p) and again.params[n].dtype == p.dtype for n, p in q.params.items())


@pytest.mark.parametrize("name", K_TYPES)
def test_any_bytes_unpack_and_pack_again(name: str) -> None:
    grid = Ggml(name)
    kind = grid.block_type
    data = torch.randint(0, 256, (30, 2, kind.block_bytes), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    supers = [1, 3] if name in ("q4_k", "q5_k") else [-1, -3] if name == "q2_k" else [-1]
    data[..., supers] &= 0x7B  # finite float16 numbers
    data = data.reshape(30, -1)
    q = grid.unpack(data, (5, 6, 512))
    assert q.codes.dtype == torch.int8 and int(q.codes.min()) == kind.low and int(q.codes.max()) == kind.high
    assert torch.equal(grid.pack(q), data)
    assert same_bits(q.decode().reshape(30, 512), dequantize(data, name))


# -- the search: not above llama.cpp's error -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", K_TYPES)
def test_golden_errors_are_not_above_llama_cpps(name: str) -> None:
    data, grid = golden("values"), Ggml(name)
    w = torch.from_numpy(data["x"])
    for weighted, importance in (("", None), ("weighted_", torch.from_numpy(data["importance"]))):
        weight = 1.0 if importance is None else importance
        llama = error(grid.unpack(torch.from_numpy(golden(name)[f"{weighted}bytes"]), tuple(w.shape)).decode(), w, weight)
        ours = error(grid.encode(w, importance=importance).decode(), w, weight)
        exact = 1e-6 * error(torch.zeros_like(w), w, weight)  # of constant rows only float16's rounding of a scale is left
        worst = torch.maximum(llama * 1.03, exact)  # a row is two super-blocks: one may be less lucky
        assert bool((ours <= worst).all()), [(str(data["kinds"][i]), weighted) for i in (ours > worst).nonzero()]
        assert float(ours.sum()) <= float(llama.sum())
        assert float((ours / llama.clamp_min(1e-30)).median()) < 0.985


@pytest.mark.parametrize("name", K_TYPES)
@pytest.mark.parametrize("make", [normal, heavy])
def test_errors_are_below_llama_cpps(name: str, make) -> None:  # type: ignore[no-untyped-def]
    w, grid = make(64, 512, seed=3), Ggml(name)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(4)).pow(4) + 1e-3
    for weight in (None, importance):
        scale = 1.0 if weight is None else weight
        ours, llama = error(grid.encode(w, importance=weight).decode(), w, scale), error(theirs(name, w, weight).decode(), w, scale)
        assert float(ours.sum()) < 0.98 * float(llama.sum())
        assert float((ours <= llama).float().mean()) > 0.6
    assert float(error(grid.encode(w).decode(), w).sum()) < float(error(theirs(name, w).decode(), w).sum())


@pytest.mark.parametrize("name", K_TYPES)
def test_hard_blocks_are_not_worse_than_llama_cpps(name: str) -> None:
    near, spikes = 1e-3 * normal(8, 256, seed=5), normal(64, 256, seed=6)
    spikes[:, ::16] *= 40
    spikes[::2, 64:128] = 0
    for w in (near + 1, near - 1, spikes, -heavy(32, 256, seed=7).abs(), normal(8, 256, seed=8) * 2e-5):
        for importance in (None, torch.rand(256, generator=torch.Generator().manual_seed(9)) + 0.1):
            scale = 1.0 if importance is None else importance
            ours, llama = Ggml(name).encode(w, importance=importance).decode(), theirs(name, w, importance).decode()
            assert float(error(ours, w, scale).sum()) <= float(error(llama, w, scale).sum()) * (1 + 1e-6)


@pytest.mark.parametrize("name", K_TYPES)
def test_importance_lowers_the_error_where_it_is(name: str) -> None:
    """In the second super-block of a row, columns 300 to 331."""
    grid, w, importance = Ggml(name), normal(40, 512, seed=10), torch.full((512,), 0.01)
    importance[300:332] = 10.0
    plain, weighted = (grid.encode(w, importance=i).decode() for i in (None, importance))
    there = slice(300, 332)
    assert float(error(weighted[:, there], w[:, there]).sum()) < 0.92 * float(error(plain[:, there], w[:, there]).sum())
    assert float(error(weighted, w, importance).sum()) < float(error(plain, w, importance).sum())


@pytest.mark.parametrize("name", K_TYPES)
def test_units_of_weights_and_importance_do_not_matter(name: str) -> None:
    grid, w, importance = Ggml(name), normal(6, 512, seed=11) * 64, normal(512, seed=12).square() + 1e-3
    one, other = grid.choose(w, importance), grid.choose(w * 8, importance * 1024)
    assert all(torch.equal(p * 8 if p.is_floating_point() else p, other[n]) for n, p in one.items())
    plain = grid.choose(w)
    assert all(torch.equal(p, grid.choose(w, torch.zeros(512))[n]) for n, p in plain.items())  # nothing was collected
    unseen = importance.clone()
    unseen[100] = 0.0
    w[:, 100] = 15.0
    assert float((grid.encode(w, importance=unseen).decode()[:, 100] - 15).abs().max()) < 15  # not given up


@pytest.mark.parametrize("name", K_TYPES)
def test_stored_numbers_are_what_a_file_holds(name: str) -> None:
    grid = Ggml(name)
    kind = grid.block_type
    params = grid.choose(torch.cat((heavy(5, 512, seed=13), torch.zeros(1, 512), normal(1, 512) * 1e-9)))
    assert list(params) == list(kind.param_bits) and grid.searches
    for parameter, value in params.items():
        if parameter in ("scale", "min"):
            assert value.dtype == torch.float32 and value.shape == (7, 2) and torch.equal(value, value.half().float())
        else:
            low, high = (0, 2 ** kind.param_bits[parameter] - 1) if name in WITH_MIN else (kind.sub_low, kind.sub_high)  # type: ignore[attr-defined]
            assert value.dtype == torch.int8 and value.shape == (7, 2 * 256 // kind.sub)  # type: ignore[attr-defined]
            assert low <= int(value.min()) and int(value.max()) <= high
    assert not bool(grid.encode(torch.zeros(2, 256)).decode().any())
    assert grid.encode(torch.zeros(0, 512)).params["sub_scale"].shape[0] == 0


@pytest.mark.parametrize("name", K_TYPES)
def test_pieces_and_neighbours_change_nothing_that_matters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, w = Ggml(name), heavy(24, 512, seed=14)
    whole = error(grid.encode(w).decode(), w)
    monkeypatch.setattr(search, "_PIECE", 1024)
    assert torch.allclose(error(grid.encode(w).decode(), w), whole, rtol=1e-3)
    assert torch.allclose(error(grid.encode(w[3:5]).decode(), w[3:5]), whole[3:5], rtol=1e-3)


# -- the promise: fake == decode(encode) -----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, (2, 256), elements=st.floats(-(2.0**14), 2.0**14, width=32, allow_subnormal=True)), st.sampled_from(K_TYPES))
def test_fake_is_decode_of_encode_for_any_floats(a: np.ndarray, name: str) -> None:
    grid, w = Ggml(name), torch.from_numpy(a)
    q = grid.encode(w)
    assert same_bits(grid.fake(w), q.decode())
    frozen = {n: p.flip(0) for n, p in q.params.items()}
    assert same_bits(grid.fake(w, frozen), grid.encode(w, frozen).decode())
    assert same_bits(q.decode(), dequantize(grid.pack(q), name))


@pytest.mark.parametrize("name", K_TYPES)
def test_on_given_parameters_every_code_is_the_nearest_and_the_mask_says_what_clips(name: str) -> None:
    grid, w = Ggml(name), heavy(6, 512, seed=15)
    params = grid.choose(w * 0.7)
    q = grid.encode(w, params)
    values, mask = grid.round_trip(w, params)
    kind, best, step = grid.block_type, torch.full_like(w, torch.inf), steps(params, name)
    for code in range(kind.low, kind.high + 1):
        best = torch.minimum(best, (QuantizedTensor(grid, torch.full_like(q.codes, code), params).decode() - w).abs())
    assert same_bits(values, q.decode()) and torch.allclose((values - w).abs(), best, rtol=1e-4, atol=1e-7)
    clipped = (values - w).abs() > step.abs() / 2 * (1 + 1e-5)
    assert mask is not None and torch.equal(~mask & (step != 0), clipped & (step != 0)) and bool(mask[step == 0].all())
    assert 0 < int(clipped.sum()) < w.numel() / 2


@pytest.mark.parametrize("name", K_TYPES)
def test_decoded_values_are_a_fixed_point_on_their_parameters_only(name: str) -> None:
    grid = Ggml(name)
    q = grid.encode(heavy(8, 512, seed=16))
    assert same_bits(grid.encode(q.decode(), q.params).decode(), q.decode())
    assert "searches its scales anew" in (grid.check_dtype(torch.float32) or "")


def test_scales_beyond_float16_are_refused_and_leave_no_half_result() -> None:
    for name in K_TYPES:
        with pytest.raises(ValueError, match="overflows"):
            Ggml(name).encode(normal(1, 256) * 1e12)
