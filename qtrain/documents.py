"""Documents of a text corpus: where they begin and end in a file, and how a corpus without a test split gets one.

A document is what a language model is given from its beginning: a story, an article, a conversation. It is a text, or the messages of
a chat ([{"role": "user", "content": "…"}, …]) that the model's chat template makes a text of.

    .txt, .text, .raw, .md, .tokens   one document, every character as it is in the file (line ends too); several where a separator is given
    .jsonl, .parquet, .csv, .tsv      one document per row; all rows one document where they are to be joined, as WikiText, whose
                                      rows are lines of articles, has to be read ("\\n\\n" between rows is what Hugging Face documents)

A split that is not given is cut from the training text: whole documents, drawn with a seed until their characters make the fraction, or
the end of the text where all of it is one document. A training document that is also in the test split is dropped.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtrain.splits import listed
from qtrain.tables import SUFFIXES, not_utf8, read_table, require_file

Messages = list[dict[str, Any]]
Document = str | Messages

PLAIN = (".txt", ".text", ".raw", ".md", ".tokens")
MESSAGES = "messages"
"""Column of a table that holds chats."""
_ENOUGH = 0.9
"""Share of the characters a cut split should have, at which no more documents are drawn for it."""


@dataclass
class Documents:
    """What one file, or one split of a dataset, holds."""

    where: str
    """How messages name it: `data.train=book.txt`."""
    items: list[Document]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def of(self, items: list[Document], part: str = "") -> Documents:
        """Some of these documents; ``part`` says which."""
        return Documents(f"{part}{self.where}", items)


@dataclass(frozen=True)
class Layout:
    """Where documents are in a file."""

    text_column: str = "text"
    chats: bool = False
    """Whether a column of chats is wanted rather than the text."""
    separator: str | None = None
    """What stands between the documents of a plain text file; None: it is one document."""
    join: str | None = None
    """What to put between the rows of a table to make them one document; None: a document per row."""
    delimiter: str | None = None
    quoting: bool | None = None


def read_documents(key: str, name: str, layout: Layout, limit: int | None) -> Documents:
    """The documents of a file.

    Args:
        key: option that names the file, `train`, say.
        limit: read no more documents (rows) than this.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, not UTF-8, or has no such column.
    """
    where, path = f"data.{key}={name}", Path(name).expanduser()
    if require_file(where, path, (*PLAIN, *SUFFIXES)) in SUFFIXES:
        columns = read_table(where, path, layout.delimiter, layout.quoting)
        return documents_of(where, {n: values[:limit] for n, values in columns.items()}, layout)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as e:
        raise not_utf8(where, e) from e
    if layout.separator is None:
        return _filled(Documents(where, [text]))
    parts: list[Document] = [part.strip("\r\n") for part in text.split(layout.separator)]
    return _filled(Documents(where, parts[:limit]))


def documents_of(where: str, columns: dict[str, list[Any]], layout: Layout) -> Documents:
    """The documents of a table.

    Raises:
        ValueError: if the column is missing, empty, or holds something else.
    """
    chats = layout.chats and MESSAGES in columns
    name = MESSAGES if chats else layout.text_column
    if name not in columns:
        texts = [n for n, values in columns.items() if values and isinstance(values[0], str)]
        wanted = f"neither a column {MESSAGES!r} nor" if layout.chats else "no column"
        raise ValueError(f"{where} has {wanted} {name!r}; its columns are {listed(columns)}. Set data.text_column={(texts or ['NAME'])[0]}")
    values = columns[name]
    for row, value in enumerate(values):
        if not (_is_chat(value) if chats else isinstance(value, str)):
            what = 'a list of {"role": …, "content": …}' if chats else "a text"
            raise ValueError(
                f"column {name!r} of {where} holds something else than {what}: row {row} is {str(value)[:80]!r}. The columns are "
                f"{listed(columns)}. Set data.text_column={'NAME' if chats else _longest(columns)}, or correct the row"
            )
    if chats:
        return _filled(Documents(where, [[{k: v for k, v in m.items() if v is not None} for m in chat] for chat in values]))
    return _filled(Documents(where, values if layout.join is None else [layout.join.join(values)]))


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and "role" in m and {"content", "tool_calls"} & set(m) for m in value)


def _longest(columns: dict[str, list[Any]]) -> str:
    """A column to propose: the one with the longest texts."""
    sizes = {n: sum(len(v) for v in values[:100] if isinstance(v, str)) for n, values in columns.items()}
    return max(sizes, key=lambda n: sizes[n]) if any(sizes.values()) else "NAME"


def _filled(read: Documents) -> Documents:
    """Without empty documents, which are counted."""
    items = [d for d in read.items if (d.strip() if isinstance(d, str) else d)]
    if not items:
        raise ValueError(f"{read.where} holds no text: a language model needs some to be measured on. Name another file or split")
    empty, notes = len(read) - len(items), list(read.notes)
    if empty:
        advice = "; if its rows are lines of longer texts, set data.join='\\n\\n'" if empty > len(read) // 10 else ""
        notes.append(f"{empty} of {len(read)} documents of {read.where} are empty and were left out{advice}")
    return Documents(read.where, items, notes)


def sample_documents() -> Documents:
    """The text that every CPython carries: the topics of `help()`, from the language reference, in the order of their names.

    Raises:
        ValueError: if this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise ValueError("this Python was installed without pydoc_data.topics, the default text. Set data.train=FILE data.test=FILE") from e
    return Documents("the sample text", [topics[name] for name in sorted(topics)])


def cut(documents: Documents, name: str, fraction: float, seed: int) -> tuple[Documents, Documents]:
    """What is left of ``documents``, and about ``fraction`` of their characters, as a split of its own.

    Raises:
        ValueError: if there is nothing to cut.
    """
    sizes = [size_of(d) for d in documents.items]
    if len(documents) == 1:
        return _cut_text(documents, name, fraction)
    order, budget = list(range(len(sizes))), fraction * sum(sizes)
    random.Random(f"{name} {seed}").shuffle(order)
    chosen, size = set[int](), 0
    for index in order:
        if size >= _ENOUGH * budget:
            break
        if size + sizes[index] <= budget:
            chosen.add(index)
            size += sizes[index]
    chosen = chosen or {min(order, key=lambda i: sizes[i])}
    left = [d for i, d in enumerate(documents.items) if i not in chosen]
    return documents.of(left), documents.of([d for i, d in enumerate(documents.items) if i in chosen], f"the {name} part of ")


def _cut_text(documents: Documents, name: str, fraction: float) -> tuple[Documents, Documents]:
    """The beginning and the end of one text, cut at the end of a line, or of a word."""
    text = documents.items[0]
    at = round(len(text) * (1 - fraction))
    if isinstance(text, str):
        ends = (text.rfind(space, at - len(text) // 20, at) + 1 for space in ("\n", " "))
        at = next((end for end in ends if end > 0), at)
    if not isinstance(text, str) or not text[:at].strip() or not text[at:].strip():
        raise ValueError(f"{documents.where} is too little to cut a {name} split from. Set data.{name}=FILE, or give more text")
    return documents.of([text[:at]]), documents.of([text[at:]], f"the {name} part of ")


def drop_copies(documents: Documents, test: Documents, what: str, notes: list[str]) -> Documents:
    """``documents`` without those that ``test`` has; adds a note with their number."""
    tested = {key_of(d) for d in test.items}
    clean = [d for d in documents.items if key_of(d) not in tested]
    dropped = len(documents) - len(clean)
    if not dropped:
        return documents
    if not clean:
        raise ValueError(f"{documents.where} holds nothing that is not in the test split too. Name another file: data.{what}=FILE")
    notes.append(f"{dropped} documents of {documents.where} that also occur in the test split were dropped")
    return documents.of(clean)


def key_of(document: Document) -> str:
    """What makes two documents the same."""
    return document if isinstance(document, str) else json.dumps(document, sort_keys=True, default=str)


def size_of(document: Document) -> int:
    """Characters."""
    return len(document) if isinstance(document, str) else sum(len(str(m.get("content", ""))) for m in document)


def characters(documents: Iterable[Document]) -> int:
    """Characters of all of them."""
    return sum(map(size_of, documents))
