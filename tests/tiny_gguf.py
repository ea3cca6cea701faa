"""A tiny GGUF file from a tiny llama: written tensor by tensor with the `gguf` package alone, so that reading can be compared with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types that the `gguf` package can write; matrices take them in turn."""


def ggml_name(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    stem, _, suffix = name.rpartition(".")
    return f"{gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).get_name(stem)}.{suffix}"


def interleave(w: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of a query or key projection as llama.cpp has them: the two halves of each head in turn."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def separate(w: NDArray[Any], heads: int) -> NDArray[Any]:
    """The inverse of `interleave`."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def heads_of(name: str, config: Any) -> int | None:
    """How many heads the rows of a tensor are of, where they are interleaved."""
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])


def write_tiny_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    types: tuple[str, ...] = TYPES,
    pre: str = "smollm",
    architecture: str = "llama",
    keys: dict[str, Any] | None = None,
    extra: dict[str, NDArray[np.float32]] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Write a llama, and return what each parameter decodes to.

    Args:
        types: of the matrices, in turn.
        pre: `tokenizer.ggml.pre`.
        keys: further hyperparameters, integers, floats and strings, by name without the architecture.
        extra: further tensors, by their name in the file.
    """
    c, writer, decoded = model.config, gguf.GGUFWriter(path, architecture), {}
    writer.add_context_length(c.max_position_embeddings)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    for key, value in (keys or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(key if key.startswith("split.") else f"{architecture}.{key}", value)
    _add_tokenizer(writer, tokenizer, pre)
    for i, (name, p) in enumerate(model.named_parameters()):
        kind = gguf.GGMLQuantizationType[types[i % len(types)] if p.ndim > 1 else "F32"]
        w, heads = p.detach().numpy(), heads_of(name, c)
        data = gguf.quantize(interleave(w, heads) if heads else w, kind)
        writer.add_tensor(ggml_name(name), data, raw_dtype=kind)
        value = gguf.dequantize(data, kind)
        decoded[name] = separate(value, heads) if heads else value
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def _add_tokenizer(writer: Any, tokenizer: Any, pre: str) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    merges = tokenizer.backend_tokenizer.model.__getstate__()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges(_merges(merges))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _merges(state: bytes) -> list[str]:
    import json

    return [merge if isinstance(merge, str) else " ".join(merge) for merge in json.loads(state)["merges"]]
