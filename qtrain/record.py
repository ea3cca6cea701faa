"""run.json: what a run did, written after every stage, so that a failed or killed run tells how far it came."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qtrain.checkpoint import versions
from qtrain.console import console
from qtrain.files import write_json
from qtrain.peak import peak_rss_bytes


class Record:
    """Collects the keys of run.json (see DESIGN: keys are only ever added; units are in the names)."""

    def __init__(self, folder: Path, recipe: str, seed: int, config: dict[str, Any]) -> None:
        self.path = folder / "run.json"
        self.data: dict[str, Any] = {
            "recipe": recipe,
            "seed": seed,
            "status": "failed",
            "error": "stopped before it was done",
            "versions": versions(),
            "config": config,
            "stages": {},
            "quantized": [],
            "kept_float": [],
            "fallbacks": [],
            "size": {},
            "exports": [],
            "notes": [],
            "timing_s": {},
            "peak_rss_bytes": 0,
        }

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, print its name, write run.json when it is done."""
        console.print(f"[bold]{name}[/]")
        started = time.monotonic()
        try:
            yield
        finally:
            self.data["timing_s"][name] = round(self.data["timing_s"].get(name, 0.0) + time.monotonic() - started, 3)
        self.write()

    def fallbacks(self, found: list[dict[str, str]]) -> None:
        """Count and print what went another way than asked (law 4): [{"name", "why"}]; those of one reason on one line."""
        self.data["fallbacks"] += found
        for why in dict.fromkeys(f["why"] for f in found):
            names = [f["name"] for f in found if f["why"] == why]
            shown = names[0] if len(names) == 1 else f"{len(names)} tensors, {names[0]} to {names[-1]}"
            console.print(f"[yellow]fallback[/] {shown}: {why}")

    def note(self, text: str) -> None:
        """Something the user should know; no fallback."""
        self.data["notes"].append(text)
        console.print(f"[dim]{text}[/]")

    def passed(self) -> None:
        """All receipts passed."""
        self.data["status"] = "passed"
        self.data.pop("error", None)
        self.write()

    def failed(self, why: str) -> None:
        """The run ends here; keeps quiet if even this cannot be written, since the reason is on its way to the user."""
        self.data.update(status="failed", error=why)
        with suppress(OSError):
            self.write()

    def write(self) -> None:
        """Write run.json atomically."""
        self.data["peak_rss_bytes"] = peak_rss_bytes()
        write_json(self.path, self.data)
