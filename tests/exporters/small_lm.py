"""Tiny random transformers models of every architecture that GGUF files have; what the exporter tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 320
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**COMMON, **SPECIAL, "num_key_value_heads": 2, "max_position_embeddings": 256}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def tiny(family: str, seed: int = 0, **options: Any) -> nn.Module:
    """A random llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, bert, bert_classifier or nomic_bert; ``options`` go into its config.

    Weights are as large as trained ones, so that attention is far from uniform and positions matter.
    """
    import transformers as t

    classes: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, GROUPED),
        "mistral": (t.MistralForCausalLM, t.MistralConfig, {**GROUPED, "sliding_window": None}),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, GROUPED),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {**GROUPED, "head_dim": 32}),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config, {**GROUPED, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
        "gemma3": (
            t.Gemma3ForCausalLM,
            t.Gemma3TextConfig,
            {**GROUPED, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7},
        ),
        "phi3": (t.Phi3ForCausalLM, t.Phi3Config, GROUPED),
        "bert": (t.BertModel, t.BertConfig, {**COMMON, "max_position_embeddings": 128}),
        "bert_classifier": (t.BertForSequenceClassification, t.BertConfig, {**COMMON, "max_position_embeddings": 128, "num_labels": 3}),
        "nomic_bert": (t.NomicBertModel, t.NomicBertConfig, {**COMMON, "max_position_embeddings": 128}),
    }
    model_class, config_class, defaults = classes[family]
    torch.manual_seed(seed)
    config = config_class(**{**defaults, **options}, attn_implementation="eager")
    model = model_class(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.2 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5)
        if parameter.ndim < 2 and name.endswith("weight") and not family.startswith("gemma"):
            parameter.data += 1.0
    return model.eval()


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random ids."""
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def nmse(ours: torch.Tensor, theirs: Any) -> float:
    """Squared error of ``theirs`` over the energy of ``ours``."""
    return float((torch.as_tensor(theirs) - ours).double().square().sum() / ours.double().square().sum())
