"""What putting codes into a graph needs again and again: initializers made once, new nodes before an old one, quantized values shared.

A value that several layers quantize alike (Q, K and V of attention read one) is quantized once. Activations are int8 or uint8 by the
profile; uint8 is the grid's code + 128, with a zero point 128 higher: the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.onnx.profile import Profile

FLOAT = int(ir.DataType.FLOAT)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Quantized:
    """A value in codes, with what its codes mean."""

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value


class Builder:
    """Adds to one graph."""

    def __init__(self, graph: ir.Graph, profile: Profile, contrib: bool) -> None:
        self.graph, self.profile, self.contrib = graph, profile, contrib
        self._new: list[ir.Node] = []
        self._shared: dict[Any, Any] = {}

    def op(self, op: str, *inputs: Any, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """A node, held back until `insert_before`; its output, or a tuple of them."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        node = ir.node(op, given, attributes, domain=domain, num_outputs=outputs)
        self._new.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def insert_before(self, node: ir.Node) -> None:
        """Put the nodes made since the last call before ``node``."""
        self.graph.insert_before(node, self._new)
        self._new = []

    def initializer(self, name: str, make: Callable[[], Array], dtype: ir.DataType | None = None) -> ir.Value:
        """The initializer ``name``, made on first use; int4 where ``dtype`` says so, else as numpy has it."""
        if name not in self.graph.initializers:
            array = np.asarray(make(), order="C")
            tensor = int4(array, name) if dtype == ir.DataType.INT4 else ir.Tensor(array, name=name)
            value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def scaled(self, x: ir.Value, name: str, factor: Any) -> ir.Value:
        """x * ``factor`` [K], once for each pair of them."""
        array = factor.detach().cpu().float().numpy()
        return self._once(("scaled", x, array.tobytes()), lambda: self.op("Mul", x, self.initializer(name, lambda: array)))

    def static(self, x: ir.Value, name: str, activation: Any) -> Quantized:
        """x on a static grid: QuantizeLinear with initializers ``name``.scale and .zero_point."""
        scale, zero = static_params(activation, self.profile.signed)

        def make() -> Quantized:
            s, z = self.initializer(f"{name}.scale", lambda: scale), self.initializer(f"{name}.zero_point", lambda: zero)
            codes = self.op("QuantizeLinear", x, s, z)
            codes.shape, codes.type = x.shape, z.type
            return Quantized(codes, s, z)

        return self._once(("static", x, scale.tobytes(), zero.tobytes()), make)

    def dynamic(self, x: ir.Value) -> Quantized:
        """x on the grid that follows from its own range: DynamicQuantizeLinear, uint8."""
        return self._once(("dynamic", x), lambda: Quantized(*self.op("DynamicQuantizeLinear", x, outputs=3)))

    def decoded(self, q: Quantized) -> ir.Value:
        """The values of codes; a node for each reader, which is what onnxruntime fuses."""
        value = self.op("DequantizeLinear", q.codes, q.scale, q.zero)
        value.shape, value.type = q.codes.shape, ir.TensorType(ir.DataType.FLOAT)
        return value

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


def static_params(activation: Any, signed: bool) -> tuple[Array, Array]:
    """Scale float32 [] and zero point int8 or uint8 [] of a static activation."""
    zero = activation.params.get("zero_point")
    point = 0 if zero is None else int(zero)
    kind = np.dtype(np.int8 if signed else np.uint8)
    return np.array(float(activation.params["scale"]), np.float32), np.array(point if signed else point + 128, kind)


def int4(array: Array, name: str) -> ir.PackedTensor[Any]:
    """Signed 4-bit codes, two per byte, low nibble first."""
    flat = array.reshape(-1).astype(np.uint8) & np.uint8(15)
    flat = np.pad(flat, (0, flat.size % 2))
    packed: Any = flat[0::2] | (flat[1::2] << 4)
    return ir.PackedTensor(packed, ir.DataType.INT4, shape=array.shape, name=name)
