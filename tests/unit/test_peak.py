"""The peak of a part of a run, and of the whole."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from qtrain.peak import measured_peak, peak_rss_bytes

MB = 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process forget its peak")
def test_a_part_is_measured_by_itself_and_the_whole_is_not_forgotten() -> None:
    large = np.ones(400 * MB, np.uint8)
    whole = peak_rss_bytes()
    del large
    with measured_peak() as small:
        part = np.ones(100 * MB, np.uint8)
        del part
    assert 90 * MB < small["rss_peak_bytes"] - small["rss_before_bytes"] < 200 * MB
    assert small["rss_peak_bytes"] < whole - 100 * MB and peak_rss_bytes() >= whole


def test_where_nothing_can_be_measured_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtrain.peak._forget", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with measured_peak() as found:
        pass
    assert found == {} and peak_rss_bytes() > 0


@pytest.mark.parametrize(
    ("precision", "quantizer", "width"),
    [
        ("32-true", {"compute_dtype": "bfloat16", "type": "nf4"}, 4),
        ("bf16-mixed", {"compute_dtype": "bfloat16", "type": "nf4"}, 2),
        ("bf16-mixed", {"compute_dtype": "float32", "type": "nf4"}, 4),  # products, and what waits for the backward pass, are in float32
        ("bf16-mixed", {"compute_dtype": "float32", "type": "int8"}, 2),
        ("bf16-mixed", {}, 2),
    ],
)
def test_the_estimate_counts_activations_in_the_type_of_the_products(precision: str, quantizer: dict[str, str], width: int) -> None:
    from qtrain.memory import width_bytes

    config = SimpleNamespace(trainer={"precision": precision}, quantizer=SimpleNamespace(**quantizer))
    assert width_bytes(config) == width
