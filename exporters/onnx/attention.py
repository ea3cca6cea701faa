"""Attention on quantized inputs: com.microsoft.QAttention, which multiplies Q, K and V in integers and hands them on head by head.

onnxscript's fusions leave MultiHeadAttention reading three quantized Linears of one input. QAttention is that in one operator: it spares
writing Q, K and V and transposing them to heads (measured: 12 % of MiniLM at 8 x 64). onnxruntime makes none of QDQ, so it is written here:

    x uint8, Concat(codes int8 [K, O] of Q, K, V), bias [3 O], s_x, Concat(scales [O]), mask int32, z_x, (zero points) -> y

The three weights stay initializers of their own; onnxruntime joins them when it loads the file.

Needed: one input with one grid, equal widths, no past, and a mask that masks, that is, Where(keep, 0, lowest): QAttention adds its own
lowest number where an int32 mask is 0. What does not fit stays MultiHeadAttention.

Source: onnxruntime docs/ContribOperators.md, contrib_ops/cpu/quantization/attention_quant.cc.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.onnx.build import Builder
from exporters.onnx.integer import IntegerLowering, only_reader
from exporters.onnx.layout import Layout
from exporters.onnx.trace import CONTRIB, DOMAIN

LOWEST = float(np.finfo(np.float32).min)
INTEGER = int(ir.DataType.INT32)


def fuse(builder: Builder, modules: dict[str, Any], layouts: dict[str, Layout]) -> set[str]:
    """Write QAttention wherever it fits; the names of the layers that are in one."""
    found: set[str] = set()
    masks: dict[ir.Value, ir.Value] = {}
    for node in [n for n in builder.graph if n.op_type == "MultiHeadAttention" and n.domain == CONTRIB]:
        inputs = (*node.inputs, *[None] * 6)[:6]
        layers = [_layer(builder, v, modules, layouts) for v in inputs[:3]]
        bias, padding, added = inputs[3:]
        x = layers[0].node.inputs[0] if layers[0] is not None else None
        if x is None or padding is not None or any(v is not None for v in node.inputs[6:]) or len(node.outputs) > 1:
            continue
        if not _alike(layers, x) or not _constant(bias):
            continue
        mask = _mask(builder, added, masks)
        if added is not None and mask is None:
            continue
        _write(builder, node, layers, x, bias, mask)
        found |= {layer.name for layer in layers if layer is not None}
    return found


def _layer(builder: Builder, value: ir.Value | None, modules: dict[str, Any], layouts: dict[str, Layout]) -> Any:
    producer = value.producer() if value is not None else None
    if value is None or producer is None or producer.domain != DOMAIN or producer.op_type != "PackedLinear" or only_reader(value) is None:
        return None
    name = producer.attributes["layer"].as_string()
    if layouts[name].op not in ("QDQ", "MatMulInteger") or layouts[name].input == "edge":
        return None
    return IntegerLowering(builder, producer, name, modules[name], layouts[name])


def _alike(layers: list[Any], x: ir.Value) -> bool:
    """Whether all three quantize ``x`` alike, have the same width, and none is used twice."""
    if None in layers or any(layer.node.inputs[0] is not x for layer in layers) or len({layer.name for layer in layers}) < 3:
        return False
    if len({layer.q.shape for layer in layers}) > 1 or len({"zero_point" in layer.q.params for layer in layers}) > 1:
        return False
    return len({_grid_of(layer) for layer in layers}) == 1


def _grid_of(layer: Any) -> Any:
    smoothing = getattr(layer.module, "inverse_smoothing", None)
    key = None if smoothing is None else smoothing.detach().cpu().numpy().tobytes()
    if layer.layout.input == "dynamic":
        return "dynamic", key
    params = layer.module.activation_fake.params
    return float(params["scale"]), int(params["zero_point"]) if "zero_point" in params else 0, key


def _constant(bias: ir.Value | None) -> bool:
    return bias is None or bias.const_value is not None


def _mask(builder: Builder, added: ir.Value | None, made: dict[ir.Value, ir.Value]) -> ir.Value | None:
    """``added`` [B, 1, S or 1, T], 0 or very low, as an int32 mask [B, S, T] or [B, T]; None where it is none, or something else."""
    where = added.producer() if added is not None else None
    if added is None or where is None or where.op_type != "Where":
        return None
    if added in made:
        return made[added]
    keep, kept, dropped = where.inputs
    if keep is None or _number(kept) != 0.0 or not (_number(dropped) or 0.0) <= -1e9:
        return None
    shape = None if keep.shape is None else list(keep.shape)
    if shape is None or len(shape) != 4 or shape[1] != 1 or shape[0] == 1 or shape[3] == 1:
        return None
    drop = [1, 2] if shape[2] == 1 else [1]
    axes = builder.initializer(f"attention.mask_axes_{len(drop)}", lambda: np.array(drop, np.int64))
    made[added] = builder.op("Squeeze", builder.op("Cast", keep, to=INTEGER), axes)
    return made[added]


def _number(value: ir.Value | None) -> float | None:
    constant = value.const_value if value is not None else None
    return float(constant.numpy().reshape(-1)[0]) if constant is not None and constant.size == 1 else None


def _write(builder: Builder, node: ir.Node, layers: list[Any], x: ir.Value, bias: ir.Value | None, mask: ir.Value | None) -> None:
    first = layers[0]
    smoothing = getattr(first.module, "inverse_smoothing", None)
    if smoothing is not None:
        x = builder.scaled(x, f"{first.name}.inverse_smoothing", smoothing)
    q = first.quantized_input(x)
    width = first.q.shape[0]
    if bias is None:
        bias = builder.initializer(f"attention.no_bias_{3 * width}", lambda: np.zeros(3 * width, np.float32))
    codes = builder.op("Concat", *(layer.codes() for layer in layers), axis=1)
    scales = builder.op("Concat", *(layer.scales() for layer in layers), axis=0)
    zeros = builder.op("Concat", *(layer.zero_points() for layer in layers), axis=0) if "zero_point" in first.q.params else None
    attributes: dict[str, Any] = {k: node.attributes[k] for k in ("num_heads", "scale", "unidirectional") if k in node.attributes}
    inputs = (q.codes, codes, bias, q.scale, scales, mask, q.zero, zeros)
    y = builder.op("QAttention", *inputs, domain=CONTRIB, mask_filter_value=LOWEST, **attributes)
    old = node.outputs[0]
    y.type, y.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
    builder.insert_before(node)
    builder.graph.remove(node, safe=True)
    for layer in layers:
        builder.graph.remove(layer.node, safe=True)
