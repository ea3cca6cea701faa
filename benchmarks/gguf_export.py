"""Seconds and memory of float -> quantized GGUF: qtrain tensor by tensor (stream=true) against llama-quantize.

    python -m benchmarks.gguf_export --mixes q4_k_m q4_0 --threads 1

The default model is the sample, SmolLM2-135M. Each is a process of its own, in turn. llama-quantize reads a float16 GGUF, qtrain the
transformers folder (float32 for the sample, since its weights are no float16 numbers); neither counts its start-up. Memory: the peak of the
process, and what it rose by from when everything was imported, since Python, torch and transformers are some 400 MB before any work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks._common import markdown, start
from benchmarks._llama_quantize import llama_quantize
from benchmarks.gguf_perplexity import keys
from exporters.gguf.write import entries, write
from qtrain import registry
from qtrain.models.causal_lm import CausalLm
from qtrain.peak import peak_rss_bytes
from qtrain.quantizers.rtn import Rtn
from qtrain.streaming import halved, streamed


def child(model: str | None, mix: str, target: Path, threads: int) -> dict[str, float]:
    """One export; {"seconds", "peak_bytes", "rise_bytes"}."""
    import torch

    torch.set_num_threads(threads)
    start()
    source = CausalLm(model)
    tokenizer = source.processor()
    skeleton, weights = source.skeleton()
    about = keys(skeleton, tokenizer)
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    if mix == "f16":
        converted = streamed(halved(skeleton), weights)
    else:
        converted = streamed(Rtn(weight=registry.get("grid", mix)()).prepare(skeleton, [])[0], weights)
    write(target, about, entries(converted, "f16"))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": peak_rss_bytes(), "rise_bytes": max(0, peak_rss_bytes() - before)}


def ours(model: str | None, mix: str, target: Path, threads: int) -> dict[str, Any]:
    """`child` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gguf_export", "--child", mix, str(target), "--threads", str(threads)]
    done = subprocess.run([*command, *(["--model", model] if model else [])], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--mixes", nargs="*", default=["q4_k_m"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2, default=None)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.model, args.child[0], Path(args.child[1]), args.threads)))
        return

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = folder / "f16.gguf"
        ours(args.model, "f16", reference, args.threads)
        size = reference.stat().st_size
        for mix in args.mixes:
            runs = []
            for _ in range(args.rounds):
                mine = ours(args.model, mix, folder / "ours.gguf", args.threads)
                theirs = llama_quantize(reference, folder / "theirs.gguf", mix, threads=args.threads)
                runs.append((mine, theirs))
                print(mix, mine, theirs, flush=True)
            times = f"{median(m['seconds'] for m, _ in runs):.1f}", f"{median(t['seconds'] for _, t in runs):.1f}"
            ratio = median(m["seconds"] / t["seconds"] for m, t in runs)
            peak, rise = (median(m[key] for m, _ in runs) for key in ("peak_bytes", "rise_bytes"))
            theirs_peak = median(t["peak_bytes"] for _, t in runs)
            rows.append([mix, *times, f"{ratio:.2f} x", *(f"{b / 1e6:.0f} ({b / size:.2f} x)" for b in (peak, rise, theirs_peak))])
    head = ["mix", "qtrain, s", "llama-quantize, s", "ratio", "peak, MB (x float16 file)", "rise, MB", "llama-quantize's peak, MB"]
    print("\n" + markdown(head, rows))


if __name__ == "__main__":
    main()
