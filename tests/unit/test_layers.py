"""convert == prepare, to the bit, for every rule and kind of activation; and nothing is swapped that would then compute something else."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain import layers
from qtrain.activations import FakeActivation, Observer, calibrate
from qtrain.grids.affine import ASYMMETRIC_RULES, SYMMETRIC_RULES, Affine
from qtrain.layers import FakeEmbedding, FakeLayer, FakeLinear, QuantizedEmbedding, QuantizedLinear, fake_layers, quantized_layers
from qtrain.prepare import convert, prepare

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = [r for r in SYMMETRIC_RULES + ASYMMETRIC_RULES if r != "absmax_mlas"]
ACTIVATIONS = {
    "none": (None, False),
    "per token": (Affine(8, "minmax", "token"), False),
    "per group": (Affine(8, "absmax", "group", 16), False),
    "mlas": (Affine(8, "absmax_mlas", "group", 32), False),
    "static": (Affine(8, "minmax", "tensor"), True),
    "static symmetric": (Affine(8, "absmax_half", "tensor"), True),
}


class Tiny(nn.Module):
    """Embedding, two Linears and a head: ids [B, T] -> logits [B, T, 40]."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32, padding_idx=0)
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 40, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(F.gelu(self.first(self.embedding(ids)))))


def tiny(tied: bool = False) -> Tiny:
    torch.manual_seed(0)
    return Tiny(tied)


def targets(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}


def prepared(
    rule: str = "absmax", activation: Affine | None = None, static: bool = False, tied: bool = False, granularity: str = "group"
) -> Tiny:
    model = tiny(tied)
    weight, embedding = Affine(4, rule, granularity, 32), Affine(8, rule, granularity, 32)
    assert prepare(model, targets(model), weight, weight if tied else embedding, activation, static) == list(targets(model))
    return model


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 6, lr: float = 1e-2, dtype: torch.dtype | None = None) -> list[float]:
    """Learn to repeat the input; a few real optimizer steps."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        batch = ids(step % 4)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(batch).flatten(0, 1).float(), batch.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    integers = torch.int32 if a.element_size() == 4 else torch.int16
    assert torch.equal(a.detach().contiguous().view(integers), b.detach().contiguous().view(integers))


def assert_convert_changes_no_bit(model: nn.Module, call: Callable[[nn.Module], Tensor] = lambda m: m(ids(9))) -> None:
    model.eval()
    before = call(model)
    names = [n for n, _ in fake_layers(model)]
    weights = {n: m.weight_fake(m.weight) for n, m in fake_layers(model)}
    assert convert(model) is model and not model.training
    assert not list(fake_layers(model))
    assert [n for n, _ in quantized_layers(model)] == names
    for name, layer in quantized_layers(model):
        assert_same_bits(layer.quantized.decode().to(weights[name].dtype), weights[name])
    assert_same_bits(call(model), before)


# -- convert == prepare ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("rule", RULES)
def test_convert_changes_no_bit_after_training(rule: str, granularity: str) -> None:
    model = prepared(rule, granularity=granularity)
    assert_convert_changes_no_bit(copy.deepcopy(model))
    start = model.first.weight.detach().clone()
    train(model)
    assert not torch.equal(model.first.weight, start)
    assert_convert_changes_no_bit(model)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_convert_changes_no_bit_of_quantized_activations(name: str) -> None:
    activation, static = ACTIVATIONS[name]
    for rule in ("signed_absmax", "minmax"):
        model = prepared(rule, activation, static)
        train(model)
        if name != "none":
            plain = copy.deepcopy(model).eval()
            for _, layer in fake_layers(plain):
                layer.activation_fake = None
            assert not torch.equal(plain(ids(9)), model.eval()(ids(9)))  # it does something
        assert_convert_changes_no_bit(model)


@pytest.mark.parametrize("rule", RULES)
def test_convert_changes_no_bit_after_calibration(rule: str) -> None:
    model = prepared(rule, Affine(8, rule, "tensor"), static=True).eval()
    with pytest.raises(ValueError, match=r"has seen no data.*activation_range=dynamic"):
        model(ids())
    calibrate(model, ({"ids": ids(s)} for s in range(5)))
    observers = [m for m in model.modules() if isinstance(m, Observer)]
    assert len(observers) == 3 and all(int(o.seen) == 5 and o.collector is None for o in observers)
    before = copy.deepcopy(model.state_dict())
    model(ids(7) * 0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # evaluation does not move a range
    assert_convert_changes_no_bit(model)


def test_convert_changes_no_bit_in_autocast_or_in_a_bfloat16_model() -> None:
    model = prepared("signed_absmax")
    train(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_convert_changes_no_bit(copy.deepcopy(model))
    half = tiny().bfloat16()
    prepare(half, targets(half), Affine(4), Affine(8), Affine(8, "absmax_mlas"))
    assert half(ids()).dtype == torch.bfloat16
    assert_convert_changes_no_bit(copy.deepcopy(half))
    for _, layer in fake_layers(half):
        layer.weight_fake.learn_scale(layer.weight)
    assert half(ids()).dtype == torch.bfloat16
    assert_convert_changes_no_bit(half)


def test_no_ids_give_no_rows_before_and_after() -> None:
    for granularity in ("group", "tensor"):
        embedding = nn.Embedding(8, 32)
        fake = FakeEmbedding(embedding, Affine(4, granularity=granularity))
        nothing = torch.zeros(2, 0, dtype=torch.int64)
        assert fake(nothing).shape == (2, 0, 32)
        assert QuantizedEmbedding(fake.encode("e")[0])(nothing).shape == (2, 0, 32)
        assert fake(torch.tensor(3)).shape == QuantizedEmbedding(fake.encode("e")[0])(torch.tensor(3)).shape == (32,)


# -- tied weights and shared modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_tied_weights_stay_one_set_of_codes(rule: str) -> None:
    model = prepared(rule, tied=True)
    train(model)
    assert_convert_changes_no_bit(model)
    assert model.head.codes.data_ptr() == model.embedding.codes.data_ptr()
    assert model.head.scale.data_ptr() == model.embedding.scale.data_ptr()
    assert model.first.codes.data_ptr() != model.embedding.codes.data_ptr()


def test_tied_weights_on_two_grids_become_two_sets_of_codes() -> None:
    model = tiny(tied=True)
    prepare(model, targets(model), Affine(4), Affine(8))
    train(model)
    assert_convert_changes_no_bit(model)
    assert model.embedding.grid.bits == 8 and model.head.grid.bits == 4
    learned = prepared("absmax", tied=True)
    learned.head.weight_fake.learn_scale(learned.head.weight)
    train(learned)
    assert_convert_changes_no_bit(learned)  # one learned its scales, the other did not


def test_a_module_that_is_held_twice_is_swapped_wherever_it_is() -> None:
    """T5 and BART hold one embedding under three names; `named_modules` gives only the first."""
    model = tiny()
    model.again = nn.ModuleDict({"embedding": model.embedding})
    prepare(model, targets(model), Affine(4), Affine(8))
    assert isinstance(model.embedding, FakeEmbedding) and model.again["embedding"] is model.embedding
    convert(model)
    assert isinstance(model.embedding, QuantizedEmbedding) and model.again["embedding"] is model.embedding


# -- what is refused -------------------------------------------------------------------------------------------------------


def test_misfits_are_all_named_and_nothing_is_swapped() -> None:
    model = nn.ModuleDict({f"l{i}": nn.Linear(48 if i else 64, 8) for i in range(8)})
    with pytest.raises(ValueError, match=r"7 modules do not fit.*\n  l1: group_size 32 does not divide.*48") as error:
        prepare(model, targets(model), Affine())
    assert "l5:" in str(error.value) and "l6:" not in str(error.value) and "and 2 more" in str(error.value)
    assert "quantizer.keep_float=[l1]" in str(error.value)
    assert not list(fake_layers(model))
    with pytest.raises(ValueError, match="l1: as the grid of its inputs, group_size 32 does not divide its rows of 48"):
        prepare(model, targets(model), Affine(granularity="channel"), activation=Affine(8))


class Offset(nn.Embedding):
    """As OPT and BART have for positions."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def refused() -> dict[str, tuple[nn.Module, str]]:
    attention = nn.MultiheadAttention(32, 2)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 8)))
    return {
        "embedding with a forward": (nn.Sequential(Offset(12, 32)), "0: Offset has a forward of its own"),
        "linear with a forward": (nn.Sequential(Scaled(32, 8)), "0: Scaled has a forward of its own"),
        "attention": (attention, "out_proj: nn.MultiheadAttention reads its weight"),
        "fused": (nn.TransformerEncoderLayer(32, 2, 64), "linear1: nn.TransformerEncoderLayer reads its weight"),
        "max_norm": (nn.Sequential(nn.Embedding(9, 32, max_norm=1.0)), "0: max_norm rewrites rows"),
        "parametrized": (normed, "0: its weight is computed"),
        "root": (nn.Linear(32, 8), "it is the model itself"),
    }


@pytest.mark.parametrize("case", refused())
def test_a_module_that_a_fake_layer_would_not_reproduce_is_refused(case: str) -> None:
    model, message = refused()[case]
    with pytest.raises(ValueError, match=message):
        prepare(model, targets(model), Affine(), Affine())


def test_preparing_twice_is_refused() -> None:
    model = prepared()
    with pytest.raises(ValueError, match="FakeLinear has a forward of its own"):
        prepare(model, targets(model), Affine(), Affine())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_raises_naming_the_module(bad: float) -> None:
    for name in ("second", "embedding"):
        model = prepared()
        with torch.no_grad():
            model.get_submodule(name).weight[3, 5] = bad
        with pytest.raises(ValueError, match=rf"the weight of {name} has 1 values that are not finite, the first at index \[3, 5\]"):
            convert(model)


# -- what prepare leaves as it was -----------------------------------------------------------------------------------------


def test_parameters_and_their_names_are_those_of_the_float_model() -> None:
    model = tiny()
    before, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    optimizer_holds = [id(p) for p in model.parameters()]
    prepare(model, targets(model), Affine(4), Affine(8), Affine(8, "absmax_mlas"))
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}
    assert [id(p) for p in model.parameters()] == optimizer_holds
    assert state.keys() == model.state_dict().keys()
    with torch.no_grad():
        model.first.weight.zero_()
    model.load_state_dict(state)  # strict: a float checkpoint loads
    assert torch.equal(model.first.weight, state["first.weight"])


def test_static_ranges_are_part_of_the_checkpoint() -> None:
    model = prepared("absmax", *ACTIVATIONS["static"])
    train(model)
    fresh = prepared("absmax", *ACTIVATIONS["static"])
    fresh.load_state_dict(model.state_dict())
    assert_same_bits(fresh.eval()(ids()), model.eval()(ids()))


def test_training_or_evaluation_mode_is_kept() -> None:
    model = tiny().eval()
    prepare(model, targets(model), Affine(4), Affine(8), *ACTIVATIONS["static"])
    assert not any(m.training for m in model.modules())
    with pytest.raises(ValueError, match="no data"):  # in evaluation nothing is observed
        model(ids())
    assert all(m.training for m in prepared().modules())


def test_embeddings_without_a_grid_stay_in_float() -> None:
    model = tiny()
    assert prepare(model, targets(model), Affine()) == ["first", "second", "head"]
    assert type(model.embedding) is nn.Embedding


def test_a_deep_copy_is_independent_and_equal() -> None:
    model = prepared("mse", *ACTIVATIONS["static"])
    model.first.weight_fake.learn_scale(model.first.weight)
    model.second.weight_fake.freeze(model.second.weight)
    train(model, steps=2)
    twin = copy.deepcopy(model)
    assert_same_bits(twin.eval()(ids()), model.eval()(ids()))
    want = model(ids())
    train(twin, steps=2)
    assert_same_bits(model.eval()(ids()), want)
    assert not torch.equal(twin.eval()(ids()), want)
    assert_convert_changes_no_bit(twin)
    assert_same_bits(copy.deepcopy(convert(model))(ids()), model(ids()))


# -- training --------------------------------------------------------------------------------------------------------------


def test_disabled_layers_train_in_float_and_evaluate_on_the_grid() -> None:
    model = prepared("absmax", ACTIVATIONS["per token"][0])
    floating = tiny()
    for _, layer in fake_layers(model):
        layer.enabled = False
    assert_same_bits(model.train()(ids()), floating(ids()))
    on_grid = model.eval()(ids())
    assert not torch.equal(on_grid, floating(ids()))
    for _, layer in fake_layers(model):
        layer.enabled = True
    assert_same_bits(model.train()(ids()), on_grid)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["none", "mlas", "static"])
def test_a_prepared_model_learns(name: str, dtype: torch.dtype | None) -> None:
    model = prepared("signed_absmax", *ACTIVATIONS[name])
    losses = train(model, steps=40, dtype=dtype)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_frozen_scales_stay_while_weights_move() -> None:
    for rule in RULES:
        model = prepared(rule)
        train(model, steps=2)
        for _, layer in fake_layers(model):
            layer.weight_fake.freeze(layer.weight)
        frozen = {n: {k: v.clone() for k, v in m.weight_fake.params().items()} for n, m in fake_layers(model)}
        start = model.first.weight.detach().clone()
        train(model, steps=4)
        assert not torch.equal(model.first.weight, start)
        unfrozen = model.first.weight_fake.grid.choose(model.first.weight)["scale"]
        assert not torch.equal(unfrozen, frozen["first"]["scale"])
        assert_convert_changes_no_bit(model)
        for name, layer in quantized_layers(model):
            for k, v in frozen[name].items():
                assert_same_bits(layer.quantized.params[k].float(), v.float())


def test_frozen_scales_follow_the_model_to_its_device_and_keep_their_type() -> None:
    fake = layers.FakeWeight(Affine(4, "minmax"))
    fake.freeze(torch.randn(4, 32))
    fake.to(torch.bfloat16)
    assert fake.frozen["scale"].dtype == torch.float32 and fake.frozen["zero_point"].dtype == torch.int8
    fake.to("meta")
    assert all(p.device.type == "meta" for p in fake.frozen.values())


# -- embeddings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", "token", "group", "tensor"])
@pytest.mark.parametrize("rule", RULES)
def test_gathered_rows_are_those_of_the_whole_fake_table_and_so_are_gradients(rule: str, granularity: str) -> None:
    grid = Affine(3, rule, granularity, 16)
    torch.manual_seed(1)
    table = nn.Embedding(20, 48, padding_idx=3)
    layer = FakeEmbedding(copy.deepcopy(table), grid)
    batch = torch.randint(0, 20, (5, 7))
    batch[0, :3] = torch.tensor([3, 4, 4])  # padding, and a row twice
    upstream = torch.randint(-4, 5, (5, 7, 48)).float()  # sums of small integers are exact in any order
    y, whole = layer(batch), F.embedding(batch, grid.fake(table.weight), padding_idx=3)
    y.backward(upstream)
    whole.backward(upstream)
    assert_same_bits(y, whole)
    assert torch.equal(layer.weight.grad, table.weight.grad)
    assert (layer.weight.grad[3] == 0).all() and (layer.weight.grad[4] != 0).any()


def test_an_embedding_keeps_its_options() -> None:
    table = nn.Embedding(20, 32, padding_idx=3, sparse=True, scale_grad_by_freq=False)
    layer = FakeEmbedding(table, Affine(8))
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx, layer.sparse) == (20, 32, 3, True)
    layer(torch.tensor([1, 1, 2])).sum().backward()
    assert layer.weight.grad.is_sparse


# -- observers -------------------------------------------------------------------------------------------------------------


def test_a_short_calibration_weighs_its_batches_evenly_and_a_long_one_by_momentum() -> None:
    observer = Observer(Affine(8, "minmax", "tensor"), momentum=0.1)
    lows, highs = [-1.0, -3.0, -2.0, -6.0], [4.0, 2.0, 9.0, 1.0]
    for low, high in zip(lows, highs, strict=True):
        observer.observe(torch.tensor([low, 0.5, high]))
    assert float(observer.low) == pytest.approx(-3.0) and float(observer.high) == pytest.approx(4.0)
    for _ in range(6):
        observer.observe(torch.tensor([-3.0, 4.0]))
    observer.observe(torch.tensor([-3.0, 14.0]))  # the eleventh: momentum 0.1 from here on
    assert float(observer.high) == pytest.approx(0.9 * 4 + 0.1 * 14)
    observer.observe(torch.tensor([-3.0, 5.0]))
    assert float(observer.high) == pytest.approx(0.9 * 5 + 0.1 * 5)
    observer.observe(torch.zeros(0, 4))
    assert int(observer.seen) == 12


def test_static_scales_follow_from_the_range_and_clip_beyond_it() -> None:
    grid = Affine(8, "minmax", "tensor")
    fake = FakeActivation(grid, Observer(grid))
    fake.train()(torch.tensor([[-1.0, 3.0]]))
    assert fake.observer is not None
    scale, zero = (fake.observer.params()[n] for n in ("scale", "zero_point"))
    assert float(scale) == pytest.approx(4 / 255) and int(zero) == round(-128 + 255 / 4)
    fake.eval()
    x = torch.tensor([[-2.0, -0.5, 1.0, 5.0]], requires_grad=True)
    y = fake(x)
    y.sum().backward()
    assert float(y[0, 0]) == pytest.approx(-1, abs=4 / 255) and float(y[0, 3]) == pytest.approx(3, abs=4 / 255)
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_a_frozen_observer_leaves_its_range_alone() -> None:
    model = prepared("absmax", *ACTIVATIONS["static"])
    train(model, steps=2)
    observers = [m for m in model.modules() if isinstance(m, Observer)]
    for observer in observers:
        observer.frozen = True
    before = [(float(o.low), float(o.high), int(o.seen)) for o in observers]
    train(model, steps=3)
    assert [(float(o.low), float(o.high), int(o.seen)) for o in observers] == before


def test_a_calibration_that_fails_does_not_go_on_calibrating() -> None:
    model = prepared("absmax", *ACTIVATIONS["static"])
    with pytest.raises(IndexError):
        calibrate(model, [{"ids": ids()}, {"ids": torch.tensor([[400]])}])
    assert all(m.collector is None for m in model.modules() if isinstance(m, Observer))


# -- what converted layers hold --------------------------------------------------------------------------------------------


def test_converted_layers_hold_codes_and_the_state_dict_restores_them() -> None:
    for tied, rule in itertools.product((False, True), ("absmax", "minmax")):
        model = prepared(rule, tied=tied)
        train(model, steps=2)
        convert(model)
        assert not list(model.parameters())
        assert isinstance(model.first, QuantizedLinear) and model.first.kind == "linear"
        assert isinstance(model.embedding, QuantizedEmbedding) and model.embedding.kind == "embedding"
        assert model.first.codes.dtype == torch.int8 and model.first.codes.shape == (64, 32)
        assert (model.first.in_features, model.first.out_features) == (32, 64)
        assert model.second.bias is None and model.first.bias is not None
        other = convert(prepared(rule, tied=tied))
        other.load_state_dict(model.state_dict())
        assert_same_bits(other(ids()), model(ids()))


def test_a_fake_linear_computes_linear_of_the_fake_weight_and_input() -> None:
    linear = nn.Linear(64, 16)
    weight, activation = Affine(4, "mse"), Affine(8, "absmax_mlas")
    layer = FakeLinear(linear, weight, FakeActivation(activation))
    x = torch.randn(3, 5, 64, requires_grad=True)
    y = layer(x)
    want = F.linear(activation.encode(x).decode(), weight.encode(linear.weight).decode(), linear.bias)
    assert_same_bits(y, want)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.fake(linear.weight).detach().sum(0).expand(3, 5, 64))
    assert isinstance(layer, FakeLayer) and linear.weight.grad is not None and linear.bias.grad is not None
