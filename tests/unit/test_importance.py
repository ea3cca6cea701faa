"""Importances: what calibration sums, who gets them, and that they reach the search."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from qtrain.grids.ggml import Ggml
from qtrain.importance import weigh
from qtrain.layers import fake_layers
from qtrain.prepare import choose_once, convert, prepare
from qtrain.quantizers.rtn import Rtn

V = 64


def model(tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=tied
    )
    return transformers.LlamaForCausalLM(config).eval()


def prepared(lm: Any, kind: str = "q4_k") -> Any:
    from qtrain.targets import select

    chosen, _ = select(lm, ["*"], [])
    prepare(lm, chosen, Ggml(type=kind), Ggml(type="q8_0"))
    return lm


def text(count: int = 3) -> list[dict[str, Tensor]]:
    torch.manual_seed(4)
    return [{"input_ids": torch.randint(0, V, (2, 7))} for _ in range(count)]


def test_the_mean_square_of_what_each_layer_reads_in_float() -> None:
    lm = model()
    seen: dict[str, list[Tensor]] = {}
    plain = copy.deepcopy(lm)
    for name in ("model.layers.0.mlp.down_proj", "lm_head"):
        plain.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for inputs in text():
            plain(**inputs)
    found = weigh(prepared(lm), text(), True)
    assert set(found) == {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, parts in seen.items():
        x = torch.cat([p.reshape(-1, p.shape[-1]) for p in parts]).double()
        assert found[name].tokens == len(x) == 42
        torch.testing.assert_close(found[name].mean().double(), x.square().mean(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(lm.get_submodule(name).weight_fake.importance, found[name].mean())


def test_a_tied_head_has_none_and_stays_tied() -> None:
    lm = prepared(model(tied=True), "q6_k")
    found = weigh(lm, text(), True)
    assert "lm_head" not in found and len(found) == 7
    for _, layer in fake_layers(lm):
        if layer.weight is lm.lm_head.weight:
            assert layer.weight_fake.importance is None


def test_it_lowers_the_error_that_it_weighs() -> None:
    lm = model()
    generator = torch.Generator().manual_seed(1)
    strong = 10 ** torch.linspace(-1, 1, 256)[torch.randperm(256, generator=generator)]
    with torch.no_grad():
        lm.model.norm.weight.copy_(strong)  # the head reads a few strong channels
    weight = lm.lm_head.weight.detach().clone()
    weighted, plain = prepared(copy.deepcopy(lm), "q3_k"), prepared(lm, "q3_k")
    importance = weigh(weighted, text(), True)["lm_head"].mean()
    for m in (weighted, plain):
        choose_once(m)
        convert(m)
    errors = [((m.lm_head.quantized.decode() - weight).square() * importance).sum() for m in (weighted, plain)]
    assert errors[0] < 0.97 * errors[1]


def test_no_text_and_wild_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="no calibration text"):
        weigh(prepared(model()), [], True)
    wild = model()
    with torch.no_grad():
        wild.model.norm.weight[3] = torch.inf
    with pytest.raises(ValueError, match="lm_head is not finite"):
        weigh(prepared(wild), text(), True)


def test_an_imatrix_file_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quantizer\.imatrix=.* is no file.*quantizer\.imatrix=true"):
        Rtn(weight=Ggml(), imatrix=str(tmp_path / "none.gguf"))


def test_a_file_gives_back_what_was_measured(tmp_path: Path) -> None:
    from qtrain.imatrix import save

    lm = prepared(model())
    measured = weigh(lm, text(), True)
    save(tmp_path / "imatrix.gguf", lm, measured)
    again = prepared(model())
    found = weigh(again, [], str(tmp_path / "imatrix.gguf"))
    assert found.keys() == measured.keys()
    for name, importance in found.items():
        torch.testing.assert_close(importance.mean(), measured[name].mean())
        assert again.get_submodule(name).weight_fake.importance is not None
    wider = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=V, hidden_size=512, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match=r"256 channels for .*which has 512.*another model"):
        weigh(prepared(wider), [], str(tmp_path / "imatrix.gguf"))
