"""`dry_run=true`: would this run fit, and are its options right? Answered from the model's config alone, in seconds.

The model is built without storage (device `meta`), its layers are counted on their grids, the adapter is put in, and the estimate of
`qtrain/memory.py` is printed. The text is read and tokenized as for training; weights are neither downloaded nor read, so nothing is said
of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtrain.lora import attach
from qtrain.memory import announce
from qtrain.record import Record
from qtrain.stages import Setup, device_of, preflight
from qtrain.targets import always_float
from qtrain.tasks import task

SAMPLE = 1 << 20
"""Values that are quantized to see how many bytes a grid takes."""


def run(config: Any, record: Record, folder: Path) -> None:
    """Check, and print what training needs.

    Raises:
        ValueError: for options that the run itself would refuse, or where there is no adapter to train.
    """
    if config.adapter is None or not hasattr(config.model, "empty"):
        raise ValueError(
            f"dry_run=true says what training an adapter beside a language model needs, given model={config.model.registered_name} and "
            f"adapter={getattr(config.adapter, 'registered_name', 'null')}. Set model=causal_lm adapter=lora, or dry_run=false"
        )
    from qtrain import direct, fit, tuning

    direct.check(config)
    with record.stage("data"):
        processor = config.model.processor()
        data = config.data.build(processor, config.seed)
        for note in data.notes:
            record.note(note)
    with record.stage("model without weights"):
        model: Any = config.model.empty()
        judged = task("language")
        device = device_of(config)
        fit.check(config, model, device)
        setup = Setup(config, record, folder, data, device, [], judged, processor, config.quantizer)
        tuning.check(setup, model)
        preflight(setup, model)
        always = always_float(config, model)
        base = base_bytes(model, {} if config.quantizer.trains else config.quantizer.weight_grids(model, always), config.quantizer.loads)
        adapter = attach(model, config.adapter, judged.name, always)
        announce(setup, adapter, base)


def base_bytes(model: nn.Module, grids: dict[str, Any], packed: bool) -> int:
    """Bytes of a model whose modules ``grids`` names are on their grids, the others as they are.

    Args:
        packed: whether codes of 4 bits share a byte in memory, as bitsandbytes' do; else each has one.
    """
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in grids}
    on_grid = {id(p): (p, grids[name]) for name, p in weights.items()}
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in on_grid)
    return rest + sum(round(p.numel() * bits(grid, p.shape[-1], packed) / 8) for p, grid in on_grid.values())


def bits(grid: Any, width: int, packed: bool) -> float:
    """Bits per weight of rows of ``width`` values in memory, scales included."""
    sample = torch.linspace(-1, 1, width * max(1, SAMPLE // width)).reshape(-1, width)
    q = grid.encode(sample)
    held = q.nbytes() if packed else sum(t.numel() * t.element_size() for t in [q.codes, *q.params.values()])
    return float(8 * held / sample.numel())
