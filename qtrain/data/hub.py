"""Any text classification dataset of the Hugging Face hub, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qtrain.hub import choose_splits, from_hub, label_names
from qtrain.registry import register
from qtrain.splits import Splits
from qtrain.text import Examples, Rows, TextClassification, pick_rows


@register("data", "hub")
@dataclass
class Hub(TextClassification):
    """A dataset of the Hugging Face hub (`data.name=owner/name`)."""

    name: str = ""
    """Name on the hub: `owner/name`."""
    config: str | None = None
    """Configuration of the dataset, where it has several."""
    revision: str | None = None
    """Branch, tag or commit; null is the newest."""
    text_column: str = "text"
    """Column of the text."""
    pair_column: str | None = None
    """Column of the second text, for tasks on pairs of sentences."""
    label_column: str = "label"
    """Column of the label."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to validate on; null: the one called validation, if the test split is another, else a part of the training split."""
    test_split: str | None = None
    """Split to test on; null: the one called test, else a part of the training split."""

    def load(self) -> Splits[Examples]:
        """Download the dataset, or take it from the cache of `datasets`, and split it.

        Raises:
            OSError: if the hub cannot be reached.
            ValueError: if the dataset, a split or a column does not exist.
        """
        if not self.name:
            raise ValueError("data=hub was given no dataset; valid: a name on the hub. Set data.name=owner/name")
        found = from_hub(self.name, self.config, self.revision)
        splits = choose_splits(found, self.name, self.train_split, self.validation_split, self.test_split)
        rows = {key: self._rows(found[split], split) for key, split in splits.items()}
        names = label_names(found, self.train_split, self.label_column)
        return self.assemble(rows["train"], rows.get("validation"), rows.get("test"), names)

    def _rows(self, table: Any, split: str) -> Rows:
        asked = [c for c in (self.text_column, self.pair_column, self.label_column) if c]
        columns = {name: table[name][:] if name in asked else [] for name in table.column_names}
        if not set(asked) <= set(columns):  # then the other text columns are what a message proposes
            columns |= {name: table[:100][name] for name, kind in table.features.items() if getattr(kind, "dtype", "") == "string"}
        return pick_rows(f"the {split} split of {self.name}", columns, self.text_column, self.label_column, self.pair_column)
