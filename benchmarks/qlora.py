"""QLoRA: the room that the base takes, and what a step costs beside a bare loop of transformers, peft and bitsandbytes.

    python -m benchmarks.qlora [--model FOLDER] [--tokens 256] [--batch 4] [--rounds 15]

Bytes are those of the tensors that are held (codes, scales, maps). A step is forward, backward and the optimizer on the same batch; the two
loops alternate, medians of the rounds. The bare loop is `model(input_ids, labels).loss` of a model that `from_pretrained` loaded with a
`BitsAndBytesConfig`, and peft's `get_peft_model`; ours is `qtrain.module.Module.training_step` on what `quantizer=bnb adapter=lora` makes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import interleaved, markdown, median_ratio, start
from qtrain.adapters.lora import Lora
from qtrain.bnb import is_bnb
from qtrain.fit import Fit
from qtrain.language_task import TASK
from qtrain.lora import attach
from qtrain.memory import stored_bytes
from qtrain.models.causal_lm import CausalLm
from qtrain.module import Module
from qtrain.peak import peak_rss_bytes
from qtrain.quantizers.bnb import Bnb


def bare(folder: Path, rank: int) -> nn.Module:
    """What people write: transformers, bitsandbytes, peft."""
    import peft
    import transformers

    make: Any = transformers.BitsAndBytesConfig
    config = make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map="cpu")
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora).train()


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A function that makes a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="transformers folder; the sample model if none is given")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    start()
    source = CausalLm(args.model)
    model: Any = source.build()
    heads = source.always_float(model)
    outside = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in heads)
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        plain = bare(Path(name), args.rank)
    base, _ = Bnb(compute_dtype="float32").prepare(model, heads)
    layers = [m for m in base.modules() if is_bnb(m)]
    held = sum(stored_bytes(layer) for layer in layers)
    adapter = attach(base, Lora(rank=args.rank, alpha=2 * args.rank), "language", heads)
    module = Module(base.train(), Fit(), torch.optim.AdamW, task=TASK)
    module.log = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    ids = torch.randint(model.config.vocab_size, (args.batch, args.tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = -100
    steps = {
        "transformers + peft + bitsandbytes": step_of(plain, lambda: plain(input_ids=ids, labels=labels, use_cache=False).loss),
        "qtrain": step_of(base, lambda: module.training_step(({"input_ids": ids}, labels), 0)),
    }
    times = interleaved(steps, args.rounds)
    peer, own = steps
    rows = [
        ["weights outside embeddings and head", f"{outside:,}"],
        ["their bytes in NF4 with double quantization", f"{held / 1e6:.2f} MB, {held / (2 * outside):.3f} x float16"],
        ["trained parameters", f"{adapter.trainable:,}"],
        *([f"a step, {key}", f"{statistics.median(values):.3f} s"] for key, values in times.items()),
        ["ratio", f"{median_ratio(times, own, peer):.3f}"],
        ["peak memory of the process, both models", f"{peak_rss_bytes() / 1e6:,.0f} MB"],
    ]
    print("\n" + markdown(["", ""], rows))


if __name__ == "__main__":
    main()
