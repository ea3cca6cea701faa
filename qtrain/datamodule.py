"""The LightningDataModules for texts to classify (tokenized once, batched by length) and images, resumable in the middle of an epoch.

Batches of similar length waste little on padding, which on a CPU is worth a factor of two. The training order of an epoch is a pure
function of (seed, epoch): shuffle all examples, sort each pool of 50 batches by length, cut it into batches, shuffle the batches.
Being a function, it can be entered anywhere: a run that resumes from a checkpoint written in the middle of an epoch sees exactly the
batches that the uninterrupted run would have seen. Images have one length, and are only shuffled; how they are augmented is a function of
(seed, epoch, first index of the batch) for the same reason: drawn from the global generator, it would depend on what dropout drew
before, and Lightning fetches a batch before a callback can restore that generator.

How Lightning 2.6 gets there (`loops/fit_loop.py`, `loops/training_epoch_loop.py`). On resume it restores its counters and then asks for
the training loader; it starts to count batches where the checkpoint stopped, but reads the loader from its beginning, and ends the
epoch when the count reaches `len(loader)`. So the loader must keep its full length and leave out the batches that are done. At the
start of each epoch it calls `set_epoch(epoch)` on `loader.batch_sampler.sampler`, in the first one after `iter(loader)`; the order is
therefore computed when the first batch is asked for, not before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from qtrain.images import Images, ImageSpec, crop_flip, normalised
from qtrain.splits import Splits
from qtrain.text import Examples

Batch = tuple[dict[str, Tensor], Tensor]
"""Inputs by name (int64 [batch, length of the longest], or float32 [batch, C, H, W]); labels, int64 [batch]."""

POOL = 50
"""Batches per pool: more sorts better, fewer shuffles better."""
_CHUNK = 1000
_LONG = 20_000
"""Texts from which tokenizing takes seconds and shows its progress."""


class ResumableBatchSampler(Sampler[list[int]]):
    """Batches of indices, shuffled in buckets of similar length, a pure function of (seed, epoch)."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed = batch_size, seed
        self.epoch, self.skip = 0, 0

    @property
    def sampler(self) -> ResumableBatchSampler:
        """Itself: Lightning looks for `set_epoch` on the sampler below a batch sampler."""
        return self

    def set_epoch(self, epoch: int, skip: int | None = None) -> None:
        """Choose the epoch that is iterated next.

        Args:
            skip: leading batches to leave out. None, which is how Lightning calls this, keeps what was set for this epoch, and is 0 in
                any other.
        """
        if skip is None:
            skip = self.skip if epoch == self.epoch else 0
        self.epoch, self.skip = epoch, skip

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of ``epoch``: every index once."""
        generator = np.random.default_rng([self.seed, epoch])
        order, pool = generator.permutation(len(self.lengths)), POOL * self.batch_size
        batches = []
        for start in range(0, len(order), pool):
            chunk = order[start : start + pool]
            chunk = chunk[np.argsort(self.lengths[chunk], kind="stable")]
            batches += [chunk[i : i + self.batch_size].tolist() for i in range(0, len(chunk), self.batch_size)]
        return [batches[i] for i in generator.permutation(len(batches))]

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever is skipped."""
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches(self.epoch)[self.skip :]


class ResumableLoader(DataLoader[Any]):
    """A loader whose checkpoint state says which order it walks, so that resuming on other data is an error, not another order."""

    def state_dict(self) -> dict[str, int]:
        """What the order of the batches depends on."""
        sampler = self.batch_sampler
        assert isinstance(sampler, ResumableBatchSampler)
        return {
            "examples": len(sampler.lengths),
            "tokens": int(sampler.lengths.sum()),
            "batch_size": sampler.batch_size,
            "seed": sampler.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Compare the state of a checkpoint that stopped inside an epoch with this loader's.

        Raises:
            ValueError: if the rest of the epoch would not be the one that the checkpoint left.
        """
        mine = self.state_dict()
        changed = [f"{name} is {mine[name]} and was {value}" for name, value in state.items() if mine.get(name) != value]
        if changed:
            raise ValueError(
                f"the checkpoint stopped inside an epoch whose order cannot be continued: {'; '.join(changed)}. Resume with the "
                "data, seed and batch size of that run (seed=… data.batch_size=… data.limit=…), or from a checkpoint written at the end "
                "of an epoch"
            )


class Encoded(Dataset[Any]):
    """One split, ready to be batched."""

    lengths: list[int]
    """What batches are sorted by."""

    @abstractmethod
    def __getitems__(self, indices: list[int]) -> Any:
        """Several examples, as `collate` takes them."""

    def __len__(self) -> int:
        return len(self.lengths)


class Tokens(Encoded):
    """One split as token ids."""

    def __init__(self, columns: dict[str, list[list[int]]], labels: list[int], cut: int) -> None:
        self.columns, self.labels = columns, labels
        self.lengths = [len(ids) for ids in next(iter(columns.values()))]
        self.cut = cut
        """Examples that were longer than `max_length`."""

    def __getitems__(self, indices: list[int]) -> list[tuple[dict[str, list[int]], int]]:
        """Token ids by column, and the label, of each."""
        return [({name: values[i] for name, values in self.columns.items()}, self.labels[i]) for i in indices]


class Pixels(Encoded):
    """One split as images, with or without augmentation."""

    def __init__(self, images: Images) -> None:
        self.images, self.labels = images, torch.tensor(images.labels, dtype=torch.int64)
        self.lengths = [1] * len(images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Pixels [N, C, H, W] as they were read, and labels [N]."""
        return self.images.pixels[indices], self.labels[indices]


class Augmented(Pixels):
    """Images cropped and mirrored at random, for the epoch that ``sampler`` is in."""

    def __init__(self, images: Images, sampler: ResumableBatchSampler) -> None:
        super().__init__(images)
        self.sampler = sampler

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Pixels [N, C, H, W] and labels [N]."""
        pixels, labels = super().__getitems__(indices)
        return crop_flip(pixels, np.random.default_rng([self.sampler.seed, self.sampler.epoch, indices[0]])), labels


E = TypeVar("E", bound=Encoded)


class ResumableDataModule(LightningDataModule, Generic[E]):
    """Loaders of batches, whose training order can be entered anywhere. A subclass encodes and collates."""

    label_names: list[str]
    notes: list[str]
    """What was dropped, cut or looks odd, one sentence each."""
    calibration_notes: list[str]
    """The same of the calibration data, which not every run reads."""
    _train: E
    _validation: E
    _test: E
    _calibration: E
    """Some of the training examples, a fair sample."""

    def __init__(self, label_names: list[str], notes: Iterable[str], batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__()
        self.label_names, self.notes, self.calibration_notes = label_names, list(notes), []
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed

    @abstractmethod
    def collate(self, items: Any) -> Batch:
        """Model inputs and labels of what `__getitems__` of a split gave."""

    def check(self, model: Any) -> None:
        """Raise ValueError, naming the remedy, if ``model`` cannot read these data."""

    def training(self, sampler: ResumableBatchSampler) -> Encoded:
        """The training split as it is trained on."""
        return self._train

    def train_dataloader(self) -> ResumableLoader:
        """The training batches; under a trainer that resumes, those that are left of its epoch."""
        sampler = ResumableBatchSampler(self._train.lengths, self.batch_size, self.seed)
        sampler.set_epoch(*self._position())
        return ResumableLoader(self.training(sampler), batch_sampler=sampler, collate_fn=self.collate, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation batches, sorted by length."""
        return self._fixed(self._validation)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test batches, sorted by length."""
        return self._fixed(self._test)

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Batches of a sample of the training examples, sorted by length; never a validation or test example."""
        return self._fixed(self._calibration)

    def example_inputs(self, count: int) -> dict[str, Tensor]:
        """Inputs of ``count`` training examples, for tracing and timing: the first ones, again from the start where they are fewer."""
        return self.collate(self._calibration.__getitems__([i % len(self._calibration) for i in range(count)]))[0]

    def _fixed(self, data: Encoded) -> DataLoader[Any]:
        order = sorted(range(len(data)), key=lambda i: (data.lengths[i], i))
        batches = [order[i : i + self.eval_batch_size] for i in range(0, len(order), self.eval_batch_size)]
        # its own generator: an evaluation must not move the global one, from which training's dropout is drawn
        return DataLoader(data, batch_sampler=batches, collate_fn=self.collate, generator=torch.Generator())

    def _position(self) -> tuple[int, int]:
        """Epoch, and batches of it that are done, where the trainer is to start."""
        if self.trainer is None:
            return 0, 0
        fit: Any = self.trainer.fit_loop
        batches = fit.epoch_loop
        epoch = fit.epoch_progress.current.processed
        if not fit.restarting:
            return epoch, 0
        batches.update_restart_stage()  # Lightning's own rule, which it applies right after this, for whether the last batch counts
        return epoch, batches.batch_progress.current.completed + int(batches.restarted_on_train_batch_end)


class ClassificationDataModule(ResumableDataModule[E]):
    """What text and image classification share; `notes`, `label_names` and `splits` say what is in the batches.

    Calibration takes the first training examples: train is in stratified order, so they are a fair sample.
    """

    splits: Splits[Any]

    def __init__(self, splits: Splits[Any], batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__(splits.label_names, splits.notes, batch_size, eval_batch_size, seed)
        self.splits = splits


class TextDataModule(ClassificationDataModule[Tokens]):
    """Loaders of tokenized batches, padded to their longest."""

    def __init__(
        self,
        splits: Splits[Examples],
        tokenizer: Any,
        *,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_length: int = 128,
        calibration_examples: int = 256,
        seed: int = 0,
    ) -> None:
        """Tokenize all splits.

        Raises:
            ValueError: if the tokenizer cannot pad.
        """
        super().__init__(splits, batch_size, eval_batch_size, seed)
        _require_padding(tokenizer)
        self._pads = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self._pad_left = tokenizer.padding_side == "left"
        if max_length > tokenizer.model_max_length:
            self.notes.append(f"data.max_length={max_length} is more than the model reads; {tokenizer.model_max_length} tokens are used")
            max_length = tokenizer.model_max_length
        self._train = encode(splits.train, tokenizer, max_length)
        self._validation = encode(splits.validation, tokenizer, max_length)
        self._test = encode(splits.test, tokenizer, max_length)
        count = min(calibration_examples, len(splits.train))
        self._calibration = Tokens({n: v[:count] for n, v in self._train.columns.items()}, self._train.labels[:count], 0)
        cut, total = self._train.cut + self._validation.cut + self._test.cut, len(self._train) + len(self._validation) + len(self._test)
        if cut:
            self.notes.append(f"{cut} of {total} examples are longer than {max_length} tokens (data.max_length) and were cut")

    def collate(self, items: list[tuple[dict[str, list[int]], int]]) -> Batch:
        """Pad to the longest of ``items``."""
        inputs = {name: self._pad(name, [features[name] for features, _ in items]) for name in items[0][0]}
        return inputs, torch.tensor([label for _, label in items], dtype=torch.int64)

    def _pad(self, name: str, rows: list[list[int]]) -> Tensor:
        longest, value = max(map(len, rows)), self._pads.get(name, 0)
        fills = [[value] * (longest - len(row)) for row in rows]
        padded = [f + r if self._pad_left else r + f for r, f in zip(rows, fills, strict=True)]
        return torch.tensor(padded, dtype=torch.int64)


class ImageDataModule(ClassificationDataModule[Pixels]):
    """Loaders of normalised images."""

    def __init__(
        self,
        splits: Splits[Images],
        spec: ImageSpec,
        *,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        calibration_examples: int = 256,
        augment: str = "none",
        seed: int = 0,
    ) -> None:
        """``spec`` has mean and std; ``augment`` is one of `qtrain.images.AUGMENTS`."""
        super().__init__(splits, batch_size, eval_batch_size, seed)
        self.spec, self.augment, self.white = spec, augment, splits.train.white
        self._train, self._validation, self._test = Pixels(splits.train), Pixels(splits.validation), Pixels(splits.test)
        self._calibration = Pixels(splits.train.take(range(min(calibration_examples, len(splits.train)))))

    def training(self, sampler: ResumableBatchSampler) -> Encoded:
        """The training split, augmented where that is asked for."""
        return self._train if self.augment == "none" else Augmented(self.splits.train, sampler)

    def collate(self, items: tuple[Tensor, Tensor]) -> Batch:
        """Normalise pixels [N, C, H, W]."""
        pixels, labels = items
        return {self.spec.input_name: normalised(pixels, self.white, self.spec)}, labels


def encode(examples: Examples, tokenizer: Any, max_length: int) -> Tokens:
    """Tokenize ``examples``, cut to ``max_length`` tokens, without padding."""
    columns: dict[str, list[list[int]]] = {}
    cut = 0
    for start in _progress(range(0, len(examples), _CHUNK), len(examples)):
        part = slice(start, start + _CHUNK)
        pairs = None if examples.pairs is None else examples.pairs[part]
        encoded = tokenizer(examples.texts[part], pairs, truncation=True, max_length=max_length, padding=False)
        for name, values in encoded.items():
            columns.setdefault(name, []).extend(values)
        cut += sum(bool(e.overflowing) for e in encoded.encodings or ())
    return Tokens(columns, examples.labels, cut)


def _progress(chunks: range, total: int) -> Any:
    if total < _LONG:
        return chunks
    from rich.console import Console
    from rich.progress import track

    return track(chunks, description=f"tokenizing {total:,} texts", console=Console(stderr=True), transient=True)


def _require_padding(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no padding token, so its texts cannot share a batch; valid: an encoder's "
            "tokenizer (BERT, RoBERTa, DistilBERT, …). Set model.path=FOLDER, or add pad_token to its tokenizer_config.json"
        )
