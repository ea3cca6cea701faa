"""Dependencies point one way, nothing is pickled, and the README is true."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from qtrain import matrix
from tests.conftest import ROOT

SOURCES = sorted([*(ROOT / "qtrain").rglob("*.py"), *(ROOT / "exporters").rglob("*.py")])
COMMON = {"grids", "activations", "layers", "prepare", "graph", "targets", "registry", "lazy", "fit", "callbacks", "console", "pt2e"}
ALLOWED = {
    "qtrain/grids": {"grids", "registry", "lazy", "gguf_names"},
    "qtrain/quantizers": COMMON | {"quantizer", "scheme", "frozen", "gguf_names", "bnb", "torchao_tensors"},
    "qtrain/adapters": COMMON,
    "qtrain/models": COMMON
    | {"samples", "wheels", "pretrained", "streaming", "gguf_header", "gguf_source"}
    | {"models", "images", "image_models", "vision", "resnet"},
    "qtrain/data": COMMON | {"samples", "text", "images", "splits", "tables", "hub", "datamodule", "language", "documents"},
    "exporters": {"grids", "receipt", "registry", "lazy", "gguf_names", "imatrix", "__init__"},
}


def imports(path: Path) -> set[str]:
    """Names of qtrain's and exporters' modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "qtrain":
                found |= {f"qtrain.{a.name}" for a in node.names}
            else:
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {name for name in found if name.split(".")[0] in ("qtrain", "exporters")}


@pytest.mark.parametrize("folder", ALLOWED)
def test_dependencies_point_one_way(folder: str) -> None:
    for path in (p for p in SOURCES if p.is_relative_to(ROOT / folder)):
        for name in imports(path):
            top, _, rest = name.partition(".")
            if top == "exporters":
                assert folder == "exporters", f"{path} imports {name}"
            else:
                assert (rest.split(".")[0] or "__init__") in ALLOWED[folder], f"{path} imports {name}"


def test_quantizers_models_and_datasets_do_not_import_each_other() -> None:
    for folder in ("quantizers", "adapters", "models", "data"):
        files = {p.stem for p in (ROOT / "qtrain" / folder).glob("*.py")} - {"__init__"}
        for path in (ROOT / "qtrain" / folder).glob("*.py"):
            for name in imports(path):
                assert not (name.startswith(f"qtrain.{folder}.") and name.rsplit(".", 1)[1] in files - {path.stem}), (
                    f"{path} imports {name}"
                )


def test_only_run_and_main_know_the_configuration() -> None:
    for path in SOURCES:
        if path.name not in ("__main__.py", "run.py", "explain.py"):
            assert "qtrain.config" not in imports(path), path


def test_qtrain_names_no_exporter() -> None:
    for path in (p for p in SOURCES if p.is_relative_to(ROOT / "qtrain")):
        for name in imports(path):
            assert not name.startswith("exporters.") or name == "exporters.base", f"{path} imports {name}"


def test_run_is_short() -> None:
    assert len((ROOT / "qtrain" / "run.py").read_text().splitlines()) <= 150


def test_nothing_is_unpickled() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                assert not (isinstance(node.func.value, ast.Name) and node.func.value.id in ("torch", "pickle")), path


def test_every_module_says_why_it_exists() -> None:
    for path in SOURCES:
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc and len(doc) > 20, path


def test_the_readme_has_the_support_matrix_of_the_registries() -> None:
    text = (ROOT / "README.md").read_text()
    assert matrix.replaced(text) == text, "run python -m qtrain.matrix README.md"


def test_the_readme_names_every_source_file_of_its_tour() -> None:
    text = (ROOT / "README.md").read_text()
    for name in text.split("## A tour")[1].split("## Tests")[0].split("`")[1::2]:
        if "/" in name and "(" not in name:
            assert (ROOT / name).exists(), name
