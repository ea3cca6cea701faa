"""What torchao's training in the graph gets wrong, put right: batch-norms, and the scales that convert reads.

prepare_qat_pt2e makes of a convolution and the batch-norm behind it

    factor = gamma / sqrt(running variance + eps)        y = batch_norm(conv(x, fake(w * factor)) / factor + b)

with epsilon 1e-5 and momentum 0.1 whatever the batch-norm had, and NaN where gamma is 0; `mend_batch_norms` mends that. convert_pt2e
then folds batch-norms by patterns that it exports anew each time (half a minute), for that epsilon only; `fold_batch_norms` does it before,
in the order of operations in which they were trained. And convert_pt2e computes scales a second time, by another rule; `keep_scales` gives
it those of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qtrain.pt2e.exported import PRODUCTS, Exported, aten, fake_quantizers, is_observer


@dataclass
class ConvBatchNorm:
    """A convolution and the batch-norm behind it, as torchao trains them: batch_norm(conv(x, fake(w * factor), 0) / factor + bias)."""

    batch_norm: fx.Node
    conv: fx.Node
    scaled: fx.Node
    """w * factor."""
    factor: fx.Node
    variance: fx.Node
    """running variance + eps; factor = gamma / sqrt(variance)."""
    bias: fx.Node | None
    """The convolution's own."""

    @classmethod
    def of(cls, graph: fx.GraphModule, batch_norm: fx.Node) -> ConvBatchNorm | None:
        """What is in front of ``batch_norm``, or None where that is something else."""
        value, bias = _input(batch_norm, 0), None
        if _is(value, aten.add.Tensor):
            bias, value = _input(_input(value, 1), 0), _input(value, 0)
        conv = _input(value, 0) if _is(value, aten.div.Tensor) else None
        weight = _input(conv, 1) if _is(conv, *PRODUCTS) else None
        scaled = _input(weight, 0) if is_observer(graph, weight) else weight
        factor = _input(_input(scaled, 1), 0) if _is(scaled, aten.mul.Tensor) else None
        factor = _input(factor, 0) if _is(factor, away_from_zero) else factor
        variance = _input(_input(factor, 1), 0) if _is(factor, aten.div.Tensor) else None
        if conv is None or scaled is None or factor is None or variance is None:
            return None
        return cls(batch_norm, conv, scaled, factor, variance, bias)


def _is(node: fx.Node | None, *operators: Any) -> bool:
    return node is not None and node.target in operators


def _input(node: fx.Node | None, position: int) -> fx.Node | None:
    value = node.args[position] if node is not None and len(node.args) > position else None
    return value if isinstance(value, fx.Node) else None


def split(graph: fx.GraphModule, names: list[str]) -> None:
    """Keep the convolutions ``names``, which stay in float, apart from the batch-norms behind them: torchao's pattern fails at them."""
    for node in [n for n in graph.graph.nodes if n.target in PRODUCTS and n.meta["layer"] in names]:
        with graph.graph.inserting_after(node):
            alias = graph.graph.call_function(aten.alias.default, (node,))
        alias.meta |= {"val": node.meta.get("val"), "split": True}
        node.replace_all_uses_with(alias, delete_user_cb=lambda user, alias=alias: user is not alias)
    graph.recompile()


def join(graph: fx.GraphModule) -> None:
    """Undo `split`."""
    for node in [n for n in graph.graph.nodes if "split" in n.meta and n.target == aten.alias.default]:
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    graph.recompile()


def away_from_zero(factor: Tensor) -> Tensor:
    """``factor``, and 1 where a channel is switched off: the batch-norm itself multiplies what was divided by it with 0."""
    return torch.where(factor.abs() < 1e-12, torch.ones_like(factor), factor)


def mend_batch_norms(graph: fx.GraphModule) -> None:
    """Put back epsilon and momentum of batch-norms, and divide by no zeros."""
    for node in graph.graph.nodes:
        had = node.meta.get("batch_norm") if node.target == aten.batch_norm.default else None
        if had is None:
            continue
        node.args = (*node.args[:6], had["momentum"], had["eps"], *node.args[8:])
        pair = ConvBatchNorm.of(graph, node)
        if pair is not None:
            pair.variance.args = (pair.variance.args[0], had["eps"])
            factor = pair.factor
            with graph.graph.inserting_after(factor):
                safe = graph.graph.call_function(away_from_zero, (factor,))
            factor.replace_all_uses_with(safe, delete_user_cb=lambda user, safe=safe: user is not safe)
    graph.recompile()


@torch.no_grad()
def fold_batch_norms(graph: Exported) -> None:
    """Fold the batch-norms behind convolutions, in place, in the order of operations in which they were trained."""
    for node in [n for n in graph.graph.nodes if n.target == aten.batch_norm.default]:
        pair = ConvBatchNorm.of(graph, node)
        conv = _input(node, 0) if pair is None else pair.conv
        scaled = _input(conv, 1) if pair is None else pair.scaled
        weight = scaled if pair is None else _input(pair.scaled, 0)
        if not _is(conv, *PRODUCTS) or weight is None or weight.op != "get_attr" or (pair is None and len(conv.users) > 1):  # type: ignore[union-attr]
            _as_function(node)
            continue
        assert conv is not None and scaled is not None
        _fold(graph, node, conv, weight, _input(conv, 2) if pair is None else pair.bias)
        scaled.replace_all_uses_with(weight)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


def _fold(graph: Exported, batch_norm: fx.Node, conv: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    gamma, beta, mean, variance = (_tensor(graph, n) for n in batch_norm.args[1:5])
    w, eps = _tensor(graph, weight), float(batch_norm.args[7])  # type: ignore[arg-type]
    factor = gamma / torch.sqrt(variance + eps)
    shift = (-mean if bias is None else _tensor(graph, bias) - mean) * factor
    owner, _, leaf = str(weight.target).rpartition(".")
    module = graph.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(w * factor.reshape(-1, *[1] * (w.ndim - 1))))
    module.register_parameter("folded_bias", nn.Parameter(beta + shift))
    with graph.graph.inserting_before(conv):
        folded = graph.graph.get_attr(f"{owner}.folded_bias")
    conv.args = (*conv.args[:2], folded, *conv.args[3:])
    batch_norm.replace_all_uses_with(conv)


def _as_function(node: fx.Node) -> None:
    """A batch-norm that has nothing to fold into, out of sight of convert_pt2e, which would spend half a minute on finding that out."""
    x, gamma, beta, mean, variance, _, momentum, eps, *_ = node.args
    node.target = F.batch_norm
    node.args = (x, mean, variance, gamma, beta, False, momentum, eps)


def keep_scales(graph: nn.Module) -> None:
    """Let torch's convert step read the scales that were trained with.

    It would compute them from the observed ranges a second time, by another rule than the fused fake-quantizer: absmax / 127.5 where that
    has max(-min / 128, max / 127), so that all codes of a weight would be other ones. Where the fake-quantizer gave a symmetric weight a
    zero point (it does so to channels without negative, or without positive, values), convert's own rule stands: integer kernels have none.
    """
    for fake in fake_quantizers(graph):
        scale, zero_point = fake.scale.detach().clone(), fake.zero_point.detach().clone()
        if getattr(fake, "is_symmetric_quant", False) and bool(zero_point.any()):
            own_scale, own_zero_point = fake.calculate_qparams()
            symmetric = zero_point == 0
            scale, zero_point = torch.where(symmetric, scale, own_scale), torch.where(symmetric, zero_point, own_zero_point)
        fake.calculate_qparams = lambda scale=scale, zero_point=zero_point: (scale, zero_point)


def _tensor(graph: fx.GraphModule, node: Any) -> Tensor:
    owner, _, leaf = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), leaf).detach()
