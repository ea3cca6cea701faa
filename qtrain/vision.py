"""torchvision and timm: imported when a model asks for them, and never in the way of anything else.

torchvision from one index beside torch from another (a CUDA build beside a CPU one, or the other way round) is a common accident:
its compiled operators do not load, and its Python half then stops with `operator torchvision::nms does not exist`. Lightning imports it
through torchmetrics wherever it is installed, so that nothing that trains could be imported either. Classification uses none of those
operators. `mend_torchvision` declares their signatures, without code behind them, which is all that its Python half asks for; one
that is called still raises.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""Operators that torchvision's Python half names when it is imported (its `_meta_registrations.py`)."""
_declared: list[Any] = []
"""torch forgets a declaration when its library object is deleted."""


def mend_torchvision() -> bool:
    """Make torchvision importable where its compiled operators do not load; to be called before Lightning is imported.

    Returns:
        Whether that was necessary: False where torchvision is whole, absent, or imported already.
    """
    spec = importlib.util.find_spec("torchvision") if "torchvision" not in sys.modules else None
    if spec is None or spec.origin is None:
        return False
    torch: Any = importlib.import_module("torch")
    folder = Path(spec.origin).parent
    try:
        for path in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
            torch.ops.load_library(str(path))
            return False
    except (ImportError, OSError) as e:
        log.info("torchvision's compiled operators do not load (%s)", str(e).splitlines()[0])
    missing = [schema for name, schema in SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in missing:
        library.define(schema)
    _declared.append(library)
    return bool(missing)


def import_vision(package: str) -> Any:
    """torchvision or timm.

    Raises:
        ValueError: if it is not installed, or does not fit the installed torch.
    """
    try:
        mend_torchvision()
        return importlib.import_module(package)
    except ImportError as e:
        raise ValueError(
            f"model={package} needs the package {package}, which cannot be imported ({e}). Install it: pip install qtrain[vision], or set "
            "model=cifar_resnet"
        ) from e
    except RuntimeError as e:
        import torch

        raise ValueError(
            f"model={package} needs torchvision, and the one that is installed does not fit torch {torch.__version__}: "
            f"{str(e).splitlines()[0]}. Install the two that belong together, from one index (pip install --force-reinstall torch "
            "torchvision), or set model=cifar_resnet"
        ) from e


def require_name(package: str, name: str, names: Iterable[str]) -> None:
    """Refuse a model that ``package`` does not have.

    Raises:
        ValueError: naming the nearest.
    """
    known = list(names)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise ValueError(
            f"model.name={name!r} is none of the {len(known)} classification models of {package}; the nearest are {', '.join(near)}. "
            f"Set model.name={near[0]}, say"
        )
