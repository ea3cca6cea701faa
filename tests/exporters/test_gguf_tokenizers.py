"""Tokenizers in GGUF files: llama.cpp makes the same tokens, of every kind of vocabulary and pre-tokenizer; the rest is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import PreTrainedTokenizerFast

from exporters.gguf import pretokenizers
from exporters.gguf.comparison import Comparison, compare
from exporters.gguf.pretokenizers import CONTRACTIONS, GPT2, KNOWN, Known, recognise, reference
from exporters.gguf.strings import TEXTS, varied_strings
from exporters.gguf.tokenizers import vocabulary
from exporters.gguf.vocabularies import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from tests.conftest import shared_data

TRAINING = [*TEXTS, *TEXTS, *(text.upper() for text in TEXTS)]
NAMED = [(entry, key, name) for entry in KNOWN for key, name in entry.names.items()]
SPACE = "▁"


def fast(parts: Any, **options: Any) -> PreTrainedTokenizerFast:
    """A transformers tokenizer of a `tokenizers` object, or of a tokenizer.json."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(parts)) if isinstance(parts, dict) else parts
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"clean_up_tokenization_spaces": False, **options})


def byte_level(pre_tokenizer: dict[str, Any], normalizer: str | None = None, size: int = 700, **model: Any) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE with this pre-tokenizer, trained on a few texts; <|begin|> and <|end|> are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    empty = json.loads(Tokenizer(models.BPE()).to_str())
    trained = Tokenizer.from_str(json.dumps(empty | {"pre_tokenizer": pre_tokenizer}))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    trained.train_from_iterator(TRAINING, trainer)
    parts = json.loads(trained.to_str())
    parts["normalizer"] = None if normalizer is None else {"type": normalizer}
    parts["model"] |= model
    return dict(parts)


def sentencepiece(normalizer: Any, pre_tokenizer: Any, pieces: list[str], added: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """tokenizer.json as transformers makes it of a SentencePiece BPE: every pair that makes a piece is a merge, in the pieces' order."""
    start = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    letters = sorted({c for text in TRAINING for c in text.replace(" ", SPACE)} | set("".join(pieces)))
    vocab = {token: i for i, token in enumerate([*start, *pieces, *(c for c in letters if c not in pieces)])}
    merges = [[p[:i], p[i:]] for p in pieces for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    special = [{"id": i, "content": t, "special": True, "normalized": False} for i, t in enumerate(start[:3])]
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab, "merges": merges}
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "decoder", "post_processor")),
        "added_tokens": [flags | token for token in [*special, *(added or [])]],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "model": model,
    }


def pieces(count: int = 300) -> list[str]:
    """Pieces such as SentencePiece finds: the most frequent pairs, joined again and again."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(TRAINING, trainers.BpeTrainer(vocab_size=count + 500, show_progress=False))
    merged = ["".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]][:count]
    return list(dict.fromkeys([*merged, *(SPACE * n for n in (2, 4, 8))]))


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE]}
GEMMA = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def metaspace(scheme: str) -> dict[str, Any]:
    """As transformers' own Llama tokenizer has it."""
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


def in_llama_cpp(folder: Path, tokenizer: Any, count: int = 250, pre: str | None = None) -> Comparison:
    """Write the vocabulary into a file without tensors, and compare its tokens with the tokenizer's."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    from exporters.gguf.llama import Llama

    path = folder / "vocabulary.gguf"
    write(path, vocabulary(tokenizer, len(tokenizer), pre))
    special = [str(token) for token in tokenizer.all_special_tokens]
    with Llama(path, vocab_only=True) as llama:
        assert llama.tokenize("Hello you", add_special=True) == tokenizer("Hello you")["input_ids"]
        return compare(tokenizer, llama.tokenize, varied_strings(count, special), pre)


def write(path: Path, keys: list[tuple[str, Any, str]]) -> None:
    """A file with a vocabulary only."""
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{name}", 32)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value, kind in keys:
        writer.add_key_value(key, value, gguf.GGUFValueType[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_dict(keys: list[tuple[str, Any, str]]) -> dict[str, Any]:
    return {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value, _ in keys}


# byte-level BPE


@pytest.mark.parametrize(("entry", "key", "name"), NAMED, ids=[name for _, _, name in NAMED])
def test_known_pre_tokenizers(entry: Known, key: tuple[bool, bool], name: str, tmp_path: Path) -> None:
    """Recognised by their structure; llama.cpp, which gets nothing but the name, cuts as transformers does."""
    ignore, clean = key
    tokenizer = fast(byte_level(reference(entry), ignore_merges=ignore), clean_up_tokenization_spaces=clean, bos_token="<|begin|>")
    found = in_llama_cpp(tmp_path, tokenizer)
    assert as_dict(vocabulary(tokenizer, len(tokenizer)))["pre"] == name
    assert found.passed, found.describe()
    assert found.same > 200
    assert set(found.beyond) <= {entry.limits}


def test_probes_tell_all_known_apart() -> None:
    cuts = [pretokenizers._behaviour(json.dumps(reference(entry))) for entry in KNOWN]
    assert len(set(cuts)) == len(KNOWN)


def test_probes_have_every_three_kinds_together() -> None:
    text = "".join(pretokenizers._every_three("abcd"))
    assert {(text + text[:2])[i : i + 3] for i in range(len(text))} == {"".join(t) for t in itertools.product("abcd", repeat=3)}


OTHER_SPELLINGS = {
    "qwen2": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
}


@pytest.mark.parametrize("name", OTHER_SPELLINGS)
def test_another_spelling_of_the_same_expression(name: str) -> None:
    entry = pretokenizers.named(name)
    assert entry is not None
    other = {**reference(entry)}
    other["pretokenizers"] = [{"type": "Split", "pattern": {"Regex": OTHER_SPELLINGS[name]}, "behavior": "Isolated", "invert": False}]
    other["pretokenizers"].append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    ignore = next(iter(entry.names))[0]
    parts = {"pre_tokenizer": other, "model": {"ignore_merges": ignore, "vocab": {}}}
    assert pretokenizers.canonical(parts) != pretokenizers.canonical({"pre_tokenizer": reference(entry)})
    assert recognise(parts) == name


def test_shorthands_are_spelt_out() -> None:
    smollm = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    assert recognise({"pre_tokenizer": smollm, "model": {}}) == "smollm"
    assert recognise({"pre_tokenizer": smollm, "model": {}}, clean_up=True) == "starcoder"


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        reference(Known("", (r"\p{N}{1,4}", GPT2), {})),
        reference(Known("", (CONTRACTIONS + r"|\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]",), {})),
    ],
    ids=["prefix space", "no expression", "four digits", "own"],
)
def test_an_unknown_pre_tokenizer_is_refused(pre_tokenizer: dict[str, Any]) -> None:
    tokenizer = fast(byte_level(pre_tokenizer, size=300))
    with pytest.raises(ValueError, match=r"sha256 [0-9a-f]{16}.*Known here: .*qwen2.*export.gguf.pre_tokenizer=NAME"):
        vocabulary(tokenizer, 300)
    assert as_dict(vocabulary(tokenizer, 300, pre="gpt-2"))["pre"] == "gpt-2"


def test_a_wrong_name_is_found_by_the_comparison(tmp_path: Path) -> None:
    found = in_llama_cpp(tmp_path, fast(byte_level(reference(KNOWN[0])), bos_token="<|begin|>"), count=100, pre="qwen2")
    assert not found.passed
    assert found.describe().startswith("failed: ")


def test_whole_words_without_merging() -> None:
    """Merging makes every token of a trained vocabulary; a token that merges cannot make needs llama.cpp's ignore_merges."""
    qwen = pretokenizers.named("qwen2")
    assert qwen is not None
    parts = byte_level(reference(qwen), ignore_merges=True)
    assert recognise(parts) == "qwen2"
    parts["model"]["vocab"]["Ġunmergeable"] = len(parts["model"]["vocab"])
    with pytest.raises(ValueError, match=r"ignore_merges=true.*nearest is qwen2"):
        recognise(parts)


def test_nfc_is_a_limit_and_other_normalizers_are_refused(tmp_path: Path) -> None:
    found = in_llama_cpp(tmp_path, fast(byte_level(reference(KNOWN[0]), "NFC"), bos_token="<|begin|>"), count=600)
    assert found.passed, found.describe()
    assert list(found.beyond) == ["llama.cpp does not normalize to NFC"]
    with pytest.raises(ValueError, match="normalizes text with Lowercase"):
        vocabulary(fast(byte_level(reference(KNOWN[0]), "Lowercase", size=300)), 300)


# SentencePiece


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix", "beyond"),
    [
        (PREPEND, None, True, 0),
        (REPLACE, GEMMA, False, 0),
        (None, metaspace("never"), False, 0),
        (None, metaspace("always"), True, 1),
        (None, metaspace("first"), True, 2),
    ],
    ids=["llama 2", "gemma", "metaspace never", "metaspace always", "metaspace first"],
)
def test_sentencepiece(normalizer: Any, pre_tokenizer: Any, prefix: bool, beyond: int, tmp_path: Path) -> None:
    tokenizer = fast(sentencepiece(normalizer, pre_tokenizer, pieces()), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found = in_llama_cpp(tmp_path, tokenizer)
    assert found.passed, found.describe()
    assert bool(found.beyond) == bool(beyond)
    keys = as_dict(vocabulary(tokenizer, len(tokenizer)))
    assert keys["model"] == "llama"
    assert keys["add_space_prefix"] is prefix
    assert keys["token_type"][:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert max(keys["scores"][3 + 256 :]) == 0.0


def test_runs_of_spaces_that_were_added_are_made_by_merges(tmp_path: Path) -> None:
    """Gemma lists them as added tokens, written as U+2581, which texts do not have; longest first would give other tokens."""
    vocab = sentencepiece(REPLACE, GEMMA, pieces())["model"]["vocab"]
    flags = {"special": False, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    runs = [{"id": vocab[SPACE * n], "content": SPACE * n} | flags for n in (2, 4, 8)]
    breaks = [{"id": len(vocab), "content": "\n\n"} | flags]
    parts = sentencepiece(REPLACE, GEMMA, pieces(), [*runs, *breaks])
    tokenizer = fast(parts, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found = in_llama_cpp(tmp_path, tokenizer)
    assert found.passed, found.describe()
    assert not found.beyond
    types = as_dict(vocabulary(tokenizer, len(tokenizer)))["token_type"]
    assert [types[vocab[SPACE * 4]], types[tokenizer.convert_tokens_to_ids("\n\n")]] == [NORMAL, USER_DEFINED]


def test_bpe_with_byte_fallback_that_is_not_sentencepiece() -> None:
    parts = sentencepiece(PREPEND, None, pieces())
    parts["model"]["merges"] = parts["model"]["merges"][::3]
    with pytest.raises(ValueError, match="was not made by SentencePiece"):
        vocabulary(fast(parts), 3000)
    parts = sentencepiece({"type": "Sequence", "normalizers": [PREPEND, {"type": "NFKC"}]}, None, pieces())
    with pytest.raises(ValueError, match="normalizes with NFKC"):
        vocabulary(fast(parts), 3000)
    parts = sentencepiece(PREPEND, {"type": "Digits", "individual_digits": True}, pieces())
    with pytest.raises(ValueError, match=r"cuts text with cut|cuts text with Digits"):
        vocabulary(fast(parts), 3000)


def test_stories15m(tmp_path: Path) -> None:
    """A real Llama 2 tokenizer: all 1,000 strings."""
    if not (shared_data() / "stories15M").exists():
        pytest.skip("shared data is not there")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared_data() / "stories15M")
    found = in_llama_cpp(tmp_path, tokenizer, count=1000)
    assert found.describe() == "passed: 1000 of 1000 varied strings have the same ids"


# Unigram and WordPiece


@pytest.mark.parametrize("spaces", [False, True], ids=["spaces kept", "spaces merged"])
def test_unigram(spaces: bool, tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.Unigram())
    if spaces:
        trained.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
        trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    else:
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(
        TRAINING, trainers.UnigramTrainer(vocab_size=2000, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    trained.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = fast(trained, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    keys = as_dict(vocabulary(tokenizer, len(tokenizer)))
    assert [keys[k] for k in ("model", "add_space_prefix", "remove_extra_whitespaces", "add_eos_token")] == ["t5", True, spaces, True]
    assert keys["token_type"][:4] == [CONTROL, CONTROL, UNKNOWN, NORMAL]


@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
def test_wordpiece(lowercase: bool, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trained.train_from_iterator(TRAINING, trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False))
    trained.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    tokenizer = fast(trained, **names)
    found = in_llama_cpp(tmp_path, tokenizer)
    assert found.passed, found.describe()
    assert found.same > 150
    keys = as_dict(vocabulary(tokenizer, len(tokenizer)))
    assert keys["bos_token_id"] == tokenizer.cls_token_id
    assert keys["tokens"][2] == "[CLS]"
    word = next(token for token in sorted(tokenizer.get_vocab()) if token.isalpha())
    assert keys["tokens"][tokenizer.convert_tokens_to_ids(word)] == SPACE + word
    trained.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    with pytest.raises(ValueError, match=r"\[CLS\] before and \[SEP\] after"):
        vocabulary(fast(trained, **names), len(tokenizer))


# the rest of the metadata


def small(**options: Any) -> PreTrainedTokenizerFast:
    return fast(byte_level(reference(KNOWN[0]), size=300), **{"bos_token": "<|begin|>", "eos_token": "<|end|>", **options})


def test_padded_and_added() -> None:
    tokenizer = small()
    tokenizer.add_tokens(["<tool>", "<|hidden|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[X]"]})
    keys = as_dict(vocabulary(tokenizer, 310))
    assert keys["tokens"][300:305] == ["<tool>", "<|hidden|>", "[X]", "[PAD303]", "[PAD304]"]
    assert keys["token_type"][298:305] == [NORMAL, NORMAL, USER_DEFINED, CONTROL, CONTROL, UNUSED, UNUSED]
    assert len(keys["tokens"]) == len(keys["token_type"]) == 310
    assert as_dict(vocabulary(tokenizer, 301))["tokens"][300:] == ["<tool>"]  # the model has no row for the others
    with pytest.raises(ValueError, match="300 tokens and the model's embedding 299 rows"):
        vocabulary(tokenizer, 299)


def test_tokens_that_would_be_written_alike() -> None:
    tokenizer = small()
    tokenizer.add_tokens(["[PAD301]"])
    with pytest.raises(ValueError, match=r"two tokens are written '\[PAD301\]'"):
        vocabulary(tokenizer, 302)


def test_what_stands_around_a_text() -> None:
    from tokenizers import processors

    keys = as_dict(vocabulary(small(), 300))
    assert [keys[k] for k in ("bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token")] == [0, 1, False, False]
    tokenizer = small()
    around = [("<|begin|>", 0), ("<|end|>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A <|end|>", special_tokens=around)
    keys = as_dict(vocabulary(tokenizer, 300))
    assert [keys["add_bos_token"], keys["add_eos_token"]] == [True, True]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> <|end|> $A", special_tokens=around)
    with pytest.raises(ValueError, match=r"puts the tokens \[0, 1\] before"):
        vocabulary(tokenizer, 300)


def test_without_bos_llama_cpp_gets_none_of_its_own() -> None:
    """It would take token 11 of a byte-level vocabulary for BOS."""
    keys = as_dict(vocabulary(small(bos_token=None), 300))
    assert (keys["bos_token_id"], keys["add_bos_token"]) == (1, False)


def test_chat_templates() -> None:
    tokenizer = small()
    assert "chat_template" not in as_dict(vocabulary(tokenizer, 300))
    tokenizer.chat_template = "{{ messages }}"
    assert as_dict(vocabulary(tokenizer, 300))["chat_template"] == "{{ messages }}"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + '<|over|>' }}{% endfor %}{{ 'assistant:' }}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|over|>"]})
    assert as_dict(vocabulary(tokenizer, 310))["eot_token_id"] == 300
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    keys = as_dict(vocabulary(tokenizer, 310))
    assert [keys[k] for k in ("chat_template", "chat_template.tool_use", "chat_templates")] == ["a", "b", ["tool_use"]]


def test_a_tokenizer_without_tokenizer_json() -> None:
    class Slow:
        pass

    with pytest.raises(ValueError, match=r"Slow has no tokenizer.json.*save_pretrained"):
        vocabulary(Slow(), 10)


def test_a_model_that_llama_cpp_has_not() -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="WordLevel, for which"):
        vocabulary(fast(Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))), 2)


# strings


def test_varied_strings_are_varied_and_always_the_same() -> None:
    found = varied_strings(1000, ["<s>", "</s>"])
    assert found == varied_strings(1000, ["<s>", "</s>"])
    assert len(found) == 1000
    assert len(set(found)) > 990
    assert sum("<s>" in text for text in found) > 20
    together = "".join(found)
    assert all(part in together for part in ("  ", "\n\n", "\r\n", "\t", "👩‍👩‍👧‍👦", "٣", "\u0301", "'LL"))
    assert varied_strings(10) == found[:10]
