"""A GGUF file as the source of a float model: transformers reads it, and this file sees that nothing is lost on the way.

A GGUF file holds weights in ggml's types, the model's hyperparameters and its tokenizer as metadata. transformers rebuilds all three
(`gguf_file=`), and decodes every tensor with the `gguf` package, so the loaded weights equal the decode of the file's bytes to the last
bit. What it passes over in silence is looked for here, before or after:

    damage              a file that is cut short, or of a tensor type that the `gguf` package cannot decode: see `qtrain/gguf_header.py`
    tensors             transformers drops tensors that it has no place for: as many numbers must arrive as the file holds
    hyperparameters     an explicit head width, biases of Llama's projections, Gemma's soft caps and attention scale, rope scaling (linear
                        and yarn), and Llama 3's frequency factors (`rope_freqs.weight`), which are matched against those that
                        `rope_type: llama3` gives, are put into the config; what cannot be expressed there is refused, since the model
                        would then be another one
    pre-tokenizer       `tokenizer.ggml.pre` names how text is split before merges; transformers knows some of the names and takes
                        GPT-2's expression for the others. Those that split digits first are put right here (SmolLM, StarCoder, …: the
                        expressions are llama.cpp's, llama-vocab.cpp); other names are refused
    the quantizer       the loaded model is plain float, but transformers marks it as quantized, and it could not be saved: the marks
                        are removed
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from qtrain.gguf_header import REMEDY, Header, TensorInfo
from qtrain.lazy import lazy_import

torch: Any = lazy_import("torch")

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every model of Llama 3's family scaled its frequencies with; only the factor differs."""
_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27 B models, whose attention scale is the width per head; that of the others is the head's width."""
ROPE_FACTORS = "rope_freqs.weight"
DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
"""Pre-tokenizers that split every digit off and go on with GPT-2's expression."""
GPT2 = {"gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion", "granite-docling"}
"""Pre-tokenizers that are GPT-2's expression alone."""


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
    width, names = header.get("attention.key_length"), {t.name for t in header.tensors}
    if width and hasattr(config, "head_dim") and not hasattr(config, "global_head_dim"):
        config.head_dim = int(width)
    for field, tensor in (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias")):
        if hasattr(config, field):
            setattr(config, field, tensor in names)
    for field in ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if isinstance(getattr(config, field, None), float):
            setattr(config, field, _shortest(getattr(config, field)))
    if header.architecture in _GEMMA:
        _repair_gemma(config, header)
    _repair_rope(config, header)
    return config


def _repair_gemma(config: Any, header: Header) -> None:
    """Soft caps; and the attention scale, which no key says: llama.cpp's graph takes it from the size of the model."""
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if header.get(field):
            setattr(config, field, float(header.get(field)))
    large = config.num_hidden_layers == _GEMMA[header.architecture]
    config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if large else config.head_dim


def _repair_rope(config: Any, header: Header) -> None:
    kind, factors = header.get("rope.scaling.type"), next((t for t in header.tensors if t.name == ROPE_FACTORS), None)
    if kind in (None, "none") and factors is None:
        return
    rope = getattr(config, "rope_parameters", None) or {}
    full = rope.get("full_attention", rope)  # where sliding layers have a rope of their own, they are not scaled
    if "rope_theta" not in full:
        raise ValueError(f"{header.path} scales its rope ({kind}), which is not read for the architecture {header.architecture}. {REMEDY}")
    scaled = full | (_llama3(header, factors, config) if factors is not None else _scaling(header, str(kind)))
    config.rope_parameters = scaled if full is rope else rope | {"full_attention": scaled}


def _shortest(value: float) -> float:
    """The number that was meant by a float32: 1e-05 for 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _scaling(header: Header, kind: str) -> dict[str, Any]:
    factor = header.get("rope.scaling.factor")
    if kind not in ("linear", "yarn") or not factor:
        raise ValueError(f"{header.path} scales its rope with type {kind!r} and factor {factor}; linear and yarn can be read. {REMEDY}")
    found = {"rope_type": kind, "factor": float(factor)}
    length = header.get("rope.scaling.original_context_length")
    return found | ({"original_max_position_embeddings": int(length)} if kind == "yarn" and length else {})


def _llama3(header: Header, factors: TensorInfo, config: Any) -> dict[str, Any]:
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
    held = sum(prod(t.shape) for t in header.tensors if t.name != ROPE_FACTORS)
    loaded = sum(p.numel() for p in model.parameters())
    if held != loaded:
        kinds = sorted({".".join(part for part in t.name.split(".") if not part.isdigit()) for t in header.tensors})
        raise ValueError(
            f"{header.path} holds {held:,} numbers and {type(model).__name__} has places for {loaded:,}: transformers does not read all of "
            f"its tensors ({', '.join(kinds)}), so the model would be another one. {REMEDY}"
        )


def lost_by_dtype(header: Header, dtype: str) -> list[dict[str, str]]:
    """Tensors whose values, read into a model of ``dtype`` (torch's name), are not on the file's grid any more: [{"name", "why"}]."""
    from gguf import GGMLQuantizationType

    from qtrain.grids.ggml import TYPES, Ggml

    found = []
    for tensor in header.tensors if dtype != "float32" else ():
        kind = GGMLQuantizationType(tensor.type).name.lower()
        why = Ggml(kind).check_dtype(getattr(torch, dtype)) if kind in TYPES and TYPES[kind].block > 1 else None
        if why:
            beside = "" if TYPES[kind].searches else f"; {why}"
            told = f"the file has it on {kind}, whose values model.dtype={dtype} rounds{beside}"
            found.append({"name": tensor.name, "why": f"{told}. Set model.dtype=float32"})
    return found


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
