"""Put the codes in, in the form that TensorRT reads: each opaque node of a traced graph becomes QuantizeLinear and DequantizeLinear nodes.

    Linear       x -> (Mul inverse_smoothing) -> (Q, DQ) -> MatMul(., DQ(codes int8 [K, O], scales [O], axis 1))
    int4 groups  x -> MatMul(., DQ(codes int4 [K, O], scales [K / block, O], axis 0, block_size))
    convolution  x -> (Q, DQ) -> Conv(., DQ(codes int8 [O, I / groups, ...], scales [O], axis 0), bias)
    embedding    Gather(DQ(codes int8 [V, D], scales [V], axis 0), ids): TensorRT gathers no int8, and compiles this to a gather of codes
    activation   x -> Q -> DQ

Nodes are named after the layer, since TensorRT's logs name them, and so are initializers: `<layer>.codes`, `<layer>.scales`, and
`<activation>.scale`. A layer that the model calls twice keeps one set. Scales of activations are scalars: a vector of one is accepted,
but TensorRT-RTX 1.7 then computes the convolution behind it in float.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.onnx.build import int4 as int4_tensor
from exporters.onnx.layout import block_params, signed_codes
from exporters.onnx.trace import DOMAIN
from exporters.tensorrt.layout import Layout
from exporters.tensorrt.precision import SMOOTHING


def lower(model: ir.Model, layers: dict[str, Any], activations: dict[str, Any], layouts: dict[str, Layout]) -> None:
    """Replace every opaque node of ``model``, in place.

    Args:
        layers: packed layers by name.
        activations: those inside layers and those that stand alone, by name.
        layouts: of the packed layers.

    Raises:
        ValueError: if the model never calls one of the layers.
    """
    modules, names = {**layers, **activations}, {id(module): name for name, module in activations.items()}
    unused = dict.fromkeys(layouts)
    for node in [n for n in model.graph if n.domain == DOMAIN]:
        name = node.attributes["layer"].as_string()
        unused.pop(name, None)
        _Lowering(model.graph, node, name, modules[name], layouts.get(name), names).run()
    if unused:
        raise ValueError(
            f"{len(unused)} quantized layers are not called by the model, the first {next(iter(unused))}; "
            f"leave them in float: quantizer.keep_float=[{','.join(list(unused)[:3])}]"
        )
    model.opset_imports.pop(DOMAIN, None)


class _Lowering:
    """The replacement of one opaque node."""

    def __init__(self, graph: ir.Graph, node: ir.Node, name: str, module: Any, layout: Layout | None, activations: dict[int, str]) -> None:
        self.graph, self.node, self.name, self.module, self.layout = graph, node, name, module, layout
        self.activations = activations
        self.new: list[ir.Node] = []

    def run(self) -> None:
        x, old = self.node.inputs[0], self.node.outputs[0]
        build = {"linear": self._linear, "conv": self._conv, "embedding": self._embedding, "activation": self._activation}
        result = build[self.module.kind](x)
        if old.is_graph_output():  # an output keeps its own name
            name, old.name = old.name, None
            result = self._op("Identity", result)
            result.name = name
        result.type, result.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        self.graph.insert_before(self.node, self.new)
        self.graph.remove(self.node, safe=True)

    def _linear(self, x: Any) -> ir.Value:
        smoothing = getattr(self.module, "inverse_smoothing", None)
        if smoothing is not None:
            x = self._op("Mul", x, self._initializer(f"{self.name}{SMOOTHING}", lambda: _array(smoothing)))
        x = self._quantized_input(x)
        return self._op("MatMul", x, self._weight(), name=self.name)

    def _conv(self, x: Any) -> ir.Value:
        layer = self.module
        x = self._quantized_input(x)
        bias = None if layer.bias is None else self._initializer(f"{self.name}.bias", lambda: _array(layer.bias))
        pads = [*layer.padding, *layer.padding]
        attributes = {"kernel_shape": list(layer.quantized.shape[2:]), "strides": list(layer.stride), "pads": pads}
        attributes |= {"dilations": list(layer.dilation), "group": layer.groups}
        return self._op("Conv", x, self._weight(), *([] if bias is None else [bias]), name=self.name, **attributes)

    def _embedding(self, ids: Any) -> ir.Value:
        return self._op("Gather", self._weight(), ids, name=self.name, axis=0)

    def _activation(self, x: Any) -> ir.Value:
        return self._on_grid(x, self.module, self.name)

    def _quantized_input(self, x: Any) -> Any:
        activation = getattr(self.module, "activation_fake", None)
        return x if activation is None else self._on_grid(x, activation, self.activations[id(activation)])

    def _on_grid(self, x: Any, activation: Any, name: str) -> ir.Value:
        scale = self._initializer(f"{name}.scale", lambda: _array(activation.params["scale"]).reshape(()))
        zero = self._initializer(f"{name}.zero_point", lambda: np.zeros((), np.int8))
        codes = self._op("QuantizeLinear", x, scale, zero, name=f"{name}.quantize")
        return self._op("DequantizeLinear", codes, scale, zero, name=f"{name}.dequantize")

    def _weight(self) -> ir.Value:
        """The value `<layer>.weight`, made on the first call of the layer."""
        made = next((o for n in self.graph for o in n.outputs if o.name == f"{self.name}.weight"), None)
        if made is not None:
            return made
        q, layout = self.module.quantized, self.layout
        assert layout is not None
        linear = self.module.kind == "linear"
        if layout.block:
            codes = self._initializer(f"{self.name}.codes", lambda: signed_codes(q).T, int4=True)
            scales = self._initializer(f"{self.name}.scales", lambda: block_params(q, layout.block)[0].T)
            attributes = {"axis": 0, "block_size": layout.block}
        else:
            codes = self._initializer(f"{self.name}.codes", lambda: signed_codes(q).T if linear else signed_codes(q))
            scales = self._initializer(f"{self.name}.scales", lambda: _vector(q.params["scale"]))
            attributes = {"axis": 1 if linear else 0}
        weight = self._op("DequantizeLinear", codes, scales, name=f"{self.name}.dequantize", **attributes)
        weight.name = f"{self.name}.weight"
        return weight

    def _initializer(self, name: str, make: Any, int4: bool = False) -> ir.Value:
        if name not in self.graph.initializers:
            array = np.asarray(make(), order="C")  # np.ascontiguousarray would make a scalar a vector, which TensorRT-RTX does not fuse
            tensor = int4_tensor(array, name) if int4 else ir.Tensor(array, name=name)
            value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _op(self, op: str, *inputs: Any, name: str | None = None, **attributes: Any) -> ir.Value:
        node = ir.node(op, list(inputs), attributes, name=name)
        self.new.append(node)
        return node.outputs[0]


def _array(tensor: Any) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().float().contiguous().numpy()


def _vector(scale: Any) -> np.ndarray[Any, Any]:
    """Scales [O, 1] as [O], or as a scalar where there is one."""
    return _array(scale).reshape(-1 if scale.numel() > 1 else ())
