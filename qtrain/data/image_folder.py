"""Your own images: one folder per class, whose name is the class (`photos/cat/1.jpg`, `photos/dog/7.png`).

Every file with the suffix of an image must be one: a damaged file is an error that names it, since a run that skips it measures
something else than was asked for. Files of other suffixes are left out and named in the report; names that begin with a dot are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qtrain.images import ImageClassification, ImageRows, Images, Size, from_pillow, gather, progress
from qtrain.registry import register
from qtrain.splits import Splits, listed

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pbm"}
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}


@register("data", "image_folder")
@dataclass
class ImageFolder(ImageClassification):
    """Your own images, one folder per class (`data.train=DIR`)."""

    train: str = ""
    """Folder of training images: one folder per class in it."""
    validation: str | None = None
    """Folder of validation images; null cuts data.validation_fraction from the training images."""
    test: str | None = None
    """Folder of test images; null cuts data.test_fraction from the training images."""

    relabel: ClassVar[str] = "data.train=DIR to a folder with one folder per class"
    own_split: ClassVar[str] = "data=image_folder data.{split}=DIR"

    def load(self, size: Size | None = None) -> Splits[Images]:
        """Read the images and split them.

        Raises:
            FileNotFoundError: if a folder is missing.
            ValueError: if it has no classes, a class has no images, or files are damaged.
        """
        if not self.train:
            raise ValueError("data=image_folder was given no folder; valid: one with a folder of images per class. Set data.train=DIR")
        train = _read("train", self.train, size)
        evaluated = {key: _read(key, name, size) if (name := getattr(self, key)) else None for key in ("validation", "test")}
        return self.divide(train, evaluated["validation"], evaluated["test"])


def _read(key: str, name: str, size: Size | None) -> ImageRows:
    where, root = f"data.{key}={name}", Path(name).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{where} is not a folder (looked for {root.absolute()}). Correct the path: data.{key}=DIR")
    paths = [path.relative_to(root) for path in _walk(root)]
    files = [path for path in paths if path.suffix.lower() in SUFFIXES and len(path.parts) > 1]
    _require_classes(where, key, root, files)
    notes: list[str] = []
    if len(files) < len(paths):
        others = listed(sorted({*paths} - {*files}))
        notes.append(f"{len(paths) - len(files)} files of {where} are not images in a class folder and were left out: {others}")
    pixels = gather(where, _decoded(where, root, files), size, notes)
    return ImageRows(where, pixels, [path.parts[0] for path in files], notes=notes)


def _walk(root: Path) -> Iterator[Path]:
    """Files below ``root`` in the order of their names."""
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _require_classes(where: str, key: str, root: Path, files: list[Path]) -> None:
    classes = [p.name for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if not classes:
        raise ValueError(
            f"{where} has no folders in it; valid: one per class, with images ({root}/cat/1.png). Move the images into folders named after "
            f"their class, or set data.{key}=DIR"
        )
    if {c.lower() for c in classes} <= _SPLITS:
        others = " ".join(f"data.{_split(c)}={root / c}" for c in classes)
        raise ValueError(
            f"the folders in {where} are called {', '.join(classes)}, which are splits, not classes; valid: a folder with one folder per "
            f"class. Set {others}"
        )
    empty = sorted({*classes} - {path.parts[0] for path in files})
    if empty:
        raise ValueError(
            f"{len(empty)} class folders of {where} hold no image ({', '.join(sorted(SUFFIXES))}): {listed(empty)}. Put images into them, "
            "or delete them"
        )


def _split(name: str) -> str:
    return next(split for split in ("train", "test", "validation") if split.startswith(name.lower()[:3]))


def _decoded(where: str, root: Path, files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """The images that can be read, by name.

    Raises:
        ValueError: after the last file, naming those that cannot.
    """
    from PIL import Image, UnidentifiedImageError

    damaged: dict[str, str] = {}
    for path in progress(files, where):
        try:
            with Image.open(root / path) as image:
                pixels = from_pillow(image)
        except UnidentifiedImageError:
            damaged[str(path)] = "it is no image"
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # what Pillow's decoders raise
            damaged[str(path)] = (str(e).splitlines() or [type(e).__name__])[0]
        else:
            yield str(path), pixels
    if damaged:
        name, why = next(iter(damaged.items()))
        raise ValueError(
            f"{len(damaged)} of the {len(files)} images of {where} cannot be read: {listed(damaged)} ({name}: {why}). "
            "Delete or replace them"
        )
