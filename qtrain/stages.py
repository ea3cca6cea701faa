"""The stages of a run, each a function of what they share; `run.py` puts them in order."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

import qtrain
from exporters.base import ExportJob, LowRank, ReceiptFailed, packed_layers
from qtrain import direct
from qtrain.checkpoint import load_weights, save_model, tidy
from qtrain.evaluate import Batch, classification_metrics, compare_to_float, layer_table, sizes
from qtrain.fit import Fit, build, check, train
from qtrain.importance import weigh
from qtrain.layers import fake_layers
from qtrain.malloc import release
from qtrain.module import Module
from qtrain.placement import moved
from qtrain.prepare import copy_of, lost_by_dtype
from qtrain.record import Record
from qtrain.sensitivity import analyze, keep_most_harmful, print_analysis
from qtrain.streaming import RuntimeOnly, halved, rows, streamed
from qtrain.targets import always_float, inside
from qtrain.tasks import Task, task

DATA_FOR = {
    "classification": "data=sample_reviews (texts) or data=digits (images), say",
    "language": "data=text",
    "embedding": "data=sample_reviews (texts), say",
}
"""What to type for data of each task."""


@dataclass
class Setup:
    """What the stages share."""

    config: Any
    """`qtrain.config.Config`."""
    record: Record
    folder: Path
    data: Any
    device: torch.device
    batches: list[Batch]
    """The whole test split, in a fixed order."""
    task: Task
    processor: Any
    """The model's tokenizer, or its `ImageSpec`."""
    scheme: Any
    """The quantizer whose work is converted and exported: the run's, or, where an adapter was merged, that of the merged model."""
    starts: dict[str, Any] = field(default_factory=dict)
    """Where the base was chosen together with its adapter (`qtrain/loftq.py`): layer -> A, B."""


def load(config: Any, record: Record, folder: Path) -> tuple[Setup, nn.Module]:
    """Data, model and device."""
    direct.check(config)
    judged = task(getattr(config.model, "task", "classification"))
    if config.optimize is not None and config.optimize not in judged.metrics:
        raise ValueError(
            f"optimize is {config.optimize!r}, and a model of {judged.name} is judged by {', '.join(judged.metrics)}. "
            f"Set optimize={judged.metrics[0]}, say"
        )
    wanted = getattr(config.data, "task", "classification")
    if wanted != judged.name and (judged.name, wanted) != ("embedding", "classification"):  # whose texts serve, without their labels
        raise ValueError(
            f"data={config.data.registered_name} is for {wanted}, and model={config.model.registered_name} for {judged.name}. "
            f"Set {DATA_FOR[judged.name]}"
        )
    processor = config.model.processor()
    data = config.data.build(processor, config.seed)
    names = data.label_names
    model = config.model.build(len(names), config.seed, names) if config.baseline else direct.load(config, record)
    data.check(model)
    for note in data.notes:
        record.note(note)
    record.fallbacks(getattr(config.model, "fallbacks", []))
    fresh = getattr(config.model, "new_parameters", [])
    if config.adapter is not None:
        whole = inside(model, config.adapter.modules_to_save)
        fresh = [name for name in fresh if name.rsplit(".", 1)[0] not in whole]
    if fresh and config.finetune.epochs == 0 and config.adapter is not None:
        raise ValueError(
            f"{len(fresh)} parameters of the model are new and untrained, the first {fresh[0]}, and an adapter leaves them as they are. "
            f"Set adapter.modules_to_save=[{','.join(dict.fromkeys(n.rsplit('.', 1)[0] for n in fresh))}], or finetune.epochs=2, or "
            "model.path to a model with a trained classifier"
        )
    if fresh and config.finetune.epochs == 0:
        raise ValueError(
            f"finetune.epochs=0, but {len(fresh)} parameters of the model are new and untrained, the first {fresh[0]}. "
            "Set finetune.epochs=2, say, or model.path to a model with a trained classifier"
        )
    batches = list(data.test_dataloader())
    device = device_of(config)
    check(config, model, device)
    judged.check(model, batches)
    return Setup(config, record, folder, data, device, batches, judged, processor, config.quantizer), model


def device_of(config: Any) -> torch.device:
    """Where the run computes."""
    wants_gpu = config.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return torch.device("cuda" if wants_gpu and torch.cuda.is_available() else "cpu")


def preflight(setup: Setup, model: nn.Module) -> None:
    """Find in seconds what would fail after minutes: patterns, shapes, and exporters that cannot hold the grids."""
    config = setup.config
    if config.analyze and hasattr(config.quantizer, "swap"):
        raise ValueError(
            f"analyze=true switches qtrain's layers on and off, and those of quantizer={config.quantizer.registered_name} are another "
            "library's. Set analyze=false, or quantizer=rtn grid@quantizer.weight=nf4, say"
        )
    scheme, always = copy.deepcopy(config.quantizer), always_float(config, model)
    if config.adapter is not None:
        merging = config.adapter.merging(scheme)
        if merging == "rounded":
            scheme, always = copy.deepcopy(config.adapter.deploy), config.model.always_float(model)
        if merging == "float" or (merging == "apart" and not config.export):
            _preflight_exports(setup, model)
            return
    example = setup.data.example_inputs(2)
    if setup.task.name == "classification":
        trial = _classification_trial(scheme, model, always, example)
    else:  # rows are rounded one by one, so one of each weight shows what all would
        trial = scheme.trial(copy_of(model), always, example)
    _preflight_exports(setup, trial)


def _preflight_exports(setup: Setup, trial: nn.Module) -> None:
    for exporter in setup.config.export.values():
        exporter.preflight(trial, setup.task.name, setup.processor)


def _classification_trial(scheme: Any, model: nn.Module, always: list[str], example: dict[str, Tensor]) -> nn.Module:
    trial = copy.deepcopy(model)
    for module in trial.modules():  # norms that begin at zero, as fresh residual networks have them, would make constants
        scale = getattr(module, "weight", None)
        if isinstance(scale, nn.Parameter) and scale.ndim == 1 and not scale.any():
            nn.init.ones_(scale)
    trial, _ = scheme.prepare(scheme.transform(trial, [example], always), always, example)
    converted: nn.Module = scheme.convert(scheme.calibrate(trial, [example]))
    return converted


def quantize(setup: Setup, float_model: nn.Module) -> nn.Module:
    """Put a copy of ``float_model`` on the grid: transform, find out what to keep in float, prepare, calibrate."""
    config, record = setup.config, setup.record
    scheme = setup.scheme
    always = always_float(config, float_model) if scheme is config.quantizer else config.model.always_float(float_model)
    calibration = calibration_batches(setup, scheme)
    model = scheme.transform(copy_of(float_model, share=not scheme.moves_weights), calibration, always)
    if config.analyze or scheme.automatic:
        rows = analyze(scheme, model, always, calibration, list(setup.data.val_dataloader()), config.analyze_examples, setup.task)
        record.data["analysis"] = rows
        print_analysis(rows)
        always = [*always, *keep_most_harmful(rows, scheme.automatic, record)]
    model, record.data["kept_float"] = scheme.prepare(model, always, setup.data.example_inputs(2))
    model = scheme.calibrate(model, calibration)
    record.data |= scheme.details
    record_fallbacks(setup)
    record_dtypes(setup, model)
    return model


def calibration_batches(setup: Setup, scheme: Any) -> list[dict[str, Tensor]]:
    """Keyword inputs to calibrate on, where ``scheme`` reads them; there is then something to be said of them."""
    if not scheme.needs_data:
        return []
    for note in setup.data.calibration_notes:
        if note not in setup.record.data["notes"]:
            setup.record.note(note)
    return [inputs for inputs, _ in setup.data.calibration_dataloader()]


def record_fallbacks(setup: Setup) -> None:
    """What the quantizer could not do as asked, since it was last asked."""
    scheme = setup.scheme
    setup.record.fallbacks(scheme.fallbacks)
    scheme.fallbacks = []


def record_dtypes(setup: Setup, model: nn.Module) -> None:
    """What 16-bit weights cost, unless it has been said: trainer.precision=bf16-true leaves its type behind."""
    setup.record.fallbacks([lost for lost in lost_by_dtype(model) if lost not in setup.record.data["fallbacks"]])


def fit_stage(setup: Setup, stage: str, model: nn.Module, fit: Fit, callbacks: Any = (), teacher: nn.Module | None = None) -> bool:
    """Train ``model`` in place, or load what an earlier run of this folder trained; whether it trained."""
    if fit.epochs == 0 or fit.max_steps == 0:
        return False
    config, folder = setup.config, setup.folder / "checkpoints"
    done, steps = folder / stage, folder / f"{stage}-steps"
    if config.resume and done.exists():
        load_weights(done, model)
        setup.record.note(f"{stage}: already trained, loaded from {done}")
        return False
    seed_everything(config.seed, verbose=False)
    distill = getattr(config.quantizer, "distill", None)
    optimizer = build(config.optimizer, "optimizer")
    distill = (distill.weight, distill.temperature) if distill else (0.0, 1.0)
    module = Module(model, fit, optimizer, teacher, *distill, task=setup.task)
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
    record_dtypes(setup, model)
    save_model(done, model, stage=stage)
    tidy(steps, keep=None)
    del module, optimizer
    release()
    return True


def measure(setup: Setup, stage: str, model: nn.Module, float_outputs: Any = None) -> Any:
    """Outputs on the test split; the metrics go into the record."""
    outputs = setup.task.predict(moved(model, setup.device), setup.batches, f"evaluating {stage}")
    setup.record.data["stages"][stage] = setup.task.measure(outputs, setup.batches, float_outputs)
    return outputs


def validate(setup: Setup, model: nn.Module, float_model: nn.Module | None) -> dict[str, float]:
    """Metrics on the validation split, which sweepers choose by: choosing by the test split would spoil it."""
    batches, judged = list(setup.data.val_dataloader()), setup.task
    reference = None
    if judged.needs_reference and float_model is not None:
        reference = judged.predict(float_model.to(setup.device), batches, "evaluating the validation split in float")
    return judged.measure(judged.predict(model, batches, "evaluating the validation split"), batches, reference)


def convert(setup: Setup, model: nn.Module, outputs: Any, float_model: nn.Module | None) -> tuple[nn.Module, Any]:
    """Integer codes instead of fake-quant, the proof that no bit of any output changed, and the outputs."""
    scheme = setup.scheme
    before = {} if float_model is None else dict(float_model.named_parameters(remove_duplicate=False))
    trained = {name: p.detach() for name, p in before.items()}
    now = {n: p for n, p in model.named_parameters(remove_duplicate=False) if type(p) is nn.Parameter}  # not codes of another library
    trained |= {n: p.detach() for n, p in now.items() if n not in trained or p.shape == trained[n].shape}
    trained |= {f"{name}.weight": layer.folded()[0].detach() for name, layer in fake_layers(model)}
    model = moved(scheme.convert(model), setup.device)
    record_fallbacks(setup)
    trained |= getattr(model, "float_weights", {})  # of a graph of torch's, whose layers have names only now
    converted = setup.task.predict(model, setup.batches, "convert == prepare")
    change = setup.task.difference(outputs, converted)
    worst = change.pop("max_abs")
    if not change["bit_exact"] and scheme.exact:
        raise ValueError(
            f"the converted model is not the trained one: outputs differ by up to {worst:.3g}. This is a defect of qtrain; please report it"
        )
    setup.record.data["convert_equals_prepare"] = change
    setup.record.data["quantized"] = layer_table(model, trained)
    setup.record.data["size"] = sizes(model, setup.config.model.empty() if float_model is None else float_model)
    save_model(setup.folder / "checkpoints" / "converted", model, whole=True, config=setup.record.data["config"])
    return model, converted


def export(
    setup: Setup,
    exporter: Any,
    model: nn.Module,
    float_model: nn.Module | None,
    outputs: Any,
    float_outputs: Any,
    adapter: LowRank | None = None,
) -> None:
    """Write one artefact and its receipt; ``outputs`` are the model's, or, with an ``adapter`` beside it, those of both together."""
    config = setup.config

    def metrics(runtime: Tensor, labels: Tensor) -> dict[str, float]:
        return classification_metrics(runtime, labels) | compare_to_float(runtime, float_outputs)

    job = ExportJob(
        model=model.cpu(),
        float_model=None if float_model is None else float_model.cpu(),
        example_inputs=setup.data.example_inputs(2),
        batches=setup.batches,
        training_logits=outputs,
        metrics=metrics,
        folder=setup.folder / "exports",
        max_length=config.model.max_positions(model),
        vocab_size=config.model.vocabulary(model),
        metadata=_metadata(config, setup.scheme),
        task=setup.task.name,
        processor=setup.processor,
        comparison=setup.task.comparison(outputs, setup.batches, float_outputs),
        importance=setup.scheme.importance,
        adapter=adapter,
    )
    _export(setup.record, exporter, job)


def _metadata(config: Any, scheme: Any) -> dict[str, str]:
    """What an artefact says of its origin."""
    mix = getattr(getattr(scheme, "weight", None), "mix", None)
    return {"recipe": config.recipe, "qtrain": qtrain.__version__} | ({"mix": mix} if mix else {})


def _export(record: Record, exporter: Any, job: ExportJob) -> None:
    try:
        entry = exporter.export(job)
    except ReceiptFailed as failure:
        record.data["exports"].append(failure.entry)
        raise
    record.fallbacks(entry["receipt"].get("fallbacks", []))
    record.data["exports"].append(entry)


def stream(config: Any, record: Record, folder: Path) -> None:
    """A language model to an artefact, one tensor in memory at a time (`qtrain/streaming.py`).

    Raises:
        ValueError: if the model, the quantizer or an exporter cannot do that.
    """
    scheme, exporters = config.quantizer, config.export
    refused = [f"export={name}" for name, exporter in exporters.items() if not exporter.streams]
    refused += [] if hasattr(config.model, "skeleton") else [f"model={config.model.registered_name}"]
    refused += [f"adapter={config.adapter.registered_name}"] if config.adapter is not None else []
    refused += [f"quantizer={scheme.registered_name}"] if scheme.trains or scheme.needs_data or scheme.moves_weights else []
    if refused or not exporters or config.analyze:
        raise ValueError(
            f"stream=true rounds one tensor after another and writes it, without {', '.join(refused) or 'analyze=true or export=[]'}. "
            "Set model=causal_lm quantizer=rtn quantizer.imatrix=false (or a file) adapter=null export=[gguf] analyze=false, or "
            "stream=false"
        )
    with record.stage("data and model"):
        processor = config.model.processor()
        data = config.data.build(processor, config.seed)
        for note in data.notes:
            record.note(note)
        model, weights = config.model.skeleton()
        data.check(model)
        batches = list(data.test_dataloader())
        positions, vocabulary = config.model.max_positions(model), config.model.vocabulary(model)
    with record.stage("quantize"):
        float_model = streamed(halved(copy.deepcopy(model)), weights)
        model, record.data["kept_float"] = scheme.prepare(model, config.model.always_float(model))
        if scheme.imatrix:
            scheme.importance = weigh(model, [], scheme.imatrix)
        model = streamed(model, weights)
        record.fallbacks(scheme.fallbacks)
    for name, exporter in exporters.items():
        with record.stage(f"export {name}"):
            exporter.preflight(model, "language", processor)
            job = ExportJob(
                model=model,
                float_model=float_model,
                example_inputs={},
                batches=batches,
                training_logits=None,
                metrics=lambda *_: {},
                folder=folder / "exports",
                max_length=positions,
                vocab_size=vocabulary,
                metadata=_metadata(config, scheme),
                task="language",
                processor=processor,
                comparison=RuntimeOnly(batches),
                importance=scheme.importance,
            )
            _export(record, exporter, job)
            record.data["stages"]["float"] = job.comparison.float_metrics
    record.data["quantized"] = rows(packed_layers(model).items())
