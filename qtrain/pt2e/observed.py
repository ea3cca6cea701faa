"""torch's observers in a graph: which quantizer puts them there, what it left out, and the calibration pass.

    pt2e   torchao's quantizers annotate the graph of torch.export by operator and pattern; `prepare_pt2e` (or `prepare_qat_pt2e`, which
           also fuses convolution and batch-norm for training) inserts observers (or fake-quantizers)
    fx     torch.ao's older `prepare_fx` traces symbolically and goes by module; deprecated, and gone one day

What torch's own flow does silently, and this does not: a chosen module that its patterns do not reach is noted; an activation that is NaN
or constant is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtrain.activations import NotFinite
from qtrain.graph import has_convolutions
from qtrain.grids.base import Grid
from qtrain.layers import FakeEmbedding
from qtrain.pt2e.exported import PRODUCTS, Exported, Untraceable, aten, fake_quantizers, is_observer, on_device, quiet, reason
from qtrain.pt2e.graph_qat import join, mend_batch_norms, split

Note = dict[str, str]


def put_observers(graph: Exported, backend: str, training: bool, kept: list[str], *, instead: str) -> Exported:
    """Insert the observers of ``backend``'s quantizer.

    Args:
        training: whether to insert fake-quantizers, for training.
        kept: names of Linear and convolution modules to leave alone.
        instead: the quantizer to name in errors that needs no graph.

    Raises:
        Untraceable: if torch's quantizer fails.
    """
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e

    if training:
        split(graph, kept)
    with quiet():
        quantizer = _quantizer(graph, backend, training, kept)
        try:
            prepared = (prepare_qat_pt2e if training else prepare_pt2e)(graph, quantizer)
        except Exception as error:  # its patterns assert what they expect
            raise Untraceable(
                f"torch's quantizer for {backend} cannot take the graph of this model: {reason(error)}. Set another quantizer.backend, or "
                f"quantizer={instead}, which needs no graph"
            ) from error
    if training:
        join(prepared)
        mend_batch_norms(prepared)
    for fake in fake_quantizers(prepared):
        fake.register_forward_pre_hook(_in_float32)
    return Exported(prepared, prepared.graph)


def _in_float32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """torch's fused fake-quantizer takes float32 only, and autocast may give it bfloat16."""
    return tuple(x.float() for x in inputs)


def _quantizer(graph: Exported, backend: str, training: bool, kept: list[str]) -> Any:
    if backend == "xnnpack":
        from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

        xnnpack = xnnpack_module()
        for node in graph.graph.nodes:
            if node.meta.get("layer") in kept:
                node.meta["quantization_annotation"] = QuantizationAnnotation(_annotated=True)
        config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_qat=training)
        return xnnpack.XNNPACKQuantizer().set_global(config)
    from torchao.quantization.pt2e.quantizer import arm_inductor_quantizer as arm
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    if backend == "arm":
        quantizer = arm.ArmInductorQuantizer().set_global(arm.get_default_arm_inductor_quantization_config(is_qat=training))
    else:
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=training))
    for name in {node.meta["layer"] for node in graph.graph.nodes if node.meta.get("layer") in kept}:
        quantizer.set_module_name_qconfig(name, None)
    return quantizer


def xnnpack_module() -> Any:
    """executorch's quantizer; or, where it is not installed, the copy that torchao has."""
    try:
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    except ImportError:
        from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack_quantizer
    return xnnpack_quantizer


def require_convolutions(model: nn.Module) -> None:
    """Refuse what prepare_fx is not offered for.

    Raises:
        ValueError: if ``model`` has no convolutions.
    """
    if not has_convolutions(model):
        raise ValueError(
            f"quantizer.flow=fx is for convolutional networks, and {type(model).__name__} has no convolutions; prepare_fx cannot trace "
            "transformers. Set quantizer.flow=pt2e, or quantizer=ptq_static, which needs no graph"
        )


def put_legacy_observers(model: nn.Module, example: dict[str, Tensor], backend: str, kept: list[str]) -> fx.GraphModule:
    """`prepare_fx` of torch.ao: trace ``model`` symbolically, fold its batch-norms, insert observers.

    Raises:
        ValueError: if this torch has no prepare_fx any more.
        Untraceable: naming what torch.fx stumbled over.
    """
    try:
        from torch.ao.quantization import HistogramObserver as Histogram
        from torch.ao.quantization import QConfig, QConfigMapping, default_per_channel_weight_observer, default_weight_observer
        from torch.ao.quantization.quantize_fx import prepare_fx
    except ImportError as error:
        raise ValueError(
            f"quantizer.flow=fx needs torch.ao.quantization.quantize_fx, which torch {torch.__version__} does not have any more. Set "
            "quantizer.flow=pt2e, which replaces it"
        ) from error
    weight = default_per_channel_weight_observer if backend == "x86" else default_weight_observer
    config: Any = QConfig
    mapping = QConfigMapping().set_global(config(activation=Histogram.with_args(reduce_range=False), weight=weight))
    for name in kept:
        mapping.set_module_name(name, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return prepare_fx(model.eval(), mapping, tuple(on_device(model, example).values()))
        except Exception as error:  # whatever the model's code raises when it is given proxies
            raise Untraceable(
                f"prepare_fx cannot trace {type(model).__name__}: {reason(error)}. Set quantizer=ptq_static, which traces what it can, or "
                "quantizer.flow=pt2e"
            ) from error


def convert_legacy(model: fx.GraphModule) -> fx.GraphModule:
    """torch.ao's convert step, with float operators between quantize and dequantize."""
    from torch.ao.quantization.quantize_fx import convert_to_reference_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert_to_reference_fx(model)


def left_out(graph: fx.GraphModule, chosen: dict[str, nn.Module], backend: str) -> list[Note]:
    """Which of the chosen modules torch's quantizer did not reach, and why; Embeddings are not its business.

    Raises:
        ValueError: if it reached none.
    """
    nodes = list(graph.graph.nodes)
    present = {n.meta["layer"] for n in nodes if n.target in PRODUCTS} | {n.target for n in nodes if n.op == "call_module"}
    reached = {n.meta["layer"] for n in nodes if n.target in PRODUCTS and is_observer(graph, n.args[1])}
    reached |= {n.target for n in nodes if n.op == "call_module" and n.args and is_observer(graph, n.args[0])}
    products = [name for name, module in chosen.items() if not isinstance(module, nn.Embedding)]
    notes = []
    for name in products:
        if name not in present:
            notes.append({"name": name, "why": "no linear or convolution of the traced graph reads its weight, so it stays in float"})
        elif name not in reached:
            notes.append({"name": name, "why": f"torch's quantizer for {backend} has no pattern for it, so it stays in float"})
    if len(notes) == len(products):
        raise ValueError(
            f"torch's quantizer for {backend} finds nothing to quantize in {len(products)} chosen modules, the first "
            f"{products[0] if products else 'none'}. Set another quantizer.backend, or quantizer=ptq_static"
        )
    return notes


def embeddings(graph: fx.GraphModule, chosen: dict[str, nn.Module]) -> list[str]:
    """Names of the chosen Embeddings that the graph looks up."""
    read = {str(n.args[0].target).removesuffix(".weight") for n in graph.graph.nodes if n.target == aten.embedding.default}
    return [name for name, module in chosen.items() if isinstance(module, nn.Embedding) and name in read]


def put_embeddings(graph: Exported, names: list[str], grid: Grid) -> None:
    """Put a `FakeEmbedding` in place of each look-up in the Embeddings ``names``."""
    made: dict[str, FakeEmbedding] = {}
    for node in list(graph.graph.nodes):
        name = str(node.args[0].target).removesuffix(".weight") if node.target == aten.embedding.default else ""
        if name not in names:
            continue
        if name not in made:
            weight = graph.get_parameter(f"{name}.weight")
            padding = node.args[2] if len(node.args) > 2 and node.args[2] >= 0 else None
            embedding = nn.Embedding(*weight.shape, padding_idx=padding, _weight=weight.detach())
            embedding.weight = weight
            made[name] = FakeEmbedding(embedding, grid)
            parent, _, leaf = name.rpartition(".")
            setattr(graph.get_submodule(parent), leaf, made[name])
        with graph.graph.inserting_before(node):
            fake = graph.graph.call_module(name, (node.args[1],))
        node.replace_all_uses_with(fake)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    graph.train(graph.training)


@torch.no_grad()
def observe(graph: fx.GraphModule, batches: Iterable[dict[str, Tensor]]) -> int:
    """Run ``batches`` (keyword inputs) through the observers, in float.

    Returns:
        Number of examples seen.

    Raises:
        ValueError: if there is no batch, or an activation is not finite or constant, naming the layer that reads it and the batch.
    """
    if isinstance(graph, Exported):
        graph.eval()
    fakes = list(fake_quantizers(graph))
    activations = list(_activations(graph))
    handles = [observer.register_forward_pre_hook(_finite(layer)) for layer, observer in activations]
    number = examples = 0
    try:
        for fake in fakes:
            fake.enable_observer(True)
            fake.disable_fake_quant()
        for batch in batches:
            graph(**on_device(graph, batch))
            examples, number = examples + len(next(iter(batch.values()))), number + 1
    except NotFinite as error:
        raise ValueError(f"calibration batch {number}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
        for fake in fakes:
            fake.disable_observer()
            fake.enable_fake_quant()
    if not examples:
        raise ValueError("there is no calibration data; set data.calibration_examples=256, say")
    for layer, observer in activations:
        _require_range(layer, getattr(observer, "activation_post_process", observer))
    if fakes:
        graph(**on_device(graph, batch))  # they derive scales from ranges when they are used
    return examples


def _activations(graph: fx.GraphModule) -> Iterator[tuple[str, nn.Module]]:
    """Observers of activations, with the name of a layer that reads each."""
    for node in graph.graph.nodes:
        if not is_observer(graph, node) or any(u.target in PRODUCTS and u.args[1] is node for u in node.users):
            continue
        yield _layer_near(graph, node), graph.get_submodule(str(node.target))


def _layer_near(graph: fx.GraphModule, node: fx.Node) -> str:
    """The Linear or convolution that reads the value of ``node``, the nearest behind it; or the nearest before it, where there is none."""
    products = (nn.Linear, nn.Conv1d, nn.Conv2d)
    for neighbours in (lambda n: list(n.users), lambda n: n.all_input_nodes):
        level, seen = [node], {node}
        while level:
            for near in level:
                module = graph.get_submodule(str(near.target)) if near.op == "call_module" else None
                if isinstance(module, products) or (isinstance(module, nn.Sequential) and isinstance(module[0], products)):
                    return str(near.target)
                if "layer" in near.meta:
                    return str(near.meta["layer"])
            level = [n for near in level for n in neighbours(near) if n not in seen]
            seen |= set(level)
    return node.name


def _finite(layer: str) -> Any:
    def check(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        finite = torch.isfinite(inputs[0])
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise NotFinite(
                f"the activation that {layer} reads has {bad} values that are not finite. Look at the data and the model; or leave the "
                f"layer in float: quantizer.keep_float=['{layer}']"
            )

    return check


def _require_range(layer: str, observer: Any) -> None:
    low, high = float(observer.min_val), float(observer.max_val)
    if low > high:
        raise ValueError(f"the activation that {layer} reads was never computed; leave it in float: quantizer.keep_float=['{layer}']")
    if low == high:
        raise ValueError(
            f"the activation that {layer} reads was {low:g} in all calibration examples: a constant has no range to quantize, and a layer "
            f"that sees nothing else is broken or unused. Leave it in float: quantizer.keep_float=['{layer}']"
        )
