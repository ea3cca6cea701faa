"""torchao's weight-only tensors as a base: their codes are ours to the bit, and peft trains beside them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from qtrain.adapters.lora import Lora
from qtrain.foreign import codes_of, convert, is_foreign
from qtrain.layers import QuantizedLinear
from qtrain.lora import attach, base_hash
from qtrain.memory import stored_bytes
from qtrain.merging import merged_float
from qtrain.quantizers.torchao_base import Torchao
from tests.tiny_lm import learn_by_heart, tiny_language_model

IDS = torch.arange(1, 81).reshape(2, 40)
HEAD = ["lm_head", "model.embed_tokens"]


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from qtrain.models.causal_lm import CausalLm

    return CausalLm(str(tiny_language_model(tmp_path_factory.mktemp("torchao") / "model"))).build()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_codes_are_those_of_our_grid_and_decode_to_the_bit(float_model: Any, kind: str) -> None:
    scheme = Torchao(type=kind)
    model, _ = scheme.prepare(copy.deepcopy(float_model), HEAD)
    layers = {n: m for n, m in model.named_modules() if is_foreign(m)}
    assert len(layers) == 14
    for name, layer in layers.items():
        q, ours = codes_of(layer), scheme.weight.encode(float_model.get_submodule(name).weight.detach())
        assert torch.equal(q.decode(), layer.weight.dequantize()) and q.grid == ours.grid
        assert torch.equal(q.codes, ours.codes) and torch.equal(q.params["scale"], ours.params["scale"])
    with torch.no_grad():
        before = model.eval()(IDS).logits
        converted = convert(model)
        torch.testing.assert_close(before, converted(IDS).logits, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, QuantizedLinear) for m in converted.modules()) == 14


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_peft_trains_beside_it(float_model: Any, kind: str) -> None:
    model, _ = Torchao(type=kind).prepare(copy.deepcopy(float_model), HEAD)
    digest = base_hash(model)
    assert digest != base_hash(float_model) and stored_bytes(model) < 0.6 * stored_bytes(float_model)
    torch.manual_seed(0)
    attach(model, Lora(rank=4), "language", HEAD)
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "TorchaoLoraLinear"  # peft's own
    model.train()
    losses = learn_by_heart(model, IDS)
    assert losses[-1] < losses[0] - 0.5
    with torch.no_grad():
        torch.testing.assert_close(merged_float(model, float_model)(IDS).logits, model.eval()(IDS).logits, rtol=1e-3, atol=1e-3)


def test_the_float_model_stays_as_it_is(float_model: Any) -> None:
    shared = copy.deepcopy(float_model, {id(p): p for p in float_model.parameters()})
    Torchao().prepare(shared, HEAD)
    assert type(float_model.model.layers[0].mlp.up_proj.weight) is torch.nn.Parameter


@pytest.mark.parametrize(("options", "message"), [({"type": "int2"}, "valid: int8, int4"), ({"group_size": 0}, "at least 1")])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Torchao(**options)


def test_rows_that_the_group_does_not_divide_are_named(float_model: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj.*keep_float"):
        Torchao(type="int4", group_size=96).prepare(copy.deepcopy(float_model), HEAD)
