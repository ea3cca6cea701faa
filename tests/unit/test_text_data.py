"""Text data: splits that do not leak, files read to the last row, and batches that resume where a checkpoint stopped."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from qtrain.data.csv import Csv
from qtrain.data.glue import Glue
from qtrain.data.hub import Hub
from qtrain.data.sample_reviews import SampleReviews
from qtrain.datamodule import POOL, ResumableBatchSampler, TextDataModule
from qtrain.hub import from_hub
from qtrain.images import ImageSpec
from qtrain.splits import Splits, stratified_order
from qtrain.text import Examples, Rows, TextClassification
from tests.conftest import shared_data


class Fixed(TextClassification):
    """Rows that a test gives."""

    def load(self) -> Splits[Examples]:
        raise NotImplementedError


def rows(labels: list[Any], prefix: str = "text", where: str = "data.train=a.csv") -> Rows:
    return Rows(where, [f"{prefix} {i}" for i in range(len(labels))], labels)


# --- splits -------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=200), st.integers(0, 99))
def test_every_prefix_of_the_order_is_stratified(labels: list[int], seed: int) -> None:
    order = stratified_order(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    total, seen = Counter(labels), Counter[int]()
    for size, index in enumerate(order, 1):
        seen[labels[index]] += 1
        assert all(abs(seen[c] - n * size / len(labels)) <= len(total) for c, n in total.items())


@settings(max_examples=30)
@given(st.integers(60, 300), st.integers(2, 4), st.integers(0, 9))
def test_cut_splits_are_stratified_disjoint_and_complete(count: int, classes: int, seed: int) -> None:
    given_rows = rows([i % classes for i in range(count)])
    splits = Fixed(split_seed=seed).assemble(given_rows)
    parts = [splits.train, splits.validation, splits.test]
    assert sorted(t for p in parts for t in p.texts) == sorted(given_rows.texts)
    assert len(splits.test) == round(0.1 * count)
    for part in parts:
        counts = Counter(part.labels)
        assert max(counts.values()) - min(counts.values()) <= 2
    assert Fixed(split_seed=seed).assemble(given_rows) == splits


def test_another_split_seed_is_another_split() -> None:
    data = rows([0, 1] * 50)
    assert Fixed(split_seed=0).assemble(data).test.texts != Fixed(split_seed=1).assemble(data).test.texts


def test_texts_of_the_test_split_leave_the_others_and_are_counted() -> None:
    train, test = rows([0, 1] * 50), rows([0, 1] * 5, "held out")
    validation = rows([0, 1] * 5, "validation")
    test.texts[:3] = train.texts[:2] + validation.texts[:1]
    splits = Fixed().assemble(train, validation, test)
    assert not set(splits.test.texts) & {*splits.train.texts, *splits.validation.texts}
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (98, 9, 10)
    assert splits.notes == [
        "2 training examples that also occur in the test split were dropped",
        "1 validation examples that also occur in the test split were dropped",
    ]


def test_copies_inside_one_file_do_not_leak_into_its_test_split() -> None:
    data = rows([0, 1] * 50)
    data.texts = [f"text {i // 4}" for i in range(100)]
    splits = Fixed().assemble(data)
    assert not set(splits.test.texts) & {*splits.train.texts, *splits.validation.texts}
    assert "dropped" in splits.notes[0]


def test_a_pair_is_a_copy_only_if_both_sentences_are() -> None:
    train = Rows("train", ["a"] * 40, [0, 1] * 20, [f"b {i}" for i in range(40)])
    test = Rows("test", ["a", "a"], [0, 1], ["b 0", "other"])
    splits = Fixed().assemble(train, None, test)
    assert len(splits.train) + len(splits.validation) == 39
    assert splits.train.pairs is not None and "b 0" not in splits.train.pairs


def test_limit_thins_all_splits_in_proportion_and_says_so() -> None:
    splits = Fixed(limit=80).assemble(rows([0, 1] * 500))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (80, 9, 10)
    assert Counter(splits.train.labels) == {0: 40, 1: 40}
    assert "data.limit=80 of 810" in splits.notes[0]


def test_a_class_that_a_split_lacks_is_noted() -> None:
    labels = [0, 1] * 100 + [2, 2, 2]
    assert any("no example of 2" in note for note in Fixed().assemble(rows(labels)).notes)


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["pos", "neg"], ["neg", "pos"], [1, 0]),
        (["10", "9"], ["9", "10"], [1, 0]),
        ([1.0, 5], ["1", "5"], [0, 1]),
        ([True, False], ["False", "True"], [1, 0]),
        (["1", "-1"], ["-1", "1"], [1, 0]),
        (["1", "x"], ["1", "x"], [0, 1]),
    ],
)
def test_labels_become_sorted_classes(labels: list[Any], names: list[str], numbers: list[int]) -> None:
    splits = Fixed().assemble(rows(labels * 20), None, rows(labels, "test"))
    assert splits.label_names == names
    assert splits.test.labels == numbers


@pytest.mark.parametrize(
    ("train", "test", "names", "message"),
    [
        ([], None, ["a", "b"], "0 training examples of 0 classes"),
        ([1] * 50, None, None, "50 training examples of 1 class; .*data.label_column=NAME"),
        ([0, 1] * 20, [0, 2, 3], None, r"data.test=b.csv has 2 labels that are not classes: 2, 3; the training examples have 0, 1"),
        ([0, 1] * 20, [-1, -1], ["a", "b"], r"valid: 0 to 1 \(a, b\); -1 means that the labels of this split are hidden"),
        ([0, 1, 7] * 20, None, ["a", "b"], "20 labels that are not classes: 7"),
        (["a", "b"] * 20, None, ["a", "b"], "40 labels that are not classes: a, b; valid: 0 to 1"),
        ([0, 1, 0.5] * 20, None, None, "label of row 2 of data.train=a.csv is 0.5; a label is an integer or a name"),
        ([0, 1, None] * 20, None, None, "label of row 2 .* is None"),
        (["0", "1", " "] * 20, None, None, "label of row 2 .* is ' '"),
        ([0, 1] * 4, None, None, "8 training examples of 2 classes are too few to cut a test split of 0.1.*data.test_fraction=0.3"),
        ([0, 1] * 6, [0, 1], None, "too few to cut a validation split.*data.validation_fraction"),
    ],
)
def test_unusable_rows_say_why(train: list[Any], test: list[Any] | None, names: list[str] | None, message: str) -> None:
    tested = None if test is None else rows(test, "test", "data.test=b.csv")
    with pytest.raises(ValueError, match=message):
        Fixed().assemble(rows(train), None, tested, names)


def test_a_validation_file_that_is_all_in_test_is_an_error() -> None:
    with pytest.raises(ValueError, match="validation split is empty"):
        Fixed().assemble(rows([0, 1] * 20), rows([0, 1], "same"), rows([0, 1], "same"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"limit": 0}, "data.limit is 0"),
        ({"test_fraction": 1.0}, "data.test_fraction is 1.0; it must lie between 0 and 1"),
        ({"test_fraction": 0.5, "validation_fraction": 0.5}, "leave nothing to train on"),
    ],
)
def test_bad_options_say_what_to_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fixed(**options)


def test_a_model_that_reads_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gives texts, and the model reads images. Set data=digits .*or model=sequence_classification"):
        SampleReviews().build(ImageSpec(), seed=0)


# --- files --------------------------------------------------------------------------------------------------------------------

SENTENCES = ['"a', "it's a , b", "None", "NA", "null", "1", 'say "hi"', " spaced ", "naïve \x85 — 好", "nan", "x'", '"']


def table(count: int = 60) -> list[tuple[str, str]]:
    return [(f"{SENTENCES[i % len(SENTENCES)]}" + (f" {i}" if i >= len(SENTENCES) else ""), str(i % 2)) for i in range(count)]


def write(path: Path, header: str, lines: list[str]) -> str:
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return str(path)


def every_text(splits: Splits[Examples]) -> list[str]:
    return sorted(splits.train.texts + splits.validation.texts + splits.test.texts)


def test_a_tsv_loads_every_row_whatever_its_quotation_marks(tmp_path: Path) -> None:
    data = table()
    path = write(tmp_path / "a.tsv", "sentence\tlabel", [f"{t}\t{label}" for t, label in data])
    splits = Csv(train=path, text_column="sentence").load()
    assert every_text(splits) == sorted(t for t, _ in data)
    assert splits.label_names == ["0", "1"]


def test_a_csv_loads_quoted_fields_and_a_byte_order_mark(tmp_path: Path) -> None:
    data = [(f"{t}, and\nmore", label) for t, label in table()]
    quoted = ['"' + t.replace('"', '""') + f'",{label}' for t, label in data]
    (tmp_path / "a [1].csv").write_text("\n".join(["text,label", *quoted]), encoding="utf-8-sig")
    splits = Csv(train=str(tmp_path / "a [1].csv")).load()
    assert every_text(splits) == sorted(t for t, _ in data)
    assert "60 texts" in splits.notes[0] and "data.quoting=false" in splits.notes[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_jsonl_and_parquet_load_every_row_and_leave_nothing(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = table()
    path = tmp_path / f"a *[1]{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t, "label": int(n), "id": i}) + "\n" for i, (t, n) in enumerate(data)))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": [t for t, _ in data], "label": [int(n) for _, n in data]}), path)
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.chdir(run)
    splits = Csv(train=str(path)).load()
    assert every_text(splits) == sorted(t for t, _ in data)
    assert not list(run.iterdir())


def test_test_files_may_call_their_text_otherwise(tmp_path: Path) -> None:
    train = write(tmp_path / "a.tsv", "label\tsentence", [f"{i % 2}\ttrain {i}" for i in range(40)])
    test = write(tmp_path / "b.tsv", "label\tcontent", [f"{i % 2}\ttest {i}" for i in range(10)])
    with pytest.raises(ValueError, match=r"has no column 'sentence'.* Set data.eval_text_column=content"):
        Csv(train=train, test=test, text_column="sentence").load()
    splits = Csv(train=train, test=test, text_column="sentence", eval_text_column="content").load()
    assert splits.test.texts[0] == "test 0"


def test_sst2_loads_all_its_rows() -> None:
    folder = shared_data() / "sst2"
    if not folder.is_dir():
        pytest.skip("SST-2 is not here")
    files: dict[str, Any] = {
        key: str(folder / name) for key, name in (("train", "train.tsv"), ("validation", "dev.tsv"), ("test", "test.tsv"))
    }
    splits = Csv(**files, text_column="sentence", eval_text_column="content").load()
    assert len(splits.train) == 67_349 - 1  # one sentence is in the test file too
    assert (len(splits.validation), len(splits.test)) == (872, 1821)
    assert splits.notes == ["1 training examples that also occur in the test split were dropped"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "text,label\na,1,2\n", {}, r"line 2 of data.train=.*a.csv has 3 fields and the header 2 \(text, label\)"),
        ("a.csv", 'text,label\n"a,1\nb,0\n', {}, "cannot be read after line 3: .*data.quoting=false"),
        ("a.csv", "text,label\n", {}, "has no rows"),
        ("a.csv", "", {}, "has no column 'text'"),
        ("a.csv", "review,label\na,1\n", {}, "has no column 'text'; its columns are review, label. Set data.text_column=review"),
        (
            "a.csv",
            "text,sentiment\na long text,1\n",
            {},
            "no column 'label'; its columns are text, sentiment. Set data.label_column=sentiment",
        ),
        ("a.csv", "text,review,label\n1,a,1\n2.5,b,0\n", {}, "column 'text' of .* holds numbers only, .*Set data.text_column=review"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', {}, "column 'text' of .* holds numbers, not text: row 0 is 3"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"te', {}, "cannot be read as jsonl"),
        ("a.parquet", "no parquet", {}, "cannot be read as parquet"),
        ("a.xlsx", "x", {}, r"ends in '.xlsx'; valid: .csv, .tsv, .jsonl, .parquet"),
        ("a.csv", "text,label\n", {"delimiter": ";;"}, "data.delimiter is ';;'"),
        ("a.csv", "text,label\na,1\n", {"pair_column": "b"}, "no column 'b'.*data.pair_column="),
    ],
)
def test_unreadable_files_say_what_to_type(tmp_path: Path, name: str, content: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Csv(train=str(tmp_path / name), **options).load()


def test_missing_files_and_other_encodings_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.train=nowhere.csv is not a file .*data.train=FILE"):
        Csv(train="nowhere.csv").load()
    with pytest.raises(ValueError, match=r"data.train=FILE"):
        Csv().load()
    (tmp_path / "a.csv").write_bytes("text,label\nsch\xf6n,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        Csv(train=str(tmp_path / "a.csv")).load()


# --- the hub ------------------------------------------------------------------------------------------------------------------


def hub_dataset(pair: bool = False, hidden: bool = True) -> Any:
    import datasets

    features = {"sentence1": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    features |= {"sentence2": datasets.Value("string")} if pair else {}

    def split(name: str, count: int, label: int | None = None) -> Any:
        columns: dict[str, list[Any]] = {"sentence1": [f"{name} {i}" for i in range(count)]}
        columns["label"] = [i % 2 if label is None else label for i in range(count)]
        columns |= {"sentence2": [f"second {i}" for i in range(count)]} if pair else {}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    return datasets.DatasetDict(
        train=split("train", 40), validation=split("validation", 10), test=split("test", 10, -1 if hidden else None)
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the next `load_dataset` returns, or raises."""
    import datasets

    answer: dict[str, Any] = {"value": None}

    def load_dataset(*args: Any, **_: Any) -> Any:
        answer["args"] = args
        if isinstance(answer["value"], Exception):
            raise answer["value"]
        return answer["value"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return answer


def test_glue_is_tested_on_its_validation_split(hub: dict[str, Any]) -> None:
    hub["value"] = hub_dataset(pair=True)
    splits = Glue(task="rte").load()
    assert hub["args"] == ("nyu-mll/glue", "rte")
    assert all(t.startswith("validation") for t in splits.test.texts) and len(splits.test) == 10
    assert all(t.startswith("train") for t in splits.train.texts + splits.validation.texts)
    assert splits.test.pairs is not None and splits.test.pairs[3] == "second 3"
    assert splits.label_names == ["no", "yes"]
    assert "validation split of GLUE rte" in splits.notes[0]


def test_a_regression_task_is_not_offered() -> None:
    with pytest.raises(ValueError, match=r"data.task is 'stsb'; valid: cola, sst2"):
        Glue(task="stsb")


def test_a_hub_dataset_uses_the_splits_it_has(hub: dict[str, Any]) -> None:
    hub["value"] = hub_dataset(hidden=False)
    splits = Hub(name="owner/name", text_column="sentence1").load()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (40, 10, 10)


def test_hidden_labels_of_a_hub_dataset_are_explained(hub: dict[str, Any]) -> None:
    hub["value"] = hub_dataset()
    with pytest.raises(ValueError, match=r"labels of this split are hidden, use another \(data.test_split=NAME\)"):
        Hub(name="owner/name", text_column="sentence1").load()
    splits = Hub(name="owner/name", text_column="sentence1", test_split="validation").load()
    assert all(t.startswith("train") for t in splits.validation.texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data.name=owner/name"),
        ({"name": "a/b", "test_split": "dev"}, "has no split 'dev'; its splits are train, validation, test. Set data.test_split=train"),
        ({"name": "a/b", "test_split": "test", "validation_split": "test"}, "must differ"),
        ({"name": "a/b", "text_column": "t"}, "has no column 't'; its columns are sentence1, label. Set data.text_column=sentence1"),
    ],
)
def test_hub_options_that_do_not_fit_say_what_to_type(hub: dict[str, Any], options: dict[str, Any], message: str) -> None:
    hub["value"] = hub_dataset()
    with pytest.raises(ValueError, match=message):
        Hub(**options).load()


def test_without_a_network_the_local_way_is_named(hub: dict[str, Any]) -> None:
    hub["value"] = ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub (OfflineModeIsEnabled)")
    with pytest.raises(OSError, match=r"glue \(sst2\) could not be downloaded.*data=csv data.train=FILE"):
        Glue().load()


def test_a_wrong_dataset_name_or_configuration_is_not_called_a_network_failure(hub: dict[str, Any]) -> None:
    from datasets.exceptions import DatasetNotFoundError

    hub["value"] = DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub")
    with pytest.raises(ValueError, match="the hub has no dataset a/b"):
        Hub(name="a/b").load()
    hub["value"] = ValueError("Config name is missing.\nPlease pick one")
    with pytest.raises(ValueError, match=r"cannot be loaded: Config name is missing.*data.config=NAME"):
        from_hub("a/b", None)


def test_the_sample_reviews_have_three_balanced_splits() -> None:
    try:
        splits = SampleReviews().load()
    except OSError as e:
        pytest.skip(f"no package index here: {e}")
    sizes = [len(splits.train), len(splits.validation), len(splits.test)]
    assert sum(sizes) == 8530
    assert sizes[2] == 853
    for part in (splits.train, splits.validation, splits.test):
        assert abs(sum(part.labels) / len(part) - 0.5) < 0.01
    assert abs(sum(splits.train.labels[:256]) - 128) <= 2  # what is calibrated on


# --- batches ------------------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of numbers: "7 1 1" is [7, 1, 1]."""

    pad_token_id: int | None = 0
    pad_token_type_id = 0
    padding_side = "right"
    model_max_length = 64
    name_or_path = "words"

    class Encoding(dict[str, list[list[int]]]):
        encodings = None

    def __call__(self, texts: list[str], pairs: list[str] | None = None, max_length: int = 64, **_: Any) -> Words.Encoding:
        ids = [[int(word) for word in text.split()][:max_length] for text in texts]
        return self.Encoding(input_ids=ids, attention_mask=[[1] * len(row) for row in ids])


def numbered(count: int, first: int = 1) -> Examples:
    """Texts of random length that begin with their own number."""
    draw = random.Random(count)
    return Examples([f"{first + i}" + " 1" * draw.randint(0, 9) for i in range(count)], [i % 2 for i in range(count)])


def module(train: int = 46, **options: Any) -> TextDataModule:
    splits = Splits(numbered(train), numbered(9, 1000), numbered(11, 2000), ["no", "yes"])
    return TextDataModule(splits, Words(), **{"batch_size": 4, "eval_batch_size": 4, "seed": 3, **options})


@given(st.integers(1, 400), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_holds_every_index_once_in_an_order_of_seed_and_epoch(count: int, size: int, seed: int, epoch: int) -> None:
    lengths = [(7 * i) % 13 for i in range(count)]
    sampler = ResumableBatchSampler(lengths, size, seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(i for b in batches for i in b) == list(range(count))
    assert len(batches) == len(sampler)
    assert sum(len(b) != size for b in batches) <= 1
    sampler.set_epoch(epoch, skip := len(batches) // 2)
    assert list(sampler) == batches[skip:]
    assert len(sampler) == len(batches)


def test_epochs_and_seeds_differ_and_skips_end_with_their_epoch() -> None:
    sampler = ResumableBatchSampler(list(range(40)), 4, seed=0)
    assert sampler.batches(0) != sampler.batches(1)
    assert sampler.batches(0) != ResumableBatchSampler(list(range(40)), 4, seed=1).batches(0)
    sampler.set_epoch(2, 3)
    sampler.set_epoch(2)
    assert sampler.skip == 3
    sampler.set_epoch(3)
    assert sampler.skip == 0


def test_batches_hold_texts_of_similar_length() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 100) for _ in range(20 * POOL)]
    padded = sum(len(b) * max(lengths[i] for i in b) for b in ResumableBatchSampler(lengths, 10, 0))
    assert padded < 1.1 * sum(lengths)


def test_batches_are_padded_to_their_longest() -> None:
    for inputs, labels in module().test_dataloader():
        assert inputs["input_ids"].dtype == labels.dtype == torch.int64
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape
        assert inputs["attention_mask"].sum(1).max() == inputs["input_ids"].shape[1]
        assert torch.equal(inputs["input_ids"] != 0, inputs["attention_mask"] == 1)


def test_evaluation_is_complete_sorted_and_the_same_each_time() -> None:
    data = module()
    first, again = list(data.test_dataloader()), list(data.test_dataloader())
    widths = [inputs["input_ids"].shape[1] for inputs, _ in first]
    assert widths == sorted(widths)
    assert sorted(i for inputs, _ in first for i in inputs["input_ids"][:, 0].tolist()) == list(range(2000, 2011))
    assert all(torch.equal(a[0]["input_ids"], b[0]["input_ids"]) for a, b in zip(first, again, strict=True))


def test_calibration_sees_training_examples_only() -> None:
    data = module(calibration_examples=10)
    seen = [i for inputs, _ in data.calibration_dataloader() for i in inputs["input_ids"][:, 0].tolist()]
    assert sorted(seen) == list(range(1, 11))
    assert len(list(module(calibration_examples=999).calibration_dataloader())) == 12


def test_loaders_leave_the_global_generator_alone() -> None:
    data = module()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert len(list(loader)) == len(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_example_inputs_are_training_examples_again_from_the_start_where_they_are_fewer() -> None:
    inputs = module(calibration_examples=3).example_inputs(5)
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert inputs["input_ids"][:, 0].tolist() == [1, 2, 3, 1, 2]


def test_padding_goes_where_the_tokenizer_says() -> None:
    data = module()
    data._pad_left = True
    for inputs, _ in data.train_dataloader():
        assert (inputs["attention_mask"].diff(dim=1) >= 0).all()  # never from 1 to 0
        assert (inputs["attention_mask"][:, -1] == 1).all()


def test_long_texts_are_cut_and_counted(tiny_bert: Path) -> None:
    from qtrain.models.sequence_classification import SequenceClassification

    tokenizer = SequenceClassification(str(tiny_bert)).tokenizer()
    texts = Examples(["good film", "bad " * 100], [0, 1])
    data = TextDataModule(Splits(texts, texts, texts, ["a", "b"]), tokenizer, max_length=16)
    assert data.notes == ["3 of 6 examples are longer than 16 tokens (data.max_length) and were cut"]
    assert max(inputs["input_ids"].shape[1] for inputs, _ in data.train_dataloader()) == 16
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    pairs = Examples(["good", "bad"], [0, 1], ["film", "story story"])
    (inputs, _), *_ = TextDataModule(Splits(pairs, pairs, pairs, ["a", "b"]), tokenizer).test_dataloader()
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]


def test_a_length_beyond_the_model_is_lowered_and_noted() -> None:
    assert "data.max_length=128 is more than the model reads; 64 tokens are used" in module(max_length=128).notes


def test_a_tokenizer_without_padding_is_refused() -> None:
    words = Words()
    words.pad_token_id = None
    with pytest.raises(ValueError, match="has no padding token"):
        TextDataModule(module().splits, words)


# --- resuming -----------------------------------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Writes down the batches it sees."""

    def __init__(self, fail_at: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.seen: list[tuple[int, tuple[int, ...]]] = []
        self.fail_at = fail_at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.fail_at == (self.current_epoch, batch_idx):
            raise ConnectionAbortedError
        self.seen.append((batch_idx, tuple(batch[0]["input_ids"][:, 0].tolist())))
        return (self.weight**2).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(Callback):
    """Saves once, at the given hook, epoch and batch, and remembers how many batches were seen by then."""

    def __init__(self, path: Path, hook: str, epoch: int, batch: int) -> None:
        self.path, self.hook, self.at, self.count = path, hook, (epoch, batch), 0

    def _save(self, trainer: Trainer, module: Any) -> None:
        trainer.save_checkpoint(self.path)
        self.count = len(module.seen)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.hook == "batch" and (trainer.current_epoch, batch_idx) == self.at:
            self._save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.hook == "epoch" and trainer.current_epoch == self.at[0]:
            self._save(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.hook == "validation" and trainer.current_epoch == self.at[0] and not self.count:
            self._save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if self.hook == "exception":
            self._save(trainer, pl_module)


def fit(recorder: Recorder, data: TextDataModule, callbacks: list[Callback], checkpoint: Path | None = None, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", callbacks=callbacks, num_sanity_val_steps=0, **quiet, **{"max_epochs": 3, **options})
    trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer


@pytest.mark.parametrize(
    ("hook", "epoch", "batch", "options"),
    [
        ("batch", 0, 4, {}),
        ("batch", 1, 0, {}),
        ("batch", 1, 4, {}),
        ("batch", 1, 5, {"accumulate_grad_batches": 2}),
        ("batch", 1, 4, {"accumulate_grad_batches": 2}),
        ("batch", 0, 11, {}),
        ("batch", 2, 11, {}),
        ("epoch", 0, 0, {}),
        ("epoch", 1, 0, {}),
        ("validation", 1, 0, {}),
        ("validation", 1, 0, {"val_check_interval": 5}),
        ("exception", 1, 4, {}),
        ("batch", 1, 4, {"limit_train_batches": 7}),
        ("batch", 1, 4, {"max_steps": 30, "max_epochs": -1}),
        ("batch", 0, 11, {"max_steps": 30, "max_epochs": -1}),
        ("batch", 1, 3, {"max_steps": 16, "max_epochs": -1, "accumulate_grad_batches": 2}),
    ],
)
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(
    tmp_path: Path, hook: str, epoch: int, batch: int, options: dict[str, Any]
) -> None:
    whole, first, second = Recorder(), Recorder((epoch, batch) if hook == "exception" else None), Recorder()
    expected = fit(whole, module(), [], **options)
    save = SaveAt(tmp_path / "a.ckpt", hook, epoch, batch)
    try:
        fit(first, module(), [save], **options)
    except ConnectionAbortedError:
        assert hook == "exception"
    resumed = fit(second, module(), [], tmp_path / "a.ckpt", **options)
    assert 0 < save.count <= len(whole.seen)
    assert first.seen[: save.count] + second.seen == whole.seen
    assert (resumed.current_epoch, resumed.global_step) == (expected.current_epoch, expected.global_step)


def test_epochs_of_one_run_differ_and_are_complete() -> None:
    recorder = Recorder()
    fit(recorder, module(), [])
    epochs = [recorder.seen[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(i for _, ids in e for i in ids) == list(range(1, 47)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert [b for _, b in epochs[1]] == [tuple(i + 1 for i in b) for b in ResumableBatchSampler(module()._train.lengths, 4, 3).batches(1)]


def test_a_second_fit_with_the_same_data_begins_at_epoch_zero() -> None:
    data, first, second = module(), Recorder(), Recorder()
    fit(first, data, [], max_epochs=2)
    fit(second, data, [], max_epochs=1)
    assert second.seen == first.seen[:12]


@pytest.mark.parametrize(("change", "message"), [({"batch_size": 5}, "batch_size is 5 and was 4"), ({"seed": 4}, "seed is 4 and was 3")])
def test_resuming_inside_an_epoch_on_other_data_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    fit(Recorder(), module(), [SaveAt(tmp_path / "a.ckpt", "batch", 1, 4)])
    with pytest.raises(ValueError, match=message):
        fit(Recorder(), module(**change), [], tmp_path / "a.ckpt")
