"""LoRA: train s * B A beside each frozen weight W, and say what becomes of it in the end.

    y = W x + s * B (A x)         A [rank, I], B [O, rank], s = alpha / rank (Hu et al. 2022, arXiv 2106.09685)
    rslora                        s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)
    dora                          m * (W + s * B A) / |W + s * B A|, with a trained magnitude m [O] (Liu et al. 2024, arXiv 2402.09353)

The layers are peft's, and so is the folder `adapter/`, which plain peft loads. W is what the quantizer made of the model: bitsandbytes'
NF4, FP4 or INT8 (`quantizer=bnb`), codes on any of our grids (`quantizer=rtn`), or, with a quantizer that trains, W in float:

    quantizer=qat     y = Q(W + s * B A) x, on the grid that is deployed: merging and rounding gives exactly the trained model

What is deployed (`merge`), since Q(W) x + B A x is what the others train, and rounding W + B A again is another model:

    apart             the base and the adapter stay two things; nothing is rounded again, nothing can be exported as one file
    float             s * B A is added to the decoded base; exported in float
    rounded           that, put on the grids of `adapter.deploy` (any quantizer); costs what the report says
    consistent        of quantizer=qat: the weight that training computed with

`init=loftq` chooses base and adapter together so that their sum starts near the float weight (`qtrain/loftq.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qtrain.fit import Fit
from qtrain.registry import register

VARIANTS = ("lora", "rslora", "dora")
BIASES = ("none", "all", "lora_only")
INITS = ("zero", "loftq")
MERGES = ("auto", "apart", "float", "rounded", "consistent")


@register("adapter", "lora")
@dataclass
class Lora:
    """LoRA, rsLoRA or DoRA by peft."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"/quantizer@deploy": None}])
    rank: int = 16
    """Rank r of the adapter."""
    alpha: float = 32.0
    """Its strength: s = alpha / r (rslora: alpha / sqrt(r))."""
    dropout: float = 0.0
    """Share of the adapter's inputs that training drops."""
    variant: str = "lora"
    """lora, rslora or dora."""
    target_modules: Any = "all-linear"
    """Names (last parts, or whole) of the Linear layers that get an adapter; all-linear: all but the output head."""
    bias: str = "none"
    """Which biases are trained: none, all, or lora_only (of the layers with an adapter)."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules to train whole, such as a new classifier; saved with the adapter."""
    init: str = "zero"
    """zero (B = 0: training starts at the base) or loftq (Li et al. 2023: base and adapter together near the float model)."""
    loftq_iterations: int = 5
    """Alternations of rounding and of the singular value decomposition in init=loftq."""
    path: str | None = None
    """An adapter folder to go on from; null for a new one."""
    merge: str = "auto"
    """What is deployed: apart, float, rounded, consistent; auto: consistent of quantizer=qat, else rounded with a deploy, else float."""
    deploy: Any = None
    """Quantizer that rounds the merged model: quantizer@adapter.deploy=rtn grid@adapter.deploy.weight=q4_0, say."""
    sample: str | None = "The easiest way to learn Python is"
    """Text that the model continues greedily before and after training; null for none. Chat models get it as a user's message."""
    sample_tokens: int = 48
    """Tokens of that continuation."""
    fit: Fit = field(default_factory=lambda: Fit(epochs=1, learning_rate=2e-4, warmup=0.03, schedule="cosine"))
    """How it trains."""

    registered_name = ""

    def __post_init__(self) -> None:
        if find_spec("peft") is None:
            raise ValueError(
                "adapter=lora needs the package peft, which is not installed. pip install 'qtrain[qlora]', or set adapter=null"
            )
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"adapter.rank is {self.rank}, alpha {self.alpha}, dropout {self.dropout}; rank is at least 1, alpha above 0, dropout from "
                "0 to below 1. Set adapter.rank=16 adapter.alpha=32 adapter.dropout=0"
            )
        for option, valid in {"variant": VARIANTS, "bias": BIASES, "init": INITS, "merge": MERGES}.items():
            if getattr(self, option) not in valid:
                raise ValueError(
                    f"adapter.{option} is {getattr(self, option)!r}; valid: {', '.join(valid)}. Set adapter.{option}={valid[0]}"
                )
        if self.loftq_iterations < 1 or self.sample_tokens < 1:
            raise ValueError(
                f"adapter.loftq_iterations is {self.loftq_iterations} and sample_tokens {self.sample_tokens}; at least 1. "
                "Set adapter.loftq_iterations=5 adapter.sample_tokens=48"
            )
        if self.path is not None and not (Path(self.path).expanduser() / "adapter_config.json").is_file():
            raise ValueError(
                f"adapter.path={self.path} is no adapter: it has no adapter_config.json. Set adapter.path to a folder that peft or qtrain "
                "wrote, or adapter.path=null for a new adapter"
            )
        if self.path is not None and self.init == "loftq":
            raise ValueError(
                "adapter.init=loftq makes a new adapter, and adapter.path names one. Set adapter.init=zero or adapter.path=null"
            )
        if self.merge == "rounded" and self.deploy is None:
            raise ValueError(
                "adapter.merge=rounded needs to know onto which grid. Set quantizer@adapter.deploy=rtn grid@adapter.deploy.weight=q4_0, say"
            )
        if getattr(self.deploy, "trains", False):
            raise ValueError(
                f"quantizer@adapter.deploy={self.deploy.registered_name} trains, and the merged model is only rounded. Set "
                "quantizer@adapter.deploy=rtn; for training on the deployed grid, set quantizer=qat and adapter.merge=consistent"
            )
        if isinstance(self.target_modules, str):
            self.target_modules = self.target_modules if self.target_modules == "all-linear" else [self.target_modules]
        else:
            self.target_modules = list(self.target_modules)

    @property
    def scaling(self) -> float:
        """s of s * B A."""
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)

    def merging(self, scheme: Any) -> str:
        """What is deployed, of a base that ``scheme`` quantizes.

        Raises:
            ValueError: if the two do not go together.
        """
        if scheme.trains:
            self._require_consistent(scheme)
            return "consistent"
        if self.merge == "consistent":
            raise ValueError(
                f"adapter.merge=consistent trains Q(W + s * B A) on the deployed grid, which quantizer={scheme.registered_name} does not. "
                "Set quantizer=qat grid@quantizer.weight=q4_0, say, or adapter.merge=float"
            )
        if self.merge != "auto":
            return self.merge
        return "float" if self.deploy is None else "rounded"

    def _require_consistent(self, scheme: Any) -> None:
        if scheme.registered_name != "qat":
            raise ValueError(
                f"quantizer={scheme.registered_name} has layers of its own, which take no adapter. Set quantizer=qat (trained on the "
                "deployed grid), quantizer=bnb or quantizer=rtn"
            )
        given = [f"adapter.merge={self.merge}"] if self.merge not in ("auto", "consistent") else []
        given += ["quantizer@adapter.deploy"] if self.deploy is not None else []
        given += [f"adapter.dropout={self.dropout}"] if self.dropout else []
        given += ["adapter.init=loftq"] if self.init == "loftq" else []
        given += ["quantizer.learn_scale=true"] if scheme.learn_scale else []
        if given:
            raise ValueError(
                f"with quantizer=qat the adapter is part of the rounded weight, Q(W + s * B A), which leaves no room for "
                f"{', '.join(given)}. Leave that out, or set quantizer=bnb (or rtn)"
            )
