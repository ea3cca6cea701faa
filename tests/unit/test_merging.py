"""What base and float model share and what they do not; biases, whole modules and magnitudes in a merge; options that have to be those
of the folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qtrain import registry
from qtrain.adapters.lora import Lora
from qtrain.bnb import is_bnb, swap
from qtrain.checkpoint import load_weights, moving_state, save_model
from qtrain.dry import base_bytes
from qtrain.foreign import convert
from qtrain.layers import FakeLinear
from qtrain.lora import Adapter, attach, base_hash, require_base, require_same
from qtrain.memory import stored_bytes
from qtrain.merging import NAME, base_weight, lora_layers, merged_float, merged_inside, merged_weight
from qtrain.models.causal_lm import CausalLm
from qtrain.prepare import copy_of
from qtrain.quantizers.bnb import Bnb
from qtrain.quantizers.qat import Qat
from qtrain.quantizers.rtn import Rtn
from qtrain.targets import always_float, inside
from tests.tiny_lm import learn_by_heart, tiny_language_model

IDS = torch.arange(1, 81).reshape(2, 40)
HEAD = ["lm_head", "model.embed_tokens"]


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny llama whose attention has biases, which are not zero."""
    folder = tiny_language_model(tmp_path_factory.mktemp("merging") / "model", attention_bias=True)
    model: Any = CausalLm(str(folder)).build()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_copy_shares_values_and_moves_by_itself(float_model: Any) -> None:
    twin: Any = copy_of(float_model)
    assert twin.model.norm.weight is not float_model.model.norm.weight
    assert twin.model.norm.weight.data_ptr() == float_model.model.norm.weight.data_ptr()
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    twin.to("meta")
    assert all(not p.is_meta for p in float_model.parameters())
    copy_of(float_model).to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in float_model.parameters())
    apart = copy_of(float_model, share=False)
    assert apart.get_submodule("model.norm").weight.data_ptr() != float_model.model.norm.weight.data_ptr()


def test_biases_that_bitsandbytes_turns_into_16_bits_are_the_base_s_alone(float_model: Any) -> None:
    before = values(float_model)
    base, _ = Bnb(compute_dtype="bfloat16").prepare(copy_of(float_model), HEAD)
    with torch.no_grad():
        first = base.eval()(IDS).logits
        assert base.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16  # it does, at the first product
        again = convert(base)(IDS).logits
    assert all(torch.equal(p, before[n]) and p.dtype == before[n].dtype for n, p in float_model.named_parameters())
    assert (first - again).square().sum() < 1e-3 * first.square().sum()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_merged_and_the_float_model_keeps_its_own(float_model: Any, bias: str) -> None:
    before = values(float_model)
    base, _ = Bnb(compute_dtype="float32").prepare(copy_of(float_model), HEAD)
    torch.manual_seed(0)
    attach(base, Lora(rank=4, bias=bias), "language", HEAD)
    learn_by_heart(base.train(), IDS)
    trained = base.get_submodule("model.layers.0.self_attn.q_proj").get_base_layer().bias
    assert not torch.equal(trained, before["model.layers.0.self_attn.q_proj.bias"])
    assert all(torch.equal(p, before[n]) for n, p in float_model.named_parameters())
    merged: Any = merged_float(base.eval(), float_model)
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.bias, trained)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, base(IDS).logits, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(p, before[n]) for n, p in float_model.named_parameters())


def test_biases_beside_codes_cannot_be_trained_and_that_is_said(float_model: Any) -> None:
    scheme = Rtn(weight=registry.get("grid", "q4_0")())
    base = scheme.convert(scheme.prepare(copy_of(float_model), HEAD)[0])
    with pytest.raises(ValueError, match=r"adapter\.bias=all trains biases.*Set adapter\.bias=none"):
        attach(base, Lora(rank=4, bias="all"), "language", HEAD)


def test_dora_starts_at_the_sum_that_loftq_made(float_model: Any) -> None:
    base, _ = Bnb().prepare(copy_of(float_model), HEAD)
    adapter = attach(base, Lora(rank=4, variant="dora"), "language", HEAD)
    name, layer = next(iter(lora_layers(base).items()))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(p.weight.shape, generator=generator) * 0.1 for p in (layer.lora_A[NAME], layer.lora_B[NAME]))
    adapter.start(name, a, b)
    w = base_weight(layer.get_base_layer())
    torch.testing.assert_close(merged_weight(layer, w), w + layer.scaling[NAME] * b @ a, rtol=1e-5, atol=1e-6)


class Two(nn.Module):
    """One name is the end of the other's, as in DistilBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_classifier, self.classifier = nn.Linear(64, 64), nn.Linear(64, 64)


def test_a_module_that_stays_in_float_protects_no_other_whose_name_ends_alike() -> None:
    model = Two()
    swap(model, {"pre_classifier": model.pre_classifier}, Bnb())
    assert is_bnb(model.pre_classifier) and type(model.classifier) is nn.Linear


def test_what_is_trained_whole_is_neither_quantized_nor_given_an_adapter() -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=40
    )
    model = RobertaForSequenceClassification(config).eval()
    source = SimpleNamespace(always_float=lambda _: ["classifier.out_proj"])
    kept = always_float(SimpleNamespace(model=source, adapter=Lora(modules_to_save=["classifier"])), model)
    assert kept == ["classifier.out_proj", "classifier.dense"] and inside(model, ["classifier"])[0] == "classifier"
    before = values(model)
    base, _ = Bnb(compute_dtype="float32").prepare(copy_of(model), kept)
    adapter = attach(base, Lora(rank=2, modules_to_save=["classifier"]), "classification", kept)
    assert all("classifier" not in name for name in adapter.names) and len(adapter.names) == 6
    with torch.no_grad():
        for p in base.parameters():
            if p.requires_grad:
                p.add_(0.01)
    merged = merged_float(base.eval(), model)
    assert torch.equal(merged.classifier.dense.weight, before["classifier.dense.weight"] + 0.01)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS[:, :20]).logits, base(IDS[:, :20]).logits, rtol=1e-3, atol=1e-3)


def test_peft_trains_no_module_that_was_not_named() -> None:
    model = nn.Sequential()
    model.add_module("body", nn.Linear(8, 8))
    model.add_module("classifier", nn.Linear(8, 2))
    adapter = attach(model, Lora(rank=2), "classification", ["classifier"])
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad) and adapter.names == ["body"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 32.0}, r"adapter\.alpha=32\.0\. Set adapter\.alpha=8$"),
        ({"variant": "rslora"}, r"Set adapter\.variant=lora$"),
        ({"rank": 8, "bias": "all"}, r"Set adapter\.rank=4 adapter\.bias=none$"),
        ({"modules_to_save": ["norm"]}, r"Set adapter\.modules_to_save=\[\]$"),
    ],
)
def test_a_folder_is_not_loaded_with_other_options(float_model: Any, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    adapter = attach(copy.deepcopy(float_model), Lora(rank=4, alpha=8), "language", HEAD)
    adapter.save(tmp_path / "a", {})
    require_same(tmp_path / "a", Lora(rank=4, alpha=8), float_model)
    with pytest.raises(ValueError, match=message):
        require_same(tmp_path / "a", Lora(**{"rank": 4, "alpha": 8, **options}), float_model)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_an_adapter_of_loftq_says_that_its_base_is_no_other(float_model: Any, tmp_path: Path) -> None:
    adapter = attach(copy.deepcopy(float_model), Lora(rank=4), "language", HEAD)
    adapter.save(tmp_path / "a", {"init": "loftq"})
    require_base(tmp_path / "a", adapter.base_sha256)
    with pytest.raises(ValueError, match=r"LoftQ chose together with it.*resume=RUN_DIR"):
        require_base(tmp_path / "a", "0" * 64)


def test_ranges_that_follow_the_data_are_in_an_adapter_s_checkpoint(float_model: Any, tmp_path: Path) -> None:
    scheme = Qat(weight=registry.get("grid", "q4_0")(), activation=registry.get("grid", "int8_activation")(), activation_range="static")
    prepared, _ = scheme.prepare(copy_of(float_model, share=False), HEAD)
    model: Any = scheme.calibrate(prepared, [{"input_ids": IDS}])
    adapter = attach(model, Lora(rank=2), "language", HEAD)
    state = moving_state(model)
    assert any("observer" in name for name in state) and any("lora_A" in name for name in state)
    assert not any(name.endswith("base_layer.weight") for name in state)
    save_model(tmp_path / "c", model)
    fake = next(m for m in model.modules() if isinstance(m, FakeLinear))
    (low,) = [b for n, b in fake.named_buffers() if n.endswith(("low", "minimum"))][:1]
    was = low.clone()
    low.fill_(-77.0)
    load_weights(tmp_path / "c", model)
    assert torch.equal(low, was)
    assert adapter.base_sha256 != "0" * 64
    model.base_sha256 = "0" * 64
    with pytest.raises(ValueError, match="another base"):
        load_weights(tmp_path / "c", model)


def test_a_merge_inside_leaves_the_trained_model_as_it_is(float_model: Any) -> None:
    scheme = Qat(weight=registry.get("grid", "q4_0")())
    model, _ = scheme.prepare(copy_of(float_model, share=False), HEAD)
    adapter: Adapter = attach(model, Lora(rank=2), "language", HEAD)
    before = base_hash(model)
    merged_inside(model)
    assert base_hash(model) == before and adapter.trainable > 0


@pytest.mark.parametrize("grid", ["q4_0", "nf4"])
def test_a_dry_run_counts_what_memory_holds(float_model: Any, grid: str) -> None:
    if grid == "nf4":
        scheme: Any = Bnb()
        base, _ = scheme.prepare(copy_of(float_model), HEAD)
    else:
        scheme = Rtn(weight=registry.get("grid", grid)())
        base = scheme.convert(scheme.prepare(copy_of(float_model), HEAD)[0])
    expected = base_bytes(float_model, scheme.weight_grids(float_model, HEAD), scheme.loads)
    assert expected == pytest.approx(stored_bytes(base), rel=0.02)
