"""Cross-layer equalization and bias correction (Nagel et al. 2019, arXiv 1906.04721): two repairs of convolutional networks.

**Equalization** (section 4.1). ReLU(s * x) = s * ReLU(x) for s > 0, so between two layers with nothing but a ReLU (or a max-pool, an
average pool, a dropout) in between, each channel's scale is free:

    W1 -> diag(1 / s) W1,  b1 -> b1 / s,  W2 -> W2 diag(s)        s_i = sqrt(r1_i / r2_i)

r1_i is the largest magnitude in row i of W1, r2_i in column i of W2; afterwards both are sqrt(r1_i * r2_i). Chains (convolution, depthwise
convolution, convolution) take a few rounds. It needs no data. The network computes the same; what changes is how evenly channels use a
grid whose scale they share: the weights of one row of W2 (or all of W1 with one scale per tensor), and the activation in between. Two
guards that the paper lacks: s_i = 1 where a range is zero, and no bias grows beyond the layer's largest. A channel whose weights a
batch-norm has all but switched off is a constant b1_i; equal ranges would multiply it by thousands, and the activation's range with it.
(The paper lowers such constants later, by "absorbing high biases", which is not exact.)

**Bias correction** (section 4.2, with data, appendix D). Rounding shifts the mean of a channel: E[W_q x_q] is not E[W x]. Layer by layer,
in the order of their calls, the mean output over the calibration data is compared with the float model's, and the difference goes into
the bias; later layers are measured with earlier ones corrected. Layers that read one tensor (query, key, value) are measured together. The
forward pass stops behind the layer that is measured, so that L layers cost about L / 2 passes over the data.

Shapes: W1 [C, I, *kernel], W2 [O, C / groups, *kernel], s, b1, means [C].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, fx, nn

from qtrain import graph
from qtrain.console import console
from qtrain.layers import FakeConv, FakeLayer, FakeLinear, fake_layers, in_float
from qtrain.smoothing import hooks, identity, run

ROUNDS = 50
"""Most passes over all pairs; three layers in a row take about ten."""
SETTLED = 1e-4
"""Largest |log s| of a pass after which nothing moves any more."""

_RELU_MODULES, _RELU_FUNCTIONS, _RELU_METHODS = (nn.ReLU,), {F.relu, F.relu_, torch.relu, torch.relu_}, {"relu", "relu_"}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity)
_POOL_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
)
_POOL_FUNCTIONS = {
    *(F.max_pool1d, F.max_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, torch.max_pool1d, torch.max_pool2d),
    *(F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
}


def equalize(model: nn.Module) -> fx.GraphModule:
    """Fold the batch-norms of ``model``, and equalize each pair of layers that allows it; its parameters change in place.

    Returns:
        The traced model, which computes the same up to float rounding.

    Raises:
        ValueError: if the model cannot be traced, or no two layers have only a ReLU between them.
    """
    try:
        traced = graph.trace(model)
    except graph.Untraceable as error:
        raise ValueError(f"quantizer.equalize=true needs to know which layer reads which: {error}. Set quantizer.equalize=false") from error
    graph.fold_batch_norms(traced, graph.batch_norms(traced))
    pairs = find_pairs(traced)
    if not pairs:
        raise ValueError(
            f"quantizer.equalize=true finds no two layers of {type(model).__name__} with only a ReLU between them (other activations, "
            "ReLU6 among them, do not commute with scales; nor may anything else read the value). Set quantizer.equalize=false"
        )
    for _ in range(ROUNDS):
        if max(balance(traced.get_submodule(a), traced.get_submodule(b)) for a, b in pairs) < SETTLED:
            break
    return traced


def find_pairs(traced: fx.GraphModule) -> list[tuple[str, str]]:
    """Names of layers between which each channel's scale is free, in the order of the graph: two convolutions, or two Linears."""
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    holders = Counter(id(m.weight) for m in traced.modules() if isinstance(getattr(m, "weight", None), nn.Parameter))

    def layer(node: fx.Node) -> Any:
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        alone = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and calls[node.target] == 1 and holders[id(module.weight)] == 1
        return module if alone else None

    found = []
    for node in traced.graph.nodes:
        first = layer(node)
        if first is None:
            continue
        reader = node
        while len(reader.users) == 1:
            reader = next(iter(reader.users))
            if not _commutes(traced, reader, pools=not isinstance(first, nn.Linear)):
                break
        if type(layer(reader)) is type(first) and reader is not node:
            found.append((str(node.target), str(reader.target)))
    return found


def _commutes(traced: fx.GraphModule, node: fx.Node, pools: bool) -> bool:
    """Whether ``node`` maps each channel by itself, and s * x to s times what it makes of x, for s > 0.

    Args:
        pools: whether pools count; behind a Linear they would pool channels.
    """
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        plain = not getattr(module, "return_indices", False)
        return isinstance(module, (*_RELU_MODULES, *_DROPOUTS)) or (pools and plain and isinstance(module, _POOL_MODULES))
    if node.op == "call_function":
        pool = node.target in _POOL_FUNCTIONS and not node.kwargs.get("return_indices", False)
        return node.target in _RELU_FUNCTIONS or node.target is F.dropout or (pools and pool)
    return node.op == "call_method" and node.target in _RELU_METHODS


@torch.no_grad()
def balance(first: Any, second: Any) -> float:
    """Equalize the channels between two layers, in place.

    Returns:
        The largest |log s|.
    """
    r1 = first.weight.abs().flatten(1).amax(1)
    w2 = second.weight
    groups = getattr(second, "groups", 1)
    r2 = w2.reshape(groups, w2.shape[0] // groups, w2.shape[1], -1).abs().amax((1, 3)).flatten()
    known = (r1 > 0) & (r2 > 0)
    s = torch.where(known, r1 / torch.where(known, r2, 1.0), 1.0).sqrt()
    if first.bias is not None:
        b = first.bias.abs()
        s = torch.where(known & (b > 0), torch.maximum(s, b / b.max()), s)
        first.bias.div_(s)
    first.weight.div_(s.reshape(-1, *[1] * (first.weight.ndim - 1)))
    columns = s.reshape(groups, 1, -1).expand(-1, w2.shape[0] // groups, -1).reshape(w2.shape[0], w2.shape[1])
    w2.mul_(columns.reshape(*w2.shape[:2], *[1] * (w2.ndim - 2)))
    return float(s.log().abs().max())


class _Enough(Exception):
    """All layers that are measured have been called: the rest of the forward pass is of no interest."""


@torch.no_grad()
def correct_biases(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Move the mean error of each output channel into the bias, layer by layer, in place.

    Args:
        model: fake-quantized, and calibrated where its activations are static; it also is its own float reference.
        batches: keyword inputs of ``model``.

    Returns:
        [{"name", "largest"}] in the order of calls: the largest |correction| of each layer.

    Raises:
        ValueError: if there is no data, no layer, or an output is not finite (naming the layer).
    """
    batches = list(batches)
    if not batches:
        raise ValueError(
            "quantizer.bias_correction=true needs calibration data, and there is none; set data.calibration_examples=256, say, or "
            "quantizer.bias_correction=false"
        )
    layers = {name: layer for name, layer in fake_layers(model) if isinstance(layer, (FakeConv, FakeLinear))}
    if not layers:
        raise ValueError(
            "quantizer.bias_correction=true finds no fake-quantized Linear or convolution to correct; set quantizer.bias_correction=false"
        )
    training = model.training
    model.eval()
    try:
        with in_float(model):
            groups, calls = call_order(model, layers, batches[0])
            wanted = _means(model, {name: layers[name] for group in groups for name in group}, batches, calls)
        rows = []
        for group in track(groups, description="correcting biases", console=console, transient=True, disable=not console.is_terminal):
            means = _means(model, {name: layers[name] for name in group}, batches, calls)
            for name in group:
                shift = (wanted[name] - means[name] + _rounding(layers[name])).to(layers[name].weight.dtype)
                _shift_bias(layers[name], shift)
                rows.append({"name": name, "largest": float(shift.abs().max())})
    finally:
        model.train(training)
    return rows


def call_order(model: nn.Module, layers: Mapping[str, FakeLayer], batch: dict[str, Tensor]) -> tuple[list[list[str]], dict[str, int]]:
    """Names of the layers that are called, in order, those together that follow each other and read one tensor; and calls per batch."""
    groups: list[list[str]] = []
    calls: dict[str, int] = {}
    last: list[Any] = [None, None]

    def reading(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if calls[name] > 1:
                last[:] = [None, None]
                return
            same = last[1] == identity(args[0])
            last[:] = [args[0], identity(args[0])]  # the tensor too: its memory must not become another's
            if same:
                groups[-1].append(name)
            else:
                groups.append([name])

        return hook

    with hooks() as registered:
        for name, layer in layers.items():
            registered.append(layer.register_forward_pre_hook(reading(name)))
        run(model, batch)
    return groups, calls


def _means(model: nn.Module, layers: Any, batches: list[dict[str, Tensor]], calls: dict[str, int]) -> dict[str, Tensor]:
    """Mean output of each channel of ``layers``, float64; each pass goes no further than the last of them."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    missing: dict[str, int] = {}

    def writing(name: str) -> Any:
        def hook(layer: nn.Module, _: Any, y: Tensor) -> None:
            rows = y.movedim(1, -1).flatten(0, -2) if isinstance(layer, FakeConv) else y.flatten(0, -2)
            total = rows.sum(0, dtype=torch.float64)
            if not bool(torch.isfinite(total).all()):
                raise ValueError(
                    f"the output of {name} is not finite. Look at the data and the model; or leave the layer in float: "
                    f"quantizer.keep_float=['{name}']"
                )
            sums[name] = sums[name] + total if name in sums else total
            counts[name] += len(rows)
            missing[name] -= 1
            if not any(n > 0 for n in missing.values()):
                raise _Enough

        return hook

    with hooks() as registered:
        for name, layer in layers.items():
            registered.append(layer.register_forward_hook(writing(name)))
        for batch in batches:
            missing.update({name: calls[name] for name in layers})
            try:
                run(model, batch)
            except _Enough:
                continue
    return {name: sums[name] / max(counts[name], 1) for name in layers}


def _rounding(layer: FakeLayer) -> Tensor:
    """What rounding adds to the bias now, in what was measured; the corrected bias is rounded anew."""
    w, b = layer.folded()
    rounded = layer.on_grid(w, b)[1]
    return torch.zeros(()) if b is None or rounded is None else rounded - b


def _shift_bias(layer: Any, shift: Tensor) -> None:
    """Add ``shift`` to every output of ``layer``."""
    holder = getattr(layer, "batch_norm", None) or layer  # the batch-norm's bias comes last
    if holder.bias is None:
        holder.bias = nn.Parameter(shift)
    else:
        holder.bias.add_(shift)
