"""What is installed: the wheel holds the configuration and the recipes, and works from another folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import ROOT


def test_the_wheel_holds_every_yaml_and_runs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    for folder in ("conf", "recipes"):
        for path in (ROOT / folder).rglob("*.yaml"):
            assert f"qtrain/_{folder}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    program = f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv = ['qtrain', '+recipe=qat_int4_bert', '--cfg', 'job']\n"
    program += "import qtrain; assert qtrain.__file__.startswith(sys.path[0])\nfrom qtrain.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "rule: signed_absmax" in done.stdout, done.stderr
