"""llama.cpp's binding against PyTorch on the same weights, and against files and libraries that are not as they should be."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters.gguf import libllama
from exporters.gguf.libllama import Library, library
from exporters.gguf.llama import Llama, LlamaError, probe
from tests.exporters.small_gguf import END, hidden, llama_vocabulary, nmse, small_bert, small_llama, write_bert, write_llama

pytestmark = pytest.mark.skipif(bool(libllama.unavailable()), reason=libllama.unavailable())

TEXT = "hello, the world: he sells 3 shells 😀\n\nhe "
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": False}


@pytest.fixture(scope="module")
def model() -> Any:
    """A causal model."""
    return small_llama()


@pytest.fixture(scope="module")
def path(model: Any, tmp_path_factory: Any) -> Path:
    """Its file, in float32."""
    found: Path = tmp_path_factory.mktemp("llama") / "small.gguf"
    write_llama(found, model)
    return found


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: Any) -> tuple[Any, Path]:
    """An encoder and its file."""
    bert, found = small_bert(), tmp_path_factory.mktemp("bert") / "bert.gguf"
    write_bert(found, bert)
    return bert, found


def opened(path: Path, context: int = 128, **options: Any) -> Llama:
    """On one thread."""
    return Llama(path, context, threads=1, **options)


def expected(model: Any, ids: list[int]) -> torch.Tensor:
    """[T, V] in PyTorch."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


# logits


@pytest.mark.parametrize(("options", "most"), [(EXACT, 1e-10), ({}, 1e-4), ({"kv_type": "q8_0"}, 1e-3)], ids=["exact", "default", "q8_0"])
def test_logits_are_pytorchs(model: Any, path: Path, options: dict[str, Any], most: float) -> None:
    with opened(path, **options) as llama:
        ids = llama.tokenize(TEXT)
        logits = llama.logits(ids)
    assert logits.shape == (len(ids), len(llama_vocabulary())) and logits.dtype == np.float32
    assert nmse(logits, expected(model, ids)) < most


def test_the_precision_of_the_cache_is_what_was_asked(model: Any, path: Path) -> None:
    errors = []
    for kv_type in ("f32", "f16", "q8_0"):
        with opened(path, kv_type=kv_type) as llama:
            ids = llama.tokenize(TEXT)
            errors.append(nmse(llama.logits(ids), expected(model, ids)))
    assert errors[0] <= errors[1] < errors[2]


def test_a_window_in_several_batches(model: Any, path: Path, monkeypatch: Any) -> None:
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 256, 100)]
    monkeypatch.setattr("exporters.gguf.llama.LOGITS_BYTES", 1)
    with opened(path, **EXACT) as llama:
        assert llama.batch == 32
        chunks = list(llama.logits_chunks(ids))
        assert [start for start, _ in chunks] == [0, 32, 64, 96] and [len(chunk) for _, chunk in chunks] == [32, 32, 32, 4]
        assert nmse(np.concatenate([chunk for _, chunk in chunks]), expected(model, ids)) < 1e-10
        assert np.array_equal(llama.logits(ids), np.concatenate([chunk for _, chunk in chunks]))


def test_windows_do_not_see_each_other(path: Path) -> None:
    with opened(path) as llama:
        ids = llama.tokenize("the world")
        first = llama.logits(ids)
        llama.logits(llama.tokenize("something else"))
        llama.greedy(ids, 3)
        assert np.array_equal(llama.logits(ids), first)


def test_ids_may_be_numpys(path: Path) -> None:
    with opened(path) as llama:
        assert np.array_equal(llama.logits(np.array([1, 2, 3])), llama.logits([1, 2, 3]))  # type: ignore[arg-type]


def test_greedy_text_is_the_arg_max_of_the_logits(path: Path) -> None:
    with opened(path, **EXACT) as llama:
        ids = llama.tokenize("hello")
        written = llama.greedy(ids, 8, stop=False)
        for i, token in enumerate(written):
            assert llama.logits([*ids, *written[:i]])[-1].argmax() == token
        assert len(written) == 8 and llama.greedy(ids, 1) == written[:1]


def test_greedy_text_ends_after_the_token_that_ends_it(model: Any, path: Path, tmp_path: Path) -> None:
    with opened(path) as llama:
        written = llama.greedy([1, 2], 6, stop=False)
    end = written[3]
    write_llama(tmp_path / "ends.gguf", model, eos_token_id=end)
    with opened(tmp_path / "ends.gguf") as llama:
        assert llama.ends(end) and not llama.ends(5)
        assert llama.greedy([1, 2], 6) == written[: written.index(end) + 1]
        assert llama.greedy([1, 2], 6, stop=False) == written


def test_speed(path: Path) -> None:
    with opened(path) as llama:
        found = llama.speed(prompt=40, generate=4)
        assert set(found) == {"prompt_tokens_per_s", "generate_tokens_per_s"} and all(value > 0 for value in found.values())
        with pytest.raises(ValueError, match="larger context"):
            llama.speed(prompt=128, generate=1)


# text


def test_tokens_and_back(path: Path) -> None:
    with opened(path, vocab_only=True) as llama:
        ids = llama.tokenize(TEXT)
        assert ids[0] == llama_vocabulary().index("he") and llama.detokenize(ids) == TEXT
        assert llama.tokenize("") == [] and llama.detokenize([]) == ""
        long = "he said 😀 " * 2000
        assert llama.detokenize(llama.tokenize(long)) == long
        assert llama.detokenize([240, 159]) == "\ufffd" * len(llama.detokenize([240, 159]))


def test_special_tokens(path: Path) -> None:
    end = llama_vocabulary().index(END)
    with opened(path) as llama:
        assert llama.tokenize(END) == [end] and len(llama.tokenize(END, parse_special=False)) == len(END)
        assert llama.special_tokens()["eos"] == end and llama.special_tokens()["mask"] is None
        assert llama.adds() == {"bos": False, "eos": False}
        assert llama.detokenize([end]) == END and llama.detokenize([end], unparse_special=False) == ""


def test_metadata(path: Path) -> None:
    with opened(path, vocab_only=True) as llama:
        known = llama.metadata()
        assert known["general.architecture"] == "llama" and known["llama.block_count"] == "2"
        assert llama.n_vocab == len(llama_vocabulary())


def test_what_the_model_is(model: Any, path: Path) -> None:
    with opened(path) as llama:
        assert "llama" in llama.describe() and "F32" in llama.describe()
        assert llama.tensor_bytes() == sum(4 * p.numel() for p in model.parameters())


# embeddings


@pytest.mark.parametrize("pooling", [None, "mean", "cls", "last"])
def test_embeddings_are_pytorchs(encoder: tuple[Any, Path], pooling: str | None) -> None:
    bert, path = encoder
    with opened(path, 64, embeddings=True, pooling=pooling) as llama:
        ids = llama.tokenize("abc he", add_special=True)
        states = hidden(bert, ids)
        pooled = {"cls": states[0], "last": states[-1]}.get(pooling or "mean", states.mean(0))
        assert nmse(llama.embed(ids), pooled) < 1e-6
        with pytest.raises(ValueError, match="pooling"):
            llama.token_embeddings(ids)


def test_embeddings_of_tokens(encoder: tuple[Any, Path]) -> None:
    bert, path = encoder
    with opened(path, 64, embeddings=True, pooling="none") as llama:
        ids = llama.tokenize("abc he", add_special=True)
        assert nmse(llama.token_embeddings(ids), hidden(bert, ids)) < 1e-6
        with pytest.raises(ValueError, match="pooling"):
            llama.embed(ids)


def test_embeddings_of_a_causal_model(model: Any, path: Path) -> None:
    with opened(path, embeddings=True, pooling="last", **EXACT) as llama:
        ids = llama.tokenize("the world")
        assert nmse(llama.embed(ids), hidden(model.model, ids)[-1]) < 1e-10


def test_an_encoder_has_no_logits(encoder: tuple[Any, Path], path: Path) -> None:
    with opened(encoder[1], 64) as llama, pytest.raises(ValueError, match="embeddings=True"):
        llama.logits([1, 2])
    with opened(path, embeddings=True) as llama, pytest.raises(ValueError, match="embeddings=False"):
        llama.logits([1, 2])
    with opened(path) as llama, pytest.raises(ValueError, match="embeddings=True"):
        llama.embed([1, 2])


# opening and closing


def test_split_files_load_through_the_first(model: Any, path: Path, tmp_path: Path) -> None:
    write_llama(tmp_path / "split.gguf", model, split=8)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 1
    with opened(files[0]) as parts, opened(path) as whole:
        ids = whole.tokenize(TEXT)
        assert np.array_equal(parts.logits(ids), whole.logits(ids))
    with pytest.raises(LlamaError, match="cannot load"):
        opened(files[1])
    files[-1].unlink()
    with pytest.raises(LlamaError, match="cannot load"):
        opened(files[0])


@pytest.mark.parametrize("options", [{"use_mmap": False}, {"repack": False}, {"check_tensors": False}, {"flash_attention": True}], ids=str)
def test_options_that_change_no_result_by_much(model: Any, path: Path, options: dict[str, Any]) -> None:
    with opened(path, **options) as llama:
        ids = llama.tokenize(TEXT)
        assert nmse(llama.logits(ids), expected(model, ids)) < 1e-4


def test_files_open_again_and_beside_each_other(path: Path) -> None:
    with opened(path) as first, opened(path) as second:
        assert np.array_equal(first.logits([1, 2]), second.logits([1, 2]))
    first.close()
    with opened(path) as third:
        third.logits([1, 2])


def test_a_closed_file_says_so(path: Path) -> None:
    llama = opened(path)
    llama.close()
    uses: list[Any] = [
        lambda: llama.logits([1]),
        lambda: llama.tokenize("a"),
        llama.metadata,
        lambda: llama.greedy([1], 1),
        lambda: llama.ends(1),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="is closed"):
            use()


def test_wrong_uses(path: Path) -> None:
    with pytest.raises(ValueError, match="kv_type is one of f32, f16"):
        opened(path, kv_type="f64")
    with pytest.raises(ValueError, match="pooling is one of"):
        opened(path, pooling="max")
    with opened(path, vocab_only=True) as llama, pytest.raises(ValueError, match="vocab_only"):
        llama.logits([1])
    with opened(path, 64) as llama:
        for tokens in ([], [0] * 65):
            with pytest.raises(ValueError, match="1 to 64 tokens"):
                llama.logits(tokens)
        for token in (-1, llama.n_vocab):
            with pytest.raises(ValueError, match=f"token {token} is not in the vocabulary"):
                llama.logits([1, token])
        with pytest.raises(ValueError, match="1 to 60 tokens"):
            llama.greedy([0] * 61, 4)


# damage


def test_there_is_no_such_file(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(LlamaError, match="there is no file"):
            opened(missing)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.1, 0.5, 0.999])
def test_a_truncated_file(path: Path, tmp_path: Path, kept: float) -> None:
    data = path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(LlamaError, match=r"cannot load .*cut\.gguf:\n    \S"):
        opened(tmp_path / "cut.gguf")


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("once upon a time")
    with pytest.raises(LlamaError, match="magic"):
        opened(tmp_path / "text.gguf")


def test_a_missing_layer(model: Any, tmp_path: Path) -> None:
    write_llama(tmp_path / "short.gguf", model, block_count=3)
    with pytest.raises(LlamaError, match=r"blk\.2\.attn_norm"):
        opened(tmp_path / "short.gguf")


def test_a_file_that_ends_the_process_is_tried_in_another(model: Any, path: Path, encoder: tuple[Any, Path], tmp_path: Path) -> None:
    probe(path)
    probe(encoder[1], embeddings=True)
    write_llama(tmp_path / "none.gguf", model, block_count=0)
    with pytest.raises(LlamaError, match=r"died of .*none\.gguf.*\n.*GGML_ASSERT"):
        probe(tmp_path / "none.gguf")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LlamaError, match="cannot run"):
        probe(tmp_path / "cut.gguf")


# the library


def test_the_version_names_the_package_and_llama_cpp() -> None:
    assert "ggml" in library().version and library().version.split()[0] in ("xllamacpp", "llama-cpp-python", str(library().path))


@pytest.mark.parametrize("struct", sorted(libllama.LAYOUTS))
@pytest.mark.parametrize("dropped", [0, 2, 3, 12])
def test_a_struct_that_is_not_as_known_is_refused(monkeypatch: Any, struct: str, dropped: int) -> None:
    layouts = [layout[:dropped] + layout[dropped + 1 :] for layout in libllama.LAYOUTS[struct]]
    monkeypatch.setitem(libllama.LAYOUTS, struct, layouts)
    with pytest.raises(RuntimeError, match=rf"{struct}_params that is not known here .*pip install"):
        Library(library().path, "test")


def test_a_library_of_something_else_is_refused() -> None:
    import _ctypes

    with pytest.raises(RuntimeError, match=r"cannot be used from .*pip install"):
        Library(Path(_ctypes.__file__), "test")


def test_no_library(monkeypatch: Any) -> None:
    monkeypatch.setattr(libllama, "_find", tuple)
    monkeypatch.setattr(libllama, "library", libllama.library.__wrapped__)
    assert "pip install xllamacpp" in libllama.unavailable()
    with pytest.raises(RuntimeError, match="pip install xllamacpp"):
        libllama.library()


def test_a_setting_that_does_not_exist() -> None:
    with pytest.raises(AttributeError):
        library().context_params(n_contexts=1)


def test_a_named_library_is_taken(monkeypatch: Any, tmp_path: Path) -> None:
    shutil.copy(sys.executable, tmp_path / "libllama.so")
    monkeypatch.setenv(libllama.OVERRIDE, str(tmp_path / "libllama.so"))
    assert libllama._find.__wrapped__() == (tmp_path / "libllama.so", str(tmp_path / "libllama.so"))
