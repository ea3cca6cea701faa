"""Which tensors a transformers folder holds of a model: decoded values of layers with codes, the other weights in the folder's type.

A layer with codes is written as what it decodes to, so the folder's type must hold those values: each to the bit, or, with `exact=false`,
so nearly that the grid reads the same codes and scales out of the rounded ones (`check_dtype`: Q4_0 and Q5_0 in float16). A layer that
quantizes or scales its own input is refused: plain transformers would compute without that.

Tied weights are one tensor, as transformers has them, as long as quantization left them equal; else both are written, and the config says
that they are not tied. Names are those of the hub's files: where transformers renames or fuses what it loads, that is undone, as its own
`save_pretrained` does.

An entry holds no bytes; the writer asks for one tensor after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporters.base import PackedLayer
from qtrain.grids.base import Grid, QuantizedTensor
from qtrain.receipt import differing

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Types of a folder by their names."""


@dataclass
class Entry:
    """One tensor of the folder."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Callable[[], Tensor]
    """Its values, in ``dtype``, on the CPU."""

    @property
    def nbytes(self) -> int:
        """Size in the file, bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Layers with codes by name; one with several names is listed under each."""
    named = model.named_modules(remove_duplicate=False)
    return {n: m for n, m in named if hasattr(m, "quantized") and hasattr(m, "kind")}


def entries(model: nn.Module, dtype: str, packed: dict[str, list[Entry]]) -> list[Entry]:
    """All tensors of the folder, in the model's order, under transformers' own names (see `original_names`).

    Args:
        packed: what is written of layers that are not decoded, by name.
    """
    layers, tied = layers_of(model), ties(model)
    found: list[Entry] = []
    for key, value in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if owner in layers and leaf == "codes":
            found += packed.get(owner) or [_decoded(f"{owner}.weight", layers[owner], TORCH[dtype])]
        elif owner not in layers or leaf == "bias":
            found.append(_float(key, value, TORCH[dtype]))
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) | tied.keys()
    return [entry for entry in found if entry.name not in ignored]


def _decoded(name: str, layer: PackedLayer, dtype: torch.dtype) -> Entry:
    return Entry(name, dtype, layer.quantized.shape, lambda: layer.quantized.decode().cpu().to(dtype))


def _float(name: str, value: Tensor, dtype: torch.dtype) -> Entry:
    stored = dtype if value.is_floating_point() else value.dtype

    def data() -> Tensor:
        found = value.detach().cpu().to(stored)
        if stored.is_floating_point and found.numel() and not all(bool(x.isfinite()) for x in found.aminmax()):
            raise ValueError(_not_finite(name, value, stored))
        return found

    return Entry(name, stored, tuple(value.shape), data)


def _not_finite(name: str, value: Tensor, dtype: torch.dtype) -> str:
    bad = int((~value.isfinite()).sum())
    if bad:
        return (
            f"the weight {name} has {bad} values that are not finite; a model cannot compute with them. "
            "Train with a lower learning rate (finetune.learning_rate=1e-5)"
        )
    kind = str(dtype).removeprefix("torch.")
    return (
        f"the weight {name} reaches {float(value.abs().max()):.3g}, and {kind} ends at {torch.finfo(dtype).max:.3g}. "
        "Set export.transformers.dtype=float32 or bfloat16"
    )


def ties(model: Any) -> dict[str, str]:
    """Tied weight -> the one that is written; empty unless the weights of every pair are still equal."""
    pairs: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    layers = layers_of(model)
    return pairs if all(_same(_value(model, layers, a), _value(model, layers, b)) for a, b in pairs.items()) else {}


def _value(model: nn.Module, layers: dict[str, Any], key: str) -> QuantizedTensor | Tensor:
    owner, _, leaf = key.rpartition(".")
    value: Tensor = layers[owner].quantized if owner in layers and leaf == "weight" else getattr(model.get_submodule(owner), leaf)
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and (a is b or torch.equal(a, b))
    if a.grid != b.grid or a.params.keys() != b.params.keys() or not torch.equal(a.codes, b.codes):
        return False
    return all(torch.equal(a.params[n], b.params[n]) for n in a.params)


# -- whether the type holds the values ------------------------------------------------------------------------------------


def refusal(module: Any, dtype: str | None, exact: bool) -> str | None:
    """Why plain transformers would not compute as ``module`` does, or None if it would; whatever has no codes is its own.

    Args:
        dtype: that decoded values are held in; None where codes are.
    """
    if getattr(module, "inverse_smoothing", None) is not None:
        return "its input channels are scaled first, which nn.Linear does not. Set quantizer.smoothquant=null, or export=[onnx]"
    if dtype is None or not hasattr(module, "quantized"):
        return None
    why = misfit(module.quantized, dtype, exact)
    return f"{module.quantized.grid.describe()}: {why}" if why else None


def misfit(q: QuantizedTensor, dtype: str, exact: bool) -> str | None:
    """Why ``dtype`` does not hold the values of ``q``, with the override to type, or None if it does."""
    wrong = lost(q, dtype)
    if not wrong:
        return None
    again = rereads(q, dtype)
    if again and not exact:
        return None
    what = f"{dtype} does not hold {wrong} of its {q.codes.numel()} values to the bit. Set export.transformers.dtype=float32, always exact"
    return what + (", or export.transformers.exact=false: the grid reads its codes back from the rounded ones" if again else "")


def lost(q: QuantizedTensor, dtype: str) -> int:
    """How many values of ``q`` change in ``dtype``."""
    values = q.decode()
    return differing(values, values.to(TORCH[dtype]).float())


def rereads(q: QuantizedTensor, dtype: str) -> bool:
    """Whether the grid says that it gives codes and scales back from values rounded to ``dtype``, and does so here."""
    if type(q.grid).check_dtype is Grid.check_dtype or q.grid.check_dtype(TORCH[dtype]) is not None:  # the base class does not know
        return False
    values = q.decode()
    again = q.grid.encode(values.to(TORCH[dtype]).float())
    return torch.equal(again.codes, q.codes) and not differing(values, again.decode())


def typical(q: QuantizedTensor) -> QuantizedTensor:
    """Random values on the grid of ``q``, two rows: what a trial of one row, which may be zeros, does not show."""
    return q.grid.encode(torch.randn(2, *q.shape[1:], generator=torch.Generator().manual_seed(0)))


# -- names --------------------------------------------------------------------------------------------------------------


def original_names(model: Any, given: list[Entry]) -> list[Entry]:
    """``given`` under the names, and cut as, the hub's files have them: what transformers does when it loads is undone.

    Renaming costs nothing. Where tensors were fused or split, all of those are made at once.
    """
    from transformers.core_model_loading import revert_weight_conversion

    known = {e.name: e for e in given}
    blanks = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in given}
    of = {id(blank): name for name, blank in blanks.items()}
    reverted = revert_weight_conversion(model, dict(blanks))
    kept = {new: known[of[id(blank)]] for new, blank in reverted.items() if id(blank) in of}
    fused = {n: e.data() for n, e in known.items() if all(e is not k for k in kept.values())}
    made = revert_weight_conversion(model, fused) if fused else {}
    renamed = [Entry(new, e.dtype, e.shape, e.data) for new, e in kept.items()]
    return renamed + [Entry(new, t.dtype, tuple(t.shape), lambda t=t: t.contiguous()) for new, t in made.items()]  # type: ignore[misc]
