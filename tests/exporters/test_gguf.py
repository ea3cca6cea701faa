"""The GGUF exporter as a whole: what it writes, what its receipt catches, what it refuses, and that it leaves nothing half-written."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
import torch
import transformers

from exporters.base import ExportJob, ReceiptFailed
from exporters.gguf import Gguf, size_bytes
from exporters.gguf.llama import Llama
from exporters.gguf.write import read_types
from qtrain import registry
from qtrain.data.text import TextCorpus
from qtrain.grids.affine import Affine
from qtrain.grids.base import Grid
from qtrain.grids.ggml import TYPES, Ggml
from qtrain.language_task import TASK
from qtrain.models.causal_lm import CausalLm
from qtrain.quantizers.rtn import Rtn
from tests.exporters.small_folder import language_job
from tests.tiny_lm import tiny_language_model

QUICK: dict[str, Any] = {"strings": 60, "generate": 4, "compare_float": False, "threads": 1}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Any:
    """A tiny model whose logits tell tokens apart, its tokenizer, and batches of text."""
    source = CausalLm(str(tiny_language_model(tmp_path_factory.mktemp("lm") / "m", initializer_range=0.08)))
    tokenizer, model = source.processor(), source.build()
    data = TextCorpus(context=64, train_tokens=3000, eval_tokens=400, calibration_sequences=4, eval_batch_size=4).build(tokenizer, 0)
    calibration = [inputs for inputs, _ in data.calibration_dataloader()]
    return model, tokenizer, list(data.test_dataloader()), calibration


def job(setup: Any, folder: Path, imatrix: bool = False, **grids: Any) -> ExportJob:
    """The model on a grid or a mix, ready to be exported."""
    model, tokenizer, batches, calibration = setup
    scheme = Rtn(imatrix=imatrix, **(grids or {"weight": registry.get("grid", "q4_k_m")()}))
    twin = CausalLm(model.config._name_or_path).build()
    keep = [] if hasattr(scheme.weight, "assign") or scheme.embedding is not None else ["lm_head", "model.embed_tokens"]
    prepared, _ = scheme.prepare(twin, keep)
    converted = scheme.convert(scheme.calibrate(prepared, calibration))
    return dataclasses.replace(language_job(converted, model, tokenizer, batches, folder), float_model=model, importance=scheme.importance)


def test_everything_that_belongs_to_an_artefact(setup: Any, tmp_path: Path) -> None:
    entry = Gguf(**QUICK | {"compare_float": True}).export(job(setup, tmp_path, imatrix=True))
    receipt, folder = entry["receipt"], tmp_path / "gguf"
    assert receipt["passed"] and receipt["tensors"] == receipt["tensors_bit_exact"] == 15
    assert sorted(p.name for p in folder.iterdir()) == ["Modelfile", "imatrix.gguf", "receipt.json", "tiny.gguf"]
    assert json.loads((folder / "receipt.json").read_text())["receipt"]["checks"]["tokenization"].startswith("passed: 60 of 60")
    assert receipt["float_bytes"] > 2.5 * entry["bytes"] and receipt["tokens_per_s"].keys() == {"float", "quantized"}
    reader = gguf.GGUFReader(folder / "tiny.gguf")
    fields = {key: reader.get_field(key).contents() for key in ("qtrain.recipe", "general.architecture", "llama.context_length")}
    assert fields == {"qtrain.recipe": "tiny", "general.architecture": "llama", "llama.context_length": 128}
    assert "FROM ./tiny.gguf" in (folder / "Modelfile").read_text()
    assert read_types(folder / "tiny.gguf")["token_embd.weight"] == "q6_k"


@pytest.mark.parametrize("kind", list(TYPES))
def test_every_type_is_the_same_in_the_file_and_nearly_the_same_in_llama_cpp(setup: Any, tmp_path: Path, kind: str) -> None:
    receipt = Gguf(**QUICK).export(job(setup, tmp_path, weight=Ggml(type=kind), embedding=Ggml(type=kind)))["receipt"]
    assert receipt["tensors"] == receipt["tensors_bit_exact"] == 15
    assert abs(receipt["metric"]["perplexity"]["runtime"] / receipt["metric"]["perplexity"]["training"] - 1) < 0.005
    assert receipt["logits_nmse"] < 2e-3


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q6_k"])
def test_with_inputs_on_the_kernels_own_grid_training_is_nearer_to_llama_cpp(setup: Any, tmp_path: Path, kind: str) -> None:
    grids: dict[str, Any] = {"weight": Ggml(type=kind), "embedding": Ggml(type=kind)}
    errors = []
    for name, activation in (("plain", None), ("rounded", registry.get("grid", "ggml_activation")())):
        given = job(setup, tmp_path / name, **grids, activation=activation)
        path = Path(Gguf(**QUICK).export(given)["path"])
        fresh = TASK.comparison(given.training_logits, setup[2], None)
        with Llama(path, context=128, threads=1, kv_type="f32", flash_attention=False, repack=False) as llama:
            for i, ids in enumerate(fresh.sequences):
                fresh.add(i, 0, llama.logits(ids))
        errors.append(fresh.result()["nmse"])
    assert errors[1] < 0.8 * errors[0]  # what is left are values that other sums moved across a rounding boundary


def test_a_long_training_context_takes_no_memory(setup: Any, tmp_path: Path) -> None:
    """Keys and values of 2^20 tokens would be 1 GB even of the tiny model."""
    given = job(setup, tmp_path)
    given.model.config.max_position_embeddings = 1 << 20  # type: ignore[union-attr,assignment]
    before = psutil.Process().memory_info().rss
    path = Path(Gguf(**QUICK).export(given)["path"])
    with Gguf(**QUICK).session(path) as llama:
        assert llama.context == 512 and llama.metadata()["llama.context_length"] == str(1 << 20)
        assert len(llama.logits(list(range(3, 103)))) == 100
        assert psutil.Process().memory_info().rss - before < 200e6
    assert Gguf(**QUICK).logits(path, setup[2]).shape == (sum(inputs["input_ids"].numel() for inputs, _ in setup[2]), 512)


def test_what_the_modelfile_cannot_say_is_in_the_record(setup: Any, tmp_path: Path) -> None:
    given = job(setup, tmp_path)
    given.processor = copy.deepcopy(given.processor)
    given.processor.chat_template = "{{ 'Today is ' + strftime_now('%d %b %Y') }}" + given.processor.chat_template
    receipt = Gguf(**QUICK).export(given)["receipt"]
    (why,) = [f["why"] for f in receipt["fallbacks"] if f["name"] == "Modelfile"]
    assert "26 Jul 2024 (%d %b %Y), Ollama's {{ currentDate }} as 2024-07-26" in why
    assert why in (tmp_path / "gguf" / "Modelfile").read_text()


def test_a_file_in_parts(setup: Any, tmp_path: Path) -> None:
    entry = Gguf(**QUICK, split="300K").export(job(setup, tmp_path))
    parts = sorted(p.name for p in (tmp_path / "gguf").glob("*.gguf"))
    assert len(parts) > 1 and Path(entry["path"]).name == parts[0] and parts[0].startswith("tiny-00001-of-0000")
    assert entry["bytes"] == sum((tmp_path / "gguf" / p).stat().st_size for p in parts)


class Damaged(Gguf):
    """Changes one bit of a code behind the exporter's back."""

    def write(self, job: ExportJob, folder: Path) -> Any:
        artefact = super().write(job, folder)
        tensor = next(t for t in gguf.GGUFReader(artefact.path).tensors if t.name == "blk.1.ffn_up.weight")
        data = bytearray(artefact.path.read_bytes())
        data[tensor.data_offset + 100] ^= 0x01
        artefact.path.write_bytes(data)
        return artefact


def test_one_wrong_bit_fails_the_receipt_and_leaves_nothing(setup: Any, tmp_path: Path) -> None:
    with pytest.raises(ReceiptFailed, match="decodes differently in") as failure:
        Damaged(**QUICK).export(job(setup, tmp_path))
    assert failure.value.entry["receipt"]["tensors_bit_exact"] == 14
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_pre_tokenizer_fails_the_receipt(setup: Any, tmp_path: Path) -> None:
    with pytest.raises(ReceiptFailed, match="tokenization failed: "):
        Gguf(**QUICK | {"strings": 300}, pre_tokenizer="gpt-2").export(job(setup, tmp_path))


class Interrupted(Gguf):
    """Ctrl-C while the file is written."""

    def write(self, job: ExportJob, folder: Path) -> Any:
        super().write(job, folder)
        raise KeyboardInterrupt


def test_an_interrupted_export_keeps_the_one_before(setup: Any, tmp_path: Path) -> None:
    given = job(setup, tmp_path)
    Gguf(**QUICK).export(given)
    before = (tmp_path / "gguf" / "tiny.gguf").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        Interrupted(**QUICK).export(given)
    assert [p.name for p in tmp_path.iterdir()] == ["gguf"]
    assert (tmp_path / "gguf" / "tiny.gguf").read_bytes() == before


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Affine(bits=4, group_size=32), r"float16 scales.*scale_dtype=float16"),
        (Affine(bits=4, group_size=24, remainder="short"), "blocks have 32 values"),
        (Affine(bits=8, rule="minmax", group_size=32, scale_dtype="float16"), "no ggml type has 8-bit codes with a zero point"),
    ],
)
def test_a_grid_that_no_type_holds_is_refused_with_the_nearest(setup: Any, tmp_path: Path, grid: Grid, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gguf(**QUICK).export(job(setup, tmp_path, weight=grid))
    assert list(tmp_path.iterdir()) == []


def test_what_preflight_finds(setup: Any) -> None:
    model, tokenizer, *_ = setup
    with pytest.raises(ValueError, match=r"is for models of language or embedding, and this one is of classification.*export=\[onnx\]"):
        Gguf().preflight(model, "classification", tokenizer)
    other = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(ValueError, match=r"gpt_neox.*llama"):
        Gguf().preflight(other, "language", tokenizer)


@pytest.mark.parametrize(
    ("option", "value"), [("float_type", "q8"), ("name", "a/b"), ("split", "many"), ("split", "0"), ("strings", -1), ("generate", 0)]
)
def test_bad_options_say_what_to_type(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"export\.gguf\.{option}.*Set export\.gguf\.|export\.gguf\.strings is.*Set export\.gguf"):
        Gguf(**{option: value})


def test_sizes() -> None:
    assert [size_bytes(s) for s in (None, "2G", "1.5m", "1000")] == [None, 2 * 10**9, 1_500_000, 1000]


def test_weights_that_are_not_finite_are_named(setup: Any, tmp_path: Path) -> None:
    given = job(setup, tmp_path)
    with torch.no_grad():
        given.model.model.norm.weight[3] = torch.nan  # type: ignore[union-attr, operator, index]
    with pytest.raises(ValueError, match=r"model\.norm\.weight has 1 values that are not finite"):
        Gguf(**QUICK).export(given)
    assert list(tmp_path.iterdir()) == []
