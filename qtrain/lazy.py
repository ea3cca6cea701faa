"""Import heavy packages on first use.

Configuration dataclasses live in the file of the method that reads them, and `--help`, config errors and `--cfg job`
load all of those files. torch, transformers and onnx take seconds to import, so files that register something name them
through this proxy. `torch.nn.Module` as a base class or `@torch.no_grad()` as a decorator would import at load time:
a test fails when one appears in a registered file.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """A module that is imported when its first attribute is read."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.__name__), attribute)


def lazy_import(name: str) -> Any:
    """Return a stand-in for the module ``name`` ("torch", "torch.nn.functional")."""
    return LazyModule(name)
