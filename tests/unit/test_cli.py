"""What a person sees at the command line: lists, help, errors that say what to type, sweeps, Ctrl-C and resume."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtrain.config import recipe_files
from tests.conftest import qtrain

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "lightning", "datasets", "torchao")


def short_error(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a run that must fail, without a traceback."""
    assert done.returncode not in (0, None), done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    return " ".join((done.stderr + done.stdout).split())


def test_alone_it_lists_the_recipes(tmp_path: Path) -> None:
    done = qtrain(cwd=tmp_path)
    assert done.returncode == 0
    for name in recipe_files():
        assert name in done.stdout


def test_an_unknown_recipe_lists_the_recipes_and_the_nearest(tmp_path: Path) -> None:
    text = short_error(qtrain("+recipe=qat_int4_bret", cwd=tmp_path))
    assert "Did you mean qat_int4_bert?" in text
    assert all(name in text for name in recipe_files())


@pytest.mark.parametrize(
    "args", [["--help"], ["+recipe=qat_int4_bert", "--cfg", "job"], ["+recipe=qat_int4_bert", "quantizer.weight.bitz=3"]]
)
def test_help_and_config_errors_import_nothing_heavy(args: list[str], tmp_path: Path) -> None:
    probe = (
        "import sys, runpy\n"
        f"sys.argv = ['qtrain', *{args!r}]\n"
        "try:\n    runpy.run_module('qtrain', run_name='__main__')\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


def test_help_lists_every_option(tmp_path: Path) -> None:
    text = qtrain("--help", cwd=tmp_path).stdout
    for group, options in {"quantizer": ("qat", "rtn", "ptq_static"), "grid": ("affine", "int8"), "export": ("onnx", "tensorrt")}.items():
        (listed,) = [line for line in text.splitlines() if line.startswith(f"{group}: ")]
        assert set(options) <= set(listed.removeprefix(f"{group}: ").split(", "))
    assert all(name in text for name in recipe_files())


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("quantizer.weight.bitz=3", ["quantizer.weight.bitz", "Did you mean bits?", "group_size"]),
        ("quantizer.weight.bits=many", ["quantizer.weight.bits", "many"]),
        ("quantizer.weight.bits=9", ["bits is 9", "2 to 8", "quantizer.weight.bits=4"]),
        ("quantizer=qatt", ["quantizer", "qatt", "Did you mean qat?"]),
        ("quantizer.weight.rule=best", ["rule", "best", "signed_absmax"]),
        ("quantizer.weight.group_size=48", ["group_size 48 does not divide", "remainder=short", "keep_float"]),
        ("quantizer.include=['*.nothing']", ["'*.nothing'", "matches none", "quantizer.include="]),
        ("quantizer.keep_float=['bert.poolr.*']", ["bert.poolr.*", "bert.pooler.dense"]),
        ("data.text_column=phrase", ["phrase", "sentence", "data.text_column="]),
        ("data.label_column=sentence", ["Correct the labels, or set data.label_column=NAME"]),
        ("data.train=/nowhere/a.tsv", ["/nowhere/a.tsv", "data.train="]),
        ("model.path=/nowhere/model", ["/nowhere/model", "model.path="]),
        ("finetune.schedule=zigzag", ["zigzag", "linear, cosine, constant"]),
        ("optimizer._target_=torch.optim.NoSuch", ["torch.optim.NoSuch", "optimizer"]),
        ("+trainer.max_epochs=3", ["trainer.max_epochs", "finetune.epochs"]),
        ("trainer.devices=2", ["trainer.devices=1"]),
        ("optimize=acuracy", ["acuracy", "accuracy, loss"]),
        ("quantizer.activation_range=static", ["static", "grid@quantizer.activation=int8_activation"]),
        ("quantizer.start_step=100000", ["quantizer.start_step", "all of it would be in float"]),
        ("finetune.epochs=0", ["new and untrained", "classifier"]),
        ("resume=/nowhere", ["/nowhere", "is not a run"]),
    ],
)
def test_bad_input_ends_in_one_short_message(override: str, parts: list[str], tiny_options: list[str], tmp_path: Path) -> None:
    options = [o for o in tiny_options if o.partition("=")[0] != override.partition("=")[0]]
    text = short_error(qtrain("+recipe=qat_int4_bert", *options, override, f"run_dir={tmp_path / 'run'}", cwd=tmp_path))
    for part in parts:
        assert part in text, text
    message = text.partition("error:")[2].partition("(debug=true")[0]
    assert 20 < len(message) < 1300, text
    assert "Error executing job" not in text
    assert not list(tmp_path.glob("run/exports/**/*.onnx"))


def test_an_exporter_that_cannot_hold_the_grid_refuses_before_training(tiny_options: list[str], tmp_path: Path) -> None:
    options = [
        "+recipe=qat_int4_bert",
        *tiny_options,
        "grid@quantizer.activation=affine",
        "quantizer.activation.granularity=token",
        "quantizer.activation.bits=8",
    ]
    started = time.monotonic()
    text = short_error(qtrain(*options, f"run_dir={tmp_path / 'run'}", cwd=tmp_path))
    assert "absmax_mlas" in text
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "failed" and "absmax_mlas" in run["error"]
    assert "float" not in run["stages"], time.monotonic() - started


def test_an_unwritable_run_dir_is_named(tiny_options: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = short_error(qtrain("+recipe=rtn_int4_bert", *tiny_options, f"run_dir={tmp_path / 'file' / 'run'}", cwd=tmp_path))
    assert "run_dir=" in text


def test_a_used_run_dir_is_never_written_over(tiny_options: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    text = short_error(qtrain("+recipe=rtn_int4_bert", *tiny_options, f"run_dir={tmp_path / 'run'}", cwd=tmp_path))
    assert "holds a run already" in text
    assert (tmp_path / "run" / "run.json").read_text() == "{}"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["run.json"]  # not even Hydra's notes


def test_debug_true_shows_the_traceback(tiny_options: list[str], tmp_path: Path) -> None:
    done = qtrain("+recipe=rtn_int4_bert", *tiny_options, "data.train=/nowhere/a.tsv", "debug=true", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_users_own_recipes_come_from_config_dir(tiny_options: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "mine" / "recipe" / "own.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /quantizer: rtn\nrecipe: own\nquantizer:\n  weight: {bits: 5}\n"
    )
    done = qtrain("--config-dir", str(tmp_path / "mine"), "+recipe=own", *tiny_options, "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bits: 5" in done.stdout


def test_a_misspelt_key_in_a_recipe_names_file_and_key(tiny_options: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "mine" / "recipe" / "own.yaml").write_text("# @package _global_\nquantizer:\n  wieght: {bits: 5}\n")
    text = short_error(qtrain("--config-dir", str(tmp_path / "mine"), "+recipe=own", *tiny_options, cwd=tmp_path))
    assert "recipe/own" in text and "wieght" in text and "Did you mean weight?" in text


def test_a_sweep_ends_with_a_table_and_a_csv_and_survives_a_failed_job(tiny_options: list[str], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    done = qtrain(
        "-m", "+recipe=rtn_int4_bert", *tiny_options, "finetune.epochs=1", "quantizer.weight.bits=2,9,4", f"run_dir={sweep}", cwd=tmp_path
    )
    assert done.returncode == 1, done.stdout + done.stderr  # a job failed
    with (sweep / "multirun.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["status"] for r in rows] == ["passed", "passed", "failed"]
    by_bits = {r["options"].partition("bits=")[2].split()[0]: r for r in rows}
    assert "bits is 9" in by_bits["9"]["error"]
    assert int(by_bits["2"]["bytes"]) < int(by_bits["4"]["bytes"])
    assert float(rows[0]["accuracy_deployed"]) >= float(rows[1]["accuracy_deployed"])
    assert "multirun.csv" in done.stdout


def start_and_stop(args: list[str], cwd: Path, wait_for: str, sig: signal.Signals) -> int:
    """Start a run, send it a signal once a file matching ``wait_for`` exists, and return its exit status."""

    def heed() -> None:  # where the tests themselves run in the background, SIGINT is ignored, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-m", "qtrain", *args], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed
    )
    for _ in range(1200):
        if list(cwd.glob(wait_for)) or process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be stopped"
    process.send_signal(sig)
    return process.wait()


@pytest.mark.parametrize("stage", ["float", "qat"])
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_a_stopped_run_resumes_to_the_metric_of_an_uninterrupted_one(
    stage: str, sig: signal.Signals, tiny_options: list[str], tmp_path: Path
) -> None:
    options = [
        "+recipe=qat_int4_bert",
        *tiny_options,
        "finetune.checkpoint_every=7",
        "quantizer.fit.checkpoint_every=7",
        "quantizer.fit.epochs=3",
    ]
    whole = qtrain(*options, f"run_dir={tmp_path / 'whole'}", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    status = start_and_stop([*options, f"run_dir={tmp_path / 'cut'}"], tmp_path, f"cut/checkpoints/{stage}-steps/step-*", sig)
    assert status == (130 if sig is signal.SIGINT else -signal.SIGKILL)
    assert not list(tmp_path.glob("cut/exports/**/*"))
    resumed = qtrain(f"resume={tmp_path / 'cut'}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut")]
    assert runs[0]["stages"] == runs[1]["stages"]
    assert runs[0]["validation"] == runs[1]["validation"]
    assert runs[1]["status"] == "passed"


def test_a_run_is_resumed_as_it_was_started_or_not_at_all(tiny_options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = qtrain("+recipe=rtn_int4_bert", *tiny_options, "finetune.epochs=1", f"run_dir={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = short_error(qtrain(f"resume={folder}", "quantizer.weight.bits=3", cwd=tmp_path))
    assert "quantizer.weight.bits=3" in text and "own options" in text
    run = json.loads((folder / "run.json").read_text())
    run["config"]["seed"] = 5  # as if the recipe had been edited in between
    (folder / "run.json").write_text(json.dumps(run))
    assert "seed was 5 and is now 0" in short_error(qtrain(f"resume={folder}", cwd=tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        [
            "quantizer.learn_scale=true",
            "quantizer.distill.weight=0.5",
            "quantizer.freeze_step=6",
            "trainer.accumulate_grad_batches=2",
            "finetune.epochs=12",
        ],
        ["finetune.keep=best", "quantizer.fit.keep=best", "quantizer.freeze_step=5", "logger=tensorboard", "quantizer.start_step=2"],
        ["trainer=deterministic", "logger=none", "export.onnx.weights=matmul_nbits", "quantizer.embedding.bits=4"],
        [
            "grid@quantizer.activation=affine",
            "quantizer.activation.bits=8",
            "quantizer.activation.granularity=tensor",
            "quantizer.activation_range=static",
            "export=[]",
        ],
        ["quantizer.weight.bits=2", "quantizer.weight.rule=minmax", "quantizer.weight.scale_dtype=bfloat16", "quantizer.embedding=null"],
    ],
    ids=["lsq", "best", "deterministic", "static", "asymmetric"],
)
def test_options_reach_the_artefact(options: list[str], tiny_options: list[str], tmp_path: Path) -> None:
    mine = [o for o in tiny_options if o.partition("=")[0] not in {x.partition("=")[0] for x in options}]
    done = qtrain("+recipe=qat_int4_bert", *mine, *options, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "passed" and run["convert_equals_prepare"]["bit_exact"]
    assert abs(run["stages"]["qat"]["accuracy"] - run["stages"]["float"]["accuracy"]) < 0.2
    for entry in run["exports"]:
        assert entry["receipt"]["tensors_bit_exact"] == len(run["quantized"])


def test_a_sweep_over_recipes_that_all_pass(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, "finetune.epochs=1", "export=[]", f"run_dir={tmp_path / 's'}"]
    done = qtrain("-m", "+recipe=rtn_int4_bert,qat_int4_bert", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "s" / "multirun.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["recipe"] for r in rows} == {"rtn_int4_bert", "qat_int4_bert"} and {r["status"] for r in rows} == {"passed"}
    assert "rtn_int4_bert" in done.stdout
    assert "holds a sweep already" in short_error(qtrain("-m", "+recipe=rtn_int4_bert", *options, cwd=tmp_path))


def test_without_a_recipe_nothing_runs(tmp_path: Path) -> None:
    assert "+recipe=qat_int4_bert" in short_error(qtrain("seed=1", cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tiny_options: list[str], tmp_path: Path) -> None:
    options = ["+recipe=qat_int4_bert", *tiny_options, "finetune.checkpoint_every=7", f"run_dir={tmp_path / 'cut'}"]
    start_and_stop(options, tmp_path, "cut/checkpoints/float-steps/step-*", signal.SIGKILL)
    (tensors,) = tmp_path.glob("cut/checkpoints/float-steps/step-*/tensors.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1000])
    text = short_error(qtrain(f"resume={tmp_path / 'cut'}", cwd=tmp_path))
    assert "damaged" in text and "Delete that folder" in text


def test_wandb_logs_offline_without_a_login(tiny_options: list[str], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    options = [*tiny_options, "finetune.epochs=1", "export=[]", "logger=wandb", f"run_dir={tmp_path / 'run'}"]
    done = qtrain("+recipe=qat_int4_bert", *options, cwd=tmp_path, WANDB_API_KEY="", HOME=str(tmp_path), WANDB_SILENT="true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("run/logs/wandb/offline-run-*"))) == 2  # float and qat, each its own


def test_a_search_maximises_the_validation_metric(tiny_options: list[str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    options = [*tiny_options, "finetune.epochs=1", "export=[]", "hydra.sweeper.n_trials=2", f"run_dir={tmp_path / 's'}"]
    done = qtrain("-m", "+recipe=qat_int4_bert", "+sweep=optuna", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    best = (tmp_path / "s" / "optimization_results.yaml").read_text()
    with (tmp_path / "s" / "multirun.csv").open() as file:
        values = [float(r["accuracy_validation"]) for r in csv.DictReader(file)]
    assert len(values) == 2 and str(max(values))[:6] in best
