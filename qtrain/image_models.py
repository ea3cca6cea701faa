"""Image classifiers: what their families share. A family adds how its network is built; see `qtrain/models/`.

Weights are read from safetensors as float32, whatever the file has. A file fits when every tensor of it has its place and every place
its tensor; the one exception is the classifier, which is new where the number of classes differs. What is new is drawn from `seed`
alone, and named in `new_parameters`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qtrain.images import ImageSpec
from qtrain.lazy import lazy_import

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy_import("torch")

log = logging.getLogger(__name__)


@dataclass
class ImageModel(ABC):
    """What every family of image classifiers has."""

    keep_float: list[str] = field(default_factory=list)
    """Patterns of modules that this family keeps in float; empty: none."""

    registered_name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.new_parameters: list[str] = []

    @abstractmethod
    def processor(self) -> ImageSpec:
        """What the model reads."""

    @abstractmethod
    def network(self, num_labels: int) -> nn.Module:
        """The network with random weights, and with those of a file where one was asked for; sets `new_parameters`."""

    def build(self, num_labels: int, seed: int, label_names: list[str] | None = None) -> nn.Module:
        """The model in float32, in evaluation mode; `new_parameters` then names what was not in a file.

        Args:
            num_labels: number of classes.
            seed: of the parameters that are not in a file; the global generator is left as it was.
            label_names: names of the classes, of which only the number matters: a CNN has no place for them.

        Raises:
            FileNotFoundError: if a file of weights does not exist.
            ValueError: if it is damaged or of another model, or there is no model of that name.
            OSError: if weights cannot be downloaded.
        """
        if label_names is not None and len(label_names) != num_labels:
            raise ValueError(
                f"{len(label_names)} label names ({', '.join(label_names)}) were given for {num_labels} classes; give one each, or none"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.network(num_labels)
        if self.new_parameters:
            first, count = self.new_parameters[0], len(self.new_parameters)
            log.info("%d parameters are new, drawn from seed %d, the first %s: no file has them", count, seed, first)
        return model.float().eval()

    def max_positions(self, model: nn.Module) -> int:
        """0: images have no positions."""
        return 0

    def vocabulary(self, model: nn.Module) -> int:
        """0: images have no tokens."""
        return 0

    def always_float(self, model: nn.Module) -> list[str]:
        """Names of the modules that stay in float: none but what `keep_float` says, since integer runtimes run every layer of a CNN.

        Raises:
            ValueError: if a pattern of `keep_float` matches no Linear, Embedding or convolution.
        """
        kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d)
        modules = [name for name, module in model.named_modules() if isinstance(module, kinds)]
        for pattern in self.keep_float:
            if not any(fnmatchcase(name, pattern) for name in modules):
                raise ValueError(
                    f"model.keep_float pattern {pattern!r} matches none of the {len(modules)} Linear, Embedding and convolution modules "
                    f"({', '.join([*modules[:2], *modules[-1:]])}, …). Set model.keep_float=[] to keep none"
                )
        return [name for name in modules if any(fnmatchcase(name, pattern) for pattern in self.keep_float)]

    def blocks(self, model: nn.Module) -> list[str]:
        """Names of the repeated blocks, first to last: of the modules in lists (not inside one another), those of the most frequent class.

        Raises:
            ValueError: if nothing is repeated.
        """
        units = list(_units(model, ""))
        kinds = Counter(type(module) for _, module in units)
        most = kinds.most_common(1)
        if not most or most[0][1] < 2:
            raise ValueError(
                f"{type(model).__name__} has no repeated blocks in an nn.Sequential or nn.ModuleList, so it cannot be walked block by "
                "block. Set model=cifar_resnet, say, which has"
            )
        return [name for name, module in units if type(module) is most[0][0]]


def _units(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters that stand in a list, themselves no list and no part of one another."""
    lists = (torch.nn.Sequential, torch.nn.ModuleList)
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if type(module) in lists and type(child) not in lists:
            if any(True for _ in child.parameters()) and any(True for _ in child.children()):
                yield full, child
        else:
            yield from _units(child, f"{full}.")


def classifiers(model: nn.Module, num_labels: int) -> list[str]:
    """The last Linear or Conv2d with one output per class: its name, alone in a list."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    heads = [name for name, m in model.named_modules() if isinstance(m, kinds) and len(m.weight) == num_labels]
    return heads[-1:]


def read_weights(path: str, option: str) -> tuple[dict[str, Tensor], str]:
    """A state dict from a safetensors file, or from `model.safetensors` in a folder; and the file's name for messages.

    Args:
        option: that gave ``path``, for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not safetensors, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    given = Path(path).expanduser()
    file = given / "model.safetensors" if given.is_dir() else given
    if not file.is_file():
        raise FileNotFoundError(
            f"the weights {file} do not exist (looked for {file.absolute()}); valid: a .safetensors file, or a folder with "
            f"model.safetensors. Set {option}=FILE, or {option}=null for new weights"
        )
    if file.suffix.lower() in (".pt", ".pth", ".th", ".bin", ".ckpt", ".pkl"):
        raise ValueError(
            f"{file} is a pickle, and reading it could run code that it holds; valid: safetensors. Convert it where you trust it: "
            f"torch.load with weights_only=True, safetensors.torch.save_file. Then set {option}={file.with_suffix('.safetensors')}"
        )
    try:
        return load_file(file), str(file)
    except SafetensorError as e:
        raise ValueError(
            f"the weights {file} are damaged ({str(e).rstrip('.')}): the file is cut short or is not safetensors. Copy it again, or set "
            f"{option}=FILE to another"
        ) from e


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str, heads: list[str], hint: str) -> list[str]:
    """Copy ``state`` into ``model``.

    Args:
        source: where ``state`` is from, for messages.
        heads: names of modules that stay as they are where the shapes differ: the classifier.
        hint: what to set if the rest does not fit.

    Returns:
        Names of the parameters that ``state`` did not have.

    Raises:
        ValueError: if the state of any other module is missing, superfluous or of another shape.
    """
    own = model.state_dict()
    wanted = {name for name in own if not name.endswith("num_batches_tracked")}
    missing = sorted(wanted - {*state})
    other = sorted(name for name in wanted & {*state} if state[name].shape != own[name].shape)
    new = [name for name in [*missing, *other] if name.rpartition(".")[0] in heads]
    superfluous = sorted({*state} - {*own})
    wrong = [name for name in [*other, *missing, *superfluous] if name not in new]
    if wrong:
        first = wrong[0]
        what = (
            f"{first} has shape {list(state[first].shape)} and the model {list(own[first].shape)}"
            if first in other
            else f"{first} is {'missing in the file' if first in missing else 'not in the model'}"
        )
        raise ValueError(f"the weights of {source} do not fit the model: {len(wrong)} tensors do not match, {what}. {hint}")
    model.load_state_dict({name: value for name, value in state.items() if name not in new}, strict=False)
    return sorted(new)
