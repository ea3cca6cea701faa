"""The receipt's comparisons: what counts as equal, what fails, and that nothing that is not a number passes."""

import json
import math
import subprocess
import sys

import pytest
import torch

from qtrain.receipt import Receipt, Tolerances, differing, max_abs, nmse, top1_agreement


def test_equal_values_are_equal_and_one_ulp_is_not() -> None:
    a = torch.tensor([0.0, 1.0, -2.5, 3e-39])
    assert differing(a, a.clone()) == 0
    assert differing(a, torch.nextafter(a, torch.full_like(a, math.inf))) == 4


def test_the_sign_of_zero_does_not_count() -> None:
    assert differing(torch.tensor([0.0, -0.0]), torch.tensor([-0.0, 0.0])) == 0


def test_nan_is_no_number() -> None:
    assert differing(torch.tensor([math.nan]), torch.tensor([0.0])) == 1


def test_nmse_is_relative_to_the_reference() -> None:
    a = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    assert nmse(a, a) == 0.0
    assert nmse(a, 1.1 * a) == pytest.approx(0.01, rel=1e-4)
    assert nmse(100 * a, 110 * a) == pytest.approx(nmse(a, 1.1 * a), rel=1e-4)
    assert nmse(torch.zeros(2), torch.zeros(2)) == 0.0
    assert nmse(torch.zeros(2), torch.ones(2)) == math.inf


def test_max_abs_and_agreement() -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[2.5, 2.0], [3.0, 0.0]])
    assert max_abs(a, b) == 1.5
    assert top1_agreement(a, b) == 0.5


def test_a_tensor_that_is_missing_or_misshapen_or_wrong_fails() -> None:
    w = torch.ones(2, 3)
    receipt = Receipt()
    receipt.add_tensor("a", w, w.clone())
    assert receipt.passed
    receipt.add_tensor("b", w, None)
    receipt.add_tensor("c", w, w.T.contiguous())
    receipt.add_tensor("d", w, w + 1)
    assert (receipt.tensors, receipt.tensors_bit_exact, len(receipt.failures)) == (4, 1, 3)
    assert not receipt.passed


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail(bad: float) -> None:
    a = torch.randn(8, 2)
    b = a.clone()
    b[3, 0] = bad
    receipt = Receipt()
    receipt.add_logits(a, b, Tolerances())
    assert not receipt.passed
    json.loads(json.dumps(receipt.json(), allow_nan=False))


def test_logits_within_and_beyond_the_tolerance() -> None:
    a = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    close, far = Receipt(), Receipt()
    close.add_logits(a, a + 1e-4 * a.roll(1), Tolerances())
    far.add_logits(a, a + 0.1 * a.roll(1), Tolerances())
    assert close.passed
    assert any("logits_nmse" in f for f in far.failures) and any("top1_agreement" in f for f in far.failures)


def test_metrics_are_compared_absolutely_and_none_may_be_missing() -> None:
    receipt = Receipt()
    receipt.add_metrics({"accuracy": 0.9, "loss": 0.3}, {"accuracy": 0.9011, "loss": 0.304}, Tolerances())
    assert [f.split()[0] for f in receipt.failures] == ["loss"]
    receipt.add_metrics({"perplexity": 9.0}, {}, Tolerances())
    assert len(receipt.failures) == 2


def test_activations_have_tolerances_of_their_own() -> None:
    wide = Tolerances().for_activations()
    assert wide.logits_nmse > Tolerances().logits_nmse and wide.top1_agreement < Tolerances().top1_agreement


def test_a_layer_that_computes_on_another_grid_fails() -> None:
    y = torch.randn(8, 16)
    receipt = Receipt()
    receipt.add_layer("a", y, y * (1 + 1e-5), Tolerances())
    assert receipt.passed and receipt.layers == 1
    receipt.add_layer("b", y, y * (1 + 1e-2), Tolerances())
    assert "does not quantize its activations" in receipt.failures[0]


@pytest.mark.parametrize(("name", "value"), [("top1_agreement", 1.5), ("logits_nmse", -1.0), ("metric", math.nan)])
def test_a_bad_tolerance_says_what_to_type(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Set export\.EXPORTER\.tolerances\.{name}="):
        Tolerances(**{name: value})


def test_json_holds_what_was_found() -> None:
    receipt = Receipt(
        fused={"BiasGelu": 2}, latency_ms={"quantized": {"1x64": 1.5}}, fallbacks=[{"name": "model.onnx", "why": "no fusion"}]
    )
    a = torch.randn(4, 2)
    receipt.add_logits(a, a, Tolerances())
    values = receipt.json()
    assert values["passed"] and values["top1_agreement"] == 1.0 and values["fallbacks"][0]["why"] == "no fusion"


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, qtrain.receipt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
