"""GGUF files of every architecture, computed by llama.cpp; codes byte for byte; what a file cannot hold is refused by name."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

gguf = pytest.importorskip("gguf")

from exporters.base import packed_weights  # noqa: E402
from exporters.gguf.architectures import ARCHITECTURES, by_name, describe, metadata  # noqa: E402
from exporters.gguf.contents import file_type, left_out  # noqa: E402
from exporters.gguf.libllama import unavailable  # noqa: E402
from exporters.gguf.write import Entry, entries, read_back, read_types, shards, tied_head, write  # noqa: E402
from qtrain.grids.affine import Affine  # noqa: E402
from qtrain.grids.base import Grid  # noqa: E402
from qtrain.grids.ggml import TYPES, Ggml, GgmlActivation  # noqa: E402
from qtrain.prepare import convert, one_row, prepare  # noqa: E402
from qtrain.quantizers.qat import Qat  # noqa: E402
from qtrain.targets import select  # noqa: E402
from tests.exporters.small_lm import LINEAR, LLAMA3, YARN, nmse, tiny, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
needs_llama = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "llama.cpp is there")

NO_TOKENIZER = [("tokenizer.ggml.model", "none", "string")]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.7 * i for i in range(8)],
}
LONG = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256, "rope_parameters": LONGROPE}
TWO_BASES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
ALTERNATING = ["full_attention", "sliding_attention"]

LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "llama-yarn-betas": ("llama", {"rope_parameters": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False}}),
    "mistral": ("mistral", {"sliding_window": 128}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-yarn": ("qwen3", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "gemma2": ("gemma2", {}),
    "gemma2-pattern": ("gemma2", {"layer_types": ALTERNATING}),
    "gemma2-linear": ("gemma2", {"rope_parameters": LINEAR}),
    "gemma3": ("gemma3", {}),
    "gemma3-untied-capped": ("gemma3", {"tie_word_embeddings": False, "final_logit_softcapping": 20.0}),
    "gemma3-pattern": ("gemma3", {"layer_types": [*ALTERNATING * 3, "full_attention"]}),
    "gemma3-no-window": ("gemma3", {"layer_types": ["full_attention"] * 7}),
    "gemma3-two-bases": ("gemma3", {"rope_parameters": TWO_BASES}),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
}


def save(model: Any, folder: Path, float_type: str = "f32", pooling: str | None = None, **about: str) -> Path:
    """The model's file, with no tokenizer."""
    task = "language" if hasattr(model, "lm_head") else "embedding"
    keys = metadata(model.config, {"general.name": "tiny", **about}, task=task, pooling=pooling)
    return write(folder / "tiny.gguf", [*keys, *NO_TOKENIZER], entries(model, float_type, pooling))[0]


def logits(model: Any, ids: list[int]) -> Tensor:
    """[T, V], float32."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def in_llama(path: Path, ids: list[int], context: int = 256) -> Any:
    """[T, V] as llama.cpp computes them, as exactly as it can."""
    from exporters.gguf.llama import Llama

    with Llama(path, context=context, threads=1, kv_type="f32", flash_attention=False, repack=False) as llama:
        return llama.logits(ids)


def quantized(model: nn.Module, weight: Grid, embedding: Grid | None = None, activation: Grid | None = None, keep: Any = ()) -> Any:
    """Convert every layer but ``keep``, in place."""
    modules, _ = select(model.eval(), ["*"], list(keep))
    prepare(model, modules, weight, embedding, activation)
    return convert(model)


# llama.cpp computes what transformers computes


@needs_llama
@pytest.mark.parametrize("case", LANGUAGE)
def test_logits(case: str, tmp_path: Path) -> None:
    family, options = LANGUAGE[case]
    model, ids = tiny(family, **options), tokens(100)
    limit = 1e-7 if family.startswith("gemma") else 1e-9  # llama.cpp looks up gelu in a table of float16 numbers
    assert nmse(logits(model, ids), in_llama(save(model, tmp_path), ids)) < limit


@needs_llama
@pytest.mark.parametrize("float_type", ["f16", "bf16"])
def test_logits_in_16_bits(float_type: str, tmp_path: Path) -> None:
    model, ids = tiny("llama"), tokens(50)
    path = save(model, tmp_path, float_type)
    types = read_types(path)
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == float_type
    assert types["blk.0.attn_norm.weight"] == "f32"
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to({"f16": torch.float16, "bf16": torch.bfloat16}[float_type]).float()
    assert nmse(logits(model, ids), in_llama(path, ids)) < 1e-4  # activations are rounded to the same type


@needs_llama
@pytest.mark.parametrize(("length", "context"), [(200, 256), (300, 512)])
def test_longrope_takes_short_or_long_factors(length: int, context: int, tmp_path: Path) -> None:
    model, ids = tiny("phi3", **LONG), tokens(length)
    assert "longrope" in describe(model.config)[0]
    assert nmse(logits(model, ids), in_llama(save(model, tmp_path), ids, context)) < 1e-9


@needs_llama
@pytest.mark.parametrize(
    ("family", "pooling"),
    [("bert", "mean"), ("bert", "cls"), ("bert", "last"), ("bert_classifier", "mean"), ("bert_classifier", "rank"), ("nomic_bert", "mean")],
)
def test_embeddings(family: str, pooling: str, tmp_path: Path) -> None:
    from exporters.gguf.llama import Llama

    model: Any = tiny(family)
    path, ids = save(model, tmp_path, pooling=pooling), tokens(60)
    with torch.no_grad():
        if pooling == "rank":
            ours = model(input_ids=torch.tensor([ids])).logits[0]
        else:
            hidden = getattr(model, "bert", model)(input_ids=torch.tensor([ids])).last_hidden_state[0]
            ours = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    with Llama(path, context=128, threads=1, embeddings=True, flash_attention=False, kv_type="f32") as llama:
        assert nmse(ours, llama.embed(ids)[: len(ours)]) < 1e-6


# codes


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_read_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    width = {"hidden_size": 256, "intermediate_size": 512} if TYPES[kind].block == 256 else {}
    model = quantized(tiny("llama", tie_word_embeddings=True, num_hidden_layers=1, **width), Ggml(kind), Ggml(kind))
    path = save(model, tmp_path)
    expected = {n: decode for n, decode in packed_weights(model).items() if n != tied_head(model)}
    for name, values in read_back(path):
        assert torch.equal(values, expected.pop(name)()), name
    assert not expected
    assert read_types(path)["token_embd.weight"] == kind


@needs_llama
@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "q4_0"), ("llama", "q8_0"), ("llama", "q4_k"), ("qwen3", "q5_0"), ("phi3", "q4_0"), ("gemma3", "q8_0"), ("gemma2", "q8_0")],
)
def test_llama_computes_with_the_codes(family: str, kind: str, tmp_path: Path) -> None:
    """With activations on llama.cpp's own grid, nothing is left to differ but the order of sums, and halves that it flips."""
    width, activation = ({"hidden_size": 256, "intermediate_size": 512}, "q8_k") if kind.endswith("_k") else ({}, "q8_0")
    model, ids = quantized(tiny(family, **width), Ggml(kind), Ggml(kind), GgmlActivation(activation)), tokens(40)
    assert nmse(logits(model, ids), in_llama(save(model, tmp_path), ids)) < 1e-4


@needs_llama
@pytest.mark.parametrize("one", ["q8_0", "q4_0"])
def test_nomic_attention_is_one_tensor_if_it_has_one_type(one: str, tmp_path: Path) -> None:
    from exporters.gguf.llama import Llama

    model: Any = tiny("nomic_bert")
    values, _ = select(model, ["*v_proj"], [])
    prepare(model, values, Ggml(one))
    quantized(model, Ggml("q8_0"), keep=["*v_proj", "*token_type*", "*word*"])
    path, ids = save(model, tmp_path, pooling="mean"), tokens(30)
    assert ("blk.0.attn_qkv.weight" in read_types(path)) == (one == "q8_0")
    expected = packed_weights(model)
    for name, value in read_back(path):
        assert torch.equal(value, expected.pop(name)()), name
    assert not expected
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
    with Llama(path, context=128, threads=1, embeddings=True) as llama:
        assert nmse(ours, llama.embed(ids)) < 1e-3


HELD = [
    (Affine(bits=8, scale_dtype="float16"), "q8_0"),
    (Affine(bits=8, granularity="channel", scale_dtype="float16"), "q8_0"),
    (Affine(bits=8, granularity="tensor", scale_dtype="float16"), "q8_0"),
    (Affine(bits=4, rule="signed_absmax", scale_dtype="float16"), "q4_0"),
    (Affine(bits=4, rule="mse", group_size=64, scale_dtype="float16"), "q4_0"),
    (Affine(bits=3, scale_dtype="float16"), "q4_0"),
    (Affine(bits=5, scale_dtype="float16"), "q5_0"),
    (Affine(bits=4, rule="minmax", scale_dtype="float16"), "q5_0"),
    (Affine(bits=6, rule="minmax", scale_dtype="float16"), "q8_0"),
]


@pytest.mark.parametrize(("grid", "kind"), HELD, ids=lambda v: v.describe() if isinstance(v, Affine) else v)
def test_affine_grids_that_are_a_ggml_type(grid: Affine, kind: str, tmp_path: Path) -> None:
    model = quantized(tiny("llama", num_hidden_layers=1, intermediate_size=128), grid, keep=["lm_head", "*embed*"])
    path = save(model, tmp_path)
    assert read_types(path)["blk.0.attn_q.weight"] == kind
    expected = packed_weights(model)
    for name, values in read_back(path):
        assert torch.equal(values, expected.pop(name)()), name
    assert not expected


def test_minmax_with_float16_mins_is_q4_1(tmp_path: Path) -> None:
    model: Any = tiny("llama", num_hidden_layers=1)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):  # the scale is 1, so every -(zero point) * scale is a small integer
            layer.weight.data = torch.randint(-3, 9, layer.weight.shape).float()
            layer.weight.data[:, ::32], layer.weight.data[:, 1::32] = -5.0, 10.0
    model = quantized(model, Affine(bits=4, rule="minmax", scale_dtype="float16"), keep=["*embed*"])
    path = save(model, tmp_path)
    assert read_types(path)["output.weight"] == "q4_1"
    expected = packed_weights(model)
    assert all(torch.equal(values, expected[name]()) for name, values in read_back(path))


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (Affine(bits=4), "scale_dtype=float16"),
        (Affine(bits=8, rule="minmax", scale_dtype="float16"), "zero point.*q8_0"),
        (Affine(bits=4, group_size=16, scale_dtype="float16"), "group_size=32"),
    ],
)
def test_grids_that_no_type_holds(grid: Affine, says: str) -> None:
    model = quantized(tiny("llama", num_hidden_layers=1), grid, keep=["lm_head", "*embed*"])
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.self_attn\.q_proj: .*{says}"):
        entries(model)


def test_activations_of_another_grid() -> None:
    model = quantized(tiny("llama", num_hidden_layers=1), Ggml("q4_0"), None, Affine(bits=8, granularity="token"))
    with pytest.raises(ValueError, match="ggml_activation"):
        entries(model)


def test_token_types_stay_float() -> None:
    model = quantized(tiny("bert", num_hidden_layers=1), Ggml("q8_0"), Ggml("q8_0"))
    with pytest.raises(ValueError, match=r"embeddings\.token_type_embeddings: .*keep_float"):
        entries(model)


# ties


def test_a_tied_head_is_one_tensor() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    assert tied_head(model) == "lm_head"
    assert "output.weight" not in {e.name for e in entries(model)}
    both = quantized(model, Ggml("q8_0"), Ggml("q8_0"))
    assert next(e.modules for e in entries(both) if e.name == "token_embd.weight") == (("model.embed_tokens", 0, 320),)


@needs_llama
def test_a_tie_that_quantization_broke_is_two_tensors(tmp_path: Path) -> None:
    model, ids = quantized(tiny("llama", tie_word_embeddings=True), Ggml("q4_0"), Ggml("q8_0")), tokens(20)
    path = save(model, tmp_path)
    types = read_types(path)
    assert (types["token_embd.weight"], types["output.weight"], tied_head(model)) == ("q8_0", "q4_0", None)
    assert nmse(logits(model, ids), in_llama(path, ids)) < 1e-2


def test_gemma2_cannot_have_two() -> None:
    model = quantized(tiny("gemma2"), Ggml("q8_0"), keep=["*embed*"])
    with pytest.raises(ValueError, match="one tensor for embedding and head"):
        entries(model)


# refusals


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'dynamic'"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type is 'llama3'"),
        ("qwen3", {"rope_parameters": {**YARN, "beta_fast": 16}}, r"beta_fast is 16"),
        ("qwen3", {"rope_parameters": {**YARN, "truncate": False}}, r"truncate is False"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("bert", {"hidden_act": "relu"}, "hidden_act is relu"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
    ],
)
def test_options_that_a_graph_has_built_in_otherwise(family: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        describe(tiny(family, **options).config)


def test_unknown_architecture() -> None:
    from transformers import GPT2Config

    with pytest.raises(ValueError, match=r"'gpt2'.*gemma3.*llama.*qwen3"):
        describe(GPT2Config())


def test_every_architecture_of_ours_is_one_of_gguf() -> None:
    from qtrain.gguf_names import ARCHITECTURES as NAMES

    assert {a.name for a in ARCHITECTURES} == set(NAMES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())
    with pytest.raises(ValueError, match=r"'mamba'.*llama"):
        by_name("mamba")


def test_tensors_that_the_graph_has_not() -> None:
    model: Any = tiny("qwen3", num_hidden_layers=1)
    model.model.layers[0].self_attn.o_proj.bias = nn.Parameter(torch.zeros(64))
    with pytest.raises(ValueError, match=r"no bias in attn_output.*o_proj\.bias"):
        entries(model)
    model = tiny("llama", num_hidden_layers=1)
    model.model.adapter = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="adapter"):
        entries(model)
    model = tiny("llama", num_hidden_layers=1)
    model.model.register_buffer("shift", torch.zeros(3))
    with pytest.raises(ValueError, match=r"model\.shift"):
        entries(model)


def test_a_model_without_head() -> None:
    model: Any = tiny("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="no output head"):
        entries(model.model)
    with pytest.raises(ValueError, match="has none"):
        entries(tiny("bert", num_hidden_layers=1), pooling="rank")


def test_a_trial_of_one_row_per_weight_is_checked() -> None:
    model = tiny("llama", num_hidden_layers=1)
    modules, _ = select(model, ["*_proj"], [])
    prepare(model, modules, Ggml("q8_0"))
    assert {e.type for e in entries(convert(one_row(model)))} == {"q8_0", "f16", "f32"}


def test_a_trial_of_one_row_with_learned_scales() -> None:
    """That is how a run finds in seconds what would fail after minutes."""
    grid, keep = Affine(rule="signed_absmax", scale_dtype="float16"), ["*embed*", "lm_head"]
    scheme = Qat(weight=grid, learn_scale=True)
    model, _ = scheme.prepare(tiny("llama", intermediate_size=128), keep)
    assert {e.type for e in entries(convert(one_row(model)))} == {"q4_0", "f16", "f32"}


def test_layers_in_training_are_refused() -> None:
    model = tiny("llama", num_hidden_layers=1)
    modules, _ = select(model, ["*q_proj"], [])
    prepare(model, modules, Ggml("q8_0"))
    with pytest.raises(ValueError, match="convert"):
        entries(model)


@pytest.mark.parametrize(
    ("value", "says"), [(float("nan"), "model.norm.weight has 1 values that are not finite"), (1e6, "float_type=bf16")]
)
def test_values_that_do_not_fit(value: float, says: str, tmp_path: Path) -> None:
    model: Any = tiny("llama", num_hidden_layers=1)
    (model.model.norm.weight if value != value else model.lm_head.weight).data.view(-1)[5] = value
    with pytest.raises(ValueError, match=says):
        save(model, tmp_path, "f16")
    if value == value:
        save(model, tmp_path, "bf16")


# metadata and the file


def contents(path: Path) -> dict[str, Any]:
    """All metadata."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


def test_metadata(tmp_path: Path) -> None:
    model = quantized(tiny("mistral", sliding_window=128), Ggml("q8_0"), keep=["*embed*"])
    found = contents(save(model, tmp_path, recipe="gguf_test", mix="q8_0"))
    assert found["general.architecture"] == "llama"
    assert (found["general.name"], found["general.file_type"], found["general.quantization_version"]) == ("tiny", 7, 2)
    assert (found["qtrain.recipe"], found["llama.context_length"], found["llama.vocab_size"]) == ("gguf_test", 128, 320)
    assert json.loads(found["qtrain.modules"])["blk.1.ffn_down.weight"] == [["model.layers.1.mlp.down_proj", 0, 64]]
    assert "sliding window" in describe(model.config)[0]


def test_file_types() -> None:
    def entry(name: str, kind: str, rows: int = 256) -> Entry:
        return Entry(name, (rows, 256), kind, lambda: None, ((name, 0, rows),))  # type: ignore[arg-type,return-value]

    many, one = entry("a", "q4_k", 1024), entry("b", "q6_k")
    assert file_type([many]) == gguf.LlamaFileType.MOSTLY_Q4_K_S
    assert file_type([many, one]) == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert file_type([many, one], "q5_k_s") == gguf.LlamaFileType.MOSTLY_Q5_K_S
    assert file_type([Entry("a", (2, 32), "f16", lambda: None)], "q4_k_m") == gguf.LlamaFileType.MOSTLY_F16  # type: ignore[arg-type,return-value]


def test_heads_that_embeddings_do_not_need() -> None:
    model = tiny("bert_classifier", num_hidden_layers=1)
    assert left_out(model, "mean") == ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"]
    assert left_out(model, "rank") == []


def test_task_and_pooling() -> None:
    with pytest.raises(ValueError, match="task embedding"):
        metadata(tiny("bert", num_hidden_layers=1).config, {})
    with pytest.raises(ValueError, match="task language"):
        metadata(tiny("llama", num_hidden_layers=1).config, {}, task="embedding")
    with pytest.raises(ValueError, match="pooling=mean"):
        describe(tiny("nomic_bert", num_hidden_layers=1).config, "rank")


def test_contradictions(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=1)
    keys, tensors = metadata(model.config, {}), entries(model)
    with pytest.raises(ValueError, match=r"319 tokens and the model's embedding 320 rows"):
        write(tmp_path / "a.gguf", [*keys, ("tokenizer.ggml.tokens", ["a"] * 319, "array")], tensors)
    with pytest.raises(ValueError, match=r"llama\.block_count twice: 1 and 2"):
        write(tmp_path / "a.gguf", [*keys, ("llama.block_count", 2, "uint32")], tensors)
    assert not (tmp_path / "a.gguf").exists()


@needs_llama
def test_shards(tmp_path: Path) -> None:
    model, ids = quantized(tiny("llama"), Ggml("q8_0"), Ggml("q8_0")), tokens(20)
    tensors, keys = entries(model), [*metadata(model.config, {}), *NO_TOKENIZER]
    paths = write(tmp_path / "whole.gguf", keys, tensors)
    assert shards(paths[0]) == paths == [tmp_path / "whole.gguf"]
    split = write(tmp_path / "split.gguf", keys, tensors, split_bytes=30_000)
    assert len(split) > 2
    assert shards(split[0]) == split == sorted(tmp_path.glob("split-*.gguf"))
    whole = dict(read_back(paths[0]))
    assert all(torch.equal(value, whole.pop(name)) for name, value in read_back(split[0]))
    assert not whole
    assert (in_llama(split[0], ids) == in_llama(paths[0], ids)).all()


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: list[Any] = []

    def watched(make: Callable[[], Any]) -> Callable[[], Any]:
        def made() -> Any:
            assert all(ref() is None for ref in alive)
            data = make()
            alive.append(weakref.ref(data))
            return data

        return made

    model = quantized(tiny("llama"), Ggml("q8_0"), Ggml("q8_0"))
    found = [Entry(e.name, e.shape, e.type, watched(e.data), e.modules) for e in entries(model)]
    write(tmp_path / "a.gguf", metadata(model.config, {}), found)
    assert len(alive) == len(found)


# rows


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 8), (4, 16)])
def test_rows_become_pairs(heads: int, size: int) -> None:
    """Row i of a head's first half, then row i of its second."""
    transform = by_name("llama").transform("blk.3.attn_k.weight", heads=99, kv_heads=heads)
    x = torch.arange(heads * size).unsqueeze(1)
    expected = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    assert transform.apply(x).flatten().tolist() == expected
    assert torch.equal(transform.undo(transform.apply(x)), x)


def test_other_tensors_stay_as_they_are() -> None:
    assert by_name("llama").transform("blk.3.attn_v.weight", 4, 2).rows(64) is None
    assert by_name("qwen2").transform("blk.3.attn_q.weight", 4, 2).rows(64) is None
    norm = by_name("gemma3").transform("blk.0.attn_q_norm.weight", 4, 2)
    assert norm.undo(norm.apply(torch.ones(3))).tolist() == [1.0, 1.0, 1.0]
    assert norm.apply(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
