"""What INT8 costs in accuracy, and what training wins back: MiniLM on SST-2, ResNet-20 on CIFAR-10.

    python -m benchmarks.int8_accuracy --sst2 ../shared/data/sst2 --model FOLDER
    python -m benchmarks.int8_accuracy --cifar ../shared/data/cifar10/cifar10_subset.npz --resnet ../shared/data/resnet20-cifar10

The recipes as they are, on a float model that is trained already (FOLDER: all-MiniLM-L6-v2 fine-tuned on SST-2, as a transformers
folder). Each row is one run: the accuracy of the float model, after calibration, after training where the recipe trains, and of the
exported file in onnxruntime, on the whole test split. Seconds are those of calibration.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks._common import composed, markdown, start
from qtrain.record import Record
from qtrain.stages import convert, export, fit_stage, load, measure, quantize

OBSERVERS = ("minmax", "moving_average", "percentile", "histogram_mse", "histogram_kl")
QAT_BERT = ["quantizer.fit.max_steps=200"]
SST2 = {
    **{f"static, {o}": ["+recipe=ptq_static_bert", f"quantizer.observer={o}"] for o in OBSERVERS},
    "static, SmoothQuant": ["+recipe=smoothquant_bert"],
    "static, torch's graph flow": ["+recipe=ptq_graph_bert"],
    "dynamic": ["+recipe=ptq_dynamic_bert"],
    "QAT, INT8": ["+recipe=qat_int8_bert", *QAT_BERT],
}
CIFAR = {
    **{f"static, {o}": ["+recipe=ptq_static_cnn", f"quantizer.observer={o}"] for o in OBSERVERS},
    "static, equalized": ["+recipe=equalized_cnn"],
    "static, torch's graph flow": ["+recipe=ptq_graph_cnn"],
    "dynamic": ["+recipe=ptq_dynamic_cnn"],
    "QAT, INT8": ["+recipe=qat_int8_cnn", "quantizer.fit.epochs=1"],
    "QAT, INT4 weights": ["+recipe=qat_w4a8_cnn", "quantizer.fit.epochs=1"],
    "QAT, INT4 weights, per tensor, absmax": [
        "+recipe=qat_w4a8_cnn",
        "quantizer.fit.epochs=1",
        "quantizer.weight.granularity=tensor",
        "quantizer.weight.rule=absmax",
    ],
    "QAT, INT3 weights": ["+recipe=qat_w4a8_cnn", "quantizer.fit.epochs=1", "quantizer.weight.bits=3"],
}


def configuration(overrides: list[str]) -> Any:
    """A recipe with overrides, as dataclasses."""
    return OmegaConf.to_object(composed([*overrides, "finetune.epochs=0", "export.onnx.latency_repeats=0"]))


def one(title: str, overrides: list[str], folder: Path) -> list[str]:
    """Run one recipe; a row of the table."""
    config = configuration(overrides)
    setup, float_model = load(config, Record(folder, title, config.seed, {}), folder)
    setup.record.data["config"] = {}
    float_logits = measure(setup, "float", float_model)
    started = time.perf_counter()
    model = quantize(setup, float_model)
    seconds = time.perf_counter() - started
    logits = measure(setup, "ptq", model, float_logits)
    if config.quantizer.trains:
        fit_stage(setup, "qat", model, config.quantizer.fit, config.quantizer.callbacks(), teacher=float_model)
        logits = measure(setup, "qat", model, float_logits)
    model, logits = convert(setup, model, logits, float_model)
    for exporter in config.export.values():
        export(setup, exporter, model, float_model, logits, float_logits)
    stages, (entry,) = setup.record.data["stages"], setup.record.data["exports"]
    runtime = entry["receipt"]["metric"]["accuracy"]["runtime"]
    shown = [stages["float"]["accuracy"], stages["ptq"]["accuracy"], stages.get("qat", {}).get("accuracy"), runtime]
    delta = 100 * (runtime - stages["float"]["accuracy"])
    return [title, *("" if a is None else f"{100 * a:.2f} %" for a in shown), f"{delta:+.2f}", f"{seconds:.0f}"]


def table(runs: dict[str, list[str]], common: list[str], only: list[str]) -> str:
    """All runs, or those named."""
    rows = []
    for title, overrides in runs.items():
        if only and not any(o in title for o in only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(one(title, [*overrides, *common], Path(folder)))
        print(" | ".join(rows[-1]), flush=True)
    return markdown(["", "float", "calibrated", "trained", "onnxruntime", "points to float", "calibration, s"], rows)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sst2", type=Path, help="folder with train.tsv, dev.tsv and test.tsv")
    parser.add_argument("--model", type=Path, help="transformers folder, fine-tuned on SST-2")
    parser.add_argument("--cifar", type=Path, help="the .npz file")
    parser.add_argument("--resnet", type=Path, help="folder of the trained ResNet-20")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose title holds one of these")
    parser.add_argument("--overrides", nargs="*", default=[], help="further Hydra overrides")
    args = parser.parse_args()
    start()
    if args.sst2:
        files = {key: args.sst2 / f"{name}.tsv" for key, name in (("train", "train"), ("validation", "dev"), ("test", "test"))}
        common = ["data=csv", *(f"data.{key}={path}" for key, path in files.items()), "data.label_column=label", "data.max_length=64"]
        common += ["data.text_column=sentence", "data.eval_text_column=content", f"model.path={args.model}", *args.overrides]
        print("\n" + table(SST2, common, args.only))
    if args.cifar:
        common = ["data=npz", f"data.path={args.cifar}", f"model.path={args.resnet}", "model.channels=3", "data.calibration_examples=512"]
        common += ["data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]", "data.augment=crop_flip", *args.overrides]
        print("\n" + table(CIFAR, common, args.only))


if __name__ == "__main__":
    main()
