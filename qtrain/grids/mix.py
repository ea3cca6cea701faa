"""Mixes: llama.cpp's named mixtures of types, as a grid per tensor. `q4_k_m` is a rule, not a format.

A file that llama-quantize calls Q4_K_M holds Q4_K, Q6_K and float32 tensors, and Q5_0 and Q8_0 ones where 256 does not divide its rows.
Which tensor gets what is llama.cpp's rule (src/llama-quant.cpp: llama_tensor_get_type, tensor_type_fallback), restated here in four steps:

1.  Left alone, in the file's float type: norms, biases, whatever has one dimension, position embeddings, token types, an experts' router.
2.  The default type of the mix: q4_k for q4_k_m and q4_k_s, and so on.
3.  Raised or lowered by what the tensor is (n layers; i the how-manieth tensor of its kind in file order; m(i) = i < n/8 or i >= 7n/8
    or (i - n/8) % 3 == 2, in integers):

        output, or the embedding     q6_k, of q8_0 q8_0
        where it is tied
        attn_v, attn_qkv, attn_kv_b  q2_k: q3_k, with 4 or more query heads per key head q4_k
                                     q3_k_m: q5_k if i < 2, else q4_k      q3_k_l: q5_k
                                     q4_k_s: q5_k if i < 4                 q4_k_m, q5_k_m: q6_k if m(i)
        ffn_down                     q2_k: q3_k
                                     q3_k_m: q5_k if i < n/16, else q4_k   q3_k_l: q5_k
                                     q4_k_s: q5_k if i < n/8               q4_k_m, q5_k_m: q6_k if m(i)
                                     q4_0, q5_0 with an importance matrix: q4_1, q5_1 if i < n/8
        attn_output                  q2_k: q3_k          q3_k_m: q4_k      q3_k_l: q5_k
        llama with kv groups, and    attn_v, attn_qkv: q5_k instead of q3_k and q4_k
        qwen2, of 80 layers
        8 experts                    attn_v, attn_k: q8_0      attn_output: q5_k of q2_k, q3_k_s, q3_k_m, q4_k_s, q4_k_m

4.  Fall-backs: a row that 256 does not divide cannot hold K-types, so q2_k, q3_k -> q4_0, q4_k -> q5_0, q5_k -> q5_1, q6_k -> q8_0;
    a row that 32 does not divide is f16. Widths of 896, 576 and 384 are common, so this is too, and each is reported.

Step 3 is of the quantized mixes: `f16` and `bf16` put every tensor that step 1 does not leave alone in that type. Checked against
llama_model_quantize itself, every mix on some sixty models, in tests/golden/mixes.json.

Limits: the Falcon and DeepSeek branches of the rule, IQ types and MXFP4 are not here; models of ours never take them. Two deliberate
differences: the type that `output` names counts for a tied embedding in a pure or a 16-bit mix too, where llama-quantize ignores it without
a word; and an explicit type that a row cannot hold falls back as the rule's own do, where llama-quantize fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from qtrain.gguf_names import OUTPUT, TOKEN_EMBEDDING, Facts
from qtrain.registry import register

if TYPE_CHECKING:
    from torch import nn

    from qtrain.grids.ggml import Ggml

DEFAULTS = {
    "q4_k_m": "q4_k",
    "q4_k_s": "q4_k",
    "q5_k_m": "q5_k",
    "q5_k_s": "q5_k",
    "q6_k": "q6_k",
    "q3_k_l": "q3_k",
    "q3_k_m": "q3_k",
    "q3_k_s": "q3_k",
    "q2_k": "q2_k",
    "q8_0": "q8_0",
    "q5_1": "q5_1",
    "q5_0": "q5_0",
    "q4_1": "q4_1",
    "q4_0": "q4_0",
    "f16": "f16",
    "bf16": "bf16",
}
"""Each mix and the type that most of its tensors get."""

TYPES = tuple(dict.fromkeys(DEFAULTS.values()))
FLOATS = ("f16", "bf16")
FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What a K-type becomes in a row that 256 does not divide."""

_ATTENTION_V = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
_FLOAT = ("ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")
_EIGHT_EXPERTS = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")
"""Mixes whose attn_output is q5_k in models of eight experts."""


class Choice(NamedTuple):
    """What one tensor gets."""

    type: str | None
    """q4_k, f16, ...; None where the mix leaves it in the float type of the file."""
    why: str | None = None
    """Why it is not the type that the rule wanted."""


def tensor_types(
    mix: str,
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    facts: Facts,
    imatrix: bool = False,
    output: str | None = None,
    embedding: str | None = None,
    pure: bool = False,
) -> dict[str, Choice]:
    """The type of each tensor of a GGUF file.

    Args:
        mix: a key of `DEFAULTS`.
        tensors: GGUF name and shape, rows last ([out, in]), of *all* tensors of the model, in any order.
        imatrix: whether there is an importance matrix (q4_0 and q5_0 then raise the first ffn_down).
        output, embedding: explicit types of these tensors.
        pure: the default type everywhere but for those two.

    Raises:
        ValueError: if the mix or a type is unknown, or ``output`` and ``embedding`` differ for one tied tensor.
    """
    _one_of("mix", mix, DEFAULTS, "Set grid@quantizer.weight=q4_k_m, say")
    shapes = sorted(tensors, key=lambda tensor: (_layer(tensor[0]), tensor[0]))
    tied = all(name != OUTPUT for name, _ in shapes)
    if tied and output and embedding and output != embedding:
        raise ValueError(
            f"output is {output} and embedding is {embedding}, but this model has one tensor for both (tied embeddings). Set one of them "
            f"only: quantizer.weight.output={output}"
        )
    rule = _Rule(mix, facts, imatrix, tied, sum(_is_attention_v(name) for name, _ in shapes))
    chosen: dict[str, Choice] = {}
    for name, shape in shapes:
        if not _quantizes(name, shape):
            chosen[name] = Choice(None)
            continue
        explicit = _explicit(name, tied, output, embedding)
        if explicit or pure or DEFAULTS[mix] in FLOATS:
            chosen[name] = _fit(explicit or DEFAULTS[mix], shape[-1])
        else:
            chosen[name] = _fit(rule(name), shape[-1])
    return chosen


class _Rule:
    """Step 3; called once for each quantized tensor in file order, since it counts them."""

    def __init__(self, mix: str, facts: Facts, imatrix: bool, tied: bool, attention_v: int) -> None:
        self.mix, self.facts, self.imatrix, self.tied = mix, facts, imatrix, tied
        self.attention_v = attention_v
        """How many tensors of the kind attn_v there are."""
        self.seen = {"attn_v": 0, "ffn_down": 0}

    def __call__(self, name: str) -> str:
        default = DEFAULTS[self.mix]
        if name == OUTPUT or (self.tied and name == TOKEN_EMBEDDING):
            return "q8_0" if default == "q8_0" else "q6_k"
        if _is_attention_v(name):
            return self._attention_v(default)
        if "attn_k.weight" in name and self.facts.experts == 8:
            return "q8_0"
        if "ffn_down" in name:
            return self._ffn_down(name, default)
        if "attn_output.weight" in name:
            return self._attention_output(default)
        return default

    def _attention_v(self, default: str) -> str:
        i = self.seen["attn_v"]
        self.seen["attn_v"] += 1
        chosen = default
        if self.mix == "q2_k":
            chosen = "q4_k" if self.facts.kv_groups >= 4 else "q3_k"
        elif self.mix == "q3_k_m":
            chosen = "q5_k" if i < 2 else "q4_k"
        elif self.mix == "q3_k_l" or (self.mix == "q4_k_s" and i < 4):
            chosen = "q5_k"
        elif self.mix in ("q4_k_m", "q5_k_m") and _more_bits(i, self.attention_v):
            chosen = "q6_k"
        if chosen in ("q3_k", "q4_k") and _is_70b(self.facts):
            chosen = "q5_k"
        return "q8_0" if self.facts.experts == 8 else chosen

    def _ffn_down(self, name: str, default: str) -> str:
        n = self.facts.layers
        i = _layer(name) if self.facts.experts > 1 else self.seen["ffn_down"]
        self.seen["ffn_down"] += 1
        if self.mix == "q2_k":
            return "q3_k"
        if self.mix == "q3_k_m":
            return "q5_k" if i < n // 16 else "q4_k"
        if self.mix == "q3_k_l" or (self.mix == "q4_k_s" and i < n // 8):
            return "q5_k"
        if self.mix in ("q4_k_m", "q5_k_m") and _more_bits(i, n):
            return "q6_k"
        if self.mix in ("q4_0", "q5_0") and self.imatrix and i < n // 8:
            return "q4_1" if self.mix == "q4_0" else "q5_1"
        return default

    def _attention_output(self, default: str) -> str:
        if self.facts.experts == 8:
            return "q5_k" if self.mix in _EIGHT_EXPERTS else default
        return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(self.mix, default)


def _quantizes(name: str, shape: tuple[int, ...]) -> bool:
    """Step 1. Leading dimensions of one are none to ggml."""
    dimensions = len(shape) - next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return dimensions >= 2 and name.endswith("weight") and "_norm.weight" not in name and not name.endswith(_FLOAT)


def _fit(wanted: str, row: int) -> Choice:
    """Step 4: ``wanted``, or what a row of ``row`` values can hold."""
    if row % _block(wanted) == 0:
        return Choice(wanted)
    chosen = FALLBACKS.get(wanted, wanted)
    if row % _block(chosen):
        chosen = "f16"
    divides = row & -row
    return Choice(chosen, f"{chosen} instead of {wanted}: {_block(wanted)} does not divide its rows of {row} values, {divides} does")


def _block(name: str) -> int:
    return 1 if name in FLOATS else 256 if name.endswith("_k") else 32


def _explicit(name: str, tied: bool, output: str | None, embedding: str | None) -> str | None:
    if name == TOKEN_EMBEDDING:
        return embedding or (output if tied else None)
    return output if name == OUTPUT else None


def _more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _is_70b(facts: Facts) -> bool:
    """Whether llama.cpp calls the model a 70B: its attn_v is an eighth of its attn_q, so more bits there cost little."""
    return facts.layers == 80 and (facts.architecture == "qwen2" or (facts.architecture == "llama" and facts.heads != facts.kv_heads))


def _is_attention_v(name: str) -> bool:
    return any(part in name for part in _ATTENTION_V)


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)", name)
    return int(found[1]) if found else -1


def _one_of(field: str, given: str, valid: Iterable[str], remedy: str) -> None:
    if given not in valid:
        raise ValueError(f"{field} is {given!r}; valid: {', '.join(valid)}. {remedy}")


@dataclass
class Mix:
    """A mixture of ggml's types by llama.cpp's rule: a grid for each module of a model."""

    registered_name: ClassVar[str] = ""

    output: str | None = None
    """Type of the output head (of a tied model: of the embedding); null for the rule's."""
    embedding: str | None = None
    """Type of the token embedding; null for the rule's."""
    pure: bool = False
    """One type for everything but what output and embedding name."""

    def __post_init__(self) -> None:
        for name in ("output", "embedding"):
            given = getattr(self, name)
            if given is not None:
                _one_of(name, given, TYPES, f"Set quantizer.weight.{name}=q8_0, say, or null for the rule's.")

    @property
    def mix(self) -> str:
        """Name of the mix: q4_k_m."""
        return self.registered_name

    def describe(self) -> str:
        """One short name for tables."""
        options = [f"{name}={getattr(self, name)}" for name in ("output", "embedding") if getattr(self, name)]
        return " ".join(["mix", self.mix, *options, *(["pure"] if self.pure else [])])

    def assign(
        self, model: nn.Module, modules: dict[str, nn.Module], imatrix: bool = False
    ) -> tuple[dict[str, Ggml], list[dict[str, str]]]:
        """The grid of each of ``modules``.

        Args:
            model: a transformers model in float; the rule goes by all of its parameters (their names and shapes; `meta` tensors will do).
            modules: those to quantize, by their names in ``model``; of a tied model the head, the embedding, or both.
            imatrix: whether there is an importance matrix.

        Returns:
            module -> grid, without the modules that the rule leaves in float (BERT's position embeddings); and the fall-backs
            [{"name", "why"}], one for each tensor: rows that the block of their type does not divide, and what a GGUF file leaves out.

        Raises:
            ValueError: if the architecture, or a parameter, has no name in GGUF.
        """
        from qtrain import gguf_names
        from qtrain.grids.ggml import Ggml

        shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        facts = gguf_names.facts(getattr(model, "config", model))
        heads = any(name.endswith("classifier.weight") for name in shapes)
        names = gguf_names.tensor_names(model.config, shapes, gguf_names.tied(model), heads)
        if facts.architecture == "nomic-bert":  # one tensor in llama.cpp's own files, and in ours where the types allow
            names = {p: re.sub(r"attn_[qkv]\.", "attn_qkv.", tensor) for p, tensor in names.items()}
        tensors = {tensor: shapes[parameter] for parameter, tensor in names.items()}
        options = (self.output, self.embedding, self.pure)
        types = tensor_types(self.mix, tensors.items(), facts, imatrix, *options)
        grids: dict[str, Ggml] = {}
        fallbacks: list[dict[str, str]] = []
        reported = set()
        for module in modules:
            tensor = names.get(f"{module}.weight")
            if tensor is None:
                fallbacks.append({"name": module, "why": "left in float: GGUF files leave it out, since llama.cpp has no use for it"})
                continue
            kind, why = types[tensor]
            if kind is not None:
                grids[module] = Ggml(type=kind)
            if why is not None and tensor not in reported:
                reported.add(tensor)
                fallbacks.append({"name": module, "why": why})
        return grids, fallbacks


@register("grid", "q4_k_m")
class Q4KM(Mix):
    """Mix: 4-bit K-quants, attn_v and ffn_down of the outer and every third layer in 6 bits; the usual choice."""


@register("grid", "q4_k_s")
class Q4KS(Mix):
    """Mix: 4-bit K-quants, the first attn_v and ffn_down in 5 bits."""


@register("grid", "q5_k_m")
class Q5KM(Mix):
    """Mix: 5-bit K-quants, attn_v and ffn_down of the outer and every third layer in 6 bits."""


@register("grid", "q5_k_s")
class Q5KS(Mix):
    """Mix: 5-bit K-quants."""


@register("grid", "q6_k")
class Q6K(Mix):
    """Mix: 6-bit K-quants."""


@register("grid", "q3_k_l")
class Q3KL(Mix):
    """Mix: 3-bit K-quants; attn_v, attn_output and ffn_down in 5 bits."""


@register("grid", "q3_k_m")
class Q3KM(Mix):
    """Mix: 3-bit K-quants; attn_v, attn_output and ffn_down in 4 bits, the first of them in 5."""


@register("grid", "q3_k_s")
class Q3KS(Mix):
    """Mix: 3-bit K-quants."""


@register("grid", "q2_k")
class Q2K(Mix):
    """Mix: 2-bit K-quants; attn_v, attn_output and ffn_down in 3 or 4 bits."""


@register("grid", "q8_0")
class Q80(Mix):
    """Mix: 8 bits, one float16 scale per 32 values."""


@register("grid", "q5_1")
class Q51(Mix):
    """Mix: 5 bits, a scale and a minimum per 32 values; the output in 6-bit K-quants."""


@register("grid", "q5_0")
class Q50(Mix):
    """Mix: 5 bits, a scale per 32 values; the output in 6-bit K-quants."""


@register("grid", "q4_1")
class Q41(Mix):
    """Mix: 4 bits, a scale and a minimum per 32 values; the output in 6-bit K-quants."""


@register("grid", "q4_0")
class Q40(Mix):
    """Mix: 4 bits, a scale per 32 values; the output in 6-bit K-quants."""


@register("grid", "f16")
class F16(Mix):
    """Mix: no quantization, float16."""


@register("grid", "bf16")
class Bf16(Mix):
    """Mix: no quantization, bfloat16."""
