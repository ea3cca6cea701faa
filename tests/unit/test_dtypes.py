"""16-bit weights on a grid: what they lose is said in the record, whoever made them so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from qtrain.grids.ggml import TYPES, Ggml
from qtrain.layers import fake_layers
from qtrain.prepare import lost_by_dtype, prepare
from tests.conftest import qtrain
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_lm import tiny_language_model

SMALL = ["data.context=32", "data.train_tokens=2000", "data.eval_tokens=200", "data.calibration_sequences=2", "logger=none"]
SMALL += ["export.gguf.strings=20", "export.gguf.generate=2", "export.gguf.compare_float=false"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_what_is_said_is_what_happens(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, grid = nn.Sequential(nn.Linear(1024, 64)), Ggml(kind)
    prepare(model, {"0": model[0]}, grid)
    model.to(dtype)
    (_, layer), *_ = fake_layers(model)
    values = layer.on_grid(layer.weight, None)[0].detach()
    assert values.dtype == dtype
    assert bool(lost_by_dtype(model)) == (not torch.equal(values.float(), layer.encode("0")[0].decode()))
    for lost in lost_by_dtype(model):
        assert lost["name"] == "0" and str(dtype).removeprefix("torch.") in lost["why"] and "Set model.dtype=float32" in lost["why"]


def record(run: Path, *options: str) -> dict[str, Any]:
    done = qtrain("+recipe=qat_q4_0_smollm2", *SMALL, *options, f"run_dir={run}", cwd=run.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def test_a_trainer_that_leaves_16_bit_weights_behind_is_recorded(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "m", initializer_range=0.08)
    steps = ["quantizer.fit.max_steps=2", f"model.path={folder}"]
    run = record(tmp_path / "run", *steps, "trainer.precision=bf16-true")
    lost = [f for f in run["fallbacks"] if "bfloat16" in f["why"]]
    assert {f["name"] for f in lost} == {q["name"] for q in run["quantized"]} and len(lost) == len(run["quantized"])
    (why,) = {f["why"] for f in lost if f["name"] == "model.layers.0.mlp.up_proj"}
    assert "bfloat16 does not hold what the scales of q4_0 can be read from: save float32" in why and "trainer.precision=32-true" in why
    assert not record(tmp_path / "mixed", *steps, "trainer.precision=bf16-mixed")["fallbacks"]  # weights stay float32


def test_a_file_on_a_grid_that_is_read_into_16_bits_is_recorded(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "m", initializer_range=0.08)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    write_tiny_gguf(tmp_path / "m.gguf", model, tokenizer, types=("Q4_0",))
    run = record(tmp_path / "run", "quantizer.fit.max_steps=0", f"model.path={tmp_path / 'm.gguf'}", "model.dtype=bfloat16")
    of_file = [f for f in run["fallbacks"] if f["why"].startswith("the file has it on q4_0, whose values model.dtype=bfloat16 rounds")]
    assert "blk.1.ffn_up.weight" in {f["name"] for f in of_file}
    assert {f["name"] for f in run["fallbacks"]} >= {q["name"] for q in run["quantized"]}
