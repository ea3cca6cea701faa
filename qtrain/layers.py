"""Layers that compute on a grid: fake-quantized in training, integer codes afterwards.

A quantizer swaps `nn.Linear` and `nn.Embedding` for the `Fake…` layer (same parameters, same names), trains or calibrates it, and
swaps that for the `Quantized…` layer, which holds codes. Both compute the same function:

    y = linear(fake_activation(x), decode(encode(w)), b)

so the swap changes no bit of any output (`convert == prepare`), and a test and every run check that it does not.

Weights w_OI: O output features, I input features. Activations may be dynamic (the grid derives a scale from each input: per token, or
per group along K) or static (an `Observer` tracks the range in training, the scale is then fixed, one per tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.grids.base import Grid, Params, QuantizedTensor, require_finite
from qtrain.grids.ste import learned_step, straight_through


class Observer(nn.Module):
    """Tracks the range of an activation and holds the static parameters that follow from it.

    The range is a moving average of each batch's minimum and maximum (Jacob et al. 2018, arXiv 1712.05877, section 3.1), with
    `momentum` the weight of the new batch. The first 1/momentum batches are averaged evenly: else the first of them would be all that
    a short calibration sees.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, grid: Grid, momentum: float = 0.01) -> None:
        super().__init__()
        self.grid = grid
        self.momentum = momentum
        self.frozen = False
        """True once the range is fixed; training then leaves it alone."""
        self.calibrating = False
        """True while a calibration pass, in evaluation mode, is to be observed."""
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Fold the range of one batch in."""
        if not x.numel():
            return
        low, high = x.detach().float().aminmax()
        weight = max(self.momentum, 1.0 / (int(self.seen) + 1))
        self.low.lerp_(low, weight)
        self.high.lerp_(high, weight)
        self.seen += 1

    def params(self) -> Params:
        """Scale (and zero point) for the range seen so far.

        Raises:
            ValueError: if no batch was seen.
        """
        if int(self.seen) == 0:
            raise ValueError(
                "a static activation grid has seen no data; train or calibrate before evaluating, or set quantizer.activation_range=dynamic"
            )
        return self.grid.choose(torch.stack([self.low, self.high]))


class FakeActivation(nn.Module):
    """Fake-quantizes an activation, dynamically or with an `Observer`."""

    def __init__(self, grid: Grid, static: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.observer = Observer(grid) if static else None

    def forward(self, x: Tensor) -> Tensor:
        """Shape and dtype of ``x``."""
        if self.observer is None:
            return self.grid.fake(x)
        if (self.training and not self.observer.frozen) or self.observer.calibrating:
            self.observer.observe(x)
        return self.grid.fake(x, self.observer.params())


class FakeWeight(nn.Module):
    """How one weight is fake-quantized: by its grid's rule, with frozen scales, or with learned scales (LSQ)."""

    scale: nn.Parameter | None

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.scale = None
        self.frozen: Params | None = None

    def learn_scale(self, w: Tensor) -> None:
        """Turn the scales into parameters, initialised by the grid's rule.

        Raises:
            ValueError: if the grid has more than a scale.
        """
        params = self.grid.choose(w.detach())
        if set(params) != {"scale"} or not hasattr(self.grid, "store"):
            raise ValueError(
                f"learnable scales need a grid with one scale per group; {self.grid.describe()} has {', '.join(params)}. "
                "Set quantizer.weight.rule=signed_absmax, or quantizer.learn_scale=false"
            )
        self.scale = nn.Parameter(params["scale"])

    def freeze(self, w: Tensor) -> None:
        """Keep the scales that ``w`` has now."""
        if self.scale is not None:
            self.scale.requires_grad_(False)
        else:
            self.frozen = self.grid.choose(w.detach())

    def params(self) -> Params | None:
        """Scales to use, or None where the grid's rule derives them from the weight."""
        if self.scale is not None:
            return {"scale": self.grid.store(self.scale.detach())}  # type: ignore[attr-defined]
        return self.frozen

    def forward(self, w: Tensor) -> Tensor:
        """The fake-quantized weight: decode(encode(w)) to the bit."""
        if self.scale is None:
            return self.grid.fake(w, self.frozen)
        grid, stored = self.grid, self.params()
        assert stored is not None
        scale = straight_through(self.scale, stored["scale"], None).unsqueeze(-1)
        y = learned_step(grid.groups(w), scale, grid.low, grid.high)  # type: ignore[attr-defined]
        return grid.ungroup(y, tuple(w.shape)).to(w.dtype)  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeWeight:
        """Frozen scales are no buffers (float checkpoints must load), so they follow the model to its device here."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.frozen is not None:
            self.frozen = {n: p.to(fn(p.new_empty(0)).device) for n, p in self.frozen.items()}
        return self


class FakeLayer(nn.Module):
    """What fake-quantized layers share: an on/off switch and how to become codes."""

    weight: nn.Parameter
    weight_fake: FakeWeight
    activation_fake: FakeActivation | None
    enabled: bool
    """False while training is to run in float (before `start_step`); evaluation is always on the grid."""

    def quantize_now(self) -> bool:
        return self.enabled or not self.training

    def encode(self, name: str) -> QuantizedTensor:
        """Integer codes of the weight.

        Raises:
            ValueError: if the weight is not finite, naming the module.
        """
        require_finite(self.weight.detach(), f"the weight of {name}")
        return self.weight_fake.grid.encode(self.weight.detach(), self.weight_fake.params())


class FakeLinear(nn.Linear, FakeLayer):
    """`nn.Linear` whose weight, and optionally input, are fake-quantized."""

    def __init__(self, linear: nn.Linear, weight: Grid, activation: Grid | None = None, static: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_fake = FakeWeight(weight)
        self.activation_fake = FakeActivation(activation, static) if activation is not None else None
        self.enabled = True
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        if not self.quantize_now():
            return F.linear(x, self.weight, self.bias)
        if self.activation_fake is not None:
            x = self.activation_fake(x)
        return F.linear(x, self.weight_fake(self.weight), self.bias)


class FakeEmbedding(nn.Embedding, FakeLayer):
    """`nn.Embedding` whose rows are fake-quantized; only the rows of the batch are, since no scale spans two rows."""

    def __init__(self, embedding: nn.Embedding, weight: Grid) -> None:
        nn.Module.__init__(self)
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
            setattr(self, name, getattr(embedding, name))
        self.weight = embedding.weight
        self.weight_fake = FakeWeight(weight)
        self.activation_fake = None
        self.enabled = True
        self.whole = getattr(weight, "granularity", "") == "tensor"
        self.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., D]."""
        if not self.quantize_now():
            return nn.Embedding.forward(self, ids)
        fake = self.weight_fake
        if self.whole or fake.scale is not None or fake.frozen is not None:
            return F.embedding(ids, fake(self.weight), self.padding_idx)
        rows = nn.Embedding.forward(self, ids)
        return fake(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)


class QuantizedLayer(nn.Module):
    """What converted layers share: the codes and the grid of their weight."""

    codes: Tensor
    kind: str
    """"linear" or "embedding": what an exporter needs to know to write the codes."""

    def _store(self, q: QuantizedTensor) -> None:
        self.grid = q.grid
        self.param_names = list(q.params)
        self.register_buffer("codes", q.codes)
        for name, value in q.params.items():
            self.register_buffer(name, value)

    @property
    def quantized(self) -> QuantizedTensor:
        """Codes, parameters and grid as one value."""
        return QuantizedTensor(self.grid, self.codes, {n: getattr(self, n) for n in self.param_names})


class QuantizedLinear(QuantizedLayer):
    """A Linear that holds integer codes and computes what `FakeLinear` computed, bit for bit."""

    kind = "linear"
    bias: Tensor | None

    def __init__(self, q: QuantizedTensor, bias: Tensor | None, activation: FakeActivation | None = None) -> None:
        super().__init__()
        self._store(q)
        self.out_features, self.in_features = q.shape
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.activation_fake = activation

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        if self.activation_fake is not None:
            x = self.activation_fake(x)
        return F.linear(x, self.quantized.decode().to(x.dtype), self.bias)


class QuantizedEmbedding(QuantizedLayer):
    """An Embedding that holds integer codes."""

    kind = "embedding"

    def __init__(self, q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._store(q)
        self.num_embeddings, self.embedding_dim = q.shape
        self.dtype = dtype
        """Type of the output: that of the weight before it became codes."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., D]."""
        q = self.quantized
        if self.codes.shape[0] == q.params["scale"].shape[0]:  # gather first: rows are independent
            flat = ids.reshape(-1)
            rows = QuantizedTensor(q.grid, q.codes[flat], {n: p[flat] for n, p in q.params.items()})
            return rows.decode().reshape(*ids.shape, self.embedding_dim).to(self.dtype)
        return F.embedding(ids, q.decode().to(self.dtype))


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` where the module called ``name`` is, and wherever else that same module is (T5 holds its embedding three times)."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, leaf, layer)


def fake_layers(model: nn.Module) -> Iterator[tuple[str, FakeLayer]]:
    """Names and fake-quantized layers, in module order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, FakeLayer))


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Names and converted layers, in module order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLayer))


def _unswappable(model: nn.Module) -> Callable[[nn.Module], str | None]:
    """A function that says why a module cannot be swapped whatever its shape, or None if it can."""
    fused: set[int] = set()
    if torch.backends.mha.get_fastpath_enabled():
        fused = {id(m) for e in model.modules() if isinstance(e, nn.TransformerEncoderLayer) for m in (e.linear1, e.linear2)}

    def why(module: nn.Module) -> str | None:
        base = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
        if type(module).forward is not base.forward:
            return f"{type(module).__name__} has a forward of its own, which a fake-quantized {base.__name__} does not repeat"
        if not isinstance(module.weight, nn.Parameter):
            return "its weight is computed (a parametrization); remove it first, with torch.nn.utils.parametrize.remove_parametrizations"
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads its weight and never calls it"
        if id(module) in fused:
            return "nn.TransformerEncoderLayer reads its weight in evaluation, unless torch.backends.mha.set_fastpath_enabled(False)"
        if getattr(module, "max_norm", None) is not None:
            return "max_norm rewrites rows as they are looked up, which codes cannot follow"
        if module is model:
            return "it is the model itself; put it in an nn.Sequential"
        return None

    return why


def prepare(
    model: nn.Module,
    modules: dict[str, nn.Module],
    weight: Grid,
    embedding: Grid | None = None,
    activation: Grid | None = None,
    static: bool = False,
) -> list[str]:
    """Swap ``modules`` of ``model`` for fake-quantized ones, in place.

    Returns:
        Names of those that were swapped; Embeddings stay in float where ``embedding`` is None.

    Raises:
        ValueError: naming every module whose shape, or whose inputs, do not fit the grid, or that computes in its own way.
    """
    swaps: dict[str, nn.Module] = {}
    misfits = []
    unswappable = _unswappable(model)
    for name, module in modules.items():
        is_embedding = isinstance(module, nn.Embedding)
        grid = embedding if is_embedding else weight
        if grid is None:
            continue
        why = unswappable(module) or grid.check_shape(tuple(module.weight.shape))  # type: ignore[arg-type]
        if not why and activation is not None and not is_embedding:
            inputs = activation.check_shape((1, int(module.in_features)))  # type: ignore[arg-type]
            why = inputs and f"as the grid of its inputs, {inputs}"
        if why:
            misfits.append(f"{name}: {why}")
        elif is_embedding:
            swaps[name] = FakeEmbedding(module, grid)  # type: ignore[arg-type]
        else:
            swaps[name] = FakeLinear(module, grid, activation, static)  # type: ignore[arg-type]
    if misfits:
        shown = "\n  ".join(misfits[:5]) + (f"\n  and {len(misfits) - 5} more" if len(misfits) > 5 else "")
        raise ValueError(
            f"{len(misfits)} modules do not fit the grid:\n  {shown}\n"
            f"or leave them in float: quantizer.keep_float=[{misfits[0].split(':')[0]}]"
        )
    for name, layer in swaps.items():
        replace(model, name, layer)
    return list(swaps)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
    """Run ``batches`` (keyword inputs of ``model``) through it in evaluation mode, so that static activation ranges are known."""
    observers = [m for m in model.modules() if isinstance(m, Observer)]
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    model.eval()
    for observer in observers:
        observer.calibrating = True
    try:
        for batch in batches:
            model(**{name: value.to(device) for name, value in batch.items()})
    finally:
        for observer in observers:
            observer.calibrating = False


def convert(model: nn.Module) -> nn.Module:
    """Swap every fake-quantized layer of ``model`` for one that holds codes, in place.

    Raises:
        ValueError: if a weight is not finite.
    """
    shared: dict[int, list[QuantizedTensor]] = {}  # tied weights stay one tensor, unless their grids or scales differ
    for name, layer in list(fake_layers(model)):
        q = layer.encode(name)
        twins = shared.setdefault(id(layer.weight), [])
        same = next((t for t in twins if _equal(t, q)), None)
        if same is None:
            twins.append(q)
        q = same or q
        if isinstance(layer, FakeLinear):
            replace(model, name, QuantizedLinear(q, layer.bias, layer.activation_fake))
        else:
            replace(model, name, QuantizedEmbedding(q, layer.weight.dtype))
    return model.eval()


def _equal(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    same = a.grid == b.grid and a.params.keys() == b.params.keys() and torch.equal(a.codes, b.codes)
    return same and all(torch.equal(a.params[n], b.params[n]) for n in a.params)
