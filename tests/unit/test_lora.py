"""Adapters: what a merge is worth, to the bit; that gradients and codes go where they should; that nothing is silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qtrain import registry
from qtrain.adapters.lora import Lora
from qtrain.checkpoint import moving_state
from qtrain.layers import FakeLinear, QuantizedLinear
from qtrain.lora import Adapter, attach, base_hash, targets
from qtrain.merging import NAME, lora_layers, merged_float, merged_inside, merged_weight
from qtrain.prepare import convert, prepare
from tests.tiny_lm import tiny_language_model

VARIANTS = ("lora", "rslora", "dora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("lora") / "model")


def load(folder: Path) -> Any:
    from qtrain.models.causal_lm import CausalLm

    return CausalLm(str(folder)).build()


def put(model: nn.Module, **options: Any) -> Adapter:
    torch.manual_seed(0)  # of peft's A
    return attach(model, Lora(rank=4, alpha=8, **options), "language", ["lm_head", "model.embed_tokens"])


def trained(adapter: Adapter, seed: int = 0) -> Adapter:
    """As if it had been trained: B is not zero any more, nor are DoRA's magnitudes what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapter.model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * (0.3 if "magnitude" in name else 0.05))
    return adapter


def on_grid(model: nn.Module, grid: str, **options: Any) -> nn.Module:
    weights = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    prepare(model, weights, registry.get("grid", grid)(**options))
    return model.eval()


IDS = torch.arange(1, 41).reshape(2, 20)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_weight_is_the_one_that_peft_merges_to_the_bit(folder: Path, variant: str) -> None:
    adapter = trained(put(load(folder), variant=variant))
    ours = {name: merged_weight(layer, layer.get_base_layer().weight.detach()) for name, layer in lora_layers(adapter.model).items()}
    assert len(ours) == 14
    merged = adapter.peft_model.merge_and_unload(safe_merge=True)
    for name, weight in ours.items():
        assert torch.equal(weight, merged.get_submodule(name).weight), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grid", ["q4_0", "nf4", "affine"])
def test_an_adapter_inside_the_rounded_weight_merges_to_what_was_trained(folder: Path, variant: str, grid: str) -> None:
    model = on_grid(load(folder), *(["ggml"] if grid == "q4_0" else [grid]), **({"type": "q4_0"} if grid == "q4_0" else {}))
    adapter = trained(put(model, variant=variant))
    with torch.no_grad():
        before = model(IDS).logits
        merged = merged_inside(model)
        assert not lora_layers(merged) and len(lora_layers(model)) == 14  # the trained one is left as it was
        assert torch.equal(before, merged(IDS).logits)
        converted = convert(merged)
        assert torch.equal(before, converted(IDS).logits)
    assert sum(isinstance(m, QuantizedLinear) for m in converted.modules()) == 14
    assert adapter.trainable == sum(p.numel() for p in adapter.tensors().values())


def test_the_gradient_reaches_the_adapter_through_the_rounding_and_nothing_else(folder: Path) -> None:
    model = on_grid(load(folder), "ggml", type="q4_0").train()
    adapter = trained(put(model))
    model(IDS).logits.square().mean().backward()
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    base: Any = layer.get_base_layer()
    assert isinstance(base, FakeLinear) and base.weight.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    x = torch.randn(3, base.in_features)
    weight = merged_weight(layer, base.weight).detach().requires_grad_()
    y = torch.nn.functional.linear(x, base.weight_fake(weight))  # straight through: dL/dB = s * (dL/dW) A^T
    y.square().sum().backward()
    layer.zero_grad()
    layer(x).square().sum().backward()
    a, s = layer.lora_A[NAME].weight, layer.scaling[NAME]
    torch.testing.assert_close(layer.lora_B[NAME].weight.grad, s * weight.grad @ a.T, rtol=1e-4, atol=1e-6)
    assert adapter.names[0] in lora_layers(model)


def test_merging_is_not_done_in_the_16_bits_of_autocast(folder: Path) -> None:
    model = on_grid(load(folder), "ggml", type="q4_0")
    trained(put(model))
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")
    weight: Any = layer.get_base_layer().weight
    with torch.autocast("cpu", torch.bfloat16):
        inside = merged_weight(layer, weight)
    assert inside.dtype == torch.float32 and torch.equal(inside, merged_weight(layer, weight))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_beside_codes_computes_what_it_does_beside_their_values(folder: Path, variant: str) -> None:
    codes = convert(on_grid(load(folder), "ggml", type="q4_0"))
    values = load(folder)
    for name, module in list(codes.named_modules()):
        if isinstance(module, QuantizedLinear):
            values.get_submodule(name).weight.data = module.quantized.decode()
    first, second = trained(put(codes, variant=variant)), trained(put(values, variant=variant))
    results = []
    for adapter in (first, second):
        adapter.model.train()
        loss = adapter.model(IDS).logits.square().mean()
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in adapter.model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    merged = merged_float(first.model, load(folder))
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, first.model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


def test_codes_are_kept_for_the_backward_pass_not_the_decoded_weight(folder: Path) -> None:
    codes = convert(on_grid(load(folder), "ggml", type="q4_0"))
    layer: Any = codes.get_submodule("model.layers.0.mlp.up_proj")
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, layer.in_features, requires_grad=True)).sum().backward()
    assert sum(t.numel() for t in kept) < layer.in_features * layer.out_features / 4


def test_the_head_that_is_the_embedding_stays_one_tensor_after_a_float_merge(folder: Path) -> None:
    model = load(folder)
    mix = registry.get("grid", "q4_0")()
    chosen = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    prepare(model, chosen, mix.assign(model, chosen, False)[0])
    trained(put(convert(model)))
    merged: Any = merged_float(model, load(folder))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_plain_peft_loads_the_folder_and_merges_to_the_deployed_weights(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = on_grid(load(folder), "ggml", type="q4_0")
    adapter = trained(put(model))
    adapter.save(tmp_path / "adapter", {"recipe": "x"})
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    deployed = merged_inside(model)
    plain = PeftModel.from_pretrained(load(folder), str(tmp_path / "adapter")).merge_and_unload(safe_merge=True)
    for name in adapter.names:
        assert torch.equal(plain.get_submodule(name).weight, deployed.get_submodule(name).weight), name
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert config["task_type"] == "CAUSAL_LM" and config["r"] == 4


def test_an_adapter_goes_on_from_its_folder_and_not_on_another_base(folder: Path, tmp_path: Path) -> None:
    adapter = trained(put(load(folder)))
    adapter.save(tmp_path / "a", {})
    again = put(load(folder))
    again.load(tmp_path / "a")
    assert all(torch.equal(t, again.tensors()[n]) for n, t in adapter.tensors().items())
    rounded = put(convert(on_grid(load(folder), "ggml", type="q4_0")))
    with pytest.raises(ValueError, match=r"trained on another base.*adapter\.path=null"):
        rounded.load(tmp_path / "a")
    other = attach(load(folder), Lora(rank=8), "language", ["lm_head"])
    with pytest.raises(ValueError, match=r"does not fit.*rank, variant and target_modules"):
        other.load(tmp_path / "a")


def test_the_hash_is_of_the_weights(folder: Path) -> None:
    model = load(folder)
    before = base_hash(model)
    assert before == base_hash(load(folder))
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-6
    assert base_hash(model) != before


def test_checkpoints_hold_the_adapter_alone(folder: Path) -> None:
    adapter = put(load(folder))
    state = moving_state(adapter.model)
    assert state and all("lora_" in name for name in state)
    assert sum(t.numel() for t in state.values()) == adapter.trainable


def test_modules_to_save_are_trained_and_merged(folder: Path) -> None:
    model = load(folder)
    adapter = attach(model, Lora(rank=2, modules_to_save=["norm"]), "language", ["lm_head"])
    trained(adapter)
    with torch.no_grad():
        torch.testing.assert_close(merged_float(model, load(folder))(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"modules_to_save has 'head'"):
        attach(load(folder), Lora(modules_to_save=["head"]), "language", [])


def test_target_modules_that_match_nothing_are_an_error_that_names_the_nearest(folder: Path) -> None:
    model = load(folder)
    assert len(targets(model, ["q_proj", "*.1.mlp.*"], [])) == 5
    with pytest.raises(ValueError, match=r"'query', which matches none of the 15 Linear layers.*q_proj"):
        targets(model, ["query"], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is at least 1"),
        ({"variant": "lokr"}, "valid: lora, rslora, dora"),
        ({"merge": "rounded"}, "quantizer@adapter.deploy=rtn"),
        ({"path": "/nowhere"}, "no adapter_config.json"),
        ({"loftq_iterations": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**options)


@pytest.mark.parametrize(
    ("quantizer", "options", "message"),
    [
        ("rtn", {"merge": "consistent"}, "Set quantizer=qat"),
        ("qat", {"dropout": 0.1}, "no room for adapter.dropout=0.1"),
        ("qat", {"merge": "float"}, "no room for adapter.merge=float"),
        ("qat", {"init": "loftq"}, "adapter.init=loftq"),
        ("torchao_qat", {}, "layers of its own"),
    ],
)
def test_bases_and_merges_that_do_not_go_together_are_refused(quantizer: str, options: dict[str, Any], message: str) -> None:
    scheme = registry.get("quantizer", quantizer)()
    with pytest.raises(ValueError, match=message):
        Lora(**options).merging(scheme)


def test_what_is_deployed_follows_from_the_base() -> None:
    rtn, qat = registry.get("quantizer", "rtn")(), registry.get("quantizer", "qat")()
    assert Lora().merging(rtn) == "float" and Lora(deploy=rtn).merging(rtn) == "rounded" and Lora().merging(qat) == "consistent"
    assert Lora(deploy=rtn, merge="apart").merging(rtn) == "apart"
