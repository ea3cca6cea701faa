"""Write a traced graph to disk: lowered, fused if the fused graph computes the same, with metadata, as one file or with external data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn

from exporters.base import Inputs, PackedLayer, activation_modules, packed_layers, quantizes_activations, standalone_activations
from exporters.onnx import lower, runtime, trace
from exporters.onnx.layout import Layout
from exporters.onnx.profile import PROFILES, Profile
from qtrain.receipt import nmse

PROTOBUF_LIMIT = 1_900_000_000
"""Bytes of initializers above which they go to a file of their own; a protobuf message holds 2 GB."""
PARITY_NMSE, PARITY_NMSE_ACTIVATIONS = 1e-4, 5e-2
"""How far a fused graph may be from the traced module, on a handful of examples. A wrong fusion (a lost mask, a swapped head) is off by
0.1 or more; int8 rounding flips by up to 1e-2. The receipt then compares the whole test split at its own tolerance."""


@dataclass
class Written:
    """One ONNX file."""

    files: list[Path]
    """The file, and the external data where it needed one."""
    fused: dict[str, int]
    fallback: str = ""
    """Why the fusions were left out, where they were asked for."""


@dataclass(frozen=True)
class Settings:
    """How to write, whatever the model."""

    max_length: int
    """Longest sequence, tokens."""
    opset: int
    fuse: bool
    profile: Profile = PROFILES["x86"]
    fixed: bool = False
    """All shapes are those of the example inputs."""


def write_model(
    model: nn.Module,
    path: Path,
    example: Inputs,
    settings: Settings,
    layouts: Mapping[str, Layout],
    metadata: dict[str, str],
) -> Written:
    """Trace ``model``, fuse, put the codes in and save; ``layouts`` is empty for a float model."""
    layers: dict[str, Any] = {name: layer for name, layer in packed_layers(model).items() if name in layouts}
    graph = trace.trace(model, example, settings.max_length, settings.opset, not settings.fixed)
    fallback = ""
    job = _Finish(path, layers, dict(layouts), metadata, example, settings)
    if settings.fuse:
        plain = graph.clone()
        try:
            return job.run(model, trace.fuse(graph), fused=True, check=True)
        except Exception as error:  # whatever a rewriter raises: the plain graph is still right, and the receipt says so
            fallback = f"fused graph left out: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            if isinstance(error, OSError):
                raise
        graph = plain
    written = job.run(model, graph, fused=False, check=not layers)  # codes have the receipt
    written.fallback = fallback
    return written


@dataclass(frozen=True)
class _Finish:
    """What happens to a graph after tracing."""

    path: Path
    layers: dict[str, Any]
    layouts: dict[str, Layout]
    metadata: dict[str, str]
    example: Inputs
    settings: Settings

    def run(self, model: nn.Module, graph: ir.Model, fused: bool, check: bool) -> Written:
        if not fused and self.settings.profile.contrib:
            trace.split_layer_norms(graph)
        if self.layers:
            modules = {**self.layers, **standalone_activations(model)}
            lower.lower(graph, modules, self.layouts, self.settings.profile, fused)
        _check_versions(graph, self.settings.opset)
        graph.producer_name = "qtrain"
        graph.metadata_props.clear()
        graph.metadata_props.update(self.metadata)
        files = save(graph, self.path)
        onnx.checker.check_model(str(self.path))
        if check:
            _check_parity(self.path, model, self.example, self.settings.fixed)
        return Written(files, trace.fused_ops(graph))


def save(graph: ir.Model, path: Path) -> list[Path]:
    """Save, beside a `.data` file where the initializers exceed what one protobuf message holds.

    Raises:
        OSError: if the disk is full.
    """
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)
    size = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)
    if size <= PROTOBUF_LIMIT:
        ir.save(graph, path)
        return [path]
    ir.save(graph, path, external_data=data.name)
    return [path, data]


def _check_versions(graph: ir.Model, opset: int) -> None:
    if graph.opset_imports[""] > opset:
        needed = graph.opset_imports[""]
        raise ValueError(f"the graph needs opset {needed}, more than the {opset} asked for; set export.onnx.opset={needed}")


def _check_parity(path: Path, reference: nn.Module, example: Inputs, fixed: bool) -> None:
    """Compare with the module on the example, on one example of it and on a shorter sequence; on the first alone if shapes are fixed."""
    session = runtime.open_session(path)
    tolerance = PARITY_NMSE_ACTIVATIONS if quantizes_activations(reference) else PARITY_NMSE
    shorter = {n: x[:, : max(2, x.shape[1] // 2)] if x.ndim == 2 and not x.is_floating_point() else x for n, x in example.items()}
    for inputs in (example,) if fixed else (example, {n: x[:1] for n, x in example.items()}, shorter):
        error = nmse(module_logits(reference, inputs), runtime.run(session, inputs))
        if not error <= tolerance:
            shapes = ", ".join(str(list(x.shape)) for x in inputs.values())
            raise ValueError(f"it differs from the module by nmse {error:.2g} on inputs of shape {shapes}")


def module_logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Logits of the module, on its own device."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with torch.no_grad():
        return trace.logits_of(model(**{n: x.to(device) for n, x in inputs.items()}))


def metadata_of(layers: dict[str, PackedLayer], given: dict[str, str], version: str, model: nn.Module | None = None) -> dict[str, str]:
    """What the file says about itself: the caller's text, the grid of every packed tensor, and how a session must be set up.

    With ``model``, the grids of its activations too.
    """
    named: dict[str, Any] = {name: layer.quantized.grid for name, layer in layers.items()}
    named |= {name: module.grid for name, module in activation_modules(model).items()} if model is not None else {}
    grids = {name: json.dumps(grid.spec(), sort_keys=True) for name, grid in named.items()}
    kinds = {spec: i for i, spec in enumerate(dict.fromkeys(grids.values()))}
    return {
        **given,
        "qtrain.version": version,
        "qtrain.grids": json.dumps({"grids": [json.loads(s) for s in kinds], "tensors": {n: kinds[s] for n, s in grids.items()}}),
        "qtrain.session_config": json.dumps(runtime.SESSION_CONFIG),
    }
