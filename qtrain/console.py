"""The one console that all messages, tables and progress bars go through."""

from __future__ import annotations

from rich.console import Console

console = Console(highlight=False, soft_wrap=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
