"""Every recipe composes, and every recipe runs: on a tiny model and data, to a passed receipt in the real runtime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from qtrain.config import Config, data_dir, recipe_files, recipe_summary, register_all
from tests.conftest import ROOT, qtrain

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


@pytest.mark.parametrize("recipe", sorted(recipe_files()))
def test_a_recipe_runs_to_a_passed_receipt(recipe: str, tiny_options: list[str], tmp_path: Path) -> None:
    options = TINY_CNN if recipe.endswith("_cnn") else tiny_options
    done = qtrain(f"+recipe={recipe}", *options, f"run_dir={tmp_path / 'run'}", *smaller(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "passed" and "error" not in run
    assert run["convert_equals_prepare"]["bit_exact"] is True or recipe.startswith("qat_graph")
    (entry,) = run["exports"]
    receipt = entry["receipt"]
    assert receipt["passed"] and receipt["tensors"] == receipt["tensors_bit_exact"] >= len(run["quantized"]) > 10
    assert Path(entry["path"]).exists()
    pair = receipt["metric"]["accuracy"]
    assert abs(pair["training"] - pair["runtime"]) <= (0.002 if "int4" in recipe else 0.0105)  # one of 96 where activations are rounded
    last = list(run["stages"].values())[-1]
    assert pair["training"] == last["accuracy"]
    assert run["stages"]["float"]["accuracy"] > 0.8  # it learned
    assert last["accuracy"] > run["stages"]["float"]["accuracy"] - 0.1
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")
    assert "deployed" in done.stdout


TINY_CNN = ["data.limit=500", "finetune.epochs=8", "trainer.precision=32-true", "data.calibration_examples=64"]


def smaller(recipe: str) -> list[str]:
    """Shorter training; and the tiny model's rows have 64 values, which a group of 128 does not divide."""
    if recipe in ("qat_int8_cnn", "qat_w4a8_cnn", "qat_graph_cnn"):
        return ["quantizer.fit.epochs=2"]
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
