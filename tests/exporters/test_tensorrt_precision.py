"""From float32 to a strongly typed float16 graph: which nodes stay, how many casts, and that parity is measured on float16 rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporters.onnx.write import save
from exporters.tensorrt import reference
from exporters.tensorrt.precision import FLOAT, HALF, HALF_MAX, Report, normalize, to_half

from .test_tensorrt_rules import Net, convolution, linear


def prepared(net: Net) -> ir.Model:
    model = ir.from_proto(net.model())
    normalize(model)
    return model


def batch(**arrays: Any) -> list[tuple[dict[str, Tensor], Tensor]]:
    inputs = {n: torch.as_tensor(np.asarray(a, np.float32)) for n, a in arrays.items()}
    return [(inputs, torch.zeros(len(next(iter(inputs.values())))))]


def halved(net: Net, data: list[tuple[dict[str, Tensor], Tensor]], data_max: float = 512.0) -> tuple[ir.Model, Report]:
    model = prepared(net)
    report = to_half(model, reference.measure(model, data), data_max)
    return model, report


def types(model: ir.Model) -> dict[str, ir.DataType]:
    """Node name -> type of its first output."""
    return {str(n.name): n.outputs[0].dtype for n in model.graph if n.outputs[0].dtype is not None}


def checked(model: ir.Model, folder: Path) -> Path:
    """Saved, valid ONNX, strictly typed."""
    path = folder / "model.onnx"
    save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    inferred = str(folder / "inferred.onnx")
    onnx.shape_inference.infer_shapes_path(str(path), inferred, check_type=True, strict_mode=True, data_prop=True)
    return path


def mlp(scale: float = 1.0) -> Net:
    """x -> MatMul -> Add -> Relu -> MatMul, with weights of a given size."""
    rng = np.random.default_rng(0)
    net = Net()
    x = net.input("x", ["batch", 8])
    h = net.op("MatMul", [x, net.constant("w1", (rng.standard_normal((8, 16)) * scale).astype(np.float32))], "m1")
    h = net.op("Relu", [net.op("Add", [h, net.constant("b1", rng.standard_normal(16).astype(np.float32))], "a1")], "r1")
    net.op("MatMul", [h, net.constant("w2", rng.standard_normal((16, 4)).astype(np.float32) / scale)], "out")
    return net.output("out", ["batch", 4])


def test_everything_is_half_and_the_network_keeps_its_types(tmp_path: Path) -> None:
    model, report = halved(mlp(), batch(x=np.ones((3, 8))))
    assert report.kept == [] and report.casts == 2 and report.halves == 4
    assert all(v.dtype == HALF for v in model.graph.initializers.values())
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [FLOAT, FLOAT]
    assert [v.name for v in model.graph.outputs] == ["out"]
    checked(model, tmp_path)


def test_a_node_beyond_data_max_stays_and_is_listed_with_what_was_seen(tmp_path: Path) -> None:
    model, report = halved(mlp(scale=500.0), batch(x=np.ones((3, 8))))
    kept = {k.node: k for k in report.kept}
    assert set(kept) == {"m1", "a1", "r1", "out"}
    measured = reference.measure(prepared(mlp(scale=500.0)), batch(x=np.ones((3, 8))))
    assert kept["m1"].maximum == measured.maximum["m1"] > 512 and "data_max=512" in kept["m1"].why
    assert all(t == FLOAT for t in types(model).values()) and report.casts == 0
    checked(model, tmp_path)


def test_data_max_is_an_option() -> None:
    _, report = halved(mlp(scale=500.0), batch(x=np.ones((3, 8))), data_max=1e9)
    assert report.kept == []


def masked_softmax() -> Net:
    """softmax(x + mask) @ v, with a mask of the lowest float32: what traced attention has."""
    net = Net()
    x, keep = net.input("x", ["batch", 8]), net.input("keep", ["batch", 8], onnx.TensorProto.BOOL)
    net.constant("zero", np.float32(0))
    net.constant("lowest", np.finfo(np.float32).min)
    mask = net.op("Where", [keep, "zero", "lowest"], "mask")
    p = net.op("Softmax", [net.op("Add", [x, mask], "scores")], "p", axis=-1)
    net.op("MatMul", [p, net.constant("v", np.eye(8, dtype=np.float32))], "out")
    return net.output("out", ["batch", 8])


def test_attention_masks_keep_the_softmax_in_float32(tmp_path: Path) -> None:
    keep = torch.tensor([[True] * 5 + [False] * 3] * 2)
    data = [({"x": torch.randn(2, 8), "keep": keep}, torch.zeros(2))]
    model, report = halved(masked_softmax(), data)
    assert {k.op for k in report.kept} == {"Where", "Add", "Softmax"}
    assert max(k.maximum or 0 for k in report.kept) == pytest.approx(float(np.finfo(np.float32).max))
    assert types(model)["out"] == HALF and report.casts == 2  # into the product, and out of the network
    checked(model, tmp_path)
    got = reference.logits(reference.rounded(model), data)
    want = torch.softmax(data[0][0]["x"].masked_fill(~keep, -1e30), -1)
    assert torch.allclose(got, want, atol=1e-3)


def test_a_constant_beyond_float16_keeps_its_node() -> None:
    net = Net()
    net.op("Mul", [net.input("x", ["batch", 2]), net.constant("c", np.float32([1e5, 1]))], "big")
    net.op("Mul", ["big", net.constant("d", np.float32([1e-5, 1]))], "out")
    _, report = halved(net.output("out", ["batch", 2]), batch(x=np.zeros((2, 2))))
    (kept,) = report.kept
    assert kept.node == "big" and kept.maximum == 1e5 and "constant" in kept.why


def test_constants_that_become_zero_are_counted() -> None:
    net = Net()
    net.op("MatMul", [net.input("x", ["batch", 3]), net.constant("w", np.float32([[1e-9], [0], [1]]))], "out")
    _, report = halved(net.output("out", ["batch", 1]), batch(x=np.ones((2, 3))))
    assert report.underflow == {"w": 1}


def test_a_sum_that_could_overflow_on_the_way_stays_though_its_result_does_not() -> None:
    net = Net()
    net.constant("axes", np.array([1]))
    net.op("ReduceMean", [net.input("x", ["batch", 400]), "axes"], "out", keepdims=0)
    _, report = halved(net.output("out", ["batch"]), batch(x=np.full((2, 400), 300.0)))
    (kept,) = report.kept
    assert kept.op == "ReduceMean" and kept.maximum == 400 * 300 > HALF_MAX


def test_operators_without_a_float16_form_stay() -> None:
    net = Net()
    net.constant("start", np.float32(0))
    net.constant("step", np.float32(1))
    net.constant("axes", np.array([0, 1]))
    x = net.input("x", ["batch", 4])
    limit = net.op("ReduceMax", [x, "axes"], "limit", keepdims=0)
    net.op("Range", ["start", limit, "step"], "out")
    _, report = halved(net.output("out", ["n"]), batch(x=np.full((2, 4), 3.0)))
    assert {k.node for k in report.kept} == {"out"} and "float16" in report.kept[0].why


def test_resize_keeps_its_scales_in_float32(tmp_path: Path) -> None:
    net = Net()
    net.constant("scales", np.float32([1, 1, 2, 2]))
    net.nodes.append(
        onnx.helper.make_node("Resize", [net.input("x", ["batch", 3, 4, 4]), "", "scales"], ["out"], name="out", mode="nearest")
    )
    model, _ = halved(net.output("out", ["batch", 3, 8, 8]), batch(x=np.ones((2, 3, 4, 4))))
    assert model.graph.initializers["scales"].dtype == FLOAT
    checked(model, tmp_path)


@pytest.mark.parametrize("net", [linear, convolution])
def test_products_of_codes_and_their_scales_stay_in_float32(net: Any, tmp_path: Path) -> None:
    data = batch(x=np.ones((8, 64) if net is linear else (2, 32, 8, 8)))
    model, report = halved(net(), data)
    assert report.kept == [] and report.casts == 0 and report.on_codes >= 4
    assert all(v.dtype != HALF for v in model.graph.initializers.values())
    checked(model, tmp_path)


def test_light_nodes_between_codes_need_no_cast() -> None:
    """Conv, Relu, MaxPool, Q: casting to float16 and back would cost more than it saves."""
    net = convolution()
    net.outputs.clear()
    net.op("MaxPool", [net.op("Relu", ["out"], "relu")], "pool", kernel_shape=[2, 2])
    net.quantize("pool")
    model, report = halved(net.output("pool.dq", ["batch", 32, 7, 7]), batch(x=np.ones((2, 32, 8, 8))))
    assert report.casts == 0 and types(model)["relu"] == FLOAT


def test_a_group_of_light_nodes_takes_the_cheaper_side() -> None:
    """One value in float32, read by three float16 products: a cast before the reshape serves them all."""
    net = linear(shape=(64, 64))
    net.outputs.clear()
    net.constant("shape", np.array([-1, 8, 8]))
    net.constant("v", np.eye(8, dtype=np.float32))
    net.op("Reshape", ["out", "shape"], "heads")
    for i in range(3):
        net.op("MatMul", ["heads", "v"], f"p{i}")
    net.op("Sum", ["p0", "p1", "p2"], "sum")
    model, report = halved(net.output("sum", ["batch", 8, 8]), batch(x=np.ones((8, 64))))
    assert types(model)["heads"] == HALF and report.casts == 2


@pytest.mark.parametrize(("exact", "dtype"), [(True, HALF), (False, FLOAT)])
def test_a_weight_alone_decodes_in_float16_only_if_its_scales_are_float16_numbers(exact: bool, dtype: ir.DataType) -> None:
    scales = np.full(32, 2.0**-7 if exact else 0.01, np.float32)
    model, report = halved(linear(activation=False, weight_scale=scales), batch(x=np.ones((8, 64))))
    assert types(model)["w"] == dtype and model.graph.initializers["w.scales"].dtype == dtype
    assert report.on_codes == (0 if exact else 1)


def test_half_scales_change_no_weight() -> None:
    """code * scale, rounded once: by a float16 DequantizeLinear, or by the cast behind a float32 one."""
    scales = (np.random.default_rng(1).random(32) * 0.01 + 1e-3).astype(np.float16).astype(np.float32)
    data = batch(x=np.random.default_rng(0).standard_normal((8, 64)))
    half, _ = halved(linear(activation=False, weight_scale=scales), data)
    nudged = linear(activation=False, weight_scale=scales)
    single = prepared(nudged)
    node = next(n for n in single.graph if n.name == "w")
    cast = ir.node("Cast", [node.outputs[0]], {"to": int(HALF)})
    back = ir.node("Cast", [cast.outputs[0]], {"to": int(FLOAT)})
    ir.convenience.replace_all_uses_with(node.outputs[0], back.outputs[0])
    cast.replace_input_with(0, node.outputs[0])
    single.graph.insert_after(node, [cast, back])
    inputs = data[0][0]["x"].half().float()
    got = reference.logits(reference.rounded(half), [({"x": inputs}, torch.zeros(8))])
    want = reference.logits(single, [({"x": inputs}, torch.zeros(8))])
    assert torch.equal(got, want.half().float())


def test_parity_rounds_what_onnxruntime_alone_does_not() -> None:
    """(x + 2048) * 1.5 - 2048 in float16 loses x's fraction; onnxruntime's CPU keeps it, since it computes in float32 throughout."""
    net = Net()
    net.constant("c", np.float32(2048))
    net.constant("k", np.float32(1.5))
    net.constant("eye", np.eye(4, dtype=np.float32))
    x = net.op("MatMul", [net.input("x", ["batch", 4]), "eye"], "first")
    net.op("Sub", [net.op("Mul", [net.op("Add", [x, "c"], "a"), "k"], "m"), "c"], "s")
    net.op("MatMul", ["s", "eye"], "out")
    values = np.array([[0.3, 0.7, 1.2, 3.3]], np.float16)
    data = batch(x=values)
    model, _ = halved(net.output("out", ["batch", 4]), data, data_max=1e9)
    want = (values + np.float16(2048)) * np.float16(1.5) - np.float16(2048)
    assert np.array_equal(reference.logits(reference.rounded(model), data).numpy(), want.astype(np.float32))
    assert not np.array_equal(reference.logits(model, data).numpy(), want.astype(np.float32))


def test_parity_rounds_as_torch_does() -> None:
    torch.manual_seed(0)
    data = batch(x=np.random.default_rng(0).standard_normal((16, 8)))
    model, _ = halved(mlp(), data)
    single = prepared(mlp())
    weights = {n: torch.from_numpy(v.const_value.numpy()) for n, v in single.graph.initializers.items() if v.const_value is not None}
    x = data[0][0]["x"].half().float()
    h = (x @ weights["w1"].half().float()).half()
    h = (h + weights["b1"].half()).relu()
    want = (h.float() @ weights["w2"].half().float()).half().float()
    got = reference.logits(reference.rounded(model), data)
    assert (got - want).abs().max() < 1e-2 and (got == want).float().mean() > 0.9  # sums in another order


def test_without_activation_codes_is_the_float_network_with_its_weights_on_the_grid() -> None:
    model = prepared(linear())
    data = batch(x=np.random.default_rng(0).standard_normal((8, 64)))
    weight = np.random.default_rng(0).integers(-127, 128, (64, 32)).astype(np.float32) * np.float32(0.01)
    got = reference.logits(reference.without_activation_codes(model), data).numpy()
    assert np.allclose(got, data[0][0]["x"].numpy() @ weight, rtol=1e-5, atol=1e-4)
    assert not np.allclose(reference.logits(model, data).numpy(), got, rtol=1e-5, atol=1e-4)


def test_control_flow_is_refused_by_name() -> None:
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["c"], value_float=1.0)], "b", [], [onnx.helper.make_tensor_value_info("c", 1, [])]
    )
    net = Net()
    net.nodes.append(
        onnx.helper.make_node("If", [net.input("x", [], onnx.TensorProto.BOOL)], ["out"], "choice", then_branch=branch, else_branch=branch)
    )
    with pytest.raises(ValueError, match=r"choice is control flow \(If\)"):
        prepared(net.output("out", []))


def test_ranges_are_the_largest_of_all_batches_and_infinite_where_not_finite() -> None:
    model = prepared(mlp())
    small, large = batch(x=np.ones((2, 8))), batch(x=np.full((5, 8), -3.0))
    measured = reference.measure(model, small + large)
    assert measured.maximum["x"] == 3.0
    assert measured.maximum["m1"] == pytest.approx(3 * reference.measure(model, small).maximum["m1"], rel=1e-5)
    assert reference.measure(model, batch(x=np.full((1, 8), np.inf))).maximum["m1"] == np.inf


OPS = ["Relu", "Tanh", "Neg", "MatMul", "Softmax", "Big", "Shape"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(OPS), min_size=1, max_size=10), st.integers(0, 3))
def test_any_chain_is_valid_strictly_typed_and_casts_a_value_at_most_once_to_each_type(ops: list[str], tail: int) -> None:
    net = Net()
    value = net.input("x", ["batch", 4])
    net.constant("eye", np.eye(4, dtype=np.float32))
    net.constant("big", np.float32(1e4))
    net.constant("small", np.float32(1e-4))
    for i, op in enumerate(ops):
        if op == "MatMul":
            value = net.op("MatMul", [value, "eye"], f"v{i}")
        elif op == "Big":
            value = net.op("Mul", [net.op("Mul", [value, "big"], f"b{i}"), "small"], f"v{i}")
        elif op == "Shape":
            net.op("Shape", [value], f"s{i}")
            value = net.op("Reshape", [value, f"s{i}"], f"v{i}")
        else:
            value = net.op(op, [value], f"v{i}")
    for i in range(tail):
        net.op("Add", [value, value], f"t{i}")
    net.op("Add", [value, "x"], "out")
    data = batch(x=np.random.default_rng(0).standard_normal((3, 4)))
    model, report = halved(net.output("out", ["batch", 4]), data)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    casts = [(n.inputs[0], n.attributes["to"].as_int()) for n in model.graph if n.op_type == "Cast"]
    assert len(casts) == len(set(casts)) == report.casts
    assert torch.allclose(reference.logits(reference.rounded(model), data), reference.logits(prepared(net), data), rtol=2e-2, atol=2e-2)
