"""Rotary positions: what llama.cpp must be told so that it turns queries and keys by the angles that transformers does.

transformers turns pair i of a head at position p by p * inv_freq[i] and scales cosine and sine by an attention factor; `rope_type` says
how inv_freq follows from theta^(-2 i / d). llama.cpp (`ggml_rope_ext`) computes theta^(-2 i / d) / factors[i], then its own linear or YaRN
scaling, and a scale of (1 + 0.1 ln factor with YaRN) * rope.scaling.attn_factor. So a type is written in one of four ways:

    default, linear     rope.freq_base, rope.scaling.type and factor: the same formula
    yarn                the same formula, if beta_fast is 32, beta_slow is 1 and the range is truncated: llama.cpp reads none of the three
    factors             anything that is fixed (llama3; yarn with other betas): one float32 factor per pair, in the tensor
                        rope_freqs.weight, for graphs that read it (llama)
    longrope            two tensors of factors; llama.cpp takes the long ones if its *context*, which it rounds up to a multiple of 256,
                        exceeds the original one, transformers if the *sequence* does

Types whose frequencies move with the sequence (dynamic) cannot be written. Sources: llama.cpp, src/llama-context.cpp and
ggml/src/ggml-cpu/ops.cpp (rope_yarn); transformers, modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Key = tuple[str, Any, str]
"""Metadata: key, value, GGUF type. Here keys are without the architecture before them."""


@dataclass
class Rope:
    """What goes into the file."""

    keys: list[Key] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """float32 [d / 2]."""
    notes: list[str] = field(default_factory=list)


def rope(config: Any, ways: frozenset[str]) -> Rope:
    """Metadata and tensors for the rotary positions of a transformers config.

    Args:
        config: with `rope_parameters`.
        ways: what the graph can do beyond the default: linear, yarn, factors, longrope, partial (fewer dimensions than the head has), swa
            (another theta for layers with a sliding window).

    Raises:
        ValueError: naming the option that cannot be written.
    """
    given = config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
    full = given.get("full_attention", given)
    dim = _dimensions(config, full, ways)
    kind = full.get("rope_type", "default")
    found = Rope([("rope.dimension_count", dim, "uint32"), ("rope.freq_base", float(full["rope_theta"]), "float32")])
    if "sliding_attention" in given:
        found.keys += _sliding(given["sliding_attention"], ways)
    if kind == "default":
        return found
    way = _way(kind, full, ways)
    if way == "linear":
        found.keys += _scaling("linear", _factor(config, full))
    elif way == "yarn":
        found.keys += [
            *_scaling("yarn", _factor(config, full)),
            ("rope.scaling.original_context_length", full["original_max_position_embeddings"], "uint32"),
        ]
        found.keys += _attention_factor(_frequencies(config, kind)[1] / (1.0 + 0.1 * math.log(_factor(config, full))))
    elif way == "factors":
        inverse, factor = _frequencies(config, kind)
        found.tensors["rope_freqs.weight"] = _plain(full["rope_theta"], dim) / inverse
        found.keys += _attention_factor(factor)
    else:
        _add_longrope(found, config, full, dim)
    return found


def _way(kind: str, full: dict[str, Any], ways: frozenset[str]) -> str:
    """linear, yarn, factors or longrope.

    Raises:
        ValueError: if none of ``ways`` gives the same angles.
    """
    if kind in ("linear", "longrope") and kind in ways:
        return kind
    other = [
        o for o, standard in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)) if (full.get(o, standard) or standard) != standard
    ]
    other += ["truncate"] if full.get("truncate", True) is False else []
    if kind == "yarn" and "yarn" in ways and not other:
        return "yarn"
    if kind in ("yarn", "llama3") and "factors" in ways:
        return "factors"
    if kind == "yarn" and "yarn" in ways:
        raise ValueError(
            f"the config's rope_parameters.{other[0]} is {full[other[0]]}, and llama.cpp's graph of this architecture has "
            "beta_fast=32, beta_slow=1, truncate=true built in; fine-tune and export with those"
        )
    valid = ", ".join(["default", *sorted(ways & {"linear", "yarn", "longrope"}), *(["llama3"] if "factors" in ways else [])])
    raise ValueError(
        f"the config's rope_parameters.rope_type is {kind!r}, which llama.cpp's graph of this architecture does not compute; it has {valid}"
    )


def _dimensions(config: Any, full: dict[str, Any], ways: frozenset[str]) -> int:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = full.get("partial_rotary_factor", 1.0)
    if share != 1.0 and "partial" not in ways:
        raise ValueError(
            f"the config's rope_parameters.partial_rotary_factor is {share}; llama.cpp's graph of this architecture turns whole heads"
        )
    return int(head * share)


def _sliding(sliding: dict[str, Any], ways: frozenset[str]) -> list[Key]:
    if "swa" not in ways or sliding.get("rope_type", "default") != "default":
        raise ValueError(
            f"the config's rope_parameters.sliding_attention is {sliding}; llama.cpp's graph of this architecture "
            + ("scales only layers with full attention" if "swa" in ways else "has the same positions in all layers")
        )
    return [("rope.freq_base_swa", float(sliding["rope_theta"]), "float32")]


def _factor(config: Any, full: dict[str, Any]) -> float:
    """By which contexts are stretched; transformers derives it where it is left out."""
    return float(full.get("factor") or config.max_position_embeddings / full["original_max_position_embeddings"])


def _scaling(kind: str, factor: float) -> list[Key]:
    return [("rope.scaling.type", kind, "string"), ("rope.scaling.factor", factor, "float32")]


def _attention_factor(factor: float) -> list[Key]:
    return [] if abs(factor - 1.0) < 1e-7 else [("rope.scaling.attn_factor", float(factor), "float32")]


def _frequencies(config: Any, kind: str, length: int | None = None) -> tuple[Tensor, float]:
    """transformers' own inv_freq, float32 [d / 2], and its attention factor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    return inverse.float(), float(factor)


def _plain(theta: float, dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def _add_longrope(found: Rope, config: Any, full: dict[str, Any], dim: int) -> None:
    original = full["original_max_position_embeddings"]
    for which in ("short", "long"):
        factors = torch.tensor(full[f"{which}_factor"], dtype=torch.float32)
        if len(factors) != dim // 2:
            raise ValueError(f"the config's rope_parameters.{which}_factor has {len(factors)} values for {dim // 2} pairs")
        found.tensors[f"rope_factors_{which}.weight"] = factors
    found.keys += [("rope.scaling.type", "longrope", "string"), ("rope.scaling.original_context_length", original, "uint32")]
    found.keys += _attention_factor(_frequencies(config, "longrope")[1])
    found.notes.append(
        f"longrope: llama.cpp opened with more than {original} tokens of context uses the long factors from the first token on; "
        f"transformers uses the short ones until the sequence is longer than {original}"
    )
