"""The one LightningModule: the task's loss, and distillation from a float teacher where asked.

Float fine-tuning, QAT and every later method train through it; what differs between them is which layers the model has and
which callbacks run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from qtrain.checkpoint import has_adapter, moving_state, require_same_base
from qtrain.evaluate import Batch, logits_of
from qtrain.fit import Fit
from qtrain.placement import is_spread
from qtrain.tasks import TASK, Task


class Module(LightningModule):
    """Trains ``model`` on batches of (keyword inputs, labels)."""

    def __init__(
        self,
        model: nn.Module,
        fit: Fit,
        optimizer: Callable[..., torch.optim.Optimizer],
        teacher: nn.Module | None = None,
        distill_weight: float = 0.0,
        temperature: float = 1.0,
        task: Task = TASK,
    ) -> None:
        """``distill_weight`` w mixes (1 - w) * loss + w * T^2 * KL(teacher || student) at temperature T (Hinton et al. 2015)."""
        super().__init__()
        self.model = model
        self.task = task
        self.fit_options = fit
        self.make_optimizer = optimizer
        self.distill_weight = distill_weight
        self.temperature = temperature
        self.steps = 0
        """Optimizer steps of the stage, known when training starts."""
        self._first = self._seen = 0
        """Examples (scored tokens) of the first batch since the last optimizer step, and of all of them."""
        self.strict_loading = not has_adapter(model)
        # in a list: neither a submodule, nor in checkpoints, nor put in training mode
        self._teacher = [teacher.eval()] if teacher is not None and distill_weight > 0 else []

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to` and its like do to each tensor; a model that is spread over devices stays where it is."""
        return self if is_spread(self.model) else super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What a checkpoint holds: of a model with an adapter, only what is trained."""
        if has_adapter(self.model):
            return moving_state(self.model, "model.")
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which base an adapter belongs to."""
        if has_adapter(self.model):
            checkpoint["base_sha256"] = self.model.base_sha256

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse an adapter of another base.

        Raises:
            ValueError: naming both hashes.
        """
        if has_adapter(self.model):
            require_same_base("the checkpoint", checkpoint.get("base_sha256"), self.model)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Keyword inputs -> logits [N, C]."""
        return logits_of(self.model(**inputs))

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Loss of one batch."""
        teacher = self._teacher[0].to(self.device) if self._teacher else None
        loss = self.task.loss(self.model, batch, teacher, self.distill_weight, self.temperature)
        self.log("loss", loss.detach(), prog_bar=True)
        if self._trainer is None or self.trainer.accumulate_grad_batches == 1:
            return loss
        count = self.task.count(batch)
        self._first = self._first or count
        self._seen += count
        return loss * (count / self._first)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients of several batches are those of one: each example, of a text each scored token, weighs the same in the mean.

        Lightning has divided each batch's own mean by the number of batches, also where an epoch ends before there are as many.
        """
        if self._seen:
            factor = self.trainer.accumulate_grad_batches * self._first / self._seen
            for p in self.parameters():
                if p.grad is not None and factor != 1:
                    p.grad.mul_(factor)
        self._first = self._seen = 0

    def validation_step(self, batch: Batch, _: int) -> None:
        """Log what the task validates by."""
        metrics, count = self.task.validate(self.model, batch)
        self.log_dict(metrics, prog_bar=True, batch_size=count)  # type: ignore[arg-type]

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip; Lightning refuses to under bf16-mixed with a fused optimizer, which is only wrong where gradients are scaled (float16)."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            if gradient_clip_val and optimizer.defaults.get("fused"):
                raise ValueError(
                    "trainer.precision=16-mixed scales gradients, which a fused optimizer undoes only inside its step, after clipping. "
                    "Set optimizer.fused=false, or trainer.precision=bf16-mixed"
                )
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        elif gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> Any:
        """Weight decay on matrices only; the schedule advances each optimizer step."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        decayed = [p for n, p in trained.items() if p.ndim > 1 and not n.endswith("weight_fake.scale")]
        rest = [p for n, p in trained.items() if p.ndim <= 1 or n.endswith("weight_fake.scale")]
        optimizer = self.make_optimizer([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=self.fit_options.learning_rate)
        self.steps = total_steps(self.trainer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, self.steps, self.fit_options))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def total_steps(trainer: Any) -> int:
    """Optimizer steps of the whole stage.

    Not `trainer.estimated_stepping_batches`: that makes the training loader before a resumed trainer knows how far it had come.
    """
    batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
    batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    steps = math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs
    return min(steps, trainer.max_steps) if trainer.max_steps >= 0 else steps


def learning_rate_factor(step: int, steps: int, fit: Fit) -> float:
    """Share of the peak learning rate at ``step`` of ``steps``."""
    warmup = math.ceil(fit.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if fit.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return max(0.0, 1 - done) if fit.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
