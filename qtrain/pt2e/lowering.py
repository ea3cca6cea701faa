"""From torch's converted graphs to qtrain's converted layers: the same codes and scales, in the form that every exporter packs.

torch's graph flows end in float operators between explicit quantize and dequantize operators:

    x -> quantize(s_x, z_x) -> dequantize -> linear(·, dequantize(quantize(w, s_w)), b)

`lower_pt2e` and `lower_fx` turn every operator with a quantized weight into a `QuantizedLinear` or `QuantizedConv` that holds torch's codes
and scales, under the name that the module had, and every quantize-dequantize pair on an activation into a `QuantizedActivation`:

    in networks with convolutions   on the graph's edge, once per value however many operators read it, as in `qtrain/graph.py`. What is
                                    on a grid already (behind a max-pool, say) is not put on the same grid again
    elsewhere                       inside the layers that read it, as in transformers that were not traced

What differs from torch's own graph, and by how much:

    codes of activations   torch multiplies by 1 / s (rule `minmax`), the runtimes divide by s (rule `minmax_onnx`, the default): the two
                           differ by one code where they meet a half. With rule=minmax the graph computes what torch's does, to the bit
    biases                 float in torch; where the input of a layer is on an edge they are int32 times s_x * s_w, which integer kernels
                           add: off by at most half such a step, unless a bias would leave 2^30 of them, where it stays float
    unsigned codes         0 … 255 become -128 … 127, with the zero point 128 less: the same numbers

Legend: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtrain import graph as cnn
from qtrain.activations import QuantizedActivation
from qtrain.grids.affine import Affine
from qtrain.grids.base import QuantizedTensor
from qtrain.layers import BIAS_STEPS, Geometry, QuantizedConv, QuantizedLinear, round_bias
from qtrain.pt2e.exported import PRODUCTS, Exported, aten

decomposed = torch.ops.quantized_decomposed

_MOVES = {
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.clone.default,
}
"""Operators that only move values: what was on a grid before them is on it behind them."""

_MADE = (QuantizedActivation, QuantizedLinear, QuantizedConv)


@dataclass
class Weight:
    """A quantized weight of torch's graph."""

    values: Tensor
    """float32 [O, …], as it was rounded: with its batch-norm folded."""
    codes: Tensor
    """int8, same shape."""
    scale: Tensor
    """float32 [O] or [1]."""
    lowest: int
    """Smallest code: -128, and the scale is absmax / 127.5, or -127, and it is absmax / 127."""
    per_channel: bool

    def on_grid(self) -> QuantizedTensor:
        """In qtrain's form."""
        rule, granularity = "absmax_half" if self.lowest == -128 else "absmax", "channel" if self.per_channel else "tensor"
        grid = Affine(bits=8, rule=rule, granularity=granularity)
        return QuantizedTensor(grid, self.codes.contiguous(), {"scale": self.scale.reshape(-1, 1).float()})


@dataclass
class Product:
    """A Linear or a convolution to be."""

    weight: Weight
    bias: Tensor | None
    geometry: Geometry | None
    """None for a Linear."""


@dataclass
class Lowering:
    """One graph on its way: first the pieces that `lower_pt2e` or `lower_fx` found, then the modules that `finish` makes of them."""

    graph: fx.GraphModule
    rule: str = "minmax_onnx"
    products: dict[fx.Node, Product] = field(default_factory=dict)
    """call_module node of a layer -> what it holds."""
    activations: dict[fx.Node, QuantizedActivation] = field(default_factory=dict)
    """call_module node on an edge -> its module."""
    notes: list[dict[str, str]] = field(default_factory=list)
    """What is not as in other networks: [{"name", "why"}]."""

    def put_activation(self, at: fx.Node, value: fx.Node, scale: float, zero_point: int, signed: bool) -> fx.Node:
        """A module on the edge behind ``value``; the node ``at`` is where torch quantized it."""
        params = {"scale": torch.tensor([[scale]]), "zero_point": torch.tensor([[zero_point - (0 if signed else 128)]], dtype=torch.int8)}
        device = next((t.device for t in (*self.graph.parameters(), *self.graph.buffers())), torch.device("cpu"))
        module = QuantizedActivation(Affine(bits=8, rule=self.rule, granularity="tensor"), params).to(device)
        name = self._place(f"{cnn.EDGES}.{value.name}", module)
        with self.graph.graph.inserting_before(at):
            node = self.graph.graph.call_module(name, (value,))
        self.activations[node] = module
        return node

    def put_product(self, at: fx.Node, name: str, x: fx.Node, product: Product) -> fx.Node:
        """The layer ``name`` in place of the operator ``at``."""
        with self.graph.graph.inserting_before(at):
            node = self.graph.graph.call_module(name, (x,))
        at.replace_all_uses_with(node)
        self.graph.graph.erase_node(at)
        self.products[node] = product
        return node

    def finish(self) -> None:
        """Each value on one grid once; activations inside layers where there are no convolutions; the layers themselves."""
        self._merge()
        edges = any(p.geometry is not None for p in self.products.values()) or cnn.has_convolutions(self.graph) or _convolves(self.graph)
        inside: dict[fx.Node, QuantizedActivation] = {} if edges else dict(self._into_layers())
        self.graph.graph.eliminate_dead_code()
        self.graph.delete_all_unused_submodules()
        for node, product in self.products.items():
            source = None if node in inside else self.activations.get(self._origin(node.args[0]))
            node.target = self._place(str(node.target), self._layer(str(node.target), product, inside.get(node), source))
        self.graph.graph.lint()
        self.graph.recompile()

    def float_weights(self) -> dict[str, Tensor]:
        """`NAME.weight` -> the float weight that was rounded."""
        return {f"{node.target}.weight": p.weight.values for node, p in self.products.items()}

    def _place(self, name: str, module: nn.Module) -> str:
        """Put ``module`` at ``name``, or at the first free name like it."""
        targets = {str(n.target) for n in self.graph.graph.nodes if n.op in ("get_attr", "call_module")}
        free, i = name, 0
        while any(t.startswith(f"{free}.") for t in targets) or isinstance(_find(self.graph, free), _MADE):
            i += 1
            free = f"{name}_{i}"
        parent, _, leaf = free.rpartition(".")
        if parent and _find(self.graph, parent) is None:
            self.graph.add_submodule(parent, nn.Module())
        setattr(self.graph.get_submodule(parent), leaf, module)
        return free

    def _merge(self) -> None:
        """Take out activations that change nothing: their value is on that very grid."""
        for node in [n for n in self.graph.graph.nodes if n in self.activations]:
            module, value = self.activations[node], node.args[0]
            assert isinstance(value, fx.Node)
            before = self._origin(value)
            twin = next((o for o in value.users if o in self.activations and o is not node and _equal(self.activations[o], module)), None)
            if before in self.activations and _equal(self.activations[before], module):
                twin = value
            elif twin is not None and list(self.graph.graph.nodes).index(twin) > list(self.graph.graph.nodes).index(node):
                continue
            if twin is not None:
                node.replace_all_uses_with(twin)
                self.graph.graph.erase_node(node)
                del self.activations[node]

    def _into_layers(self) -> Iterator[tuple[fx.Node, QuantizedActivation]]:
        """Move activations that layers read into them."""
        for node, module in list(self.activations.items()):
            for user in [u for u in node.users if u in self.products]:
                user.replace_input_with(node, node.args[0])  # type: ignore[arg-type]
                yield user, QuantizedActivation(module.grid, module.params)
            if not node.users:
                self.graph.graph.erase_node(node)
                del self.activations[node]

    def _origin(self, node: Any) -> Any:
        """The value that ``node`` is, before it was moved."""
        while (_moves(node) or cnn.moves(self.graph, node)) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def _layer(self, name: str, product: Product, activation: QuantizedActivation | None, source: QuantizedActivation | None) -> nn.Module:
        q, bias, bias_codes = product.weight.on_grid(), product.bias, None
        if source is not None and bias is not None:
            step = (source.params["scale"].reshape(()) * q.params["scale"]).reshape(-1).expand(len(bias))
            if bool((bias.abs() <= step * BIAS_STEPS).all()):
                bias_codes = round_bias(bias, step)
                bias = bias_codes.float() * step
            else:
                self.notes.append({"name": name, "why": "its bias is too large for int32 steps of its weight's scale, and stays in float"})
        rest: dict[str, Any] = {"activation": activation, "bias_codes": bias_codes, "source": source}
        if product.geometry is None:
            return QuantizedLinear(q, bias, **rest)
        return QuantizedConv(q, bias, product.geometry, **rest)


def lower_pt2e(graph: fx.GraphModule, rule: str = "minmax_onnx") -> tuple[Exported, list[dict[str, str]]]:
    """A graph from `convert_pt2e(…, fold_quantize=False)`, in evaluation mode, as one with qtrain's layers; changes ``graph``.

    Args:
        rule: minmax_onnx, or minmax for torch's own rounding of activations.

    Returns:
        The graph, with `float_weights` by name; and what could not be as in other networks.

    Raises:
        ValueError: naming an operator whose weight torch quantized and no layer of qtrain can hold.
    """
    lowering = Lowering(graph, rule)
    rounded = {node.args[1].args[0] for node in graph.graph.nodes if node.target in PRODUCTS and _is_dequantize(node.args[1])}
    for node in list(graph.graph.nodes):
        if node.target == decomposed.quantize_per_tensor.default and node not in rounded:
            value, scale, zero_point, low, high, _ = node.args
            assert high - low == 255, f"{node} has the codes {low} to {high}"
            on_grid = lowering.put_activation(node, value, scale, zero_point, low < 0)
            for user in list(node.users):
                assert user.target == decomposed.dequantize_per_tensor.default and user.args[1:3] == (scale, zero_point), user
                user.replace_all_uses_with(on_grid)
                graph.graph.erase_node(user)
            graph.graph.erase_node(node)
        elif node.target == aten.dropout.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    for node in [n for n in graph.graph.nodes if n.target in PRODUCTS]:
        weight = _pt2e_weight(graph, node.args[1])
        if weight is not None:
            bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            product = Product(weight, None if bias is None else _attribute(graph, bias), _geometry(node))
            lowering.put_product(node, node.meta["layer"], node.args[0], product)
    graph.graph.eliminate_dead_code()
    _refuse_rest(graph)
    lowering.finish()
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in [n for n in order if n.op == "get_attr"]:  # so that modules come in the order in which they run
        min(node.users, key=order.__getitem__).prepend(node)
    return _done(lowering, Exported(graph, graph.graph))


def lower_fx(graph: fx.GraphModule, rule: str = "minmax_onnx") -> tuple[fx.GraphModule, list[dict[str, str]]]:
    """A graph from `convert_to_reference_fx`, as one with qtrain's layers; see `lower_pt2e`."""
    lowering = Lowering(graph, rule)
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is torch.quantize_per_tensor:
            value, scale, zero_point, dtype = node.args
            numbers = float(_attribute(graph, scale)), int(_attribute(graph, zero_point))
            on_grid = lowering.put_activation(node, value, *numbers, dtype == torch.qint8)
            for user in list(node.users):
                assert user.op == "call_method" and user.target == "dequantize", user
                user.replace_all_uses_with(on_grid)
                graph.graph.erase_node(user)
            graph.graph.erase_node(node)
        elif node.op == "call_module":
            _fx_product(lowering, node)
    lowering.finish()
    return _done(lowering, graph)


def _done(lowering: Lowering, graph: Any) -> tuple[Any, list[dict[str, str]]]:
    graph.float_weights = lowering.float_weights()
    return graph.eval(), lowering.notes


def _fx_product(lowering: Lowering, node: fx.Node) -> None:
    """A reference module, alone or fused with the ReLU behind it, as a layer (and a ReLU)."""
    module: Any = lowering.graph.get_submodule(str(node.target))
    fused = isinstance(module, nn.Sequential) and hasattr(module[0], "get_quantized_weight")
    reference = module[0] if fused else module
    if not hasattr(reference, "get_quantized_weight"):
        return
    w = reference.get_quantized_weight()
    per_channel = w.qscheme() == torch.per_channel_affine
    scale = w.q_per_channel_scales() if per_channel else torch.tensor([w.q_scale()], device=w.device)
    lowest = -128 if reference.weight_quant_min is None else reference.weight_quant_min
    weight = Weight(reference.weight.detach(), w.int_repr(), scale.float(), lowest, per_channel)
    bias = None if reference.bias is None else reference.bias.detach()
    geometry = Geometry.of(reference) if isinstance(reference, (nn.Conv1d, nn.Conv2d)) else None
    x = node.args[0]
    assert isinstance(x, fx.Node)
    product = lowering.put_product(node, str(node.target), x, Product(weight, bias, geometry))
    if fused:
        with lowering.graph.graph.inserting_after(product):
            relu = lowering.graph.graph.call_function(torch.relu, (product,))
        product.replace_all_uses_with(relu, delete_user_cb=lambda user: user is not relu)


def _is_dequantize(node: Any) -> bool:
    return node.target in (decomposed.dequantize_per_channel.default, decomposed.dequantize_per_tensor.default)


def _pt2e_weight(graph: fx.GraphModule, node: Any) -> Weight | None:
    """The weight that the dequantize operator ``node`` makes, or None where it is float."""
    if not _is_dequantize(node):
        return None
    per_channel = node.target == decomposed.dequantize_per_channel.default
    rounding = node.args[0]
    values, scale, zero_point, *rest = rounding.args
    if values.op != "get_attr":  # torch folds a batch-norm only where its pattern fits
        return None
    w = _attribute(graph, values)
    if per_channel:
        axis, low, high, dtype = rest
        assert axis == 0, f"the weight {values} has scales along axis {axis}"
        s, z = _attribute(graph, scale), _attribute(graph, zero_point)
    else:
        low, high, dtype = rest
        s, z = scale, zero_point
    assert not torch.as_tensor(z).any() and (low, high) in ((-128, 127), (-127, 127)), f"the weight {values} is not symmetric"
    codes = rounding.target(w, s, z, *rest)
    assert dtype == torch.int8
    return Weight(w, codes, torch.as_tensor(s, device=w.device).reshape(-1).float(), low, per_channel)


def _geometry(node: fx.Node) -> Geometry | None:
    """Of an aten convolution (x, weight, bias, stride, padding, dilation, groups); None for a linear."""
    if node.target == aten.linear.default:
        return None
    dimensions = 1 if node.target == aten.conv1d.default else 2
    defaults = [("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)]
    given: list[Any] = [
        node.args[3 + i] if len(node.args) > 3 + i else node.kwargs.get(name, default) for i, (name, default) in enumerate(defaults)
    ]

    def each(value: Any) -> tuple[int, ...]:
        values = [value] if isinstance(value, int) else list(value)
        return tuple(values if len(values) == dimensions else values * dimensions)

    return Geometry(each(given[0]), each(given[1]), each(given[2]), int(given[3]))


def _refuse_rest(graph: fx.GraphModule) -> None:
    """Raise where a quantize operator is left: torch's quantizer chose an operator that no layer of qtrain holds."""
    for node in graph.graph.nodes:
        if getattr(node.target, "namespace", "") == "quantized_decomposed":
            reader = next((u for u in node.users if getattr(u.target, "namespace", "") != "quantized_decomposed"), node)
            where = reader.meta.get("layer") or reader.name
            raise ValueError(
                f"torch's quantizer put the weight of {where} ({reader.target}) on a grid; qtrain's layers are Linear, Conv1d and Conv2d. "
                "Set quantizer=ptq_static, which leaves it in float, or another quantizer.backend"
            )


def _attribute(graph: fx.GraphModule, node: Any) -> Tensor:
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach()


def _find(graph: fx.GraphModule, name: str) -> nn.Module | None:
    try:
        return graph.get_submodule(name)
    except AttributeError:
        return None


def _equal(a: QuantizedActivation, b: QuantizedActivation) -> bool:
    return a.grid == b.grid and all(torch.equal(a.params[n], b.params[n]) for n in a.params)


def _moves(node: Any) -> bool:
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        rest = list(node.args[2:])
        return (
            node.kwargs.get("mode", "constant") == "constant"
            and all(v in ("constant", None, 0) for v in rest)
            and not node.kwargs.get("value")
        )
    return node.target in _MOVES


def _convolves(graph: fx.GraphModule) -> bool:
    return any(n.target in (aten.conv1d.default, aten.conv2d.default) for n in graph.graph.nodes)
