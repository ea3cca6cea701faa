"""A model as the graph of its operators: what torch.export makes, so that it trains, moves and copies as other modules do.

torch.export runs the model's Python once, with tensors that have shapes and no values, and writes down the ATen operators that ran. What
decided anything from values cannot be written down (`Untraceable`); what depended on the mode or the device was decided once and for
all. `Exported` decides it again:

    train(), eval()   dropout, the dropout inside attention, and the statistics of batch-norms follow the mode; so do torch's
                      fake-quantizers, which observe in training only (they would follow the test split too, if they were let)
    to(device)        devices that are written into the graph (torch.arange(…, device="cpu")) move with the parameters

Batch and sequence (`axes`) stay open, everything else has the size it had. The call stays the model's: keyword inputs, the same output.
"""

from __future__ import annotations

import contextlib
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.node import map_aggregate

from qtrain.evaluate import logits_of

aten = torch.ops.aten

PRODUCTS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default)
"""Operators (x, weight, bias, …) that become layers of qtrain."""
_PADDED = {aten.conv1d.padding: aten.conv1d.default, aten.conv2d.padding: aten.conv2d.default}
"""Convolutions whose padding is a word."""
_DROPOUTS = {aten.dropout.default: 2, aten.feature_dropout.default: 2, aten.alpha_dropout.default: 2}
"""Operator -> position of its mode."""
_NOTHING = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg)
"""Operators that check what was true when the model was traced, its device among other things."""
_SCALARS = {aten.add.Tensor: aten.add.Scalar, aten.mul.Tensor: aten.mul.Scalar}
"""For integers (positions) plus or times a number: XNNPACK's quantizer would make the number, and so the positions, float."""
_ACTIVATIONS = {
    aten.relu.default: nn.ReLU,
    aten.relu6.default: nn.ReLU6,
    aten.hardtanh.default: nn.Hardtanh,
    aten.hardswish.default: nn.Hardswish,
    aten.silu.default: nn.SiLU,
}


class Untraceable(ValueError):
    """torch.export cannot write the model down."""


class Exported(fx.GraphModule):
    """A graph of ATen operators that can be trained: what `export` makes, and `Exported(g, g.graph)` of what torchao makes of that."""

    _mode: bool | None = None
    """Mode that the graph is in; None where that is not known."""

    def __init__(self, root: Any, graph: fx.Graph, class_name: str = "Exported") -> None:
        super().__init__(root, graph, class_name)
        self.meta.update(getattr(root, "meta", {}))
        self._switch(self.training)

    @property
    def config(self) -> Any:
        """The model's own, where it has one: positions, vocabulary, heads."""
        return self.meta["config"]

    @property
    def frozen(self) -> bool:
        """Whether ranges and scales stay as they are, in training too."""
        return bool(self.meta.get("frozen"))

    @property
    def batch_norms_frozen(self) -> bool:
        """Whether statistics of batch-norms stay as they are, in training too."""
        return bool(self.meta.get("batch_norms_frozen"))

    def freeze(self, ranges: bool, batch_norms: bool) -> None:
        """Set both switches."""
        if (ranges, batch_norms) != (self.frozen, self.batch_norms_frozen):
            self.meta |= {"frozen": ranges, "batch_norms_frozen": batch_norms}
            self._switch(self.training)

    def train(self, mode: bool = True) -> Exported:
        """As `nn.Module.train`, with what torch.export wrote down for one mode."""
        nn.Module.train(self, mode)
        self._switch(mode)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph in the mode that the module is in: Lightning sets `training` after a validation without calling `train`."""
        if self.training != self._mode:
            self._switch(self.training)
        return super().__call__(*args, **kwargs)

    def _switch(self, training: bool) -> None:
        self._mode = training
        changed = False
        for node in self.graph.nodes:
            if node.target in _DROPOUTS:
                changed |= _set_argument(node, _DROPOUTS[node.target], training)
            elif node.target == aten.batch_norm.default:
                changed |= _set_argument(node, 5, training and not self.batch_norms_frozen)
            elif node.target == aten.scaled_dot_product_attention.default:
                rate = node.meta.setdefault("dropout", _argument(node, 4, "dropout_p", 0.0))
                changed |= _set_argument(node, 4, rate if training else 0.0, "dropout_p")
        if changed:
            self.recompile()
        for fake in fake_quantizers(self):
            fake.enable_observer(training and not self.frozen)

    def _load_from_state_dict(self, *args: Any) -> None:
        """A checkpoint from training holds fake-quantizers that observe: the next call sets them to this model's mode again."""
        super()._load_from_state_dict(*args)  # type: ignore[no-untyped-call]
        self._mode = None

    def _apply(self, fn: Any, recurse: bool = True) -> Exported:
        """Devices in the graph follow the parameters."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)

        def moved(value: Any) -> Any:
            return device if isinstance(value, torch.device) else value

        changed = False
        for node in self.graph.nodes if device is not None else ():
            args, kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
            if (args, kwargs) != (node.args, node.kwargs):
                node.args, node.kwargs, changed = args, kwargs, True
        if changed:
            self.recompile()
        return self


def on_device(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """``batch`` where the parameters of ``model`` are."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return {name: x.to(device) for name, x in batch.items()}


def fake_quantizers(model: nn.Module) -> Iterator[Any]:
    """torchao's fake-quantizers: they have switches."""
    return (m for m in model.modules() if hasattr(m, "enable_observer") and hasattr(m, "enable_fake_quant"))


def is_observer(graph: fx.GraphModule, node: Any) -> bool:
    """Whether ``node`` calls an observer or a fake-quantizer of torch's."""
    return isinstance(node, fx.Node) and node.op == "call_module" and hasattr(graph.get_submodule(str(node.target)), "calculate_qparams")


def axes(x: Tensor) -> dict[int, Any]:
    """Which axes of an input stay open: the first (the batch), and the second of two-dimensional integers (the sequence)."""
    return {0: Dim.DYNAMIC} | ({1: Dim.DYNAMIC} if x.ndim == 2 and not x.is_floating_point() else {})


def export(model: nn.Module, example: dict[str, Tensor], *, training: bool = False, instead: str) -> Exported:
    """The graph of ``model``, in evaluation mode; shares its parameters.

    Each linear and convolution has the name of its module in ``node.meta["layer"]``; each batch-norm its options in ``meta["batch_norm"]``.

    Args:
        example: keyword inputs, 2 or more examples.
        training: whether the graph is to be trained; it is then traced in training mode.
        instead: the quantizer to name in errors that needs no graph.

    Raises:
        Untraceable: naming the operator or the source line that cannot be traced.
    """
    example = on_device(model, example)
    open_axes = {name: axes(x) for name, x in example.items()}
    model.train(training)
    try:
        with quiet():
            program = torch.export.export(model, (), kwargs=dict(example), dynamic_shapes=open_axes)
            graph = program.module(check_guards=False)
    except Exception as error:  # whatever the model's code, or torch's tracer, raises
        raise Untraceable(
            f"torch.export cannot trace {type(model).__name__}: {reason(error)}. Set quantizer={instead}, which swaps layers and needs no "
            "graph, or change that line"
        ) from error
    finally:
        model.eval()
    assert isinstance(graph, fx.GraphModule)
    _tidy(graph)
    exported = Exported(graph, graph.graph).eval()
    exported.meta["config"] = getattr(model, "config", None)
    _require_same(model, exported, example, instead)
    return exported


def _tidy(graph: fx.GraphModule) -> None:
    """Remove what only checks or counts, make in-place operators ordinary ones, and name layers."""
    for node in list(graph.graph.nodes):
        counts = node.target == aten.add_.Tensor and getattr(node.args[0], "op", "") == "get_attr" and not node.users
        if node.target in _NOTHING or counts:  # a batch-norm's num_batches_tracked, which its momentum does not use
            graph.graph.erase_node(node)
            continue
        if node.op != "call_function":
            continue
        _out_of_place(node)
        if node.target in _SCALARS and not isinstance(node.args[1], fx.Node) and not _is_float(node):
            node.target = _SCALARS[node.target]
        if node.target in _PADDED:
            _pad_by_number(node)
        if node.target in PRODUCTS:
            weight = node.args[1]
            owner = str(weight.target).removesuffix(".weight") if getattr(weight, "op", "") == "get_attr" else ""
            node.meta["layer"] = owner or module_of(node)
        elif node.target == aten.batch_norm.default:
            node.meta["batch_norm"] = {"name": module_of(node), "momentum": node.args[6], "eps": node.args[7]}
        elif node.target in _ACTIVATIONS:
            _as_module(node)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


def _out_of_place(node: fx.Node) -> None:
    """x.relu_() becomes x.relu(), and who reads x later reads the result: one value on a grid may have many readers."""
    schema = getattr(node.target, "_schema", None)
    packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
    if schema is None or not schema.is_mutable or not packet.endswith("_") or not hasattr(aten, packet[:-1]):
        return
    replacement = getattr(getattr(aten, packet[:-1]), overload, None)
    if replacement is None:
        return
    node.target = replacement
    later = set()
    following = node.next
    while following.op != "root":
        later.add(following)
        following = following.next
    changed = node.args[0]
    assert isinstance(changed, fx.Node)
    changed.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)


def _pad_by_number(node: fx.Node) -> None:
    """padding="same" as a number, where it is the same on both sides."""
    weight, padding = node.args[1], _argument(node, 4, "padding", "valid")
    assert isinstance(weight, fx.Node)
    kernel = weight.meta["val"].shape[2:]
    dilation = _argument(node, 5, "dilation", [1])
    dilation = [*dilation] * (len(kernel) // len(dilation))
    total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    if not any(t % 2 for t in total):
        stride, groups = _argument(node, 3, "stride", [1]), _argument(node, 6, "groups", 1)
        bias = _argument(node, 2, "bias", None)
        node.target = _PADDED[node.target]  # type: ignore[index]
        node.args, node.kwargs = (node.args[0], weight, bias, stride, [t // 2 for t in total], dilation, groups), {}


def _as_module(node: fx.Node) -> None:
    """Make of each activation a module of its own: torchao's patterns know nn.ReLU, not F.relu, and fail where one is called twice."""
    stack = dict(node.meta.get("nn_module_stack", {}))
    cls = _ACTIVATIONS[node.target]  # type: ignore[index]
    node.meta["nn_module_stack"] = stack | {node.name: (f"{module_of(node)}.{node.name}", f"{cls.__module__}.{cls.__qualname__}")}


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def module_of(node: fx.Node) -> str:
    """Name of the module whose code ran this operator."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def _require_same(model: nn.Module, exported: Exported, example: dict[str, Tensor], instead: str) -> None:
    """Whether the graph computes in evaluation what the model computes, also for another batch than the one it was traced with.

    Raises:
        Untraceable: if it does not: the model's own code asks for the mode, or draws random numbers.
    """
    one = {name: x[:1] for name, x in example.items()}
    with torch.no_grad():
        wanted = logits_of(model(**one)).float()
        try:
            given = logits_of(exported(**one)).float()
        except RuntimeError as error:
            given, why = torch.full_like(wanted, torch.nan), f"fails on one example ({_first_line(error)})"
        else:
            why = f"computes other logits (by up to {float((given - wanted).abs().max()):.3g})"
    if not torch.allclose(given, wanted, rtol=1e-3, atol=1e-5):
        raise Untraceable(
            f"the graph that torch.export makes of {type(model).__name__} {why} in evaluation: its code asks for the mode or for sizes, "
            f"which a graph decides once (stochastic depth does). Set quantizer={instead}, which needs no graph"
        )


def reason(error: BaseException) -> str:
    """What torch complained about, and the line of the model's code where it did."""
    fixed = re.search(r"You marked (.+?) as dynamic but your code specialized it to be a constant \((\d+)\)", str(error))
    if fixed:
        return f"its code makes {fixed[1]} always {fixed[2]}, which has to stay open"
    package = str(Path(torch.__file__).parent)
    ours = (package, str(Path(__file__).parent), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f"{_first_line(error)} (at {frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`)" if frames else _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _set_argument(node: fx.Node, position: int, value: Any, name: str = "") -> bool:
    """Set an argument by position, or by name where fewer are given; returns whether it was another."""
    if len(node.args) > position:
        if node.args[position] == value:
            return False
        node.args = (*node.args[:position], value, *node.args[position + 1 :])
        return True
    if node.kwargs.get(name, 0.0) == value:
        return False
    node.kwargs = {**node.kwargs, name: value}
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep advice of torch's tracer and quantizers off the terminal; errors still raise."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)  # which torch logs whole graphs at
        try:
            yield
        finally:
            logging.disable(level)
