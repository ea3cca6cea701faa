"""Sizes as people write them, read without importing torch: the configuration is checked before anything else."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def size_bytes(text: str | None) -> int | None:
    """Bytes of `5G`, `5GB`, `500M`, `1000000`; None for None.

    Raises:
        ValueError: if it is none of these.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", str(text).strip().upper())
    if found is None or float(found[1]) * _UNITS[found[2]] < 1:
        raise ValueError(
            f"export.transformers.max_shard_size is {text!r}; valid: a size such as 5G or 500M, or null for one file. "
            "Set export.transformers.max_shard_size=5G, say"
        )
    return int(float(found[1]) * _UNITS[found[2]])
