"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): outliers of activations move into weights, and the model computes the same.

    W x = (W diag(s)) (diag(1 / s) x)        s_j = max|x_j|^alpha / max|W_:j|^(1 - alpha)        j: input channels

A Linear's weight has a scale per output channel, its input one scale for all channels; so a channel of x that is a hundred times larger
than the rest costs the rest their resolution, and the same factor in W costs little. alpha = 0.5 shares the difficulty evenly.

Linears that read one tensor (query, key and value) share one s, with the largest magnitude over all their weights, so that the tensor is
still quantized once. A channel that was zero in all calibration data keeps s = 1: nothing is known of it.

**Where it helps.** The paper smooths what a LayerNorm writes. Elsewhere it may do harm: where a few columns of W are much larger than the
rest (25 times in MiniLM's down projections), 1 / s turns their channels of x into new outliers. On SST-2 with alpha = 0.5, what norms write
gains 4 to 9 dB, and inputs of down lose 2 to 6. So each group is rounded both ways on a sample of its inputs, and left alone where
smoothing makes its outputs worse.

**Where 1 / s goes.** Into parameters that exist already, where that is exact, since it then costs nothing at run time:

    a norm      the weight and bias of the LayerNorm or RMSNorm whose output x is (pre-norm encoders)
    a Linear    the rows and bias of an earlier Linear whose channels reach x one by one (value -> output of attention; up -> ReLU -> down)
    x itself    else: a `SmoothedLinear` multiplies its input by 1 / s

Whether it is exact is tried out, not derived from names: the norm of a post-norm encoder such as BERT also feeds the residual, and a GELU
is not homogeneous, so there the logits change and the attempt is undone. One calibration example screens each attempt, and the whole first
batch confirms all of them together (a ReLU6 shows only where something reaches 6).

Unlike the authors' code this knows no model families, and it also smooths what no norm precedes. What it does not do: search for alpha.

Shapes: I input channels; x [..., I], W [O, I], s [I], all in the model's own type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from qtrain.console import console
from qtrain.evaluate import logits_of, sqnr_db
from qtrain.grids.affine import Affine
from qtrain.grids.base import Grid
from qtrain.layers import SmoothedLinear
from qtrain.prepare import replace
from qtrain.receipt import nmse

UNCHANGED = 1e-8
"""Squared error of the logits, relative, below which a model computes the same: float32 rounding makes about 1e-13."""
LEAST = 1e-5
"""Least s, and least magnitude of a weight that counts, as in the authors' code."""
SAMPLE = 512
"""Rows of each group's input on which smoothing is tried out."""
NEAR = 3
"""How many Linears back a Linear may be that takes 1 / s: query, key and value come in any order."""


@dataclass
class Group:
    """Linears that read one tensor."""

    layers: list[str]
    producers: list[str]
    """Modules whose parameters might take 1 / s, the likeliest first."""
    low: Tensor | None = None
    high: Tensor | None = None
    sample: list[Tensor] = field(default_factory=list, repr=False)
    """Some of the inputs, [rows, I] each."""

    def fold(self, x: Tensor, rows: int) -> None:
        """See one batch, [N, I]; keep about ``rows`` of it."""
        low, high = x.amin(0), x.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.sample.append(x[:: max(1, len(x) // rows)][:rows].clone())

    def ends(self) -> tuple[Tensor, Tensor]:
        """Least and largest value of each input channel, [I]."""
        assert self.low is not None and self.high is not None
        return self.low, self.high

    def absmax(self) -> Tensor:
        """Largest magnitude of each input channel, [I]."""
        low, high = self.ends()
        return torch.maximum(high, -low)


@dataclass
class Fusion:
    """1 / s in the parameters of ``producer``, and how to take it out again."""

    producer: str
    undo: Callable[[], None] = field(repr=False)


@torch.no_grad()
def smooth(
    model: nn.Module,
    chosen: dict[str, nn.Module],
    calibration: list[dict[str, Tensor]],
    alpha: float,
    weight: Grid | None = None,
    activation: Grid | None = None,
) -> list[dict[str, Any]]:
    """Smooth the inputs of the Linears in ``chosen``, in place; the model computes what it computed.

    Args:
        chosen: modules of ``model`` by name; those that are no Linear are left alone.
        calibration: keyword inputs of ``model``, with examples along their first axis.
        alpha: 0 (weights are evened out) to 1 (activations are).
        weight, activation: grids on which it is tried out whether smoothing helps; None for INT8 with a scale per output channel, and per
            tensor.

    Returns:
        For each group of Linears that share s: {"layers": names, "fused": name of the module that holds 1 / s, or None, "largest": the
        largest s, "gain_db": by how much smoothing improves the signal to noise of their outputs}; and "skipped": why, where nothing was
        done.

    Raises:
        ValueError: if there is no data or no Linear, a Linear is never called, or its input is not finite (naming layer and batch).
    """
    linears = {name: m for name, m in chosen.items() if isinstance(m, nn.Linear)}
    assert not any(isinstance(m, SmoothedLinear) for m in linears.values()), "smoothed already"
    if not linears:
        raise ValueError(
            f"quantizer.smoothquant={alpha} smooths the inputs of Linear layers, and none of the {len(chosen)} chosen modules is one. "
            "Set quantizer.smoothquant=null"
        )
    if not calibration:
        raise ValueError(
            f"quantizer.smoothquant={alpha} needs calibration data, and there is none; set data.calibration_examples=256, say, or "
            "quantizer.smoothquant=null"
        )
    shared = _shared_parameters(model)
    tied = [name for name, m in linears.items() if id(m.weight) in shared]
    grids = (weight or Affine(8, "absmax", "channel"), activation or Affine(8, "minmax", "tensor"))
    training = model.training
    model.eval()
    try:
        example = {name: value[:1] for name, value in calibration[0].items()}
        groups = find_groups(model, {n: m for n, m in linears.items() if n not in tied}, example)
        _measure(model, groups, calibration)
        scales = [choose_scale(g.absmax(), _weights(model, g), alpha) for g in groups]
        gains = [gain_db(group, _weights(model, group), s, *grids) for group, s in zip(groups, scales, strict=True)]
        better = [number for number, gain in enumerate(gains) if gain > 0]
        fused = _fuse(model, groups, scales, better, example, calibration[0])
    finally:
        model.train(training)
    rows = []
    for number, (group, s, gain) in enumerate(zip(groups, scales, gains, strict=True)):
        row = {"layers": group.layers, "fused": fused.get(number), "largest": float(s.max()), "gain_db": round(gain, 2)}
        if number not in better:
            row["skipped"] = f"its outputs would lose {abs(gain):.1f} dB"
        elif number not in fused:
            for name in group.layers:
                layer: Any = model.get_submodule(name)
                smoothed = SmoothedLinear(layer, 1.0 / s)
                smoothed.weight = _scaled(layer.weight, s)
                replace(model, name, smoothed)
        rows.append(row)
    why = "its weight belongs to another module too, which would change with it"
    return rows + [{"layers": [name], "fused": None, "largest": 1.0, "gain_db": 0.0, "skipped": why} for name in tied]


def choose_scale(absmax: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """s [I]; 1 where a channel was never other than zero.

    Args:
        absmax: max|x_j|, [I].
        weights: of the Linears that read x, each [O, I].
    """
    w = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp_min(LEAST)
    s = (absmax.pow(alpha) / w.pow(1 - alpha)).clamp_min(LEAST)
    return torch.where(absmax > 0, s, 1.0)


def gain_db(group: Group, weights: list[Tensor], s: Tensor, weight: Grid, activation: Grid) -> float:
    """Decibels by which the outputs of ``weights`` come closer to float if smoothed with ``s`` [I], on the sample of the group's inputs."""
    low, high = group.ends()
    x = torch.cat(group.sample)
    y = torch.cat([x @ w.T for w in weights], -1)

    def quality(s: Tensor) -> float:
        params = None
        if getattr(activation, "granularity", "") == "tensor":  # the range of all the data, as calibration will find it
            params = activation.choose(torch.stack([(low / s).amin(), (high / s).amax()]))
        x_q = activation.fake(x / s, params)
        return sqnr_db(y, torch.cat([x_q @ weight.fake(w * s).T for w in weights], -1))

    before, after = quality(torch.ones_like(s)), quality(s)
    return 0.0 if before == after else max(min(after - before, 300.0), -300.0)  # either may be infinite


def find_groups(model: nn.Module, linears: dict[str, nn.Linear], example: dict[str, Tensor]) -> list[Group]:
    """Which of ``linears`` read one tensor, in the order of their calls, and what might have written it; runs ``example``.

    Raises:
        ValueError: if one of them is not called.
    """
    reads: dict[str, list[Any]] = {}
    inputs: dict[str, Tensor] = {}
    written: dict[int, str] = {}  # storage -> the norm that filled it
    calls: list[tuple[str, int]] = []
    near: dict[str, list[tuple[str, int]]] = {}
    alive = []  # else a new tensor may get the memory, and so the identity, of one that is gone

    def reading(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["input"]
            if not x.numel():
                return
            alive.append(x)
            reads.setdefault(name, []).append(identity(x))
            inputs.setdefault(name, x)
            near.setdefault(name, calls[-NEAR:])

        return hook

    def writing(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: Any, y: Any) -> None:
            if isinstance(module, nn.Linear):
                calls.append((name, module.out_features))
            elif isinstance(y, Tensor):
                alive.append(y)
                written[y.untyped_storage().data_ptr()] = name

        return hook

    shared = _shared_parameters(model)
    with hooks() as registered:
        for name, linear in linears.items():
            registered.append(linear.register_forward_pre_hook(reading(name), with_kwargs=True))
        for name, module in model.named_modules():
            if (isinstance(module, nn.Linear) or _is_norm(module)) and id(module.weight) not in shared:
                registered.append(module.register_forward_hook(writing(name, module)))
        run(model, example)
    silent = [name for name in linears if name not in reads]
    if silent:
        raise ValueError(
            f"{len(silent)} Linear modules are never called, the first {silent[0]}, so their inputs cannot be smoothed. Leave them in "
            f"float: quantizer.keep_float=[{','.join(silent[:3])}], or set quantizer.smoothquant=null"
        )
    found: dict[tuple[Any, ...], Group] = {}
    for name, keys in reads.items():
        group = found.setdefault(tuple(keys), Group([], []))
        if not group.layers:
            x = inputs[name]
            norm = written.get(x.untyped_storage().data_ptr())
            norms = [norm] if norm is not None and len(model.get_parameter(f"{norm}.weight")) == x.shape[-1] else []
            group.producers = norms or [n for n, width in reversed(near[name]) if width == x.shape[-1]]
        group.layers.append(name)
    return list(found.values())


def identity(x: Tensor) -> tuple[Any, ...]:
    """Equal for two living tensors that hold the same values, because they are the same memory, unchanged since."""
    layout = () if x.is_contiguous() else (x.shape, x.stride())
    return (x.data_ptr(), x.numel(), x.shape[-1:], x._version, layout)


def _measure(model: nn.Module, groups: list[Group], calibration: list[dict[str, Tensor]]) -> None:
    """Let each group see its inputs."""
    batch, rows = 0, -(-SAMPLE // len(calibration))

    def seeing(group: Group) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = (args[0] if args else kwargs["input"]).flatten(0, -2)
            if not len(x):
                return
            group.fold(x, rows)
            if not bool(torch.isfinite(group.absmax()).all()):
                bad = int((~torch.isfinite(x)).sum())
                raise ValueError(
                    f"calibration batch {batch}: the input of {group.layers[0]} is not finite in {bad:,} of {x.numel():,} values. Look at "
                    f"the data and the model; or leave the layer in float: quantizer.keep_float=['{group.layers[0]}']"
                )

        return hook

    with hooks() as registered:
        for group in groups:
            registered.append(model.get_submodule(group.layers[0]).register_forward_pre_hook(seeing(group), with_kwargs=True))
        shown = track(calibration, description="smoothing", console=console, transient=True, disable=not console.is_terminal)
        for batch, inputs in enumerate(shown):  # noqa: B007 (the hooks read it)
            run(model, inputs)


def _fuse(
    model: nn.Module,
    groups: list[Group],
    scales: list[Tensor],
    numbers: list[int],
    example: dict[str, Tensor],
    batch: dict[str, Tensor],
) -> dict[int, str]:
    """Put 1 / s into producers wherever the logits stay the same; number of a group, of ``numbers``, -> its producer."""
    fusions: dict[int, Fusion] = {}
    before, before_all = run(model, example), run(model, batch)
    for number in track(numbers, description="smoothing: fusing", console=console, transient=True, disable=not console.is_terminal):
        for producer in groups[number].producers:
            fusion = _attempt(model, groups[number], producer, scales[number])
            if nmse(before, run(model, example)) < UNCHANGED:
                fusions[number] = fusion
                break
            fusion.undo()
    while fusions and not nmse(before_all, run(model, batch)) < UNCHANGED:
        fusions.popitem()[1].undo()  # the last first, since it may have changed what an earlier one changed before
    return {number: fusion.producer for number, fusion in fusions.items()}


def _attempt(model: nn.Module, group: Group, producer: str, s: Tensor) -> Fusion:
    source: Any = model.get_submodule(producer)
    rows = s.reshape(-1, *[1] * (source.weight.ndim - 1))
    edits: list[tuple[Any, str, nn.Parameter]] = [(source, "weight", _scaled(source.weight, 1.0 / rows))]
    if getattr(source, "bias", None) is not None:
        edits.append((source, "bias", _scaled(source.bias, 1.0 / s)))
    for name in group.layers:
        layer: Any = model.get_submodule(name)
        edits.append((layer, "weight", _scaled(layer.weight, s)))
    old = [(module, name, getattr(module, name)) for module, name, _ in edits]
    for module, name, parameter in edits:
        setattr(module, name, parameter)

    def undo() -> None:
        for module, name, parameter in old:
            setattr(module, name, parameter)

    return Fusion(producer, undo)


def _scaled(parameter: nn.Parameter, by: Tensor) -> nn.Parameter:
    return nn.Parameter((parameter * by).to(parameter.dtype), requires_grad=parameter.requires_grad)


def _weights(model: nn.Module, group: Group) -> list[Tensor]:
    return [model.get_parameter(f"{name}.weight") for name in group.layers]


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm, and the many that models define themselves: one weight per channel, perhaps a bias."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    return type(module).__name__.endswith("Norm") and weight is not None and weight.ndim == 1 and parameters.keys() <= {"weight", "bias"}


def _shared_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that several modules hold."""
    counts = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {key for key, count in counts.items() if count > 1}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of one batch, moved to the model's device."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return logits_of(model(**{name: value.to(device) for name, value in inputs.items()}))


@contextmanager
def hooks() -> Iterator[list[Any]]:
    """A list of hooks that are removed at the end."""
    registered: list[Any] = []
    try:
        yield registered
    finally:
        for hook in registered:
            hook.remove()
