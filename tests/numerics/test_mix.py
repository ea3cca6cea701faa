"""Mixes give every tensor the type that llama.cpp's own quantizer gives it; GGUF names are those of llama.cpp's converter."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtrain import registry
from qtrain.gguf_names import ARCHITECTURES, Facts, architecture, facts, left_out, tensor_names
from qtrain.grids.mix import DEFAULTS, TYPES, Choice, Mix, tensor_types
from tests.conftest import ROOT

GOLDEN: dict[str, Any] = json.loads((ROOT / "tests" / "golden" / "mixes.json").read_text())
"""What llama_model_quantize made of models; tests/golden/make_mixes.py says how."""


def block(kind: str) -> int:
    return 1 if kind in ("f16", "bf16") else 256 if kind.endswith("_k") else 32


def expand(tensors: dict[str, Any], layers: int) -> dict[str, tuple[int, ...]]:
    return {n.replace("{i}", str(i)): tuple(s) for n, s in tensors.items() for i in range(layers if "{i}" in n else 1)}


def written_by_llama_cpp(model: dict[str, Any], run: str) -> dict[str, str | None]:
    """Tensor -> type, None where llama.cpp kept it; the run-length encoding undone."""
    layers = model["facts"]["layers"]
    full = {n.removeprefix("blk.{i}.").removesuffix(".weight"): n for n in model["tensors"] if n.endswith("weight")}
    types: dict[str, str | None] = dict.fromkeys(expand(model["tensors"], layers))
    for text, names in model["types"][run].items():
        row: list[str] = []
        for part in text.split():
            kind, _, count = part.partition("*")
            row += [kind] * int(count or layers)
        for name in names.split():
            types |= {n: row[i] for i, n in enumerate(expand({full[name]: ()}, layers))}
    return types


def options(run: str) -> dict[str, Any]:
    return {key: value or True for key, _, value in (option.partition("=") for option in run.split()[1:])}


def ours(model: dict[str, Any], run: str) -> dict[str, Choice]:
    tensors = expand(model["tensors"], model["facts"]["layers"])
    return tensor_types(run.split()[0], tensors.items(), Facts(**model["facts"]), **options(run))


@pytest.mark.parametrize("name", GOLDEN)
def test_every_tensor_has_the_type_that_llama_cpp_gives_it(name: str) -> None:
    model = GOLDEN[name]
    assert set(DEFAULTS) <= set(model["types"])
    for run in model["types"]:
        theirs, found = written_by_llama_cpp(model, run), {n: c.type for n, c in ours(model, run).items()}
        given = options(run)
        if "output.weight" not in theirs and "output" in given and run.startswith(("f16", "bf16")):
            assert theirs["token_embd.weight"] == run.split()[0], "llama.cpp ignores the option; the essay says that we do not"
            theirs["token_embd.weight"] = given["output"]
        assert found == theirs, run


def test_an_importance_matrix_changes_only_what_the_golden_file_says() -> None:
    for name, model in GOLDEN.items():
        for mix in DEFAULTS:
            if f"{mix} imatrix" not in model["types"] and name != "SmolLM2-135M-Instruct":  # not measured with one
                with_matrix = ours(model, f"{mix} imatrix")
                assert {n: c.type for n, c in with_matrix.items()} == written_by_llama_cpp(model, mix)


def test_the_golden_file_covers_every_branch() -> None:
    models = GOLDEN.values()
    assert len(GOLDEN) > 60
    assert {m["facts"]["architecture"] for m in models} == set(ARCHITECTURES.values())
    assert {m["facts"]["experts"] for m in models} == {0, 4, 8}
    assert {"output.weight" in m["tensors"] for m in models} == {True, False}
    written = {kind for m in models for types in m["types"].values() for text in types for kind in (p.split("*")[0] for p in text.split())}
    assert written == set(TYPES)
    assert {run for m in models for run in m["types"] if run.endswith(" imatrix")} == {"q4_0 imatrix", "q5_0 imatrix"}


def test_smollm2_is_as_the_small_model_of_its_shape() -> None:
    small, true = GOLDEN["llama 30x576/1536 9:3 tied"], GOLDEN["SmolLM2-135M-Instruct"]
    assert small["facts"] == true["facts"]
    for mix in DEFAULTS:
        assert written_by_llama_cpp(small, mix) == written_by_llama_cpp(true, mix)


def test_the_type_that_output_names_counts_for_a_tied_embedding_in_every_mix() -> None:
    tensors = [("token_embd.weight", (8, 256)), ("blk.0.attn_q.weight", (8, 256))]
    for mix in DEFAULTS:
        for pure in (False, True):
            types = tensor_types(mix, tensors, Facts("llama", 1, 4, 4), output="q5_1", pure=pure)
            assert types["token_embd.weight"].type == "q5_1"
            assert types["blk.0.attn_q.weight"].type == DEFAULTS[mix]


@pytest.mark.parametrize("name", GOLDEN)
def test_fallbacks_say_which_row_does_not_fit_and_what_divides_it(name: str) -> None:
    model = GOLDEN[name]
    shapes = expand(model["tensors"], model["facts"]["layers"])
    for mix in DEFAULTS:
        for tensor, (kind, why) in ours(model, mix).items():
            row = shapes[tensor][-1]
            if why is None:
                continue
            wanted = why.split(" instead of ")[1].split(":")[0]
            assert why.startswith(f"{kind} instead of {wanted}: ")
            assert row % block(wanted) != 0 and f"{block(wanted)} does not divide its rows of {row} values" in why


def test_a_fallback_in_words() -> None:
    types = tensor_types("q4_k_m", [("token_embd.weight", (8, 576)), ("blk.0.ffn_up.weight", (8, 100))], Facts("llama", 1, 9, 3))
    assert types["token_embd.weight"] == ("q8_0", "q8_0 instead of q6_k: 256 does not divide its rows of 576 values, 64 does")
    assert types["blk.0.ffn_up.weight"] == ("f16", "f16 instead of q4_k: 256 does not divide its rows of 100 values, 4 does")


@given(
    mix=st.sampled_from(sorted(DEFAULTS)),
    width=st.integers(1, 80).map(lambda n: 16 * n),
    ffn=st.integers(1, 80).map(lambda n: 16 * n),
    layers=st.integers(1, 90),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    imatrix=st.booleans(),
    explicit=st.sampled_from([None, *TYPES]),
)
def test_every_row_holds_whole_blocks(
    mix: str, width: int, ffn: int, layers: int, kv_heads: int, imatrix: bool, explicit: str | None
) -> None:
    per_layer = {
        "attn_q": width,
        "attn_k": width,
        "attn_v": width,
        "attn_output": width,
        "ffn_up": width,
        "ffn_gate": width,
        "ffn_down": ffn,
    }
    tensors = {f"blk.{i}.{name}.weight": (2, row) for name, row in per_layer.items() for i in range(layers)}
    tensors |= {"token_embd.weight": (2, width), "output_norm.weight": (width,)}
    types = tensor_types(mix, tensors.items(), Facts("llama", layers, 8, kv_heads), imatrix, output=explicit)
    assert set(types) == set(tensors)
    assert types["output_norm.weight"] == (None, None)
    for name, (kind, why) in types.items():
        if kind is not None:
            assert tensors[name][-1] % block(kind) == 0
            assert why is None or tensors[name][-1] % 256


def test_bad_options_say_what_is_valid() -> None:
    with pytest.raises(ValueError, match=r"mix is 'q4_k_x'; valid: q4_k_m, .*grid@quantizer.weight=q4_k_m"):
        tensor_types("q4_k_x", [], Facts("llama", 1, 1, 1))
    with pytest.raises(ValueError, match=r"output is 'q4_k_m'; valid: q4_k, .*quantizer.weight.output=q8_0"):
        registry.get("grid", "q4_k_m")(output="q4_k_m")
    with pytest.raises(ValueError, match=r"one tensor for both"):
        tensor_types("q4_k_m", [("token_embd.weight", (8, 256))], Facts("llama", 1, 1, 1), output="q6_k", embedding="q4_k")


def test_every_mix_is_registered_under_its_own_name() -> None:
    for name in DEFAULTS:
        mix = registry.get("grid", name)()
        assert isinstance(mix, Mix) and mix.mix == name
    assert registry.get("grid", "q4_k_m")(output="q8_0", pure=True).describe() == "mix q4_k_m output=q8_0 pure"


# -- names, on models of transformers -------------------------------------------------------------------------------------------------


@cache
def model_of(kind: str, **extra: Any) -> Any:
    """A small model of transformers on the `meta` device."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    sizes = {"num_hidden_layers": 2, "hidden_size": 576, "intermediate_size": 512, "num_attention_heads": 9, "vocab_size": 64}
    sizes |= {} if "bert" in kind else {"num_key_value_heads": 3, "head_dim": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    head = extra.pop("head", "bare" if "bert" in kind else "causal")
    auto = {"bare": AutoModel, "causal": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}[head]
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(kind, **(sizes | extra)))


def named(model: Any) -> dict[str, str]:
    parameters = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    return tensor_names(model.config, parameters)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_parameter_has_a_tensor_of_its_own(kind: str) -> None:
    import gguf

    model = model_of(kind)
    names = named(model)
    parameters = dict(model.named_parameters())
    assert {n for n in parameters if not left_out(n)} <= set(names)
    assert len(set(names.values())) == len({id(model.get_parameter(n)) for n in names})
    known = {form.format(bid=i) for form in gguf.TENSOR_NAMES.values() for i in range(2)}
    for parameter, name in names.items():
        stem, _, suffix = name.rpartition(".")
        assert stem in known and parameter.endswith(suffix)
    assert names[next(n for n in parameters if "embed" in n)] == "token_embd.weight"


EXPECTED = {
    ("llama", "model.layers.1.post_attention_layernorm.weight"): "blk.1.ffn_norm.weight",
    ("llama", "model.layers.1.self_attn.o_proj.weight"): "blk.1.attn_output.weight",
    ("llama", "lm_head.weight"): "output.weight",
    ("mistral", "model.layers.0.mlp.gate_proj.weight"): "blk.0.ffn_gate.weight",
    ("qwen2", "model.layers.0.self_attn.k_proj.bias"): "blk.0.attn_k.bias",
    ("qwen3", "model.layers.0.self_attn.q_norm.weight"): "blk.0.attn_q_norm.weight",
    ("gemma2", "model.layers.1.post_attention_layernorm.weight"): "blk.1.post_attention_norm.weight",
    ("gemma2", "model.layers.1.pre_feedforward_layernorm.weight"): "blk.1.ffn_norm.weight",
    ("gemma2", "model.layers.1.post_feedforward_layernorm.weight"): "blk.1.post_ffw_norm.weight",
    ("gemma2", "lm_head.weight"): "token_embd.weight",
    ("gemma3_text", "model.layers.1.self_attn.k_norm.weight"): "blk.1.attn_k_norm.weight",
    ("phi3", "model.layers.0.self_attn.qkv_proj.weight"): "blk.0.attn_qkv.weight",
    ("phi3", "model.layers.0.mlp.gate_up_proj.weight"): "blk.0.ffn_up.weight",
    ("bert", "encoder.layer.1.attention.self.value.bias"): "blk.1.attn_v.bias",
    ("bert", "encoder.layer.1.attention.output.LayerNorm.weight"): "blk.1.attn_output_norm.weight",
    ("bert", "encoder.layer.1.output.LayerNorm.weight"): "blk.1.layer_output_norm.weight",
    ("bert", "embeddings.token_type_embeddings.weight"): "token_types.weight",
    ("nomic_bert", "layers.1.self_attn.k_proj.weight"): "blk.1.attn_k.weight",
    ("nomic_bert", "layers.1.post_mlp_layernorm.bias"): "blk.1.layer_output_norm.bias",
}


@pytest.mark.parametrize(("kind", "parameter"), EXPECTED)
def test_a_parameter_has_the_name_that_llama_cpps_converter_gives_it(kind: str, parameter: str) -> None:
    assert named(model_of(kind))[parameter] == EXPECTED[kind, parameter]


def test_names_do_not_depend_on_what_wraps_the_model() -> None:
    config = model_of("llama").config
    names = tensor_names(config, ["layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"])
    assert set(names.values()) == {"blk.0.ffn_up.weight"}
    parameters = ["bert.encoder.layer.0.output.dense.weight", "bert.pooler.dense.bias", "cls.predictions.bias"]
    assert tensor_names(model_of("bert").config, parameters) == {parameters[0]: "blk.0.ffn_down.weight"}


def test_facts_of_a_configuration() -> None:
    assert facts(model_of("qwen3").config) == Facts("qwen3", layers=2, heads=9, kv_heads=3)
    assert facts(model_of("nomic_bert").config) == Facts("nomic-bert", layers=2, heads=9, kv_heads=9)
    assert facts(model_of("llama").config).kv_groups == 3


def test_an_unknown_architecture_or_head_names_itself_and_ours() -> None:
    import torch
    from transformers import OPTConfig

    with pytest.raises(ValueError, match=r"models of type 'opt' .*ours are bert, gemma2, .*qwen3.*model.path="):
        architecture(OPTConfig())
    with pytest.raises(ValueError, match=r"models of type 'Linear' "):
        registry.get("grid", "q4_k_m")().assign(torch.nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match=r"2 parameters have no tensor in a GGUF file of architecture bert, the first classifier\.weight"):
        named(model_of("bert", head="classifier"))


# -- grids for modules ------------------------------------------------------------------------------------------------------------------


def swappable(model: Any) -> dict[str, Any]:
    from torch import nn

    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}


@pytest.mark.parametrize("tie", [True, False])
def test_assign_gives_each_module_the_grid_of_its_tensor_and_reports_fallbacks(tie: bool) -> None:
    from qtrain.grids.ggml import Ggml

    model = model_of("llama", tie_word_embeddings=tie)
    modules = swappable(model)
    grids, fallbacks = registry.get("grid", "q4_k_m")().assign(model, modules)
    assert set(grids) == set(modules) and all(isinstance(grid, Ggml) for grid in grids.values())
    assert grids["lm_head"].type == "q8_0"
    assert grids["model.embed_tokens"].type == ("q8_0" if tie else "q5_0")
    assert grids["model.layers.1.mlp.down_proj"].type == "q6_k"  # the last of two layers; 512 wide
    assert grids["model.layers.1.self_attn.q_proj"].type == "q5_0"
    whys = {row["name"]: row["why"] for row in fallbacks}
    assert set(whys) == {name for name in modules if "down_proj" not in name} - ({"lm_head"} if tie else set())
    assert len(whys) == len(fallbacks), "one for each tensor"
    assert whys["model.layers.0.self_attn.q_proj"] == "q5_0 instead of q4_k: 256 does not divide its rows of 576 values, 64 does"


def test_the_rule_goes_by_the_whole_model_whichever_modules_are_asked_for() -> None:
    model = model_of("llama")
    every, _ = registry.get("grid", "q4_k_m")().assign(model, swappable(model))
    part = {n: m for n, m in swappable(model).items() if "layers.1" in n}
    some, fallbacks = registry.get("grid", "q4_k_m")().assign(model, part)
    assert some == {n: every[n] for n in part}
    assert {row["name"] for row in fallbacks} < set(part)


def test_options_and_an_importance_matrix_reach_the_rule() -> None:
    model = model_of("llama", num_hidden_layers=8)
    q4_0 = registry.get("grid", "q4_0")
    plain, _ = q4_0().assign(model, swappable(model))
    matrix, _ = q4_0().assign(model, swappable(model), imatrix=True)
    assert {n: grid.type for n, grid in matrix.items() if grid != plain[n]} == {"model.layers.0.mlp.down_proj": "q4_1"}
    grids, _ = q4_0(output="q5_1", embedding="f16").assign(model, swappable(model))
    assert (grids["lm_head"].type, grids["model.embed_tokens"].type) == ("q5_1", "f16")
    grids, _ = q4_0(pure=True).assign(model, swappable(model))
    assert {grid.type for grid in grids.values()} == {"q4_0"}


def test_what_the_rule_or_the_file_leaves_out_stays_in_float() -> None:
    model = model_of("bert")
    modules = swappable(model)
    grids, fallbacks = registry.get("grid", "q8_0")().assign(model, modules)
    assert set(modules) - set(grids) == {"embeddings.position_embeddings", "embeddings.token_type_embeddings", "pooler.dense"}
    assert [row["name"] for row in fallbacks] == ["pooler.dense"] and "left in float" in fallbacks[0]["why"]
    assert {grid.type for grid in grids.values()} == {"q8_0"}


def test_a_classifier_is_part_of_a_bert_file() -> None:
    model = model_of("bert", head="classifier")
    grids, fallbacks = registry.get("grid", "q8_0")().assign(model, swappable(model))
    assert grids["classifier"].type == grids["bert.pooler.dense"].type == "q8_0" and not fallbacks


def test_q_k_and_v_of_nomic_bert_are_one_tensor_to_the_rule() -> None:
    model = model_of("nomic_bert", hidden_size=768, num_attention_heads=12, num_hidden_layers=12)
    grids, _ = registry.get("grid", "q4_k_m")().assign(model, swappable(model))
    theirs = written_by_llama_cpp(GOLDEN["nomic-bert 12x768/3072 12:12 fused"], "q4_k_m")
    for i in range(12):
        types = {grids[f"layers.{i}.self_attn.{name}_proj"].type for name in "qkv"}
        assert types == {theirs[f"blk.{i}.attn_qkv.weight"]}
        assert grids[f"layers.{i}.mlp.up_proj"].type == theirs[f"blk.{i}.ffn_up.weight"]
