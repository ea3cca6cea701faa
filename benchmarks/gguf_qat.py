"""What QAT on the deployed grid wins back in llama.cpp, and what is left of QAT on another grid after llama-quantize.

    python -m benchmarks.gguf_qat --model ../shared/data/stories15M --test ../shared/data/tinystories/eval.jsonl \\
        --train ../shared/data/tinystories/calibration.txt --steps 300

Rows, all in the same llama.cpp on the same text, all Q4_0 files of one size:

    float                   the float32 model
    RTN                     rounded to Q4_0 by qtrain; llama-quantize's own file beside it
    QAT on Q4_0             trained on ggml's grid, packed as it is
    torchao QAT, values     trained as long on torchao's int4 grid (groups of 32, absmax / 7.5); the values that it computed with, through
                            llama-quantize
    torchao QAT, weights    the same; its float weights, as most converters take them, through llama-quantize

"recovered" is the share of the perplexity that RTN lost in llama.cpp.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from benchmarks._common import composed, markdown, start, text_options, text_overrides
from benchmarks._llama_quantize import llama_quantize
from benchmarks.gguf_perplexity import in_llama, keys
from exporters.base import packed_layers
from exporters.gguf.write import entries, write
from qtrain.console import console
from qtrain.record import Record
from qtrain.stages import convert, fit_stage, load, measure, quantize

RTN = ["+recipe=gguf_q4_k_m_smollm2", "grid@quantizer.weight=q4_0", "quantizer.imatrix=false"]
QAT = ["+recipe=qat_q4_0_smollm2"]
TORCHAO = [
    *("+recipe=qat_q4_0_smollm2", "quantizer=torchao_qat", "grid@quantizer.weight=affine"),
    *("quantizer.weight.rule=absmax_half", "quantizer.weight.group_size=32"),
]


def stages(overrides: list[str], folder: Path) -> tuple[Any, Any, nn.Module, Any, dict[str, torch.Tensor]]:
    """Setup, float model, converted model, its outputs, and the float weights that training ended with."""
    config: Any = OmegaConf.to_object(composed([*overrides, "export=[]"]))
    setup, float_model = load(config, Record(folder, "benchmark", config.seed, {}), folder)
    setup.record.data["config"] = {}
    outputs = measure(setup, "float", float_model)
    model = quantize(setup, float_model)
    if config.quantizer.trains:
        fit_stage(setup, "qat", model, config.quantizer.fit, config.quantizer.callbacks(), teacher=float_model)
        outputs = measure(setup, "qat", model, outputs)
    else:
        outputs = measure(setup, "ptq", model, outputs)
    weights = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    model, outputs = convert(setup, model, outputs, float_model)
    return setup, float_model, model, outputs, weights


def with_weights(float_model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """A float model of other weights."""
    model = copy.deepcopy(float_model)
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in weights:
                parameter.copy_(weights[name])
    return model


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text_options(parser, steps=300, learning_rate=1e-4)
    args = parser.parse_args()
    start()
    common = text_overrides(args)
    fit = ["quantizer.fit.epochs=1000", f"quantizer.fit.max_steps={args.steps}", f"quantizer.fit.learning_rate={args.learning_rate}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def perplexity(model: nn.Module, float_type: str = "f32", requantize: bool = False) -> float:
            file, target = folder / "model.gguf", folder / "q4_0.gguf"
            write(file, keys(float_model, setup.processor), entries(model, float_type))
            if requantize:
                llama_quantize(file, target, "q4_0")
            return float(in_llama(target if requantize else file, outputs, setup.batches)["runtime"]["perplexity"])

        setup, float_model, model, outputs, _ = stages([*RTN, *common], folder / "rtn")
        base, rtn = perplexity(float_model), perplexity(model)
        rows: list[list[Any]] = [["float", f"{base:.4f}", ""], ["RTN Q4_0, qtrain", f"{rtn:.4f}", "0 %"]]

        def add(title: str, value: float) -> None:
            rows.append([title, f"{value:.4f}", f"{100 * (rtn - value) / (rtn - base):.0f} %" if math.isfinite(value) else ""])
            console.print(" | ".join(rows[-1]))

        add("RTN Q4_0, llama-quantize", perplexity(float_model, requantize=True))
        setup, float_model, model, outputs, _ = stages([*QAT, *common, *fit], folder / "qat")
        add("QAT on Q4_0, packed as trained", perplexity(model))
        setup, float_model, model, outputs, weights = stages([*TORCHAO, *common, *fit], folder / "torchao")
        decoded = {f"{n}.weight": layer.quantized.decode() for n, layer in packed_layers(model).items()}
        add("QAT on torchao's int4, its values, llama-quantize", perplexity(with_weights(float_model, weights | decoded), requantize=True))
        add("QAT on torchao's int4, its float weights, llama-quantize", perplexity(with_weights(float_model, weights), requantize=True))
    print("\n" + markdown(["", "perplexity in llama.cpp", "recovered"], rows))


if __name__ == "__main__":
    main()
