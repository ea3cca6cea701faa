"""Each layer alone on its grid: what is measured, in which order, and what follows from it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.equalization import in_float
from qtrain.evaluate import sqnr_db
from qtrain.grids.affine import Affine
from qtrain.layers import fake_activations, fake_layers
from qtrain.record import Record
from qtrain.report import html
from qtrain.scheme import Scheme
from qtrain.sensitivity import Alone, analyze, first, keep_most_harmful, print_analysis
from tests.unit.test_report import run as example_run

pytestmark = pytest.mark.usefixtures("one_thread")


class Cnn(nn.Module):
    """x [N, 3, 8, 8] -> logits [N, 5], with a residual whose value a convolution reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(x + self.third(self.second(x)))
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Words(nn.Module):
    """ids [N, T] -> logits [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.up, self.down, self.head = (
            nn.Embedding(30, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
            nn.Linear(16, 5),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head((x + self.down(F.gelu(self.up(self.norm(x))))).mean(1))


def build(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def batches(kind: type[nn.Module], sizes: tuple[int, ...] = (8, 8, 4), seed: int = 0) -> list[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in sizes:
        x = torch.randn(n, 3, 8, 8, generator=generator) if kind is Cnn else torch.randint(30, (n, 6), generator=generator)
        made.append(({"x" if kind is Cnn else "ids": x}, torch.randint(5, (n,), generator=generator)))
    return made


def scheme(static: bool = True, bits: int = 4, **options: Any) -> Scheme:
    activation = Affine(4, "minmax_onnx", "tensor")
    ways: dict[str, Any] = {"activation_range": "static", "observer": "minmax"} if static else {}
    return Scheme(
        weight=Affine(bits, "absmax", "channel"), embedding=Affine(8, "absmax", "channel"), activation=activation, **ways, **options
    )


def analysis(kind: type[nn.Module], given: Scheme | None = None, examples: int = 100) -> list[dict[str, Any]]:
    data = batches(kind)
    return analyze(given or scheme(), build(kind), ["head"], [inputs for inputs, _ in data[:2]], data, examples)


ROW = {"name", "grid", "sqnr_db", "accuracy", "accuracy_drop", "loss", "agreement", "kl"}


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize(("kind", "names"), [(Cnn, {"first", "second", "third"}), (Words, {"embedding", "up", "down"})])
def test_there_is_a_row_for_each_layer_the_most_harmful_first(kind: type[nn.Module], names: set[str], static: bool) -> None:
    model, given = build(kind), scheme(static)
    before = copy.deepcopy(model.state_dict())
    data = batches(kind)
    rows = analyze(given, model, ["head"], [inputs for inputs, _ in data], data, 100)
    assert {row["name"] for row in rows} == names and all(set(row) == ROW for row in rows)
    assert [row["kl"] for row in rows] == sorted((row["kl"] for row in rows), reverse=True) and rows[-1]["kl"] > 0
    assert {row["grid"] for row in rows} <= {"int4 per-channel absmax", "int8 per-channel absmax"}
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert not list(fake_layers(model)) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert given == scheme(static) and given.fallbacks == []


@torch.no_grad()
def test_the_numbers_are_those_of_a_model_with_one_layer_rounded() -> None:
    """The reference for `up`: a model in which nothing else was ever chosen."""
    data = batches(Words)
    row = next(r for r in analysis(Words, scheme(static=False)) if r["name"] == "up")
    model, only = build(Words), build(Words)
    scheme(static=False, include=["up"]).prepare(only, [])
    want = torch.cat([model(**inputs) for inputs, _ in data])
    got = torch.cat([only(**inputs) for inputs, _ in data])
    labels = torch.cat([labels for _, labels in data])
    assert row["kl"] == pytest.approx(float((want.softmax(-1) * (want.log_softmax(-1) - got.log_softmax(-1))).sum(-1).mean()), rel=1e-3)
    assert row["loss"] == pytest.approx(float(F.cross_entropy(got, labels)), rel=1e-5)
    assert row["accuracy"] == pytest.approx(float((got.argmax(-1) == labels).float().mean()))
    assert row["accuracy_drop"] == pytest.approx(float((want.argmax(-1) == labels).float().mean()) - row["accuracy"])
    assert row["agreement"] == pytest.approx(float((got.argmax(-1) == want.argmax(-1)).float().mean()))
    xs = [model.norm(model.embedding(inputs["ids"])) for inputs, _ in data]  # type: ignore[operator]
    y, y_q = (torch.cat([m.get_submodule("up")(x) for x in xs]) for m in (model, only))
    assert row["sqnr_db"] == pytest.approx(sqnr_db(y, y_q), abs=1e-3)


@torch.no_grad()
def test_in_a_graph_the_value_is_rounded_for_its_reader_alone() -> None:
    """`second` reads what the residual reads; the pool and the flattening before a Linear move values that are on a grid."""
    data = batches(Cnn)
    model = build(Cnn)
    given = scheme(keep_float=["head"])
    prepared, _ = given.prepare(copy.deepcopy(model), [])
    given.calibrate(prepared, [inputs for inputs, _ in data])
    prepared.eval()
    second: Any = prepared.get_submodule("second")
    x = data[0][0]["x"]
    with in_float(prepared):
        float_outputs: dict[str, Tensor] = {}
        handles = [
            m.register_forward_hook(lambda m, a, y, n=n: float_outputs.update({n: y})) for n, m in prepared.named_modules() if n == "first"
        ]
        prepared(x=x)
        for handle in handles:
            handle.remove()
        value = F.relu(float_outputs["first"])
        with Alone(second) as alone:
            got = prepared(x=x)
    edge = second.source
    assert edge is not None and not edge.bypassed
    rounded = edge.grid.fake(value, edge.static_params())
    y = second(rounded)
    want = model.head(F.max_pool2d(F.relu(value + model.third(y)), 2).flatten(1))  # type: ignore[operator]
    assert torch.allclose(got, want, atol=1e-5)
    assert alone.sqnr_db() == pytest.approx(sqnr_db(model.second(value), y), abs=1e-2)  # type: ignore[operator]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in prepared.modules())
    assert not any(switch.bypassed for _, switch in (*fake_layers(prepared), *fake_activations(prepared)))


def test_a_coarser_grid_is_more_harmful_and_an_exact_one_is_not() -> None:
    coarse, fine = ({r["name"]: r for r in analysis(Words, scheme(bits=bits))} for bits in (2, 8))
    for name in ("up", "down"):
        assert coarse[name]["sqnr_db"] < fine[name]["sqnr_db"] and coarse[name]["kl"] > fine[name]["kl"]
    data = batches(Words)
    model = build(Words)
    with torch.no_grad():
        model.embedding.weight.copy_((model.embedding.weight * 4).round() / 4)  # type: ignore[operator, union-attr, arg-type]
        model.embedding.weight[:, 0] = 127 / 4  # type: ignore[index, operator, union-attr]
    rows = analyze(scheme(), model, ["head"], [data[0][0]], data, 100)
    embedding = next(r for r in rows if r["name"] == "embedding")
    assert embedding["sqnr_db"] is None and abs(embedding["kl"]) < 1e-9 and rows[-1] == embedding


def test_what_is_not_finite_comes_first_and_is_none() -> None:
    data = batches(Words)
    data[0][0]["ids"][:] = 7
    model = build(Words)
    with torch.no_grad():
        model.embedding.weight[7] = 3e38  # type: ignore[index, operator, union-attr]
    rows = analyze(scheme(static=False), model, ["head"], [], data, 100)
    assert rows[0]["kl"] is None
    json.dumps(rows, allow_nan=False)
    assert "not finite" in html(example_run(analysis=rows))
    print_analysis(rows)


def test_a_quantizer_that_trains_is_analyzed_as_it_starts() -> None:
    """Its convolutions hold their batch-norms; in evaluation that is the same convolution."""
    trains, rounds = scheme(), scheme()
    trains.trains = True  # type: ignore[misc]
    for held, folded in zip(analysis(Cnn, trains), analysis(Cnn, rounds), strict=True):
        assert held["name"] == folded["name"] and held["kl"] == pytest.approx(folded["kl"], rel=0.05)


def test_biases_are_not_corrected_meanwhile() -> None:
    assert analysis(Words, scheme(bias_correction=True)) == analysis(Words)


def test_only_so_many_examples_are_used() -> None:
    data = batches(Cnn)
    for examples, sizes in ((1, [1]), (8, [8]), (11, [8, 3]), (20, [8, 8, 4]), (1000, [8, 8, 4])):
        taken = first(data, examples)
        assert [len(labels) for _, labels in taken] == [len(inputs["x"]) for inputs, _ in taken] == sizes
    assert torch.equal(first(data, 11)[1][0]["x"], data[1][0]["x"][:3])
    assert {round(row["accuracy"] * 3) / 3 for row in analysis(Cnn, examples=3)} == {row["accuracy"] for row in analysis(Cnn, examples=3)}


def test_bad_input_says_what_to_do() -> None:
    data = batches(Words)
    with pytest.raises(ValueError, match=r"no validation examples.*data\.validation_fraction=0\.1.*analyze=false"):
        analyze(scheme(), build(Words), [], [data[0][0]], [], 100)
    with pytest.raises(ValueError, match=r"no calibration data"):
        analyze(scheme(), build(Words), [], [], data, 100)

    class Whole(Scheme):
        registered_name = "ptq_graph"

        def prepare(self, model: nn.Module, *_: Any) -> tuple[nn.Module, list[str]]:
            return model, []

    with pytest.raises(ValueError, match=r"quantizer=ptq_graph has no layers.*auto:N.*quantizer=ptq_static.*analyze=false"):
        analyze(Whole(weight=Affine()), build(Words), [], [data[0][0]], data, 100)


def rows_of(count: int) -> list[dict[str, Any]]:
    numbers = {"sqnr_db": 30.0, "accuracy": 0.9, "accuracy_drop": 0.015, "loss": 0.4, "agreement": 0.98}
    return [{"name": f"layer.{i}", "grid": "int8", **numbers, "kl": math.exp(-i)} for i in range(count)]


def test_the_table_shows_fifteen_and_counts_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    print_analysis(rows_of(18))
    text = capsys.readouterr().out
    assert "layer.14" in text and "layer.15" not in text and "and 3 more in run.json" in text
    assert "30.0 dB" in text and "90.00 %" in text and "1.50" in text
    print_analysis(rows_of(15))
    assert "more in run.json" not in capsys.readouterr().out


def test_the_page_shows_them_too() -> None:
    page = html(example_run(analysis=rows_of(18)))
    assert "Each layer alone" in page and "layer.14" in page and "layer.15" not in page and "and 3 more in run.json" in page
    assert "Each layer alone" not in html(example_run())


def test_the_most_harmful_stay_in_float_and_the_record_says_so(tmp_path: Path) -> None:
    record = Record(tmp_path, "recipe", 0, {})
    assert keep_most_harmful(rows_of(4), 0, record) == [] and record.data["notes"] == []
    assert keep_most_harmful(rows_of(4), 2, record) == ["layer.0", "layer.1"]
    assert record.data["notes"] == ["auto:2 keeps in float, as the most harmful: layer.0, layer.1"]
    for count in (4, 9):
        with pytest.raises(ValueError, match=rf"auto:{count} keeps {count} layers.*only 4 to quantize; valid: auto:1 to auto:3.*=auto:1"):
            keep_most_harmful(rows_of(4), count, record)


def test_keeping_them_is_better_than_keeping_others() -> None:
    data = batches(Cnn, (64,), seed=3)
    calibration = [inputs for inputs, _ in data]
    rows = analyze(scheme(), build(Cnn), ["head"], calibration, data, 100)

    @torch.no_grad()
    def kept(name: str) -> float:
        model, _ = (given := scheme(keep_float=["head", name])).prepare(build(Cnn), [])
        model = given.calibrate(model, calibration)
        return sqnr_db(build(Cnn)(**calibration[0]), model(**calibration[0]))

    assert kept(rows[0]["name"]) > kept(rows[-1]["name"])
