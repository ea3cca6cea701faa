"""Text for language models: plain files, tables, a corpus of the hub, or the manual that every Python carries.

What a document is, and where a split comes from that is not given, is said in `qtrain/documents.py`; how documents become sequences to
train on and windows to measure perplexity on, in `qtrain/language.py`; what stands before and after one, in `qtrain/tokens.py`.

The default text is `pydoc_data.topics` of CPython, which `help()` prints: 79 topics of the language reference, 465,048 characters in
Python 3.11. It needs no download and is the same wherever that Python version runs; another version has another text, so perplexities on
it compare between runs of one Python version, and with nothing published.

Perplexity depends on how a text is fed in. WikiText-2 as published: `data.name=Salesforce/wikitext data.config=wikitext-2-raw-v1
data.join='\\n\\n'`, its rows being lines of articles. Stories or articles of their own: a jsonl with one per row, so that each begins with
BOS.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from platform import python_version
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.documents import Documents, Layout, cut, documents_of, drop_copies, read_documents, sample_documents
from qtrain.hub import choose_splits, from_hub
from qtrain.images import ImageSpec
from qtrain.registry import register

if TYPE_CHECKING:
    from qtrain.language import LanguageDataModule

LOCAL = "data=text data.train=FILE data.test=FILE (.txt, .jsonl, .parquet, .csv)"
AUTO = ("auto", "true", "false")
LONG = ("windows", "cut")
LOSS_ON = ("auto", "all", "assistant")


@register("data", "text")
@dataclass
class TextCorpus:
    """Text for language models: your own files, a corpus of the hub, or (as it is) the manual that Python carries."""

    train: str | None = None
    """File to train and calibrate on: .txt (one document) or .jsonl, .parquet, .csv (one per row); null: the sample text, or the hub's."""
    validation: str | None = None
    """File to validate on; null cuts data.validation_fraction from the training text."""
    test: str | None = None
    """File to measure perplexity on; null cuts data.test_fraction from the training text."""
    calibration: str | None = None
    """File to calibrate on; null takes sequences of the training text."""
    text_column: str = "text"
    """Column of the text in a table."""
    document_separator: str | None = None
    """What stands between the documents of a .txt, as '\\n\\n' or '<|endoftext|>'; null: a file is one document."""
    join: str | None = None
    """What to put between the rows of a table to make them one document, as '\\n\\n' for WikiText; null: a document per row."""
    delimiter: str | None = None
    """What separates the fields of a table; null: comma in .csv, tab in .tsv."""
    quoting: bool | None = None
    """Whether fields may be enclosed in double quotes; null: yes in .csv, no in .tsv."""
    name: str | None = None
    """A corpus of the Hugging Face hub: `owner/name`."""
    config: str | None = None
    """Configuration of the corpus, where it has several, as wikitext-2-raw-v1."""
    revision: str | None = None
    """Branch, tag or commit; null is the newest."""
    train_split: str = "train"
    """Split of the corpus to train on."""
    validation_split: str | None = None
    """Split to validate on; null: the one called validation, else a part of the training split."""
    test_split: str | None = None
    """Split to test on; null: the one called test, else a part of the training split."""
    streaming: bool = False
    """Fetch only the data.limit first rows of each split of the corpus, as for C4, which is larger than most disks."""
    chat_template: bool = False
    """Render column `messages` (or, where there is none, the text as a user's message) through the model's chat template."""
    loss_on: str = "auto"
    """What is learnt and measured: all tokens, what the assistant says, or auto for the latter where chat_template renders `messages`."""
    add_bos: str = "auto"
    """Whether a document begins with BOS: true, false, or auto for what the tokenizer does."""
    add_eos: str = "auto"
    """Whether a document ends with EOS: true, false, or auto for what the tokenizer does, and in training between documents without BOS."""
    context: int | None = None
    """Tokens of a sequence; null: 512, or what the model reads if that is less."""
    stride: int | None = None
    """Tokens between evaluation windows, each scored once, with at least context - stride before it; null: half the context."""
    window_bos: bool = False
    """Whether sequences that begin inside a document begin with BOS too, where documents do, as in llama.cpp's perplexity."""
    mask_documents: bool = False
    """Whether the documents that share a training sequence are hidden from each other."""
    long_documents: str = "windows"
    """How evaluation reads documents longer than the context: windows, or cut (its first tokens only)."""
    batch_size: int = 8
    """Sequences per training batch."""
    eval_batch_size: int = 8
    """Sequences per validation, test and calibration batch."""
    train_tokens: int | None = None
    """At most this many tokens of training text."""
    eval_tokens: int | None = None
    """At most this many tokens of validation, and of test text."""
    calibration_sequences: int = 128
    """Sequences that post-training quantization calibrates on, spread over the training text."""
    limit: int | None = None
    """At most this many documents (rows) per file or split: for a quick look."""
    validation_fraction: float = 0.1
    """Share of the training text used for validation where none is given."""
    test_fraction: float = 0.1
    """Share of the training text used for testing where none is given."""
    split_seed: int = 0
    """Seed of the splits; the training seed does not change them."""

    registered_name: ClassVar[str] = ""
    task: ClassVar[str] = "language"

    def __post_init__(self) -> None:
        for option, least in {"context": 2, "eval_tokens": 2, "train_tokens": 2}.items() | dict.fromkeys(
            ("stride", "batch_size", "eval_batch_size", "calibration_sequences", "limit"), 1
        ).items():
            value = getattr(self, option)
            if value is not None and value < least:
                raise ValueError(f"data.{option} is {value}; it must be at least {least}. Set data.{option}=128, say.")
        for option, valid in {"add_bos": AUTO, "add_eos": AUTO, "long_documents": LONG, "loss_on": LOSS_ON}.items():
            value = str(getattr(self, option)).lower()  # true and false arrive as such from yaml
            if value not in valid:
                raise ValueError(f"data.{option} is {value!r}; valid: {', '.join(valid)}. Set data.{option}={valid[0]}")
            setattr(self, option, value)
        for option in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, option) < 1:
                raise ValueError(f"data.{option} is {getattr(self, option)}; it must lie between 0 and 1. Set data.{option}=0.1, say.")
        if self.loss_on == "assistant" and not self.chat_template:
            raise ValueError(
                "data.loss_on=assistant needs conversations, and data.chat_template=false reads texts; valid then: auto, all. "
                "Set data.chat_template=true, or data.loss_on=all"
            )
        if self.document_separator == "":
            raise ValueError("data.document_separator is empty; valid: some text, or null. Set data.document_separator='\\n\\n', say.")
        if self.streaming and self.limit is None:
            raise ValueError("data.streaming=true fetches as many rows as data.limit says, and it says nothing. Set data.limit=1000, say.")
        if self.name and self.train:
            raise ValueError(f"data.name={self.name} and data.train={self.train} are both given; train on one. Set data.train=null")

    def build(self, processor: Any, seed: int) -> LanguageDataModule:
        """Read, split and tokenize.

        Args:
            processor: a transformers tokenizer.
            seed: seed of the training order.

        Raises:
            ValueError: if the model reads images, or the text cannot be used.
            OSError: if it cannot be read.
        """
        from qtrain.language import LanguageDataModule

        if isinstance(processor, ImageSpec):
            raise ValueError(
                f"data={self.registered_name} gives texts, and the model reads images. Set model=causal_lm, "
                "or data=digits (or npz, image_folder, hub_images)"
            )
        train, validation, test, calibration, notes = self.load()
        return LanguageDataModule(
            train,
            validation,
            test,
            calibration,
            processor,
            context=self.context,
            stride=self.stride,
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
            train_tokens=self.train_tokens,
            eval_tokens=self.eval_tokens,
            calibration_sequences=self.calibration_sequences,
            chat_template=self.chat_template,
            loss_on=self.loss_on,
            add_bos=self.add_bos,
            add_eos=self.add_eos,
            window_bos=self.window_bos,
            mask_documents=self.mask_documents,
            cut_documents=self.long_documents == "cut",
            seed=seed,
            notes=notes,
        )

    def load(self) -> tuple[Documents, Documents, Documents, Documents | None, list[str]]:
        """Training, validation, test and calibration documents, and notes.

        Raises:
            ValueError: if the text cannot be used.
            OSError: if it cannot be read.
        """
        given = self._hub() if self.name else {}
        given |= {key: self._file(key, path) for key in ("train", "validation", "test", "calibration") if (path := getattr(self, key))}
        notes: list[str] = []
        if "train" not in given:
            sample = sample_documents()
            given["train"] = sample.of(sample.items[: self.limit])
            notes.append(
                f"the {'training text' if 'test' in given else 'text'} is pydoc_data.topics of Python {python_version()} (data.train=FILE "
                "for your own); numbers on it compare only between runs of this Python version"
            )
        notes += [note for documents in given.values() for note in documents.notes]
        train, validation, test = given["train"], given.get("validation"), given.get("test")
        if test is None:
            train, test = cut(train, "test", self.test_fraction, self.split_seed)
        train = drop_copies(train, test, "train", notes)
        if validation is None:
            train, validation = cut(train, "validation", self.validation_fraction, self.split_seed)
        else:
            validation = drop_copies(validation, test, "validation", notes)
        calibration = given.get("calibration")
        if calibration is not None:
            calibration = drop_copies(calibration, test, "calibration", notes)
        return train, validation, test, calibration, notes

    def _layout(self) -> Layout:
        return Layout(
            self.text_column, self.chat_template, _typed(self.document_separator), _typed(self.join), self.delimiter, self.quoting
        )

    def _file(self, key: str, path: str) -> Documents:
        return read_documents(key, path, self._layout(), self.limit)

    def _hub(self) -> dict[str, Documents]:
        assert self.name is not None
        found = from_hub(self.name, self.config, self.revision, LOCAL, self.streaming)
        splits = choose_splits(found, self.name, self.train_split, self.validation_split, self.test_split)
        return {
            key: documents_of(f"the {split} split of {self.name}", self._columns(found[split]), self._layout())
            for key, split in splits.items()
            if not getattr(self, key)
        }

    def _columns(self, table: Any) -> dict[str, list[Any]]:
        if self.streaming:
            rows = list(islice(table, self.limit))
            return {name: [row.get(name) for row in rows] for name in (rows[0] if rows else {})}
        wanted = {self.text_column, "messages"} & set(table.column_names) or set(table.column_names)
        size = len(table) if self.limit is None else min(self.limit, len(table))
        return {name: table[:size][name] if name in wanted else [] for name in table.column_names}


def _typed(text: str | None) -> str | None:
    r"""What a shell user means by ``\n`` and ``\t``."""
    return None if text is None else text.replace("\\n", "\n").replace("\\t", "\t")
