"""Activation ranges against references written here: NumPy in float64, plain loops, exhaustive searches, and onnxruntime's calibrators."""

import contextlib
import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import calibrate
from torch import Tensor

from qtrain.grids.affine import Affine
from qtrain.observers import OBSERVERS, Collector, Histogram, divergences, make

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = sorted(OBSERVERS)
HISTOGRAMS = ["percentile", "histogram_mse", "histogram_kl"]
ORDERLESS = ["minmax", *HISTOGRAMS]
BOTH = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
BINS = 512


def grid(symmetric: bool = False, bits: int = 8) -> Affine:
    return Affine(bits, "absmax_onnx" if symmetric else "minmax_onnx", "tensor")


def collector(name: str, symmetric: bool = False, bits: int = 8, percentile: float = 99.0, bins: int = BINS) -> Collector:
    return make(name, grid=grid(symmetric, bits), percentile=percentile, bins=bins)


def seen(
    name: str, *batches: Tensor, symmetric: bool = False, bits: int = 8, percentile: float = 99.0, bins: int = BINS
) -> tuple[float, float]:
    """The range after those batches."""
    c = collector(name, symmetric, bits, percentile, bins)
    for batch in batches:
        c.observe(batch)
    low, high = c.range()
    assert low.dtype == high.dtype == torch.float32 and low.shape == high.shape == ()
    assert low <= high
    return float(low), float(high)


def bin_width(x: Tensor, bins: int = BINS) -> float:
    """The widest that a bin may be."""
    return float(x.abs().max()) / bins


def distributions(count: int = 20_000, seed: int = 0) -> dict[str, Tensor]:
    """What activations look like."""
    g = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(count, generator=g)

    outliers, pair = normal(), normal()
    outliers[:5] = 30.0
    pair[:2] = torch.tensor([-80.0, 25.0])
    return {
        "normal": normal(),
        "relu": normal().relu(),
        "negative": -normal().abs(),
        "gelu": torch.nn.functional.gelu(1.5 * normal()),
        "laplace": normal().abs().log() * normal().sign(),
        "student": normal() / torch.stack([normal(), normal(), normal()]).square().mean(0).sqrt(),
        "lognormal": normal().exp(),
        "uniform": torch.rand(count, generator=g) - 0.25,
        "far from zero": 5 + torch.rand(count, generator=g),
        "outliers": outliers,
        "two sides": pair,
        "padded": normal() * (torch.rand(count, generator=g) < 0.5),
        "softmax": torch.softmax(2 * normal().view(-1, 50), -1).reshape(-1),
    }


DISTRIBUTIONS = sorted(distributions(50))
HEAVY = ["laplace", "student", "lognormal", "outliers", "two sides"]

batches = st.lists(
    st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=40).map(
        lambda values: torch.tensor(values, dtype=torch.float32)
    ),
    min_size=1,
    max_size=6,
)

# -- what every collector does ---------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", ALL)
@given(data=batches)
@settings(max_examples=40, deadline=None)
def test_any_batches_give_a_range_within_what_was_seen(name: str, symmetric: bool, data: list[Tensor]) -> None:
    low, high = seen(name, *data, symmetric=symmetric)
    x = torch.cat(data)
    most = float(x.abs().max())
    assert math.isfinite(low) and math.isfinite(high)
    if symmetric:
        assert -most <= low <= high <= most
    else:
        assert min(float(x.min()), 0.0) <= low <= high <= max(float(x.max()), 0.0)
    if symmetric and name in HISTOGRAMS and x.min() < x.max():
        assert low == -high


@pytest.mark.parametrize("name", ALL)
def test_no_data_is_an_error(name: str) -> None:
    c = collector(name)
    c.observe(torch.empty(0, 7))
    with pytest.raises(ValueError, match="no data seen"):
        c.range()


@BOTH
@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_changes_nothing(name: str, symmetric: bool) -> None:
    x = distributions()["gelu"]
    assert seen(name, x[:0], x, x[:0].view(0, 3), x, symmetric=symmetric) == seen(name, x, x, symmetric=symmetric)


@BOTH
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("c", [0.0, -0.0, 5.0, -3e-3, 1e-30, 1e30, -1.0])
def test_a_constant_is_its_own_range(name: str, symmetric: bool, c: float) -> None:
    x = torch.full((3, 5), c)
    value = float(x[0, 0])
    assert seen(name, x, x[:1], symmetric=symmetric) == (value, value)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nan_and_infinity_are_refused_and_not_folded_in(name: str, dtype: torch.dtype) -> None:
    x = distributions()["normal"].to(dtype)
    c, clean = collector(name), collector(name)
    c.observe(x)
    clean.observe(x)
    bad = x.clone()
    bad[[3, 10, 500]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    with pytest.raises(ValueError, match=r"3 of 20,000 values are not finite: 1 NaN, 2 infinite"):
        c.observe(bad)
    with pytest.raises(ValueError, match="1 of 1 values"):
        c.observe(torch.tensor([math.nan], dtype=dtype))
    assert c.range() == clean.range()


@pytest.mark.parametrize("name", ALL)
def test_what_overflows_float32_is_not_finite(name: str) -> None:
    with pytest.raises(ValueError, match="1 of 2 values"):
        collector(name).observe(torch.tensor([1e300, 1.0], dtype=torch.float64))


@BOTH
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_seen_as_the_float32_they_are(name: str, symmetric: bool, dtype: torch.dtype) -> None:
    x = distributions()["student"].to(dtype)
    assert seen(name, x, x * 2, symmetric=symmetric) == seen(name, x.float(), (x * 2).float(), symmetric=symmetric)


@pytest.mark.parametrize("name", ALL)
def test_shape_strides_and_gradients_do_not_matter(name: str) -> None:
    x = distributions()["gelu"]
    want = seen(name, x)
    assert seen(name, x.view(10, 20, 5, 20)) == want
    assert seen(name, x.view(100, 200).T) == want
    assert seen(name, x.view(10, 20, 5, 20).to(memory_format=torch.channels_last)) == want
    assert seen(name, x.clone().requires_grad_()) == want
    assert seen(name, x.view(1, -1).expand(3, -1)) == seen(name, torch.cat([x, x, x]))


@pytest.mark.parametrize("name", ORDERLESS)
@BOTH
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_neither_order_nor_slicing_of_the_batches_matters(name: str, symmetric: bool, distribution: str) -> None:
    """Not to a bin only: the counts follow from the values."""
    x = distributions()[distribution]
    x = x * torch.logspace(-3, 3, len(x), base=2)  # ranges that grow, or shrink, from batch to batch
    whole = seen(name, x, symmetric=symmetric)
    pieces = list(x.split(1_237))
    assert seen(name, *pieces, symmetric=symmetric) == whole
    assert seen(name, *reversed(pieces), symmetric=symmetric) == whole
    assert seen(name, x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))], symmetric=symmetric) == whole


@pytest.mark.parametrize("name", ORDERLESS)
@given(data=batches, seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_any_batches_may_come_in_any_order(name: str, data: list[Tensor], seed: int) -> None:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    assert seen(name, *(data[i] for i in order)) == seen(name, *data) == seen(name, torch.cat(data))


@pytest.mark.parametrize("name", ALL)
@BOTH
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_scaling_the_data_scales_the_range(name: str, symmetric: bool, distribution: str) -> None:
    x = distributions()[distribution]
    low, high = seen(name, x, symmetric=symmetric)
    for factor in (2.0**-40, 0.5, 2.0**30):
        assert seen(name, x * factor, symmetric=symmetric) == (low * factor, high * factor)
    if name == "histogram_kl":
        return  # its levels depend on how the bins fall, and its curve is flat
    a, b = seen(name, x * 1.37, symmetric=symmetric)
    tolerance = 0.06 if name == "histogram_mse" else 0.0  # a flat optimum
    for got, want in ((a / 1.37, low), (b / 1.37, high)):
        assert got == pytest.approx(want, rel=tolerance + 1e-6, abs=2 * bin_width(x))


@pytest.mark.parametrize("name", ORDERLESS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_symmetric_range_does_not_know_signs(name: str, distribution: str) -> None:
    """Except that there is one code more below zero, of which the squared error makes use."""
    x = distributions()[distribution]
    low, high = seen(name, x, symmetric=True)
    other_low, other_high = seen(name, -x, symmetric=True)
    assert max(-low, high) == pytest.approx(max(-other_low, other_high), abs=2 * bin_width(x), rel=0.02 * (name == "histogram_mse"))


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_one_sided_data_keep_one_end_at_zero(name: str) -> None:
    """All codes of the grid go to the side where the values are."""
    x = distributions()["relu"]
    low, high = seen(name, x)
    assert low == 0.0 and 2.0 < high <= float(x.max())
    low, high = seen(name, -x)
    assert high == 0.0 and -float(x.max()) <= low < -2.0


@pytest.mark.parametrize("distribution", HEAVY)
@BOTH
def test_heavy_tails_are_clipped_by_all_but_minmax(distribution: str, symmetric: bool) -> None:
    x = distributions(100_000)[distribution]
    ends = float(x.min()), float(x.max())
    span = (lambda low, high: max(-low, high)) if symmetric else (lambda low, high: max(high, 0.0) - min(low, 0.0))
    assert seen("minmax", x) == ends
    for name in HISTOGRAMS:
        assert span(*seen(name, x, symmetric=symmetric, bins=2048)) < 0.999 * span(*ends), name


@pytest.mark.parametrize("name", ALL)
def test_many_values_in_one_batch(name: str) -> None:
    """More than fit in a piece, and more of one kind than float32 can count to."""
    x = distributions(1_000)["normal"]
    big = x.repeat(3_000)  # 3 M values, 23 pieces
    assert seen(name, big) == seen(name, x) if name != "histogram_kl" else math.isfinite(seen(name, big)[1])
    c = collector(name)
    c.observe(x)
    c.observe(torch.zeros(1).expand(2**24 + 3))
    if isinstance(c, Histogram):
        assert int(c.counts.sum()) == 2**24 + 1_003


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 3e-36, 1e-30, 1e37, 3.4e38])
@BOTH
def test_the_ends_of_float32(name: str, symmetric: bool, magnitude: float) -> None:
    x = distributions()["uniform"]
    x = (x.double() / float(x.abs().max()) * magnitude).float()
    low, high = seen(name, x, x / 2, symmetric=symmetric)
    assert -magnitude * 1.001 <= low <= 0 < 0.7 * magnitude < high <= magnitude * 1.001


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
@BOTH
def test_ranges_are_those_of_the_cpu(name: str, symmetric: bool) -> None:
    for x in (*distributions().values(), torch.zeros(9)):
        assert seen(name, (x / 2).cuda(), x.cuda(), symmetric=symmetric) == seen(name, x / 2, x, symmetric=symmetric)


def test_names_and_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'entropy'; valid: minmax, moving_average, percentile, histogram_mse, histogram_kl"):
        make("entropy", grid=grid())
    for bad in (0.0, 101.0, math.nan):
        with pytest.raises(ValueError, match=r"quantizer\.percentile=99\.99"):
            make("percentile", grid=grid(), percentile=bad)
    with pytest.raises(ValueError, match=r"momentum=0\.01"):
        make("moving_average", grid=grid(), momentum=0.0)
    for name in HISTOGRAMS:
        with pytest.raises(ValueError, match="at least 256"):
            make(name, grid=grid(), bins=255)


def test_torchao_is_imported_only_by_those_who_use_it() -> None:
    code = (
        "import sys; from qtrain import observers as o; from qtrain.grids.affine import Affine; g = Affine(8, 'absmax', 'tensor');"
        "[o.make(n, grid=g) for n in ('percentile', 'histogram_mse', 'histogram_kl')]; assert 'torchao' not in sys.modules;"
        "o.make('minmax', grid=g); assert 'torchao' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -- minmax and moving_average ---------------------------------------------------------------------------------------


def test_a_short_calibration_averages_all_batches_evenly() -> None:
    data = [torch.tensor([-i - 1.0, 10.0 * i + 1.0]) for i in range(8)]
    low, high = seen("moving_average", *data)
    assert low == pytest.approx(np.mean([-i - 1.0 for i in range(8)]), rel=1e-6)
    assert high == pytest.approx(np.mean([10.0 * i + 1.0 for i in range(8)]), rel=1e-6)


def test_a_long_calibration_is_an_exponential_average() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(60, 30, generator=generator)
    c = make("moving_average", grid=grid(), momentum=0.1)
    low = high = 0.0
    for i, batch in enumerate(data):
        c.observe(batch)
        weight = max(0.1, 1 / (i + 1))
        low += weight * (float(batch.min()) - low)
        high += weight * (float(batch.max()) - high)
    assert [float(end) for end in c.range()] == pytest.approx([low, high], rel=1e-5)


def test_torchao_on_its_own_would_see_little_but_the_first_batch() -> None:
    """Why its averaging constant is set here."""
    from torchao.quantization.pt2e.observer import MovingAverageMinMaxObserver

    theirs = MovingAverageMinMaxObserver()
    data = [torch.tensor([0.0, 1.0]), *([torch.tensor([0.0, 2.0])] * 7)]
    for batch in data:
        theirs(batch)
    assert float(theirs.max_val) == pytest.approx(1 + 1 - 0.99**7)
    assert seen("moving_average", *data)[1] == pytest.approx(15 / 8)


# -- the histogram ---------------------------------------------------------------------------------------------------


@given(data=batches)
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_numpy(data: list[Tensor]) -> None:
    c = collector("histogram_mse", bins=256)
    assert isinstance(c, Histogram)
    for batch in data:
        c.observe(batch)
    x = torch.cat(data).double().numpy()
    assume(np.abs(x).max() > 1e-30)
    assert math.frexp(c.width)[0] == 0.5
    assert 256 * c.width <= np.abs(x).max() < 512 * c.width
    edges = np.arange(-512, 513) * c.width
    np.testing.assert_array_equal(c.counts.numpy(), np.histogram(x, edges)[0])
    assert c.zeros == (x == 0).sum()


# -- percentile ------------------------------------------------------------------------------------------------------


RANKS = [90.013, 99.003, 99.913]
"""Per cents of 20,000 values that end between two of them: the references compare float shares, which at a value go either way."""


@pytest.mark.parametrize("percentile", [50.0, *RANKS, 100.0])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_percentiles_are_numpy_s_to_a_bin(distribution: str, percentile: float) -> None:
    x = distributions()[distribution]
    a = x.double().numpy()
    width = bin_width(x) * (1 + 1e-9)
    cut = (100.0 - percentile) / 2
    low, high = seen("percentile", *x.split(3_000), percentile=percentile)
    want_low = -np.percentile(-a, 100.0 - cut, method="inverted_cdf")
    want_high = np.percentile(a, 100.0 - cut, method="inverted_cdf")
    assert want_low - width <= low <= want_low and want_high <= high <= want_high + width
    _, t = seen("percentile", *x.split(3_000), percentile=percentile, symmetric=True)
    want = np.percentile(np.abs(a), percentile, method="inverted_cdf")
    assert want <= t <= want + width


@given(data=batches, percentile=st.floats(1.0, 100.0))
@settings(max_examples=60, deadline=None)
def test_at_least_the_percentile_is_inside_and_one_bin_less_would_not_do(data: list[Tensor], percentile: float) -> None:
    x = torch.cat(data).double()
    low, high = seen("percentile", *data, percentile=percentile)
    assert float(((x >= low) & (x <= high)).double().mean()) * 100 >= percentile - 1e-6
    _, t = seen("percentile", *data, percentile=percentile, symmetric=True)
    assert float((x.abs() <= t).double().mean()) * 100 >= percentile - 1e-6 or x.min() == x.max()
    inside = t - 1.01 * bin_width(x)
    assert float((x.abs() < inside).double().mean()) * 100 < percentile + 1e-6


def collected(method: str, symmetric: bool, bins: int, percentile: float, levels: int, *data: Tensor) -> calibrate.HistogramCollector:
    """onnxruntime's collector, with the data seen."""
    c = calibrate.HistogramCollector(method, symmetric, bins, levels, percentile, None)
    with contextlib.redirect_stdout(io.StringIO()):
        for batch in data:
            c.collect({"x": batch.numpy()})
    return c


def of_onnxruntime(c: calibrate.HistogramCollector) -> tuple[float, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        low, high = c.compute_collection_result()["x"][:2]
    return float(low), float(high)


@pytest.mark.parametrize("percentile", RANKS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@BOTH
def test_percentiles_are_onnxruntime_s_to_a_bin_of_each(distribution: str, percentile: float, symmetric: bool) -> None:
    """A bin of each, since theirs ends at a lower edge, ours at an upper one, and the bins are not the same. It cuts (-t, t) to the data.

    The same batches, the largest first: its bins then stay put, and are no wider than ours.
    """
    x = distributions()[distribution]
    data = sorted(x.split(4_000), key=lambda batch: -float(batch.abs().max()))
    width = bin_width(x)
    low, high = seen("percentile", *data, percentile=percentile, symmetric=symmetric)
    # signed bins there span both signs, those of |x| one
    theirs = of_onnxruntime(collected("percentile", symmetric, BINS if symmetric else 2 * BINS, percentile, 128, *data))
    if symmetric:
        low, theirs = -max(-low, high), (-max(-theirs[0], theirs[1]), max(-theirs[0], theirs[1]))
    assert low == pytest.approx(theirs[0], abs=2.001 * width) and high == pytest.approx(theirs[1], abs=2.001 * width)


@pytest.mark.parametrize("percentile", RANKS)
@pytest.mark.parametrize("distribution", ["normal", "laplace", "lognormal", "gelu"])
def test_on_onnxruntime_s_own_bins_percentiles_differ_by_the_upper_bin(distribution: str, percentile: float) -> None:
    """Where the largest magnitude is a power of two, bins are the same. It returns the lower edge of the upper bin, ours is the upper."""
    x = distributions()[distribution]
    x = x / x.abs().max() * 4.0
    assert float(x.abs().max()) == 4.0
    low, high = seen("percentile", x, percentile=percentile)
    theirs = of_onnxruntime(collected("percentile", False, 2 * BINS, percentile, 128, x))
    assert low == pytest.approx(theirs[0], abs=1e-6)
    assert high == pytest.approx(min(theirs[1] + 4.0 / BINS, float(x.max())), abs=1e-6)


# -- histogram_mse ---------------------------------------------------------------------------------------------------


def squared_error(a: np.ndarray, low: float, high: float, symmetric: bool, bits: int) -> float:
    """Of the codes, in float64, written down again without reference to the implementation."""
    first, last = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(-low, high) / last if symmetric else (high - low) / (last - first)
    zero = 0 if symmetric else np.clip(first - np.round(low / scale), first, last)
    codes = np.clip(np.round(a / scale) + zero, first, last)
    return float((((codes - zero) * scale - a) ** 2).sum())


def least_error(a: np.ndarray, symmetric: bool, bits: int) -> float:
    """An exhaustive search: of the threshold, or of one end and then the other, three times."""
    low, high = min(a.min(), 0.0), max(a.max(), 0.0)
    shrinks = 2.0 ** (-np.arange(0, 7, 0.04))
    if symmetric:
        t = max(-low, high)
        return min(squared_error(a, -t * f, t * f, True, bits) for f in shrinks)
    f_low, least = 1.0, math.inf
    for _ in range(3):
        _, f_high = min((squared_error(a, low * f_low, high * f, False, bits), f) for f in (shrinks if high else [1.0]))
        least, f_low = min((squared_error(a, low * f, high * f_high, False, bits), f) for f in (shrinks if low else [1.0]))
    return least


@BOTH
@pytest.mark.parametrize("bits", [4, 7, 8])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_squared_error_is_the_least_there_is(distribution: str, bits: int, symmetric: bool) -> None:
    x = distributions(4_000)[distribution]
    low, high = seen("histogram_mse", *x.split(500), symmetric=symmetric, bits=bits, bins=2048)
    a = x.double().numpy()
    assert squared_error(a, low, high, symmetric, bits) <= 1.03 * least_error(a, symmetric, bits)


@BOTH
@pytest.mark.parametrize("distribution", ["normal", "relu", "gelu", "two sides"])
def test_the_grid_computes_that_squared_error(distribution: str, symmetric: bool) -> None:
    """The reference here, the search and the grid itself mean the same codes."""
    x = distributions()[distribution]
    low, high = seen("histogram_mse", x, symmetric=symmetric, bins=2048)
    on = grid(symmetric)
    error = float((on.fake(x, on.choose(torch.tensor([low, high]))).double() - x.double()).square().sum())
    assert error == pytest.approx(squared_error(x.double().numpy(), low, high, symmetric, 8), rel=1e-3)


def test_zeros_cost_nothing() -> None:
    """However many a ReLU or padding adds, the range for the other values stays."""
    x = distributions()["normal"]
    for name in ("histogram_mse", "histogram_kl"):
        for symmetric in (False, True):
            assert seen(name, x, torch.zeros(10 * len(x)), symmetric=symmetric) == seen(name, x, symmetric=symmetric)


# -- histogram_kl ----------------------------------------------------------------------------------------------------


def divergence(counts: np.ndarray, start: int, stop: int, levels: int) -> float:
    """KL(P || Q) by the book, in plain loops."""
    n = stop - start
    p = [float(counts[start + i]) for i in range(n)]
    p[0] += float(counts[:start].sum())
    p[-1] += float(counts[stop:].sum())
    q = [0.0] * n
    for level in range(levels):
        members = [i for i in range(n) if i * levels // n == level]
        used = [i for i in members if p[i] > 0]
        for i in used:
            q[i] = max(sum(float(counts[start + j]) for j in members) / len(used), 1e-4)
    kept = float(counts[start:stop].sum()) or 1e-4
    return sum(a / sum(p) * math.log((a / sum(p)) / (b / kept)) for a, b in zip(p, q, strict=True) if a > 0)


@given(
    counts=st.lists(st.integers(0, 50), min_size=8, max_size=60).filter(any),
    levels=st.integers(2, 8),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_divergences_are_those_of_the_definition(counts: list[int], levels: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(counts) - levels))
    stop = data.draw(st.integers(start + levels, len(counts)))
    got = divergences(torch.tensor(counts).double(), torch.tensor([start, start]), torch.tensor([stop, stop]), levels)
    want = divergence(np.array(counts), start, stop, levels)
    assert got.tolist() == pytest.approx([want, want], abs=1e-9)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@BOTH
def test_the_threshold_has_the_least_divergence_of_all(distribution: str, symmetric: bool) -> None:
    """16 codes and few bins, for the loops' sake; histograms made by NumPy, without zeros."""
    x = distributions(5_000)[distribution]
    a = x.double().numpy()
    c = collector("histogram_kl", symmetric, bits=4, bins=16)
    c.observe(x)
    assert isinstance(c, Histogram)
    width, most = c.width, np.abs(a).max()
    a = a[a != 0]
    best, want = math.inf, 0.0
    bins = math.floor(most / width) + 1
    levels = 8 if symmetric else 16
    counts = np.histogram(np.abs(a) if symmetric else a, np.arange(0 if symmetric else -bins, bins + 1) * width)[0]
    used = [int(i) for i in np.floor([min(a.min(), 0) / width, max(a.max(), 0) / width])]
    for t in range(1, bins + 1):
        start, stop = (0, t) if symmetric else (max(-t, used[0]) + bins, min(t, used[1] + 1) + bins)
        if stop - start < levels:
            continue
        value = divergence(counts, start, stop, levels)
        if value <= best + 1e-12:
            best, want = value, t * width
    low, high = (float(end) for end in c.range())
    if symmetric:
        assert (low, high) == (-high, pytest.approx(min(want, most), rel=1e-6))
    else:
        assert (low, high) == (pytest.approx(max(-want, float(x.min())), rel=1e-6), pytest.approx(min(want, float(x.max())), rel=1e-6))


def entropies_of_onnxruntime(x: Tensor, bins: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[float], float]:
    """Its histogram [bins], its divergence for each half-width from levels // 2 bins up, and its threshold."""
    values: list[float] = []
    original = calibrate.entropy

    def recorded(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        values.append(float(original(p, q)))
        return np.float32(values[-1])

    monkeypatch.setattr(calibrate, "entropy", recorded)
    c = collected("entropy", False, bins, 99.0, levels, x)
    threshold = of_onnxruntime(c)[1]
    monkeypatch.undo()
    return c.get_histogram_dict()["x"][0], values, threshold


TWO_SIDED = ["laplace", "normal", "outliers", "student", "uniform"]


@pytest.mark.parametrize("distribution", TWO_SIDED)
def test_entropy_thresholds_are_onnxruntime_s(distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the distance between the candidates, of 2 i + 1 bins, for which it computes the definition.

    With 15 levels, those of 15, 45, 75, ... bins leave no remainder, and there the two agree on the best. Ours has 16 levels and all
    candidates. The bins are the same, since the largest magnitude is a power of two. Data with as much on one side as on the other: of
    one-sided data onnxruntime gives half of the levels to the side where nothing is.
    """
    x = distributions(200_000)[distribution]
    if distribution == "uniform":
        x = x - 0.25
    x = x / x.abs().max()
    half, levels = 256, 15
    counts, theirs, threshold = entropies_of_onnxruntime(x, 2 * half, levels, monkeypatch)
    exact = torch.tensor([i for i in range(levels // 2, half) if (2 * i + 1) % levels == 0])
    ours = divergences(torch.from_numpy(counts).double(), half - exact, half + exact + 1, levels)
    assert int(ours.argmin()) == int(np.argmin([theirs[int(i) - levels // 2] for i in exact]))
    low, high = seen("histogram_kl", x, bits=4, bins=half)
    assert max(-low, high) == pytest.approx(threshold, abs=levels / half)


def test_divergences_are_onnxruntime_s_where_it_leaves_no_remainder(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no bin is empty: it spreads a level over those too."""
    x = distributions(200_000)["normal"]
    x = x / x.abs().max()
    half, levels = 128, 15
    counts, theirs, _ = entropies_of_onnxruntime(x, 2 * half, levels, monkeypatch)
    exact = [i for i in range(levels // 2, half) if (2 * i + 1) % levels == 0 and counts[half - i : half + i + 1].min() > 0]
    assert len(exact) >= 5
    ours = divergences(torch.from_numpy(counts).double(), half - torch.tensor(exact), half + torch.tensor(exact) + 1, levels)
    want = [theirs[i - levels // 2] for i in exact]
    assert ours.tolist() == pytest.approx(want, rel=0.02)  # it truncates Q to integers and sums in float32
