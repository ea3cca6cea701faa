"""Tables of the user's own files: csv, tsv, jsonl and parquet, as columns.

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
from pathlib import Path
from typing import Any

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TYPED = (".jsonl", ".parquet")
SUFFIXES = (*DELIMITERS, *TYPED)


def require_file(where: str, path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """The lower-case suffix of ``path``, which is a file and one of ``suffixes``.

    Args:
        where: how messages name it: `data.train=reviews.csv`.

    Raises:
        ValueError: if the suffix is another.
        FileNotFoundError: if there is no such file.
    """
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise ValueError(f"{where} ends in {suffix or 'no suffix'!r}; valid: {', '.join(suffixes)}. Rename or convert the file")
    if not path.is_file():
        raise FileNotFoundError(f"{where} is not a file (looked for {path.absolute()}). Correct the path: {where.split('=')[0]}=FILE")
    return suffix


def read_table(where: str, path: Path, delimiter: str | None = None, quoting: bool | None = None) -> dict[str, list[Any]]:
    """Values by column name.

    Args:
        where: how messages name the file.
        delimiter: of csv and tsv files; None: comma in .csv, tab in .tsv.
        quoting: whether their fields may be enclosed in double quotes; None: yes in .csv, no in .tsv.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as its suffix says.
    """
    suffix = require_file(where, path)
    if suffix in TYPED:
        return _read_typed(where, path)
    return _read_delimited(where, path, delimiter or DELIMITERS[suffix], quoting if quoting is not None else suffix == ".csv")


def _read_delimited(where: str, path: Path, delimiter: str, quoted: bool) -> dict[str, list[Any]]:
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
        raise not_utf8(where, e) from e
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def not_utf8(where: str, error: UnicodeDecodeError) -> ValueError:
    """What is raised for a file in another encoding."""
    return ValueError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8")


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
