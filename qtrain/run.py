"""The pipeline: data -> model -> float baseline -> quantize -> evaluate -> export -> receipt -> report."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything

from qtrain import sweep
from qtrain.config import Config
from qtrain.layers import calibrate
from qtrain.malloc import tune_malloc
from qtrain.record import Record
from qtrain.report import print_summary, write_html
from qtrain.stages import convert, export, fit_stage, load, measure, preflight


def run(config: Config, resolved: dict[str, Any], folder: Path) -> float | None:
    """Run ``config`` in ``folder``; returns the metric named by ``config.optimize``.

    Raises:
        ValueError: for bad input, and for a receipt that failed; run.json then has the reason.
    """
    refuse_used_folder(folder, config.resume)
    sweep.set_folder(folder)
    tune_malloc()
    record = Record(folder, config.recipe, config.seed, resolved)
    try:
        return pipeline(config, record, folder)
    except BaseException as error:
        record.failed(str(error) or type(error).__name__)
        raise


def pipeline(config: Config, record: Record, folder: Path) -> float | None:
    """All stages in order."""
    seed_everything(config.seed, verbose=False)
    with record.stage("data and model"):
        setup, float_model = load(config, record, folder)
        preflight(setup, float_model)
    with record.stage("float"):
        fit_stage(setup, "float", float_model, config.finetune)
        float_logits = measure(setup, "float", float_model)
    scheme = config.quantizer
    with record.stage("ptq"):
        model = copy.deepcopy(float_model)
        record.data["kept_float"] = scheme.prepare(model, config.model.always_float(model))
        if scheme.activation_range == "static":
            calibrate(model, (inputs for inputs, _ in setup.data.calibration_dataloader()))
        logits = measure(setup, "ptq", model, float_logits)
    if scheme.trains:
        with record.stage("qat"):
            fit_stage(setup, "qat", model, scheme.fit, scheme.callbacks(), teacher=float_model)
            logits = measure(setup, "qat", model, float_logits)
    with record.stage("convert"):
        model = convert(setup, model, logits, float_model)
    for name, exporter in config.export.items():
        with record.stage(f"export {name}"):
            export(setup, exporter, model, float_model, logits, float_logits)
    record.passed()
    print_summary(record.data, folder)
    write_html(record.data, folder / "report.html")
    last = record.data["stages"]["qat" if scheme.trains else "ptq"]
    return last.get(config.optimize)


def refuse_used_folder(folder: Path, resume: str | None) -> None:
    """A run never writes over another one.

    Raises:
        ValueError: if ``folder`` holds a run and ``resume`` does not say to continue it.
    """
    if resume is None and ((folder / "run.json").exists() or (folder / "checkpoints").exists()):
        raise ValueError(f"run_dir={folder} holds a run already. Continue it with resume={folder}, or give another run_dir")
