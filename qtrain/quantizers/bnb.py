"""bitsandbytes: NF4, FP4 and LLM.int8() layers, the bases of QLoRA, through transformers' own replacement and settings.

    nf4, fp4     4-bit codebooks in blocks of 64 (QLoRA: Dettmers et al. 2023, arXiv 2305.14314); the grids of `qtrain/grids/codebook.py`
    int8         rows of weights in int8 with their absmax, inputs in int8 too but for columns with a value above `threshold`
                 (LLM.int8(): Dettmers et al. 2022, arXiv 2208.07339)

In training and evaluation the layers are bitsandbytes' own. `convert` reads their codes, which nothing rounds again, into layers of ours.
Where the two compute in another order (or, of int8, where bitsandbytes rounds the inputs and ours does not) outputs differ, so the run
reports by how much and measures the converted model too.

On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight in the first evaluation: its scales become bfloat16, and double
quantization is made anew from those when the weight is read back, so that the base is another one after it was evaluated. Here that path
is switched off (`Linear4bit.support_avx512bf16_for_cpu`); codes and scales stay those that were made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.registry import register
from qtrain.targets import select

if TYPE_CHECKING:
    from torch import nn

TYPES = ("nf4", "fp4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
STORAGE = ("uint8", "bfloat16", "float16", "float32")


@register("quantizer", "bnb")
@dataclass
class Bnb:
    """bitsandbytes' NF4, FP4 or INT8 layers: the frozen base of QLoRA."""

    exact: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    static: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    moves_weights: ClassVar[bool] = False
    automatic: ClassVar[int] = 0
    activation: ClassVar[None] = None
    embedding: ClassVar[None] = None
    smoothquant: ClassVar[None] = None
    imatrix: ClassVar[bool] = False
    bias_correction: ClassVar[bool] = False
    equalize: ClassVar[bool] = False

    type: str = "nf4"
    """nf4, fp4 or int8."""
    double_quant: bool = True
    """Of nf4 and fp4: keep the scales in 8 bits too (4.13 bits per weight instead of 4.5)."""
    compute_dtype: str = "auto"
    """Of nf4 and fp4: type of the products: float32, bfloat16 or float16; auto is bfloat16 on CUDA where it is fast, else float32."""
    quant_storage: str = "uint8"
    """Of nf4 and fp4: type of the tensor that holds the bytes; FSDP wants that of the other parameters (bfloat16)."""
    threshold: float = 6.0
    """Of int8: columns of the input with a magnitude above it are multiplied in 16 bits; 0 for none."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of modules to quantize; embeddings and convolutions stay in float."""
    keep_float: Any = field(default_factory=list)
    """Patterns of modules to leave in float, besides those of the model family."""

    registered_name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.fallbacks: list[dict[str, str]] = []
        """What could not be done as asked: [{"name", "why"}]."""
        self.details: dict[str, Any] = {}
        """What was done to the model, for run.json."""
        self.importance: dict[str, Any] = {}
        """Importances: none are measured."""
        self.keep_float = [self.keep_float] if isinstance(self.keep_float, str) else list(self.keep_float)
        options = {"type": TYPES, "compute_dtype": DTYPES, "quant_storage": STORAGE}
        for option, valid in options.items():
            if getattr(self, option) not in valid:
                raise ValueError(
                    f"quantizer.{option} is {getattr(self, option)!r}; valid: {', '.join(valid)}. Set quantizer.{option}={valid[0]}"
                )
        if any(pattern.startswith("auto:") for pattern in self.keep_float):
            raise ValueError(
                f"quantizer.keep_float has {self.keep_float}; layers of bitsandbytes cannot be tried one by one, as auto:N does. Find the "
                "names with quantizer=rtn grid@quantizer.weight=nf4 quantizer.keep_float=auto:N, and list them here"
            )
        if self.threshold < 0:
            raise ValueError(f"quantizer.threshold is {self.threshold}; at least 0. Set quantizer.threshold=6.0")
        if self.type == "int8" and self.quant_storage != "uint8":
            raise ValueError(f"quantizer.quant_storage={self.quant_storage} is for nf4 and fp4. Set quantizer.quant_storage=uint8")

    @property
    def weight(self) -> Any:
        """The grid that the weights are on."""
        from qtrain.registry import get

        if self.type == "int8":
            return get("grid", "affine")(bits=8, granularity="channel", rule="absmax")
        return get("grid", self.type)(double_quant=self.double_quant)

    def weight_grids(self, model: nn.Module, keep_float: list[str]) -> dict[str, Any]:
        """See `qtrain.targets.Scheme.weight_grids`."""
        grid = self.weight
        return dict.fromkeys(self._chosen(model, keep_float)[0], grid)

    def _chosen(self, model: nn.Module, keep_float: list[str]) -> tuple[dict[str, Any], list[str]]:
        import torch

        chosen, kept = select(model, self.include, [*self.keep_float, *keep_float])
        linear: dict[str, Any] = {name: module for name, module in chosen.items() if type(module) is torch.nn.Linear}
        if not linear:
            raise ValueError(
                f"quantizer.include={self.include} names no Linear layer of {type(model).__name__}, and bitsandbytes has no other. "
                "Set quantizer.include=['*']"
            )
        return linear, sorted([*kept, *(name for name in chosen if name not in linear)])

    def transform(self, model: nn.Module, calibration: list[dict[str, Any]], keep_float: list[str]) -> nn.Module:
        """Nothing happens to the float model first."""
        return model

    def prepare(self, model: nn.Module, keep_float: list[str], example: dict[str, Any] | None = None) -> tuple[nn.Module, list[str]]:
        """Put bitsandbytes' layers in place of the Linear ones, in place; see `qtrain.targets.Scheme.prepare`.

        Raises:
            ValueError: if a pattern matches nothing, a weight is not finite, or bitsandbytes is not installed.
        """
        from qtrain.bnb import swap

        linear, kept = self._chosen(model, keep_float)
        swap(model, linear, self)
        return model, kept

    def calibrate(self, model: nn.Module, batches: Iterable[dict[str, Any]]) -> nn.Module:
        """There is nothing to calibrate."""
        return model

    def convert(self, model: nn.Module) -> nn.Module:
        """Layers of ours with the codes of bitsandbytes', in place."""
        from qtrain.bnb import convert

        return convert(model)

    def callbacks(self) -> list[Any]:
        """None."""
        return []
