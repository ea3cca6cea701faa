"""Weights that go straight into 4 or 8 bits: the same base to the bit as by way of a float model, and the same merged model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qtrain import direct
from qtrain.adapters.lora import Lora
from qtrain.bnb import is_bnb
from qtrain.lora import attach, base_hash
from qtrain.merging import lora_layers, merged_float
from qtrain.models.causal_lm import CausalLm
from qtrain.module import Module
from qtrain.placement import gathered, is_spread, moved
from qtrain.quantizers.bnb import Bnb
from qtrain.quantizers.rtn import Rtn
from qtrain.record import Record
from qtrain.run import refuse_other_run
from tests.tiny_lm import learn_by_heart, tiny_language_model

IDS = torch.arange(1, 81).reshape(2, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("direct") / "model")


def loaded(folder: Path, tmp_path: Path, scheme: Any, **options: Any) -> tuple[Any, Record]:
    """The base without a float model, and what was recorded."""
    record = Record(tmp_path, "test", 0, {})
    return direct.load(SimpleNamespace(model=CausalLm(str(folder), **options), quantizer=scheme, adapter=Lora()), record), record


def by_way_of_float(folder: Path, scheme: Any, dtype: str = "float32") -> tuple[Any, list[str]]:
    source = CausalLm(str(folder), dtype=dtype)
    model = source.build()
    return scheme.prepare(model, source.always_float(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"type": "fp4", "double_quant": False}, {"type": "int8"}], ids=["nf4", "fp4", "int8"])
def test_the_base_is_the_same_to_the_bit(folder: Path, tmp_path: Path, options: dict[str, Any], dtype: str) -> None:
    expected, kept = by_way_of_float(folder, Bnb(**options), dtype)
    model, record = loaded(folder, tmp_path, Bnb(**options), dtype=dtype)
    assert base_hash(model) == base_hash(expected) and record.data["kept_float"] == kept
    assert [n for n, m in model.named_modules() if is_bnb(m)] == [n for n, m in expected.named_modules() if is_bnb(m)]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected.eval()(IDS).logits)


def test_what_is_to_stay_in_float_does(folder: Path, tmp_path: Path) -> None:
    model, record = loaded(folder, tmp_path, Bnb(keep_float=["*.layers.1.*", "*.up_proj"]))
    swapped = {n for n, m in model.named_modules() if is_bnb(m)}
    assert len(swapped) == 6 and all(".layers.0." in n and not n.endswith("up_proj") for n in swapped)
    assert {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"} <= set(record.data["kept_float"])


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_merge_needs_no_float_model(folder: Path, tmp_path: Path, variant: str) -> None:
    model, _ = loaded(folder, tmp_path, Bnb())
    torch.manual_seed(0)
    attach(model, Lora(rank=4, variant=variant), "language", ["lm_head", "model.embed_tokens"])
    losses = learn_by_heart(model.train(), IDS)
    assert losses[-1] < losses[0] - 0.5
    merged: Any = merged_float(model.eval())
    expected = merged_float(model, CausalLm(str(folder)).build())
    assert base_hash(merged) == base_hash(expected) and not lora_layers(merged) and len(lora_layers(model)) == 14
    assert merged.lm_head.weight is merged.model.embed_tokens.weight  # tied as before
    assert merged.model.norm.weight is not model.model.norm.weight and not hasattr(merged, "is_loaded_in_4bit")
    with torch.no_grad():
        assert torch.equal(merged(IDS).logits, expected(IDS).logits)
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-3)


def test_a_weight_that_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    CausalLm(str(folder)).save(broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj"):
        loaded(broken, tmp_path, Bnb())


def test_layers_that_transformers_would_choose_otherwise_are_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtrain.bnb import settings

    monkeypatch.setattr(Bnb, "settings", lambda self, skip: settings(self, ["lm_head"]))
    with pytest.raises(ValueError, match=r"2 differ, the first model\.layers\.0\.mlp\.up_proj.*baseline=true"):
        loaded(folder, tmp_path, Bnb(keep_float=["*.up_proj"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": Rtn(weight=object())}, "quantizer=rtn.*or baseline=true"),
        ({"adapter": None}, "adapter=null.*adapter=lora"),
        ({"adapter": Lora(init="loftq")}, r"adapter\.init=loftq.*adapter\.init=zero"),
        ({"analyze": True}, "analyze=true.*analyze=false"),
        ({"finetune": SimpleNamespace(epochs=2)}, r"finetune\.epochs=2.*finetune\.epochs=0"),
        ({"model": SimpleNamespace(registered_name="timm")}, "model=timm.*model=causal_lm"),
        ({"baseline": True, "model": CausalLm(device_map="auto")}, r"model\.device_map=auto.*Set baseline=false"),
    ],
)
def test_what_cannot_do_without_a_float_model_is_refused(options: dict[str, Any], message: str) -> None:
    usual = {"baseline": False, "model": CausalLm(), "quantizer": Bnb(), "adapter": Lora(), "analyze": False}
    config = SimpleNamespace(**usual | {"finetune": SimpleNamespace(epochs=0)} | options)
    with pytest.raises(ValueError, match=message):
        direct.check(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "everywhere"}, r"valid: auto, balanced.*model\.device_map=auto"),
        ({"max_memory": {"0": "20GiB"}}, r"model\.device_map is null.*model\.device_map=auto"),
        ({"device_map": "auto", "max_memory": "20GiB"}, r"model\.max_memory is '20GiB'; valid: null, or bytes by device"),
    ],
)
def test_bad_placements_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLm(**options)


def test_too_little_room_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"do not fit onto the devices of model\.device_map=auto.*Raise model\.max_memory"):
        loaded(folder, tmp_path, Bnb(), device_map="auto", max_memory={"cpu": "300KB"})


def test_a_run_goes_on_with_keys_that_json_turns_into_text_and_with_options_that_are_new(tmp_path: Path) -> None:
    now = {"resume": "x", "baseline": False, "model": {"max_memory": {0: "20GiB"}, "device_map": "auto", "path": "m"}, "seed": 0}
    was = {"seed": 0, "model": {"path": "m", "max_memory": {"0": "20GiB"}}}  # of a version without device_map and baseline
    (tmp_path / "run.json").write_text(json.dumps({"config": was}))
    refuse_other_run(tmp_path, now)
    now["model"]["path"] = "other"  # type: ignore[index]
    with pytest.raises(ValueError, match="the recipe has changed since that run was started"):
        refuse_other_run(tmp_path, now)


def test_a_model_that_is_spread_over_devices_stays_where_it_is() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert not is_spread(model) and moved(model, torch.device("cpu")) is model
    assert moved(copy.deepcopy(model), torch.device("meta"))[0].weight.is_meta
    model.hf_device_map = {"0": 0, "1": 1}
    assert is_spread(model) and not moved(model, torch.device("meta"))[0].weight.is_meta
    module = Module(model, None, None)  # type: ignore[arg-type]
    assert not module.to("meta").model[0].weight.is_meta
    assert not is_spread(gathered(model)) and not hasattr(model, "hf_device_map")
    model.hf_device_map = {"": "cpu"}
    assert module.to("meta").model[0].weight.is_meta


def test_an_untied_model_is_checked_for_its_exporter_without_weights(tmp_path: Path) -> None:
    """Head and embedding are two tensors, which cannot be compared where they have no storage."""
    path = tiny_language_model(tmp_path / "untied", tied=False)
    command = [sys.executable, "-m", "qtrain", "+recipe=qlora_smollm2", f"model.path={path}", "baseline=false", "dry_run=true"]
    done = subprocess.run([*command, "data.context=64", f"run_dir={tmp_path / 'run'}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "trainable parameters" in done.stdout, done.stderr + done.stdout


def test_layers_without_an_adapter_are_exported_too(folder: Path, tmp_path: Path) -> None:
    options = ["adapter.target_modules=[q_proj,v_proj]", "adapter.merge=apart", "export=[transformers]", "quantizer@adapter.deploy=null"]
    options += ["data.context=64", "data.train_tokens=3000", "data.eval_tokens=400", "adapter.fit.max_steps=2", "adapter.sample=null"]
    command = [sys.executable, "-m", "qtrain", "+recipe=qlora_smollm2", f"model.path={folder}", "baseline=false", *options]
    done = subprocess.run([*command, "logger=none", f"run_dir={tmp_path / 'run'}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(result["quantized"]) == 14 and not any("sqnr_db" in row for row in result["quantized"])
    assert "4 layers" in result["exports"][0]["receipt"]["checks"]["adapter"] and result["exports"][0]["receipt"]["passed"]


@pytest.mark.parametrize("merge", ["apart", "rounded"])
def test_the_command_line(folder: Path, tmp_path: Path, merge: str) -> None:
    options = ["export=[]", "quantizer@adapter.deploy=null"] if merge == "apart" else ["export.gguf.strings=20", "export.gguf.generate=4"]
    options += ["data.context=64", "data.train_tokens=3000", "data.eval_tokens=400", "adapter.fit.max_steps=2", "adapter.sample=null"]
    command = [sys.executable, "-m", "qtrain", "+recipe=qlora_smollm2", f"model.path={folder}", "baseline=false", f"adapter.merge={merge}"]
    command += ["model.device_map=auto", "model.max_memory={cpu: 4GB}", f"run_dir={tmp_path / 'run'}", "logger=none", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "float" not in result["stages"] and {"ptq", "adapter"} <= result["stages"].keys() and "perplexity" in result["validation"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file() and result["status"] == "passed"
    if merge == "apart":
        assert "nothing was converted" in result["notes"][-1] and not result["exports"]
        return
    receipt = result["exports"][0]["receipt"]
    assert receipt["passed"] and receipt["tensors_bit_exact"] == receipt["tensors"] == 15 and len(result["quantized"]) == 16
