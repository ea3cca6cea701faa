"""What tests of the transformers exporter share: tiny models ready to export, and a process without qtrain."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from exporters.base import ExportJob
from qtrain.data.text import TextCorpus
from qtrain.evaluate import classification_metrics
from qtrain.models.causal_lm import CausalLm
from qtrain.models.sequence_classification import SequenceClassification
from qtrain.quantizers.rtn import Rtn
from qtrain.tasks import task as task_of
from tests.tiny_lm import tiny_language_model

PLAIN = """
import sys
class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("qtrain", "exporters"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden)
import json, torch
try:
    import torchvision
except ImportError:
    pass
except RuntimeError:  # of another index than torch: transformers would not import it
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import transformers
"""
"""How a user's script begins, with qtrain out of reach."""


def plain(script: str, *arguments: str) -> Any:
    """Run a script that knows transformers and not qtrain; returns the json that it prints last."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN + script, *arguments], capture_output=True, text=True, check=False, env={"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class TinyLm:
    """A tiny llama, its tokenizer, and text."""

    def __init__(self, path: Path, **config: Any) -> None:
        folder = path if path.is_file() else tiny_language_model(path, **{"initializer_range": 0.08, **config})
        self.source = CausalLm(str(folder))
        self.tokenizer, self.model = self.source.processor(), self.source.build()
        data = TextCorpus(context=64, train_tokens=3000, eval_tokens=400, calibration_sequences=4, eval_batch_size=4)
        self.batches = list(data.build(self.tokenizer, 0).test_dataloader())

    def job(self, folder: Path, **grids: Any) -> ExportJob:
        """The model on grids, ready to be exported."""
        scheme = Rtn(imatrix=False, **grids)
        kept = [] if scheme.embedding is not None else ["lm_head", "model.embed_tokens"]
        prepared, _ = scheme.prepare(self.source.build(), kept)
        return language_job(scheme.convert(prepared), self.model, self.tokenizer, self.batches, folder)


def language_job(model: Any, float_model: Any, tokenizer: Any, batches: Any, folder: Path) -> ExportJob:
    """What a run gives an exporter of a language model."""
    judged = task_of("language")
    outputs, reference = judged.predict(model, batches, ""), judged.predict(float_model, batches, "")
    return ExportJob(
        model=model,
        example_inputs={},
        batches=batches,
        training_logits=outputs,
        metrics=lambda *_: {},
        folder=folder,
        max_length=128,
        vocab_size=512,
        metadata={"recipe": "tiny", "qtrain": "0"},
        task="language",
        processor=tokenizer,
        comparison=judged.comparison(outputs, batches, reference),
    )


def classifier_job(bert: Path, folder: Path, sentences: list[str], **grids: Any) -> ExportJob:
    """A BERT with a new classifier on grids, ready to be exported."""
    import torch

    source = SequenceClassification(str(bert))
    tokenizer, model = source.processor(), source.build(3, 0, ["bad", "fair", "good"])
    scheme = Rtn(imatrix=False, **grids)
    prepared, _ = scheme.prepare(model, source.always_float(model))
    converted = scheme.convert(prepared)
    batches = []
    for start in range(0, len(sentences), 4):
        some = dict(tokenizer(sentences[start : start + 4], padding=True, truncation=True, max_length=32, return_tensors="pt"))
        batches.append((some, torch.arange(len(some["input_ids"])) % 3))
    return ExportJob(
        model=converted,
        example_inputs=batches[0][0],
        batches=batches,
        training_logits=task_of("classification").predict(converted, batches, ""),
        metrics=classification_metrics,
        folder=folder,
        max_length=64,
        vocab_size=len(tokenizer),
        metadata={"recipe": "tiny"},
        processor=tokenizer,
    )
