"""The main job on real input: what README promises, measured (minutes), and the same on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import qtrain


@pytest.mark.slow
def test_the_main_job_keeps_its_promises(tmp_path: Path) -> None:
    done = qtrain("+recipe=qat_int4_bert", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    (entry,) = run["exports"]
    receipt = entry["receipt"]
    assert run["status"] == "passed"
    assert receipt["tensors"] == receipt["tensors_bit_exact"] == 40
    assert abs(receipt["metric"]["accuracy"]["runtime"] - run["stages"]["qat"]["accuracy"]) <= 0.002
    assert run["stages"]["qat"]["accuracy"] > 0.78
    assert receipt["float_bytes"] / entry["bytes"] >= 4.5
    assert run["peak_rss_bytes"] <= 3e9


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_recipe_runs_on_a_gpu(precision: str, tiny_options: list[str], tmp_path: Path) -> None:
    options = [o for o in tiny_options if not o.startswith("trainer.precision")]
    done = qtrain(
        "+recipe=qat_int4_bert",
        *options,
        f"trainer.precision={precision}",
        "trainer.accelerator=gpu",
        f"run_dir={tmp_path / 'run'}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "passed"
