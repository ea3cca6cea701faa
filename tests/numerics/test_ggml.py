"""ggml's blocks of 32, its 16-bit floats and its activations, against llama.cpp itself, the gguf package, and definitions written here."""

import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from qtrain.grids.base import QuantizedTensor, from_spec
from qtrain.grids.ggml import FALLBACKS, TYPES, Ggml, GgmlActivation, blocks, fallback, floats
from qtrain.grids.ggml import activation as activations
from qtrain.layers import FakeEmbedding, QuantizedEmbedding

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = list(blocks.TYPES)
FLOATS = list(floats.TYPES)
WITH_MIN = ("q4_1", "q5_1")
WIDTHS = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awkward() -> Tensor:
    """Rows of 64 that meet the rules' corners; every scale is a normal float32."""
    w = normal(24, 64) * 10 ** (4 * torch.linspace(-1, 1, 24).unsqueeze(-1))
    w[0], w[1], w[2] = 0.0, -0.0, 0.37
    w[3, ::3] = -0.0
    w[4], w[5] = w[4].abs(), -w[5].abs()
    w[6, ::5], w[6, 1::5] = -0.0, 0.0
    w[7, ::5], w[7, 1::5] = 0.0, -0.0
    w[6].abs_(), w[7].abs_()
    w[6, 0], w[7, 0] = -0.0, 0.0
    w[8] = w[8].sign() * 3  # peaks with both signs
    w[9] = 1e-7 * w[9].sign() * torch.arange(64)  # float16's denormals
    w[10] *= 1e-12  # a float16 scale of zero
    w[11] = normal(64, seed=1) / (torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.003) ** 2  # heavy tails
    w[12] = torch.arange(-32, 32) / 2  # halves: where rounding rules differ
    w[13] = torch.arange(64) / 2 + 0.25
    w[14] = torch.linspace(-127, 127, 64).mul(2).round() / 2
    w[15] = 1000 + 0.01 * w[15].sign()
    return w


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    integers = {4: torch.int32, 2: torch.int16}[a.element_size()]
    different = (a.contiguous().view(integers) != b.contiguous().view(integers)).nonzero()
    assert not len(different), (
        f"{len(different)} differ, first at {different[0].tolist()}: {a[tuple(different[0])]} {b[tuple(different[0])]}"
    )


def quantization_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


@pytest.fixture(scope="module")
def llama() -> ctypes.CDLL:
    """llama.cpp's shared object."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        pytest.skip("xllamacpp is not installed")
    library = ctypes.CDLL(str(next(Path(found.origin).parent.glob("*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return library


def llama_bytes(llama: ctypes.CDLL, name: str, w: Tensor, importance: Tensor | None = None) -> Tensor:
    """What llama-quantize writes for ``w``, uint8 [R, bytes per row]."""
    a = np.ascontiguousarray(w.numpy(), dtype=np.float32)
    out = np.empty((a.shape[0], Ggml(name).row_bytes(a.shape[1])), np.uint8)
    weights = None if importance is None else importance.numpy().ctypes.data
    written = llama.ggml_quantize_chunk(int(quantization_type(name)), a.ctypes.data, out.ctypes.data, 0, *a.shape, weights)
    assert written == out.size
    return torch.from_numpy(out)


# -- bytes: what llama.cpp writes, what the gguf package reads ------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_bytes_are_those_of_llama_cpp(llama: ctypes.CDLL, name: str) -> None:
    for w in (awkward(), normal(300, 96, seed=3), normal(64, 320, seed=4).bfloat16().float(), normal(16, 4096, seed=5) * 1e-3):
        grid = Ggml(name)
        assert torch.equal(grid.pack(grid.encode(w)), llama_bytes(llama, name, w))


@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_bytes_are_those_of_the_gguf_package(name: str) -> None:
    """Where a block's zeros have both signs the package stores any zero as the min; llama.cpp, and we, the first."""
    grid, w = Ggml(name), torch.cat((awkward()[8:], normal(200, 64, seed=6)))
    expected = gguf.quantize(w.numpy(), quantization_type(name)).view(np.uint8)
    assert np.array_equal(grid.pack(grid.encode(w)).numpy(), expected)


@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_decode_is_the_gguf_packages_dequantize(name: str) -> None:
    grid = Ggml(name)
    for w in (awkward(), normal(40, 256, seed=7)):
        q = grid.encode(w)
        data = grid.pack(q)
        assert data.dtype == torch.uint8 and data.shape == (len(w), grid.row_bytes(w.shape[1])) and data.numel() == q.nbytes()
        assert_same_bits(q.decode(), torch.from_numpy(gguf.dequantize(data.numpy(), quantization_type(name))))


@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_any_bytes_unpack_and_pack_again(name: str) -> None:
    grid = Ggml(name)
    data = torch.randint(0, 256, (50, 96 // grid.block, grid.block_bytes), generator=torch.Generator().manual_seed(8)).to(torch.uint8)
    data[..., 1:4:2] &= 0x7B  # scales and mins, or values, that are finite
    data = data.reshape(50, grid.row_bytes(96))
    q = grid.unpack(data, (5, 10, 96))
    assert q.shape == (5, 10, 96) and q.codes.dtype == (torch.int16 if name in FLOATS else torch.int8)
    assert torch.equal(grid.pack(q), data)
    assert_same_bits(q.decode(), torch.from_numpy(gguf.dequantize(data.numpy(), quantization_type(name)).copy()).reshape(5, 10, 96))
    if name in BLOCKS:
        assert int(q.codes.min()) >= (-128 if name == "q8_0" else grid.block_type.low) and int(q.codes.max()) == grid.block_type.high


@pytest.mark.parametrize("name", BLOCKS)
def test_with_importance_the_weighted_error_is_not_above_llama_cpps_nor_the_rules(llama: ctypes.CDLL, name: str) -> None:
    grid, w = Ggml(name), torch.cat((normal(200, 128, seed=9), awkward().repeat(1, 2), normal(20, 128, seed=10) + 3))
    importance = normal(128, seed=11).square() + 0.01

    def error(values: Tensor) -> Tensor:
        return (importance.double() * (values.double() - w).square()).sum(-1)

    ours = grid.encode(w, grid.choose(w, importance))
    theirs = grid.unpack(llama_bytes(llama, name, w, importance), tuple(w.shape))
    assert float(error(ours.decode())[:200].sum()) <= float(error(theirs.decode())[:200].sum())
    rule = error(Ggml(name).encode(w, grid.choose(w)).decode())
    assert bool((error(ours.decode()) <= rule * (1 + 1e-5)).all())
    if name != "q8_0":
        assert float(error(ours.decode())[:200].sum()) < 0.9 * float(rule[:200].sum())
    again = grid.encode(w, importance=importance)
    assert torch.equal(again.codes, ours.codes) and all(torch.equal(again.params[n], ours.params[n]) for n in ours.params)
    unseen = grid.encode(w, importance=torch.zeros(128))  # nothing was collected: every channel counts alike
    assert bool(torch.isfinite(unseen.decode()).all())


# -- the promise: fake == decode(encode) ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    arrays(np.float32, (3, 64), elements=st.floats(-(2.0**15), 2.0**15, width=32, allow_subnormal=True)),
    st.sampled_from(BLOCKS + FLOATS),
)
def test_fake_is_decode_of_encode_for_any_floats(a: np.ndarray, name: str) -> None:
    grid, w = Ggml(name), torch.from_numpy(a)
    q = grid.encode(w)
    assert_same_bits(q.decode(), grid.fake(w))
    frozen = grid.choose(w * 0.7)
    q = grid.encode(w, frozen)
    assert all(torch.equal(q.params[n], frozen[n]) for n in frozen) and set(q.params) == set(frozen)
    assert_same_bits(q.decode(), grid.fake(w, frozen))


@pytest.mark.parametrize("name", BLOCKS)
def test_on_given_parameters_every_code_is_the_nearest_and_the_mask_says_what_clips(name: str) -> None:
    grid, w = Ggml(name), normal(40, 64, seed=11)
    low, high = grid.block_type.low, grid.block_type.high
    params = grid.choose(w * 0.6)
    q = grid.encode(w, params)
    scale = params["scale"].repeat_interleave(32, -1).double()
    least = params["min"].repeat_interleave(32, -1).double() if "min" in params else 0.0
    exact = (w.double() - least) / scale
    assert float((q.codes - exact.clamp(low, high)).abs().max()) <= 0.5 + 2.0**-15
    assert int(q.codes.min()) == low and int(q.codes.max()) == high
    _, mask = grid.round_trip(w, params)
    assert mask is not None
    far = (exact - exact.round()).abs() < 0.499  # not where float32 decides
    inside = (exact >= low - 0.5) & (exact <= high + 0.5)
    assert torch.equal(mask[far], inside[far]) and 0 < int((~mask).sum()) < mask.numel() / 2


@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_ggmls_own_rule_clips_half_a_step_opposite_the_peak_or_nothing(name: str) -> None:
    grid, w = Ggml(name), normal(100, 64, seed=12)
    _, mask = grid.round_trip(w)
    if name not in ("q4_0", "q5_0"):
        assert mask is None
        return
    assert mask is not None
    d = (blocks.signed_peak(w.reshape(100, 2, 32)) / grid.block_type.low).double()
    assert torch.equal(mask.reshape(100, 2, 32), w.reshape(100, 2, 32) / d < grid.block_type.high + 0.5)


def test_gradients_pass_straight_through_where_nothing_clips() -> None:
    grid, w = Ggml("q4_0"), normal(8, 64, seed=13).requires_grad_()
    coefficients = normal(8, 64, seed=14)
    (grid.fake(w) * coefficients).sum().backward()
    mask = grid.round_trip(w.detach())[1]
    assert mask is not None and w.grad is not None and not bool(mask.all())
    assert torch.equal(w.grad, coefficients * mask)


@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_pieces_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, w = Ggml(name), normal(37, 96, seed=15)
    q, frozen = grid.encode(w), grid.choose(w * 0.9)
    data, fake = grid.pack(q), grid.round_trip(w, frozen)
    monkeypatch.setattr(type(grid.block_type), "piece", 200)
    again = grid.encode(w)
    assert torch.equal(again.codes, q.codes) and all(torch.equal(again.params[n], q.params[n]) for n in q.params)
    assert torch.equal(grid.pack(q), data) and torch.equal(grid.unpack(data, (37, 96)).codes, q.codes)
    assert_same_bits(again.decode(), grid.fake(w))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(grid.round_trip(w, frozen), fake, strict=True))  # type: ignore[arg-type]


# -- decoded values as a fixed point --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q8_0"])
def test_which_saves_survive_for_every_float16_scale(name: str, dtype: str) -> None:
    grid = Ggml(name)
    low, high = grid.block_type.low, grid.block_type.high
    scale = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    scale = scale[scale < 65504 / (-low)] if dtype == "float16" else scale[scale < 6e4]
    if name != "q8_0":
        scale = torch.cat((scale, -scale))
    codes = torch.randint(low, high + 1, (len(scale), 32), dtype=torch.int8, generator=torch.Generator().manual_seed(16))
    codes[:, 7] = low
    values = QuantizedTensor(grid, codes, {"scale": scale.unsqueeze(-1)}).decode()
    again = grid.encode(values.to(getattr(torch, dtype)).float())
    changed = (again.decode() != values).any(-1)
    if dtype in grid.block_type.survives:
        assert not bool(changed.any())
        real = scale != 0
        assert torch.equal(again.codes[real], codes[real]) and torch.equal(again.params["scale"][real, 0], scale[real])
    else:
        assert float(changed.float().mean()) > (0.8 if dtype == "bfloat16" else 0.001)


@pytest.mark.parametrize("name", WITH_MIN)
def test_mins_survive_float32_but_no_shorter_type(name: str) -> None:
    grid = Ggml(name)
    for offset in (0.0, 1.0, 100.0):
        q = grid.encode(normal(500, 64, seed=17) + offset)
        assert torch.equal(grid.pack(grid.encode(q.decode())), grid.pack(q))
    assert not torch.equal(grid.pack(grid.encode(q.decode().half())), grid.pack(q))


@pytest.mark.parametrize("name", FLOATS)
def test_floats_survive_themselves(name: str) -> None:
    grid = Ggml(name)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = QuantizedTensor(grid, bits, {}).decode()
    finite = torch.isfinite(values)
    q = grid.encode(values[finite])
    assert torch.equal(q.codes, bits[finite]) and grid.choose(values) == q.params == {}
    assert_same_bits(values[finite], grid.fake(values[finite]))


def test_check_dtype_says_what_is_lost() -> None:
    assert Ggml("q4_0").check_dtype(torch.float16) is None and Ggml("bf16").check_dtype(torch.bfloat16) is None
    assert "save float32 or float16" in (Ggml("q4_0").check_dtype(torch.bfloat16) or "")
    assert "save float32" in (Ggml("q8_0").check_dtype(torch.float16) or "")
    assert "does not hold every value of f16" in (Ggml("f16").check_dtype(torch.bfloat16) or "")
    for name, block_type in TYPES.items():
        if block_type.searches:
            assert "keep the codes" in (Ggml(name).check_dtype(torch.float32) or "")


# -- shapes, types, errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_shapes_and_dtypes(name: str) -> None:
    grid, w = Ggml(name), normal(3, 5, 64, seed=18)
    q = grid.encode(w)
    assert q.shape == (3, 5, 64) and grid.pack(q).shape == (15, grid.row_bytes(64))
    assert all(p.shape == (15, 2) and p.dtype == torch.float32 for p in q.params.values())
    flat = grid.encode(w.reshape(15, 64))
    assert torch.equal(q.codes.reshape(15, 64), flat.codes)
    assert_same_bits(grid.encode(w.transpose(0, 1)).decode().transpose(0, 1).contiguous(), q.decode())
    assert grid.fake(w.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(grid.fake(w.bfloat16()), grid.fake(w.bfloat16().float()).bfloat16())
    for shape in ((0, 64), (4, 0), (64,)):
        empty = grid.encode(normal(*shape))
        assert empty.decode().shape == grid.fake(normal(*shape)).shape == shape
        assert grid.unpack(grid.pack(empty), shape).shape == shape
    rows = torch.tensor([7, 2, 2])  # as an embedding takes them
    gathered = QuantizedTensor(grid, flat.codes[rows], {n: p[rows] for n, p in flat.params.items()})
    assert_same_bits(gathered.decode(), flat.decode()[rows])


def test_rows_that_blocks_do_not_divide_are_refused_with_llama_cpps_own_choice() -> None:
    with pytest.raises(ValueError, match=r"shape \[4, 80\].*q4_0.*rows of 80.*type=f16.*keep_float"):
        Ggml("q4_0").encode(normal(4, 80))
    assert Ggml("f16").check_shape((4, 7)) is None and Ggml("q8_0").check_shape((3, 3, 3)) is not None
    assert fallback("q4_0", 64) == "q4_0" and fallback("q4_0", 80) == "f16"
    for wanted, other in FALLBACKS.items():
        if wanted in TYPES:
            assert (fallback(wanted, 512), fallback(wanted, 576), fallback(wanted, 580)) == (wanted, other, "f16")
            assert f"set type={other}" in (Ggml(wanted).check_shape((2, 576)) or "").lower()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"type is 'q4_k_m'; ggml's types here: q4_0, .*quantizer\.weight\.type=q4_0"):
        Ggml("q4_k_m")
    w = normal(4, 64)
    w[2, 5] = float("nan")
    for params in (None, Ggml("q4_1").choose(normal(4, 64))):
        with pytest.raises(ValueError, match=r"1 values that are not finite, the first at index \[2, 5\]"):
            Ggml("q4_1").encode(w, params)
    for name in BLOCKS:
        with pytest.raises(ValueError, match=f"a scale overflows the 16-bit float in which ggml {name} stores it.*keep_float"):
            Ggml(name).encode(normal(4, 64) * 1e8)
    with pytest.raises(ValueError, match=r"a value overflows .* f16 .*type=bf16"):
        Ggml("f16").encode(torch.tensor([1.0, 70000.0]))
    Ggml("bf16").encode(torch.tensor([1.0, 70000.0]))
    huge = torch.full((1, 64), 3e38)  # whose sum is infinite
    assert torch.isfinite(Ggml("bf16").encode(huge).decode()).all()
    with pytest.raises(ValueError, match=r"each of the 64 input channels, given shape \[32\]"):
        Ggml("q4_0").choose(normal(4, 64), torch.ones(32))
    with pytest.raises(ValueError, match=r"uint8 bytes of shape \[4, 36\], given uint8 \[4, 34\]"):
        Ggml("q4_0").unpack(torch.zeros(4, 34, dtype=torch.uint8), (4, 64))


@pytest.mark.parametrize("grid", [*(Ggml(n) for n in BLOCKS + FLOATS), *(GgmlActivation(n) for n in activations.TYPES)])
def test_specs_describe_the_grid(grid: Ggml | GgmlActivation) -> None:
    assert from_spec(grid.spec()) == grid and grid.type in grid.describe() and not grid.searches
    packed = grid.block_type.packed_bits()
    kept = grid.code_bits + sum(grid.param_bits(n) for n in grid.block_type.param_bits) / grid.block
    assert packed == kept or (grid.type == "q8_k" and packed > kept)  # q8_k stores sums too


# -- embeddings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q4_0", "q5_1", "q8_0", "f16", "bf16"])
def test_embeddings_take_rows_and_stay_on_the_grid(name: str) -> None:
    grid = Ggml(name)
    table = nn.Embedding(20, 64, padding_idx=3)
    ids = torch.tensor([[1, 3, 19], [0, 1, 3]])
    fake = FakeEmbedding(table, grid)
    whole = grid.fake(table.weight).detach()
    assert_same_bits(fake(ids).detach(), whole[ids])
    assert_same_bits(QuantizedEmbedding(fake.encode("table")[0])(ids), whole[ids])
    fake.weight_fake.freeze(table.weight * 0.8)
    whole = grid.fake(table.weight, fake.weight_fake.params())
    assert_same_bits(fake(ids).detach(), whole[ids].detach())
    assert_same_bits(QuantizedEmbedding(fake.encode("table")[0])(ids), whole[ids].detach())
    assert fake(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 64) and fake(torch.tensor(3)).shape == (64,)


# -- activations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "function"), [("q8_0", "quantize_row_q8_0"), ("q8_k", "quantize_row_q8_K")])
def test_activations_are_what_llama_cpps_kernels_make(llama: ctypes.CDLL, name: str, function: str) -> None:
    """Its x86 build; others round otherwise where a value meets a half."""
    grid = GgmlActivation(name)
    for x in (awkward().repeat(1, 4), normal(4000, 256, seed=19), normal(50, 512, seed=20).bfloat16().float()):
        a = np.ascontiguousarray(x.numpy())
        out = np.empty((len(a), grid.row_bytes(a.shape[1])), np.uint8)
        quantize = getattr(llama, function)
        quantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        quantize(a.ctypes.data, out.ctypes.data, a.size)
        q = grid.encode(x)
        theirs = grid.unpack(torch.from_numpy(out), tuple(x.shape))
        assert torch.equal(theirs.codes, q.codes)
        assert_same_bits(theirs.params["scale"], q.params["scale"])
        if name == "q8_k":  # the sums; it leaves those of zero blocks as they were
            written = (q.params["scale"] != 0).repeat_interleave(292, -1)
            assert torch.equal(grid.pack(q)[written], torch.from_numpy(out)[written])
        else:
            assert torch.equal(grid.pack(q), torch.from_numpy(out))
        assert_same_bits(grid.fake(x), q.decode())
        assert grid.round_trip(x)[1] is None


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (2, 256), elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=True)),
    st.sampled_from(["q8_0", "q8_k"]),
)
def test_activations_fake_is_decode_of_encode_for_any_floats(a: np.ndarray, name: str) -> None:
    grid = GgmlActivation(name)
    x = torch.from_numpy(a) * (2.0**-40 if name == "q8_0" else 1.0)
    assert_same_bits(grid.fake(x), grid.encode(x).decode())
    if name == "q8_k":
        peak = x.abs().amax(-1, keepdim=True)
        assert bool(((grid.fake(x) - x).abs() <= peak / 254 * (1 + 1e-5)).all())


def test_activations_differ_from_the_weight_type_in_halves_only() -> None:
    x = normal(2000, 256, seed=21)
    a, w = GgmlActivation("q8_0").encode(x), Ggml("q8_0").encode(x)
    assert_same_bits(a.params["scale"], w.params["scale"])
    difference = (a.codes.int() - w.codes.int()).abs()
    assert int(difference.max()) <= 1 and float(difference.float().mean()) < 1e-4


def test_activations_refuse_what_llama_cpp_has_no_kernel_for() -> None:
    with pytest.raises(ValueError, match=r"blocks of 256.*rows of 576.*type=q8_0"):
        GgmlActivation("q8_k").fake(normal(2, 576))
    with pytest.raises(ValueError, match=r"type is 'q8_1'.*q8_0 or q8_k"):
        GgmlActivation("q8_1")
