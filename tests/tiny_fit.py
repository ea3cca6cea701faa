"""A training stage on a small language model: real text, real tokenizer, real trainer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from qtrain.fit import Fit, train
from qtrain.language import LanguageDataModule
from qtrain.language_task import TASK
from qtrain.module import Module
from tests.tiny_lm import tiny_text, tiny_tokenizer

TRAINER = {
    "_target_": "lightning.pytorch.Trainer",
    "accelerator": "cpu",
    "precision": "32-true",
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
}


def small_llama(**config: Any) -> Any:
    """A llama of two layers, 32 wide, with random weights of a fixed seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "use_cache": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**values, **config}))


tokenizer = cache(tiny_tokenizer)
"""Making it takes a second."""


def small_text(folder: Path, characters: int = 8000, batch_size: int = 4) -> LanguageDataModule:
    """Sequences of 32 tokens."""
    from qtrain.data.text import TextCorpus

    path = folder / "text.txt"
    path.write_text(tiny_text(characters))
    return TextCorpus(train=str(path), context=32, batch_size=batch_size, calibration_sequences=2).build(tokenizer(), 0)


def language_fit(
    model: Any,
    folder: Path,
    callbacks: list[Callback] | None = None,
    *,
    stage: str = "float",
    resume: bool = False,
    module: type[Module] = Module,
    trainer: dict[str, Any] | None = None,
    optimizer: Any = torch.optim.AdamW,
    seed: int = 0,
    **options: Any,
) -> Module:
    """Train ``model`` on `small_text`; checkpoints are in ``folder``/steps."""
    fit = Fit(**{"epochs": 1, "max_steps": 8, "learning_rate": 1e-2, "schedule": "constant", "warmup": 0.0, **options})
    torch.manual_seed(seed)
    made = module(model, fit, optimizer, task=TASK)
    node = {**TRAINER, **(trainer or {})}
    train(
        made,
        small_text(folder),
        fit,
        stage=stage,
        folder=folder / "steps",
        trainer=node,
        logger=None,
        callbacks=callbacks or [],
        resume=resume,
    )
    return made
