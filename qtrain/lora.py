"""LoRA layers of peft in a model of ours: where they go, what a folder of theirs has to fit, and their layers beside codes and inside them.

peft's layers are put around the layers of the base, in place; the model keeps its class and its names, so that losses, metrics and
exporters see the model that they know. Three bases:

    float or bitsandbytes   peft's own layers
    `QuantizedLinear`       codes on any grid; peft's layer around it, the gradient passes through the decoded weight (`LoraOnCodes`)
    `FakeLinear`            training on the grid: the adapter is part of the weight that is rounded, y = Q(W + s * B A) x (`LoraInside`)

Shapes: W [O, I], A [r, I], B [O, r], DoRA's magnitude m [O].
"""

from __future__ import annotations

import difflib
import hashlib
import json
import warnings
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from qtrain.bnb import is_int8
from qtrain.checkpoint import staged
from qtrain.files import write_json
from qtrain.foreign import parts
from qtrain.layers import FakeLinear, QuantizedLinear
from qtrain.merging import NAME, base_weight, lora_layers, merged_weight

ABOUT = "qtrain.json"
"""Beside peft's files: which base the adapter was trained on."""
TASKS = {"language": "CAUSAL_LM", "classification": "SEQ_CLS", "embedding": "FEATURE_EXTRACTION"}
"""peft's names of our tasks."""


class LoraOnCodes(peft_layer.Linear):
    """An adapter beside a weight that is held as codes."""


class LoraInside(peft_layer.Linear):
    """An adapter inside a weight that is fake-quantized: its base layer asks `weight_now` for the float weight to round."""

    def __init__(self, base_layer: FakeLinear, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        base_layer.inside = self.weight_now

    def weight_now(self, w_OI: Tensor) -> Tensor:
        """W + s * B A [O, I], differentiable."""
        return merged_weight(self, w_OI)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] -> [..., O]."""
        y: Tensor = self.base_layer(x)
        return y


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can be put around it."""
    return isinstance(module, (nn.Linear, QuantizedLinear))


def targets(model: nn.Module, wanted: str | list[str], without: list[str]) -> list[str]:
    """Names of the layers that get an adapter.

    Args:
        wanted: `all-linear`, or last parts of names, whole names or patterns.
        without: names that all-linear leaves out.

    Raises:
        ValueError: if one of ``wanted`` matches no Linear layer.
    """
    found = [name for name, module in model.named_modules() if is_linear(module)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no Linear layer to put an adapter beside. Set adapter=null")
    if wanted == "all-linear":
        return [name for name in found if name not in without]
    chosen: set[str] = set()
    for pattern in wanted:
        matches = {name for name in found if name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)}
        if not matches:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in found})
            close = difflib.get_close_matches(pattern, leaves, n=1, cutoff=0.0)
            raise ValueError(
                f"adapter.target_modules has {pattern!r}, which matches none of the {len(found)} Linear layers; their names end in "
                f"{', '.join(leaves[:12])}. Set adapter.target_modules=[{close[0]}] or all-linear"
            )
        chosen |= matches
    return [name for name in found if name in chosen]


def short_names(names: list[str], model: nn.Module) -> list[str]:
    """Last parts of ``names`` where these mean the same layers, as people write them in adapter_config.json."""
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    same = [n for n, m in model.named_modules() if is_linear(m) and n.rsplit(".", 1)[-1] in leaves]
    return leaves if same == names else names


def base_hash(model: nn.Module) -> str:
    """sha256 of every weight and code of a model without adapter, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            for part in parts(tensor):
                digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class Adapter:
    """An adapter in a model."""

    peft_model: Any
    """peft's wrapper around the model; writes the folder that plain peft reads."""
    model: Any
    """The model itself, of its own class, with peft's layers inside."""

    @property
    def base_sha256(self) -> str:
        """Hash of the base without adapter; empty where it has no storage."""
        return str(self.model.base_sha256)

    @property
    def names(self) -> list[str]:
        """Layers with an adapter."""
        return list(lora_layers(self.model))

    @property
    def trainable(self) -> int:
        """Parameters that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def tensors(self) -> dict[str, Tensor]:
        """What an adapter's file holds, by the names of peft."""
        from peft import get_peft_model_state_dict

        found: dict[str, Tensor] = get_peft_model_state_dict(self.peft_model)
        return found

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write peft's folder, all or nothing, and ``about`` beside it in `qtrain.json`.

        Raises:
            OSError: if it cannot be written.
        """
        with staged(folder) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks the hub for the base's config to see whether embeddings grew
            self.peft_model.save_pretrained(str(temporary), save_embedding_layers=False)
            (temporary / "README.md").unlink(missing_ok=True)  # peft's empty form of a model card
            write_json(temporary / ABOUT, {"base_sha256": self.base_sha256, **about})

    def load(self, folder: Path) -> None:
        """Put the weights of an adapter's folder into this adapter; `require_same` has compared their options.

        Raises:
            ValueError: if it was trained on another base, is damaged or has other shapes.
        """
        from peft import load_peft_weights, set_peft_model_state_dict

        require_base(folder, self.base_sha256)
        try:
            found = load_peft_weights(str(folder), device="cpu")
            report: Any = set_peft_model_state_dict(self.peft_model, found)
        except Exception as error:
            raise ValueError(
                f"adapter.path={folder} does not fit: {str(error).splitlines()[0]}. Give the rank, variant and target_modules that it "
                "was trained with"
            ) from error
        lost = [k for k in report.missing_keys if "lora_" in k] + list(report.unexpected_keys)
        if lost:
            raise ValueError(
                f"adapter.path={folder} does not fit: {len(lost)} of its tensors, or of this adapter's, have no partner, the first "
                f"{lost[0]}. Give the rank, variant and target_modules that it was trained with"
            )

    def start(self, name: str, a_rI: Tensor, b_Or: Tensor) -> None:
        """Set A and B of one layer."""
        layer = self.model.get_submodule(name)
        with torch.no_grad():
            layer.lora_A[NAME].weight.copy_(a_rI)
            layer.lora_B[NAME].weight.copy_(b_Or)
            if NAME in layer.lora_magnitude_vector:  # peft has taken the norms of the base alone
                magnitude = layer.lora_magnitude_vector[NAME]
                w_OI = base_weight(layer.get_base_layer()).float()
                magnitude.weight.copy_(magnitude.get_weight_norm(w_OI, layer.get_delta_weight(NAME), scaling=1))


def require_base(folder: Path, base_sha256: str) -> None:
    """Refuse an adapter of another base; one without `qtrain.json` says nothing of its base, and passes.

    Raises:
        ValueError: naming both hashes.
    """
    about = Path(folder) / ABOUT
    if not about.is_file():
        return
    held = json.loads(about.read_text())
    was = held.get("base_sha256")
    if was != base_sha256 and held.get("init") == "loftq":
        raise ValueError(
            f"the adapter in {folder} belongs to a base that LoftQ chose together with it (adapter.init=loftq), and not to what rounding "
            "the model gives. Continue its own run with resume=RUN_DIR, or start a new adapter: adapter.path=null"
        )
    if was != base_sha256:
        raise ValueError(
            f"the adapter in {folder} was trained on another base (sha256 {str(was)[:12]}…) than this one ({base_sha256[:12]}…): other "
            "weights, or quantized in another way. Set model.path and quantizer as in the run that trained it, or adapter.path=null"
        )


def has_module(model: nn.Module, end: str) -> bool:
    """Whether a module's name is ``end``, or ends in it."""
    return any(name == end or name.endswith(f".{end}") for name, _ in model.named_modules())


def require_fits(model: nn.Module, options: Any) -> None:
    """Refuse modules to train whole that the model does not have.

    Raises:
        ValueError: naming them.
    """
    missing = [m for m in options.modules_to_save if not has_module(model, m)]
    if missing:
        raise ValueError(
            f"adapter.modules_to_save has {missing[0]!r}, which is no module of {type(model).__name__}. Set adapter.modules_to_save=[]"
        )


def require_norms(options: Any, device: torch.device) -> None:
    """Refuse DoRA beside LLM.int8() where peft cannot read the norms of its weights.

    Raises:
        ValueError: on a CPU.
    """
    if options.variant == "dora" and device.type != "cuda":
        raise ValueError(
            "adapter.variant=dora beside quantizer.type=int8 needs CUDA: on a CPU peft 0.21 drops the scales of LLM.int8() weights when it "
            "reads their norms. Set adapter.variant=lora, or quantizer.type=nf4"
        )


def require_same(folder: Path, options: Any, model: nn.Module) -> None:
    """Refuse an adapter folder that was made with other options than this run's: another scale would be another model.

    Raises:
        ValueError: naming the options to set.
    """
    held = json.loads((folder / "adapter_config.json").read_text())
    if held.get("peft_type") != "LORA":
        raise ValueError(f"the adapter in {folder} is of the type {held.get('peft_type')}, not LORA. Set adapter.path=null for a new one")
    variant = "dora" if held.get("use_dora") else "rslora" if held.get("use_rslora") else "lora"
    was = {"rank": held["r"], "alpha": held["lora_alpha"], "variant": variant, "bias": held.get("bias", "none")}
    was["modules_to_save"] = sorted(m for m in held.get("modules_to_save") or [] if has_module(model, m))  # peft names some that may be
    now = {key: getattr(options, key) for key in was} | {"modules_to_save": sorted(options.modules_to_save)}
    wrong = {key: value for key, value in was.items() if value != now[key]}
    if wrong:
        given = ", ".join(f"adapter.{key}={now[key]}" for key in wrong)
        valid = " ".join(f"adapter.{key}={value}".replace(" ", "").replace("'", "") for key, value in wrong.items())
        raise ValueError(f"the adapter in {folder} was trained with other options than this run's {given}. Set {valid}")


def attach(model: nn.Module, options: Any, task: str, without: list[str]) -> Adapter:
    """Put adapters into ``model``, in place, and freeze the rest.

    Args:
        options: `qtrain.adapters.lora.Lora`.
        without: layers that `all-linear` leaves out: the output heads.

    Raises:
        ValueError: if the target modules do not exist.
    """
    names = targets(model, options.target_modules, without)
    require_fits(model, options)
    if any(is_int8(m) for m in model.modules()):
        require_norms(options, next(model.parameters()).device)
    held = [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear) and m.bias is not None and n in names]
    if options.bias != "none" and held:
        raise ValueError(
            f"adapter.bias={options.bias} trains biases, and that of {held[0]} is held with its codes (quantizer=rtn, or a layer in whose "
            "place bitsandbytes' would compute wrongly). Set adapter.bias=none, or quantizer=torchao"
        )
    digest = "" if any(p.is_meta for p in model.parameters()) else base_hash(model)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        bias=options.bias,
        use_rslora=options.variant == "rslora",
        use_dora=options.variant == "dora",
        target_modules=short_names(names, model),
        modules_to_save=list(options.modules_to_save) or None,
    )  # without a task_type, by which peft would also train whatever is called classifier or score
    config._register_custom_module({FakeLinear: LoraInside, QuantizedLinear: LoraOnCodes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that LoraOnCodes' base is no nn.Linear
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    if task != "classification" or options.modules_to_save:  # else peft would look for a trained classifier in the folder
        config.task_type = TASKS[task]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name and "modules_to_save" not in name:
            parameter.data = parameter.data.clone()  # a bias that is trained; its values were the float model's too
    target: Any = model
    target.base_sha256 = digest
    return Adapter(wrapped, model)
