"""Put the codes in: each opaque node of a traced graph becomes the operators that hold its layer.

Initializers are named after the layer, which is how a reader (and the receipt) finds a tensor again:

    <layer>.codes   <layer>.scales   <layer>.zero_points      and the value <layer>.weight or <layer>.rows that they decode to

    MatMulNBits            x, codes uint8 [O, N, B], scales [O, N] -> y                                       com.microsoft
    DequantizeLinear       codes int4/int8 [K, O], scales [N, O] -> weight [K, O]; MatMul                     opset 21, blocks along axis 0
    Unpack                 codes int4/int8 [O, N, S] -> Cast, (Sub), Mul scales, Reshape -> weight [O, K]; Transpose, MatMul
                           (constants only: onnxruntime folds them into a float32 weight when it loads the file)
    GatherBlockQuantized   codes uint8 [V, bytes], ids, scales [V, N] -> rows                                 com.microsoft
    Gather                 Gather(codes int8 [V, D], ids), Cast, (Sub), Mul Gather(scales [V, 1], ids) -> rows

A layer that the model calls twice keeps one set of initializers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.base import PackedLayer
from exporters.onnx.layout import Layout, block_params, pack, signed_codes
from exporters.onnx.trace import CONTRIB, DOMAIN

FLOAT = int(ir.DataType.FLOAT)


def lower(model: ir.Model, layers: dict[str, PackedLayer], layouts: dict[str, Layout]) -> None:
    """Replace every opaque node of ``model``, in place.

    Raises:
        ValueError: if a quantized layer has no node in the graph, that is, the model never calls it.
    """
    unused = dict(layers)
    for node in [n for n in model.graph if n.domain == DOMAIN]:
        name = node.attributes["layer"].as_string()
        unused.pop(name, None)
        _Lowering(model.graph, node, name, layers[name], layouts[name]).run()
    if unused:
        raise ValueError(
            f"{len(unused)} quantized layers are not called by the model, the first {next(iter(unused))}; "
            f"leave them in float: quantizer.keep_float=[{','.join(list(unused)[:3])}]"
        )
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports.setdefault(CONTRIB, 1)


class _Lowering:
    """The replacement of one opaque node."""

    def __init__(self, graph: ir.Graph, node: ir.Node, name: str, layer: PackedLayer, layout: Layout) -> None:
        self.graph, self.node, self.name, self.layout = graph, node, name, layout
        self.q = layer.quantized
        self.new: list[ir.Node] = []

    def run(self) -> None:
        x, old = self.node.inputs[0], self.node.outputs[0]
        build = {
            "MatMulNBits": self._matmul_nbits,
            "DequantizeLinear": self._dequantize_linear,
            "Unpack": self._unpack,
            "GatherBlockQuantized": self._gather_blocks,
            "Gather": self._gather_rows,
        }[self.layout.op]
        result = build(x)
        if old.is_graph_output():  # an output keeps its own name
            name, old.name = old.name, None
            result = self._op("Identity", result)
            result.name = name
        result.type, result.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        self.graph.insert_before(self.node, self.new)
        self.graph.remove(self.node, safe=True)

    # -- linear ------------------------------------------------------------------------------------------------------

    def _matmul_nbits(self, x: Any) -> ir.Value:
        bits, block = self.layout.bits, self.layout.block
        rows, columns = self.q.shape
        blocks = -(-columns // block)
        codes = self._initializer("codes", lambda: pack(signed_codes(self.q), bits, blocks * block).reshape(rows, blocks, -1))
        attributes: dict[str, Any] = {"K": columns, "N": rows, "bits": bits, "block_size": block}
        attributes["accuracy_level"] = self.layout.accuracy_level
        return self._op("MatMulNBits", x, codes, self._scales(), self._packed_zero_points(), domain=CONTRIB, **attributes)

    def _dequantize_linear(self, x: Any) -> ir.Value:
        weight = self._existing("weight")
        if weight is None:
            codes = self._initializer("codes", lambda: signed_codes(self.q).T, self._integer())
            scales = self._initializer("scales", lambda: block_params(self.q, self.layout.block)[0].T)
            inputs = [codes, scales]
            if "zero_point" in self.q.params:
                inputs.append(self._initializer("zero_points", lambda: _zero_points(self.q, self.layout.block).T, self._integer()))
            weight = self._op("DequantizeLinear", *inputs, axis=0, block_size=self.layout.block, output="weight")
        return self._op("MatMul", x, weight)

    def _unpack(self, x: Any) -> ir.Value:
        weight = self._existing("weight")
        if weight is None:
            weight = self._unpacked_weight()
        return self._op("MatMul", x, self._op("Transpose", weight, perm=[1, 0]))

    def _unpacked_weight(self) -> ir.Value:
        rows, columns = self.q.shape
        size = self.layout.block
        groups = -(-columns // size)
        shape_3d = (rows, groups, size)
        codes = self._initializer("codes", lambda: _padded(signed_codes(self.q), groups * size).reshape(shape_3d), self._integer())
        value = self._op("Cast", codes, to=FLOAT)
        if "zero_point" in self.q.params:
            zero = self._initializer("zero_points", lambda: _zero_points(self.q, size)[..., None], self._integer())
            value = self._op("Sub", value, self._op("Cast", zero, to=FLOAT))
        scales = self._initializer("scales", lambda: block_params(self.q, size)[0][..., None])
        value = self._op("Mul", value, scales)
        shape = self._initializer("shape", lambda: np.array([rows, groups * size], np.int64))
        whole = groups * size == columns
        value = self._op("Reshape", value, shape, output="weight" if whole else None)
        return value if whole else self._first_columns(value, columns, "weight")

    # -- embedding ---------------------------------------------------------------------------------------------------

    def _gather_blocks(self, ids: Any) -> ir.Value:
        bits, columns = self.layout.bits, self.q.shape[1]
        padded = -(-columns // (8 // bits)) * (8 // bits)
        codes = self._initializer("codes", lambda: pack(signed_codes(self.q), bits, padded))
        attributes: dict[str, Any] = {"bits": bits, "block_size": self.layout.block, "gather_axis": 0, "quantize_axis": 1}
        inputs = (codes, ids, self._scales(), self._packed_zero_points())
        output = "rows" if padded == columns else None
        rows = self._op("GatherBlockQuantized", *inputs, domain=CONTRIB, output=output, **attributes)
        return rows if padded == columns else self._first_columns(rows, columns, "rows")

    def _gather_rows(self, ids: Any) -> ir.Value:
        codes = self._initializer("codes", lambda: signed_codes(self.q))
        value = self._op("Cast", self._op("Gather", codes, ids, axis=0), to=FLOAT)
        if "zero_point" in self.q.params:
            zero = self._initializer("zero_points", lambda: _zero_points(self.q, self.layout.block))
            value = self._op("Sub", value, self._op("Cast", self._op("Gather", zero, ids, axis=0), to=FLOAT))
        return self._op("Mul", value, self._op("Gather", self._scales(), ids, axis=0), output="rows")

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _scales(self) -> ir.Value:
        return self._initializer("scales", lambda: block_params(self.q, self.layout.block)[0])

    def _packed_zero_points(self) -> ir.Value | None:
        if "zero_point" not in self.q.params:
            return None
        bits = self.layout.bits

        def packed() -> np.ndarray[Any, Any]:
            zero = _zero_points(self.q, self.layout.block)
            per_byte = 8 // bits
            return pack(zero, bits, -(-zero.shape[1] // per_byte) * per_byte)

        return self._initializer("zero_points", packed)

    def _first_columns(self, value: ir.Value, columns: int, output: str) -> ir.Value:
        """value[..., :columns]."""
        given = {"start": 0, "end": columns, "axis": -1}
        bounds = [self._initializer(f"{output}_{part}", lambda n=n: np.array([n], np.int64)) for part, n in given.items()]
        return self._op("Slice", value, *bounds, output=output)

    def _integer(self) -> ir.DataType:
        return ir.DataType.INT4 if self.layout.bits == 4 else ir.DataType.INT8

    def _existing(self, suffix: str) -> ir.Value | None:
        """The value `<layer>.<suffix>` where an earlier call of this layer made it."""
        codes = self.graph.initializers.get(f"{self.name}.codes")
        if codes is None:
            return None
        return next((o for n in self.graph for o in n.outputs if o.name == f"{self.name}.{suffix}"), None)

    def _initializer(self, suffix: str, make: Any, dtype: ir.DataType | None = None) -> ir.Value:
        """The initializer `<layer>.<suffix>`, made on first use."""
        name = f"{self.name}.{suffix}"
        if name not in self.graph.initializers:
            array = np.ascontiguousarray(make())
            tensor = _int4(array, name) if dtype == ir.DataType.INT4 else ir.Tensor(array, name=name)
            value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _op(self, op: str, *inputs: Any, domain: str = "", output: str | None = None, **attributes: Any) -> ir.Value:
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        node = ir.node(op, given, attributes, domain=domain)
        self.new.append(node)
        result = node.outputs[0]
        if output is not None and all(o.name != f"{self.name}.{output}" for n in self.graph for o in n.outputs):
            result.name = f"{self.name}.{output}"
        return result


def _zero_points(q: Any, block: int) -> np.ndarray[Any, Any]:
    zero = block_params(q, block)[1]
    assert zero is not None
    return zero


def _padded(codes: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    return np.pad(codes, ((0, 0), (0, length - codes.shape[1])))


def _int4(array: np.ndarray[Any, Any], name: str) -> ir.PackedTensor[Any]:
    """Signed 4-bit codes, two per byte, low nibble first."""
    flat = array.reshape(-1).astype(np.uint8) & np.uint8(15)
    flat = np.pad(flat, (0, flat.size % 2))
    packed: Any = flat[0::2] | (flat[1::2] << 4)
    return ir.PackedTensor(packed, ir.DataType.INT4, shape=array.shape, name=name)
