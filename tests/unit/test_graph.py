"""Convolutional networks: batch-norms fold, every value an integer operator reads is on a grid once, and convert changes no bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qtrain import graph
from qtrain.activations import FakeActivation, QuantizedActivation, calibrate
from qtrain.callbacks import FakeQuantSchedule
from qtrain.grids.affine import Affine, Int8, Int8Activation
from qtrain.grids.ggml import Ggml
from qtrain.layers import BIAS_STEPS, FakeConv, QuantizedConv, QuantizedLinear, fold
from qtrain.quantizers.ptq_dynamic import PtqDynamic
from qtrain.quantizers.ptq_static import PtqStatic
from qtrain.quantizers.qat import Qat
from tests.conftest import residual_cnn

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def cnn(seed: int = 0) -> nn.Module:
    """With statistics and affine parameters that are not the initial ones."""
    return residual_cnn(seed)


def static(**options: object) -> PtqStatic:
    return PtqStatic(weight=Int8(), activation=Int8Activation(), **options)  # type: ignore[arg-type]


def qat(**options: object) -> Qat:
    return Qat(weight=Int8(), activation=Int8Activation(), activation_range="static", **options)  # type: ignore[arg-type]


def prepared(scheme: object, model: nn.Module | None = None) -> nn.Module:
    made, _ = scheme.prepare(cnn() if model is None else model, [])  # type: ignore[attr-defined]
    return scheme.calibrate(made, [{"pixel_values": images(8, seed=s)} for s in (1, 2)])  # type: ignore[attr-defined]


def edges(model: nn.Module) -> list[str]:
    return [n.removeprefix("on_grid.") for n, m in model.named_modules() if isinstance(m, (FakeActivation, QuantizedActivation))]


# -- folding -----------------------------------------------------------------------------------------------------------------


def test_folding_changes_nothing_but_the_last_bits_and_removes_every_batch_norm() -> None:
    model, x = cnn(), images()
    traced = graph.trace(copy.deepcopy(model))
    pairs = graph.batch_norms(traced)
    assert set(pairs) == {"stem", "block.conv1", "block.conv2"} and pairs["stem"] == "norm"
    graph.fold_batch_norms(traced, pairs)
    assert not [m for m in traced.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


def test_fold_against_float64() -> None:
    conv, norm = nn.Conv2d(3, 5, 3, bias=True).double(), nn.BatchNorm2d(5).double().eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    w, b = fold(conv.weight, conv.bias, norm)
    torch.testing.assert_close(F.conv2d(x, w, b), norm(conv(x)), rtol=1e-12, atol=1e-12)


def test_a_batch_norm_read_by_two_or_behind_a_shared_layer_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    assert graph.batch_norms(graph.trace(Shared().eval())) == {}


# -- edges -------------------------------------------------------------------------------------------------------------------


def test_every_value_that_an_integer_operator_reads_is_on_a_grid_once() -> None:
    model = prepared(static())
    assert isinstance(model, fx.GraphModule)
    nodes = {n.name: n for n in model.graph.nodes}
    # the image, the stem after its ReLU, conv1 after its ReLU, conv2 before the addition, the sum after its ReLU, the pooled value
    assert edges(model) == ["pixel_values", "relu", "block_relu1", "block_conv2", "relu_1", "pool"]
    for name in edges(model):
        readers = list(nodes[name].users)
        assert len(readers) == 1 and readers[0].target == f"on_grid.{name}"
    assert isinstance(model.get_submodule("head").source, FakeActivation)
    assert model.get_submodule("block.conv2").source is model.get_submodule("on_grid.block_relu1")
    assert model.get_submodule("stem").source is model.get_submodule("on_grid.pixel_values")


def test_a_layer_left_in_float_leaves_the_sum_behind_it_in_float() -> None:
    scheme = static(keep_float=["block.conv2"])
    model, kept = scheme.prepare(cnn(), [])
    assert kept == ["block.conv2"] and "block_conv2" not in edges(model)
    assert isinstance(model.get_submodule("block.conv2"), nn.Conv2d)


def test_what_cannot_be_traced_is_quantized_layer_by_layer_and_said() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, pixel_values: Tensor) -> Tensor:
            y = self.conv(pixel_values)
            if y.mean() > 0:
                y = y * 2
            return self.head(y.mean((2, 3)))

    scheme = static()
    model = prepared(scheme, Branch().eval())
    (fallback,) = scheme.fallbacks
    assert fallback["name"] == "Branch" and "cannot be traced" in fallback["why"]
    assert model.conv.activation_fake is not None and model.conv.source is None
    before = model(images())
    assert torch.equal(scheme.convert(model)(images()), before)


def test_a_module_that_is_never_called_is_an_error() -> None:
    model = cnn()
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=r"never called by the model, the first spare.*keep_float=\[spare\]"):
        static().prepare(model, [])


# -- convert == prepare ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 7, 4])
@pytest.mark.parametrize("rule", ["minmax_onnx", "absmax_onnx"])
def test_convert_changes_no_bit_after_calibration(bits: int, rule: str) -> None:
    scheme = PtqStatic(weight=Int8(bits=bits), activation=Int8Activation(rule=rule))
    model = prepared(scheme)
    before = model(images())
    converted = scheme.convert(model)
    assert torch.equal(converted(images()), before)
    assert {type(converted.get_submodule(n)) for n in ("stem", "block.conv1", "block.conv2")} == {QuantizedConv}
    assert not list(converted.parameters()) and edges(converted)


@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("freeze", [None, 0, 3])
def test_convert_changes_no_bit_after_training_with_batch_norms(freeze: int | None, learn_scale: bool) -> None:
    scheme = qat(freeze_step=freeze, learn_scale=learn_scale)
    model = prepared(scheme)
    train(model, scheme, steps=6)
    assert isinstance(model.get_submodule("stem"), FakeConv) and model.get_submodule("stem").batch_norm is not None
    before = model.eval()(images())
    converted = scheme.convert(model)
    assert torch.equal(converted(images()), before)
    assert not [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]


def test_convert_changes_no_bit_with_dynamic_activations() -> None:
    scheme = PtqDynamic(weight=Int8(), activation=Int8Activation())
    model = prepared(scheme)
    before = model(images())
    assert torch.equal(scheme.convert(model)(images()), before)


def train(model: nn.Module, scheme: Qat, steps: int) -> None:
    class Trainer:
        global_step = 0

    (schedule,) = scheme.callbacks()
    assert isinstance(schedule, FakeQuantSchedule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    model.train()
    for step in range(steps):
        trainer = Trainer()
        trainer.global_step = step
        schedule.on_train_batch_start(trainer, model, None, step)  # type: ignore[arg-type]
        loss = F.cross_entropy(model(pixel_values=images(8, seed=step)), torch.arange(8) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# -- batch-norms in training -------------------------------------------------------------------------------------------------


def test_batch_norm_statistics_move_until_they_are_frozen() -> None:
    scheme = qat(freeze_batch_norm_step=2)
    model = prepared(scheme)
    norm = model.get_submodule("stem").batch_norm
    start = norm.running_mean.clone()
    train(model, scheme, steps=2)
    moved = norm.running_mean.clone()
    assert not torch.equal(start, moved)
    train(model, qat(freeze_batch_norm_step=0), steps=2)
    assert torch.equal(norm.running_mean, moved)
    assert not norm.training and model.get_submodule("stem").training  # .train() leaves it frozen


def test_with_batch_statistics_the_layer_computes_the_batch_norm_of_a_convolution() -> None:
    """With 8 bits the weight is nearly exact, so the difference to float is rounding only."""
    conv, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
    norm.running_var.uniform_(0.2, 3)
    nn.init.uniform_(norm.weight, 0.5, 2)
    fake = FakeConv(copy.deepcopy(conv), Int8(), None, copy.deepcopy(norm)).train()
    x = images()
    want, got = norm.train()(conv(x)), fake(x)
    assert (want - got).square().mean() / want.square().mean() < 1e-3
    torch.testing.assert_close(fake.batch_norm.running_var, norm.running_var, rtol=2e-2, atol=1e-3)
    got.sum().backward()
    assert all(p.grad is not None for p in fake.parameters())


def test_a_channel_that_batch_norm_switches_off_gives_no_nan() -> None:
    norm = nn.BatchNorm2d(8)
    nn.init.zeros_(norm.weight)
    fake = FakeConv(nn.Conv2d(3, 8, 3), Int8(), None, norm).train()
    assert torch.isfinite(fake(images())).all() and torch.isfinite(fake.eval()(images())).all()


# -- integer biases ----------------------------------------------------------------------------------------------------------


def test_biases_are_integers_of_the_step_that_the_sums_have() -> None:
    scheme = static()
    model = scheme.convert(prepared(scheme))
    for name in ("stem", "block.conv1", "block.conv2", "head"):
        layer = model.get_submodule(name)
        assert isinstance(layer, (QuantizedConv, QuantizedLinear)) and layer.bias_codes.dtype == torch.int32
        step = layer.source.params["scale"].reshape(()) * layer.quantized.params["scale"].reshape(-1)
        assert torch.equal(layer.bias, layer.bias_codes.float() * step)


def test_a_bias_beyond_int32_raises_the_scale_of_its_channel() -> None:
    scheme = static()
    model = cnn()
    with torch.no_grad():
        model.head.weight[1] = 1e-12
        model.head.bias[1] = 5.0
    made = prepared(scheme, model)
    before = made(images())
    converted = scheme.convert(made)
    assert torch.equal(converted(images()), before)
    head = converted.get_submodule("head")
    assert abs(int(head.bias_codes[1])) <= BIAS_STEPS and float(head.bias[1]) == pytest.approx(5.0, rel=1e-6)
    assert not head.codes[1].any()


def test_weights_in_groups_leave_the_bias_in_float() -> None:
    scheme = PtqStatic(weight=Affine(4, granularity="tensor"), activation=Int8Activation(), include=["head"])
    assert scheme.convert(prepared(scheme)).get_submodule("head").bias_codes is not None
    scheme = PtqStatic(weight=Affine(4, group_size=4), activation=Int8Activation(), include=["head"])
    assert scheme.convert(prepared(scheme)).get_submodule("head").bias_codes is None


class Wide(nn.Module):
    """A convolution and a head of that width, so that blocks of 256 fit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.pool, self.head = nn.Conv2d(3, width, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(width, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(F.relu(self.conv(pixel_values))), 1))


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_1", "q4_k", "q6_k"])
def test_the_bias_is_an_integer_only_where_the_weight_is_one_scale_times_codes(kind: str) -> None:
    scheme = PtqStatic(weight=Ggml(kind), activation=Int8Activation(), include=["head"])
    made = prepared(scheme, Wide(256 if kind.endswith("k") else 32))
    before, bias = made(images()), made.get_submodule("head").bias.detach().clone()
    made.train()(images()).sum().backward()
    head = scheme.convert(made).get_submodule("head")
    assert torch.equal(made(images()), before)
    assert (head.bias_codes is not None) == (kind == "q8_0")
    assert torch.equal(head.bias, bias) == (kind != "q8_0")


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_16_bit_floats_behind_static_activations(kind: str) -> None:
    scheme = PtqStatic(weight=Ggml(kind), activation=Int8Activation())
    made = prepared(scheme)
    before = made(images())
    assert torch.equal(scheme.convert(made)(images()), before)
    assert made.get_submodule("stem").bias_codes is None


# -- what does not fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding is 'reflect'"),
        (nn.Conv2d(3, 4, 2, padding="same"), "padding='same' of a kernel"),
    ],
)
def test_a_convolution_that_no_integer_kernel_computes_is_refused(conv: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        static().prepare(nn.Sequential(conv), [])


def test_a_grid_of_tokens_is_no_grid_for_a_convolution() -> None:
    scheme = PtqDynamic(weight=Int8(), activation=Affine(8, "minmax", "token"))
    with pytest.raises(ValueError, match=r"granularity=token; set quantizer\.activation\.granularity=tensor"):
        scheme.prepare(cnn(), [])


# -- calibration -------------------------------------------------------------------------------------------------------------


def test_calibration_names_what_is_wrong() -> None:
    model, _ = static().prepare(cnn(), [])
    with pytest.raises(ValueError, match="no calibration data"):
        calibrate(model, [])
    bad = images()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"calibration batch 1: the activation on_grid.pixel_values is not finite.*keep_float=\['stem'\]"):
        calibrate(model, [{"pixel_values": images()}, {"pixel_values": bad}])
    with pytest.raises(ValueError, match=r"on_grid.pixel_values was 0 in all calibration examples"):
        calibrate(model, [{"pixel_values": torch.zeros(2, 3, 12, 12)}])


def test_one_dimensional_convolutions_are_quantized_too() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3, padding="same"), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3, groups=4), nn.Flatten())
    scheme = static()
    made, kept = scheme.prepare(model.eval(), [])
    assert kept == []
    scheme.calibrate(made, [{"input": torch.randn(4, 3, 16)}])
    x = torch.randn(2, 3, 16)
    before = made(x)
    assert (before - model(x)).square().sum() / before.square().sum() < 1e-2
    assert torch.equal(scheme.convert(made)(x), before)
