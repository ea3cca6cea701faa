"""torch's graph flows: what is lowered computes what torch computes, under the modules' names, and nothing is left out silently."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qtrain.activations import QuantizedActivation
from qtrain.checkpoint import load_weights, save_model
from qtrain.grids.affine import Int8
from qtrain.layers import QuantizedConv, QuantizedEmbedding, QuantizedLinear, quantized_layers
from qtrain.module import logits_of
from qtrain.pt2e import BACKENDS, GraphScheme, exported, observed
from qtrain.pt2e.exported import Exported, Untraceable, aten, fake_quantizers
from qtrain.pt2e.graph_qat import ConvBatchNorm, fold_batch_norms
from qtrain.pt2e.lowering import lower_pt2e
from qtrain.quantizers.ptq_graph import PtqGraph
from qtrain.quantizers.qat_graph import QatGraph
from qtrain.receipt import nmse
from tests.conftest import residual_cnn

pytestmark = pytest.mark.usefixtures("one_thread")

CNN_FLOWS = [("pt2e", b) for b in BACKENDS] + [("fx", "x86"), ("fx", "arm")]


def images(count: int = 6, seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))}


def sentences(count: int = 4, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(5, 30, (count, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


IMAGES = [images(8, seed) for seed in (1, 2)]
SENTENCES = [sentences(8, 9, 1), sentences(3, 21, 2)]


@pytest.fixture(scope="module")
def bert(tiny_bert: Path) -> nn.Module:
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2).eval()
    with torch.no_grad():  # far from the initial zeros, so that a wrong bias shows
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.uniform_(-0.1, 0.1)
    return model


def quantized(scheme: GraphScheme, model: nn.Module, batches: list[dict[str, Tensor]], keep_float: list[str] | None = None) -> Any:
    prepared, _ = scheme.prepare(copy.deepcopy(model), keep_float or [], {n: x[:2] for n, x in batches[0].items()})
    return scheme.calibrate(prepared, batches)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits_of(model(**batch))


def edges(model: nn.Module) -> list[str]:
    return [
        n.removeprefix("on_grid.") for n, m in model.named_modules() if isinstance(m, QuantizedActivation) and "activation_fake" not in n
    ]


# -- lowering: the same numbers ------------------------------------------------------------------------------------------------


def both(scheme: GraphScheme, model: nn.Module, batches: list[dict[str, Tensor]], rule: str) -> tuple[Any, Any]:
    """torch's converted graph, and ours."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    prepared, _ = scheme.prepare(copy.deepcopy(model), [], {n: x[:2] for n, x in batches[0].items()})
    prepared = GraphScheme.calibrate(scheme, prepared, batches)
    torchs = convert_pt2e(copy.deepcopy(prepared))  # type: ignore[arg-type]
    return torchs, lower_pt2e(convert_pt2e(copy.deepcopy(prepared), fold_quantize=False), rule)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lowered_transformer_computes_what_torchs_converted_graph_does_to_the_bit(bert: nn.Module, backend: str) -> None:
    torchs, ours = both(PtqGraph(backend=backend), bert, SENTENCES, "minmax")
    assert torch.equal(logits(ours, sentences(5, 13, 7)), logits(torchs, sentences(5, 13, 7)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lowered_network_differs_from_torchs_by_half_a_step_of_its_int32_biases(backend: str) -> None:
    torchs, ours = both(PtqGraph(backend=backend), residual_cnn(), IMAGES, "minmax")
    assert nmse(logits(torchs, images(seed=5)), logits(ours, images(seed=5))) < 1e-5
    convs = [m for _, m in quantized_layers(ours) if isinstance(m, QuantizedConv)]
    assert len(convs) == 3 and all(c.bias_codes is not None and c.source is not None for c in convs)
    state = torchs.state_dict()
    for conv in convs:  # codes and scales are torch's, and biases are off by half a step at most
        step = conv.source.params["scale"].reshape(()) * conv.quantized.params["scale"].reshape(-1)
        assert any(t.dtype == torch.int8 and t.shape == conv.codes.shape and torch.equal(t, conv.codes) for t in state.values())
        assert any(b.shape == conv.bias.shape and bool(((b - conv.bias).abs() <= 0.51 * step).all()) for b in state.values())


def test_rounding_as_the_runtimes_do_it_changes_a_code_here_and_there(bert: nn.Module) -> None:
    torchs, ours = both(PtqGraph(), bert, SENTENCES, "minmax_onnx")
    assert nmse(logits(torchs, sentences(5, 13, 7)), logits(ours, sentences(5, 13, 7))) < 1e-3


@pytest.mark.parametrize(("flow", "backend"), CNN_FLOWS)
def test_a_network_is_near_the_float_one_and_its_layers_have_their_names(flow: str, backend: str) -> None:
    model = residual_cnn()
    ours = quantized(PtqGraph(flow=flow, backend=backend), model, IMAGES)
    assert nmse(logits(model, images(seed=5)), logits(ours, images(seed=5))) < 1e-2
    assert [n for n, _ in quantized_layers(ours)] == ["stem", "block.conv1", "block.conv2", "head"]
    assert not [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {f"{n}.weight" for n, _ in quantized_layers(ours)} == set(ours.float_weights)
    for name, layer in quantized_layers(ours):
        step = layer.quantized.params["scale"].amax()
        assert float((layer.quantized.decode() - ours.float_weights[f"{name}.weight"]).abs().max()) <= 0.51 * float(step)


@pytest.mark.parametrize(("flow", "backend"), [("pt2e", "x86"), ("pt2e", "xnnpack"), ("fx", "x86")])
def test_each_value_is_on_a_grid_once(flow: str, backend: str) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.pool = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.b(self.pool(torch.relu(self.a(pixel_values)))).mean((2, 3))

    ours = quantized(PtqGraph(flow=flow, backend=backend), Pooled().eval(), IMAGES)
    read = [n for n in ours.graph.nodes if n.op == "call_module" and str(n.target).startswith("on_grid.")]
    before_b = next(n for n in ours.graph.nodes if n.target == "b").args[0]
    assert len(read) == len(edges(ours)) and before_b not in read, "the pool's output is on the grid of its input"
    assert ours.get_submodule("b").source is not None


def test_transformers_quantize_inside_layers_and_query_key_and_value_alike(bert: nn.Module) -> None:
    ours = quantized(PtqGraph(embedding=Int8()), bert, SENTENCES, ["classifier"])
    names = [n for n, _ in quantized_layers(ours)]
    assert names[:3] == [f"bert.embeddings.{n}_embeddings" for n in ("word", "token_type", "position")]
    assert names[3] == "bert.encoder.layer.0.attention.self.query"
    assert names[-1] == "bert.pooler.dense" and edges(ours) == []
    three = [ours.get_submodule(f"bert.encoder.layer.0.attention.self.{n}") for n in ("query", "key", "value")]
    assert all(isinstance(m, QuantizedLinear) and torch.equal(m.activation_fake.scale, three[0].activation_fake.scale) for m in three)
    assert isinstance(ours.get_submodule("bert.embeddings.word_embeddings"), QuantizedEmbedding)
    assert "bert.embeddings.word_embeddings.weight" in ours.float_weights
    assert nmse(logits(bert, sentences(5, 13, 7)), logits(ours, sentences(5, 13, 7))) < 1e-2


def test_the_call_stays_the_models_for_any_batch_length_and_order(bert: nn.Module) -> None:
    ours = quantized(PtqGraph(), bert, SENTENCES)
    for count, length in ((1, 1), (1, 5), (7, 33), (2, 64)):
        batch = sentences(count, length)
        assert logits(ours, batch).shape == (count, 2)
        assert torch.equal(logits(ours, dict(reversed(batch.items()))), logits(ours, batch))
    assert hasattr(ours(**sentences()), "logits")


def test_outliers_are_smoothed_before_the_model_is_traced(bert: nn.Module) -> None:
    model = copy.deepcopy(bert)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight[3] *= 60
    scheme, x = PtqGraph(smoothquant=0.5), sentences(5, 13, 7)
    smoothed = scheme.transform(copy.deepcopy(model), SENTENCES, ["classifier"])
    assert scheme.details["smoothing"] and nmse(logits(model, x), logits(smoothed, x)) < 1e-8
    ours = quantized(scheme, smoothed, SENTENCES, ["classifier"])
    assert nmse(logits(model, x), logits(ours, x)) < nmse(
        logits(model, x), logits(quantized(PtqGraph(), model, SENTENCES, ["classifier"]), x)
    )


def test_a_copy_computes_the_same_and_convert_has_nothing_left_to_do(bert: nn.Module) -> None:
    scheme = PtqGraph(embedding=Int8())
    ours = quantized(scheme, bert, SENTENCES)
    twin = copy.deepcopy(ours)
    assert isinstance(twin, Exported) and torch.equal(logits(twin, sentences()), logits(ours, sentences()))
    assert scheme.exact and scheme.convert(ours) is ours


@pytest.mark.parametrize("flow", ["pt2e", "fx"])
def test_onnx_traces_a_network(flow: str) -> None:
    from exporters.onnx import trace

    ours = quantized(PtqGraph(flow=flow), residual_cnn(), IMAGES)
    model = trace.trace(ours, images(2), 64, 21)
    assert str(model.graph.inputs[0].shape[0]) == "batch"
    assert sum(n.op_type == "PackedConv" for n in model.graph) == 3


def test_onnx_traces_a_transformer_with_open_batch_and_sequence(bert: nn.Module) -> None:
    from exporters.onnx import trace

    ours = quantized(PtqGraph(embedding=Int8()), bert, SENTENCES)
    model = trace.trace(ours, sentences(2, 7), 64, 21)
    assert [str(d) for d in model.graph.inputs[0].shape] == ["batch", "sequence"]
    kinds = [n.op_type for n in model.graph]
    assert kinds.count("PackedLinear") == 14 and kinds.count("PackedEmbedding") == 3


def test_devices_in_the_graph_follow_the_parameters(bert: nn.Module) -> None:
    ours = quantized(PtqGraph(), bert, SENTENCES)

    def devices() -> set[str]:
        found: set[str] = set()
        for node in ours.graph.nodes:
            fx.node.map_aggregate((node.args, node.kwargs), lambda a: found.add(a.type) if isinstance(a, torch.device) else None)
        return found

    assert devices() == {"cpu"}
    ours.to("meta")
    assert devices() == {"meta"}


# -- what is left in float, and why --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flow", "backend"), CNN_FLOWS)
def test_keep_float_goes_by_name(flow: str, backend: str) -> None:
    scheme = PtqGraph(flow=flow, backend=backend, keep_float=["block.*1"])
    prepared, kept = scheme.prepare(residual_cnn(), ["head"], images(2))
    assert kept == ["block.conv1", "head"]
    ours = scheme.calibrate(prepared, IMAGES)
    assert [n for n, _ in quantized_layers(ours)] == ["stem", "block.conv2"]
    assert nmse(logits(residual_cnn(), images(seed=5)), logits(ours, images(seed=5))) < 1e-2


def test_keep_float_of_a_transformer(bert: nn.Module) -> None:
    scheme = PtqGraph(embedding=Int8(), keep_float=["*.query", "*.word_embeddings"])
    prepared, kept = scheme.prepare(copy.deepcopy(bert), ["classifier"], sentences(2))
    names = [n for n, _ in quantized_layers(scheme.calibrate(prepared, SENTENCES))]
    queries = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    assert kept == ["bert.embeddings.word_embeddings", *queries, "classifier"]
    assert len(names) == 13 and not set(names) & set(kept)


def test_embeddings_are_listed_where_they_stay_in_float(bert: nn.Module) -> None:
    _, kept = PtqGraph(embedding=None).prepare(copy.deepcopy(bert), ["classifier"], sentences(2))
    assert [n for n in kept if "embeddings" in n] == [f"bert.embeddings.{n}_embeddings" for n in ("position", "token_type", "word")]


class Same(nn.Module):
    """A convolution whose padding is a word, and a Linear that nothing calls."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.a, self.same, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, kernel, padding="same", dilation=2), nn.Linear(4, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.same(torch.relu(self.a(pixel_values))).mean((2, 3))


def test_what_torchs_quantizer_does_not_reach_is_noted() -> None:
    scheme, model = PtqGraph(), Same(3).eval()
    prepared, kept = scheme.prepare(copy.deepcopy(model), [], images(2))
    assert kept == ["unused"] == [note["name"] for note in scheme.fallbacks]
    assert "no linear or convolution of the traced graph reads its weight" in scheme.fallbacks[0]["why"]
    ours = scheme.calibrate(prepared, IMAGES)
    assert [n for n, _ in quantized_layers(ours)] == ["a", "same"]
    assert nmse(logits(model, images(seed=5)), logits(ours, images(seed=5))) < 1e-2


def test_a_module_that_torch_has_no_pattern_for_is_noted() -> None:
    class OneDimensional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)).mean(2))

    signal = {"x": torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0))}
    scheme = PtqGraph(backend="arm")
    prepared, kept = scheme.prepare(OneDimensional().eval(), [], signal)
    assert kept == ["a"] and scheme.fallbacks[0]["why"].startswith("torch's quantizer for arm has no pattern for it")
    assert [n for n, _ in quantized_layers(scheme.calibrate(prepared, [signal]))] == ["b"]
    ours = quantized(PtqGraph(), OneDimensional().eval(), [signal])
    assert [n for n, _ in quantized_layers(ours)] == ["a", "b"] and ours.get_submodule("a").codes.ndim == 3


def test_a_pattern_that_matches_nothing_raises(bert: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"pattern 'bert\.encoder\.layer\.9\.\*' matches none"):
        PtqGraph(keep_float=["bert.encoder.layer.9.*"]).prepare(copy.deepcopy(bert), [], sentences(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PtqGraph(backend="cuda"), r"quantizer\.backend is 'cuda'; valid: x86, arm, xnnpack"),
        (lambda: PtqGraph(flow="eager"), r"quantizer\.flow is 'eager'; valid: pt2e, fx"),
        (lambda: PtqGraph(flow="fx", backend="xnnpack"), r"quantizer\.flow=fx has the backends x86 and arm"),
        (lambda: PtqGraph(keep_float="auto:3"), r"quantizer=ptq_static quantizer\.keep_float=auto:N"),
        (lambda: QatGraph(keep_float=["auto:3"]), r"quantizer=qat quantizer\.keep_float=auto:N"),
        (lambda: QatGraph(freeze_step=5, freeze_batch_norm_step=9), r"0 <= freeze_batch_norm_step <= freeze_step"),
        (lambda: PtqGraph(smoothquant=2.0), r"quantizer\.smoothquant is 2\.0"),
        (lambda: PtqGraph(smoothquant=0.5, backend="xnnpack"), r"Set quantizer\.backend=x86, or quantizer\.smoothquant=null"),
    ],
)
def test_options_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_older_flow_says_that_it_is_deprecated_and_what_replaces_it() -> None:
    scheme = PtqGraph(flow="fx")
    scheme.prepare(residual_cnn(), [], images(2))
    assert "deprecated" in scheme.fallbacks[0]["why"] and "flow=pt2e" in scheme.fallbacks[0]["why"]


def test_the_older_flow_refuses_transformers_and_names_what_takes_them(bert: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"flow=fx is for convolutional networks.*quantizer\.flow=pt2e, or quantizer=ptq_static"):
        PtqGraph(flow="fx").prepare(copy.deepcopy(bert), [], sentences(2))


def test_the_older_flow_that_torch_no_longer_has_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.ao.quantization.quantize_fx", None)
    with pytest.raises(ValueError, match=r"does not have any more. Set quantizer\.flow=pt2e"):
        PtqGraph(flow="fx").prepare(residual_cnn(), [], images(2))


def test_xnnpack_says_whose_quantizer_it_is() -> None:
    scheme = PtqGraph(backend="xnnpack")
    scheme.prepare(residual_cnn(), [], images(2))
    installed = observed.xnnpack_module().__name__.startswith("executorch")
    assert [note["name"] for note in scheme.fallbacks] == ([] if installed else ["quantizer.backend=xnnpack"])


# -- what cannot be traced -----------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.conv(pixel_values)
        if x.sum() > 0:
            x = -x
        return x.mean((2, 3))


@pytest.mark.parametrize(("scheme", "instead"), [(PtqGraph(), "ptq_static"), (QatGraph(), "qat"), (PtqGraph(flow="fx"), "ptq_static")])
def test_control_flow_on_values_is_an_error_that_names_the_line(scheme: GraphScheme, instead: str) -> None:
    with pytest.raises(Untraceable, match=rf"trace Branches: (?s:.*)if x\.sum\(\) > 0(?s:.*)quantizer={instead}\b") as caught:
        scheme.prepare(Branches().eval(), [], images(2))
    assert "test_graph_quantizers.py" in str(caught.value)


def test_an_operator_without_a_shape_rule_is_an_error_that_names_it() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, pixel_values: Tensor) -> Tensor:
            x = self.conv(pixel_values).mean((2, 3))
            return x + int(torch.histc(x, 4).max().item())

    with pytest.raises(Untraceable, match=r"cannot trace Counts: .*torch\.histc\(x, 4\)"):
        PtqGraph().prepare(Counts().eval(), [], images(2))


def test_a_graph_that_decided_the_mode_once_and_for_all_is_refused() -> None:
    class StochasticDepth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, pixel_values: Tensor) -> Tensor:
            x = self.conv(pixel_values).mean((2, 3))
            return x / 0.5 * (torch.rand(x.shape[0], 1) < 0.5) if self.training else x

    assert quantized(PtqGraph(), StochasticDepth().eval(), IMAGES) is not None
    with pytest.raises(Untraceable, match=r"asks for the mode or for sizes.*quantizer=qat"):
        QatGraph().prepare(StochasticDepth().eval(), [], images(2))


def test_a_size_that_the_code_fixes_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.conv(pixel_values).reshape(2, 4, -1).mean(2)

    with pytest.raises(Untraceable, match=r"trace Fixed: its code makes .*size\(\)\[0\] always 2.*quantizer=ptq_static"):
        PtqGraph().prepare(Fixed().eval(), [], images(2))


def test_in_place_operators_become_ordinary_ones() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)

        def forward(self, pixel_values: Tensor) -> Tensor:
            x = self.a(pixel_values)
            y = self.relu(x)
            y = self.b(y)
            y += x  # x is relu'd by now
            return y.mean((2, 3))

    model = InPlace().eval()
    graph = exported.export(model, images(2), instead="ptq_static")
    assert not [n for n in graph.graph.nodes if str(n.target).split(".")[-2:-1] and str(n.target).split(".")[1].endswith("_")]
    torch.testing.assert_close(logits(graph, images(5)), logits(model, images(5)))


# -- calibration ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flow", "backend"), [("pt2e", "x86"), ("fx", "x86")])
def test_bad_calibration_data_is_named(flow: str, backend: str) -> None:
    def calibrated(batches: list[dict[str, Tensor]], model: nn.Module | None = None) -> None:
        scheme = PtqGraph(flow=flow, backend=backend)
        prepared, _ = scheme.prepare(model or residual_cnn(), [], images(2))
        scheme.calibrate(prepared, batches)

    broken = images(4)
    broken["pixel_values"][1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"calibration batch 1: the activation that stem reads has 1 values that are not finite"):
        calibrated([images(4), broken])
    with pytest.raises(ValueError, match=r"there is no calibration data"):
        calibrated([])
    dead = residual_cnn()
    nn.init.constant_(dead.norm.weight, 0)
    nn.init.constant_(dead.norm.bias, -1)
    with pytest.raises(ValueError, match=r"the activation that block\.conv1 reads was (0|-1) in all calibration examples"):
        calibrated(IMAGES, dead)


# -- training ------------------------------------------------------------------------------------------------------------------


def steps(model: Any, batches: list[dict[str, Tensor]], count: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    model.train()
    for i in range(count):
        y = logits_of(model(**batches[i % len(batches)]))
        optimizer.zero_grad()
        F.cross_entropy(y, torch.arange(len(y)) % y.shape[1]).backward()
        optimizer.step()
    model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_moves_everything_and_evaluation_nothing(backend: str) -> None:
    model = quantized(QatGraph(backend=backend), residual_cnn(), IMAGES)
    before = state(model)
    x = images(5, 9)
    y = logits(model, x)
    assert torch.equal(logits(model, x), y) and not changed(before, model), "evaluation follows no ranges"
    steps(model, IMAGES)
    moved = changed(before, model)
    assert {n for n, _ in model.named_parameters()} - moved == {"stem.bias"}, "which its batch-norm takes out again"
    assert {"norm.running_mean", "block.bn2.running_var"} <= moved and any(n.endswith("min_val") for n in moved)
    after = state(model)
    assert torch.equal(logits(model, x), logits(model, x)) and not changed(after, model)


def test_dropout_and_the_dropout_inside_attention_follow_the_mode(bert: nn.Module) -> None:
    model = quantized(QatGraph(embedding=Int8()), bert, SENTENCES)
    x = sentences(4, 11, 3)
    attention = [n for n in model.graph.nodes if n.target == aten.scaled_dot_product_attention.default]
    assert torch.equal(logits(model, x), logits(model, x)) and all(n.kwargs.get("dropout_p", 0) == 0 for n in attention)
    model.train()
    assert not torch.equal(logits(model, x), logits(model, x))
    assert all((n.args[4] if len(n.args) > 4 else n.kwargs["dropout_p"]) == 0.1 for n in attention)
    model.eval()
    assert torch.equal(logits(model, x), logits(model, x))


def test_a_mode_that_is_set_without_train_counts() -> None:
    """Lightning does so after each validation."""
    model = quantized(QatGraph(), residual_cnn(), IMAGES)
    before = state(model)
    for module in model.modules():
        module.training = True
    logits(model, images(8, 30))
    assert any("running" in n for n in changed(before, model)) and any(n.endswith("min_val") for n in changed(before, model))
    before = state(model)
    for module in model.modules():
        module.training = False
    logits(model, images(8, 31))
    assert all(n.endswith("observer_enabled") for n in changed(before, model))


def test_frozen_ranges_and_batch_norms_stay() -> None:
    model = quantized(QatGraph(), residual_cnn(), IMAGES)
    (callback,) = QatGraph(freeze_step=2, freeze_batch_norm_step=1).callbacks()

    def at(step: int) -> set[str]:
        model.train()
        callback.on_train_batch_start(SimpleNamespace(global_step=step), SimpleNamespace(model=model), None, 0)
        before = state(model)
        logits(model, images(8, 30 + step))
        return changed(before, model)

    assert any("running" in n for n in at(0))
    moved = at(1)
    assert not any("running" in n for n in moved) and any(n.endswith("min_val") for n in moved)
    assert at(2) == set()
    model.eval()
    model.train()
    assert at(3) == set(), "a validation in between thaws nothing"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trained_network_converts_to_nearly_the_same_numbers(backend: str) -> None:
    scheme = QatGraph(backend=backend)
    model = quantized(scheme, residual_cnn(), IMAGES)
    steps(model, IMAGES)
    scales = {
        n.meta["layer"]: model.get_submodule(n.args[1].target).scale.clone() for n in model.graph.nodes if n.target in exported.PRODUCTS
    }
    x = images(16, 9)
    trained = logits(model, x)
    ours = scheme.convert(model)
    assert not scheme.exact and nmse(trained, logits(ours, x)) < 1e-3
    assert [n for n, _ in quantized_layers(ours)] == ["stem", "block.conv1", "block.conv2", "head"]
    for name, layer in quantized_layers(ours):
        assert torch.equal(layer.quantized.params["scale"].reshape(-1), scales[name].reshape(-1)), "scales are those of training"


def test_a_trained_transformer_converts_to_the_same_bits(bert: nn.Module) -> None:
    scheme = QatGraph(embedding=Int8())
    model = quantized(scheme, bert, SENTENCES, ["classifier"])
    steps(model, SENTENCES)
    trained = logits(model, sentences(5, 13, 7))
    ours = scheme.convert(model)
    assert nmse(trained, logits(ours, sentences(5, 13, 7))) < 1e-6
    assert len(list(quantized_layers(ours))) == 16


def test_epsilon_and_momentum_of_batch_norms_are_the_models() -> None:
    model = residual_cnn()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-2, 0.3
    prepared = quantized(QatGraph(), model, IMAGES)
    nodes = [n for n in prepared.graph.nodes if n.target == aten.batch_norm.default]
    assert len(nodes) == 3 and {n.args[6:8] for n in nodes} == {(0.3, 1e-2)}
    assert {ConvBatchNorm.of(prepared, n).variance.args[1] for n in nodes} == {1e-2}  # type: ignore[union-attr]
    for fake in fake_quantizers(prepared):
        fake.disable_fake_quant()
    x = images(5, 9)
    torch.testing.assert_close(logits(prepared, x), logits(model, x), rtol=1e-4, atol=1e-5)
    folded = copy.deepcopy(prepared)
    fold_batch_norms(folded)
    for fake in fake_quantizers(folded):
        fake.disable_fake_quant()
    assert not [n for n in folded.graph.nodes if n.target == aten.batch_norm.default]
    torch.testing.assert_close(logits(folded, x), logits(model, x), rtol=1e-4, atol=1e-5)


def test_a_channel_that_is_switched_off_stays_off() -> None:
    model = residual_cnn()
    with torch.no_grad():
        model.block.bn2.weight[1] = 0.0
    scheme = QatGraph()
    trained = quantized(scheme, model, IMAGES)
    x = images(16, 9)
    assert nmse(logits(model, x), logits(trained, x)) < 1e-2
    steps(trained, IMAGES)
    y = logits(trained, x)
    assert bool(torch.isfinite(y).all()) and nmse(y, logits(scheme.convert(trained), x)) < 1e-3


def test_a_relu_that_is_called_twice_and_a_batch_norm_without_a_convolution() -> None:
    class Preactivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.relu = nn.BatchNorm2d(3), nn.ReLU(inplace=True)
            self.a, self.b, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, pixel_values: Tensor) -> Tensor:
            x = self.relu(self.a(self.relu(self.norm(pixel_values))))
            return self.relu(self.last(self.relu(self.b(x)))).mean((2, 3))

    torch.manual_seed(0)
    model, x = Preactivation().eval(), images(16, 9)
    for scheme in (PtqGraph(), QatGraph()):
        ours = scheme.convert(quantized(scheme, model, IMAGES))
        assert nmse(logits(model, x), logits(ours, x)) < 1e-2
        assert [n for n, _ in quantized_layers(ours)] == ["a", "b"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_convolution_kept_in_float_trains_and_is_folded_too(backend: str) -> None:
    scheme = QatGraph(backend=backend, keep_float=["stem"])
    model = quantized(scheme, residual_cnn(), IMAGES)
    steps(model, IMAGES)
    x = images(16, 9)
    trained = logits(model, x)
    ours = scheme.convert(model)
    assert nmse(trained, logits(ours, x)) < 1e-3 and [n for n, _ in quantized_layers(ours)] == ["block.conv1", "block.conv2", "head"]
    assert not [n for n in ours.graph.nodes if n.target == aten.batch_norm.default]


@pytest.mark.parametrize("backend", ["x86", "xnnpack"])
def test_nothing_is_rounded_between_a_batch_norm_and_its_functional_relu(backend: str) -> None:
    """torchao's training patterns know nn.ReLU only; a grid in front of the ReLU would spend half its codes on what it cuts off."""
    model = quantized(QatGraph(backend=backend), residual_cnn(), IMAGES)
    for node in model.graph.nodes:
        if node.target == aten.relu.default:
            assert not exported.is_observer(model, node.args[0]), node


def test_all_positive_channels_get_a_symmetric_scale() -> None:
    model = residual_cnn()
    with torch.no_grad():
        model.stem.weight[2].abs_()
    scheme = QatGraph()
    ours = scheme.convert(quantized(scheme, model, IMAGES))
    layer = ours.get_submodule("stem")
    assert layer.codes[2].min() >= 0 and layer.codes[2].max() >= 126
    assert nmse(logits(model, images(seed=5)), logits(ours, images(seed=5))) < 1e-2


def test_training_runs_under_autocast(bert: nn.Module) -> None:
    for model, batch in (
        (quantized(QatGraph(), bert, SENTENCES), SENTENCES[0]),
        (quantized(QatGraph(), residual_cnn(), IMAGES), IMAGES[0]),
    ):
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = logits_of(model(**batch)).float().square().mean()
        loss.backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_a_checkpoint_restores_a_trained_graph(bert: nn.Module, tmp_path: Path) -> None:
    scheme = QatGraph(embedding=Int8())
    model = quantized(scheme, bert, SENTENCES, ["classifier"])
    steps(model, SENTENCES)
    save_model(tmp_path / "qat", model, stage="qat")
    again = quantized(scheme, bert, SENTENCES, ["classifier"])
    assert not torch.equal(logits(again, sentences()), logits(model, sentences()))
    assert load_weights(tmp_path / "qat", again) == {"stage": "qat"}
    assert torch.equal(logits(again, sentences()), logits(model, sentences()))
    model.train()
    save_model(tmp_path / "training", model, stage="qat")
    load_weights(tmp_path / "training", again)
    before = state(again)
    assert torch.equal(logits(again, sentences()), logits(model.eval(), sentences()))
    assert all(n.endswith("observer_enabled") for n in changed(before, again)), "it was saved in training, and is evaluated here"


def test_a_copy_of_a_model_in_training_trains_by_itself() -> None:
    model = quantized(QatGraph(), residual_cnn(), IMAGES)
    model.freeze(True, False)
    twin = copy.deepcopy(model)
    assert isinstance(twin, Exported) and twin.frozen and not twin.batch_norms_frozen
    before = state(model)
    steps(twin, IMAGES)
    assert not changed(before, model) and changed(before, twin)
    assert not any(n.endswith("min_val") for n in changed(before, twin))
