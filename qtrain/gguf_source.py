"""A GGUF file as the source of a float model: transformers reads it, and this file sees that nothing is lost on the way.

A GGUF file holds weights in ggml's types, the model's hyperparameters and its tokenizer as metadata. transformers rebuilds all three
(`gguf_file=`), and decodes every tensor with the `gguf` package, so the loaded weights equal the decode of the file's bytes to the last
bit. What it passes over in silence is looked for here, before or after:

    damage              a file that is cut short, or of a tensor type that the `gguf` package cannot decode, is refused before it is read
    tensors             transformers drops tensors that it has no place for: as many numbers must arrive as the file holds
    hyperparameters     an explicit head width, rope scaling (linear and yarn), and Llama 3's frequency factors (`rope_freqs.weight`),
                        which are matched against the factors that `rope_type: llama3` gives, are put into the config; what cannot be
                        expressed there is refused, since the model would then be another one
    pre-tokenizer       `tokenizer.ggml.pre` names how text is split before merges; transformers knows some of the names and takes
                        GPT-2's expression for the others. Those that split digits first are put right here (SmolLM, StarCoder, …: the
                        expressions are llama.cpp's, llama-vocab.cpp); other names are refused
    the quantizer       the loaded model is plain float, but transformers marks it as quantized, and it could not be saved: the marks
                        are removed

Layout of the file (the specification is ggml/docs/gguf.md): magic, version, counts; key-value pairs; tensor infos (name, dimensions
fastest first, type, offset); padding to `general.alignment`; data. Only files of one part and of little-endian byte order are read.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qtrain.lazy import lazy_import

torch: Any = lazy_import("torch")

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every model of Llama 3's family scaled its frequencies with; only the factor differs."""
DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
"""Pre-tokenizers that split every digit off and go on with GPT-2's expression."""
GPT2 = {"gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion", "granite-docling"}
"""Pre-tokenizers that are GPT-2's expression alone."""
REMEDY = "Set model.path=/a/folder to the transformers folder that the file was made from"


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    name: str
    shape: tuple[int, ...]
    """In torch's order."""
    type: int
    """ggml's number."""
    offset: int
    """Bytes from the beginning of the data."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data."""

    path: Path
    metadata: dict[str, Any]
    """Scalars and strings by key; arrays of numbers as lists, arrays of strings as their length."""
    tensors: list[Tensor]
    data_start: int
    bytes: int
    """Of the whole file."""

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def get(self, key: str) -> Any:
        """A hyperparameter of the architecture, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")


class _Reader:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def text(self) -> str:
        size = self.number("<Q")
        self.at += size
        if self.at > len(self.data):
            raise struct.error("a string reaches past the end")
        return self.data[self.at - size : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            for _ in range(count):
                size = self.number("<Q")
                self.at += size
            return count
        return [self.number(_SCALARS[kind]) for _ in range(count)]


def read_header(path: Path) -> Header:
    """Everything but the data.

    Raises:
        ValueError: if the file is not a GGUF file, is cut short, is one part of several, or holds tensors that cannot be decoded.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with GGUF. {REMEDY}, or to another file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(path, _Reader(data))
            except (struct.error, KeyError, UnicodeDecodeError, OverflowError) as e:
                raise ValueError(
                    f"the header of {path} is damaged ({type(e).__name__}: {e}): the file is cut short ({len(data):,} bytes) or not a GGUF "
                    f"file. Copy it again. {REMEDY}"
                ) from e
    _check(header)
    return header


def _parse(path: Path, reader: _Reader) -> Header:
    reader.at = 4
    version, tensors, pairs = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
    if version not in (2, 3):
        raise ValueError(f"{path} is GGUF of version {version} (or big-endian); versions 2 and 3 can be read. {REMEDY}")
    metadata = {}
    for _ in range(pairs):
        key, kind = reader.text(), reader.number("<I")
        metadata[key] = reader.value(kind)
    metadata["general.architecture"]  # a GGUF file of a model has one
    infos = []
    for _ in range(tensors):
        name, dimensions = reader.text(), reader.number("<I")
        shape = tuple(reader.number("<Q") for _ in range(dimensions))[::-1]
        infos.append(Tensor(name, shape, reader.number("<I"), reader.number("<Q")))
    alignment = metadata.get("general.alignment", 32)
    return Header(path, metadata, infos, -(-reader.at // alignment) * alignment, len(reader.data))


def _check(header: Header) -> None:
    sizes, path = import_gguf().GGML_QUANT_SIZES, header.path
    if header.metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{path} is one of {header.metadata['split.count']} parts; a model is read from a single file. "
            f"Merge them first (llama-gguf-split --merge {path.name} whole.gguf). {REMEDY}"
        )
    unreadable = {t.name: _type_name(t.type) for t in header.tensors if not _readable(t.type)}
    if unreadable:
        name, kind = next(iter(unreadable.items()))
        raise ValueError(
            f"{len(unreadable)} tensors of {path} are of types that cannot be decoded, the first {name} of type {kind}; valid: "
            f"{', '.join(t.name for t in sizes if _readable(t.value))}. {REMEDY}"
        )
    kinds = {t.value: size for t, size in sizes.items()}
    for t in header.tensors:
        block, block_bytes = kinds[t.type]
        end = header.data_start + t.offset + prod(t.shape) // block * block_bytes
        if end > header.bytes:
            raise ValueError(
                f"{path} is cut short: it has {header.bytes:,} bytes, and tensor {t.name} ends at {end:,}. Copy it again. {REMEDY}"
            )


def _type_name(kind: int) -> str:
    names = {t.value: t.name for t in import_gguf().GGML_QUANT_SIZES}
    return names.get(kind, f"number {kind}")


def _readable(kind: int) -> bool:
    """Whether the `gguf` package can decode a type: one block of zeros is tried."""
    import numpy as np

    gguf = import_gguf()
    sizes = {t.value: (t, size) for t, size in gguf.GGML_QUANT_SIZES.items()}
    if kind not in sizes:
        return False
    quant, (_, block_bytes) = sizes[kind]
    if quant.name in ("F32", "F16"):
        return True
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), quant)
    except NotImplementedError:
        return False
    return True


def import_gguf() -> Any:
    """The `gguf` package.

    Raises:
        ValueError: if it, or accelerate, which transformers wants beside it, is not installed.
    """
    try:
        import accelerate  # noqa: F401
        import gguf
    except ImportError as e:
        raise ValueError(f"reading a GGUF file needs the packages gguf and accelerate ({e}). Type pip install 'qtrain[gguf]'") from e
    return gguf


def require_known(header: Header) -> None:
    """Raise for an architecture that transformers cannot rebuild.

    Raises:
        ValueError: with those that it can.
    """
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = {*GGUF_CONFIG_ARCHS, *(name.replace("_", "-") for name in GGUF_SUPPORTED_ARCHITECTURES), *GGUF_SUPPORTED_ARCHITECTURES}
    if header.architecture.replace("moe", "_moe") not in known and header.architecture not in known:
        valid = ", ".join(sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"} | set(GGUF_CONFIG_ARCHS)))
        raise ValueError(
            f"{header.path} is of architecture {header.architecture!r}, which transformers cannot read; valid: {valid}. {REMEDY}"
        )


def repair_config(config: Any, header: Header) -> Any:
    """Put what transformers does not read of the hyperparameters into ``config``, in place.

    Raises:
        ValueError: if the file scales its rope in a way that is not known here.
    """
    width = header.get("attention.key_length")
    if width and getattr(config, "head_dim", width) != width and not isinstance(getattr(config, "layer_types", None), list):
        config.head_dim = int(width)
    kind = header.get("rope.scaling.type")
    factors = next((t for t in header.tensors if t.name == "rope_freqs.weight"), None)
    if kind in (None, "none") and factors is None:
        return config
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise ValueError(f"{header.path} scales its rope ({kind}), which is not read for the architecture {header.architecture}. {REMEDY}")
    config.rope_parameters = rope | (_llama3(header, factors, config) if factors is not None else _scaling(header, str(kind)))
    return config


def _scaling(header: Header, kind: str) -> dict[str, Any]:
    factor = header.get("rope.scaling.factor")
    if kind not in ("linear", "yarn") or not factor:
        raise ValueError(f"{header.path} scales its rope with type {kind!r} and factor {factor}; linear and yarn can be read. {REMEDY}")
    found = {"rope_type": kind, "factor": float(factor)}
    length = header.get("rope.scaling.original_context_length")
    return found | ({"original_max_position_embeddings": int(length)} if kind == "yarn" and length else {})


def _llama3(header: Header, factors: Tensor, config: Any) -> dict[str, Any]:
    """Parameters of Llama 3's scaling whose frequencies are those of the file."""
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    data = np.memmap(header.path, np.float32, "r", header.data_start + factors.offset, factors.shape)
    stored = torch.from_numpy(np.array(data))
    found = {"rope_type": "llama3", "factor": float(stored.max()), **_LLAMA3}
    trial, theta = type(config)(**config.to_dict()), config.rope_parameters["rope_theta"]
    trial.rope_parameters = {"rope_theta": theta, **found}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](trial, "cpu")
    plain = 1.0 / theta ** (torch.arange(0, 2 * len(stored), 2) / (2 * len(stored)))
    if scaled.shape != stored.shape or not torch.allclose(plain / scaled, stored, rtol=1e-4):
        raise ValueError(
            f"{header.path} scales its rope by factors of its own (rope_freqs.weight, 1 to {found['factor']:g}), which are not Llama 3's. "
            f"{REMEDY}"
        )
    return found


def repair_tokenizer(tokenizer: Any, header: Header) -> Any:
    """Split text before merges as llama.cpp does, in place.

    Raises:
        ValueError: for a pre-tokenizer that neither transformers nor this file knows.
    """
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return tokenizer
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name in DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    elif name not in GPT2 and name not in GGUF_PRE_TOKENIZER_SPLITS:
        known = ", ".join(sorted(DIGITS | GPT2 | set(GGUF_PRE_TOKENIZER_SPLITS)))
        raise ValueError(f"{header.path} splits text with the pre-tokenizer {name!r}, which is not known here; valid: {known}. {REMEDY}")
    return tokenizer


def check_complete(model: Any, header: Header) -> None:
    """Raise unless every number of the file arrived in ``model``.

    Raises:
        ValueError: with how many were dropped; a tensor that transformers has no place for is otherwise lost in silence.
    """
    held = sum(prod(t.shape) for t in header.tensors if t.name != "rope_freqs.weight")
    loaded = sum(p.numel() for p in model.parameters())
    if held != loaded:
        kinds = sorted({".".join(part for part in t.name.split(".") if not part.isdigit()) for t in header.tensors})
        raise ValueError(
            f"{header.path} holds {held:,} numbers and {type(model).__name__} has places for {loaded:,}: transformers does not read all of "
            f"its tensors ({', '.join(kinds)}), so the model would be another one. {REMEDY}"
        )


def unmark(model: Any) -> None:
    """Forget that the weights came from a GGUF file: they are plain floats now, and can be saved."""
    for holder, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        with contextlib.suppress(AttributeError):
            delattr(holder, name)


@contextmanager
def muted() -> Iterator[None]:
    """No progress bars of tqdm's, which transformers' reader shows whatever its own settings say."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
        yield
