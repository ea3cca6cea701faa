"""A GGUF file loaded by llama.cpp, before anything is computed: what it says about itself, and its tokenizer.

This is llama.cpp's `llama_model`, without a `llama_context`, which `Llama` adds. With `vocab_only`, weights are not read, and a file needs
none.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import c_int32
from pathlib import Path
from typing import Any, Self

from exporters.gguf.libllama import library

SPECIAL = ("bos", "eos", "eot", "sep", "nl", "pad", "mask")

MAPPED, READ = 1, 0
"""enum llama_load_mode."""


class LlamaError(RuntimeError):
    """llama.cpp refused or failed; the message ends with the last lines of its log."""


class LlamaModel:
    """A model file.

    Args:
        path: a .gguf file; of a split model the first one (…-00001-of-0000N.gguf).
        vocab_only: load the tokenizer and the metadata alone.
        use_mmap: map the file rather than read it.
        check_tensors: refuse blocks whose scales are not finite; reads the whole file.
        repack: let llama.cpp reorder weights in memory for its faster kernels, as it does by default.
        gpu_layers: layers on a GPU, where the library has one; 0 keeps everything on the CPU.

    Raises:
        LlamaError: if llama.cpp cannot load the file.
        RuntimeError: if there is no llama.cpp.
    """

    def __init__(
        self,
        path: str | Path,
        vocab_only: bool = False,
        use_mmap: bool = True,
        check_tensors: bool = True,
        repack: bool = True,
        gpu_layers: int = 0,
    ) -> None:
        self._model: Any = None
        self.path, self.vocab_only, self.gpu_layers = Path(path), vocab_only, gpu_layers
        self._lib = library()
        self._lib.explain()
        if not self.path.is_file():
            raise LlamaError(f"there is no file {self.path}")
        fields: dict[str, Any] = {"n_gpu_layers": gpu_layers, "vocab_only": vocab_only, "check_tensors": check_tensors}
        if gpu_layers == 0:
            no_devices = (ctypes.c_void_p * 1)(None)
            fields["devices"] = ctypes.cast(no_devices, ctypes.c_void_p)
        params = self._lib.model_params(**fields, use_extra_bufts=repack, load_mode=MAPPED if use_mmap else READ)
        self._model = self._lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise LlamaError(f"llama.cpp cannot load {self.path}:\n{self._lib.explain()}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        model, self._model = getattr(self, "_model", None), None
        if model:
            self._lib.llama_model_free(model)

    # what the file is

    @property
    def version(self) -> str:
        """Of llama.cpp and the package that brought it."""
        return str(self._lib.version)

    def describe(self) -> str:
        """llama.cpp's own words for the model, such as "llama 256M Q4_1"."""
        return _text(lambda buffer, size: self._lib.llama_model_desc(self._loaded(), buffer, size))

    def tensor_bytes(self) -> int:
        """Of all tensors."""
        return int(self._lib.llama_model_size(self._loaded()))

    def metadata(self) -> dict[str, str]:
        """The file's scalar metadata as llama.cpp prints it; arrays are left out, as its API does."""
        lib, model = self._lib, self._loaded()
        found = {}
        for i in range(lib.llama_model_meta_count(model)):
            key = _text(lambda buffer, size, i=i: lib.llama_model_meta_key_by_index(model, i, buffer, size))
            found[key] = _text(lambda buffer, size, i=i: lib.llama_model_meta_val_str_by_index(model, i, buffer, size))
        return found

    def special_tokens(self) -> dict[str, int | None]:
        """bos, eos, eot, sep, nl, pad, mask -> id, null where the vocabulary has none."""
        self._loaded()
        ids = {name: getattr(self._lib, f"llama_vocab_{name}")(self._vocab) for name in SPECIAL}
        return {name: None if token < 0 else token for name, token in ids.items()}

    def adds(self) -> dict[str, bool]:
        """Whether ``tokenize(add_special=True)`` adds bos and eos."""
        self._loaded()
        return {name: getattr(self._lib, f"llama_vocab_get_add_{name}")(self._vocab) for name in ("bos", "eos")}

    def ends(self, token: int) -> bool:
        """Whether generation stops after ``token``."""
        self._loaded()
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    # text

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids.

        Args:
            add_special: begin and end as `adds` says.
            parse_special: read special tokens that stand in the text; else they are text.

        Raises:
            LlamaError: if the vocabulary cannot spell the text.
        """
        self._loaded()
        data = text.encode()
        room = len(data) + 8
        for _ in range(2):
            ids = (c_int32 * room)()
            count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
            if count >= 0:
                return list(ids[:count])
            room = -count
        raise LlamaError(f"llama.cpp cannot tokenize {text[:40]!r} with {self.path}:\n{self._lib.explain()}")

    def detokenize(self, tokens: Sequence[int], remove_special: bool = False, unparse_special: bool = True) -> str:
        """The text of ``tokens``; bytes that are no UTF-8 become U+FFFD."""
        ids = self._ids(tokens)
        room = 16 * len(tokens) + 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(room)
            size = self._lib.llama_detokenize(self._vocab, ids, len(tokens), buffer, room, remove_special, unparse_special)
            if size >= 0:
                return buffer.raw[:size].decode(errors="replace")
            room = -size
        raise LlamaError(f"llama.cpp cannot write {len(tokens)} tokens as text with {self.path}:\n{self._lib.explain()}")

    # inside

    def _loaded(self) -> Any:
        if not self._model:
            raise ValueError(f"{self.path} is closed")
        return self._model

    def _ids(self, tokens: Sequence[int]) -> Any:
        """An array of ids that exist."""
        self._loaded()
        ids = [int(token) for token in tokens]
        wrong = [token for token in ids if not 0 <= token < self.n_vocab]
        if wrong:
            raise ValueError(f"token {wrong[0]} is not in the vocabulary of {self.n_vocab} tokens of {self.path}")
        return (c_int32 * len(ids))(*ids)


def _text(write: Callable[[Any, int], int]) -> str:
    """What a function of (buffer, size) writes there, whatever its length."""
    size = 256
    while True:
        buffer = ctypes.create_string_buffer(size)
        needed = write(buffer, size)
        if needed < size:
            return buffer.value.decode(errors="replace")
        size = needed + 1
