"""Causal language models from a folder: every weight in its place, ties as they are, and what is wrong is named."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtrain.models.causal_lm import CausalLm
from tests.conftest import ROOT, shared_data
from tests.tiny_lm import tiny_language_model, tiny_text

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module", autouse=True)
def _threads(one_thread: None) -> None:
    """Small models."""


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def folder(tied: bool, tmp_path: Path) -> Path:
    return tiny_language_model(tmp_path / "lm", tied)


def build(folder: Path, **options: Any) -> Any:
    return CausalLm(str(folder), **options).build(0, 0)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of the file, or leave them out; the names have `__` for a dot."""
    path = folder / "model.safetensors"
    state = load_file(path) | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: t for name, t in state.items() if t is not None}, path, metadata={"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_every_weight_is_the_files_and_ties_are_kept(folder: Path, tied: bool) -> None:
    source = CausalLm(str(folder))
    model: Any = source.build(0, 0)
    stored = load_file(folder / "model.safetensors")
    assert (HEAD in stored) is not tied
    assert all(torch.equal(value, stored.get(name, stored[EMBEDDING])) for name, value in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.config.tie_word_embeddings is tied
    assert source.new_parameters == [] and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_what_a_run_asks_of_a_family(folder: Path, tied: bool) -> None:
    source = CausalLm(str(folder))
    tokenizer, model = source.processor(), source.build(0, 0)
    assert source.task == "language"
    assert source.blocks(model) == ["model.layers.0", "model.layers.1"]
    assert source.always_float(model) == (["model.embed_tokens", "lm_head"] if tied else ["lm_head"])
    assert (source.max_positions(model), source.vocabulary(model)) == (128, 512)
    assert (len(tokenizer), tokenizer.model_max_length) == (512, 128)
    inputs = source.example_inputs(2, 9, 512)
    assert list(inputs) == source.input_names(tokenizer)
    out = model(**inputs)
    assert out.logits.shape == (2, 9, 512) and out.past_key_values is None
    assert torch.equal(inputs["input_ids"], source.example_inputs(2, 9, 512)["input_ids"])


def test_the_tokenizer_goes_there_and_back_and_has_the_chat_template(tmp_path: Path) -> None:
    tokenizer = CausalLm(str(tiny_language_model(tmp_path))).processor()
    text = tiny_text(2000) + "  12 345\n\n\tüñí 日本 🙂"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) < len(text)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat)["input_ids"][0] == 1


def test_keep_float_names_modules_instead_of_the_head(folder: Path) -> None:
    source = CausalLm(str(folder), keep_float=["*.0.self_attn.*"])
    assert source.always_float(source.build(0, 0)) == [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"]
    with pytest.raises(ValueError, match=r"pattern 'no\*such' matches none of .*Set model.keep_float=\[\] for the output head alone"):
        CausalLm(str(folder), keep_float=["no*such"]).always_float(source.build(0, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_in_the_type_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path)
    model, stored = build(folder, dtype=dtype), load_file(folder / "model.safetensors")
    assert all(torch.equal(p, stored[name].to(getattr(torch, dtype))) for name, p in model.named_parameters())


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.dtype is 'int8'; valid: float32, bfloat16, float16. Set model.dtype=float32"):
        CausalLm(dtype="int8")


def test_what_is_built_can_be_saved_and_read_again(folder: Path, tmp_path: Path, tied: bool) -> None:
    CausalLm(str(folder)).save(tmp_path / "again")
    first, second = build(folder).state_dict(), build(tmp_path / "again").state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "again/config.json").read_text())["use_cache"] is True


def test_generate_keeps_keys_and_values_of_its_own(tmp_path: Path) -> None:
    model = build(tiny_language_model(tmp_path))
    ids = torch.tensor([[1, 5, 9]])
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2, eos_token_id=None)
    for t in range(3, 11):
        assert out[0, t] == model(input_ids=out[:, :t]).logits[0, -1].argmax()


def test_a_head_of_its_own_beside_a_config_that_calls_it_tied_stays_its_own(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "a", tied=False)
    configure(folder, tie_word_embeddings=True)
    source = CausalLm(str(folder))
    model: Any = source.build(0, 0)
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")[HEAD])
    assert model.config.tie_word_embeddings is False and source.heads(model) == ["lm_head"]
    source.save(tmp_path / "b")
    assert torch.equal(build(tmp_path / "b").lm_head.weight, model.lm_head.weight)


def test_a_vocabulary_padded_beyond_the_tokenizer_is_kept(tmp_path: Path) -> None:
    source = CausalLm(str(tiny_language_model(tmp_path, vocab=300, vocab_size=320)))
    assert len(source.processor()) == 300
    assert source.vocabulary(source.build(0, 0)) == 320


def test_loading_is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build(folder)
    CausalLm(str(folder)).processor()
    assert capfd.readouterr() == ("", "")


# --- faults -------------------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_named(folder: Path) -> None:
    bad = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    bad[3, 4], bad[5, 6] = math.nan, math.inf
    change(folder, model__layers__1__mlp__up_proj__weight=bad)
    with pytest.raises(ValueError, match=r"weight model.layers.1.mlp.up_proj.weight of .* holds 2 values of 131,072 that are NaN or inf"):
        build(folder)


def test_a_parameter_that_is_missing_or_of_another_shape_is_named(folder: Path) -> None:
    change(folder, model__layers__1__mlp__up_proj__weight=None, model__norm__weight=torch.ones(5))
    with pytest.raises(ValueError, match=r"2 parameters are missing or have another shape, the first is model.layers.1.mlp.up_proj.weight"):
        build(folder)


def test_only_a_tied_head_may_be_missing(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path, tied=True)
    configure(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"1 parameters are missing .* lm_head.weight"):
        build(folder)


def test_tensors_without_a_place_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, model__vision__weight=torch.ones(3))
    build(folder)
    assert "1 tensors of" in caplog.text and "the first model.vision.weight" in caplog.text


def test_a_vocabulary_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path, vocab=300)
    configure(folder, vocab_size=299)
    with pytest.raises(ValueError, match=r"has 300 tokens and the model embeds 299: '.*', id 299, is the first"):
        CausalLm(str(folder)).processor()
    with pytest.raises(ValueError, match=r"missing or have another shape, the first is (lm_head|model.embed_tokens).weight"):
        build(folder)


def test_missing_tokenizer_files_are_named(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(ValueError, match=r"tokenizer"):
        CausalLm(str(folder)).processor()


def test_a_model_that_is_quantized_already_is_refused(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"is quantized already \(quant_method 'gptq'\).*the float model that it was made from"):
        build(folder)


def test_damage_and_wrong_paths_say_what_to_type(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"the weights of .* are damaged .*Copy it again"):
        build(folder)
    with pytest.raises(FileNotFoundError, match=r"does not exist .*model.path=null for the sample"):
        build(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    (folder / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"holds no transformers model but 1 GGUF files. Set model.path=.*b.gguf"):
        build(folder)


def test_an_encoder_is_no_causal_language_model(tiny_bert: Path) -> None:
    model = CausalLm(str(tiny_bert))
    with pytest.raises(ValueError, match=r"cls.predictions"):
        model.build(0, 0)


# --- size and truth -----------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from qtrain.vision import mend_torchvision
mend_torchvision()
import torch
from transformers import LlamaForCausalLM
from qtrain.models.causal_lm import CausalLm
CausalLm(sys.argv[1]).build()  # small: what is imported and allocated once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = CausalLm(sys.argv[2], dtype=sys.argv[3]).build()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "copies"), [("float32", 1.3), ("bfloat16", 3.3)])
def test_the_model_is_held_once(dtype: str, copies: float, tmp_path: Path) -> None:
    """The pages of the file that are read count too, though the kernel can drop them: in bfloat16 they are twice the model."""
    small = tiny_language_model(tmp_path / "small")
    large = tiny_language_model(tmp_path / "large", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, vocab_size=20_000)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(small), str(large), dtype], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert peak < copies * size


@pytest.mark.slow
def test_the_perplexity_of_a_trained_model() -> None:
    folder = shared_data() / "stories15M"
    if not folder.is_dir():
        pytest.skip("needs stories15M")
    source = CausalLm(str(folder))
    tokenizer, model = source.processor(), source.build(0, 0)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for line in (shared_data() / "tinystories" / "eval.jsonl").read_text().splitlines():
            ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:256]])
            assert ids[0, 0] == tokenizer.bos_token_id
            total += float(torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
    assert tokens == 11434
    assert math.exp(total / tokens) == pytest.approx(3.026, abs=5e-4)
