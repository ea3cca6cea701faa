"""`python -m qtrain`: Hydra composes the configuration, it becomes dataclasses once, and run() does the rest.

Exit status: 0 when every receipt passed, 1 on any error or failed receipt, 130 after Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from qtrain import registry, sweep
from qtrain.config import Config, data_dir, recipe_files, recipe_summary, register_all
from qtrain.console import console, errors
from qtrain.explain import explain
from qtrain.files import refuse_used
from qtrain.vision import mend_torchvision

_failure: list[Exception] = []


@hydra.main(version_base="1.3", config_path=str(data_dir("conf")), config_name="config")
def task(cfg: DictConfig) -> Any:
    """One job: a single run, or one of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if "recipe" in hydra_config.runtime.choices:
        cfg.recipe = hydra_config.runtime.choices["recipe"]  # the name of a user's own recipe, too
    if hydra_config.mode is RunMode.MULTIRUN:
        sweep.announce(hydra_config)
    try:
        return start(cfg, folder)
    except Exception as error:
        if hydra_config.mode is not RunMode.MULTIRUN:
            _failure.append(error)  # main() raises it, after Hydra, which would print its own notice first
            return None
        if cfg.traceback:
            traceback.print_exc()
        errors.print(f"[red]job failed:[/] {explain(error)}")
        sweep.record_failure(folder, explain(error))
        return float("nan")  # the other jobs go on; the table at the end shows the reason


def start(cfg: DictConfig, folder: Path) -> float | None:
    """Turn the configuration into dataclasses, run, and return the metric that a sweeper optimises."""
    for key in cfg.without:
        cfg[key] = None
    OmegaConf.resolve(cfg)
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    mend_torchvision()  # Lightning imports it where it is installed
    quiet(["torchao", "torch.utils._pytree"], logging.ERROR)  # compiled kernels that this machine cannot load; deprecations inside torch
    from qtrain.run import run  # torch is imported here, not before

    quiet(["lightning.pytorch", "lightning.fabric", "torch.onnx", "onnxscript", "onnx_ir", "httpx"], logging.WARNING)
    return run(config, cast(dict[str, Any], OmegaConf.to_container(cfg)), folder)


def quiet(libraries: list[str], level: int) -> None:
    """Keep the notices of ``libraries`` out of the terminal; what is at ``level`` or above goes to run.log."""
    logging.captureWarnings(True)
    for name in libraries:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers.clear()
        logger.propagate = True


def list_recipes() -> None:
    """Print every recipe with one line."""
    console.print("[bold]qtrain[/]: train on the grid that you deploy\n")
    console.print("Recipes (python -m qtrain +recipe=NAME):")
    width = max((len(name) for name in recipe_files()), default=0)
    for name, path in recipe_files().items():
        console.print(f"  [cyan]{name:<{width}}[/]  {recipe_summary(path)}")
    console.print("\nOptions: python -m qtrain --help    Sweep: -m key=a,b    Continue a run: resume=RUN_DIR")


HELP = """\
qtrain: train on the grid that you deploy.

python -m qtrain                              list the recipes
python -m qtrain +recipe=NAME                 run one
python -m qtrain +recipe=NAME key=value       with other options
python -m qtrain -m +recipe=NAME key=a,b      sweep
python -m qtrain resume=RUN_DIR               continue a run that was stopped
python -m qtrain +recipe=NAME --cfg job       print its configuration and stop
python -m qtrain --hydra-help                 the flags of Hydra, which reads all this

== Options of each group (group=option) ==
"""


def print_help(args: list[str]) -> None:
    """What there is to type. Hydra's own --help copies the whole configuration once per group, which takes two seconds."""
    from hydra import compose, initialize_config_dir

    print(HELP)
    for group in registry.PACKAGES:
        options = registry.entries(group)
        print(f"{group}: {', '.join(o.name for o in options)}")
        for option in options:
            print(f"    {option.name:<24} {option.summary}")
    for folder in sorted(p for p in data_dir("conf").iterdir() if p.is_dir() and p.name != "hydra"):
        print(f"{folder.name}: {', '.join(sorted(f.stem for f in folder.glob('*.yaml')))}")
    print(f"recipe: {', '.join(recipe_files())}\n")
    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        cfg = compose("config", overrides=[a for a in args if not a.startswith("-")])
    print("== Configuration (override with key=value; with +recipe=NAME it is that recipe's) ==")
    print(OmegaConf.to_yaml(cfg))


NULLS = re.compile(r"^(?:grid|quantizer)@([\w.]+)=null$")
"""A group that is to be left out: what it would have filled is null."""


def rewrite(args: list[str]) -> list[str]:
    """Check what Hydra cannot, and expand debug=true, resume=DIR and GROUP=null, for which its grammar has no room.

    Raises:
        ValueError: if there is no recipe, the folder to resume holds no run, or the folder to write holds one.
    """
    args = ["debug=traceback" if a == "debug=true" else NULLS.sub(r"\1=null", a) for a in args]
    args = ["without=[adapter]" if a == "adapter=null" else a for a in args]
    resumed = [a for a in args if a.startswith("resume=") and a != "resume=null"]
    if resumed:
        return continued(Path(resumed[0].removeprefix("resume=")).expanduser(), [a for a in args if a != resumed[0]])
    if any(a.startswith("-") and a not in ("-m", "--multirun") and not a.startswith("--config") for a in args):
        return args  # --help, --cfg job, ...: nothing is run
    if not any(a.lstrip("+").startswith("recipe=") for a in args):
        raise ValueError("no recipe was given. Type +recipe=qat_int4_bert, say; python -m qtrain lists the recipes")
    for folder in (Path(a.removeprefix("run_dir=")) for a in args if a.startswith("run_dir=")):
        refuse_used(folder)
        if (folder / "multirun.csv").exists() or any(folder.glob("*/.hydra")):
            raise ValueError(
                f"run_dir={folder} holds a sweep already. Give another run_dir; one of its jobs goes on with resume={folder}/0"
            )
    return args


def continued(folder: Path, others: list[str]) -> list[str]:
    """The command line that ``folder`` was started with, to continue it.

    Raises:
        ValueError: if the folder holds no run, or options are given beside it.
    """
    saved = folder / ".hydra" / "overrides.yaml"
    if not saved.is_file():
        raise ValueError(
            f"resume={folder} is not a run: {saved} does not exist. Give the folder that the run printed, like resume=runs/NAME/DATE_TIME"
        )
    if set(others) - {"debug=traceback", "traceback=true"}:
        raise ValueError(
            f"resume={folder} goes on with that run's own options; given beside it: {' '.join(others)}. Leave them out, or start a new run"
        )
    overrides = [str(o) for o in OmegaConf.load(saved) if not str(o).startswith(("run_dir=", "resume=", "hydra.", "debug=traceback"))]
    sources = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.config_sources
    extra = [f"--config-dir={s.path}" for s in sources if s.provider == "command-line"]
    return [*extra, *overrides, *others, f"run_dir={folder}", f"resume={folder}"]


def main() -> None:
    """Entry point."""
    args = sys.argv[1:]
    if not args:
        list_recipes()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, and leave as one message
    wants_traceback = any(a in ("debug=true", "debug=traceback", "traceback=true") for a in args)
    try:
        sys.argv[1:] = rewrite(args)
        register_all()
        if {"--help", "-h"} & set(args):
            print_help(sys.argv[1:])
            return
        task()
        if _failure:
            raise _failure[0]
    except BrokenPipeError:  # the reader of our output has left: `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        errors.print("\n[yellow]stopped.[/] Nothing is half-written. " + sweep.resume_hint())
        sys.exit(130)
    except Exception as error:
        if wants_traceback:
            traceback.print_exc()
        errors.print(f"[bold red]error:[/] {explain(error)}", soft_wrap=True)
        if not wants_traceback:
            errors.print("[dim](debug=true shows the traceback)[/]")
        sys.exit(1)
    if sweep.failed():
        sys.exit(1)


if __name__ == "__main__":
    main()
