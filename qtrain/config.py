"""The configuration: one root dataclass, the folders of conf/ and recipes/, and their registration with Hydra.

With registry.py this is the only file that knows the ConfigStore. It imports no heavy package: `--help`, config errors and
`--cfg job` answer in under a second.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from qtrain import registry
from qtrain.fit import Fit

METRICS = ("accuracy", "loss", "perplexity", "cosine")
"""What models of all tasks are judged by; which of them a task has, `qtrain/tasks.py` says."""


@dataclass
class Config:
    """Everything a run reads."""

    recipe: str = "none"
    """Name of the recipe, set by it."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
    run_dir: str | None = None
    """Folder of this run; null for runs/<recipe>/<date>_<time>."""
    resume: str | None = None
    """Folder of an earlier run to continue; its own configuration is used."""
    traceback: bool = False
    """Show tracebacks of errors (`debug=true`)."""
    model: Any = MISSING
    """Where the model comes from."""
    data: Any = MISSING
    """Training, validation and test data."""
    finetune: Fit = field(default_factory=lambda: Fit(epochs=2, learning_rate=5e-5))
    """How the float model is fine-tuned before quantization; epochs=0 for a model that is trained already."""
    quantizer: Any = MISSING
    """Which value of the grid each weight gets."""
    adapter: Any = None
    """Matrices to train beside the frozen model (adapter=lora); null trains, or only rounds, the model's own weights."""
    baseline: bool = True
    """Load and measure the float model first; false (of quantizer=bnb with an adapter) reads weights straight into 4 or 8 bits."""
    without: list[str] = field(default_factory=list)
    """Parts of a recipe to leave out: without=[adapter]; adapter=null says the same."""
    stream: bool = False
    """Quantize and export a language model tensor by tensor, never whole in memory; perplexity is then measured in the runtime alone."""
    dry_run: bool = False
    """Check the options and say what training an adapter will need, without the model's weights and without training."""
    analyze: bool = False
    """Measure each layer alone on the grid: SQNR of its output, and the metric on the validation split."""
    analyze_examples: int = 512
    """Validation examples that the analysis uses, at most."""
    export: dict[str, Any] = field(default_factory=dict)
    """Exporters, by name; `export=[]` for none."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """lightning.pytorch.Trainer."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """A torch optimizer."""
    logger: Any = None
    """A Lightning logger."""
    optimize: str | None = None
    """Metric on the validation split that the run returns to a sweeper: accuracy, loss, perplexity or cosine; null is the task's first."""

    def __post_init__(self) -> None:
        if self.optimize not in (None, *METRICS):
            raise ValueError(f"optimize is {self.optimize!r}; valid: {', '.join(METRICS)}, null. Set optimize=accuracy, say.")
        if set(self.without) - {"adapter"}:
            raise ValueError(f"without is {self.without}; valid: adapter, or nothing. Set without=[adapter], or without=[]")
        if self.analyze_examples < 1:
            raise ValueError(f"analyze_examples is {self.analyze_examples}; it must be at least 1. Set analyze_examples=512, say.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it is from 0 to 4294967295. Set seed=0, say.")


def data_dir(name: str) -> Path:
    """The folder `conf` or `recipes`: in a checkout, or as shipped in the wheel.

    Raises:
        FileNotFoundError: if the installation lacks it.
    """
    here = Path(__file__).resolve().parent
    for candidate in (here / f"_{name}", here.parent / name):
        if any(candidate.glob("**/*.yaml")):
            return candidate
    raise FileNotFoundError(f"qtrain is installed without its {name}/ folder; reinstall it: pip install --force-reinstall qtrain")


def recipe_files() -> dict[str, Path]:
    """Recipe name -> file."""
    return {path.stem: path for path in sorted(data_dir("recipes").glob("*.yaml"))}


def recipe_summary(path: Path) -> str:
    """First line of a recipe's header comment (after the package line)."""
    for line in path.read_text().splitlines():
        text = line.lstrip("# ").strip()
        if line.startswith("#") and text and not text.startswith("@package"):
            return text
    return ""


def wandb_offline() -> bool:
    """Whether to log offline: true unless a key is set or the user is logged in."""
    netrc = Path.home() / (".netrc" if os.name != "nt" else "_netrc")
    try:
        logged_in = netrc.exists() and "wandb" in netrc.read_text()
    except OSError:
        logged_in = False
    return not (os.environ.get("WANDB_API_KEY") or logged_in)


def run_folder(run_dir: str | None, recipe: str, kind: str) -> str:
    """Folder of a run or a sweep: the user's, or runs/<recipe>/<date>_<time>."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = "several" if recipe == "none" else recipe  # a sweep over recipes, or a user's own that does not name itself
    return run_dir or f"runs/{name}/{stamp}{'_sweep' if kind == 'sweep' else ''}"


def register_all() -> None:
    """Put the schema, all registered options and all recipes into Hydra's ConfigStore."""
    OmegaConf.register_new_resolver("wandb_offline", wandb_offline, replace=True)
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True, use_cache=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config, provider="qtrain/config.py")
    registry.load_all()
    for name, path in recipe_files().items():
        node = OmegaConf.load(path)
        OmegaConf.update(node, "recipe", name, force_add=True)
        store.store(group="recipe", name=name, node=node, package="_global_", provider=f"recipes/{path.name}")
