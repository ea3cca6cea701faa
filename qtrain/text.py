"""Text classification data: what an example is, which columns of a table it comes from, and the options every text dataset shares.

How rows become three clean splits is in `qtrain/splits.py`; what a dataset file adds is how its rows are read: see `qtrain/data/`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtrain.images import ImageSpec
from qtrain.splits import Classification, Part, Splits, Unnumbered, listed

if TYPE_CHECKING:
    from qtrain.datamodule import TextDataModule

_LOOK = 100
"""Rows that are looked at to propose a column."""


@dataclass
class Examples(Part):
    """Texts (or pairs of texts) and the number of the class of each."""

    texts: list[str]
    labels: list[int]
    pairs: list[str] | None = None
    """Second sentences, where the task has them."""

    def take(self, indices: Iterable[int]) -> Examples:
        """The examples at ``indices``, in that order."""
        chosen = list(indices)
        pairs = None if self.pairs is None else [self.pairs[i] for i in chosen]
        return Examples([self.texts[i] for i in chosen], [self.labels[i] for i in chosen], pairs)

    def keys(self) -> list[tuple[str, str]]:
        """What makes two examples the same input."""
        return list(zip(self.texts, self.pairs or [""] * len(self), strict=True))


@dataclass
class Rows(Unnumbered[Examples]):
    """One split as it was read: texts are checked, labels are still what the file says."""

    where: str
    """How messages name it: `data.train=reviews.csv`."""
    texts: list[str]
    labels: list[Any]
    pairs: list[str] | None = None

    def numbered(self, labels: list[int]) -> Examples:
        """The same texts with numbers for labels."""
        return Examples(self.texts, labels, self.pairs)


@dataclass
class TextClassification(Classification):
    """Options that all text classification datasets share."""

    max_length: int = 128
    """Tokens per example; longer texts are cut, and counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("max_length")

    @abstractmethod
    def load(self) -> Splits[Examples]:
        """Read the dataset and split it.

        Raises:
            ValueError: if the rows cannot be used for classification.
            OSError: if they cannot be read.
        """

    def build(self, processor: Any, seed: int) -> TextDataModule:
        """Read, split and tokenize.

        Args:
            processor: a transformers tokenizer.
            seed: seed of the training order.

        Raises:
            ValueError: if the model reads images.
        """
        from qtrain.datamodule import TextDataModule

        if isinstance(processor, ImageSpec):
            raise ValueError(
                f"data={self.registered_name} gives texts, and the model reads images. Set data=digits (or npz, image_folder, hub_images), "
                "or model=sequence_classification"
            )
        return TextDataModule(
            self.load(),
            processor,
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
            max_length=self.max_length,
            calibration_examples=self.calibration_examples,
            seed=seed,
        )


def pick_rows(where: str, columns: dict[str, list[Any]], text: str, label: str, pair: str | None = None) -> Rows:
    """Choose the columns of a table and check them.

    Args:
        where: how messages name the table.
        columns: values by column name.
        text, label, pair: column names.

    Raises:
        ValueError: if a column is missing, the table is empty, or the text column does not hold text.
    """
    asked = {"text_column": text, "label_column": label} | ({"pair_column": pair} if pair else {})
    for key, name in asked.items():
        if name not in columns:
            raise ValueError(f"{where} has no column {name!r}; its columns are {listed(columns)}. Set data.{key}={_guess(key, columns)}")
    if not columns[text]:
        raise ValueError(f"{where} has no rows; a dataset needs at least one per class and split. Name another file or split.")
    for key in ("text_column", "pair_column"):
        if key in asked:
            _require_text(where, key, asked[key], columns)
    return Rows(where, columns[text], columns[label], columns[pair] if pair else None)


def _require_text(where: str, key: str, name: str, columns: dict[str, list[Any]]) -> None:
    values = columns[name]
    for row, value in enumerate(values):
        if not isinstance(value, str):
            what = "numbers" if isinstance(value, (int, float)) else type(value).__name__
            raise ValueError(
                f"column {name!r} of {where} holds {what}, not text: row {row} is {value!r}. The columns are {listed(columns)}. "
                f"Set data.{key}={_guess(key, columns)}"
            )
    if all(_is_number(value) for value in values):
        raise ValueError(
            f"column {name!r} of {where} holds numbers only, the first is {values[0]!r}; a {key} holds sentences. "
            f"The columns are {listed(columns)}. Set data.{key}={_guess(key, columns)}"
        )


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _guess(key: str, columns: dict[str, list[Any]]) -> str:
    """A column to propose for ``key``: the one with the shortest values for a label, with the longest that are text for a text."""
    if key == "label_column":
        sizes = {name: sum(len(str(v)) for v in values[:_LOOK]) for name, values in columns.items() if values}
        return "label" if "label" in columns else min(sizes, key=lambda name: sizes[name], default="NAME")
    texts = {name: [v for v in values[:_LOOK] if isinstance(v, str) and not _is_number(v)] for name, values in columns.items()}
    return max((name for name in texts if texts[name]), key=lambda name: sum(map(len, texts[name])), default="NAME")
