"""Equalization changes no output and evens out ranges; bias correction leaves no mean error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qtrain.equalization import balance, call_order, correct_biases, equalize, find_pairs, in_float
from qtrain.evaluate import sqnr_db
from qtrain.grids.affine import Affine
from qtrain.layers import FakeConv, FakeLinear, fake_activations, fake_layers
from qtrain.receipt import nmse
from qtrain.scheme import Scheme
from qtrain.smoothing import run

pytestmark = pytest.mark.usefixtures("one_thread")


class Cnn(nn.Module):
    """x [N, 3, 8, 8] -> logits [N, 5]: a plain pair, a depthwise chain with a pool, a residual, a head of two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.bn2 = nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise, self.bn3 = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24)
        self.grouped = nn.Conv2d(24, 12, 3, groups=4)
        self.last = nn.Conv2d(12, 12, 1)
        self.hidden, self.head = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.first(x)))
        x = self.bn2(self.second(x)).relu()
        x = F.max_pool2d(torch.relu(self.bn3(self.depthwise(x))), 2)
        x = F.relu(self.grouped(x))
        x = x + self.last(x)
        return self.head(F.dropout(F.relu(self.hidden(x.mean((2, 3)))), 0.1, self.training))


def cnn(spread: float = 1.5) -> Cnn:
    """Channels with ranges that differ by e^(4 * spread)."""
    torch.manual_seed(0)
    model = Cnn()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.copy_((spread * torch.randn_like(m.weight)).exp())
                m.bias.copy_(0.1 * torch.randn_like(m.bias) * m.weight)
                m.running_mean.normal_(0, 0.1)  # type: ignore[union-attr, operator]
                m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return model.eval()


def images(count: int = 2, seed: int = 0, size: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(size, 3, 8, 8, generator=generator)} for _ in range(count)]


PAIRS = [("first", "second"), ("second", "depthwise"), ("depthwise", "grouped"), ("hidden", "head")]


def ranges(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Largest magnitude of each channel, out of ``a`` and into ``b``, channel by channel."""
    groups = getattr(b, "groups", 1)
    per, out = b.weight.shape[1], len(b.weight) // groups
    into = [b.weight[i // per * out : (i // per + 1) * out, i % per].abs().max() for i in range(groups * per)]
    return a.weight.abs().flatten(1).amax(1), torch.stack(into)


@torch.no_grad()
def test_the_network_computes_the_same_and_ranges_are_equal() -> None:
    model = cnn()
    traced = equalize(copy.deepcopy(model))
    for batch in images():
        assert nmse(model(**batch), traced(**batch)) < 1e-11
    assert find_pairs(traced) == PAIRS
    assert not any(isinstance(m, nn.BatchNorm2d) for m in traced.modules())
    for a, b in PAIRS:
        r1, r2 = ranges(traced.get_submodule(a), traced.get_submodule(b))
        assert torch.allclose(r1, r2, rtol=1e-2)


@torch.no_grad()
def test_one_pair_gets_the_scales_of_the_paper() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 3)
    first.weight.mul_(torch.logspace(-3, 1, 8).reshape(-1, 1, 1, 1))
    w1, w2 = first.weight.clone(), second.weight.clone()
    moved = balance(first, second)
    s = torch.stack([(w1[i].abs().max() / w2[:, i].abs().max()).sqrt() for i in range(8)])
    assert torch.allclose(first.weight, w1 / s.reshape(-1, 1, 1, 1)) and torch.allclose(second.weight, w2 * s.reshape(1, -1, 1, 1))
    assert moved == pytest.approx(float(s.log().abs().max()), rel=1e-5)
    assert balance(first, second) < 1e-5


@torch.no_grad()
def test_a_dead_channel_keeps_its_scale_and_a_constant_one_does_not_grow() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
    first.weight[0] = 0.0
    second.weight[:, 1] = 0.0
    first.weight[2] *= 1e-9
    first.bias[:] = torch.tensor([0.3, 0.2, 0.5, 0.1, -0.4, 0.0])
    x = torch.randn(2, 3, 4, 4)
    want, w1 = second(F.relu(first(x))), first.weight.clone()
    balance(first, second)
    assert torch.equal(first.weight[:2], w1[:2]) and torch.allclose(second(F.relu(first(x))), want, atol=1e-6)
    assert float(first.bias.abs().max()) <= 0.5


class Wired(nn.Module):
    """Two convolutions and what stands between them."""

    def __init__(self, between: Any, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Conv2d(3, 8, 3), second or nn.Conv2d(8, 4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


COMMUTE = {
    "nothing": nn.Identity(),
    "relu": F.relu,
    "relu in place": nn.ReLU(inplace=True),
    "max-pool": lambda x: F.max_pool2d(x.relu(), 2),
    "average": nn.Sequential(nn.AvgPool2d(2, padding=1), nn.ReLU()),
    "global": lambda x: F.adaptive_avg_pool2d(x, 1),
    "dropout": nn.Sequential(nn.ReLU(), nn.Dropout(0.5)),
}
DO_NOT = {
    "relu6": F.relu6,
    "relu6 module": nn.ReLU6(),
    "gelu": F.gelu,
    "hardswish": nn.Hardswish(),
    "twice": lambda x: x + F.relu(x),
    "shift": lambda x: F.relu(x + 1),
    "batch-norm behind a relu": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)),
    "shuffle": lambda x: x.flip(1),
}


@pytest.mark.parametrize("name", COMMUTE)
@torch.no_grad()
def test_what_commutes_with_scales(name: str) -> None:
    torch.manual_seed(0)
    model = Wired(COMMUTE[name]).eval()
    model.first.weight.mul_(torch.logspace(-2, 2, 8).reshape(-1, 1, 1, 1))
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    traced = equalize(model)
    assert find_pairs(traced) == [("first", "second")]
    assert nmse(want, traced(x)) < 1e-11


@pytest.mark.parametrize("name", DO_NOT)
def test_what_does_not(name: str) -> None:
    with pytest.raises(ValueError, match=r"no two layers of Wired with only a ReLU between.*quantizer\.equalize=false"):
        equalize(Wired(DO_NOT[name]).eval())


def test_what_reads_another_axis_is_no_pair() -> None:
    """A Linear right behind a convolution reads columns of pixels; a pool behind a Linear pools channels."""
    with pytest.raises(ValueError, match="no two layers"):
        equalize(Wired(F.relu, nn.Linear(6, 2)))
    with pytest.raises(ValueError, match="no two layers"):
        equalize(nn.Sequential(nn.Linear(8, 8), nn.AvgPool1d(2), nn.Linear(4, 2)))


def test_a_layer_that_is_used_twice_is_no_pair() -> None:
    model = Wired(F.relu)
    model.second = nn.Sequential(model.first, nn.ReLU())
    model.first.weight = nn.Parameter(torch.randn(3, 3, 1, 1))
    with pytest.raises(ValueError, match="no two layers"):
        equalize(model)
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match="no two layers"):
        equalize(tied)


def test_a_model_without_a_graph_is_refused() -> None:
    class Depends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"quantizer\.equalize=true.*Depends cannot be traced.*Set quantizer\.equalize=false"):
        equalize(Depends())


# -- bias correction ----------------------------------------------------------------------------------------------------------


def prepared(model: nn.Module, bits: int = 3, activation: bool = True, trains: bool = False, **options: Any) -> nn.Module:
    static = {"activation": Affine(8, "minmax_onnx", "tensor"), "activation_range": "static", "observer": "minmax"} if activation else {}
    scheme = Scheme(weight=Affine(bits, "absmax", "channel"), **static, **options)
    if trains:
        scheme.trains = True  # type: ignore[misc]
    model, _ = scheme.prepare(model, [])
    return scheme.calibrate(model, images())


@torch.no_grad()
def means(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each output channel, the slow way: all outputs at once."""
    outputs: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, y, name=name: outputs.setdefault(name, []).append(y))
        for name, layer in fake_layers(model)
    ]
    for batch in batches:
        run(model, batch)
    for handle in handles:
        handle.remove()
    whole = {name: torch.cat(ys).double() for name, ys in outputs.items()}
    return {name: y.mean([d for d in range(y.ndim) if d != 1]) for name, y in whole.items()}


@pytest.mark.parametrize("activation", [True, False], ids=["static", "weights only"])
@pytest.mark.parametrize("trains", [False, True], ids=["folded", "held"])
@torch.no_grad()
def test_no_mean_error_is_left_and_the_reference_agrees(activation: bool, trains: bool) -> None:
    model = prepared(cnn(0.5), activation=activation, trains=trains)
    assert any(getattr(layer, "batch_norm", None) is not None for _, layer in fake_layers(model)) == trains
    reference = copy.deepcopy(model)
    with in_float(model):
        want = means(model, images())
    before = means(model, images())
    rows = correct_biases(model, images())
    after = means(model, images())
    order = ["first", "second", "depthwise", "grouped", "last", "hidden", "head"]
    assert [row["name"] for row in rows] == order
    for name in order:
        layer: Any = model.get_submodule(name)
        step = layer._scales(*layer.folded())[1]  # with static activations the runtime's bias is an integer number of these
        limit = 1e-4 * float(want[name].abs().max()) + (0.0 if step is None else 0.51 * step)
        assert ((after[name] - want[name]).abs() < limit).all(), name
        assert (step is not None) == activation and float((before[name] - want[name]).abs().max()) > 1e-3

    for name in order:  # the reference: a whole pass over everything for each layer
        layer = reference.get_submodule(name)
        rounded = layer.on_grid(*layer.folded())[1]
        old = layer.folded()[1]
        without_bias = means(reference, images())[name] - (0 if rounded is None else rounded)
        shift = (want[name] - without_bias - (0 if old is None else old)).float()
        holder = getattr(layer, "batch_norm", None) or layer
        holder.bias = nn.Parameter(shift if holder.bias is None else holder.bias + shift)
    for name in order:
        mine, theirs = (m.get_submodule(name).folded()[1] for m in (model, reference))  # type: ignore[operator]
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("bits", [3, 4])
@torch.no_grad()
def test_low_bits_are_closer_to_float_after_correction(bits: int) -> None:
    model, fresh = cnn(0.5), images(1, seed=5, size=64)[0]
    want = model(**fresh)
    plain = sqnr_db(want, prepared(copy.deepcopy(model), bits)(**fresh))
    corrected = sqnr_db(want, prepared(copy.deepcopy(model), bits, bias_correction=True)(**fresh))
    assert corrected > plain + 1, (plain, corrected)


@torch.no_grad()
def test_per_tensor_weights_are_closer_to_float_after_equalization() -> None:
    model, fresh = cnn(1.0), images(1, seed=5, size=64)[0]
    want = model(**fresh)

    def measure(equalized: bool) -> float:
        scheme = Scheme(weight=Affine(8, "absmax", "tensor"), equalize=equalized)
        rounded, _ = scheme.prepare(scheme.transform(copy.deepcopy(model), [], []), [])
        return sqnr_db(want, rounded(**fresh))

    assert measure(True) > measure(False) + 6


class Branches(nn.Module):
    """x [N, T, 8] -> [N, T, 8]: three Linears that read one tensor, one of them with another input too."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.o(torch.sigmoid(self.q(x)) * self.v(x) + self.k(x))
        self.calls += 1
        return self.o(F.relu(y))


def test_layers_that_read_one_tensor_are_measured_together_and_the_pass_stops_behind_them() -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    scheme = Scheme(weight=Affine(3, "absmax", "channel"))
    scheme.prepare(model, [])
    layers = {name: layer for name, layer in fake_layers(model) if isinstance(layer, (FakeLinear, FakeConv))}
    batches = [{"x": torch.randn(4, 5, 8) + 1} for _ in range(3)]
    assert call_order(model, layers, batches[0]) == ([["q", "v", "k"], ["o"]], {"q": 1, "v": 1, "k": 1, "o": 2})
    with torch.no_grad(), in_float(model):
        want = torch.cat([model(**b) for b in batches])
    model.calls = 0
    rows = correct_biases(model, batches)
    assert model.calls == 2 + 3 * 2 + 3 * 1 + 3 * 2  # order, float, {q, v, k} half-way, o to its second call
    assert [row["name"] for row in rows] == ["q", "v", "k", "o"]
    assert all(isinstance(layer.bias, nn.Parameter) for layer in layers.values())
    with torch.no_grad(), in_float(model):
        assert not torch.allclose(torch.cat([model(**b) for b in batches]), want)  # the biases are in the float weights now


def test_bad_input_says_what_to_do() -> None:
    model = prepared(cnn())
    with pytest.raises(ValueError, match=r"there is none; set data\.calibration_examples=256.*quantizer\.bias_correction=false"):
        correct_biases(model, [])
    with pytest.raises(ValueError, match=r"finds no fake-quantized.*quantizer\.bias_correction=false"):
        correct_biases(cnn(), images())
    with torch.no_grad():
        model.get_submodule("second").weight[0] = float("inf")  # type: ignore[operator, index]
    with pytest.raises(ValueError, match=r"the output of second is not finite.*quantizer\.keep_float=\['second'\]"):
        correct_biases(model, images())
    assert not any(switch.bypassed for _, switch in (*fake_layers(model), *fake_activations(model)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_result_is_a_graph_that_can_be_prepared() -> None:
    traced = equalize(cnn())
    assert isinstance(traced, fx.GraphModule)
    assert [name for name, _ in fake_layers(prepared(traced))] == ["first", "second", "depthwise", "grouped", "last", "hidden", "head"]
