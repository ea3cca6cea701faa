"""Makes mixes.json: which type llama.cpp itself gives to each tensor, for every mix, on models of many shapes.

    pip install llama-cpp-python gguf          # 0.3.36 was used; it compiles llama.cpp
    python tests/golden/make_mixes.py --library SITE_PACKAGES/llama_cpp/lib/libllama.so [--smollm2 SmolLM2-135M-Instruct.Q4_1.gguf]

Each model is a GGUF file of random tensors with the true names, layers, heads and row lengths, but two rows per matrix: the rule
reads row lengths only. `llama_model_quantize` writes it anew, and what it wrote is read back. SmolLM2 is the true file, quantized whole,
without an importance matrix.

mixes.json holds, for each model, its facts, its tensors ({i} is the layer), and for each run ("q4_k_m", "q4_0 imatrix",
"q4_k_m output=q8_0") the types, run-length encoded over the layers: {"q4_k": "attn_k attn_q", "q6_k*3 q4_k*2": "attn_v"}, names without
`blk.{i}.` and `.weight`. Tensors that are not listed keep their type. A run with an importance matrix is stored only where it changes
a type.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

FILE_TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13}
FILE_TYPES |= {"q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "bf16": 32}
"""Mixes and llama.cpp's numbers for them (enum llama_ftype)."""
OPTIONS = ["pure", "output=q8_0", "output=f16", "embedding=q5_1", "pure embedding=q8_0"]


@dataclass
class Model:
    """A model to quantize."""

    architecture: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    tied: bool = False
    experts: int = 0
    fused: bool = False
    """Of nomic-bert: attn_qkv instead of three tensors."""

    @property
    def name(self) -> str:
        flags = ["tied"] * self.tied + ["fused"] * self.fused + [f"{self.experts} experts"] * bool(self.experts)
        return " ".join([f"{self.architecture} {self.layers}x{self.width}/{self.ffn} {self.heads}:{self.kv_heads}", *flags])

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """GGUF name, with {i} for the layer, and shape, rows last."""
        wide, encoder = self.width, self.architecture in ("bert", "nomic-bert")
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (2, wide)}
        if not self.tied and not encoder:
            found["output.weight"] = (2, wide)
        if encoder:
            found |= {"token_types.weight": (2, wide), "token_embd_norm.weight": (wide,), "token_embd_norm.bias": (wide,)}
            found |= {"position_embd.weight": (2, wide)} if self.architecture == "bert" else {}
        else:
            found["output_norm.weight"] = (wide,)
        fused = self.fused or self.architecture == "phi3"
        attention = ["attn_qkv"] if fused else ["attn_q", "attn_k", "attn_v"]
        block: dict[str, tuple[int, ...]] = {f"{name}.weight": (2, wide) for name in [*attention, "attn_output"]}
        if self.architecture in ("qwen2", "bert"):
            block |= {f"{name}.bias": (wide,) for name in attention}
        if self.architecture in ("qwen3", "gemma3"):
            block |= {"attn_q_norm.weight": (64,), "attn_k_norm.weight": (64,)}
        gate = self.architecture not in ("bert", "phi3")
        for name in ["ffn_up", "ffn_down", *(["ffn_gate"] if gate else [])]:
            row = self.ffn if name == "ffn_down" else wide
            block |= {f"{name}_exps.weight": (self.experts, 2, row)} if self.experts else {f"{name}.weight": (2, row)}
        if self.experts:
            block["ffn_gate_inp.weight"] = (self.experts, wide)
        norms = ["attn_output_norm", "layer_output_norm"] if encoder else ["attn_norm", "ffn_norm"]
        norms += ["post_attention_norm", "post_ffw_norm"] if self.architecture.startswith("gemma") else []
        block |= {f"{name}.weight": (wide,) for name in norms}
        return found | {f"blk.{{i}}.{name}": shape for name, shape in block.items()}

    def write(self, path: Path) -> None:
        """The model as a GGUF file of random float32 numbers, so that what llama.cpp leaves alone stays float32."""
        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_block_count(self.layers)
        writer.add_context_length(512)
        writer.add_embedding_length(self.width)
        writer.add_feed_forward_length(self.ffn)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_layer_norm_eps(1e-5)
        writer.add_vocab_size(2)
        if self.experts:
            writer.add_expert_count(self.experts)
            writer.add_expert_used_count(2)
        draw = np.random.default_rng(0)
        for name, shape in expand(self.tensors(), self.layers).items():
            writer.add_tensor(name, draw.normal(size=shape).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


MODELS = [
    *[Model("llama", n, 256, 512, 8, 8) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 22, 24, 30, 31, 32, 33, 40, 48, 62)],
    *[Model("llama", n, 256, 512, 8, 2, tied=True) for n in (6, 16, 26, 36)],
    *[Model("llama", 8, 256, 512, 12, kv, tied=tied) for kv in (12, 6, 4, 3, 2, 1) for tied in (False, True)],
    Model("llama", 6, 288, 768, 6, 6, tied=True),  # stories15M
    Model("llama", 30, 576, 1536, 9, 3, tied=True),  # SmolLM2-135M
    Model("llama", 22, 2048, 5632, 32, 4),  # TinyLlama
    Model("llama", 32, 4096, 14336, 32, 8),  # Mistral 7B
    Model("llama", 80, 8192, 28672, 64, 8),  # Llama 70B
    Model("llama", 80, 8192, 22016, 64, 64),  # Llama 65B
    *[
        Model("llama", 9, width, ffn, 4, 2, tied=tied)
        for width, ffn in [(288, 512), (256, 288), (100, 512), (256, 100)]
        for tied in (False, True)
    ],
    Model("llama", 12, 48, 200, 4, 4, tied=True),
    Model("llama", 32, 4096, 14336, 32, 8, experts=8),  # Mixtral 8x7B
    Model("llama", 12, 256, 512, 8, 4, experts=4),
    Model("llama", 12, 288, 512, 8, 4, experts=8, tied=True),
    Model("qwen2", 24, 896, 4864, 14, 2, tied=True),  # Qwen2.5-0.5B
    Model("qwen2", 28, 3584, 18944, 28, 4),  # Qwen2.5-7B
    Model("qwen2", 80, 8192, 29568, 64, 8),  # Qwen2.5-72B
    Model("qwen2", 80, 8192, 29568, 64, 64),
    Model("qwen3", 28, 1024, 3072, 16, 8, tied=True),  # Qwen3-0.6B
    Model("qwen3", 80, 256, 512, 8, 2),
    Model("gemma2", 26, 2304, 9216, 8, 4, tied=True),  # Gemma 2 2B
    Model("gemma3", 18, 640, 2048, 4, 1, tied=True),  # Gemma 3 270M
    Model("gemma3", 26, 1152, 6912, 4, 1, tied=True),  # Gemma 3 1B
    Model("phi3", 32, 3072, 8192, 32, 32),  # Phi-3 mini
    Model("phi3", 40, 5120, 17920, 40, 10),  # Phi-3 medium
    Model("phi3", 10, 96, 160, 4, 4),
    Model("bert", 6, 384, 1536, 12, 12),  # MiniLM
    Model("bert", 24, 1024, 4096, 16, 16),  # BGE large
    Model("nomic-bert", 12, 768, 3072, 12, 12),
    Model("nomic-bert", 12, 768, 3072, 12, 12, fused=True),
]
WITH_OPTIONS = ("llama 6x288/768 6:6 tied", "llama 22x2048/5632 32:4", "qwen2 24x896/4864 14:2 tied", "gemma2 26x2304/9216 8:4 tied")


class Importance(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t)]


class Parameters(ctypes.Structure):
    """llama_model_quantize_params."""

    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("threads", "file_type", "output", "embedding")],
        *[(n, ctypes.c_bool) for n in ("allow_requantize", "quantize_output", "only_copy", "pure", "keep_split", "dry_run")],
        ("imatrix", ctypes.POINTER(Importance)),
        *[(name, ctypes.c_void_p) for name in ("kv_overrides", "type_overrides", "prune_layers")],
        ("max_buffer", ctypes.c_size_t),
    ]


class Quantize:
    """llama_model_quantize of a shared library."""

    def __init__(self, library: Path) -> None:
        for name in ("libggml-base.so", "libggml-cpu.so", "libggml.so"):
            ctypes.CDLL(str(library.parent / name), mode=ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(library))
        self.lib.llama_model_quantize_default_params.restype = Parameters
        self.lib.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
        self.log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(self._keep)
        self.lib.llama_log_set(self.log, None)
        self.said: list[str] = []
        defaults = self.lib.llama_model_quantize_default_params()
        if defaults.file_type != 7 or not defaults.quantize_output or defaults.max_buffer != 8 << 30:
            raise RuntimeError("llama_model_quantize_params is laid out otherwise in this llama.cpp; mend Parameters")

    def _keep(self, _level: int, text: bytes, _user: Any) -> None:
        self.said.append(text.decode(errors="replace"))

    def __call__(self, source: Path, target: Path, mix: str, options: list[str]) -> None:
        """Write ``source`` to ``target`` as ``mix``; options are pure, imatrix, output=TYPE, embedding=TYPE."""
        parameters = self.lib.llama_model_quantize_default_params()
        parameters.threads, parameters.file_type, parameters.allow_requantize = 1, FILE_TYPES[mix], True
        one = (ctypes.c_float * 1)(
            1.0
        )  # that there is a matrix is what the rule asks; llama.cpp searches its own way where a tensor has none
        matrix = (Importance * 2)(Importance(b"no.such.tensor", one, 1), Importance(None, None, 0))
        for option in options:
            key, _, value = option.partition("=")
            if key == "imatrix":
                parameters.imatrix = matrix
            elif key == "pure":
                parameters.pure = True
            else:
                setattr(parameters, key, int(gguf.GGMLQuantizationType[value.upper()]))
        self.said.clear()
        if self.lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)):
            raise RuntimeError(f"{source} as {mix}: {''.join(self.said[-3:])}")


def expand(tensors: dict[str, tuple[int, ...]], layers: int) -> dict[str, tuple[int, ...]]:
    """{i} becomes each layer."""
    return {n.replace("{i}", str(i)): s for n, s in tensors.items() for i in range(layers if "{i}" in n else 1)}


def types_of(path: Path) -> dict[str, str]:
    """Tensor -> type of a GGUF file."""
    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}


def compress(types: dict[str, str], tensors: dict[str, tuple[int, ...]], layers: int) -> dict[str, str]:
    """Run-length encoded types of the layers -> the tensors that have them."""
    found: dict[str, list[str]] = {}
    for name in tensors:
        row = [types[n] for n in expand({name: ()}, layers)]
        runs = [(kind, len(list(group))) for kind, group in itertools.groupby(row)]
        text = runs[0][0] if len(runs) == 1 else " ".join(f"{kind}*{count}" for kind, count in runs)
        found.setdefault(text, []).append(name.removeprefix("blk.{i}.").removesuffix(".weight"))
    return {text: " ".join(names) for text, names in found.items()}


def measure(quantize: Quantize, source: Path, model: dict[str, Any], options: list[str], folder: Path) -> dict[str, Any]:
    """``model`` with its runs, each mix plain and with each of ``options``."""
    target = folder / "quantized.gguf"
    tensors, layers = model["tensors"], model["facts"]["layers"]
    quantize(source, target, "f16", [])
    kept = {n for n, kind in types_of(target).items() if kind == "f32"}
    quantized = {n: s for n, s in tensors.items() if n.replace("{i}", "0") not in kept}
    runs: dict[str, Any] = {}
    for mix in FILE_TYPES:
        for extra in ["", *options]:
            quantize(source, target, mix, extra.split())
            types = compress(types_of(target), quantized, layers)
            if extra != "imatrix" or types != runs[mix]:
                runs[f"{mix} {extra}".strip()] = types
    return {**model, "types": runs}


def smollm2(path: Path) -> dict[str, Any]:
    """Facts and tensors of the true file."""
    reader = gguf.GGUFReader(path)
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    facts = {"architecture": "llama", "layers": 30, "heads": 9, "kv_heads": 3, "experts": 0}
    tensors = {n.replace("blk.0.", "blk.{i}."): s for n, s in shapes.items() if not n.startswith("blk.") or n.startswith("blk.0.")}
    return {"facts": facts, "tensors": tensors}


def main() -> None:
    """Write mixes.json beside this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--smollm2", type=Path)
    given = parser.parse_args()
    quantize = Quantize(given.library)
    models = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for model in MODELS:
            model.write(folder / "model.gguf")
            facts = {k: getattr(model, k) for k in ("architecture", "layers", "heads", "kv_heads", "experts")}
            options = ["imatrix", *(OPTIONS if model.name in WITH_OPTIONS else [])]
            print(model.name, file=sys.stderr)
            models[model.name] = measure(quantize, folder / "model.gguf", {"facts": facts, "tensors": model.tensors()}, options, folder)
        if given.smollm2:
            models["SmolLM2-135M-Instruct"] = measure(quantize, given.smollm2, smollm2(given.smollm2), [], folder)
    assert set(WITH_OPTIONS) <= set(models)
    lines = [f"{json.dumps(name)}: {json.dumps(model)}" for name, model in models.items()]
    Path(__file__).with_name("mixes.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
