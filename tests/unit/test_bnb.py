"""bitsandbytes' layers: their codes are ours to the bit, evaluation leaves them as they are, and peft trains beside them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qtrain.adapters.lora import Lora
from qtrain.bnb import codes_of, is_bnb
from qtrain.foreign import convert
from qtrain.layers import QuantizedLinear
from qtrain.lora import attach, base_hash
from qtrain.memory import logical, stored_bytes
from qtrain.merging import merged_float
from qtrain.quantizers.bnb import Bnb
from tests.tiny_lm import learn_by_heart, tiny_language_model

IDS = torch.arange(1, 81).reshape(2, 40)
HEAD = ["lm_head", "model.embed_tokens"]


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from qtrain.models.causal_lm import CausalLm

    return CausalLm(str(tiny_language_model(tmp_path_factory.mktemp("bnb") / "model"))).build()


def based(float_model: Any, **options: Any) -> Any:
    model, kept = Bnb(**options).prepare(copy.deepcopy(float_model), HEAD)
    assert kept == sorted(HEAD)
    return model


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_four_bit_layers_convert_to_the_bit(float_model: Any, kind: str, double_quant: bool) -> None:
    import bitsandbytes.functional as F

    model = based(float_model, type=kind, double_quant=double_quant)
    layers = {n: m for n, m in model.named_modules() if is_bnb(m)}
    assert len(layers) == 14 and model.is_loaded_in_4bit and model.config.quantization_config.bnb_4bit_quant_type == kind
    for layer in layers.values():
        assert torch.equal(codes_of(layer).decode(), F.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    model.eval()
    with torch.no_grad():
        before = model(IDS).logits
        converted = convert(model)
        assert torch.equal(before, converted(IDS).logits)
    assert sum(isinstance(m, QuantizedLinear) for m in converted.modules()) == 14 and not hasattr(converted, "is_loaded_in_4bit")


def test_int8_rows_are_those_of_llm_int8(float_model: Any) -> None:
    model = based(float_model, type="int8")
    for name, layer in [(n, m) for n, m in model.named_modules() if is_bnb(m)]:
        w = float_model.get_submodule(name).weight
        assert (codes_of(layer).decode() - w).abs().max() <= w.abs().amax() / 127 * 0.58  # half a step, and float16 before
    model.eval()
    with torch.no_grad():
        runtime = model(IDS).logits  # rounds its inputs too, in float16
        weights = [codes_of(m).decode() for m in model.modules() if is_bnb(m)]  # read after a forward pass, which moves the scales
        decoded = convert(model)(IDS).logits
    assert len(weights) == 14
    assert (runtime - decoded).square().sum() / decoded.square().sum() < 5e-3


@pytest.mark.parametrize("width", [80, 288, 128, 96])
def test_rows_that_are_no_multiple_of_the_block_compute_what_their_codes_mean(width: int) -> None:
    """bitsandbytes 0.50 has a kernel that does not; wherever it is used, our layer stands in, and the run says so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 32))
    weight, scheme = model[0].weight.detach().clone(), Bnb()
    prepared: Any = scheme.prepare(copy.deepcopy(model), [])[0]
    grid = scheme.weight
    expected = torch.nn.functional.linear(torch.eye(width), grid.encode(weight).decode(), model[0].bias)
    with torch.no_grad():
        assert torch.allclose(prepared[0](torch.eye(width)), expected, rtol=1e-5, atol=1e-6)
    assert [f["name"] for f in scheme.fallbacks] == [n for n, m in prepared.named_modules() if isinstance(m, QuantizedLinear)]
    assert width % 64 or not scheme.fallbacks


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_evaluation_leaves_the_base_as_it_was(float_model: Any, kind: str) -> None:
    model = based(float_model, type=kind)
    before = [codes_of(m).decode() for m in model.modules() if is_bnb(m)]
    digest = base_hash(model)
    model.eval()
    with torch.no_grad():
        model(IDS)
        model.train()(IDS)
        model.eval()(IDS[:, :1])
    assert all(torch.equal(b, codes_of(m).decode()) for b, m in zip(before, [m for m in model.modules() if is_bnb(m)], strict=True))
    if kind == "nf4":
        assert base_hash(model) == digest


@pytest.mark.parametrize(("kind", "variant"), [("nf4", "lora"), ("nf4", "dora"), ("fp4", "rslora"), ("int8", "lora")])
def test_peft_trains_beside_it_and_the_merge_is_of_the_decoded_base(float_model: Any, kind: str, variant: str) -> None:
    model = based(float_model, type=kind)
    torch.manual_seed(0)
    adapter = attach(model, Lora(rank=4, variant=variant), "language", HEAD)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert type(layer).__module__ == "peft.tuners.lora.bnb"  # peft's own layer for bitsandbytes
    model.train()
    losses = learn_by_heart(model, IDS)
    assert losses[-1] < losses[0] - 0.5 and adapter.trainable == sum(p.numel() for p in adapter.tensors().values())
    with torch.no_grad():
        apart, merged = model.eval()(IDS).logits, merged_float(model, float_model)(IDS).logits
    tolerance = 5e-3 if kind == "int8" else 1e-9  # int8 rounds its inputs in evaluation
    assert (apart - merged).square().sum() / merged.square().sum() < tolerance
    assert all(type(m) is nn.Linear for n, m in merged_float(model, float_model).named_modules() if n.endswith("_proj"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works on CUDA")
def test_dora_beside_int8_is_refused_on_a_cpu(float_model: Any) -> None:
    with pytest.raises(ValueError, match=r"needs CUDA.*adapter\.variant=lora"):
        attach(based(float_model, type="int8"), Lora(variant="dora"), "language", HEAD)


def test_the_base_takes_the_room_it_should(float_model: Any) -> None:
    linear = sum(m.weight.numel() for n, m in float_model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    rest = stored_bytes(float_model) - 4 * linear
    model = based(float_model)
    share = (stored_bytes(model) - rest) / (2 * linear)
    assert share < 0.30  # of float16
    assert sum(logical(p) for p in model.parameters()) == sum(p.numel() for p in float_model.parameters())


def test_storage_for_sharded_training_holds_the_same_codes(float_model: Any) -> None:
    plain, wide = based(float_model), based(float_model, quant_storage="bfloat16")
    for a, b in zip(plain.modules(), wide.modules(), strict=True):
        if is_bnb(a):
            assert b.weight.dtype == torch.bfloat16 and torch.equal(codes_of(a).decode(), codes_of(b).decode())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "int4"}, "valid: nf4, fp4, int8"),
        ({"compute_dtype": "half"}, "valid: auto, float32"),
        ({"threshold": -1}, "at least 0"),
        ({"keep_float": "auto:3"}, "quantizer=rtn"),
        ({"type": "int8", "quant_storage": "bfloat16"}, "quant_storage=uint8"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bnb(**options)


def test_weights_that_are_not_finite_are_named(float_model: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(float_model)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj"):
        Bnb().prepare(model, HEAD)
