"""Tensor by tensor: the same codes as from the whole model, one tensor in memory, and a runtime's perplexity by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtrain import registry
from qtrain.language_task import TASK, Comparison
from qtrain.layers import quantized_layers
from qtrain.models.causal_lm import CausalLm
from qtrain.quantizers.rtn import Rtn
from qtrain.streaming import RuntimeOnly, StreamedLayer, Weights, halved, rows, streamed
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_lm import tiny_language_model


def mixed(model: Any, mix: str = "q4_k_m") -> Any:
    prepared, _ = Rtn(weight=registry.get("grid", mix)()).prepare(model, [])
    return prepared


@pytest.mark.parametrize("tied", [True, False])
def test_its_codes_are_those_of_the_whole_model(tmp_path: Path, tied: bool) -> None:
    folder = tiny_language_model(tmp_path / "m", tied=tied)
    source = CausalLm(str(folder))
    whole = Rtn(weight=registry.get("grid", "q4_k_m")())
    model, _ = whole.prepare(source.build(), [])
    expected = dict(quantized_layers(whole.convert(whole.calibrate(model, []))))
    skeleton, weights = source.skeleton()
    assert all(p.is_meta for p in skeleton.parameters())
    made = streamed(mixed(skeleton), weights)
    layers = {n: m for n, m in made.named_modules() if isinstance(m, StreamedLayer)}
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        q, wanted = layer.quantized, expected[name].quantized
        assert layer.kind == expected[name].kind and q.grid == wanted.grid and q.shape == wanted.shape
        assert torch.equal(q.codes, wanted.codes)
        assert all(torch.equal(q.params[n], wanted.params[n]) for n in wanted.params)
        assert len(layer.quantized.held) == 1  # and no other
    assert (layers["lm_head"].quantized is layers["model.embed_tokens"].quantized) == tied
    assert not any(p.is_meta for p in made.parameters())
    assert {row["name"] for row in rows(layers.items())} == set(expected)
    assert all(row["sqnr_db"] > 10 for row in rows(layers.items()))


def test_the_float_file_beside_it_is_float16(tmp_path: Path) -> None:
    source = CausalLm(str(tiny_language_model(tmp_path / "m")))
    skeleton, weights = source.skeleton()
    made, model = streamed(halved(skeleton), weights), source.build()
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(made.get_submodule(name).quantized.decode(), model.get_submodule(name).weight.half().float())


def test_shards_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "m", tied=False)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors.*stream=false"):
        Weights(folder)
    names = sorted(tensors)
    split = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in split.items():
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {n: file for file, part in split.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = Weights(folder)
    assert all(torch.equal(weights(n), tensors[n]) for n in names)
    with pytest.raises(ValueError, match=r"have no lm_head\.bias"):
        weights("lm_head.bias")
    tensors["lm_head.weight"][3, 4] = torch.nan
    save_file({n: tensors[n] for n in split["a.safetensors"]}, folder / "a.safetensors", metadata={"format": "pt"})
    save_file({n: tensors[n] for n in split["b.safetensors"]}, folder / "b.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight.*not finite"):
        Weights(folder)("lm_head.weight")


def test_a_gguf_file_cannot_be_streamed(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "m")
    source = CausalLm(str(folder))
    write_tiny_gguf(tmp_path / "tiny.gguf", source.build(), source.processor())
    source = CausalLm(str(tmp_path / "tiny.gguf"))
    with pytest.raises(ValueError, match="stream=true reads safetensors"):
        source.skeleton()


def test_a_runtime_alone_scores_as_beside_training(tmp_path: Path) -> None:
    model: Any = CausalLm(str(tiny_language_model(tmp_path / "m"))).build()
    ids = torch.randint(3, 500, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5], labels[1, 8:] = -100, -100
    batches = [({"input_ids": ids}, labels)]
    both, alone = Comparison(TASK.predict(model, batches, ""), batches, None), RuntimeOnly(batches)
    assert both.sequences == alone.sequences
    with torch.inference_mode():
        for i, tokens in enumerate(alone.sequences):
            logits = model(torch.tensor([tokens])).logits[0]
            for start in range(0, len(tokens), 5):
                both.add(i, start, logits[start : start + 5])
                alone.add(i, start, logits[start : start + 5])
    assert alone.result()["runtime"]["loss"] == pytest.approx(both.result()["runtime"]["loss"], rel=1e-6)
    assert alone.result()["nmse"] is None and alone.fresh().runtime.tokens == 0
