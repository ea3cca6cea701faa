"""Text classification data: the options every text dataset shares, and how rows become three clean splits.

A number measured on examples that training saw is worth nothing, so the rules are in one place and every dataset goes through them:

    order     rows are put in a stratified order: every prefix of it holds the classes in the proportion of the whole
    test      a split of its own, or a prefix of that order; a training or validation text that occurs in it is dropped, and counted
    validation  likewise a split of its own, or a prefix of what is left
    train     the rest, in stratified order, so that its first N examples are a fair calibration set

The splits depend on `split_seed` only, never on the seed of the training run, so that runs with several seeds share one test split.
What a dataset file adds is how its rows are read; see `qtrain/data/`.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from qtrain.datamodule import TextDataModule

_INTEGER = re.compile(r"\s*[+-]?\d+\s*")
_SHOWN = 10
_LOOK = 100
"""Rows that are looked at to propose a column."""


@dataclass
class Examples:
    """Texts (or pairs of texts) and the number of the class of each."""

    texts: list[str]
    labels: list[int]
    pairs: list[str] | None = None
    """Second sentences, where the task has them."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> Examples:
        """The examples at ``indices``, in that order."""
        chosen = list(indices)
        pairs = None if self.pairs is None else [self.pairs[i] for i in chosen]
        return Examples([self.texts[i] for i in chosen], [self.labels[i] for i in chosen], pairs)

    def keys(self) -> list[tuple[str, str]]:
        """What makes two examples the same input."""
        return list(zip(self.texts, self.pairs or [""] * len(self), strict=True))


@dataclass
class Splits:
    """Three splits without an example in common between test and the others."""

    train: Examples
    validation: Examples
    test: Examples
    label_names: list[str]
    """Name of class 0, 1, ..."""
    notes: list[str] = field(default_factory=list)
    """What was dropped, cut or looks odd, one sentence each, for the report."""


@dataclass
class Rows:
    """One split as it was read: texts are checked, labels are still what the file says."""

    where: str
    """How messages name it: `data.train=reviews.csv`."""
    texts: list[str]
    labels: list[Any]
    pairs: list[str] | None = None


@dataclass
class TextClassification(ABC):
    """Options that all text classification datasets share."""

    batch_size: int = 32
    """Examples per training batch."""
    eval_batch_size: int = 64
    """Examples per validation, test and calibration batch."""
    max_length: int = 128
    """Tokens per example; longer texts are cut, and counted."""
    validation_fraction: float = 0.1
    """Share of the training examples used for validation where the dataset has no validation split."""
    test_fraction: float = 0.1
    """Share of the training examples used for testing where the dataset has no test split."""
    split_seed: int = 0
    """Seed of the splits; the training seed does not change them."""
    limit: int | None = None
    """At most this many training examples, and in proportion fewer of the others: for a quick look."""
    calibration_examples: int = 256
    """Training examples that post-training quantization calibrates on."""

    registered_name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size", "max_length", "calibration_examples", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}; it must be at least 1. Set data.{name}=32, say.")
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(f"data.{name} is {value}; it must lie between 0 and 1. Set data.{name}=0.1, say.")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction} and data.test_fraction={self.test_fraction} leave nothing to "
                "train on; together they must stay below 1. Set data.validation_fraction=0.1 data.test_fraction=0.1"
            )

    @abstractmethod
    def load(self) -> Splits:
        """Read the dataset and split it.

        Raises:
            ValueError: if the rows cannot be used for classification.
            OSError: if they cannot be read.
        """

    def build(self, tokenizer: Any, seed: int) -> TextDataModule:
        """Read, split and tokenize.

        Args:
            tokenizer: a transformers tokenizer.
            seed: seed of the training order.
        """
        from qtrain.datamodule import TextDataModule

        return TextDataModule(
            self.load(),
            tokenizer,
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
            max_length=self.max_length,
            calibration_examples=self.calibration_examples,
            seed=seed,
        )

    def assemble(
        self,
        train: Rows,
        validation: Rows | None = None,
        test: Rows | None = None,
        label_names: list[str] | None = None,
        notes: Sequence[str] = (),
    ) -> Splits:
        """Turn rows into splits: number the labels, cut what is missing, drop what leaks, apply `limit`.

        Args:
            validation, test: None to cut them from ``train``.
            label_names: names of classes 0, 1, ... where the dataset declares them (labels are then integers); None to sort
                the labels that ``train`` has.

        Raises:
            ValueError: if a split is empty or too small, a label is unknown, or only one class is left.
        """
        classes = _Classes.declared(label_names) if label_names else _Classes.found(train)
        rest = classes.number(train)
        validated = classes.number(validation) if validation else None
        tested = classes.number(test) if test else None
        _require_classes(rest, train.where)
        found = list(notes)
        if tested is None:
            rest, tested = self._cut(rest, "test", self.test_fraction)
        rest = _drop_leaks(rest, tested, "training", found)
        if validated is None:
            rest, validated = self._cut(rest, "validation", self.validation_fraction)
        else:
            validated = _drop_leaks(validated, tested, "validation", found)
        rest = rest.take(stratified_order(rest.labels, self.split_seed))
        if self.limit is not None and self.limit < len(rest):
            found.append(f"data.limit={self.limit} of {len(rest)} training examples; validation and test in proportion")
            share = self.limit / len(rest)
            rest = rest.take(range(self.limit))
            validated, tested = self._thin(validated, share), self._thin(tested, share)
        _require_classes(rest, f"{train.where}, after splitting,")
        for name, split in (("validation", validated), ("test", tested)):
            _require_some(split, name)
            absent = sorted(set(rest.labels) - set(split.labels))
            if absent:
                found.append(f"the {name} split has no example of {_names(classes.names[i] for i in absent)}")
        return Splits(rest, validated, tested, classes.names, found)

    def _cut(self, examples: Examples, name: str, fraction: float) -> tuple[Examples, Examples]:
        """What is left of ``examples``, and a stratified ``fraction`` of them, both in their old order."""
        size, classes = round(len(examples) * fraction), len(set(examples.labels))
        if size < classes or len(examples) - size < classes:
            raise ValueError(
                f"{len(examples)} training examples of {classes} classes are too few to cut a {name} split of {fraction:g} from them: "
                f"it would have {size}, and a split needs an example per class. Set data.{name}_fraction=0.3, say, or give a {name} file "
                f"(data=csv data.{name}=FILE)"
            )
        order = stratified_order(examples.labels, self.split_seed)
        return examples.take(sorted(order[size:])), examples.take(sorted(order[:size]))

    def _thin(self, examples: Examples, share: float) -> Examples:
        size = min(len(examples), max(len(set(examples.labels)), round(len(examples) * share)))
        return examples.take(sorted(stratified_order(examples.labels, self.split_seed)[:size]))


def stratified_order(labels: Sequence[int], seed: int) -> list[int]:
    """A shuffle of which every prefix holds the classes in the proportion of the whole, to within one example per class.

    Within its class an example gets a random rank; examples are sorted by (rank + 0.5) / class size.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    generator = random.Random(seed)
    placed = []
    for label in sorted(members):
        generator.shuffle(members[label])
        size = len(members[label])
        placed += [((rank + 0.5) / size, generator.random(), index) for rank, index in enumerate(members[label])]
    return [index for _, _, index in sorted(placed)]


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
            raise ValueError(f"{where} has no column {name!r}; its columns are {_names(columns)}. Set data.{key}={_guess(key, columns)}")
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
                f"column {name!r} of {where} holds {what}, not text: row {row} is {value!r}. The columns are {_names(columns)}. "
                f"Set data.{key}={_guess(key, columns)}"
            )
    if all(_is_number(value) for value in values):
        raise ValueError(
            f"column {name!r} of {where} holds numbers only, the first is {values[0]!r}; a {key} holds sentences. "
            f"The columns are {_names(columns)}. Set data.{key}={_guess(key, columns)}"
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


def _names(names: Iterable[Any]) -> str:
    listed = [n if len(n) <= 40 else f"{n[:37]}..." for n in map(str, names)]
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


@dataclass
class _Classes:
    """The names of the classes and how a label of the file becomes a number."""

    names: list[str]
    integers: bool
    """Labels are integers (perhaps written as text), so that `1`, `"1"` and `1.0` are one class."""
    is_declared: bool = False

    @classmethod
    def declared(cls, names: list[str]) -> _Classes:
        return cls(names, integers=True, is_declared=True)

    @classmethod
    def found(cls, rows: Rows) -> _Classes:
        """The classes of ``rows``: integers by value, names by alphabet."""
        plain = [_plain(label, rows.where, row) for row, label in enumerate(rows.labels)]
        integers = all(_INTEGER.fullmatch(p) for p in plain)
        distinct = {str(int(p)) for p in plain} if integers else set(plain)
        return cls(sorted(distinct, key=int) if integers else sorted(distinct), integers)

    def number(self, rows: Rows) -> Examples:
        """``rows`` with numbered labels.

        Raises:
            ValueError: naming the labels that are not among the classes.
        """
        numbers = {str(i) if self.is_declared else name: i for i, name in enumerate(self.names)}
        keys = [_plain(label, rows.where, row) for row, label in enumerate(rows.labels)]
        if self.integers:
            keys = [str(int(k)) if _INTEGER.fullmatch(k) else k for k in keys]
        unknown = Counter(k for k in keys if k not in numbers)
        if unknown:
            raise ValueError(self._complain(rows.where, unknown))
        return Examples(rows.texts, [numbers[k] for k in keys], rows.pairs)

    def _complain(self, where: str, unknown: Counter[str]) -> str:
        count = f"{where} has {sum(unknown.values())} labels that are not classes: {_names(sorted(unknown))}"
        if self.is_declared:
            hidden = "; -1 means that the labels of this split are hidden, use another (data.test_split=NAME)" if "-1" in unknown else ""
            return f"{count}; valid: 0 to {len(self.names) - 1} ({_names(self.names)}){hidden}. Set data.label_column=NAME"
        return f"{count}; the training examples have {_names(self.names)}. Correct the labels, or set data.label_column=NAME"


def _plain(label: Any, where: str, row: int) -> str:
    """A label as text: `"3"` for 3 and 3.0."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if isinstance(label, int) or (isinstance(label, str) and label.strip()):
        return str(label)
    raise ValueError(
        f"the label of row {row} of {where} is {label!r}; a label is an integer or a name. Correct the row, or set data.label_column=NAME"
    )


def _require_classes(examples: Examples, where: str) -> None:
    present = len(set(examples.labels))
    if present < 2:
        raise ValueError(
            f"{where} has {len(examples)} training examples of {present} class{'' if present == 1 else 'es'}; classification needs two "
            "classes or more. Set data.label_column=NAME, or raise data.limit"
        )


def _require_some(examples: Examples, name: str) -> None:
    if not len(examples):
        raise ValueError(
            f"the {name} split is empty (after dropping what it shares with test); it needs one example or more. "
            f"Leave out data.{name} to cut one from the training examples"
        )


def _drop_leaks(examples: Examples, test: Examples, name: str, notes: list[str]) -> Examples:
    """``examples`` without the inputs that ``test`` has; adds a note with their number."""
    tested = set(test.keys())
    clean = [i for i, key in enumerate(examples.keys()) if key not in tested]
    dropped = len(examples) - len(clean)
    if dropped:
        notes.append(f"{dropped} {name} examples that also occur in the test split were dropped")
    return examples.take(clean)


def from_hub(name: str, config: str | None, revision: str | None = None) -> Any:
    """All splits of a dataset of the Hugging Face hub, as `datasets.load_dataset` gives them.

    Raises:
        OSError: if the hub cannot be reached and the dataset is not in the cache of `datasets`.
        ValueError: if there is no such dataset or configuration.
    """
    import datasets

    shown = name + (f" ({config})" if config else "")
    remedy = "or use local files: data=csv data.train=FILE data.test=FILE data.text_column=text data.label_column=label"
    try:
        return datasets.load_dataset(name, config, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as e:
        raise ValueError(f"the hub has no dataset {shown} that can be read from here. Correct data.name=owner/name, {remedy}") from e
    except OSError as e:
        raise OSError(
            f"dataset {shown} could not be downloaded ({type(e).__name__}): the hub cannot be reached, and the dataset is not in the cache "
            f"(HF_HOME). Run once with a network, {remedy}"
        ) from e
    except (ValueError, RuntimeError) as e:
        raise ValueError(f"dataset {shown} cannot be loaded: {str(e).splitlines()[0]}. Set data.config=NAME, {remedy}") from e
