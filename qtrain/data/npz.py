"""Images as arrays in .npz files, which is how many small image sets travel (MNIST, CIFAR subsets, MedMNIST).

One file may hold all splits (`data.path`), or each split has its own (`data.train`, `data.test`, `data.validation`). Arrays are found by
their usual names (x_train, train_images, ...) or named by option. Nothing is unpickled: an array of Python objects is refused.

Images are [N, H, W], [N, H, W, C] or [N, C, H, W]; which of the latter two is told by where 1, 3 or 4 stands, and asked for where it
stands in both places. Integers from 0 to 255 are kept as uint8 and 255 is full brightness; floats are taken as they are.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.images import ImageClassification, ImageRows, Images, Size, fitted
from qtrain.lazy import lazy_import
from qtrain.registry import register
from qtrain.splits import Splits, listed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    np, torch = lazy_import("numpy"), lazy_import("torch")

WORDS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
IMAGES = ("x", "images", "X", "data")
LABELS = ("y", "labels", "Y", "targets", "target", "label")
LAYOUTS = ("auto", "nhwc", "nchw")
_COLOURS = (1, 3, 4)
_BRIGHT = 2.0
"""Floats above this, none of them negative, are probably 0 to 255."""


@register("data", "npz")
@dataclass
class Npz(ImageClassification):
    """Your own images and labels as arrays in .npz files (`data.path=FILE`, or one file per split)."""

    path: str = ""
    """File with the arrays of all splits."""
    train: str | None = None
    """File of the training split, instead of data.path."""
    validation: str | None = None
    """File of the validation split; null: the arrays of data.path, else a part of the training split."""
    test: str | None = None
    """File of the test split; null: the arrays of data.path, else a part of the training split."""
    train_images: str | None = None
    """Name of the array; null: x_train, train_images or another usual name."""
    train_labels: str | None = None
    """Name of the array; null: y_train, train_labels, ..."""
    validation_images: str | None = None
    """Name of the array; null: x_val, val_images, ..., where the file has it."""
    validation_labels: str | None = None
    """Name of the array; null: y_val, val_labels, ..."""
    test_images: str | None = None
    """Name of the array; null: x_test, test_images, ..., where the file has it."""
    test_labels: str | None = None
    """Name of the array; null: y_test, test_labels, ..."""
    layout: str = "auto"
    """Order of the axes of images: nhwc (channels last), nchw, or auto."""
    white: float | None = None
    """Value of full brightness, which becomes 1; null: 255 for integers, 1 for floats."""
    label_names: list[str] | None = None
    """Names of classes 0, 1, ...; null: the labels that the training split has."""

    relabel: ClassVar[str] = "data.train_labels=NAME"
    own_split: ClassVar[str] = "data=npz data.{split}=FILE"
    other_split: ClassVar[str] = "data.test=FILE"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in LAYOUTS:
            raise ValueError(f"data.layout is {self.layout!r}; valid: {', '.join(LAYOUTS)}. Set data.layout=auto")
        if self.white is not None and not self.white > 0:
            raise ValueError(f"data.white is {self.white}; it must be above 0. Set data.white=255, say.")
        if self.path and self.train:
            raise ValueError(
                f"data.path={self.path} and data.train={self.train} both give training images; valid: one of them. Set data.path=''"
            )

    def load(self, size: Size | None = None) -> Splits[Images]:
        """Read the arrays and split them.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is no .npz, or its arrays are not images and labels.
        """
        if not self.path and not self.train:
            raise ValueError("data=npz was given no file; valid: a .npz file with arrays x_train and y_train. Set data.path=FILE")
        train = self._rows("train", size)
        assert train is not None
        return self.divide(train, self._rows("validation", size), self._rows("test", size), self.label_names)

    def _rows(self, split: str, size: Size | None) -> ImageRows | None:
        """One split; None where it has no file of its own and `data.path` does not have its arrays."""
        own = getattr(self, split)
        key, name = (split, own) if own else ("path", self.path)
        if not name:
            return None
        where = f"data.{key}={name}"
        with _opened(where, Path(name).expanduser()) as file:
            found = [self._find(split, what, file, plain=bool(own) or split == "train") for what in ("images", "labels")]
            if found == [None, None] and split != "train" and not own:
                return None
            for what, array in zip(("images", "labels"), found, strict=True):
                if array is None:
                    raise ValueError(
                        f"{where} has no array with the {what} of the {split} split under a usual name; its arrays are "
                        f"{listed(file.files)}. Set data.{split}_{what}={_guess(what, file.files)}"
                    )
            images, labels = found[0] or "", found[1] or ""
            notes: list[str] = []
            pixels, white = self._pixels(where, images, file[images], notes)
            classes = _labels(where, split, labels, file[labels], len(pixels))
        return ImageRows(where, fitted(where, pixels, size, notes), classes, white, notes)

    def _find(self, split: str, what: str, file: Any, plain: bool) -> str | None:
        """Name of an array in the file; None if it is not there."""
        asked = getattr(self, f"{split}_{what}")
        if asked is not None:
            if asked not in file.files:
                raise ValueError(
                    f"the file of the {split} split has no array {asked!r}; its arrays are {listed(file.files)}. "
                    f"Set data.{split}_{what}={_guess(what, file.files)}"
                )
            return asked
        stems = IMAGES if what == "images" else LABELS
        usual = [pattern.format(stem, word) for word in WORDS[split] for stem in stems for pattern in ("{0}_{1}", "{1}_{0}")]
        if plain:
            usual += [*stems, "arr_0" if what == "images" else "arr_1"]
        return next((name for name in usual if name in file.files), None)

    def _pixels(self, where: str, name: str, array: np.ndarray[Any, Any], notes: list[str]) -> tuple[Tensor, float]:
        """uint8 or float32 [N, C, H, W], and the value of full brightness."""
        what = f"the array {name} of {where}"
        array = self._channels_first(what, array)
        if array.dtype.kind == "b":
            return torch.from_numpy(np.ascontiguousarray(array.astype(np.uint8))), self.white or 1.0
        if array.dtype.kind in "iu":
            low, high = int(array.min()), int(array.max())
            if low >= 0 and high <= 255:
                return torch.from_numpy(np.ascontiguousarray(array.astype(np.uint8))), self.white or 255.0
            if self.white is None:
                raise ValueError(
                    f"{what} has integers from {low} to {high}, and full brightness is 255 unless you say otherwise. "
                    f"Set data.white={high}, say"
                )
        elif array.dtype.kind != "f":
            raise ValueError(
                f"{what} has values of type {array.dtype}; images are integers from 0 to 255 or floats. Set data.train_images=NAME"
            )
        values = np.ascontiguousarray(array.astype(np.float32))
        if not np.isfinite(values).all():
            first = int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(1)))
            raise ValueError(f"{what} holds NaN or infinite values, first in image {first}. Correct or remove these images")
        if self.white is None and values.min() >= 0 and values.max() > _BRIGHT:
            notes.append(f"the floats of {what} reach {values.max():g} and are taken as they are; data.white=255 would divide them")
        return torch.from_numpy(values), self.white or 1.0

    def _channels_first(self, what: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        shape = list(array.shape)
        if array.ndim not in (3, 4) or 0 in shape[1:]:
            raise ValueError(
                f"{what} has shape {shape}; images are [N, H, W], [N, H, W, C] or [N, C, H, W]. Reshape the array, or set "
                "data.train_images=NAME (data.test_images=NAME) to another"
            )
        if not shape[0]:
            raise ValueError(f"{what} has no images; a split needs at least one per class. Set data.path=FILE to another file")
        if array.ndim == 3:
            return array[:, None]
        last, first = shape[3] in _COLOURS, shape[1] in _COLOURS
        if self.layout == "auto" and last == first:
            given = "could be channels first or last" if last else "has neither 1, 3 nor 4 channels, first or last"
            raise ValueError(f"{what} has shape {shape}, which {given}. Set data.layout=nhwc (channels last) or data.layout=nchw")
        channels_last = self.layout == "nhwc" or (self.layout == "auto" and last)
        return array.transpose(0, 3, 1, 2) if channels_last else array


def _labels(where: str, split: str, name: str, array: np.ndarray[Any, Any], images: int) -> list[Any]:
    what = f"the array {name} of {where}"
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(
            f"{what} has shape {list(array.shape)}; labels are [N], one per image (of one-hot rows take the arg-max). "
            f"Set data.{split}_labels=NAME to another"
        )
    if len(array) != images:
        raise ValueError(f"{what} has {len(array)} labels for {images} images; valid: one each. Set data.{split}_labels=NAME to another")
    return [label.decode() if isinstance(label, bytes) else label for label in array.tolist()]


@contextmanager
def _opened(where: str, path: Path) -> Iterator[Any]:
    """The file, and what a failure to read it means."""
    key = where.split("=")[0]
    if not path.is_file():
        raise FileNotFoundError(f"{where} is not a file (looked for {path.absolute()}). Correct the path: {key}=FILE")
    try:
        file: Any = np.load(path)
        if not hasattr(file, "files"):
            raise ValueError(f"{where} is one array, not a .npz file of several. Save them with numpy.savez(FILE, x_train=…, y_train=…)")
        with file:
            yield file
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as e:
        raise ValueError(f"{where} cannot be read as .npz ({e}): it is cut short or damaged. Copy it again, or set {key}=FILE") from e
    except ValueError as e:
        if "allow_pickle" not in str(e):
            raise
        raise ValueError(
            f"{where} is no .npz file of plain arrays: reading it would unpickle Python objects, which runs code that it holds. Save "
            "integers or floats with numpy.savez(FILE, x_train=…, y_train=…)"
        ) from e


def _guess(what: str, names: list[str]) -> str:
    """An array to propose."""
    near = [n for n in names if any(stem.lower() in n.lower() for stem in (("image", "x") if what == "images" else ("label", "y")))]
    return (near or names or ["NAME"])[0]
