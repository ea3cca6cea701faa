"""From a torch module to an ONNX graph in which every quantized layer is one opaque node, and the fusions of onnxruntime on top.

While the graph is traced, each converted layer, and each activation that stands on an edge of the model's graph, is stood in for by a
module that computes nothing: it emits a node `qtrain.PackedLinear`, `PackedConv`, `PackedEmbedding` or `PackedActivation` that carries
the module's name (`torch.onnx.ops.symbolic`). No code, scale or float copy of a packed weight therefore ever passes through the tracer,
the constant folder or the fusions, none of which could keep them as they are; `lower` puts them in last. The stand-ins are swapped in
place and swapped back, whatever happens: a copy would hold the model twice.

A Linear's bias is an addition of its own, which the fusions look for (bias + GELU, attention); a convolution's belongs to its node, and so
does `inverse_smoothing`.

Fusions are onnxscript's for onnxruntime (`optimize_for_ort`): attention, bias + GELU, skip + layer norm. The last is taken apart again,
into Sum and LayerNormalization: onnxruntime 1.31 computes SkipLayerNormalization 2.5 times slower than the two (and fuses Add with
LayerNormalization, hence Sum). onnxruntime.transformers' optimizer finds attention in no graph that torch's exporter makes today.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from torch import Tensor, nn
from torch.export import Dim

from exporters.base import Inputs, packed_layers, standalone_activations

DOMAIN = "qtrain"
"""Of the opaque nodes; none is left in a file."""
CONTRIB = "com.microsoft"


class StandIn(nn.Module):
    """Emits one opaque node for a converted layer or an activation, float32 out.

    linear: x [..., I] -> [..., O]; conv: x [N, I, *spatial] -> [N, O, *spatial]; embedding: ids [...] -> [..., D]; activation: x -> x.
    """

    def __init__(self, name: str, layer: Any) -> None:
        super().__init__()
        self.name, self.layer_kind = name, layer.kind
        self.bias = getattr(layer, "bias", None) if layer.kind == "linear" else None
        if layer.kind == "conv":
            self.kernel = tuple(layer.quantized.shape[2:])
            self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        if layer.kind != "activation":
            self.width = layer.quantized.shape[1 if layer.kind == "embedding" else 0]
        self.embed_scale = getattr(layer, "embed_scale", None)

    def forward(self, x: Tensor) -> Tensor:
        op = f"{DOMAIN}::Packed{self.layer_kind.capitalize()}"
        y = torch.onnx.ops.symbolic(op, (x,), {"layer": self.name}, dtype=torch.float32, shape=self._shape(x), version=1)
        if self.embed_scale is not None:
            return y * self.embed_scale
        return y if self.bias is None else y + self.bias

    def _shape(self, x: Tensor) -> tuple[Any, ...]:
        if self.layer_kind == "activation":
            return tuple(x.shape)
        if self.layer_kind == "conv":
            windows = zip(x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
            return (x.shape[0], self.width, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in windows))
        return (*(x.shape[:-1] if self.layer_kind == "linear" else x.shape), self.width)


class Logits(nn.Module):
    """Positional tensors in, logits out; what `torch.onnx.export` traces."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        return logits_of(self.model(**dict(zip(self.names, tensors, strict=True))))


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor, a tuple that begins with it, or an object or dict with `logits`."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):  # transformers' ModelOutput is one too
        return output["logits"]
    return output.logits if hasattr(output, "logits") else output[0]


def trace(model: nn.Module, inputs: Inputs, max_length: int, opset: int, dynamic: bool = True) -> ir.Model:
    """The graph of ``model``, with inputs named as in ``inputs`` and output `logits`.

    Where ``dynamic``, a first axis is the batch, and a second axis of a two-dimensional integer input is the sequence; else all shapes are
    those of ``inputs``.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    tensors = tuple(t.to(device) for t in inputs.values())
    wrapper = Logits(model, list(inputs)).eval()
    with _stand_ins(wrapper, model), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            wrapper,
            tensors,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes=(tuple(_axes(t, max_length) for t in tensors),) if dynamic else None,
        )
    assert program is not None
    return _tidy(program.model)


def fuse(model: ir.Model) -> ir.Model:
    """Fuse attention and bias + GELU; changes ``model``."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    with _quiet():
        fused, _ = optimize_for_ort(model)
    split_layer_norms(fused)
    return _tidy(fused)


def split_layer_norms(model: ir.Model) -> None:
    """SkipLayerNormalization, or what onnxruntime would make one (Add, LayerNormalization), becomes Sum, LayerNormalization; in place."""
    for norm in [n for n in model.graph if n.op_type == "LayerNormalization"]:
        add = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if add is not None and add.op_type == "Add" and add.domain == "":
            add.op_type = "Sum"
    for node in [n for n in model.graph if n.op_type == "SkipLayerNormalization" and n.domain == CONTRIB]:
        x, skip, gamma, beta, bias = (*node.inputs, None, None)[:5]
        if beta is None or any(o.uses() for o in node.outputs[1:3]):
            continue
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-12
        total = ir.node("Sum", [v for v in (x, bias, skip) if v is not None])
        norm = ir.node("LayerNormalization", [total.outputs[0], gamma, beta], {"axis": -1, "epsilon": epsilon})
        made = [norm.outputs[0], None, None, total.outputs[0]]
        model.graph.insert_before(node, [total, norm])
        for old, new in zip(node.outputs, made, strict=False):
            if new is not None:
                new.type, new.shape = old.type, old.shape
                ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def fused_ops(model: ir.Model) -> dict[str, int]:
    """Operators of onnxruntime's own domain by count, those that hold packed weights aside."""
    packed = ("MatMulNBits", "GatherBlockQuantized")
    return dict(Counter(n.op_type for n in model.graph.all_nodes() if n.domain == CONTRIB and n.op_type not in packed))


def _axes(x: Tensor, max_length: int) -> dict[int, Any]:
    axes = {0: Dim("batch")}
    if x.ndim == 2 and not x.is_floating_point():
        axes[1] = Dim("sequence", max=max_length)
    return axes


def _tidy(model: ir.Model) -> ir.Model:
    """Drop what nothing reads, and the tracer's notes (source lines, paths)."""
    passes.RemoveUnusedNodesPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    return model


@contextlib.contextmanager
def _stand_ins(root: nn.Module, model: nn.Module) -> Iterator[None]:
    names = {id(layer): name for name, layer in (*packed_layers(model).items(), *standalone_activations(model).items())}
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent in [m for m in root.modules() if id(m) not in names]:
            for key, child in list(parent._modules.items()):
                if child is not None and id(child) in names:
                    swapped.append((parent, key, child))
                    parent._modules[key] = StandIn(names[id(child)], child).eval()
        yield
    finally:
        for parent, key, child in swapped:
            parent._modules[key] = child


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's progress lines and advice off the terminal; errors still raise."""
    level = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
