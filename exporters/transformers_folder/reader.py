"""The process in which the receipt of a transformers folder is made: plain `from_pretrained`, with qtrain out of reach.

    python -I reader.py '{"folder": …, "auto": "AutoModelForCausalLM", "path": […], "threads": 2}'

This file imports nothing of qtrain's, and before anything else it makes `import qtrain` an error, however qtrain is installed; so what
it reports is what a user of the folder gets. Requests are json lines on the standard input. An answer is json lines too, those with a
"bytes" key followed by that many bytes of float32, and ends with {"end": true} or {"error": "…"}. Whatever libraries print goes to the
error stream.

The model is loaded in float32, which holds every value of a folder of 16-bit floats as it is; `compute` changes the type.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

HIDDEN = ("qtrain", "exporters")
PIECE = 1 << 22
"""Values that are sent at once."""
Answer = tuple[dict[str, Any], Any]


class Hidden:
    """Finds no module of qtrain's, before any other finder can."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        """See importlib.abc.MetaPathFinder."""
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"{name} is hidden: the folder must load without it", name=name)


def hide() -> None:
    """Make sure that qtrain cannot be imported."""
    sys.meta_path.insert(0, Hidden)  # type: ignore[arg-type]
    for name in HIDDEN:
        assert not any(loaded.split(".")[0] == name for loaded in sys.modules), f"{name} was imported when the interpreter started"
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} can be imported")


def mend() -> None:
    """A torchvision whose operators do not fit torch stops transformers from being imported; declare those that it names."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        library = importlib.import_module("torch.library").Library("torchvision", "FRAGMENT")
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            library.define(schema)
        globals()["_declared"] = library  # torch forgets the declaration when its library object is deleted


class Reader:
    """The loaded folder, and what can be asked of it."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.transformers: Any = importlib.import_module("transformers")
        self.folder = request["folder"]
        self.torch.set_num_threads(request["threads"])
        self.torch.set_grad_enabled(False)
        self.transformers.utils.logging.set_verbosity_error()
        self.transformers.utils.logging.disable_progress_bar()
        auto = getattr(self.transformers, request["auto"])
        self.model, self.report = auto.from_pretrained(self.folder, dtype=self.torch.float32, output_loading_info=True)
        self.model.eval()
        self.tokenizer: Any = None

    def about(self) -> Iterator[Answer]:
        """What loading said: {"missing", "unexpected", "class", "config"}, the last the keys of config.json."""
        lost = {*self.report["missing_keys"], *(key for key, *_ in self.report["mismatched_keys"])}
        found = {"missing": sorted(lost), "unexpected": sorted(self.report["unexpected_keys"]), "class": type(self.model).__name__}
        yield {**found, "config": list(self.model.config.to_dict())}, None

    def tensor(self, name: str) -> Iterator[Answer]:
        """A parameter or buffer in float32; 4-bit weights as bitsandbytes dequantizes them to that."""
        owner, _, leaf = name.rpartition(".")
        value = getattr(self.model.get_submodule(owner), leaf)
        if type(value).__name__ == "Params4bit":
            state = copy.copy(value.quant_state)
            state.dtype = self.torch.float32
            value = importlib.import_module("bitsandbytes.functional").dequantize_4bit(value.data, state)
        yield from self.send(value)

    def adapter(self, folder: str) -> Iterator[Answer]:
        """Load an adapter with peft, and compute with it from now on: {"version", "layers", "lost"}."""
        peft = importlib.import_module("peft")
        self.model = peft.PeftModel.from_pretrained(self.model, folder)
        self.model.eval()
        held = set(peft.utils.save_and_load.load_peft_weights(folder, device="cpu"))
        present = set(peft.get_peft_model_state_dict(self.model, save_embedding_layers=False))
        layers = sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in self.model.modules())
        yield {"version": peft.__version__, "layers": layers, "lost": sorted(held ^ present)}, None

    def names(self) -> Iterator[Answer]:
        """{"names"} of all parameters and buffers that are saved."""
        yield {"names": list(self.model.state_dict())}, None

    def logits(self, **inputs: Any) -> Iterator[Answer]:
        """Logits of a batch, or of each position of a sequence."""
        output = self.model(**{name: self.torch.tensor(value) for name, value in inputs.items()}).logits.float()
        yield from self.send(output[0] if output.ndim == 3 else output)

    def embed(self, ids: list[int], pooling: str) -> Iterator[Answer]:
        """The pooled vector [1, D] of a sequence."""
        tensor = self.torch.tensor([ids])
        states = self.model(input_ids=tensor, attention_mask=self.torch.ones_like(tensor)).last_hidden_state.float()
        yield from self.send(states[:, 0] if pooling == "cls" else states.mean(1))

    def generate(self, ids: list[int], count: int) -> Iterator[Answer]:
        """{"ids"} written greedily."""
        tensor = self.torch.tensor([ids])
        written = self.model.generate(
            tensor, attention_mask=self.torch.ones_like(tensor), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        yield {"ids": written[0, len(ids) :].tolist()}, None

    def tokenize(self, texts: list[str]) -> Iterator[Answer]:
        """{"ids"} of each text, with the tokens that the tokenizer puts around it."""
        yield {"ids": [self.processor()(text)["input_ids"] for text in texts]}, None

    def chat(self, messages: list[dict[str, str]]) -> Iterator[Answer]:
        """{"text"} of the chat template."""
        yield {"text": self.processor().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)}, None

    def compute(self, dtype: str) -> Iterator[Answer]:
        """Compute in another type from now on; buffers, such as rotary frequencies, stay as transformers made them."""
        wanted = getattr(self.torch, dtype)
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(wanted)
        for module in self.model.modules():
            if type(module).__name__ == "Linear4bit":
                module.compute_dtype, module.compute_type_is_set = wanted, True
                module.support_avx512bf16_for_cpu = False  # whose kernels round scales to bfloat16
        yield {"dtype": dtype}, None

    def processor(self) -> Any:
        """The folder's tokenizer."""
        if self.tokenizer is None:
            self.tokenizer = self.transformers.AutoTokenizer.from_pretrained(self.folder)
        return self.tokenizer

    def send(self, tensor: Any) -> Iterator[Answer]:
        """A tensor in pieces of rows; the first answer has its shape."""
        shape, flat = list(tensor.shape), tensor.detach().reshape(-1)
        yield {"shape": shape}, None
        for start in range(0, flat.numel(), PIECE):
            yield {}, flat[start : start + PIECE].float().contiguous()


def serve(reader: Reader, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the requests end."""
    for line in requests:
        request = json.loads(line)
        try:
            for header, tensor in getattr(reader, request.pop("do"))(**request):
                data = b"" if tensor is None else tensor.numpy().tobytes()
                _answer(answers, header | ({"bytes": len(data)} if tensor is not None else {}), data)
            _answer(answers, {"end": True})
        except Exception as error:
            _answer(answers, {"error": f"{type(error).__name__}: {error}"})


def _answer(answers: BinaryIO, header: dict[str, Any], data: bytes = b"") -> None:
    answers.write(json.dumps(header).encode() + b"\n" + data)
    answers.flush()


def main() -> None:
    """See the module."""
    hide()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed
    request = json.loads(sys.argv[1])
    sys.path += [entry for entry in request["path"] if entry not in sys.path]
    try:
        mend()
        reader = Reader(request)
    except Exception as error:
        _answer(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    _answer(answers, {"end": True})
    serve(reader, sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
