"""What a transformers folder says beside its weights: config, generation config, tokenizer, and where it comes from.

The config is training's with its original meaning: keys and values are kept again, weights are called tied if they are, nothing says any
more that a GGUF file was read, and the type is the folder's. `qtrain.json` names the recipe and, per layer, the grid and how the folder
holds it; transformers does not read it. Encoders for sentence embeddings get the files by which sentence-transformers knows how to pool.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

AUTO = {"language": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification", "embedding": "AutoModel"}
"""transformers' class that loads the folder, by task."""
ABOUT = "qtrain.json"
_MODULE = "sentence_transformers.models"


def write_config(model: Any, folder: Path, dtype: str, tied: bool, quantization: dict[str, Any] | None) -> None:
    """config.json, and generation_config.json of models that generate.

    Args:
        quantization: settings by which transformers loads layers that hold codes; None where there are none.
    """
    config = copy.deepcopy(model.config)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(part, "use_cache", None) is False:
            part.use_cache = True
        if getattr(part, "tie_word_embeddings", False) and not tied:
            part.tie_word_embeddings = False
        part.dtype = dtype
        with contextlib.suppress(AttributeError):
            del part.quantization_config
    config.architectures = [type(model).__name__]
    if quantization is not None:
        config.quantization_config = quantization
    config.to_json_file(folder / "config.json", use_diff=True)
    if model.can_generate():
        generation = copy.deepcopy(model.generation_config)
        if generation.use_cache is False:
            generation.use_cache = True
        generation.to_json_file(folder / "generation_config.json", use_diff=True)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer and its chat template, without the lengths to which the run last cut and padded."""
    twin = copy.deepcopy(tokenizer)
    backend = getattr(twin, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    with quiet():
        twin.save_pretrained(folder)


def write_about(folder: Path, metadata: dict[str, str], task: str, dtype: str, layers: dict[str, dict[str, Any]]) -> None:
    """qtrain.json: {"recipe", "qtrain", "task", "dtype", "layers": {name: {"grid": spec, "held": how}}}."""
    (folder / ABOUT).write_text(json.dumps({**metadata, "task": task, "dtype": dtype, "layers": layers}, indent=1) + "\n")


def read_about(folder: Path) -> dict[str, Any]:
    """Undo `write_about`.

    Raises:
        ValueError: if the folder is not one of ours.
    """
    try:
        return json.loads((folder / ABOUT).read_text())
    except OSError as error:
        raise ValueError(f"the folder {folder} has no {ABOUT}; it was not written by qtrain") from error


def forget_base(adapter: Path) -> None:
    """Take the name of the float model out of a copied adapter: the base is the folder around it, on its grid."""
    path = adapter / "adapter_config.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"base_model_name_or_path": None}, indent=2, sort_keys=True) + "\n")


def write_pooling(model: Any, folder: Path) -> None:
    """modules.json and 1_Pooling/config.json, as sentence-transformers reads them."""
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"{_MODULE}.{kind}"} for i, (kind, path) in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": model.config.hidden_size,
        "pooling_mode_cls_token": model.pooling == "cls",
        "pooling_mode_mean_tokens": model.pooling == "mean",
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2) + "\n")


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of transformers'."""
    messages: Any = transformers.utils.logging
    level = messages.get_verbosity()
    messages.set_verbosity_error()
    try:
        yield
    finally:
        messages.set_verbosity(level)
