"""Your own files: csv, tsv, jsonl or parquet, one example per row.

csv and tsv are read with the standard library, every value as text. A parser that infers types turns the review "None" into a
missing value, a class "1" into 1.0 where a chunk of the file has a gap, and a row with a field too many into an index column; here a
row with another number of fields than the header is an error with its line number. jsonl and parquet have types, and are read through
`datasets` in a temporary folder, so that no copy stays behind.

Quotes: a csv field may be enclosed in double quotes; a tsv field, as GLUE writes it, is never quoted, and a quotation mark is just a
character (read otherwise, one review that opens with a quotation mark swallows all rows up to the next such). `data.quoting` says
otherwise.
"""

from __future__ import annotations

import csv
import glob
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.registry import register
from qtrain.splits import Splits
from qtrain.text import Examples, Rows, TextClassification, pick_rows

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TYPED = (".jsonl", ".parquet")


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
        columns = self._columns(where, Path(name).expanduser())
        if key != "train" and text not in columns and self.eval_text_column is None and len(columns) == 2 + bool(self.pair_column):
            other = next((c for c in columns if c not in (self.label_column, self.pair_column)), text)
            raise ValueError(
                f"{where} has no column {text!r}, which the training file has; its columns are {', '.join(columns)}. "
                f"Set data.eval_text_column={other}"
            )
        return pick_rows(where, columns, text, self.label_column, self.pair_column)

    def _columns(self, where: str, path: Path) -> dict[str, list[Any]]:
        suffix = path.suffix.lower()
        if suffix not in (*DELIMITERS, *TYPED):
            raise ValueError(f"{where} ends in {suffix or 'no suffix'!r}; valid: .csv, .tsv, .jsonl, .parquet. Rename or convert the file")
        if not path.is_file():
            raise FileNotFoundError(f"{where} is not a file (looked for {path.absolute()}). Correct the path: {where.split('=')[0]}=FILE")
        if suffix in TYPED:
            return _read_typed(where, path)
        return self._read_delimited(where, path)

    def _read_delimited(self, where: str, path: Path) -> dict[str, list[Any]]:
        suffix = path.suffix.lower()
        quoted = self.quoting if self.quoting is not None else suffix == ".csv"
        delimiter = self.delimiter or DELIMITERS[suffix]
        if len(delimiter) != 1:
            raise ValueError(f"data.delimiter is {delimiter!r}; a delimiter is one character. Set data.delimiter=';', say.")
        rows: list[list[str]] = []
        try:
            with path.open(encoding="utf-8-sig", newline="") as f:
                reader = csv.reader(f, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True)
                header = next(reader, [])
                for row in reader:
                    if row and len(row) != len(header):
                        raise ValueError(
                            f"line {reader.line_num} of {where} has {len(row)} fields and the header {len(header)} ({', '.join(header)}). "
                            f"Correct the file, or set data.delimiter (now {delimiter!r}) or data.quoting={str(not quoted).lower()}"
                        )
                    rows += [row] if row else []
        except csv.Error as e:
            raise ValueError(
                f"{where} cannot be read after line {reader.line_num}: {e}. Correct the file, or set data.quoting={str(not quoted).lower()}"
            ) from e
        except UnicodeDecodeError as e:
            raise ValueError(f"{where} is not UTF-8 ({e.reason} at byte {e.start}). Save the file as UTF-8") from e
        return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _read_typed(where: str, path: Path) -> dict[str, list[Any]]:
    """jsonl or parquet through `datasets`, without leaving a copy in its cache."""
    import datasets

    read = datasets.Dataset.from_json if path.suffix.lower() == ".jsonl" else datasets.Dataset.from_parquet
    shown = datasets.is_progress_bar_enabled()
    with tempfile.TemporaryDirectory(prefix="qtrain-") as cache:
        datasets.disable_progress_bars()
        try:
            table = read(glob.escape(str(path.absolute())), cache_dir=cache, keep_in_memory=True)
            return {name: table[name][:] for name in table.column_names}
        except Exception as e:  # datasets wraps whatever pyarrow raises
            cause = str(e.__cause__ or e).splitlines()[0]
            raise ValueError(f"{where} cannot be read as {path.suffix.lower()[1:]}: {cause}. Correct or convert the file") from e
        finally:
            if shown:
                datasets.enable_progress_bars()


def _multiline(rows: Rows) -> list[str]:
    """A note where texts span lines: legitimate in a quoted csv, and what a stray quotation mark does to a file."""
    count = sum("\n" in text for text in rows.texts)
    if not count:
        return []
    return [f"{count} texts of {rows.where} span several lines; if the file does not quote its fields, set data.quoting=false"]
