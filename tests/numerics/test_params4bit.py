"""Codes that bitsandbytes has, and that it gets from us, decode to the same bits on either side."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qtrain.grids.affine import Int8
from qtrain.grids.codebook import Fp4, Nf3, Nf4
from qtrain.grids.params4bit import from_params4bit, from_quant_state, to_params4bit, to_quant_state

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS = {"nf4": Nf4, "fp4": Fp4}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def bnb() -> Any:
    module = pytest.importorskip("bitsandbytes")
    with torch.compiler.set_stance("force_eager"):
        yield module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(GRIDS)),
    st.integers(1, 40),
    st.sampled_from([64, 128, 192]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_codes_go_there_and_back_and_nothing_is_rounded(
    bnb: Any, name: str, rows: int, columns: int, nested: bool, dtype: torch.dtype, seed: int
) -> None:
    w = normal(rows, columns, seed=seed).to(dtype)
    data, state = bnb.functional.quantize_4bit(w, compress_statistics=nested, quant_type=name)
    q = from_quant_state(data, state)
    assert q.grid == GRIDS[name](64, nested) and q.shape == (rows, columns)
    assert torch.equal(q.codes, q.grid.encode(w).codes)
    assert torch.equal(q.decode().to(dtype), bnb.functional.dequantize_4bit(data, state))
    again, made = to_quant_state(q, dtype)
    assert torch.equal(again, data) and made == state and made.nested == nested
    assert torch.equal(bnb.functional.dequantize_4bit(again, made), bnb.functional.dequantize_4bit(data, state))
    packed = made.as_dict(packed=True)
    expected = state.as_dict(packed=True)
    assert packed.keys() == expected.keys() and all(torch.equal(packed[k], expected[k]) for k in packed)  # what a checkpoint holds
    restored = bnb.functional.QuantState.from_dict({f"weight.{k}": v for k, v in packed.items()}, torch.device("cpu"))
    third = from_quant_state(data, restored)
    assert torch.equal(third.decode(), q.decode())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_layers_of_bitsandbytes_compute_with_codes_of_ours(bnb: Any, storage: torch.dtype, nested: bool) -> None:
    linear = nn.Linear(128, 48)
    q = Nf4(64, nested).encode(linear.weight)
    layer = bnb.nn.Linear4bit(128, 48, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4", quant_storage=storage)
    layer.weight, layer.bias = to_params4bit(q, quant_storage=storage), linear.bias
    layer.support_avx512bf16_for_cpu = False
    x = normal(5, 128)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, q.decode(), linear.bias), rtol=1e-6, atol=1e-6)
    assert layer.weight.dtype == storage and not layer.weight.requires_grad
    back = from_params4bit(layer.weight)
    assert torch.equal(back.codes, q.codes) and all(torch.equal(back.params[n], q.params[n]) for n in q.params)
    other = bnb.nn.Linear4bit(128, 48, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4", quant_storage=storage)
    other.weight = bnb.nn.Params4bit(linear.weight.data, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    other = other.to("cpu")
    assert torch.equal(other.weight.data.view(torch.uint8), layer.weight.data.view(torch.uint8))
    assert torch.equal(from_params4bit(other.weight).decode(), q.decode())


def test_another_map_of_scales_is_refused_or_kept_as_float32(bnb: Any) -> None:
    w = normal(64, 64)
    data, state = bnb.functional.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
    other = copy.deepcopy(state)
    other.state2.code[0] = -1.0
    with pytest.raises(ValueError, match=r"8-bit map of its scales is another.*expand=True"):
        from_quant_state(data, other)
    q = from_quant_state(data, other, expand=True)
    assert q.grid == Nf4(64, False) and torch.equal(q.decode(), bnb.functional.dequantize_4bit(data, other))
    assert torch.equal(from_quant_state(data, state, expand=True).decode(), from_quant_state(data, state).decode())
    coarse = copy.deepcopy(state)
    codes, coarse.state2 = bnb.functional.quantize_blockwise(w.reshape(64, 64).abs().amax(1) - state.offset, blocksize=64)
    coarse.absmax = codes
    with pytest.raises(ValueError, match="in blocks of 64, not 256"):
        from_quant_state(data, coarse)
    assert torch.equal(from_quant_state(data, coarse, expand=True).decode(), bnb.functional.dequantize_4bit(data, coarse))


def test_what_cannot_be_taken_over_says_what_to_do(bnb: Any) -> None:
    with pytest.raises(ValueError, match=r"no codes yet.*layer\.to\('cpu'\)"):
        from_params4bit(bnb.nn.Params4bit(normal(4, 64), quant_type="nf4"))
    data, state = bnb.functional.quantize_4bit(normal(4, 64), quant_type="nf4")
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="support_avx512bf16_for_cpu = False"):
        from_quant_state(data, state)
    state.packing_format_for_cpu, state.quant_type = False, "int4"
    with pytest.raises(ValueError, match=r"'int4'; the grids here are nf4, fp4"):
        from_quant_state(data, state)
    state.quant_type = "fp4"
    with pytest.raises(ValueError, match="is not fp4's"):
        from_quant_state(data, state)
    with pytest.raises(ValueError, match=r"not nf3 b64.*nearest is grid@quantizer\.weight=nf4"):
        to_quant_state(Nf3().encode(normal(4, 64)))
    with pytest.raises(ValueError, match=r"not int8 per-channel.*int8"):
        to_quant_state(Int8().encode(normal(4, 64)))
    with pytest.raises(ValueError, match=r"33 bytes.*float32.*quant_storage=uint8"):
        to_params4bit(Nf4().encode(normal(66)), quant_storage=torch.float32)


def test_loading_the_grids_imports_neither_torch_nor_bitsandbytes() -> None:
    code = "import sys, qtrain.registry as r; r.load('qtrain.grids'); print(*{'torch', 'numpy', 'bitsandbytes'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
