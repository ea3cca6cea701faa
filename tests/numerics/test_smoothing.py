"""Smoothing changes no logit, puts 1 / s where that is exact and nowhere else, and makes outliers easier to round."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain import smoothing
from qtrain.activations import calibrate
from qtrain.evaluate import sqnr_db
from qtrain.grids.affine import Affine
from qtrain.layers import SmoothedLinear, quantized_layers
from qtrain.prepare import convert, prepare
from qtrain.receipt import nmse
from qtrain.smoothing import choose_scale, run, smooth

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HEADS = 32, 4


class RMSNorm(nn.Module):
    """As Llama has it; with ``offset`` as Gemma has it, where the weight is 1 + weight."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5 - offset)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.offset + self.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.softmax(q @ k.transpose(-1, -2) / (WIDTH / HEADS) ** 0.5, -1) @ v
        return self.output(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, norm: Any, activation: Any, pre: bool) -> None:
        super().__init__()
        self.attention, self.first, self.second = Attention(), norm(), norm()
        self.up, self.down, self.activation, self.pre = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH, bias=False), activation, pre

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attention(self.first(x))
            return x + self.down(self.activation(self.up(self.second(x))))
        x = self.first(x + self.attention(x))
        return self.second(x + self.down(self.activation(self.up(x))))


class Encoder(nn.Module):
    """ids [N, T] -> logits [N, 3]; the norms of its first block have outliers in three channels."""

    def __init__(self, norm: Any = lambda: nn.LayerNorm(WIDTH), activation: Any = F.gelu, pre: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(Block(norm, activation, pre) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            for layer in (self.blocks[0].first, self.blocks[0].second):
                layer.weight[:3] += torch.tensor([40.0, 80.0, 20.0])  # type: ignore[index, operator]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def encoder(**options: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(**options).eval()


def batches(count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"ids": torch.randint(50, (4, 11), generator=generator)} for _ in range(count)]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smooth whatever it does to the error."""
    monkeypatch.setattr(smoothing, "gain_db", lambda *_: 1.0)


def smoothed(model: nn.Module, data: list[dict[str, Tensor]], alpha: float = 0.5) -> tuple[nn.Module, dict[str, Any]]:
    """A smoothed copy, which must compute the same on other data; and layer -> what it was fused with."""
    after = copy.deepcopy(model)
    rows = smooth(after, linears(after), data, alpha)
    assert sorted(name for row in rows for name in row["layers"]) == sorted(linears(model))
    for batch in [*data, *([] if "ids" not in data[0] else batches(2, seed=9))]:
        with torch.no_grad():
            assert nmse(run(model, batch), run(after, batch)) < 1e-10
    return after, {name: row["fused"] for row in rows for name in row["layers"]}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_scale_is_the_papers(alpha: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(100, 8) * torch.logspace(-2, 2, 8), [torch.randn(5, 8), torch.randn(6, 8)]
    s = choose_scale(x.abs().amax(0), w, alpha)
    for j in range(8):
        largest = max(float(a[:, j].abs().max()) for a in w)
        assert float(s[j]) == pytest.approx(float(x[:, j].abs().max()) ** alpha / largest ** (1 - alpha), rel=1e-5)
    if alpha == 0.5:
        smooth_x, smooth_w = (x / s).abs().amax(0), torch.stack([(a * s).abs().amax(0) for a in w]).amax(0)
        assert torch.allclose(smooth_x, smooth_w)


def test_a_channel_without_data_stays_and_one_without_weights_takes_no_part() -> None:
    s = choose_scale(torch.tensor([0.0, 4.0, 4.0]), [torch.tensor([[1.0, 1.0, 0.0]])], 0.5)
    assert s[0] == 1 and s[1] == 2 and torch.isfinite(s).all() and s[2] > 100


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(WIDTH), RMSNorm, lambda: nn.RMSNorm(WIDTH)], ids=["layer", "own rms", "rms"])
def test_in_a_pre_norm_encoder_the_norms_take_it(norm: Any, alpha: float) -> None:
    _, fused = smoothed(encoder(norm=norm), batches(), alpha)
    for block in ("blocks.0", "blocks.1"):
        assert {fused[f"{block}.attention.{name}"] for name in ("query", "key", "value")} == {f"{block}.first"}
        assert fused[f"{block}.attention.output"] == f"{block}.attention.value"
        assert fused[f"{block}.up"] == f"{block}.second"
        assert fused[f"{block}.down"] is None  # GELU is not homogeneous
    assert fused["head"] is None


@pytest.mark.usefixtures("always")
def test_in_a_post_norm_encoder_the_layers_do() -> None:
    model = encoder(pre=False)
    after, fused = smoothed(model, batches())
    assert {name for name, producer in fused.items() if producer} == {f"blocks.{i}.attention.output" for i in (0, 1)}
    for name, layer in linears(after).items():
        assert isinstance(layer, SmoothedLinear) == (fused[name] is None)
    assert torch.equal(after.blocks[0].first.weight, model.blocks[0].first.weight)  # type: ignore[union-attr, index]
    shared = [after.get_submodule(f"blocks.1.attention.{n}").inverse_smoothing for n in ("query", "key", "value")]
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[0], shared[2])  # type: ignore[arg-type]


@pytest.mark.usefixtures("always")
def test_a_norm_that_reads_its_weight_in_another_way_is_left_alone() -> None:
    model = encoder(norm=lambda: RMSNorm(offset=1.0))
    after, fused = smoothed(model, batches())
    assert not any(producer and "attention.value" not in producer for producer in fused.values())
    assert torch.equal(after.blocks[0].first.weight, model.blocks[0].first.weight)  # type: ignore[union-attr, index]


@pytest.mark.usefixtures("always")
def test_a_relu_lets_the_scale_through() -> None:
    _, fused = smoothed(encoder(activation=F.relu), batches())
    assert fused["blocks.0.down"] == "blocks.0.up" and fused["blocks.1.down"] == "blocks.1.up"


@pytest.mark.usefixtures("always")
def test_what_one_example_does_not_show_the_batch_does() -> None:
    """ReLU6 is a ReLU as long as nothing reaches 6."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU6(), nn.Linear(16, 4)).eval()
    small, large = 0.1 * torch.randn(1, 8), 100 * torch.randn(3, 8)
    for data, producer in ((small, "0"), (torch.cat([small, large]), None)):
        _, fused = smoothed(model, [{"input": data}])
        assert fused == {"0": None, "2": producer}


@pytest.fixture(scope="module")
def bert(tiny_bert: Path) -> nn.Module:
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2, attn_implementation="eager").eval()
    with torch.no_grad():  # outliers as trained encoders have them: in few channels, the same in every layer
        for layer in model.bert.encoder.layer:
            for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
                norm.weight[[5, 17]] *= 40
                norm.bias.normal_()
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(3)
    return model


def sentences(count: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 30, (6, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "attention_mask": (torch.arange(12) < 9 + i[:, :1] % 4).long()} for i in ids]


@pytest.mark.usefixtures("always")
def test_bert_computes_the_same(bert: nn.Module) -> None:
    after, fused = smoothed(bert, sentences())
    for i in (0, 1):
        layer = f"bert.encoder.layer.{i}"
        assert fused[f"{layer}.attention.output.dense"] == f"{layer}.attention.self.value"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense", "output.dense"):
            assert fused[f"{layer}.{name}"] is None
    assert fused["bert.pooler.dense"] == "bert.encoder.layer.1.output.LayerNorm"  # which nothing else reads
    with torch.no_grad():
        assert nmse(run(bert, sentences(1, seed=5)[0]), run(after, sentences(1, seed=5)[0])) < 1e-10


def static(model: nn.Module, data: list[dict[str, Tensor]]) -> nn.Module:
    """INT8 as `ptq_static` has it."""
    chosen = {n: m for n, m in linears(model).items() if n not in ("head", "classifier")}
    observer = {"kind": "minmax"}
    prepare(model, chosen, Affine(8, "absmax", "channel"), None, Affine(8, "minmax_onnx", "tensor"), True, observer=observer)
    calibrate(model, data)
    return model.eval()


@pytest.mark.parametrize("which", ["pre-norm", "bert"])
@torch.no_grad()
def test_static_int8_is_closer_to_float_after_smoothing(which: str, bert: nn.Module) -> None:
    model, data = (encoder(), batches()) if which == "pre-norm" else (bert, sentences())
    after, _ = smoothed(model, data)
    rounded, smooth_rounded = static(copy.deepcopy(model), data), static(after, data)
    fresh = batches(1, seed=7)[0] if which == "pre-norm" else sentences(1, seed=7)[0]
    want = run(model, fresh)
    before, now = (sqnr_db(want, run(m, fresh)) for m in (rounded, smooth_rounded))
    assert now > before + 6, (before, now)


@pytest.mark.usefixtures("always")
@torch.no_grad()
def test_the_factor_survives_prepare_and_convert() -> None:
    model, data = encoder(pre=False), batches()
    after, fused = smoothed(model, data)
    prepared = static(after, data)
    before = run(prepared, data[0])
    converted = convert(prepared)
    assert torch.equal(run(converted, data[0]), before)
    for name, layer in quantized_layers(converted):
        assert (layer.inverse_smoothing is None) == (fused[name] is not None)


@torch.no_grad()
def test_a_group_is_left_alone_where_smoothing_would_do_harm() -> None:
    """With alpha = 0 it is the weight's ranges that are evened out; the activations of the second Linear become worse by that."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(first=nn.Linear(64, 128), middle=nn.Tanhshrink(), second=nn.Linear(128, 16))).eval()
    first, second = linears(model).values()
    x = torch.randn(2000, 64)
    x[:, :2] *= 50
    first.weight[:, :2] *= 0.1
    first.weight[:2] *= 10
    second.weight[:, :2] *= 20
    after = copy.deepcopy(model)
    data = [{"input": part} for part in x.split(500)]
    good, bad = smooth(after, linears(after), data, 0.0)
    assert good["gain_db"] > 3 and good["fused"] is None and isinstance(after.first, SmoothedLinear)
    assert bad["gain_db"] < -3 and bad["skipped"] == f"its outputs would lose {-bad['gain_db']:.1f} dB"
    assert type(after.second) is nn.Linear and torch.equal(after.second.weight, second.weight)

    def error(m: nn.Module) -> float:
        return sqnr_db(first(x), static(copy.deepcopy(m), data).first(x))  # type: ignore[operator]

    assert error(after) - error(model) == pytest.approx(good["gain_db"], abs=0.5)  # a sample tells as much as all rows


def test_the_grids_of_the_caller_decide() -> None:
    """Weights of 2 bits suffer from whatever moves into them, and activations in float gain nothing from it."""
    torch.manual_seed(0)
    x = torch.randn(100, 64)
    x[:, :2] *= 50
    model = nn.Sequential(nn.Linear(64, 16)).eval()
    gains = []
    for weight, activation in ((None, None), (Affine(2, "absmax", "channel"), Affine(8, "absmax", "token"))):
        after = copy.deepcopy(model)
        gains.append(smooth(after, linears(after), [{"input": x}], 0.5, weight, activation)[0]["gain_db"])
    assert gains[0] > 3 and gains[1] < gains[0] - 3


@pytest.mark.usefixtures("always")
def test_only_chosen_layers_change_and_a_norm_with_another_reader_is_left_alone() -> None:
    model = encoder()
    after = copy.deepcopy(model)
    name = "blocks.0.attention.query"
    rows = smooth(after, {name: after.get_submodule(name), "embedding": after.embedding}, batches(), 0.5)
    assert rows[0]["layers"] == [name] and rows[0]["fused"] is None and rows[0]["largest"] > 1
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, after.get_parameter(n))}
    assert changed == {f"{name}.weight"}


def test_a_tied_weight_stays_as_it_is() -> None:
    model = encoder()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    after = copy.deepcopy(model)
    rows = smooth(after, linears(after), batches(), 0.5)
    skipped = {row["layers"][0] for row in rows if "skipped" in row}
    assert skipped == {"blocks.0.up", "blocks.1.up"}
    assert after.blocks[0].up.weight is after.blocks[1].up.weight
    with torch.no_grad():
        assert nmse(run(model, batches()[0]), run(after, batches()[0])) < 1e-10


@pytest.mark.usefixtures("always")
def test_a_layer_that_is_called_many_times_has_one_scale() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.often = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.once(x)
            for _ in range(3):
                x = torch.tanh(self.often(x))
            return x

    torch.manual_seed(0)
    smoothed(Repeats().eval(), [{"x": torch.randn(4, 16)}])


@pytest.mark.usefixtures("always")
def test_the_mode_is_kept_and_dropout_is_off_meanwhile() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model.forward = lambda x: model["a"](F.dropout(x, 0.5, model.training))  # type: ignore[method-assign]
    model.train()
    row = smooth(model, {"a": model["a"]}, [{"x": torch.ones(2, 8)}], 1.0)[0]
    assert model.training and row["largest"] == 1.0


def test_bad_input_says_what_to_do() -> None:
    model = encoder()
    chosen = linears(model)
    with pytest.raises(ValueError, match=r"there is none; set data\.calibration_examples=256.*quantizer\.smoothquant=null"):
        smooth(model, chosen, [], 0.5)
    with pytest.raises(ValueError, match=r"none of the 1 chosen modules is one.*quantizer\.smoothquant=null"):
        smooth(model, {"embedding": model.embedding}, batches(), 0.5)
    model.unused = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"1 Linear modules are never called, the first unused.*quantizer\.keep_float=\[unused\]"):
        smooth(model, linears(model), batches(), 0.5)


def test_values_that_are_not_finite_name_the_layer_and_the_batch() -> None:
    model = encoder()
    with torch.no_grad():
        model.embedding.weight[7] = float("nan")
    data = [{"ids": b["ids"].clamp_min(8)} for b in batches(2)] + [{"ids": torch.full((1, 3), 7)}]
    with pytest.raises(
        ValueError, match=r"calibration batch 2: the input of blocks\.0\.attention\.query is not finite in 96 of 96 values.*keep_float="
    ):
        smooth(model, linears(model), data, 0.5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
