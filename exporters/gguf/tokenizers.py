"""A transformers tokenizer as the metadata of a GGUF file.

llama.cpp tokenizes by itself, from the vocabulary in the file. What is written is read off the tokenizer that training used, not off the
files it came from: its `tokenizers` object (tokenizer.json), its special tokens, and what it does to a probe text.

    kind of vocabulary, tokens, types, scores, merges     vocabularies.py
    name of the expression that cuts text                 pretokenizers.py
    special ids, what stands around a text, chat          here

A vocabulary smaller than the embedding is padded with unused tokens, [PAD…]; added tokens beyond the embedding, which the model could not
read, are left out; a tokenizer whose own vocabulary is larger than the embedding is another model's.

Whether the file tokenizes as training did is measured, not argued: `varied_strings` are for that, and `comparison.py` knows where llama.cpp
has no way to do the same.
"""

from __future__ import annotations

import json
from typing import Any

from exporters.gguf.chat import end_of_turn
from exporters.gguf.strings import varied_strings
from exporters.gguf.vocabularies import Key, Source, tokens_of

__all__ = ["Key", "varied_strings", "vocabulary"]

SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
}
"""transformers' name, and end of turn -> llama.cpp's key (its spelling). llama.cpp ends generation there too; it knows the ends of turns
of many models by their text, but not of all."""


def vocabulary(tokenizer: Any, n_vocab: int, pre: str | None = None) -> list[Key]:
    """Metadata of ``tokenizer``: key, value, and the name of a GGUF type.

    Args:
        tokenizer: of transformers, with a `tokenizers` backend.
        n_vocab: rows of the model's embedding.
        pre: name of the pre-tokenizer, instead of the recognised one.

    Raises:
        ValueError: if llama.cpp cannot tokenize as it does, with what to do.
    """
    source = Source(tokenizer_json(tokenizer), n_vocab, pre, bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)))
    keys, _ = tokens_of(source)
    return [*keys, *_special(tokenizer, source), *_templates(tokenizer)]


def tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's tokenizer.json.

    Raises:
        ValueError: if it has none.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        raise ValueError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which a GGUF file is made from; make one (pip install sentencepiece, "
            "then AutoTokenizer.from_pretrained(PATH).save_pretrained(FOLDER)) and set model.path=FOLDER"
        )
    return dict(json.loads(backend.to_str()))


def surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    return whole[:at], whole[at + len(plain) :]


def _special(tokenizer: Any, source: Source) -> list[Key]:
    """Special ids, and which of them stand around a text.

    Raises:
        ValueError: if llama.cpp would put others around it.
    """
    before, after = surroundings(tokenizer)
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL}
    if source.kind == "bert":
        ids |= {"bos": tokenizer.cls_token_id, "eos": None}
        if before != [tokenizer.cls_token_id] or after != [tokenizer.sep_token_id]:
            raise ValueError(
                f"llama.cpp puts [CLS] before and [SEP] after every text of a WordPiece model; this tokenizer puts {before} and {after}"
            )
        around = []
    else:
        if len(before) > 1 or len(after) > 1:
            raise ValueError(
                f"the tokenizer puts the tokens {before} before and {after} after a text; llama.cpp can put one each, BOS and EOS"
            )
        ids |= {name: found[0] for name, found in (("bos", before), ("eos", after)) if found}
        ids["eot"] = end_of_turn(tokenizer)
        if ids["bos"] is None:
            ids["bos"] = ids["eos"]  # not added to texts, but llama.cpp would take token 11 for it
        around = [("tokenizer.ggml.add_bos_token", bool(before), "bool"), ("tokenizer.ggml.add_eos_token", bool(after), "bool")]
    return [(f"tokenizer.ggml.{SPECIAL[n]}", int(i), "uint32") for n, i in ids.items() if i is not None and i < source.n_vocab] + around


def _templates(tokenizer: Any) -> list[Key]:
    """Chat templates: the default one, and others by name."""
    found = getattr(tokenizer, "chat_template", None)
    if not found:
        return []
    named = found if isinstance(found, dict) else {"default": found}
    others = sorted(name for name in named if name != "default")
    keys: list[Key] = [("tokenizer.chat_template", named["default"], "string")] if "default" in named else []
    keys += [(f"tokenizer.chat_template.{name}", named[name], "string") for name in others]
    return [*keys, ("tokenizer.chat_templates", others, "array")] if others else keys
