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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.frozen import FrozenBase
from qtrain.registry import get, register

if TYPE_CHECKING:
    from torch import nn

TYPES = ("nf4", "fp4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
STORAGE = ("uint8", "bfloat16", "float16", "float32")


@register("quantizer", "bnb")
@dataclass
class Bnb(FrozenBase):
    """bitsandbytes' NF4, FP4 or INT8 layers: the frozen base of QLoRA."""

    loads: ClassVar[bool] = True

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

    def __post_init__(self) -> None:
        super().__post_init__()
        options = {"type": TYPES, "compute_dtype": DTYPES, "quant_storage": STORAGE}
        for option, valid in options.items():
            if getattr(self, option) not in valid:
                raise ValueError(
                    f"quantizer.{option} is {getattr(self, option)!r}; valid: {', '.join(valid)}. Set quantizer.{option}={valid[0]}"
                )
        if self.threshold < 0:
            raise ValueError(f"quantizer.threshold is {self.threshold}; at least 0. Set quantizer.threshold=6.0")
        if self.type == "int8" and self.quant_storage != "uint8":
            raise ValueError(f"quantizer.quant_storage={self.quant_storage} is for nf4 and fp4. Set quantizer.quant_storage=uint8")
        self.weight = grid(self.type, self.double_quant)

    def swap(self, model: nn.Module, linear: dict[str, Any]) -> None:
        """bitsandbytes' layers in place of ``linear``."""
        from qtrain.bnb import swap

        self._report(swap(model, linear, self))

    def settings(self, skip: list[str]) -> Any:
        """transformers' config that makes it read weights straight into these layers; modules in ``skip`` stay in float."""
        from qtrain.bnb import exactly, settings

        return settings(self, [exactly(name) for name in skip])

    def settle(self, model: nn.Module) -> None:
        """Make a model that was read so compute with its codes."""
        from qtrain.bnb import settle

        self._report(settle(model))

    def _report(self, wrong: list[str]) -> None:
        why = (
            "bitsandbytes decodes rows of this length wrongly on this processor (its AVX-512 kernel takes the scales of other blocks), so "
            "a layer of qtrain's computes with the same codes"
        )
        self.fallbacks += [{"name": name, "why": why} for name in wrong]


def grid(type: str, double_quant: bool) -> Any:
    """The grid that bitsandbytes' weights are on."""
    if type == "int8":
        return get("grid", "affine")(bits=8, granularity="channel", rule="absmax")
    return get("grid", type)(double_quant=double_quant)
