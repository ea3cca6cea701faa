"""onnxruntime, as the receipt and every deployment must run it.

`session.qdq_matmulnbits_accuracy_level=0` is set in every session: without it onnxruntime's default session turns DequantizeLinear +
MatMul into MatMulNBits at accuracy_level 4 and so quantizes activations that training left in float, without a word. Where training has
the int8 grid, the node itself says accuracy_level 4. Files with int8 activations compute the same with or without it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import psutil
import torch
from torch import Tensor

from exporters.base import Inputs
from qtrain.receipt import Latency

SESSION_CONFIG = {"session.qdq_matmulnbits_accuracy_level": "0", "session.intra_op.allow_spinning": "0"}
"""The first keeps activations in float; the second keeps the idle threads of one session from slowing another down."""


def threads() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def open_session(model: Path | bytes) -> onnxruntime.InferenceSession:
    """A session on the CPU that computes what training computed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, inputs: Inputs) -> Tensor:
    """The first output, float32.

    Raises:
        ValueError: if an input of the graph is not given.
    """
    wanted = [i.name for i in session.get_inputs()]
    missing = [n for n in wanted if n not in inputs]
    if missing:
        raise ValueError(f"the graph needs inputs {', '.join(missing)}, which a batch of the test split lacks (it has {', '.join(inputs)})")
    return torch.from_numpy(session.run(None, {n: inputs[n].detach().cpu().numpy() for n in wanted})[0])


def logits(path: Path, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
    """Logits float32 [N, C] of all batches in order."""
    session = open_session(path)
    return torch.cat([y.reshape(-1, y.shape[-1]) for y in (run(session, inputs) for inputs, _ in batches)])


# -- latency ---------------------------------------------------------------------------------------------------------


def latency(paths: dict[str, Path], batches: list[int], length: int, repeats: int, example: Inputs, vocab_size: int) -> Latency:
    """Median milliseconds per shape `batch x length`; the models take turns, so that a busy machine slows all of them alike."""
    sessions = {name: open_session(path) for name, path in paths.items()}
    result: Latency = {name: {} for name in sessions}
    for batch in batches:
        feed = random_inputs(example, batch, length, vocab_size)
        shape = f"{batch}x{length}"
        for name, milliseconds in interleaved(sessions, feed, repeats).items():
            result[name][shape] = round(median(milliseconds), 4)
    return result


def interleaved(sessions: dict[str, onnxruntime.InferenceSession], feed: Inputs, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of ``repeats`` runs of each session, one after the other, after two warm-up rounds."""
    feeds = {n: {i.name: feed[i.name].numpy() for i in s.get_inputs()} for n, s in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(repeats + 2):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds[name])
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def random_inputs(example: Inputs, batch: int, length: int, vocab_size: int) -> Inputs:
    """Inputs of ``batch`` full sequences: random token ids, masks of ones, other integers zero, floats normal with the example's shape."""
    generator = torch.Generator().manual_seed(0)
    made: Inputs = {}
    for name, x in example.items():
        if x.is_floating_point():
            made[name] = torch.randn((batch, *x.shape[1:]), generator=generator, dtype=x.dtype)
            continue
        shape = (batch, length) if x.ndim == 2 else (batch, *x.shape[1:])
        if "mask" in name:
            made[name] = torch.ones(shape, dtype=x.dtype)
        elif "type" in name:
            made[name] = torch.zeros(shape, dtype=x.dtype)
        else:
            made[name] = torch.randint(0, vocab_size, shape, generator=generator).to(x.dtype)
    return made
