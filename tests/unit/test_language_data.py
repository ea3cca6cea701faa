"""Text for language models: documents, splits, token ids, packed sequences, and windows that score every token once."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain import tokens
from qtrain.data.text import TextCorpus
from qtrain.documents import Documents, cut, sample_documents
from qtrain.images import ImageSpec
from qtrain.language import IGNORED, LanguageDataModule, Window, Windows, windows
from qtrain.models.causal_lm import CausalLm
from qtrain.record import Record
from qtrain.stages import load
from qtrain.tokens import find_marks, tokenize
from tests.conftest import shared_data
from tests.tiny_lm import tiny_language_model, tiny_text, tiny_tokenizer
from tests.unit.test_text_data import Recorder, SaveAt, fit


@pytest.fixture(scope="module")
def plain() -> Any:
    """A tokenizer that adds nothing, as SmolLM2's."""
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def marked() -> Any:
    """One that puts BOS before a text, as Llama's does, by its post-processor alone."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A <|im_start|> $B", special_tokens=[("<|im_start|>", 1)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_language_model(tmp_path_factory.mktemp("lm"))).eval()


def stories(path: Path, count: int, words: int = 60, name: str = "story") -> str:
    path.write_text("".join(json.dumps({"text": f"{name} {i}: " + f"word{i} and more. " * (words + i)}) + "\n" for i in range(count)))
    return str(path)


def corpus(tmp_path: Path, **options: Any) -> TextCorpus:
    train = stories(tmp_path / "train.jsonl", 30)
    test = stories(tmp_path / "test.jsonl", 5, 10, "held out")
    return TextCorpus(**{"train": train, "test": test, "context": 64, "batch_size": 4, "calibration_sequences": 8, **options})


def numbers(*lengths: int) -> list[Any]:
    return [np.arange(n, dtype=np.int32) + 1000 * i for i, n in enumerate(lengths)]


# --- windows ------------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_windows_score_every_token_but_the_first_once_with_as_much_before_it_as_promised(length: int, context: int, data: Any) -> None:
    stride = data.draw(st.integers(1, context - 1))
    scored = []
    for begin, end, first in windows(length, context, stride):
        assert end - begin <= context
        scored += list(range(first, end))
        assert all(t - begin >= min(t, context - stride) for t in range(first, end))
    assert scored == list(range(1, length))


def test_without_overlap_the_first_token_of_each_window_is_not_scored() -> None:
    assert windows(10, 4, 4) == [(0, 4, 1), (4, 8, 5), (8, 10, 9)]


def hugging_face_perplexity(model: Any, ids: Tensor, max_length: int, stride: int) -> tuple[float, int]:
    """As their page on the perplexity of fixed-length models has it, loss by the model itself."""
    nll_sum, n_tokens, prev_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        target = ids[:, begin:end].clone()
        target[:, : -(end - prev_end)] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=target).loss
        valid = int((target[:, 1:] != -100).sum())
        nll_sum, n_tokens, prev_end = nll_sum + float(loss) * valid, n_tokens + valid, end
        if end == ids.shape[1]:
            break
    return math.exp(nll_sum / n_tokens), n_tokens


def perplexity(model: Any, batches: Any) -> tuple[float, int]:
    """Over batches as the data module gives them."""
    total, count = 0.0, 0
    for inputs, labels in batches:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"))
        count += int((labels[:, 1:] != IGNORED).sum())
    return math.exp(total / count), count


@pytest.mark.parametrize("stride", [24, 64])
@pytest.mark.usefixtures("one_thread")
def test_perplexity_with_stride_is_that_of_hugging_faces_recipe(tmp_path: Path, plain: Any, model: Any, stride: int) -> None:
    (tmp_path / "book.txt").write_text(tiny_text(800))
    data = corpus(tmp_path, test=str(tmp_path / "book.txt"), stride=stride).build(plain, 0)
    ours, count = perplexity(model, data.test_dataloader())
    theirs, expected = hugging_face_perplexity(model, plain(tiny_text(800), return_tensors="pt")["input_ids"], 64, stride)
    assert count == expected
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_padding_changes_no_perplexity(tmp_path: Path, marked: Any, model: Any) -> None:
    batched = perplexity(model, corpus(tmp_path, eval_batch_size=8).build(marked, 0).test_dataloader())
    single = perplexity(model, corpus(tmp_path, eval_batch_size=1).build(marked, 0).test_dataloader())
    assert batched[1] == single[1]
    assert batched[0] == pytest.approx(single[0], rel=1e-5)


def test_batches_are_padded_on_the_right_and_labels_are_the_tokens_themselves(tmp_path: Path, marked: Any) -> None:
    data = corpus(tmp_path, context=128, eval_batch_size=5).build(marked, 0)
    for inputs, labels in data.test_dataloader():
        ids = inputs["input_ids"]
        assert ids.dtype == labels.dtype == torch.int64 and ids.shape == labels.shape
        assert bool((labels[:, 0] == IGNORED).all())
        assert bool((ids[labels != IGNORED] == labels[labels != IGNORED]).all())
        padding = (ids == marked.pad_token_id).cumsum(1) > 0
        assert bool((labels[padding] == IGNORED).all())


def test_bos_replaces_the_first_token_of_windows_inside_a_document_where_that_is_asked() -> None:
    data = Windows(numbers(10), [Window(0, *w) for w in windows(10, 4, 2)], bos=77)
    assert [item.ids.tolist() for item in data.__getitems__([0, 1, 3])] == [[0, 1, 2, 3], [77, 3, 4, 5], [77, 7, 8, 9]]
    assert [item.is_scored.tolist() for item in data.__getitems__([0, 1])] == [[False, True, True, True], [False, False, True, True]]


def test_long_documents_are_cut_where_that_is_asked_and_counted(tmp_path: Path, marked: Any) -> None:
    data = corpus(tmp_path, long_documents="cut").build(marked, 0)
    assert data.counts["test"]["sequences"] == 5
    assert data.counts["test"]["scored_tokens"] == 5 * 63
    assert any("5 documents of data.test=" in n and "first 64 tokens only" in n for n in data.notes)


def test_eval_tokens_stops_inside_a_document(tmp_path: Path, marked: Any) -> None:
    counts = corpus(tmp_path, eval_tokens=150).build(marked, 0).counts
    assert counts["test"]["tokens"] == counts["validation"]["tokens"] == 150


def test_documents_of_one_token_are_not_scored_and_counted(tmp_path: Path, plain: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "hello world"}\n')
    data = corpus(tmp_path, test=str(tmp_path / "a.jsonl")).build(plain, 0)
    assert data.counts["test"]["documents"] == 1
    assert any("1 documents of data.test=" in n and "fewer than two tokens" in n for n in data.notes)


# --- packing ------------------------------------------------------------------------------------------------------------------


def stream_of(data: LanguageDataModule) -> list[int]:
    return [i for item in data._train.__getitems__(list(range(len(data._train)))) for i in item.ids.tolist()]


@pytest.mark.parametrize(("which", "between"), [("marked", []), ("plain", [2])])
def test_documents_are_laid_end_to_end_with_what_the_tokenizer_wants(
    tmp_path: Path, request: pytest.FixtureRequest, which: str, between: list[int]
) -> None:
    tokenizer = request.getfixturevalue(which)
    data = corpus(tmp_path, validation=stories(tmp_path / "v.jsonl", 3, name="validated")).build(tokenizer, 0)
    rows = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    expected = [i for text in rows for i in [*tokenizer(text)["input_ids"], *between]]
    assert stream_of(data) == expected[: len(expected) // 64 * 64]
    counts = data.counts["train"]
    assert counts == {"documents": 30, "tokens": len(expected), "sequences": len(expected) // 64, "scored_tokens": len(expected) // 64 * 63}


@pytest.mark.usefixtures("one_thread")
def test_masked_documents_give_the_logits_they_have_alone(tmp_path: Path, marked: Any, model: Any) -> None:
    data = corpus(tmp_path, train=stories(tmp_path / "short.jsonl", 40, -30), mask_documents=True, validation=str(tmp_path / "test.jsonl"))
    data.test = stories(tmp_path / "t.jsonl", 2, name="other")
    inputs, labels = next(iter(data.build(marked, 0).train_dataloader()))
    starts = inputs["position_ids"] == 0
    assert int(starts.sum()) > len(starts)
    assert bool((labels[starts] == IGNORED).all())
    assert bool((labels[~starts] != IGNORED).all())
    with torch.no_grad():
        together = model(**inputs, use_cache=False).logits
        for row, ids, begins in zip(together, inputs["input_ids"], starts, strict=True):
            edges = [*begins.nonzero().flatten().tolist(), len(ids)]
            for low, high in pairwise(edges):
                torch.testing.assert_close(model(ids[None, low:high]).logits[0], row[low:high], rtol=1e-4, atol=1e-4)


def test_calibration_is_spread_over_the_training_text_and_fewer_than_asked_are_noted(tmp_path: Path, plain: Any) -> None:
    data = corpus(tmp_path, calibration_sequences=4, mask_documents=True).build(plain, 0)
    begins = [c.begin for c in data._calibration.cuts]
    assert begins[0] == 0 and begins[-1] == data._train.cuts[-1].begin and len(set(begins)) == 4
    assert any("calibration has 4 sequences of 64 tokens" in n and "128 or more are advised" in n for n in data.calibration_notes)
    assert not any("calibration" in n for n in data.notes)  # a run that does not calibrate does not hear of it
    assert all(set(inputs) == {"input_ids"} for inputs, _ in data.calibration_dataloader())
    many = corpus(tmp_path, calibration_sequences=10_000).build(plain, 0)
    assert any(f"calibration has {len(many._train)} sequences" in n and "the text has no more" in n for n in many.calibration_notes)
    assert data.example_inputs(6)["input_ids"].shape == (6, 64)


def test_a_calibration_file_is_what_is_calibrated_on(tmp_path: Path, plain: Any) -> None:
    (tmp_path / "c.txt").write_text("calibrated on this. " * 200)
    data = corpus(tmp_path, calibration=str(tmp_path / "c.txt")).build(plain, 0)
    text = plain.decode(next(iter(data.calibration_dataloader()))[0]["input_ids"][0])
    assert "calibrated on this" in text
    assert len(data._calibration) == 8


def test_a_resumed_run_sees_the_sequences_of_an_uninterrupted_one(tmp_path: Path, plain: Any) -> None:
    def data() -> LanguageDataModule:
        return corpus(tmp_path, train_tokens=64 * 24).build(plain, 3)

    whole, first, second = Recorder(), Recorder(), Recorder()
    fit(whole, data(), [], max_epochs=2)  # type: ignore[arg-type]
    save = SaveAt(tmp_path / "a.ckpt", "batch", 1, 2)
    fit(first, data(), [save], max_epochs=2)  # type: ignore[arg-type]
    fit(second, data(), [], tmp_path / "a.ckpt", max_epochs=2)  # type: ignore[arg-type]
    assert (save.count, len(whole.seen)) == (9, 12)
    assert first.seen[: save.count] + second.seen == whole.seen


# --- token ids ----------------------------------------------------------------------------------------------------------------


def test_what_stands_around_a_document_follows_the_tokenizer_or_the_options(plain: Any, marked: Any) -> None:
    def around(tokenizer: Any, *options: str) -> tuple[Any, ...]:
        marks = find_marks(tokenizer, *options)
        return marks.before, marks.after, marks.between

    assert around(plain) == ((), (), (2,))
    assert around(marked) == ((1,), (), ())
    assert around(plain, "true") == ((1,), (), ())
    assert around(marked, "false") == ((), (), (2,))
    assert around(marked, "auto", "true") == ((1,), (2,), ())
    assert around(plain, "auto", "false") == ((), (), ())


def test_a_document_that_begins_with_bos_gets_no_second_one(marked: Any) -> None:
    [ids] = tokenize(["<|im_start|>hello"], marked, find_marks(marked))
    assert ids.tolist()[:1] == [1] and ids.tolist().count(1) == 1


def test_a_tokenizer_without_bos_cannot_be_asked_for_one(plain: Any) -> None:
    without = tiny_tokenizer()
    without.bos_token = None
    with pytest.raises(ValueError, match=r"data.add_bos=true, but the tokenizer has no BOS token. Set data.add_bos=auto"):
        find_marks(without, "true")


def sentencepiece_like() -> Any:
    """BPE over the whole text as one word, spaces as ▁, bytes where there is no token: as Llama 2's tokenizer.json is."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # only to learn the merges
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trained.train_from_iterator(
        tiny_text().splitlines(), trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False, limit_alphabet=60)
    )
    trained.pre_tokenizer = None  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


NASTY = (
    "a\n\n\n  b\t\tc 😀😀🏳️‍🌈 naïve — 東京都は日本の首都です。 \r\n12345678901234567890 "
    + "    def f(x):\n        return 1\n" * 3
    + "é" * 7
    + "\u3000"
)


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece_like])
@pytest.mark.parametrize("piece", [tokens.PIECE, 3000])
def test_long_texts_in_pieces_have_the_ids_of_one_go(monkeypatch: pytest.MonkeyPatch, make: Any, piece: int) -> None:
    tokenizer = make()
    text = tiny_text(100_000) + NASTY * 200
    monkeypatch.setattr(tokens, "PIECE", piece)
    calls: list[int] = []
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = tokens._long_text(text, tokenizer, None, calls.append)
    assert ids.tolist() == whole
    assert sum(calls) == len(text) and len(calls) > 5


def test_a_text_without_a_place_to_join_pieces_at_is_tokenized_in_one_go(plain: Any) -> None:
    text = "a" * 45_000
    assert tokens._long_text(text, plain, None, lambda _: None).tolist() == plain(text, verbose=False)["input_ids"]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from(["word ", "\n", "a", " ", "Ünï ", "😀", "12", "def f():\n"]), min_size=400, max_size=900),
    st.integers(200, 600),
)
def test_pieces_of_any_text_have_the_ids_of_one_go(parts: list[str], piece: int) -> None:
    text, tokenizer = "".join(parts), tiny_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE", piece)
        patch.setattr(tokens, "MARGIN", 100)
        ids = tokens._long_text(text, tokenizer, None, lambda _: None)
    assert ids.tolist() == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_a_limit_takes_the_first_tokens(plain: Any) -> None:
    text = tiny_text(90_000)
    whole = plain(text, verbose=False)["input_ids"]
    [ids] = tokenize([text], plain, find_marks(plain), limit=500)
    assert ids.tolist() == whole[:500]
    some = tokenize([text[:3000]] * 10, plain, find_marks(plain), limit=2500)
    assert sum(map(len, some)) == 2500


def grown(**options: Any) -> Any:
    """A tokenizer that has a token more than the model has rows for, as after add_tokens alone."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new|>"], **options)
    assert tokenizer.convert_tokens_to_ids("<|new|>") == 512
    return tokenizer


@pytest.mark.parametrize(
    ("split", "name"), [("train", "training"), ("test", "test"), ("validation", "validation"), ("calibration", "calibration")]
)
def test_a_token_that_the_model_has_no_row_for_is_named(tmp_path: Path, model: Any, split: str, name: str) -> None:
    path = stories(tmp_path / "n.jsonl", 6, 20, "<|new|> in")
    data = corpus(tmp_path, **{split: path}).build(grown(), 0)
    remedy = r"has 512 rows, for ids up to 511 \(1 tokens.*resize_token_embeddings\(513\).*set model.path"
    with pytest.raises(ValueError, match=rf"the {name} text has the token '<\|new\|>', id 512, and the model's embedding {remedy}"):
        data.check(model)


def test_a_run_refuses_such_a_token_when_it_loads(tmp_path: Path) -> None:
    def run() -> None:
        config = SimpleNamespace(model=CausalLm(str(folder)), data=corpus(tmp_path), seed=0, optimize=None, baseline=True)
        load(config, Record(tmp_path, "none", 0, {}), tmp_path)

    folder = tiny_language_model(tmp_path / "lm")
    grown().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"'<\|new\|>', id 512, is the first without a row.*model.resize_token_embeddings\(513\)"):
        run()
    tiny_tokenizer().save_pretrained(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["."] = 700  # a hole: as many tokens as before, one of them with a larger id
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match=r"the training text has the token '.', id 700, and the model's embedding has 512 rows"):
        run()


def test_a_token_that_no_text_has_is_no_error_not_even_as_padding(tmp_path: Path, model: Any) -> None:
    tokenizer = grown()
    tokenizer.pad_token = "<|new|>"
    data = corpus(tmp_path, eval_batch_size=5).build(tokenizer, 0)
    data.check(model)
    batches = list(data.test_dataloader())
    assert any(bool((labels[:, -1] == IGNORED).any()) for _, labels in batches), "nothing is padded: the test shows nothing"
    assert perplexity(model, batches) == perplexity(model, corpus(tmp_path, eval_batch_size=5).build(tiny_tokenizer(), 0).test_dataloader())


# --- chats --------------------------------------------------------------------------------------------------------------------


def chats(path: Path, count: int) -> str:
    rows = [[{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i} " * 20}] for i in range(count)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


def test_messages_go_through_the_chat_template_without_another_bos(tmp_path: Path, marked: Any) -> None:
    data = TextCorpus(train=chats(tmp_path / "c.jsonl", 40), chat_template=True, context=64, calibration_sequences=2).build(marked, 0)
    stream = marked.decode(stream_of(data))
    assert stream.startswith("<|im_start|>user\nquestion ")
    assert "<|im_end|>\n<|im_start|>assistant\nanswer " in stream
    assert "<|im_start|><|im_start|>" not in stream and "<|im_end|><|im_end|>" not in stream


def test_a_text_is_the_message_of_a_user(tmp_path: Path, plain: Any) -> None:
    data = corpus(tmp_path, chat_template=True).build(plain, 0)
    assert plain.decode(stream_of(data)[:20]).startswith("<|im_start|>user\nstory ")


def test_a_tokenizer_without_chat_template_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"the model's tokenizer has no chat template. Set data.chat_template=false"):
        corpus(tmp_path, chat_template=True).build(tokenizer, 0)


def test_a_template_that_refuses_says_so(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"refuses a conversation \(roles must alternate\); its roles are user, assistant"):
        TextCorpus(train=chats(tmp_path / "c.jsonl", 40), chat_template=True, context=64).build(tokenizer, 0)


# --- documents and splits -----------------------------------------------------------------------------------------------------


def texts(corpus: TextCorpus) -> tuple[list[Any], list[Any], list[Any], list[str]]:
    train, validation, test, _, notes = corpus.load()
    return train.items, validation.items, test.items, notes


def test_the_sample_text_has_three_splits_of_disjoint_topics() -> None:
    train, validation, test, notes = texts(TextCorpus())
    assert sorted(train + validation + test) == sorted(sample_documents().items)
    assert not set(test) & {*train, *validation}
    total = sum(map(len, sample_documents().items))
    assert 0.08 * total < sum(map(len, test)) <= 0.1 * total
    assert len(notes) == 1 and "pydoc_data.topics of Python 3." in notes[0]
    assert texts(TextCorpus())[2] == test
    assert texts(TextCorpus(split_seed=1))[2] != test


def test_one_text_is_cut_at_the_end_of_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {i} of the only text\n" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    [train], [validation], [test], _ = texts(TextCorpus(train=str(tmp_path / "a.txt")))
    assert train + validation + test == text
    assert train.endswith("\n") and validation.endswith("\n")
    assert 0.1 * len(text) <= len(test) < 0.11 * len(text)


@given(st.lists(st.integers(1, 500), min_size=2, max_size=40), st.floats(0.05, 0.5), st.integers(0, 5))
def test_a_cut_split_has_about_its_share_and_loses_nothing(sizes: list[int], fraction: float, seed: int) -> None:
    items = [chr(97 + i % 26) * n for i, n in enumerate(sizes)]
    left, taken = cut(Documents("a", list(items)), "test", fraction, seed)
    assert sorted(map(str, left.items + taken.items)) == sorted(items)
    assert left.items and taken.items
    assert len(taken) == 1 or sum(map(len, taken.items)) <= fraction * sum(sizes)


def test_plain_text_keeps_every_character_and_may_hold_several_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo \x85 \n\n<|endoftext|>\nthree\n\n<|endoftext|>\n".encode())
    assert TextCorpus(test=str(path)).load()[2].items == ["one\r\ntwo \x85 \n\n<|endoftext|>\nthree\n\n<|endoftext|>\n"]
    split = TextCorpus(test=str(path), document_separator="<|endoftext|>").load()
    assert split[2].items == ["one\r\ntwo \x85 ", "three"]
    assert any("1 of 3 documents" in n for n in split[4])
    assert TextCorpus(test=str(path), document_separator=r"\n\n").load()[2].items[1] == "<|endoftext|>\nthree"


def test_rows_are_documents_or_lines_of_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("", " = A = \n", "", "text \n")))
    read = TextCorpus(test=str(path)).load()
    assert read[2].items == [" = A = \n", "text \n"]
    assert any("2 of 4 documents" in n and r"data.join='\n\n'" in n for n in read[4])
    assert TextCorpus(test=str(path), join=r"\n\n").load()[2].items == ["\n\n = A = \n\n\n\n\ntext \n"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_of_other_kinds_are_read(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text('id,body\n1,"one, two"\n2,three\n')
    else:
        pq.write_table(pa.table({"id": [1, 2], "body": ["one, two", "three"]}), path)
    assert TextCorpus(test=str(path), text_column="body").load()[2].items == ["one, two", "three"]


def test_copies_of_test_documents_leave_the_other_splits(tmp_path: Path) -> None:
    train, test = stories(tmp_path / "a.jsonl", 30), stories(tmp_path / "b.jsonl", 4)
    splits = texts(TextCorpus(train=train, test=test, calibration=train))
    assert not set(splits[2]) & {*splits[0], *splits[1]}
    assert sum("4 documents of data." in n and "were dropped" in n for n in splits[3]) == 2


def test_a_test_file_alone_is_measured_and_the_rest_is_the_sample_text(tmp_path: Path) -> None:
    train, _, test, notes = texts(TextCorpus(test=stories(tmp_path / "b.jsonl", 4)))
    assert len(test) == 4 and set(train) <= set(sample_documents().items)
    assert "the training text is pydoc_data.topics" in notes[0]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"", {}, "data.test=.*a.txt holds no text"),
        ("a.txt", b" \n ", {}, "holds no text"),
        ("a.txt", b"sch\xf6n", {}, "is not UTF-8 .*at byte 3"),
        ("a.txt", b"a", {}, "has no document of two tokens or more"),
        ("a.jsonl", b'{"text": "sch\xf6n"}\n', {}, "cannot be read as jsonl"),
        ("a.jsonl", b'{"body": "a text", "n": 1}\n', {}, "has no column 'text'; its columns are body, n. Set data.text_column=body"),
        ("a.jsonl", b'{"text": 3}\n', {}, "holds something else than a text: row 0 is '3'"),
        ("a.jsonl", b'{"text": "a b"}\n{"text": null}\n', {}, "row 1 is 'None'"),
        ("a.jsonl", b'{"text": "a b"}\n{"te', {}, "cannot be read as jsonl"),
        ("a.jsonl", b'{"n": 1}\n', {"chat_template": True}, "has neither a column 'messages' nor 'text'; its columns are n"),
        ("a.jsonl", b'{"messages": ["a"]}\n', {"chat_template": True}, r'something else than a list of \{"role": …'),
        ("a.docx", b"x", {}, "ends in '.docx'; valid: .txt, .text, .raw, .md, .tokens, .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_unusable_files_say_what_to_type(
    tmp_path: Path, plain: Any, name: str, content: bytes, options: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        corpus(tmp_path, test=str(tmp_path / name), **options).build(plain, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "data.context is 1; it must be at least 2"),
        ({"limit": 0}, "data.limit is 0"),
        ({"add_bos": "yes"}, "data.add_bos is 'yes'; valid: auto, true, false. Set data.add_bos=auto"),
        ({"long_documents": "drop"}, "valid: windows, cut"),
        ({"test_fraction": 1.0}, "must lie between 0 and 1"),
        ({"streaming": True, "name": "allenai/c4"}, "Set data.limit=1000"),
        ({"name": "a/b", "train": "c.txt"}, "are both given"),
        ({"document_separator": ""}, "data.document_separator is empty"),
    ],
)
def test_bad_options_say_what_to_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextCorpus(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 65}, "data.stride is 65; it is from 1 to the context, 64 tokens.*Set data.stride=32"),
        ({"context": 200}, "data.context=200 is longer than the model reads, 128 tokens. Set data.context=128"),
        ({"train": "short.txt"}, "data.train=.*short.txt has 33 tokens, too little for one sequence of 64"),
    ],
)
def test_lengths_that_do_not_fit_say_what_to_type(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "short.txt").write_text("a few words here, and there\n" * 2)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 128
    if "train" in options:
        options = {"train": str(tmp_path / "short.txt"), "validation": stories(tmp_path / "v.jsonl", 3, name="other")}
    with pytest.raises(ValueError, match=message):
        corpus(tmp_path, **options).build(tokenizer, 0)


def test_the_context_is_512_or_what_the_model_reads(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert corpus(tmp_path, context=None).build(tokenizer, 0).context == 512
    tokenizer.model_max_length = 128
    data = corpus(tmp_path, context=None).build(tokenizer, 0)
    assert (data.context, data.stride) == (128, 64)
    with pytest.raises(ValueError, match=r"data.context=128 is longer than the model reads, 100 tokens"):
        data.require_positions(100)


def test_a_model_that_reads_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data=text gives texts, and the model reads images. Set model=causal_lm"):
        TextCorpus().build(ImageSpec(), seed=0)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"data.train=nowhere.txt is not a file .*data.train=FILE"):
        TextCorpus(train="nowhere.txt").load()


def test_yaml_booleans_are_understood() -> None:
    assert TextCorpus(add_bos=True).add_bos == "true"  # type: ignore[arg-type]


# --- the hub ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_a_corpus_of_the_hub_is_read_by_its_splits(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    import datasets

    def split(name: str, count: int) -> Any:
        rows = datasets.Dataset.from_dict({"text": [f"{name} line {i}" for i in range(count)], "id": list(range(count))})
        return rows.to_iterable_dataset() if streaming else rows

    def load_dataset(*args: Any, streaming: bool, **_: Any) -> Any:
        assert args == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        kind = datasets.IterableDatasetDict if streaming else datasets.DatasetDict
        return kind(train=split("train", 40), validation=split("validation", 5), test=split("test", 6))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options: dict[str, Any] = {"name": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "streaming": streaming, "limit": 3}
    train, validation, test, notes = texts(TextCorpus(**options))
    assert (len(train), len(validation), len(test)) == (3, 3, 3)
    assert train[0] == "train line 0" and not notes
    assert texts(TextCorpus(**options, join=r"\n\n"))[2] == ["test line 0\n\ntest line 1\n\ntest line 2"]
    with pytest.raises(ValueError, match="the train split of Salesforce/wikitext has no column 'body'"):
        TextCorpus(**options, text_column="body").load()


def test_without_a_network_the_local_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(OSError, match=r"could not be downloaded.*data=text data.train=FILE data.test=FILE"):
        TextCorpus(name="allenai/c4").load()


# --- real data ----------------------------------------------------------------------------------------------------------------


def test_the_stories_have_the_tokens_that_are_known_of_them() -> None:
    folder = shared_data()
    if not (folder / "stories15M").is_dir():
        pytest.skip("stories15M is not here")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "stories15M")
    files: dict[str, Any] = {"train": str(folder / "tinystories/calibration.txt"), "test": str(folder / "tinystories/eval.jsonl")}
    whole = TextCorpus(**files).build(tokenizer, 0)
    assert (whole.context, whole.marks.before) == (256, (1,))
    assert whole.counts["test"] == {"documents": 60, "tokens": 11_846, "sequences": 68, "scored_tokens": 11_786}
    cut_off = TextCorpus(**files, long_documents="cut").build(tokenizer, 0)
    assert cut_off.counts["test"]["scored_tokens"] == 11_434


@pytest.mark.slow
def test_the_stories_have_the_perplexity_that_is_known_of_them() -> None:
    folder = shared_data()
    if not (folder / "stories15M").is_dir():
        pytest.skip("stories15M is not here")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "stories15M")
    files: dict[str, Any] = {"train": str(folder / "tinystories/calibration.txt"), "test": str(folder / "tinystories/eval.jsonl")}
    data = TextCorpus(**files, long_documents="cut").build(tokenizer, 0)
    value, count = perplexity(AutoModelForCausalLM.from_pretrained(folder / "stories15M").eval(), data.test_dataloader())
    assert count == 11_434
    assert value == pytest.approx(3.026, abs=5e-4)
