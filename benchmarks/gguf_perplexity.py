"""Perplexity of every mix in llama.cpp: qtrain's files (plain, and weighed by an importance matrix) against llama-quantize's own.

    python -m benchmarks.gguf_perplexity --model ../shared/data/stories15M --test ../shared/data/tinystories/eval.jsonl \\
        --calibration ../shared/data/tinystories/calibration.txt
    python -m benchmarks.gguf_perplexity --model FOLDER --test ../shared/data/wikitext2/wiki.test.raw \\
        --calibration ../shared/data/wikitext2/wiki.train.part1MB.txt --mixes q4_k_m q4_0 --context 512 --tokens 16384

Both quantize the same float model (llama-quantize from its float32 GGUF), both files run in the same llama.cpp over the same windows.
"PyTorch" is qtrain's converted model; the difference to llama.cpp is what its 8-bit activations and float16 cache do. llama-quantize gets
the importance matrix that qtrain measured, as a file.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import markdown, start
from benchmarks._llama_quantize import llama_quantize
from exporters.gguf import Gguf
from exporters.gguf.architectures import metadata
from exporters.gguf.llama import Llama
from exporters.gguf.tokenizers import vocabulary
from exporters.gguf.write import entries, read_back, write
from qtrain import registry
from qtrain.console import console
from qtrain.data.text import TextCorpus
from qtrain.evaluate import Batch
from qtrain.imatrix import save
from qtrain.language_task import TASK, Comparison, LanguageOutputs
from qtrain.models.causal_lm import CausalLm
from qtrain.quantizers.rtn import Rtn
from qtrain.receipt import differing

MIXES = (
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q5_0",
    "q5_1",
    "q4_k_m",
    "q4_k_s",
    "q4_1",
    "q4_0",
    "q3_k_l",
    "q3_k_m",
    "q3_k_s",
    "q2_k",
    "f16",
    "bf16",
)


class Text:
    """The evaluation and calibration text, and the float model's outputs."""

    def __init__(self, args: argparse.Namespace) -> None:
        source = CausalLm(args.model)
        self.tokenizer = source.processor()
        self.model: Any = source.build()
        corpus = TextCorpus(
            train=args.calibration, test=args.test, context=args.context, eval_tokens=args.tokens, long_documents=args.long_documents
        )
        data = corpus.build(self.tokenizer, 0)
        self.batches = list(data.test_dataloader())
        self.calibration = [inputs for inputs, _ in data.calibration_dataloader()]
        self.float = TASK.predict(self.model, self.batches, "float")


def in_llama(file: Path, outputs: LanguageOutputs, batches: list[Batch]) -> dict[str, Any]:
    """llama.cpp's metrics on a text, compared with ``outputs``."""
    comparison = Comparison(outputs, batches, None)
    with Llama(file, context=max(map(len, comparison.sequences))) as llama:
        for index, ids in enumerate(comparison.sequences):
            for start, logits in llama.logits_chunks(ids):
                comparison.add(index, start, logits)
    return comparison.result()


def keys(model: Any, tokenizer: Any) -> Any:
    """Metadata of a file."""
    config = model.config.get_text_config()
    return metadata(config, {"general.name": "benchmark"}, task="language") + vocabulary(tokenizer, config.vocab_size)


def quantized(text: Text, mix: str, imatrix: bool, inputs: bool = False) -> tuple[Any, Rtn]:
    """The model on a mix, and the quantizer that put it there; with ``inputs``, those of products are rounded as llama.cpp's kernels do."""
    scheme = Rtn(
        weight=registry.get("grid", mix)(), imatrix=imatrix, activation=registry.get("grid", "ggml_activation")() if inputs else None
    )
    model, _ = scheme.prepare(copy.deepcopy(text.model, {id(p): p for p in text.model.parameters()}), [])
    model = scheme.calibrate(model, text.calibration if imatrix else [])
    return scheme.convert(model), scheme


def one(text: Text, mix: str, folder: Path, reference: Path, use_imatrix: bool, inputs: bool) -> list[Any]:
    """A row of the table."""
    rounded = None
    if inputs:
        model, _ = quantized(text, mix, use_imatrix, inputs=True)
        rounded = TASK.measure(TASK.predict(model, text.batches, mix), text.batches)["perplexity"]
    model, scheme = quantized(text, mix, use_imatrix)
    outputs = TASK.predict(model, text.batches, mix)
    ours, theirs, matrix = folder / "ours.gguf", folder / "theirs.gguf", folder / "imatrix.gguf"
    write(ours, keys(text.model, text.tokenizer), entries(model, "f16"))
    expected = Gguf().packed(model)
    exact = sum(not differing(expected.pop(name)(), value) for name, value in read_back(ours) if name in expected)
    total = exact + len(expected)
    if use_imatrix:
        save(matrix, model, scheme.importance)
    llama_quantize(reference, theirs, mix, matrix if use_imatrix else None)
    result = in_llama(ours, outputs, text.batches)
    other = in_llama(theirs, outputs, text.batches)
    training, runtime, peer = result["training"]["perplexity"], result["runtime"]["perplexity"], other["runtime"]["perplexity"]
    return [
        mix + (", imatrix" if use_imatrix else ""),
        f"{exact} of {total}",
        f"{training:.4f}",
        f"{runtime:.4f}",
        f"{100 * (runtime / training - 1):+.2f} %",
        *([f"{rounded:.4f}", f"{100 * (runtime / rounded - 1):+.2f} %"] if rounded is not None else []),
        f"{peer:.4f}",
        f"{100 * (runtime / peer - 1):+.2f} %",
        f"{ours.stat().st_size / 1e6:.2f}",
        f"{theirs.stat().st_size / 1e6:.2f}",
    ]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="transformers folder or GGUF file")
    parser.add_argument("--test", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--mixes", nargs="*", default=list(MIXES))
    parser.add_argument("--context", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=None, help="of the test text, at most")
    parser.add_argument("--long-documents", default="cut")
    parser.add_argument("--no-imatrix", action="store_true")
    parser.add_argument("--inputs", action="store_true", help="also PyTorch with the inputs of products rounded as llama.cpp's kernels do")
    args = parser.parse_args()
    start()
    text = Text(args)
    console.print(f"float32: perplexity {TASK.measure(text.float, text.batches)['perplexity']:.4f} of {len(text.float)} tokens")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = folder / "float.gguf"
        write(reference, keys(text.model, text.tokenizer), entries(text.model, "f32"))
        for mix in args.mixes:
            for use_imatrix in (False, True) if not args.no_imatrix and "_k" in mix else (False,):
                with torch.inference_mode():
                    rows.append(one(text, mix, folder, reference, use_imatrix, args.inputs))
                console.print(" | ".join(map(str, rows[-1])), soft_wrap=True)
    head = ["mix", "tensors bit-exact", "PyTorch", "llama.cpp", "difference"]
    head += ["PyTorch, 8-bit inputs", "llama.cpp to that"] if args.inputs else []
    head += ["llama-quantize's file", "ours to theirs", "MB", "theirs, MB"]
    print("\n" + markdown(head, rows))


if __name__ == "__main__":
    main()
