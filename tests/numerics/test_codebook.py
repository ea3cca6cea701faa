"""Codebook grids against bitsandbytes, to the bit, and against definitions written here."""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from exporters.base import packed_layers, packed_weights
from qtrain import checkpoint, registry
from qtrain.evaluate import sizes
from qtrain.grids.base import QuantizedTensor, from_spec
from qtrain.grids.codebook import BLOCK_SIZES, Codebook, Fp4, Nf2, Nf3, Nf4
from qtrain.layers import FakeEmbedding, QuantizedEmbedding, fake_layers
from qtrain.prepare import convert, prepare
from qtrain.quantizers.rtn import Rtn

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS = {"nf4": Nf4, "fp4": Fp4, "nf3": Nf3, "nf2": Nf2}
FOUR_BITS = ("nf4", "fp4")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("normal", "heavy", "zeros", "constant", "subnormal", "zero blocks", "ties", "tiny and large")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bnb() -> Any:
    """bitsandbytes.functional, whose fallbacks run without torch.compile."""
    functional = pytest.importorskip("bitsandbytes.functional")
    with torch.compiler.set_stance("force_eager"):
        yield functional


def values(kind: str, n: int, seed: int = 0) -> Tensor:
    """n float32 numbers, finite as float16 too."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=generator)
    if kind == "heavy":
        return (w / (torch.rand(n, generator=generator) + 0.003) ** 2).clamp(-6e4, 6e4)
    if kind == "zeros":
        return w * 0.0  # of both signs
    if kind == "constant":
        return torch.full((n,), float(w[0]))
    if kind == "subnormal":
        return w * 10.0 ** float(torch.randint(-44, -36, (), generator=generator))
    if kind == "zero blocks":
        return torch.where(torch.arange(n) // 32 % 3 == 0, 0.0, w)
    if kind == "ties":
        x = torch.tensor(Fp4.codebook + Nf4.codebook + Nf3.codebook).sort().values
        middles = torch.cat([(Fp4().tables(CPU).threshold), Nf4().tables(CPU).threshold, x])
        middles = middles[middles.isfinite()]
        picked = middles[torch.randint(len(middles), (n,), generator=generator)]
        picked = torch.nextafter(picked, picked + torch.randint(-1, 2, (n,), generator=generator))
        return torch.where(torch.arange(n) % 32 == 0, 1.0, picked) * 2.0 ** float(torch.randint(-3, 4, (), generator=generator))
    if kind == "tiny and large":
        return w * 10.0 ** -(torch.arange(n) // 32 % 7).float()
    return w


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    integers = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    different = (a.contiguous().view(integers) != b.contiguous().view(integers)).reshape(-1).nonzero()
    assert not len(different), (
        f"{len(different)} differ, first at {int(different[0])}: {a.reshape(-1)[different[0]]} {b.reshape(-1)[different[0]]}"
    )


def their_values(bnb: Any, data: Tensor, state: Any) -> Tensor:
    """What bitsandbytes decodes, [n]: as one row, since its AVX-512 decoder takes wrong scales where blocks cross rows."""
    flat = copy.copy(state)
    flat.shape = torch.Size([1, state.shape.numel()])
    return bnb.dequantize_4bit(data, flat).reshape(-1)


# -- the values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUR_BITS)
def test_the_codebook_is_bitsandbytes_own(bnb: Any, name: str) -> None:
    assert_same_bits(torch.tensor(GRIDS[name].codebook), bnb.get_4bit_type(name, "cpu"))
    assert_same_bits(GRIDS[name]().tables(CPU).by_code, bnb.get_4bit_type(name, "cpu"))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_floats_are_qloras_quantiles(bits: int) -> None:
    quantile = NormalDist().inv_cdf
    d = (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    half = 2 ** (bits - 1)
    positive = [quantile(1 - d + (d - 0.5) * i / half) for i in range(half)]
    negative = [-quantile(1 - d + (d - 0.5) * i / (half - 1)) for i in range(half - 1)]
    expected = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float64) / quantile(1 - d)
    book = torch.tensor(GRIDS[f"nf{bits}"].codebook, dtype=torch.float64)
    assert bool(((book - expected).abs() < (3e-7 if bits == 4 else 4e-8)).all())  # bitsandbytes rounds 0.96770833 to seven digits
    assert float(book[half - 1]) == 0.0 and float(book[0]) == -1.0 and float(book[-1]) == 1.0
    assert bool((book == book.float().double()).all())


def test_thresholds_are_those_of_bitsandbytes_and_each_has_a_bucket(bnb: Any) -> None:
    from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds

    for name in FOUR_BITS:
        bounds, _ = _get_4bit_quantize_bounds(name, CPU)
        found = GRIDS[name]().tables(CPU).threshold
        assert_same_bits(found[found.isfinite()], bounds)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(GRIDS)), st.integers(0, 999))
def test_a_code_is_the_nearest(name: str, seed: int) -> None:
    """On the scales of another tensor too, where values lie beyond the codebook."""
    grid, w = GRIDS[name](double_quant=False), values("heavy", 256, seed)
    for params in (None, grid.choose(values("normal", 256, seed + 1) * 3)):
        q = grid.encode(w, params)
        candidates = torch.tensor(grid.codebook, dtype=torch.float64) * q.params["absmax"].repeat_interleave(64)[:, None]
        distance = (candidates - w[:, None]).abs()
        chosen = distance.gather(1, q.codes.long()[:, None])[:, 0]
        slack = 1e-6 * q.params["absmax"].repeat_interleave(64) + 1e-6 * w.abs()
        assert bool((chosen <= distance.amin(1) + slack).all())


# -- bitsandbytes, to the bit ----------------------------------------------------------------------------------------------


@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from(FOUR_BITS),
    st.sampled_from(KINDS),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.sampled_from(BLOCK_SIZES[:5]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_codes_scales_and_values_are_bitsandbytes(
    bnb: Any, name: str, kind: str, shape: list[int], block: int, nested: bool, dtype: torch.dtype, seed: int
) -> None:
    w = values(kind, torch.Size(shape).numel(), seed).reshape(shape).to(dtype)
    data, state = bnb.quantize_4bit(w, blocksize=block, compress_statistics=nested, quant_type=name)
    grid = GRIDS[name](block, nested)
    q = grid.encode(w)
    assert q.shape == tuple(shape) and q.codes.dtype == torch.int8
    assert_same_bits(grid.pack(q), data)
    assert_same_bits(q.params["absmax"], state.absmax)
    if nested:
        assert_same_bits(q.params["nested_absmax"], state.state2.absmax)
        assert_same_bits(q.params["nested_offset"], state.offset)
    ours, theirs = q.decode().to(dtype).reshape(-1), their_values(bnb, data, state)
    if dtype == torch.bfloat16:  # AVX512-BF16's conversion makes zeros of bfloat16's denormals
        least = torch.finfo(dtype).smallest_normal
        ours, theirs = (torch.where(x.abs() <= least, x * 0.0, x) for x in (ours, theirs))
    if name == "fp4":  # its decoder of rows that 16 does not divide gives code 8 a sign
        ours, theirs = ours + 0.0, theirs + 0.0
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("name", FOUR_BITS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_whole_weight_is_bitsandbytes(bnb: Any, name: str, nested: bool) -> None:
    for shape, block in (((384, 1024), 64), ((300, 320), 64), ((96, 4096), 4096), ((130, 66), 2048), ((7, 4099), 128)):
        for dtype in DTYPES:
            w = values("heavy", shape[0] * shape[1], 1).reshape(shape).to(dtype)
            data, state = bnb.quantize_4bit(w, blocksize=block, compress_statistics=nested, quant_type=name)
            q = GRIDS[name](block, nested).encode(w)
            assert torch.equal(q.grid.pack(q), data) and torch.equal(q.params["absmax"], state.absmax)
            assert torch.equal(q.decode().to(dtype).reshape(-1), their_values(bnb, data, state))
            if shape[1] % block == 0:
                assert_same_bits(q.decode().to(dtype), bnb.dequantize_4bit(data, state))


def test_a_tie_goes_to_the_lower_value(bnb: Any) -> None:
    for name in FOUR_BITS:
        grid = GRIDS[name](32, False)
        bounds = grid.tables(CPU).threshold
        bounds = bounds[bounds.isfinite()]
        for step in (-1, 0, 1):
            w = torch.cat([torch.ones(1), torch.nextafter(bounds, bounds + step), torch.zeros(16)])
            assert torch.equal(grid.pack(grid.encode(w)), bnb.quantize_4bit(w, blocksize=32, quant_type=name)[0])
        order = torch.tensor(sorted(range(16), key=lambda c: (grid.codebook[c], c)), dtype=torch.int8)
        assert torch.equal(grid.encode(torch.cat([torch.ones(1), bounds, torch.zeros(16)])).codes[1:16], order[:15])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(GRIDS)), st.integers(1, 300), st.booleans(), st.integers(0, 99))
def test_bytes_unpack_to_the_codes(name: str, n: int, nested: bool, seed: int) -> None:
    grid = GRIDS[name](32, nested)
    q = grid.encode(values("normal", n, seed))
    data = grid.pack(q)
    count = {4: 2, 3: 8, 2: 4}[grid.code_bits]
    assert data.dtype == torch.uint8 and data.shape == (-(-n // count) * count * grid.code_bits // 8, 1)
    back = grid.unpack(data, q.shape, q.params)
    assert torch.equal(back.codes, q.codes) and back.codes.dtype == torch.int8
    first = format(int(data[0]), "08b")[: grid.code_bits]
    assert int(first, 2) == int(q.codes[0])  # the first code in the highest bits
    with pytest.raises(ValueError, match=r"elements, given uint8 and"):
        grid.unpack(data[:-1], q.shape, q.params)
    with pytest.raises(ValueError, match=r"elements, given uint8 and"):
        grid.unpack(data, q.shape, {**q.params, "absmax": q.params["absmax"].repeat(2)})


# -- the promise: fake == decode(encode) -----------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(list(GRIDS)),
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 30), min_size=0, max_size=3),
    st.sampled_from(BLOCK_SIZES[:3]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_fake_is_decode_of_encode(name: str, kind: str, shape: list[int], block: int, nested: bool, dtype: torch.dtype, seed: int) -> None:
    grid = GRIDS[name](block, nested)
    w = values(kind, max(torch.Size(shape).numel(), 1), seed)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    q = grid.encode(w)
    assert_same_bits(grid.fake(w), q.decode().to(dtype))
    chosen = grid.choose(w)
    assert all(torch.equal(chosen[n].nan_to_num(), q.params[n].nan_to_num()) for n in q.params)
    stored = grid.encode(w, chosen)
    assert_same_bits(grid.fake(w, chosen), stored.decode().to(dtype))
    if not nested:
        assert torch.equal(stored.codes, q.codes)
        if float(q.params["absmax"].where(q.params["absmax"] > 0, 1.0).min() if w.numel() else 1.0) > 1e-37:
            assert_same_bits(grid.encode(q.decode()).decode(), q.decode())  # float32 values give themselves back, as check_dtype says
        assert grid.check_dtype(torch.float32) is None and "float32" in (grid.check_dtype(torch.bfloat16) or "")
    else:
        assert "keep the codes" in (grid.check_dtype(torch.float32) or "")


@pytest.mark.parametrize("name", GRIDS)
def test_the_gradient_passes_straight_through_where_nothing_is_clipped(name: str) -> None:
    grid = GRIDS[name](32, False)
    w = values("normal", 100).requires_grad_()
    weights = values("normal", 100, 1)
    (grid.fake(w) * weights).sum().backward()
    assert torch.equal(w.grad, weights)  # type: ignore[arg-type]
    first, second, *_, before, last = sorted(grid.codebook)
    low, high = first - (second - first) / 2, last + (last - before) / 2
    x = torch.linspace(-2, 2, 4096).requires_grad_()
    grid.fake(x, {"absmax": torch.ones(128)}).sum().backward()
    assert torch.equal(x.grad, ((x >= low) & (x <= high)).float())  # type: ignore[arg-type]


def test_nan_reaches_the_loss_and_is_refused_by_encode() -> None:
    for grid in (Nf4(), Nf4(double_quant=False)):
        w = values("normal", 256)
        w[70] = float("nan")
        assert bool(grid.fake(w)[64:128].isnan().all())
        with pytest.raises(ValueError, match=r"1 values that are not finite.*index \[70\]"):
            grid.encode(w)
    with pytest.raises(ValueError, match=r"quantizer\.weight\.double_quant=false"):
        Nf4().encode(torch.full((512,), 3e38))


# -- options, sizes, rows ---------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_file() -> None:
    w = values("normal", 1024 * 1024).reshape(1024, 1024)
    assert Nf4().encode(w).nbytes() * 8 / w.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert Nf4(double_quant=False).encode(w).nbytes() * 8 == (4 + 32 / 64) * w.numel()
    assert Nf3(128, False).encode(w).nbytes() * 8 == (3 + 32 / 128) * w.numel()
    assert Nf2(32).encode(w).nbytes() * 8 == (2 + 8 / 32 + 32 / (32 * 256)) * w.numel() + 32
    assert [GRIDS[n]().code_bits for n in GRIDS] == [4, 4, 3, 2]


def test_grids_are_registered_and_come_back_from_their_spec() -> None:
    for name, cls in GRIDS.items():
        grid = registry.get("grid", name)(block_size=128, double_quant=False)
        assert type(grid) is cls and from_spec(grid.spec()) == grid and grid != cls()
        assert grid.describe() == f"{name} b128" and cls().describe() == f"{name} b64 double-quantized"
    assert Nf4() != Nf3()


def test_bad_options_say_what_to_type() -> None:
    with pytest.raises(ValueError, match=r"block_size is 48; valid: 32, 64.*quantizer\.weight\.block_size=64"):
        Nf4(48)
    with pytest.raises(ValueError, match=r"nf4 b64.*grid of weights.*grid@quantizer\.activation=int8_activation"):
        Rtn(weight=Nf4(), activation=Nf4())


def embedding(rows: int, width: int, seed: int = 0) -> nn.Embedding:
    module = nn.Embedding(rows, width)
    module.weight.data = values("normal", rows * width, seed).reshape(rows, width)
    return module


@pytest.mark.parametrize(("rows", "width"), [(1, 50), (40, 64), (40, 128), (40, 96), (40, 32), (3, 7)])
@pytest.mark.parametrize("nested", [False, True])
def test_looked_up_rows_are_those_of_the_whole_table(rows: int, width: int, nested: bool) -> None:
    grid, table = Nf4(64, nested), embedding(rows, width)
    ids = torch.randint(rows, (5, 3), generator=torch.Generator().manual_seed(1))
    whole = grid.fake(table.weight.detach())
    fake = FakeEmbedding(copy.deepcopy(table), grid)
    assert fake.whole == (nested or width % 64 != 0) == grid.spans_rows((rows, width))
    assert torch.equal(fake(ids), whole[ids])
    fake.weight_fake.freeze(fake.weight)
    frozen = grid.fake(table.weight.detach(), fake.weight_fake.frozen)
    assert torch.equal(fake(ids), frozen[ids])
    q = grid.encode(table.weight)
    part = grid.take(q, ids.reshape(-1))
    assert (part is None) == (width % 64 != 0)
    assert part is None or torch.equal(part.decode(), whole[ids.reshape(-1)])
    assert torch.equal(QuantizedEmbedding(q)(ids), whole[ids])


# -- in models ----------------------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 48), nn.Linear(48, 33), nn.ReLU(), nn.Linear(33, 70, bias=False), nn.Conv1d(9, 4, 3))


def prepared(grid: Codebook, **options: Any) -> nn.Module:
    net = model()
    swapped = {n: m for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.Conv1d))}
    assert prepare(net, swapped, grid, grid, **options) == list(swapped)
    return net


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("nested", [False, True])
def test_training_moves_weights_and_convert_changes_no_bit(name: str, nested: bool, tmp_path: Path) -> None:
    net, ids = prepared(GRIDS[name](64, nested)), torch.arange(36).reshape(4, 9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    losses = []
    for step in range(12):
        if step == 8:
            for _, layer in fake_layers(net):
                layer.weight_fake.freeze(layer.folded()[0])
        loss = (net(ids) - 0.3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    checkpoint.save_model(tmp_path / "training", net)
    again = prepared(GRIDS[name](64, nested))
    checkpoint.load_weights(tmp_path / "training", again)
    y = net.eval()(ids)
    assert torch.equal(again.eval()(ids), y)
    codes = convert(net)
    assert torch.equal(codes(ids), y)
    checkpoint.save_model(tmp_path / "codes", codes)
    other = convert(prepared(GRIDS[name](64, nested)))
    assert not torch.equal(other(ids), y)
    checkpoint.load_weights(tmp_path / "codes", other)
    assert torch.equal(other(ids), y)
    with pytest.raises(ValueError, match="'block_size': 64"):
        checkpoint.load_weights(tmp_path / "codes", convert(prepared(GRIDS[name](32, nested))))


def test_round_to_nearest_sizes_and_what_a_receipt_compares() -> None:
    net = model()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    float_model = copy.deepcopy(net)
    scheme = Rtn(weight=Nf4(), embedding=Nf3(32, False), include=["0", "1", "3"])
    net, kept = scheme.prepare(net, [])
    codes = convert(net)
    assert kept == ["4"] and list(packed_layers(codes)) == ["0", "1", "3"]
    grids = {"0": Nf3(32, False), "1": Nf4(), "3": Nf4()}
    for name, decoded in packed_weights(codes).items():
        assert torch.equal(decoded(), grids[name].fake(before[f"{name}.weight"]))
    expected = sum(grids[n].encode(before[f"{n}.weight"]).nbytes() for n in grids) + 4 * (
        33 + sum(p.numel() for p in float_model[4].parameters())
    )
    assert sizes(codes, float_model)["quantized_bytes"] == expected


@pytest.mark.parametrize("name", GRIDS)
def test_static_activations_beside_it_leave_the_bias_in_float(name: str) -> None:
    net = prepared(GRIDS[name](), activation=registry.get("grid", "int8_activation")(), static=True)
    ids = torch.arange(36).reshape(4, 9)
    y = net.train()(ids).detach()
    y = net.eval()(ids)
    codes = convert(net)
    assert torch.equal(codes(ids), y) and codes[1].bias_codes is None


@pytest.mark.parametrize("exporter", ["onnx", "gguf", "tensorrt"])
def test_exporters_that_cannot_hold_it_name_the_nearest(exporter: str) -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    prepare(net, {"0": net[0]}, Nf4())
    (message,) = registry.get("export", exporter)().refusals(convert(net))
    assert "nf4 b64 double-quantized" in message and "nearest is grid@quantizer.weight=" in message.replace("affine with 4 bits: set ", "")


def test_a_quantized_tensor_of_codes_alone_decodes() -> None:
    q = QuantizedTensor(Nf4(32, False), torch.arange(16).repeat(4).to(torch.int8).reshape(4, 16), {"absmax": torch.tensor([2.0, 0.5])})
    expected = torch.tensor(Nf4.codebook).repeat(4) * torch.tensor([2.0, 0.5]).repeat_interleave(32)
    assert torch.equal(q.decode(), expected.reshape(4, 16))
