"""The receipt of a transformers folder: what plain transformers makes of it, against training.

loading        no parameter is missing, and no tensor is left over
float weights  every weight without codes is training's, rounded once to the folder's type
logits         of the evaluation text or test split: NMSE, largest difference, share of equal arg-max; and the metrics
tokenizer      the same ids of varied strings, and the same text of a chat
generation     both write the same tokens greedily. Where they part, training must have found both tokens equally likely, up to twice
               the largest difference of any logit on the evaluation text: then no more than rounding decided
16-bit types   the folder also computes in its own type: finite logits, and how far they are from those in float32
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from exporters.base import Artefact, ExportJob, Inputs, greedy
from exporters.gguf.strings import varied_strings
from exporters.transformers_folder.about import quiet
from exporters.transformers_folder.contents import TORCH, layers_of
from qtrain.receipt import Receipt, differing, nmse

if TYPE_CHECKING:
    from exporters.transformers_folder import TransformersFolder
    from exporters.transformers_folder.session import Session

PROMPT = 16
"""Tokens of the evaluation text that generation goes on from."""
STRINGS = 200
"""Varied strings that both tokenizers are given."""
SHORT = 64
"""Tokens that are computed in the folder's own type, which few CPUs are fast at."""
CHAT = [
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Oh?"},
]


def prove(exporter: TransformersFolder, job: ExportJob, artefact: Artefact, session: Session, receipt: Receipt) -> None:
    """Fill in ``receipt``; see the module."""
    receipt.add_check("loading", loading(job, session))
    receipt.add_check("float weights", float_weights(job, session, exporter.dtype))
    if artefact.adapter_path is not None:
        receipt.add_check("adapter", adapter(artefact, session))
    compute = str(next(p.dtype for p in [*job.model.parameters(), *job.model.buffers()] if p.is_floating_point())).removeprefix("torch.")
    session.value("compute", dtype=compute)
    switched = ", without bitsandbytes' AVX512-BF16 kernels" if "quantization_config" in session.about["config"] else ""
    receipt.checks["computed in"] = f"passed: {compute}, from the folder's {exporter.dtype} values{switched}"
    if job.comparison is None:
        exporter.compare_logits(job, artefact, receipt)
    else:
        outputs(exporter, job, session, receipt)
    receipt.add_check("tokenizer", tokenizer(job.processor, session))
    if job.task == "language" and exporter.generate:
        receipt.add_check("generation", generation(job, session, exporter.generate, receipt.logits_max_abs))
    if exporter.dtype != "float32":
        receipt.add_check(exporter.dtype, own_type(job, session, exporter.dtype))


def loading(job: ExportJob, session: Session) -> str:
    """Whether the folder and transformers' model have the same parameters."""
    about = session.about
    missing = [name for name in about["missing"] if job.task != "embedding" or not name.startswith("pooler.")]
    for what, names in (("missing in", missing), ("left over of", about["unexpected"])):
        if names:
            return f"failed: {len(names)} tensors are {what} the folder, the first {names[0]}"
    return f"passed: {about['class']}, in a process that cannot import qtrain"


def float_weights(job: ExportJob, session: Session, dtype: str) -> str:
    """Compare every weight without codes, as loaded."""
    layers = layers_of(job.model)
    count = 0
    for name, value in job.model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in layers and leaf != "bias":
            continue
        expected = value.detach().cpu()
        expected = expected.to(TORCH[dtype]).float() if expected.is_floating_point() else expected.float()
        loaded = session.tensor("tensor", name=name)
        wrong = differing(expected, loaded) if expected.shape == loaded.shape else expected.numel()
        if wrong:
            return f"failed: {name} differs in {wrong} of {expected.numel()} values"
        count += 1
    return f"passed: {count} tensors are training's, in {dtype}"


def adapter(artefact: Artefact, session: Session) -> str:
    """Load the adapter beside the base with plain peft; from here on the session computes with both."""
    found = session.value("adapter", folder=str(artefact.adapter_path))
    if found["lost"]:
        return (
            f"failed: {len(found['lost'])} tensors of the adapter have no place in the base, or are missing, the first {found['lost'][0]}"
        )
    return f"passed: peft {found['version']} loads it beside the folder, {found['layers']} layers"


def outputs(exporter: TransformersFolder, job: ExportJob, session: Session, receipt: Receipt) -> None:
    """Compare the logits, or embeddings, of every sequence with training's."""
    comparison = job.comparison
    for index, ids in enumerate(comparison.sequences):
        job.tell(f"transformers on the evaluation text, {index + 1} of {len(comparison.sequences)} sequences")
        given: dict[str, Any] = {"do": "logits", "input_ids": [ids]}
        if job.task == "embedding":
            given = {"do": "embed", "ids": ids, "pooling": job.model.pooling}
        for start, rows in session.rows(**given):
            comparison.add(index, start, rows)
    result = comparison.result()
    receipt.add_agreement(result["nmse"], result["max_abs"], result["top1_agreement"], exporter.tolerances)
    receipt.add_metrics(result["training"], result["runtime"], exporter.tolerances)


def tokenizer(ours: Any, session: Session) -> str:
    """Compare the ids of varied strings, and the text of a chat."""
    texts = varied_strings(STRINGS, [str(token) for token in ours.all_special_tokens])
    with quiet():  # some are longer than the model reads
        expected = [ours(text)["input_ids"] for text in texts]
    for text, a, b in zip(texts, expected, session.value("tokenize", texts=texts)["ids"], strict=True):
        if a != b:
            return f"failed: {text!r} is {a[:12]} in training and {b[:12]} in the folder"
    if getattr(ours, "chat_template", None) is None:
        return f"passed: {len(texts)} varied strings have the same ids; there is no chat template"
    trained = ours.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    chat = session.value("chat", messages=CHAT)["text"]
    if chat != trained:
        return f"failed: the chat template gives {chat!r}, in training {trained!r}"
    return f"passed: {len(texts)} varied strings have the same ids, and a chat the same text"


@torch.inference_mode()
def generation(job: ExportJob, session: Session, count: int, noise: float) -> str:
    """Generate greedily from the start of the evaluation text on both sides."""
    prompt = max(job.comparison.sequences, key=len)[:PROMPT]
    model: Any = job.whole
    with quiet():  # of settings for sampling in the generation config
        ours = greedy(model, prompt, count)
    theirs = session.value("generate", ids=prompt, count=count)["ids"]
    if ours == theirs:
        return f"passed: the same {len(ours)} greedy tokens: {job.processor.decode(ours)!r}"
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if same == min(len(ours), len(theirs)):
        return f"failed: training stops after {len(ours)} tokens, the folder after {len(theirs)}"
    logits = model(input_ids=torch.tensor([prompt + ours[:same]])).logits[0, -1].float()
    gap = float(logits[ours[same]] - logits[theirs[same]])
    if gap <= 2 * noise:
        return f"passed: the first {same} of {len(ours)} greedy tokens are the same; then two are equally likely (logits {gap:.2g} apart)"
    return f"failed: from token {same} on the folder writes {theirs[same:][:8]}, training {ours[same:][:8]}, by {gap:.3g} in its logits"


def own_type(job: ExportJob, session: Session, dtype: str) -> str:
    """Compute one sequence in float32 and in the folder's own type. The session stays in that type."""
    if job.comparison is None:
        given = {name: [rows[0]] for name, rows in as_lists(job.batches[0][0]).items()}
    else:
        given = {"input_ids": [job.comparison.sequences[0][:SHORT]]}
    asked: dict[str, Any] = {"do": "logits", **given}
    if job.task == "embedding":
        asked = {"do": "embed", "ids": given["input_ids"][0], "pooling": job.model.pooling}
    session.value("compute", dtype="float32")
    reference = session.tensor(**asked)
    session.value("compute", dtype=dtype)
    found = session.tensor(**asked)
    if not bool(found.isfinite().all()):
        return f"failed: outputs that are computed in {dtype} are not finite. Set export.transformers.dtype=bfloat16 or float32"
    return f"passed: computed in {dtype}, outputs are off by an nmse of {nmse(reference, found):.1e}"


def as_lists(inputs: Inputs) -> dict[str, list[Any]]:
    """Inputs as json holds them."""
    return {name: value.tolist() for name, value in inputs.items()}
