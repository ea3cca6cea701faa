"""Image classification data: what an example is, how images of files become tensors, and the options every image dataset shares.

Images stay as they were read, 8 bits per value where the file has 8 bits, and become normalised float32 when a batch is made:
x = (pixel / white - mean) / std, per channel. What the model reads (channels, size, mean, std) it says in an `ImageSpec`; where it leaves
mean and std open they are those of the training split. Images of another size than the model's are scaled to cover it and cut
around the centre, so that proportions stay.

How examples become three clean splits is in `qtrain/splits.py`; what a dataset file adds is how its images are read: see `qtrain/data/`.

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.lazy import lazy_import
from qtrain.splits import Classification, Part, Splits, Unnumbered, listed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from qtrain.datamodule import ImageDataModule
else:
    np, torch = lazy_import("numpy"), lazy_import("torch")

Size = tuple[int, int]
"""Height and width, pixels."""
AUGMENTS = ("none", "crop_flip")
PADDING = 4
"""Pixels of black around an image that is cropped at random: He et al. 2015 (arXiv 1512.03385), section 4.2."""
_CHUNK = 1024
_MANY = 2000
"""Images from which reading takes seconds and shows its progress."""


@dataclass(frozen=True)
class ImageSpec:
    """What an image model reads: float32 [N, channels, *size], x = (pixel / white - mean) / std."""

    input_name: str = "pixel_values"
    """Name of the parameter of `forward`."""
    channels: int = 3
    size: Size | None = None
    """None: any."""
    mean: tuple[float, ...] | None = None
    """Per channel; None: not known, the training split's."""
    std: tuple[float, ...] | None = None


@dataclass(eq=False)
class Images(Part):
    """Images of one size and the number of the class of each."""

    pixels: Tensor
    """uint8 or float32 [N, C, H, W]."""
    labels: list[int]
    white: float = 255.0
    """Value of full brightness, which becomes 1."""

    def take(self, indices: Iterable[int]) -> Images:
        """The images at ``indices``, in that order."""
        chosen = list(indices)
        return Images(self.pixels[chosen], [self.labels[i] for i in chosen], self.white)

    def keys(self) -> list[bytes]:
        """What makes two images the same input: 128 bits of a hash of their pixels."""
        return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in self.pixels.numpy()]


@dataclass(eq=False)
class ImageRows(Unnumbered[Images]):
    """One split as it was read: images are checked and of one size, labels are still what the file says."""

    where: str
    """How messages name it: `data.train=folder`."""
    pixels: Tensor
    """uint8 or float32 [N, C, H, W]."""
    labels: list[Any]
    white: float = 255.0
    notes: list[str] = field(default_factory=list)

    def numbered(self, labels: list[int]) -> Images:
        """The same images with numbers for labels."""
        return Images(self.pixels, labels, self.white)


@dataclass
class ImageClassification(Classification):
    """Options that all image classification datasets share."""

    size: int | None = None
    """Height and width to which images are brought, pixels; null: the model's, else the images' own, which must then be one."""
    mean: list[float] | None = None
    """Mean per channel where 1 is full brightness; null: the model's, else that of the training split."""
    std: list[float] | None = None
    """Standard deviation per channel; null: the model's, else that of the training split."""
    augment: str = "none"
    """Of training images: none, or crop_flip (crop at random after padding with 4 black pixels, mirror every other one)."""

    relabel: ClassVar[str] = "data=npz data.path=FILE to data with other labels"
    own_split: ClassVar[str] = "data=image_folder data.{split}=DIR"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("size")
        if self.augment not in AUGMENTS:
            raise ValueError(f"data.augment is {self.augment!r}; valid: {', '.join(AUGMENTS)}. Set data.augment=none")
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError(
                f"data.mean={self.mean} and data.std={self.std} do not belong together; give both, one value per channel, or neither. "
                "Set data.mean=[0.5] data.std=[0.25], say."
            )
        if not all(math.isfinite(m) for m in self.mean or ()) or not all(math.isfinite(s) and s > 0 for s in self.std or ()):
            raise ValueError(f"data.mean={self.mean} must be finite and data.std={self.std} above 0. Set data.mean=null data.std=null")

    @abstractmethod
    def load(self, size: Size | None = None) -> Splits[Images]:
        """Read the dataset and split it.

        Args:
            size: what to bring images to; None: as they are.

        Raises:
            ValueError: if the images cannot be used for classification.
            OSError: if they cannot be read.
        """

    def build(self, processor: Any, seed: int) -> ImageDataModule:
        """Read, split and fit to what the model reads.

        Args:
            processor: the model's `ImageSpec`.
            seed: seed of the training order and of augmentation.

        Raises:
            ValueError: if the model reads texts, or another number of channels.
        """
        from qtrain.datamodule import ImageDataModule

        if not isinstance(processor, ImageSpec):
            raise ValueError(
                f"data={self.registered_name} gives images, and the model reads texts. Set model=cifar_resnet (or torchvision, timm), or "
                "data=sample_reviews (or csv, hub, glue)"
            )
        splits = self.load((self.size, self.size) if self.size else processor.size)
        notes = list(splits.notes)
        _require_channels(splits.train.pixels.shape[1], processor.channels, notes)
        mean, std = self._normalisation(splits.train, processor, notes)
        height, width = splits.train.pixels.shape[2:]
        return ImageDataModule(
            replace(splits, notes=notes),
            replace(processor, size=(height, width), mean=mean, std=std),
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
            calibration_examples=self.calibration_examples,
            augment=self.augment,
            seed=seed,
        )

    def divide(
        self,
        train: ImageRows,
        validation: ImageRows | None = None,
        test: ImageRows | None = None,
        label_names: list[str] | None = None,
    ) -> Splits[Images]:
        """`assemble`, for images that are checked to be alike in all splits first.

        Raises:
            ValueError: if they differ in size, channels or range, and for what `assemble` refuses.
        """
        rows = [part for part in (train, validation, test) if part is not None]
        notes = [note for part in rows for note in part.notes]
        if {part.pixels.shape[1] for part in rows} == {1, 3}:
            for part in (part for part in rows if part.pixels.shape[1] == 1):
                part.pixels = part.pixels.expand(-1, 3, -1, -1).contiguous()
                notes.append(f"the gray images of {part.where} became RGB by repeating their channel, since other splits have colour")
        for part in rows[1:]:
            _require_alike(train, part)
        return self.assemble(train, validation, test, label_names, notes)

    def _normalisation(self, train: Images, spec: ImageSpec, notes: list[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation, one per channel of the model."""
        if self.mean is not None and self.std is not None:
            if len(self.mean) not in (1, spec.channels):
                raise ValueError(
                    f"data.mean and data.std have {len(self.mean)} values and the model reads {spec.channels} channels; valid: one value, "
                    f"or one per channel. Set data.mean=null data.std=null for those of the training split"
                )
            return _repeated(tuple(self.mean), spec.channels), _repeated(tuple(self.std), spec.channels)
        if spec.mean is not None and spec.std is not None:
            return _repeated(spec.mean, spec.channels), _repeated(spec.std, spec.channels)
        mean, std = statistics(train)
        notes.append(
            f"images are normalised with the training split's own data.mean=[{_numbers(mean)}] data.std=[{_numbers(std)}]; a model that "
            "was trained before needs those of its training"
        )
        return _repeated(mean, spec.channels), _repeated(std, spec.channels)


def statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixel / white, to four digits; the deviation of a constant channel is given as 1."""
    count = images.pixels.numel() / images.pixels.shape[1]
    total = torch.zeros(images.pixels.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for start in range(0, len(images), _CHUNK):
        part = images.pixels[start : start + _CHUNK].double() / images.white
        total += part.sum((0, 2, 3))
        squares += part.square().sum((0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
    return tuple(float(f"{m:.4g}") for m in mean.tolist()), tuple(float(f"{s:.4g}") for s in std.tolist())


def normalised(pixels: Tensor, white: float, spec: ImageSpec) -> Tensor:
    """Model inputs.

    Args:
        pixels: uint8 or float32 [N, C, H, W], C that of ``spec``, or 1, which is repeated.
        spec: with mean and std.

    Returns:
        float32 [N, spec.channels, H, W].
    """
    mean, std = (torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1) for values in (spec.mean, spec.std))
    return (pixels.float() / white - mean) / std


def crop_flip(pixels: Tensor, generator: np.random.Generator) -> Tensor:
    """Each image cropped to its own size at random after padding with black, every other one mirrored left to right.

    Args:
        pixels: [N, C, H, W].
    """
    count, channels, height, width = pixels.shape
    top, left = torch.from_numpy(generator.integers(0, 2 * PADDING + 1, (2, count, 1)))
    mirrored = torch.from_numpy(generator.integers(0, 2, (count, 1))).bool()
    rows = top + torch.arange(height)
    columns = left + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
    padded = torch.nn.functional.pad(pixels, (PADDING,) * 4)
    n, c = torch.arange(count).reshape(-1, 1, 1, 1), torch.arange(channels).reshape(1, -1, 1, 1)
    return padded[n, c, rows.reshape(count, 1, height, 1), columns.reshape(count, 1, 1, width)]


def resize(pixels: Tensor, size: Size) -> Tensor:
    """Scale to cover ``size`` (bilinear, antialiased), then cut around the centre; the dtype stays.

    Args:
        pixels: uint8 or float32 [N, C, H, W].
    """
    height, width = pixels.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    covering = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    scaled = torch.nn.functional.interpolate(pixels.float(), covering, mode="bilinear", antialias=True, align_corners=False)
    top, left = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
    cut = scaled[:, :, top : top + size[0], left : left + size[1]]
    return (cut.round().clamp(0, 255) if pixels.dtype == torch.uint8 else cut).to(pixels.dtype)


def from_pillow(image: Any) -> Tensor:
    """A Pillow image as uint8 [1, H, W] (gray) or [3, H, W] (colour); transparency is left out.

    Raises:
        ValueError: if it has more than 8 bits per value.
    """
    from PIL import ImageOps

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has pixels of mode {image.mode!r}, more than 8 bits each; save it with 8")
    upright = ImageOps.exif_transpose(image).convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    values = torch.from_numpy(np.array(upright))
    return values.unsqueeze(0) if values.ndim == 2 else values.permute(2, 0, 1).contiguous()


def gather(where: str, images: Iterable[tuple[str, Tensor]], size: Size | None, notes: list[str]) -> Tensor:
    """Images of several sizes and colours as one tensor.

    Args:
        images: name and pixels, uint8 [1 or 3, H, W].
        size: what to bring them to; None: they must be of one size.
        notes: where to say what was changed.

    Returns:
        uint8 [N, C, H, W].

    Raises:
        ValueError: if sizes differ, naming two that do.
    """
    seen: dict[Size, str] = {}
    parts, resized = [], 0
    for name, pixels in images:
        own: Size = (pixels.shape[1], pixels.shape[2])
        seen.setdefault(own, name)
        if size is not None and own != size:
            pixels, resized = resize(pixels.unsqueeze(0), size)[0], resized + 1
        parts.append(pixels)
    if size is None and len(seen) > 1:
        examples = ", ".join(f"{shown(own)} ({name})" for own, name in list(seen.items())[:3])
        raise ValueError(
            f"the images of {where} have {len(seen)} different sizes (height x width): {examples}; a batch has one. "
            f"Set data.size={min(min(own) for own in seen)}, say"
        )
    if resized:
        notes.append(_resized_note(resized, where, list(seen), size))
    gray = sum(len(part) == 1 for part in parts)
    if 0 < gray < len(parts):
        parts = [part.expand(3, -1, -1) for part in parts]
        notes.append(f"{gray} of {len(parts)} images of {where} are gray and became RGB by repeating their channel")
    return torch.stack(parts)


def fitted(where: str, pixels: Tensor, size: Size | None, notes: list[str]) -> Tensor:
    """Images of one size, [N, C, H, W], brought to ``size``."""
    own: Size = (pixels.shape[2], pixels.shape[3])
    if size is None or size == own:
        return pixels
    notes.append(_resized_note(len(pixels), where, [own], size))
    return torch.cat([resize(pixels[i : i + _CHUNK], size) for i in range(0, len(pixels), _CHUNK)])


def shown(size: Size) -> str:
    """A size for messages."""
    return f"{size[0]} x {size[1]}"


def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    """``items``, with a bar on a terminal where there are many."""
    if len(items) < _MANY:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description=f"reading {len(items):,} images of {what}", console=Console(stderr=True), transient=True)


def _resized_note(count: int, where: str, sizes: list[Size], size: Size | None) -> str:
    assert size is not None
    return f"{count} images of {where} were resized to {shown(size)} (height x width) from {listed(shown(s) for s in sizes if s != size)}"


def _require_channels(given: int, read: int, notes: list[str]) -> None:
    if given == read:
        return
    if (given, read) != (1, 3):
        raise ValueError(
            f"the images have {given} channels and the model reads {read}. Set model.channels={given} (a model that has no such option "
            f"reads images of {read} only), or convert the images"
        )
    notes.append("the images are gray and the model reads RGB: their channel is repeated")


def _require_alike(train: ImageRows, other: ImageRows) -> None:
    for what, mine, theirs, remedy in (
        ("channels", train.pixels.shape[1], other.pixels.shape[1], "Convert one of them"),
        (
            "height x width",
            shown((train.pixels.shape[2], train.pixels.shape[3])),
            shown((other.pixels.shape[2], other.pixels.shape[3])),
            f"Set data.size={min(train.pixels.shape[2:])}",
        ),
        ("type", str(train.pixels.dtype)[6:], str(other.pixels.dtype)[6:], "Save both as uint8"),
        ("full brightness", train.white, other.white, "Save both with one range"),
    ):
        if mine != theirs:
            raise ValueError(f"the images of {train.where} and {other.where} differ in {what}: {mine} and {theirs}. {remedy}")


def _repeated(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{v:g}" for v in values)
