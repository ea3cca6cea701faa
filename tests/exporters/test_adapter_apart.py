"""An adapter beside its base: in llama.cpp's own format, and in peft's; both runtimes compute with the two together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("xllamacpp")

import gguf

from exporters.base import ExportJob, LowRank, ReceiptFailed
from exporters.gguf import Gguf, adapter
from exporters.gguf.llama import Llama, LlamaError
from exporters.transformers_folder import TransformersFolder
from qtrain import registry
from qtrain.adapters.lora import Lora
from qtrain.lora import attach
from qtrain.merging import NAME, base_of, lora_layers, merged_float
from qtrain.receipt import nmse
from tests.exporters.small_folder import TinyLm, language_job, plain
from tests.tiny_lm import learn_by_heart

QUICK: dict[str, Any] = {"strings": 20, "generate": 4, "compare_float": False, "threads": 1}
LAYERS = ["q_proj", "k_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> TinyLm:
    return TinyLm(tmp_path_factory.mktemp("apart") / "m")


def apart(tiny: TinyLm, folder: Path, grid: str, **options: Any) -> ExportJob:
    """The tiny model on a grid, an adapter trained beside it, ready to be exported as two things."""
    base = tiny.job(folder, weight=registry.get("grid", grid)())
    lora = Lora(rank=4, alpha=12, **{"target_modules": LAYERS, **options})
    torch.manual_seed(0)
    made = attach(base.model, lora, "language", [])
    losses = learn_by_heart(base.model.train(), torch.arange(1, 81).reshape(2, 40))
    assert losses[-1] < losses[0] - 0.3
    made.save(folder / "trained", {})
    whole = base.model.eval()
    layers = {n: (m.lora_A[NAME].weight.detach(), m.lora_B[NAME].weight.detach()) for n, m in lora_layers(whole).items()}
    job = language_job(whole, tiny.model, tiny.tokenizer, tiny.batches, folder)
    beside = LowRank(folder / "trained", layers, lora.rank, lora.scaling, whole)
    return dataclasses.replace(job, model=base_of(whole), adapter=beside)


@pytest.mark.parametrize(("grid", "variant"), [("q4_0", "lora"), ("q8_0", "rslora")])
def test_llama_computes_with_an_adapter_beside_the_base(tiny: TinyLm, tmp_path: Path, grid: str, variant: str) -> None:
    job = apart(tiny, tmp_path, grid, variant=variant)
    entry = Gguf(**QUICK).export(job)
    assert entry["receipt"]["passed"] and entry["receipt"]["checks"]["adapter"].startswith("passed: A and B of 8 layers")
    files = sorted(p.name for p in (tmp_path / "gguf").iterdir())
    assert files == ["Modelfile", "receipt.json", "tiny-lora.gguf", "tiny.gguf"]
    reader = gguf.GGUFReader(tmp_path / "gguf" / "tiny-lora.gguf")
    keys = ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    kind, architecture, what, alpha = (reader.get_field(key).contents() for key in keys)
    assert (kind, architecture, what) == ("adapter", "llama", "lora") and alpha == pytest.approx(12 * (2 if variant == "rslora" else 1))
    ids = list(range(1, 41))
    with torch.no_grad():
        both, alone = (m(torch.tensor([ids])).logits[0] for m in (job.whole, job.model))
    path = tmp_path / "gguf" / "tiny.gguf"
    with Llama(path, context=64, adapter=tmp_path / "gguf" / "tiny-lora.gguf") as llama, Llama(path, context=64) as bare:
        with_adapter, without_it = torch.from_numpy(llama.logits(ids)), torch.from_numpy(bare.logits(ids))
    energy = both.square().sum()
    assert (with_adapter - both).square().sum() < 2e-3 * energy < 0.02 * (with_adapter - alone).square().sum()
    assert (without_it - alone).square().sum() < 2e-3 * alone.square().sum()


def test_rows_of_b_go_where_the_rows_of_the_weight_go(tiny: TinyLm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp wants the rows of q and k in another order; B as peft has it would be another model, and the receipt sees it."""
    job = apart(tiny, tmp_path, "q8_0")
    beside = adapter.placed
    monkeypatch.setattr(adapter, "placed", lambda model: {p: (name, type(t)()) for p, (name, t) in beside(model).items()})
    with pytest.raises(ReceiptFailed, match=r"logits_nmse|top1_agreement|perplexity"):
        Gguf(**QUICK).export(job)


def test_a_damaged_adapter_is_seen(tiny: TinyLm, tmp_path: Path) -> None:
    job = apart(tiny, tmp_path, "q8_0")
    Gguf(**QUICK).export(job)
    path = tmp_path / "gguf" / "tiny-lora.gguf"
    assert adapter.compare(path, job).startswith("passed")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert adapter.compare(path, job).startswith("failed: 1 of 16")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(LlamaError, match="cannot load the adapter"):
        Llama(tmp_path / "gguf" / "tiny.gguf", context=32, adapter=path)


@pytest.mark.parametrize(("variant", "others"), [("dora", []), ("lora", ["adapter.bias=all"])])
def test_what_llama_has_no_place_for_is_refused(tiny: TinyLm, variant: str, others: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"without {others[0] if others else 'adapter.variant=dora'}.*Set adapter\.merge=float"):
        Gguf().refuse_adapter(variant, others, tiny.model, [])
    with pytest.raises(ValueError, match=r"export=onnx writes one model"):
        registry.get("export", "onnx")().refuse_adapter("lora", [], tiny.model, [])
    with pytest.raises(ValueError, match=r"no tensor of its own for lm_head"):  # it is the embedding's
        Gguf().refuse_adapter("lora", [], tiny.model, ["lm_head"])


@pytest.mark.parametrize(("grid", "variant"), [("nf4", "dora"), ("q4_1", "lora")])
def test_plain_peft_loads_the_adapter_beside_the_folder(tiny: TinyLm, tmp_path: Path, grid: str, variant: str) -> None:
    job = apart(tiny, tmp_path, grid, variant=variant)
    entry = TransformersFolder(dtype="float16" if grid == "nf4" else "float32", generate=4).export(job)
    assert entry["receipt"]["passed"] and entry["receipt"]["checks"]["adapter"].endswith("8 layers")
    script = """
import peft
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, sys.argv[1] + "/adapter").eval()
for module in model.modules():
    module.compute_dtype = torch.float32
    module.support_avx512bf16_for_cpu = False
with torch.no_grad():
    print(json.dumps(model(torch.arange(1, 41)[None]).logits[0, -1].tolist()))
"""
    expected = torch.tensor(plain(script, str(tmp_path / "transformers")))
    with torch.no_grad():
        ours = job.whole(torch.arange(1, 41)[None]).logits[0, -1]
        merged: Any = merged_float(job.whole, tiny.model)
        torch.testing.assert_close(merged(torch.arange(1, 41)[None]).logits[0, -1], ours, rtol=1e-3, atol=1e-3)
        alone = job.model(torch.arange(1, 41)[None]).logits[0, -1]
    assert nmse(ours, expected) < 1e-5 < 1e-2 < nmse(ours, alone)  # the folder's float16 rounds embeddings and norms


def test_an_adapter_that_does_not_fit_its_base_fails_the_receipt(tiny: TinyLm, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    job = apart(tiny, tmp_path, "q4_1")
    assert job.adapter is not None
    shutil.copytree(job.adapter.folder, tmp_path / "other")
    held = load_file(tmp_path / "other" / "adapter_model.safetensors")
    save_file({n.replace("layers.1.", "layers.7."): t for n, t in held.items()}, tmp_path / "other" / "adapter_model.safetensors")
    other = dataclasses.replace(job, adapter=dataclasses.replace(job.adapter, folder=tmp_path / "other"))
    with pytest.raises(ReceiptFailed, match="adapter failed: 16 tensors"):
        TransformersFolder(dtype="float32", generate=0).export(other)
    assert not (tmp_path / "transformers").exists()
