"""GGUF for llama.cpp, Ollama and everything built on them: the codes of training, byte for byte, and the proof from llama.cpp itself.

`llama-quantize` rounds a float file; what QAT had put on a grid is rounded a second time, onto another one. Here nothing is rounded: each
layer's codes and scales are packed into the blocks of its ggml type (`qtrain/grids/ggml`), everything without codes is written in
`float_type`. The files of an artefact:

    <name>-lora.gguf   an adapter that stays beside the model, for llama.cpp's --lora
    <name>.gguf        the model; of a split one <name>-00001-of-0000N.gguf …
    Modelfile          for `ollama create NAME -f Modelfile`: template, stop tokens and context, from the tokenizer's chat template
    imatrix.gguf       the importances that weighed the rounding, where they were measured, for llama-quantize's --imatrix

Which tensor has which name and transformation is in `architectures.py`, the tokenizer in `tokenizers.py`, the file in `write.py`, the
receipt in `proof.py`, and llama.cpp in `llama.py`. The receipt's runtime rounds the *inputs* of its products to 8 bits on the CPU, which
PyTorch does not unless training had `grid@quantizer.activation=ggml_activation`; the tolerances are for that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporters.base import Artefact, Exporter, ExportJob, Inputs, packed_layers, packed_weights
from qtrain.lazy import lazy_import
from qtrain.receipt import Latency, Receipt, Tolerances
from qtrain.registry import register

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy_import("torch")

FLOAT_TYPES = ("f32", "f16", "bf16")
_SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@register("export", "gguf")
@dataclass
class Gguf(Exporter):
    """llama.cpp / Ollama: GGUF with training's own codes, a Modelfile, and a receipt from llama.cpp."""

    tasks: ClassVar[tuple[str, ...]] = ("language", "embedding")
    streams: ClassVar[bool] = True
    floats: ClassVar[bool] = True

    tolerances: Tolerances = field(default_factory=lambda: Tolerances(logits_nmse=1e-2, top1_agreement=0.9, metric=0.02))
    """How far llama.cpp may be from training."""
    name: str | None = None
    """Stem of the file's name; null is the recipe's name."""
    float_type: str = "f16"
    """Type of weights that have no codes: f32, f16 or bf16. Vectors (norms, biases) are f32."""
    split: str | None = None
    """Largest size of one file (2G, 500M); null writes one file."""
    pre_tokenizer: str | None = None
    """Name of the pre-tokenizer (`tokenizer.ggml.pre`) of a byte-level BPE that qtrain does not recognise."""
    num_ctx: int | None = None
    """Context that the Modelfile sets, tokens; null is the smaller of the model's and 4096."""
    compare_float: bool = True
    """Write the float model too, in float_type, and measure its size and speed; it is not kept."""
    threads: int | None = None
    """Threads of llama.cpp; null is one per usable core."""
    strings: int = 1000
    """Strings on which tokenization is compared."""
    generate: int = 32
    """Tokens that both sides generate greedily."""

    def __post_init__(self) -> None:
        if self.float_type not in FLOAT_TYPES:
            raise ValueError(
                f"export.gguf.float_type is {self.float_type!r}; valid: {', '.join(FLOAT_TYPES)}. Set export.gguf.float_type=f16"
            )
        if self.name is not None and not re.fullmatch(r"[\w.+-]+", self.name):
            raise ValueError(f"export.gguf.name is {self.name!r}; it is part of a file's name. Set export.gguf.name=my-model, say")
        if self.strings < 0 or self.generate < 1:
            raise ValueError(
                f"export.gguf.strings is {self.strings} and generate {self.generate}; at least 0 and 1. "
                "Set export.gguf.strings=1000 export.gguf.generate=32"
            )
        self.split_bytes = size_bytes(self.split)
        """`split` in bytes."""

    @property
    def runtime_version(self) -> str:
        from exporters.gguf.libllama import library

        return str(library().version)

    def preflight(self, model: nn.Module, task: str, processor: Any) -> None:
        """See `Exporter.preflight`; also the architecture, the tokenizer, and whether there is a llama.cpp."""
        from exporters.gguf.architectures import describe
        from exporters.gguf.contents import entries
        from exporters.gguf.tokenizers import vocabulary

        pooling = getattr(model, "pooling", None)
        if task in self.tasks:
            describe(model.config, pooling)  # first what a user can do nothing about
        super().preflight(model, task, processor)
        entries(model, self.float_type, pooling)
        config: Any = model.config
        vocabulary(processor, int(config.get_text_config().vocab_size), self.pre_tokenizer)
        self.runtime_version  # noqa: B018 (raises where there is none)

    def refusals(self, model: nn.Module) -> list[str]:
        """Layers whose grid no ggml type is."""
        from exporters.gguf.pack import refusal

        found = []
        for name, layer in packed_layers(model).items():
            why = refusal(layer)
            if why:
                found.append(f"{name}: {why}")
        return found

    def write(self, job: ExportJob, folder: Path) -> Artefact:
        """The model, its Modelfile, its importances, and the float model to compare with."""
        from exporters.gguf import adapter
        from exporters.gguf.architectures import describe, metadata
        from exporters.gguf.contents import left_out
        from exporters.gguf.modelfile import modelfile, shortfalls
        from exporters.gguf.tokenizers import vocabulary
        from exporters.gguf.write import entries, write
        from qtrain.imatrix import save

        config: Any = job.model.config
        vocabulary_keys = vocabulary(job.processor, int(config.get_text_config().vocab_size), self.pre_tokenizer)
        stem = self.name or job.metadata.get("recipe", "model")
        pooling = getattr(job.model, "pooling", None)
        about = metadata(config, job.metadata | {"general.name": stem}, task=job.task, pooling=pooling) + vocabulary_keys
        files = write(folder / f"{stem}.gguf", about, entries(job.model, self.float_type, pooling), self.split_bytes, job.tell)
        artefact = Artefact(files[0], list(files))
        artefact.fallbacks = [{"name": stem, "why": note} for note in describe(config, pooling)]
        artefact.fallbacks += [
            {"name": name, "why": "no file holds it: embeddings do not need it"} for name in left_out(job.model, pooling)
        ]
        if job.adapter is not None:
            artefact.adapter_path = folder / f"{stem}-lora.gguf"
            adapter.write(artefact.adapter_path, job)
            artefact.files.append(artefact.adapter_path)
        if job.task == "language":
            beside = None if artefact.adapter_path is None else artefact.adapter_path.name
            context = self.num_ctx or min(job.max_length, 4096)
            (folder / "Modelfile").write_text(modelfile(job.processor, files[0].name, context, beside), encoding="utf-8")
            artefact.fallbacks += [{"name": "Modelfile", "why": why} for why in shortfalls(job.processor)]
        if job.importance:
            save(folder / "imatrix.gguf", job.model, job.importance)
        if self.compare_float and job.float_model is not None:
            reference = folder / ".float" / f"{stem}-{self.float_type}.gguf"
            reference.parent.mkdir()
            artefact.float_files = write(reference, about, entries(job.float_model, self.float_type, pooling), None, job.tell)
            artefact.float_path = artefact.float_files[0]
        return artefact

    def refuse_adapter(self, variant: str, others: list[str], model: nn.Module, names: list[str]) -> None:
        """See `Exporter.refuse_adapter`: llama.cpp reads A and B of LoRA."""
        from exporters.gguf.adapter import refuse

        refuse(variant, others, model, names)

    def packed(self, model: nn.Module) -> dict[str, Any]:
        """As every exporter's; a tied head is the embedding's tensor, and is checked as that."""
        from exporters.gguf.write import tied_head

        return {n: decode for n, decode in packed_weights(model).items() if n != tied_head(model)}

    def tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Every packed tensor, decoded by the `gguf` package from the file."""
        from exporters.gguf.write import read_back

        return read_back(path)

    def compare(self, job: ExportJob, artefact: Artefact, receipt: Receipt) -> None:
        """Logits, perplexity, tokenization, generation and speed, in llama.cpp."""
        from exporters.gguf.proof import prove

        try:
            prove(self, job, artefact, receipt)
        finally:
            for file in artefact.float_files:
                file.unlink(missing_ok=True)
            if artefact.float_path is not None:
                artefact.float_path.parent.rmdir()

    def products(self, path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        """None: llama.cpp has no call for a single product; activations are compared through the logits."""
        return iter(())

    def session(self, path: Path, context: int = 512) -> Any:
        """llama.cpp with the file loaded, for texts of ``context`` tokens: its memory of keys and values is allocated at once, and the
        context that a model was trained with may be gigabytes of it."""
        from exporters.gguf.llama import Llama

        return Llama(path, context, threads=self.threads)

    def logits(self, path: Path, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
        """Logits at every position of every sequence, float32 [N, V]; for small texts, `compare` works without holding them."""
        with self.session(path, max(inputs["input_ids"].shape[1] for inputs, _ in batches)) as llama:
            rows = [torch.from_numpy(llama.logits(ids.tolist())) for inputs, _ in batches for ids in inputs["input_ids"]]
        return torch.cat(rows)

    def latency(self, artefact: Artefact, job: ExportJob) -> Latency:
        """Empty: a language model's speed is in tokens per second."""
        return {}


def size_bytes(text: str | None) -> int | None:
    """Bytes of `2G`, `500M`, `1000000`.

    Raises:
        ValueError: if it is none of these.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", str(text).strip().upper())
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"export.gguf.split is {text!r}; valid: a size such as 2G or 500M, or null. Set export.gguf.split=2G, say")
    return int(float(found[1]) * _SIZES[found[2]])
