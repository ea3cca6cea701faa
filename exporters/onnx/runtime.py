"""onnxruntime, as the receipt and every deployment must run it.

`session.qdq_matmulnbits_accuracy_level=0` is set in every session: without it onnxruntime's default session turns DequantizeLinear +
MatMul into MatMulNBits at accuracy_level 4 and so quantizes activations that training left in float, without a word. Where training has
the int8 grid, the node itself says accuracy_level 4.

A packed tensor is decoded by the operator that will use it, out of the file as it lies on disk: MatMulNBits multiplies an identity
matrix (at accuracy_level 0, which gives every decoded weight exactly: all other products are 0), DequantizeLinear and the constant part
of Unpack run alone, embeddings gather all their rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import psutil
import torch
from torch import Tensor

from exporters.base import Inputs
from qtrain.receipt import Latency

SESSION_CONFIG = {"session.qdq_matmulnbits_accuracy_level": "0", "session.intra_op.allow_spinning": "0"}
"""The first keeps activations in float; the second keeps the idle threads of one session from slowing another down."""
IDENTITY = 1024
"""Most rows of an identity matrix, so that decoding a weight costs K * 1024 * O multiplications instead of K * K * O."""


def threads() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def open_session(model: Path | bytes) -> onnxruntime.InferenceSession:
    """A session on the CPU that computes what training computed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, inputs: Inputs) -> Tensor:
    """The first output, float32.

    Raises:
        ValueError: if an input of the graph is not given.
    """
    wanted = [i.name for i in session.get_inputs()]
    missing = [n for n in wanted if n not in inputs]
    if missing:
        raise ValueError(f"the graph needs inputs {', '.join(missing)}, which a batch of the test split lacks (it has {', '.join(inputs)})")
    return torch.from_numpy(session.run(None, {n: inputs[n].detach().cpu().numpy() for n in wanted})[0])


def logits(path: Path, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
    """Logits float32 [N, C] of all batches in order."""
    session = open_session(path)
    return torch.cat([y.reshape(-1, y.shape[-1]) for y in (run(session, inputs) for inputs, _ in batches)])


# -- decoding --------------------------------------------------------------------------------------------------------


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Layer names and decoded weights, float32 [O, K], one at a time."""
    model = ir.load(path)
    for name in [n.removesuffix(".codes") for n in model.graph.initializers if n.endswith(".codes")]:
        yield name, torch.from_numpy(_decode(model, name))


def _decode(model: ir.Model, name: str) -> np.ndarray[Any, Any]:
    codes = model.graph.initializers[f"{name}.codes"]
    users = [node for node, _ in codes.uses()]
    if not users:
        raise ValueError(f"nothing in the file reads {name}.codes")
    node = users[0]
    if node.op_type == "MatMulNBits":
        return _decode_matmul_nbits(node)
    produced = {v.name: v for n in model.graph for v in n.outputs}
    if node.op_type in ("Gather", "GatherBlockQuantized"):
        ids = node.inputs[1]
        assert ids is not None and codes.const_value is not None
        return _run_part(model, produced[f"{name}.rows"], {ids: np.arange(len(codes.const_value.numpy()))})
    value = _run_part(model, produced[f"{name}.weight"], {})
    return value.T.copy() if node.op_type == "DequantizeLinear" else value


def products(path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """Layer names and what their MatMulNBits, as it is in the file, makes of each input [R, K]: float32 [R, O]."""
    model = ir.load(path)
    for name, x in inputs.items():
        node = next(n for n, _ in model.graph.initializers[f"{name}.codes"].uses())
        a, y = node.inputs[0], node.outputs[0]
        assert a is not None
        yield name, torch.from_numpy(_run_part(model, y, {a: x.cpu().numpy()}))


def _decode_matmul_nbits(node: ir.Node) -> np.ndarray[Any, Any]:
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


def _run_part(model: ir.Model, output: ir.Value, feeds: dict[ir.Value, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Run the nodes that lead from initializers and ``feeds`` to ``output``, as they are in the file."""
    needed: set[ir.Node] = set()
    initializers: dict[str, onnx.TensorProto] = {}
    stack = [output]
    while stack:
        value = stack.pop()
        if value in feeds:
            continue
        if value.const_value is not None and value.producer() is None:
            tensor, label = value.const_value, str(value.name)  # by its bytes, which may lie in an external file
            initializers[label] = onnx.helper.make_tensor(label, int(tensor.dtype), tensor.shape.numpy(), tensor.tobytes(), raw=True)
            continue
        producer = value.producer()
        assert producer is not None, value.name
        if producer not in needed:
            needed.add(producer)
            stack += [v for v in producer.inputs if v is not None]
    nodes = [ir.to_proto(n) for n in model.graph if n in needed]
    return _run_nodes(nodes, list(initializers.values()), str(output.name), {str(v.name): a for v, a in feeds.items()})


def _run_nodes(nodes: list[Any], initializers: list[Any], output: str, feeds: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    helper = onnx.helper
    inputs = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()]
    outputs = [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "decode", inputs, outputs, initializers), opset_imports=opsets, ir_version=10)
    size = sum(len(i.raw_data) for i in initializers)
    if size < 1_900_000_000:
        return open_session(model.SerializeToString()).run(None, feeds)[0]
    return _run_large(model, feeds)


def _run_large(model: onnx.ModelProto, feeds: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """One tensor beyond the 2 GB that a protobuf message holds goes through a file with external data."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decode.onnx"
        onnx.save_model(model, path, save_as_external_data=True, location="decode.data")
        return open_session(path).run(None, feeds)[0]


# -- latency ---------------------------------------------------------------------------------------------------------


def latency(paths: dict[str, Path], batches: list[int], length: int, repeats: int, example: Inputs, vocab_size: int) -> Latency:
    """Median milliseconds per shape `batch x length`; the models take turns, so that a busy machine slows all of them alike."""
    sessions = {name: open_session(path) for name, path in paths.items()}
    result: Latency = {name: {} for name in sessions}
    for batch in batches:
        feed = random_inputs(example, batch, length, vocab_size)
        shape = f"{batch}x{length}"
        for name, milliseconds in interleaved(sessions, feed, repeats).items():
            result[name][shape] = round(median(milliseconds), 4)
    return result


def interleaved(sessions: dict[str, onnxruntime.InferenceSession], feed: Inputs, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of ``repeats`` runs of each session, one after the other, after two warm-up rounds."""
    feeds = {n: {i.name: feed[i.name].numpy() for i in s.get_inputs()} for n, s in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(repeats + 2):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds[name])
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def random_inputs(example: Inputs, batch: int, length: int, vocab_size: int) -> Inputs:
    """Inputs of ``batch`` full sequences: random token ids, masks of ones, other integers zero, floats normal with the example's shape."""
    generator = torch.Generator().manual_seed(0)
    made: Inputs = {}
    for name, x in example.items():
        if x.is_floating_point():
            made[name] = torch.randn((batch, *x.shape[1:]), generator=generator, dtype=x.dtype)
            continue
        shape = (batch, length) if x.ndim == 2 else (batch, *x.shape[1:])
        if "mask" in name:
            made[name] = torch.ones(shape, dtype=x.dtype)
        elif "type" in name:
            made[name] = torch.zeros(shape, dtype=x.dtype)
        else:
            made[name] = torch.randint(0, vocab_size, shape, generator=generator).to(x.dtype)
    return made
