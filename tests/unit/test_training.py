"""One training stage: schedule, distillation, fake-quant switches, best weights, a loss that is not finite."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtrain.callbacks import FakeQuantSchedule
from qtrain.fit import Fit, resolve_precision, train
from qtrain.grids.affine import Affine
from qtrain.layers import FakeLinear, fake_layers
from qtrain.module import Module, learning_rate_factor
from qtrain.prepare import prepare

TRAINER = {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "precision": "32-true", "gradient_clip_val": 1.0}


class Points(nn.Module):
    """Two layers on points in 16 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class PointData(LightningDataModule):
    def __init__(self, poison: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(160, 16, generator=generator)
        y = (x[:, 0] + x[:, 1] * x[:, 2] > 0).long()
        if poison is not None:
            x[poison] = float("nan")
        self.batches = [({"x": a}, b) for a, b in zip(x.split(16), y.split(16), strict=True)]

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = train_dataloader


def fit(model: nn.Module, tmp_path: Path, callbacks: list[Callback] | None = None, data: PointData | None = None, **options: Any) -> Module:
    chosen = Fit(**{"epochs": 2, "learning_rate": 1e-2, **options})
    module = Module(model, chosen, lambda groups, lr: torch.optim.AdamW(groups, lr=lr, fused=True))
    data = data or PointData()
    train(module, data, chosen, stage="float", folder=tmp_path, trainer=TRAINER, logger=None, callbacks=callbacks or [], resume=False)
    return module


class Watch(Callback):
    """Remembers what `look` returns at each step."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(self.look(pl_module))


def on_grid() -> nn.Module:
    model = Points()
    prepare(model, {"first": model.first, "second": model.second}, Affine(bits=3, rule="signed_absmax", group_size=16))
    return model


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate_factor(s, 100, Fit(warmup=0.1)) for s in range(100)]
    assert rates[0] < rates[5] < rates[9] < 1 and max(rates) == rates[10] == 1
    assert all(a > b for a, b in itertools.pairwise(rates[10:])) and rates[-1] < 0.02
    cosine = [learning_rate_factor(s, 100, Fit(warmup=0, schedule="cosine")) for s in range(101)]
    assert cosine[0] == 1 and math.isclose(cosine[50], 0.5) and math.isclose(cosine[100], 0, abs_tol=1e-12)
    assert {learning_rate_factor(s, 100, Fit(warmup=0, schedule="constant")) for s in range(100)} == {1.0}


def test_training_in_float_and_on_the_grid_learns(tmp_path: Path) -> None:
    for model in (Points(), on_grid()):
        before = loss_of(model)
        fit(model, tmp_path, epochs=6)
        assert loss_of(model) < before - 0.05


def test_training_is_in_training_mode_whatever_went_before(tmp_path: Path) -> None:
    model = on_grid().eval()
    watch = Watch(lambda m: all(module.training for module in m.modules()))
    fit(model, tmp_path, [watch])
    assert watch.seen and all(watch.seen)


def loss_of(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return float(torch.stack([F.cross_entropy(model(**x), y) for x, y in PointData().batches]).mean())


def test_fake_quant_starts_and_scales_freeze_at_their_steps(tmp_path: Path) -> None:
    model = on_grid()
    watch = Watch(lambda m: ([layer.enabled for _, layer in fake_layers(m)], [layer.weight_fake.frozen for _, layer in fake_layers(m)]))
    weights = Watch(lambda m: m.model.first.weight.detach().clone())
    fit(model, tmp_path, [FakeQuantSchedule(start_step=4, freeze_step=9), watch, weights])
    enabled = [all(e) for e, _ in watch.seen]
    assert enabled == [False] * 4 + [True] * 16
    frozen = [f[0] is not None for _, f in watch.seen]
    assert frozen == [False] * 9 + [True] * 11
    assert torch.equal(watch.seen[9][1][0]["scale"], watch.seen[-1][1][0]["scale"])
    assert not torch.equal(weights.seen[9], weights.seen[-1])  # the weights go on moving


def test_evaluation_is_on_the_grid_before_fake_quant_starts() -> None:
    model = on_grid()
    for _, layer in fake_layers(model):
        layer.enabled = False
    x = torch.randn(4, 16)
    first = model.first
    assert isinstance(first, FakeLinear)
    assert torch.equal(first.train()(x), F.linear(x, first.weight, first.bias))
    assert torch.equal(first.eval()(x), F.linear(x, first.weight_fake.grid.fake(first.weight), first.bias))


def test_distillation_matches_its_formula() -> None:
    torch.manual_seed(3)
    student, teacher = Points(), Points()
    with torch.no_grad():
        teacher.second.weight.add_(1.0)
    module = Module(student, Fit(), torch.optim.AdamW, teacher, distill_weight=0.3, temperature=2.0)
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    inputs, labels = PointData().batches[0]
    got = float(module.training_step((inputs, labels), 0))
    s, t = student(**inputs).double(), teacher(**inputs).double()
    p, q = torch.softmax(t / 2, -1), torch.softmax(s / 2, -1)
    expected = 0.7 * float(F.cross_entropy(s, labels)) + 0.3 * 4 * float((p * (p / q).log()).sum(-1).mean())
    assert math.isclose(got, expected, rel_tol=1e-5)
    assert all(p.requires_grad for p in teacher.parameters())  # it is the float model, and stays as it was
    assert all(p.grad is None for p in teacher.parameters())
    assert all(name.startswith("model.") for name, _ in module.named_parameters())  # the teacher is in no checkpoint


def test_learned_scales_are_trained_and_not_decayed(tmp_path: Path) -> None:
    model = on_grid()
    for _, layer in fake_layers(model):
        layer.weight_fake.learn_scale(layer.weight)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("scale")}
    module = fit(model, tmp_path)
    assert before and all(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    groups = module.trainer.optimizers[0].param_groups
    scales = {id(p) for n, p in model.named_parameters() if n.endswith("scale")}
    assert scales == {id(p) for p in groups[1]["params"]} & scales and groups[1]["weight_decay"] == 0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        fit(Points(), tmp_path, data=PointData(poison=100), checkpoint_every=2)
    (kept,) = tmp_path.glob("step-*")
    from qtrain.checkpoint import load

    state = load(kept)["state_dict"]
    assert all(bool(torch.isfinite(v).all()) for v in state.values())


def test_the_best_weights_are_put_back(tmp_path: Path) -> None:
    model = Points()

    class Epochs(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.seen.append(float(trainer.callback_metrics["validation_loss"]))

    epochs = Epochs()
    fit(model, tmp_path, [epochs], epochs=5, learning_rate=1.0, keep="best", schedule="constant")
    assert min(epochs.seen) < epochs.seen[-1], "the last epoch was the best: the test shows nothing"
    assert math.isclose(loss_of(model), min(epochs.seen), rel_tol=1e-4)
    assert not (tmp_path / "best").exists()


def test_early_stopping_stops(tmp_path: Path) -> None:
    module = fit(Points(), tmp_path, epochs=50, learning_rate=1.0, schedule="constant", early_stopping=2)
    assert module.trainer.current_epoch < 50


@pytest.mark.parametrize("bad", [{"schedule": "zigzag"}, {"keep": "worst"}, {"warmup": 1.0}, {"epochs": -1}, {"learning_rate": 0.0}])
def test_bad_options_say_what_to_type(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Set finetune\."):
        Fit(**bad)


def test_precision_auto_is_one_that_lightning_knows() -> None:
    assert resolve_precision("auto") in ("bf16-mixed", "32-true")
    assert resolve_precision("16-mixed") == "16-mixed"
