"""Four ways to deploy an adapter, after the same number of steps on the same text, all in the same llama.cpp.

    python -m benchmarks.lora_merges --model ../shared/data/stories15M --test ../shared/data/tinystories/eval.jsonl \\
        --train ../shared/data/tinystories/calibration.txt --steps 200

    1 apart         NF4 base, LoRA beside it (bitsandbytes and peft); PyTorch only: it is no file
    2 float         merged into the decoded base, float16 GGUF
    3 rounded       merged and rounded to Q4_0
    4 consistent    trained with Q(W + s * B A) on Q4_0, packed as trained

`qtrain` measures the first three in one run, so this is two runs of the command line's own pipeline.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks._common import composed, markdown, start, text_options, text_overrides
from qtrain.run import run


def finished(overrides: list[str], folder: Path) -> dict[str, Any]:
    """run.json of a run."""
    cfg = composed([*overrides, "adapter.sample=null"])
    run(OmegaConf.to_object(cfg), OmegaConf.to_container(cfg, resolve=False), folder)  # type: ignore[arg-type]
    return dict(json.loads((folder / "run.json").read_text()))


def runtime(result: dict[str, Any]) -> dict[str, float]:
    """Perplexity on both sides of the receipt."""
    return dict(result["exports"][0]["receipt"]["metric"]["perplexity"])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text_options(parser, steps=200, learning_rate=2e-4)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    start()
    common = [
        *text_overrides(args),
        "adapter.fit.epochs=1000",
        f"adapter.fit.max_steps={args.steps}",
        f"adapter.fit.learning_rate={args.learning_rate}",
    ]
    common += [f"adapter.rank={args.rank}", f"adapter.alpha={2 * args.rank}", "export.gguf.strings=50"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rounded = finished(["+recipe=qlora_smollm2", *common], folder / "rounded")
        merged = finished(["+recipe=qlora_smollm2", "adapter.merge=float", *common], folder / "float")
        inside = finished(["+recipe=qat_lora_q4_0_smollm2", *common], folder / "inside")
    stages = rounded["stages"]
    rows = [
        ["float model, not tuned", f"{stages['float']['perplexity']:.4f}", "", ""],
        ["NF4, not tuned", f"{stages['ptq']['perplexity']:.4f}", "", ""],
        ["Q4_0, not tuned", f"{inside['stages']['ptq']['perplexity']:.4f}", "", ""],
        ["1 QLoRA, apart", f"{stages['adapter']['perplexity']:.4f}", "", ""],
    ]
    for title, result in (("2 merged, float16", merged), ("3 merged, rounded to Q4_0", rounded), ("4 trained inside Q4_0, packed", inside)):
        pair = runtime(result)
        difference = f"{100 * (pair['runtime'] / pair['training'] - 1):+.2f} %"
        rows.append([title, f"{pair['training']:.4f}", f"{pair['runtime']:.4f}", difference])
    print("\n" + markdown([f"{args.steps} steps, rank {args.rank}", "PyTorch", "llama.cpp", "difference"], rows))


if __name__ == "__main__":
    main()
