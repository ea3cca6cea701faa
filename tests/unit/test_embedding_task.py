"""Sentence embeddings: pooling, neighbours, and the model source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from qtrain.embedding_task import TASK, closeness, embed, nearest
from qtrain.models.sentence_embedding import SentenceEmbedding


def encoder(pooling: str = "mean") -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, max_position_embeddings=16
    )
    model: Any = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.pooling = pooling
    return model


def batches() -> list[Any]:
    torch.manual_seed(1)
    made = []
    for count, length in ((4, 6), (3, 9)):
        ids = torch.randint(3, 50, (count, length))
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        made.append(({"input_ids": ids, "attention_mask": mask}, torch.zeros(count, dtype=torch.int64)))
    return made


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_change_a_vector(pooling: str) -> None:
    model = encoder(pooling)
    inputs, _ = batches()[0]
    vectors = embed(model, inputs)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(4))
    short = {n: v[:1, :3] for n, v in inputs.items()}
    torch.testing.assert_close(embed(model, short)[0], vectors[0], rtol=1e-4, atol=1e-5)
    states = model(**short).last_hidden_state[0]
    expected = states[0] if pooling == "cls" else states.mean(0)
    torch.testing.assert_close(vectors[0], F.normalize(expected, dim=0), rtol=1e-4, atol=1e-5)


def test_neighbours_and_closeness() -> None:
    x = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=-1)
    assert nearest(x).tolist() == [1, 0, 3, 2]
    assert closeness(x, x) == {"cosine": pytest.approx(1.0), "agreement": 1.0}
    y = x[[2, 1, 0, 3]]
    assert closeness(y, x)["agreement"] == 0.0


def test_the_comparison_takes_vectors_of_any_length() -> None:
    model, data = encoder(), batches()
    outputs = TASK.predict(model, data, "")
    comparison = TASK.comparison(outputs, data, outputs)
    assert [len(s) for s in comparison.sequences] == [3, 6, 6, 6, 4, 9, 9]
    for i, ids in enumerate(comparison.sequences):
        vector = embed(model, {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)})
        comparison.add(i, 0, 7.5 * vector.detach().numpy())
    result = comparison.result()
    assert result["nmse"] < 1e-9 and result["top1_agreement"] == 1.0 and result["tokens"] == 43
    assert result["runtime"]["cosine"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="32"):
        comparison.add(0, 0, torch.ones(1, 31))


def test_it_can_only_be_distilled() -> None:
    model, batch = encoder(), batches()[0]
    with pytest.raises(ValueError, match=r"finetune\.epochs=0.*distill"):
        TASK.loss(model, batch, None, 0.0, 1.0)
    assert float(TASK.loss(model, batch, encoder(), 1.0, 1.0)) == pytest.approx(0, abs=1e-6)
    other = encoder("cls")
    loss = TASK.loss(model, batch, other, 1.0, 1.0)
    loss.backward()
    assert loss > 0 and all(p.grad is not None for p in model.encoder.parameters())


def saved(folder: Path, **pooling: bool) -> Path:
    encoder().save_pretrained(folder)
    if pooling:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    return folder


def test_the_folder_says_how_it_pools(tmp_path: Path) -> None:
    assert SentenceEmbedding(str(saved(tmp_path / "a"))).build().pooling == "mean"
    cls = saved(tmp_path / "b", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    assert SentenceEmbedding(str(cls)).build().pooling == "cls"
    assert SentenceEmbedding(str(cls), pooling="mean").build().pooling == "mean"
    other = saved(tmp_path / "c", pooling_mode_max_tokens=True)
    with pytest.raises(ValueError, match=r"pools by pooling_mode_max_tokens.*model\.pooling=mean"):
        SentenceEmbedding(str(other)).build()
    (other / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ValueError, match="a layer behind its pooling"):
        SentenceEmbedding(str(other)).build()
    with pytest.raises(ValueError, match=r"model\.pooling is 'max'"):
        SentenceEmbedding(pooling="max")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.0.attention.self.query.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 parameters are missing.*query"):
        SentenceEmbedding(str(folder)).build()


def test_too_few_texts() -> None:
    with pytest.raises(ValueError, match="neighbours need at least 3"):
        TASK.check(encoder(), [batches()[0]][:0])
