"""The TensorRT exporter: what it writes, what its receipt says, and what it refuses; on a BERT-like and a convolutional network."""

from __future__ import annotations

import json
import subprocess
import sys
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

from exporters.base import Artefact, ExportJob, ReceiptFailed
from exporters.tensorrt import TensorrtExport
from qtrain import registry
from qtrain.activations import calibrate
from qtrain.grids.affine import Affine
from qtrain.prepare import convert, prepare
from qtrain.targets import select

from .small import Small, accuracy, batches, job, logits_of, quantized

W8 = Affine(bits=8, granularity="channel")
A8 = Affine(bits=8, rule="absmax_onnx", granularity="tensor")
QUICK = TensorrtExport(runtime="onnxruntime")


def static(model: nn.Module, weight: Affine = W8, embedding: Affine | None = W8, activation: Affine = A8) -> nn.Module:
    """Everything but the classifier on a grid, activations calibrated."""
    modules, _ = select(model.eval(), ["*"], ["classifier"])
    prepare(model, modules, weight, embedding, activation, True)
    calibrate(model, [inputs for inputs, _ in batches()])
    return convert(model)


def bert() -> nn.Module:
    """A BERT of two layers, not quantized."""
    from transformers import BertConfig, BertForSequenceClassification, set_seed

    set_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=37, num_labels=3, **sizes)).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(20)  # logits of an untrained classifier are all but zero
    return model


class Cnn(nn.Module):
    """A residual block with a shortcut convolution, pooled; logits [batch, 10]."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.BatchNorm2d(32)
        self.shortcut = nn.Conv2d(16, 32, 1, stride=2)
        self.classifier = nn.Linear(32, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(pixel_values))), 2)
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.classifier(F.adaptive_avg_pool2d(F.relu(y + self.shortcut(x)), 1).flatten(1))


def images() -> list[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 5, 6)
    return [
        ({"pixel_values": torch.randn(n, 3, 16, 16, generator=generator)}, torch.randint(0, 10, (n,), generator=generator)) for n in sizes
    ]


def quantized_cnn() -> nn.Module:
    """Traced, batch-norms folded, every value on a static grid."""
    from qtrain import graph

    model = Cnn()
    for inputs, _ in images():
        model(**inputs)
    traced = graph.trace(model.eval())
    graph.fold_batch_norms(traced, graph.batch_norms(traced))
    modules, _ = select(traced, ["*"], [])
    prepare(traced, modules, W8, None, None, False)
    graph.put_on_edges(traced, A8, {"kind": "minmax"})
    calibrate(traced, [inputs for inputs, _ in images()])
    return convert(traced)


def image_job(model: nn.Module, folder: Path) -> ExportJob:
    data = images()
    with torch.no_grad():
        logits = torch.cat([model(**inputs) for inputs, _ in data])
    example = {n: x[:2] for n, x in data[0][0].items()}
    return ExportJob(model, example, data, logits, accuracy, folder, max_length=0, vocab_size=0)


def nodes(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, dict[str, Any]]:
    """A BERT with static int8 activations, and its entry."""
    model = static(bert())
    folder = tmp_path_factory.mktemp("bert")
    return folder / "tensorrt", model, TensorrtExport().export(job(model, folder))


@pytest.fixture(scope="module")
def exported_cnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, dict[str, Any]]:
    model = quantized_cnn()
    folder = tmp_path_factory.mktemp("cnn")
    return folder / "tensorrt", model, TensorrtExport().export(image_job(model, folder))


# -- a transformer -------------------------------------------------------------------------------------------------------


def test_the_receipt_of_a_transformer(exported: Any) -> None:
    _, _, entry = exported
    receipt = entry["receipt"]
    assert receipt["passed"] and receipt["failures"] == [] and entry["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    assert receipt["tensors"] == receipt["tensors_bit_exact"] == 16 + 13  # weights and activations
    assert receipt["layers"] == 13 and receipt["layers_nmse"] < 1e-12  # products of codes are typed float32: no rounding but their own
    assert receipt["logits_nmse"] < 1e-3 and receipt["top1_agreement"] == 1.0


def test_every_check_says_what_it_did(exported: Any) -> None:
    checks = exported[2]["receipt"]["checks"]
    assert set(checks) >= {
        "precision",
        "onnx_checker",
        "shape_inference",
        "qdq_lint",
        "fp16_parity",
        "packed_tensors",
        "rtx_compile",
        "engine",
    }
    for name in ("onnx_checker", "shape_inference", "qdq_lint", "fp16_parity", "packed_tensors"):
        assert checks[name].startswith("passed: "), checks[name]
    assert "rtol=0.005" in checks["fp16_parity"] and "every float16 tensor rounded" in checks["fp16_parity"]
    if not torch.cuda.is_available():
        assert checks["engine"].startswith("not built: ") and "no CUDA GPU" in checks["engine"]
    if checks["rtx_compile"].startswith("passed"):
        assert "9 products on int8" in checks["rtx_compile"] and "it was not run" in checks["rtx_compile"]  # q, k and v are one
    else:
        assert checks["rtx_compile"].startswith("not run: no package tensorrt_rtx")


def test_what_stays_in_float32_is_listed_with_what_was_seen(exported: Any) -> None:
    fallbacks = exported[2]["receipt"]["fallbacks"]
    kept = {f["why"].split(" ")[0]: f for f in fallbacks if "stays in float32" in f["why"]}
    assert set(kept) == {"Where", "Add", "Softmax"} and len(kept["Softmax"]["name"].split(", ")) == 2
    assert all("3.403e+38" in f["why"] for f in kept.values())  # the attention mask


def test_the_file_is_strictly_typed_and_standard(exported: Any) -> None:
    path = exported[0] / "model.onnx"
    model = onnx.load(path)
    assert model.ir_version <= 10 and {o.domain: o.version for o in model.opset_import} == {"": 21}
    assert all(n.domain == "" for n in model.graph.node) and not any(n.metadata_props or n.doc_string for n in model.graph.node)
    ops = nodes(path)
    assert ops["QuantizeLinear"] == 13 and ops["DequantizeLinear"] == 13 + 16
    kinds = Counter(i.data_type for i in model.graph.initializer)
    assert kinds[onnx.TensorProto.FLOAT16] > 0 and kinds[onnx.TensorProto.INT8] == 16 + 13  # codes and zero points
    assert [(o.name, o.type.tensor_type.elem_type) for o in model.graph.output] == [("logits", onnx.TensorProto.FLOAT)]
    names = {n.name for n in model.graph.node}
    assert {"bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.query.activation_fake.quantize"} <= names
    metadata = {p.key: p.value for p in model.metadata_props}
    assert "qtrain.grids" in metadata and "qtrain.session_config" not in metadata


def test_embeddings_are_codes_behind_a_dequantizer(exported: Any) -> None:
    """TensorRT gathers no int8: codes, DequantizeLinear, Gather."""
    graph = onnx.load(exported[0] / "model.onnx").graph
    makers = {n.output[0]: n for n in graph.node}
    gathers = [n for n in graph.node if n.op_type == "Gather" and makers.get(n.input[0]) is not None]
    tables = [makers[n.input[0]] for n in gathers if makers[n.input[0]].op_type in ("DequantizeLinear", "Cast")]
    assert len(tables) == 3


def test_all_files_are_there(exported: Any) -> None:
    folder, _, entry = exported
    names = ["README.md", "build_engine.py", "build_engine.sh", "engine.json", "model.onnx", "receipt.json", "reference.npz"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    assert json.loads((folder / "receipt.json").read_text()) == entry
    assert entry["bytes"] == (folder / "model.onnx").stat().st_size
    with np.load(folder / "reference.npz") as stored:
        assert set(stored) == {"input.input_ids", "input.attention_mask", "training", "onnxruntime"} and len(stored["training"]) == 4
        assert np.abs(stored["training"] - stored["onnxruntime"]).max() < 0.1


def test_the_profile_has_every_dynamic_axis(exported: Any) -> None:
    settings = json.loads((exported[0] / "engine.json").read_text())
    shapes = {"min": [1, 1], "opt": [8, 64], "max": [32, 64]}
    assert settings["profile"] == {"input_ids": shapes, "attention_mask": shapes}


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 3), (3, 33)])
def test_axes_are_dynamic(exported: Any, shape: tuple[int, int]) -> None:
    folder, model, _ = exported
    mask = torch.ones(shape, dtype=torch.int64)
    mask[0, (shape[1] + 1) // 2 :] = 0
    data = [({"input_ids": torch.randint(0, 37, shape), "attention_mask": mask}, torch.zeros(shape[0]))]
    error = (QUICK.logits(folder / "model.onnx", data) - logits_of(model, data)).abs().max()
    assert error < 0.1


# -- a convolutional network -----------------------------------------------------------------------------------------------


def test_the_receipt_of_a_convolutional_network(exported_cnn: Any) -> None:
    folder, _, entry = exported_cnn
    receipt = entry["receipt"]
    assert receipt["passed"] and receipt["tensors"] == receipt["tensors_bit_exact"] > 10
    assert receipt["logits_nmse"] < 1e-9  # all of it on codes: nothing is float16
    checks = receipt["checks"]
    assert checks["qdq_lint"].startswith("passed") and ", 0 casts" in checks["precision"]
    if checks["rtx_compile"].startswith("passed"):
        assert "5 products on int8" in checks["rtx_compile"]
    assert json.loads((folder / "engine.json").read_text())["profile"] == {
        "pixel_values": {"min": [1, 3, 16, 16], "opt": [8, 3, 16, 16], "max": [32, 3, 16, 16]}
    }


def test_biases_stay_in_float_and_weights_are_per_channel(exported_cnn: Any) -> None:
    graph = onnx.load(exported_cnn[0] / "model.onnx").graph
    constants = {i.name: i for i in graph.initializer}
    convolutions = [n for n in graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 4
    for node in convolutions:
        assert constants[node.input[2]].data_type == onnx.TensorProto.FLOAT
        assert list(constants[f"{node.name}.scales"].dims) == [constants[f"{node.name}.codes"].dims[0]]
    for name, constant in constants.items():
        if name.startswith("on_grid.") and name.endswith(".scale"):
            assert list(constant.dims) == []  # TensorRT-RTX does not fuse a vector of one


def test_advice_is_listed_by_layer(exported_cnn: Any) -> None:
    why = {f["name"]: f["why"] for f in exported_cnn[2]["receipt"]["fallbacks"]}
    assert "gemv" in why["classifier"] and "channels" in why["stem"]


# -- weights alone, and options ----------------------------------------------------------------------------------------------


def int4(**changes: Any) -> Affine:
    return Affine(**{"bits": 4, "group_size": 64, **changes})


@pytest.mark.parametrize(
    ("grid", "kind", "scales"),
    [
        (int4(), onnx.TensorProto.INT4, onnx.TensorProto.FLOAT),
        (int4(scale_dtype="float16"), onnx.TensorProto.INT4, onnx.TensorProto.FLOAT16),
        (int4(group_size=128), onnx.TensorProto.INT4, onnx.TensorProto.FLOAT),
        (int4(granularity="channel"), onnx.TensorProto.INT4, onnx.TensorProto.FLOAT),
        (Affine(bits=3, granularity="channel"), onnx.TensorProto.INT4, onnx.TensorProto.FLOAT),
        (W8, onnx.TensorProto.INT8, onnx.TensorProto.FLOAT),
        (Affine(bits=5, granularity="tensor", scale_dtype="float16"), onnx.TensorProto.INT8, onnx.TensorProto.FLOAT16),
    ],
)
def test_weights_alone(grid: Affine, kind: int, scales: int, tmp_path: Path) -> None:
    model = quantized(Small(128), grid, W8)
    receipt = QUICK.export(job(model, tmp_path))["receipt"]
    assert receipt["passed"] and receipt["tensors_bit_exact"] == 2 and receipt["layers"] == 0
    constants = {i.name: i.data_type for i in onnx.load(tmp_path / "tensorrt" / "model.onnx").graph.initializer}
    assert constants["inner.codes"] == kind and constants["inner.scales"] == scales


def test_precision_fp32_keeps_everything_in_float32(tmp_path: Path) -> None:
    receipt = TensorrtExport(precision="fp32", runtime="onnxruntime").export(job(static(Small()), tmp_path))["receipt"]
    assert receipt["checks"]["fp16_parity"] == "not run: precision=fp32" and receipt["logits_nmse"] < 1e-9
    assert not any(i.data_type == onnx.TensorProto.FLOAT16 for i in onnx.load(tmp_path / "tensorrt" / "model.onnx").graph.initializer)


class Twice(Small):
    """Calls one Linear twice, and ends in a quantized one, whose output is the graph's."""

    def __init__(self) -> None:
        super().__init__(width=32, hidden=32)
        self.last = nn.Linear(32, 3, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = (self.embedding(input_ids) + self.embedding(input_ids.roll(1, 1))) * attention_mask.unsqueeze(-1)
        return {"logits": self.last(self.inner(torch.relu(self.inner(x.mean(1)))))}


def test_a_layer_called_twice_is_written_once(tmp_path: Path) -> None:
    receipt = QUICK.export(job(static(Twice()), tmp_path))["receipt"]
    assert receipt["passed"] and receipt["tensors"] == receipt["tensors_bit_exact"] == 5
    file = onnx.load(tmp_path / "tensorrt" / "model.onnx")
    assert [o.name for o in file.graph.output] == ["logits"]
    assert sum(i.name.endswith(".codes") for i in file.graph.initializer) == 3


def test_a_smoothed_input_is_part_of_its_layer(tmp_path: Path) -> None:
    from qtrain.layers import SmoothedLinear

    model = Small()
    model.inner = SmoothedLinear(model.inner, torch.linspace(0.5, 2.0, 96))
    receipt = QUICK.export(job(static(model), tmp_path))["receipt"]
    assert receipt["passed"] and receipt["layers"] == 1 and receipt["layers_nmse"] < 1e-12


def test_a_large_file_uses_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.onnx import write

    monkeypatch.setattr(write, "PROTOBUF_LIMIT", 1000)
    entry = QUICK.export(job(static(Small()), tmp_path))
    folder = tmp_path / "tensorrt"
    assert (folder / "model.onnx.data").exists() and entry["receipt"]["passed"]
    assert entry["bytes"] == sum((folder / n).stat().st_size for n in ("model.onnx", "model.onnx.data"))


@pytest.mark.parametrize(
    ("option", "type_this"),
    [
        ({"precision": "bf16"}, "precision=fp16"),
        ({"runtime": "cuda"}, "runtime=auto"),
        ({"opt_batch": 64}, "max_batch=32"),
        ({"min_batch": 0}, "max_batch=32"),
        ({"data_max": 0.0}, "data_max=512"),
        ({"workspace_gib": -1.0}, "workspace_gib=4"),
        ({"rtol": -1.0}, "rtol=0.005"),
        ({"timing_cache": "/tmp/cache"}, "timing_cache=timing.cache"),
    ],
)
def test_a_bad_option_says_what_to_type(option: dict[str, Any], type_this: str) -> None:
    with pytest.raises(ValueError, match=rf"export\.tensorrt\.{type_this}"):
        TensorrtExport(**option)


def test_sequence_lengths_must_fit_the_model(tmp_path: Path) -> None:
    assert TensorrtExport().lengths(512) == (1, 64, 512) and TensorrtExport().lengths(48) == (1, 48, 48)
    with pytest.raises(ValueError, match=r"export\.tensorrt\.max_length=64"):
        TensorrtExport(max_length=100, runtime="onnxruntime").export(job(static(Small()), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_dynamic_axis_without_a_range_is_named() -> None:
    import onnx_ir as ir

    value = ir.Value(name="audio", shape=ir.Shape(["batch", "frames"]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([value], [], nodes=[], opset_imports={"": 21})
    with pytest.raises(ValueError, match="audio has the dynamic axis frames"):
        QUICK.ranges(ir.Model(graph, ir_version=10), 64)


# -- refusals ------------------------------------------------------------------------------------------------------------


REFUSED: list[tuple[Affine, Affine | None, Affine | None, list[str]]] = [
    (Affine(bits=8, rule="minmax", granularity="channel"), W8, None, ["zero points", "quantizer.weight.rule=absmax"]),
    (Affine(bits=4, rule="signed_absmax"), W8, None, ["have a sign", "quantizer.weight.rule=absmax"]),
    (Affine(bits=4, rule="mse", granularity="channel"), W8, None, ["have a sign", "rule=absmax"]),
    (Affine(bits=4), W8, None, ["64 or 128", "quantizer.weight.group_size=64"]),
    (Affine(bits=8, group_size=64), W8, None, ["4-bit", "quantizer.weight.granularity=channel"]),
    (W8, Affine(bits=8, rule="minmax", granularity="channel"), None, ["quantizer.embedding.rule=absmax"]),
    (W8, Affine(bits=4, group_size=64), None, ["Linears only", "quantizer.embedding.granularity=channel"]),
    (W8, W8, Affine(bits=8, rule="minmax_onnx", granularity="tensor"), ["quantizer.activation.rule=absmax_onnx"]),
    (W8, W8, Affine(bits=8, rule="absmax", granularity="tensor"), ["quantizer.activation.rule=absmax_onnx"]),
    (W8, W8, Affine(bits=7, rule="absmax_onnx", granularity="tensor"), ["quantizer.activation.bits=8"]),
    (int4(), W8, A8, ["float activations only", "quantizer.activation=null"]),
]


@pytest.mark.parametrize(("weight", "embedding", "activation", "says"), REFUSED)
def test_a_refusal_names_the_layer_the_reason_and_what_to_type(
    weight: Affine, embedding: Affine | None, activation: Affine | None, says: list[str], tmp_path: Path
) -> None:
    model = quantized(Small(128), weight, embedding) if activation is None else static(Small(128), weight, embedding, activation)
    (message,) = QUICK.refusals(model)
    assert message.startswith(("inner (", "embedding ("))
    for text in says:
        assert text in message
    with pytest.raises(ValueError, match="export=tensorrt cannot hold 1 of"):
        QUICK.export(job(model, tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_dynamic_activations_are_refused(granularity: str) -> None:
    model = quantized(Small(), W8, W8, Affine(bits=8, rule="absmax_onnx", granularity=granularity))
    (message,) = QUICK.refusals(model)
    assert "quantizer.activation_range=static" in message and ("granularity=tensor" in message) == (granularity == "token")


def test_activations_on_edges_are_refused_by_name() -> None:
    model = quantized_cnn()
    from dataclasses import replace

    activation = model.get_submodule("on_grid.pixel_values")
    activation.grid = replace(A8, rule="minmax_onnx")
    (message,) = QUICK.refusals(model)
    assert message.startswith("on_grid.pixel_values") and "absmax_onnx" in message


def test_a_half_precision_model_is_refused() -> None:
    model = quantized(Small(), W8, W8).to(torch.bfloat16)
    assert any("float32" in m and "classifier.weight" in m for m in QUICK.refusals(model))


# -- what is wrong is found, and leaves nothing ------------------------------------------------------------------------------


class Corrupting(TensorrtExport):
    """Flips one bit of a constant after the file was written and checked."""

    registered_name = "tensorrt"
    target = ""

    def write(self, job: ExportJob, folder: Path) -> Any:
        artefact: Artefact = super().write(job, folder)
        file = onnx.load(artefact.path)
        tensor = next(i for i in file.graph.initializer if i.name == self.target)
        data = bytearray(tensor.raw_data)
        data[0] ^= 1
        tensor.raw_data = bytes(data)
        onnx.save(file, artefact.path)
        return artefact


@pytest.mark.parametrize(
    ("target", "named"),
    [("inner.codes", "inner"), ("embedding.scales", "embedding"), ("inner.activation_fake.scale", "inner.activation_fake")],
)
def test_one_flipped_bit_fails_the_receipt_and_leaves_nothing(target: str, named: str, tmp_path: Path) -> None:
    exporter = Corrupting(runtime="onnxruntime")
    exporter.target = target
    with pytest.raises(ReceiptFailed, match=rf"tensor {named} decodes differently") as failure:
        exporter.export(job(static(Small()), tmp_path))
    checks = failure.value.entry["receipt"]["checks"]
    assert checks["packed_tensors"].startswith("failed") and checks["engine"].startswith("not built")
    assert list(tmp_path.iterdir()) == []


def test_logits_beyond_the_tolerance_fail_with_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(
        ReceiptFailed, match=r"fp16_parity: .* logits are beyond rtol=0 and atol=1e-08.*export\.tensorrt\.data_max=64"
    ) as failure:
        TensorrtExport(rtol=0.0, atol=1e-8, runtime="onnxruntime").export(job(quantized(Small(), W8, W8), tmp_path))
    assert failure.value.entry["receipt"]["checks"]["fp16_parity"].startswith("failed")
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_float16_stay_in_float32_and_parity_holds(tmp_path: Path) -> None:
    """Without data_max the network would overflow: hidden values of 1e6."""
    model = Small()
    with torch.no_grad():
        model.inner.weight.mul_(1e6)
        model.classifier.weight.mul_(1e-6)
    model = quantized(model, W8, W8)
    receipt = QUICK.export(job(model, tmp_path))["receipt"]
    assert receipt["passed"] and any("beyond data_max" in f["why"] for f in receipt["fallbacks"])
    with pytest.raises(ReceiptFailed, match="fp16_parity"):
        TensorrtExport(data_max=1e30, runtime="onnxruntime").export(job(model, tmp_path))


def test_ctrl_c_leaves_nothing_and_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    model = static(Small())
    given = job(model, tmp_path)
    for place in ("torch.onnx.export", "onnx.checker.check_model", "exporters.tensorrt.scripts.write_beside"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                QUICK.export(given)
        assert list(tmp_path.iterdir()) == []
    assert QUICK.runtime == "onnxruntime" and torch.equal(logits_of(model, given.batches), given.training_logits)


def test_a_layer_that_the_model_never_calls_is_named(tmp_path: Path) -> None:
    model = Small()
    model.spare = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"keep_float=\[spare\]"):
        QUICK.export(job(quantized(model, W8, W8), tmp_path))


def test_registering_it_imports_no_heavy_package() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'numpy', 'tensorrt'}"
    code = f"import sys; from qtrain import registry; registry.entries('export'); sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert registry.get("export", "tensorrt") is TensorrtExport
