"""Small GGUF files with known weights, written tensor by tensor here: a causal model and an encoder, beside the same in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

END = "<|end|>"
"""The token that ends a text: id 256."""


def llama_vocabulary() -> list[str]:
    """Bytes in GPT-2's spelling, `END`, and one merge."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    return [*(spelling[byte] for byte in range(256)), END, "he", "<|a|>", "<|b|>"]


def small_llama(layers: int = 2, heads: int = 4, seed: int = 0) -> LlamaForCausalLM:
    """128 wide, heads of 32, 2 key heads, 260 tokens; large enough weights that the logits differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(llama_vocabulary()),
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def small_bert(seed: int = 0) -> BertModel:
    """32 wide, 2 layers, 40 tokens."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(bert_vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_act="gelu",
    )
    model = BertModel(config, add_pooling_layer=False)
    model.train(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def bert_vocabulary() -> list[str]:
    """In WordPiece's spelling."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in "abcdefghi")]


def write_llama(path: Path, model: LlamaForCausalLM, split: int = 0, **changed: Any) -> None:
    """``split`` tensors per file; ``changed`` metadata, by the key's last word."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", changed.get(key.split(".")[-1], value))
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    words = llama_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in words])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(changed.get("eos_token_id", words.index(END)))
    writer.add_bos_token_id(words.index(END))
    for name, value in model.state_dict().items():
        writer.add_tensor(_llama_name(name), _llama_value(name, value, config).numpy().astype(np.float32))
    _close(writer)


def write_bert(path: Path, model: BertModel) -> None:
    """With mean pooling."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    words = bert_vocabulary()
    writer.add_tokenizer_model("bert")
    writer.add_token_list([word[2:] if word.startswith("##") else word if word.startswith("[") else "\u2581" + word for word in words])
    writer.add_token_types([3 if word.startswith("[") else 1 for word in words])
    writer.add_token_type_count(config.type_vocab_size)
    writer.add_bos_token_id(words.index("[CLS]"))
    writer.add_sep_token_id(words.index("[SEP]"))
    writer.add_pad_token_id(words.index("[PAD]"))
    writer.add_unk_token_id(words.index("[UNK]"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if "position_ids" not in name:
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(str(found), value.numpy().astype(np.float32))
    _close(writer)


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama_name(name: str) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
    return str(names.get_name(name, try_suffixes=(".weight",)))


def _llama_value(name: str, value: Tensor, config: Any) -> Tensor:
    """q and k with the two halves of each head interleaved, as ggml's rotation reads them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            return value.view(count, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
    return value


def nmse(given: np.ndarray, expected: Tensor | np.ndarray) -> float:
    """Squared error over squared length."""
    target = np.asarray(expected, np.float64)
    return float(((given - target) ** 2).sum() / (target**2).sum())


def hidden(model: nn.Module, ids: list[int]) -> Tensor:
    """[T, D] of the encoder."""
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids])).last_hidden_state[0]
    return found
