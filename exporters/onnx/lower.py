"""Put the codes in: each opaque node of a traced graph becomes the operators that hold its layer.

Initializers are named after the layer, which is how a reader (and the receipt) finds a tensor again:

    <layer>.codes   <layer>.scales   <layer>.zero_points      and the value <layer>.weight or <layer>.rows that they decode to

    MatMulNBits            x, codes uint8 [O, N, B], scales [O, N] -> y                                       com.microsoft
    DequantizeLinear       codes int4/int8 [K, O], scales [N, O] -> weight [K, O]; MatMul                     opset 21, blocks along axis 0
    Unpack                 codes int4/int8 [O, N, S] -> Cast, (Sub), Mul scales, Reshape -> weight [O, K]; Transpose, MatMul
                           convolutions: codes [O, I / groups, *kernel] -> Cast, (Sub), Mul -> weight; Conv
                           (constants only: onnxruntime folds them into a float32 weight when it loads the file)
    QDQ, MatMulInteger     int8 codes for integer products: `exporters/onnx/integer.py`, as are activations
    GatherBlockQuantized   codes uint8 [V, bytes], ids, scales [V, N] -> rows                                 com.microsoft
    Gather                 Gather(codes int8 [V, D], ids), Cast, (Sub), Mul Gather(scales [V, 1], ids) -> rows

A layer that the model calls twice keeps one set of initializers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from exporters.onnx.build import FLOAT, Builder
from exporters.onnx.integer import IntegerLowering
from exporters.onnx.layout import Layout, block_params, pack, signed_codes
from exporters.onnx.profile import PROFILES, Profile
from exporters.onnx.trace import CONTRIB, DOMAIN


def lower(
    model: ir.Model,
    modules: dict[str, Any],
    layouts: dict[str, Layout],
    profile: Profile = PROFILES["x86"],
    fuse: bool = False,
) -> None:
    """Replace every opaque node of ``model``, in place.

    Args:
        modules: converted layers, and activations on edges, by name.
        layouts: of the layers.
        fuse: whether onnxruntime's own integer operators may be used where QDQ does not lead to them.

    Raises:
        ValueError: if a quantized layer has no node in the graph, that is, the model never calls it.
    """
    from exporters.onnx import attention, edges

    unused = dict.fromkeys(layouts)
    builder = Builder(model.graph, profile, fuse and profile.contrib)
    if builder.contrib and profile.attention:
        for name in attention.fuse(builder, modules, layouts):
            unused.pop(name)
    for node in [n for n in model.graph if n.domain == DOMAIN]:
        name = node.attributes["layer"].as_string()
        unused.pop(name, None)
        _Lowering(builder, node, name, modules[name], layouts.get(name)).run()
    if unused:
        raise ValueError(
            f"{len(unused)} quantized layers are not called by the model, the first {next(iter(unused))}; "
            f"leave them in float: quantizer.keep_float=[{','.join(list(unused)[:3])}]"
        )
    edges.tidy(builder)
    passes.RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports.setdefault(CONTRIB, 1)


class _Lowering(IntegerLowering):
    """The replacement of one opaque node."""

    def run(self) -> None:
        x, old = self.node.inputs[0], self.node.outputs[0]
        result = self._build(x)
        if old.is_graph_output():  # an output keeps its own name
            name, old.name = old.name, None
            result = self.op("Identity", result)
            result.name = name
        result.type, result.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        self.builder.insert_before(self.node)
        self.graph.remove(self.node, safe=True)

    def _build(self, x: Any) -> ir.Value:
        if self.module.kind == "activation":
            return self.activation(x)
        assert self.layout is not None
        smoothing = getattr(self.module, "inverse_smoothing", None)
        if smoothing is not None:
            x = self.builder.scaled(x, f"{self.name}.inverse_smoothing", smoothing)
        if self.module.kind == "conv":
            return self.convolution(x)
        build = {
            "MatMulNBits": self._matmul_nbits,
            "DequantizeLinear": self._dequantize_linear,
            "Unpack": self._unpack,
            "QDQ": self.linear_qdq,
            "MatMulInteger": self.linear_dynamic,
            "GatherBlockQuantized": self._gather_blocks,
            "Gather": self._gather_rows,
        }[self.layout.op]
        return build(x)

    # -- linear ------------------------------------------------------------------------------------------------------

    def _matmul_nbits(self, x: Any) -> ir.Value:
        bits, block = self.layout.bits, self.layout.block
        rows, columns = self.q.shape
        blocks = -(-columns // block)
        codes = self.initializer("codes", lambda: pack(signed_codes(self.q), bits, blocks * block).reshape(rows, blocks, -1))
        attributes: dict[str, Any] = {"K": columns, "N": rows, "bits": bits, "block_size": block}
        attributes["accuracy_level"] = self.layout.accuracy_level
        return self.op("MatMulNBits", x, codes, self._scales(), self._packed_zero_points(), domain=CONTRIB, **attributes)

    def _dequantize_linear(self, x: Any) -> ir.Value:
        weight = self.existing("weight")
        if weight is None:
            codes = self.initializer("codes", lambda: signed_codes(self.q).T, self._integer())
            scales = self.initializer("scales", lambda: block_params(self.q, self.layout.block)[0].T)
            inputs = [codes, scales]
            if "zero_point" in self.q.params:
                inputs.append(self.initializer("zero_points", lambda: _zero_points(self.q, self.layout.block).T, self._integer()))
            weight = self.op("DequantizeLinear", *inputs, axis=0, block_size=self.layout.block, output="weight")
        return self.op("MatMul", x, weight)

    def _unpack(self, x: Any) -> ir.Value:
        weight = self.existing("weight")
        if weight is None:
            weight = self._unpacked_weight()
        return self.op("MatMul", x, self.op("Transpose", weight, perm=[1, 0]))

    def _unpacked_weight(self) -> ir.Value:
        rows, columns = self.q.shape
        size = self.layout.block
        groups = -(-columns // size)
        shape_3d = (rows, groups, size)
        codes = self.initializer("codes", lambda: _padded(signed_codes(self.q), groups * size).reshape(shape_3d), self._integer())
        value = self.op("Cast", codes, to=FLOAT)
        if "zero_point" in self.q.params:
            zero = self.initializer("zero_points", lambda: _zero_points(self.q, size)[..., None], self._integer())
            value = self.op("Sub", value, self.op("Cast", zero, to=FLOAT))
        scales = self.initializer("scales", lambda: block_params(self.q, size)[0][..., None])
        value = self.op("Mul", value, scales)
        shape = self.initializer("shape", lambda: np.array([rows, groups * size], np.int64))
        whole = groups * size == columns
        value = self.op("Reshape", value, shape, output="weight" if whole else None)
        return value if whole else self._first_columns(value, columns, "weight")

    # -- embedding ---------------------------------------------------------------------------------------------------

    def _gather_blocks(self, ids: Any) -> ir.Value:
        bits, columns = self.layout.bits, self.q.shape[1]
        padded = -(-columns // (8 // bits)) * (8 // bits)
        codes = self.initializer("codes", lambda: pack(signed_codes(self.q), bits, padded))
        attributes: dict[str, Any] = {"bits": bits, "block_size": self.layout.block, "gather_axis": 0, "quantize_axis": 1}
        inputs = (codes, ids, self._scales(), self._packed_zero_points())
        output = "rows" if padded == columns else None
        rows = self.op("GatherBlockQuantized", *inputs, domain=CONTRIB, output=output, **attributes)
        return rows if padded == columns else self._first_columns(rows, columns, "rows")

    def _gather_rows(self, ids: Any) -> ir.Value:
        codes = self.initializer("codes", lambda: signed_codes(self.q))
        value = self.op("Cast", self.op("Gather", codes, ids, axis=0), to=FLOAT)
        if "zero_point" in self.q.params:
            zero = self.initializer("zero_points", lambda: _zero_points(self.q, self.layout.block))
            value = self.op("Sub", value, self.op("Cast", self.op("Gather", zero, ids, axis=0), to=FLOAT))
        return self.op("Mul", value, self.op("Gather", self._scales(), ids, axis=0), output="rows")

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _scales(self) -> ir.Value:
        return self.initializer("scales", lambda: block_params(self.q, self.layout.block)[0])

    def _packed_zero_points(self) -> ir.Value | None:
        if "zero_point" not in self.q.params:
            return None
        bits = self.layout.bits

        def packed() -> np.ndarray[Any, Any]:
            zero = _zero_points(self.q, self.layout.block)
            per_byte = 8 // bits
            return pack(zero, bits, -(-zero.shape[1] // per_byte) * per_byte)

        return self.initializer("zero_points", packed)

    def _first_columns(self, value: ir.Value, columns: int, output: str) -> ir.Value:
        """value[..., :columns]."""
        given = {"start": 0, "end": columns, "axis": -1}
        bounds = [self.initializer(f"{output}_{part}", lambda n=n: np.array([n], np.int64)) for part, n in given.items()]
        return self.op("Slice", value, *bounds, output=output)

    def _integer(self) -> ir.DataType:
        return ir.DataType.INT4 if self.layout.bits == 4 else ir.DataType.INT8


def _zero_points(q: Any, block: int) -> np.ndarray[Any, Any]:
    zero = block_params(q, block)[1]
    assert zero is not None
    return zero


def _padded(codes: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    return np.pad(codes, ((0, 0), (0, length - codes.shape[1])))
