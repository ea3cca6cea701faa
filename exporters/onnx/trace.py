"""From a torch module to an ONNX graph in which every quantized layer is one opaque node, and the fusions of onnxruntime on top.

While the graph is traced, each converted layer is stood in for by a module that computes nothing: it emits a node
`qtrain.PackedLinear` or `qtrain.PackedEmbedding` that carries the layer's name (`torch.onnx.ops.symbolic`). No code, scale or float copy
of a packed weight therefore ever passes through the tracer, the constant folder or the fusions, none of which could keep them as they
are; `lower` puts them in last. The stand-ins are swapped in place and swapped back, whatever happens: a copy would hold the model twice.

Fusions are onnxscript's for onnxruntime (`optimize_for_ort`): attention, skip + layer norm, bias + GELU. onnxruntime.transformers'
optimizer finds attention in no graph that torch's exporter makes today.
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

from exporters.base import Inputs, packed_layers

DOMAIN = "qtrain"
"""Of the opaque nodes; none is left in a file."""
CONTRIB = "com.microsoft"


class StandIn(nn.Module):
    """Emits one opaque node for a converted layer. x [..., K] float32 or ids [...] -> [..., width] float32."""

    def __init__(self, name: str, layer: Any) -> None:
        super().__init__()
        self.name = name
        self.linear = layer.kind == "linear"
        self.width = layer.quantized.shape[0 if self.linear else 1]
        self.bias = getattr(layer, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*(x.shape[:-1] if self.linear else x.shape), self.width)
        op = f"{DOMAIN}::{'PackedLinear' if self.linear else 'PackedEmbedding'}"
        y = torch.onnx.ops.symbolic(op, (x,), {"layer": self.name}, dtype=torch.float32, shape=shape, version=1)
        return y if self.bias is None else y + self.bias


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


def trace(model: nn.Module, inputs: Inputs, max_length: int, opset: int) -> ir.Model:
    """The graph of ``model``, with inputs named as in ``inputs``, output `logits`, and dynamic batch and sequence axes.

    A first axis is the batch; a second axis of a two-dimensional integer input is the sequence.
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
            dynamic_shapes=(tuple(_axes(t, max_length) for t in tensors),),
        )
    assert program is not None
    return _tidy(program.model)


def fuse(model: ir.Model) -> ir.Model:
    """Fuse attention, skip + layer norm and bias + GELU; changes ``model``."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    with _quiet():
        fused, _ = optimize_for_ort(model)
    return _tidy(fused)


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
    names = {id(layer): name for name, layer in packed_layers(model).items()}
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent in list(root.modules()):
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
