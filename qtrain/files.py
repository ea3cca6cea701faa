"""Files are written whole or not at all: under a temporary name beside the final one, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write json under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(document, file, indent=1)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def refuse_used(folder: Path) -> None:
    """A run never writes over another one.

    Raises:
        ValueError: if ``folder`` holds a run.
    """
    if (folder / "run.json").exists() or (folder / "checkpoints").exists():
        raise ValueError(f"run_dir={folder} holds a run already. Continue it with resume={folder}, or give another run_dir")
