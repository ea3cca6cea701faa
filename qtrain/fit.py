"""One training stage: options, the Lightning trainer, resume.

`Fit` is what a user sets per stage (`finetune.epochs=3`, `quantizer.fit.learning_rate=1e-4`); the trainer, logger and optimizer are
third-party classes named in `conf/` and built here, at the one place where `_target_` is instantiated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

SCHEDULES = ("linear", "cosine", "constant")
OPTIONS = {"float": "finetune", "qat": "quantizer.fit", "adapter": "adapter.fit"}
"""Where the options of each stage are."""
OWN_KEYS = {
    "max_epochs": "finetune.epochs or quantizer.fit.epochs",
    "max_steps": "finetune.max_steps or quantizer.fit.max_steps",
    "callbacks": "the options of finetune and quantizer",
    "logger": "logger=csv, tensorboard, wandb or none",
    "plugins": "nothing: checkpoints are safetensors",
    "default_root_dir": "run_dir",
    "enable_checkpointing": "finetune.checkpoint_every or quantizer.fit.checkpoint_every",
    "enable_progress_bar": "nothing: it follows the terminal",
    "num_sanity_val_steps": "nothing: it is 0",
    "use_distributed_sampler": "nothing: one device trains",
}
"""Options of Lightning's Trainer that have another home here."""


@dataclass
class Fit:
    """How one stage trains."""

    epochs: int = 2
    """Passes over the training split; 0 skips the stage's training."""
    max_steps: int = -1
    """Optimizer steps at most; -1 for no limit."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    schedule: str = "linear"
    """Learning rate after the warm-up: linear or cosine (both to 0), or constant."""
    early_stopping: int = 0
    """Stop after this many validations without a lower validation loss; 0 for never."""
    keep: str = "last"
    """Which weights to go on with: last, or best (lowest validation loss, checked after each epoch)."""
    checkpoint_every: int = 200
    """Optimizer steps between checkpoints from which `resume=` continues; 0 for none."""
    neftune_alpha: float | None = None
    """Noise on the input embeddings while training (NEFTune, Jain et al. 2023): 5 to 15 in the paper; null for none."""
    gradient_checkpointing: bool = False
    """Compute transformer blocks again in the backward pass instead of remembering them: less memory, about a third more time."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule is {self.schedule!r}; valid: {', '.join(SCHEDULES)}. Set finetune.schedule=linear (or quantizer.fit.schedule)."
            )
        if self.keep not in ("last", "best"):
            raise ValueError(f"keep is {self.keep!r}; valid: last, best. Set finetune.keep=last (or quantizer.fit.keep).")
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"warmup is {self.warmup}; a share of the steps, 0 to below 1. Set finetune.warmup=0.1 (or quantizer.fit.warmup)."
            )
        if self.early_stopping < 0 or self.checkpoint_every < 0 or self.max_steps < -1:
            raise ValueError(
                f"early_stopping={self.early_stopping}, checkpoint_every={self.checkpoint_every} and max_steps={self.max_steps} must be at "
                "least 0, 0 and -1. Set finetune.early_stopping=0 finetune.checkpoint_every=200 finetune.max_steps=-1 (or quantizer.fit.…)"
            )
        if self.neftune_alpha is not None and not 0 < self.neftune_alpha < float("inf"):
            raise ValueError(
                f"neftune_alpha is {self.neftune_alpha}; above 0, or null for no noise. Set finetune.neftune_alpha=5 (or quantizer.fit.…)"
            )
        if self.epochs < 0 or self.learning_rate <= 0:
            raise ValueError(
                f"epochs is {self.epochs} and learning_rate {self.learning_rate}; epochs is at least 0 and learning_rate above 0. "
                "Set finetune.epochs=2 finetune.learning_rate=5e-5 (or quantizer.fit.…)."
            )


@dataclass
class Distill:
    """Distillation from the float model."""

    weight: float = 0.0
    """Share of the distillation loss, 0 (off) to 1 (nothing else)."""
    temperature: float = 2.0
    """Softens both distributions; above 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1 or self.temperature <= 0:
            raise ValueError(
                f"distill.weight is {self.weight} and distill.temperature {self.temperature}; "
                "the weight is from 0 to 1, the temperature above 0. "
                "Set quantizer.distill.weight=0.5 quantizer.distill.temperature=2, say."
            )


def check(config: Any, model: Any, device: torch.device) -> None:
    """Refuse at once what a later stage could not do.

    Args:
        config: `qtrain.config.Config`.
        model: the float model.
        device: where it will train.

    Raises:
        ValueError: naming the stage's option, or the optimizer.
    """
    from qtrain.neftune import input_embedding
    from qtrain.optimizers import require_device
    from qtrain.recompute import require_recomputable

    stages = {"float": config.finetune, "qat": getattr(config.quantizer, "fit", None), "adapter": getattr(config.adapter, "fit", None)}
    training = {OPTIONS[stage]: fit for stage, fit in stages.items() if fit is not None and fit.epochs and fit.max_steps}
    for option, fit in training.items():
        if fit.neftune_alpha is not None:
            input_embedding(model, option)
        if fit.gradient_checkpointing:
            require_recomputable(model, option)
    if training:
        require_device(config.optimizer, device)
        build(config.optimizer, "optimizer")


def build(node: dict[str, Any], key: str, **kwargs: Any) -> Any:
    """Instantiate a third-party class from a config node: the only call site of `hydra.utils.instantiate`.

    Raises:
        ValueError: if the class cannot be imported or refuses its arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, **kwargs, _convert_="all")
    except (InstantiationException, ModuleNotFoundError) as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{key} names {node.get('_target_')}, which could not be built: {cause}. "
            f"Choose another ({key}=…; the options are listed by --help) or install what is missing."
        ) from error


def resolve_precision(precision: str, accelerator: str = "auto") -> str:
    """Turn `auto` into bf16-mixed where bfloat16 products are faster than float32 ones, and 32-true elsewhere."""
    import torch

    if precision != "auto":
        return precision
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    capable = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    )
    return "bf16-mixed" if capable else "32-true"


def train(
    module: LightningModule,
    data: LightningDataModule,
    fit: Fit,
    *,
    stage: str,
    folder: Path,
    trainer: dict[str, Any],
    logger: dict[str, Any] | None,
    callbacks: list[Callback],
    resume: bool,
) -> Trainer:
    """Train ``module`` and leave its weights in it.

    Args:
        stage: "float", "qat" or "adapter"; names the logs, and where the options are (`OPTIONS`).
        folder: where this stage's resumable checkpoints go.
        trainer, logger: config nodes of third-party classes.
        resume: continue from the newest complete checkpoint in ``folder``, if there is one.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after a resumable checkpoint was written.
        ValueError: if a loss, gradient or weight is not finite, the model cannot do what ``fit`` asks, or a checkpoint to resume from is
            corrupt.
    """
    from qtrain.callbacks import standard_callbacks
    from qtrain.checkpoint import SafeCheckpointIO, newest

    node = checked(trainer)
    node["precision"] = resolve_precision(str(node.get("precision", "auto")), str(node.get("accelerator", "auto")))
    last = newest(folder) if resume else None
    instance: Trainer = build(
        node,
        "trainer",
        max_epochs=fit.epochs,
        max_steps=fit.max_steps,
        callbacks=[*callbacks, *standard_callbacks(fit, stage, folder)],
        logger=build(logger, "logger", name=stage) if logger else False,
        plugins=[SafeCheckpointIO()],
        default_root_dir=str(folder),
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    module.train()  # Lightning keeps the mode that modules are in, and evaluation has put them in evaluation mode
    try:
        with as_asked(module.model, fit, OPTIONS[stage]):
            instance.fit(module, datamodule=data, ckpt_path=str(last) if last else None, weights_only=True)
    except SystemExit:  # Lightning turns Ctrl-C into exit(1)
        raise KeyboardInterrupt from None
    finally:
        close(instance.logger)
    return instance


@contextmanager
def as_asked(model: Any, fit: Fit, option: str) -> Iterator[None]:
    """``model`` as ``fit`` wants it while it trains."""
    from qtrain.neftune import noisy_embeddings
    from qtrain.recompute import recomputed

    with ExitStack() as stack:
        if fit.neftune_alpha is not None:
            stack.enter_context(noisy_embeddings(model, fit.neftune_alpha, option))
        if fit.gradient_checkpointing:
            stack.enter_context(recomputed(model, option))
        yield


def checked(trainer: dict[str, Any]) -> dict[str, Any]:
    """A copy of the trainer's options.

    Raises:
        ValueError: for an option that qtrain sets itself, and for several devices.
    """
    for key, instead in OWN_KEYS.items():
        if key in trainer:
            raise ValueError(f"trainer.{key} is set by qtrain; given {trainer[key]!r}. Set {instead}")
    if str(trainer.get("devices", 1)) not in ("1", "[0]"):
        raise ValueError(f"trainer.devices is {trainer['devices']}; this version trains on one device. Set trainer.devices=1")
    return dict(trainer)


def close(logger: Any) -> None:
    """End a logger's run, so that the next stage or job gets one of its own."""
    finish = getattr(getattr(logger, "experiment", None), "finish", None)  # wandb
    if finish is not None:
        finish()
