"""Noise on embeddings: its size, where it is and is not, and that a resumed run draws the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from qtrain.fit import Fit, check
from qtrain.neftune import noisy_embeddings
from tests.tiny_fit import language_fit, small_llama


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("length", "width", "alpha"), [(64, 32, 5.0), (16, 128, 15.0)])
def test_noise_is_uniform_and_its_size_is_that_of_the_formula(length: int, width: int, alpha: float) -> None:
    model = small_llama(hidden_size=width).train()
    ids = torch.randint(0, 512, (200, length))
    exact = model.get_input_embeddings()(ids)
    with noisy_embeddings(model, alpha, "finetune"):
        noise = model.get_input_embeddings()(ids) - exact
        again = model.get_input_embeddings()(ids) - exact
    bound = alpha / (length * width) ** 0.5
    assert 0.999 * bound < float(noise.abs().max()) <= 1.0001 * bound
    assert float(noise.std()) == pytest.approx(bound / 3**0.5, rel=0.01)
    assert float(noise.flatten(1).norm(dim=1).mean()) == pytest.approx(alpha / 3**0.5, rel=0.01)  # whatever the length and the width
    assert not torch.equal(noise, again)


def test_only_training_has_noise_and_only_within_the_stage() -> None:
    model = small_llama().eval()
    ids = torch.randint(0, 512, (2, 8))
    with torch.no_grad():
        exact = model(ids).logits
        with noisy_embeddings(model, 5.0, "finetune"):
            assert torch.equal(model(ids).logits, exact)
            assert not torch.equal(model.train()(ids).logits, exact)
        assert torch.equal(model(ids).logits, exact)
        with pytest.raises(RuntimeError, match="stop"), noisy_embeddings(model, 5.0, "finetune"):
            raise RuntimeError("stop")
        assert torch.equal(model(ids).logits, exact)


CPU = torch.device("cpu")
ADAMW = {"_target_": "torch.optim.AdamW", "_partial_": True}


class Interrupt(Callback):
    """Ctrl-C after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("one_thread")
def test_a_stage_trains_with_noise_that_the_seed_and_a_checkpoint_determine(tmp_path: Path) -> None:
    def trained(*callbacks: Callback, model: Any = None, **options: Any) -> Tensor:
        lm = model if model is not None else small_llama()
        language_fit(lm, tmp_path, list(callbacks), **{"neftune_alpha": 5.0, "checkpoint_every": 3, **options})
        assert not lm.get_input_embeddings()._forward_hooks
        return weights(lm)

    whole = trained()
    assert torch.equal(whole, trained())
    assert not torch.equal(whole, trained(seed=1))
    assert not torch.equal(whole, trained(neftune_alpha=None))
    lm = small_llama()
    with pytest.raises(KeyboardInterrupt):
        trained(Interrupt(5), model=lm)
    assert not lm.get_input_embeddings()._forward_hooks
    assert torch.equal(trained(resume=True, seed=7), whole)


@pytest.mark.usefixtures("one_thread")
def test_validation_has_no_noise(tmp_path: Path) -> None:
    class Losses(Callback):
        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            self.loss = float(trainer.callback_metrics["validation_loss"])

    exact, noisy = Losses(), Losses()
    language_fit(small_llama(), tmp_path, [exact], learning_rate=1e-12, max_steps=2, trainer={"val_check_interval": 1})
    language_fit(small_llama(), tmp_path, [noisy], learning_rate=1e-12, max_steps=2, trainer={"val_check_interval": 1}, neftune_alpha=1e4)
    assert exact.loss == pytest.approx(noisy.loss, rel=1e-6)


@pytest.mark.parametrize("stage", ["finetune", "quantizer.fit", "adapter.fit"])
def test_a_model_without_embeddings_is_refused_when_a_run_loads(stage: str) -> None:
    noisy, plain = Fit(neftune_alpha=5.0), Fit()
    fits = {name: noisy if name == stage else plain for name in ("finetune", "quantizer.fit", "adapter.fit")}
    config = SimpleNamespace(
        finetune=fits["finetune"],
        quantizer=SimpleNamespace(fit=fits["quantizer.fit"]),
        adapter=SimpleNamespace(fit=fits["adapter.fit"]),
        optimizer=ADAMW,
    )
    check(config, small_llama(), CPU)
    with pytest.raises(ValueError, match=rf"Linear names none \(get_input_embeddings\).*Set {stage}.neftune_alpha=null"):
        check(config, nn.Linear(2, 2), CPU)
    noisy.epochs = 0
    check(config, nn.Linear(2, 2), CPU)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bad_strength_says_what_to_type(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"neftune_alpha is .*Set finetune.neftune_alpha=5"):
        Fit(neftune_alpha=alpha)
