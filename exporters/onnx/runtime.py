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


def open_session(model: Path | bytes, config: dict[str, str] = SESSION_CONFIG) -> onnxruntime.InferenceSession:
    """A session on the CPU that computes what training computed, with the entries of ``config``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, inputs: Inputs) -> Tensor:
    """The first output, float32. A graph with fixed shapes gets its batch size at a time, and sequences filled up with zeros (no mask).

    Raises:
        ValueError: if an input of the graph is not given, or is longer than a fixed shape.
    """
    shapes = {i.name: i.shape for i in session.get_inputs()}
    missing = [n for n in shapes if n not in inputs]
    if missing:
        raise ValueError(f"the graph needs inputs {', '.join(missing)}, which a batch of the test split lacks (it has {', '.join(inputs)})")
    given = {n: inputs[n].detach().cpu() for n in shapes}
    count = len(next(iter(given.values())))
    batch = next(iter(shapes.values()))[0]
    if not isinstance(batch, int):
        return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in given.items()})[0])
    given = {n: _filled(x, shapes[n]) for n, x in given.items()}
    pieces = []
    for start in range(0, count, batch):
        piece = {n: x[start : start + batch] for n, x in given.items()}
        size = len(next(iter(piece.values())))
        full = {n: torch.cat([x, x[:1].expand(batch - size, *x.shape[1:])]) for n, x in piece.items()}
        pieces.append(torch.from_numpy(session.run(None, {n: x.numpy() for n, x in full.items()})[0])[:size])
    return torch.cat(pieces)


def _filled(x: Tensor, shape: list[int]) -> Tensor:
    """``x`` with zeros behind its sequences, up to a fixed length."""
    if x.ndim != 2 or x.is_floating_point() or x.shape[1] == shape[1]:
        return x
    if x.shape[1] > shape[1]:
        raise ValueError(
            f"the file takes sequences of {shape[1]} tokens, the test split has one of {x.shape[1]}; set export.onnx.length={x.shape[1]}"
        )
    return torch.nn.functional.pad(x, (0, shape[1] - x.shape[1]))


def fixed_example(example: Inputs, batch: int, length: int) -> Inputs:
    """``example`` with ``batch`` examples, and sequences of ``length`` tokens (repeated, or cut)."""
    made = {}
    for name, x in example.items():
        repeats = [-(-batch // len(x)), *[1] * (x.ndim - 1)]
        sequence = length and x.ndim == 2 and not x.is_floating_point()
        if sequence:
            repeats[1] = -(-length // x.shape[1])
        x = x.repeat(*repeats)[:batch]
        made[name] = x[:, :length].contiguous() if sequence else x.contiguous()
    return made


def logits(path: Path, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
    """Logits float32 [N, C] of all batches in order."""
    return session_logits(open_session(path), batches)


def session_logits(session: onnxruntime.InferenceSession, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
    """As `logits`, of a session that is open."""
    return torch.cat([y.reshape(-1, y.shape[-1]) for y in (run(session, inputs) for inputs, _ in batches)])


# -- latency ---------------------------------------------------------------------------------------------------------


def latency(paths: dict[str, Path], batches: list[int], length: int, repeats: int, example: Inputs, vocab_size: int) -> Latency:
    """Median milliseconds per shape; the models take turns, so that a busy machine slows all of them alike.

    A shape is `batch x length` where there are sequences, else that of the first input: `8x3x32x32`.
    """
    sessions = {name: open_session(path) for name, path in paths.items()}
    result: Latency = {name: {} for name in sessions}
    for batch in batches:
        feed = random_inputs(example, batch, length, vocab_size)
        shape = "x".join(map(str, (batch, length) if _has_sequences(feed) else next(iter(feed.values())).shape))
        for name, milliseconds in interleaved(sessions, feed, repeats).items():
            result[name][shape] = round(median(milliseconds), 4)
    return result


def _has_sequences(inputs: Inputs) -> bool:
    return any(x.ndim == 2 and not x.is_floating_point() for x in inputs.values())


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
