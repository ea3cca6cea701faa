"""Checkpoints are folders of safetensors and json: nothing is pickled, nothing is half-written.

Two kinds share one format. A *model* folder holds weights (or codes), the grids by layer, the resolved config and the versions.
A *training* folder (`step-00000200`) holds all that Lightning needs to continue: weights, optimizer moments, schedule, loop counters.

    tensors.safetensors     every tensor, under its path
    checkpoint.json         everything else, the sha256 of the tensor file, versions

A folder is written under a temporary name and renamed when complete. Loading checks the sha256, so a truncated or damaged file is an
error that says so, never wrong numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qtrain
from qtrain.grids.base import from_spec
from qtrain.layers import fake_layers, quantized_layers

TENSORS = "tensors.safetensors"
REST = "checkpoint.json"


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"qtrain": qtrain.__version__}
    for package in ("torch", "torchao", "lightning", "transformers", "onnx", "onnxruntime", "onnxscript", "gguf", "xllamacpp", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def save(folder: Path, tree: dict[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, tensors and plain values as ``folder``, all or nothing.

    Raises:
        OSError: if the disk is full or not writable; ``folder`` is then as it was before.
        TypeError: for a value that is none of the above.
    """
    with staged(Path(folder)) as temporary:
        tensors: dict[str, Tensor] = {}
        rest = _strip(tree, "", tensors, {})
        try:
            save_file(tensors, temporary / TENSORS)
        except SafetensorError as error:
            raise OSError(f"checkpoint {folder} could not be written: {error}. Free disk space, or set run_dir to another disk") from error
        document = {"format": 1, "versions": versions(), "sha256": _digest(temporary / TENSORS), "tree": rest}
        (temporary / REST).write_text(json.dumps(document))


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when all went well, and nothing if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        remove(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: Path) -> dict[str, Any]:
    """Read what `save` wrote.

    Raises:
        ValueError: if the folder is missing, incomplete or damaged.
    """
    folder = Path(folder)
    try:
        document = json.loads((folder / REST).read_text())
        if _digest(folder / TENSORS) != document["sha256"]:
            raise ValueError(f"the sha256 of {TENSORS} is not the one that was written")
        return _fill(document["tree"], load_file(folder / TENSORS))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {folder} is missing, truncated or damaged ({error}). "
            "Delete that folder and resume again: the stage is then repeated"
        ) from error


def remove(folder: Path) -> None:
    """Delete a folder, if there is one; renamed first, so that no half-deleted folder bears the name."""
    if folder.exists():
        grave = Path(tempfile.mkdtemp(prefix=".old.", dir=folder.parent))
        os.replace(folder, grave / "x")
        shutil.rmtree(grave, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The `step-N` folder with the highest N."""
    return max(folder.glob("step-*"), default=None) if folder.exists() else None


def tidy(folder: Path, keep: Path | None) -> None:
    """Delete all `step-N` folders but ``keep``, and what killed processes left."""
    for entry in folder.glob("*") if folder.exists() else []:
        if entry != keep and entry.name.startswith("step-"):
            remove(entry)
    for entry in folder.glob(".*") if folder.exists() else []:
        shutil.rmtree(entry, ignore_errors=True)


def save_model(folder: Path, model: nn.Module, whole: bool = False, **extra: Any) -> None:
    """Save weights or codes of ``model``, the grid of every layer on one, scales that training froze, and ``extra`` plain values.

    Args:
        whole: of a model with an adapter, the base too; else only what is trained.
    """
    grids = _grids(model)
    frozen = {name: layer.weight_fake.frozen for name, layer in fake_layers(model)}
    base = {"base_sha256": model.base_sha256} if has_adapter(model) else {}
    save(folder, {"state": dict(model.state_dict()) if whole else moving_state(model), "grids": grids, "frozen": frozen, **base, **extra})


def moving_state(model: nn.Module, prefix: str = "") -> dict[str, Any]:
    """What a checkpoint of ``model`` holds: everything, or, beside a frozen base (`qtrain/lora.py`), what training changes.

    That is what requires a gradient, and buffers that follow the data: ranges of activations, statistics of batch-norms.
    """
    state = dict(model.state_dict())
    if has_adapter(model):
        codes = tuple(f"{name}." for name, _ in quantized_layers(model))
        moving = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        moving |= {name for name, _ in model.named_buffers(remove_duplicate=False) if not name.startswith(codes or ("\0",))}
        state = {name: value for name, value in state.items() if name in moving}
    return {prefix + name: value for name, value in state.items()}


def has_adapter(model: nn.Module) -> bool:
    """Whether peft's layers are in it."""
    return hasattr(model, "peft_config")


def _grids(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The grid of every layer that is on one, converted or still in training."""
    fake = {name: layer.weight_fake.grid.spec() for name, layer in fake_layers(model)}
    return fake | {name: layer.grid.spec() for name, layer in quantized_layers(model)}


def require_same_base(what: str, was: Any, model: Any) -> None:
    """Refuse a checkpoint with an adapter of another base than the model's.

    Args:
        what: names the checkpoint.
        was: sha256 of its base.

    Raises:
        ValueError: naming both hashes.
    """
    if was != model.base_sha256:
        raise ValueError(
            f"{what} holds an adapter of another base (sha256 {str(was)[:12]}…) than this one ({model.base_sha256[:12]}…). Start a new run "
            "(run_dir=…), or put model.path and quantizer back as they were"
        )


def load_weights(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Load what `save_model` saved into a model of the same shape; returns the rest of the checkpoint.

    Raises:
        ValueError: if the folder is damaged, does not fit the model, or holds other grids or an adapter of another base.
    """
    tree = load(folder)
    if has_adapter(model) and "base_sha256" in tree:  # versions before it did not write it
        require_same_base(f"checkpoint {folder}", tree["base_sha256"], model)
    stored = {name: from_spec(spec).spec() for name, spec in tree["grids"].items()}
    present = _grids(model)
    if stored != present:
        different = sorted(n for n in stored.keys() | present.keys() if stored.get(n) != present.get(n))
        raise ValueError(
            f"checkpoint {folder} holds {different[0]} on {stored.get(different[0], 'float')}, the model has it on "
            f"{present.get(different[0], 'float')} ({len(different)} layers differ). Load it with the config saved beside it"
        )
    try:
        report = model.load_state_dict(tree["state"], strict=not has_adapter(model))
        lost = sorted(set(report.missing_keys) & moving_state(model).keys())
        if lost:
            raise RuntimeError(f"it has no {lost[0]}")
    except RuntimeError as error:
        raise ValueError(f"checkpoint {folder} does not fit the model: {str(error).splitlines()[-1].strip()}") from error
    for name, layer in fake_layers(model):
        scales = tree["frozen"].get(name)
        layer.weight_fake.frozen = scales and {k: v.to(layer.weight.device) for k, v in scales.items()}
    return {k: v for k, v in tree.items() if k not in ("state", "grids", "frozen")}


class SafeCheckpointIO(CheckpointIO):
    """Lets Lightning save and load its training state in this format."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See `save`."""
        save(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See `load`."""
        return load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """See `remove`."""
        remove(Path(path))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _strip(value: Any, path: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    """Replace tensors by references; each storage is written once, so tied weights stay tied."""
    if isinstance(value, Tensor):
        identity = (value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.dtype) if value.numel() else path
        if identity not in seen:
            seen[identity] = path
            tensors[path] = value.detach().cpu().contiguous()
        return {"__tensor__": seen[identity]}
    if isinstance(value, dict):
        return {"__dict__": [[_key(k), _strip(v, f"{path}/{k}" if path else str(k), tensors, seen)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_strip(v, f"{path}/{i}", tensors, seen) for i, v in enumerate(value)]
        return {"__tuple__": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values; {path} is a {type(value).__name__}")


def _key(key: Any) -> Any:
    if isinstance(key, (str, int)):
        return key
    raise TypeError(f"a checkpoint's keys are strings or integers, not {type(key).__name__}")


def _fill(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_fill(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__tuple__" in value:
        return tuple(_fill(v, tensors) for v in value["__tuple__"])
    return {k: _fill(v, tensors) for k, v in value["__dict__"]}
