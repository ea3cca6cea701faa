"""Speed, size and accuracy of INT8 ONNX files, beside float32 and what onnxruntime.quantization makes of the same model.

    python -m benchmarks.onnx_int8                      shapes of MiniLM and ResNet-20 with random weights (8 minutes on two busy cores)
    python -m benchmarks.onnx_int8 --resnet ../shared/data/resnet20-cifar10 --cifar ../shared/data/cifar10/cifar10_subset.npz
    python -m benchmarks.onnx_int8 --bert FOLDER --sst2 ../shared/data/sst2       FOLDER: a classifier of two labels, trained

Every file of ours is written by the ONNX exporter. onnxruntime.quantization gets our float file, plain and fused, through its own
`quant_pre_process`, weights int8 per channel, QDQ, and the same calibration examples (its minimum-maximum calibrator). Three things had to
be done for it: `quantize_dynamic` stops on shapes that torch's exporter leaves in the file (stale value_info), so those are taken out
and float is named as the type of what then has none; `quantize_static` stops at the bias of a fused Attention, so that only MatMul and
Gather of a fused file are quantized; and its default of int8 activations runs slower than float32 on x86, so that uint8 is shown too.

All sessions take turns within a round, so that a busy machine slows them alike; the tables have the median over rounds, and the median of
the per-round ratio to the fused float file: above 1 is faster. "spinning" is onnxruntime's default, in which idle threads spin;
every run then waits until those of the session before have gone to sleep. The other columns have it off, as in the receipt.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from benchmarks._common import machine, markdown
from exporters.base import ExportJob, Inputs
from exporters.onnx import OnnxExport
from exporters.onnx.runtime import SESSION_CONFIG, open_session, random_inputs, run, threads
from exporters.onnx.write import Settings, write_model
from qtrain.grids.affine import Int8, Int8Activation
from qtrain.malloc import tune_malloc
from qtrain.quantizers.ptq_dynamic import PtqDynamic
from qtrain.quantizers.ptq_static import PtqStatic

LENGTH = 64
CALIBRATION, BATCH = 256, 32
FLOAT = "float32, fused"
SLEEP = 0.05
"""Seconds after which the threads of an idle session have stopped spinning."""


@dataclass
class Task:
    """One model and what it is tried on."""

    title: str
    model: nn.Module
    keep_float: list[str]
    calibration: list[Inputs]
    """Batches."""
    batches: tuple[int, ...]
    """Sizes to time."""
    feed: Callable[[int], Inputs]
    test: list[tuple[Inputs, Tensor]]
    """Batches with labels; empty where there is no data."""
    observer: str = "minmax"


# -- models ----------------------------------------------------------------------------------------------------------


def bert(folder: str | None, sst2: str | None) -> Task:
    """A classifier with the shape of MiniLM, or the one in ``folder``."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification, set_seed

    set_seed(0)
    if folder:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    else:
        shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        model = BertForSequenceClassification(BertConfig(**shape, num_labels=2)).eval()
    example = {"input_ids": torch.zeros(2, 2, dtype=torch.int64), "attention_mask": torch.ones(2, 2, dtype=torch.int64)}
    vocabulary = model.config.vocab_size
    calibration = [random_inputs(example, BATCH, LENGTH, vocabulary) for _ in range(CALIBRATION // BATCH)]
    test: list[tuple[Inputs, Tensor]] = []
    if folder and sst2:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        calibration = [inputs for inputs, _ in _sentences(tokenizer, Path(sst2) / "train.tsv", CALIBRATION)]
        test = _sentences(tokenizer, Path(sst2) / "test.tsv", None)
    kept = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ("classifier" in n or "pooler" in n)]
    feed = lambda batch: random_inputs(example, batch, LENGTH, vocabulary)  # noqa: E731
    return Task(f"BERT with the shape of MiniLM, {LENGTH} tokens", model, kept, calibration, (1, 8), feed, test, "percentile")


def _sentences(tokenizer: Any, path: Path, count: int | None) -> list[tuple[Inputs, Tensor]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:count]
    found = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        encoded = tokenizer(
            [r.get("sentence") or r["content"] for r in part], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        inputs = {n: encoded[n] for n in ("input_ids", "attention_mask")}
        found.append((inputs, torch.tensor([int(r["label"]) for r in part])))
    return found


def resnet(weights: str | None, cifar: str | None) -> Task:
    """ResNet-20 for 32 x 32 images, with random weights or a state dict."""
    from qtrain.resnet import CifarResNet

    torch.manual_seed(0)
    model = CifarResNet(20, 3, 10).eval()
    if weights:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(Path(weights) / "model.safetensors"), strict=False)
    example = {"pixel_values": torch.zeros(2, 3, 32, 32)}
    calibration = [{"pixel_values": torch.randn(BATCH, 3, 32, 32)} for _ in range(CALIBRATION // BATCH)]
    test: list[tuple[Inputs, Tensor]] = []
    if cifar:
        data = np.load(cifar)
        calibration = [x for x, _ in _pixels(data["x_train"][:CALIBRATION], data["y_train"][:CALIBRATION])]
        test = _pixels(data["x_test"], data["y_test"])
    feed = lambda batch: random_inputs(example, batch, 0, 0)  # noqa: E731
    return Task("ResNet-20, 32 x 32 images", model, [], calibration, (1, 8, 32), feed, test)


def _pixels(images: Any, labels: Any) -> list[tuple[Inputs, Tensor]]:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(labels.astype(np.int64)).reshape(-1)
    return [({"pixel_values": a}, b) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)]


# -- files -----------------------------------------------------------------------------------------------------------


def write_all(task: Task, folder: Path) -> dict[str, Path]:
    """Every file by the name of its row."""
    example = {n: x[:2] for n, x in task.calibration[0].items()}
    length = LENGTH * 8 if "input_ids" in example else 0
    paths: dict[str, Path] = {}
    for name, fuse in (("float32", False), (FLOAT, True)):
        paths[name] = folder / f"float_{fuse}.onnx"
        written = write_model(task.model, paths[name], example, Settings(length, 21, fuse), {}, {})
        assert not written.fallback, written.fallback
    for kind in ("static", "dynamic"):
        model = quantize(task, kind)
        for fuse in (True, False) if "input_ids" in example else (True,):
            name = f"{kind}{'' if fuse else ', fuse=false'}"
            (target := folder / name).mkdir()
            job = ExportJob(model, example, [], torch.zeros(0, 2), lambda x, y: {}, target, length, 1)
            artefact = OnnxExport(fuse=fuse).write(job, target)
            assert not artefact.fallbacks, artefact.fallbacks
            paths[name] = artefact.path
    for fused in (False, True) if "input_ids" in example else (False,):
        for what, make in _others(task, paths[FLOAT if fused else "float32"], folder, fused).items():
            name = f"onnxruntime.quantization {what}{' of the fused file' if fused else ''}"
            path = folder / f"other{len(paths)}.onnx"
            make(path)
            paths[name] = path
    return paths


def quantize(task: Task, kind: str) -> nn.Module:
    """A converted copy of the model."""
    import copy

    grids: dict[str, Any] = {"weight": Int8(), "embedding": Int8(), "activation": Int8Activation()}
    scheme = PtqStatic(observer=task.observer, **grids) if kind == "static" else PtqDynamic(**grids)
    model, _ = scheme.prepare(copy.deepcopy(task.model), task.keep_float)
    scheme.calibrate(model, task.calibration)
    return scheme.convert(model)


def _prepared(source: Path, folder: Path) -> tuple[Path, Path]:
    """Through onnxruntime.quantization's own pre-processing; and once more, without stale shapes."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    whole, stripped = folder / f"prepared_{source.name}", folder / f"stripped_{source.name}"
    quant_pre_process(str(source), str(whole), skip_symbolic_shape=True)
    model = onnx.load(whole)
    del model.graph.value_info[:]
    onnx.save(model, stripped)
    return whole, stripped


def _others(task: Task, source: Path, folder: Path, fused: bool) -> dict[str, Callable[[Path], None]]:
    """What onnxruntime.quantization makes of a file, by what it is called."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(task.calibration)

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {n: x.numpy() for n, x in batch.items()}

    whole, stripped = _prepared(source, folder)
    common: dict[str, Any] = {"per_channel": True, "extra_options": {"DefaultTensorType": onnx.TensorProto.FLOAT}}

    def static(kind: Any) -> Callable[[Path], None]:
        given = {**common, "quant_format": QuantFormat.QDQ, "weight_type": QuantType.QInt8, "activation_type": kind}
        if fused:  # it stops at the bias of Attention
            given["op_types_to_quantize"] = ["MatMul", "Gather"]
        return lambda path: quantize_static(str(whole), str(path), Reader(), **given)

    return {
        "static uint8": static(QuantType.QUInt8),
        **({} if fused else {"static int8 (its default)": static(QuantType.QInt8)}),
        "dynamic": lambda path: quantize_dynamic(str(stripped), str(path), **common),
    }


# -- measuring -------------------------------------------------------------------------------------------------------


def spinning_session(path: Path) -> onnxruntime.InferenceSession:
    """A session with the thread settings that onnxruntime has by default."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    for key, value in SESSION_CONFIG.items():
        if "spinning" not in key:
            options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def timed(sessions: dict[str, Any], feed: Inputs, rounds: int, sleep: float) -> dict[str, list[float]]:
    """Milliseconds per run; in every round each session runs twice, and the second counts."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    feeds = {name: {i.name: feed[i.name].numpy() for i in s.get_inputs()} for name, s in sessions.items()}
    for turn in range(rounds + 2):
        for name, session in sessions.items():
            time.sleep(sleep)
            session.run(None, feeds[name])
            start = time.perf_counter()
            session.run(None, feeds[name])
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def accuracy(path: Path, test: list[tuple[Inputs, Tensor]]) -> float:
    """Share of examples."""
    session = open_session(path)
    right = sum(int((run(session, inputs).argmax(-1) == labels).sum()) for inputs, labels in test)
    return right / sum(len(labels) for _, labels in test)


def measure(task: Task, rounds: int) -> str:
    """The table of one model."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = write_all(task, Path(temporary))
        columns: list[tuple[str, dict[str, list[float]]]] = []
        for label, open_, sleep in (("", open_session, 0.0), (" spinning", spinning_session, SLEEP)):
            sessions = {name: open_(path) for name, path in paths.items()}
            for batch in task.batches:
                columns.append((f"batch {batch}{label}", timed(sessions, task.feed(batch), rounds, sleep)))
            del sessions
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        right = {name: accuracy(path, task.test) for name, path in paths.items()} if task.test else {}
    head = [
        "file",
        "MB",
        "of float32",
        *(part for label, _ in columns for part in (f"{label}, ms", "ratio")),
        *(["accuracy"] if right else []),
    ]
    rows = []
    for name, size in sizes.items():
        cells = [name, f"{size / 1e6:.2f}", f"{size / sizes[FLOAT]:.3f}"]
        for _, times in columns:
            ratio = median(a / b for a, b in zip(times[FLOAT], times[name], strict=True))
            cells += [f"{median(times[name]):.2f}", f"{ratio:.2f}"]
        rows.append([*cells, *([f"{100 * right[name]:.2f} %"] if right else [])])
    return f"{task.title}; medians of {rounds} interleaved rounds\n\n{markdown(head, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bert", help="folder of a transformers sequence classifier")
    parser.add_argument("--sst2", help="folder with train.tsv and test.tsv: also measure accuracy, for --bert")
    parser.add_argument("--resnet", help="folder with model.safetensors of a CIFAR-10 ResNet-20")
    parser.add_argument("--cifar", help="npz with x_train, y_train, x_test, y_test: also measure accuracy, for --resnet")
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    tune_malloc()
    print(f"{machine()}, onnxruntime {onnxruntime.__version__}\n", flush=True)
    print(measure(bert(given.bert, given.sst2), given.rounds), flush=True)
    print(measure(resnet(given.resnet, given.cifar), given.rounds), flush=True)


if __name__ == "__main__":
    main()
