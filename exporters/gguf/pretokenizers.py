r"""Which of llama.cpp's pre-tokenizers a byte-level BPE tokenizer has.

Before byte-level BPE merges anything, a regular expression cuts the text into words. transformers keeps that expression in tokenizer.json;
a GGUF file keeps only a name, `tokenizer.ggml.pre`, and llama.cpp has the expressions compiled in (src/llama-vocab.cpp). A wrong name
gives other tokens without any error, so a name is written only when it is known to be right:

    1  normalizer, pre_tokenizer and the model's merge options are read from tokenizer.json and written in one canonical form: sequences
       flattened, options that change nothing left out, shorthands (Digits, ByteLevel's own expression) spelt out
    2  equal to an entry of `KNOWN`: that entry
    3  otherwise its behaviour decides. Both cut `probes()`: some 100,000 characters in which every three of 50 kinds of character follow
       each other (letters of six categories and seven scripts, digits, marks, punctuation, symbols, spaces, control characters), with
       long runs and contractions in every case. An entry that cuts it the same is the same pre-tokenizer, however it is written
    4  otherwise a ValueError with the hash of the canonical form

llama.cpp derives two more settings from the name: whether a word that is a token as a whole is taken without merging (`ignore_merges`),
and whether spaces before punctuation are dropped when tokens become text again. Names that differ in these alone are told apart by the
tokenizer's own settings; where llama.cpp has no name with the right `ignore_merges`, the vocabulary decides whether it matters.

What no name can say: llama.cpp applies no Unicode normalization before byte-level BPE, so that a tokenizer with NFC cuts the same only for
text in NFC; and some of its expressions are others than the tokenizer's (`Known.limits`, `cut_alike`).

The source of each entry is the tokenizer.json of the model named beside it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel cuts with when `use_regex` is set."""

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PREFIX, END = r"[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+|\s+(?!\S)|\s+"
ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
DEEPSEEK = ASCII_PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + END
CJK = "[一-龥぀-ゟ゠-ヿ]+"
LATIN = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ"
    "-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ\U00010400-"
    "\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-"
    "\U000118df\U0001e900-\U0001e943"
)
ASIA = "[一-龥ࠀ-一가-퟿]+"


def _gpt4(numbers: str, letters: str = r"\p{L}+", other: str = r"\p{L}\p{N}", start: str = CONTRACTIONS + "|") -> str:
    """The family of expressions that began with GPT-4's."""
    return rf"{start}{PREFIX}{letters}|{numbers}| ?[^\s{other}]+[\r\n]*|{END}"


def _gpt4o(numbers: str, ends: str, cased: tuple[str, str] = CASED) -> str:
    """The family that began with GPT-4o's: words are cut where lower case is followed by upper case."""
    upper, lower = cased
    return rf"{PREFIX}{upper}*{lower}+{ends}|{PREFIX}{upper}+{lower}*{ends}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{END}"


def _ascii_cases(numbers: str, ends: str) -> str:
    """What llama.cpp has in place of it."""
    return _gpt4o(numbers, ends, (r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"))


LETTERS_AND_MARKS = r"[\p{L}\p{M}]+"
CASES = "llama.cpp tells upper from lower case in ASCII only, and does not take marks for a part of a word"
SPACES = "llama.cpp takes all spaces outside of ASCII for one control character"


@dataclass(frozen=True)
class Known:
    """One way to cut text that llama.cpp has."""

    model: str
    """Where its tokenizer.json is from."""
    cuts: tuple[str, ...]
    """Expressions, one after the other, each cutting the pieces of the one before; "contiguous punctuation" is no expression."""
    names: dict[tuple[bool, bool], str]
    """(ignore_merges, clean_up_tokenization_spaces) -> llama.cpp's name."""
    bytes_after: int | None = None
    """How many of the cuts come before the text becomes bytes; null is all of them."""
    limits: str = ""
    """What llama.cpp does otherwise."""
    own: tuple[str, ...] = ()
    """Its expressions, where they are not `cuts`."""
    spaces: bool = False
    """Whether it replaces spaces outside of ASCII."""


KNOWN = (
    Known("openai-community/gpt2", (GPT2,), {(False, True): "gpt-2"}),
    Known("HuggingFaceTB/SmolLM2-135M, bigcode/starcoder2-3b", (r"\p{N}", GPT2), {(False, False): "smollm", (False, True): "starcoder"}),
    Known(
        "meta-llama/Meta-Llama-3-8B, microsoft/phi-4 (without ignore_merges)",
        (_gpt4(r"\p{N}{1,3}"),),
        {(True, True): "llama-bpe", (False, True): "dbrx"},
    ),
    Known("Qwen/Qwen2.5-0.5B, Qwen/Qwen3-0.6B", (_gpt4(r"\p{N}"),), {(False, False): "qwen2", (False, True): "stablelm2"}),
    Known("Qwen/Qwen3.5-4B", (_gpt4(r"\p{N}", LETTERS_AND_MARKS, r"\p{L}\p{M}\p{N}"),), {(False, False): "qwen35"}),
    Known(
        "mistralai/Mistral-Nemo-Base-2407",
        (_gpt4o(r"\p{N}", ""),),
        {(True, False): "tekken"},
        limits=CASES,
        own=(_ascii_cases(r"\p{N}", ""),),
    ),
    Known(
        "Xenova/gpt-4o, microsoft/Phi-4-mini-instruct",
        (_gpt4o(r"\p{N}{1,3}", CONTRACTIONS + "?"),),
        {(False, False): "gpt-4o"},
        limits=CASES,
        own=(_ascii_cases(r"\p{N}{1,3}", CONTRACTIONS + "?"),),
    ),
    Known("deepseek-ai/DeepSeek-V3", (r"\p{N}{1,3}", CJK, DEEPSEEK), {(False, False): "deepseek-v3"}),
    Known(
        "deepseek-ai/deepseek-coder-6.7b-base",
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", ASIA, r"\p{N}"),
        {(False, False): "deepseek-coder"},
        limits=SPACES,
        spaces=True,
    ),
    Known(
        "deepseek-ai/deepseek-llm-7b-base",
        (r"[\r\n]", rf"\s?[{LATIN}]+", "\\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", ASIA, r"\p{N}"),
        {(False, False): "deepseek-llm"},
        limits=SPACES,
        spaces=True,
    ),
    Known(
        "tiiuae/falcon-7b",
        ("contiguous punctuation", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
        {(False, True): "falcon"},
        bytes_after=2,
    ),
    Known("bigscience/bloom-560m", (r" ?[^(\s|[.,!?…。，、।۔،])]+",), {(False, True): "bloom"}),
    Known("openbmb/MiniCPM5-1B", (r"\p{N}{1,3}", _gpt4(r"\p{N}+")), {(True, True): "minicpm5"}),
    Known(
        "ByteDance-Seed/Seed-Coder-8B-Base",
        (rf"{CONTRACTIONS}|{PREFIX}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{END}",),
        {(False, False): "seed-coder"},
    ),
)

OVERRIDE = "export.gguf.pre_tokenizer=NAME"


def recognise(parts: dict[str, Any], clean_up: bool = False) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer.

    Args:
        parts: its tokenizer.json.
        clean_up: its `clean_up_tokenization_spaces`.

    Raises:
        ValueError: if it is none that is known here, with the hash of its canonical form.
    """
    entry = find(parts)
    if entry is None:
        raise ValueError(_unknown(parts))
    ignore = bool(parts["model"].get("ignore_merges"))
    names = {key: name for key, name in entry.names.items() if key[0] == ignore}
    if not names and merging_is_the_same(parts):
        names = entry.names
    if not names:
        raise ValueError(
            f"this tokenizer cuts text as {entry.model} does, but with ignore_merges={str(ignore).lower()}, which changes its tokens, and "
            f"llama.cpp has no name for that; the nearest is {' or '.join(entry.names.values())}: set {OVERRIDE} if tokens may differ"
        )
    return next((name for key, name in names.items() if key[1] == clean_up), next(iter(names.values())))


def find(parts: dict[str, Any]) -> Known | None:
    """The entry that cuts text as this tokenizer.json does."""
    steps = canonical(parts)
    for entry in KNOWN:
        if steps == _canonical_entry(entry):
            return entry
    own = _behaviour(json.dumps(parts.get("pre_tokenizer")))
    return next((entry for entry in KNOWN if _behaviour(json.dumps(reference(entry))) == own), None)


def fingerprint(parts: dict[str, Any]) -> str:
    """sha256 of the canonical form."""
    return hashlib.sha256(json.dumps(canonical(parts), ensure_ascii=False).encode()).hexdigest()


def canonical(parts: dict[str, Any]) -> list[list[str]]:
    """The pre-tokenizer as a list of steps, each a list of words."""
    return [step for part in _flatten(parts.get("pre_tokenizer"), "pretokenizers") for step in _step(part)]


def normalizers(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """The normalizer as a flat list."""
    return list(_flatten(parts.get("normalizer"), "normalizers"))


def named(name: str) -> Known | None:
    """The entry that llama.cpp calls ``name``."""
    return next((entry for entry in KNOWN if name in entry.names.values()), None)


def cut_alike(entry: Known, text: str) -> bool:
    """Whether llama.cpp's own expressions cut ``text`` as the entry does."""
    theirs = "".join("\v" if c.isspace() and not c.isascii() else c for c in text) if entry.spaces else text
    return _lengths(reference(entry), text) == _lengths(reference(entry, entry.own), theirs)


def reference(entry: Known, own: tuple[str, ...] = ()) -> dict[str, Any]:
    """The entry's `pre_tokenizer`, as a tokenizer.json has it, or the same with llama.cpp's ``own`` expressions."""
    cuts: list[dict[str, Any]] = [
        {"type": "Punctuation", "behavior": "Contiguous"}
        if cut == "contiguous punctuation"
        else {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
        for cut in own or entry.cuts
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    at = len(cuts) if entry.bytes_after is None else entry.bytes_after
    return {"type": "Sequence", "pretokenizers": [*cuts[:at], to_bytes, *cuts[at:]]}


@cache
def probes() -> str:
    """The text on which behaviours are compared."""
    kinds = "azAZàÀǅʰ一あカ가กअאعж\u0301\u093e\u0e3117٣Ⅷ½'\".-(_/「。！$+<^`|€😀\u200d\ufe0f\x07 \n\r\t\u00a0\u3000\u0085"
    runs = "".join(f"a{kind * count}b {kind * count}\n{kind * count}" for kind in kinds for count in (*range(1, 10), 16))
    words = ["s", "t", "re", "ve", "m", "ll", "d", "S", "T", "RE", "Ve", "M", "lL", "D", "x", "é", "ſ"]
    short = "".join(f"{a}'{word}{b}" for word in words for a in ("a", "A", "1", " ", "'", "é") for b in ("", " ", "s", "1", "'"))
    return runs + short + "".join(_every_three(kinds))


def merging_is_the_same(parts: dict[str, Any]) -> bool:
    """Whether `ignore_merges` changes nothing: merging makes every token of the vocabulary out of its own text."""
    from tokenizers import Tokenizer

    model = dict(parts["model"], ignore_merges=False)
    added = {token["content"] for token in parts.get("added_tokens", [])}
    words = [token for token in model["vocab"] if token not in added]
    plain = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, **dict.fromkeys(_PARTS), "added_tokens": []}))
    return all(len(found.ids) == 1 for found in plain.encode_batch(words, add_special_tokens=False))


_PARTS = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")


def _flatten(part: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[key]:
            yield from _flatten(inner, key)
    else:
        yield part


def _step(part: dict[str, Any]) -> Iterator[list[str]]:
    kind = part["type"]
    if kind == "Digits":
        yield ["cut", r"\p{N}" if part["individual_digits"] else r"\p{N}+"]
    elif kind == "Punctuation" and part.get("behavior") == "Contiguous":
        yield ["cut", "contiguous punctuation"]
    elif kind == "Split" and "Regex" in part["pattern"] and part["behavior"] == "Isolated":
        yield ["cut", _regex(part["pattern"]["Regex"])]
    elif kind == "ByteLevel":
        if part.get("add_prefix_space", True):
            yield ["prefix space"]
        if part.get("use_regex", True):
            yield ["cut", GPT2]
        yield ["bytes"]
    else:
        yield [json.dumps(part, sort_keys=True, ensure_ascii=False)]


def _regex(expression: str) -> str:
    """The same expression in one spelling."""
    return expression.replace("\r", r"\r").replace("\n", r"\n").replace("{1}", "")


@cache
def _canonical_of(pre_tokenizer: str) -> list[list[str]]:
    return canonical({"pre_tokenizer": json.loads(pre_tokenizer)})


def _canonical_entry(entry: Known) -> list[list[str]]:
    return _canonical_of(json.dumps(reference(entry)))


@cache
def _behaviour(pre_tokenizer: str) -> str:
    """Hash of the words that `probes()` is cut into."""
    cutter = _cutter(pre_tokenizer)
    words = [word for word, _ in cutter.pre_tokenize_str(probes())] if cutter is not None else [probes()]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


@cache
def _cutter(pre_tokenizer: str) -> Any:
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    parts = {"version": "1.0", "added_tokens": [], **dict.fromkeys(_PARTS), "pre_tokenizer": json.loads(pre_tokenizer), "model": model}
    return Tokenizer.from_str(json.dumps(parts)).pre_tokenizer


def _lengths(pre_tokenizer: dict[str, Any], text: str) -> list[int]:
    """Characters of each piece of ``text``."""
    return [end - start for _, (start, end) in _cutter(json.dumps(pre_tokenizer)).pre_tokenize_str(text)]


def _every_three(kinds: str) -> Iterator[str]:
    """A de Bruijn sequence: every three of ``kinds`` stand together once (the concatenated Lyndon words of length 1 and 3)."""
    for letters in itertools.product(range(len(kinds)), repeat=3):
        if len(set(letters)) == 1:
            yield kinds[letters[0]]
        elif letters < letters[1:] + letters[:1] and letters < letters[2:] + letters[:2]:
            yield "".join(kinds[i] for i in letters)


def _unknown(parts: dict[str, Any]) -> str:
    steps = json.dumps(canonical(parts), ensure_ascii=False)
    shown = steps if len(steps) < 400 else steps[:400] + "…"
    names = sorted({name for entry in KNOWN for name in entry.names.values()})
    return (
        f"this tokenizer cuts text in a way that is not known here (sha256 {fingerprint(parts)[:16]}): {shown}. llama.cpp knows such ways "
        f"by name, and a wrong name gives wrong tokens without an error. Known here: {', '.join(names)}. If llama.cpp has this one under a "
        f"name, set {OVERRIDE}; the receipt then compares its tokens with this tokenizer's"
    )
