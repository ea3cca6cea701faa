"""How near to the float model training starts: rounding alone (LoRA with B = 0), and LoftQ's base and adapter together.

    python -m benchmarks.loftq_start --model ../shared/data/stories15M --test ../shared/data/tinystories/eval.jsonl \\
        --train ../shared/data/tinystories/calibration.txt --rank 32

KL divergence to the float model, nats per token of held-out text, before any step of training; every Linear but the head is on the grid.
"error" is the squared error of the weights, base plus adapter, as a share of their squares.
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import torch
from torch import nn

from benchmarks._common import markdown, start
from qtrain import registry
from qtrain.adapters.lora import Lora
from qtrain.console import console
from qtrain.data.text import TextCorpus
from qtrain.language_task import TASK
from qtrain.loftq import start_near
from qtrain.lora import attach
from qtrain.merging import base_weight, lora_layers, merged_weight
from qtrain.models.causal_lm import CausalLm
from qtrain.quantizers.rtn import Rtn

GRIDS = {"nf4": {}, "q4_0": {"type": "q4_0"}, "nf3": {}, "q3_k": {"type": "q3_k"}, "nf2": {}, "q2_k": {"type": "q2_k"}}


def started(float_model: Any, grid: Any, args: argparse.Namespace, rounds: int) -> tuple[Any, float]:
    """The base with its adapter, and its weights' error; ``rounds`` 0 is LoRA as usual."""
    model = copy.deepcopy(float_model)
    heads = [n for n, m in model.named_modules() if m is model.get_output_embeddings() or m is model.get_input_embeddings()]
    scheme, options = Rtn(weight=grid), Lora(rank=args.rank, alpha=args.rank)
    grids = {
        n: g for n, g in scheme.weight_grids(model, heads).items() if grid.check_shape(tuple(model.get_submodule(n).weight.shape)) is None
    }
    scheme.include = list(grids)
    starts = start_near(model, grids, args.rank, options.scaling, rounds) if rounds else {}
    model, _ = scheme.prepare(model, [])
    adapter = attach(scheme.convert(scheme.calibrate(model, [])), options, "language", heads)
    for name, (a, b) in starts.items():
        adapter.start(name, a, b)
    error = energy = 0.0
    with torch.no_grad():
        for name, layer in lora_layers(adapter.model).items():
            if name in grids:
                w: nn.Parameter = float_model.get_submodule(name).weight
                error += float((merged_weight(layer, base_weight(layer.get_base_layer())) - w).square().sum())
                energy += float(w.square().sum())
    return adapter.model.eval(), error / energy


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--train", required=True, help="not used, but cut off from the test text")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--grids", nargs="*", default=list(GRIDS))
    args = parser.parse_args()
    start()
    source = CausalLm(args.model)
    tokenizer, float_model = source.processor(), source.build()
    data = TextCorpus(train=args.train, test=args.test, long_documents="cut", eval_tokens=args.tokens).build(tokenizer, 0)
    batches = list(data.test_dataloader())
    reference = TASK.predict(float_model, batches, "float")
    rows = []
    for name in args.grids:
        grid = registry.get("grid", "ggml" if GRIDS[name] else name)(**GRIDS[name])
        found = []
        for rounds in (0, args.rounds):
            model, error = started(float_model, grid, args, rounds)
            kl = TASK.measure(TASK.predict(model, batches, name), batches, reference)["kl"]
            found.append((kl, error))
        (plain, e0), (near, e1) = found
        rows.append([name, f"{plain:.4f}", f"{near:.4f}", f"{near / plain:.2f}" if plain else "", f"{100 * e0:.3f} %", f"{100 * e1:.3f} %"])
        console.print(" | ".join(rows[-1]))
        assert math.isfinite(near)
    print("\n" + markdown(["base", "KL, LoRA with B = 0", f"KL, LoftQ, rank {args.rank}", "ratio", "error", "error, LoftQ"], rows))


if __name__ == "__main__":
    main()
