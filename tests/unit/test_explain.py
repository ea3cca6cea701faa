"""Exceptions become one message each."""

from __future__ import annotations

import errno

import pytest
from rich.markup import render

from qtrain.explain import explain


def plain(error: BaseException) -> str:
    return render(explain(error)).plain


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/full/x"), ["disk is full", "/full/x", "run_dir="]),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), ["/root/x", "run_dir="]),
        (MemoryError(), ["out of memory", "data.batch_size"]),
        (ValueError("bits is 9 [red]"), ["bits is 9 [red]"]),
        (RuntimeError("odd"), ["RuntimeError: odd"]),
        (KeyError("x"), ["KeyError"]),
    ],
)
def test_each_error_says_what_to_do(error: BaseException, parts: list[str]) -> None:
    text = plain(error)
    assert all(part in text for part in parts), text
