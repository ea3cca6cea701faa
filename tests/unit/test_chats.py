"""Conversations: which tokens the assistant says, for templates of many families, in packed sequences and evaluation windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qtrain.chats import Chats, tokenize_chats
from qtrain.data.text import TextCorpus
from qtrain.language import IGNORED, LanguageDataModule
from qtrain.language_task import TASK
from qtrain.tokens import find_marks
from tests.tiny_lm import CHAT_TEMPLATE, tiny_language_model, tiny_tokenizer

# What models' own templates do, in our words.

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|stop|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|stop|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'assistant') != (loop.index0 % 2 == 1) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHAT_TEMPLATE
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
)
UNENDED = MARKED.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}")
TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + '(' + call.function.arguments | tojson + ')</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = CHAT_TEMPLATE.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")

TOKENS = ["<|head|>", "<|stop|>", "<|eot|>", "<start>", "<end>", "<|user|>", "<|assistant|>", "<|system|>", "<call>", "</call>"]

SYSTEM = [{"role": "system", "content": "Answer in one word."}]
TURNS = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "It is Paris, on the Seine."},
    {"role": "user", "content": "It is Paris, on the Seine.\nAnd of Italy?"},
    {"role": "assistant", "content": "Rome!\n\nIn Latium."},
    {"role": "user", "content": "Thank you."},
]


def talking(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(TOKENS, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def said(tokenizer: Any, *conversations: Any, **options: Any) -> tuple[list[str], Chats]:
    """What the assistant says in all texts, in order, a stretch of tokens each."""
    chats = tokenize_chats(list(conversations), tokenizer, find_marks(tokenizer), **options)
    found = []
    for ids, is_said in chats.texts:
        edges = np.flatnonzero(np.diff(np.concatenate([[False], is_said, [False]]))).reshape(-1, 2)
        found += [tokenizer.decode(ids[low:high]) for low, high in edges]
    return found, chats


@pytest.mark.parametrize(
    ("template", "system", "before", "after"),
    [
        (CHAT_TEMPLATE, True, "", "<|im_end|>"),
        (DEFAULT_SYSTEM, True, "", "<|im_end|>"),
        (DEFAULT_SYSTEM, False, "", "<|im_end|>"),
        (LLAMA3, True, "", "<|eot|>"),
        (MISTRAL, False, " ", "<|im_end|>"),
        (GEMMA, False, "", "<end>"),
        (PHI3, True, "", "<end>"),
        (PLAIN, True, " ", "\n"),
        (MARKED, True, "", "<|im_end|>"),
    ],
    ids=["chatml", "default system", "own system", "llama 3", "mistral", "gemma", "phi 3", "plain", "marked"],
)
def test_what_the_assistant_says_is_its_words_and_the_token_that_ends_its_turn(
    template: str, system: bool, before: str, after: str
) -> None:
    tokenizer = talking(template)
    conversation = [*(SYSTEM if system else []), *TURNS]
    found, chats = said(tokenizer, conversation)
    assert found == [before + TURNS[1]["content"] + after, before + TURNS[3]["content"] + after]
    [(ids, _)] = chats.texts
    assert ids.tolist() == tokenizer(tokenizer.apply_chat_template(conversation, tokenize=False), add_special_tokens=False)["input_ids"]
    assert not chats.notes("here")


def test_every_kind_of_turn_is_told_apart_in_a_conversation_with_tools() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    conversation = [
        *SYSTEM,
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "22 degrees"},
        {"role": "assistant", "content": "It is warm."},
        {"role": "assistant", "content": "Take a hat."},
    ]
    found, chats = said(talking(TOOLS), conversation)
    assert found == ['<call>weather({"city": "Rome"})</call><|im_end|>', "It is warm.<|im_end|>", "Take a hat.<|im_end|>"]
    assert not chats.notes("here")


def test_a_turn_that_is_written_otherwise_later_is_a_text_of_its_own_after_the_prompt_that_a_model_gets() -> None:
    tokenizer = talking(QWEN3)
    thoughts = [{**m, "reasoning_content": "hm"} if m["role"] == "assistant" else m for m in TURNS[:4]]
    found, chats = said(tokenizer, thoughts)
    assert found == ["<think>\nhm\n</think>\n\n" + TURNS[i]["content"] + "<|im_end|>" for i in (1, 3)]
    texts = [tokenizer.decode(ids) for ids, _ in chats.texts]
    assert texts == [tokenizer.apply_chat_template(thoughts[:n], tokenize=False) for n in (2, 4)]
    assert texts[1].count("<think>") == 1  # the first turn's are gone, as a model would see it
    assert chats.split == 1 and "in 1 conversations of here" in chats.notes("here")[0]
    assert said(tokenizer, thoughts[:2])[1].split == 0


@pytest.mark.parametrize(
    ("template", "content"),
    [(R1, "Paris"), (CHAT_TEMPLATE, "\nParis")],
    ids=["a prompt that opens a thought", "a token that reaches over the end of the prompt"],
)
def test_a_turn_that_does_not_begin_with_its_prompt_is_not_scored_and_counted(template: str, content: str) -> None:
    tokenizer = talking(template)
    tokenizer.add_tokens(["\n\n"])  # as most large vocabularies have it
    found, chats = said(tokenizer, [TURNS[0], {"role": "assistant", "content": content}])
    assert found == [] and chats.lost == 1
    assert "1 turns of the assistant in here are not scored" in chats.notes("here")[0]


def test_an_opening_of_the_assistant_that_no_prompt_is_made_for_loses_that_turn_alone() -> None:
    opening = [{"role": "assistant", "content": "Welcome."}, *TURNS]
    found, chats = said(talking(DEFAULT_SYSTEM), opening)
    assert found == [TURNS[1]["content"] + "<|im_end|>", TURNS[3]["content"] + "<|im_end|>"]
    assert (chats.lost, chats.split, len(chats.texts)) == (1, 0, 1)
    assert said(talking(CHAT_TEMPLATE), opening)[0][0] == "Welcome.<|im_end|>"


def test_marks_of_the_template_that_leave_out_the_end_of_a_turn_are_noted() -> None:
    found, chats = said(talking(UNENDED), TURNS)
    assert found == [TURNS[1]["content"], TURNS[3]["content"]]
    assert "leave out '<|im_end|>'" in chats.notes("here")[0]


def test_conversations_in_which_the_assistant_says_nothing_are_left_out_and_counted() -> None:
    found, chats = said(talking(CHAT_TEMPLATE), TURNS[:1], "a text", TURNS[:2], SYSTEM)
    assert found == [TURNS[1]["content"] + "<|im_end|>"] and len(chats.texts) == 1
    assert chats.notes("here")[0].startswith("3 conversations of here have no turn of the assistant")


def test_bos_is_put_before_a_conversation_where_it_is_asked_for_and_never_scored() -> None:
    tokenizer = talking(CHAT_TEMPLATE)
    tokenizer.bos_token = "<|endoftext|>"
    chats = tokenize_chats([TURNS], tokenizer, find_marks(tokenizer, "true"))
    [(ids, is_said)] = chats.texts
    assert ids[0] == tokenizer.bos_token_id and ids[1] != ids[0] and len(ids) == len(is_said) and not is_said[0]
    assert tokenizer.decode(ids[is_said]).startswith(TURNS[1]["content"])


def test_a_limit_cuts_the_last_conversation() -> None:
    tokenizer = talking(CHAT_TEMPLATE)
    whole = said(tokenizer, TURNS, TURNS)[1].texts
    cut = said(tokenizer, TURNS, TURNS, limit=len(whole[0].ids) + 40)[1].texts
    assert [len(t.ids) for t in cut] == [len(t.is_said) for t in cut] == [len(whole[0].ids), 40]
    assert cut[1].ids.tolist() == whole[1].ids[:40].tolist() and cut[1].is_said.tolist() == whole[1].is_said[:40].tolist()


# --- training and evaluation ----------------------------------------------------------------------------------------------------


def file(path: Path, count: int, name: str = "train", words: int = 6) -> str:
    def conversation(i: int) -> list[dict[str, str]]:
        asked = [{"role": "user", "content": f"{name} {turn} of {i}: " + "how much is it? " * words} for turn in range(2)]
        told = [{"role": "assistant", "content": f"{name} answer {i} " + "five. " * (1 + i % 4)} for _ in range(2)]
        return [*SYSTEM, *(m for pair in zip(asked, told, strict=True) for m in pair)]

    path.write_text("".join(json.dumps({"messages": conversation(i)}) + "\n" for i in range(count)))
    return str(path)


def built(folder: Path, tokenizer: Any = None, **options: Any) -> LanguageDataModule:
    given = {"train": file(folder / "train.jsonl", 40), "test": file(folder / "test.jsonl", 6, "test"), "context": 64, **options}
    corpus = TextCorpus(**{"chat_template": True, "calibration_sequences": 4, "batch_size": 4, "eval_batch_size": 4, **given})
    return corpus.build(tokenizer or tiny_tokenizer(), 0)


def learnt(batches: Any) -> list[int]:
    """The scored tokens of all batches, in order."""
    return [int(i) for _, labels in batches for i in labels[labels != IGNORED]]


def in_order(data: LanguageDataModule) -> list[tuple[dict[str, Tensor], Tensor]]:
    return [data.collate(data._train.__getitems__([i])) for i in range(len(data._train))]


@pytest.mark.parametrize("mask", [False, True])
def test_packed_sequences_learn_the_assistants_part_and_nothing_else(tmp_path: Path, mask: bool) -> None:
    tokenizer = tiny_tokenizer()
    data = built(tmp_path, tokenizer, mask_documents=mask)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    answers = "".join(m["content"] + "<|im_end|>|" for row in rows for m in row if m["role"] == "assistant")
    stretches = []
    for inputs, labels in in_order(data):
        scored = (labels != IGNORED)[0]
        assert bool((labels[0, scored] == inputs["input_ids"][0, scored]).all()) and not bool(scored[0])
        assert ("position_ids" in inputs) == mask
        edges = np.flatnonzero(np.diff(np.concatenate([[False], scored.numpy(), [False]]))).reshape(-1, 2)
        stretches += [tokenizer.decode(inputs["input_ids"][0, low:high]) for low, high in edges]
    assert all(stretch in answers for stretch in stretches)
    assert sum(stretch + "|" in answers and stretch.endswith("<|im_end|>") for stretch in stretches) > 40
    counts = data.counts["train"]
    assert counts["scored_tokens"] == len(learnt(in_order(data))) < counts["tokens"] / 2
    assert any(f"{counts['scored_tokens']:,} of {sum(data._train.lengths):,} training tokens" in n for n in data.notes)


def test_all_tokens_are_learnt_where_that_is_asked_or_there_are_no_messages(tmp_path: Path) -> None:
    every = built(tmp_path, loss_on="all")
    assert every.counts["train"]["scored_tokens"] == 63 * len(every._train)
    assert not any("assistant" in n for n in every.notes)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i} " * 30}) + "\n" for i in range(40)))
    texts = built(tmp_path, train=str(tmp_path / "a.jsonl"))
    assert texts.counts["train"]["scored_tokens"] == 63 * len(texts._train)
    assert 0 < texts.counts["test"]["scored_tokens"] < texts.counts["test"]["tokens"] / 2  # its file has conversations


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("context", [64, 512])
def test_perplexity_is_that_of_the_assistants_part(tmp_path: Path, context: int) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_language_model(tmp_path / "lm", max_position_embeddings=512)).eval()
    tokenizer = tiny_tokenizer()
    data = built(tmp_path, tokenizer, context=context, stride=context // 2, train=file(tmp_path / "more.jsonl", 80, "more"))
    batches = list(data.test_dataloader())
    assert all(bool((labels[:, 1:] != IGNORED).any(1).all()) for _, labels in batches)
    outputs = TASK.predict(model, batches, "")
    conversations = [json.loads(line)["messages"] for line in Path(tmp_path / "test.jsonl").read_text().splitlines()]
    expected = [
        i for c in conversations for m in c if m["role"] == "assistant" for i in tokenizer(m["content"] + "<|im_end|>")["input_ids"]
    ]
    assert sorted(outputs.targets_S.tolist()) == sorted(expected)
    if context == 512:  # each conversation is one window: compare with the model's own loss
        total = 0.0
        for conversation in conversations:
            [ids], [mask] = (torch.tensor([v]) for v in _by_hand(tokenizer, conversation))
            labels = torch.where(mask.bool(), ids, IGNORED)[None]
            with torch.no_grad():
                total += float(model(ids[None], labels=labels).loss) * int(mask.sum())
        assert TASK.measure(outputs, batches)["loss"] == pytest.approx(total / len(expected), rel=1e-5)


def _by_hand(tokenizer: Any, conversation: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """ChatML, message by message: ids, and 1 where the assistant says them."""
    ids, mask = [], []
    for m in conversation:
        for text, is_said in ((f"<|im_start|>{m['role']}\n", 0), (m["content"] + "<|im_end|>", m["role"] == "assistant"), ("\n", 0)):
            part = tokenizer(text)["input_ids"]
            ids += part
            mask += [int(is_said)] * len(part)
    return ids, mask


def test_sequences_and_windows_with_nothing_to_learn_are_left_out_so_that_no_batch_is_without(tmp_path: Path) -> None:
    data = built(tmp_path, train=file(tmp_path / "long.jsonl", 30, "long", words=60), test=file(tmp_path / "t.jsonl", 4, "t", words=60))
    packed = sum(len(d) for d in data._train.documents) // 64
    assert len(data._train) < packed / 2
    assert any(f"{packed - len(data._train)} of {packed} sequences of data.train=" in n and "not trained on" in n for n in data.notes)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert all(bool((labels != IGNORED).any(1).all()) for _, labels in loader)
    calibrated = torch.cat([inputs["input_ids"] for inputs, _ in built(tmp_path, calibration_sequences=10_000).calibration_dataloader()])
    assert len(calibrated) * 64 > 0.9 * sum(map(len, built(tmp_path)._train.documents))  # all that a model will read


@pytest.mark.parametrize("split", ["train", "test", "validation"])
def test_a_loss_on_nothing_is_an_error_that_names_the_split(tmp_path: Path, split: str) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"asked {i} " * 30}]}) + "\n" for i in range(30)))
    with pytest.raises(ValueError, match=rf"data.{split}=.*users.jsonl: the loss is on what the assistant says.*set data.loss_on=all"):
        built(tmp_path, **{split: str(path)})
    assert built(tmp_path, loss_on="all", **{split: str(path)}).counts[split]["scored_tokens"] > 100


def test_sequences_that_leave_every_answer_out_are_a_loss_on_nothing(tmp_path: Path) -> None:
    train, validation = file(tmp_path / "long.jsonl", 2, "long", words=20), file(tmp_path / "v.jsonl", 3, "v")
    first = int(_by_hand(tiny_tokenizer(), json.loads(Path(train).read_text().splitlines()[0])["messages"])[1].index(1))
    assert 0 < first % 64 < 60
    with pytest.raises(ValueError, match=r"no sequence of 64 tokens \(data.context\) has one that the assistant says"):
        built(tmp_path, train=train, validation=validation, train_tokens=first + 2)


def test_texts_alone_cannot_have_the_loss_on_an_assistant() -> None:
    with pytest.raises(ValueError, match=r"data.loss_on=assistant needs conversations.*Set data.chat_template=true"):
        TextCorpus(loss_on="assistant")
    with pytest.raises(ValueError, match=r"data.loss_on is 'users'; valid: auto, all, assistant"):
        TextCorpus(loss_on="users")
