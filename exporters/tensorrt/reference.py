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
from exporters.onnx.runtime import run, threads
from exporters.onnx.write import save
from exporters.tensorrt.precision import FLOAT, HALF, MOVES, SUMS, Measured, is_float, is_weight

SESSION_CONFIG = {"session.disable_quant_qdq": "1", "session.intra_op.allow_spinning": "0"}
MAXIMUM, TERMS = "qtrain.maximum.", "qtrain.terms."


def open_session(model: Path | bytes) -> onnxruntime.InferenceSession:
    """A session on the CPU that computes what the file says, operator by operator."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"])


def logits(model: Path | ir.Model, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
    """Logits float32 [N, C] of all batches in order, of a file or of a graph in memory."""
    if isinstance(model, Path):
        return _logits(open_session(model), batches)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        save(model, path)
        return _logits(open_session(path), batches)


def _logits(session: onnxruntime.InferenceSession, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
    return torch.cat([y.reshape(-1, y.shape[-1]) for y in (run(session, inputs) for inputs, _ in batches)])


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
    """Layer names and weights, float32 in the shape of the codes, decoded by the file's own DequantizeLinear, one at a time.

    A float16 scale is decoded in float32, which holds code * scale exactly: codes and scales are compared to the bit, while the float16
    network itself rounds the product to its own type, as it rounds every weight.
    """
    model = ir.load(path)
    for codes in list(model.graph.initializers.values()):
        if not str(codes.name).endswith(".codes"):
            continue
        node = next((n for n, _ in codes.uses() if n.op_type == "DequantizeLinear"), None)
        if node is None:
            raise ValueError(f"no DequantizeLinear reads {codes.name}")
        value = _run_alone(node)
        shape = node.metadata_props.get(SHAPE)
        if shape:
            value = value.T if shape == "transposed" else value.reshape([int(d) for d in shape.split("x")])
        yield str(codes.name).removesuffix(".codes"), torch.from_numpy(np.ascontiguousarray(value))


SHAPE = "qtrain.shape"
"""Metadata of a DequantizeLinear: how its output becomes the layer's weight, where it is not that weight as it stands."""


def _run_alone(node: ir.Node) -> np.ndarray[Any, Any]:
    """Run one DequantizeLinear with the file's constants, scale in float32."""
    protos = []
    for value in node.inputs:
        assert value is not None and value.const_value is not None
        tensor = value.const_value
        if tensor.dtype == HALF:
            protos.append(onnx.numpy_helper.from_array(tensor.numpy().astype(np.float32), str(value.name)))
        else:
            protos.append(onnx.helper.make_tensor(str(value.name), int(tensor.dtype), tensor.shape.numpy(), tensor.tobytes(), raw=True))
    proto = ir.to_proto(node)
    output = onnx.helper.make_tensor_value_info(proto.output[0], onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([proto], "decode", [], [output], protos)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return open_session(model.SerializeToString()).run(None, {})[0]


def is_activation(node: ir.Node) -> bool:
    """Whether a DequantizeLinear decodes an activation."""
    return node.op_type == "DequantizeLinear" and not is_weight(node)
