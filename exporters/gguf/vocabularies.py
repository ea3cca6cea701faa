"""The four kinds of vocabulary that llama.cpp has, each made from a tokenizer.json.

    tokenizer.ggml.model   what it is                           what llama.cpp does with a text
    gpt2                   byte-level BPE                       cuts with the expression that `tokenizer.ggml.pre` names, merges by rank
    llama                  BPE as SentencePiece makes it        joins the neighbours whose joint text is the token with the highest
                                                                score; what is no token becomes bytes (<0x0A>)
    t5                     Unigram                              the segmentation with the highest sum of scores
    bert                   WordPiece                            words, then the longest token from the left

Scores of `llama`. tokenizer.json has no scores but merges: pairs of tokens in order of preference, of which the first that stands in the
text is joined. SentencePiece has a score for each token, and joins whatever makes the best token. These are the same if all pairs that make
one token stand together in the order, and if every pair of tokens that makes a token is a merge; the score is then minus the token's
place. Both are checked: a BPE with byte fallback that was not made by SentencePiece is refused, since llama.cpp would join pairs that
it never joins. (Writing constant scores, as some converters do when there is no tokenizer.model, gives other tokens.)

Spaces. SentencePiece writes a space as U+2581. `bert` marks the beginning of a word with it, where tokenizer.json marks the continuation
with ##.

Tokens that were added to a vocabulary are found in the text before anything else. llama.cpp knows two kinds: CONTROL (special: hidden in
output) and USER_DEFINED; both are looked for in the text as it is, before normalization.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from exporters.gguf.pretokenizers import canonical, fingerprint, normalizers, recognise

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types (llama.h, enum llama_token_type)."""

SPACE = "▁"
UNSCORED = -1000.0
"""Score of tokens that nothing is joined to; below every token's place among the merges is not needed, as they are never compared."""
BROKEN_MERGES = 0.01
"""Share of merges that may contradict scores; the receipt finds what is left of them."""

Key = tuple[str, Any, str]


@dataclass
class Source:
    """A tokenizer as far as a file needs it."""

    parts: dict[str, Any]
    """Its tokenizer.json."""
    n_vocab: int
    """Rows of the model's embedding."""
    pre: str | None = None
    """Name of the pre-tokenizer that the user gave."""
    clean_up: bool = False
    """`clean_up_tokenization_spaces`."""
    added: dict[int, dict[str, Any]] = field(init=False)
    """Added tokens by id."""
    texts: dict[int, str] = field(init=False)
    """Every token by id."""

    def __post_init__(self) -> None:
        vocabulary = self.parts["model"]["vocab"]
        pairs = enumerate(text for text, _ in vocabulary) if isinstance(vocabulary, list) else ((i, t) for t, i in vocabulary.items())
        listed = dict(pairs)
        self.added = {t["id"]: t for t in self.parts.get("added_tokens", [])}
        own = max(listed, default=-1)
        if own >= self.n_vocab:
            raise ValueError(
                f"the tokenizer has {own + 1} tokens and the model's embedding {self.n_vocab} rows, so the model cannot read them all; "
                "choose the model's own tokenizer (the folder of model.path has another model's)"
            )
        self.texts = listed | {i: t["content"] for i, t in self.added.items() if i < self.n_vocab}

    @property
    def kind(self) -> str:
        """`tokenizer.ggml.model`."""
        model = self.parts["model"]
        if model["type"] == "BPE":
            return "llama" if model.get("byte_fallback") else "gpt2"
        return {"WordPiece": "bert", "Unigram": "t5"}.get(model["type"], "")

    def made_by_merges(self, i: int) -> bool:
        """Whether an added token is one in name only: Gemma's runs of spaces, written as U+2581, which raw texts do not have."""
        token = self.added[i]
        return self.kind == "llama" and SPACE in token["content"] and not token["normalized"] and not token["special"]


def tokens_of(source: Source) -> tuple[list[Key], list[str]]:
    """The metadata of the vocabulary itself, and its tokens as written.

    Raises:
        ValueError: if llama.cpp has no tokenizer that makes the same tokens.
    """
    builders: dict[str, Callable[[Source], list[Key]]] = {"gpt2": _gpt2, "llama": _llama, "t5": _t5, "bert": _bert}
    if source.kind not in builders:
        raise ValueError(
            f"the tokenizer's model is {source.parts['model']['type']}, for which llama.cpp has none; it has byte-level and SentencePiece "
            "BPE, Unigram and WordPiece. export=[onnx] holds the model without its tokenizer"
        )
    keys = builders[source.kind](source)
    texts = next(value for key, value, _ in keys if key == "tokenizer.ggml.tokens")
    if len(set(texts)) != len(texts):
        seen: set[str] = set()
        twice = next(t for t in texts if t in seen or seen.add(t))  # type: ignore[func-returns-value]
        raise ValueError(f"two tokens are written {twice!r} in llama.cpp's vocabulary, which cannot tell them apart")
    return keys, texts


def _listed(source: Source, text: Callable[[str], str], kind: Callable[[int, str], int]) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids without a token are [PADn], unused."""
    texts, kinds = [], []
    for i in range(source.n_vocab):
        token = source.texts.get(i)
        if token is None:
            texts.append(f"[PAD{i}]")
            kinds.append(UNUSED)
        elif i in source.added and not source.made_by_merges(i):
            control = source.added[i]["special"] or looks_special(token)
            texts.append(token if control or source.kind == "gpt2" else token.replace(SPACE, " "))
            kinds.append(CONTROL if control else USER_DEFINED)
        else:
            texts.append(text(token))
            kinds.append(kind(i, token))
    return texts, kinds


def looks_special(token: str) -> bool:
    """Whether an added token is a control token, whatever its flag says: <|…|>, <｜…｜>, and Gemma's <unused…> and <mask>."""
    marks = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    wrapped = any(token.startswith(a) and token.endswith(b) and len(token) > len(a + b) for a, b in marks)
    return wrapped or token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def _head(model: str, pre: str, texts: list[str], kinds: list[int], scores: list[float] | None = None) -> list[Key]:
    keys: list[Key] = [
        ("tokenizer.ggml.model", model, "string"),
        ("tokenizer.ggml.pre", pre, "string"),
        ("tokenizer.ggml.tokens", texts, "array"),
    ]
    if scores is not None:
        keys.append(("tokenizer.ggml.scores", scores, "array"))
    return [*keys, ("tokenizer.ggml.token_type", kinds, "array")]


def _gpt2(source: Source) -> list[Key]:
    model = source.parts["model"]
    _refuse_options(model)
    other = [n["type"] for n in normalizers(source.parts) if n["type"] != "NFC"]
    if other and source.pre is None:
        raise ValueError(
            f"the tokenizer normalizes text with {', '.join(other)} before byte-level BPE, which llama.cpp does not; "
            "set export.gguf.pre_tokenizer=NAME if that changes none of your texts"
        )
    if not any(step[0] == "bytes" for step in canonical(source.parts)):
        raise ValueError(_unknown_structure(source, "neither turns text into bytes nor falls back to them"))
    pre = source.pre or recognise(source.parts, source.clean_up)
    texts, kinds = _listed(source, lambda token: token, lambda i, token: NORMAL)
    pairs = _merges(model)
    if not pairs:
        raise ValueError("the tokenizer's BPE has no merges, and llama.cpp loads none without; use a tokenizer that was trained")
    if any(" " in part for pair in pairs for part in pair):
        raise ValueError("the tokenizer merges tokens with spaces in them, which llama.cpp's list of merges cannot hold")
    return [*_head("gpt2", pre, texts, kinds), ("tokenizer.ggml.merges", [f"{a} {b}" for a, b in pairs], "array")]


def _llama(source: Source) -> list[Key]:
    model = source.parts["model"]
    _refuse_options(model)
    prefix = _space_prefix(source)
    scores = _scores(source)
    missing = [f"<0x{i:02X}>" for i in range(256) if f"<0x{i:02X}>" not in model["vocab"]]
    if missing:
        raise ValueError(f"the tokenizer falls back to bytes and has no token {missing[0]}; llama.cpp wants all 256")
    unknown = model.get("unk_token")

    def kind(i: int, token: str) -> int:
        return UNKNOWN if token == unknown else BYTE if _is_byte(token) else NORMAL

    texts, kinds = _listed(source, lambda token: token, kind)
    kinds = [UNKNOWN if text == unknown else k for text, k in zip(texts, kinds, strict=True)]
    values = [scores.get(source.texts.get(i, ""), 0.0 if k in (BYTE, UNKNOWN) else UNSCORED) for i, k in enumerate(kinds)]
    return [*_head("llama", "default", texts, kinds, values), ("tokenizer.ggml.add_space_prefix", prefix, "bool")]


def _t5(source: Source) -> list[Key]:
    model = source.parts["model"]
    if model.get("byte_fallback"):
        raise ValueError("the tokenizer is a Unigram model that falls back to bytes, which llama.cpp's has no code for")
    steps = [n["type"] for n in normalizers(source.parts)]
    maps = [base64.b64decode(n["precompiled_charsmap"]) for n in normalizers(source.parts) if n["type"] == "Precompiled"]
    cuts = [json.loads(s[0])["type"] for s in canonical(source.parts)]
    if set(steps) - {"Precompiled", "Replace", "Strip"} or len(maps) > 1 or cuts not in (["Metaspace"], ["WhitespaceSplit", "Metaspace"]):
        raise ValueError(_unknown_structure(source, "is not what SentencePiece makes for Unigram"))
    unknown = model.get("unk_id")
    texts, kinds = _listed(source, lambda token: token, lambda i, token: NORMAL)
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    listed = {i: float(score) for i, (_, score) in enumerate(model["vocab"])}
    keys = _head("t5", "default", texts, kinds, [listed.get(i, UNSCORED) for i in range(source.n_vocab)])
    keys += [
        ("tokenizer.ggml.add_space_prefix", _prepends(source), "bool"),
        ("tokenizer.ggml.remove_extra_whitespaces", _merges_spaces(source), "bool"),
    ]
    return [*keys, ("tokenizer.ggml.precompiled_charsmap", maps[0], "array")] if maps and maps[0] else keys


def _bert(source: Source) -> list[Key]:
    model = source.parts["model"]
    found = normalizers(source.parts)
    plain = len(found) == 1 and found[0]["type"] == "BertNormalizer" and found[0]["clean_text"] and found[0]["handle_chinese_chars"]
    cuts = canonical(source.parts)
    if not plain or len(cuts) != 1 or "BertPreTokenizer" not in cuts[0][0] or model["continuing_subword_prefix"] != "##":
        why = "is not BERT's (BertNormalizer with clean_text and handle_chinese_chars, BertPreTokenizer, ##)"
        raise ValueError(_unknown_structure(source, why))
    texts, kinds = _listed(source, lambda t: t[2:] if t.startswith("##") else SPACE + t, lambda i, token: NORMAL)
    lower, strip = bool(found[0]["lowercase"]), found[0]["strip_accents"]
    keys = _head("bert", "default", texts, kinds)
    if lower and strip in (None, True):
        return keys
    return [
        *keys,
        ("tokenizer.ggml.normalizer.lowercase", lower, "bool"),
        ("tokenizer.ggml.normalizer.strip_accents", lower if strip is None else bool(strip), "bool"),
    ]


def _refuse_options(model: dict[str, Any]) -> None:
    """Refuse options of BPE that llama.cpp has not."""
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"the tokenizer's BPE has {name}={model[name]!r}, which llama.cpp's has not; use a tokenizer without it")


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs in order of preference, from either form that tokenizer.json has had."""
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]  # type: ignore[misc]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(source: Source) -> dict[str, float]:
    """Token -> minus its place among the tokens that merges make.

    Raises:
        ValueError: if scores cannot say what the merges say.
    """
    pairs, vocabulary = _merges(source.parts["model"]), source.parts["model"]["vocab"]
    place: dict[str, int] = {}
    broken = 0
    for a, b in pairs:
        if place.setdefault(a + b, len(place)) != len(place) - 1:
            broken += 1
    known = set(pairs)
    added = {t["content"] for t in source.added.values()}
    tokens = [t for t in vocabulary if t not in added and not _is_byte(t)]
    missing = sum(t[:i] in vocabulary and t[i:] in vocabulary and (t[:i], t[i:]) not in known for t in tokens for i in range(1, len(t)))
    if broken + missing > BROKEN_MERGES * max(1, len(pairs)):
        raise ValueError(
            f"the tokenizer's BPE has byte fallback, but was not made by SentencePiece: of {len(pairs)} merges {broken} are out of their "
            f"token's order, and {missing} pairs that make a token are no merges. llama.cpp joins by score whatever makes a token, "
            "and would give other tokens"
        )
    return {token: -float(i) for token, i in place.items()}


def _space_prefix(source: Source) -> bool:
    """Whether SentencePiece's BPE puts a space before a text.

    Raises:
        ValueError: if the tokenizer does anything else to a text.
    """
    for n in normalizers(source.parts):
        prepend = n["type"] == "Prepend" and n["prepend"] == SPACE
        replace = n["type"] == "Replace" and n["pattern"] == {"String": " "} and n["content"] == SPACE
        if not prepend and not replace:
            raise ValueError(_unknown_structure(source, f"normalizes with {n['type']}, which SentencePiece BPE in llama.cpp does not"))
    for step in canonical(source.parts):
        part = json.loads(step[0]) if step[0].startswith("{") else {"type": step[0]}
        whole = part["type"] == "Metaspace" and part["replacement"] == SPACE and not part.get("split", True)
        gemma = part["type"] == "Split" and part["pattern"] == {"String": " "} and part["behavior"] == "MergedWithPrevious"
        if not whole and not gemma:
            raise ValueError(_unknown_structure(source, f"cuts text with {part['type']}, which SentencePiece BPE in llama.cpp does not"))
    return _prepends(source)


def _prepends(source: Source) -> bool:
    """Whether a space is put before a text."""
    prepend = any(n["type"] == "Prepend" for n in normalizers(source.parts))
    steps = [json.loads(s[0]) for s in canonical(source.parts) if s[0].startswith("{")]
    return prepend or any(s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never" for s in steps)


def _merges_spaces(source: Source) -> bool:
    """Whether two spaces become one."""
    from tokenizers import Tokenizer

    cutter = Tokenizer.from_str(json.dumps(source.parts | {"post_processor": None}))
    return bool(cutter.encode("a  b").ids == cutter.encode("a b").ids)


def _unknown_structure(source: Source, why: str) -> str:
    steps = json.dumps([normalizers(source.parts), canonical(source.parts)], ensure_ascii=False)
    return f"this tokenizer {why} (sha256 {fingerprint(source.parts)[:16]}): {steps[:400]}; llama.cpp would give other tokens"
