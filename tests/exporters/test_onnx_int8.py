"""INT8 in the ONNX exporter: bit-exact codes, biases and activations in onnxruntime, and the integer kernels that it really runs."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporters.base import ExportJob, ReceiptFailed, packed_layers, probe
from exporters.onnx import OnnxExport, edges
from exporters.onnx.runtime import open_session
from qtrain.activations import QuantizedActivation, calibrate
from qtrain.grids.affine import Affine, Int8, Int8Activation
from qtrain.grids.base import Grid
from qtrain.prepare import convert, prepare
from qtrain.receipt import differing, nmse

from .small import Small, batches, job, quantized
from .small_cnn import SYMMETRIC, SmallCnn, images, quantized_cnn
from .test_onnx import Corrupting, Twice, bert

QUICK = OnnxExport(latency_repeats=0)
STANDARD = OnnxExport(latency_repeats=0, fuse=False)
ROW7 = Affine(bits=7, granularity="channel")


def static_bert(weight: Grid | None = None, activation: Grid | None = None, static: bool = True) -> nn.Module:
    """A BERT of two layers with INT8 weights, embeddings and activations."""
    model = copy.deepcopy(bert()[0])
    modules = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)) and n != "classifier"}
    prepare(model, modules, weight or Int8(), Int8(), activation or Int8Activation(), static)
    calibrate(model, [inputs for inputs, _ in batches()])
    return convert(model)


def cnn_job(model: nn.Module, folder: Path, data: Any = None, **given: Any) -> ExportJob:
    """What a run gives for a model of images."""
    data = images() if data is None else data
    with torch.no_grad():
        logits = torch.cat([model(**inputs) for inputs, _ in data])
    values = {"example_inputs": data[0][0], "batches": data, "training_logits": logits, "max_length": 0, "vocab_size": 0, **given}
    return ExportJob(model, values.pop("example_inputs"), metrics=lambda x, y: {}, folder=folder, **values)


def operators(path: Path | str) -> Counter[str]:
    """Operators in the file."""
    return Counter(n.op_type for n in onnx.load(path).graph.node)


def running(path: Path | str, tmp_path: Path) -> Counter[str]:
    """Operators that onnxruntime runs when it has loaded the file with default settings."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return operators(tmp_path / "optimized.onnx")


def standard_only(path: Path | str) -> bool:
    return all(n.domain == "" for n in onnx.load(path).graph.node)


# -- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [Int8Activation(), SYMMETRIC])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_transformer_in_static_int8(fuse: bool, activation: Grid, tmp_path: Path) -> None:
    model = static_bert(activation=activation)
    entry = (QUICK if fuse else STANDARD).export(job(model, tmp_path))
    receipt = entry["receipt"]
    assert receipt["passed"] and receipt["fallbacks"] == []
    assert receipt["tensors"] == receipt["tensors_bit_exact"] == 16 + 13  # weights, and the activations of the Linears
    assert receipt["layers"] == 13 and receipt["layers_nmse"] < 1e-11 and receipt["logits_nmse"] < 1e-4
    ran = running(entry["path"], tmp_path)
    assert ran["QuantizeLinear"] == 9  # Q, K and V share one
    if fuse:
        assert receipt["fused"] == {"QAttention": 2, "MatMulIntegerToFloat": 7}
        assert ran["QAttention"] == 2 and ran["MatMulIntegerToFloat"] == 7 and ran["Gelu"] == 2 and not ran["DequantizeLinear"]
    else:
        assert standard_only(entry["path"]) and ran["MatMulIntegerToFloat"] == 13
        assert not ran["DequantizeLinear"] and not ran["SkipLayerNormalization"]


@pytest.mark.parametrize("fuse", [True, False])
def test_a_transformer_in_dynamic_int8(fuse: bool, tmp_path: Path) -> None:
    entry = (QUICK if fuse else STANDARD).export(job(static_bert(static=False), tmp_path))
    receipt = entry["receipt"]
    assert receipt["passed"] and receipt["layers"] == 13 and receipt["layers_nmse"] < 1e-11 and receipt["logits_nmse"] < 1e-4
    ran = running(entry["path"], tmp_path)
    assert not ran["MatMulInteger"] and not ran["Add" if fuse else "BiasGelu"] > 4
    if fuse:
        assert ran["QAttention"] == 2 and ran["DynamicQuantizeMatMul"] == 7
    else:
        assert standard_only(entry["path"]) and ran["DynamicQuantizeMatMul"] + ran["MatMulIntegerToFloat"] == 13


@pytest.mark.parametrize("static", [True, False])
def test_attention_keeps_its_mask_and_its_axes(static: bool, tmp_path: Path) -> None:
    model = static_bert(static=static)
    path = Path(QUICK.export(job(model, tmp_path))["path"])
    assert operators(path)["QAttention"] == 2
    for shape in ((1, 1), (1, 2), (3, 33), (5, 3)):
        mask = torch.ones(shape, dtype=torch.int64)
        mask[0, (shape[1] + 1) // 2 :] = 0
        inputs = {"input_ids": torch.randint(0, 37, shape), "attention_mask": mask}
        with torch.no_grad():
            training = model(**inputs).logits
        assert nmse(training, QUICK.logits(path, [(inputs, torch.zeros(0))])) < 1e-4
    changed = {**inputs, "attention_mask": torch.ones(5, 3, dtype=torch.int64)}
    assert nmse(training, QUICK.logits(path, [(changed, torch.zeros(0))])) > 1e-6 or static


WEIGHTS = [Affine(bits=8, rule="minmax", granularity="channel"), Affine(bits=4, granularity="tensor"), ROW7]


@pytest.mark.parametrize("given", WEIGHTS)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
def test_weights_with_zero_points_one_scale_or_few_bits(fuse: bool, static: bool, given: Affine, tmp_path: Path) -> None:
    model = Small().eval()
    prepare(model, {"inner": model.inner, "classifier": model.classifier}, given, None, Int8Activation(), static)
    calibrate(model, [inputs for inputs, _ in batches()])
    entry = (QUICK if fuse else STANDARD).export(job(convert(model), tmp_path))
    receipt, ran = entry["receipt"], running(entry["path"], tmp_path)
    assert receipt["passed"] and receipt["tensors"] == receipt["tensors_bit_exact"] and receipt["layers_nmse"] < 1e-11
    kernels = ("MatMulIntegerToFloat", "QLinearMatMul") if static else ("DynamicQuantizeMatMul",)
    assert sum(ran[kernel] for kernel in kernels) == 2


@pytest.mark.parametrize("static", [True, False])
def test_attention_with_zero_points(static: bool, tmp_path: Path) -> None:
    receipt = QUICK.export(job(static_bert(WEIGHTS[0], static=static), tmp_path))["receipt"]
    assert receipt["passed"] and receipt["fused"]["QAttention"] == 2 and receipt["layers_nmse"] < 1e-11


@pytest.mark.parametrize("make", [lambda: static_bert(), lambda: static_bert(static=False)])
def test_a_default_session_computes_the_same(make: Any, tmp_path: Path) -> None:
    """No setting of ours may be needed for the numbers of an INT8 file, fused by onnxruntime or not."""
    path = Path(STANDARD.export(job(make(), tmp_path))["path"])
    inputs = {n: x.numpy() for n, x in batches()[0][0].items()}
    ours = open_session(path).run(None, inputs)[0]
    theirs = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    assert np.array_equal(ours, theirs)


class Smoothed(Small):
    """Three Linears of one input, two of which scale it alike."""

    def __init__(self) -> None:
        super().__init__(width=32, hidden=32)
        self.second, self.third = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = (self.embedding(input_ids) * attention_mask.unsqueeze(-1)).mean(1)
        return {"logits": self.classifier(torch.relu(self.inner(x) + self.second(x)) * self.third(x))}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_smoothed_inputs_are_scaled_once(static: bool, fuse: bool, tmp_path: Path) -> None:
    from qtrain.layers import SmoothedLinear

    model = Smoothed().eval()
    factors = {n: torch.rand(32, generator=torch.Generator().manual_seed(s)) + 0.5 for n, s in (("inner", 1), ("second", 1), ("third", 2))}
    for name, factor in factors.items():
        setattr(model, name, SmoothedLinear(getattr(model, name), factor))
    prepare(model, {n: getattr(model, n) for n in factors}, Int8(), None, Int8Activation(), static)
    calibrate(model, [inputs for inputs, _ in batches()])
    entry = (QUICK if fuse else STANDARD).export(job(convert(model), tmp_path))
    assert entry["receipt"]["layers"] == 3 and entry["receipt"]["layers_nmse"] < 1e-11 and entry["receipt"]["logits_nmse"] < 1e-6
    assert sum(i.name.endswith("inverse_smoothing") for i in onnx.load(entry["path"]).graph.initializer) == 2


@pytest.mark.parametrize("static", [True, False])
def test_a_layer_called_twice_is_written_once(static: bool, tmp_path: Path) -> None:
    model = Twice().eval()
    prepare(model, {n: getattr(model, n) for n in ("inner", "last")}, Int8(), None, Int8Activation(), static)
    calibrate(model, [inputs for inputs, _ in batches()])
    entry = QUICK.export(job(convert(model), tmp_path))
    assert entry["receipt"]["passed"] and sum(i.name.endswith(".codes") for i in onnx.load(entry["path"]).graph.initializer) == 2


# -- convolutional networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [Int8Activation(), SYMMETRIC])
def test_a_convolutional_network_runs_in_integers_throughout(activation: Grid, tmp_path: Path) -> None:
    model = quantized_cnn(SmallCnn(), activation=activation)
    entry = QUICK.export(cnn_job(model, tmp_path))
    receipt = entry["receipt"]
    assert receipt["passed"] and receipt["fallbacks"] == [] and receipt["logits_nmse"] < 1e-4 and standard_only(entry["path"])
    biases = sum(layer.bias_codes is not None for layer in packed_layers(model).values())  # type: ignore[attr-defined]
    activations = sum(isinstance(m, QuantizedActivation) for m in model.modules())
    assert biases == 6 and receipt["tensors"] == receipt["tensors_bit_exact"] == 7 + biases + activations
    ran = running(entry["path"], tmp_path)
    integer = {"QLinearConv": 6, "QLinearAdd": 2, "QLinearConcat": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1, "QuantizeLinear": 1}
    assert {op: ran[op] for op in integer} == integer
    assert not {"Conv", "DequantizeLinear", "Add", "Relu", "Clip", "ReduceMean"} & set(ran)


def test_moved_values_stay_in_codes(tmp_path: Path) -> None:
    path = Path(QUICK.export(cnn_job(quantized_cnn(SmallCnn()), tmp_path))["path"])
    graph = onnx.load(path).graph
    made_by = {o: n.op_type for n in graph.node for o in n.output}
    moves = [n for n in graph.node if n.op_type in ("MaxPool", "Slice", "Pad")]
    assert {n.op_type for n in moves} == {"MaxPool", "Slice", "Pad"}
    assert all(made_by[n.input[0]] in ("QuantizeLinear", "MaxPool", "Slice", "Pad") for n in moves)


@pytest.mark.parametrize("grid", [Int8(), Affine(bits=4, granularity="channel"), Affine(bits=8, rule="minmax", granularity="tensor")])
def test_convolutions_with_float_activations(grid: Affine, tmp_path: Path) -> None:
    model = quantized_cnn(SmallCnn(), dynamic=True, weight=grid, activation=None)
    receipt = QUICK.export(cnn_job(model, tmp_path))["receipt"]
    assert receipt["passed"] and receipt["tensors"] == receipt["tensors_bit_exact"] == 7 and receipt["logits_nmse"] < 1e-11


def test_dynamic_convolutions_compute_on_training_s_grid(tmp_path: Path) -> None:
    entry = QUICK.export(cnn_job(quantized_cnn(SmallCnn(), dynamic=True), tmp_path))
    receipt, ran = entry["receipt"], running(entry["path"], tmp_path)
    assert receipt["passed"] and receipt["layers"] == 7 and receipt["layers_nmse"] < 1e-11 and receipt["logits_nmse"] < 1e-4
    assert ran["DynamicQuantizeLinear"] == 5 and ran["DynamicQuantizeMatMul"] == 1 and not ran["ConvInteger"]


class Signal(nn.Module):
    """Conv1d on a path that torch.fx cannot trace, so that each layer quantizes its own input."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.first = nn.Conv1d(4, 8, 5, stride=2, padding=2, dilation=2)
        self.second = nn.Conv1d(8, 6, 3, groups=2, bias=False)
        self.classifier = nn.Linear(6, 3)

    def forward(self, signal: Tensor) -> Tensor:
        x = F.relu(self.first(signal))
        if x.shape[-1] > 2:  # data decides
            x = F.relu(self.second(x))
        return self.classifier(x.mean(-1))


@pytest.mark.parametrize("static", [True, False])
def test_one_dimension_and_layers_that_quantize_their_own_input(static: bool, tmp_path: Path) -> None:
    data = [({"signal": torch.randn(5 + i, 4, 24)}, torch.randint(0, 3, (5 + i,))) for i in range(3)]
    model = Signal().eval()
    prepare(model, {n: m for n, m in model.named_modules() if hasattr(m, "weight")}, Int8(), None, Int8Activation(), static)
    calibrate(model, [inputs for inputs, _ in data])
    receipt = QUICK.export(cnn_job(convert(model), tmp_path, data))["receipt"]
    assert receipt["passed"] and receipt["layers"] == 3 and receipt["layers_nmse"] < 1e-11
    assert receipt["tensors"] == receipt["tensors_bit_exact"] == (6 if static else 3)


@pytest.mark.parametrize("kept", ["stem", "middle", "classifier"])
def test_what_training_left_in_float_stays_in_float(kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two quantized values onnxruntime would quantize the weight of a float layer."""
    model = quantized_cnn(SmallCnn(), keep_float=[kept])
    entry = QUICK.export(cnn_job(model, tmp_path))
    assert entry["receipt"]["passed"] and entry["receipt"]["tensors"] == entry["receipt"]["tensors_bit_exact"]
    ran = running(entry["path"], tmp_path)
    assert ran["QLinearConv"] + ran["Conv"] == 6 and ran["Conv"] == (kept != "classifier") and ran["QGemm"] == (kept != "classifier")
    if kept != "middle":
        return
    monkeypatch.setattr(edges, "_keep_in_float", lambda builder, node: None)
    assert running(QUICK.export(cnn_job(model, tmp_path))["path"], tmp_path)["QLinearConv"] == 6  # else there is nothing to guard against


def test_latency_of_images_is_by_shape(tmp_path: Path) -> None:
    exporter = OnnxExport(latency_repeats=1, latency_batches=[2])
    receipt = exporter.export(cnn_job(quantized_cnn(SmallCnn()), tmp_path, float_model=SmallCnn().eval()))["receipt"]
    assert set(receipt["latency_ms"]) == {"float", "quantized"} and set(receipt["latency_ms"]["quantized"]) == {"2x3x8x8"}


# -- activations, bit for bit ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamic_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = quantized(Small(32), Int8(), None, Int8Activation())
    return Path(QUICK.export(job(model, tmp_path_factory.mktemp("dynamic")))["path"])


ODD = {
    "zeros": torch.zeros(4, 8),
    "both zeros": torch.tensor([0.0, -0.0] * 16),
    "positive": torch.linspace(0.25, 9.0, 64),
    "negative": -torch.linspace(0.25, 9.0, 64),
    "one value": torch.full((3,), 0.7),
    "large": torch.tensor([3e38, -1e37, 5.0]),
    "small": torch.tensor([3e-30, -1e-30, 2e-30]),
    "halves": (torch.arange(-100, 156) + 0.5) / 8,
}


@pytest.mark.parametrize("what", [*ODD, "random"])
def test_a_dynamic_range_is_found_and_rounded_as_in_training(what: str, dynamic_file: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    random = [torch.randn(64, generator=generator) * s + o for s in (1e-3, 1.0, 50.0) for o in (-3.0, 0.0, 1.5)]
    for x in random if what == "random" else [ODD[what]]:
        ((name, runtime),) = QUICK.activations(dynamic_file, {"inner.activation_fake": x})
        assert name == "inner.activation_fake" and differing(Int8Activation().fake(x), runtime) == 0


@pytest.mark.parametrize("profile", ["x86", "arm"])
@pytest.mark.parametrize("rule", ["minmax_onnx", "absmax_onnx"])
def test_static_activations_are_rounded_as_in_training(rule: str, profile: str, tmp_path: Path) -> None:
    """Each range is an activation of its own; the receipt compares all 256 codes, and values at, between and beyond them."""
    grid = Affine(bits=8, rule=rule, granularity="tensor")

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            ranges = [(-1.0, 1.0), (0.0, 6.0), (-3.3, 0.1), (-1e-4, 7e-4), (-7e5, 3e5), (0.0, 1e-30), (-0.3712, 0.0)]
            self.edges = nn.ModuleList(QuantizedActivation(grid, grid.choose(torch.tensor(r))) for r in ranges)
            self.classifier = nn.Linear(6, 3)

        def forward(self, signal: Tensor) -> Tensor:
            return self.classifier(torch.stack([edge(signal) for edge in self.edges]).sum(0))

    model = Many().eval()
    prepare(model, {"classifier": model.classifier}, Int8())
    model = convert(model)
    data = [({"signal": torch.randn(4, 6)}, torch.zeros(4, dtype=torch.int64))]
    entry = OnnxExport(latency_repeats=0, profile=profile).export(cnn_job(model, tmp_path, data))
    assert entry["receipt"]["tensors_bit_exact"] == 1 + 7
    for name, edge in [(f"edges.{i}", e) for i, e in enumerate(model.edges)]:
        x = probe(edge)
        assert x.abs().max() >= 1e30 and len(x.unique()) > 700
        ((_, runtime),) = QUICK.activations(Path(entry["path"]), {name: x})
        assert differing(edge(x), runtime) == 0


class Faulty(OnnxExport):
    """A runtime that rounds one activation in its own way."""

    registered_name = "onnx"

    def activations(self, path: Path, inputs: dict[str, Tensor]) -> Any:
        for name, value in super().activations(path, inputs):
            yield name, value.clone().index_fill_(0, torch.tensor([0]), 0.5)


def test_an_activation_that_differs_fails_the_receipt(tmp_path: Path) -> None:
    with pytest.raises(ReceiptFailed, match=r"activation inner.activation_fake comes out differently"):
        Faulty(latency_repeats=0).export(job(quantized(Small(32), Int8(), None, Int8Activation()), tmp_path))


# -- profiles --------------------------------------------------------------------------------------------------------


def test_arm_has_signed_activations(tmp_path: Path) -> None:
    for make, made in ((static_bert(), job), (quantized_cnn(SmallCnn()), cnn_job)):
        entry = OnnxExport(latency_repeats=0, profile="arm").export(made(make, tmp_path))
        kinds = {i.data_type for i in onnx.load(entry["path"]).graph.initializer if i.name.endswith(".zero_point")}
        assert entry["receipt"]["passed"] and entry["receipt"]["fallbacks"] == [] and kinds == {onnx.TensorProto.INT8}


def test_mobile_is_standard_with_fixed_shapes(tmp_path: Path) -> None:
    exporter = OnnxExport(latency_repeats=1, profile="mobile", batch=4, length=12)
    entry = exporter.export(job(static_bert(), tmp_path, float_model=bert()[0]))
    assert entry["receipt"]["passed"] and standard_only(entry["path"]) and set(entry["receipt"]["latency_ms"]["float"]) == {"4x12"}
    shapes = [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(entry["path"]).graph.input]
    assert shapes == [[4, 12], [4, 12]]
    entry = OnnxExport(latency_repeats=1, profile="mobile", batch=5).export(cnn_job(quantized_cnn(SmallCnn()), tmp_path))
    assert entry["receipt"]["passed"] and set(entry["receipt"]["latency_ms"]["quantized"]) == {"5x3x8x8"}


def test_a_sequence_beyond_a_fixed_length_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sequences of 8 tokens, the test split has one of 9; set export\.onnx\.length=9"):
        OnnxExport(latency_repeats=0, batch=2, length=8).export(job(static_bert(), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_old_x86_needs_seven_bits(tmp_path: Path) -> None:
    exporter = OnnxExport(latency_repeats=0, profile="x86_avx2")
    assert exporter.export(job(static_bert(ROW7), tmp_path))["receipt"]["passed"]
    assert exporter.export(cnn_job(quantized_cnn(SmallCnn(), weight=ROW7), tmp_path))["receipt"]["passed"]
    for model in (static_bert(), static_bert(static=False), quantized_cnn(SmallCnn())):
        assert all("quantizer.weight.bits=7" in message and "x86 for those with VNNI" in message for message in exporter.refusals(model))
        assert exporter.refusals(model)
    weights_only = quantized(Small(), Int8(), Int8())
    assert exporter.refusals(weights_only) == []  # saturation is between two integers


@pytest.mark.parametrize(
    ("option", "type_this"),
    [
        ({"profile": "vnni"}, "x86, x86_avx2, arm, mobile"),
        ({"profile": "mobile"}, r"export\.onnx\.batch=1"),
        ({"profile": "mobile", "batch": 1, "fuse": True}, r"export\.onnx\.fuse=false"),
        ({"length": 128}, r"export\.onnx\.batch=1"),
        ({"batch": -1}, r"export\.onnx\.batch=1"),
    ],
)
def test_a_bad_option_says_what_to_type(option: dict[str, Any], type_this: str) -> None:
    with pytest.raises(ValueError, match=type_this):
        OnnxExport(**option)


# -- refusals --------------------------------------------------------------------------------------------------------

TENSOR = {"granularity": "tensor", "bits": 8}
LINEAR_REFUSED: list[tuple[Affine, Affine, bool, dict[str, Any], list[str]]] = [
    (Int8(), Affine(bits=8, granularity="token"), False, {}, ["int8 per-token absmax", "one scale and zero point", "int8_activation"]),
    (Int8(), Affine(rule="absmax_onnx", **TENSOR), False, {}, ["DynamicQuantizeLinear", "minmax_onnx"]),
    (Int8(), Affine(rule="absmax", **TENSOR), True, {}, ["divides by the scale", "quantizer.activation.rule=absmax_onnx"]),
    (Int8(), Affine(rule="minmax_onnx", bits=7, granularity="tensor"), True, {}, ["quantizer.activation.bits=8"]),
    (Int8(), Int8Activation(), True, {"weights": "unpack"}, ["weights=unpack would compute in float", "export.onnx.weights=auto"]),
    (Int8(), Int8Activation(), False, {"weights": "matmul_nbits"}, ["export.onnx.weights=auto"]),
    (Int8(), Int8Activation(), False, {"profile": "mobile", "batch": 1, "length": 8}, ["quantizer.activation_range=static"]),
    (Affine(bits=8, group_size=32), Int8Activation(), True, {}, ["weights in groups", "quantizer.weight.granularity=channel"]),
    (Affine(bits=8, group_size=32), Int8Activation(), False, {}, ["weights in groups", "rule=absmax_mlas"]),
]


@pytest.mark.parametrize(("weight", "activation", "static", "options", "says"), LINEAR_REFUSED)
def test_a_refusal_names_the_layer_the_reason_and_what_to_type(
    weight: Affine, activation: Affine, static: bool, options: dict[str, Any], says: list[str], tmp_path: Path
) -> None:
    model = Small(96).eval()
    prepare(model, {"inner": model.inner}, weight, None, activation, static)
    calibrate(model, [inputs for inputs, _ in batches()])
    model = convert(model)
    exporter = OnnxExport(**options)
    message = exporter.refusals(model)[0]
    assert message.startswith("inner (")
    for text in says:
        assert text in message
    with pytest.raises(ValueError, match="export=onnx cannot hold"):
        exporter.export(job(model, tmp_path))
    assert list(tmp_path.iterdir()) == []


CONVOLUTIONS_REFUSED: list[tuple[dict[str, Any], bool, str]] = [
    ({"weight": Affine(bits=8, rule="minmax", granularity="channel")}, False, "one zero point for all output channels"),
    ({"weight": Affine(bits=8, granularity="token")}, False, "quantizer.weight.granularity=channel"),
    ({"activation": Affine(rule="minmax", **TENSOR)}, False, "quantizer.activation.rule=minmax_onnx"),
]


@pytest.mark.parametrize(("grids", "dynamic", "says"), CONVOLUTIONS_REFUSED)
def test_a_convolution_that_the_runtime_cannot_hold_is_refused(grids: dict[str, Any], dynamic: bool, says: str) -> None:
    messages = QUICK.refusals(quantized_cnn(SmallCnn(), dynamic=dynamic, **grids))
    assert messages and any(says in message for message in messages)


def test_mobile_refuses_what_is_not_standard() -> None:
    exporter = OnnxExport(profile="mobile", batch=1)
    messages = exporter.refusals(quantized(Small(), Affine(bits=2), Affine(bits=4)))
    assert "bits=4" in messages[1] and "MatMulNBits" in messages[1]
    assert "GatherBlockQuantized" in messages[0] and "quantizer.embedding.bits=8" in messages[0]
    assert "export.onnx.length=128" in messages[2]


# -- the file --------------------------------------------------------------------------------------------------------


class FirstByte(Corrupting):
    """Changes the first byte: a zero point has no other."""

    position = 0


@pytest.mark.parametrize("fuse", [True, False])
def test_one_flipped_bit_in_a_transformer_fails_the_receipt(fuse: bool, tmp_path: Path) -> None:
    layer, given = "bert.encoder.layer.0.attention.self.query", job(static_bert(), tmp_path)
    exporter = FirstByte(latency_repeats=0, fuse=fuse)
    for part in (".codes", ".scales", ".activation_fake.scale", ".activation_fake.zero_point"):
        exporter.target = layer + part
        named = layer + (".activation_fake" if "activation" in part else "")
        with pytest.raises(ReceiptFailed, match=f"tensor {named} decodes differently"):
            exporter.export(given)
        assert list(tmp_path.iterdir()) == []


def test_one_flipped_bit_in_a_convolutional_network_fails_the_receipt(tmp_path: Path) -> None:
    given, exporter = cnn_job(quantized_cnn(SmallCnn()), tmp_path), FirstByte(latency_repeats=0)
    targets = {"inner.codes": "inner", "inner.scales": "inner", "inner.bias_codes": "inner.bias"}
    targets |= {"classifier.bias_scales": "classifier.bias"}
    targets |= {"on_grid.inner.scale": "on_grid.inner", "on_grid.inner.zero_point": "on_grid.inner"}
    for exporter.target, named in targets.items():
        with pytest.raises(ReceiptFailed, match=f"tensor {named} decodes differently"):
            exporter.export(given)
        assert list(tmp_path.iterdir()) == []


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    path = Path(QUICK.export(cnn_job(quantized_cnn(SmallCnn()), tmp_path))["path"])
    file = onnx.load(path)
    metadata = {p.key: p.value for p in file.metadata_props}
    grids = json.loads(metadata["qtrain.grids"])
    assert file.ir_version == 10 and metadata["qtrain.profile"] == "x86"
    assert grids["grids"][grids["tensors"]["on_grid.inner"]]["rule"] == "minmax_onnx"
    assert "VNNI" in (path.parent / "README.md").read_text() and "QuantizeLinear" in (path.parent / "README.md").read_text()


def test_weights_and_embeddings_are_a_quarter(tmp_path: Path) -> None:
    model = quantized(Small(1024, 512), Int8(), Int8(), Int8Activation())
    entry = QUICK.export(job(model, tmp_path, float_model=Small(1024, 512).eval()))
    assert entry["bytes"] < 0.27 * entry["receipt"]["float_bytes"]


def test_a_large_file_uses_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.onnx import write

    monkeypatch.setattr(write, "PROTOBUF_LIMIT", 1000)
    for model, made in ((static_bert(), job), (quantized_cnn(SmallCnn()), cnn_job)):
        entry = QUICK.export(made(model, tmp_path))
        assert entry["receipt"]["passed"] and (tmp_path / "onnx" / "model.onnx.data").exists()


def test_opsets(tmp_path: Path) -> None:
    for opset in (22, 23):
        for model, made in ((static_bert(), job), (quantized_cnn(SmallCnn()), cnn_job)):
            path = Path(OnnxExport(opset=opset, latency_repeats=0).export(made(model, tmp_path))["path"])
            assert {o.domain: o.version for o in onnx.load(path).opset_import}[""] == opset
