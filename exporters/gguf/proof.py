"""The receipt of a GGUF file, made in llama.cpp: what it computes, how it tokenizes, what it writes, and how fast it is.

    logits         at every scored position of the evaluation text: NMSE, largest difference, share of equal arg-max
    perplexity     of the same tokens on both sides, and KL divergence and agreement with the float model
    tokenization   1,000 varied strings, and the evaluation text: the same ids from transformers and from llama.cpp
    generation     the longest common prefix of what both write greedily; not a pass or fail, since one flip changes all that follows
    speed          tokens per second for a prompt and for generation, beside the float file, interleaved

Logits stream through `job.comparison`, a few hundred tokens at a time.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from exporters.base import Artefact, ExportJob, greedy
from exporters.gguf import adapter
from exporters.gguf.llama import Llama, probe
from qtrain.receipt import Receipt

if TYPE_CHECKING:
    from exporters.gguf import Gguf

PROMPT = 16
"""Tokens of the evaluation text that generation goes on from."""
SPEED_RUNS = 3


def prove(exporter: Gguf, job: ExportJob, artefact: Artefact, receipt: Receipt) -> None:
    """Fill in ``receipt``; see the module."""
    longest = max(map(len, job.comparison.sequences))
    embeds = job.task == "embedding"
    room = longest if embeds else max(longest, PROMPT + exporter.generate)
    beside: dict[str, Any] = {} if artefact.adapter_path is None else {"adapter": str(artefact.adapter_path)}
    probe(artefact.path, embeddings=embeds, **beside)  # in a child process: llama.cpp aborts on some damaged files
    if artefact.adapter_path is not None:
        receipt.add_check("adapter", adapter.compare(artefact.adapter_path, job))
    with Llama(artefact.path, context=room, threads=exporter.threads, embeddings=embeds, **beside) as llama:
        compare_outputs(exporter, job, llama, receipt)
        alone = hasattr(job.comparison, "fresh")  # a streamed run: PyTorch never saw the model
        receipt.add_check("tokenization", tokenization(exporter, job.processor, llama, receipt))
        if not embeds and receipt.passed and job.training_logits is not None:
            receipt.checks["generation"] = generation(job, llama, exporter.generate)
    if alone and artefact.float_path is not None:
        with Llama(artefact.float_path, context=room, threads=exporter.threads) as llama:
            alongside = job.comparison.fresh()
            feed(job, llama, alongside)
            job.comparison.float_metrics = alongside.result()["runtime"]
    if receipt.passed and not embeds:
        receipt.tokens_per_s = speed(exporter, artefact)


def compare_outputs(exporter: Gguf, job: ExportJob, llama: Llama, receipt: Receipt) -> None:
    """Compare llama.cpp's logits, or embeddings, of every sequence with training's."""
    feed(job, llama, job.comparison)
    result, tolerances = job.comparison.result(), exporter.tolerances
    if result["nmse"] is None:
        receipt.metric = {name: {"training": None, "runtime": value} for name, value in result["runtime"].items()}  # type: ignore[dict-item]
        return
    receipt.add_agreement(result["nmse"], result["max_abs"], result["top1_agreement"], tolerances)
    receipt.add_metrics(result["training"], result["runtime"], tolerances)


def feed(job: ExportJob, llama: Llama, comparison: Any) -> None:
    """Give a comparison what llama.cpp makes of its sequences."""
    for index, ids in enumerate(comparison.sequences):
        job.tell(f"llama.cpp on the evaluation text, {index + 1} of {len(comparison.sequences)} sequences")
        if job.task == "embedding":
            comparison.add(index, 0, llama.embed(ids)[None])
            continue
        for start, logits in llama.logits_chunks(ids):
            comparison.add(index, start, logits)


def tokenization(exporter: Gguf, tokenizer: Any, llama: Llama, receipt: Receipt) -> str:
    """Compare the ids of varied strings: "passed: …", "failed: …" or "not run: …"; what llama.cpp cannot do is a fallback."""
    from exporters.gguf.comparison import compare
    from exporters.gguf.strings import varied_strings

    if not exporter.strings:
        return "not run: export.gguf.strings=0"
    texts = varied_strings(exporter.strings, [str(token) for token in tokenizer.all_special_tokens])
    found = compare(tokenizer, lambda text: llama.tokenize(text, add_special=False, parse_special=True), texts, exporter.pre_tokenizer)
    receipt.fallbacks += [{"name": "tokenization", "why": f"{why} ({n} of {len(texts)} varied strings)"} for why, n in found.beyond.items()]
    return found.describe()


def generation(job: ExportJob, llama: Llama, count: int) -> str:
    """Generate greedily from the start of the evaluation text on both sides."""
    prompt = max(job.comparison.sequences, key=len)[:PROMPT]
    ours, theirs = greedy(job.whole, prompt, count), llama.greedy(prompt, count)
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"passed: the first {same} of {max(len(ours), len(theirs))} greedy tokens are the same: {llama.detokenize(theirs[:same])!r}"


def speed(exporter: Gguf, artefact: Artefact) -> dict[str, dict[str, float]]:
    """Tokens per second, medians of interleaved runs."""
    paths = {"quantized": artefact.path} | ({"float": artefact.float_path} if artefact.float_path is not None else {})
    opened = {
        name: Llama(path, context=256, threads=exporter.threads, adapter=artefact.adapter_path if name == "quantized" else None)
        for name, path in paths.items()
    }
    try:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in opened}
        for _ in range(SPEED_RUNS):
            for name, llama in opened.items():
                runs[name].append(llama.speed(prompt=128, generate=16))
        return {n: {k.removesuffix("_tokens_per_s"): median(r[k] for r in rs) for k in rs[0]} for n, rs in runs.items()}
    finally:
        for llama in opened.values():
            llama.close()
