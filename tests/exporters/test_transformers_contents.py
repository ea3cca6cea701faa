"""What a transformers folder holds, piece by piece: names, ties, other sources and tasks, and how generation is judged."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from exporters.base import ExportJob
from exporters.transformers_folder import TransformersFolder, about
from exporters.transformers_folder.contents import Entry, entries, original_names, ties
from exporters.transformers_folder.proof import generation
from exporters.transformers_folder.sizes import size_bytes
from exporters.transformers_folder.write import as_bytes, write_file, write_weights
from qtrain.grids.ggml import Ggml
from qtrain.models.sentence_embedding import SentenceEmbedding
from qtrain.quantizers.rtn import Rtn
from qtrain.tasks import task as task_of
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_lm import tiny_language_model

from .small_folder import TinyLm, language_job, plain
from .small_lm import GROUPED, tiny


@pytest.fixture(scope="module", autouse=True)
def _threads(one_thread: None) -> None:
    """Small models."""


def saved_and_ours(model: Any, auto: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What transformers writes of a model that it has loaded, and what we write."""
    model.save_pretrained(folder / "first")
    loaded = getattr(transformers, auto).from_pretrained(folder / "first")
    loaded.save_pretrained(folder / "theirs")
    (folder / "ours").mkdir()
    write_weights(folder / "ours", original_names(loaded, entries(loaded, "float32", {})), None, lambda _: None)
    return load_file(folder / "theirs" / "model.safetensors"), load_file(folder / "ours" / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "tied", "gemma3", "phi3", "bert_classifier", "nomic_bert", "mixtral", "qwen2_moe"])
def test_tensors_and_names_are_those_of_save_pretrained(family: str, tmp_path: Path) -> None:
    experts = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    made: dict[str, Any] = {
        "tied": lambda: tiny("llama", tie_word_embeddings=True),
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, num_local_experts=4)),
        "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**GROUPED, **experts)),
    }
    autos = {"bert_classifier": "AutoModelForSequenceClassification", "nomic_bert": "AutoModel"}
    model = made.get(family, lambda: tiny(family))()
    theirs, ours = saved_and_ours(model, autos.get(family, "AutoModelForCausalLM"), tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(ours[n].dtype == t.dtype and torch.equal(ours[n], t) for n, t in theirs.items())


def test_a_file_of_all_types_is_read_by_safetensors(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {str(k): torch.arange(6).reshape(2, 3).to(k) for k in kinds} | {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    write_file(tmp_path / "f.safetensors", [Entry(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()])  # type: ignore[misc]
    found = load_file(tmp_path / "f.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())
    assert bytes(as_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).T)) == b"\x01\x00\x03\x00\x02\x00\x04\x00"


def test_only_one_tensor_is_made_at_a_time(tmp_path: Path) -> None:
    made: list[Any] = []

    def data() -> torch.Tensor:
        assert all(tensor() is None for tensor in made)
        tensor = torch.ones(4)
        made.append(weakref.ref(tensor))
        return tensor

    write_file(tmp_path / "f.safetensors", [Entry(f"t{i}", torch.float32, (4,), data) for i in range(3)])
    assert len(made) == 3


def test_sizes() -> None:
    assert [size_bytes(s) for s in (None, "2G", "5GB", "1.5m", "1000")] == [None, 2 * 10**9, 5 * 10**9, 1_500_000, 1000]


def test_ties_hold_while_both_decode_alike(tmp_path: Path) -> None:
    lm = TinyLm(tmp_path / "m")
    assert ties(lm.model) == {"lm_head.weight": "model.embed_tokens.weight"}
    grids = {"same": (Ggml(type="q8_0"), Ggml(type="q8_0")), "other": (Ggml(type="q4_0"), Ggml(type="q8_0"))}
    jobs = {name: lm.job(tmp_path, weight=w, embedding=e).model for name, (w, e) in grids.items()}
    assert len(ties(jobs["same"])) == 1 and ties(jobs["other"]) == {}
    for name, model in jobs.items():
        (tmp_path / name).mkdir()
        about.write_config(model, tmp_path / name, "float32", bool(ties(model)), None)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["tie_word_embeddings"] is (name == "same") and config["use_cache"] is True and config["dtype"] == "float32"
        assert not any(str(tmp_path) in str(value) for value in config.values())
    assert jobs["other"].config.tie_word_embeddings is True  # the model itself is left as it was


def test_a_model_from_a_gguf_file_without_codes(tmp_path: Path) -> None:
    source = tiny_language_model(tmp_path / "source", initializer_range=0.08)
    write_tiny_gguf(tmp_path / "m.gguf", LlamaForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source))
    lm = TinyLm(tmp_path / "m.gguf")
    receipt = TransformersFolder(generate=4).export(language_job(lm.model, lm.model, lm.tokenizer, lm.batches, tmp_path))["receipt"]
    assert receipt["passed"] and receipt["tensors"] == 0 and 0 < receipt["logits_nmse"] < 1e-5
    assert receipt["checks"]["tokenizer"].startswith("passed")
    assert receipt["checks"]["float weights"] == "passed: 21 tensors are training's, in float16"
    config = json.loads((tmp_path / "transformers" / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]


def embedding_job(bert: Path, folder: Path, texts: list[str]) -> ExportJob:
    """A sentence encoder in Q8_0, ready to be exported."""
    source = SentenceEmbedding(str(bert))
    tokenizer, model, judged = source.processor(), source.build(), task_of("embedding")
    batches = [(dict(tokenizer(texts[i : i + 4], padding=True, return_tensors="pt")), torch.zeros(4)) for i in range(0, len(texts), 4)]
    reference = judged.predict(model, batches, "")
    prepared, _ = Rtn(imatrix=False, weight=Ggml(type="q8_0"), embedding=Ggml(type="q8_0")).prepare(model, [])
    converted = Rtn(imatrix=False).convert(prepared)
    outputs = judged.predict(converted, batches, "")
    return ExportJob(
        model=converted,
        example_inputs={},
        batches=batches,
        training_logits=outputs,
        metrics=lambda *_: {},
        folder=folder,
        max_length=64,
        vocab_size=len(tokenizer),
        task="embedding",
        processor=tokenizer,
        comparison=judged.comparison(outputs, batches, reference),
    )


def test_sentence_embeddings(tiny_bert: Path, tmp_path: Path) -> None:
    texts = ["the good film", "a dull plot with this story", "its cast was superb and witty", "boring one of in who that"]
    given = embedding_job(tiny_bert, tmp_path, texts)
    entry = TransformersFolder(dtype="float32").export(given)
    assert entry["receipt"]["passed"] and entry["receipt"]["logits_nmse"] < 1e-11 and entry["receipt"]["top1_agreement"] == 1.0
    assert json.loads((tmp_path / "transformers" / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True
    script = """
model = transformers.AutoModel.from_pretrained(sys.argv[1]).eval()
given = transformers.AutoTokenizer.from_pretrained(sys.argv[1])(["the good film"], return_tensors="pt")
print(json.dumps(model(**given).last_hidden_state.mean(1)[0].tolist()))
"""
    vector = torch.nn.functional.normalize(torch.tensor(plain(script, entry["path"])), dim=-1)
    assert torch.allclose(vector, given.training_logits[0], atol=1e-5)


class Writes(nn.Module):
    """Writes 5, 6, 7, …; of the next token and the one after it the first is more likely by a given difference."""

    def __init__(self, gap: float) -> None:
        super().__init__()
        self.gap = gap

    def generate(self, ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        return torch.cat([ids, torch.arange(5, 5 + max_new_tokens)[None]], 1)

    def forward(self, input_ids: torch.Tensor) -> Any:
        logits = torch.zeros(1, input_ids.shape[1], 32)
        following = int(input_ids[0, -1]) + 1
        logits[0, -1, following], logits[0, -1, following + 1] = 3.0, 3.0 - self.gap
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("theirs", "gap", "said"),
    [
        ([5, 6, 7, 8], 1.0, "passed: the same 4 greedy tokens"),
        ([5, 6, 8, 9], 0.01, "passed: the first 2 of 4 greedy tokens are the same; then two are equally likely"),
        ([5, 6, 8, 9], 0.5, r"failed: from token 2 on the folder writes \[8, 9\], training \[7, 8\], by 0.5 in its logits"),
        ([5, 6], 0.0, "failed: training stops after 4 tokens, the folder after 2"),
    ],
)
def test_generation_may_part_only_where_rounding_decides(theirs: list[int], gap: float, said: str) -> None:
    tokenizer = SimpleNamespace(decode=str)
    job: Any = SimpleNamespace(whole=Writes(gap), comparison=SimpleNamespace(sequences=[[1, 2, 4]]), processor=tokenizer)
    session: Any = SimpleNamespace(value=lambda *_, **__: {"ids": theirs})
    found = generation(job, session, 4, noise=0.01)
    assert re.match(said, found)
