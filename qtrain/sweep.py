"""What a sweep prints: a header per job and, at the end, one sorted table and multirun.csv over all jobs.

Each job leaves its run.json; the table is made from those, so failed jobs are in it with their reason.
"""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.table import Table

from qtrain.console import console
from qtrain.files import write_json

_state: dict[str, Any] = {"failed": False, "folder": None, "sweep": None}


def failed() -> bool:
    """Whether a job of this process failed."""
    return bool(_state["failed"])


def set_folder(folder: Path) -> None:
    """Remember the run that is going on, for the hint after Ctrl-C."""
    _state["folder"] = folder


def resume_hint() -> str:
    """What to type to go on; in a sweep, after the table of the jobs so far."""
    if _state["sweep"] is not None and _state["sweep"].is_dir():
        finish(_state["sweep"])
    return f"Continue with: python -m qtrain resume={_state['folder']}" if _state["folder"] else "No run had begun."


def announce(hydra_config: Any) -> None:
    """Say which job begins."""
    console.rule(f"job {hydra_config.job.num}: {escape(hydra_config.job.override_dirname or '')}")


def record_failure(folder: Path, reason: str) -> None:
    """Note in the job's run.json why it failed; keeps what the run had written."""
    _state["failed"] = True
    path = folder / "run.json"
    try:
        document = json.loads(path.read_text()) if path.exists() else {}
        document.update(status="failed", error=reason)
        write_json(path, document)
    except OSError:
        console.print(f"[red]{escape(str(folder))} cannot be written; the table at the end is all there is about this job[/]")


class SweepTable(Callback):
    """Prints the table when all jobs are done."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Remember the folder, for a table after Ctrl-C."""
        _state["sweep"] = Path(config.hydra.sweep.dir)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Read every job's run.json, print, write multirun.csv; jobs may have run in other processes."""
        _state["failed"] = True  # unless all of this works
        rows = finish(Path(config.hydra.sweep.dir))
        _state["sweep"] = None
        _state["failed"] = any(line["status"] != "passed" for line in rows)


def finish(folder: Path) -> list[dict[str, Any]]:
    """Print the table of a sweep's jobs, write its csv, and return its rows."""
    rows = sorted((row(job) for job in folder.iterdir() if (job / ".hydra").is_dir()), key=order)
    if rows:
        print_table(rows)
        path = folder / "multirun.csv"
        write_csv(path, rows)
        console.print(f"[dim]{path}[/]", soft_wrap=True)
    return rows


def row(job: Path) -> dict[str, Any]:
    """One line of the table, from a job's folder."""
    path = job / "run.json"
    run: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"status": "failed", "error": "no run.json: the job was killed"}
    )
    overrides = [
        str(o) for o in OmegaConf.load(job / ".hydra" / "overrides.yaml") if not str(o).startswith(("+recipe=", "run_dir=", "hydra."))
    ]
    stages = run.get("stages", {})
    best = stages.get("qat") or stages.get("ptq") or {}
    exported = (run.get("exports") or [{}])[0]
    receipt = exported.get("receipt") or {}
    deployed = (receipt.get("metric") or {}).get("accuracy", {})
    latency = (receipt.get("latency_ms") or {}).get("quantized", {})
    validation = run.get("validation") or {}
    return {
        "job": int(job.name) if job.name.isdigit() else job.name,
        "recipe": run.get("recipe", ""),
        "options": " ".join(overrides),
        "status": run.get("status", "failed"),
        "accuracy_float": stages.get("float", {}).get("accuracy"),
        "accuracy_ptq": stages.get("ptq", {}).get("accuracy"),
        "accuracy": best.get("accuracy"),
        "accuracy_deployed": deployed.get("runtime"),
        "accuracy_validation": validation.get("accuracy"),
        "bytes": exported.get("bytes"),
        **{f"latency_ms_{shape}": value for shape, value in latency.items()},
        "error": run.get("error", ""),
    }


def order(line: dict[str, Any]) -> tuple[int, float, float]:
    """Passed jobs first, the most accurate on top, the smaller of two equals first."""
    accuracy = line["accuracy_deployed"] if line["accuracy_deployed"] is not None else line["accuracy"]
    return (line["status"] != "passed", -(accuracy if accuracy is not None else -math.inf), line["bytes"] or math.inf)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The table on the console."""
    columns = [c for c in _columns(rows) if c != "recipe" or len({line["recipe"] for line in rows}) > 1]
    table = Table(title="sweep: accuracies on the test split (choose options by accuracy_validation)", title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold", justify="left" if column in ("recipe", "options", "status", "error") else "right")
    for line in rows:
        table.add_row(*(_cell(line.get(c)) for c in columns), style=None if line["status"] == "passed" else "red")
    console.print(table)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows as csv, under a temporary name first."""
    temporary = path.with_suffix(".csv.tmp")
    try:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, _columns(rows), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(key for line in rows for key in line))
    return [n for n in names if n != "error" and any(line.get(n) is not None for line in rows)] + (
        ["error"] if any(r["error"] for r in rows) else []
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return escape(f"{value:,}" if isinstance(value, int) and value > 9999 else str(value))
