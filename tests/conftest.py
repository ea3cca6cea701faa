"""Small real inputs: a BERT of two layers with a tokenizer of its own, sentences it can learn, and the command line."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: one worker per core, and threads that wait for each other take the time
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from qtrain.vision import mend_torchvision

mend_torchvision()  # before a test imports Lightning

ROOT = Path(__file__).resolve().parent.parent
GOOD = ["good", "great", "fine", "lovely", "bright", "superb", "charming", "witty"]
BAD = ["bad", "awful", "dull", "boring", "weak", "clumsy", "tedious", "flat"]
NEUTRAL = ["the", "film", "a", "plot", "with", "its", "cast", "and", "one", "scene", "of", "this", "story", "that", "was", "in", "who"]


def shared_data() -> Path:
    """Real models and data, where a developer has them."""
    return Path(os.environ.get("QTRAIN_SHARED", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def _no_hub() -> None:
    """Tests never wait for a model hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: threads that wait for each other on a busy machine take most of the time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_tiny_bert(folder: Path, hidden: int = 64, intermediate: int = 128) -> Path:
    """A randomly initialised two-layer BERT with a word-level WordPiece vocabulary, as a transformers folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *NEUTRAL]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    set_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=intermediate,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    ).save_pretrained(folder)
    return folder


def write_reviews(path: Path, count: int, seed: int) -> Path:
    """Sentences with more good or more bad words, labelled so; tab-separated."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["sentence", "label"])
        for i in range(count):
            label = i % 2
            words = draw.choices(NEUTRAL, k=draw.randint(3, 12)) + draw.choices(GOOD if label else BAD, k=2)
            draw.shuffle(words)
            writer.writerow([" ".join(words), label])
    return path


def residual_cnn(seed: int = 0) -> Any:
    """A small trained-looking CNN of one residual block: `pixel_values` [N, 3, H, W] -> logits [N, 4], in evaluation mode."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.relu1 = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + x)

    class Cnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.block = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), Block(8)
            self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            x = self.block(torch.relu(self.norm(self.stem(pixel_values))))
            return self.head(torch.flatten(self.pool(x), 1))

    torch.manual_seed(seed)
    model = Cnn()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny BERT."""
    return save_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """train.tsv (320 sentences) and test.tsv (96)."""
    folder = tmp_path_factory.mktemp("reviews")
    return {"train": write_reviews(folder / "train.tsv", 320, 1), "test": write_reviews(folder / "test.tsv", 96, 2)}


@pytest.fixture(scope="session")
def tiny_options(tiny_bert: Path, reviews: dict[str, Path]) -> list[str]:
    """Overrides that run any BERT recipe on the tiny model and data in seconds."""
    return [
        f"model.path={tiny_bert}",
        "data=csv",
        f"data.train={reviews['train']}",
        f"data.test={reviews['test']}",
        "data.text_column=sentence",
        "data.label_column=label",
        "finetune.epochs=3",
        "finetune.learning_rate=2e-3",
        "trainer.precision=32-true",
    ]


def qtrain(*args: str, cwd: Path, timeout: float | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m qtrain` as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "qtrain", *args],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
