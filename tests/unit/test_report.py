"""The closing table, the page, and the sweep's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qtrain.files import write_json
from qtrain.report import columns, html, summary
from qtrain.sweep import SweepTable, order, row


def run(**changes: Any) -> dict[str, Any]:
    receipt = {
        "passed": True,
        "tensors": 3,
        "tensors_bit_exact": 3,
        "logits_nmse": 1e-12,
        "logits_max_abs": 1e-5,
        "top1_agreement": 1.0,
        "metric": {"accuracy": {"training": 0.8, "runtime": 0.8}, "loss": {"training": 0.5, "runtime": 0.5}},
        "latency_ms": {"float": {"1x64": 9.0}, "quantized": {"1x64": 8.0}},
        "float_bytes": 90_000_000,
    }
    base = {
        "recipe": "<b>recipe</b>",
        "seed": 0,
        "status": "passed",
        "stages": {"float": {"accuracy": 0.9, "loss": 0.3}, "ptq": {"accuracy": 0.7, "loss": 0.6, "agreement": 0.8, "kl": 0.1}},
        "quantized": [{"name": "a.b", "grid": "int4 g32 absmax", "shape": [4, 64], "sqnr_db": None}],
        "kept_float": ["head"],
        "fallbacks": [{"name": "x", "why": "y < z"}],
        "exports": [{"target": "onnx", "path": "/p/model.onnx", "bytes": 19_000_000, "runtime": "onnxruntime 1", "receipt": receipt}],
        "timing_s": {"float": 1.0},
        "peak_rss_bytes": 10**9,
        "config": {"seed": 0},
        "versions": {"torch": "2"},
    }
    return base | changes


def test_the_table_sets_the_stages_side_by_side() -> None:
    head, rows = summary(run())
    assert head == ["", "float", "PTQ (rounded)", "deployed (onnxruntime 1)"]
    table = {r[0]: r[1:] for r in rows}
    assert table["accuracy"] == ["90.00 %", "70.00 %", "80.00 %"]
    assert table["agreement with float"] == ["", "80.00 %", ""]
    assert table["size"] == ["90.00 MB", "", "19.00 MB"]
    assert table["latency, 1 x 64"] == ["9.00 ms", "", "8.00 ms"]


def test_a_run_without_exports_has_a_table_too() -> None:
    assert [c["title"] for c in columns(run(exports=[]))] == ["float", "PTQ (rounded)"]
    assert "<table>" in html(run(exports=[]))


def test_the_page_escapes_what_it_is_given_and_holds_what_matters() -> None:
    page = html(run())
    assert "<b>recipe" not in page and "&lt;b&gt;recipe" in page
    for part in ("a.b", "int4 g32 absmax", "exact", "head", "y &lt; z", "3 of 3", "1e-12", "seed: 0"):
        assert part in page


def test_a_failed_receipt_without_numbers_can_be_shown() -> None:
    failed = run(status="failed")
    failed["exports"][0]["receipt"] |= {"passed": False, "logits_nmse": None, "logits_max_abs": None, "top1_agreement": None}
    failed["exports"][0]["receipt"]["metric"]["loss"]["runtime"] = None
    assert "not finite" in html(failed)


def make_job(folder: Path, number: int, overrides: list[str], document: dict[str, Any] | None) -> Path:
    job = folder / str(number)
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text(json.dumps(["+recipe=x", *overrides]))
    if document is not None:
        write_json(job / "run.json", document)
    return job


def test_jobs_are_sorted_by_what_is_deployed_and_failed_ones_come_last(tmp_path: Path) -> None:
    worse = run()
    worse["exports"][0]["receipt"]["metric"]["accuracy"]["runtime"] = 0.6
    lines = [
        row(make_job(tmp_path, 0, ["bits=2"], worse)),
        row(make_job(tmp_path, 1, ["bits=9"], {"status": "failed", "error": "bits is 9"})),
        row(make_job(tmp_path, 2, ["bits=4"], run())),
        row(make_job(tmp_path, 3, ["bits=3"], None)),
    ]
    ranked = sorted(lines, key=order)
    assert [r["options"] for r in ranked[:2]] == ["bits=4", "bits=2"]
    assert {r["error"] for r in ranked[2:]} == {"bits is 9", "no run.json: the job was killed"}


def test_the_sweep_writes_all_jobs_to_one_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    make_job(tmp_path, 0, ["bits=4"], run())
    make_job(tmp_path, 1, ["bits=9"], {"status": "failed", "error": "bits is 9"})
    SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    text = (tmp_path / "multirun.csv").read_text()
    assert len(text.splitlines()) == 3 and "latency_ms_1x64" in text and "bits is 9" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "multirun.csv"]


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
