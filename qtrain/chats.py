"""Which tokens of a conversation the assistant says: those that fine-tuning learns, and that perplexity is measured on.

What a model has to say itself is what its chat template does not hand to it: the template makes the prompt of a turn (the conversation
so far and, with `add_generation_prompt`, the beginning of the answer), and the rest up to the token that ends the turn is the answer.
The same words in a user's mouth are not learnt, nor is a system prompt, or what a tool gave.

    <|im_start|>user\\nhow much?<|im_end|>\\n<|im_start|>assistant\\nfive<|im_end|>\\n<|im_start|>user\\n…
    ............................................................ xxxxxxxxxxxxxx .......................     x learnt

Two ways to find them. A template with `{% generation %}` marks them itself (transformers, `return_assistant_tokens_mask`). Else the
answer to messages[:i] is what render(messages[: i + 1]) has after render(messages[:i], add_generation_prompt=True), in tokens: the
prompt's have to be the first of the conversation's, and these the first of the whole conversation's but for tokens that close it (Phi's
template writes EOS after the last turn). It then ends behind the last special token that only white space follows.

Templates that write an earlier turn otherwise once later ones follow (Qwen3 leaves its thoughts out) make no such beginning. Such a turn
becomes a text of its own, render(messages[: i + 1]), after the prompt that a model would get for it. Where not even that begins with the
prompt (DeepSeek-R1's opens a thought that its template cuts out of answers; a token may also reach over the end of the prompt), it is not
known what the assistant says, and the turn is not learnt. Both are counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qtrain.console import progress
from qtrain.documents import Document, Messages
from qtrain.tokens import Ids, Marks, encode, render, require_template

ASSISTANT = "assistant"
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MANY = 2000
"""Conversations from which tokenizing takes seconds and shows its progress."""


class Marked(NamedTuple):
    """A text, and which of its tokens the assistant says."""

    ids: Ids
    is_said: NDArray[np.bool_]


@dataclass
class Chats:
    """Conversations as token ids, and what did not go as it should."""

    texts: list[Marked] = field(default_factory=list)
    silent: int = 0
    """Conversations without a turn of the assistant."""
    split: int = 0
    """Conversations of which some turn is a text of its own."""
    lost: int = 0
    """Turns of the assistant that are not learnt."""
    unended: str = ""
    """The token that ends a turn, where the template's own marks leave it out."""

    def notes(self, where: str) -> list[str]:
        """What a user should know, one sentence each."""
        found = []
        if self.silent:
            found.append(
                f"{self.silent} conversations of {where} have no turn of the assistant and were left out (data.loss_on=all keeps them)"
            )
        if self.split:
            found.append(
                f"the chat template writes earlier turns otherwise once later ones follow, in {self.split} conversations of {where}: "
                "such a turn is a text of its own, after the prompt that a model would get for it"
            )
        if self.lost:
            found.append(
                f"{self.lost} turns of the assistant in {where} are not scored: the prompt that the chat template makes for them is not "
                "what the conversation begins with, so that what the assistant says cannot be told (data.loss_on=all scores everything)"
            )
        if self.unended:
            found.append(
                f"the chat template's {{% generation %}} marks leave out {self.unended!r}, which follows a turn in {where}: a model does "
                "not learn to end its turn from them"
            )
        return found


def tokenize_chats(documents: Sequence[Document], tokenizer: Any, marks: Marks, limit: int | None = None) -> Chats:
    """Token ids of each conversation, and which of them the assistant says.

    Args:
        documents: messages; a text is the message of a user, to which no assistant answers.
        limit: tokens in all, at which to stop; the last text is cut to it.

    Raises:
        ValueError: if the tokenizer has no chat template, or the template refuses a conversation.
    """
    require_template(tokenizer)
    reader, chats, count = _Reader(tokenizer), Chats(), 0
    before = np.asarray(marks.chat_before, np.int32)
    shown = f"finding what the assistant says in {len(documents):,} conversations" if len(documents) > _MANY else ""
    for document in progress(documents, shown):
        for text in reader.read(document, chats):
            begun = tuple(text.ids[: len(before)]) == marks.chat_before
            ids = text.ids if begun else np.concatenate([before, text.ids])
            room = len(ids) if limit is None else limit - count
            is_said = np.concatenate([np.zeros(len(ids) - len(text.ids), bool), text.is_said])
            chats.texts.append(Marked(ids[:room], is_said[:room]))
            count += len(chats.texts[-1].ids)
            if limit is not None and count >= limit:
                return chats
    return chats


class _Reader:
    """Conversations to tokens, for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.marks_itself = bool(getattr(tokenizer, "is_fast", False)) and _marks_itself(tokenizer)
        self.added = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
        self._blank: dict[int, bool] = {}

    def read(self, document: Document, chats: Chats) -> list[Marked]:
        """The texts of one conversation; counts what goes wrong in ``chats``."""
        turns = [] if isinstance(document, str) else [i for i, m in enumerate(document) if m["role"] == ASSISTANT]
        if not turns or isinstance(document, str):
            render(self.tokenizer, document)  # a conversation that the template refuses is an error, whoever speaks in it
            chats.silent += 1
            return []
        marked = self._by_marks(document, len(turns), chats) if self.marks_itself else None
        return [marked] if marked is not None else self._by_prompts(document, turns, chats)

    def _by_marks(self, messages: Messages, turns: int, chats: Chats) -> Marked | None:
        """By the template's own marks; None where transformers does not find all turns by them."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "tokenizer_kwargs": {"verbose": False}}
        found = render(self.tokenizer, messages, **options)
        ids, is_said = np.asarray(found["input_ids"], np.int32), np.asarray(found["assistant_masks"], bool)
        ends = np.flatnonzero(is_said & ~np.append(is_said[1:], False))
        if len(ends) < turns:
            return None
        for end in ends:
            if end + 1 < len(ids) and self._is_special(ids[end + 1]) and not self._is_special(ids[end]):
                chats.unended = self.tokenizer.decode([ids[end + 1]])
        return Marked(ids, is_said)

    def _by_prompts(self, messages: Messages, turns: list[int], chats: Chats) -> list[Marked]:
        """By what the template gives a model before each turn."""
        texts = [render(self.tokenizer, messages)]
        for i in turns:
            texts += [_prompt(self.tokenizer, messages[:i]), render(self.tokenizer, messages[: i + 1])]
        whole, *parts = encode(texts, self.tokenizer)
        spans, own = [], []
        for prompt, said in zip(parts[::2], parts[1::2], strict=True):
            if span := self._span(prompt, said, whole):
                spans.append(span)
            elif span := self._span(prompt, said, said):
                own.append(_marked(said, [span]))
        chats.lost += len(turns) - len(spans) - len(own)
        chats.split += bool(own)
        return own + ([_marked(whole, spans)] if spans else [])

    def _span(self, prompt: Ids, said: Ids, whole: Ids) -> tuple[int, int] | None:
        """First token of the answer, and the one after its last, in ``whole``; None if the prompt and the answer do not begin it."""
        start, same = len(prompt), _shared(said, whole)
        if not start or same < start or _shared(prompt, whole) < start or not all(self._closes(i) for i in said[same:]):
            return None
        end = same
        while end > start and self._is_blank(whole[end - 1]):
            end -= 1
        end = end if end > start and self._is_special(whole[end - 1]) else same
        return (start, end) if end > start else None

    def _closes(self, token: int) -> bool:
        return self._is_special(token) or self._is_blank(token)

    def _is_special(self, token: int) -> bool:
        return int(token) in self.added and not self._is_blank(token)

    def _is_blank(self, token: int) -> bool:
        token = int(token)
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token]).strip()
        return self._blank[token]


def _marks_itself(tokenizer: Any) -> bool:
    """Whether the template has the tag that transformers looks for."""
    template = tokenizer.chat_template
    return bool(_MARK.search(template if isinstance(template, str) else template.get("default", "")))


def _prompt(tokenizer: Any, messages: Messages) -> str:
    """What a model is given to answer ``messages``; empty if the template cannot say."""
    try:  # in a list of conversations, since transformers takes an empty one for none
        return str(tokenizer.apply_chat_template([messages], tokenize=False, add_generation_prompt=True)[0])
    except Exception:  # no message before the assistant's, or two of its turns in a row, which some templates refuse
        return ""


def _shared(a: Ids, b: Ids) -> int:
    """Tokens that both begin with."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _marked(ids: Ids, spans: list[tuple[int, int]]) -> Marked:
    is_said = np.zeros(len(ids), bool)
    for start, end in spans:
        is_said[start:end] = True
    return Marked(ids, is_said)
