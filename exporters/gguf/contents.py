"""What the GGUF file of a model holds: its tensors, as entries that make their bytes when asked.

Converted layers give their codes, packed as they are (`exporters/gguf/pack.py`); the remaining weights are written in the float type that
the config names. Vectors (norms, biases) and the matrices that llama.cpp adds to activations stay float32, as in llama.cpp's own converter.

An entry holds no bytes, so that the writer, which first writes all names and offsets and then one tensor after the other, never has more
than one tensor's bytes beside the model.

A model whose head is tied to its embedding has one tensor. Where quantization gave the two different codes they are two tensors, if the
graph can read two.

The metadata `qtrain.modules` is a json object, GGUF name -> [[module, first row, last row + 1], ...], of all tensors that come from codes,
so that the file alone says which layers it holds (`exporters.gguf.write.read_back`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.base import packed_layers
from exporters.gguf.architectures import architecture, names
from exporters.gguf.graph import Architecture, Transform, kv_heads
from exporters.gguf.pack import Refused, pack, plan
from qtrain.gguf_names import OUTPUT

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Types of weights without codes."""
STAY_F32 = ("position_embd.weight", "token_types.weight")
"""Matrices that are added to activations."""
MODULES = "qtrain.modules"

FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "bf16": 32,
}
"""Mix -> `general.file_type`, by which programs show a file's kind."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: rows first."""
    type: str
    """ggml's name of the type, lower case."""
    data: Callable[[], NDArray[Any]]
    """Makes the bytes: uint8, or the float type."""
    modules: tuple[tuple[str, int, int], ...] = ()
    """Converted layers whose codes these are, with their rows: (module, first, last + 1)."""

    @property
    def nbytes(self) -> int:
        """Size in the file, without padding."""
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type.upper()]]
        return math.prod(self.shape) // values * size


def entries(model: nn.Module, float_type: str = "f16", pooling: str | None = None) -> list[Entry]:
    """What the file of a transformers model, converted or in float, will hold.

    It costs little, since no bytes are made: a full check, too, of a trial model whose weights have one row each.

    Args:
        float_type: of matrices without codes: f32, f16 or bf16.
        pooling: of encoders; see `Architecture.keys`.

    Raises:
        ValueError: if the architecture is unknown, or its graph has no tensor for one of the model's, or no type for a layer's grid.
    """
    if float_type not in FLOATS:
        raise ValueError(f"float_type is {float_type!r}; valid: {', '.join(FLOATS)}. Set export.gguf.float_type=f16")
    config, arch, weights, known = _named(model, pooling)
    _check_whole(model, weights, known, arch, pooling)
    found: dict[str, Entry] = {}
    for parameter, name in known.items():
        transform = arch.transform(name, config.num_attention_heads, kv_heads(config))
        if name not in found:  # where the head is tied, the embedding came before it
            found[name] = _entry(name, parameter, weights[parameter], transform, float_type)
    for name, factors in arch.positions(config).tensors.items():
        found[name] = Entry(name, tuple(factors.shape), "f32", lambda factors=factors: factors.numpy())  # type: ignore[misc]
    return _fused(list(found.values())) if arch.fused else list(found.values())


def placed(model: nn.Module) -> dict[str, tuple[str, Transform]]:
    """Parameter -> GGUF name, and what is done to its rows, of those that have a tensor of the file to themselves."""
    config, arch, _, known = _named(model, None)
    if arch.fused:
        return {}
    users = Counter(known.values())  # a tied head's tensor is the embedding's
    alone = {p: name for p, name in known.items() if users[name] == 1}
    return {p: (name, arch.transform(name, config.num_attention_heads, kv_heads(config))) for p, name in alone.items()}


def left_out(model: nn.Module, pooling: str | None = None) -> list[str]:
    """Parameters that the file does not hold: heads of encoders that embeddings do not need."""
    _, _, weights, known = _named(model, pooling)
    return sorted(weights.keys() - known.keys())


def tied_head(model: nn.Module) -> str | None:
    """Name of the output head where it is the embedding's tensor; the file's codes are then listed under the embedding."""
    arch = architecture(_config(model))
    if not _tied(model, arch):
        return None
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next(name for name, module in model.named_modules(remove_duplicate=False) if module is head)


def modules(entries: list[Entry]) -> str:
    """The json of `qtrain.modules`."""
    return json.dumps({e.name: e.modules for e in entries if e.modules}, separators=(",", ":"))


def file_type(entries: list[Entry], mix: str | None = None) -> int:
    """llama.cpp's number for a file of these types.

    Args:
        mix: name of the mix that chose the types of layers with codes; null: by the type that most values have.
    """
    if mix in FILE_TYPES and any(e.modules for e in entries):
        return FILE_TYPES[mix]
    counts: Counter[str] = Counter()
    for entry in entries:
        if len(entry.shape) > 1 and entry.name not in STAY_F32:
            counts[entry.type] += math.prod(entry.shape)
    most = counts.most_common(1)[0][0]
    return FILE_TYPES[most] if most in FILE_TYPES else FILE_TYPES[f"{most}_m" if len(counts) > 1 else f"{most}_s"]


def _config(model: nn.Module) -> Any:
    return model.config.get_text_config()  # type: ignore[operator,union-attr]


def _named(model: nn.Module, pooling: str | None) -> tuple[Any, Architecture, dict[str, Any], dict[str, str]]:
    """Config, architecture, parameter -> weight, and parameter -> GGUF name of those that the file holds."""
    config = _config(model)
    arch = architecture(config)
    weights = dict(_weights(model))
    return config, arch, weights, names(arch, config, weights, _tied(model, arch), pooling)


def _weights(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters by name, in the model's order; a converted layer stands for its weight.

    Raises:
        ValueError: for a layer that is still in training, or float and scaled.
    """
    layers = packed_layers(model)
    for name, module in model.named_modules():
        if hasattr(module, "weight_fake"):
            raise ValueError(f"{name} is still fake-quantized; an exporter packs codes: give it qtrain.prepare.convert(model)")
        if name in layers:
            yield f"{name}.weight", module
            if getattr(module, "bias", None) is not None:
                yield f"{name}.bias", module.bias
            continue
        if getattr(module, "inverse_smoothing", None) is not None:
            raise ValueError(
                f"the input of {name} is scaled per channel, and llama.cpp multiplies nothing before a product; use quantizer=rtn"
            )
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{name}.{leaf}" if name else leaf, parameter


def _tied(model: Any, arch: Architecture) -> bool:
    """Whether one tensor is embedding and head.

    Raises:
        ValueError: if it must be, and is not.
    """
    head, embedding = (None, None) if arch.encoder else (model.get_output_embeddings(), model.get_input_embeddings())
    if head is None or embedding is None:
        return False
    if hasattr(head, "quantized") and hasattr(embedding, "quantized"):
        a, b = head.quantized, embedding.quantized
        same = (
            a.grid.spec() == b.grid.spec()
            and torch.equal(a.codes, b.codes)
            and all(torch.equal(a.params[n], b.params[n]) for n in b.params)
        )
    else:
        a, b = getattr(head, "weight", None), getattr(embedding, "weight", None)
        same = a is not None and b is not None and (a is b or (not a.is_meta and torch.equal(a, b)))
    if not same and not arch.own_output:
        raise ValueError(
            f"llama.cpp's {arch.name} graph has one tensor for embedding and head, and the model's differ; put both on one grid "
            "(quantizer.embedding as quantizer.weight), or leave both in float"
        )
    return same


def _check_whole(model: nn.Module, weights: dict[str, Any], known: dict[str, str], arch: Architecture, pooling: str | None) -> None:
    """That nothing of the model is missing in the file.

    Raises:
        ValueError: naming what is.
    """
    held = set(known.values())
    tied = not arch.encoder and _tied(model, arch)
    if not (arch.encoder or tied or OUTPUT in held):
        raise ValueError("the model has no output head, so it computes no logits; load it with AutoModelForCausalLM (model=causal_lm)")
    if pooling == "rank" and "cls.output.weight" not in held:
        raise ValueError("pooling=rank is for models with a classifier, and this one has none; set pooling=mean or cls")
    inside = tuple(f"{name}." for name in packed_layers(model))
    rest = [k for k in model.state_dict() if k not in weights and not k.startswith(inside or ("\0",))]
    if rest:
        raise ValueError(
            f"the model stores {rest[0]}, which is no parameter and has no tensor in a GGUF file; choose another model, or export=[]"
        )


def _entry(name: str, parameter: str, weight: Any, transform: Transform, float_type: str) -> Entry:
    module = parameter.rsplit(".", 1)[0]
    if isinstance(weight, Tensor):
        kind = "f32" if weight.ndim < 2 or name in STAY_F32 else float_type
        return Entry(name, tuple(weight.shape), kind, lambda: _floats(weight, transform, kind, parameter))
    try:
        packed = plan(weight, name)
    except Refused as why:
        raise Refused(f"{module}: {why}") from None
    shape = packed.q.shape
    return Entry(name, shape, packed.type, lambda: pack(packed, transform.rows(shape[0])).numpy(), ((module, 0, shape[0]),))


def _floats(weight: Tensor, transform: Transform, kind: str, parameter: str) -> NDArray[Any]:
    """A float weight in the type ``kind``.

    Raises:
        ValueError: for values that are not finite, or become so.
    """
    x = transform.apply(weight.detach().cpu().float())
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{parameter} has {int((~torch.isfinite(x)).sum())} values that are not finite; a file with them computes nothing")
    x = x.to(FLOATS[kind]).contiguous()
    if kind == "f16" and not bool(torch.isfinite(x).all()):
        raise ValueError(f"{parameter} has values beyond 65504, the largest of float16; set export.gguf.float_type=bf16")
    return x.view(torch.int16).numpy() if kind == "bf16" else x.numpy()


def _fused(entries: list[Entry]) -> list[Entry]:
    """q, k and v of a block as one entry, where they have one type."""
    found = {e.name: e for e in entries}
    for name in [n for n in found if n.endswith(".attn_q.weight")]:
        three = [found[name.replace("attn_q", part)] for part in ("attn_q", "attn_k", "attn_v")]
        if len({e.type for e in three}) > 1:
            continue
        starts = np.cumsum([0, *(e.shape[0] for e in three)]).tolist()
        modules = tuple((m, s + a, s + b) for s, e in zip(starts[:-1], three, strict=True) for m, a, b in e.modules)
        whole = Entry(
            name.replace("attn_q", "attn_qkv"),
            (starts[-1], *three[0].shape[1:]),
            three[0].type,
            lambda three=three: np.concatenate([e.data() for e in three]),  # type: ignore[misc]
            modules,
        )
        found = {(whole.name if n == name else n): (whole if n == name else e) for n, e in found.items() if e not in three[1:]}
    return list(found.values())
