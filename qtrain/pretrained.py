"""What the families that transformers loads share: where the model comes from, its tokenizer, its blocks, and what an error means.

A model is a source (how to build it, its blocks in order, what stays in float), not only a loaded module. What differs between
architectures is found by structure, not by a table of names:

    blocks         the longest `nn.ModuleList` of modules of one class (`bert.encoder.layer`, `model.layers`, …)
    always_float   what the family names as its heads, unless `keep_float` names something else

Parameters that a file does not have are named in `new_parameters`; which of them are allowed to be new is the family's decision. Nothing
that transformers prints while it loads reaches the user: a failure becomes one message that says what to type.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import nn
else:
    torch, transformers = lazy_import("torch"), lazy_import("transformers")

PAD_OFFSET = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "camembert",
    "mpnet",
    "longformer",
    "data2vec-text",
    "ibert",
}
"""Families whose positions begin after the padding token's id, so that they read that many tokens fewer."""
UNLIMITED = 1_000_000
"""Positions of a model without a limit; a tokenizer whose longest input is above this was saved without one."""
REMEDY = "Set model.path=/a/folder to a local copy, or model.path=null for the sample model"


@dataclass
class Pretrained(ABC):
    """A transformers folder, a hub id, or (null) the family's sample model."""

    path: str | None = None
    """A transformers folder, or a model id of the Hugging Face hub; null is the family's sample model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model; say true only for a source you trust."""
    keep_float: list[str] = field(default_factory=list)
    """Patterns of modules that this family keeps in float; empty: its heads."""

    registered_name: ClassVar[str] = ""
    what: ClassVar[str] = "a model"
    """How messages name it."""
    head: ClassVar[str] = "head"
    """How messages name what `heads` finds."""

    def __post_init__(self) -> None:
        self.new_parameters: list[str] = []

    @abstractmethod
    def sample(self) -> Path:
        """The folder of the sample model, fetched on first use."""

    @abstractmethod
    def heads(self, model: nn.Module) -> list[str]:
        """Names of the modules that stay in float unless `keep_float` says otherwise.

        Raises:
            ValueError: if they are not found.
        """

    @abstractmethod
    def classes(self) -> Any:
        """The mapping of transformers from a config's class to the class of the model."""

    def processor(self) -> Any:
        """What the model reads: its `tokenizer()`."""
        return self.tokenizer()

    def tokenizer(self) -> Any:
        """The model's tokenizer, giving only the inputs that the model reads.

        Raises:
            ValueError: if the folder holds no tokenizer, or one with more tokens than the model.
            OSError: if it cannot be read or downloaded.
        """
        source, config = self._config()
        tokenizer = self._load_tokenizer(source)
        size = len(tokenizer)
        if size <= len(tokenizer.all_special_ids):
            raise ValueError(
                f"{source} holds no vocabulary: its tokenizer has {size} tokens, all of them special. Copy tokenizer.json (or vocab.txt) "
                "of the model into it, or set model.path=/a/folder to another"
            )
        vocabulary = getattr(config.get_text_config(), "vocab_size", size)
        if size > vocabulary:
            first = min((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocabulary)
            raise ValueError(
                f"the tokenizer of {source} has {size} tokens and the model embeds {vocabulary}: {first[1]!r}, id {first[0]}, is the first "
                f"without a row. If it was added, save the model after model.resize_token_embeddings({size}), whose new rows have to be "
                "trained; if they are of different models, copy the model's own tokenizer.json into the folder. Or set model.path=/a/folder"
            )
        tokenizer.model_input_names = self._accepted(config, tokenizer.model_input_names)
        if tokenizer.model_max_length > UNLIMITED:
            tokenizer.model_max_length = positions(config)
        return tokenizer

    def max_positions(self, model: Any) -> int:
        """Longest input that the model has positions for, tokens."""
        return positions(model.config)

    def vocabulary(self, model: Any) -> int:
        """Token ids are below this."""
        return int(model.config.get_text_config().vocab_size)

    def blocks(self, model: nn.Module) -> list[str]:
        """Names of the transformer blocks, first to last.

        Raises:
            ValueError: if the model has no list of repeated blocks.
        """
        lists = [
            (len(m), name) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len({type(b) for b in m}) == 1
        ]
        if not lists:
            raise ValueError(
                f"{type(model).__name__} has no nn.ModuleList of repeated blocks, so it cannot be walked block by block. "
                "Set model.path to a model that has one, such as a BERT or a Llama"
            )
        longest = max(size for size, _ in lists)
        name = next(name for size, name in lists if size == longest)
        return [f"{name}.{i}" for i in range(longest)]

    def always_float(self, model: nn.Module) -> list[str]:
        """Names of the modules that stay in float: those that `keep_float` names, else the `heads`.

        Raises:
            ValueError: if a pattern of `keep_float` matches no Linear or Embedding, or the heads are not found.
        """
        if not self.keep_float:
            return self.heads(model)
        names = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))]
        for pattern in self.keep_float:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"model.keep_float pattern {pattern!r} matches none of the {len(names)} Linear and Embedding modules "
                    f"({', '.join(names[-3:])}, …). Set model.keep_float=[] for the {self.head} alone"
                )
        return [n for n in names if any(fnmatchcase(n, p) for p in self.keep_float)]

    def _source(self) -> str:
        """What to give to transformers: a folder that exists, or a hub id."""
        if self.path is None:
            return str(self.sample())
        path = Path(self.path).expanduser()
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ValueError(
                    f"the folder {path} has no config.json, so it is not a transformers model; valid: a folder written by save_pretrained. "
                    "Set model.path=/a/folder"
                )
            return str(path)
        if path.exists():
            raise ValueError(f"{path} is a file; valid: a folder written by save_pretrained. Set model.path={path.parent}")
        if self.path.startswith(("/", ".", "~")) or self.path.count("/") > 1 or "\\" in self.path:
            raise FileNotFoundError(
                f"the folder {path} does not exist (looked for {path.absolute()}); valid: a transformers folder, or a hub id such as "
                "owner/name. Set model.path=/a/folder, or model.path=null for the sample model"
            )
        return self.path

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        return options | ({"revision": self.revision} if self.revision else {})

    def _config(self) -> tuple[str, Any]:
        source = self._source()
        with quiet(), self._explained(source):
            return source, transformers.AutoConfig.from_pretrained(source, **self._options())

    def _load_tokenizer(self, source: str) -> Any:
        with quiet(), self._explained(source):
            return transformers.AutoTokenizer.from_pretrained(source, **self._options())

    @contextmanager
    def _explained(self, source: str) -> Iterator[None]:
        """Say what a failure of transformers means for the user."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as e:
            if Path(source).exists():
                kind = "folder" if Path(source).is_dir() else "file"
                raise ValueError(f"the {kind} {source} cannot be loaded as {self.what}: {first_line(e)}. {REMEDY}") from e
            if "connect" in str(e) or "offline" in str(e).lower():
                raise OSError(
                    f"model {source!r} could not be downloaded: the hub cannot be reached, and the model is not in its cache. {REMEDY}"
                ) from e
            raise ValueError(f"model {source!r} cannot be loaded from the hub: {first_line(e)}. {REMEDY}") from e
        except Exception as e:
            if type(e).__name__ != "SafetensorError":
                raise
            raise ValueError(
                f"the weights of {source} are damaged ({first_line(e)}): the file is cut short or is not safetensors. Copy it again. "
                f"{REMEDY}"
            ) from e

    def _accepted(self, config: Any, names: list[str]) -> list[str]:
        """Those of ``names`` that the model's forward takes: a DistilBERT beside a BERT tokenizer has no token types."""
        mapping = self.classes()
        if type(config) not in mapping:
            return names
        accepted = inspect.signature(mapping[type(config)].forward).parameters
        return [name for name in names if name in accepted]


def missing(report: dict[str, Any]) -> list[str]:
    """Parameters that the file does not have, or has in another shape, of transformers' loading report."""
    return sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})


def positions(config: Any) -> int:
    """Tokens that the model can read."""
    offset = (config.pad_token_id or 0) + 1 if config.model_type in PAD_OFFSET else 0
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED) - offset


def first_line(error: BaseException) -> str:
    """The beginning of an error, to be quoted in another."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no load report of transformers: what matters of them is said in our own words."""
    messages: Any = transformers.utils.logging
    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()
