"""The stages of a run, each a function of what they share; `run.py` puts them in order."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

import qtrain
from exporters.base import ExportJob, ReceiptFailed
from qtrain.checkpoint import load_weights, save_model, tidy
from qtrain.evaluate import classification_metrics, compare_to_float, layer_table, predict, sizes
from qtrain.fit import Fit, build, train
from qtrain.layers import fake_layers
from qtrain.malloc import release
from qtrain.module import Module
from qtrain.receipt import nmse
from qtrain.record import Record
from qtrain.sensitivity import analyze, keep_most_harmful, print_analysis


@dataclass
class Setup:
    """What the stages share."""

    config: Any
    """`qtrain.config.Config`."""
    record: Record
    folder: Path
    data: Any
    device: torch.device
    batches: list[tuple[dict[str, Tensor], Tensor]]
    """The whole test split, in a fixed order."""
    labels: Tensor


def load(config: Any, record: Record, folder: Path) -> tuple[Setup, nn.Module]:
    """Data, model and device."""
    data = config.data.build(config.model.processor(), config.seed)
    model = config.model.build(len(data.label_names), config.seed, data.label_names)
    for note in data.notes:
        record.note(note)
    fresh = getattr(config.model, "new_parameters", [])
    if fresh and config.finetune.epochs == 0:
        raise ValueError(
            f"finetune.epochs=0, but {len(fresh)} parameters of the model are new and untrained, the first {fresh[0]}. "
            "Set finetune.epochs=2, say, or model.path to a model with a trained classifier"
        )
    batches = list(data.test_dataloader())
    wants_gpu = config.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    device = torch.device("cuda" if wants_gpu and torch.cuda.is_available() else "cpu")
    return Setup(config, record, folder, data, device, batches, torch.cat([labels for _, labels in batches])), model


def preflight(setup: Setup, model: nn.Module) -> None:
    """Find in seconds what would fail after minutes: patterns, shapes, and exporters that cannot hold the grids."""
    scheme, trial = copy.deepcopy(setup.config.quantizer), copy.deepcopy(model)
    for module in trial.modules():  # norms that begin at zero, as fresh residual networks have them, would make constants
        scale = getattr(module, "weight", None)
        if isinstance(scale, nn.Parameter) and scale.ndim == 1 and not scale.any():
            nn.init.ones_(scale)
    example = setup.data.example_inputs(2)
    always = setup.config.model.always_float(trial)
    trial, _ = scheme.prepare(scheme.transform(trial, [example], always), always, example)
    trial = scheme.convert(scheme.calibrate(trial, [example]))
    for exporter in setup.config.export.values():
        exporter.refuse(trial)


def quantize(setup: Setup, float_model: nn.Module) -> nn.Module:
    """Put a copy of ``float_model`` on the grid: transform, find out what to keep in float, prepare, calibrate."""
    config, record = setup.config, setup.record
    scheme, always = config.quantizer, config.model.always_float(float_model)
    calibration = [inputs for inputs, _ in setup.data.calibration_dataloader()] if scheme.needs_data else []
    model = scheme.transform(copy.deepcopy(float_model), calibration, always)
    if config.analyze or scheme.automatic:
        rows = analyze(scheme, model, always, calibration, list(setup.data.val_dataloader()), config.analyze_examples)
        record.data["analysis"] = rows
        print_analysis(rows)
        always = [*always, *keep_most_harmful(rows, scheme.automatic, record)]
    model, record.data["kept_float"] = scheme.prepare(model, always, setup.data.example_inputs(2))
    model = scheme.calibrate(model, calibration)
    record.data |= scheme.details
    record_fallbacks(setup)
    return model


def record_fallbacks(setup: Setup) -> None:
    """What the quantizer could not do as asked, since it was last asked."""
    fallbacks = setup.config.quantizer.fallbacks
    while fallbacks:
        fallback = fallbacks.pop(0)
        setup.record.fallback(fallback["name"], fallback["why"])


def fit_stage(setup: Setup, stage: str, model: nn.Module, fit: Fit, callbacks: Any = (), teacher: nn.Module | None = None) -> None:
    """Train ``model`` in place, or load what an earlier run of this folder trained."""
    if fit.epochs == 0 or fit.max_steps == 0:
        return
    config, folder = setup.config, setup.folder / "checkpoints"
    done, steps = folder / stage, folder / f"{stage}-steps"
    if config.resume and done.exists():
        load_weights(done, model)
        setup.record.note(f"{stage}: already trained, loaded from {done}")
        return
    seed_everything(config.seed, verbose=False)
    distill = getattr(config.quantizer, "distill", None)
    optimizer = build(config.optimizer, "optimizer")
    module = Module(model, fit, optimizer, teacher, distill.weight if distill else 0.0, distill.temperature if distill else 1.0)
    train(
        module,
        setup.data,
        fit,
        stage=stage,
        folder=steps,
        trainer=config.trainer,
        logger=config.logger,
        callbacks=list(callbacks),
        resume=bool(config.resume),
    )
    save_model(done, model, stage=stage)
    tidy(steps, keep=None)
    del module, optimizer
    release()


def measure(setup: Setup, stage: str, model: nn.Module, float_logits: Tensor | None = None) -> Tensor:
    """Logits on the test split; the metrics go into the record."""
    logits = predict(model.to(setup.device), setup.batches, f"evaluating {stage}")
    metrics = classification_metrics(logits, setup.labels)
    if float_logits is not None:
        metrics |= compare_to_float(logits, float_logits)
    setup.record.data["stages"][stage] = metrics
    return logits


def validate(setup: Setup, model: nn.Module) -> dict[str, float]:
    """Metrics on the validation split, which sweepers choose by: choosing by the test split would spoil it."""
    batches = list(setup.data.val_dataloader())
    logits = predict(model, batches, "evaluating the validation split")
    return classification_metrics(logits, torch.cat([labels for _, labels in batches]))


def convert(setup: Setup, model: nn.Module, logits: Tensor, float_model: nn.Module) -> tuple[nn.Module, Tensor]:
    """Integer codes instead of fake-quant, the proof that no bit of any logit changed, and the logits."""
    scheme = setup.config.quantizer
    trained = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    trained |= {f"{name}.weight": layer.folded()[0].detach() for name, layer in fake_layers(model)}
    model = scheme.convert(model).to(setup.device)
    record_fallbacks(setup)
    trained |= getattr(model, "float_weights", {})  # of a graph of torch's, whose layers have names only now
    converted = predict(model, setup.batches, "convert == prepare")
    exact = torch.equal(converted, logits)
    if not exact and scheme.exact:
        worst = float((converted - logits).abs().max())
        raise ValueError(
            f"the converted model is not the trained one: logits differ by up to {worst:.3g}. This is a defect of qtrain; please report it"
        )
    setup.record.data["convert_equals_prepare"] = {"logits": converted.numel(), "bit_exact": exact, "nmse": nmse(logits, converted)}
    setup.record.data["quantized"] = layer_table(model, trained)
    setup.record.data["size"] = sizes(model, float_model)
    save_model(setup.folder / "checkpoints" / "converted", model, config=setup.record.data["config"])
    return model, converted


def export(setup: Setup, exporter: Any, model: nn.Module, float_model: nn.Module, logits: Tensor, float_logits: Tensor) -> None:
    """Write one artefact and its receipt."""
    config = setup.config

    def metrics(runtime: Tensor, labels: Tensor) -> dict[str, float]:
        return classification_metrics(runtime, labels) | compare_to_float(runtime, float_logits)

    job = ExportJob(
        model=model.cpu(),
        float_model=float_model.cpu(),
        example_inputs=setup.data.example_inputs(2),
        batches=setup.batches,
        training_logits=logits,
        metrics=metrics,
        folder=setup.folder / "exports",
        max_length=config.model.max_positions(model),
        vocab_size=config.model.vocabulary(model),
        metadata={"recipe": config.recipe, "qtrain": qtrain.__version__},
    )
    try:
        entry = exporter.export(job)
    except ReceiptFailed as failure:
        setup.record.data["exports"].append(failure.entry)
        raise
    for fallback in entry["receipt"].get("fallbacks", []):
        setup.record.fallback(fallback["name"], fallback["why"])
    setup.record.data["exports"].append(entry)
