"""The recipes with an adapter: run short to a passed receipt, resumed after a kill, refused where they must be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import qtrain
from tests.recipes.test_recipes import TINY_LM
from tests.tiny_lm import tiny_language_model

NO_EXPORT = [*(option for option in TINY_LM if not option.startswith("export.")), "export=[]"]
SHORT = ["adapter.fit.max_steps=16", "adapter.rank=4", "adapter.fit.learning_rate=3e-3", "data.batch_size=4", "adapter.sample_tokens=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("adapter") / "model")


def run(recipe: str, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    done = qtrain(f"+recipe={recipe}", *options, f"run_dir={folder}", cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "run.json").read_text()), done.stdout


@pytest.mark.parametrize("recipe", ["qlora_smollm2", "qlora_int8_smollm2", "loftq_smollm2", "qat_lora_q4_0_smollm2"])
def test_a_recipe_of_a_language_model_ends_with_every_merge_measured(recipe: str, model: Path, tmp_path: Path) -> None:
    result, shown = run(recipe, tmp_path / "run", f"model.path={model}", *TINY_LM, *SHORT)
    stages, adapter = result["stages"], result["adapter"]
    assert result["status"] == "passed" and stages["adapter"]["perplexity"] < stages["ptq"]["perplexity"]
    (entry,) = result["exports"]
    pair = entry["receipt"]["metric"]["perplexity"]
    assert abs(pair["runtime"] / pair["training"] - 1) <= 0.005
    assert entry["receipt"]["tensors"] == entry["receipt"]["tensors_bit_exact"] == (0 if recipe.startswith("loftq") else 15)
    assert sorted(p.name for p in (tmp_path / "run" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "qtrain.json",
    ]
    assert adapter["layers"] == 14 and f"{adapter['trainable_parameters']:,} trainable parameters" in shown
    assert set(adapter["sample"]) == {"prompt", "before", "after"} and result["memory"]["expected"]["total_bytes"] > 0
    assert "Adapter" in (tmp_path / "run" / "report.html").read_text()
    if recipe.startswith("qat"):
        assert result["merge_equals_training"]["bit_exact"] and adapter["merge"] == "consistent"
        assert stages["merged_consistent"] == stages["adapter"]
        assert pair["training"] == pytest.approx(stages["adapter"]["perplexity"], rel=1e-5)
    else:
        assert stages["merged_float"]["perplexity"] == pytest.approx(stages["adapter"]["perplexity"], rel=2e-3)
        deployed = "merged_float" if recipe.startswith("loftq") else "merged_rounded"
        assert pair["training"] == pytest.approx(stages[deployed]["perplexity"], rel=1e-4)
        assert set(adapter["merges"]) == {"apart", "float"} | ({"rounded"} if deployed == "merged_rounded" else set())
    if recipe.startswith("loftq"):
        assert stages["adapter_start"]["kl"] < stages["ptq"]["kl"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["qlora_smollm2", "qlora_int8_smollm2", "loftq_smollm2", "qat_lora_q4_0_smollm2"])
@pytest.mark.parametrize("merge", ["auto", "apart"])
def test_the_recipes_run_on_a_gpu(recipe: str, merge: str, model: Path, tmp_path: Path) -> None:
    if merge == "apart" and recipe.startswith("qat"):
        pytest.skip("an adapter inside the weight is not kept apart")
    options = [f"model.path={model}", *TINY_LM, *SHORT, "trainer.accelerator=gpu", f"adapter.merge={merge}"]
    options += ["export=[transformers]"] if merge == "apart" else []
    result, _ = run(recipe, tmp_path / "run", *options)
    assert result["status"] == "passed" and result["memory"]["measured"]["cuda_peak_bytes"] > 0
    assert result["stages"]["adapter"]["perplexity"] < result["stages"]["ptq"]["perplexity"]
    assert all(entry["receipt"]["passed"] for entry in result["exports"])


def test_base_and_adapter_kept_apart_are_both_left_behind(model: Path, tmp_path: Path) -> None:
    options = [f"model.path={model}", *NO_EXPORT, *SHORT, "adapter.merge=apart", "adapter.variant=dora", "adapter.sample=null"]
    result, _ = run("qlora_smollm2", tmp_path / "run", *options)
    assert set(result["adapter"]["merges"]) == {"apart", "float", "rounded"} and result["convert_equals_prepare"]["nmse"] < 1e-9
    assert {row["grid"] for row in result["quantized"]} == {"nf4 b64 double-quantized"} and len(result["quantized"]) == 14
    assert all(row["sqnr_db"] > 15 for row in result["quantized"])
    converted = json.loads((tmp_path / "run" / "checkpoints" / "converted" / "checkpoint.json").read_text())
    assert len(converted["tree"]["__dict__"][0][1]["__dict__"]) > 100  # codes, scales and the adapter


@pytest.mark.parametrize("target", ["gguf", "transformers"])
def test_base_and_adapter_are_deployed_as_two_things(target: str, model: Path, tmp_path: Path) -> None:
    options = [f"model.path={model}", *NO_EXPORT[:-1], *SHORT, f"export=[{target}]", "adapter.merge=apart", "quantizer@adapter.deploy=null"]
    if target == "gguf":
        options += ["quantizer=rtn", "grid@quantizer.weight=q4_0", "adapter.variant=rslora", "export.gguf.strings=20"]
    result, _ = run("qlora_smollm2", tmp_path / "run", *options, "adapter.sample=null", "adapter.target_modules=[q_proj,k_proj,up_proj]")
    (entry,) = result["exports"]
    receipt, stages = entry["receipt"], result["stages"]
    pair = receipt["metric"]["perplexity"]
    assert receipt["passed"] and receipt["checks"]["adapter"].startswith("passed") and "6 layers" in receipt["checks"]["adapter"]
    assert pair["training"] == pytest.approx(stages["adapter"]["perplexity"], rel=1e-4)
    assert abs(pair["runtime"] / pair["training"] - 1) <= 0.005
    assert abs(pair["runtime"] / stages["ptq"]["perplexity"] - 1) > 0.02, "the base alone would have passed: the test shows nothing"
    files = {str(p.relative_to(entry["path"] if target != "gguf" else Path(entry["path"]).parent)) for p in Path(entry["path"]).rglob("*")}
    if target == "gguf":
        folder = Path(entry["path"]).parent
        assert "ADAPTER ./qlora_smollm2-lora.gguf" in (folder / "Modelfile").read_text() and (folder / "qlora_smollm2-lora.gguf").is_file()
    else:
        assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model.safetensors"} <= files


def test_a_new_classifier_is_trained_or_refused(tiny_options: list[str], tmp_path: Path) -> None:
    options = [o for o in tiny_options if not o.startswith(("finetune", "quantizer"))]
    done = qtrain("+recipe=lora_bert", *options, "adapter.modules_to_save=[]", f"run_dir={tmp_path / 'r'}", cwd=tmp_path)
    assert done.returncode != 0 and "Set adapter.modules_to_save=[classifier]" in done.stderr.replace("\n", " ")


def test_a_classifier_is_tuned_beside_nf4_and_deployed_in_int8(tiny_options: list[str], tmp_path: Path) -> None:
    options = [o for o in tiny_options if not o.startswith(("finetune", "quantizer"))]
    result, said = run("lora_bert", tmp_path / "run", *options, "adapter.rank=8", "adapter.fit.epochs=12", "adapter.fit.learning_rate=5e-3")
    shown = f"{result['adapter']['trainable_parameters']:,} trainable parameters"
    assert shown in said, "run.json and the console count differently"
    (entry,) = result["exports"]
    pair = entry["receipt"]["metric"]["accuracy"]
    assert pair["training"] > 0.8 > result["stages"]["float"]["accuracy"] and abs(pair["training"] - pair["runtime"]) < 0.01
    assert entry["receipt"]["tensors"] == entry["receipt"]["tensors_bit_exact"] > 10


def test_a_classifier_is_merged_in_float_and_deployed_in_float(tiny_options: list[str], tmp_path: Path) -> None:
    options = [o for o in tiny_options if not o.startswith(("finetune", "quantizer"))]
    options += ["adapter.rank=4", "adapter.fit.epochs=2", "adapter.merge=float", "quantizer@adapter.deploy=null"]
    result, _ = run("lora_bert", tmp_path / "run", *options)
    (entry,) = result["exports"]
    pair = entry["receipt"]["metric"]["accuracy"]
    assert entry["receipt"]["passed"] and entry["receipt"]["logits_nmse"] < 1e-9 and pair["training"] == pair["runtime"]
    assert pair["training"] == result["stages"]["merged_float"]["accuracy"]
    folder = tmp_path / "run" / "exports" / "onnx"
    assert "float32 weights" in (folder / "README.md").read_text() and not (folder / "float.onnx").exists()


def chats(folder: Path) -> Path:
    """99 short conversations."""
    said = [(f"What is {i} and one?", f"{i + 1}, I think.") for i in range(99)]
    rows = [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] for asked, answer in said]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in rows))
    return folder / "chats.jsonl"


def test_the_shape_for_one_gpu_trains_on_a_small_model(model: Path, tmp_path: Path) -> None:
    """bfloat16, NF4 without a float model, gradient checkpointing, the loss on what the assistant says; nothing deployed."""
    options = [f"model.path={model}", f"data.train={chats(tmp_path)}", "data.context=128", "adapter.fit.max_steps=12", "adapter.rank=4"]
    result, shown = run("qlora_llama", tmp_path / "run", *options, "trainer.accumulate_grad_batches=1", "adapter.fit.learning_rate=1e-2")
    stages = result["stages"]
    assert stages["adapter"]["perplexity"] < 0.9 * stages["ptq"]["perplexity"] and set(stages) == {"ptq", "adapter"}
    assert "the loss is on what the assistant says" in shown and result["memory"]["measured"]["rss_peak_bytes"] > 0
    assert result["config"]["adapter"]["fit"]["gradient_checkpointing"] and "fused AdamW of torch" in shown
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file() and not result["exports"]


def test_the_shape_for_one_gpu_is_checked_without_its_weights(tmp_path: Path) -> None:
    """An 8B Llama's config, no weights: seconds, and a number near what such runs are known to need."""
    from transformers import LlamaConfig

    from tests.tiny_lm import tiny_tokenizer

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    options = [f"model.path={tmp_path / 'llama'}", f"data.train={chats(tmp_path)}", "data.context=128", "dry_run=true"]
    result, shown = run("qlora_llama", tmp_path / "run", *options)
    expected = result["memory"]["expected"]
    assert 5.5e9 < expected["base_bytes"] < 6.0e9  # 7.0 G weights at 4.13 bits, 1.05 G at 16
    assert "41,943,040 trainable parameters" in shown and not (tmp_path / "run" / "checkpoints").exists()
    assert result["status"] == "passed" and result["config"]["adapter"]["rank"] == 16


@pytest.mark.parametrize("baseline", ["true", "false"])
def test_a_killed_run_goes_on_from_an_adapter_alone_to_the_same_numbers(baseline: str, model: Path, tmp_path: Path) -> None:
    options = [f"model.path={model}", *NO_EXPORT, *SHORT, "adapter.fit.checkpoint_every=4", "adapter.sample=null", f"baseline={baseline}"]
    options += ["finetune.epochs=0"] if baseline == "false" else []
    whole, _ = run("qlora_smollm2", tmp_path / "whole", *options)
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "qtrain", "+recipe=qlora_smollm2", *options, f"run_dir={folder}"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    steps = folder / "checkpoints" / "adapter-steps"
    while not list(steps.glob("step-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (checkpoint,) = steps.glob("step-*")
    size = sum(f.stat().st_size for f in checkpoint.iterdir())
    assert size < 4 * 3.2 * (whole["adapter"]["trainable_parameters"]) + 50_000  # weights and two moments, no base
    done = qtrain(f"resume={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "run.json").read_text())["stages"] == whole["stages"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["adapter.target_modules=[query]"], "matches none of the 15 Linear layers"),
        (["adapter.merge=apart"], "GGUF holds ggml's types only, not nf4"),
        (["adapter.merge=apart", "adapter.variant=dora"], "without adapter.variant=dora"),
        (["adapter.merge=consistent"], "Set quantizer=qat"),
        (["adapter.path=nowhere"], "no adapter_config.json"),
        (["optimizer=paged_adamw_8bit"], "CUDA"),
        (["dry_run=true", "optimizer=paged_adamw_8bit"], "CUDA"),
        (["dry_run=true", "baseline=false", "quantizer=rtn"], "or baseline=true"),
        (["quantizer=ptq_graph"], "traces the model into a graph"),
        (["analyze=true"], "Set analyze=false"),
        (
            ["quantizer=rtn", "grid@quantizer.weight=q4_k_m", "adapter.modules_to_save=[up_proj]"],
            "Set quantizer.keep_float=[model.layers.0",
        ),
        (["trainer.precision=bf16-true"], "Set trainer.precision=bf16-mixed"),
        (["adapter.modules_to_save=[classifier]"], "no module of LlamaForCausalLM"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(options: list[str], message: str, model: Path, tmp_path: Path) -> None:
    done = qtrain("+recipe=qlora_smollm2", f"model.path={model}", *TINY_LM, *SHORT, *options, f"run_dir={tmp_path / 'r'}", cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr.replace("\n", " "), done.stdout + done.stderr
    assert not (tmp_path / "r" / "checkpoints" / "adapter").exists()
