"""NF4 and FP4 in a transformers folder: the bytes that transformers itself writes of bitsandbytes' layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from exporters.base import ReceiptFailed, packed_layers
from exporters.transformers_folder import TransformersFolder, four_bit
from qtrain.grids.codebook import Fp4, Nf3, Nf4
from qtrain.grids.ggml import Ggml
from qtrain.prepare import convert, prepare

from .small_folder import TinyLm, plain
from .test_transformers_export import Damaged

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> TinyLm:
    """A tiny language model whose weights are float16 numbers, so that loading it in float16 changes none."""
    made = TinyLm(tmp_path_factory.mktemp("lm") / "m")
    made.model.config.use_cache = True  # type: ignore[union-attr]
    made.model.half().save_pretrained(made.source.path)  # type: ignore[operator]
    made.model.float()  # type: ignore[operator]
    return made


def theirs(lm: TinyLm, folder: Path, dtype: str, kind: str, double: bool) -> dict[str, Any]:
    """What transformers writes of the model that it quantized by bitsandbytes."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    auto: Any = transformers.AutoModelForCausalLM
    auto.from_pretrained(lm.source.path, quantization_config=settings, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether type, shape and bytes are equal."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_the_folder_is_the_one_that_transformers_writes_and_loads_as_4_bit(lm: TinyLm, tmp_path: Path) -> None:
    given = lm.job(tmp_path, weight=Nf4())
    entry = TransformersFolder(generate=8).export(given)
    receipt, folder = entry["receipt"], Path(entry["path"])
    assert receipt["tensors"] == receipt["tensors_bit_exact"] == 14 and receipt["logits_nmse"] < 1e-9 and receipt["fallbacks"] == []
    assert "without bitsandbytes' AVX512-BF16 kernels" in receipt["checks"]["computed in"]
    ours, expected = load_file(folder / "model.safetensors"), theirs(lm, tmp_path / "theirs", "float16", "nf4", True)
    assert ours.keys() == expected.keys() and all(same(ours[name], expected[name]) for name in expected)
    config, reference = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "theirs"))
    assert config["quantization_config"] == {**reference.pop("quantization_config"), "llm_int8_skip_modules": ["lm_head"]}
    assert {k: v for k, v in config.items() if k != "quantization_config"} == reference
    loaded = plain(
        """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
kinds = [type(m).__name__ for m in model.modules()]
state = model.model.layers[0].mlp.up_proj.weight.quant_state
print(json.dumps([kinds.count("Linear4bit"), kinds.count("Linear"), str(model.dtype), str(state.dtype), str(state.state2.absmax.dtype)]))
""",
        str(folder),
    )
    assert loaded == [14, 1, "torch.float16", "torch.float16", "torch.float32"]


@pytest.mark.parametrize("grid", [Nf4(double_quant=False), Fp4(), Fp4(double_quant=False)], ids=lambda g: g.describe())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_of_layer_has_their_bytes(lm: TinyLm, tmp_path: Path, grid: Any, dtype: str) -> None:
    given = lm.job(tmp_path, weight=grid)
    if dtype == "bfloat16":  # which they round first
        twin = lm.source.build().bfloat16().float()
        modules = {n: m for n, m in twin.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        prepare(twin, modules, grid)
        given.model = convert(twin)
    expected = theirs(lm, tmp_path / "theirs", dtype, grid.registered_name, grid.double_quant)
    layers = four_bit.packable(given.model)
    assert len(layers) == 14
    for name, layer in layers.items():
        ours = {e.name: e.data() for e in four_bit.four_bit_entries(name, layer.quantized, dtype)}
        assert ours.keys() == {n for n in expected if n.startswith(f"{name}.weight")}
        assert all(same(value, expected[n]) for n, value in ours.items())


def test_a_mixture_keeps_other_grids_as_values(lm: TinyLm, tmp_path: Path) -> None:
    given = lm.job(tmp_path, weight=Nf4(), embedding=Ggml(type="f16"))
    half = Ggml(type="f16")
    for name in ("model.layers.0.mlp.up_proj", "lm_head"):
        twin = nn.Sequential(nn.Linear(256, 512, bias=False))
        twin[0].weight.data = given.model.get_submodule(name).quantized.decode().half().float()  # type: ignore[union-attr, operator]
        prepare(twin, {"0": twin[0]}, half)
        given.model.set_submodule(name, convert(twin)[0])  # type: ignore[index]
    exporter = TransformersFolder(generate=0)
    exporter.preflight(given.model, "language", given.processor)
    assert set(packed_layers(given.model)) - set(exporter._packed(given.model)) == {
        "model.layers.0.mlp.up_proj",
        "lm_head",
        "model.embed_tokens",
    }
    settings = four_bit.settings(given.model, exporter._packed(given.model), "float16")
    assert settings["llm_int8_skip_modules"] == ["model.layers.0.mlp.up_proj", "lm_head"]


class DamagedScale(Damaged):
    """In an 8-bit scale."""

    tensor = "model.layers.0.self_attn.v_proj.weight.absmax"


def test_one_wrong_bit_fails_the_receipt(lm: TinyLm, tmp_path: Path) -> None:
    with pytest.raises(ReceiptFailed, match=r"tensor model\.layers\.0\.self_attn\.v_proj decodes differently in 6\d of"):
        DamagedScale(generate=0).export(lm.job(tmp_path, weight=Nf4()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("grids", "options", "message"),
    [
        ({"weight": Nf4(), "embedding": Nf4()}, {}, r"embed_tokens: nf4 b64 double-quantized: float16 does not hold .*dtype=float32"),
        ({"weight": Nf4(), "embedding": Nf4()}, {"dtype": "float32"}, None),
        ({"weight": Nf3()}, {}, "q_proj: nf3 .*float16 does not hold .*dtype=float32"),
        ({"weight": Nf4(block_size=512)}, {}, r"q_proj: nf4 b512.*float16 does not hold"),
        ({"weight": Nf4()}, {"bitsandbytes": False}, "q_proj: nf4 .*float16 does not hold .*dtype=float32"),
        ({"weight": Nf4()}, {"bitsandbytes": False, "dtype": "float32"}, None),
    ],
)
def test_what_bitsandbytes_has_no_layer_for_is_held_as_values(
    lm: TinyLm, tmp_path: Path, grids: dict[str, Any], options: dict[str, Any], message: str | None
) -> None:
    given, exporter = lm.job(tmp_path, **grids), TransformersFolder(**options)
    if message is None:
        exporter.preflight(given.model, "language", given.processor)
        return
    with pytest.raises(ValueError, match=message):
        exporter.preflight(given.model, "language", given.processor)


def test_names_that_would_hit_other_layers_are_anchored() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("pre_classifier", "classifier", "a1", "a10")})
    assert four_bit.skipped(model, {"pre_classifier", "a10"}) == ["^classifier$", "a1"]
    assert four_bit.skipped(model, {"classifier"}) == ["pre_classifier", "a1", "a10"]
    model._keep_in_fp32_modules = ["classifier"]  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"keeps pre_classifier of ModuleDict .*Set quantizer\.keep_float=\['pre_classifier'\]"):
        four_bit.skipped(model, {"pre_classifier"})


def test_without_bitsandbytes_it_says_what_to_install(lm: TinyLm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = lm.job(tmp_path, weight=Nf4())
    monkeypatch.setattr(four_bit, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install bitsandbytes, or set export\.transformers\.bitsandbytes=false"):
        TransformersFolder().preflight(given.model, "language", given.processor)
