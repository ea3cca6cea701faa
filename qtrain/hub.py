"""Datasets of the Hugging Face hub: fetching one, with errors that name the local way, and choosing its splits.

`datasets` keeps what it downloads in its own cache (HF_HOME), never in the folder of a run.
"""

from __future__ import annotations

from typing import Any

LOCAL_TEXT = "data=csv data.train=FILE data.test=FILE data.text_column=text data.label_column=label"
LOCAL_IMAGES = "data=image_folder data.train=DIR data.test=DIR, or data=npz data.path=FILE"


def from_hub(name: str, config: str | None, revision: str | None = None, local: str = LOCAL_TEXT, streaming: bool = False) -> Any:
    """All splits of a dataset of the Hugging Face hub, as `datasets.load_dataset` gives them.

    Args:
        local: what to type to use local files instead, for messages.
        streaming: fetch rows when they are read, for a dataset that is larger than the disk.

    Raises:
        OSError: if the hub cannot be reached and the dataset is not in the cache of `datasets`.
        ValueError: if there is no such dataset or configuration.
    """
    import datasets

    shown = name + (f" ({config})" if config else "")
    remedy = f"or use local files: {local}"
    try:
        return datasets.load_dataset(name, config, revision=revision, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as e:
        raise ValueError(f"the hub has no dataset {shown} that can be read from here. Correct data.name=owner/name, {remedy}") from e
    except OSError as e:
        raise OSError(
            f"dataset {shown} could not be downloaded ({type(e).__name__}): the hub cannot be reached, and the dataset is not in the cache "
            f"(HF_HOME). Run once with a network, {remedy}"
        ) from e
    except (ValueError, RuntimeError) as e:
        raise ValueError(f"dataset {shown} cannot be loaded: {str(e).splitlines()[0]}. Set data.config=NAME, {remedy}") from e


def choose_splits(found: Any, name: str, train: str, validation: str | None, test: str | None) -> dict[str, str]:
    """Which split of a dataset is train, validation and test; validation and test are left out where they are cut from training.

    Args:
        found: splits by name.
        name: of the dataset, for messages.
        train, validation, test: options of the user; None takes the split of that name where it is free.

    Raises:
        ValueError: if a split does not exist, or test and validation are the same.
    """
    test = test or ("test" if "test" in found else None)
    validation = validation or ("validation" if "validation" in found and test != "validation" else None)
    if test is not None and test == validation:
        raise ValueError(f"data.test_split and data.validation_split are both {test!r}; they must differ. Set data.validation_split=null")
    splits = {key: split for key, split in (("train", train), ("validation", validation), ("test", test)) if split}
    for key, split in splits.items():
        if split not in found:
            raise ValueError(f"{name} has no split {split!r}; its splits are {', '.join(found)}. Set data.{key}_split={next(iter(found))}")
    return splits


def label_names(found: Any, split: str, column: str) -> list[str] | None:
    """The class names that a dataset declares, or None."""
    return getattr(found[split].features.get(column), "names", None)
