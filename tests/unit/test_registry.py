"""The decorator that puts a class on the command line, and that the command line stays light."""

import subprocess
import sys
import textwrap
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from qtrain import registry

HEAVY = ("torch", "torchao", "transformers", "onnx", "onnxruntime", "lightning", "numpy")


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten, by the registry and by Hydra."""
    registry.load_all()  # what is imported only once is registered only once
    store = ConfigStore.instance()
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.setattr(store, "repo", {k: dict(v) if isinstance(v, dict) else v for k, v in store.repo.items()})


def make(name: str = "Method", module: str = __name__) -> type:
    cls = type(name, (), {"__doc__": "Does a thing.\n\nAnd more.", "__annotations__": {"bits": int}, "bits": 4, "__module__": module})
    return dataclass(cls)


@pytest.mark.usefixtures("clean")
def test_a_registered_class_is_found_summarised_and_known_to_hydra() -> None:
    cls = registry.register("grid", "probe")(make())
    assert registry.get("grid", "probe") is cls
    assert cls.registered_name == "probe"
    (entry,) = [e for e in registry.entries("grid") if e.name == "probe"]
    assert (entry.group, entry.cls, entry.summary) == ("grid", cls, "Does a thing.")
    node = ConfigStore.instance().load("grid/probe.yaml")
    assert node.node.bits == 4 and node.package == "grid"
    with pytest.raises(Exception, match="bitz"):  # a misspelt key
        node.node.bitz = 3


@pytest.mark.usefixtures("clean")
def test_options_of_a_list_group_live_under_their_own_name() -> None:
    registry.register("export", "probe")(make())
    assert ConfigStore.instance().load("export/probe.yaml").package == "export.probe"


@pytest.mark.usefixtures("clean")
def test_a_name_that_is_taken_raises_and_names_who_has_it() -> None:
    registry.register("grid", "probe")(make("First", "somewhere.first"))
    with pytest.raises(ValueError, match=r"grid=probe is registered by somewhere\.first already; choose another name in here"):
        registry.register("grid", "probe")(make("Second", "here"))
    registry.register("quantizer", "probe")(make("Second", "here"))  # another group, another name space
    again = make("First", "somewhere.first")
    registry.register("grid", "probe")(again)  # a module that is imported again
    assert registry.get("grid", "probe") is again


@pytest.mark.usefixtures("clean")
def test_a_name_taken_by_a_class_of_the_same_name_in_another_file_raises() -> None:
    registry.register("grid", "probe")(make("Config", "somewhere.first"))
    with pytest.raises(ValueError, match="is registered by"):
        registry.register("grid", "probe")(make("Config", "somewhere.second"))


def test_an_unknown_group_or_name_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'grids' is unknown; valid groups: grid, quantizer, adapter, model, data, export"):
        registry.register("grids", "probe")
    with pytest.raises(ValueError, match=r"grid=afine does not exist; valid: .*affine"):
        registry.get("grid", "afine")


@pytest.mark.parametrize("group", registry.PACKAGES)
def test_every_option_is_a_documented_dataclass_that_is_where_it_should_be(group: str) -> None:
    found = registry.entries(group)
    assert [e.name for e in found] == sorted({e.name for e in found})
    for entry in found:
        assert is_dataclass(entry.cls), entry
        assert entry.summary and not entry.summary.startswith(f"{entry.cls.__name__}("), f"{entry.cls} has no docstring of its own"
        assert entry.summary == (entry.cls.__doc__ or "").splitlines()[0].strip()
        assert entry.cls.__module__.startswith(registry.PACKAGES[group] + "."), entry
        assert entry.cls.registered_name == entry.name  # type: ignore[attr-defined]
        assert registry.get(group, entry.name) is entry.cls


def heavy_after(statement: str) -> list[str]:
    """What a fresh interpreter has imported of `HEAVY` after ``statement``."""
    code = f"import sys, qtrain.registry as r\n{statement}\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_probe_for_heavy_imports_sees_one() -> None:
    assert heavy_after("import numpy") == ["numpy"]


@pytest.mark.parametrize("package", registry.PACKAGES.values())
def test_loading_a_package_imports_nothing_heavy(package: str) -> None:
    assert heavy_after(f"r.load({package!r})") == []


def test_loading_everything_imports_nothing_heavy() -> None:
    assert heavy_after("r.load_all()") == []


def test_load_imports_every_file_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "probe_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("one", "two"):
        (package / f"{name}.py").write_text(
            textwrap.dedent(f"""
            import sys
            sys.probe_loaded = [*getattr(sys, "probe_loaded", []), "{name}"]
            """)
        )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "probe_loaded", [], raising=False)
    registry.load("probe_package")
    assert sys.probe_loaded == ["one", "two"]  # type: ignore[attr-defined]
