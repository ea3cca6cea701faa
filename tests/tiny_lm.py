"""A small real language model: a llama of two layers with a byte-level BPE tokenizer of its own, which llama.cpp knows as `smollm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
"""Ids 0, 1 and 2: as SmolLM2 has them, unknown, beginning, and end (and padding)."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_text(characters: int = 30_000) -> str:
    """English text that every Python has: the language reference, from its own help system."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[:characters]


def tiny_tokenizer(vocab: int = 512) -> Any:
    """A byte-level BPE of ``vocab`` tokens (at least 259), single digits, GPT-2's regular expression, and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(tiny_text().splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_language_model(folder: Path, tied: bool = True, vocab: int = 512, seed: int = 0, **config: Any) -> Path:
    """Save a randomly initialised llama with its tokenizer as a transformers folder.

    256 wide, so that ggml's super-blocks fit every row; 512 in the middle; 2 layers; 4 heads of 64 over 2 key-value heads; 128 positions.

    Args:
        tied: whether the output head is the embedding.
        vocab: tokens of the tokenizer and rows of the embedding; `vocab_size=` in ``config`` gives the model more rows than that.
        seed: of the weights.
        config: other fields of `LlamaConfig`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.05,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**values, **config}))
    model.save_pretrained(folder)
    tiny_tokenizer(vocab).save_pretrained(folder)
    return folder


def learn_by_heart(model: Any, ids: Any, steps: int = 8) -> list[float]:
    """The losses of a few steps of AdamW on ``ids`` [B, T], of what requires a gradient."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses
