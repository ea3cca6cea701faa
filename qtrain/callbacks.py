"""What happens around training steps: fake-quant schedule, checkpoints to resume from, best weights, progress."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from qtrain.checkpoint import load_weights, remove, save_model, tidy
from qtrain.divergence import StopAtNonFinite, finite_weights
from qtrain.fit import Fit
from qtrain.layers import FakeConv, fake_activations, fake_layers
from qtrain.prepare import choose_once


class FakeQuantSchedule(Callback):
    """Train in float before ``start_step``; keep scales and activation ranges fixed from ``freeze_step`` on (optimizer steps).

    Grids that search for their scales do so every ``search_every`` steps.
    Statistics of the batch-norms that convolutions hold stay from ``freeze_batch_norm_step`` on. Evaluation is always on the grid. All
    are functions of the step and of saved weights, so a resumed run does the same.
    """

    def __init__(self, start_step: int, freeze_step: int | None, freeze_batch_norm_step: int | None = None, search_every: int = 0) -> None:
        self.start_step = start_step
        self.freeze_step = freeze_step
        self.freeze_batch_norm_step = freeze_batch_norm_step
        self.search_every = search_every
        self.scales: dict[str, dict[str, torch.Tensor]] = {}
        self.searched: dict[str, dict[str, torch.Tensor]] = {}
        """Scales of the last search, by layer, where a resumed run goes on from."""
        self._last_search = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a schedule that would never reach the grid."""
        steps = int(pl_module.steps)  # type: ignore[arg-type]
        if self.start_step >= steps:
            raise ValueError(
                f"quantizer.start_step is {self.start_step}, and training has {steps} steps: all of it would be in float. "
                f"Set quantizer.start_step={steps // 4}, say, or quantizer.fit.epochs higher"
            )
        self._last_search = trainer.global_step
        for name, layer in fake_layers(pl_module):
            if name in self.searched:
                layer.weight_fake.frozen = {k: v.to(layer.weight.device) for k, v in self.searched[name].items()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the switches for this step."""
        step = trainer.global_step
        freeze = _reached(self.freeze_step, step)
        if self.search_every and not freeze and step >= self._last_search + self.search_every:
            self._last_search = step
            self._search(pl_module)
        for _, activation in fake_activations(pl_module):
            activation.enabled = step >= self.start_step
            if freeze and activation.observer is not None:
                activation.observer.frozen = True
        for name, layer in fake_layers(pl_module):
            layer.enabled = step >= self.start_step
            if freeze:
                self._freeze(name, layer)
            if isinstance(layer, FakeConv) and not layer.batch_norm_frozen and _reached(self.freeze_batch_norm_step, step):
                layer.freeze_batch_norm()

    def _search(self, module: LightningModule) -> None:
        layers = [(n, layer) for n, layer in fake_layers(module) if layer.weight_fake.searches]
        for _, layer in layers:
            layer.weight_fake.frozen = None
        choose_once(module, "")
        self.searched = {n: {k: v.cpu() for k, v in (layer.weight_fake.frozen or {}).items()} for n, layer in layers}

    def _freeze(self, name: str, layer: Any) -> None:
        fake = layer.weight_fake
        if fake.frozen is None and (fake.scale is None or fake.scale.requires_grad):
            if name in self.scales:  # resumed after the freeze: the scales of that step, not of today's weights
                fake.frozen = {k: v.to(layer.weight.device) for k, v in self.scales[name].items()}
            else:
                fake.freeze(layer.folded()[0])
                frozen: dict[str, torch.Tensor] = fake.frozen or {}
                self.scales[name] = {k: v.detach().cpu() for k, v in frozen.items()}

    def state_dict(self) -> dict[str, Any]:
        """Frozen and searched scales by layer."""
        return {"scales": {n: p for n, p in self.scales.items() if p}, "searched": self.searched}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore frozen and searched scales."""
        self.scales, self.searched = state_dict["scales"], state_dict["searched"]


def _reached(when: int | None, step: int) -> bool:
    return when is not None and step >= when


class StepCheckpoint(Callback):
    """Write `step-N` folders to resume from: every ``every`` optimizer steps and on Ctrl-C; only the newest is kept."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder = folder
        self.every = every
        self.saved = -1
        self.rng: torch.Tensor | None = None
        self.cuda_rng: list[torch.Tensor] = []
        self._consistent = False
        """Between two optimizer steps, and not inside a validation: where a checkpoint can be continued."""

    def state_dict(self) -> dict[str, Any]:
        """State of the generators that draw dropout, so that the resumed run draws the same."""
        return {"rng": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all(), "saved": self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the generators' states for the first batch."""
        self.rng, self.cuda_rng, self.saved = state_dict["rng"], state_dict["cuda"], state_dict["saved"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the generator before the first batch after a resume: building the loader drew from it."""
        self._consistent = False
        if self.rng is not None:
            torch.set_rng_state(self.rng.cpu())
            if len(self.cuda_rng) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all([state.cpu() for state in self.cuda_rng])
            self.rng = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save every `every` optimizer steps."""
        self._consistent = (batch_idx + 1) % trainer.accumulate_grad_batches == 0  # gradients in the making are not saved
        step = trainer.global_step
        if self.every and self._consistent and step % self.every == 0 and step != self.saved:
            self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Half a validation cannot be continued."""
        self._consistent = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """On Ctrl-C between two steps, save where we are; inside a step the last checkpoint stands."""
        stopped = self.every and isinstance(exception, KeyboardInterrupt) and self._consistent
        if stopped and trainer.global_step > max(self.saved, 0) and finite_weights(pl_module):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self.saved = trainer.global_step
        target = self.folder / f"step-{self.saved:08d}"
        trainer.save_checkpoint(target, weights_only=False)
        tidy(self.folder, keep=target)


class KeepBest(Callback):
    """Keep the weights of the validation with the lowest loss, and put them back at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "best"
        self.best = float("inf")

    def state_dict(self) -> dict[str, Any]:
        """The lowest loss so far; the weights are on disk."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the lowest loss."""
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if better."""
        loss = float(trainer.callback_metrics.get("validation_loss", float("inf")))
        if loss < self.best:
            self.best = loss
            save_model(self.folder, pl_module.model)  # type: ignore[arg-type]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the best weights."""
        if self.folder.exists():
            load_weights(self.folder, pl_module.model)  # type: ignore[arg-type]
            remove(self.folder)


class PlainProgress(Callback):
    """Progress for logs and pipes, where a bar cannot redraw itself: a line every 10 % with loss, steps/s and time left."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.started = 0.0
        self.first = 0
        self.shown = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started, self.first = time.monotonic(), trainer.global_step
        self.shown = int(10 * trainer.global_step / max(1, int(pl_module.steps)))  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Print when another tenth is done."""
        total, step = int(pl_module.steps), trainer.global_step  # type: ignore[arg-type]
        tenth = int(10 * step / max(1, total))
        if tenth <= self.shown:
            return
        self.shown = tenth
        rate = (step - self.first) / max(1e-9, time.monotonic() - self.started)
        loss = float(trainer.callback_metrics.get("loss", float("nan")))
        print(
            f"  {self.stage}: step {step}/{total}  loss {loss:.4f}  {rate:.2f} steps/s  {(total - step) / max(rate, 1e-9):.0f} s left",
            flush=True,
        )


def progress(stage: str) -> Callback:
    """A Rich bar on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        return RichProgressBar(leave=True, theme=RichProgressBarTheme(metrics_format=".4f"))
    return PlainProgress(stage)


def standard_callbacks(fit: Fit, stage: str, folder: Path) -> list[Callback]:
    """What every training stage has."""
    callbacks: list[Callback] = [progress(stage), StopAtNonFinite(fit, stage, folder), StepCheckpoint(folder, fit.checkpoint_every)]
    if fit.early_stopping:
        callbacks.append(EarlyStopping("validation_loss", patience=fit.early_stopping))
    if fit.keep == "best":
        callbacks.append(KeepBest(folder))
    return callbacks
