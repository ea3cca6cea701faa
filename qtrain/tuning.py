"""The stages of a run with an adapter: put it beside (or inside) the quantized base, train it, and say what each way to deploy it costs.

    base       what the quantizer made, its codes; or, of quantizer=qat, fake-quantized layers that the adapter goes into
    adapter    trained by the one LightningModule; checkpoints hold the adapter alone
    merges     measured beside each other on the test split: stage "adapter" (kept apart), "merged_float", "merged_rounded",
               "merged_consistent"

What is deployed goes on to `convert` and the exporters like any other quantized model.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import nn

from exporters.base import LowRank
from qtrain.console import console
from qtrain.layers import fake_layers
from qtrain.loftq import start_near
from qtrain.lora import Adapter, attach, require_fits, require_norms, require_same, targets
from qtrain.malloc import release
from qtrain.memory import announce, report
from qtrain.merging import NAME, base_of, lora_layers, merged_float, merged_inside
from qtrain.peak import measured_peak
from qtrain.placement import gathered
from qtrain.prepare import copy_of
from qtrain.stages import Setup, fit_stage, measure, quantize
from qtrain.targets import always_float, inside
from qtrain.tokens import render

STAGES = {"apart": "adapter", "float": "merged_float", "rounded": "merged_rounded", "consistent": "merged_consistent"}
"""Where the metrics of each merge are in run.json's `stages`."""


def check(setup: Setup, model: nn.Module) -> None:
    """Refuse in seconds what would fail after minutes; ``model`` is the float model, with or without storage.

    Raises:
        ValueError: for options that do not go together.
    """
    config = setup.config
    merging = config.adapter.merging(config.quantizer)
    if merging != "consistent" and config.quantizer.smoothquant is not None:
        raise ValueError(
            f"quantizer.smoothquant={config.quantizer.smoothquant} divides the inputs of layers, which an adapter's merge does not know. "
            "Set quantizer.smoothquant=null"
        )
    if merging != "consistent" and getattr(config.quantizer, "activation", None) is not None:
        raise ValueError(
            f"quantizer={config.quantizer.registered_name} rounds activations, through which no gradient reaches the adapters of earlier "
            "layers. Set grid@quantizer.activation=null, or quantizer=qat"
        )
    if setup.task.name == "embedding" and not getattr(getattr(config.quantizer, "distill", None), "weight", 0):
        raise ValueError(
            "an embedding model has no labels for an adapter to learn from: it can only be distilled, which quantizer="
            f"{config.quantizer.registered_name} does not. Set quantizer=qat quantizer.distill.weight=1, or adapter=null"
        )
    if str(config.trainer.get("precision", "")).endswith("16-true") and merging != "consistent":
        raise ValueError(
            f"trainer.precision={config.trainer['precision']} would turn the scales of the frozen base into 16 bits, which makes it "
            "another one. Set trainer.precision=bf16-mixed"
        )
    always = always_float(config, model)
    grids = config.quantizer.weight_grids(model, always)
    options = config.adapter
    require_fits(model, options)
    whole = [name for name in inside(model, options.modules_to_save) if name in grids]
    if whole:  # of a mix, which names a type for every tensor
        raise ValueError(
            f"adapter.modules_to_save={options.modules_to_save} trains {whole[0]}, and quantizer.weight puts it on a grid. Set "
            f"quantizer.keep_float=[{','.join(whole)}]"
        )
    names = targets(model, options.target_modules, always)
    if merging == "apart":
        others = [f"adapter.bias={options.bias}"] if options.bias != "none" else []
        others += [f"adapter.modules_to_save=[{','.join(options.modules_to_save)}]"] if options.modules_to_save else []
        for exporter in config.export.values():
            exporter.refuse_adapter(options.variant, others, model, names)
    if getattr(config.quantizer, "type", "") == "int8":
        require_norms(config.adapter, setup.device)
    if config.adapter.path is not None:
        require_same(Path(config.adapter.path).expanduser(), config.adapter, model)


def source(setup: Setup, float_model: nn.Module) -> nn.Module:
    """What the base is made of: the float model, or, of init=loftq, weights chosen with the adapter's first values (`Setup.starts`)."""
    options = setup.config.adapter
    if options.init != "loftq":
        return float_model
    always = always_float(setup.config, float_model)
    near = copy_of(float_model, share=False)
    grids = setup.scheme.weight_grids(near, always)
    names = targets(near, options.target_modules, always)
    chosen = {name: grids[name] for name in names if name in grids}
    setup.starts = start_near(near, chosen, options.rank, options.scaling, options.loftq_iterations)
    return near


def tune(setup: Setup, model: nn.Module, float_model: nn.Module | None, float_outputs: Any) -> tuple[nn.Module, Any]:
    """Train an adapter on ``model``, the prepared base; returns the model to deploy, prepared, and its outputs.

    `Setup.scheme` is then what converts it.

    Args:
        float_model: what the base was made of; None of baseline=false.
    """
    options, scheme = setup.config.adapter, setup.scheme
    if float_model is not None:
        float_model.cpu()  # a GPU that holds the base in 4 bits need not have room for both; a teacher is moved back by training
    merging = options.merging(scheme)
    base = model
    if merging != "consistent" and next(fake_layers(model), None) is not None:
        base = scheme.convert(model)  # a frozen weight is decoded in each step, not rounded
    seed_everything(setup.config.seed, verbose=False)  # the same A in a run that goes on
    adapter = attach(base, options, setup.task.name, always_float(setup.config, float_model or base))
    trainable = adapter.trainable
    for name, (a, b) in setup.starts.items():
        adapter.start(name, a, b)
    if options.path is not None:
        adapter.load(Path(options.path).expanduser())
    announce(setup, adapter)
    if setup.starts or options.path is not None:
        measure(setup, "adapter_start", base, float_outputs)
    before = greedy(setup, base, options)
    release()  # else what evaluation left would hide what training needs
    with measured_peak() as peak:
        trained = fit_stage(setup, "adapter", base, options.fit, scheme.callbacks(), teacher=float_model)
    if trained:
        report(setup, peak)
    outputs = measure(setup, "adapter", base, float_outputs)
    said = compare_samples(setup, before, greedy(setup, base, options))
    folder = setup.folder / "adapter"
    adapter.save(folder, {"recipe": setup.config.recipe, "merge": merging, "base": scheme.registered_name, "init": options.init})
    deployed, outputs = _merges(setup, base, merging, float_model, outputs, float_outputs)
    setup.record.data["adapter"] = _about(setup, adapter, merging, trainable) | said
    return deployed, outputs


def _merges(
    setup: Setup, base: nn.Module, merging: str, float_model: nn.Module | None, outputs: Any, float_outputs: Any
) -> tuple[nn.Module, Any]:
    """Measure every merge that the options allow; the one to deploy, and its outputs."""
    if merging == "apart":
        if float_model is not None:  # else there may be no room for one
            merged, _ = _merged_float(setup, base, float_model, float_outputs)
            _also_rounded(setup, merged, float_outputs)
        return base, outputs
    if merging == "consistent":
        deployed = merged_inside(base)
        merged = measure(setup, STAGES["consistent"], deployed, float_outputs)
        change = setup.task.difference(outputs, merged)
        if not change["bit_exact"]:
            raise ValueError(
                f"the merged model is not the trained one: outputs differ by up to {change['max_abs']:.3g}. This is a defect of qtrain; "
                "please report it"
            )
        setup.record.data["merge_equals_training"] = change
        return deployed, merged
    merged, merged_outputs = _merged_float(setup, base, float_model, float_outputs)
    if merging == "float":
        _also_rounded(setup, merged, float_outputs)
        return merged, merged_outputs
    return _rounded(setup, merged, float_outputs)


def _merged_float(setup: Setup, base: nn.Module, float_model: nn.Module | None, float_outputs: Any) -> tuple[nn.Module, Any]:
    merged = merged_float(base, float_model)
    return merged, measure(setup, STAGES["float"], merged, float_outputs)


def _rounded(setup: Setup, merged: nn.Module, float_outputs: Any) -> tuple[nn.Module, Any]:
    setup.scheme = setup.config.adapter.deploy
    model = quantize(setup, merged)
    return model, measure(setup, STAGES["rounded"], model, float_outputs)


def _also_rounded(setup: Setup, merged: nn.Module, float_outputs: Any) -> None:
    """Measure what `adapter.deploy` would make of the merged model, where it is given though something else is deployed."""
    if setup.config.adapter.deploy is None:
        return
    aside = copy.copy(setup.record)  # what is not deployed leaves nothing but its metrics
    aside.data = copy.deepcopy(setup.record.data)
    try:
        _rounded(replace(setup, record=aside), merged, float_outputs)
    except ValueError as error:
        setup.record.note(f"merged and rounded was not measured: {error}")
        return
    setup.record.data["stages"][STAGES["rounded"]] = aside.data["stages"][STAGES["rounded"]]


def apart(setup: Setup, model: nn.Module) -> tuple[nn.Module, LowRank]:
    """The base, and the adapter that stays beside it, for exporters; both on the CPU."""
    options = setup.config.adapter
    model = gathered(model)
    layers = {name: (layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach()) for name, layer in lora_layers(model).items()}
    return base_of(model), LowRank(setup.folder / "adapter", layers, options.rank, options.scaling, model)


def _about(setup: Setup, adapter: Adapter, merging: str, trainable: int) -> dict[str, Any]:
    """What run.json says of the adapter."""
    options, stages = setup.config.adapter, setup.record.data["stages"]
    return {
        "path": str(setup.folder / "adapter"),
        "variant": options.variant,
        "rank": options.rank,
        "scaling": options.scaling,
        "layers": len(adapter.names),
        "trainable_parameters": trainable,
        "base_sha256": adapter.base_sha256,
        "merge": merging,
        "merges": {merge: stages[stage] for merge, stage in STAGES.items() if stage in stages},
    }


@torch.inference_mode()
def greedy(setup: Setup, model: Any, options: Any) -> str | None:
    """What the model says next, most likely token by token; None where it is no language model or no text is asked for."""
    if setup.task.name != "language" or options.sample is None:
        return None
    tokenizer = setup.processor
    if getattr(setup.data, "chat", False):
        told = {"tokenize": True, "add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        ids = render(tokenizer, options.sample, **told)["input_ids"]
    else:
        ids = tokenizer(options.sample, return_tensors="pt")["input_ids"]
    model.eval()
    ids = ids.to(next(model.parameters()).device)
    done = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=options.sample_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    text: str = tokenizer.decode(done[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def compare_samples(setup: Setup, before: str | None, after: str | None) -> dict[str, Any]:
    """Show what the model said before and after; the same for run.json."""
    if before is None or after is None:
        return {}
    for when, text in (("before", before), ("after", after)):
        console.print(f"  {when:6} {setup.config.adapter.sample!r} -> {text!r}", style="dim", soft_wrap=True, highlight=False)
    return {"sample": {"prompt": setup.config.adapter.sample, "before": before, "after": after}}
