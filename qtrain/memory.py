"""What training an adapter will need, told before it starts: the base as it is stored, the adapter, and an estimate of a step.

Exact: the base (codes, scales, what stayed in float), the trained parameters, their gradients, the optimizer's moments. Estimated: the
activations that wait for the backward pass, after Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1): a transformer layer keeps

    34 * T * H bytes in 16 bits (T tokens of the batch, H hidden width), without the matrix of attention, which fused kernels do not keep

twice that in 32 bits; with gradient checkpointing only its input, 2 * T * H bytes, plus all of one layer that is computed again. A head
over the vocabulary adds its logits (at most `qtrain.language_task.KEPT`) four times; a base in codes, its largest weight decoded. The
measured peak is printed after training and in run.json (`memory.measured`), to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from qtrain.bnb import compute_dtype
from qtrain.console import console
from qtrain.fit import resolve_precision
from qtrain.foreign import parts
from qtrain.layers import quantized_layers
from qtrain.optimizers import moment_bytes

PER_LAYER = 34
"""Bytes that a transformer layer keeps per token and unit of width, in 16 bits."""


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.gradients + self.optimizer + self.activations

    def rows(self) -> dict[str, int]:
        """By name, the total last."""
        return {f"{name}_bytes": value for name, value in vars(self).items()} | {"total_bytes": self.total}


def stored_bytes(model: nn.Module) -> int:
    """Bytes of every distinct tensor of a model, those beside a bitsandbytes weight (absmax, …) included."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors |= {id(t): t for t in vars(part).values() if isinstance(t, torch.Tensor)} if part is not None else {}
        scales = getattr(parameter, "SCB", None)
        tensors |= {id(scales): scales} if isinstance(scales, torch.Tensor) else {}
    return sum(part.numel() * part.element_size() for t in tensors.values() for part in parts(t))


def estimate(
    model: nn.Module, tokens: int, *, checkpointing: bool, moment_bytes: int = 8, width_bytes: int = 4, base: int | None = None
) -> Memory:
    """What a step on ``tokens`` tokens needs.

    Args:
        model: with its adapter; what is trained requires a gradient.
        base: bytes of what is not trained, where they cannot be read off ``model``, which has no storage (`qtrain/dry.py`).
        moment_bytes: of the optimizer per trained parameter: 8 for AdamW in float32, 2 for its 8-bit form.
        width_bytes: of an activation: 4, or 2 under bf16-mixed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    adapter = sum(p.numel() * p.element_size() for p in trained)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, hidden = int(getattr(text, "num_hidden_layers", 0) or 0), int(getattr(text, "hidden_size", 0) or 0)
    layer = PER_LAYER * tokens * hidden * width_bytes // 2
    activations = (layers * tokens * hidden * width_bytes + layer) if checkpointing else layers * layer
    base = stored_bytes(model) - adapter if base is None else base
    return Memory(base, adapter, adapter, count * moment_bytes, activations + _largest(model) + _head(model, tokens))


def _largest(model: nn.Module) -> int:
    """Bytes of the largest weight that is decoded for a product, float32."""
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    return 4 * max((int(m.in_features * m.out_features) for m in modules), default=0)


def _head(model: Any, tokens: int) -> int:
    from qtrain.language_task import KEPT

    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return 0
    vocabulary = max((t.shape[0] for t in [*head.parameters(), *head.buffers()] if t.ndim == 2), default=0)
    return 4 * 4 * min(KEPT, tokens * vocabulary)


def show(memory: Memory, trained: int, total: int) -> None:
    """Print it."""
    share = 100 * trained / max(1, total)
    console.print(f"  {trained:,} trainable parameters, {share:.2f} % of {total:,}", highlight=False)
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name, value in memory.rows().items():
        label = {"activations_bytes": "activations, about", "total_bytes": "a step, about"}.get(name, name.removesuffix("_bytes"))
        table.add_row(f"  {label}", f"{value / 1e6:,.{0 if value >= 1e7 else 2}f} MB")
    console.print(table)


def announce(setup: Any, adapter: Any, base: int | None = None) -> None:
    """Print, before training, how much is trained and what it needs; the same goes into run.json.

    Args:
        base: see `estimate`.
    """
    config, fit = setup.config, setup.config.adapter.fit
    memory = estimate(
        adapter.model,
        tokens(setup),
        checkpointing=fit.gradient_checkpointing,
        moment_bytes=moment_bytes(config.optimizer),
        width_bytes=width_bytes(config),
        base=base,
    )
    total = sum(logical(p) for p in adapter.model.parameters()) + sum(
        codes.numel() for codes in {id(layer.codes): layer.codes for _, layer in quantized_layers(adapter.model)}.values()
    )
    show(memory, adapter.trainable, total)
    setup.record.data["memory"] = {"expected": memory.rows()}


def width_bytes(config: Any) -> int:
    """Bytes of an activation in training: 2 under a 16-bit precision, unless bitsandbytes' 4-bit products are in float32."""
    if "16" not in resolve_precision(str(config.trainer.get("precision", "auto"))):
        return 4
    products = getattr(config.quantizer, "compute_dtype", None)
    return 4 if products is not None and config.quantizer.type != "int8" and compute_dtype(products) == torch.float32 else 2


def report(setup: Any, peak: dict[str, int]) -> None:
    """Print what training needed, as `qtrain.peak.measured_peak` found it; the same goes into run.json beside the estimate."""
    if not peak:
        return
    setup.record.data["memory"]["measured"] = peak
    parts = []
    if "rss_peak_bytes" in peak:
        rise, whole = peak["rss_peak_bytes"] - peak["rss_before_bytes"], peak["rss_peak_bytes"]
        parts.append(f"{rise / 1e6:,.0f} MB more than before it, {whole / 1e6:,.0f} MB in all, with Python, libraries and data")
    if "cuda_peak_bytes" in peak:
        parts.append(f"{peak['cuda_peak_bytes'] / 1e6:,.0f} MB on the GPU")
    console.print(f"  training's peak: {'; '.join(parts)}", style="dim", highlight=False, soft_wrap=True)


def logical(parameter: Any) -> int:
    """Weights that a parameter stands for: two of a byte of bitsandbytes' 4-bit types."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None and state.shape is not None else int(parameter.numel())


def tokens(setup: Any) -> int:
    """Tokens of a training batch, at most."""
    data = setup.data
    length: Any = getattr(data, "context", None) or getattr(setup.config.data, "max_length", 1)
    return int(length) * int(setup.config.data.batch_size)
