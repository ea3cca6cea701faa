"""Run a GGUF file in llama.cpp: tokens, logits, embeddings, greedy text and speed, as a receipt needs them.

One `Llama` is one file in one context. Nothing here depends on how the file was made.

    with Llama(path, context=512) as llama:
        tokens = llama.tokenize("Once upon a time")
        logits_TV = llama.logits(tokens)                        # float32, all positions, memory cleared first

What differs from PyTorch in float32, on the same weights:

    KV cache      float16 by default, as llama.cpp's programs have it; `kv_type="f32"` is exact, but flash attention rounds even that to
                  float16: it takes `flash_attention=False` too
    attention     flash attention by default, where the CPU has a kernel for it; without it, the plain product and soft-max
    activations   products with quantized weights round their input to 8 bits (Q8_0 and Q8_1 with 32-blocks, Q8_K with K-types), with
                  float16 weights to float16. This is what the CPU kernels are; no option turns it off, only float32 weights do

SmolLM2-135M, WikiText-2 in windows of 512 tokens, against PyTorch in float32 on the same decoded weights (4,096 tokens; Q4_1: 1,536):

    weights    settings                                    NMSE of logits    KL         same arg-max    perplexity / PyTorch's
    float32    kv_type="f32", flash_attention=False        5e-12             0          1.0000          1.0000
    float32    default (float16 cache, flash attention)    1.3e-7            3.6e-7     0.9998          1.0000
    float16    default                                     1.3e-6            3.9e-6     0.998           1.0001
    Q4_1       kv_type="f32", flash_attention=False        7.9e-4            3.4e-3     0.968           1.006
    Q4_1       default                                     7.8e-4            3.1e-3     0.964           1.003
    Q4_1       flash_attention=False                       7.4e-4            3.2e-3     0.965           1.010
    Q4_1       kv_type="q8_0"                              8.5e-4            3.4e-3     0.956           1.007

So the rounding of activations is all but the whole difference.

Memory: a batch's logits exist three times (in llama.cpp's graph, in its result, and copied here), so a batch has as many tokens as make
`LOGITS_BYTES` of float32 logits and at most 512; `logits_chunks` hands out one batch at a time.

A file is data from somewhere. llama.cpp answers almost all damage with an error, which `LlamaError` carries; what its assertions find ends
the process. `probe` loads and runs a file in a process of its own first.

Shapes: T tokens, V vocabulary, D width of the embedding.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int8, c_int32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from exporters.gguf.libllama import GGML_TYPES, POOLING, Batch
from exporters.gguf.llama_model import LlamaError, LlamaModel

__all__ = ["Llama", "LlamaError", "probe"]

LOGITS_BYTES = 128 * 2**20
"""Float32 logits of one batch."""

BATCH = 512
"""Most tokens of one batch: llama.cpp's own default for a physical batch."""


class Llama(LlamaModel):
    """A model file, loaded and ready to run.

    Args:
        path: a .gguf file; of a split model the first one (…-00001-of-0000N.gguf).
        context: tokens of the longest window; null is the file's training context.
        threads: null is one per usable physical core.
        embeddings: return embeddings (`embed`, `token_embeddings`) instead of logits.
        pooling: of embeddings: none, mean, cls, last; null is what the file says.
        kv_type: of the KV cache: f16 (llama.cpp's default), f32, bf16, q8_0.
        flash_attention: null is llama.cpp's own choice.
        adapter: a GGUF file with a LoRA to compute with beside the weights.
        vocab_only: load the tokenizer and the metadata alone; see also `LlamaModel` for this and the other ``options``.

    Raises:
        ValueError: for options that do not exist.
        LlamaError: if llama.cpp cannot load the file.
        RuntimeError: if there is no llama.cpp.
    """

    def __init__(
        self,
        path: str | Path,
        context: int | None = 512,
        threads: int | None = None,
        embeddings: bool = False,
        pooling: str | None = None,
        *,
        kv_type: str = "f16",
        flash_attention: bool | None = None,
        vocab_only: bool = False,
        adapter: str | Path | None = None,
        **options: Any,
    ) -> None:
        self._context: Any = None
        _one_of("kv_type", kv_type, GGML_TYPES)
        _one_of("pooling", pooling, POOLING)
        super().__init__(path, vocab_only, **options)
        self.embeddings, self._encoder = embeddings, False
        self.context = context or self._lib.llama_model_n_ctx_train(self._model)
        self.threads = threads or _usable_cores()
        if not vocab_only:
            try:
                self._open(pooling, kv_type, flash_attention)
                if adapter is not None:
                    self._attach(Path(adapter))
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        context, self._context = getattr(self, "_context", None), None
        if context:
            self._lib.llama_free(context)
        super().close()

    @property
    def batch(self) -> int:
        """Tokens that are computed at once."""
        return int(self._lib.llama_n_batch(self._opened()))

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """float32 [T, V]: what follows each token of one window. See `logits_chunks` for large vocabularies."""
        out = np.empty((len(tokens), self.n_vocab), np.float32)
        for start, chunk in self.logits_chunks(tokens):
            out[start : start + len(chunk)] = chunk
        return out

    def logits_chunks(self, tokens: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first position, float32 [t, V]) for consecutive pieces of a window of at most `context` tokens; the memory is cleared first."""
        self._check_logits()
        ids, size = self._window(tokens, self.context), self.batch
        self._clear()
        for start in range(0, len(tokens), size):
            count = min(size, len(tokens) - start)
            self._run(ids, start, count, every=True)
            yield start, self._last_logits(count)

    def greedy(self, tokens: Sequence[int], count: int, stop: bool = True) -> list[int]:
        """At most ``count`` most likely tokens after ``tokens``; ``stop`` ends after the token that ends generation."""
        self._check_logits()
        ids, size = self._window(tokens, self.context - count), self.batch
        self._clear()
        for start in range(0, len(tokens), size):
            self._run(ids, start, min(size, len(tokens) - start), every=False)
        found: list[int] = []
        while len(found) < count:
            if found:
                self._run((c_int32 * 1)(found[-1]), 0, 1, every=False)
            found.append(int(self._last_logits(1)[0].argmax()))
            if stop and self.ends(found[-1]):
                break
        return found

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """float32 [D]: the window's pooled embedding, as the model computes it (not normalized)."""
        pooling = self._embedding_run(tokens)
        if pooling == POOLING["none"]:
            raise ValueError(f"{self.path} names no pooling; load it with pooling=mean, cls or last, or call token_embeddings")
        return self._vector(self._lib.llama_get_embeddings_seq(self._context, 0))

    def token_embeddings(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """float32 [T, D]: the last hidden state of each token; needs ``pooling="none"``."""
        pooling = self._embedding_run(tokens)
        if pooling != POOLING["none"]:
            raise ValueError('this model was loaded with pooling; load it with pooling="none" for one embedding per token')
        return np.stack([self._vector(self._lib.llama_get_embeddings_ith(self._context, i)) for i in range(len(tokens))])

    def speed(self, prompt: int = 128, generate: int = 32) -> dict[str, float]:
        """Tokens per second of reading ``prompt`` tokens and of writing ``generate``, after one of each to warm up."""
        if prompt + generate > self.context:
            raise ValueError(f"{prompt} + {generate} tokens do not fit a context of {self.context}; load it with a larger context")
        ids = (c_int32 * max(prompt, generate))(*((7919 * i) % self.n_vocab for i in range(max(prompt, generate))))
        self._clear()
        for count in (min(prompt, self.batch), 1):
            self._run(ids, 0, count, every=False)
        self._clear()
        start = time.perf_counter()
        for first in range(0, prompt, self.batch):
            self._run(ids, first, min(self.batch, prompt - first), every=False)
        middle = time.perf_counter()
        for i in range(generate):
            self._run(ids, i, 1, every=False)
        end = time.perf_counter()
        return {"prompt_tokens_per_s": prompt / (middle - start), "generate_tokens_per_s": generate / (end - middle)}

    def run(self) -> None:
        """Compute four tokens, to see whether the model runs at all."""
        ids = self._ids([token % self.n_vocab for token in range(4)])
        self._clear()
        self._run(ids, 0, 4, every=True)

    # inside

    def _open(self, pooling: str | None, kv_type: str, flash_attention: bool | None) -> None:
        lib, known = self._lib, self.metadata()
        self._encoder = known.get(f"{known.get('general.architecture')}.attention.causal") == "false"
        fits = max(32, LOGITS_BYTES // (4 * max(self.n_vocab, 1)) // 32 * 32)
        batch = self.context if self.embeddings else min(self.context, BATCH, fits)
        asked = {"n_ctx": self.context, "n_batch": batch, "n_ubatch": batch, "n_threads": self.threads, "n_threads_batch": self.threads}
        params = lib.context_params(
            **asked,
            pooling_type=POOLING[pooling],
            flash_attn_type=-1 if flash_attention is None else int(flash_attention),
            type_k=GGML_TYPES[kv_type],
            type_v=GGML_TYPES[kv_type],
            embeddings=self.embeddings,
            offload_kqv=self.gpu_layers != 0,
            op_offload=self.gpu_layers != 0,
        )
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise LlamaError(f"llama.cpp cannot make a context of {self.context} tokens for {self.path}:\n{lib.explain()}")
        has = {name: getattr(lib, f"llama_{name}")(self._context) for name in asked}
        if any(has[name] != value for name, value in asked.items() if name != "n_ctx") or has["n_ctx"] < self.context:
            raise LlamaError(f"{self.version} made a context with {has} where {asked} was asked; its structs are not as known here")

    def _attach(self, path: Path) -> None:
        """Compute with the LoRA of a GGUF file beside the weights; llama.cpp frees it with the model."""
        lib = self._lib
        adapter = lib.llama_adapter_lora_init(self._model, os.fsencode(path)) if path.is_file() else None
        if not adapter:
            raise LlamaError(f"llama.cpp cannot load the adapter {path} beside {self.path}:\n{lib.explain()}")
        code = lib.llama_set_adapters_lora(self._context, (c_void_p * 1)(adapter), 1, (c_float * 1)(1.0))
        if code != 0:
            raise LlamaError(f"llama.cpp cannot compute with the adapter {path} (code {code}):\n{lib.explain()}")

    def _check_logits(self) -> None:
        if self.embeddings:
            raise ValueError("this model was loaded with embeddings=True and computes no logits; load it with embeddings=False")
        if self._encoder:
            raise ValueError(f"{self.path} is an encoder, which computes no logits; load it with embeddings=True")

    def _opened(self) -> Any:
        if not self._context:
            why = "was loaded with vocab_only=True, which computes nothing" if self._model else "is closed"
            raise ValueError(f"{self.path} {why}")
        return self._context

    def _window(self, tokens: Sequence[int], most: int) -> Any:
        """An array of ids that exist and fit."""
        if not 0 < len(tokens) <= most:
            raise ValueError(f"a window has 1 to {most} tokens here, not {len(tokens)}; load it with a larger context")
        return self._ids(tokens)

    def _clear(self) -> None:
        memory = self._lib.llama_get_memory(self._opened())
        if memory:
            self._lib.llama_memory_clear(memory, True)

    def _run(self, ids: Any, start: int, count: int, every: bool) -> None:
        """Compute tokens start … start + count behind the memory's end; outputs for ``every`` token or the last one."""
        lib = self._lib
        flags = (c_int8 * count)(*([int(every)] * (count - 1)), 1)
        token = ctypes.cast(ctypes.byref(ids, 4 * start), ctypes.POINTER(c_int32))
        batch = Batch(n_tokens=count, token=token, logits=flags)
        call = lib.llama_decode if lib.llama_get_memory(self._opened()) else lib.llama_encode
        code = call(self._context, batch)
        if code != 0:
            raise LlamaError(f"llama.cpp cannot compute {count} tokens with {self.path} (code {code}):\n{lib.explain()}")

    def _last_logits(self, count: int) -> NDArray[np.float32]:
        pointer = self._lib.llama_get_logits(self._context)
        if not pointer:
            raise LlamaError(f"{self.path} computes no logits: it is an embedding model; load it with embeddings=True")
        return np.ctypeslib.as_array(pointer, (count, self.n_vocab)).copy()

    def _embedding_run(self, tokens: Sequence[int]) -> int:
        if not self.embeddings:
            raise ValueError("this model was loaded for logits; load it with embeddings=True")
        ids = self._window(tokens, self.context)
        self._clear()
        self._run(ids, 0, len(tokens), every=True)
        return int(self._lib.llama_pooling_type(self._context))

    def _vector(self, pointer: Any) -> NDArray[np.float32]:
        if not pointer:
            raise LlamaError(f"llama.cpp returned no embedding of {self.path}:\n{self._lib.explain()}")
        return np.ctypeslib.as_array(pointer, (self._lib.llama_model_n_embd_out(self._model),)).copy()


def probe(path: str | Path, embeddings: bool = False, **options: Any) -> None:
    """Load and run a file in a process of its own, so that what ends that process is an exception here.

    Raises:
        LlamaError: if llama.cpp refuses the file or dies of it, with its last words.
    """
    call = [sys.executable, "-m", __name__, str(path), json.dumps({"embeddings": embeddings, **options})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        words = "\n".join(f"    {line}" for line in done.stderr.splitlines()[-8:])
        how = "died of" if done.returncode < 0 else "cannot run"
        raise LlamaError(f"llama.cpp {how} {path} (exit status {done.returncode}):\n{words}")


def _one_of(option: str, value: Any, valid: dict[Any, int]) -> None:
    if value not in valid:
        raise ValueError(f"{option} is one of {', '.join(str(name) for name in valid)}, not {value}")


def _usable_cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


if __name__ == "__main__":
    with Llama(sys.argv[1], **{"context": 32, "threads": 1, **json.loads(sys.argv[2])}) as _llama:
        _llama.run()
