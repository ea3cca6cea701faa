"""The LightningDataModule for language models: packed sequences to train on, windows to measure perplexity on.

A batch is ({"input_ids": int64 [B, T]}, labels int64 [B, T]). labels[b, t] is the token at t itself, not shifted, or -100 where it is not
scored: position 0 never is, since nothing comes before it, nor is padding (on the right; causal attention does not see it).

Training and calibration. The documents, each with its BOS or EOS, are laid end to end and cut into sequences of `context` tokens; the
rest that does not fill one is dropped. A token sees the documents before its own in the sequence, as in most pretraining, unless
`mask_documents`: then positions start again with each document (`position_ids`), from which transformers makes the attention mask where
no cache is in use, and the first token of a document is not scored.

Conversations. Where the loss is on the assistant's part (`data.loss_on`), the tokens that it does not say are only seen, in all splits
(`qtrain/chats.py`); sequences and windows without a scored token are left out, so that every batch has one.

Evaluation. Each document by itself, in windows of `context` tokens that begin every `stride` tokens; a window scores only the tokens that
no earlier one has, so that each token is scored once, with at least context - stride tokens before it, and the windows of short
documents are whole. This is what Hugging Face documents ("Perplexity of fixed-length models"):

    tokens   0 1 2 3 4 5 6 7 8 9          context 4, stride 2
             . x x x                      x scored, o only seen, . the first, which nothing precedes
                 o o x x
                     o o x x
                         o o x x

Windows and sequences that begin inside a document do so without BOS. `window_bos` puts it in place of their first token, as llama.cpp's
perplexity does: models that lean on it at position 0 (Gemma, by repute) need that; one that has learnt that a story begins there reads
better without (a 15 M TinyStories model on sequences of running text: 9.22 with, 8.21 without).

Legend: B sequences, T tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtrain.chats import tokenize_chats
from qtrain.datamodule import Batch, Encoded, ResumableDataModule
from qtrain.documents import Documents
from qtrain.tokens import Ids, find_marks, require_vocabulary, tokenize

IGNORED = -100
"""Label of a token that is not scored."""
DEFAULT_CONTEXT = 512
UNLIMITED = 1 << 24
"""`model_max_length` of tokenizers that do not know is beyond this."""
FEW = 128
"""Calibration sequences below which a note is made."""


class Window(NamedTuple):
    """Tokens begin to end of a document, of which those before ``scored`` are only seen."""

    document: int
    begin: int
    end: int
    scored: int


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first scored token) of each window over ``length`` tokens; token 0 is never scored."""
    found, done = [], 1
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        found.append((begin, end, max(done, begin + 1)))
        done = end
        if end == length:
            break
    return found


Said = list[NDArray[np.bool_]] | None
"""Which tokens of each document may be scored; None: all."""


class Item(NamedTuple):
    """One sequence, as `collate` takes it."""

    ids: NDArray[np.int64]
    is_scored: NDArray[np.bool_]
    positions: NDArray[np.int64] | None


class Windows(Encoded):
    """Windows over documents, cut out when they are asked for: overlapping ones would be many times the text."""

    def __init__(
        self,
        documents: list[Ids],
        cuts: list[Window],
        bos: int | None,
        starts: NDArray[np.int64] | None = None,
        mask: bool = False,
        said: Said = None,
    ) -> None:
        """See the module.

        Args:
            bos: what replaces the first token of a window that begins inside a document; None leaves it.
            starts: where documents begin in the one stream that ``documents`` then is.
            mask: give positions that start again with each document.
            said: which tokens of each document may be scored; None: all.
        """
        self.documents, self.cuts, self.bos, self.starts, self.mask, self.said = documents, cuts, bos, starts, mask, said
        self.lengths = [c.end - c.begin for c in cuts]

    def __getitems__(self, indices: list[int]) -> list[Item]:
        """Several windows."""
        return [self._item(self.cuts[i]) for i in indices]

    def _item(self, cut: Window) -> Item:
        ids = self.documents[cut.document][cut.begin : cut.end].astype(np.int64)
        if self.bos is not None and cut.begin > 0:
            ids[0] = self.bos
        places = np.arange(cut.begin, cut.end)
        is_scored = places >= max(cut.scored, cut.begin + 1)
        if self.said is not None:
            is_scored &= self.said[cut.document][cut.begin : cut.end]
        if self.starts is None or not self.mask:
            return Item(ids, is_scored, None)
        own = np.maximum(self.starts[np.searchsorted(self.starts, places, side="right") - 1], cut.begin)
        return Item(ids, is_scored & (places != own), places - own)

    def scored(self) -> Windows:
        """These without the ones that have no scored token."""
        cuts = self.cuts if self.said is None else [c for c in self.cuts if self._item(c).is_scored.any()]
        return Windows(self.documents, cuts, self.bos, self.starts, self.mask, self.said)

    def some(self, count: int) -> Windows:
        """``count`` of these, evenly spread, not masked."""
        chosen = np.linspace(0, len(self.cuts) - 1, min(count, len(self.cuts))).round().astype(int)
        return Windows(self.documents, [self.cuts[i] for i in chosen], self.bos, self.starts, said=self.said)

    @property
    def counts(self) -> dict[str, int]:
        """What is in it: documents, their tokens, sequences, and tokens that are scored."""
        documents = len(self.documents) if self.starts is None else len(self.starts)
        scored = sum(int(self._item(c).is_scored.sum()) for c in self.cuts)
        return {"documents": documents, "tokens": sum(map(len, self.documents)), "sequences": len(self.cuts), "scored_tokens": scored}


class LanguageDataModule(ResumableDataModule[Windows]):
    """Loaders of sequences of token ids."""

    def __init__(
        self,
        train: Documents,
        validation: Documents,
        test: Documents,
        calibration: Documents | None,
        tokenizer: Any,
        *,
        context: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        train_tokens: int | None = None,
        eval_tokens: int | None = None,
        calibration_sequences: int = 128,
        chat_template: bool = False,
        loss_on: str = "all",
        add_bos: str = "auto",
        add_eos: str = "auto",
        window_bos: bool = False,
        mask_documents: bool = False,
        cut_documents: bool = False,
        seed: int = 0,
        notes: list[str] | None = None,
    ) -> None:
        """Tokenize everything; see `qtrain.data.text.TextCorpus` for the options. ``calibration`` None is a part of ``train``.

        Raises:
            ValueError: if the context is longer than the model reads, or there is too little text.
        """
        super().__init__([], notes or [], batch_size, eval_batch_size, seed)
        self.context, self.marks = chosen_context(context, tokenizer), find_marks(tokenizer, add_bos, add_eos)
        self.stride = self._checked(stride)
        self.tokenizer, self.chat, self._mask, self._cut = tokenizer, chat_template, mask_documents, cut_documents
        self._loss_on = loss_on
        self._window_bos = self.marks.bos if window_bos else None
        self._pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        packed = self._packed(train, train_tokens)
        self._train = self._to_learn(packed, train.where)
        self._validation, self._test = self._windows(validation, eval_tokens), self._windows(test, eval_tokens)
        source = packed if calibration is None else self._packed(calibration, train_tokens)
        self._calibration = source.some(calibration_sequences)
        found = len(self._calibration)
        if found < max(calibration_sequences, FEW):
            why = "the text has no more" if found < calibration_sequences else f"{FEW} or more are advised"
            self.calibration_notes = [f"calibration has {found} sequences of {self.context} tokens (data.calibration_sequences): {why}"]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """What is in each split: documents, tokens, sequences, scored tokens."""
        splits = {"train": self._train, "validation": self._validation, "test": self._test, "calibration": self._calibration}
        return {name: split.counts for name, split in splits.items()}

    def check(self, model: Any) -> None:
        """Refuse token ids that the model has no embedding for; padding, which nothing sees, is then another token.

        Raises:
            ValueError: naming the token.
        """
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
        rows = min(module.weight.shape[0] for module in modules if module is not None)
        splits = {"training": self._train, "validation": self._validation, "test": self._test, "calibration": self._calibration}
        for name, split in splits.items():
            for ids in [*split.documents, np.asarray(self.marks.before, np.int32)]:
                require_vocabulary(f"the {name} text", ids, self.tokenizer, rows)
        self._pad = self._pad if self._pad < rows else 0

    def require_positions(self, positions: int | None) -> None:
        """Refuse a context that is longer than the model's ``positions``, which a tokenizer does not always know.

        Raises:
            ValueError: naming the option.
        """
        if positions is not None and self.context > positions:
            raise too_long(self.context, positions)

    def collate(self, items: list[Item]) -> Batch:
        """Pad on the right to the longest of ``items``."""
        longest = max(len(item.ids) for item in items)
        ids, is_scored = _stacked([i.ids for i in items], longest, self._pad), _stacked([i.is_scored for i in items], longest, 0)
        inputs = {"input_ids": ids}
        if items[0].positions is not None:
            inputs["position_ids"] = _stacked([i.positions for i in items], longest, 0)
        return inputs, torch.where(is_scored.bool(), ids, IGNORED)

    def _checked(self, stride: int | None) -> int:
        stride = max(1, self.context // 2) if stride is None else stride
        if not 1 <= stride <= self.context:
            raise ValueError(
                f"data.stride is {stride}; it is from 1 to the context, {self.context} tokens, so that no token is left out. "
                f"Set data.stride={max(1, self.context // 2)}, say."
            )
        return stride

    def _tokens(self, documents: Documents, limit: int | None) -> tuple[list[Ids], Said]:
        """Token ids of each document, and which of them the assistant says where only those are scored."""
        chats = any(not isinstance(d, str) for d in documents.items)
        if self._loss_on == "all" or (self._loss_on == "auto" and not (self.chat and chats)):
            return tokenize(documents.items, self.tokenizer, self.marks, self.chat, limit), None
        found = tokenize_chats(documents.items, self.tokenizer, self.marks, limit)
        self.notes += [note for note in found.notes(documents.where) if note not in self.notes]
        if not any(text.is_said.any() for text in found.texts):
            raise nothing_to_learn(documents.where, f"of its {len(documents)} documents none has a turn of the assistant that is scored")
        return [text.ids for text in found.texts], [text.is_said for text in found.texts]

    def _packed(self, documents: Documents, limit: int | None) -> Windows:
        found, said = self._tokens(documents, limit)
        between = np.asarray(self.marks.between if not self.chat else (), np.int32)
        parts = [part for ids in found for part in (ids, between)]
        stream = np.concatenate(parts)
        count = len(stream) // self.context
        if not count:
            raise ValueError(
                f"{documents.where} has {len(stream)} tokens, too little for one sequence of {self.context}. "
                f"Give more text, or set data.context={max(2, len(stream) // 2)}"
            )
        starts = np.cumsum([0, *(len(ids) + len(between) for ids in found[:-1])])
        cuts = [Window(0, i * self.context, (i + 1) * self.context, 1) for i in range(count)]
        return Windows([stream], cuts, self._window_bos, starts, self._mask, None if said is None else [np.concatenate(said)])

    def _to_learn(self, packed: Windows, where: str) -> Windows:
        """The sequences that have a token to learn, which are counted where that is not all of them."""
        kept = packed.scored()
        if packed.said is None:
            return kept
        if not len(kept):
            raise nothing_to_learn(where, f"no sequence of {self.context} tokens (data.context) has one that the assistant says")
        if len(kept) < len(packed):
            self.notes.append(
                f"{len(packed) - len(kept)} of {len(packed)} sequences of {where} have nothing that the assistant says and are not "
                "trained on"
            )
        counts = kept.counts
        self.notes.append(
            f"the loss is on what the assistant says: {counts['scored_tokens']:,} of {sum(kept.lengths):,} training tokens "
            "(data.loss_on=all for all of them)"
        )
        return kept

    def _windows(self, documents: Documents, limit: int | None) -> Windows:
        found, said = self._tokens(documents, limit)
        kept = [i for i, ids in enumerate(found) if len(ids) > 1]
        if not kept:
            raise ValueError(
                f"{documents.where} has no document of two tokens or more, so there is no token to predict. Name another file, or raise "
                "data.eval_tokens"
            )
        if len(kept) < len(found):
            self.notes.append(f"{len(found) - len(kept)} documents of {documents.where} have fewer than two tokens and are not scored")
        if self._cut:
            longer = sum(len(found[i]) > self.context for i in kept)
            if longer:
                self.notes.append(f"{longer} documents of {documents.where} are measured up to their first {self.context} tokens only")
        end = self.context if self._cut else None
        texts = [found[i][:end] for i in kept]
        cuts = [Window(i, *cut) for i, ids in enumerate(texts) for cut in windows(len(ids), self.context, self.stride)]
        made = Windows(texts, cuts, self._window_bos, said=None if said is None else [said[i][:end] for i in kept]).scored()
        if not len(made):
            raise nothing_to_learn(documents.where, "what is left of it (data.eval_tokens, data.long_documents) has none that it says")
        return made


def _stacked(rows: list[Any], longest: int, fill: int) -> Tensor:
    """Rows [T] of several lengths -> int64 [B, T]."""
    padded = np.full((len(rows), longest), fill, np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)


def chosen_context(context: int | None, tokenizer: Any) -> int:
    """Tokens of a sequence.

    Raises:
        ValueError: if the tokenizer knows that the model reads fewer.
    """
    most = int(min(tokenizer.model_max_length, UNLIMITED))
    if context is None:
        return min(DEFAULT_CONTEXT, most)
    if context > most:
        raise too_long(context, most)
    return context


def too_long(context: int, positions: int) -> ValueError:
    """What is raised for a context beyond the model's."""
    return ValueError(f"data.context={context} is longer than the model reads, {positions} tokens. Set data.context={positions}")


def nothing_to_learn(where: str, why: str) -> ValueError:
    """What is raised for conversations in which the assistant says nothing."""
    return ValueError(
        f"{where}: the loss is on what the assistant says (data.loss_on), and would be on nothing: {why}. "
        'Give conversations with turns of {"role": "assistant", …}, or set data.loss_on=all'
    )
