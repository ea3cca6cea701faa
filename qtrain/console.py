"""The one console that all messages, tables and progress bars go through."""

from __future__ import annotations

import os
import sys

from rich.console import Console

console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
