"""A folder that `from_pretrained` loads without qtrain: safetensors, config, tokenizer, and the proof from transformers itself.

    AutoModelForCausalLM                    language models
    AutoModelForSequenceClassification      classifiers of texts
    AutoModel, SentenceTransformer          sentence embeddings

NF4 and FP4 layers are bitsandbytes': their codes are copied into its own checkpoint format (`four_bit.py`), and from_pretrained loads 4-bit
layers. On every other grid a layer is in the folder as the values that its codes decode to: plain transformers has no other place for
them, and computes with them in float. Such a folder is not smaller than the float model's; what it gives is training's model in every
tool that reads transformers folders. Weights without codes are written in `dtype`. A type that does not hold the decoded values to the bit
is refused; float32 holds them always. How the values of some grids fare, in 16-bit types:

    ggml f16, bf16      exact in their own type
    Q4_0, Q5_0          scale times code has up to 15 bits, float16 keeps 11: a quarter (Q5_0: 40 %) of the values are rounded, by at most
                        2^-11 of themselves. llama.cpp's rule reads the same scales and codes out of the rounded values, so a converter
                        that quantizes the folder to that type gets training's codes back; `exact=false` allows that, and the receipt
                        says it
    other grids         float32

The receipt is made in a process that cannot import qtrain (`reader.py`): every weight bit for bit, logits, metrics, the tokenizer's ids,
the chat template, and what the model writes greedily. It computes in float32, from the stored values, so that it is comparable with
training to 1e-6; a folder in a 16-bit type is also tried in that. bitsandbytes' kernels for AVX512-BF16 round scales to bfloat16 at the
first product; they are switched off there (`Linear4bit.support_avx512bf16_for_cpu`), as they are in training.

An adapter that stays beside its base is in `adapter/`, as peft wrote it: `PeftModel.from_pretrained(model, "FOLDER/adapter")`; the receipt
is then of both together, loaded by plain peft.

What this cannot do: models with code of their own (trust_remote_code), `stream=true`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporters.base import Artefact, Exporter, ExportJob, Inputs, activation_modules, packed_layers
from qtrain.lazy import lazy_import
from qtrain.receipt import Latency, Receipt, Tolerances
from qtrain.registry import register

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from exporters.transformers_folder.session import Session
else:
    torch = lazy_import("torch")

DTYPES = ("float16", "bfloat16", "float32")
ADAPTER = "adapter"
"""Folder, inside the model's, of an adapter that stays beside it."""


@register("export", "transformers")
@dataclass
class TransformersFolder(Exporter):
    """A transformers folder in safetensors, which from_pretrained loads without qtrain; the receipt is from there."""

    tasks: ClassVar[tuple[str, ...]] = ("classification", "language", "embedding")
    floats: ClassVar[bool] = True
    widest: ClassVar[dict[str, str]] = {"dtype": "float32"}

    tolerances: Tolerances = field(default_factory=lambda: Tolerances(top1_agreement=0.98, metric=0.01))
    """How far the folder's logits may be from training's."""
    dtype: str = "float16"
    """Type of the folder: float16, bfloat16 or float32, which holds the values of every grid."""
    exact: bool = True
    """Refuse a dtype that rounds decoded values; false allows it where the grid reads its codes back (Q4_0 and Q5_0 in float16)."""
    bitsandbytes: bool = True
    """Hold NF4 and FP4 layers as bitsandbytes' 4-bit layers; false: as decoded values, which need dtype=float32."""
    max_shard_size: str | None = "5G"
    """Largest size of one weights file (5G, 500M); null writes one file."""
    generate: int = 32
    """Tokens that training and the folder generate greedily; 0 for none."""

    def __post_init__(self) -> None:
        from exporters.transformers_folder.sizes import size_bytes

        if self.dtype not in DTYPES:
            raise ValueError(
                f"export.transformers.dtype is {self.dtype!r}; valid: {', '.join(DTYPES)}. Set export.transformers.dtype=float16"
            )
        if self.generate < 0:
            raise ValueError(f"export.transformers.generate is {self.generate}; at least 0. Set export.transformers.generate=32")
        self.most = size_bytes(self.max_shard_size)
        """`max_shard_size` in bytes."""
        self._session: Session | None = None

    @property
    def runtime_version(self) -> str:
        from importlib.metadata import version

        return f"transformers {version('transformers')}"

    def preflight(self, model: nn.Module, task: str, processor: Any) -> None:
        """See `Exporter.preflight`; also whether it is a model of transformers', and what other values of its grids would need."""
        from exporters.transformers_folder.contents import misfit, typical
        from exporters.transformers_folder.four_bit import require_bitsandbytes, skipped

        super().preflight(model, task, processor)
        require_transformers(model)
        packed = self._packed(model)
        if packed:
            require_bitsandbytes()
            skipped(model, set(packed))
        for name, layer in packed_layers(model).items():
            if name in packed:
                continue
            why = misfit(typical(layer.quantized), self.dtype, self.exact)
            if why:
                raise ValueError(f"export=transformers cannot hold {name} ({layer.quantized.grid.describe()}): {why}")

    def refusals(self, model: nn.Module) -> list[str]:
        """Layers that plain transformers would compute differently."""
        from exporters.transformers_folder.contents import refusal

        activations = activation_modules(model).items()
        packed = self._packed(model)
        found = [f"{n} ({a.grid.describe()}): transformers leaves activations in float. Set export=[onnx]" for n, a in activations]
        for name, module in model.named_modules():
            why = refusal(module, None if name in packed else self.dtype, self.exact)
            if why:
                found.append(f"{name}: {why}")
        return found

    def write(self, job: ExportJob, folder: Path) -> Artefact:
        """Weights, config, tokenizer and qtrain.json."""
        from exporters.transformers_folder import about
        from exporters.transformers_folder.contents import entries, layers_of, original_names, ties
        from exporters.transformers_folder.four_bit import four_bit_entries, settings
        from exporters.transformers_folder.write import write_weights

        require_transformers(job.model)
        packed = self._packed(job.model)
        codes = {name: four_bit_entries(name, layer.quantized, self.dtype) for name, layer in packed.items()}
        write_weights(folder, original_names(job.model, entries(job.model, self.dtype, codes)), self.most, job.tell)
        quantization = settings(job.model, packed, self.dtype) if packed else None
        about.write_config(job.model, folder, self.dtype, bool(ties(job.model)), quantization)
        about.write_tokenizer(job.processor, folder)
        held = self._held(layers_of(job.model), packed)
        about.write_about(folder, job.metadata, job.task, self.dtype, held)
        if job.task == "embedding":
            about.write_pooling(job.model, folder)
        if job.adapter is not None:
            shutil.copytree(job.adapter.folder, folder / ADAPTER)
            about.forget_base(folder / ADAPTER)
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        beside = None if job.adapter is None else folder / ADAPTER
        return Artefact(folder, files, fallbacks=self._fallbacks(held), adapter_path=beside)

    def refuse_adapter(self, variant: str, others: list[str], model: nn.Module, names: list[str]) -> None:
        """See `Exporter.refuse_adapter`: peft reads its own folder, whatever is in it."""

    def _packed(self, model: nn.Module) -> dict[str, Any]:
        """Layers that are written as codes, by name."""
        from exporters.transformers_folder.four_bit import packable

        return packable(model) if self.bitsandbytes else {}

    def _held(self, layers: dict[str, Any], packed: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Layer -> its grid, and whether the folder has its codes, its values, or rounded ones."""
        from exporters.transformers_folder.contents import lost

        how = {n: "codes" if n in packed else "rounded" if lost(m.quantized, self.dtype) else "values" for n, m in layers.items()}
        return {name: {"grid": layer.quantized.grid.spec(), "held": how[name]} for name, layer in layers.items()}

    def _fallbacks(self, held: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
        count = sum(layer["held"] == "rounded" for layer in held.values())
        why = f"values are rounded to {self.dtype}, of which the grid makes training's codes again; only dtype=float32 holds them exactly"
        return [{"name": f"{count} of {len(held)} layers", "why": why}] if count else []

    def tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Every layer that had codes, as transformers loads it; where values were rounded, what the grid makes of those."""
        from exporters.transformers_folder.about import read_about
        from qtrain.grids.base import from_spec

        with self._opened(path) as session:
            for name, layer in read_about(path)["layers"].items():
                value = session.tensor("tensor", name=f"{name}.weight")
                yield name, from_spec(layer["grid"]).encode(value).decode() if layer["held"] == "rounded" else value

    def _receipt(self, job: ExportJob, artefact: Artefact) -> Receipt:
        """As every exporter's, with the folder loaded once; a folder that does not load has a failed receipt."""
        from exporters.transformers_folder.session import ReaderFailed

        try:
            with self.session(artefact.path) as self._session:
                return super()._receipt(job, artefact)
        except ReaderFailed as error:
            return Receipt(fallbacks=artefact.fallbacks, failures=[f"transformers says: {error}"])
        finally:
            self._session = None

    def compare(self, job: ExportJob, artefact: Artefact, receipt: Receipt) -> None:
        """Float weights, logits, metrics, tokenizer and generation, in transformers."""
        from exporters.transformers_folder.proof import prove

        with self._opened(artefact.path) as session:
            prove(self, job, artefact, session, receipt)

    def compare_logits(self, job: ExportJob, artefact: Artefact, receipt: Receipt) -> None:
        """The logits of a classifier, as every exporter's."""
        super().compare(job, artefact, receipt)

    def products(self, path: Path, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        """None: no layer here quantizes its input."""
        return iter(())

    def session(self, path: Path) -> Session:
        """The folder, loaded in a process of its own without qtrain."""
        from exporters.transformers_folder.about import AUTO, read_about
        from exporters.transformers_folder.session import Session

        return Session(path, AUTO[read_about(path)["task"]])

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Session]:
        """The session of the receipt that is being made, or a new one."""
        if self._session is not None and self._session.path == path:
            yield self._session
            return
        with self.session(path) as session:
            yield session

    def logits(self, path: Path, batches: list[tuple[Inputs, Tensor]]) -> Tensor:
        """Logits of every example, or at every position of every sequence, float32 [N, C]; `compare` does not hold those of a text."""
        from exporters.transformers_folder.proof import as_lists

        with self._opened(path) as session:
            given = [as_lists(inputs) for inputs, _ in batches]
            if all(list(inputs) != ["input_ids"] for inputs in given):
                return torch.cat([session.tensor("logits", **inputs) for inputs in given])
            return torch.cat([session.tensor("logits", input_ids=[ids]) for inputs in given for ids in inputs["input_ids"]])

    def latency(self, artefact: Artefact, job: ExportJob) -> Latency:
        """Empty: the folder computes in float, at the float model's speed."""
        return {}


def require_transformers(model: nn.Module) -> None:
    """Raise unless ``model`` is of a class that transformers has.

    Raises:
        ValueError: naming the class.
    """
    names = [c.__name__ for c in type(model).__mro__]
    if "PreTrainedModel" not in names or not type(model).__module__.startswith("transformers."):
        why = "has code of its own, which the folder would need" if "PreTrainedModel" in names else "is not a model of transformers'"
        raise ValueError(
            f"export=transformers writes a folder that plain transformers loads, and {type(model).__name__} {why}. "
            "Set export=[onnx], or export=[] for none"
        )
