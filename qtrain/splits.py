"""Classification data of any kind: the options every dataset shares, and how examples become three clean splits.

A number measured on examples that training saw is worth nothing, so the rules are in one place and every dataset goes through them:

    order     examples are put in a stratified order: every prefix of it holds the classes in the proportion of the whole
    test      a split of its own, or a prefix of that order; a training or validation example that occurs in it is dropped, and counted
    validation  likewise a split of its own, or a prefix of what is left
    train     the rest, in stratified order, so that its first N examples are a fair calibration set

The splits depend on `split_seed` only, never on the seed of the training run, so that runs with several seeds share one test split.
What an example is, is said in `qtrain/text.py` and `qtrain/images.py`; what a dataset file adds is how it is read: see `qtrain/data/`.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Self, TypeVar

_INTEGER = re.compile(r"\s*[+-]?\d+\s*")
_SHOWN = 10


class Part(ABC):
    """One split: inputs, and the number of the class of each."""

    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def take(self, indices: Iterable[int]) -> Self:
        """The examples at ``indices``, in that order."""

    @abstractmethod
    def keys(self) -> Sequence[Hashable]:
        """What makes two examples the same input."""


P = TypeVar("P", bound=Part)


class Unnumbered(ABC, Generic[P]):
    """One split as it was read: inputs are checked, labels are still what the file says."""

    where: str
    """How messages name it: `data.train=reviews.csv`."""
    labels: list[Any]

    @abstractmethod
    def numbered(self, labels: list[int]) -> P:
        """The same inputs with numbers for labels."""


@dataclass
class Splits(Generic[P]):
    """Three splits without an example in common between test and the others."""

    train: P
    validation: P
    test: P
    label_names: list[str]
    """Name of class 0, 1, ..."""
    notes: list[str] = field(default_factory=list)
    """What was dropped, cut or looks odd, one sentence each, for the report."""


@dataclass
class Classification(ABC):
    """Options that all classification datasets share."""

    batch_size: int = 32
    """Examples per training batch."""
    eval_batch_size: int = 64
    """Examples per validation, test and calibration batch."""
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
    relabel: ClassVar[str] = "data.label_column=NAME"
    """What to set where labels are not what they should be."""
    own_split: ClassVar[str] = "data=csv data.{split}=FILE"
    """What to type to give a split of one's own."""
    other_split: ClassVar[str] = "data.test_split=NAME"
    """What to set to take another split for testing."""

    def __post_init__(self) -> None:
        self.require_positive("batch_size", "eval_batch_size", "calibration_examples", "limit")
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(f"data.{name} is {value}; it must lie between 0 and 1. Set data.{name}=0.1, say.")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction} and data.test_fraction={self.test_fraction} leave nothing to "
                "train on; together they must stay below 1. Set data.validation_fraction=0.1 data.test_fraction=0.1"
            )

    def require_positive(self, *options: str) -> None:
        """Refuse options below 1.

        Raises:
            ValueError: naming the option.
        """
        for name in options:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}; it must be at least 1. Set data.{name}=32, say.")

    @abstractmethod
    def build(self, processor: Any, seed: int) -> Any:
        """Read, split and encode for the model whose `processor()` is given; returns a data module.

        Args:
            processor: what the model reads: a transformers tokenizer, or a `qtrain.images.ImageSpec`.
            seed: seed of the training order.
        """

    def assemble(
        self,
        train: Unnumbered[P],
        validation: Unnumbered[P] | None = None,
        test: Unnumbered[P] | None = None,
        label_names: list[str] | None = None,
        notes: Sequence[str] = (),
    ) -> Splits[P]:
        """Turn what was read into splits: number the labels, cut what is missing, drop what leaks, apply `limit`.

        Args:
            validation, test: None to cut them from ``train``.
            label_names: names of classes 0, 1, ... where the dataset declares them (labels are then integers); None to sort
                the labels that ``train`` has.

        Raises:
            ValueError: if a split is empty or too small, a label is unknown, or only one class is left.
        """
        classes = self._declared(label_names) if label_names else self._found(train)
        rest = self._number(classes, train)
        validated = self._number(classes, validation) if validation else None
        tested = self._number(classes, test) if test else None
        self._require_classes(rest, train.where)
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
        self._require_classes(rest, f"{train.where}, after splitting,")
        for name, split in (("validation", validated), ("test", tested)):
            _require_some(split, name)
            absent = sorted(set(rest.labels) - set(split.labels))
            if absent:
                found.append(f"the {name} split has no example of {listed(classes.names[i] for i in absent)}")
        return Splits(rest, validated, tested, classes.names, found)

    def _cut(self, examples: P, name: str, fraction: float) -> tuple[P, P]:
        """What is left of ``examples``, and a stratified ``fraction`` of them, both in their old order."""
        size, classes = round(len(examples) * fraction), len(set(examples.labels))
        if size < classes or len(examples) - size < classes:
            raise ValueError(
                f"{len(examples)} training examples of {classes} classes are too few to cut a {name} split of {fraction:g} from them: "
                f"it would have {size}, and a split needs an example per class. Set data.{name}_fraction=0.3, say, or give a {name} split "
                f"of your own ({self.own_split.format(split=name)})"
            )
        order = stratified_order(examples.labels, self.split_seed)
        return examples.take(sorted(order[size:])), examples.take(sorted(order[:size]))

    def _thin(self, examples: P, share: float) -> P:
        size = min(len(examples), max(len(set(examples.labels)), round(len(examples) * share)))
        return examples.take(sorted(stratified_order(examples.labels, self.split_seed)[:size]))

    def _declared(self, names: list[str]) -> Classes:
        return Classes(names, integers=True, is_declared=True)

    def _found(self, train: Unnumbered[P]) -> Classes:
        """The classes of ``train``: integers by value, names by alphabet."""
        plain = [self._plain(label, train.where, row) for row, label in enumerate(train.labels)]
        integers = all(_INTEGER.fullmatch(p) for p in plain)
        distinct = {str(int(p)) for p in plain} if integers else set(plain)
        return Classes(sorted(distinct, key=int) if integers else sorted(distinct), integers)

    def _number(self, classes: Classes, read: Unnumbered[P]) -> P:
        """``read`` with numbered labels.

        Raises:
            ValueError: naming the labels that are not among the classes.
        """
        numbers = {str(i) if classes.is_declared else name: i for i, name in enumerate(classes.names)}
        keys = [self._plain(label, read.where, row) for row, label in enumerate(read.labels)]
        if classes.integers:
            keys = [str(int(k)) if _INTEGER.fullmatch(k) else k for k in keys]
        unknown = Counter(k for k in keys if k not in numbers)
        if unknown:
            raise ValueError(self._complain(classes, read.where, unknown))
        return read.numbered([numbers[k] for k in keys])

    def _complain(self, classes: Classes, where: str, unknown: Counter[str]) -> str:
        count = f"{where} has {sum(unknown.values())} labels that are not classes: {listed(sorted(unknown))}"
        if classes.is_declared:
            hidden = f"; -1 means that the labels of this split are hidden, use another ({self.other_split})" if "-1" in unknown else ""
            return f"{count}; valid: 0 to {len(classes.names) - 1} ({listed(classes.names)}){hidden}. Set {self.relabel}"
        return f"{count}; the training examples have {listed(classes.names)}. Correct the labels, or set {self.relabel}"

    def _plain(self, label: Any, where: str, row: int) -> str:
        """A label as text: `"3"` for 3 and 3.0."""
        if isinstance(label, float) and label.is_integer():
            return str(int(label))
        if isinstance(label, int) or (isinstance(label, str) and label.strip()):
            return str(label)
        raise ValueError(
            f"the label of row {row} of {where} is {label!r}; a label is an integer or a name. Correct the row, or set {self.relabel}"
        )

    def _require_classes(self, examples: Part, where: str) -> None:
        present = len(set(examples.labels))
        if present < 2:
            raise ValueError(
                f"{where} has {len(examples)} training examples of {present} class{'' if present == 1 else 'es'}; classification needs "
                f"two classes or more. Set {self.relabel}, or raise data.limit"
            )


@dataclass
class Classes:
    """The names of the classes and how a label of the file becomes a number."""

    names: list[str]
    integers: bool
    """Labels are integers (perhaps written as text), so that `1`, `"1"` and `1.0` are one class."""
    is_declared: bool = False


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


def listed(names: Iterable[Any]) -> str:
    """The first names, shortened, and how many more there are: for messages."""
    shown = [n if len(n) <= 40 else f"{n[:37]}..." for n in map(str, names)]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _require_some(examples: Part, name: str) -> None:
    if not len(examples):
        raise ValueError(
            f"the {name} split is empty (after dropping what it shares with test); it needs one example or more. "
            f"Leave out data.{name} to cut one from the training examples"
        )


def _drop_leaks(examples: P, test: P, name: str, notes: list[str]) -> P:
    """``examples`` without the inputs that ``test`` has; adds a note with their number."""
    tested = set(test.keys())
    clean = [i for i, key in enumerate(examples.keys()) if key not in tested]
    dropped = len(examples) - len(clean)
    if not dropped:
        return examples
    notes.append(f"{dropped} {name} examples that also occur in the test split were dropped")
    return examples.take(clean)
