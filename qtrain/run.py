"""The pipeline: data -> model -> float baseline -> quantize -> evaluate -> export -> receipt -> report."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything

from qtrain import sweep
from qtrain.checkpoint import has_adapter
from qtrain.config import Config
from qtrain.console import console
from qtrain.files import refuse_used
from qtrain.lazy import lazy_import
from qtrain.malloc import tune_malloc
from qtrain.record import Record
from qtrain.report import print_summary, write_html
from qtrain.stages import convert, export, fit_stage, load, measure, preflight, quantize, stream, validate

tuning, dry = lazy_import("qtrain.tuning"), lazy_import("qtrain.dry")  # peft takes a second to import


def run(config: Config, resolved: dict[str, Any], folder: Path) -> float:
    """Run ``config`` in ``folder``; returns the metric named by ``config.optimize``.

    Raises:
        ValueError: for bad input, and for a receipt that failed; run.json then has the reason.
    """
    refuse_other_run(folder, resolved)
    sweep.set_folder(folder)
    console.print(f"run folder: {folder}", style="dim", soft_wrap=True)
    tune_malloc()
    record = Record(folder, config.recipe, config.seed, resolved)
    record.write()
    try:
        return pipeline(config, record, folder)
    except BaseException as error:
        record.failed(str(error) or type(error).__name__)
        with suppress(OSError):
            write_html(record.data, folder / "report.html")
        raise


def pipeline(config: Config, record: Record, folder: Path) -> float:
    """All stages in order; returns `optimize` on the validation split (of a streamed run, which has none, NaN)."""
    seed_everything(config.seed, verbose=False)
    if config.stream:
        stream(config, record, folder)
        return finish(record, folder, math.nan)
    if config.dry_run:
        dry.run(config, record, folder)
        record.passed()
        return math.nan
    with record.stage("data and model"):
        setup, model = load(config, record, folder)
        shape = model if config.baseline else config.model.empty()
        if config.adapter is not None:
            tuning.check(setup, shape)
        preflight(setup, shape)
    float_model, float_outputs = None, None
    if config.baseline:
        float_model = model
        with record.stage("float"):
            fit_stage(setup, "float", float_model, config.finetune)
            float_outputs = measure(setup, "float", float_model)
    scheme = config.quantizer
    with record.stage("ptq"):
        if float_model is not None:
            model = quantize(setup, float_model if config.adapter is None else tuning.source(setup, float_model))
        outputs = measure(setup, "ptq", model, float_outputs)
    if config.adapter is not None:
        with record.stage("adapter"):
            model, outputs = tuning.tune(setup, model, float_model, float_outputs)
    elif scheme.trains:
        with record.stage("qat"):
            fit_stage(setup, "qat", model, scheme.fit, scheme.callbacks(), teacher=float_model)
            outputs = measure(setup, "qat", model, float_outputs)
    with record.stage("convert"):
        if config.baseline or config.export or config.adapter.merging(scheme) != "apart":
            model, outputs = convert(setup, model, outputs, float_model)
            if not record.data["convert_equals_prepare"]["bit_exact"]:  # what is exact by construction has raised
                outputs = measure(setup, "converted", model, float_outputs)
        else:
            record.note("the base stays in the layers that it was read into, with the adapter beside it: nothing was converted")
        record.data["validation"] = validate(setup, model, float_model)
    base, adapter = tuning.apart(setup, model) if config.export and has_adapter(model) else (model, None)
    for name, exporter in config.export.items():
        with record.stage(f"export {name}"):
            export(setup, exporter, base, float_model, outputs, float_outputs, adapter)
    return finish(record, folder, float(record.data["validation"][config.optimize or setup.task.metrics[0]]))


def finish(record: Record, folder: Path, metric: float) -> float:
    """The run passed: say so, and write the report."""
    record.passed()
    print_summary(record.data, folder)
    write_html(record.data, folder / "report.html")
    return metric


def refuse_other_run(folder: Path, resolved: dict[str, Any]) -> None:
    """A run never writes over another one, and goes on only as it was started.

    Raises:
        ValueError: if ``folder`` holds a run and `resume` does not say to continue it, or that run had another configuration.
    """
    path = folder / "run.json"
    if resolved["resume"] is None:
        refuse_used(folder)
        return
    if not path.exists():
        return
    was = json.loads(path.read_text())["config"]
    changed = [key for key in was if key not in ("resume", "run_dir", "traceback", "logger") and not _same(resolved.get(key), was[key])]
    if changed:
        raise ValueError(
            f"resume={folder}: the recipe has changed since that run was started ({changed[0]} was {was.get(changed[0])} and is now "
            f"{resolved.get(changed[0])}). Start a new run, or put the recipe back as it was"
        )


def _same(now: Any, was: Any) -> bool:
    """Whether a configuration says what one read from json said; what is new since then says nothing."""
    if isinstance(now, dict) and isinstance(was, dict):
        held = {str(key): value for key, value in now.items()}
        return all(key in held and _same(held[key], value) for key, value in was.items())
    return bool(json.loads(json.dumps(now)) == was)
