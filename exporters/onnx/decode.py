"""What a file holds, read back by the runtime: packed tensors, activations, and the products of single layers.

A packed tensor is decoded by the operator that will use it, out of the file as it lies on disk: MatMulNBits multiplies an identity
matrix (at accuracy_level 0, which gives every decoded weight exactly: all other products are 0), integer products multiply an identity
of codes (1, with scale 1 and zero point 0), DequantizeLinear and the constant part of Unpack run alone, embeddings gather all their rows.
The weights in QAttention are decoded, and multiplied, by MatMulIntegerToFloat, which is the same routine of MLAS on the same initializers.

A static activation is shown by the values of all its codes, and by what QuantizeLinear and DequantizeLinear make of an input.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from exporters.base import Inputs
from exporters.onnx.runtime import open_session
from exporters.onnx.trace import CONTRIB

IDENTITY = 1024
"""Most rows of an identity matrix, so that decoding a weight costs K * 1024 * O multiplications instead of K * K * O."""

PRODUCTS = ("MatMulNBits", "MatMul", "Gemm", "Conv", "MatMulInteger", "MatMulIntegerToFloat", "QAttention")
OWN = ".activation_fake"
"""Suffix of a layer's name that names the activation inside it."""

Array = np.ndarray[Any, Any]


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and decoded values, float32, one at a time: weights in the shape of their codes, biases [O], activations [256]."""
    model = ir.load(path)
    for name in _layers(model):
        yield name, torch.from_numpy(_weight(model, name))
        if f"{name}.bias_codes" in model.graph.initializers:
            yield f"{name}.bias", torch.from_numpy(_run_part(model, _values(model)[f"{name}.bias"], {}))
    for name, quantize in _static_activations(model).items():
        yield name, torch.from_numpy(_all_codes(quantize))


def activations(path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """Names and what quantizing and decoding, with the file's scales and zero points, makes of each input."""
    model = ir.load(path)
    static = _static_activations(model)
    for name, x in inputs.items():
        if name in static:
            yield name, torch.from_numpy(_on_grid(static[name], x.cpu().numpy()))
        elif name.endswith(OWN) and (node := _quantizer(model, name.removesuffix(OWN))) is not None:
            yield name, torch.from_numpy(_on_grid(node, x.cpu().numpy()))


def products(path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """Layer names and what the operators of the file make of each input, bias aside: float32 [R, O], or [N, O, *spatial]."""
    model = ir.load(path)
    for name, x in inputs.items():
        yield name, torch.from_numpy(_product(model, name, x.cpu().numpy()))


# -- finding things ------------------------------------------------------------------------------------------------------


def _layers(model: ir.Model) -> list[str]:
    return [n.removesuffix(".codes") for n in model.graph.initializers if n.endswith(".codes")]


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(v.name): v for n in model.graph for v in n.outputs}


def _reader(model: ir.Model, name: str) -> ir.Node:
    """The operator that multiplies with, or looks up in, the codes of a layer."""
    waiting = [node for node, _ in model.graph.initializers[f"{name}.codes"].uses()]
    if not waiting:
        raise ValueError(f"nothing in the file reads {name}.codes")
    while waiting:
        node = waiting.pop(0)
        if node.op_type in (*PRODUCTS, "Gather", "GatherBlockQuantized"):
            return node
        waiting += [user for output in node.outputs for user, _ in output.uses()]
    raise ValueError(f"no product in the file reads {name}.codes")


def _static_activations(model: ir.Model) -> dict[str, ir.Node]:
    """Name -> QuantizeLinear. Layers that share one are all listed."""
    found = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and node.inputs[1] is not None:
            name = str(node.inputs[1].name).removesuffix(".scale")
            if not name.endswith(OWN):
                found[name] = node
    for name in _layers(model):
        quantizer = _quantizer(model, name)
        if quantizer is not None and quantizer.op_type == "QuantizeLinear":
            found[f"{name}{OWN}"] = quantizer
    return found


def _quantizer(model: ir.Model, name: str) -> ir.Node | None:
    """The node that quantizes a layer's own input; None where it reads floats, or an edge's activation."""
    reader = _reader(model, name)
    value = reader.inputs[0] if reader.op_type in PRODUCTS else None
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "DequantizeLinear":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type == "DynamicQuantizeLinear":
        return node
    own = node.op_type == "QuantizeLinear" and node.inputs[1] is not None and str(node.inputs[1].name).endswith(f"{OWN}.scale")
    return node if own else None


# -- weights -------------------------------------------------------------------------------------------------------------


def _weight(model: ir.Model, name: str) -> Array:
    node = _reader(model, name)
    if node.op_type == "MatMulNBits":
        return _decode_matmul_nbits(node)
    values = _values(model)
    if node.op_type in ("Gather", "GatherBlockQuantized"):
        codes, ids = model.graph.initializers[f"{name}.codes"], node.inputs[1]
        assert ids is not None and codes.const_value is not None
        return _run_part(model, values[f"{name}.rows"], {ids: np.arange(len(codes.const_value.numpy()))})
    if f"{name}.weight" not in values:
        return _decode_integers(model, name)
    value = _run_part(model, values[f"{name}.weight"], {})
    first = next(iter(model.graph.initializers[f"{name}.codes"].uses())).node
    transposed = first.op_type == "DequantizeLinear" and node.op_type != "Conv"
    return value.T.copy() if transposed else value


def _decode_integers(model: ir.Model, name: str) -> Array:
    """[O, K]: an identity matrix of codes times the weight, in pieces of `IDENTITY` rows."""
    rows = model.graph.initializers[f"{name}.codes"].const_value
    assert rows is not None
    total, pieces = rows.shape.numpy()[0], []
    for first in range(0, total, IDENTITY):
        eye = np.zeros((min(IDENTITY, total - first), total), np.uint8)
        eye[np.arange(len(eye)), first + np.arange(len(eye))] = 1
        pieces.append(_integer_product(model, name, eye, np.float32(1.0), np.uint8(0)))
    return np.ascontiguousarray(np.concatenate(pieces).T)


def _integer_product(model: ir.Model, name: str, codes: Array, scale: Any, zero: Any) -> Array:
    """[R, O] = (codes [R, K] - zero) * scale times the layer's weight, in integers."""
    held = {part: model.graph.initializers.get(f"{name}.{part}") for part in ("codes", "scales", "zero_points")}
    constants = {part: v for part, v in held.items() if v is not None}
    names = ["x", "codes", "scale", "scales", "zero", *(["zero_points"] if "zero_points" in constants else [])]
    node = onnx.helper.make_node("MatMulIntegerToFloat", names, ["y"], domain=CONTRIB)
    given = {"scale": np.asarray(scale), "zero": np.asarray(zero)}
    initializers = [_proto(v, part) for part, v in constants.items()] + [onnx.numpy_helper.from_array(a, n) for n, a in given.items()]
    return _run_nodes([node], initializers, "y", {"x": codes})


def _decode_matmul_nbits(node: ir.Node) -> Array:
    """Feed identity matrices to the node's own codes, `IDENTITY` columns at a time."""
    attributes: dict[str, Any] = {k: node.attributes[k].as_int() for k in ("K", "N", "bits", "block_size")}
    attributes["accuracy_level"] = 0
    arrays = [v.const_value.numpy() if v is not None and v.const_value is not None else None for v in node.inputs[1:4]]
    codes, scales, zeros = (*arrays, None)[:3]
    assert codes is not None and scales is not None
    total, step, pieces = attributes["K"], IDENTITY // attributes["block_size"], []
    for first in range(0, codes.shape[1], step):
        blocks = slice(first, first + step)
        columns = min(total - first * attributes["block_size"], IDENTITY)
        inputs = {"codes": codes[:, blocks], "scales": scales[:, blocks]}
        if zeros is not None:
            zeros_2d = zeros.reshape(len(scales), -1)
            per_byte = 8 // attributes["bits"]
            inputs["zero_points"] = zeros_2d[:, first // per_byte : -(-(first + step) // per_byte)]
        attributes["K"] = columns
        proto = onnx.helper.make_node("MatMulNBits", ["eye", *inputs], ["y"], domain="com.microsoft", **attributes)
        initializers = [onnx.numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in inputs.items()]
        pieces.append(_run_nodes([proto], initializers, "y", {"eye": np.eye(columns, dtype=np.float32)}).T)
    return np.concatenate(pieces, axis=1)


# -- activations and products --------------------------------------------------------------------------------------------


def _all_codes(quantize: ir.Node) -> Array:
    """What DequantizeLinear makes of every code, lowest first: float32 [256]."""
    zero = quantize.inputs[2]
    assert zero is not None and zero.const_value is not None
    kind = np.int8 if zero.const_value.dtype == ir.DataType.INT8 else np.uint8
    codes = np.arange(np.iinfo(kind).min, np.iinfo(kind).max + 1).astype(kind)
    decode = onnx.helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"])
    return _run_nodes([decode], _params(quantize), "y", {"codes": codes})


def _on_grid(quantize: ir.Node, x: Array) -> Array:
    """What DequantizeLinear makes of what ``quantize`` (QuantizeLinear or DynamicQuantizeLinear) makes of x."""
    dynamic = quantize.op_type == "DynamicQuantizeLinear"
    nodes = [
        onnx.helper.make_node(quantize.op_type, ["x"] if dynamic else ["x", "scale", "zero"], ["q", "scale", "zero"] if dynamic else ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    return _run_nodes(nodes, [] if dynamic else _params(quantize), "y", {"x": x})


def _params(quantize: ir.Node) -> list[Any]:
    scale, zero = quantize.inputs[1:3]
    assert scale is not None and zero is not None
    return [_proto(scale, "scale"), _proto(zero, "zero")]


def _product(model: ir.Model, name: str, x: Array) -> Array:
    node = _reader(model, name)
    if node.op_type == "MatMulNBits":
        a = node.inputs[0]
        assert a is not None
        return _run_part(model, node.outputs[0], {a: x})
    quantizer = _quantizer(model, name)
    assert quantizer is not None and quantizer.inputs[0] is not None
    given, smoothing = quantizer.inputs[0], model.graph.initializers.get(f"{name}.inverse_smoothing")
    multiply = given.producer()
    if smoothing is None and multiply is not None and multiply.op_type == "Mul":  # one that is shared has the first layer's name
        smoothing = next((v for v in multiply.inputs if v is not None and str(v.name).endswith(".inverse_smoothing")), None)
    if smoothing is not None and smoothing.const_value is not None:
        x = x * smoothing.const_value.numpy()
    if node.op_type == "QAttention":
        return _in_attention(model, name, quantizer, x)
    if node.op_type == "MatMulInteger":
        return _run_part(model, _values(model)[f"{name}.product"], {given: x})
    return _run_part(model, node.outputs[0], {given: x}, without_bias=node)


def _in_attention(model: ir.Model, name: str, quantize: ir.Node, x: Array) -> Array:
    """One of the three products in a QAttention."""
    if quantize.op_type == "QuantizeLinear":
        scale, zero = (v.const_value.numpy() for v in quantize.inputs[1:3] if v is not None and v.const_value is not None)
        node = onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"])
        return _integer_product(model, name, _run_nodes([node], _params(quantize), "q", {"x": x}), scale, zero)
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    codes, scale, zero = (_run_nodes([node], [], which, {"x": x}) for which in ("q", "s", "z"))
    return _integer_product(model, name, codes, scale, zero)


# -- running parts of the file -------------------------------------------------------------------------------------------


def _run_part(model: ir.Model, output: ir.Value, feeds: dict[ir.Value, Array], without_bias: ir.Node | None = None) -> Array:
    """Run the nodes that lead from initializers and ``feeds`` to ``output``, as they are in the file, but for the bias of one node."""
    needed: set[ir.Node] = set()
    initializers: dict[str, onnx.TensorProto] = {}
    stack = [output]
    while stack:
        value = stack.pop()
        if value in feeds:
            continue
        if value.const_value is not None and value.producer() is None:
            initializers[str(value.name)] = _proto(value, str(value.name))
            continue
        producer = value.producer()
        assert producer is not None, value.name
        if producer not in needed:
            needed.add(producer)
            stack += [v for v in _inputs(producer, producer is without_bias) if v is not None]
    nodes = []
    for node in (n for n in model.graph if n in needed):
        proto = ir.to_proto(node)
        if node is without_bias:
            del proto.input[:]
            proto.input.extend(str(v.name) if v is not None else "" for v in _inputs(node, True))
        nodes.append(proto)
    return _run_nodes(nodes, list(initializers.values()), str(output.name), {str(v.name): a for v, a in feeds.items()})


def _inputs(node: ir.Node, without_bias: bool) -> list[ir.Value | None]:
    last = {"Conv": 2, "Gemm": 2, "MatMulIntegerToFloat": 6}.get(node.op_type) if without_bias else None
    return list(node.inputs[:last])


def _proto(value: ir.Value, label: str) -> onnx.TensorProto:
    """An initializer by its bytes, which may lie in an external file."""
    tensor = value.const_value
    assert tensor is not None
    return onnx.helper.make_tensor(label, int(tensor.dtype), tensor.shape.numpy(), tensor.tobytes(), raw=True)


def _run_nodes(nodes: list[Any], initializers: list[Any], output: str, feeds: dict[str, Array]) -> Array:
    helper = onnx.helper
    inputs = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()]
    outputs = [onnx.ValueInfoProto(name=output)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "decode", inputs, outputs, initializers), opset_imports=opsets, ir_version=10)
    size = sum(len(i.raw_data) for i in initializers)
    if size < 1_900_000_000:
        return np.asarray(open_session(model.SerializeToString()).run(None, feeds)[0])
    return _run_large(model, feeds)


def _run_large(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    """One tensor beyond the 2 GB that a protobuf message holds goes through a file with external data."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decode.onnx"
        onnx.save_model(model, path, save_as_external_data=True, location="decode.data")
        return np.asarray(open_session(path).run(None, feeds)[0])
