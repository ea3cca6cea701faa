"""Your own files: csv, tsv, jsonl or parquet, one example per row. How they are read is said in `qtrain/tables.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qtrain.registry import register
from qtrain.splits import Splits
from qtrain.tables import read_table
from qtrain.text import Examples, Rows, TextClassification, pick_rows


@register("data", "csv")
@dataclass
class Csv(TextClassification):
    """Your own csv, tsv, jsonl or parquet files with a text and a label column."""

    train: str = ""
    """File of training examples."""
    validation: str | None = None
    """File of validation examples; null cuts data.validation_fraction from the training examples."""
    test: str | None = None
    """File of test examples; null cuts data.test_fraction from the training examples."""
    text_column: str = "text"
    """Column of the text."""
    pair_column: str | None = None
    """Column of the second text, for tasks on pairs of sentences."""
    label_column: str = "label"
    """Column of the label: integers or names."""
    eval_text_column: str | None = None
    """Column of the text in the validation and test files where it has another name than in the training file."""
    delimiter: str | None = None
    """What separates fields; null: comma in .csv, tab in .tsv."""
    quoting: bool | None = None
    """Whether fields may be enclosed in double quotes; null: yes in .csv, no in .tsv."""

    def load(self) -> Splits[Examples]:
        """Read the files and split them.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file cannot be read as its suffix says, or its columns do not fit.
        """
        if not self.train:
            raise ValueError("data=csv was given no training file; valid: a .csv, .tsv, .jsonl or .parquet file. Set data.train=FILE")
        rows = self._rows("train", self.train, self.text_column)
        evaluated = {}
        for key in ("validation", "test"):
            name = getattr(self, key)
            evaluated[key] = self._rows(key, name, self.eval_text_column or self.text_column) if name else None
        return self.assemble(rows, evaluated["validation"], evaluated["test"], notes=_multiline(rows))

    def _rows(self, key: str, name: str, text: str) -> Rows:
        where = f"data.{key}={name}"
        columns = read_table(where, Path(name).expanduser(), self.delimiter, self.quoting)
        if key != "train" and text not in columns and self.eval_text_column is None and len(columns) == 2 + bool(self.pair_column):
            other = next((c for c in columns if c not in (self.label_column, self.pair_column)), text)
            raise ValueError(
                f"{where} has no column {text!r}, which the training file has; its columns are {', '.join(columns)}. "
                f"Set data.eval_text_column={other}"
            )
        return pick_rows(where, columns, text, self.label_column, self.pair_column)


def _multiline(rows: Rows) -> list[str]:
    """A note where texts span lines: legitimate in a quoted csv, and what a stray quotation mark does to a file."""
    count = sum("\n" in text for text in rows.texts)
    if not count:
        return []
    return [f"{count} texts of {rows.where} span several lines; if the file does not quote its fields, set data.quoting=false"]
