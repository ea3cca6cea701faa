"""Layers that multiply integers: int8 weights beside activations that are quantized, statically or at run time.

                                                                                                        onnxruntime fuses it to
    static    Q -> DQ -> MatMul(., DQ(codes int8 [K, O], scales [O]))                                   MatMulIntegerToFloat
              … -> Gemm(., weight, DQ(bias int32 [O], s_x * s_w)), on an edge                           QGemm
              … -> Conv(., DQ(codes int8 [O, I / groups, *kernel], scales [O]), bias int32) -> Q        QLinearConv
    dynamic   DynamicQuantizeLinear -> MatMulInteger(., codes int8 [K, O]) -> Cast -> Mul(s_x * scales) DynamicQuantizeMatMul
    float     Q -> DQ -> Conv(., unpacked weight): onnxruntime has no fast integer kernel with float output

(Q: QuantizeLinear, DQ: DequantizeLinear.) With `fuse` a static product is written as com.microsoft.MatMulIntegerToFloat itself, so that it
takes the bias that follows: what onnxruntime makes of QDQ adds the bias in a pass of its own (measured: 7 % of MiniLM). The biases of
BiasGelu, and of residual sums, go there too.

Activations on edges are QuantizeLinear + DequantizeLinear. onnxruntime drops a ReLU or Clip in front of QuantizeLinear that keeps no code
back (a ReLU where the zero point is the lowest code); others, on symmetric grids, would make it fall back to float, so there they move
behind, as Max(codes, code of 0) and Min(codes, code of 6): the same codes, since rounding keeps order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.onnx.build import FLOAT, Array, Builder, Quantized, static_params
from exporters.onnx.layout import Layout, block_params, signed_codes
from exporters.onnx.trace import CONTRIB, DOMAIN


class IntegerLowering:
    """Builds the replacement of one opaque node: the part about integers, and the helpers."""

    def __init__(self, builder: Builder, node: ir.Node, name: str, module: Any, layout: Layout | None) -> None:
        self.builder, self.graph, self.node, self.name, self.module = builder, builder.graph, node, name, module
        self.layout: Any = layout
        self.q: Any = getattr(module, "quantized", None)

    # -- activations -------------------------------------------------------------------------------------------------

    def activation(self, x: ir.Value) -> ir.Value:
        """An activation on an edge."""
        before, low, high = self._clamp(x)
        if before is None:
            return self.builder.decoded(self.builder.static(x, self.name, self.module))
        q = self.builder.static(before, self.name, self.module)
        codes = q.codes
        for op, bound in (("Max", low), ("Min", high)):
            if bound is not None:
                codes = self.op(op, codes, self.initializer(f"{op.lower()}_code", lambda bound=bound: bound))
                codes.shape, codes.type = x.shape, q.codes.type
        return self.builder.decoded(Quantized(codes, q.scale, q.zero))

    def _clamp(self, x: ir.Value) -> tuple[ir.Value | None, Array | None, Array | None]:
        """What a ReLU or Clip that made ``x`` read, and the least and largest code that it lets through, where it keeps any code back.

        onnxruntime drops those that keep none back by itself, and falls back to float32 for the others.
        """
        clamp = x.producer()
        if clamp is None or clamp.op_type not in ("Relu", "Clip") or clamp.domain != "" or only_reader(x) is None:
            return None, None, None
        given = clamp.inputs[1:]
        if any(v is not None and v.const_value is None for v in given):
            return None, None, None
        bounds: list[Any] = [np.float32(0.0), None] if clamp.op_type == "Relu" else [_scalar(v) for v in (*given, None, None)[:2]]
        scale, zero = static_params(self.module, self.builder.profile.signed)
        limits = np.iinfo(zero.dtype)
        ends: list[Array | None] = []
        for bound, end in zip(bounds, (limits.min, limits.max), strict=True):
            code = end if bound is None else np.clip(np.round(np.float32(bound) / scale) + np.float32(zero), limits.min, limits.max)
            ends.append(None if code == end else np.array(code).astype(zero.dtype))
        return (None if ends == [None, None] else clamp.inputs[0]), ends[0], ends[1]

    def quantized_input(self, x: ir.Value) -> Quantized:
        """The layer's input in codes, quantized by the layer itself."""
        if self.layout.input == "dynamic":
            return self.builder.dynamic(x)
        return self.builder.static(x, f"{self.name}.activation_fake", self.module.activation_fake)

    def input_on_grid(self, x: ir.Value) -> ir.Value:
        """The layer's input as floats that are on its grid."""
        return x if self.layout.input in ("float", "edge") else self.builder.decoded(self.quantized_input(x))

    # -- linear ------------------------------------------------------------------------------------------------------

    def linear_qdq(self, x: ir.Value) -> ir.Value:
        """x [..., K] -> [..., O], static."""
        if self.builder.contrib and self.layout.input == "static":
            q, bias = self.quantized_input(x), take_bias(self.node.outputs[0], self.q.shape[0])
            zeros = self.zero_points()
            inputs = (q.codes, self.codes(), q.scale, self.scales(), q.zero, zeros, bias)
            return self.op("MatMulIntegerToFloat", *inputs, domain=CONTRIB, output="product")
        weight = self.existing("weight")
        if weight is None:
            zeros = self.initializer("zero_points", lambda: _rows(self.q)[1])  # QGemm is fused only where there are some
            weight = self.op("DequantizeLinear", self.codes(), self.scales(), zeros, axis=1, output="weight")
        x = self.input_on_grid(x)
        matrix = x.shape is not None and len(x.shape) == 2
        on_grid = self.module.bias_codes is not None
        bias = take_bias(self.node.outputs[0], self.q.shape[0]) if on_grid or (matrix and self.builder.profile.contrib) else None
        if bias is None:
            return self.op("MatMul", x, weight, output="product")
        if on_grid and matrix:
            return self.op("Gemm", x, weight, self.bias_on_grid(), output="product")
        # with Add onnxruntime would make a Gemm of two axes, and compute it in float
        return self.op("Sum", self.op("MatMul", x, weight, output="product"), self.bias_on_grid() if on_grid else bias)

    def linear_dynamic(self, x: ir.Value) -> ir.Value:
        """x [..., K] -> [..., O], with the range of x."""
        q = self.quantized_input(x)
        sums = self.op("MatMulInteger", q.codes, self.codes(), q.zero, self.zero_points())
        product = self.op("Mul", self.op("Cast", sums, to=FLOAT), self.op("Mul", q.scale, self.scales()), output="product")
        bias = take_bias(self.node.outputs[0], self.q.shape[0]) if self.builder.contrib else None
        return product if bias is None else self.op("Add", product, bias)

    def codes(self) -> ir.Value:
        """int8 [K, O]."""
        return self.initializer("codes", lambda: signed_codes(self.q).T)

    def scales(self) -> ir.Value:
        """float32 [O]."""
        return self.initializer("scales", lambda: _rows(self.q)[0])

    def zero_points(self) -> ir.Value | None:
        """int8 [O], None where they are 0."""
        return self.initializer("zero_points", lambda: _rows(self.q)[1]) if "zero_point" in self.q.params else None

    # -- convolution -------------------------------------------------------------------------------------------------

    def convolution(self, x: ir.Value) -> ir.Value:
        """x [N, I, *spatial] -> [N, O, *spatial]."""
        integer = self.layout.op == "QDQ" and leads_to_grid(self.node.outputs[0])
        x = self.input_on_grid(x)
        weight = self.existing("weight")
        if weight is None:
            weight = self._integer_kernel() if integer else self._float_kernel()
        bias: ir.Value | None = None
        if integer and self.module.bias_codes is not None:
            bias = self.bias_on_grid()
        elif self.module.bias is not None:  # in a float convolution, of the same value
            bias = self.initializer("float_bias", lambda: _array(self.module.bias))
        attributes: dict[str, Any] = {"strides": list(self.module.stride), "pads": [*self.module.padding, *self.module.padding]}
        attributes |= {"dilations": list(self.module.dilation), "group": self.module.groups, "kernel_shape": list(self.q.shape[2:])}
        return self.op("Conv", x, weight, bias, output="product", **attributes)

    def _integer_kernel(self) -> ir.Value:
        codes = self.initializer("codes", lambda: signed_codes(self.q))
        return self.op("DequantizeLinear", codes, self.scales(), axis=0, output="weight")

    def _float_kernel(self) -> ir.Value:
        each = (-1, *[1] * (len(self.q.shape) - 1))
        integer = ir.DataType.INT4 if self.layout.bits == 4 else ir.DataType.INT8
        value = self.op("Cast", self.initializer("codes", lambda: signed_codes(self.q), integer), to=FLOAT)
        if "zero_point" in self.q.params:
            zero = self.initializer("zero_points", lambda: _rows(self.q)[1].reshape(each), integer)
            value = self.op("Sub", value, self.op("Cast", zero, to=FLOAT))
        return self.op("Mul", value, self.initializer("scales", lambda: _rows(self.q)[0].reshape(each)), output="weight")

    def bias_on_grid(self) -> ir.Value:
        """int32 codes times s_x * s_w, [O]."""
        bias = self.existing("bias")
        if bias is not None:
            return bias
        codes = self.initializer("bias_codes", lambda: self.module.bias_codes.cpu().numpy())
        step = self.initializer("bias_scales", lambda: _bias_step(self.module))
        return self.op("DequantizeLinear", codes, step, axis=0, output="bias")

    # -- pieces ------------------------------------------------------------------------------------------------------

    def existing(self, suffix: str) -> Any:
        """The value `<layer>.<suffix>` where an earlier call of this layer made it."""
        if f"{self.name}.codes" not in self.graph.initializers:
            return None
        return next((o for n in self.graph for o in n.outputs if o.name == f"{self.name}.{suffix}"), None)

    def initializer(self, suffix: str, make: Any, dtype: ir.DataType | None = None) -> ir.Value:
        """The initializer `<layer>.<suffix>`, made on first use."""
        return self.builder.initializer(f"{self.name}.{suffix}", make, dtype)

    def op(self, op: str, *inputs: Any, output: str | None = None, **rest: Any) -> Any:
        """A node; its output is called `<layer>.<output>` unless an earlier call of the layer has that name."""
        result = self.builder.op(op, *inputs, **rest)
        if output is not None and all(o.name != f"{self.name}.{output}" for n in self.graph for o in n.outputs):
            result.name = f"{self.name}.{output}"
        return result


def leads_to_grid(value: ir.Value) -> bool:
    """Whether ``value`` goes to an activation on an edge, with nothing but a ReLU or Clip between: what QLinearConv needs."""
    while (reader := only_reader(value)) is not None:
        if reader.domain == DOMAIN:
            return reader.op_type == "PackedActivation"
        if reader.op_type not in ("Relu", "Clip"):
            return False
        value = reader.outputs[0]
    return False


def take_bias(value: ir.Value, width: int) -> ir.Value | None:
    """The bias [width] that the only reader of ``value`` adds, taken out of that reader; None where there is none.

    The reader is Add (which goes), Sum of several (which goes on without it) or BiasGelu (which becomes Gelu).
    """
    reader = only_reader(value)
    if reader is None or reader.graph is None or reader.op_type not in ("Add", "Sum", "BiasGelu"):
        return None
    biases = [v for v in reader.inputs if v is not None and v.const_value is not None and list(v.const_value.shape) == [width]]
    if not biases:
        return None
    others, result, graph = [v for v in reader.inputs if v is not None and v is not biases[0]], reader.outputs[0], reader.graph
    if reader.op_type == "BiasGelu" or len(others) > 1:
        new = ir.node("Gelu" if reader.op_type == "BiasGelu" else "Sum", others)
        new.outputs[0].shape, new.outputs[0].type = result.shape, result.type
        graph.insert_before(reader, [new])
        value = new.outputs[0]
    if result.is_graph_output():  # an output keeps its name
        value.name, result.name = result.name, None
    ir.convenience.replace_all_uses_with(result, value, replace_graph_outputs=True)
    graph.remove(reader, safe=True)
    return biases[0]


def _scalar(value: ir.Value | None) -> Any:
    """Of a constant with one element; None where there is none."""
    return value.const_value.numpy().reshape(())[()] if value is not None and value.const_value is not None else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value``; None where there are several, or the value is an output of the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _rows(q: Any) -> tuple[Array, Array]:
    """Scale and zero point (0 where there is none) of each row, [O]."""
    columns = int(np.prod(q.shape[1:]))
    scale, zero = block_params(q, columns)
    return scale[:, 0], np.zeros(len(scale), np.int8) if zero is None else zero[:, 0]


def _bias_step(layer: Any) -> Array:
    """s_x * s_w, float32 [O], multiplied as the layer does."""
    step = layer.source.params["scale"].reshape(()) * layer.quantized.params["scale"]
    return _array(step.reshape(-1).expand(layer.quantized.shape[0]))


def _array(tensor: Any) -> Array:
    return np.asarray(tensor.detach().cpu().float().contiguous().numpy())
