"""Checkpoints: everything comes back, damage is an error, and a full disk leaves what was there."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qtrain import checkpoint
from qtrain.grids.affine import Affine
from qtrain.layers import fake_layers
from qtrain.prepare import convert, prepare


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 16), nn.Linear(16, 32))


def prepared(weight: Affine) -> nn.Module:
    model = small_model()
    prepare(
        model,
        {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))},
        weight,
        Affine(bits=8, granularity="channel"),
    )
    return model


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    tree = {
        "a": {1: shared, "two": (shared, [torch.arange(3), None, True])},
        "empty": torch.zeros(0, 5),
        "half": torch.randn(2).bfloat16(),
        "plain": [1, 2.5, "x", float("inf")],
        "codes": torch.tensor([-8, 7], dtype=torch.int8),
    }
    checkpoint.save(tmp_path / "c", tree)
    back = checkpoint.load(tmp_path / "c")
    assert back["plain"] == tree["plain"]
    assert torch.equal(back["a"][1], shared) and isinstance(back["a"]["two"], tuple)
    assert back["a"]["two"][0] is back["a"][1]  # tied stays tied
    assert back["a"]["two"][1][1:] == [None, True]
    assert back["empty"].shape == (0, 5) and back["half"].dtype == torch.bfloat16
    assert torch.equal(back["codes"], tree["codes"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "no json", "no tensors"])
def test_a_damaged_checkpoint_says_so(damage: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"w": torch.randn(100)})
    tensors, rest = tmp_path / "c" / checkpoint.TENSORS, tmp_path / "c" / checkpoint.REST
    data = bytearray(tensors.read_bytes())
    if damage == "truncate":
        tensors.write_bytes(data[:-10])
    elif damage == "flip":
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif damage == "no json":
        rest.write_text(rest.read_text()[:40])
    else:
        tensors.unlink()
    with pytest.raises(ValueError, match="missing, truncated or damaged"):
        checkpoint.load(tmp_path / "c")


def test_an_object_that_is_no_tensor_or_plain_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a/b"):
        checkpoint.save(tmp_path / "c", {"a": {"b": object()}})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_checkpoint_and_nothing_half_written(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from qtrain.vision import mend_torchvision\n"
        "mend_torchvision()\n"
        "from qtrain import checkpoint\n"
        "folder = Path(sys.argv[1])\n"
        "checkpoint.save(folder, {'w': torch.ones(10)})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n    checkpoint.save(folder, {'w': torch.ones(100000)})\n"
        "except OSError as error:\n    print('OSError', error)\n"
        "print(float(checkpoint.load(folder)['w'].sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "c")], capture_output=True, text=True, check=True)
    assert "OSError" in done.stdout and done.stdout.strip().endswith("10.0")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("rule", ["signed_absmax", "minmax", "mse"])
def test_codes_and_grids_come_back(rule: str, tmp_path: Path) -> None:
    model = convert(prepared(Affine(rule=rule, group_size=16)))
    checkpoint.save_model(tmp_path / "c", model, stage="x")
    other = convert(prepared(Affine(rule=rule, group_size=16)))
    for layer in other:
        layer.codes.zero_()
    assert checkpoint.load_weights(tmp_path / "c", other) == {"stage": "x"}
    ids = torch.arange(20)
    assert torch.equal(model(ids), other(ids))


def test_a_checkpoint_on_another_grid_is_refused(tmp_path: Path) -> None:
    checkpoint.save_model(tmp_path / "c", convert(prepared(Affine(group_size=16))))
    with pytest.raises(ValueError, match="'group_size': 16"):
        checkpoint.load_weights(tmp_path / "c", convert(prepared(Affine(bits=3, group_size=16))))


def test_a_checkpoint_of_another_version_of_a_grid_is_refused(tmp_path: Path) -> None:
    checkpoint.save_model(tmp_path / "c", convert(prepared(Affine(group_size=16))))
    path = tmp_path / "c" / checkpoint.REST
    path.write_text(path.read_text().replace('["version", 1]', '["version", 99]'))
    with pytest.raises(ValueError, match="version 99"):
        checkpoint.load_weights(tmp_path / "c", convert(prepared(Affine(group_size=16))))


def test_frozen_scales_come_back(tmp_path: Path) -> None:
    model = prepared(Affine(group_size=16))
    for _, layer in fake_layers(model):
        layer.weight_fake.freeze(layer.weight)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7)  # the rule would now give other scales
    checkpoint.save_model(tmp_path / "c", model)
    other = prepared(Affine(group_size=16))
    checkpoint.load_weights(tmp_path / "c", other)
    ids = torch.arange(20)
    assert torch.equal(model.eval()(ids), other.eval()(ids))
    assert torch.equal(convert(copy.deepcopy(model))(ids), convert(other)(ids))


def test_versions_are_stored(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {})
    stored = json.loads((tmp_path / "c" / checkpoint.REST).read_text())["versions"]
    assert stored["torch"] == torch.__version__.split("+")[0] or stored["torch"] == torch.__version__
    assert "qtrain" in stored
