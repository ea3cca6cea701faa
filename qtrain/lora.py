"""LoRA layers of peft inside a model of ours: put them in, compute the weight they stand for, take them out again.

peft's layers are put around the layers of the base, in place; the model keeps its class and its names, so that losses, metrics and
exporters see the model that they know. Three bases:

    float or bitsandbytes   peft's own layers
    `QuantizedLinear`       codes on any grid; peft's layer around it, the gradient passes through the decoded weight (`LoraOnCodes`)
    `FakeLinear`            training on the grid: the adapter is part of the weight that is rounded, y = Q(W + s * B A) x (`LoraInside`)

`merged_weight` is W + s * B A in the order of operations of peft's own `merge(safe_merge=True)`, so that plain peft, given the float base
and the folder `adapter/`, comes to the same bits. It is never computed under autocast: the deployed weight is made in float32.

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
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from qtrain.bnb import is_int8, unmark
from qtrain.checkpoint import staged
from qtrain.files import write_json
from qtrain.foreign import codes_of, is_foreign, parts
from qtrain.layers import FakeLinear, QuantizedLayer, QuantizedLinear
from qtrain.prepare import copy_of, replace

NAME = "default"
"""peft's name of the one adapter."""
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


def merged_weight(layer: Any, w_OI: Tensor) -> Tensor:
    """The weight that a peft layer stands for, of the base's float weight: W + s * B A, scaled to the magnitudes of DoRA."""
    with torch.autocast(w_OI.device.type, enabled=False):
        delta_OI = layer.get_delta_weight(NAME)
        variant = layer.lora_variant.get(NAME)
        if variant is None:
            return w_OI + delta_OI.to(w_OI.dtype)
        magnitude = layer.lora_magnitude_vector[NAME]
        norm_O = magnitude.get_weight_norm(w_OI, delta_OI, scaling=1).detach()  # constant in the gradient: the paper's section 4.3
        return ((magnitude.weight / norm_O).view(-1, 1) * (w_OI + delta_OI)).to(w_OI.dtype)


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
        """Put the weights of an adapter's folder into this adapter.

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


def require_base(folder: Path, base_sha256: str) -> None:
    """Refuse an adapter of another base; one without `qtrain.json` says nothing of its base, and passes.

    Raises:
        ValueError: naming both hashes.
    """
    about = Path(folder) / ABOUT
    if not about.is_file():
        return
    was = json.loads(about.read_text()).get("base_sha256")
    if was != base_sha256:
        raise ValueError(
            f"the adapter in {folder} was trained on another base (sha256 {str(was)[:12]}…) than this one ({base_sha256[:12]}…): other "
            "weights, or quantized in another way. Set model.path and quantizer as in the run that trained it, or adapter.path=null"
        )


def attach(model: nn.Module, options: Any, task: str, without: list[str]) -> Adapter:
    """Put adapters into ``model``, in place, and freeze the rest.

    Args:
        options: `qtrain.adapters.lora.Lora`.
        without: layers that `all-linear` leaves out: the output heads.

    Raises:
        ValueError: if the target modules do not exist.
    """
    names = targets(model, options.target_modules, [*without, *options.modules_to_save])
    if options.variant == "dora" and not torch.cuda.is_available() and any(is_int8(m) for m in model.modules()):
        raise ValueError(
            "adapter.variant=dora beside quantizer.type=int8 needs CUDA: on a CPU peft 0.21 drops the scales of LLM.int8() weights when it "
            "reads their norms. Set adapter.variant=lora, or quantizer.type=nf4"
        )
    missing = [m for m in options.modules_to_save if not any(n == m or n.endswith(f".{m}") for n, _ in model.named_modules())]
    if missing:
        raise ValueError(
            f"adapter.modules_to_save has {missing[0]!r}, which is no module of {type(model).__name__}. Set adapter.modules_to_save=[]"
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
        task_type=TASKS[task],
    )
    config._register_custom_module({FakeLinear: LoraInside, QuantizedLinear: LoraOnCodes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that LoraOnCodes' base is no nn.Linear
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    target: Any = model
    target.base_sha256 = digest
    return Adapter(wrapped, model)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> peft's layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, peft_layer.LoraLayer)}


def base_weight(layer: nn.Module) -> Tensor:
    """The float weight [O, I] that a base layer computes with, decoded where it is quantized."""
    if isinstance(layer, QuantizedLayer):
        return layer.quantized.decode()
    if is_foreign(layer):
        return codes_of(layer).decode()
    weight: Any = layer.weight
    return weight.detach()  # type: ignore[no-any-return]


@torch.no_grad()
def merged_inside(model: nn.Module) -> nn.Module:
    """A fake-quantized model with its adapters merged (`LoraInside`); it shares all other tensors with ``model``."""
    twin = copy_of(model)
    for name, layer in lora_layers(twin).items():
        base = layer.get_base_layer()
        base.weight, base.inside = nn.Parameter(merged_weight(layer, base.weight), requires_grad=False), None
        replace(twin, name, base)
    _unwrap(twin)
    return twin.requires_grad_(False).eval()


@torch.no_grad()
def merged_float(model: nn.Module, float_model: nn.Module | None = None) -> nn.Module:
    """A float model of the decoded base with its adapters merged.

    Args:
        model: the base with its adapters.
        float_model: what the base was made of; gives the classes of its modules, and shares what was not quantized. None where there is
            none (`qtrain/straight.py`): the merged model is then on the CPU, and shares nothing.
    """
    twin = copy_of(float_model) if float_model is not None else frame(model)
    decoded: dict[int, nn.Parameter] = {}  # tied weights stay one
    for name, module in list(model.named_modules()):
        if isinstance(module, peft_layer.LoraLayer):
            base: Any = module.get_base_layer()
            weight = nn.Parameter(merged_weight(module, base_weight(base)), requires_grad=False)
        elif isinstance(module, ModulesToSaveWrapper):
            replace(twin, name, module.modules_to_save[NAME])
            continue
        elif is_quantized(module) and not name.endswith(".base_layer"):
            base = module
            key = id(module.codes if isinstance(module, QuantizedLayer) else module.weight)
            if key not in decoded:
                decoded[key] = nn.Parameter(base_weight(module), requires_grad=False)
            weight = decoded[key]
        else:
            continue
        target: Any = twin.get_submodule(name)
        place: Any = {"dtype": target.weight.dtype} | ({"device": "cpu"} if float_model is None else {})
        fits = weight.to(**place) is weight
        target.weight = weight if fits else nn.Parameter(weight.to(**place), requires_grad=False)
        if getattr(base, "bias", None) is not None:
            target.bias = nn.Parameter(base.bias.detach().to(**place), requires_grad=False)
    return twin.requires_grad_(False).eval()


def without(model: Any) -> nn.Module:
    """The base alone; shares its tensors with ``model``."""
    twin = copy_of(model)
    for name, layer in lora_layers(twin).items():
        replace(twin, name, layer.get_base_layer())
    _unwrap(twin, trained=False)
    return twin.eval()


def frame(model: Any) -> nn.Module:
    """The modules of a base with its adapters, on the CPU, with Linear layers without storage where codes or adapters are."""
    from accelerate.hooks import remove_hook_from_module

    dtype = model.get_input_embeddings().weight.dtype
    twin: Any = copy_of(model)
    remove_hook_from_module(twin, recurse=True)
    for name, layer in list(model.named_modules()):
        if name.endswith(".base_layer") or not (isinstance(layer, peft_layer.LoraLayer) or is_quantized(layer)):
            continue
        base: Any = layer.get_base_layer() if isinstance(layer, peft_layer.LoraLayer) else layer
        bias = getattr(base, "bias", None) is not None
        replace(twin, name, nn.Linear(base.in_features, base.out_features, bias=bias, device="meta", dtype=dtype))
    _unwrap(twin)
    unmark(twin)
    twin.__dict__.pop("hf_device_map", None)
    cpu: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in twin.modules():
        for key, p in module._parameters.items():
            if p is not None and not p.is_meta:
                module._parameters[key] = cpu.setdefault(id(p), nn.Parameter(p.detach().cpu().clone(), requires_grad=False))
        for key, b in module._buffers.items():
            module._buffers[key] = None if b is None else b.detach().cpu().clone()
    return twin  # type: ignore[no-any-return]


def is_quantized(module: nn.Module) -> bool:
    """Whether a module holds codes, ours or those of bitsandbytes."""
    return isinstance(module, QuantizedLayer) or is_foreign(module)


def _unwrap(model: nn.Module, trained: bool = True) -> None:
    """Take peft's marks off, and put modules that were trained whole, or, unless ``trained``, those that they were made of, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            replace(model, name, module.modules_to_save[NAME] if trained else module.original_module)
    for attribute in ("peft_config", "_hf_peft_config_loaded", "peft_type", "base_sha256"):
        if attribute in vars(model):
            delattr(model, attribute)
