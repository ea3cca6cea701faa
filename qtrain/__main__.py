"""`python -m qtrain`: Hydra composes the configuration, it becomes dataclasses once, and run() does the rest.

Exit status: 0 when every receipt passed, 1 on any error or failed receipt, 130 after Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from qtrain import sweep
from qtrain.config import Config, data_dir, recipe_files, recipe_summary, register_all
from qtrain.console import console, errors
from qtrain.explain import explain


@hydra.main(version_base="1.3", config_path=str(data_dir("conf")), config_name="config")
def task(cfg: DictConfig) -> Any:
    """One job: a single run, or one of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode is not RunMode.MULTIRUN:
        return start(cfg, folder)
    sweep.announce(hydra_config)
    try:
        return start(cfg, folder)
    except Exception as error:  # the other jobs go on; the table at the end shows the reason
        if cfg.traceback:
            traceback.print_exc()
        errors.print(f"[red]job failed:[/] {explain(error)}")
        sweep.record_failure(folder, explain(error))
        return float("nan")


def start(cfg: DictConfig, folder: Path) -> float | None:
    """Turn the configuration into dataclasses, run, and return the metric that a sweeper optimises."""
    OmegaConf.resolve(cfg)
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    quiet(["torchao"], logging.ERROR)  # compiled kernels that this machine cannot load
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


def rewrite(args: list[str]) -> list[str]:
    """Expand the two conveniences that Hydra's grammar has no room for: debug=true and resume=DIR.

    Raises:
        ValueError: if the folder to resume holds no run.
    """
    args = ["debug=traceback" if a == "debug=true" else a for a in args]
    given = [a for a in args if a.startswith("resume=") and a != "resume=null"]
    if not given:
        return args
    folder = Path(given[0].removeprefix("resume="))
    saved = folder / ".hydra" / "overrides.yaml"
    if not saved.is_file():
        raise ValueError(
            f"resume={folder} is not a run: {saved} does not exist. Give the folder that the run printed, like resume=runs/NAME/DATE_TIME"
        )
    overrides = [str(o) for o in OmegaConf.load(saved) if not str(o).startswith(("run_dir=", "resume=", "hydra."))]
    sources = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.config_sources
    extra = [f"--config-dir={s.path}" for s in sources if s.provider == "command-line"]
    mine = [a for a in args if a != given[0]]
    return [*extra, *overrides, *mine, f"run_dir={folder}", f"resume={folder}"]


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
        task()
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
