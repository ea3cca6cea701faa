"""Training that diverges stops before the step that would spoil the weights, and says where and what to change.

A NaN comes by one of three ways, and each is looked for before anything of it can be saved:

    loss        of any batch of the step
    gradient    of a finite loss (the square root of 0, an overflow in bfloat16): its norm is not finite
    weights     of a finite gradient, where the step is too large: looked at before a checkpoint is written, and at the end

so that a `step-N` folder, and what a stage leaves behind, is always from before.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qtrain.checkpoint import newest
from qtrain.fit import OPTIONS, Fit


class StopAtNonFinite(Callback):
    """Stop before a step whose loss or gradient is NaN or infinite, so that neither the weights nor a checkpoint ever hold what it makes.

    One answer is waited for per optimizer step, which costs a GPU less than one per loss. Where gradients are scaled (float16) infinite
    ones are usual, and the scaler leaves those steps out by itself.
    """

    def __init__(self, fit: Fit, stage: str, folder: Path) -> None:
        """``folder`` is where the stage's `step-N` are."""
        self.fit, self.stage, self.folder = fit, stage, folder
        self._losses: list[torch.Tensor] = []
        """Of the batches since the last step."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Remember the loss."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Check the losses and the gradient of this step."""
        losses, self._losses = torch.stack(self._losses), []
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        norm = torch.zeros(()) if scaled or not gradients else torch.nn.utils.get_total_norm(gradients)
        if bool(torch.isfinite(losses).all() & torch.isfinite(norm).to(losses.device)):
            return
        bad = losses[~torch.isfinite(losses)]
        what = f"the loss is {float(bad[0])}" if len(bad) else f"the gradient is not finite (its norm is {float(norm)}), first that of "
        what += "" if len(bad) else _first((n, p.grad) for n, p in pl_module.named_parameters())
        raise self._stopped(f"{what} at optimizer step {trainer.global_step + 1}, which was not taken", trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check the weights before they are saved: a step that is too large makes them infinite of a finite gradient."""
        every = self.fit.checkpoint_every
        if every and trainer.global_step % every == 0:
            self._check_weights(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what the stage has come to."""
        self._check_weights(trainer, pl_module)

    def _check_weights(self, trainer: Trainer, module: LightningModule) -> None:
        if not finite_weights(module):
            first = _first((n, p) for n, p in module.named_parameters() if p.requires_grad)
            raise self._stopped(f"the weight {first} is not finite after optimizer step {trainer.global_step}", trainer)

    def _stopped(self, what: str, trainer: Trainer) -> ValueError:
        last, option = newest(self.folder), OPTIONS[self.stage]
        kept = f"the checkpoint of step {int(last.name.removeprefix('step-'))} is kept ({last})" if last else "there is no checkpoint yet"
        exact = "" if trainer.precision == "32-true" else ", or trainer.precision=32-true"
        return ValueError(
            f"{what}; {kept}. The stage {self.stage!r} trains with {option}.learning_rate={self.fit.learning_rate:g}: start again with "
            f"{option}.learning_rate={self.fit.learning_rate / 10:g}, say{exact}"
        )


def finite_weights(module: torch.nn.Module) -> bool:
    """Whether every trained weight is neither NaN nor infinite."""
    trained = [p.detach() for p in module.parameters() if p.requires_grad]
    return not trained or bool(torch.stack([torch.isfinite(p).all().cpu() for p in trained]).all())


def _first(named: Iterable[tuple[str, torch.Tensor | None]]) -> str:
    """Name of the first tensor with a value that is not finite, as the model knows it."""
    found = (name for name, tensor in named if tensor is not None and not bool(torch.isfinite(tensor).all()))
    return next(found, "all together").removeprefix("model.")
