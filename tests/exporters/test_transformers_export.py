"""The transformers exporter as a whole: what the folder holds, what its receipt catches, and that nothing is left half-written."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from exporters.base import ExportJob, ReceiptFailed, packed_layers
from exporters.transformers_folder import TransformersFolder
from exporters.transformers_folder.session import ReaderFailed, Session
from qtrain.grids.affine import Affine
from qtrain.grids.ggml import Ggml

from .small_folder import TinyLm, classifier_job, plain

LOAD = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("An import statement", return_tensors="pt")
written = model.generate(**ids, max_new_tokens=4, do_sample=False)
tied = model.lm_head.weight is model.model.embed_tokens.weight
print(json.dumps({"dtype": str(model.dtype), "ids": ids["input_ids"].tolist(), "written": written.tolist(), "tied": tied,
                  "use_cache": model.config.use_cache, "chat": tokenizer.chat_template is not None}))
"""


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> TinyLm:
    """A tiny language model whose head is its embedding."""
    return TinyLm(tmp_path_factory.mktemp("tied") / "m")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
    return found


def test_a_folder_in_float32_is_training_to_the_bit_and_loads_without_qtrain(tied: TinyLm, tmp_path: Path) -> None:
    given = tied.job(tmp_path, weight=Ggml(type="q4_0"), embedding=Ggml(type="q8_0"))
    entry = TransformersFolder(dtype="float32", max_shard_size="2M", generate=8).export(given)
    receipt, folder = entry["receipt"], Path(entry["path"])
    assert receipt["passed"] and receipt["tensors"] == receipt["tensors_bit_exact"] == 16 and receipt["logits_nmse"] < 1e-11
    assert receipt["fallbacks"] == [] and {name: said.split(":")[0] for name, said in receipt["checks"].items()} == dict.fromkeys(
        ("loading", "float weights", "computed in", "tokenizer", "generation"), "passed"
    )
    assert entry["bytes"] == sum(f.stat().st_size for f in folder.iterdir() if f.name != "receipt.json")
    shards = [f.stat().st_size for f in folder.glob("*.safetensors")]
    assert len(shards) > 2 and max(shards) < 2.1e6 and (folder / "model.safetensors.index.json").exists()
    values = stored(folder)
    assert "lm_head.weight" in values  # Q4_0, where the embedding is Q8_0: no longer tied
    for name, layer in packed_layers(given.model).items():
        assert torch.equal(values[f"{name}.weight"], layer.quantized.decode())
    loaded = plain(LOAD, str(folder))
    assert loaded["dtype"] == "torch.float32" and loaded["use_cache"] is True and loaded["chat"] is True and loaded["tied"] is False
    assert loaded["ids"] == [tied.tokenizer("An import statement")["input_ids"]]
    ids = torch.tensor(loaded["ids"])
    written = given.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    assert loaded["written"] == written.tolist()
    about = json.loads((folder / "qtrain.json").read_text())
    assert about["recipe"] == "tiny" and about["layers"]["lm_head"] == {"grid": Ggml(type="q4_0").spec(), "held": "values"}


def test_values_rounded_to_float16_give_codes_back_and_the_receipt_says_so(tied: TinyLm, tmp_path: Path) -> None:
    given = tied.job(tmp_path, weight=Ggml(type="q4_0"), embedding=Ggml(type="q4_0"))
    entry = TransformersFolder(exact=False, generate=8).export(given)
    receipt = entry["receipt"]
    assert receipt["tensors_bit_exact"] == 16 and 0 < receipt["logits_nmse"] < 1e-5
    assert receipt["fallbacks"][0]["name"] == "16 of 16 layers" and "rounded to float16" in receipt["fallbacks"][0]["why"]
    assert receipt["checks"]["float16"].startswith("passed: computed in float16")
    values = stored(Path(entry["path"]))
    assert "lm_head.weight" not in values  # one tensor, as before
    for name, layer in packed_layers(given.model).items():
        if name != "lm_head":
            again = layer.quantized.grid.encode(values[f"{name}.weight"].float())
            assert torch.equal(again.codes, layer.quantized.codes)
            assert all(torch.equal(again.params[p], layer.quantized.params[p]) for p in again.params)
    loaded = plain(LOAD, entry["path"])
    assert loaded["dtype"] == "torch.float16" and loaded["tied"] is True


def test_bfloat16_and_an_untied_head(tmp_path: Path, one_thread: None) -> None:
    lm = TinyLm(tmp_path / "m", tied=False)
    entry = TransformersFolder(dtype="bfloat16", generate=0).export(lm.job(tmp_path, weight=Ggml(type="bf16")))
    assert entry["receipt"]["tensors_bit_exact"] == 14 and entry["receipt"]["checks"]["bfloat16"].startswith("passed")
    values = stored(Path(entry["path"]))
    assert torch.equal(values["lm_head.weight"], lm.model.lm_head.weight.bfloat16())
    assert {str(v.dtype) for v in values.values()} == {"torch.bfloat16"}


@pytest.mark.parametrize(
    ("grid", "dtype", "exact", "message"),
    [
        (Ggml(type="q4_0"), "float16", True, r"float16 does not hold \d+ of its .*dtype=float32, always exact, or .*exact=false"),
        (Ggml(type="q4_0"), "float16", False, None),
        (Ggml(type="q4_0"), "bfloat16", False, r"bfloat16 does not hold \d+ .*float32, always exact\n"),
        (Ggml(type="q4_0"), "float32", True, None),
        (Ggml(type="q8_0"), "float16", False, r"float16 does not hold \d+ .*float32, always exact\n"),
        (Ggml(type="f16"), "float16", True, None),
        (Ggml(type="bf16"), "bfloat16", True, None),
        (Ggml(type="bf16"), "float16", True, "float16 does not hold"),
        (Ggml(type="q4_k"), "float32", True, None),
        (Affine(), "float16", False, r"int4 g32 absmax: float16 does not hold \d+ .*float32, always exact\n"),
        (Affine(), "float32", True, None),
    ],
)
def test_what_a_type_holds(tied: TinyLm, tmp_path: Path, grid: Any, dtype: str, exact: bool, message: str | None) -> None:
    given = tied.job(tmp_path, weight=grid)
    exporter = TransformersFolder(dtype=dtype, exact=exact)
    if message is None:
        exporter.preflight(given.model, "language", given.processor)
        return
    with pytest.raises(ValueError, match=message):
        exporter.preflight(given.model, "language", given.processor)
    with pytest.raises(ValueError, match="float32, always exact"):
        exporter.export(given)
    assert list(tmp_path.iterdir()) == []


def test_a_trial_whose_rows_are_zeros_is_refused_too(tied: TinyLm, tmp_path: Path) -> None:
    given = tied.job(tmp_path, weight=Ggml(type="q4_0"))
    for layer in packed_layers(given.model).values():
        layer.quantized.codes.zero_()
        layer.quantized.params["scale"].zero_()
    assert TransformersFolder().refusals(given.model) == []
    with pytest.raises(ValueError, match="float16 does not hold"):
        TransformersFolder().preflight(given.model, "language", given.processor)


class Damaged(TransformersFolder):
    """Changes one bit of a tensor behind the exporter's back."""

    tensor = "model.layers.1.mlp.up_proj.weight"

    def write(self, job: ExportJob, folder: Path) -> Any:
        artefact = super().write(job, folder)
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        header = int.from_bytes(data[:8], "little")
        begin, _ = json.loads(data[8 : 8 + header])[self.tensor]["data_offsets"]
        data[8 + header + begin + 20] ^= 0x01
        path.write_bytes(data)
        return artefact


class DamagedFloat(Damaged):
    """In a weight without codes."""

    tensor = "model.norm.weight"


class Incomplete(TransformersFolder):
    """Loses a tensor."""

    def write(self, job: ExportJob, folder: Path) -> Any:
        from exporters.transformers_folder import contents

        everything = contents.entries
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(contents, "entries", lambda *given: everything(*given)[:-1])
            return super().write(job, folder)


class Broken(TransformersFolder):
    """Cuts the weights short."""

    def write(self, job: ExportJob, folder: Path) -> Any:
        artefact = super().write(job, folder)
        os.truncate(folder / "model.safetensors", 50_000)
        return artefact


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Damaged, "tensor model.layers.1.mlp.up_proj decodes differently in 1 of"),
        (DamagedFloat, "float weights failed: model.norm.weight differs in 1 of 256 values"),
        (Incomplete, "loading failed: 1 tensors are missing in the folder, the first model.norm.weight"),
        (Broken, "transformers says: SafetensorError"),
    ],
)
def test_a_fault_fails_the_receipt_and_leaves_nothing(tied: TinyLm, tmp_path: Path, fault: type, message: str) -> None:
    with pytest.raises(ReceiptFailed, match=message) as failure:
        fault(dtype="float32", generate=0).export(tied.job(tmp_path, weight=Ggml(type="q4_0")))
    assert failure.value.entry["receipt"]["passed"] is False
    assert list(tmp_path.iterdir()) == []


class Interrupted(TransformersFolder):
    """Ctrl-C while the receipt is made."""

    def compare(self, *_: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_export_keeps_the_one_before_and_ends_its_process(tied: TinyLm, tmp_path: Path) -> None:
    given = tied.job(tmp_path, weight=Ggml(type="f16"))
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "before").touch()
    exporter = Interrupted(generate=0)
    started = []
    original = exporter.session
    exporter.session = lambda path: started.append(original(path)) or started[0]  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(KeyboardInterrupt):
        exporter.export(given)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["transformers", "transformers/before"]
    assert started[0]._process.returncode == -signal.SIGKILL


def test_a_process_that_is_killed_is_an_error_that_says_so(tied: TinyLm, tmp_path: Path) -> None:
    tied.model.config.get_text_config()
    tied.source.save(tmp_path / "m")
    with Session(tmp_path / "m", "AutoModelForCausalLM") as session:
        assert session.value("tokenize", texts=["An import"])["ids"] == [tied.tokenizer("An import")["input_ids"]]
        with pytest.raises(ReaderFailed, match="AttributeError"):
            session.value("tensor", name="model.nothing")
        session._process.kill()
        with pytest.raises(ReaderFailed, match="ended with signal 9, as when memory runs out"):
            session.value("names")


def test_weights_that_the_type_cannot_hold_are_named(tied: TinyLm, tmp_path: Path) -> None:
    given = tied.job(tmp_path, weight=Ggml(type="f16"))
    norm = given.model.model.norm.weight  # type: ignore[union-attr]
    with torch.no_grad():
        norm[3] = 1e5  # type: ignore[operator, index]
    with pytest.raises(ValueError, match=r"model\.norm\.weight reaches 1e\+05, and float16 ends at 6\.55e\+04\. Set export\.transformers"):
        TransformersFolder().export(given)
    with torch.no_grad():
        norm[3] = torch.nan  # type: ignore[operator, index]
    with pytest.raises(ValueError, match=r"model\.norm\.weight has 1 values that are not finite"):
        TransformersFolder().export(given)
    assert list(tmp_path.iterdir()) == []


def test_what_plain_transformers_would_compute_differently_is_refused(tied: TinyLm, tmp_path: Path) -> None:
    given = tied.job(tmp_path, weight=Affine(), activation=Affine(bits=8, granularity="token"))
    with pytest.raises(ValueError, match=r"activation_fake \(int8 per-token absmax\): transformers leaves activations in float"):
        TransformersFolder(dtype="float32").preflight(given.model, "language", given.processor)
    given = tied.job(tmp_path, weight=Affine())
    next(iter(packed_layers(given.model).values())).inverse_smoothing = torch.ones(256)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"q_proj: its input channels are scaled first.*Set quantizer\.smoothquant=null"):
        TransformersFolder(dtype="float32").preflight(given.model, "language", given.processor)
    with pytest.raises(ValueError, match="Sequential is not a model of transformers'"):
        TransformersFolder().preflight(torch.nn.Sequential(), "classification", None)


def test_a_classifier(tiny_bert: Path, tmp_path: Path, one_thread: None) -> None:
    sentences = ["the good film", "a dull plot with this story", "its cast was superb and witty", "boring", "one of in who that"] * 3
    given = classifier_job(tiny_bert, tmp_path, sentences, weight=Affine(), embedding=Affine(bits=8, granularity="channel"))
    entry = TransformersFolder(dtype="float32").export(given)
    assert entry["receipt"]["tensors_bit_exact"] == 16 and entry["receipt"]["logits_nmse"] < 1e-11
    assert entry["receipt"]["metric"].keys() == {"accuracy", "loss"}
    script = """
classify = transformers.pipeline("text-classification", sys.argv[1], top_k=None)
print(json.dumps(classify("the good film")))
"""
    (rows,) = plain(script, entry["path"])
    found = {row["label"]: row["score"] for row in rows}
    expected = given.training_logits[0].softmax(-1).tolist()
    assert found == pytest.approx(dict(zip(["bad", "fair", "good"], expected, strict=True)), abs=1e-5)


@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("max_shard_size", "many"), ("max_shard_size", "0"), ("generate", -1)])
def test_bad_options_say_what_to_type(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"export\.transformers\.{option} is .*Set export\.transformers\.{option}="):
        TransformersFolder(**{option: value})
