"""The classification tasks of GLUE (Wang et al. 2018, arXiv 1804.07461), from the Hugging Face hub.

The hub's test splits have hidden labels (-1): only GLUE's server can score them. What everybody reports is accuracy on the validation
split, so that is our test split, and validation examples are cut from the training split. STS-B (a regression) and AX (no training
examples) are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtrain.hub import from_hub
from qtrain.registry import register
from qtrain.splits import Splits
from qtrain.text import Examples, TextClassification, pick_rows

TASKS: dict[str, tuple[str, str | None]] = {
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
"""Columns of the sentence, or of both sentences."""


@register("data", "glue")
@dataclass
class Glue(TextClassification):
    """A classification task of GLUE, from the Hugging Face hub (`data.task=sst2`)."""

    task: str = "sst2"
    """cola, sst2, mrpc, qqp, mnli (tested on its matched part), qnli, rte, wnli."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"data.task is {self.task!r}; valid: {', '.join(TASKS)}. Set data.task=sst2, say.")

    def load(self) -> Splits[Examples]:
        """Download the task, or take it from the cache of `datasets`, and split it.

        Raises:
            OSError: if the hub cannot be reached.
        """
        found = from_hub("nyu-mll/glue", self.task)
        test = "validation_matched" if self.task == "mnli" else "validation"
        text, pair = TASKS[self.task]
        rows = {}
        for split in ("train", test):
            columns = {name: found[split][name][:] for name in (text, pair, "label") if name}
            rows[split] = pick_rows(f"the {split} split of GLUE {self.task}", columns, text, "label", pair)
        note = f"tested on the {test} split of GLUE {self.task}: the labels of its test split are hidden"
        return self.assemble(rows["train"], None, rows[test], found["train"].features["label"].names, notes=[note])
