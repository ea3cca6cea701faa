"""The affine grids against references written here: NumPy in float32 for bits, float64 for errors, torchao and onnxruntime for parity."""

import itertools
import json
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper
from torch import Tensor

from qtrain.grids import affine
from qtrain.grids.affine import ASYMMETRIC_RULES, GRANULARITIES, SCALE_BITS, SYMMETRIC_RULES, Affine, Int8, Int8Activation
from qtrain.grids.base import from_spec

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = SYMMETRIC_RULES + ASYMMETRIC_RULES
GROUP = 8


def grids(rule: str, bits: int = 4, **options: object) -> list[Affine]:
    """The rule at every granularity and stored type that it allows."""
    if rule == "absmax_mlas":
        bits, types = 8, ["float32"]
    else:
        types = list(SCALE_BITS)
    return [Affine(bits, rule, g, GROUP, scale_dtype=t, **options) for g, t in itertools.product(GRANULARITIES, types)]  # type: ignore[arg-type]


def normal(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Gaussian values whose magnitude differs from row to row by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    return w * 10 ** (spread * (torch.rand(*shape[:-1], 1, generator=generator) - 0.5))


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    integers = {4: torch.int32, 2: torch.int16, 8: torch.int64, 1: torch.int8}[a.element_size()]
    different = (a.contiguous().view(integers) != b.contiguous().view(integers)).nonzero()
    assert not len(different), (
        f"{len(different)} differ, first at {different[0].tolist()}: {a[tuple(different[0])]} {b[tuple(different[0])]}"
    )


def cut(w: Tensor, grid: Affine) -> np.ndarray:
    """``w`` as float32 [R, G, S], written down again without reference to the implementation."""
    a = w.detach().float().numpy()
    match grid.granularity:
        case "tensor":
            return a.reshape(1, 1, -1)
        case "channel":
            return a.reshape(a.shape[0], 1, -1)
        case "token":
            return a.reshape(-1, 1, a.shape[-1])
    return a.reshape(-1, a.shape[-1] // grid.group_size, grid.group_size)


def stored(scale: np.ndarray, grid: Affine) -> np.ndarray:
    """Round float32 to the stored type by hand, and away from zero."""
    if grid.scale_dtype == "float16":
        with np.errstate(over="ignore"):
            scale = scale.astype(np.float16).astype(np.float32)
        least = np.float32(2.0**-24)
    else:
        least = np.float32(2.0**-126)
    if grid.scale_dtype == "bfloat16":  # keep 16 of 32 bits, ties to even
        bits = scale.view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        scale = bits.astype(np.uint32).view(np.float32)
    if grid.rule == "signed_absmax":
        return np.where(np.abs(scale) < least, least, scale).astype(np.float32)
    return np.maximum(scale, least)


def reference_scale(x: np.ndarray, grid: Affine) -> tuple[np.ndarray, np.ndarray | None]:
    """Scale and zero point of the closed-form rules, in IEEE float32, one operation at a time."""
    b, f = grid.bits, np.float32
    if grid.rule == "minmax":
        lowest, highest = np.minimum(x.min(-1), f(0)), np.maximum(x.max(-1), f(0))
        scale = stored((highest - lowest) / f(2**b - 1), grid)
        return scale, np.clip(-(2 ** (b - 1)) - np.rint(lowest / scale), -(2 ** (b - 1)), 2 ** (b - 1) - 1)
    if grid.rule == "signed_absmax":
        index = np.abs(x).argmax(-1)
        peak = np.take_along_axis(x, index[..., None], -1)[..., 0]
        return stored(peak / f(-(2 ** (b - 1))), grid), None
    divisor = {"absmax": 2 ** (b - 1) - 1, "absmax_half": 2 ** (b - 1) - 0.5, "absmax_mlas": 127}[grid.rule]
    return stored(np.abs(x).max(-1) / f(divisor), grid), None


def squared_error(w: Tensor, grid: Affine) -> float:
    return float((grid.fake(w).double() - w.double()).square().sum())


# -- the promise: fake == decode(encode) ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rule", RULES)
def test_fake_is_decode_of_encode_and_every_code_is_the_nearest(rule: str, bits: int) -> None:
    if rule == "absmax_mlas" and bits != 8:
        pytest.skip("absmax_mlas has 8 bits")
    for grid in grids(rule, bits):
        w = normal(6, 24, seed=bits)
        w[1] = 0.0
        w[2] = -0.37
        w[3, ::3] = -0.0
        q = grid.encode(w)
        assert q.codes.dtype == torch.int8 and q.shape == (6, 24)
        assert int(q.codes.min()) >= grid.low == -(2 ** (bits - 1)) and int(q.codes.max()) <= grid.high == 2 ** (bits - 1) - 1
        assert_same_bits(q.decode(), grid.fake(w))

        x, codes = cut(w, grid), cut(q.codes, grid)
        scale = q.params["scale"].numpy()[..., None]
        zero = q.params["zero_point"].numpy()[..., None].astype(np.float32) if not grid.symmetric else np.float32(0)
        assert set(q.params) == ({"scale"} if grid.symmetric else {"scale", "zero_point"})
        assert_same_bits(torch.from_numpy(((codes - zero) * scale).reshape(6, 24)), q.decode())
        exact = np.clip(x.astype(np.float64) / scale + zero, grid.low, grid.high)
        assert np.abs(codes - exact).max() <= 0.5 + 2.0**-20 * 2**bits, grid.describe()


@settings(max_examples=150, deadline=None)
@given(
    arrays(np.float32, (3, 16), elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=True)),
    st.sampled_from(RULES),
    st.integers(2, 8),
    st.sampled_from(GRANULARITIES),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_fake_is_decode_of_encode_for_any_floats(a: np.ndarray, rule: str, bits: int, granularity: str, scale_dtype: str) -> None:
    bits, scale_dtype = (8, "float32") if rule == "absmax_mlas" else (bits, scale_dtype)
    grid = Affine(bits, rule, granularity, GROUP, scale_dtype=scale_dtype)
    w = torch.from_numpy(a)
    q = grid.encode(w)
    assert_same_bits(q.decode(), grid.fake(w))
    assert torch.equal(grid.encode(q.decode(), q.params).codes, q.codes)
    for name, value in grid.choose(w).items():
        assert_same_bits(value, q.params[name])


# -- scales -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rule", ["absmax", "absmax_half", "signed_absmax", "minmax", "absmax_mlas"])
def test_scales_equal_a_reference_one_operation_at_a_time(rule: str, bits: int) -> None:
    for grid in grids(rule, bits):
        w = normal(6, 32, seed=bits)
        w[0], w[1], w[2] = 0.0, w[1].abs(), -w[2].abs()
        params = grid.choose(w)
        scale, zero = reference_scale(cut(w, grid), grid)
        assert_same_bits(params["scale"], torch.from_numpy(scale))
        if zero is None:
            assert set(params) == {"scale"}
        else:
            assert params["zero_point"].dtype == torch.int8
            assert np.array_equal(params["zero_point"].numpy(), zero)


@pytest.mark.parametrize("rule", [r for r in RULES if r != "absmax_mlas"])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_scales_are_numbers_of_their_stored_type(rule: str, scale_dtype: str) -> None:
    grid = Affine(4, rule, "group", GROUP, scale_dtype=scale_dtype)
    scale = grid.choose(normal(64, 32, spread=6))["scale"]
    assert_same_bits(scale, scale.to(getattr(torch, scale_dtype)).float())
    wide = Affine(4, rule, "group", GROUP).choose(normal(64, 32, spread=6))["scale"]
    assert not torch.equal(scale, wide)


def test_signed_absmax_gives_the_largest_magnitude_the_lowest_code() -> None:
    grid = Affine(4, "signed_absmax", "group", GROUP)
    up = torch.tensor([[0.1, -0.2, 8.0, 1.0, 0.0, -3.0, 2.0, 7.0]])
    for w, sign in ((up, -1), (-up, 1)):
        q = grid.encode(w)
        assert int(q.codes[0, 2]) == -8
        assert float(q.params["scale"]) == sign * 1.0
        assert float(q.decode()[0, 2]) == float(w[0, 2])
    both = grid.encode(torch.tensor([[4.0, -4.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    assert float(both.params["scale"]) == 0.5  # of two equal magnitudes the negative one is exact, the other clips
    assert both.codes[0, :3].tolist() == [7, -8, 2]


def test_ties_go_to_the_even_code() -> None:
    w = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5]])
    assert Affine(4, "absmax", "group", GROUP).encode(w).codes.tolist() == [[7, 0, 2, 2, 0, -2, -2, 6]]
    asymmetric = Affine(4, "minmax", "group", GROUP).encode(torch.tensor([[0.0, 15.0, 0.5, 1.5, 2.5, 3.5, 4.5, 14.5]]))
    assert asymmetric.codes.tolist() == [[-8, 7, -8, -6, -6, -4, -4, 6]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rule", "plain"), [("mse", "signed_absmax"), ("mse_minmax", "minmax")])
def test_a_searched_scale_has_less_error_than_the_plain_and_little_more_than_a_finer_search(rule: str, plain: str, bits: int) -> None:
    w = normal(48, 32, seed=bits)
    w[:, ::16] *= 4  # outliers, for which shrinking pays
    searched, given_rule = Affine(bits, rule, "group", 32), Affine(bits, plain, "group", 32)

    def errors(values: Tensor) -> Tensor:
        return (values.double() - w.double()).square().sum(-1)

    ours, theirs = errors(searched.fake(w)), errors(given_rule.fake(w))
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert ours.sum() < 0.99 * theirs.sum() or bits == 8

    params = given_rule.choose(w)
    finest = torch.full_like(ours, math.inf)
    for shrink in np.linspace(0.35, 1.0, 400):
        scale = params["scale"].double() * shrink
        zero = torch.zeros_like(scale)
        if plain == "minmax":
            lowest = w.double().amin(-1, keepdim=True).clamp_max(0) * shrink
            zero = (searched.low - (lowest / scale).round()).clamp(searched.low, searched.high)
        codes = ((w.double() / scale).round() + zero).clamp(searched.low, searched.high)
        finest = torch.minimum(finest, errors((codes - zero) * scale))
    assert ours.sum() <= 1.05 * finest.sum()


# -- idempotence ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_values_on_the_grid_keep_their_codes_under_their_own_scales(rule: str) -> None:
    for bits in (2, 4, 8):
        for grid in grids(rule, bits):
            q = grid.encode(normal(8, 32, seed=bits))
            again = grid.encode(q.decode(), q.params)
            assert torch.equal(again.codes, q.codes)
            assert_same_bits(grid.fake(q.decode(), q.params), q.decode())


def test_signed_absmax_is_idempotent_to_the_bit_and_absmax_where_the_product_is_exact() -> None:
    for bits in (2, 3, 4, 5, 8):
        for rule, types in (("signed_absmax", list(SCALE_BITS)), ("absmax", ["float16", "bfloat16"])):
            for scale_dtype, granularity in itertools.product(types, GRANULARITIES):
                grid = Affine(bits, rule, granularity, GROUP, scale_dtype=scale_dtype)
                once = grid.fake(normal(16, 32, seed=bits))
                assert_same_bits(grid.fake(once), once)
        grid = Affine(bits, "absmax", "group", GROUP)  # high * scale rounds in float32: the codes hold, the last bit of a scale may not
        q = grid.encode(normal(16, 32, seed=bits))
        assert torch.equal(grid.encode(q.decode()).codes, q.codes)


def test_absmax_half_is_not_idempotent() -> None:
    """Known, and why a weight must be encoded once: its largest value shrinks by 7/7.5 every time."""
    grid = Affine(4, "absmax_half", "group", GROUP)
    once = grid.fake(normal(16, 32))
    assert not torch.equal(grid.fake(once), once)


# -- shapes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [r for r in RULES if r != "absmax_mlas"])
@pytest.mark.parametrize("columns", [70, 32, 20, 65])
def test_a_short_last_group_is_the_same_as_cutting_the_row_by_hand(rule: str, columns: int) -> None:
    w = normal(5, columns, seed=columns)
    short = Affine(4, rule, "group", 32, remainder="short")
    q, fake = short.encode(w), short.fake(w)
    assert q.params["scale"].shape == (5, math.ceil(columns / 32))
    for g, start in enumerate(range(0, columns, 32)):
        part = w[:, start : start + 32].contiguous()
        by_hand = Affine(4, rule, "token").encode(part)
        assert torch.equal(q.codes[:, start : start + 32], by_hand.codes)
        assert_same_bits(fake[:, start : start + 32], by_hand.decode())
        for name in q.params:
            assert_same_bits(q.params[name][:, g : g + 1], by_hand.params[name])


def test_a_row_that_does_not_divide_is_refused_with_the_remedy() -> None:
    w = torch.ones(2, 48)
    for call in (Affine().encode, Affine().fake, Affine().choose):
        with pytest.raises(ValueError, match=r"\[2, 48\].*32 does not divide.*48 values.*\(16\).*remainder=short.*granularity=channel"):
            call(w)
    assert Affine().check_shape((2, 48)) and Affine().check_shape((2, 64)) is None
    assert Affine(remainder="short").check_shape((2, 48)) is None


@pytest.mark.parametrize("rule", RULES)
def test_leading_dimensions_are_rows(rule: str) -> None:
    x = normal(2, 3, 16, seed=4)
    for granularity in ("token", "group"):
        grid = Affine(8, rule, granularity, GROUP)
        flat, cube = grid.encode(x.reshape(6, 16)), grid.encode(x)
        assert cube.shape == (2, 3, 16)
        assert torch.equal(cube.codes.reshape(6, 16), flat.codes)
        assert_same_bits(cube.params["scale"], flat.params["scale"])
        assert_same_bits(grid.fake(x).reshape(6, 16), flat.decode())
        assert_same_bits(grid.fake(x[1, 2]), flat.decode()[5])  # 1-D
        assert_same_bits(grid.fake(x[:1, :1]).reshape(16), flat.decode()[0])  # a single row
    whole = Affine(8, rule, "tensor").encode(x)
    assert whole.params["scale"].shape == (1, 1)
    assert Affine(8, rule, "channel").encode(x).params["scale"].shape == (2, 1)


@pytest.mark.parametrize("shape", [(0,), (0, 16), (3, 0), (2, 0, 16), (0, 2, 16), ()])
def test_empty_tensors_and_scalars_keep_their_shape(shape: tuple[int, ...]) -> None:
    for rule in RULES:
        for grid in grids(rule):
            w = torch.full(shape, 0.75)
            q = grid.encode(w)
            assert q.shape == shape and q.decode().shape == shape and grid.fake(w).shape == shape
            assert grid.fake(w, q.params).shape == shape
            assert set(q.params) == ({"scale"} if grid.symmetric else {"scale", "zero_point"})


@pytest.mark.parametrize("rule", RULES)
def test_memory_layout_changes_nothing(rule: str) -> None:
    base = normal(32, 48, seed=5)
    for w in (base.t(), base[::2, ::3], base.as_strided((4, 32), (1, 7)), base[0].expand(16, 48)):
        for grid in [g for g in grids(rule) if g.scale_dtype == "float32"]:
            got, want = grid.encode(w), grid.encode(w.contiguous())
            assert torch.equal(got.codes, want.codes) and got.codes.is_contiguous()
            for name in want.params:
                assert_same_bits(got.params[name], want.params[name])
            assert_same_bits(grid.fake(w), want.decode())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_output_has_the_type_of_the_input(rule: str, dtype: torch.dtype) -> None:
    for grid in grids(rule):
        w = normal(4, 32).to(dtype)
        q = grid.encode(w)
        assert q.decode().dtype == torch.float32 and q.params["scale"].dtype == torch.float32
        assert_same_bits(grid.fake(w), q.decode().to(dtype))
        assert torch.equal(q.codes, grid.encode(w.float()).codes)


@pytest.mark.parametrize("rule", RULES)
def test_the_size_of_a_piece_changes_nothing(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(37, 40, seed=6)
    for grid in [g for g in grids(rule) if g.scale_dtype == "float32"]:
        monkeypatch.setattr(affine, "_PIECE", 1 << 18)
        q, fake = grid.encode(w), grid.fake(w)
        frozen = grid.fake(w * 1.1, q.params)
        for piece in (1, 100, 401):
            monkeypatch.setattr(affine, "_PIECE", piece)
            again = grid.encode(w)
            assert torch.equal(again.codes, q.codes)
            for name in q.params:
                assert_same_bits(again.params[name], q.params[name])
            assert_same_bits(grid.fake(w), fake)
            assert_same_bits(grid.fake(w * 1.1, q.params), frozen)


@pytest.mark.parametrize("rule", RULES)
def test_the_number_of_threads_changes_nothing(rule: str) -> None:
    w = normal(96, 1024, seed=7)
    threads = torch.get_num_threads()
    try:
        for granularity in ("tensor", "channel", "group"):
            grid = Affine(8 if rule == "absmax_mlas" else 4, rule, granularity, 32)
            torch.set_num_threads(1)
            one = grid.fake(w)
            torch.set_num_threads(4)
            assert_same_bits(grid.fake(w), one)
    finally:
        torch.set_num_threads(threads)


def test_scales_given_are_the_scales_used() -> None:
    w = normal(4, 32)
    for rule in RULES:
        for grid in grids(rule):
            params = grid.choose(w * 1.7)
            q = grid.encode(w, params)
            assert_same_bits(q.params["scale"], params["scale"])
            assert_same_bits(q.decode(), grid.fake(w, params))


# -- values at the edges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_zero_rows_constant_rows_and_denormals(rule: str) -> None:
    for bits in (2, 4, 8):
        for grid in grids(rule, bits):
            for zero in (0.0, -0.0, 1e-40, -1e-40):
                q = grid.encode(torch.full((4, 16), zero))
                assert_same_bits(q.decode().abs(), torch.zeros(4, 16))
                assert (q.params["scale"] != 0).all() and torch.isfinite(q.params["scale"]).all()
            for value in (3.0, -3.0):
                error = (grid.fake(torch.full((4, 16), value)) - value).abs().max() / 3
                step = {"absmax_half": 0.5 / (2 ** (bits - 1) - 0.5)}.get(rule, 0.0)
                assert error <= step + 2.0**-8  # bfloat16 scales


def test_minus_zero_becomes_zero_since_codes_have_none() -> None:
    w = torch.tensor([[-0.0, -0.01, 0.01, 0.0, 5.0, -5.0, 1.0, -1.0]])
    for rule in ("absmax", "absmax_half", "minmax"):
        fake = Affine(4, rule, "group", GROUP).fake(w)
        assert not torch.signbit(fake[0, :4]).any()


@pytest.mark.parametrize("exponent", [-38, -37, -30, 0, 30, 38])
@pytest.mark.parametrize("rule", RULES)
def test_extreme_magnitudes_stay_finite_and_near(rule: str, exponent: int) -> None:
    w = torch.linspace(-1, 1, 32).reshape(4, 8) * 10.0**exponent
    grid = Affine(8, rule, "group", GROUP)
    q = grid.encode(w)
    assert torch.isfinite(q.decode()).all()
    assert_same_bits(q.decode(), grid.fake(w))
    if -37 < exponent < 38:
        assert (q.decode() - w).abs().max() <= 0.01 * 10.0**exponent


def test_scales_that_overflow_their_type_raise_with_the_remedy() -> None:
    w = torch.full((1, 32), 1e38)
    for rule in ("absmax", "absmax_half", "signed_absmax", "minmax", "mse", "mse_minmax"):
        with pytest.raises(ValueError, match="overflows float16; set scale_dtype=float32 or bfloat16"):
            Affine(4, rule, scale_dtype="float16").encode(w)
        for scale_dtype in ("float32", "bfloat16"):
            assert torch.isfinite(Affine(4, rule, scale_dtype=scale_dtype).encode(w).decode()).all()
    w[0, ::2] = -3e38
    w[0, 1::2] = 3e38
    with pytest.raises(ValueError, match=r"overflows float32.*keep_float="):
        Affine(4, "minmax").encode(w)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_raise_and_say_where(bad: float) -> None:
    w = normal(4, 32)
    w[2, 7] = bad
    for rule in RULES:
        for grid in grids(rule):
            with pytest.raises(ValueError, match=r"1 values that are not finite, the first at index \[2, 7\].*keep_float="):
                grid.encode(w)


# -- options ------------------------------------------------------------------------------------------------------------------


def test_a_spec_survives_json() -> None:
    for rule in RULES:
        for grid in grids(rule, 5, remainder="short"):
            spec = json.loads(json.dumps(grid.spec()))
            assert from_spec(spec) == grid
            assert spec["grid"] == "affine" and spec["version"] == Affine.version


def test_a_spec_of_another_version_or_an_unknown_grid_raises() -> None:
    with pytest.raises(ValueError, match=r"holds version 99 of grid affine; this qtrain has version 1.*quantize again"):
        from_spec({**Affine().spec(), "version": 99})
    with pytest.raises(ValueError, match=r"grid=nope does not exist; valid: .*affine"):
        from_spec({**Affine().spec(), "grid": "nope"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"bits is 1.*2 to 8.*quantizer\.weight\.bits=4"),
        ({"bits": 9}, r"bits is 9.*2 to 8.*quantizer\.weight\.bits=4"),
        ({"rule": "absmaxx"}, r"rule is 'absmaxx'; valid: absmax.*minmax.*quantizer\.weight\.rule="),
        ({"granularity": "row"}, r"granularity is 'row'; valid: tensor, channel, token, group.*quantizer\.weight\.granularity="),
        ({"remainder": "pad"}, r"remainder is 'pad'; valid: error, short.*quantizer\.weight\.remainder="),
        ({"scale_dtype": "int8"}, r"scale_dtype is 'int8'; valid: float32, float16, bfloat16.*quantizer\.weight\.scale_dtype="),
        ({"group_size": 1}, r"group_size is 1.*at least 2.*quantizer\.weight\.group_size=32"),
        ({"rule": "absmax_mlas", "bits": 4}, r"bits=4 scale_dtype=float32; set bits=8 scale_dtype=float32"),
        ({"rule": "absmax_mlas", "bits": 8, "scale_dtype": "float16"}, r"bits=8 scale_dtype=float16; set bits=8 scale_dtype=float32"),
    ],
)
def test_a_bad_option_says_what_to_type(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Affine(**options)  # type: ignore[arg-type]


def test_sizes_count_codes_scales_and_zero_points() -> None:
    w = torch.ones(4, 64)
    assert Affine(4, "absmax", scale_dtype="float16").encode(w).nbytes() == (4 * 64 * 4 + 4 * 2 * 16) // 8
    assert Affine(3, "minmax").encode(w).nbytes() == math.ceil((4 * 64 * 3 + 4 * 2 * (32 + 3)) / 8)
    assert "int4 g32 absmax float16" in Affine(4, scale_dtype="float16").describe()


# -- parity: torchao ------------------------------------------------------------------------------------------------------------


def assert_same_gradient(ours: Tensor, theirs: Tensor) -> None:
    """The same zeros; elsewhere torchao multiplies by the scale (1e-38 in a zero row) and by its inverse, ours by one."""
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad == 0, theirs.grad == 0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rule", ["absmax_half", "minmax"])
def test_torchao_has_the_same_bits(rule: str, bits: int) -> None:
    from torchao.quantization.quant_primitives import (
        MappingType,
        _fake_quantize_affine,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    mapping = MappingType.SYMMETRIC if rule == "absmax_half" else MappingType.ASYMMETRIC
    w, x = normal(6, 64, seed=bits), normal(2, 3, 64, seed=bits)
    w[0], w[1], w[2] = 0.0, w[1].abs(), -w[2].abs()
    cases = [("group", w, (1, 32)), ("channel", w, (1, 64)), ("tensor", w, (6, 64)), ("token", x, (1, 1, 64)), ("group", x, (1, 1, 32))]
    for granularity, t, block in cases:
        grid = Affine(bits, rule, granularity, 32)
        bounds = {"quant_min": grid.low, "quant_max": grid.high}
        scale, zero = choose_qparams_affine(t, mapping, block, torch.int8, **bounds)
        codes = quantize_affine(t, block, scale, zero, torch.int8, **bounds)
        values = dequantize_affine(codes, block, scale, zero, torch.int8, **bounds)
        q = grid.encode(t)
        assert_same_bits(q.params["scale"].flatten(), scale.flatten())
        assert torch.equal(q.params.get("zero_point", torch.zeros_like(scale)).flatten().int(), zero.flatten().int())
        assert torch.equal(q.codes, codes)
        assert_same_bits(q.decode(), values)

        ours, theirs = t.clone().requires_grad_(), t.clone().requires_grad_()
        upstream = normal(*t.shape, seed=bits + 100)
        grid.fake(ours).backward(upstream)
        fake = _fake_quantize_affine(theirs, block, scale, zero, torch.int8, **bounds)
        fake.backward(upstream)
        assert torch.equal(grid.fake(t), fake.detach())  # torchao's zeros keep a sign, ours are those of the codes
        assert_same_gradient(ours, theirs)


@pytest.mark.parametrize("bits", range(2, 9))
def test_torchao_qat_fake_quantizer_has_the_same_output_and_gradient(bits: int) -> None:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    w, upstream = normal(16, 64, seed=bits), normal(16, 64, seed=bits + 1)
    dtype = getattr(torch, f"int{bits}")
    cases = [("absmax_half", "group", {"group_size": 32, "is_symmetric": True}), ("absmax_half", "channel", {"granularity": "per_channel"})]
    for rule, granularity, options in [*cases, ("minmax", "token", {"granularity": "per_token", "is_symmetric": False})]:
        quantizer = IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, **options))  # its asymmetric *group* rule has a float zero point
        ours, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
        y, z = Affine(bits, rule, granularity, 32).fake(ours), quantizer(theirs)
        y.backward(upstream)
        z.backward(upstream)
        assert torch.equal(y, z)
        assert_same_gradient(ours, theirs)
        if rule == "absmax_half":
            assert (ours.grad == 0).any() and (ours.grad != 0).any()


# -- parity: onnxruntime ----------------------------------------------------------------------------------------------------------


def mat_mul_nbits(x: Tensor, codes: Tensor, scale: Tensor, block: int) -> Tensor:
    """x @ w.T by onnxruntime's MatMulNBits with 4-bit codes at accuracy_level 4 (int8 activations)."""
    n, k = codes.shape
    unsigned = (codes.to(torch.int16) + 8).to(torch.uint8).reshape(n, k // block, block)
    packed = (unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)).numpy()
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=block, accuracy_level=4
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, n])],
        [onnx.numpy_helper.from_array(packed, "b"), onnx.numpy_helper.from_array(scale.reshape(-1).numpy(), "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def activations(k: int, block: int) -> Tensor:
    """Random rows, and rows that a slightly different rule would round differently."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(12, k, generator=generator)
    x[1] = 0.0
    x[2, ::16] = 300.0  # outliers
    x[3] = torch.arange(k) % 253 / 2 - 63  # ties, once the scale is 1 ...
    x[3, ::32] = 127.0
    x[4] = -x[3]
    x[5] = 0.25
    x[6] = torch.where(torch.arange(k) % 2 == 0, 1.0, -1.0)
    x[7] *= 1e-30
    x[8] *= 1e30
    x[9] = -0.0
    x[10] = torch.linspace(-1, 1, k)
    x[11, : k // 2] = 0.0  # zero blocks beside others
    peak = torch.rand(32, k // block, 1, generator=generator) + 1  # near ties, where x * (127 / absmax) and x * (1 / scale) round apart
    ties = (torch.randint(-127, 127, (32, k // block, block), generator=generator) + 0.5) * peak / 127
    ties[..., :1] = peak
    return torch.cat([x, ties.reshape(32, k)])


@pytest.mark.parametrize("block", [32, 128])
def test_absmax_mlas_is_what_onnxruntime_does_to_activations(block: int) -> None:
    k, n = 256, 24
    weight = Affine(4, "signed_absmax", "group", block)
    q = weight.encode(normal(n, k, seed=block, spread=0.5))
    x = activations(k, block)
    y = mat_mul_nbits(x, q.codes, q.params["scale"], block).double()

    grid = Affine(8, "absmax_mlas", "group", block)
    fake = grid.fake(x).double()
    w = q.decode().double()
    size = fake.abs() @ w.abs().t()
    assert ((y - fake @ w.t()).abs() <= 2e-6 * size).all()
    assert (y[[1, 9]] == 0).all()
    rows = [0, 2, 7, 8, 10, 11]
    assert ((y - x.double() @ w.t()).abs() > 1e-4 * size)[rows].double().mean() > 0.5  # the quantization is no rounding noise
    other = grid.fake(x, grid.choose(x)).double()  # x * (1 / scale)
    assert ((y - other @ w.t()).abs() > 1e-5 * size)[12:].any()


# -- the rounding of ONNX ----------------------------------------------------------------------------------------------------


def onnx_codes(op: str, x: torch.Tensor, *inputs: np.ndarray) -> list[np.ndarray]:  # type: ignore[type-arg]
    """What onnxruntime makes of ``x`` with one node."""
    outputs = {"QuantizeLinear": ["y"], "DynamicQuantizeLinear": ["y", "scale", "zero"]}[op]
    names = ["x", "s", "z"][: 1 + len(inputs)]
    signed = bool(inputs) and inputs[1].dtype == np.int8
    types = {"y": TensorProto.INT8 if signed else TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
    graph = helper.make_graph(
        [helper.make_node(op, names, outputs)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info(o, types[o], None) for o in outputs],
        [onnx.numpy_helper.from_array(v, n) for n, v in zip(names[1:], inputs, strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})


def inputs_of_all_kinds() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(64, 37, generator=generator)
    return [
        normal,
        normal.abs(),
        -normal.abs(),
        normal**5,
        normal + 7,
        torch.zeros(3, 4),
        torch.full((3, 4), 2.5),
        torch.arange(-300, 300) * 0.5,
        normal * 1e-20,
        normal * 1e20,
    ]


@pytest.mark.parametrize("x", inputs_of_all_kinds(), ids=range(10))
def test_minmax_onnx_is_dynamic_quantize_linear_to_the_bit(x: torch.Tensor) -> None:
    q = Affine(8, "minmax_onnx", "tensor").encode(x)
    codes, scale, zero = onnx_codes("DynamicQuantizeLinear", x)
    assert np.array_equal(codes.astype(np.int16) - 128, q.codes.numpy())
    assert int(zero) - 128 == int(q.params["zero_point"])
    assert float(scale) == float(q.params["scale"]) or not x.any()  # all zero: any scale, the values are 0


@pytest.mark.parametrize("x", inputs_of_all_kinds(), ids=range(10))
@pytest.mark.parametrize("rule", ["minmax_onnx", "absmax_onnx"])
def test_static_codes_are_quantize_linear_to_the_bit(x: torch.Tensor, rule: str) -> None:
    grid = Affine(8, rule, "tensor")
    params = grid.choose(x * 0.7)  # some values clip
    halves = (torch.arange(-400, 400) + 0.5) * params["scale"].reshape(())
    for values in (x, halves):
        q = grid.encode(values, params)
        zero = params.get("zero_point", torch.zeros(1, 1, dtype=torch.int8)).reshape(()).numpy()
        codes = onnx_codes("QuantizeLinear", values, params["scale"].reshape(()).numpy(), zero)[0]
        if float(params["scale"]) > 1e-30:
            assert np.array_equal(codes, q.codes.numpy())
        assert torch.equal(grid.fake(values, params), q.decode())


def test_dividing_and_multiplying_by_the_inverse_are_two_grids() -> None:
    """Why the rules exist: on the same scale, a few values in a hundred thousand get another code."""
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(3))
    divides, multiplies = Affine(8, "minmax_onnx", "tensor"), Affine(8, "minmax", "tensor")
    params = divides.choose(x)
    halves = (torch.randint(-100, 100, (400_000,), generator=torch.Generator().manual_seed(4)) + 0.5) * params["scale"].reshape(())
    assert (divides.encode(halves, params).codes != multiplies.encode(halves, params).codes).any()


def test_presets_are_the_grids_they_name() -> None:
    assert (Int8().bits, Int8().rule, Int8().granularity) == (8, "absmax", "channel")
    assert (Int8Activation().bits, Int8Activation().rule, Int8Activation().granularity) == (8, "minmax_onnx", "tensor")
    assert Int8(bits=7).spec()["grid"] == "int8" and from_spec(Int8(bits=7).spec()) == Int8(bits=7)
