"""The other end of `reader.py`: starts the process that loads a folder without qtrain, asks it, and gives its answers as tensors.

Answers come through a pipe, a few megabytes at a time: the process waits until they are read, so no text's logits are held whole, and no
temporary file is written. The process is in a group of its own, so that Ctrl-C reaches it only through `close`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCRIPT = Path(__file__).with_name("reader.py")
LINES = 4
"""Last lines of the process's error stream that a message shows."""


class ReaderFailed(RuntimeError):
    """transformers could not load the folder, or could not do with it what was asked."""


class Session:
    """A folder, loaded by plain transformers in a process of its own; a context manager."""

    def __init__(self, folder: Path, auto: str) -> None:
        """Load ``folder`` with transformers' class ``auto``, in float32, on the CPU.

        Raises:
            ReaderFailed: if that does not work.
        """
        self.path = folder
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the session)
        request = {"folder": str(folder.resolve()), "auto": auto, "path": _search_path(), "threads": torch.get_num_threads()}
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(SCRIPT), json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""},
            process_group=0,
        )
        try:
            for _ in self._answers():
                pass
            self.about = self.value("about")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def value(self, do: str, **given: Any) -> dict[str, Any]:
        """The one answer to a request that gives no tensor."""
        return next(iter(list(self._ask(do, given))))[0]

    def tensor(self, do: str, **given: Any) -> Tensor:
        """A whole tensor, float32."""
        answers = self._ask(do, given)
        shape = next(answers)[0]["shape"]
        out = np.empty(int(np.prod(shape)), np.float32)
        at = 0
        for _, piece in answers:
            out[at : at + len(piece)] = piece
            at += len(piece)
        return torch.from_numpy(out.reshape(shape))

    def rows(self, do: str, **given: Any) -> Iterator[tuple[int, Tensor]]:
        """First row and rows of a matrix, a few megabytes at a time."""
        answers = self._ask(do, given)
        width = next(answers)[0]["shape"][-1]
        rest, start = np.empty(0, np.float32), 0
        for _, piece in answers:
            held = np.concatenate([rest, piece]) if len(rest) else piece
            count = len(held) // width
            if count:
                yield start, torch.from_numpy(held[: count * width].reshape(count, width))
            start, rest = start + count, held[count * width :]

    def _ask(self, do: str, given: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **given}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._answers()

    def _answers(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """Header and piece of each answer to the last request.

        Raises:
            ReaderFailed: if the request failed, or the process ended.
        """
        stream: Any = self._process.stdout
        while line := stream.readline():
            header = json.loads(line)
            if "error" in header:
                raise ReaderFailed(header["error"].strip())
            if "end" in header:
                return
            data = stream.read(header["bytes"]) if "bytes" in header else b""
            if len(data) < header.get("bytes", 0):
                break
            yield header, np.frombuffer(bytearray(data), np.float32)
        raise self._ended()

    def _ended(self) -> ReaderFailed:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()[-LINES:]
        why = f"signal {-code}" + (", as when memory runs out" if code == -9 else "") if code < 0 else f"exit status {code}"
        return ReaderFailed(f"the process that loads the folder ended with {why}: {' / '.join(said) or 'it said nothing'}")


def _search_path() -> list[str]:
    """Where this process finds its packages, without folders that hold qtrain but not torch."""
    folders = [Path(entry) for entry in sys.path if entry]
    return [str(f.resolve()) for f in folders if (f / "torch").is_dir() or not (f / "qtrain").is_dir()]
