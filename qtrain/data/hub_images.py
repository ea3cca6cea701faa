"""Any image classification dataset of the Hugging Face hub, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.hub import LOCAL_IMAGES, choose_splits, from_hub, label_names
from qtrain.images import ImageClassification, ImageRows, Images, Size, from_pillow, gather, progress
from qtrain.registry import register
from qtrain.splits import Splits, listed

if TYPE_CHECKING:
    from torch import Tensor


@register("data", "hub_images")
@dataclass
class HubImages(ImageClassification):
    """An image dataset of the Hugging Face hub (`data.name=owner/name`)."""

    name: str = ""
    """Name on the hub: `owner/name`."""
    config: str | None = None
    """Configuration of the dataset, where it has several."""
    revision: str | None = None
    """Branch, tag or commit; null is the newest."""
    image_column: str | None = None
    """Column of the image; null: the one column that holds images."""
    label_column: str = "label"
    """Column of the label."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to validate on; null: the one called validation, if the test split is another, else a part of the training split."""
    test_split: str | None = None
    """Split to test on; null: the one called test, else a part of the training split."""

    relabel: ClassVar[str] = "data.label_column=NAME"

    def load(self, size: Size | None = None) -> Splits[Images]:
        """Download the dataset, or take it from the cache of `datasets`, and split it.

        Raises:
            OSError: if the hub cannot be reached.
            ValueError: if the dataset, a split or a column does not exist, or the column does not hold images.
        """
        if not self.name:
            raise ValueError("data=hub_images was given no dataset; valid: a name on the hub. Set data.name=owner/name")
        found = from_hub(self.name, self.config, self.revision, LOCAL_IMAGES)
        splits = choose_splits(found, self.name, self.train_split, self.validation_split, self.test_split)
        rows = {key: self._rows(found[split], split, size) for key, split in splits.items()}
        names = label_names(found, self.train_split, self.label_column)
        return self.divide(rows["train"], rows.get("validation"), rows.get("test"), names)

    def _rows(self, table: Any, split: str, size: Size | None) -> ImageRows:
        where = f"the {split} split of {self.name}"
        images = [name for name, kind in table.features.items() if type(kind).__name__ == "Image"]
        column = self.image_column or (images[0] if len(images) == 1 else None)
        if column is None or column not in images:
            asked = f"has no column {column!r} that holds images" if column else f"has {len(images)} columns that hold images"
            raise ValueError(
                f"{where} {asked}; those that do: {listed(images) or 'none'}, of {listed(table.column_names)}. "
                f"Set data.image_column={images[0] if images else 'NAME'}, or data.name=owner/name to another dataset"
            )
        if self.label_column not in table.column_names:
            others = [name for name in table.column_names if name not in images]
            raise ValueError(
                f"{where} has no column {self.label_column!r}; its columns are {listed(table.column_names)}. "
                f"Set data.label_column={others[0] if others else 'NAME'}"
            )
        if not len(table):
            raise ValueError(f"{where} has no rows; a dataset needs at least one per class and split. Set data.{split}_split=NAME")
        notes: list[str] = []
        pixels = gather(where, _decoded(where, table.select_columns([column]), column), size, notes)
        return ImageRows(where, pixels, table[self.label_column][:], notes=notes)


def _decoded(where: str, table: Any, column: str) -> Iterator[tuple[str, Tensor]]:
    """The images, by row.

    Raises:
        ValueError: naming the first that cannot be read.
    """
    for row in progress(range(len(table)), where):
        try:
            image = table[row][column]
            if image is None:
                raise ValueError("it is missing")
            pixels = from_pillow(image)
        except (OSError, SyntaxError, ValueError) as e:  # what Pillow's decoders raise
            raise ValueError(
                f"the image of row {row} of {where} cannot be read: {(str(e).splitlines() or [type(e).__name__])[0]}. "
                "Take the dataset without it: data=image_folder data.train=DIR"
            ) from e
        yield f"row {row}", pixels
