"""Swap layers for ones that compute on a grid (`prepare`), and those for ones that hold codes (`convert`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qtrain.activations import FakeActivation, Observer, QuantizedActivation
from qtrain.console import progress
from qtrain.grids.base import Grid, QuantizedTensor
from qtrain.layers import (
    FakeConv,
    FakeEmbedding,
    FakeLayer,
    FakeLinear,
    QuantizedConv,
    QuantizedEmbedding,
    QuantizedLinear,
    SmoothedLinear,
    fake_activations,
    fake_layers,
)
from qtrain.scaled_embedding import multiplies

SWAPPABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
"""Classes of modules that can be put on a grid."""
ROWS = 8
"""Rows of a weight that show whether a type holds the values of its grid."""


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` where the module called ``name`` is, and wherever else that same module is (T5 holds its embedding three times)."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, leaf, layer)


def copy_of(model: nn.Module, share: bool = True) -> nn.Module:
    """A copy of the modules; of their tensors too, unless ``share``.

    Shared are the values. The Parameters around them are the copy's own, so that one model can move to another device or type (which
    gives a Parameter other values in place) and the other stays as it is; tied ones stay tied. Parameters of other libraries' classes,
    which carry more than their values, are the same objects; so are buffers, but for the statistics of batch-norms, which training moves.
    """
    if not share:
        return copy.deepcopy(model)
    moving = {id(b) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for b in m.buffers()}
    memo: dict[int, Any] = {id(b): b for b in model.buffers() if id(b) not in moving}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=p.requires_grad) if type(p) is nn.Parameter else p
    return copy.deepcopy(model, memo)


def _unswappable(model: nn.Module) -> Callable[[nn.Module], str | None]:
    """A function that says why a module cannot be swapped whatever its shape, or None if it can."""
    fused: set[int] = set()
    if torch.backends.mha.get_fastpath_enabled():
        fused = {id(m) for e in model.modules() if isinstance(e, nn.TransformerEncoderLayer) for m in (e.linear1, e.linear2)}

    def why(module: nn.Module) -> str | None:
        base = next(c for c in SWAPPABLE if isinstance(module, c))
        known = type(module).forward in (base.forward, SmoothedLinear.forward)
        if not known and not (isinstance(module, nn.Embedding) and multiplies(module)):
            return f"{type(module).__name__} has a forward of its own, which a fake-quantized {base.__name__} does not repeat"
        if not isinstance(module.weight, nn.Parameter):
            return "its weight is computed (a parametrization); remove it first, with torch.nn.utils.parametrize.remove_parametrizations"
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads its weight and never calls it"
        if id(module) in fused:
            return "nn.TransformerEncoderLayer reads its weight in evaluation, unless torch.backends.mha.set_fastpath_enabled(False)"
        if getattr(module, "max_norm", None) is not None:
            return "max_norm rewrites rows as they are looked up, which codes cannot follow"
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return f"its padding is {module.padding_mode!r}, and no integer convolution has another than zeros"
        if module is model:
            return "it is the model itself; put it in an nn.Sequential"
        return None

    return why


def prepare(
    model: nn.Module,
    modules: dict[str, nn.Module],
    weight: Grid | dict[str, Grid],
    embedding: Grid | None = None,
    activation: Grid | None = None,
    static: bool = False,
    *,
    observer: dict[str, Any] | None = None,
    batch_norms: dict[str, Any] | None = None,
) -> list[str]:
    """Swap ``modules`` of ``model`` for fake-quantized ones, in place.

    Args:
        weight, embedding: grids of the weights; or in ``weight`` the grid of each module by name, embeddings included.
        activation: grid of each layer's input, or None where it stays in float or is quantized elsewhere.
        static: whether the input's range is observed and then fixed.
        observer: options of `Observer`, for static ranges.
        batch_norms: convolution's name -> the batch-norm behind it, to hold while training.

    Returns:
        Names of those that were swapped; Embeddings stay in float where ``embedding`` is None.

    Raises:
        ValueError: naming every module whose shape, or whose inputs, do not fit the grid, or that computes in its own way.
    """
    swaps: dict[str, nn.Module] = {}
    misfits = []
    unswappable = _unswappable(model)
    for name, module in modules.items():
        grid = _grid_of(name, module, weight, embedding)
        if grid is None:
            continue
        beside = activation if activation is None or not hasattr(activation, "beside") else activation.beside(grid)
        why = unswappable(module) or grid.check_shape(tuple(module.weight.shape)) or _input_misfit(module, beside)  # type: ignore[arg-type]
        if why:
            misfits.append(f"{name}: {why}")
            continue
        fake = None
        if beside is not None and not isinstance(module, nn.Embedding):
            fake = FakeActivation(beside, Observer(beside, **(observer or {})) if static else None)
        try:
            swaps[name] = _swapped(module, grid, fake, (batch_norms or {}).get(name))
        except ValueError as error:
            misfits.append(f"{name}: {error}")
    if misfits:
        shown = "\n  ".join(misfits[:5]) + (f"\n  and {len(misfits) - 5} more" if len(misfits) > 5 else "")
        raise ValueError(
            f"{len(misfits)} modules do not fit the grid:\n  {shown}\n"
            f"or leave them in float: quantizer.keep_float=[{misfits[0].split(':')[0]}]"
        )
    for name, layer in swaps.items():
        replace(model, name, layer)
    return list(swaps)


def _grid_of(name: str, module: nn.Module, weight: Grid | dict[str, Grid], embedding: Grid | None) -> Grid | None:
    if isinstance(weight, dict):
        return weight.get(name)
    return embedding if isinstance(module, nn.Embedding) else weight


def _input_misfit(module: nn.Module, activation: Grid | None) -> str | None:
    """Why the input of ``module`` does not fit the grid ``activation``."""
    if activation is None or isinstance(module, nn.Embedding):
        return None
    if isinstance(module, nn.Linear):
        why = activation.check_shape((1, module.in_features))
        return why and f"as the grid of its inputs, {why}"
    granularity = getattr(activation, "granularity", "tensor")
    if granularity != "tensor":
        return (
            f"the inputs of a convolution have one scale, given quantizer.activation.granularity={granularity}; "
            "set quantizer.activation.granularity=tensor"
        )
    return None


def _swapped(module: nn.Module, grid: Grid, fake: FakeActivation | None, batch_norm: Any) -> FakeLayer:
    if isinstance(module, nn.Embedding):
        return FakeEmbedding(module, grid)
    if isinstance(module, nn.Linear):
        return FakeLinear(module, grid, fake)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    return FakeConv(module, grid, fake, batch_norm)


def choose_once(model: nn.Module, what: str = "searching scales") -> None:
    """Search the scales of every layer whose grid, or importance, wants a search, and keep them: that takes seconds, using them does not.

    Args:
        what: shown beside the progress bar; empty for none.
    """
    searched = [layer for _, layer in fake_layers(model) if layer.weight_fake.searches and layer.weight_fake.frozen is None]
    found: dict[Any, Any] = {}
    for layer in progress(searched, what):
        fake = layer.weight_fake
        key = (id(layer.weight), repr(fake.grid), id(fake.importance))
        if key not in found:
            fake.freeze(layer.folded()[0])
            found[key] = fake.frozen
        fake.frozen = found[key]  # tied weights share theirs


def one_row(model: nn.Module) -> nn.Module:
    """Cut the weight of every fake-quantized layer down to its first row, in place: for a trial of what takes long on whole weights.

    A row of a model without storage becomes one of evenly spread values.
    """
    for _, layer in fake_layers(model):
        row = layer.weight[:1].detach()
        row = torch.linspace(-1, 1, row.numel(), dtype=row.dtype).view(row.shape) if row.is_meta else row
        layer.weight = nn.Parameter(row, requires_grad=False)
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.zeros_like(layer.bias[:1], device=row.device), requires_grad=False)
        if layer.weight_fake.scale is not None:
            layer.weight_fake.scale = nn.Parameter(layer.weight_fake.scale[:1].detach())
    return model


def lost_by_dtype(model: nn.Module) -> list[dict[str, str]]:
    """Layers that compute with other values than the runtime, because their weights have 16 bits: [{"name", "why"}].

    Their codes and scales are right, and files have them whole; what the model computes with here is decode(codes) in the weight's dtype.
    """
    found = []
    for name, layer in fake_layers(model):
        w, grid = layer.weight.detach(), layer.weight_fake.grid
        if w.dtype == torch.float32:
            continue
        kept, values = str(w.dtype).removeprefix("torch."), grid.fake(w[:ROWS].float())
        if not torch.equal(values.to(w.dtype).float(), values):
            beside = None if grid.check_dtype(torch.float32) else grid.check_dtype(w.dtype)
            told = "; ".join(filter(None, [f"its values are rounded to {kept} in training and evaluation, not in the runtime", beside]))
            found.append({"name": name, "why": f"{told}. Set model.dtype=float32 and trainer.precision=32-true (or bf16-mixed)"})
    return found


def convert(model: nn.Module) -> nn.Module:
    """Swap every fake-quantized layer and activation of ``model`` for one that holds codes, in place.

    Raises:
        ValueError: if a weight is not finite, or a static activation has no range.
    """
    model.eval()
    layers = list(fake_layers(model))
    inside = {id(layer.activation_fake) for _, layer in layers}
    edges: dict[int, QuantizedActivation] = {}
    for name, activation in list(fake_activations(model)):
        if id(activation) not in inside:
            edges[id(activation)] = activation.converted()  # type: ignore[assignment]
            replace(model, name, edges[id(activation)])
    shared: dict[int, list[QuantizedTensor]] = {}  # tied weights stay one tensor, unless their grids or scales differ
    for name, layer in progress(layers, "converting to codes"):
        q, bias, bias_codes = layer.encode(name)
        twins = shared.setdefault(id(layer.weight), [])
        same = next((t for t in twins if _equal(t, q)), None)
        if same is None:
            twins.append(q)
        replace(model, name, _converted(layer, same or q, bias, bias_codes, edges.get(id(layer.source))))
    return model.eval()


def _converted(layer: FakeLayer, q: QuantizedTensor, bias: Any, bias_codes: Any, source: QuantizedActivation | None) -> nn.Module:
    if isinstance(layer, FakeEmbedding):
        return QuantizedEmbedding(q, layer.weight.dtype, layer.embed_scale)
    activation = None if layer.activation_fake is None else layer.activation_fake.converted()
    rest: dict[str, Any] = {"activation": activation, "bias_codes": bias_codes, "source": source}
    if isinstance(layer, FakeConv):
        return QuantizedConv(q, bias, layer.geometry, **rest)
    assert isinstance(layer, FakeLinear)
    return QuantizedLinear(q, bias, **rest, inverse_smoothing=layer.inverse_smoothing)


def _equal(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    same = a.grid == b.grid and a.params.keys() == b.params.keys() and torch.equal(a.codes, b.codes)
    return same and all(torch.equal(a.params[n], b.params[n]) for n in a.params)
