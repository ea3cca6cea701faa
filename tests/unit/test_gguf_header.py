"""The header of a GGUF file: what the `gguf` package reads of it, and damage of every kind as one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.gguf_header import read_header
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_lm import tiny_language_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of all types that can be written."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tiny_language_model(tmp_path_factory.mktemp("lm"))
    write_tiny_gguf(folder / "m.gguf", LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    return folder / "m.gguf"


def test_it_is_what_the_gguf_package_reads(whole: Path) -> None:
    header, reader = read_header(whole), gguf.GGUFReader(whole)
    assert header.architecture == "llama"
    assert [(t.name, t.shape, t.type, header.data_start + t.offset) for t in header.tensors] == [
        (t.name, tuple(int(n) for n in t.shape[::-1]), t.tensor_type.value, t.data_offset) for t in reader.tensors
    ]
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            value: Any = field.contents()
            assert header.metadata[key] == (len(value) if isinstance(value, list) and isinstance(value[0], str) else value)
    assert header.get("block_count") == 2 and header.get("nothing") is None


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_is_cut_short_anywhere_is_refused(whole: Path, share: float) -> None:
    data = whole.read_bytes()
    path = whole.parent / "cut.gguf"
    header = read_header(whole)
    for size in (int(share * len(data)), int(share * header.data_start), len(data) - 1 - int(share * 100)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"is cut short|not a GGUF file"):
            read_header(path)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(4, 4000), value=st.integers(0, 255))
def test_a_header_with_a_wrong_byte_never_ends_otherwise(whole: Path, at: int, value: int) -> None:
    data = bytearray(whole.read_bytes())
    data[at] = value
    path = whole.parent / "wrong.gguf"
    path.write_bytes(data)
    try:
        error = ""
        assert read_header(path).path == path
    except ValueError as e:
        error = str(e)
    assert not error or str(path) in error


def write(path: Path, architecture: str = "llama", kind: gguf.GGMLQuantizationType | None = None, **keys: int) -> Path:
    """A file of one tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        writer.add_uint16(key.replace("__", "."), value)
    if kind is None:
        writer.add_tensor("a", np.zeros((2, 32), np.float32))
    else:
        writer.add_tensor("a", np.zeros((2, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_type_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "good.gguf", kind=gguf.GGMLQuantizationType.Q4_K)).tensors[0].shape == (2, 256)
    with pytest.raises(ValueError, match=r"1 tensors of .* cannot be decoded, the first a of type Q8_K; valid: F32, F16, Q4_0, .*Q6_K"):
        read_header(write(tmp_path / "bad.gguf", kind=gguf.GGMLQuantizationType.Q8_K))
    path = write(tmp_path / "unknown.gguf")
    data = path.read_bytes()
    at = data.index(b"\x01\0\0\0\0\0\0\0a") + 9 + 4 + 16  # after the name: number of dimensions, dimensions, type
    path.write_bytes(data[:at] + (4).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ValueError, match=r"the first a of type number 4"):
        read_header(path)


def test_one_part_of_several_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is one of 3 parts.*llama-gguf-split --merge a.gguf whole.gguf"):
        read_header(write(tmp_path / "a.gguf", split__count=3))


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    for content, message in (
        (b"", "is not a GGUF file"),
        (b"GGUF", "damaged"),
        (b"<html>" * 20, "is not a GGUF file"),
        (b"GGUF" + b"\1\0\0\0" + bytes(64), "is GGUF of version 1"),
        (b"GGUF" + b"\0\0\0\3" + bytes(64), r"is GGUF of version 50331648 \(or big-endian\)"),
        (b"GGUF" + b"\3\0\0\0" + bytes(64), "damaged"),
    ):
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_header(tmp_path / "a.gguf")
