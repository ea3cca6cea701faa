"""How a model family lies in a GGUF file: its metadata, its tensors' names, and the few that are not written as they are.

llama.cpp has one hand-written graph per architecture. What the graph takes from metadata is written from the transformers config; what it
has built in is compared with the config, and a config that says otherwise is refused by the option's name. Tensor names are those of
the gguf package's maps (`qtrain/gguf_names.py`); here is only what those maps do not know:

    llama        rows of q and k are reordered: transformers turns (i, i + d/2) of a head together, this graph (2i, 2i + 1)
    gemma2/3     norms are written as 1 + w, which is what they multiply by
    nomic-bert   q, k and v become one tensor where they have one type (older llama.cpp reads nothing else)
    encoders     with pooling=rank BERT's pooler and classifier are the file's head; with other poolings heads are left out

Rows are moved, never changed, so codes and packed bytes are reordered exactly as float weights are.

A graph without sliding windows is exact up to the window's length: `context_length` is then no more than the window, and a note says so.

Sources: llama.cpp, src/models/*.cpp (the graphs) and src/llama-model.cpp (metadata).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from exporters.gguf.graph import Architecture, head_dim, unsupported, window
from exporters.gguf.rope import Key
from qtrain import gguf_names

_HEADS = re.compile(r"(?:\w*bert\.)?(?:(pooler\.dense)|classifier)\.(weight|bias)")
"""The dense layer before a classifier, and the classifier."""

ATTENTION = ("attn_q", "attn_k", "attn_v")
SILU, GELU, GELU_TANH = ("silu", "swish"), ("gelu",), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")


def _gemma(config: Any, name: str, pattern: int, large: int) -> list[Key]:
    """Window, its pattern, and the scale of queries, which both graphs derive from the number of layers."""
    expected = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == large else head_dim(config)
    if config.query_pre_attn_scalar != expected:
        raise unsupported(name, "query_pre_attn_scalar", config.query_pre_attn_scalar, str(expected))
    if not window(config):
        return []
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    keys: list[Key] = [("attention.sliding_window", config.sliding_window, "uint32")]
    usual = [i % pattern < pattern - 1 for i in range(len(sliding))]
    return keys if sliding == usual else [*keys, ("attention.sliding_window_pattern", sliding, "array")]


def _gemma2(config: Any) -> list[Key]:
    keys: list[Key] = []
    for option in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, option)
        if value is None:
            raise unsupported("gemma2", option, None, "soft-capped logits")
        keys.append((option, float(value), "float32"))
    if not window(config):
        raise unsupported("gemma2", "layer_types", "without sliding_attention", "layers with a sliding window")
    return [*keys, *_gemma(config, "gemma2", 2, 46)]


def _gemma3(config: Any) -> list[Key]:
    cap = config.final_logit_softcapping
    keys: list[Key] = [] if cap is None else [("final_logit_softcapping", float(cap), "float32")]
    return [*keys, *_gemma(config, "gemma3", 6, 62)]


def _phi3(config: Any) -> list[Key]:
    return [("attention.sliding_window", 0, "uint32")]


_GEMMA: dict[str, tuple[Any, ...]] = {
    "hidden_activation": GELU_TANH,
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
}

ARCHITECTURES = (
    Architecture(
        "llama",
        {"hidden_act": SILU},
        biases=frozenset({*ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down"}),
        ropes=frozenset({"linear", "yarn", "factors"}),
        pairs=True,
    ),
    Architecture(
        "qwen2",
        {"hidden_act": SILU},
        biases=frozenset(ATTENTION),
        ropes=frozenset({"linear", "yarn"}),
        narrow_heads=True,
    ),
    Architecture(
        "qwen3",
        {"hidden_act": SILU, "attention_bias": (False,)},
        ropes=frozenset({"linear", "yarn"}),
    ),
    Architecture(
        "gemma2",
        {**_GEMMA, "tie_word_embeddings": (True,)},
        ropes=frozenset({"linear"}),
        norm_offset=1.0,
        own_output=False,
        windows=True,
        special=_gemma2,
    ),
    Architecture(
        "gemma3",
        _GEMMA,
        ropes=frozenset({"linear", "swa"}),
        norm_offset=1.0,
        windows=True,
        special=_gemma3,
    ),
    Architecture(
        "phi3",
        {"hidden_act": SILU},
        ropes=frozenset({"longrope", "partial"}),
        narrow_heads=True,
        special=_phi3,
    ),
    Architecture(
        "bert",
        {"hidden_act": GELU + GELU_TANH, "is_decoder": (False,), "position_embedding_type": ("absolute",)},
        biases=frozenset({*ATTENTION, "attn_output", "ffn_up", "ffn_down", "cls", "cls.output"}),
        encoder=True,
    ),
    Architecture(
        "nomic-bert",
        {"hidden_act": SILU},
        ropes=frozenset({"linear", "yarn"}),
        encoder=True,
        fused=True,
    ),
)


def by_name(name: str) -> Architecture:
    """The architecture that a file names.

    Raises:
        ValueError: if it is none of ours.
    """
    found = next((a for a in ARCHITECTURES if a.name == name), None)
    if found is None:
        raise ValueError(f"the file's architecture is {name!r}; ours are {', '.join(a.name for a in ARCHITECTURES)}")
    return found


def architecture(config: Any) -> Architecture:
    """The architecture of a transformers config.

    Raises:
        ValueError: if it is none of ours, naming it and listing them.
    """
    return by_name(gguf_names.architecture(config))


def describe(config: Any, pooling: str | None = None) -> list[str]:
    """What a user should know about a file of this config.

    Raises:
        ValueError: if llama.cpp has no graph for it, or one that computes something else, naming the option.
    """
    text = config.get_text_config()
    arch = architecture(text)
    arch.keys(text, pooling)
    return arch.notes(text)


def metadata(config: Any, about: dict[str, str], *, task: str = "language", pooling: str | None = None) -> list[Key]:
    """Metadata of a file but for its tokenizer and what follows from its tensors: key, value, type.

    Args:
        config: of the transformers model.
        about: text to store: keys `general.*` as they are, others as `qtrain.<key>`. `mix` names the mix that chose the types.
        task: language or embedding.
        pooling: of encoders; null is none for language and mean for embedding.

    Raises:
        ValueError: see `describe`.
    """
    text = config.get_text_config()
    arch = architecture(text)
    if arch.encoder != (task == "embedding"):
        wants = "embedding" if arch.encoder else "language"
        raise ValueError(
            f"llama.cpp's {arch.name} graph is for task {wants}, and this run's is {task}; choose a model for that (model.path=FOLDER)"
        )
    stored = {key if key.startswith("general.") else f"qtrain.{key}": str(value) for key, value in about.items()}
    return [
        ("general.architecture", arch.name, "string"),
        ("general.type", "model", "string"),
        *((key, value, "string") for key, value in stored.items() if value),
        *arch.keys(text, pooling or ("mean" if arch.encoder else None)),
    ]


def names(arch: Architecture, config: Any, parameters: Iterable[str], tied: bool, pooling: str | None = None) -> dict[str, str]:
    """GGUF names of the parameters (…weight, …bias) of a transformers model; those that the file leaves out are not in it.

    Raises:
        ValueError: naming a parameter for which the graph has no tensor.
    """
    parameters = list(parameters)
    heads = {p: found for p in parameters if arch.encoder and (found := _head(p))}
    known = gguf_names.tensor_names(config, [p for p in parameters if p not in heads], tied)
    if pooling == "rank":
        known |= heads
    for parameter, name in known.items():
        stem = re.sub(r"^blk\.\d+\.", "", name).removesuffix(".bias")
        if name.endswith(".bias") and not stem.endswith("norm") and stem not in arch.biases:
            raise ValueError(
                f"llama.cpp's {arch.name} graph adds no bias in {stem}, and the model has {parameter}; "
                "choose a model without it (model.path=FOLDER), or export=[]"
            )
    return known


def _head(parameter: str) -> str | None:
    """The tensor of a classification head that ``parameter`` is."""
    match = _HEADS.fullmatch(parameter)
    return match and f"{'cls' if match[1] else 'cls.output'}.{match[2]}"
