"""The ONNX exporter: every grid that it holds, in every storage, bit-exact in onnxruntime; and what it does when anything is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from exporters.base import Artefact, ExportJob, ReceiptFailed, packed_layers
from exporters.onnx import STORAGES, OnnxExport
from qtrain import registry
from qtrain.activations import calibrate
from qtrain.grids.affine import Affine
from qtrain.prepare import prepare
from qtrain.receipt import nmse

from .small import Small, batches, job, logits_of, quantized

GROUPED = [Affine(bits=b, rule="signed_absmax") for b in range(2, 9)]
GROUPED += [Affine(bits=b, rule="minmax", group_size=g) for b, g in ((2, 32), (3, 16), (4, 32), (8, 16))]
GROUPED += [
    Affine(rule="absmax", group_size=96),
    Affine(rule="mse", group_size=48),
    Affine(bits=8, rule="absmax_half", group_size=16, scale_dtype="float16"),
    Affine(rule="signed_absmax", scale_dtype="bfloat16"),
]
ROWS = [
    Affine(bits=b, rule=r, granularity=g)
    for b, r, g in ((4, "absmax", "channel"), (8, "minmax", "channel"), (2, "mse", "tensor"), (8, "absmax", "tensor"))
]
SHORT = [Affine(rule="signed_absmax", remainder="short"), Affine(bits=8, rule="minmax", group_size=64, remainder="short")]
QUICK = OnnxExport(latency_repeats=0)
MLAS = Affine(bits=8, rule="absmax_mlas")


MATRIX = [(g, 96) for g in GROUPED] + [(g, 33) for g in ROWS] + [(g, 80) for g in SHORT]


class Many(nn.Module):
    """One small model per entry of the matrix, so that one trace tries all grids; the logits are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleDict({f"{g.describe()} {w}".replace(" ", "_"): Small(w, seed=i) for i, (g, w) in enumerate(MATRIX)})

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": torch.stack([m(input_ids, attention_mask)["logits"] for m in self.each.values()]).sum(0)}


def initializer_names(path: Path) -> set[str]:
    return {i.name for i in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("weights", STORAGES)
def test_every_grid_is_bit_exact_in_every_storage(weights: str, tmp_path: Path) -> None:
    """Each grid holds an embedding and a Linear; a failure names the layer, which is named after its grid."""
    model = Many()
    for part, (grid, _) in zip(model.each.values(), MATRIX, strict=True):
        quantized(part, grid, grid)
    receipt = OnnxExport(weights=weights, fuse=False, latency_repeats=0).export(job(model.eval(), tmp_path))["receipt"]
    assert receipt["passed"] and receipt["tensors"] == receipt["tensors_bit_exact"] == 2 * len(MATRIX)
    assert receipt["logits_nmse"] < 1e-11


@pytest.mark.parametrize("grid", [Affine(rule="signed_absmax"), Affine(bits=8, granularity="channel")], ids=["blocks", "rows"])
def test_an_embedding_that_multiplies_its_rows(grid: Affine, tmp_path: Path) -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    model = Small()
    model.embedding = BartScaledWordEmbedding(*model.embedding.weight.shape, 1, embed_scale=9.8)
    receipt = QUICK.export(job(quantized(model, Affine(), grid), tmp_path))["receipt"]
    assert receipt["passed"] and receipt["tensors"] == receipt["tensors_bit_exact"] == 2 and receipt["logits_nmse"] < 1e-11


@pytest.mark.parametrize("weights", STORAGES)
def test_codes_are_found_by_their_layers_name_and_no_float_weight_is_left(weights: str, tmp_path: Path) -> None:
    model = quantized(Small(), Affine(), Affine(bits=8, granularity="channel"))
    path = Path(OnnxExport(weights=weights, latency_repeats=0).export(job(model, tmp_path))["path"])
    assert {"embedding.codes", "embedding.scales", "inner.codes", "inner.scales"} <= initializer_names(path)
    sizes = {i.name: int(np.prod(i.dims)) for i in onnx.load(path).graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    assert max(sizes.values()) <= 45 * 3  # the classifier, which stays in float


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    model = quantized(Small(), Affine(rule="signed_absmax"), Affine(bits=8, granularity="channel"))
    path = Path(QUICK.export(job(model, tmp_path, metadata={"recipe": "r"}))["path"])
    file = onnx.load(path)
    assert file.ir_version == 10
    assert {o.domain: o.version for o in file.opset_import} == {"": 21, "com.microsoft": 1}
    assert not any(n.domain == "qtrain" for n in file.graph.node)
    metadata = {p.key: p.value for p in file.metadata_props}
    grids = json.loads(metadata["qtrain.grids"])
    assert metadata["recipe"] == "r" and metadata["qtrain.version"]
    assert grids["grids"][grids["tensors"]["inner"]] == Affine(rule="signed_absmax").spec()
    assert "qdq_matmulnbits_accuracy_level" in metadata["qtrain.session_config"]
    assert not any(n.metadata_props or n.doc_string for n in file.graph.node)  # no paths of the machine that wrote it
    assert "qdq_matmulnbits_accuracy_level" in (path.parent / "README.md").read_text()


@pytest.mark.parametrize("opset", [22, 23])
def test_later_opsets(opset: int, tmp_path: Path) -> None:
    model = quantized(Small(), Affine(), Affine(bits=8, granularity="channel"))
    path = Path(OnnxExport(opset=opset, latency_repeats=0).export(job(model, tmp_path))["path"])
    assert {o.domain: o.version for o in onnx.load(path).opset_import}[""] == opset


def test_the_model_is_given_back_as_it_was(tmp_path: Path) -> None:
    model = quantized(Small(), Affine(), Affine(bits=8, granularity="channel"))
    before = {n: type(m) for n, m in model.named_modules()}
    given = job(model, tmp_path)
    QUICK.export(given)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert torch.equal(logits_of(model, given.batches), given.training_logits)


class Twice(Small):
    """Calls one Linear twice, and ends in a quantized one, whose output is the graph's."""

    def __init__(self) -> None:
        super().__init__(width=32, hidden=32)
        self.last = nn.Linear(32, 3, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = (self.embedding(input_ids) + self.embedding(input_ids.roll(1, 1))) * attention_mask.unsqueeze(-1)
        return {"logits": self.last(self.inner(torch.relu(self.inner(x.mean(1)))))}


@pytest.mark.parametrize("weights", STORAGES)
def test_a_layer_called_twice_is_written_once(weights: str, tmp_path: Path) -> None:
    model = quantized(Twice(), Affine(), Affine(group_size=16))
    receipt = OnnxExport(weights=weights, latency_repeats=0).export(job(model, tmp_path))["receipt"]
    assert receipt["tensors"] == receipt["tensors_bit_exact"] == 3
    onnx_file = onnx.load(tmp_path / "onnx" / "model.onnx")
    assert [o.name for o in onnx_file.graph.output] == ["logits"]
    assert sum(i.name.endswith(".codes") for i in onnx_file.graph.initializer) == 3


def test_a_wide_layer_is_decoded_in_pieces(tmp_path: Path) -> None:
    for rule in ("signed_absmax", "minmax"):
        model = quantized(Small(width=1024 + 512 + 32, hidden=5), Affine(bits=2, rule=rule, group_size=32), Affine(group_size=16))
        assert QUICK.export(job(model, tmp_path))["receipt"]["tensors_bit_exact"] == 2


# -- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "rule", "group"), [(4, "signed_absmax", 16), (4, "minmax", 32), (8, "absmax", 32), (2, "signed_absmax", 32), (4, "absmax", 64)]
)
def test_int8_activations_are_computed_on_training_s_grid(bits: int, rule: str, group: int, tmp_path: Path) -> None:
    model = quantized(
        Small(128), Affine(bits=bits, rule=rule, group_size=group), None, Affine(bits=8, rule="absmax_mlas", group_size=group)
    )
    receipt = QUICK.export(job(model, tmp_path))["receipt"]
    assert receipt["passed"] and receipt["layers"] == 1 and receipt["layers_nmse"] < 1e-7
    node = next(n for n in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node if n.op_type == "MatMulNBits")
    assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 4


def test_a_finer_activation_group_sets_the_block(tmp_path: Path) -> None:
    model = quantized(Small(96), Affine(granularity="channel"), None, MLAS)
    assert QUICK.export(job(model, tmp_path))["receipt"]["layers_nmse"] < 1e-7


@pytest.mark.parametrize("weights", STORAGES)
def test_float_activations_stay_float(weights: str, tmp_path: Path) -> None:
    """onnxruntime would quantize those of dequantize_linear by itself; 256 columns and groups of 32 trigger it."""
    model = quantized(Small(256, 128), Affine(), Affine(bits=8, granularity="channel"))
    given = job(model, tmp_path)
    entry = OnnxExport(weights=weights, latency_repeats=0).export(given)
    assert entry["receipt"]["logits_nmse"] < 1e-11
    assert all(a.i == 0 for n in onnx.load(entry["path"]).graph.node for a in n.attribute if a.name == "accuracy_level")


# -- refusals --------------------------------------------------------------------------------------------------------

ROW8 = Affine(bits=8, granularity="channel")
REFUSED = [
    (
        Affine(group_size=24),
        ROW8,
        None,
        "matmul_nbits",
        ["inner (int4 g24 absmax)", "not 24", "quantizer.weight.group_size=32", "weights=unpack"],
    ),
    (Affine(group_size=12), None, None, "matmul_nbits", ["quantizer.weight.group_size=16"]),
    (Affine(), Affine(group_size=24), None, "unpack", ["embedding (int4 g24", "not 24", "quantizer.embedding.group_size=32"]),
    (
        Affine(),
        None,
        Affine(bits=8, granularity="token"),
        "matmul_nbits",
        ["int8 per-token absmax", "rule=absmax_mlas", "group_size=32", "int8_activation", "activation=null"],
    ),
    (Affine(), None, MLAS, "dequantize_linear", ["weights=dequantize_linear would compute in float", "export.onnx.weights=matmul_nbits"]),
    (Affine(), None, MLAS, "unpack", ["export.onnx.weights=matmul_nbits"]),
    (
        Affine(group_size=16),
        None,
        MLAS,
        "matmul_nbits",
        ["groups of 32", "quantizer.weight.group_size=32", "quantizer.activation.group_size=16"],
    ),
    (Affine(bits=2, group_size=16), None, Affine(bits=8, rule="absmax_mlas", group_size=16), "matmul_nbits", ["2-bit", "group_size=32"]),
]


@pytest.mark.parametrize(("weight", "embedding", "activation", "weights", "says"), REFUSED)
def test_a_refusal_names_the_layer_the_reason_and_what_to_type(
    weight: Affine, embedding: Affine | None, activation: Affine | None, weights: str, says: list[str], tmp_path: Path
) -> None:
    model = quantized(Small(), weight, embedding, activation)
    exporter = OnnxExport(weights=weights)
    (message,) = exporter.refusals(model)
    for text in says:
        assert text in message
    with pytest.raises(ValueError, match="export=onnx cannot hold 1 of"):
        exporter.export(job(model, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_static_range_is_refused() -> None:
    model = Small().eval()
    prepare(model, {"inner": model.inner}, Affine(), None, Affine(bits=8, granularity="tensor"), static=True)
    calibrate(model, [inputs for inputs, _ in batches()])
    from qtrain.prepare import convert

    (message,) = OnnxExport().refusals(convert(model))
    assert "static" in message and "activation_range=dynamic" in message


def test_a_half_precision_model_is_refused() -> None:
    model = quantized(Small(), Affine(), ROW8).to(torch.bfloat16)
    assert any("float32" in m and "classifier.weight" in m for m in OnnxExport().refusals(model))


@pytest.mark.parametrize(
    ("option", "type_this"), [({"weights": "int4"}, "weights=unpack"), ({"opset": 20}, "opset=21"), ({"latency_length": 0}, "latency")]
)
def test_a_bad_option_says_what_to_type(option: dict[str, Any], type_this: str) -> None:
    with pytest.raises(ValueError, match=type_this):
        OnnxExport(**option)


# -- nothing is left when anything fails -----------------------------------------------------------------------------


class Corrupting(OnnxExport):
    """Flips one bit of an initializer after the file was written (the first write is kept, to trace once)."""

    registered_name = "onnx"
    target = ""
    position = 7
    """Of the byte that is changed."""
    kept: bytes = b""

    def write(self, job: ExportJob, folder: Path) -> Artefact:
        path = folder / "model.onnx"
        if not self.kept:
            self.kept = super().write(job, folder).path.read_bytes()
        file = onnx.load_from_string(self.kept)
        tensor = next(i for i in file.graph.initializer if i.name == self.target)
        data = bytearray(tensor.raw_data)
        data[self.position] ^= 1
        tensor.raw_data = bytes(data)
        onnx.save(file, path)
        return Artefact(path, [path])


@pytest.mark.parametrize("weights", STORAGES)
def test_one_flipped_bit_fails_the_receipt_and_leaves_nothing(weights: str, tmp_path: Path) -> None:
    model = quantized(Small(), Affine(), Affine(group_size=32))
    exporter = Corrupting(weights=weights, fuse=False, latency_repeats=0)
    for layer in ("inner", "embedding"):
        for part in ("codes", "scales"):
            exporter.target = f"{layer}.{part}"
            with pytest.raises(ReceiptFailed, match=f"tensor {layer} decodes differently") as failure:
                exporter.export(job(model, tmp_path))
            assert failure.value.entry["receipt"]["tensors_bit_exact"] == 1
            assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_and_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    model = quantized(Small(), Affine(), ROW8)
    given = job(model, tmp_path)
    for place in ("torch.onnx.export", "onnx.checker.check_model", "exporters.onnx.runtime.logits"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                QUICK.export(given)
        assert list(tmp_path.iterdir()) == []
    assert len(packed_layers(model)) == 2


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk: a write beyond it fails as ENOSPC does."""
    code = f"""
        import resource, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent.parent.parent)!r})
        from tests.exporters.small import Small, job, quantized
        from exporters.onnx import OnnxExport
        from qtrain.grids.affine import Affine
        model = quantized(Small(2048, 512), Affine(), Affine(bits=8, granularity="channel"))
        given = job(model, Path({str(tmp_path)!r}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            OnnxExport(latency_repeats=0).export(given)
        except OSError as error:
            sys.exit(3)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


# -- a transformer: fusion, float beside it, dynamic axes ------------------------------------------------------------


def bert(activation: Affine | None = None) -> tuple[nn.Module, nn.Module]:
    """A float BERT of two layers and a quantized copy."""
    import copy

    from transformers import BertConfig, BertForSequenceClassification, set_seed

    set_seed(0)
    config = BertConfig(
        vocab_size=37,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=3,
        max_position_embeddings=64,
    )
    plain = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        plain.classifier.weight.mul_(20)  # logits of an untrained classifier are all but zero
    return plain, quantized(copy.deepcopy(plain), Affine(rule="signed_absmax"), Affine(bits=8, granularity="channel"), activation)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, nn.Module, dict[str, Any]]:
    plain, model = bert()
    folder = tmp_path_factory.mktemp("bert")
    entry = OnnxExport(latency_repeats=2, latency_length=16).export(job(model, folder, float_model=plain))
    return folder / "onnx", plain, model, entry


def test_a_transformer_is_fused_and_timed_beside_its_float_self(exported: Any) -> None:
    folder, _, _, entry = exported
    receipt = entry["receipt"]
    assert receipt["passed"] and receipt["fallbacks"] == []
    assert receipt["fused"] == {"MultiHeadAttention": 2, "BiasGelu": 2}
    for name in ("model.onnx", "float.onnx"):  # onnxruntime's SkipLayerNormalization is the slower of the two
        operators = [n.op_type for n in onnx.load(folder / name).graph.node]
        assert operators.count("Sum") == operators.count("LayerNormalization") == 5 and "SkipLayerNormalization" not in operators
    assert set(receipt["latency_ms"]) == {"float", "quantized"} and set(receipt["latency_ms"]["float"]) == {"1x16", "8x16"}
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "float.onnx", "model.onnx", "receipt.json"]
    assert entry["bytes"] == (folder / "model.onnx").stat().st_size and receipt["float_bytes"] == (folder / "float.onnx").stat().st_size
    assert json.loads((folder / "receipt.json").read_text()) == entry


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 64), (5, 3), (3, 33)])
def test_axes_are_dynamic(exported: Any, shape: tuple[int, int]) -> None:
    folder, plain, model, _ = exported
    mask = torch.ones(shape, dtype=torch.int64)
    mask[0, (shape[1] + 1) // 2 :] = 0
    inputs = {"input_ids": torch.randint(0, 37, shape), "attention_mask": mask}
    for name, module in (("model.onnx", model), ("float.onnx", plain)):
        runtime = OnnxExport().logits(folder / name, [(inputs, torch.zeros(0))])
        assert nmse(logits_of(module, [(inputs, torch.zeros(0))]), runtime) < 1e-9


def test_a_transformer_with_int8_activations(tmp_path: Path) -> None:
    _, model = bert(MLAS)
    receipt = QUICK.export(job(model, tmp_path))["receipt"]
    assert receipt["passed"] and receipt["layers"] == 13 and receipt["layers_nmse"] < 1e-7 and receipt["fallbacks"] == []


@pytest.mark.parametrize("how", ["raises", "wrong"])
def test_a_fusion_that_fails_is_left_out_and_recorded(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.onnx import trace

    def broken(graph: Any) -> Any:
        if how == "raises":
            raise RuntimeError("no such pattern")
        next(n for n in graph.graph if n.op_type == "Relu").op_type = "Neg"
        return graph

    monkeypatch.setattr(trace, "fuse", broken)
    receipt = QUICK.export(job(quantized(Small(), Affine(), ROW8), tmp_path))["receipt"]
    assert receipt["passed"] and receipt["fused"] == {}
    (fallback,) = receipt["fallbacks"]
    assert fallback["name"] == "model.onnx" and (
        "no such pattern" in fallback["why"] if how == "raises" else "differs from the module" in fallback["why"]
    )


def test_a_large_file_uses_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.onnx import write

    monkeypatch.setattr(write, "PROTOBUF_LIMIT", 1000)
    entry = QUICK.export(job(quantized(Small(), Affine(), ROW8), tmp_path, float_model=Small().eval()))
    folder = tmp_path / "onnx"
    assert {p.name for p in folder.iterdir()} >= {"model.onnx", "model.onnx.data", "float.onnx", "float.onnx.data"}
    assert entry["bytes"] == sum((folder / n).stat().st_size for n in ("model.onnx", "model.onnx.data"))


def test_a_layer_that_the_model_never_calls_is_named(tmp_path: Path) -> None:
    model = Small()
    model.spare = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"keep_float=\[spare\]"):
        QUICK.export(job(quantized(model, Affine(), ROW8), tmp_path))


def test_registering_it_imports_no_heavy_package() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'numpy'}"
    code = f"import sys; from qtrain import registry; registry.entries('export'); sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert registry.get("export", "onnx") is OnnxExport
