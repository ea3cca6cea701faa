"""Encoders for sentence embeddings: MiniLM, BGE, E5, nomic and others that pool the hidden states of a BERT into one unit vector.

    source     a transformers folder (or one of sentence-transformers), a hub id, or null for the sample, all-MiniLM-L6-v2
    pooling    mean over tokens or the first token (cls): what `1_Pooling/config.json` says, mean where there is none, or `pooling=`
    task       "embedding": judged by its distance to the float model (`qtrain/embedding_task.py`); any dataset of texts will do

BERT's own pooler (a Linear on the first token, for next-sentence prediction) is not part of an embedding and is left away.
"""

from __future__ import annotations

import json
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
    from torch import nn
else:
    torch, transformers = lazy_import("torch"), lazy_import("transformers")

POOLINGS = ("mean", "cls")
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@register("model", "sentence_embedding")
@dataclass
class SentenceEmbedding(Pretrained):
    """An encoder for sentence embeddings: a folder, a hub id, or (null) the sample model, all-MiniLM-L6-v2."""

    pooling: str | None = None
    """How hidden states become one vector: mean or cls; null is what the folder says, or mean."""

    task: ClassVar[str] = "embedding"
    what: ClassVar[str] = "a sentence encoder"
    head: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling not in (None, *POOLINGS):
            raise ValueError(f"model.pooling is {self.pooling!r}; valid: {', '.join(POOLINGS)}, null. Set model.pooling=mean, say")

    def build(self, num_labels: int = 0, seed: int = 0, label_names: list[str] | None = None) -> nn.Module:
        """The encoder in float32, in evaluation mode, with an attribute `pooling`.

        Args:
            num_labels, seed, label_names: not used: there are no classes, and no parameter is new.

        Raises:
            FileNotFoundError: if the folder does not exist.
            ValueError: if it is no encoder, or its weights are damaged, incomplete or of another model.
            OSError: if the hub cannot be reached.
        """
        source, _ = self._config()
        pooling = self._pooling(source)
        with quiet(), self._explained(source), torch.random.fork_rng(devices=[]):
            model, report = transformers.AutoModel.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **self._options()
            )
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        lost = [name for name in missing(report) if not name.startswith("pooler.")]
        if lost:
            raise ValueError(
                f"the weights of {source} do not fit its config.json: {len(lost)} parameters are missing or have another shape, the first "
                f"is {lost[0]}. Set model.path=/a/folder to a model whose weights are complete"
            )
        self.blocks(model)
        model.pooling = pooling
        encoder: nn.Module = model.eval()
        return encoder

    def sample(self) -> Path:
        """all-MiniLM-L6-v2."""
        return sample_model()

    def classes(self) -> Any:
        """transformers' classes of bare encoders."""
        return transformers.models.auto.modeling_auto.MODEL_MAPPING

    def heads(self, model: nn.Module) -> list[str]:
        """None: every layer can be put on a grid."""
        return []

    def _pooling(self, source: str) -> str:
        """What `pooling` says, or the folder, in the format of sentence-transformers.

        Raises:
            ValueError: for a way of pooling that this version does not have, or further layers behind it.
        """
        if self.pooling is not None:
            return self.pooling
        folder = Path(source)
        modules = json.loads((folder / "modules.json").read_text()) if (folder / "modules.json").is_file() else []
        dense = [m["type"] for m in modules if m["type"].rsplit(".", 1)[-1] not in ("Transformer", "Pooling", "Normalize")]
        if dense:
            raise ValueError(
                f"{source} has a layer behind its pooling ({dense[0]}), which an encoder's file does not hold. Set model.path to another"
            )
        file = folder / "1_Pooling" / "config.json"
        if not file.is_file():
            return "mean"
        config = json.loads(file.read_text())
        chosen = [mode for mode, on in config.items() if mode.startswith("pooling_mode_") and on]
        if len(chosen) != 1 or chosen[0] not in _MODES:
            raise ValueError(
                f"{source} pools by {', '.join(chosen) or 'nothing'}; valid: mean, cls. Set model.pooling=mean, or model.path to another"
            )
        return _MODES[chosen[0]]
