"""The one console that all messages, tables and progress bars go through."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")

console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


_shown: list[str] = []


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """``items`` with a bar on a terminal; none where ``what`` is empty, and none inside another bar."""
    show = bool(what) and console.is_terminal and not _shown
    if show:
        _shown.append(what)
    try:
        yield from track(list(items), description=what, console=console, transient=True, disable=not show)
    finally:
        if show:
            _shown.remove(what)
