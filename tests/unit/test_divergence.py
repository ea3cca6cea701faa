"""Training that diverges: where it stops, what is left of it, and that it goes on from there to where it would have come."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from qtrain.checkpoint import load
from qtrain.divergence import StopAtNonFinite
from qtrain.fit import Fit
from qtrain.language_task import TASK
from qtrain.module import Module
from tests.tiny_fit import language_fit, small_llama, small_text

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class BadLoss(Module):
    """Its loss is NaN in the seventh batch."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss * float("nan") if index == 6 else loss


class BadGradient(Module):
    """The gradient of one weight has a NaN in the seventh batch, of a finite loss."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        if index == 6:
            weight = self.model.get_parameter(WEIGHT)
            spoilt = torch.zeros_like(weight).index_fill_(1, torch.tensor([3]), float("nan"))
            handle = weight.register_hook(lambda g: [g + spoilt, handle.remove()][0])
        return super().training_step(batch, index)


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


@pytest.mark.parametrize(("bad", "what"), [(BadLoss, "the loss is nan"), (BadGradient, rf"gradient is not finite .*{WEIGHT}")])
@pytest.mark.parametrize("every", [1, 4])
def test_it_stops_before_the_step_and_goes_on_from_the_checkpoint(tmp_path: Path, bad: type[Module], what: str, every: int) -> None:
    whole, model, losses = small_llama(), small_llama(), Losses()
    language_fit(whole, tmp_path, checkpoint_every=0)
    kept = 6 if every == 1 else 4
    with pytest.raises(ValueError, match=rf"{what} at optimizer step 7, which was not taken; the checkpoint of step {kept} is kept"):
        language_fit(model, tmp_path, [losses], module=bad, checkpoint_every=every)
    assert len(losses.seen) == 6 and all(torch.isfinite(torch.tensor(losses.seen)))
    assert bool(torch.isfinite(weights(model)).all())
    [folder] = (tmp_path / "steps").glob("step-*")
    state = load(folder)
    assert folder.name == f"step-{kept:08d}" and state["global_step"] == kept
    assert all(bool(torch.isfinite(v).all()) for v in state["state_dict"].values())
    if every == 1:  # what is in memory is what was saved: the bad step changed nothing
        assert all(torch.equal(v, state["state_dict"][f"model.{n}"]) for n, v in model.state_dict().items())
    resumed = small_llama()
    language_fit(resumed, tmp_path, checkpoint_every=every, resume=True)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_bad_batch_among_several_of_a_step_is_found(tmp_path: Path) -> None:
    model = small_llama()
    with pytest.raises(ValueError, match=r"the loss is nan at optimizer step 3, which was not taken"):
        language_fit(model, tmp_path, module=BadLoss, trainer={"accumulate_grad_batches": 3})
    assert bool(torch.isfinite(weights(model)).all())


@pytest.mark.parametrize("every", [1, 0, 200])
def test_weights_that_a_step_made_infinite_are_never_saved(tmp_path: Path, every: int) -> None:
    too_far = partial(torch.optim.SGD, weight_decay=1e38)
    with pytest.raises(ValueError, match=r"the weight model.* is not finite after optimizer step 1; there is no checkpoint yet"):
        language_fit(small_llama(), tmp_path, max_steps=1, learning_rate=1e6, optimizer=too_far, checkpoint_every=every)
    assert not list(tmp_path.glob("steps/step-*"))


@pytest.mark.parametrize(("stage", "option"), [("float", "finetune"), ("qat", "quantizer.fit"), ("adapter", "adapter.fit")])
def test_the_message_has_the_option_of_the_stage(tmp_path: Path, stage: str, option: str) -> None:
    with pytest.raises(ValueError, match=rf"trains with {option}.learning_rate=0.01: start again with {option}.learning_rate=0.001, say$"):
        language_fit(small_llama(), tmp_path, module=BadLoss, stage=stage)
    with pytest.raises(ValueError, match=r"say, or trainer.precision=32-true$"):
        language_fit(small_llama(), tmp_path, module=BadLoss, stage=stage, trainer={"precision": "bf16-mixed"})


def test_a_validation_does_not_hide_a_bad_loss_from_the_best_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at optimizer step 7"):
        language_fit(small_llama(), tmp_path, module=BadLoss, keep="best", trainer={"val_check_interval": 2})
    best = load(tmp_path / "steps" / "best")
    assert all(bool(torch.isfinite(v).all()) for v in best["state"].values())


def test_infinite_gradients_of_scaled_losses_are_left_to_the_scaler(tmp_path: Path) -> None:
    model = small_llama()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    fit = Fit(max_steps=8, learning_rate=1e-3)
    module = BadGradient(model, fit, lambda groups, lr: torch.optim.AdamW(groups, lr=lr), task=TASK)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=8,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        callbacks=[StopAtNonFinite(fit, "float", tmp_path)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=small_text(tmp_path))
    assert scaler.get_scale() == 2.0**15  # halved once
    assert bool(torch.isfinite(weights(model)).all())
