"""Which modules are chosen, and that nothing about it is silent."""

import pytest
import torch
from torch import nn

from qtrain.grids.affine import Affine
from qtrain.layers import FakeLayer
from qtrain.scheme import Scheme
from qtrain.targets import select


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"query": nn.Linear(32, 32), "output": nn.Linear(32, 32)})
        self.norm = nn.LayerNorm(32)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 2)


LAYERS = [f"blocks.{i}.attention.{n}" for i in (0, 1) for n in ("query", "output")]
EVERYTHING = ["embedding", *LAYERS, "head"]


def test_everything_is_every_linear_and_embedding_in_module_order() -> None:
    model = Model()
    chosen, kept = select(model, ["*"], [])
    assert list(chosen) == EVERYTHING and kept == []
    assert all(model.get_submodule(n) is m for n, m in chosen.items())


@pytest.mark.parametrize(
    ("include", "keep_float", "want"),
    [
        (["blocks.*"], [], LAYERS),
        (["*.query", "head"], [], [LAYERS[0], LAYERS[2], "head"]),
        (["blocks.[1-9].*"], [], LAYERS[2:]),
        (["*"], ["head", "embedding"], LAYERS),
        (["*"], ["*.output"], ["embedding", LAYERS[0], LAYERS[2], "head"]),
        (["head", "*.query"], ["blocks.0.*"], [LAYERS[2], "head"]),
        (["hea?"], [], ["head"]),
    ],
)
def test_globs_choose_and_keep_float_wins(include: list[str], keep_float: list[str], want: list[str]) -> None:
    chosen, kept = select(Model(), include, keep_float)
    assert list(chosen) == want
    assert kept == [n for n in EVERYTHING if n not in want]


def test_a_pattern_is_the_whole_name_and_has_a_case() -> None:
    for pattern in ("query", "Head", "blocks", "*.norm"):
        with pytest.raises(ValueError, match="matches none of the 6"):
            select(Model(), [pattern], [])


def test_an_unmatched_pattern_raises_with_near_names_and_the_key_to_set() -> None:
    with pytest.raises(
        ValueError, match=r"quantizer\.include pattern 'blocks\.0\.attention\.quer'.*nearest are blocks\.0\.attention\.query"
    ) as error:
        select(Model(), ["*", "blocks.0.attention.quer"], [])
    assert "quantizer.include=['blocks.0.attention.query']" in str(error.value)
    with pytest.raises(ValueError, match=r"quantizer\.keep_float pattern 'haed'.*nearest are head.*quantizer\.keep_float=\['head'\]"):
        select(Model(), ["*"], ["haed"])


def test_nothing_left_to_quantize_raises() -> None:
    with pytest.raises(ValueError, match=r"leaves nothing to quantize.*quantizer\.keep_float="):
        select(Model(), ["head"], ["head"])
    with pytest.raises(ValueError, match="has no Linear, Embedding or convolution"):
        select(nn.Sequential(nn.ReLU()), ["*"], [])


def test_a_scheme_prepares_what_it_selects_and_names_what_stays_in_float() -> None:
    model = Model()
    same, kept = Scheme(weight=Affine(), include=["blocks.*", "embedding"], keep_float=["blocks.1.*"]).prepare(model, ["head"])
    assert same is model
    assert kept == sorted(["embedding", "head", LAYERS[2], LAYERS[3]])  # the embedding since it has no grid
    assert [n for n, m in model.named_modules() if isinstance(m, FakeLayer)] == LAYERS[:2]
    with pytest.raises(ValueError, match=r"keep_float pattern 'classifier'"):
        Scheme(weight=Affine()).prepare(Model(), ["classifier"])


def test_a_scheme_converts_what_it_prepared() -> None:
    model = Model()
    scheme = Scheme(weight=Affine(), embedding=Affine(8), activation=Affine(8, "absmax_mlas"))
    assert scheme.prepare(model, []) == (model, [])
    model.eval()
    before = model.head(model.embedding(torch.arange(10)))
    scheme.convert(model)
    assert torch.equal(model.head(model.embedding(torch.arange(10))), before)
    assert not [p for n, p in model.named_parameters() if "norm" not in n]


def test_a_scheme_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"activation_range is 'statik'; valid: dynamic, static"):
        Scheme(activation_range="statik")
    for granularity in ("token", "channel", "group"):
        with pytest.raises(ValueError, match=rf"granularity={granularity}.*granularity=tensor or quantizer\.activation_range=dynamic"):
            Scheme(activation=Affine(8, granularity=granularity), activation_range="static")
        Scheme(activation=Affine(8, granularity=granularity))
    Scheme(activation=Affine(8, granularity="tensor"), activation_range="static")
    with pytest.raises(ValueError, match="static has no activation grid to fix"):
        Scheme(activation_range="static")


def test_observers_have_one_list_of_names() -> None:
    from qtrain import observers, scheme

    assert set(scheme.OBSERVERS) == set(observers.OBSERVERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observer": "entropy"}, r"quantizer\.observer is 'entropy'; valid: minmax, .*histogram_kl"),
        ({"percentile": 40.0}, r"quantizer\.percentile is 40\.0; it is above 50"),
        ({"smoothquant": 1.5}, r"quantizer\.smoothquant is 1\.5; it is from 0 to 1"),
        ({"keep_float": "auto:many"}, r"quantizer\.keep_float has 'auto:many'; N of auto:N is a positive integer"),
        ({"keep_float": ["head", "auto:0"]}, r"quantizer\.keep_float has 'auto:0'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme(weight=Affine(), **options)  # type: ignore[arg-type]


def test_automatic_patterns_are_counted_and_the_others_kept() -> None:
    scheme = Scheme(weight=Affine(), keep_float=["auto:3", "head"])
    assert (scheme.automatic, scheme.keep_float) == (3, ["head"])
    assert Scheme(weight=Affine(), keep_float="auto:2").automatic == 2 and Scheme(weight=Affine()).automatic == 0
