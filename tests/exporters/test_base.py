"""What every exporter promises, tried on one that writes text: no receipt, no artefact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporters.base import Artefact, Exporter, ExportJob, Inputs, ReceiptFailed, packed_layers, staged
from qtrain.grids.affine import Affine
from qtrain.prepare import prepare
from qtrain.receipt import Latency

from .small import Small, batches, job, logits_of, quantized


@dataclass
class Pretend(Exporter):
    """An exporter whose runtime is the model itself, with one fault."""

    fault: str = ""
    model: Any = None
    registered_name = "pretend"

    @property
    def runtime_version(self) -> str:
        return "pretend 1.0"

    def refusals(self, model: nn.Module) -> list[str]:
        return ["inner: int4 g32: a reason; set quantizer.weight.bits=8"] if self.fault == "refuse" else []

    def write(self, job: ExportJob, folder: Path) -> Artefact:
        path = folder / "model.txt"
        path.write_text("codes")
        if self.fault == "full disk":
            raise OSError(28, "No space left on device")
        if self.fault == "interrupt":
            raise KeyboardInterrupt
        return Artefact(path, [path])

    def tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        for name, layer in packed_layers(self.model).items():
            value = layer.quantized.decode()
            if self.fault == "one bit" and name == "inner":
                value.view(torch.int32)[0, 0] ^= 1
            if not (self.fault == "missing" and name == "inner"):
                yield name, value

    def products(self, path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def session(self, path: Path) -> Any:
        return None

    def logits(self, path: Path, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
        logits = logits_of(self.model, batches)
        return logits * 1.1 if self.fault == "logits" else logits

    def latency(self, artefact: Artefact, job: ExportJob) -> Latency:
        return {"quantized": {"1x8": 1.0}}


@pytest.fixture
def model() -> nn.Module:
    return quantized(Small(), Affine(), Affine(bits=8, granularity="channel"))


def test_a_good_artefact_gets_its_name_and_its_receipt(model: nn.Module, tmp_path: Path) -> None:
    entry = Pretend(model=model).export(job(model, tmp_path))
    assert entry["target"] == "pretend" and entry["runtime"] == "pretend 1.0" and entry["bytes"] == 5
    receipt = entry["receipt"]
    assert receipt["passed"] and receipt["tensors"] == receipt["tensors_bit_exact"] == 2 and receipt["logits_nmse"] == 0
    assert receipt["metric"]["accuracy"]["training"] == receipt["metric"]["accuracy"]["runtime"]
    assert json.loads((tmp_path / "pretend" / "receipt.json").read_text()) == entry
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pretend"]


@pytest.mark.parametrize("fault", ["one bit", "missing", "logits"])
def test_a_failed_receipt_leaves_nothing_and_carries_its_entry(model: nn.Module, tmp_path: Path, fault: str) -> None:
    with pytest.raises(ReceiptFailed, match="nothing was kept") as failure:
        Pretend(model=model, fault=fault).export(job(model, tmp_path))
    assert not failure.value.entry["receipt"]["passed"] and failure.value.entry["receipt"]["failures"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("fault", "error"), [("full disk", OSError), ("interrupt", KeyboardInterrupt), ("refuse", ValueError)])
def test_whatever_is_raised_leaves_nothing(model: nn.Module, tmp_path: Path, fault: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        Pretend(model=model, fault=fault).export(job(model, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_artefact_stays_until_a_new_one_passes(model: nn.Module, tmp_path: Path) -> None:
    Pretend(model=model).export(job(model, tmp_path))
    (tmp_path / "pretend" / "mark").touch()
    with pytest.raises(ReceiptFailed):
        Pretend(model=model, fault="one bit").export(job(model, tmp_path))
    assert (tmp_path / "pretend" / "mark").exists()
    Pretend(model=model).export(job(model, tmp_path))
    assert not (tmp_path / "pretend" / "mark").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pretend"]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".onnx.partial").mkdir()
    (tmp_path / ".onnx.partial" / "half").touch()
    with staged(tmp_path / "onnx") as work:
        assert list(work.iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["onnx"]


def test_a_model_without_codes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no quantized layer"):
        Pretend().export(job(Small().eval(), tmp_path))
    fake = Small().eval()
    prepare(fake, {"inner": fake.inner}, Affine())
    with pytest.raises(ValueError, match="still fake-quantized, the first inner"):
        Pretend().export(job(fake, tmp_path))


def test_metrics_are_of_the_whole_split(model: nn.Module, tmp_path: Path) -> None:
    seen = []

    def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
        seen.append((tuple(logits.shape), tuple(labels.shape)))
        return {"loss": 1.0}

    Pretend(model=model).export(job(model, tmp_path, metrics=metrics))
    count = sum(len(y) for _, y in batches())
    assert seen == [((count, 3), (count,))] * 2
