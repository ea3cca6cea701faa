"""Gemma: its embedding multiplies the rows it looks up, in training as in llama.cpp's graph, and is packed like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from exporters.gguf import Gguf
from exporters.gguf.write import read_types
from qtrain import registry
from qtrain.data.text import TextCorpus
from qtrain.models.causal_lm import CausalLm
from qtrain.quantizers.rtn import Rtn
from qtrain.streaming import halved, streamed
from tests.exporters.small_lm import tiny
from tests.exporters.test_gguf import QUICK, job
from tests.tiny_lm import tiny_tokenizer

SHAPE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 128}


@pytest.fixture(scope="module", params=["gemma3", "gemma2"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Any:
    """As that of `test_gguf.py`, of a Gemma; 256 wide, so that K-types fit."""
    folder = tmp_path_factory.mktemp(request.param) / "m"
    gemma: Any = tiny(request.param, **SHAPE)
    gemma.model.embed_tokens.weight.data *= 0.08  # the head's too: with larger logits a wrong guess costs thousands of nats
    gemma.save_pretrained(folder)
    tiny_tokenizer(512).save_pretrained(folder)
    source = CausalLm(str(folder))
    tokenizer, model = source.processor(), source.build()
    data = TextCorpus(context=32, train_tokens=1500, eval_tokens=300, calibration_sequences=4, eval_batch_size=4).build(tokenizer, 0)
    return model, tokenizer, list(data.test_dataloader()), [inputs for inputs, _ in data.calibration_dataloader()]


@pytest.mark.parametrize(("mix", "kind"), [("q4_0", "q6_k"), ("q4_k_m", "q6_k")])
@pytest.mark.parametrize("pure", [False, True], ids=["mix", "pure"])
def test_the_tied_embedding_is_packed_and_llama_cpp_computes_with_it(setup: Any, tmp_path: Path, mix: str, kind: str, pure: bool) -> None:
    given = job(setup, tmp_path, weight=registry.get("grid", mix)(pure=pure))
    receipt = Gguf(**QUICK).export(given)["receipt"]
    path = tmp_path / "gguf" / "tiny.gguf"
    expected = mix.removesuffix("_m") if pure else kind
    assert receipt["passed"] and read_types(path)["token_embd.weight"] == expected and "output.weight" not in read_types(path)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    embedding: Any = given.model.get_input_embeddings()  # type: ignore[operator]
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)), embedding.quantized.decode())
    assert receipt["tensors"] == receipt["tensors_bit_exact"] == len([t for t in read_types(path).values() if t != "f32"])
    assert abs(receipt["metric"]["perplexity"]["runtime"] / receipt["metric"]["perplexity"]["training"] - 1) < 0.01
    ids = torch.tensor([[5, 9, 300]])
    row = embedding.quantized.decode()[ids]
    assert torch.equal(given.model.model.embed_tokens(ids), row * embedding.embed_scale)  # type: ignore[union-attr,operator]


def test_tensor_by_tensor_its_codes_are_the_same(setup: Any, tmp_path: Path) -> None:
    whole: Any = job(setup, tmp_path).model
    source = CausalLm(setup[0].config._name_or_path)
    (skeleton, weights), (beside, _) = source.skeleton(), source.skeleton()
    made: Any = streamed(Rtn(weight=registry.get("grid", "q4_k_m")()).prepare(skeleton, [])[0], weights)
    assert torch.equal(made.model.embed_tokens.quantized.codes, whole.model.embed_tokens.quantized.codes)
    float_file: Any = streamed(halved(beside), weights)
    assert torch.equal(float_file.model.embed_tokens.quantized.decode(), setup[0].model.embed_tokens.weight.half().float())
