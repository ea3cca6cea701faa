"""Every recipe composes, and every recipe runs: on a tiny model and data, to a passed receipt in the real runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from qtrain.config import Config, data_dir, recipe_files, recipe_summary, register_all
from tests.conftest import ROOT, qtrain
from tests.tiny_lm import tiny_language_model

GOLDEN = ROOT / "tests" / "golden" / "config_keys.txt"


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register_all()


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides))
    cfg.logger = None  # names Hydra's output folder, which compose does not have
    return cfg


@pytest.mark.parametrize("recipe", sorted(recipe_files()))
def test_a_recipe_composes_into_dataclasses(recipe: str) -> None:
    config = OmegaConf.to_object(composed(f"+recipe={recipe}"))
    assert isinstance(config, Config)
    assert config.recipe == recipe


@pytest.mark.parametrize("path", sorted(recipe_files().values()), ids=lambda p: p.stem)
def test_a_recipe_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 30
    assert text.startswith("# @package _global_\n")
    assert len(recipe_summary(path)) > 20
    assert f"python -m qtrain +recipe={path.stem}" in text
    assert "launcher" not in text and "sweeper" not in text


@pytest.mark.parametrize("recipe", [r for r in sorted(recipe_files()) if "lora" not in r and "loftq" not in r])
def test_a_recipe_runs_to_a_passed_receipt(recipe: str, tiny_options: list[str], tmp_path: Path) -> None:
    options = tiny(recipe, tiny_options, tmp_path)
    done = qtrain(f"+recipe={recipe}", *options, f"run_dir={tmp_path / 'run'}", *smaller(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "passed" and "error" not in run
    assert run["convert_equals_prepare"]["bit_exact"] is True or recipe.startswith("qat_graph")
    (entry,) = run["exports"]
    receipt = entry["receipt"]
    layers = len(run["quantized"]) - (task_of(recipe) == "language")  # whose head is the embedding's tensor
    assert receipt["passed"] and receipt["tensors"] == receipt["tensors_bit_exact"] >= layers > 10
    assert Path(entry["path"]).exists()
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")
    assert "deployed" in done.stdout
    {"classification": classifies, "language": speaks, "embedding": embeds}[task_of(recipe)](recipe, run)


def task_of(recipe: str) -> str:
    """What the recipe's model is for."""
    return "language" if recipe.endswith("_smollm2") else "embedding" if recipe.endswith("_embeddings") else "classification"


def classifies(recipe: str, run: dict[str, Any]) -> None:
    """The classifier learned, and deploys what it learned."""
    receipt = run["exports"][0]["receipt"]
    pair = receipt["metric"]["accuracy"]
    assert abs(pair["training"] - pair["runtime"]) <= (0.002 if "int4" in recipe else 0.0105)  # one of 96 where activations are rounded
    last = list(run["stages"].values())[-1]
    assert pair["training"] == last["accuracy"]
    assert run["stages"]["float"]["accuracy"] > 0.8  # it learned
    assert last["accuracy"] > run["stages"]["float"]["accuracy"] - 0.1


def speaks(recipe: str, run: dict[str, Any]) -> None:
    """The language model learned, and has the same perplexity in llama.cpp."""
    receipt, stages = run["exports"][0]["receipt"], run["stages"]
    pair = receipt["metric"]["perplexity"]
    assert pair["training"] == pytest.approx(list(stages.values())[-1]["perplexity"], rel=1e-5)
    assert abs(pair["runtime"] / pair["training"] - 1) <= 0.005
    assert stages["float"]["perplexity"] < 200  # of 512 tokens: it learned
    assert receipt["checks"]["tokenization"].startswith("passed") and receipt["checks"]["generation"].startswith("passed")
    assert receipt["tokens_per_s"]["quantized"]["prompt"] > 0 and receipt["float_bytes"] > run["exports"][0]["bytes"]
    if recipe.startswith("qat"):
        assert stages["qat"]["kl"] < stages["ptq"]["kl"]
    folder = Path(run["exports"][0]["path"]).parent
    assert f"FROM ./{Path(run['exports'][0]['path']).name}" in (folder / "Modelfile").read_text()
    assert (folder / "imatrix.gguf").exists() == bool(run["config"]["quantizer"]["imatrix"])
    calibrates = run["config"]["quantizer"]["imatrix"] is True  # which alone reads the calibration text here, whose size is then noted
    assert any(note.startswith("calibration has 32 sequences") for note in run["notes"]) == calibrates


def embeds(recipe: str, run: dict[str, Any]) -> None:
    """The vectors stay where they were, in training and in llama.cpp."""
    pair = run["exports"][0]["receipt"]["metric"]["cosine"]
    assert pair["training"] == pytest.approx(run["stages"]["ptq"]["cosine"], rel=1e-6)
    assert min(pair["training"], pair["runtime"]) > 0.995


def tiny(recipe: str, bert: list[str], folder: Path) -> list[str]:
    """A tiny model and data for a recipe."""
    if recipe.endswith("_cnn"):
        return TINY_CNN
    if task_of(recipe) == "language":
        return [f"model.path={tiny_language_model(folder / 'model')}", *TINY_LM]
    return [o for o in bert if not o.startswith("finetune")] if task_of(recipe) == "embedding" else bert


TINY_LM = [
    *("data.context=64", "data.train_tokens=60000", "data.eval_tokens=1500", "data.calibration_sequences=32", "data.batch_size=8"),
    *("finetune.epochs=1", "finetune.max_steps=80", "finetune.learning_rate=3e-3", "trainer.precision=32-true"),
    *("export.gguf.strings=300", "export.gguf.generate=8"),
]
TINY_CNN = ["data.limit=500", "finetune.epochs=8", "trainer.precision=32-true", "data.calibration_examples=64"]


def smaller(recipe: str) -> list[str]:
    """Shorter training; and the tiny model's rows have 64 values, which a group of 128 does not divide."""
    if recipe in ("qat_int8_cnn", "qat_w4a8_cnn", "qat_graph_cnn"):
        return ["quantizer.fit.epochs=2"]
    if recipe == "qat_q4_0_smollm2":
        return ["quantizer.fit.max_steps=20", "quantizer.fit.learning_rate=3e-4", "data.batch_size=4"]
    return ["quantizer.weight.group_size=32"] if recipe == "qat_w4a8_bert" else []


def test_every_key_of_the_configuration_is_known() -> None:
    """A new knob is a visible diff: run with QTRAIN_UPDATE_GOLDEN=1 to accept it."""
    import os

    lines: list[str] = []
    for recipe in sorted(recipe_files()):
        cfg = composed(f"+recipe={recipe}")
        lines += [f"{recipe}: {key}" for key in sorted(keys(cfg))]
    text = "\n".join(lines) + "\n"
    if os.environ.get("QTRAIN_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def keys(node: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for key in node:
        child = node._get_node(key)
        name = f"{prefix}{key}"
        found += keys(child, f"{name}.") if isinstance(child, DictConfig) and not child._is_none() and len(child) else [name]
    return found


def test_the_most_harmful_layers_stay_in_float_and_the_analysis_says_why(tmp_path: Path) -> None:
    options = ["analyze=true", "analyze_examples=32", "quantizer.keep_float=auto:2", "export.onnx.latency_repeats=0"]
    done = qtrain("+recipe=ptq_static_cnn", *TINY_CNN, *options, "finetune.epochs=2", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    rows = run["analysis"]
    assert len(rows) == 20 and [r["kl"] for r in rows] == sorted((r["kl"] for r in rows), reverse=True)
    assert set(run["kept_float"]) == {rows[0]["name"], rows[1]["name"]} and len(run["quantized"]) == 18
    assert "auto:2 keeps in float" in done.stdout
    assert rows[0]["name"] in (tmp_path / "run" / "report.html").read_text()
