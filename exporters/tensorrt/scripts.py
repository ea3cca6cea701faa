"""What lies beside the model for the machine that will run it: engine.json, build_engine.sh, build_engine.py, reference.npz, README.md."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from exporters.base import Inputs
from exporters.tensorrt.rtx import Profile

SHELL = """\
#!/bin/sh
# Build the TensorRT engine of the model beside this file with trtexec, on the machine and GPU that will use it.
# trtexec comes with TensorRT's archive, package or container (nvcr.io/nvidia/tensorrt), not with its Python wheels.
# Precision is in the graph: --stronglyTyped is needed before TensorRT 11 and is the default since.
set -eu
cd "$(dirname "$0")"
trtexec \\
{arguments} \\
    --stronglyTyped \\
    --memPoolSize=workspace:{workspace_mib} \\
{cache}    --saveEngine=model.engine \\
    "$@"
# Compare the engine with what training and onnxruntime computed, where TensorRT's Python package is installed.
if python3 -c "import tensorrt, numpy" 2>/dev/null; then
    python3 build_engine.py --engine model.engine
else
    echo "no Python package tensorrt here: the engine was not compared with reference.npz" >&2
fi
"""

README = """\
# {name}

`model.onnx` is a strongly typed network for TensorRT ({precision}): its types say where TensorRT computes in int8, float16 and float32.
`receipt.json` says what was checked when it was written.

Engines do not travel between GPUs and TensorRT versions, so build one where it will run:

    sh build_engine.sh            # trtexec; further arguments are passed on to it
    python3 build_engine.py       # or TensorRT's Python package; also compares with reference.npz

Shapes: {shapes}. Other shapes: edit `engine.json`, or export again with export.tensorrt.max_batch=... .

With onnxruntime on an RTX GPU (pip install onnxruntime-ep-nv-tensorrt-rtx-cu13) the file runs as it is: NvTensorRTRTXExecutionProvider.
"""


def write_beside(folder: Path, settings: dict[str, Any], reference: tuple[Inputs, Tensor, Tensor], name: str, precision: str) -> None:
    """Write all files that go with the model.

    Args:
        settings: what engine.json holds.
        reference: inputs, the logits of training and those of onnxruntime on them.
    """
    (folder / "engine.json").write_text(json.dumps(settings, indent=1) + "\n")
    script = folder / "build_engine.sh"
    script.write_text(shell_script(settings))
    script.chmod(0o755)
    shutil.copyfile(Path(__file__).with_name("build_engine.py"), folder / "build_engine.py")
    inputs, training, onnxruntime = reference
    arrays = {f"input.{n}": x.detach().cpu().numpy() for n, x in inputs.items()}
    arrays |= {"training": training.float().cpu().numpy(), "onnxruntime": onnxruntime.float().cpu().numpy()}
    np.savez(folder / "reference.npz", **arrays)  # type: ignore[arg-type]
    shapes = "; ".join(f"{n} {_x(s['min'])} to {_x(s['max'])}, best at {_x(s['opt'])}" for n, s in settings["profile"].items())
    (folder / "README.md").write_text(README.format(name=name, precision=precision, shapes=shapes or "fixed"))


def shell_script(settings: dict[str, Any]) -> str:
    """build_engine.sh."""
    arguments = [f"--onnx={settings['onnx']}"]
    profile: Profile = settings["profile"]
    for which in ("min", "opt", "max") if profile else ():
        arguments.append(f"--{which}Shapes=" + ",".join(f"{name}:{_x(shapes[which])}" for name, shapes in profile.items()))
    return SHELL.format(
        arguments=" \\\n".join(f"    {shlex.quote(a)}" for a in arguments),
        workspace_mib=int(settings["workspace_gib"] * 1024),
        cache=f"    {shlex.quote('--timingCacheFile=' + settings['timing_cache'])} \\\n" if settings["timing_cache"] else "",
    )


def reference_rows(count: int, least: int, most: int) -> list[int]:
    """Which of ``count`` examples the reference has: the first ``most``, repeated where the engine takes no fewer than ``least``."""
    return [i % count for i in range(max(least, min(count, most)))]


def _x(shape: list[int]) -> str:
    return "x".join(map(str, shape))
