"""Gradients against straight-through estimators written here in float64: `Grid.fake`, and LSQ (Esser et al. 2020, arXiv 1902.08153)."""

import re

import pytest
import torch
from torch import Tensor

from exporters.gguf.pack import plan
from qtrain.grids.affine import ASYMMETRIC_RULES, NEVER_CLIPS, SYMMETRIC_RULES, Affine
from qtrain.grids.base import Params
from qtrain.grids.ggml import Ggml
from qtrain.grids.ste import learned_step, straight_through
from qtrain.layers import FakeLinear, FakeWeight, QuantizedLinear
from qtrain.prepare import convert

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = SYMMETRIC_RULES + ASYMMETRIC_RULES
GROUP = 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid_of(rule: str, **options: object) -> Affine:
    return Affine(8 if rule == "absmax_mlas" else 4, rule, "group", GROUP, **options)  # type: ignore[arg-type]


def position(w: Tensor, params: Params) -> Tensor:
    """w / scale + zero point in float64, before rounding: [R, G, S]."""
    v = w.detach().double().reshape(len(w), -1, GROUP) / params["scale"].double()[..., None]
    return v + params["zero_point"].double()[..., None] if "zero_point" in params else v


def gradient_of_fake(w: Tensor, upstream: Tensor, grid: Affine, params: Params | None = None) -> Tensor:
    leaf = w.clone().requires_grad_()
    grid.fake(leaf, params).backward(upstream)
    assert leaf.grad is not None
    return leaf.grad


# -- Grid.fake ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_passes_where_the_rounded_code_is_on_the_grid(rule: str) -> None:
    grid = grid_of(rule)
    w, upstream = normal(32, 64), normal(32, 64, seed=1)
    v = position(w, grid.choose(w)).reshape(32, 64)
    inside = (v.round() >= grid.low) & (v.round() <= grid.high)
    gradient = gradient_of_fake(w, upstream, grid)
    decided = (v - grid.high - 0.5).abs() > 1e-4  # absmax_half puts the maximum at high + 0.5, where the last bit of float32 decides
    assert torch.equal(gradient[decided], (upstream * inside)[decided])
    assert ((gradient == upstream) | (gradient == 0)).all()
    assert decided.all() or (rule == "absmax_half" and decided.double().mean() > 0.95)
    if rule in NEVER_CLIPS:
        assert (gradient != 0).all()
    elif rule not in ("minmax", "minmax_onnx"):  # which clips at most where the zero point rounds
        assert (gradient == 0).any() and inside.double().mean() > 0.8


@pytest.mark.parametrize("rule", RULES)
def test_frozen_scales_clip_what_grew_beyond_them(rule: str) -> None:
    grid = grid_of(rule)
    w, upstream = normal(32, 64), normal(32, 64, seed=1)
    params = grid.choose(w * 0.5)
    rounded = position(w, params).round()
    inside = ((rounded >= grid.low) & (rounded <= grid.high)).reshape(32, 64)
    assert 0 < (~inside).sum() < inside.sum()
    assert torch.equal(gradient_of_fake(w, upstream, grid, params), upstream * inside)


@pytest.mark.parametrize("rule", [r for r in SYMMETRIC_RULES if r != "absmax_mlas"])
def test_scales_rounded_to_small_float16_clip_under_every_rule(rule: str) -> None:
    """Below 6e-5 a float16 scale may round down by more than half a code, so even absmax clips, at both ends; the gradient says so."""
    grid = Affine(8, rule, "group", GROUP, scale_dtype="float16")
    w, upstream = normal(32, 64) * 3e-5, normal(32, 64, seed=1)
    v = position(w, grid.choose(w)).reshape(32, 64)
    inside = (v.round() >= grid.low) & (v.round() <= grid.high)
    decided = ((v - v.floor() - 0.5).abs() > 1e-4) | ((v > grid.low) & (v < grid.high))
    assert (v.round() > grid.high).any() and ((v.round() < grid.low).any() or rule == "mse")
    assert torch.equal(gradient_of_fake(w, upstream, grid)[decided], (upstream * inside)[decided])


def test_a_short_last_group_and_low_precision_keep_shape_and_type() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = normal(3, 37).to(dtype).requires_grad_()
        Affine(4, "absmax", "group", 16, remainder="short").fake(w).sum().backward()
        assert w.grad is not None and w.grad.dtype == dtype
        assert torch.equal(w.grad, torch.ones_like(w))


def test_straight_through_returns_the_values_it_was_given() -> None:
    w = normal(8).requires_grad_()
    values, mask = normal(8, seed=1), torch.arange(8) % 2 == 0
    y = straight_through(w, values, mask)
    assert torch.equal(y, values) and y.requires_grad
    (y * torch.arange(8)).sum().backward()
    assert torch.equal(w.grad, torch.arange(8.0) * mask)


def test_no_gradient_is_asked_for_none_is_kept() -> None:
    assert not grid_of("mse").fake(normal(4, 32)).requires_grad


# -- LSQ -------------------------------------------------------------------------------------------------------------------------


def lsq(x: Tensor, scale: Tensor, upstream: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """Esser et al. 2020 in float64: y (equations 1, 2), dL/ds (3, times g = 1/sqrt(N Q_P)), dL/dx (5)."""
    x, scale, upstream = x.double(), scale.double(), upstream.double()
    q_n, q_p = -low, high
    v = x / scale
    y = v.clamp(-q_n, q_p).round() * scale
    middle = (v > -q_n) & (v < q_p)
    dy_ds = torch.where(middle, v.round() - v, torch.where(v <= -q_n, -float(q_n), float(q_p)))
    g = 1 / (x.shape[-1] * q_p) ** 0.5
    return y, (upstream * dy_ds).sum(-1, keepdim=True) * g, upstream * middle


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_learned_step_is_lsq(bits: int, sign: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = normal(8, 3, 32, seed=bits).requires_grad_()
    scale = (sign * (0.3 + normal(8, 3, 1, seed=bits + 1).abs()) / high).requires_grad_()
    upstream = normal(8, 3, 32, seed=bits + 2)
    y = learned_step(x, scale, low, high)
    y.backward(upstream)
    want_y, want_scale, want_x = lsq(x.detach(), scale.detach(), upstream, low, high)
    torch.testing.assert_close(y.double(), want_y, rtol=1e-6, atol=1e-7)
    assert torch.equal(x.grad.double(), want_x)
    assert (want_x == 0).any()
    torch.testing.assert_close(scale.grad.double(), want_scale, rtol=1e-4, atol=1e-5)


def test_between_the_last_code_and_half_a_step_beyond_the_bound_rules() -> None:
    """Equation 3 looks at v, not at round(v): at v = 7.3 the code is clipped, though it would round to 7 anyway."""
    x, scale = torch.tensor([[[7.3, 6.8, -8.3, 1.25]]], requires_grad=True), torch.ones(1, 1, 1, requires_grad=True)
    learned_step(x, scale, -8, 7).sum().backward()
    assert x.grad.flatten().tolist() == [0.0, 1.0, 0.0, 1.0]
    assert float(scale.grad) == pytest.approx((7 + 0.2 - 8 - 0.25) / (4 * 7) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rule", SYMMETRIC_RULES)
def test_a_learned_scale_passes_straight_through_its_stored_type(rule: str, scale_dtype: str) -> None:
    if rule == "absmax_mlas" and scale_dtype != "float32":
        pytest.skip("absmax_mlas has float32 scales")
    grid = grid_of(rule, scale_dtype=scale_dtype)
    w, upstream = normal(8, 64), normal(8, 64, seed=1)
    fake = FakeWeight(grid)
    fake.learn_scale(w)
    assert fake.scale is not None and fake.scale.shape == (8, 4)
    assert torch.equal(fake.scale, grid.choose(w)["scale"])
    with torch.no_grad():
        fake.scale.mul_(0.83)  # now between two numbers of the stored type
    leaf = w.clone().requires_grad_()
    y = fake(leaf)
    y.backward(upstream)

    scale = fake.scale.detach()
    held = scale if scale_dtype == "float32" else scale.to(getattr(torch, scale_dtype)).float()
    assert torch.equal(held, scale) == (scale_dtype == "float32")
    cut = (8, 4, GROUP)
    want_y, want_scale, want_w = lsq(w.reshape(cut), held[..., None], upstream.reshape(cut), grid.low, grid.high)
    torch.testing.assert_close(y.double(), want_y.reshape(8, 64), rtol=1e-6, atol=1e-7)
    assert torch.equal(leaf.grad.double(), want_w.reshape(8, 64))
    torch.testing.assert_close(fake.scale.grad.double(), want_scale.squeeze(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rule", ["absmax", "signed_absmax", "mse"])
def test_convert_changes_no_bit_after_the_scales_have_learned(rule: str, scale_dtype: str) -> None:
    grid = Affine(3, rule, "group", GROUP, "short", scale_dtype)
    linear = torch.nn.Linear(40, 12)
    with torch.no_grad():
        linear.weight.copy_(normal(12, 40) * 0.2)
    model = torch.nn.Sequential(FakeLinear(linear, grid))
    layer = model[0]
    layer.weight_fake.learn_scale(layer.weight)
    start = layer.weight_fake.scale.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, target = normal(64, 40), normal(64, 12, seed=1)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert (layer.weight_fake.scale != start).all()
    model.eval()
    before, weight = model(x).detach(), layer.weight_fake(layer.weight).detach()
    convert(model)
    assert torch.equal(model(x).view(torch.int32), before.view(torch.int32))
    assert torch.equal(model[0].quantized.decode().view(torch.int32), weight.view(torch.int32))
    held = model[0].quantized.params["scale"]
    assert torch.equal(held, held.to(getattr(torch, scale_dtype)).float())


def test_a_learned_scale_that_reaches_zero_stays_a_number() -> None:
    for rule in ("absmax", "signed_absmax"):
        fake = FakeWeight(grid_of(rule))
        fake.learn_scale(normal(2, 32))
        with torch.no_grad():
            fake.scale.zero_()
        y = fake(normal(2, 32).requires_grad_())
        y.sum().backward()
        assert torch.isfinite(y).all() and torch.isfinite(fake.scale.grad).all()


def test_frozen_learned_scales_get_no_gradient() -> None:
    fake, w = FakeWeight(grid_of("absmax")), normal(2, 32).requires_grad_()
    fake.learn_scale(w)
    fake.freeze(w)
    fake(w).sum().backward()
    assert fake.scale.grad is None and w.grad is not None


def test_scales_with_zero_points_cannot_be_learned_and_the_message_says_what_to_type() -> None:
    with pytest.raises(ValueError, match=r"int4 g16 minmax has scale, zero_point.*rule=signed_absmax.*learn_scale=false"):
        FakeWeight(grid_of("minmax")).learn_scale(normal(2, 32))


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "f16"])
def test_a_grid_without_rules_names_one_that_has_them(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"ggml {kind} has.*Set grid@quantizer\.weight=affine (.*) \(which.*learn_scale=false") as error:
        FakeWeight(Ggml(kind)).learn_scale(normal(2, 256))
    found = re.findall(r"quantizer\.weight\.(\w+)=(\w+)", str(error.value))
    fake = FakeWeight(Affine(**dict(found)))  # type: ignore[arg-type]  # what it says to type is a grid, which learns, and which GGUF holds
    w = normal(2, 256)
    fake.learn_scale(w)
    assert fake.scale is not None and plan(QuantizedLinear(fake.grid.encode(w, fake.params()), None)).type == "q4_0"
