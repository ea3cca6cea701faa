"""Handwritten digits that come with scikit-learn: nothing to fetch, and a convolutional network learns them in seconds.

1,797 images of 8 x 8 pixels, one channel, values 0 to 16: the test part of the UCI set "Optical Recognition of Handwritten Digits"
(Alpaydin & Kaynak 1998). They have no test split of their own: one is cut from them (`data.test_fraction`, `data.split_seed`), so
numbers compare with each other and not with published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtrain.images import ImageClassification, ImageRows, Images, Size, fitted
from qtrain.lazy import lazy_import
from qtrain.registry import register
from qtrain.splits import Splits

if TYPE_CHECKING:
    import torch
else:
    torch = lazy_import("torch")


@register("data", "digits")
@dataclass
class Digits(ImageClassification):
    """1,797 real handwritten digits of 8 x 8 pixels, which come with scikit-learn: no download."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment == "crop_flip":
            raise ValueError(
                "data.augment=crop_flip mirrors images, and a mirrored digit is none; it is for photographs. Set data.augment=none"
            )

    def load(self, size: Size | None = None) -> Splits[Images]:
        """The digits, split."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        notes: list[str] = []
        pixels = fitted("data=digits", torch.from_numpy(digits.images.astype("uint8")).unsqueeze(1), size, notes)
        rows = ImageRows("data=digits", pixels, digits.target.tolist(), white=16.0, notes=notes)
        return self.divide(rows, label_names=[str(i) for i in range(10)])
