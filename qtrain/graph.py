"""Convolutional networks as graphs: where batch-norms fold, and which values an integer runtime keeps on a grid.

A layer of a transformer quantizes its own input. In a convolutional network that is not enough: additions, poolings and the outputs of
convolutions are integers too, and only the graph says which operator reads what. So the model is traced symbolically (torch.fx), and

    batch_norms(graph)        finds the batch-norms directly behind a convolution; `fold_batch_norms` folds them
    put_on_edges(graph, …)    puts one fake-quantized activation behind every value that an integer operator reads

A traced model is an `fx.GraphModule` with the submodules, names and parameters of the original. Integer operators are those that
onnxruntime (QLinearConv, QGemm, QLinearAdd, QLinearMul, QLinearConcat, QLinearAveragePool, …) and TensorRT fuse:

    conv, linear              if they were chosen; a ReLU or ReLU6 behind them costs nothing, so the value behind *it* is what gets the grid
    add, mul, cat, avg-pool   if all their operands come from integer operators
    max-pool, flatten, slice, zero-pad, transpose, reshape, … only move values: what is on a grid before them is on it behind them

One value has one grid, however many operators read it. The output of the network stays in float.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qtrain.activations import FakeActivation, Observer
from qtrain.grids.base import Grid
from qtrain.layers import FakeConv, FakeLinear, fold
from qtrain.prepare import SWAPPABLE

EDGES = "on_grid"
"""Submodule of a traced model that holds the activations on its edges."""

_PASS_MODULES = (nn.MaxPool1d, nn.MaxPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d, nn.Unflatten)
_PASS_FUNCTIONS = {
    F.dropout,
    torch.flatten,
    torch.reshape,
    torch.permute,
    torch.transpose,
    torch.squeeze,
    torch.unsqueeze,
    operator.getitem,
}
_PASS_METHODS = {"flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous"}
_CLAMP_MODULES = (nn.ReLU, nn.ReLU6)
_CLAMP_FUNCTIONS = {F.relu, F.relu6, F.relu_, torch.relu, torch.relu_}
_CLAMP_METHODS = {"relu", "relu_"}
_JOIN_FUNCTIONS = {operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul, torch.cat, torch.concat}
_JOIN_METHODS = {"add", "add_", "mul", "mul_"}
_POOL_MODULES = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_POOL_FUNCTIONS = {F.avg_pool2d, F.avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool1d, torch.mean}


_PRODUCTS = (FakeConv, FakeLinear)


class Untraceable(ValueError):
    """The model's code depends on its data, so there is no graph of it."""


class _Tracer(fx.Tracer):
    """Does not look into layers that go on a grid: torch.fx only knows torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SWAPPABLE) or super().is_leaf_module(m, module_qualified_name)


def has_convolutions(model: nn.Module) -> bool:
    """Whether there is anything in ``model`` that needs its graph."""
    return any(isinstance(m, (nn.Conv1d, nn.Conv2d)) for m in model.modules())


def trace(model: nn.Module) -> fx.GraphModule:
    """The graph of ``model``; shares its submodules and parameters.

    Raises:
        Untraceable: naming what torch.fx stumbled over.
    """
    training = model.training
    try:
        traced = fx.GraphModule(model, _Tracer().trace(model), type(model).__name__)
    except Exception as error:  # whatever the model's code raises when it is given proxies
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Untraceable(f"{type(model).__name__} cannot be traced symbolically: {reason}") from error
    return traced.train(training)


def batch_norms(graph: fx.GraphModule) -> dict[str, str]:
    """Convolution -> the batch-norm that alone reads it, by name."""
    calls: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    found = {}
    for node in graph.graph.nodes:
        if not _is_module(graph, node, (nn.BatchNorm1d, nn.BatchNorm2d)) or calls[node.target] > 1:
            continue
        producer = node.args[0]
        # not Linear: behind one, BatchNorm1d may count [N, T, C] by T
        alone = isinstance(producer, fx.Node) and len(producer.users) == 1 and _is_module(graph, producer, (nn.Conv1d, nn.Conv2d))
        if alone and calls[producer.target] == 1 and graph.get_submodule(node.target).track_running_stats:
            found[producer.target] = node.target
    return found


def fold_batch_norms(graph: fx.GraphModule, pairs: dict[str, str]) -> None:
    """Fold each batch-norm of ``pairs`` into the layer before it, in place; the model computes the same in evaluation."""
    for name, norm in pairs.items():
        layer: Any = graph.get_submodule(name)
        with torch.no_grad():
            w, b = fold(layer.weight, layer.bias, graph.get_submodule(norm))
        layer.weight, layer.bias = nn.Parameter(w), nn.Parameter(b)
    remove_nodes(graph, set(pairs.values()))


def remove_nodes(graph: fx.GraphModule, modules: set[str]) -> None:
    """Take calls of ``modules`` (of one input) out of the graph."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and node.target in modules:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()


def put_on_edges(graph: fx.GraphModule, grid: Grid, observer: dict[str, Any]) -> list[str]:
    """Put a static fake-quantized activation behind every value that an integer operator reads, in place.

    The model's fake layers are the chosen ones; each of them learns its `source`.

    Args:
        grid: one scale per tensor.
        observer: options of `Observer`.

    Returns:
        Names of the activations.
    """
    plan = _Plan(graph)
    edges = nn.ModuleDict()
    graph.add_submodule(EDGES, edges)
    made: dict[fx.Node, FakeActivation] = {}
    for value, reader in plan.values.items():
        fake = FakeActivation(grid, Observer(grid, **observer))
        assert fake.observer is not None
        fake.observer.layer = reader
        edges[value.name] = fake
        with graph.graph.inserting_after(value):
            on_grid = graph.graph.call_module(f"{EDGES}.{value.name}", (value,))
        value.replace_all_uses_with(on_grid, delete_user_cb=lambda user, on_grid=on_grid: user is not on_grid)
        made[on_grid] = fake
    for node in graph.graph.nodes:
        if _is_module(graph, node, _PRODUCTS):
            source = _origin(graph, node.args[0])
            if source in made:
                layer: Any = graph.get_submodule(node.target)
                layer.reads(made[source])
    graph.graph.lint()
    graph.recompile()
    return [f"{EDGES}.{name}" for name in edges]


class _Plan:
    """Which values get a grid, and the name of a layer that reads each (for messages)."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.integer: set[fx.Node] = set()
        """Operators that compute in integers, and what only moves or clamps their values."""
        self.values: dict[fx.Node, str] = {}
        for node in list(graph.graph.nodes):
            self._visit(node)
        for node in list(self.integer):
            if _is_module(graph, node, _PRODUCTS):
                self._output(node)

    def _visit(self, node: fx.Node) -> None:
        operands = list(node.all_input_nodes)
        if _is_module(self.graph, node, _PRODUCTS):
            self.integer.add(node)
            self._read(node.args[0], str(node.target))
        elif moves(self.graph, node) or _clamps(self.graph, node):
            if operands and operands[0] in self.integer:
                self.integer.add(node)
        elif (_joins(node) or _pools(self.graph, node)) and operands and all(o in self.integer for o in operands):
            self.integer.add(node)
            for operand in operands:
                self._read(operand, str(node.name))

    def _read(self, value: Any, reader: str) -> None:
        if isinstance(value, fx.Node):
            self.values.setdefault(_origin(self.graph, value), reader)

    def _output(self, node: fx.Node) -> None:
        """A layer whose output goes on in float would run in float: put it on a grid, but for the network's own output."""
        value = node
        while len(value.users) == 1 and _clamps(self.graph, next(iter(value.users))):
            value = next(iter(value.users))
        ends = any(_leads_to_output(self.graph, user) for user in value.users)
        if not ends and value not in self.values and value.users:
            self.values[value] = str(node.target)


def _leads_to_output(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "output":
        return True
    return moves(graph, node) and any(_leads_to_output(graph, user) for user in node.users)


def _origin(graph: fx.GraphModule, node: Any) -> fx.Node:
    """The value that ``node`` is, before it was moved."""
    while moves(graph, node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_module(graph: fx.GraphModule, node: fx.Node, classes: Any) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), classes)


def moves(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _is_module(graph, node, _PASS_MODULES)
    if node.op == "call_function":
        if node.target is F.pad:
            mode, value = _argument(node, 2, "mode", "constant"), _argument(node, 3, "value", None)
            return mode == "constant" and not value
        return node.target in _PASS_FUNCTIONS or "max_pool" in getattr(node.target, "__name__", "")
    return node.op == "call_method" and node.target in _PASS_METHODS


def _clamps(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _is_module(graph, node, _CLAMP_MODULES)
    return node.target in (_CLAMP_FUNCTIONS if node.op == "call_function" else _CLAMP_METHODS)


def _joins(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target in (torch.cat, torch.concat):
        return True
    joins = node.target in (_JOIN_FUNCTIONS if node.op == "call_function" else _JOIN_METHODS if node.op == "call_method" else ())
    return joins and sum(isinstance(a, fx.Node) for a in node.args) == 2


def _pools(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _is_module(graph, node, _POOL_MODULES)
    if node.target in (torch.mean, "mean"):
        dims = _argument(node, 1, "dim", ())
        return tuple(dims if isinstance(dims, (tuple, list)) else (dims,)) in ((2, 3), (-2, -1), (-1, -2), (3, 2))
    return node.op == "call_function" and node.target in _POOL_FUNCTIONS


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
