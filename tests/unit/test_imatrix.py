"""Importance matrix files: there and back, as llama.cpp's own GGUF reader sees them, and files that are none."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.gguf import libllama
from qtrain import imatrix
from qtrain.imatrix import CHUNK, Entry, Imatrix


def example() -> Imatrix:
    """A dense weight and one of three experts, the second of which no token reached."""
    rng = np.random.default_rng(0)
    dense = Entry(rng.random((1, 8), np.float32) * 100, np.array([640], np.float32))
    experts = Entry(rng.random((3, 4), np.float32), np.array([5, 0, 3], np.float32))
    return Imatrix({"blk.1.ffn_down.weight": dense, "blk.0.ffn_up_exps.weight": experts}, ["a text", "wörter"], 5, 128)


def same(a: Imatrix, b: Imatrix) -> bool:
    """To the bit."""
    entries = a.entries.keys() == b.entries.keys() and all(
        np.array_equal(a.entries[n].sums_EI, b.entries[n].sums_EI) and np.array_equal(a.entries[n].counts_E, b.entries[n].counts_E)
        for n in a.entries
    )
    return entries and (a.datasets, a.chunk_count, a.chunk_size) == (b.datasets, b.chunk_count, b.chunk_size)


def legacy(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    """The older format."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name.encode())) + name.encode() + struct.pack("<ii", calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + tail


# there and back


def test_a_file_reads_as_it_was_written(tmp_path: Path) -> None:
    imatrix.write(tmp_path / "imatrix.gguf", example())
    assert same(imatrix.read(tmp_path / "imatrix.gguf"), example())
    assert [file.name for file in tmp_path.iterdir()] == ["imatrix.gguf"]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=9), st.integers(1, 2**24))
def test_sums_and_counts_are_exact(tmp_path_factory: Any, sums: list[float], tokens: int) -> None:
    path = tmp_path_factory.mktemp("imatrix") / "i.gguf"
    given_ = Imatrix({"blk.0.attn_q.weight": Entry(np.array([sums], np.float32), np.array([tokens], np.float32))}, ["text"], 1)
    imatrix.write(path, given_)
    assert same(imatrix.read(path), given_)


def test_importance_is_the_mean_and_1_where_no_token_came_by() -> None:
    entries = example().entries
    dense, experts = entries["blk.1.ffn_down.weight"], entries["blk.0.ffn_up_exps.weight"]
    assert np.array_equal(dense.importance(), dense.sums_EI / np.float32(640)) and dense.importance().dtype == np.float32
    assert np.array_equal(experts.importance(), [experts.sums_EI[0] / 5, np.ones(4), experts.sums_EI[2] / 3])


def test_importance_by_name() -> None:
    found = example()
    assert found.importance("blk.1.ffn_down.weight", 8) is not None and found.importance("output.weight", 8) is None
    with pytest.raises(ValueError, match=r"8 channels for blk\.1\.ffn_down\.weight, which has 16: it is of another model"):
        found.importance("blk.1.ffn_down.weight", 16)


# as llama.cpp reads it


@pytest.mark.skipif(bool(libllama.unavailable()), reason=libllama.unavailable())
def test_llama_cpps_own_reader_finds_keys_and_tensors(tmp_path: Path) -> None:
    imatrix.write(tmp_path / "imatrix.gguf", example())
    lib = ctypes.CDLL(str(libllama.library().path))
    gguf = _Reader(lib, tmp_path / "imatrix.gguf")
    assert gguf.text("general.type") == "imatrix" and gguf.find("general.architecture") < 0
    assert (gguf.number("imatrix.chunk_count"), gguf.number("imatrix.chunk_size")) == (5, 128)
    assert gguf.texts("imatrix.datasets") == ["a text", "wörter"]
    names = ["blk.0.ffn_up_exps.weight", "blk.1.ffn_down.weight"]
    assert gguf.tensors() == {f"{n}.{part}": 0 for n in names for part in ("in_sum2", "counts")}  # 0 is float32
    gguf.close()


class _Reader:
    """gguf.h."""

    def __init__(self, lib: Any, path: Path) -> None:
        self.lib = lib
        pointer, index = ctypes.c_void_p, ctypes.c_int64
        results = {"init_from_file": pointer, "find_key": index, "get_val_str": ctypes.c_char_p, "get_val_u32": ctypes.c_uint32}
        results |= {
            "get_arr_n": ctypes.c_size_t,
            "get_arr_str": ctypes.c_char_p,
            "get_n_tensors": index,
            "get_tensor_name": ctypes.c_char_p,
        }
        results |= {"get_tensor_type": ctypes.c_int, "free": None}
        for name, result in results.items():
            getattr(lib, f"gguf_{name}").restype = result

        class Params(ctypes.Structure):
            _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]

        self.at = pointer(lib.gguf_init_from_file(str(path).encode(), Params(True, None)))
        assert self.at

    def find(self, key: str) -> int:
        """Its index."""
        return int(self.lib.gguf_find_key(self.at, key.encode()))

    def text(self, key: str) -> str:
        """A string."""
        return str(self.lib.gguf_get_val_str(self.at, ctypes.c_int64(self.find(key))).decode())

    def number(self, key: str) -> int:
        """A uint32."""
        return int(self.lib.gguf_get_val_u32(self.at, ctypes.c_int64(self.find(key))))

    def texts(self, key: str) -> list[str]:
        """An array of strings."""
        at = ctypes.c_int64(self.find(key))
        return [self.lib.gguf_get_arr_str(self.at, at, ctypes.c_size_t(i)).decode() for i in range(self.lib.gguf_get_arr_n(self.at, at))]

    def tensors(self) -> dict[str, int]:
        """Name -> type."""
        lib, at = self.lib, self.at
        indices = [ctypes.c_int64(i) for i in range(lib.gguf_get_n_tensors(at))]
        return {lib.gguf_get_tensor_name(at, i).decode(): lib.gguf_get_tensor_type(at, i) for i in indices}

    def close(self) -> None:
        """Free it."""
        self.lib.gguf_free(self.at)


# what calibration measured


def test_a_models_importances(tmp_path: Path) -> None:
    import torch

    from qtrain.importance import Importance
    from tests.exporters.small_gguf import small_llama

    model = small_llama()
    width = model.config.hidden_size
    measured = {
        "model.layers.1.self_attn.q_proj": Importance(torch.arange(width).float(), 1000),
        "lm_head": Importance(torch.ones(width), 1000),
        "model.layers.0.self_attn.q_proj": Importance(torch.zeros(width), 0),
    }
    imatrix.save(tmp_path / "imatrix.gguf", model, measured, dataset="some text")
    found = imatrix.read(tmp_path / "imatrix.gguf")
    assert set(found.entries) == {"blk.1.attn_q.weight", "output.weight"}
    assert np.array_equal(found.importance("blk.1.attn_q.weight", width), measured["model.layers.1.self_attn.q_proj"].mean().numpy())
    assert (found.datasets, found.chunk_count, found.chunk_size) == (["some text"], 2, CHUNK)


# the older format


@pytest.mark.parametrize("tail", [b"", struct.pack("<ii", 7, 6) + b"a text"], ids=["older", "newer"])
def test_the_older_format(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy({"blk.0.attn_q.weight": (7, [7.0, 14.0, 0.0]), "wörter": (0, [3.0])}, tail))
    found = imatrix.read(path)
    assert np.array_equal(found.importance("blk.0.attn_q.weight", 3), [1, 2, 0])
    assert np.array_equal(found.importance("wörter", 1), [3])
    assert (found.chunk_count, found.datasets, found.chunk_size) == ((7, ["a text"], 0) if tail else (0, [], 0))
    imatrix.write(tmp_path / "imatrix.gguf", found)
    again = imatrix.read(tmp_path / "imatrix.gguf")
    assert all(np.array_equal(again.entries[n].importance(), found.entries[n].importance()) for n in found.entries)


# what is none


@pytest.mark.parametrize("kept", [0, 3, 6, 20, 32, 60, -1])
def test_a_truncated_older_file(tmp_path: Path, kept: int) -> None:
    data = legacy({"blk.0.attn_q.weight": (7, [1.0] * 9), "b": (7, [1.0])})
    (tmp_path / "i.dat").write_bytes(data[:kept])
    with pytest.raises(ValueError, match=r"i\.dat is neither a GGUF file nor a complete importance matrix of the older format: at byte"):
        imatrix.read(tmp_path / "i.dat")


@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.95])
def test_a_truncated_file(tmp_path: Path, kept: float) -> None:
    imatrix.write(tmp_path / "whole.gguf", example())
    data = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "i.gguf").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=r"i\.gguf is a damaged GGUF file"):
        imatrix.read(tmp_path / "i.gguf")


def test_other_gguf_files(tmp_path: Path) -> None:
    import gguf

    def write(kind: str, tensors: dict[str, np.ndarray]) -> Path:
        writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
        writer.add_type(kind)
        for name, value in tensors.items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "other.gguf"

    ones = np.ones((1, 4), np.float32)
    with pytest.raises(ValueError, match="of type model, not imatrix"):
        imatrix.read(write("model", {"a": ones}))
    with pytest.raises(ValueError, match="a lacks float32 tensors"):
        imatrix.read(write("imatrix", {"a.in_sum2": ones}))
    with pytest.raises(ValueError, match="a lacks float32 tensors"):
        imatrix.read(write("imatrix", {"a.in_sum2": ones.astype(np.float16), "a.counts": ones}))
    with pytest.raises(ValueError, match="has 4 sums and 3 counts"):
        imatrix.read(write("imatrix", {"a.in_sum2": ones, "a.counts": ones[:, :3]}))


@pytest.mark.parametrize(
    ("name", "sums", "counts", "what"),
    [
        ("a", [[1.0, float("nan")]], [1.0], "not finite"),
        ("a", [[1.0, -1.0]], [1.0], "negative"),
        ("a", [[1.0, 1.0]], [0.0], "no tokens"),
        ("a", [1.0, 1.0], [1.0], r"sums \(2,\)"),
        ("a", [[1.0, 1.0]], [1.0, 1.0], r"counts \(2,\)"),
        ("blk." + 60 * "a", [[1.0]], [1.0], "longer than 55 characters"),
    ],
)
def test_entries_that_llama_cpp_would_misread(tmp_path: Path, name: str, sums: Any, counts: Any, what: str) -> None:
    wrong = Imatrix({name: Entry(np.array(sums, np.float32), np.array(counts, np.float32))})
    with pytest.raises(ValueError, match=what):
        imatrix.write(tmp_path / "i.gguf", wrong)
    assert not list(tmp_path.iterdir())


def test_no_entries(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without entries"):
        imatrix.write(tmp_path / "i.gguf", Imatrix())
