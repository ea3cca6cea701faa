"""Layers that compute on a grid: fake-quantized in training, integer codes afterwards.

A quantizer swaps `nn.Linear`, `nn.Embedding`, `nn.Conv1d` and `nn.Conv2d` for the `Fake…` layer (same parameters, same names), trains or
calibrates it, and swaps that for the `Quantized…` layer, which holds codes (`qtrain/prepare.py`). Both compute the same function:

    y = linear(fake_activation(x), decode(encode(w)), b)

so the swap changes no bit of any output (`convert == prepare`), and a test and every run check that it does not.

Weights w_OI: O output features, I input features; w_OIK: convolutions, K the kernel. Activations are in `qtrain/activations.py`.

**Biases.** Integer kernels add the bias to the integer sums, so it must be an integer too: with a static activation of scale s_x on the
edge before the layer (`source`), the bias is on the grid of int32 times s_x * s_w. Where a channel's weights are so small that its bias
would leave int32, the weight's scale is raised until it fits (2^30 steps), in training as at convert. Layers without `source` add a
float bias.

**Batch-norms** directly behind a convolution belong to its weight: w * gamma / sqrt(var + eps). Post-training they are folded once
(`fold_batch_norm`). In training `FakeConv` holds them: while their statistics move, the weight is folded with the *running* variance before
it is rounded, the output is scaled back, and normalized by the batch (Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2); once they are
frozen, and in evaluation, it is one convolution with folded weight and bias, as it will be deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.activations import FakeActivation, QuantizedActivation
from qtrain.grids.base import Grid, Params, QuantizedTensor, require_finite
from qtrain.grids.ste import learned_step, straight_through
from qtrain.scaled_embedding import NAME as SCALE
from qtrain.scaled_embedding import scale_of, scaled

BIAS_STEPS = 2.0**30
"""Largest magnitude of a bias, in steps of s_x * s_w; int32 has twice as many."""


class FakeWeight(nn.Module):
    """How one weight is fake-quantized: by its grid's rule, with frozen scales, or with learned scales (LSQ)."""

    scale: nn.Parameter | None

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.scale = None
        self.frozen: Params | None = None
        self.importance: Tensor | None = None
        """Mean squared activation of each input channel, float32 [I]: weighs errors where the grid searches its scales."""

    @property
    def searches(self) -> bool:
        """Whether scales come from a search, not from a rule that costs next to nothing."""
        return self.scale is None and (self.grid.searches or self.importance is not None)

    def learn_scale(self, w: Tensor) -> None:
        """Turn the scales into parameters, initialised by the grid's rule.

        Raises:
            ValueError: if the grid has more than a scale.
        """
        params = self.grid.choose(w.detach())
        if set(params) != {"scale"} or not hasattr(self.grid, "store"):
            has = f"has {', '.join(params) or 'none'}"
            remedy = "quantizer.weight.rule=signed_absmax"
            if not hasattr(self.grid, "rule"):  # ggml's types, say, whose scales follow from the weights
                has += ", by a rule of its own" if params else ""
                remedy = f"grid@quantizer.weight=affine {remedy} quantizer.weight.scale_dtype=float16 (which GGUF holds as q4_0)"
            raise ValueError(
                f"learnable scales need a grid with one scale per group, that is free to move; {self.grid.describe()} {has}. "
                f"Set {remedy}, or quantizer.learn_scale=false"
            )
        self.scale = nn.Parameter(params["scale"])

    def freeze(self, w: Tensor) -> None:
        """Keep the scales that ``w`` has now."""
        if self.scale is not None:
            self.scale.requires_grad_(False)
        else:
            self.frozen = self.grid.choose(w.detach(), self.importance)

    def choose(self, w: Tensor) -> Params | None:
        """Scales for ``w``, or None where the grid's rule derives them as it encodes."""
        given = self.params()
        return self.grid.choose(w.detach(), self.importance) if given is None and self.importance is not None else given

    def params(self) -> Params | None:
        """Scales to use, or None where the grid's rule derives them from the weight."""
        if self.scale is not None:
            return {"scale": self.grid.store(self.scale.detach())}  # type: ignore[attr-defined]
        return self.frozen

    def forward(self, w: Tensor, params: Params | None = None) -> Tensor:
        """The fake-quantized weight: decode(encode(w)) to the bit; on the scales ``params`` where given and not learned."""
        if self.scale is None:
            return self.grid.fake(w, self.choose(w) if params is None else params)
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
        if self.importance is not None:
            self.importance = self.importance.to(fn(self.importance.new_empty(0)).device)
        return self


class FakeLayer(nn.Module):
    """What fake-quantized layers share: an on/off switch, the weight and bias that the runtime will have, and how to become codes."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_fake: FakeWeight
    activation_fake: FakeActivation | None
    enabled: bool
    """False while training is to run in float (before `start_step`); evaluation is always on the grid."""
    bypassed: bool
    """True while the layer is to compute in float, whatever the mode (sensitivity analysis)."""

    def _set_up(self, weight: Grid, activation: FakeActivation | None) -> None:
        self.weight_fake = FakeWeight(weight)
        self.activation_fake = activation
        self.enabled, self.bypassed = True, False
        self._source: list[FakeActivation] = []

    @property
    def source(self) -> FakeActivation | None:
        """The static activation on the graph's edge before this layer; a list holds it, so that it is no submodule of two parents."""
        return self._source[0] if self._source else None

    def reads(self, activation: FakeActivation) -> None:
        """Set `source` (no property setter: `nn.Module` would register a module that is assigned)."""
        self._source = [activation]

    def quantize_now(self) -> bool:
        return not self.bypassed and (self.enabled or not self.training)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Float weight and bias, with whatever the runtime's layer has folded into them."""
        return self.weight, self.bias

    def on_grid(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the runtime has them, differentiable."""
        params, step = self._scales(w, b)
        w = self.weight_fake(w, params)
        if step is None or b is None:
            return w, b
        return w, straight_through(b, round_bias(b.detach(), step).float() * step, None)

    def encode(self, name: str) -> tuple[QuantizedTensor, Tensor | None, Tensor | None]:
        """Integer codes of the weight; the bias, float32 [O]; and its codes, int32 [O], where it is on a grid.

        Raises:
            ValueError: if the weight is not finite, naming the module.
        """
        w, b = (t if t is None else t.detach() for t in self.folded())
        assert w is not None
        require_finite(w, f"the weight of {name}")
        params, step = self._scales(w, b)
        q = self.weight_fake.grid.encode(w, self.weight_fake.choose(w) if params is None else params)
        if step is None or b is None:
            return q, b, None
        require_finite(b, f"the bias of {name}")
        codes = round_bias(b, step)
        return q, codes.float() * step, codes

    @torch.no_grad()
    def _scales(self, w: Tensor, b: Tensor | None) -> tuple[Params | None, Tensor | None]:
        """Weight scales raised for the bias, and the bias's step s_x * s_w [O]; None, None where the bias is not on a grid."""
        known = self.source.static_params() if self.source is not None else None
        if b is None or known is None or self.source is None or self.source.bypassed:
            return None, None
        learned = self.weight_fake.params()
        params = dict(self.weight_fake.grid.choose(w.detach()) if learned is None else learned)
        if params.keys() - {"zero_point"} != {"scale"}:  # 16-bit floats have none, super-blocks and mins more: no integer sum of one scale
            return None, None
        scale = params["scale"]
        if scale.shape[-1] != 1 or scale.shape[0] not in (1, len(w)):  # groups along a row: integer sums have no one scale
            return None, None
        s_x = known["scale"].reshape(())
        least = b.detach().abs().unsqueeze(-1) / (s_x * BIAS_STEPS)
        least = least.amax().reshape(1, 1) if len(scale) == 1 else least
        if self.weight_fake.scale is None:
            params["scale"] = scale = torch.where(scale.abs() < least, torch.copysign(least, scale), scale)
        return params, (s_x * scale).reshape(-1).expand(len(w))


def round_bias(b: Tensor, step: Tensor) -> Tensor:
    limit = 2.0**31 - 128  # the largest float32 below 2^31
    return (b / step).round().clamp(-limit, limit).to(torch.int32)


class FakeLinear(nn.Linear, FakeLayer):
    """`nn.Linear` whose weight, and optionally input, are fake-quantized."""

    inverse_smoothing: Tensor | None
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, linear: nn.Linear, weight: Grid, activation: FakeActivation | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("inverse_smoothing", getattr(linear, "inverse_smoothing", None))
        self.inside: Callable[[Tensor], Tensor] | None = None
        """Where an adapter is trained inside the weight: what makes the float weight to round of `weight` (`qtrain/lora.py`)."""
        self._set_up(weight, activation)
        self.train(linear.training)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Float weight and bias, with the adapter that is inside the weight."""
        return (self.inside(self.weight) if self.inside is not None else self.weight), self.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        if self.inverse_smoothing is not None:
            x = x * self.inverse_smoothing
        if not self.quantize_now():
            return F.linear(x, *self.folded())
        if self.activation_fake is not None:
            x = self.activation_fake(x)
        return F.linear(x, *self.on_grid(*self.folded()))


class SmoothedLinear(nn.Linear):
    """A float `nn.Linear` that scales its input channels first: y = linear(x * inverse_smoothing, w, b) (`qtrain/smoothing.py`)."""

    inverse_smoothing: Tensor

    def __init__(self, linear: nn.Linear, inverse_smoothing: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("inverse_smoothing", inverse_smoothing)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return F.linear(x * self.inverse_smoothing, self.weight, self.bias)


class FakeConv(FakeLayer):
    """`nn.Conv1d` or `nn.Conv2d` whose weight, and optionally input, are fake-quantized; may hold the batch-norm behind it."""

    def __init__(
        self,
        conv: nn.Conv1d | nn.Conv2d,
        weight: Grid,
        activation: FakeActivation | None = None,
        batch_norm: nn.modules.batchnorm._BatchNorm | None = None,
    ) -> None:
        super().__init__()
        self.weight: nn.Parameter = conv.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = conv.bias  # type: ignore[assignment]
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.geometry = Geometry.of(conv)
        self.batch_norm = batch_norm
        self.batch_norm_frozen = False
        """True from the step on at which the batch-norm's statistics stay."""
        self._set_up(weight, activation)
        self.train(conv.training)

    def train(self, mode: bool = True) -> FakeConv:
        """As `nn.Module.train`; a frozen batch-norm stays in evaluation mode."""
        super().train(mode)
        if self.batch_norm is not None and self.batch_norm_frozen:
            self.batch_norm.eval()
        return self

    def freeze_batch_norm(self) -> None:
        """Keep the statistics that the batch-norm has now."""
        self.batch_norm_frozen = True
        self.train(self.training)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the one convolution that this layer is in evaluation."""
        return (self.weight, self.bias) if self.batch_norm is None else fold(self.weight, self.bias, self.batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, I, *spatial] -> [N, O, *spatial]."""
        if not self.quantize_now():
            y = self.geometry.convolve(x, self.weight, self.bias)
            return y if self.batch_norm is None else self.batch_norm(y)
        if self.activation_fake is not None:
            x = self.activation_fake(x)
        if self.batch_norm is None or not self.batch_norm.training:
            return self.geometry.convolve(x, *self.on_grid(*self.folded()))
        return self._with_batch_statistics(x, self.batch_norm)

    def _with_batch_statistics(self, x: Tensor, batch_norm: Any) -> Tensor:
        factor = _factor(batch_norm)
        factor = torch.where(factor.abs() < 1e-12, torch.ones_like(factor), factor)  # a channel that is switched off
        broadcast = (-1, *[1] * (self.weight.ndim - 1))
        w, _ = self.on_grid(self.weight * factor.reshape(broadcast), None)
        y = self.geometry.convolve(x, w, None) / factor.reshape(broadcast[:-1])
        if self.bias is not None:
            y = y + self.bias.reshape(broadcast[:-1])
        return batch_norm(y)


class Geometry:
    """Where a convolution reads: stride, padding, dilation, groups."""

    def __init__(self, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> None:
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    @classmethod
    def of(cls, conv: nn.Conv1d | nn.Conv2d) -> Geometry:
        """Of a module.

        Raises:
            ValueError: for a padding that is not the same on both sides.
        """
        padding = conv.padding
        if padding == "valid":
            padding = (0,) * len(conv.kernel_size)
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
            if any(t % 2 for t in total):
                raise ValueError(f"padding='same' of a kernel of {conv.kernel_size} is not symmetric")
            padding = tuple(t // 2 for t in total)
        return cls(tuple(conv.stride), tuple(padding), tuple(conv.dilation), conv.groups)  # type: ignore[arg-type]

    def convolve(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """conv1d or conv2d by the shape of ``w``."""
        convolution = F.conv1d if w.ndim == 3 else F.conv2d
        return convolution(x, w, b, self.stride, self.padding, self.dilation, self.groups)


def _factor(batch_norm: Any) -> Tensor:
    """gamma / sqrt(running variance + eps), [O]."""
    factor = torch.rsqrt(batch_norm.running_var + batch_norm.eps)
    return factor if batch_norm.weight is None else factor * batch_norm.weight


def fold(w: Tensor, b: Tensor | None, batch_norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one layer that computes batch_norm(layer(x)) in evaluation; w [O, …], b [O] or None."""
    factor = _factor(batch_norm)
    shift = -batch_norm.running_mean if b is None else b - batch_norm.running_mean
    bias = shift * factor if batch_norm.bias is None else batch_norm.bias + shift * factor
    return w * factor.reshape(-1, *[1] * (w.ndim - 1)), bias


class FakeEmbedding(nn.Embedding, FakeLayer):
    """`nn.Embedding` whose rows are fake-quantized; only the rows of the batch are, unless scales span rows.

    Where the embedding multiplies its rows (`qtrain/scaled_embedding.py`), so does this, after they were fake-quantized.
    """

    embed_scale: float | Tensor | None

    def __init__(self, embedding: nn.Embedding, weight: Grid) -> None:
        nn.Module.__init__(self)
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
            setattr(self, name, getattr(embedding, name))
        self.weight, self.bias = embedding.weight, None
        self._set_up(weight, None)
        self.whole = weight.spans_rows(tuple(embedding.weight.shape))
        _keep_scale(self, scale_of(embedding), SCALE not in embedding._non_persistent_buffers_set)
        self.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., D]."""
        return scaled(self._rows(ids), self.embed_scale)

    def _rows(self, ids: Tensor) -> Tensor:
        if not self.quantize_now():
            return nn.Embedding.forward(self, ids)
        fake = self.weight_fake
        if self.whole or fake.scale is not None or any(len(p) != self.num_embeddings for p in (fake.frozen or {}).values()):
            return F.embedding(ids, fake(self.weight), self.padding_idx)
        flat = ids.reshape(-1)
        params = None if fake.frozen is None else {name: p[flat] for name, p in fake.frozen.items()}
        return fake(nn.Embedding.forward(self, flat), params).reshape(*ids.shape, self.embedding_dim)


def _keep_scale(module: nn.Module, scale: float | Tensor | None, persistent: bool) -> None:
    """Set `embed_scale`; a tensor becomes a buffer, so that it follows the model to its device."""
    if isinstance(scale, Tensor):
        module.register_buffer(SCALE, scale, persistent)
    else:
        setattr(module, SCALE, scale)


class QuantizedLayer(nn.Module):
    """What converted layers share: the codes and the grid of their weight."""

    codes: Tensor
    kind: str
    """"linear", "conv" or "embedding": what an exporter needs to know to write the codes."""

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


class QuantizedProduct(QuantizedLayer):
    """What a Linear and a convolution share: a bias, and the activation they read."""

    bias: Tensor | None
    """float32 [O]; equal to bias_codes * s_x * s_w where those are given."""
    bias_codes: Tensor | None
    """int32 [O], where `source` gives the bias a grid."""
    activation_fake: FakeActivation | QuantizedActivation | None
    """On the layer's own input; None where it is in float or quantized on the graph's edge."""

    def __init__(
        self,
        q: QuantizedTensor,
        bias: Tensor | None,
        activation: FakeActivation | QuantizedActivation | None = None,
        bias_codes: Tensor | None = None,
        source: QuantizedActivation | None = None,
    ) -> None:
        super().__init__()
        self._store(q)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("bias_codes", bias_codes)
        self.activation_fake = activation
        self._source = [source] if source is not None else []

    @property
    def source(self) -> QuantizedActivation | None:
        """The static activation on the graph's edge before this layer."""
        return self._source[0] if self._source else None


class QuantizedLinear(QuantizedProduct):
    """A Linear that holds integer codes and computes what `FakeLinear` computed, bit for bit."""

    kind = "linear"
    inverse_smoothing: Tensor | None

    def __init__(self, q: QuantizedTensor, bias: Tensor | None, *rest: Any, inverse_smoothing: Tensor | None = None, **named: Any) -> None:
        super().__init__(q, bias, *rest, **named)
        self.out_features, self.in_features = q.shape
        self.register_buffer("inverse_smoothing", inverse_smoothing)

    @property
    def weight(self) -> Tensor:
        """The decoded weight, float32 [O, I], made when it is asked for: peft's layers look at that of their base."""
        return self.quantized.decode()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        if self.inverse_smoothing is not None:
            x = x * self.inverse_smoothing
        if self.activation_fake is not None:
            x = self.activation_fake(x)
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
            return y
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """x [..., I], as it is, times the decoded weight."""
        bias = None if self.bias is None else self.bias.to(x.dtype)  # bitsandbytes leaves one in the type of its products
        return F.linear(x, self.quantized.decode().to(x.dtype), bias)


class _FrozenProduct(torch.autograd.Function):
    """Lets the gradient through a product with codes, and keeps the codes for it, not the decoded weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return (grad @ ctx.layer.quantized.decode().to(grad.dtype)).to(ctx.dtype), None


class QuantizedConv(QuantizedProduct):
    """A convolution that holds integer codes [O, I / groups, *kernel] and computes what `FakeConv` computed in evaluation, bit for bit."""

    kind = "conv"

    def __init__(self, q: QuantizedTensor, bias: Tensor | None, geometry: Geometry, *rest: Any, **named: Any) -> None:
        super().__init__(q, bias, *rest, **named)
        self.geometry = geometry
        self.stride, self.padding, self.dilation = geometry.stride, geometry.padding, geometry.dilation
        self.groups = geometry.groups

    def forward(self, x: Tensor) -> Tensor:
        """x [N, I, *spatial] -> [N, O, *spatial]."""
        if self.activation_fake is not None:
            x = self.activation_fake(x)
        return self.geometry.convolve(x, self.quantized.decode().to(x.dtype), self.bias)


class QuantizedEmbedding(QuantizedLayer):
    """An Embedding that holds integer codes."""

    kind = "embedding"
    embed_scale: float | Tensor | None
    """What decoded rows are multiplied by."""

    def __init__(self, q: QuantizedTensor, dtype: torch.dtype = torch.float32, embed_scale: float | Tensor | None = None) -> None:
        super().__init__()
        self._store(q)
        _keep_scale(self, embed_scale, persistent=False)
        self.num_embeddings, self.embedding_dim = q.shape
        self.dtype = dtype
        """Type of the output: that of the weight before it became codes."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., D]."""
        return scaled(self._rows(ids), self.embed_scale)

    def _rows(self, ids: Tensor) -> Tensor:
        q = self.quantized
        rows = q.grid.take(q, ids.reshape(-1))
        if rows is not None:
            return rows.decode().reshape(*ids.shape, self.embedding_dim).to(self.dtype)
        return F.embedding(ids, q.decode().to(self.dtype))


def fake_layers(model: nn.Module) -> Iterator[tuple[str, FakeLayer]]:
    """Names and fake-quantized layers, in module order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, FakeLayer))


def fake_activations(model: nn.Module) -> Iterator[tuple[str, FakeActivation]]:
    """Names and fake-quantized activations, inside layers and on edges, in module order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, FakeActivation))


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Names and converted layers, in module order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLayer))


@contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """Let a fake-quantized model compute in float meanwhile."""
    switches: list[Any] = [m for _, m in (*fake_layers(model), *fake_activations(model))]
    before = [switch.bypassed for switch in switches]
    for switch in switches:
        switch.bypassed = True
    try:
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.bypassed = was
