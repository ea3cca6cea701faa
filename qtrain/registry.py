"""One decorator puts a dataclass on the command line.

Grids, quantizers, models, datasets and exporters are dataclasses whose fields are their options and whose methods are
the method. `@register("quantizer", "rtn")` stores the class in Hydra's ConfigStore, so that `quantizer=rtn` selects it,
`--help` lists it and a misspelt key is an error. `load("qtrain.quantizers")` imports every file of a package, which is
why adding a file is all that it takes to add a method. Nothing here may import torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hydra.core.config_store import ConfigStore

T = TypeVar("T", bound=type)

PACKAGES = {
    "grid": "qtrain.grids",
    "quantizer": "qtrain.quantizers",
    "adapter": "qtrain.adapters",
    "model": "qtrain.models",
    "data": "qtrain.data",
    "export": "exporters",
}
"""Where each group's files live."""

LISTS = {"export"}
"""Groups of which a run takes several: each option lives under its own name (`export.onnx.…`)."""


@dataclass(frozen=True)
class Entry:
    """One registered option."""

    group: str
    name: str
    cls: type
    summary: str
    """First line of the class's docstring."""


_ENTRIES: dict[tuple[str, str], Entry] = {}


def register(group: str, name: str) -> Callable[[T], T]:
    """Register a dataclass under ``group`` and ``name`` (`group=name` on the command line).

    Raises:
        ValueError: if the name is taken by another class, or the group is unknown.
    """
    if group not in PACKAGES:
        raise ValueError(f"group {group!r} is unknown; valid groups: {', '.join(PACKAGES)}")

    def decorate(cls: T) -> T:
        taken = _ENTRIES.get((group, name))
        if taken is not None and (taken.cls.__module__, taken.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{group}={name} is registered by {taken.cls.__module__} already; choose another name in {cls.__module__}")
        summary = (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""
        _ENTRIES[group, name] = Entry(group, name, cls, summary)
        package = f"{group}.{name}" if group in LISTS else group
        ConfigStore.instance().store(group=group, name=name, node=cls, package=package, provider=cls.__module__)
        cls.registered_name = name  # type: ignore[attr-defined]
        return cls

    return decorate


def load(package: str) -> None:
    """Import every module of ``package``, so that each registers what it holds."""
    root = importlib.import_module(package)
    for module in pkgutil.iter_modules(root.__path__):
        importlib.import_module(f"{package}.{module.name}")


def load_all() -> None:
    """Import every registered package."""
    for package in PACKAGES.values():
        load(package)


def entries(group: str) -> list[Entry]:
    """All options of ``group``, by name."""
    if group in PACKAGES:
        load(PACKAGES[group])
    return sorted((e for (g, _), e in _ENTRIES.items() if g == group), key=lambda e: e.name)


def get(group: str, name: str) -> type:
    """The class registered under ``group`` and ``name``.

    Raises:
        ValueError: if there is none; the message lists what there is.
    """
    for entry in entries(group):
        if entry.name == name:
            return entry.cls
    raise ValueError(f"{group}={name} does not exist; valid: {', '.join(e.name for e in entries(group))}")
