"""TensorRT's rules: for each a graph that keeps it and one that breaks it, and what NVIDIA's own parser and builder say to the latter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from exporters.tensorrt import rtx
from exporters.tensorrt.precision import normalize
from exporters.tensorrt.rules import RULES, Finding, lint

ZERO = np.int8(0)
FLOAT, HALF, INT8, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.INT32
DIMS = {"batch": 8}


@dataclass
class Net:
    """A small graph, made by hand: every node is named after its first output."""

    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    opset: int = 21

    def input(self, name: str, shape: list[Any], dtype: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, shape: list[Any], dtype: int = FLOAT) -> Net:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return self

    def constant(self, name: str, array: Any) -> str:
        self.constants.append(array if isinstance(array, onnx.TensorProto) else numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def quantize(self, x: str, scale: Any = 0.05, zero: Any = ZERO, dtype: Any = np.float32) -> str:
        """x on an int8 grid."""
        self.constant(f"{x}.scale", np.asarray(scale, dtype))
        self.constant(f"{x}.zero", np.asarray(zero))
        codes = self.op("QuantizeLinear", [x, f"{x}.scale", f"{x}.zero"], f"{x}.q")
        return self.op("DequantizeLinear", [codes, f"{x}.scale", f"{x}.zero"], f"{x}.dq")

    def weight(self, name: str, shape: tuple[int, ...], axis: int, scale: Any = None, dtype: Any = np.float32, **attributes: Any) -> str:
        """An int8 weight, one scale per channel."""
        rng = np.random.default_rng(0)
        self.constant(f"{name}.codes", rng.integers(-127, 128, shape).astype(np.int8))
        self.constant(f"{name}.scales", np.full(shape[axis], 0.01, dtype) if scale is None else scale)
        return self.op("DequantizeLinear", [f"{name}.codes", f"{name}.scales"], name, axis=axis, **attributes)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "net", self.inputs, self.outputs, self.constants)
        domains = {n.domain for n in self.nodes if n.domain}
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in domains)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def linear(**changes: Any) -> Net:
    """x [batch, 64] on codes, times a weight [64, 32] on codes, plus a float bias; one thing may be another way."""
    net = Net(opset=changes.get("opset", 21))
    x = net.input("x", ["batch", 64])
    a = net.quantize(x, changes.get("scale", 0.05), changes.get("zero", np.int8(0))) if changes.get("activation", True) else x
    k, n = changes.get("shape", (64, 32))
    w = net.weight("w", (k, n), changes.get("axis", 1), changes.get("weight_scale"))
    y = net.op("MatMul", [a, w], "y")
    net.op("Add", [y, net.constant("b", np.zeros(n, np.float32))], "out")
    return net.output("out", ["batch", n])


def cut_weight(net: Net, name: str = "w") -> Net:
    """Take the weight's DequantizeLinear and constants out."""
    net.nodes = [n for n in net.nodes if n.output[0] != name]
    net.constants = [c for c in net.constants if not c.name.startswith(f"{name}.")]
    return net


# -- one breaking example per rule (and more where a rule has several sides) ---------------------------------------------


def contrib_operator() -> Net:
    net = linear()
    net.op("BiasGelu", ["out", "b"], "gelu", domain="com.microsoft")
    net.outputs.clear()
    return net.output("gelu", ["batch", 32])


def old_opset() -> Net:
    return linear(opset=12)


def new_opset() -> Net:
    return linear(opset=25)


def half_scales(opset: int = 18) -> Net:
    net = Net(opset=opset)
    net.quantize(net.input("x", ["batch", 64], HALF), dtype=np.float16)
    return net.output("x.dq", ["batch", 64], HALF)


def int4_before_21(block: int = 64, opset: int = 19) -> Net:
    net = cut_weight(linear(activation=False))
    net.opset = opset
    codes = helper.make_tensor("w.codes", onnx.TensorProto.INT4, (64, 32), bytes(64 * 32 // 2), raw=True)
    net.constant("w.codes", codes)
    net.constant("w.scales", np.full((64 // block, 32), 0.01, np.float32))
    node = helper.make_node("DequantizeLinear", ["w.codes", "w.scales"], ["w"], name="w", axis=0, block_size=block)
    net.nodes.insert(0, node)
    return net


def dynamic_quantization() -> Net:
    net = Net()
    x = net.input("x", ["batch", 64])
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], ["q", "s", "z"], name="dynamic"))
    net.op("DequantizeLinear", ["q", "s", "z"], "out")
    return net.output("out", ["batch", 64])


def asymmetric() -> Net:
    return linear(zero=np.int8(3))


def no_zero_point() -> Net:
    net = linear()
    for node in net.nodes:
        if node.op_type == "QuantizeLinear":
            del node.input[2:]
    return net


def negative_scale() -> Net:
    return linear(weight_scale=np.where(np.arange(32) == 5, -0.01, 0.01).astype(np.float32))


def infinite_scale() -> Net:
    return linear(scale=np.inf)


def computed_scale() -> Net:
    net = linear()
    net.constants = [c for c in net.constants if c.name != "x.scale"]
    net.nodes.insert(0, helper.make_node("ReduceMax", ["x"], ["x.scale"], name="x.scale", keepdims=0))
    return net


def per_channel_activation() -> Net:
    net = linear(scale=np.full(64, 0.05), zero=np.zeros(64, np.int8))
    for node in net.nodes:
        if node.output[0] in ("x.q", "x.dq"):
            node.attribute.append(helper.make_attribute("axis", 1))
    return net


def scale_in_a_vector() -> Net:
    return linear(scale=[0.05], zero=np.zeros(1, np.int8))


def wrong_axis() -> Net:
    return linear(axis=0)


def int8_blocks() -> Net:
    net = cut_weight(linear(activation=False))
    net.constant("w.codes", np.ones((64, 32), np.int8))
    net.constant("w.scales", np.full((1, 32), 0.01, np.float32))
    net.nodes.insert(0, helper.make_node("DequantizeLinear", ["w.codes", "w.scales"], ["w"], name="w", axis=0, block_size=64))
    return net


def small_blocks() -> Net:
    return int4_before_21(block=32, opset=21)


def int4_on_codes() -> Net:
    net = int4_before_21(opset=21)
    for node in net.nodes:
        if node.op_type == "MatMul":
            node.input[0] = "x.dq"
    net.nodes = [*net.nodes[:1], *linear().nodes[:2], *net.nodes[1:]]
    net.constants += linear().constants[:2]
    return net


def codes_read_by_another() -> Net:
    net = linear()
    net.op("Cast", ["x.q"], "x.q.cast", to=FLOAT)
    return net.output("x.q.cast", ["batch", 64])


def other_scale() -> Net:
    net = linear()
    net.constant("other", np.float32(0.04))
    next(n for n in net.nodes if n.output[0] == "x.dq").input[1] = "other"
    return net


def gathered_codes() -> Net:
    net = Net()
    ids = net.input("ids", ["batch", 4], INT32)
    net.constant("table", np.ones((37, 64), np.int8))
    net.constant("s", np.float32(0.01))
    net.op("Gather", ["table", ids], "rows", axis=0)
    net.op("DequantizeLinear", ["rows", "s"], "out")
    return net.output("out", ["batch", 4, 64])


def quantized_in_the_graph() -> Net:
    net = cut_weight(linear())
    net.constant("w.float", np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32))
    net.constant("w.scales", np.full(32, 0.03, np.float32))
    net.constant("w.zeros", np.zeros(32, np.int8))
    quantize = helper.make_node("QuantizeLinear", ["w.float", "w.scales", "w.zeros"], ["w.q"], name="w.q", axis=1)
    net.nodes[:0] = [quantize, helper.make_node("DequantizeLinear", ["w.q", "w.scales", "w.zeros"], ["w"], name="w", axis=1)]
    return net


def convolution(channels: tuple[int, int] = (32, 32), bias: str = "float", group: int = 1) -> Net:
    net = Net()
    inputs, outputs = channels
    x = net.quantize(net.input("x", ["batch", inputs, 8, 8]))
    w = net.weight("w", (outputs, inputs // group, 3, 3), 0)
    net.constant("b", np.zeros(outputs, np.float32))
    b = "b"
    if bias == "int32":
        net.constant("b.codes", np.zeros(outputs, np.int32))
        net.constant("b.scales", np.full(outputs, 0.0005, np.float32))
        b = net.op("DequantizeLinear", ["b.codes", "b.scales"], "b.dq", axis=0)
    if bias == "int8":
        b = net.weight("b8", (outputs,), 0)
    net.op("Conv", [x, w, b], "out", kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=group)
    return net.output("out", ["batch", outputs, 8, 8])


def quantized_output() -> Net:
    net = linear()
    return net.output("x.q", ["batch", 64], INT8)


def unknown_axis() -> Net:
    net = Net()
    net.op("Relu", [net.input("x", ["batch", "frames"])], "out")
    return net.output("out", ["batch", "frames"])


def mixed_types() -> Net:
    net = Net()
    net.op("Add", [net.input("x", ["batch", 64]), net.input("z", ["batch", 64], HALF)], "out")
    return net.output("out", ["batch", 64])


def weight_in_float() -> Net:
    net = cut_weight(linear())
    net.constant("w", np.ones((64, 32), np.float32))
    return net


def weight_alone() -> Net:
    return linear(activation=False)


def residual(on_codes: bool) -> Net:
    net = linear(shape=(64, 64))
    net.outputs.clear()
    net.op("Add", ["out", "x.dq" if on_codes else "x"], "sum")
    net.op("Relu", ["sum"], "relu")
    net.quantize("relu")
    return net.output("relu.dq", ["batch", 64])


def float_residual() -> Net:
    return residual(on_codes=False)


def one_column() -> Net:
    return linear(shape=(64, 1))


def few_columns() -> Net:
    return linear(shape=(64, 10))


def stem() -> Net:
    return convolution((3, 32))


def few_channels() -> Net:
    return convolution((9, 9))


def odd_groups() -> Net:
    return convolution((12, 12), group=12)


BROKEN: list[tuple[str, Callable[[], Net], str, bool | None]] = [
    ("domain", contrib_operator, "com.microsoft.BiasGelu", True),
    ("opset", old_opset, "opset 12", None),
    ("opset", new_opset, "opset 25", None),
    ("opset", half_scales, "opset 19", None),
    ("opset", int4_before_21, "opset 21", None),
    ("operators", dynamic_quantization, "DynamicQuantizeLinear", True),
    ("zero_point", asymmetric, "absmax_onnx", True),
    ("zero_point", no_zero_point, "uint8", False),
    ("scale", negative_scale, "1 of its scales", True),
    ("scale", infinite_scale, "not finite", False),
    ("scale", computed_scale, "constant", None),
    ("granularity", per_channel_activation, "64 scales on an activation", None),
    ("granularity", scale_in_a_vector, "scalar", False),
    ("granularity", wrong_axis, "axis 0", None),
    ("blocks", int8_blocks, "granularity=channel", None),
    ("blocks", small_blocks, "64 and 128", None),
    ("blocks", int4_on_codes, "floats only", None),
    ("pairs", codes_read_by_another, "Cast", None),
    ("pairs", other_scale, "not that of", False),
    ("constants", gathered_codes, "Gather", True),
    ("weights", quantized_in_the_graph, "w.float", False),
    ("bias", lambda: convolution(bias="int32"), "float biases", True),
    ("bias", lambda: convolution(bias="int8"), "float biases", None),
    ("network", quantized_output, "INT8", None),
    ("network", unknown_axis, "frames", None),
    ("types", mixed_types, "FLOAT16", True),
    ("both_operands", weight_in_float, "its weight is not", False),
    ("both_operands", weight_alone, "its input is not", False),
    ("residual", float_residual, "not on codes", False),
    ("gemv", one_column, "64 x 1", False),
    ("gemv", few_columns, "below 16", False),
    ("channels", stem, "3 channels", False),
    ("channels", few_channels, "9 to 9", False),
    ("channels", odd_groups, "multiple of 8", False),
]
"""Rule, a graph that breaks it, what the finding says, and whether TensorRT for RTX refuses it too.

None where it is not asked, because it takes more than NVIDIA's documentation of TensorRT promises (blocks of int8, computed scales), or
because the answer says nothing about the rule.
"""
KEPT = [
    linear,
    convolution,
    lambda: residual(on_codes=True),
    lambda: int4_before_21(opset=21),
    lambda: int4_before_21(block=64, opset=23),
    lambda: half_scales(opset=21),
]


def findings(net: Net) -> list[Finding]:
    model = ir.from_proto(net.model())
    normalize(model)
    return lint(model, DIMS)


def test_every_rule_has_a_breaking_example() -> None:
    assert {rule for rule, *_ in BROKEN} == set(RULES)


@pytest.mark.parametrize("net", KEPT)
def test_a_graph_that_keeps_all_rules_has_no_finding(net: Callable[[], Net]) -> None:
    assert findings(net()) == []


@pytest.mark.parametrize(("rule", "net", "says", "refused"), BROKEN)
def test_a_graph_that_breaks_a_rule_is_found_with_its_place(rule: str, net: Callable[[], Net], says: str, refused: bool | None) -> None:
    found = [f for f in findings(net()) if f.rule == rule]
    assert found and any(says in str(f) for f in found)
    assert all(f.node and f.required == RULES[rule][0] for f in found)


def test_requirements_come_first() -> None:
    net = linear(shape=(64, 1), zero=np.int8(3))
    required = [f.required for f in findings(net)]
    assert True in required and False in required and required == sorted(required, reverse=True)


@pytest.fixture(scope="module")
def compiler() -> Any:
    trt = rtx.compiler()
    if trt is None:
        pytest.skip("TensorRT for RTX is not installed (pip install tensorrt-rtx-cu13)")
    return trt


def compiles(trt: Any, net: Net, folder: Path) -> bool:
    path = folder / "net.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(net.model()), path)
    inputs = {i.name: [d.dim_value or 8 for d in i.type.tensor_type.shape.dim] for i in net.inputs}
    profile = {name: {"min": shape, "opt": shape, "max": shape} for name, shape in inputs.items()}
    try:
        rtx.compile_ahead(trt, path, profile, ("SM89",))
    except rtx.Rejected:
        return False
    return True


def test_tensorrt_takes_what_keeps_the_rules(compiler: Any, tmp_path: Path) -> None:
    for net in KEPT:
        assert compiles(compiler, net(), tmp_path)


def test_tensorrt_refuses_what_breaks_a_requirement(compiler: Any, tmp_path: Path) -> None:
    for rule, net, says, refused in BROKEN:
        if refused is not None:
            assert compiles(compiler, net(), tmp_path) != refused, (rule, says)
