"""Whether llama.cpp makes the same tokens of a text as training's tokenizer.

A difference is a failure unless llama.cpp has no way to do the same, whatever stands in the file. Such texts are known beforehand, so
that they can be told from mistakes of ours; they are counted and named, not left out in silence:

    byte-level BPE    a tokenizer that normalizes to NFC, and a text that is not in NFC
                      expressions that llama.cpp approximates (`pretokenizers.Known.limits`)
    SentencePiece     transformers' LlamaTokenizer (version 5, without legacy=True) puts no space before a text that begins with one, and
                      none after a special token; SentencePiece and llama.cpp do
    WordPiece         when accents are stripped: Hangul is not decomposed, and spacing and enclosing marks are dropped too; vertical tab,
                      form feed and U+0085 are spaces; words of more than 100 characters are not unknown
    added tokens      those that take spaces beside them along (lstrip, rstrip), or must stand alone (single_word)
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from exporters.gguf.pretokenizers import Known, cut_alike, find, named
from exporters.gguf.vocabularies import SPACE, Source

SHOWN = 12
"""Ids that a message shows."""


@dataclass
class Comparison:
    """What came of it."""

    same: int = 0
    different: list[tuple[str, list[int], list[int]]] = field(default_factory=list)
    """Text, training's ids and llama.cpp's."""
    beyond: Counter[str] = field(default_factory=Counter)
    """What llama.cpp cannot do -> texts that have other ids for it."""

    @property
    def passed(self) -> bool:
        """Whether every difference is one that llama.cpp cannot help."""
        return not self.different

    def describe(self) -> str:
        """One line for the receipt."""
        count = self.same + len(self.different)
        rest = "".join(f"; {n} others cannot be: {why}" for why, n in self.beyond.most_common())
        if self.passed:
            return f"passed: {self.same} of {count} varied strings have the same ids{rest}"
        text, ours, theirs = self.different[0]
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        return (
            f"failed: {len(self.different)} of {count} varied strings have other ids, the first {text!r} from token {at} on: "
            f"{ours[at : at + SHOWN]} in training, {theirs[at : at + SHOWN]} in llama.cpp{rest}"
        )


def compare(tokenizer: Any, tokenize: Callable[[str], list[int]], texts: Sequence[str], pre: str | None = None) -> Comparison:
    """Tokenize every text on both sides, without tokens around it; special tokens in the text are tokens.

    Args:
        tokenize: llama.cpp's, for the file that was written.
        pre: the pre-tokenizer's name, if the user gave one.
    """
    from exporters.gguf.tokenizers import tokenizer_json

    found, why = Comparison(), limits(Source(tokenizer_json(tokenizer), len(tokenizer), pre))
    for text in texts:
        ours, theirs = tokenizer(text, add_special_tokens=False)["input_ids"], tokenize(text)
        if ours == theirs:
            found.same += 1
        elif reason := next((what for what, beyond in why.items() if beyond(text)), ""):
            found.beyond[reason] += 1
        else:
            found.different.append((text, ours, theirs))
    return found


def limits(source: Source) -> dict[str, Callable[[str], bool]]:
    """What llama.cpp cannot do of this tokenizer -> whether it matters for a text."""
    kinds = {"gpt2": _gpt2, "llama": _llama, "bert": _bert}
    found = kinds[source.kind](source) if source.kind in kinds else {}
    odd = [t["content"] for t in source.added.values() if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if odd:
        found["llama.cpp knows no lstrip, rstrip or single_word of added tokens"] = lambda text: any(token in text for token in odd)
    return found


def _gpt2(source: Source) -> dict[str, Callable[[str], bool]]:
    found: dict[str, Callable[[str], bool]] = {}
    if source.parts.get("normalizer") is not None:
        found["llama.cpp does not normalize to NFC"] = lambda text: unicodedata.normalize("NFC", text) != text
    entry: Known | None = named(source.pre) if source.pre else find(source.parts)
    if entry is not None and entry.limits:
        found[entry.limits] = lambda text: not cut_alike(entry, text)
    return found


def _llama(source: Source) -> dict[str, Callable[[str], bool]]:
    pre = source.parts.get("pre_tokenizer") or {}
    scheme = pre.get("prepend_scheme", "never") if pre.get("type") == "Metaspace" else "never"
    if scheme == "never":
        return {}
    tokens = [t["content"] for t in source.added.values()]

    def begins(text: str) -> bool:
        for token in tokens:
            text = text.replace(token, "\0")
        return any(part.startswith((" ", SPACE)) for part in text.split("\0"))

    found: dict[str, Callable[[str], bool]] = {"llama.cpp puts a space before a text that begins with one, as SentencePiece does": begins}
    if scheme == "first":
        found["llama.cpp puts a space after special tokens, as SentencePiece does"] = lambda text: any(t in text for t in tokens)
    return found


def _bert(source: Source) -> dict[str, Callable[[str], bool]]:
    normalizer, longest = source.parts["normalizer"], source.parts["model"].get("max_input_chars_per_word", 100)
    strips = normalizer["strip_accents"] if normalizer["strip_accents"] is not None else normalizer["lowercase"]

    def marks(text: str) -> bool:
        return any(unicodedata.category(c) in ("Mc", "Me") or "\uac00" <= c <= "\ud7a3" for c in text)

    found: dict[str, Callable[[str], bool]] = {
        "llama.cpp takes U+2581 for the beginning of a word": lambda text: SPACE in text,
        "llama.cpp takes vertical tab, form feed and U+0085 for spaces": lambda text: any(c in text for c in "\v\f\x85"),
        f"llama.cpp knows no longest word ({longest} characters)": lambda text: any(len(word) > longest for word in text.split()),
    }
    return ({"llama.cpp drops spacing marks and does not decompose Hangul": marks} if strips else {}) | found
