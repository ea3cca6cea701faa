"""Text to token ids for language models: what stands before and after a document, and long texts in pieces.

Before and after. Most tokenizers of the Llama and Gemma families put a BOS token before a text, those of GPT-2, Qwen and SmolLM2
nothing; llama.cpp calls it `add_bos_token`. A model that was trained with it is much worse without it, and the other way round. What a
tokenizer does is found by asking it (attributes of the same name are not reliable), unless an option says otherwise; a text that
begins with BOS already gets no second one. Chat templates write their own.

Pieces. A tokenizer says nothing while it works on a long text, and works on one core. So a text beyond `PIECE` characters is tokenized in
pieces that overlap by 2 * `MARGIN` characters. They are joined where both have a token boundary, nearest to the middle of the overlap,
and where the `RUN` tokens before and after it agree in id and place. What a piece does at its ends (a space put before it, half a word)
is then outside of what is taken, and the ids are those of the whole text in one go: a merge of BPE, a lattice of Unigram or a
regular expression that looked further than `MARGIN` would have to disagree within the run. Where no such place exists (megabytes of one
character), the text is tokenized in one go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtrain.console import console
from qtrain.documents import Document, characters

Ids = NDArray[np.int32]

PIECE = 20_000
"""Characters of a piece, without the overlap."""
MARGIN = 1000
RUN = 16
_TOGETHER = 16
"""Pieces, or as many characters, that are tokenized at once, on several cores."""
_LONG = 2_000_000
"""Characters from which tokenizing takes seconds and shows its progress."""


@dataclass(frozen=True)
class Marks:
    """Token ids that belong to a document."""

    before: tuple[int, ...]
    """BOS, usually, or nothing."""
    after: tuple[int, ...]
    """EOS, if anything."""
    between: tuple[int, ...] = ()
    """Follows each document where several share a sequence, if nothing else would show where one ends."""
    chat_before: tuple[int, ...] = ()
    """Before what a chat template made, which has its own BOS where it needs one."""

    @property
    def bos(self) -> int | None:
        """What a document begins with."""
        return self.before[0] if self.before else None


def find_marks(tokenizer: Any, add_bos: str = "auto", add_eos: str = "auto") -> Marks:
    """What ``tokenizer`` puts around a text, or what the options say ("auto", "true", "false").

    Raises:
        ValueError: if a token is asked for that the tokenizer does not have.
    """
    plain, full = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    extra = len(full) - len(plain)
    first = next((i for i in range(extra + 1) if full[i : i + len(plain)] == plain), 0)
    before, after = full[:first], full[first + len(plain) :]
    if add_bos != "auto":
        before = _asked(tokenizer, "bos", before) if add_bos == "true" else []
    if add_eos != "auto":
        after = _asked(tokenizer, "eos", after) if add_eos == "true" else []
    eos = [] if tokenizer.eos_token_id is None or add_eos == "false" else [tokenizer.eos_token_id]
    between = [] if before or after else eos
    return Marks(tuple(before), tuple(after), tuple(between), tuple(before if add_bos == "true" else []))


def _asked(tokenizer: Any, which: str, found: list[int]) -> list[int]:
    token = getattr(tokenizer, f"{which}_token_id")
    if token is None and not found:
        raise ValueError(f"data.add_{which}=true, but the tokenizer has no {which.upper()} token. Set data.add_{which}=auto")
    return found or [token]


def require_vocabulary(where: str, ids: NDArray[np.integer[Any]], tokenizer: Any, rows: int) -> None:
    """Refuse token ids that a model has no embedding for, as of tokens that were added to its tokenizer alone.

    Args:
        where: what the ids are of.
        rows: rows of the embedding, and of the output head.

    Raises:
        ValueError: naming the token.
    """
    beyond = np.unique(ids[ids >= rows])
    if len(beyond):
        token, size = tokenizer.convert_ids_to_tokens(int(beyond[0])), max(len(tokenizer), int(beyond[-1]) + 1)
        raise ValueError(
            f"{where} has the token {token!r}, id {beyond[0]}, and the model's embedding has {rows} rows, for ids up to {rows - 1} "
            f"({len(beyond)} tokens of the text are beyond it). If they were added to the tokenizer, save the model after "
            f"model.resize_token_embeddings({size}), whose new rows have to be trained, and set model.path to its folder; if not, copy the "
            "model's own tokenizer.json into its folder"
        )


def tokenize(
    documents: Sequence[Document], tokenizer: Any, marks: Marks, chat_template: bool = False, limit: int | None = None
) -> list[Ids]:
    """Token ids of each document, with what belongs before and after it.

    Args:
        chat_template: render messages, or a text as the message of a user, through the tokenizer's chat template.
        limit: tokens in all, at which to stop; the last document is cut to it.

    Raises:
        ValueError: if the tokenizer has no chat template, or the template refuses the messages.
    """
    if chat_template:
        require_template(tokenizer)
    texts = [render(tokenizer, d) for d in documents] if chat_template else [d if isinstance(d, str) else "" for d in documents]
    before = marks.chat_before if chat_template else marks.before
    after = () if chat_template else marks.after
    found: list[Ids] = []
    count = 0
    for ids in _plain(texts, tokenizer, limit):
        start = () if before and tuple(ids[: len(before)]) == before else before
        marked = np.concatenate([np.asarray(start, np.int32), ids, np.asarray(after, np.int32)])
        found.append(marked if limit is None else marked[: limit - count])
        count += len(found[-1])
        if limit is not None and count >= limit:
            break
    return found


def require_template(tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("data.chat_template=true, but the model's tokenizer has no chat template. Set data.chat_template=false")


def render(tokenizer: Any, document: Document, **options: Any) -> Any:
    """The text that the chat template makes of a conversation, or, with other ``options`` of transformers, its tokens.

    Raises:
        ValueError: if the template refuses the messages.
    """
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, **options})
    except Exception as e:  # templates raise what they like
        raise ValueError(
            f"the model's chat template refuses a conversation ({e}); its roles are {', '.join(m['role'] for m in messages)[:100]}. "
            "Correct the messages, or set data.chat_template=false"
        ) from e


def encode(texts: list[str], tokenizer: Any) -> list[Ids]:
    """Ids of each text, without marks."""
    return [np.asarray(ids, np.int32) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _plain(texts: list[str], tokenizer: Any, limit: int | None) -> Iterator[Ids]:
    """Ids of each text in order, without marks."""
    fast = getattr(tokenizer, "is_fast", False)
    with _progress(characters(texts), limit) as advance:
        batch: list[str] = []
        for text in texts:
            if len(text) > 2 * PIECE and fast:
                yield from _batch(batch, tokenizer, advance)
                batch = []
                yield _long_text(text, tokenizer, limit, advance)
                continue
            batch.append(text)
            if sum(map(len, batch)) > _TOGETHER * PIECE or (limit is not None and len(batch) >= 100):
                yield from _batch(batch, tokenizer, advance)
                batch = []
        yield from _batch(batch, tokenizer, advance)


def _batch(texts: list[str], tokenizer: Any, advance: Any) -> Iterator[Ids]:
    if texts:
        rows = encode(texts, tokenizer)
        advance(sum(map(len, texts)))
        yield from rows


@dataclass
class _Piece:
    """A stretch of a text: ids, and where each token begins and ends in the whole text."""

    ids: Ids
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


def _long_text(text: str, tokenizer: Any, limit: int | None, advance: Any) -> Ids:
    """Ids of a text in pieces; at least ``limit`` of them."""
    starts = list(range(0, len(text), PIECE))
    if len(text) - starts[-1] <= MARGIN:
        starts.pop()
    kept: list[Ids] = []
    last: _Piece | None = None
    first = 0
    """Token of the last piece from which on it counts."""
    for group in range(0, len(starts), _TOGETHER):
        for start, piece in zip(
            starts[group : group + _TOGETHER], _pieces(text, starts[group : group + _TOGETHER], starts[-1], tokenizer), strict=True
        ):
            if last is not None:
                seam = _seam(last, piece, start)
                if seam is None:
                    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)
                kept.append(last.ids[first : seam[0]])
                first = seam[1]
            last = piece
            advance(PIECE if start != starts[-1] else len(text) - start)
        if limit is not None and sum(map(len, kept)) >= limit:
            return np.concatenate(kept)
    assert last is not None
    return np.concatenate([*kept, last.ids[first:]])


def _pieces(text: str, starts: list[int], final: int, tokenizer: Any) -> list[_Piece]:
    lows = [max(0, start - MARGIN) for start in starts]
    highs = [len(text) if start == final else start + PIECE + MARGIN for start in starts]
    found = tokenizer(
        [text[low:high] for low, high in zip(lows, highs, strict=True)],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    places = [np.asarray(o, np.int64).reshape(-1, 2) + low for o, low in zip(found["offset_mapping"], lows, strict=True)]
    return [_Piece(np.asarray(i, np.int32), p[:, 0], p[:, 1]) for i, p in zip(found["input_ids"], places, strict=True)]


def _seam(left: _Piece, right: _Piece, middle: int) -> tuple[int, int] | None:
    """A token of each piece, the same token of the text, at which one can go on for the other; nearest to ``middle``."""
    low, high = np.searchsorted(left.begins, [middle - MARGIN, middle + MARGIN])
    candidates = range(max(int(low), RUN), min(int(high), len(left.ids) - RUN))
    for i in sorted(candidates, key=lambda i: abs(int(left.begins[i]) - middle)):
        j = int(np.searchsorted(right.begins, left.begins[i]))
        if left.ends[i - 1] > left.begins[i] or j < RUN or j + RUN > len(right.ids):
            continue
        mine, other = slice(i - RUN, i + RUN), slice(j - RUN, j + RUN)
        if all(np.array_equal(getattr(left, n)[mine], getattr(right, n)[other]) for n in ("ids", "begins", "ends")):
            return i, j
    return None


@contextmanager
def _progress(total: int, limit: int | None) -> Iterator[Any]:
    """A bar on a terminal, a line elsewhere; neither for short texts."""
    if total < _LONG or (limit is not None and limit < _LONG // 8):
        yield lambda _: None
        return
    what = f"tokenizing {total / 1e6:.1f} million characters"
    if not console.is_terminal:
        console.print(what, style="dim")
        yield lambda _: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
