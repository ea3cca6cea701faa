"""Image data: arrays, folders and hub datasets read to the last image, splits that do not leak, batches that a resumed run repeats."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from qtrain import images as images_module
from qtrain.data.digits import Digits
from qtrain.data.hub_images import HubImages
from qtrain.data.image_folder import ImageFolder
from qtrain.data.npz import Npz
from qtrain.datamodule import ImageDataModule
from qtrain.images import (
    PADDING,
    ImageClassification,
    ImageRows,
    Images,
    ImageSpec,
    crop_flip,
    from_pillow,
    normalised,
    resize,
    statistics,
)
from qtrain.splits import Splits
from tests.conftest import shared_data

GRAY, RGB = ImageSpec(channels=1), ImageSpec()


class Fixed(ImageClassification):
    """Images that a test gives."""

    def load(self, size: Any = None) -> Splits[Images]:
        raise NotImplementedError


def noise(count: int, channels: int = 3, size: int = 6, seed: int = 0) -> Tensor:
    """uint8 [count, channels, size, size], no two alike; the first pixel of an image is its number."""
    pixels = torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(count) % 256
    return pixels


def rows(count: int, seed: int = 0, where: str = "data.train=a", **options: Any) -> ImageRows:
    return ImageRows(where, noise(count, seed=seed, **options), [i % 2 for i in range(count)])


def channels_last(pixels: Tensor) -> np.ndarray[Any, Any]:
    return pixels.permute(0, 2, 3, 1).numpy()


def save_npz(path: Path, count: int = 60, **arrays: Any) -> str:
    """x_train, y_train, and what else is given."""
    arrays = {"x_train": channels_last(noise(count)), "y_train": np.arange(count) % 3, **arrays}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def every_image(splits: Splits[Images]) -> list[bytes]:
    return sorted(key for part in (splits.train, splits.validation, splits.test) for key in list(part.keys()))


# --- splits -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(60, 200), st.integers(0, 9))
def test_cut_splits_are_stratified_disjoint_and_complete(count: int, seed: int) -> None:
    splits = Fixed(split_seed=seed).divide(rows(count))
    assert every_image(splits) == sorted(Images(noise(count), [0] * count).keys())
    assert len(splits.test) == round(0.1 * count)
    for part in (splits.train, splits.validation, splits.test):
        assert abs(Counter(part.labels)[0] - Counter(part.labels)[1]) <= 2
    again = Fixed(split_seed=seed).divide(rows(count))
    assert torch.equal(splits.train.pixels, again.train.pixels) and splits.test.labels == again.test.labels


def test_labels_stay_with_their_images() -> None:
    splits = Fixed().divide(rows(200))
    for part in (splits.train, splits.validation, splits.test):
        assert part.labels == [int(n) % 2 for n in part.pixels[:, 0, 0, 0]]


def test_images_of_the_test_split_leave_the_others_and_are_counted() -> None:
    train, validation, test = rows(60), rows(10, seed=1, where="data.validation=b"), rows(10, seed=2, where="data.test=c")
    test.pixels[:3] = torch.cat([train.pixels[:2], validation.pixels[:1]])
    splits = Fixed().divide(train, validation, test)
    assert not {*splits.test.keys()} & {*splits.train.keys(), *splits.validation.keys()}
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (58, 9, 10)
    assert splits.notes == [
        "2 training examples that also occur in the test split were dropped",
        "1 validation examples that also occur in the test split were dropped",
    ]


def test_gray_and_colour_splits_become_colour_before_they_are_compared() -> None:
    train, test = rows(60, channels=1), rows(10, channels=1, where="data.test=b")
    test.pixels = test.pixels.expand(-1, 3, -1, -1).contiguous()
    splits = Fixed().divide(train, None, test)
    assert splits.train.pixels.shape[1] == 3
    assert splits.notes[0].startswith("the gray images of data.train=a became RGB")
    assert "10 training examples that also occur" in splits.notes[1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"size": 8}, r"data.train=a and data.test=b differ in height x width: 6 x 6 and 8 x 8. Set data.size=6"),
        ({"channels": 2}, "differ in channels: 3 and 2"),
    ],
)
def test_splits_that_are_not_alike_are_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fixed().divide(rows(60), None, rows(10, where="data.test=b", **other))


def test_splits_of_different_ranges_are_refused() -> None:
    test = rows(10, where="data.test=b")
    test.pixels = test.pixels.float()
    with pytest.raises(ValueError, match="differ in type: uint8 and float32"):
        Fixed().divide(rows(60), None, test)


def test_limit_thins_all_splits_in_proportion_and_says_so() -> None:
    splits = Fixed(limit=20).divide(rows(200))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 2, 2)
    assert "data.limit=20 of 162" in splits.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "data.size is 0"),
        ({"augment": "flip"}, r"data.augment is 'flip'; valid: none, crop_flip"),
        ({"mean": [0.5]}, "do not belong together"),
        ({"mean": [0.5, 0.5], "std": [0.5]}, "do not belong together"),
        ({"mean": [0.5], "std": [0.0]}, "must be finite and data.std=.* above 0"),
        ({"batch_size": 0}, "data.batch_size is 0"),
    ],
)
def test_bad_options_say_what_to_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fixed(**options)


# --- tensors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_statistics_are_those_of_all_pixels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "_CHUNK", 7)
    pixels = noise(50).to(dtype)
    mean, std = statistics(Images(pixels, [0] * 50, white=255.0))
    scaled = pixels.double().numpy() / 255
    assert np.allclose(mean, scaled.mean((0, 2, 3)), rtol=1e-3)
    assert np.allclose(std, scaled.std((0, 2, 3)), rtol=1e-3)
    assert all(float(f"{value:.4g}") == value for value in (*mean, *std))  # what the note says is what is used


def test_a_constant_channel_is_not_divided_by_zero() -> None:
    pixels = noise(20)
    pixels[:, 1] = 77
    mean, std = statistics(Images(pixels, [0] * 20))
    assert std[1] == 1 and mean[1] == pytest.approx(77 / 255, rel=1e-3)


def test_batches_are_normalised_as_the_formula_says() -> None:
    pixels, spec = noise(4), ImageSpec(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x = normalised(pixels, 255.0, spec)
    expected = (pixels.numpy() / np.float32(255) - np.float32([0.1, 0.2, 0.3])[:, None, None]) / np.float32([0.5, 0.6, 0.7])[:, None, None]
    assert x.dtype == torch.float32
    assert np.array_equal(x.numpy(), expected.astype(np.float32))


def test_one_gray_channel_is_repeated_before_it_is_normalised() -> None:
    pixels, spec = noise(4, channels=1), ImageSpec(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert torch.equal(normalised(pixels, 255.0, spec), normalised(pixels.expand(-1, 3, -1, -1), 255.0, spec))


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_a_random_crop_is_a_window_of_the_padded_image_perhaps_mirrored(count: int, height: int, width: int, seed: int) -> None:
    pixels = torch.randint(1, 256, (count, 2, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    cropped = crop_flip(pixels, np.random.default_rng(seed))
    assert cropped.shape == pixels.shape and cropped.dtype == pixels.dtype
    assert torch.equal(cropped, crop_flip(pixels, np.random.default_rng(seed)))
    for image, crop in zip(pixels, cropped, strict=True):
        padded = torch.nn.functional.pad(image, (PADDING,) * 4)
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # [2, 9, 9, height, width]
        mirrored = torch.stack([windows, windows.flip(4)])
        assert (mirrored == crop[None, :, None, None]).all(1).flatten(3).all(3).any()


def test_crops_use_every_offset_and_mirror_half() -> None:
    pixels = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(4000, -1, -1, -1)
    cropped = crop_flip(pixels, np.random.default_rng(0))
    kinds = Counter(bytes(image.numpy().tobytes()) for image in cropped)
    assert len(kinds) == 2 * (2 * PADDING + 1) ** 2


def test_resizing_keeps_the_dtype_the_range_and_proportions() -> None:
    assert resize(noise(3, size=9), (4, 4)).shape == (3, 3, 4, 4)
    assert resize(noise(3, size=9), (12, 12)).dtype == torch.uint8
    flat = torch.full((1, 1, 5, 20), 200, dtype=torch.uint8)
    assert torch.equal(resize(flat, (7, 7)), torch.full((1, 1, 7, 7), 200, dtype=torch.uint8))
    wide = torch.zeros(1, 1, 10, 30)
    wide[..., 10:20] = 1  # the middle third is what a square shows
    assert torch.equal(resize(wide, (10, 10)), torch.ones(1, 1, 10, 10))


# --- the data module ----------------------------------------------------------------------------------------------------------


def build(spec: ImageSpec = RGB, data: ImageRows | None = None, **options: Any) -> ImageDataModule:
    """A module of 46 training images and a few others, unless ``data`` is given."""

    class Given(ImageClassification):
        def load(self, size: Any = None) -> Splits[Images]:
            if data is not None:
                return self.divide(data)
            return self.divide(rows(46), rows(9, seed=1, where="validation"), rows(11, seed=2, where="test"))

    return Given(**{"batch_size": 4, "eval_batch_size": 4, **options}).build(spec, seed=3)


def test_mean_and_std_are_the_users_else_the_models_else_the_training_splits() -> None:
    known = ImageSpec(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert build(known, mean=[0.5], std=[0.25]).spec.mean == (0.5, 0.5, 0.5)
    assert build(known).spec.std == (1.0, 2.0, 3.0) and not build(known).notes
    own = build()
    assert own.spec.mean == statistics(own.splits.train)[0]
    assert "data.mean=[" in own.notes[0] and ",".join(f"{m:g}" for m in own.spec.mean) in own.notes[0]
    inputs = torch.cat([inputs["pixel_values"] for inputs, _ in own.train_dataloader()])
    assert torch.allclose(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-3)
    assert torch.allclose(inputs.std((0, 2, 3)), torch.ones(3), atol=1e-3)
    with pytest.raises(ValueError, match=r"have 2 values and the model reads 3 channels.*data.mean=null"):
        build(mean=[0.1, 0.2], std=[1.0, 1.0])


def test_gray_images_are_repeated_for_a_colour_model_and_other_channels_refused() -> None:
    data = build(RGB, rows(60, channels=1))
    assert "the images are gray and the model reads RGB: their channel is repeated" in data.notes
    assert data.example_inputs(2)["pixel_values"].shape == (2, 3, 6, 6)
    assert len(set(data.spec.mean or ())) == 1
    with pytest.raises(ValueError, match=r"images have 3 channels and the model reads 1\. Set model.channels=3"):
        build(GRAY)


def test_a_model_that_reads_texts_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data=digits gives images, and the model reads texts. Set model=cifar_resnet .*data=sample_reviews"
    ):
        Digits().build(object(), seed=0)


def numbers(loader: Any, module: ImageDataModule) -> list[list[int]]:
    """The number of each image, by batch."""
    mean, std = (torch.tensor(v)[0] for v in (module.spec.mean, module.spec.std))
    return [((inputs["pixel_values"][:, 0, 0, 0] * std + mean) * 255).round().int().tolist() for inputs, _ in loader]


def test_an_epoch_has_every_image_once_and_evaluation_is_in_order() -> None:
    data = build()
    assert sorted(n for batch in numbers(data.train_dataloader(), data) for n in batch) == list(range(46))
    assert [n for batch in numbers(data.test_dataloader(), data) for n in batch] == list(range(11))
    for (inputs, labels), batch in zip(data.test_dataloader(), numbers(data.test_dataloader(), data), strict=True):
        assert labels.tolist() == [n % 2 for n in batch] and labels.dtype == torch.int64
        assert list(inputs) == ["pixel_values"] and inputs["pixel_values"].dtype == torch.float32


def test_calibration_and_examples_are_training_images_without_augmentation() -> None:
    data, plain = build(calibration_examples=5, augment="crop_flip"), build(calibration_examples=5)
    (batch, _), *_ = data.calibration_dataloader()
    assert torch.equal(batch["pixel_values"], next(iter(plain.calibration_dataloader()))[0]["pixel_values"])
    assert {n for b in numbers(data.calibration_dataloader(), data) for n in b} == {int(n) for n in data.splits.train.pixels[:5, 0, 0, 0]}
    examples = data.example_inputs(7)["pixel_values"]
    assert torch.equal(examples[5:], examples[:2]) and torch.equal(examples[:4], batch["pixel_values"])


def test_only_training_batches_are_augmented_and_nothing_moves_the_global_generator() -> None:
    augmented, plain = build(augment="crop_flip"), build()
    before = torch.get_rng_state()
    train = [inputs["pixel_values"] for inputs, _ in augmented.train_dataloader()]
    assert not any(torch.equal(a, b[0]["pixel_values"]) for a, b in zip(train, plain.train_dataloader(), strict=True))
    for name in ("val_dataloader", "test_dataloader"):
        pairs = zip(getattr(augmented, name)(), getattr(plain, name)(), strict=True)
        assert all(torch.equal(a[0]["pixel_values"], b[0]["pixel_values"]) for a, b in pairs)
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_differs_between_epochs_and_seeds_and_repeats_where_they_are_equal() -> None:
    def epoch(number: int, seed: int, skip: int = 0) -> list[Tensor]:
        data = build(augment="crop_flip")
        data.seed = seed
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(number, skip)  # type: ignore[union-attr]
        return [inputs["pixel_values"] for inputs, _ in loader]

    first = epoch(1, 3)
    assert all(torch.equal(a, b) for a, b in zip(first[5:], epoch(1, 3, skip=5), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, epoch(2, 3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, epoch(1, 4), strict=True))


class Recorder(LightningModule):
    """Writes down the batches it sees; draws from the global generator, as dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch[0]["pixel_values"])
        return (self.weight**2).sum() * torch.rand(())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(Callback):
    """Saves once, in the middle of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 4):
            trainer.save_checkpoint(self.path)
            self.count = len(pl_module.seen)


def test_a_resumed_run_sees_the_augmented_batches_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def fit(recorder: Recorder, callbacks: list[Callback], checkpoint: Path | None = None) -> None:
        trainer = Trainer(
            accelerator="cpu",
            callbacks=callbacks,
            max_epochs=3,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(recorder, datamodule=build(augment="crop_flip"), ckpt_path=checkpoint, weights_only=True)

    whole, resumed, save = Recorder(), Recorder(), SaveAt(tmp_path / "a.ckpt")
    fit(whole, [save])
    torch.rand(7)
    fit(resumed, [], tmp_path / "a.ckpt")
    assert len(whole.seen) == 36 and save.count == 17
    assert all(torch.equal(a, b) for a, b in zip(whole.seen[17:], resumed.seen, strict=True))


# --- digits -------------------------------------------------------------------------------------------------------------------


def test_the_digits_are_1797_images_of_ten_classes() -> None:
    data = Digits().build(GRAY, seed=0)
    parts = [data.splits.train, data.splits.validation, data.splits.test]
    assert sum(map(len, parts)) == 1797 and len(parts[2]) == 180
    assert data.label_names == [str(i) for i in range(10)]
    assert data.spec.size == (8, 8) and data.white == 16
    assert parts[0].pixels.dtype == torch.uint8 and int(parts[0].pixels.max()) == 16
    assert all(len(Counter(part.labels)) == 10 for part in parts)
    assert Digits().build(ImageSpec(channels=3, size=(16, 16)), seed=0).example_inputs(1)["pixel_values"].shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"a mirrored digit is none.*data.augment=none"):
        Digits(augment="crop_flip")


# --- npz ----------------------------------------------------------------------------------------------------------------------


def test_one_file_with_all_splits(tmp_path: Path) -> None:
    test, validation = noise(9, seed=5), noise(6, seed=6)
    path = save_npz(
        tmp_path / "a.npz",
        x_test=channels_last(test),
        y_test=np.arange(9)[:, None] % 3,
        x_val=channels_last(validation),
        y_val=(np.arange(6) % 3).astype(float),
    )
    splits = Npz(path=path).load()
    assert torch.equal(splits.test.pixels, test) and torch.equal(splits.validation.pixels, validation)
    assert splits.test.labels == [i % 3 for i in range(9)] and splits.label_names == ["0", "1", "2"]
    assert every_image(splits) == sorted(Images(torch.cat([noise(60), test, validation]), [0] * 75).keys())


def test_files_per_split_and_names_of_ones_own(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=channels_last(noise(40)), y=np.array(["cat", "dog"] * 20))
    np.savez_compressed(tmp_path / "b.npz", pictures=channels_last(noise(6, seed=1)), kinds=np.array([b"dog", b"cat"] * 3))
    data = Npz(train=str(tmp_path / "a.npz"), test=str(tmp_path / "b.npz"), test_images="pictures", test_labels="kinds")
    splits = data.load()
    assert splits.label_names == ["cat", "dog"] and splits.test.labels == [1, 0] * 3


def test_label_names_declare_the_classes(tmp_path: Path) -> None:
    splits = Npz(path=save_npz(tmp_path / "a.npz"), label_names=["a", "b", "c", "d"]).load()
    assert splits.label_names == ["a", "b", "c", "d"] and {*splits.train.labels} == {0, 1, 2}


@pytest.mark.parametrize(
    ("array", "expected", "white"),
    [
        (noise(60, 1)[:, 0].numpy(), noise(60, 1), 255.0),
        (noise(60).numpy(), noise(60), 255.0),
        (channels_last(noise(60)).astype(np.int64), noise(60), 255.0),
        (noise(60, 1)[:, 0].numpy() > 99, (noise(60, 1) > 99).to(torch.uint8), 1.0),
        (noise(60).numpy() / 255.0, (noise(60).double() / 255).float(), 1.0),
        (noise(60, 4).numpy().astype(np.float16), noise(60, 4).float(), 1.0),
    ],
    ids=["NHW", "NCHW", "int64 NHWC", "bool", "float64", "float16"],
)
def test_arrays_of_every_layout_and_type(tmp_path: Path, array: Any, expected: Tensor, white: float) -> None:
    data = Npz(path=save_npz(tmp_path / "a.npz", x_train=array))
    read = data._rows("train", None)
    assert read is not None and torch.equal(read.pixels, expected) and read.pixels.is_contiguous() and read.white == white
    assert bool(read.notes) == (array.dtype == np.float16)  # floats to 255 are noted


@pytest.mark.parametrize(("layout", "size"), [("nhwc", (3, 6)), ("nchw", (6, 3))])
def test_an_ambiguous_layout_is_asked_for(tmp_path: Path, layout: str, size: tuple[int, int]) -> None:
    path = save_npz(tmp_path / "a.npz", x_train=noise(60, 3, 6)[..., :3].numpy())
    with pytest.raises(ValueError, match=r"has shape \[60, 3, 6, 3\], which could be channels first or last. Set data.layout=nhwc"):
        Npz(path=path).load()
    read = Npz(path=path, layout=layout)._rows("train", None)
    assert read is not None and read.pixels.shape == (60, 3, *size)


def test_a_scale_of_ones_own(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", x_train=noise(60).numpy().astype(np.uint16) * 16)
    with pytest.raises(ValueError, match=r"integers from 0 to 4080.*Set data.white=4080"):
        Npz(path=path).load()
    data = Npz(path=path, white=4080).build(RGB, seed=0)
    assert data.white == 4080 and 0.3 < (data.spec.mean or (0,))[0] < 0.7


def test_images_of_another_size_than_the_models_are_resized_and_noted(tmp_path: Path) -> None:
    data = Npz(path=save_npz(tmp_path / "a.npz")).build(ImageSpec(size=(8, 8)), seed=0)
    assert data.spec.size == (8, 8) and data.example_inputs(2)["pixel_values"].shape == (2, 3, 8, 8)
    assert any("60 images of" in note and "resized to 8 x 8 (height x width) from 6 x 6" in note for note in data.notes)
    assert Npz(path=save_npz(tmp_path / "b.npz"), size=4).build(ImageSpec(size=(8, 8)), seed=0).spec.size == (4, 4)


def pickled() -> np.ndarray[Any, Any]:
    return np.array([{"a": 1}] * 60, dtype=object)


def with_nan() -> np.ndarray[Any, Any]:
    array = noise(60).numpy().astype(np.float32)
    array[7, 0, 0, 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"x_train": None}, {}, "no array with the images of the train split.* arrays are y_train. Set data.train_images=y_train"),
        ({"y_train": None}, {}, "no array with the labels of the train split"),
        ({"x_test": noise(5).numpy()}, {}, "no array with the labels of the test split"),
        ({}, {"train_images": "pictures"}, "has no array 'pictures'; its arrays are x_train, y_train. Set data.train_images=x_train"),
        ({"x_train": np.zeros((60, 64))}, {}, r"has shape \[60, 64\]; images are \[N, H, W\]"),
        ({"x_train": np.zeros((60, 7, 6, 5))}, {}, r"has neither 1, 3 nor 4 channels.*data.layout=nhwc"),
        ({"x_train": np.zeros((0, 6, 6))}, {}, "has no images"),
        ({"x_train": np.full((60, 6, 6), "a")}, {}, "values of type <U1"),
        ({"x_train": with_nan()}, {}, "NaN or infinite values, first in image 7"),
        ({"x_train": noise(60).numpy().astype(np.int16) - 128}, {}, "integers from -128 to 127"),
        ({"x_train": pickled()}, {}, "would unpickle Python objects"),
        ({"y_train": np.zeros((60, 3))}, {}, r"has shape \[60, 3\]; labels are \[N\], one per image \(of one-hot rows"),
        ({"y_train": np.zeros(59)}, {}, "has 59 labels for 60 images"),
        ({"y_train": np.zeros(60, int)}, {}, "60 training examples of 1 class; .*data.train_labels=NAME"),
        ({"y_train": np.arange(60) / 7}, {}, "label of row 1 .* is 0.14.*; a label is an integer or a name"),
        ({"x_test": noise(4).numpy(), "y_test": np.array([0, 1, 2, 9])}, {}, "has 1 labels that are not classes: 9; the training examples"),
        ({}, {"label_names": ["a", "b"]}, r"20 labels that are not classes: 2; valid: 0 to 1 \(a, b\)"),
        ({}, {"train": "b.npz"}, "both give training images"),
        ({}, {"layout": "hwc"}, "data.layout is 'hwc'; valid: auto, nhwc, nchw"),
        ({}, {"white": 0.0}, "data.white is 0.0"),
    ],
)
def test_unusable_arrays_say_what_to_type(tmp_path: Path, arrays: dict[str, Any], options: dict[str, Any], message: str) -> None:
    path = save_npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        Npz(path=path, **options).load()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[400:420] = bytes(20)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (cut_short, "cannot be read as .npz .*Copy it again, or set data.path=FILE"),
        (damaged, "cannot be read as .npz"),
        (lambda path: path.write_bytes(b""), "cannot be read as .npz"),
        (lambda path: path.write_text("no arrays"), "no .npz file of plain arrays"),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), "is one array, not a .npz file of several"),
    ],
)
def test_damaged_files_are_told_apart(tmp_path: Path, break_it: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "a.npz"
    save_npz(path)
    break_it(path)
    with pytest.raises(ValueError, match=message):
        Npz(path=str(path)).load()


def test_missing_files_say_what_to_type() -> None:
    with pytest.raises(FileNotFoundError, match=r"data.path=nowhere.npz is not a file .*data.path=FILE"):
        Npz(path="nowhere.npz").load()
    with pytest.raises(ValueError, match=r"data=npz was given no file.*data.path=FILE"):
        Npz().load()


def test_cifar10_loads_all_its_images() -> None:
    path = shared_data() / "cifar10" / "cifar10_subset.npz"
    if not path.is_file():
        pytest.skip("CIFAR-10 is not here")
    splits = Npz(path=str(path)).load()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (9000, 1000, 5000)
    assert splits.train.pixels.shape[1:] == (3, 32, 32) and splits.notes == []


# --- folders ------------------------------------------------------------------------------------------------------------------


def write_folder(
    root: Path, count: int = 20, size: int = 6, mode: str = "RGB", seed: int = 0, classes: tuple[str, ...] = ("cat", "dog")
) -> str:
    pixels = noise(count * len(classes), 3 if mode == "RGB" else 1, size, seed)
    for i, image in enumerate(pixels):
        folder = root / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        values = image.permute(1, 2, 0).numpy()
        Image.fromarray(values if mode == "RGB" else values[..., 0]).save(folder / f"{i:03d}.png")
    return str(root)


def test_a_folder_per_class_is_read_to_the_last_image(tmp_path: Path) -> None:
    splits = ImageFolder(train=write_folder(tmp_path / "a"), test=write_folder(tmp_path / "b", 3, seed=1)).load()
    assert splits.label_names == ["cat", "dog"] and splits.test.labels == [0] * 3 + [1] * 3
    assert every_image(splits) == sorted(Images(torch.cat([noise(40), noise(6, seed=1)]), [0] * 46).keys())
    for part in (splits.train, splits.validation):
        assert part.labels == [int(n) % 2 for n in part.pixels[:, 0, 0, 0]]


def test_classes_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    assert ImageFolder(train=write_folder(tmp_path, classes=("10", "9", "1"))).load().label_names == ["1", "9", "10"]


def test_subfolders_hidden_files_and_other_files(tmp_path: Path) -> None:
    root = Path(write_folder(tmp_path / "a"))
    (root / "cat" / "more").mkdir()
    Image.fromarray(channels_last(noise(1, seed=9))[0]).save(root / "cat" / "more" / "x.PNG")
    (root / "cat" / "notes.txt").write_text("")
    Image.fromarray(channels_last(noise(1, seed=9))[0]).save(root / "top.png")
    (root / ".cache").mkdir()
    (root / "dog" / ".DS_Store").write_bytes(b"")
    splits = ImageFolder(train=str(root)).load()
    assert len(every_image(splits)) == 41
    assert any("2 files of" in note and "cat/notes.txt, top.png" in note for note in splits.notes)


def test_gray_images_among_coloured_ones_become_rgb(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", classes=("cat",))
    write_folder(tmp_path / "a", mode="L", classes=("dog",))
    splits = ImageFolder(train=str(tmp_path / "a")).load()
    assert splits.train.pixels.shape[1] == 3
    assert "20 of 40 images of" in splits.notes[0] and "are gray" in splits.notes[0]
    assert ImageFolder(train=write_folder(tmp_path / "b", mode="L")).load().train.pixels.shape[1] == 1


def test_images_of_several_sizes_need_one_to_be_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", classes=("cat",))
    write_folder(tmp_path / "a", size=9, classes=("dog",))
    root = str(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"2 different sizes \(height x width\): 6 x 6 \(cat/000.png\), 9 x 9 \(dog/000.png\).*data.size=6"
    ):
        ImageFolder(train=root).build(RGB, seed=0)
    data = ImageFolder(train=root, size=6).build(RGB, seed=0)
    assert data.spec.size == (6, 6)
    assert any("20 images of" in note and "resized to 6 x 6 (height x width) from 9 x 9" in note for note in data.notes)
    assert ImageFolder(train=root).build(ImageSpec(size=(12, 10)), seed=0).spec.size == (12, 10)


def test_every_damaged_image_is_named(tmp_path: Path) -> None:
    root = Path(write_folder(tmp_path / "a"))
    (root / "cat" / "text.jpg").write_text("no image")
    (root / "dog" / "empty.png").write_bytes(b"")
    whole = (root / "dog" / "001.png").read_bytes()
    (root / "dog" / "short.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"3 of the 43 images .*: cat/text.jpg, dog/empty.png, dog/short.png .*Delete or replace"):
        ImageFolder(train=str(root)).load()


def test_pillow_modes_become_gray_or_rgb() -> None:
    colour = Image.fromarray(channels_last(noise(1))[0])
    for mode, channels in (("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3), ("CMYK", 3)):
        assert from_pillow(colour.convert(mode)).shape == (channels, 6, 6)
    for mode in ("I", "F", "I;16"):
        with pytest.raises(ValueError, match="more than 8 bits"):
            from_pillow(colour.convert("L").convert("I").convert(mode))


def test_an_image_is_turned_as_its_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    file = io.BytesIO()
    Image.fromarray(channels_last(noise(1))[0][:, :4].copy()).save(file, "PNG", exif=exif)
    assert from_pillow(Image.open(file)).shape == (3, 4, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root.mkdir(), "has no folders in it; valid: one per class"),
        (lambda root: (root / "cat").mkdir(parents=True), "1 class folders .* hold no image .*: cat"),
        (lambda root: write_folder(root, classes=("cat",)), "20 training examples of 1 class"),
        (
            lambda root: write_folder(root / "train") + write_folder(root / "val"),
            r"are splits, not classes.*data.train=.*data.validation=.*val",
        ),
        (lambda root: write_folder(root, 3), "too few to cut a test split.*data=image_folder data.test=DIR"),
    ],
)
def test_unusable_folders_say_what_to_type(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        ImageFolder(train=str(tmp_path / "a")).load()


def test_missing_folders_and_unknown_classes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.train=nowhere is not a folder .*data.train=DIR"):
        ImageFolder(train="nowhere").load()
    with pytest.raises(ValueError, match=r"data.train=DIR"):
        ImageFolder().load()
    test = write_folder(tmp_path / "b", 3, seed=1, classes=("cat", "bird"))
    with pytest.raises(ValueError, match="3 labels that are not classes: bird; the training examples have cat, dog"):
        ImageFolder(train=write_folder(tmp_path / "a"), test=test).load()


# --- the hub ------------------------------------------------------------------------------------------------------------------


def hub_dataset(broken: bool = False) -> Any:
    import datasets

    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"]), "id": datasets.Value("int64")}
    )

    def png(pixels: np.ndarray[Any, Any]) -> dict[str, Any]:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    def split(count: int, seed: int) -> Any:
        images = [png(image) for image in channels_last(noise(count, seed=seed))]
        if broken:
            images[2]["bytes"] = b"no image"
        columns = {"img": images, "label": [i % 2 for i in range(count)], "id": list(range(count))}
        return datasets.Dataset.from_dict(columns, features=features)

    return datasets.DatasetDict(train=split(40, 0), test=split(10, 1))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the next `load_dataset` returns, or raises."""
    import datasets

    answer: dict[str, Any] = {"value": hub_dataset()}

    def load_dataset(*_: Any, **__: Any) -> Any:
        if isinstance(answer["value"], Exception):
            raise answer["value"]
        return answer["value"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return answer


@pytest.mark.usefixtures("hub")
def test_a_hub_dataset_is_read_to_the_last_image() -> None:
    splits = HubImages(name="owner/name").load()
    assert splits.label_names == ["no", "yes"]
    assert torch.equal(splits.test.pixels, noise(10, seed=1)) and splits.test.labels == [0, 1] * 5
    assert every_image(splits) == sorted(Images(torch.cat([noise(40), noise(10, seed=1)]), [0] * 50).keys())


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data.name=owner/name"),
        ({"name": "a/b", "test_split": "dev"}, "has no split 'dev'; its splits are train, test. Set data.test_split=train"),
        ({"name": "a/b", "image_column": "id"}, "no column 'id' that holds images; those that do: img, .*Set data.image_column=img"),
        ({"name": "a/b", "label_column": "kind"}, "has no column 'kind'; its columns are img, label, id. Set data.label_column=label"),
    ],
)
def test_hub_options_that_do_not_fit_say_what_to_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HubImages(**options).load()


def test_hub_failures_name_the_local_way_and_the_row(hub: dict[str, Any]) -> None:
    hub["value"] = ConnectionError("Couldn't reach it")
    with pytest.raises(OSError, match=r"could not be downloaded.*data=image_folder data.train=DIR"):
        HubImages(name="a/b").load()
    hub["value"] = hub_dataset(broken=True)
    with pytest.raises(ValueError, match="image of row 2 of the train split of a/b cannot be read"):
        HubImages(name="a/b").load()
