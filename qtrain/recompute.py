"""Gradient checkpointing: blocks are computed again in the backward pass instead of being remembered (Chen et al. 2016, arXiv 1604.06174).

What a training step remembers is then one activation per transformer block, and what one block needs inside; the price is one more
forward pass, about a third of the step. transformers does it, block by block, by torch's checkpoint without re-entering autograd, which
gives gradients to adapters in a frozen base as it is. For the kind that re-enters, transformers also makes the embeddings ask for a
gradient, by hooks that it leaves in place when it is switched off (5.23): they are removed at once.

A block has to compute the same twice. Dropout does (the generator is put back), fake-quant does; static activation ranges that follow the
batches (observer=moving_average) would move in between, and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qtrain.layers import fake_activations


def require_recomputable(model: Any, option: str) -> None:
    """Refuse a model that transformers cannot compute in parts.

    Args:
        option: where the stage's options are: `finetune`.

    Raises:
        ValueError: naming the option.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"{option}.gradient_checkpointing=true, and {type(model).__name__} cannot: it is no model of transformers, or one without "
            f"support for it; valid for it: false. Set {option}.gradient_checkpointing=false, and data.batch_size lower to save memory"
        )


@contextmanager
def recomputed(model: Any, option: str) -> Iterator[None]:
    """Blocks of ``model`` are computed again in the backward pass.

    Raises:
        ValueError: see `require_recomputable`; also for static activation ranges that follow the batches.
    """
    require_recomputable(model, option)
    for name, activation in fake_activations(model):
        if activation.observer is not None and activation.observer.kind == "moving_average":
            raise ValueError(
                f"{option}.gradient_checkpointing=true computes every block twice, and the activation range of {name} follows what it sees "
                f"(quantizer.observer=moving_average). Set quantizer.observer=minmax, or {option}.gradient_checkpointing=false"
            )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the latter until 5.22
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()
    try:
        yield
    finally:
        disable()
