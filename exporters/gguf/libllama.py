"""llama.cpp's shared object: where it is found, its functions, and the layout of its parameter structs, checked.

llama.cpp's C API (include/llama.h) is what its own programs and Ollama's engine compute with. Two wheels carry it:

    xllamacpp          prebuilt; one shared object, xllamacpp/xllamacpp*.so, that is a Python module and exports the C API as well
    llama-cpp-python   compiled at installation; llama_cpp/lib/libllama.so beside libggml*.so

The file is opened with ctypes; neither package is imported. With both installed, the prebuilt one is taken; the environment variable
QTRAIN_LIBLLAMA names another file.

Structs are the API's one trap. `llama_model_params` and `llama_context_params` go by value, so that a field at the wrong offset is not an
error but another setting, and they change between builds. So:

- A layout is a list of (field, type, default). It is used only if the library's own defaults, read at the layout's offsets, are the
  layout's defaults; no layout that fits is an error that names the build. Defaults that are not zero stand at the start, in the middle and
  at the end of both structs, so that a field inserted or removed between them is noticed.
- What the library returns is kept whole, with 256 bytes to spare, and only the fields that are set are changed: fields that newer builds
  append keep their defaults. (All three calling conventions allow it: a struct this large is returned through a pointer, and passed as a
  copy on the stack or behind a pointer, read at offsets from its start.)
- `Llama` reads the settings back from the context that was made.

The log is one global callback. It prints nothing; the last lines at level warning and above are kept for the messages of exceptions.

What cannot be caught: a failed GGML_ASSERT in llama.cpp ends the process (`llama.probe` tries a file in a process of its own).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
from collections import deque
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = {"xllamacpp": ("xllamacpp", "xllamacpp*"), "llama-cpp-python": ("llama_cpp", "lib/*llama.*")}
"""Distribution -> (package, where its shared object is)."""

SUFFIXES = (".so", ".pyd", ".dylib", ".dll")

OVERRIDE = "QTRAIN_LIBLLAMA"

SPARE_BYTES = 256
"""Room behind the known fields of a struct, for those that newer builds append."""

GGML_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}
"""Types of the KV cache (ggml.h, enum ggml_type)."""

POOLING = {None: -1, "none": 0, "mean": 1, "cls": 2, "last": 3}
"""enum llama_pooling_type; None is what the file says."""

MODEL_PARAMS: list[tuple[str, Any, Any]] = [
    ("devices", c_void_p, None),
    ("tensor_buft_overrides", c_void_p, None),
    ("n_gpu_layers", c_int32, -1),
    ("split_mode", c_int32, 1),
    ("load_mode", c_int32, -1),
    ("lazy_mode", c_int32, 1),
    ("main_gpu", c_int32, 0),
    ("tensor_split", c_void_p, None),
    ("progress_callback", c_void_p, None),
    ("progress_callback_user_data", c_void_p, None),
    ("kv_overrides", c_void_p, None),
    ("vocab_only", c_bool, False),
    ("check_tensors", c_bool, False),
    ("use_extra_bufts", c_bool, True),
    ("no_host", c_bool, False),
    ("no_alloc", c_bool, False),
    ("load_mtp", c_bool, False),
]

CONTEXT_PARAMS: list[tuple[str, Any, Any]] = [
    ("n_ctx", c_uint32, 512),
    ("n_batch", c_uint32, 2048),
    ("n_ubatch", c_uint32, 512),
    ("n_seq_max", c_uint32, 1),
    ("n_rs_seq", c_uint32, 0),
    ("n_outputs_max", c_uint32, 0),
    ("n_outputs_max_per_seq", c_uint32, 1),
    ("n_threads", c_int32, 4),
    ("n_threads_batch", c_int32, 4),
    ("ctx_type", c_int32, 0),
    ("rope_scaling_type", c_int32, -1),
    ("pooling_type", c_int32, -1),
    ("attention_type", c_int32, -1),
    ("flash_attn_type", c_int32, -1),
    ("rope_freq_base", c_float, 0.0),
    ("rope_freq_scale", c_float, 0.0),
    ("yarn_ext_factor", c_float, -1.0),
    ("yarn_attn_factor", c_float, -1.0),
    ("yarn_beta_fast", c_float, -1.0),
    ("yarn_beta_slow", c_float, -1.0),
    ("yarn_orig_ctx", c_uint32, 0),
    ("defrag_thold", c_float, -1.0),
    ("cb_eval", c_void_p, None),
    ("cb_eval_user_data", c_void_p, None),
    ("type_k", c_int32, 1),
    ("type_v", c_int32, 1),
    ("abort_callback", c_void_p, None),
    ("abort_callback_data", c_void_p, None),
    ("embeddings", c_bool, False),
    ("offload_kqv", c_bool, True),
    ("no_perf", c_bool, True),
    ("op_offload", c_bool, True),
    ("swa_full", c_bool, True),
    ("kv_unified", c_bool, False),
    ("samplers", c_void_p, None),
    ("n_samplers", c_size_t, 0),
    ("ctx_other", c_void_p, None),
]

_AT = [name for name, _, _ in CONTEXT_PARAMS].index("embeddings")

LAYOUTS: dict[str, list[list[tuple[str, Any, Any]]]] = {
    "llama_model": [MODEL_PARAMS, [field for field in MODEL_PARAMS if field[0] != "lazy_mode"]],
    "llama_context": [[*CONTEXT_PARAMS[:_AT], ("added", c_void_p, None), *CONTEXT_PARAMS[_AT:]], CONTEXT_PARAMS],
}
"""Known layouts of each struct, newest first. xllamacpp 2026.10.11549 has 8 more bytes before the context's booleans, and both first
layouts; 2026.8.10566 has both second ones; llama-cpp-python 0.3.36 has the first of the model and the second of the context."""


class Batch(ctypes.Structure):
    """`llama_batch`: positions and sequences left NULL are counted from the memory's end, in sequence 0."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
    ]


LOG_CALLBACK = CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
LOG_WARNING, LOG_ERROR, LOG_CONTINUED = 3, 4, 5

FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [LOG_CALLBACK, c_void_p]),
    "llama_backend_init": (None, []),
    "llama_batch_get_one": (Batch, [POINTER(c_int32), c_int32]),
    "llama_model_free": (None, [c_void_p]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_n_embd_out": (c_int32, [c_void_p]),
    "llama_model_size": (c_uint64, [c_void_p]),
    "llama_model_desc": (c_int32, [c_void_p, c_char_p, c_size_t]),
    "llama_model_meta_count": (c_int32, [c_void_p]),
    "llama_model_meta_key_by_index": (c_int32, [c_void_p, c_int32, c_char_p, c_size_t]),
    "llama_model_meta_val_str_by_index": (c_int32, [c_void_p, c_int32, c_char_p, c_size_t]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_ubatch": (c_uint32, [c_void_p]),
    "llama_n_threads": (c_int32, [c_void_p]),
    "llama_n_threads_batch": (c_int32, [c_void_p]),
    "llama_pooling_type": (c_int32, [c_void_p]),
    "llama_encode": (c_int32, [c_void_p, Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_embeddings_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_get_embeddings_seq": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_vocab_get_add_eos": (c_bool, [c_void_p]),
    **{f"llama_vocab_{name}": (c_int32, [c_void_p]) for name in ("bos", "eos", "eot", "sep", "nl", "pad", "mask")},
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_detokenize": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
}

TEXTS = {"llama.cpp": "llama_version", "build": "_Z18llama_build_numberv", "ggml": "ggml_version"}
"""What a library says about itself; older ones lack some."""


def unavailable() -> str:
    """Why llama.cpp cannot run here; empty where it can."""
    return "" if _find() else f"llama.cpp is not installed; pip install xllamacpp (or set {OVERRIDE}=PATH/TO/libllama.so)"


@cache
def library() -> Library:
    """The one library of this process.

    Raises:
        RuntimeError: if there is none, or its structs are not as known here.
    """
    if why := unavailable():
        raise RuntimeError(why)
    return Library(*_find())


class Library:
    """The functions of one shared object by their own names, with the checked structs."""

    def __init__(self, path: Path, origin: str) -> None:
        self.path, self.origin = path, origin
        self._lines: deque[str] = deque(maxlen=8)
        try:
            self._lib = ctypes.CDLL(str(path))
            self._declare()
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"llama.cpp cannot be used from {path}: {error}; pip install --upgrade xllamacpp") from error
        self._callback = LOG_CALLBACK(self._log)
        self._lib.llama_log_set(self._callback, None)
        self._lib.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    @property
    def version(self) -> str:
        """Such as "xllamacpp 2026.10.11549 (llama.cpp 0.6.0-dev, ggml 0.26.0)"."""
        found = []
        for what, name in TEXTS.items():
            function = getattr(self._lib, name, None)
            if function is None:
                continue
            function.restype = c_int32 if what == "build" else c_char_p
            value = function()
            if value:
                found.append(f"{what} {value.decode() if isinstance(value, bytes) else value}")
        return f"{self.origin} ({', '.join(found)})" if found else self.origin

    def model_params(self, **fields: Any) -> Any:
        """The library's defaults with ``fields`` set."""
        return self._params("llama_model", fields)

    def context_params(self, **fields: Any) -> Any:
        """The library's defaults with ``fields`` set."""
        return self._params("llama_context", fields)

    def explain(self) -> str:
        """The last lines of llama.cpp's log, forgotten afterwards."""
        lines = [line.strip() for line in self._lines if line.strip()]
        self._lines.clear()
        return "\n".join(f"    {line}" for line in lines) or "    (llama.cpp logged no reason)"

    def _params(self, struct: str, fields: dict[str, Any]) -> Any:
        params = getattr(self._lib, f"{struct}_default_params")()
        for name, value in fields.items():
            getattr(params, name)  # a struct takes any attribute: a misspelt one would be lost
            setattr(params, name, value)
        return params

    def _declare(self) -> None:
        structs = {struct: self._layout(struct, layouts) for struct, layouts in LAYOUTS.items()}
        functions = {
            **FUNCTIONS,
            "llama_model_load_from_file": (c_void_p, [c_char_p, structs["llama_model"]]),
            "llama_init_from_model": (c_void_p, [c_void_p, structs["llama_context"]]),
        }
        for name, (result, arguments) in functions.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments
        self._check_batch()

    def _layout(self, struct: str, layouts: list[list[tuple[str, Any, Any]]]) -> Any:
        """The struct, with the first layout that reads the library's defaults as they should be."""
        function = getattr(self._lib, f"{struct}_default_params")
        wrong: list[str] = []
        for layout in layouts:
            fields = [(name, kind) for name, kind, _ in layout]
            kind = type(struct, (ctypes.Structure,), {"_fields_": [*fields, ("spare", c_uint8 * SPARE_BYTES)]})
            function.restype = kind
            params = function()
            wrong = [name for name, _, default in layout if getattr(params, name) != default]
            if not wrong:
                return kind
        raise RuntimeError(
            f"{self.version} at {self.path} has a {struct}_params that is not known here (not where they should be: {', '.join(wrong)}); "
            "pip install xllamacpp==2026.10.11549 is known to work"
        )

    def _check_batch(self) -> None:
        tokens = (c_int32 * 3)(5, 6, 7)
        batch = self._lib.llama_batch_get_one(tokens, 3)
        same = batch.n_tokens == 3 and bool(batch.token) and list(batch.token[:3]) == [5, 6, 7]
        if not same or batch.embd or batch.pos or batch.n_seq_id or batch.seq_id or batch.logits:
            raise RuntimeError(
                f"{self.version} at {self.path} has a llama_batch that is not known here; pip install xllamacpp==2026.10.11549"
            )

    def _log(self, level: int, text: bytes | None, _: Any) -> None:
        line = (text or b"").decode(errors="replace")
        if level == LOG_CONTINUED and self._lines:
            self._lines[-1] += line
        elif level in (LOG_WARNING, LOG_ERROR):
            self._lines.append(line)


@cache
def _find() -> tuple[Path, str] | tuple[()]:
    """The shared object, and the distribution and version it is from."""
    if given := os.environ.get(OVERRIDE):
        return Path(given), given
    for distribution, (package, pattern) in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).glob(pattern)):
                if path.suffix in SUFFIXES:
                    return path, f"{distribution} {_version(distribution)}"
    return ()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
