"""Quantized values on the edges of a graph: keep them in codes as long as nothing but moving happens, and keep float layers in float.

    codes move   DequantizeLinear -> Slice, Pad, MaxPool, Reshape, Transpose, … becomes … -> DequantizeLinear: moving codes and moving
                 values is the same thing. A max-pool may move before, since decoding keeps order; zero padding pads with the zero point
    pooling      ReduceMean over an image becomes GlobalAveragePool, for which onnxruntime has an integer kernel
    float layer  a Conv or Gemm with a float weight between two quantized values: onnxruntime would quantize that weight to int8, with
                 one scale, without a word (its WeightBiasQuantization), though training left it in float. A Sum of one operand, which
                 copies, between the layer and its QuantizeLinear stops it

Nothing here changes a number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.onnx.build import Builder, Quantized
from exporters.onnx.integer import only_reader

MOVES = {
    "Slice",
    "Pad",
    "MaxPool",
    "Flatten",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Expand",
    "Tile",
    "Identity",
}
"""Operators of whose first input every output value is a copy, and that compute on int8 and uint8."""


def tidy(builder: Builder) -> None:
    """All of the above, in place."""
    graph = builder.graph
    for node in [n for n in graph if n.op_type == "ReduceMean"]:
        _pool(builder, node)
    waiting = [n for n in graph if n.op_type == "DequantizeLinear" and _is_activation(n)]
    while waiting:
        waiting += _move(builder, waiting.pop(0))
    for node in list(graph):
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            _keep_in_float(builder, node)


def _is_activation(node: ir.Node) -> bool:
    codes = node.inputs[0]
    return codes is not None and codes.const_value is None


def _pool(builder: Builder, node: ir.Node) -> None:
    """ReduceMean over the last two of four axes, between DequantizeLinear and QuantizeLinear."""
    x, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    quantize = only_reader(node.outputs[0])
    if x is None or x.producer() is None or x.producer().op_type != "DequantizeLinear":  # type: ignore[union-attr]
        return
    if quantize is None or quantize.op_type != "QuantizeLinear" or axes is None or axes.const_value is None:
        return
    if x.shape is None or len(x.shape) != 4 or sorted(int(a) % 4 for a in axes.const_value.numpy().reshape(-1)) != [2, 3]:
        return
    pooled = builder.op("GlobalAveragePool", x)
    codes = builder.op("QuantizeLinear", pooled, *quantize.inputs[1:])
    codes.type = quantize.outputs[0].type
    keeps = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
    if not keeps:
        codes = builder.op("Squeeze", codes, builder.initializer("image_axes", lambda: np.array([2, 3], np.int64)))
    codes.shape, codes.type = quantize.outputs[0].shape, quantize.outputs[0].type
    _replace(builder, quantize, codes)
    builder.graph.remove(node, safe=True)


def _replace(builder: Builder, node: ir.Node, value: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(node.outputs[0], value)
    builder.insert_before(node)
    builder.graph.remove(node, safe=True)


def _move(builder: Builder, decode: ir.Node) -> list[ir.Node]:
    """Move the readers of ``decode`` that only move values before it; the DequantizeLinear nodes that this made."""
    made: list[ir.Node] = []
    codes, scale, zero = decode.inputs
    assert codes is not None and scale is not None and zero is not None
    for reader, index in list(decode.outputs[0].uses()):
        if not _moves(reader, index):
            continue
        rest = list(reader.inputs[1:])
        if reader.op_type == "Pad":
            rest = [rest[0], zero, *rest[2:]]
        attributes: dict[str, Any] = dict(reader.attributes)
        moved = builder.op(reader.op_type, codes, *rest, **attributes)
        old = reader.outputs[0]
        moved.shape, moved.type = old.shape, codes.type
        value = builder.decoded(Quantized(moved, scale, zero))
        producer = value.producer()
        assert producer is not None
        made.append(producer)
        _replace(builder, reader, value)
    if not decode.outputs[0].uses() and not decode.outputs[0].is_graph_output():
        builder.graph.remove(decode, safe=True)
    return made


def _moves(node: ir.Node, index: int) -> bool:
    if node.op_type not in MOVES or node.domain != "" or index != 0 or len(node.outputs) > 1 or node.outputs[0].is_graph_output():
        return False
    if node.op_type != "Pad":
        return True
    constant = "mode" not in node.attributes or node.attributes["mode"].as_string() == "constant"
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    return not constant or fill is None or (fill.const_value is not None and not np.any(fill.const_value.numpy()))


def _keep_in_float(builder: Builder, node: ir.Node) -> None:
    """Keep onnxruntime from quantizing what is in float here: the weight, or the bias."""
    x = node.inputs[0].producer() if node.inputs[0] is not None else None
    if x is None or x.op_type != "DequantizeLinear":
        return
    constants = list(node.inputs[1:])
    last = node
    if node.op_type == "MatMul":  # with the addition behind it, onnxruntime makes it a Gemm
        add = only_reader(node.outputs[0])
        if add is None or add.op_type != "Add":
            return
        constants += [v for v in add.inputs if v is not node.outputs[0]]
        last = add
    if all(v is None or _is_decoded(v) for v in constants):
        return
    while (reader := only_reader(last.outputs[0])) is not None:
        if reader.op_type == "QuantizeLinear":
            copy: Any = builder.op("Sum", last.outputs[0])
            copy.shape, copy.type = last.outputs[0].shape, last.outputs[0].type
            builder.insert_before(reader)
            reader.replace_input_with(0, copy)
            return
        if reader.op_type not in ("Relu", "Clip"):
            return
        last = reader


def _is_decoded(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"
