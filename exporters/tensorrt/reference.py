"""onnxruntime on the CPU as the reference for what TensorRT is to compute: values of a float32 graph, and a file as it lies on disk.

Sessions run with `session.disable_quant_qdq=1`: QuantizeLinear and DequantizeLinear are then the operators that ONNX defines. Fused int8
kernels of a CPU add nothing to what is shown here, and on processors without VNNI some of them saturate.

`rounded` exists because onnxruntime has few float16 kernels on the CPU: it computes a float16 graph in float32 and rounds only where the
graph ends (seen with 1.31: 2048 + 0.3 keeps its 0.3 through three float16 nodes). Parity shown by such a run says nothing about float16.
So the parity check rewrites the file's graph: float32 nodes, with an explicit cast to float16 and back behind every node that makes a
float16 tensor. That rounds what a float16 kernel with a float32 accumulator rounds; a fused kernel rounds less.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime
import torch
from torch import Tensor

from exporters.base import Inputs
from exporters.onnx import runtime
from exporters.onnx.write import save
from exporters.tensorrt.precision import FLOAT, HALF, MOVES, SMOOTHING, SUMS, Measured, is_float

SESSION_CONFIG = {"session.disable_quant_qdq": "1", "session.intra_op.allow_spinning": "0"}
ALL_CODES = np.arange(-128, 128, dtype=np.int8)
MAXIMUM, TERMS = "qtrain.maximum.", "qtrain.terms."


def open_session(model: Path | bytes) -> onnxruntime.InferenceSession:
    """A session on the CPU that computes what the file says, operator by operator."""
    return runtime.open_session(model, SESSION_CONFIG)


def logits(model: Path | ir.Model, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
    """Logits float32 [N, C] of all batches in order, of a file or of a graph in memory."""
    if isinstance(model, Path):
        return runtime.session_logits(open_session(model), batches)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        save(model, path)
        return runtime.session_logits(open_session(path), batches)


def first_examples(batches: list[tuple[Inputs, Tensor]], count: int) -> list[tuple[Inputs, Tensor]]:
    """Whole batches until ``count`` examples are there."""
    found: list[tuple[Inputs, Tensor]] = []
    for inputs, labels in batches:
        if sum(len(y) for _, y in found) >= count:
            break
        found.append((inputs, labels))
    return found


# -- ranges --------------------------------------------------------------------------------------------------------------


def measure(model: ir.Model, batches: list[tuple[Inputs, Tensor]]) -> Measured:
    """Run a normalized float32 graph and note the largest magnitude of every float value, and how many terms its sums have.

    The graph gets one scalar output per value, so that no activation is kept.
    """
    graph = model.clone().graph
    watched = [v for v in (*graph.inputs, *(o for n in graph for o in n.outputs)) if v.dtype == FLOAT]
    sums = [n for n in graph if n.op_type in SUMS and is_float(n.inputs[0]) and is_float(n.outputs[0])]
    for value in watched:
        _output(graph, f"{MAXIMUM}{value.name}", "ReduceMax", [_node(graph, "Abs", [value])], keepdims=0)
    for node in sums:
        assert node.inputs[0] is not None
        _output(graph, f"{TERMS}{node.name}", "Div", [_size(graph, node.inputs[0]), _size(graph, node.outputs[0])])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.onnx"
        save(ir.Model(graph, ir_version=model.ir_version), path)
        session = open_session(path)
        names = [o.name for o in session.get_outputs()][-len(watched) - len(sums) :]
        largest = dict.fromkeys(names, 0.0)
        for inputs, _ in batches:
            feed = {i.name: inputs[i.name].detach().cpu().numpy() for i in session.get_inputs()}
            for name, value in zip(names, session.run(names, feed), strict=True):
                number = float(value)
                largest[name] = max(largest[name], number) if np.isfinite(number) else np.inf
    return Measured(
        {n.removeprefix(MAXIMUM): v for n, v in largest.items() if n.startswith(MAXIMUM)},
        {n.removeprefix(TERMS): v for n, v in largest.items() if n.startswith(TERMS)},
    )


def _node(graph: ir.Graph, op: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
    node = ir.node(op, inputs, attributes)
    graph.append(node)
    return node.outputs[0]


def _size(graph: ir.Graph, value: ir.Value) -> ir.Value:
    return _node(graph, "Cast", [_node(graph, "Size", [value])], to=int(FLOAT))


def _output(graph: ir.Graph, name: str, op: str, inputs: list[ir.Value], **attributes: Any) -> None:
    value = _node(graph, op, inputs, **attributes)
    value.name, value.type, value.shape = name, ir.TensorType(FLOAT), ir.Shape([])
    graph.outputs.append(value)


# -- float16 as a GPU rounds it ------------------------------------------------------------------------------------------


def rounded(model: ir.Model) -> ir.Model:
    """A float32 copy of a float16 graph that rounds every float16 tensor to float16."""
    model = model.clone()
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.dtype == HALF:
            assert value.const_value is not None
            tensor = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.const_value, value.type = tensor, ir.TensorType(FLOAT)
    for node in list(graph):
        for value in node.outputs:
            if value.dtype != HALF:
                continue
            value.type = ir.TensorType(FLOAT)
            if node.op_type == "ConstantOfShape":
                fill = node.attributes["value"].as_tensor().numpy().astype(np.float32)
                node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(fill))
            if node.op_type in ("Cast", "EyeLike", "RandomNormal", "RandomUniform"):
                key = "to" if node.op_type == "Cast" else "dtype"
                node.attributes[key] = ir.AttrInt64(key, int(FLOAT))
            if node.op_type not in MOVES:
                _round(graph, node, value)
    return model


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    half = ir.node("Cast", [value], {"to": int(HALF)})
    single = ir.node("Cast", [half.outputs[0]], {"to": int(FLOAT)})
    half.outputs[0].type, single.outputs[0].type = ir.TensorType(HALF), ir.TensorType(FLOAT)
    ir.convenience.replace_all_uses_with(value, single.outputs[0])
    half.replace_input_with(0, value)
    graph.insert_after(node, [half, single])


def without_activation_codes(model: ir.Model) -> ir.Model:
    """A copy whose activations stay in float: what is left is the weights' codes and the float types.

    Rounding an activation to float16 moves values across the boundaries of its int8 grid, so that logits of two precisions differ by more
    than either precision's error; with the activation grids out of the way the precisions can be compared.
    """
    model = model.clone()
    for node in [n for n in model.graph if n.op_type == "QuantizeLinear"]:
        for user, _ in list(node.outputs[0].uses()):
            assert user.op_type == "DequantizeLinear" and node.inputs[0] is not None
            ir.convenience.replace_all_uses_with(user.outputs[0], node.inputs[0], replace_graph_outputs=True)
    passes.RemoveUnusedNodesPass()(model)
    return model


# -- decoding ------------------------------------------------------------------------------------------------------------


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights, float32 in the shape of the codes, and all values of each activation, decoded by the file's own DequantizeLinear.

    A float16 scale is decoded in float32, which holds code * scale exactly: codes and scales are compared to the bit, while the float16
    network itself rounds the product to its own type, as it rounds every weight.
    """
    model = ir.load(path)
    for name, node in _decoders(model):
        value = _run_part([node], node.outputs[0], {})
        transposed = any(user.op_type == "MatMul" for user in _users(node.outputs[0]))
        yield name, torch.from_numpy(np.ascontiguousarray(value.T if transposed else value))
    for name, node in _quantizers(model):
        dequantize = next(iter(node.outputs[0].uses()))[0]
        assert dequantize.inputs[0] is not None
        yield name, torch.from_numpy(_run_part([dequantize], dequantize.outputs[0], {dequantize.inputs[0]: ALL_CODES}))


def activations(path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """Activation names and what the file's QuantizeLinear and DequantizeLinear make of each input, float32 as x."""
    quantizers = dict(_quantizers(ir.load(path)))
    for name, x in inputs.items():
        quantize = quantizers[name]
        dequantize, given = next(iter(quantize.outputs[0].uses()))[0], quantize.inputs[0]
        assert given is not None
        yield name, torch.from_numpy(_run_part([dequantize, quantize], dequantize.outputs[0], {given: x.detach().cpu().numpy()}))


def products(path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """Layer names and what each layer of the file, from its (smoothing and) QuantizeLinear to its product, makes of its input; no bias."""
    decoders = dict(_decoders(ir.load(path)))
    for name, x in inputs.items():
        product = next(u for u in _users(decoders[name].outputs[0]) if u.op_type in ("MatMul", "Conv"))
        dequantize = _producer(product.inputs[0])
        quantize = _producer(dequantize.inputs[0])
        nodes, first = [product, decoders[name], dequantize, quantize], quantize.inputs[0]
        smoothing = None if first is None else first.producer()
        if smoothing is not None and any(v is not None and str(v.name) == f"{name}{SMOOTHING}" for v in smoothing.inputs):
            nodes.append(smoothing)
            first = next(v for v in smoothing.inputs if v is not None and v.const_value is None)
        assert first is not None
        yield name, torch.from_numpy(_run_part(nodes, product.outputs[0], {first: x.detach().cpu().numpy()}))


def _producer(value: ir.Value | None) -> ir.Node:
    node = None if value is None else value.producer()
    assert node is not None
    return node


def _quantizers(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """Activation names and their QuantizeLinear; of several that share a scale, one."""
    for name, value in model.graph.initializers.items():
        if name.endswith(".scale"):
            node = next((n for n, _ in value.uses() if n.op_type == "QuantizeLinear"), None)
            if node is not None:
                yield name.removesuffix(".scale"), node


def _decoders(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """Layer names and the DequantizeLinear of their codes."""
    for value in list(model.graph.initializers.values()):
        if str(value.name).endswith(".codes"):
            node = next((n for n, _ in value.uses() if n.op_type == "DequantizeLinear"), None)
            if node is None:
                raise ValueError(f"no DequantizeLinear reads {value.name}")
            yield str(value.name).removesuffix(".codes"), node


def _users(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes that read a value, behind casts."""
    for node, _ in value.uses():
        if node.op_type == "Cast":
            yield from _users(node.outputs[0])
        else:
            yield node


def _run_part(nodes: list[ir.Node], output: ir.Value, feeds: dict[ir.Value, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Run some nodes of a file with its constants; float16 scales in float32, casts to float16 and all."""
    helper, protos, seen = onnx.helper, [], set(feeds)
    for node in nodes:
        for value in node.inputs:
            if value is None or value in seen or value.producer() is not None or value.const_value is None:
                continue
            seen.add(value)
            protos.append(_constant(value, widen=node.op_type == "DequantizeLinear"))
    inputs = [helper.make_tensor_value_info(str(v.name), helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for v, a in feeds.items()]
    result = helper.make_tensor_value_info(str(output.name), onnx.TensorProto.FLOAT, None)
    parts = [ir.to_proto(n) for n in reversed(nodes)]
    for part in parts:
        if part.op_type == "Conv":
            del part.input[2:]  # the bias
    graph = helper.make_graph(parts, "part", inputs, [result], protos)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return open_session(model.SerializeToString()).run(None, {str(v.name): a for v, a in feeds.items()})[0]


def _constant(value: ir.Value, widen: bool) -> onnx.TensorProto:
    tensor = value.const_value
    assert tensor is not None
    if widen and tensor.dtype == HALF:
        return onnx.numpy_helper.from_array(tensor.numpy().astype(np.float32), str(value.name))
    return onnx.helper.make_tensor(str(value.name), int(tensor.dtype), tensor.shape.numpy(), tensor.tobytes(), raw=True)
