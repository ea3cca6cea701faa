"""Language models: chunked losses and scores against the whole logits, and the comparison with a runtime."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from qtrain import language_task
from qtrain.grids.affine import Affine
from qtrain.language_task import IGNORED, TASK, Head, hidden
from qtrain.prepare import convert, prepare

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
V = 61


def model(kind: str = "llama", **options: Any) -> Any:
    torch.manual_seed(0)
    config = {
        "llama": transformers.LlamaConfig,
        "gemma2": transformers.Gemma2Config,
        "granite": transformers.GraniteConfig,
        "cohere": transformers.CohereConfig,
    }[kind](vocab_size=V, **SMALL, **options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def batches() -> list[tuple[dict[str, Tensor], Tensor]]:
    """Two batches of other lengths, with padding and with context that is not scored."""
    torch.manual_seed(1)
    made = []
    for shape in ((3, 9), (2, 14)):
        ids = torch.randint(0, V, shape)
        labels = ids.clone()
        labels[0, :4] = IGNORED
        labels[1, 6:] = IGNORED
        made.append(({"input_ids": ids}, labels))
    return made


def whole(lm: Any, data: list[tuple[dict[str, Tensor], Tensor]]) -> tuple[Tensor, Tensor]:
    """All logits at scored positions, and the tokens that follow, without any chunk."""
    logits, targets = [], []
    with torch.no_grad():
        for inputs, labels in data:
            out, wanted = lm(**inputs).logits.float()[:, :-1], labels[:, 1:] != IGNORED
            logits.append(out[wanted])
            targets.append(labels[:, 1:][wanted])
    return torch.cat(logits), torch.cat(targets)


@pytest.fixture(params=[1, 3, 1000], autouse=True)
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_task, "CHUNK", request.param * V)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 0.05, "head_dim": 8}),
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
    ],
)
def test_metrics_are_those_of_the_whole_logits(kind: str, options: dict[str, Any]) -> None:
    lm, data = model(kind, **options), batches()
    other = copy.deepcopy(lm)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn_like(p))
    TASK.check(lm, data)
    outputs, reference = TASK.predict(other, data, ""), TASK.predict(lm, data, "")
    got = TASK.measure(outputs, data, reference)
    logits, targets = whole(other, data)
    float_logits, _ = whole(lm, data)
    loss = F.cross_entropy(logits.double(), targets).item()
    log_p, log_q = F.log_softmax(float_logits.double(), -1), F.log_softmax(logits.double(), -1)
    assert got["loss"] == pytest.approx(loss, rel=1e-6)
    assert got["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert got["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3, abs=1e-7)
    assert got["agreement"] == pytest.approx(float((logits.argmax(-1) == float_logits.argmax(-1)).double().mean()))
    assert len(outputs) == len(targets) == 3 * 8 - 3 - 3 + 2 * 13 - 3 - 8


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.4, 2.0), (1.0, 1.5)])
def test_the_chunked_loss_and_its_gradient_are_those_of_the_whole_logits(weight: float, temperature: float) -> None:
    lm, teacher, batch = model(tie_word_embeddings=True), model(), batches()[0]
    reference = copy.deepcopy(lm)
    loss = TASK.loss(lm, batch, teacher if weight else None, weight, temperature)
    loss.backward()
    inputs, labels = batch
    wanted = labels[:, 1:] != IGNORED
    logits, targets = reference(**inputs).logits[:, :-1][wanted], labels[:, 1:][wanted]
    with torch.no_grad():
        taught = teacher(**inputs).logits[:, :-1][wanted]
    expected = (1 - weight) * F.cross_entropy(logits, targets)
    expected = expected + weight * temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, -1), F.log_softmax(taught / temperature, -1), reduction="batchmean", log_target=True
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, a), (_, b) in zip(lm.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_without_anything_to_learn_is_refused() -> None:
    inputs, labels = batches()[0]
    with pytest.raises(ValueError, match="no token to learn"):
        TASK.loss(model(), (inputs, torch.full_like(labels, IGNORED)), None, 0.0, 1.0)
    with pytest.raises(ValueError, match="no token to score"):
        TASK.check(model(), [(inputs, torch.full_like(labels, IGNORED))])


def test_a_family_with_another_head_is_refused() -> None:
    lm = model()
    lm.lm_head.register_forward_hook(lambda *args: args[-1])
    TASK.check(lm, batches())
    lm.register_forward_hook(lambda _, __, out: setattr(out, "logits", out.logits.flip(-1)))
    with pytest.raises(ValueError, match="another way"):
        TASK.check(lm, batches())


def test_weights_that_give_nan_are_refused() -> None:
    lm = model()
    with torch.no_grad():
        lm.lm_head.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        TASK.check(lm, batches())


def test_the_comparison_scores_a_runtime_that_gives_its_logits_in_pieces() -> None:
    lm, data = model(), batches()
    reference = TASK.predict(lm, data, "")
    comparison = TASK.comparison(TASK.predict(lm, data, ""), data, reference)
    noise = torch.Generator().manual_seed(3)
    squared = energy = 0.0
    logits_all, targets_all = [], []
    rows = [(ids, row) for inputs, labels in data for ids, row in zip(inputs["input_ids"], labels, strict=True)]
    assert len(comparison.sequences) == len(rows)
    for index, (ids, row) in enumerate(rows):
        tokens = comparison.sequences[index]
        assert tokens == ids.tolist()[: len(tokens)]
        with torch.no_grad():
            exact = Head(lm)(hidden(lm, {"input_ids": torch.tensor([tokens])}))[0]
        runtime = exact + 0.1 * torch.randn(exact.shape, generator=noise)
        for start in range(0, len(tokens), 4):
            comparison.add(index, start, runtime[start : start + 4].numpy())
        wanted = (row[1:] != IGNORED).nonzero().flatten()
        squared += float((runtime[wanted] - exact[wanted]).double().square().sum())
        energy += float(exact[wanted].double().square().sum())
        logits_all.append(runtime[wanted])
        targets_all.append(row[1:][wanted])
    result = comparison.result()
    logits, targets = torch.cat(logits_all), torch.cat(targets_all)
    assert result["tokens"] == len(targets) == len(reference)
    assert result["nmse"] == pytest.approx(squared / energy, rel=1e-4)
    assert result["runtime"]["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert result["training"]["kl"] == pytest.approx(0, abs=1e-6)
    assert result["runtime"]["kl"] > 1e-4
    with pytest.raises(ValueError, match="vocabularies differ"):
        comparison.add(0, 0, torch.zeros(9, V + 1))


def test_a_changed_head_or_body_is_a_difference() -> None:
    lm, data = model(), batches()
    before = TASK.predict(copy.deepcopy(lm), data, "")
    assert TASK.difference(before, TASK.predict(lm, data, ""))["bit_exact"]
    with torch.no_grad():
        lm.lm_head.weight[V - 1, 0] += 1e-3
    assert not TASK.difference(before, TASK.predict(lm, data, ""))["bit_exact"]
    with torch.no_grad():
        lm.lm_head.weight[V - 1, 0] -= 1e-3
        lm.model.norm.weight += 1e-6
    change = TASK.difference(before, TASK.predict(lm, data, ""))
    assert not change["bit_exact"] and change["nmse"] > 0


@pytest.mark.parametrize("kind", ["fake", "codes"])
def test_a_head_that_is_rounded_once_computes_the_same(kind: str) -> None:
    lm, data = model(), batches()
    prepare(lm, {"lm_head": lm.lm_head}, Affine(bits=4, group_size=16), activation=Affine(bits=8, granularity="token"))
    if kind == "codes":
        convert(lm)
    outputs = TASK.predict(lm, data, "")
    head = Head(lm)
    assert outputs.head.vocabulary == head.vocabulary == V
    with torch.inference_mode():
        assert torch.equal(outputs.logits(slice(0, 5)), head(outputs.states_SH[:5]))
        assert not torch.equal(head(outputs.states_SH[:5]), model().lm_head(outputs.states_SH[:5]))
