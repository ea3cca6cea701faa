"""What llama.cpp calls things: the GGUF architecture of a Hugging Face model, and the GGUF name of each of its parameters.

    model.layers.3.self_attn.v_proj.weight    <->    blk.3.attn_v.weight

The names are those of the `gguf` package (`gguf.get_tensor_name_map`), which llama.cpp's converter uses; beyond it this file knows

    architectures                 those that we can write: llama (SmolLM, TinyLlama, Mistral), qwen2, qwen3, gemma2, gemma3, phi3, and the
                                  encoders bert and nomic-bert
    tied embeddings               one tensor, token_embd.weight: llama.cpp reads the output head from it when there is no output.weight
    what no file holds            BERT's pooler and its pre-training heads: llama.cpp pools the hidden states itself
    nomic_bert of transformers    q, k and v are three modules there, where the first nomic models had one; llama.cpp reads either

Both the mixes (`qtrain/grids/mix.py`, whose rule goes by GGUF names) and the exporter read names here, so that the type that training
used is the type of the tensor of that name. Nothing heavy is imported at load time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "bert": "bert",
    "nomic_bert": "nomic-bert",
}
"""model_type of a Hugging Face configuration -> architecture of a GGUF file."""

TOKEN_EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"

_WRAPPERS = re.compile(r"^(bert|nomic_bert)\.|(?<=^model\.)language_model\.|^language_model\.")
"""Prefixes that a head or a vision model puts before the names of the text model."""
_LEFT_OUT = re.compile(r"^(pooler\.|cls\.predictions\.|cls\.seq_relationship\.)")
"""Parameters of encoders that llama.cpp has no use for."""
_HEADS = {"pooler.dense": "cls", "classifier": "cls.output"}
"""BERT's classification head, of files whose pooling is `rank`."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_NOMIC = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "post_attention_layernorm": "attn_output_norm",
    "post_mlp_layernorm": "layer_output_norm",
}


@dataclass(frozen=True)
class Facts:
    """What llama.cpp's choice of tensor types depends on, beside names and shapes."""

    architecture: str
    """As GGUF spells it: llama, nomic-bert."""
    layers: int
    heads: int
    """Attention heads of the queries."""
    kv_heads: int
    """Attention heads of keys and values."""
    experts: int = 0
    """Experts per layer; 0 in dense models."""

    @property
    def kv_groups(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads


def architecture(config: Any) -> str:
    """The GGUF architecture of a Hugging Face configuration.

    Raises:
        ValueError: if it is none of ours, naming it and ours.
    """
    kind = getattr(_text(config), "model_type", type(config).__name__)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"models of type {kind!r} are not among those whose GGUF tensors qtrain can name; ours are {', '.join(sorted(ARCHITECTURES))}. "
            "Choose such a model (model.path=FOLDER), or a grid and an exporter that go by no GGUF names (grid@quantizer.weight=ggml, "
            "export=[onnx])"
        )
    return ARCHITECTURES[kind]


def facts(config: Any) -> Facts:
    """The numbers of a Hugging Face configuration that llama.cpp's type rule reads.

    Raises:
        ValueError: if the architecture is none of ours.
    """
    text, arch = _text(config), architecture(config)
    heads = text.num_attention_heads
    return Facts(
        arch,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        experts=getattr(text, "num_local_experts", None) or 0,
    )


def tied(model: nn.Module) -> bool:
    """Whether the output head and the token embedding of a transformers model are one tensor."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is None or embedding is None:
        return False
    ours, theirs = getattr(head, "weight", None), getattr(embedding, "weight", None)
    if ours is None or theirs is None:  # layers that hold codes
        return bool(getattr(_text(model.config), "tie_word_embeddings", False))
    return ours is theirs


def tensor_names(config: Any, parameters: Iterable[str], tied: bool | None = None, heads: bool = False) -> dict[str, str]:
    """The GGUF name of each of ``parameters`` (`...weight`, `...bias`, as `model.named_parameters()` gives them).

    Args:
        tied: whether the output head is the token embedding; None for what the configuration says.
        heads: name BERT's pooler and classifier too, where they are otherwise left out and refused.

    Returns:
        parameter -> tensor, without the parameters that no file holds (`left_out`); of a tied model, the head and the embedding have the
        same tensor. Turn it round for tensor -> parameter.

    Raises:
        ValueError: if the architecture is none of ours, or has no tensor for a parameter, naming them.
    """
    import gguf

    arch = architecture(config)
    text = _text(config)
    tied = bool(getattr(text, "tie_word_embeddings", False)) if tied is None else tied
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[arch], text.num_hidden_layers)
    names, unknown = {}, []
    for parameter in parameters:
        module, _, suffix = _WRAPPERS.sub("", parameter).rpartition(".")
        if heads and arch == "bert" and module in _HEADS:
            names[parameter] = f"{_HEADS[module]}.{suffix}"
            continue
        if left_out(parameter):
            continue
        if tied and parameter.endswith("lm_head.weight"):
            names[parameter] = TOKEN_EMBEDDING
            continue
        name = _tensor_name(table, arch, parameter)
        if name is None or name.startswith("cls."):
            unknown.append(parameter)
        else:
            names[parameter] = name
    if unknown:
        raise ValueError(
            f"{len(unknown)} parameters have no tensor in a GGUF file of architecture {arch}, the first {', '.join(unknown[:3])}; a file "
            "holds the language model, or the encoder. Choose a model without them (model=causal_lm, say)"
        )
    return names


def left_out(parameter: str) -> bool:
    """Whether ``parameter`` is one that GGUF files leave out, since llama.cpp has no use for it (BERT's pooler)."""
    return bool(_LEFT_OUT.match(_WRAPPERS.sub("", parameter)))


def _tensor_name(table: Any, arch: str, parameter: str) -> str | None:
    inner = _WRAPPERS.sub("", parameter)
    if arch == "nomic-bert" and (found := _LAYER.search(inner)):
        layer, rest = found.groups()
        module, _, suffix = rest.rpartition(".")
        if module in _NOMIC:
            return f"blk.{layer}.{_NOMIC[module]}.{suffix}"
    for candidate in (inner, f"model.{inner}"):  # a bare LlamaModel has no `model.`
        name = table.get_name(candidate, (".weight", ".bias"))
        if name is not None:
            return str(name)
    return None


def _text(config: Any) -> Any:
    """The configuration of the text model, where a vision model wraps one."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
