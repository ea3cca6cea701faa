"""What one of llama.cpp's graphs is to the exporter: what it reads from metadata, what it has built in, how it wants its rows.

`Architecture` is one graph; the table of them is in `exporters/gguf/architectures.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporters.gguf.rope import Key, Rope, rope

POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}
"""llama.cpp's pooling types: what becomes of the token embeddings of an encoder."""


@dataclass(frozen=True)
class Transform:
    """What happens to one tensor on the way into the file."""

    heads: int = 0
    """Number of heads whose rows become pairs: row i of a head's first half is followed by row i of its second. 0 leaves them."""
    add: float = 0.0
    """Added to every value."""

    def rows(self, count: int) -> Tensor | None:
        """For each of ``count`` rows of the file the row of the model, int64; None where they are the same."""
        return torch.arange(count).reshape(self.heads, 2, -1).transpose(1, 2).reshape(-1) if self.heads else None

    def apply(self, x: Tensor) -> Tensor:
        """Model to file, along dim 0; values, codes or packed rows."""
        index = self.rows(len(x))
        x = x if index is None else x[index.to(x.device)]
        return x + self.add if self.add else x

    def undo(self, x: Tensor) -> Tensor:
        """File to model."""
        index = self.rows(len(x))
        x = x if index is None else x[torch.argsort(index).to(x.device)]
        return x - self.add if self.add else x


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's graphs, and how transformers' models of that family go into its file."""

    name: str
    """Of the graph: `general.architecture`."""
    fixed: dict[str, tuple[Any, ...]]
    """Options that are built into the graph -> the values that mean what it computes."""
    biases: frozenset[str] = frozenset()
    """Linear layers that may have a bias, by GGUF name."""
    ropes: frozenset[str] = frozenset()
    """See `exporters.gguf.rope`; empty for learned positions."""
    pairs: bool = False
    """Whether rows of q and k are reordered."""
    norm_offset: float = 0.0
    """Added to the weights of norms."""
    own_output: bool = True
    """Whether the output head may be a tensor of its own."""
    windows: bool = False
    """Whether the graph has sliding windows."""
    narrow_heads: bool = False
    """Whether heads * head_dim must be the width."""
    encoder: bool = False
    """Whether it gives embeddings and no logits."""
    fused: bool = False
    """Whether q, k and v of one type become one tensor."""
    special: Callable[[Any], list[Key]] = lambda config: []
    """Metadata and checks of this graph alone."""

    def transform(self, name: str, heads: int, kv_heads: int) -> Transform:
        """What happens to the tensor called ``name`` in the file."""
        stem = name.rsplit(".", 1)[0].rsplit(".", 1)[-1]
        if self.pairs and stem in ("attn_q", "attn_k"):
            return Transform(heads=heads if stem == "attn_q" else kv_heads)
        return Transform(add=self.norm_offset) if self.norm_offset and name.endswith("norm.weight") else Transform()

    def positions(self, config: Any) -> Rope:
        """Metadata and tensors of rotary positions; nothing where positions are learned."""
        return rope(config, self.ropes) if self.ropes else Rope()

    def keys(self, config: Any, pooling: str | None = None) -> list[Key]:
        """The file's metadata of this config: key (with the architecture before it), value, type.

        Args:
            pooling: of encoders: none, mean, cls, last or rank (a classifier on the first token; bert only).

        Raises:
            ValueError: naming the first option of ``config`` that the graph does not compute.
        """
        self._check(config, pooling)
        heads, width = config.num_attention_heads, config.hidden_size
        keys: list[Key] = [
            ("context_length", self.context(config), "uint32"),
            ("embedding_length", width, "uint32"),
            ("block_count", config.num_hidden_layers, "uint32"),
            ("feed_forward_length", config.intermediate_size, "uint32"),
            ("attention.head_count", heads, "uint32"),
            ("attention.head_count_kv", kv_heads(config), "uint32"),
            ("attention.key_length", head_dim(config), "uint32"),
            ("attention.value_length", head_dim(config), "uint32"),
            ("vocab_size", config.vocab_size, "uint32"),
        ]
        if self.encoder:
            keys += [("attention.layer_norm_epsilon", float(config.layer_norm_eps), "float32"), ("attention.causal", False, "bool")]
            keys += [("pooling_type", POOLING[pooling or "none"], "uint32")]
            if pooling == "rank":
                keys.append(("classifier.output_labels", [str(v) for _, v in sorted(config.id2label.items())], "array"))
        else:
            keys.append(("attention.layer_norm_rms_epsilon", float(config.rms_norm_eps), "float32"))
        keys += self.positions(config).keys + self.special(config)
        named = [(f"{self.name}.{key}", value, kind) for key, value, kind in keys]
        types = getattr(config, "type_vocab_size", 0)
        return [*named, ("tokenizer.ggml.token_type_count", types, "uint32")] if self.encoder and types else named

    def context(self, config: Any) -> int:
        """Tokens up to which the graph computes what the model does."""
        most, width = int(config.max_position_embeddings), window(config)
        return min(most, width) if width and not self.windows else most

    def notes(self, config: Any) -> list[str]:
        """What a user should know about the file."""
        found = list(self.positions(config).notes)
        if self.context(config) < config.max_position_embeddings:
            found.append(
                f"context_length is {self.context(config)}, not {config.max_position_embeddings}: the model has a sliding window of that "
                f"length, and llama.cpp's {self.name} graph has none"
            )
        return found

    def _check(self, config: Any, pooling: str | None) -> None:
        if not self.encoder and pooling not in (None, "none"):
            raise ValueError(f"pooling is {pooling}; the {self.name} graph is exported for logits. Set pooling=null")
        if pooling is not None and pooling not in POOLING:
            raise ValueError(f"pooling is {pooling!r}; valid: {', '.join(POOLING)}")
        if pooling == "rank" and self.name != "bert":
            raise ValueError(f"pooling=rank (a classifier) is in llama.cpp's bert graph, not in {self.name}; set pooling=mean")
        for option, values in self.fixed.items():
            given = getattr(config, option, values[0])
            if given not in values:
                raise unsupported(self.name, option, given, " or ".join(map(str, values)))
        if self.narrow_heads and head_dim(config) * config.num_attention_heads != config.hidden_size:
            raise unsupported(
                self.name,
                "head_dim",
                head_dim(config),
                f"hidden_size / num_attention_heads = {config.hidden_size}/{config.num_attention_heads}",
            )


def unsupported(name: str, option: str, given: Any, computes: str) -> ValueError:
    """The error for an option that a graph has built in otherwise."""
    return ValueError(
        f"the config's {option} is {given}, and llama.cpp's {name} graph computes {computes} only; "
        "choose another model (model.path=FOLDER), or export=[]"
    )


def head_dim(config: Any) -> int:
    """Values per head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_heads(config: Any) -> int:
    """Heads of keys and values."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def window(config: Any) -> int:
    """Length of the sliding window, 0 where no layer has one."""
    types = getattr(config, "layer_types", None)
    return (getattr(config, "sliding_window", None) or 0) if types is None or "sliding_attention" in types else 0
