"""TensorRT's rules for an ONNX graph with QuantizeLinear and DequantizeLinear (Q and DQ below), one function each.

A *requirement* is what TensorRT's parser or builder refuses, or its documentation rules out: the receipt fails. *Advice* is what the
documentation recommends for speed: the file computes the same, TensorRT just runs that part in another type, and the receipt lists it as
a fallback.

    domain          requirement  operators of ONNX itself only: com.microsoft's are onnxruntime's
    opset           requirement  13 to 24; float16 scales need 19, int4 and blocks 21
    operators       requirement  none that TensorRT does not have (DynamicQuantizeLinear, MatMulInteger, QLinearConv, …)
    zero_point      requirement  zero, of the type of the codes
    scale           requirement  a constant, finite, greater than 0
    granularity     requirement  activations have one scale, a scalar; a weight one, or one per output channel along the right axis
    blocks          requirement  int4 only, 64 or 128 values along one axis, weights that meet float activations
    pairs           requirement  the output of a Q is read by DQs of the same scale, and by nothing else
    constants       requirement  quantized constants are read by DQ only
    weights         requirement  a weight is stored as codes + DQ, never as a float + Q
    bias            requirement  no codes in a bias, which stays in float
    network         requirement  inputs and outputs are no quantized types, and have static shapes but for the axes of the profile
    types           requirement  the float operands of one node have one type (strong typing)
    both_operands   advice       a product has codes in both operands or in none (int4 weights alone are TensorRT's weight-only mode)
    residual        advice       an addition behind an int8 product has its other operand on codes too, else a following Q cannot be fused
    gemv            advice       no Q and DQ around products with one row or column, or sides below 16: they use no tensor cores
    channels        advice       no int8 convolutions with few channels: some (a 3-channel 7 x 7 stem) have no int8 kernel at all

Sources: NVIDIA TensorRT documentation, "Explicit Quantization" (Q/DQ placement recommendations, limitations), "Working with Quantized
Types", "Strongly Typed Networks"; onnx-tensorrt, docs/operators.md (opsets, operators) and onnxOpImporters.cpp; NVIDIA ModelOpt's int8
placement (GEMV, sides and channels below 16). TensorRT for RTX 1.7.1 itself refuses what breaks domain, operators, zero_point, a scale's
sign, constants, bias (int32) and types; it takes some of the rest (int8 blocks, other block sizes, computed scales), which TensorRT's
documentation does not promise. The tests ask it where its package is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.tensorrt.layout import BLOCKS
from exporters.tensorrt.precision import PRODUCTS, decoder, dequantized, is_product_of_codes, is_weight, is_weight_only, operator_set

OPSETS = (13, 24)
"""The first with scales per channel, and the last that TensorRT 10.15 to 11.2 read."""
HALF_OPSET, BLOCK_OPSET = 19, 21
INT4 = (ir.DataType.INT4, ir.DataType.UINT4)
QUANTIZED = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.UINT4)
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
NOT_IN_TENSORRT = operator_set(
    "AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress ConcatFromSequence "
    "ConvInteger DFT Det DynamicQuantizeLinear MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss "
    "Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty "
    "SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer "
    "StringSplit TfIdfVectorizer Unique"
)
LEAST_SIDE = 16
"""Rows, columns and channels below which int8 tensor cores have nothing to gain (ModelOpt)."""

Dims = Mapping[str, int]
"""Symbolic axis -> its size in the optimization profile."""


@dataclass(frozen=True)
class Finding:
    """One place where a graph breaks a rule."""

    rule: str
    node: str
    """Name of the node, initializer, input or output."""
    message: str
    required: bool

    def __str__(self) -> str:
        return f"{self.rule}: {self.node}: {self.message}"


Found = Iterator[tuple[str, str]]
"""(node, message)."""


def lint(model: ir.Model, dims: Dims) -> list[Finding]:
    """All findings of all rules on a graph with shapes and types, requirements first."""
    found = []
    for name, (required, rule) in RULES.items():
        found += [Finding(name, node, message, required) for node, message in rule(model, dims)]
    return sorted(found, key=lambda f: not f.required)


# -- requirements --------------------------------------------------------------------------------------------------------


def domain(model: ir.Model, dims: Dims) -> Found:
    """Operators of ONNX itself only."""
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            yield _name(node), f"{node.domain}.{node.op_type} is not ONNX's; TensorRT has no such operator"
    for function in model.functions.values():
        yield function.name, "it is a function of the file; inline it"


def opset(model: ir.Model, dims: Dims) -> Found:
    """The operator set is one that TensorRT's parser reads, and new enough for what is in the graph."""
    version = model.opset_imports.get("", 0)
    least, most = OPSETS
    if not least <= version <= most:
        yield "the file", f"opset {version}; TensorRT reads {least} to {most}"
    for node in _codes(model):
        scale = node.inputs[1]
        if version < BLOCK_OPSET and (_block(node) or _codes_type(node) in INT4):
            yield _name(node), f"int4 and blocks need opset {BLOCK_OPSET}, not {version}"
        elif version < HALF_OPSET and scale is not None and scale.dtype == ir.DataType.FLOAT16:
            yield _name(node), f"float16 scales need opset {HALF_OPSET}, not {version}"


def operators(model: ir.Model, dims: Dims) -> Found:
    """Every operator is one that TensorRT has."""
    for node in model.graph.all_nodes():
        if node.op_type in NOT_IN_TENSORRT:
            yield _name(node), f"TensorRT has no {node.op_type}"
        if node.op_type == "LayerNormalization" and len([o for o in node.outputs if o.uses() or o.is_graph_output()]) > 1:
            yield _name(node), "TensorRT's LayerNormalization has its first output only"


def zero_point(model: ir.Model, dims: Dims) -> Found:
    """Zero points are zero."""
    for node in _codes(model):
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is None:
            if node.op_type == "QuantizeLinear" and not node.attributes.get("output_dtype"):
                yield _name(node), "it has no zero point, so that ONNX makes its codes uint8; give it an int8 zero"
            continue
        if zero.const_value is None:
            yield _name(node), f"its zero point {zero.name} is computed; TensorRT needs a constant zero"
        elif zero.dtype not in QUANTIZED:
            yield _name(node), f"its zero point is {zero.dtype}; TensorRT's codes are int8"
        elif np.any(zero.const_value.numpy().astype(np.int32) != 0):
            yield _name(node), "its zero point is not 0; TensorRT is symmetric (quantizer.activation.rule=absmax_onnx)"


def scale(model: ir.Model, dims: Dims) -> Found:
    """Scales are constants, finite and greater than 0."""
    for node in _codes(model):
        value = node.inputs[1]
        if value is None or value.const_value is None:
            yield _name(node), "its scale is computed at run time; TensorRT needs a constant"
            continue
        array = value.const_value.numpy().astype(np.float32)
        if not np.all(np.isfinite(array)):
            yield _name(node), f"{int((~np.isfinite(array)).sum())} of its scales are not finite"
        elif np.any(array <= 0):
            yield _name(node), f"{int((array <= 0).sum())} of its scales are not greater than 0 (quantizer.weight.rule=absmax)"


def granularity(model: ir.Model, dims: Dims) -> Found:
    """One scale per activation; one scale, or one per output channel, per weight."""
    for node in _codes(model):
        value = node.inputs[1]
        if value is None or value.const_value is None or _block(node):
            continue
        if value.const_value.size == 1:
            if len(value.const_value.shape) and not (node.op_type == "DequantizeLinear" and is_weight(node)):
                yield _name(node), "its scale is a vector of one number; a scalar is what TensorRT fuses with the product behind it"
            continue
        if node.op_type == "QuantizeLinear" or not is_weight(node):
            yield _name(node), f"{value.const_value.size} scales on an activation; it has one (quantizer.activation.granularity=tensor)"
            continue
        rank = len(_shape(node.inputs[0]) or ())
        given = node.attributes.get("axis")
        axis = (given.as_int() if given is not None else 1) % max(rank, 1)
        for user, index in node.outputs[0].uses():
            right = _channel_axis(user, index, rank)
            if right is not None and axis != right:
                yield (
                    _name(node),
                    f"its scales lie along axis {axis}; output channels of {_name(user)} are axis {right}",
                )


def blocks(model: ir.Model, dims: Dims) -> Found:
    """Blocks are int4's, of 64 or 128 values, in weights alone."""
    for node in _codes(model):
        size = _block(node)
        if not size:
            if node.op_type == "DequantizeLinear" and _codes_type(node) in INT4 and (_elements(node) or 0) % 2:
                yield _name(node), "int4 codes come in pairs, and their number is odd"
            continue
        if node.op_type == "QuantizeLinear" or not is_weight(node):
            yield _name(node), "blocks on an activation; TensorRT has them for weights"
        elif _codes_type(node) not in INT4:
            yield _name(node), f"blocks of {_codes_type(node)}; TensorRT has them for int4 (quantizer.weight.granularity=channel)"
        elif size not in BLOCKS:
            yield _name(node), f"blocks of {size}; TensorRT has {' and '.join(map(str, sorted(BLOCKS)))}"
        elif not is_weight_only(node):
            yield _name(node), "an int4 weight meets an activation on codes; TensorRT multiplies it with floats only"


def pairs(model: ir.Model, dims: Dims) -> Found:
    """Codes of activations go from Q to DQ."""
    for node in _all(model, "QuantizeLinear"):
        users = node.outputs[0].uses()
        if node.outputs[0].is_graph_output() or not users:
            yield _name(node), "no DequantizeLinear reads it"
        for user, index in users:
            if user.op_type != "DequantizeLinear" or index != 0:
                yield (
                    _name(node),
                    f"{_name(user)} ({user.op_type}) reads its codes; TensorRT reads them in DequantizeLinear only",
                )
            elif not _same(node.inputs[1], user.inputs[1]):
                yield _name(user), f"its scale is not that of {_name(node)}, whose codes it reads"
    for node in _all(model, "DequantizeLinear"):
        producer = None if node.inputs[0] is None else node.inputs[0].producer()
        if not is_weight(node) and (producer is None or producer.op_type != "QuantizeLinear"):
            yield _name(node), "it reads neither codes of a QuantizeLinear nor a constant"


def constants(model: ir.Model, dims: Dims) -> Found:
    """Quantized constants are read by DQ."""
    for name, value in model.graph.initializers.items():
        if value.dtype not in QUANTIZED:
            continue
        for user, index in value.uses():
            if not (user.op_type in ("QuantizeLinear", "DequantizeLinear") and (index == 2 or (index == 0 and user.op_type[0] == "D"))):
                yield (
                    name,
                    f"{_name(user)} ({user.op_type}) reads this {value.dtype} constant; only DequantizeLinear may",
                )


def weights(model: ir.Model, dims: Dims) -> Found:
    """Weights are stored as codes."""
    for node in _all(model, "QuantizeLinear"):
        first = node.inputs[0]
        if first is not None and first.const_value is not None:
            yield _name(node), f"it quantizes the constant {first.name} in the graph; store its codes, so that nothing rounds again"


def bias(model: ir.Model, dims: Dims) -> Found:
    """Biases are floats."""
    for node in model.graph.all_nodes():
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2 and dequantized(node.inputs[2]):
            yield _name(node), "its bias is on codes; TensorRT adds float biases"
    for node in _all(model, "DequantizeLinear"):
        if _codes_type(node) == ir.DataType.INT32:
            yield _name(node), "it decodes int32, which TensorRT's parser refuses; a bias stays in float"


def network(model: ir.Model, dims: Dims) -> Found:
    """Inputs and outputs are of plain types; their dynamic axes are in the profile."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype in QUANTIZED:
            yield str(value.name), f"a network input or output of type {value.dtype}"
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and str(size.value) not in dims:
                yield (
                    str(value.name),
                    f"axis {axis} ({size.value}) is dynamic without a range; TensorRT needs min, opt and max",
                )


def types(model: ir.Model, dims: Dims) -> Found:
    """Float operands of one node have one type."""
    for node in model.graph.all_nodes():
        operands = list(node.inputs)
        if node.op_type == "Resize":  # its scales are float32 by definition
            operands = operands[:1]
        given = [v.dtype for v in operands if v is not None and v.dtype in FLOATS]
        made = [v.dtype for v in node.outputs if v.dtype in FLOATS]
        if len(set(given)) > 1:
            yield _name(node), f"operands of {' and '.join(sorted({str(d) for d in given}))}; a strongly typed network casts explicitly"
        elif given and made and node.op_type in SAME_TYPE and given[0] != made[0]:
            yield _name(node), f"it makes {made[0]} of {given[0]}"


SAME_TYPE = operator_set(
    "Add Sub Mul Div MatMul Gemm Conv Relu Softmax LayerNormalization Reshape Transpose Concat Gelu Tanh DequantizeLinear"
)
"""Operators whose float outputs have the type of their float inputs (for DequantizeLinear: of its scale)."""


# -- advice --------------------------------------------------------------------------------------------------------------


def both_operands(model: ir.Model, dims: Dims) -> Found:
    """Products have codes in both operands or in none."""
    for node in _all(model, *PRODUCTS):
        first, second = dequantized(node.inputs[0]), dequantized(node.inputs[1])
        if first and not second:
            yield _name(node), "its input is on codes and its weight is not, so that it runs in float"
        if second and not first and (weight := decoder(node.inputs[1])) is not None and _codes_type(weight) not in INT4:
            yield _name(node), "its weight is int8 and its input is not, so that it runs in float: smaller, not faster"


def residual(model: ir.Model, dims: Dims) -> Found:
    """Additions behind int8 products have codes on the other side."""
    for node in _all(model, "Add"):
        operands = [v for v in node.inputs if v is not None and v.const_value is None]
        if len(operands) != 2 or not _reaches_codes(node.outputs[0]):
            continue
        direct = [_comes_from_product(v) for v in operands]
        on_codes = [dequantized(v) for v in operands]
        if any(direct) and not any(on_codes):
            yield _name(node), "it adds to an int8 product a value that is not on codes, so that the following QuantizeLinear is not fused"


def gemv(model: ir.Model, dims: Dims) -> Found:
    """Small products are left in float."""
    for node in _all(model, "MatMul", "Gemm"):
        if not is_product_of_codes(node):
            continue
        out, weight = _shape(node.outputs[0]), _shape(node.inputs[1])
        if not out or not weight or len(weight) != 2:
            continue
        transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        k, n = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
        rows = [_size(d, dims) for d in out[:-1]]
        m = None if None in rows else int(np.prod([r for r in rows if r is not None]))
        if m == 1 or n == 1:
            yield _name(node), f"a product of {m} x {k} with {k} x {n}: one row or column uses no tensor cores; keep it in float"
        elif isinstance(k, int) and isinstance(n, int) and min(k, n) < LEAST_SIDE:
            yield _name(node), f"a product with {k} x {n}: sides below {LEAST_SIDE} are faster in float"


def channels(model: ir.Model, dims: Dims) -> Found:
    """Convolutions with few channels are left in float."""
    for node in _all(model, "Conv"):
        shape = _shape(node.inputs[1])
        if not is_product_of_codes(node) or not shape or not all(isinstance(d, int) for d in shape[:2]):
            continue
        group = node.attributes["group"].as_int() if "group" in node.attributes else 1
        outputs, inputs = int(str(shape[0])), int(str(shape[1]))
        if group > 1:
            if outputs % 8:
                yield _name(node), f"a grouped convolution to {outputs} channels, no multiple of 8, may have no int8 kernel"
        elif min(inputs, outputs) < LEAST_SIDE and ((inputs % 8 and outputs % 8) or max(inputs, outputs) < LEAST_SIDE):
            yield _name(node), f"a convolution from {inputs} to {outputs} channels may have no int8 kernel, or a slow one; keep it in float"
        elif inputs < 4:
            yield (
                _name(node),
                f"a convolution of {inputs} channels (TensorRT 10.16 had no int8 kernel for a 7 x 7 stem)",
            )


Rule = Callable[[ir.Model, Dims], Found]
RULES: dict[str, tuple[bool, Rule]] = {
    **{
        rule.__name__: (True, rule)
        for rule in (domain, opset, operators, zero_point, scale, granularity, blocks, pairs, constants, weights)
    },
    **{rule.__name__: (True, rule) for rule in (bias, network, types)},
    **{rule.__name__: (False, rule) for rule in (both_operands, residual, gemv, channels)},
}
"""Name -> (whether it is a requirement, the rule)."""


# -- pieces --------------------------------------------------------------------------------------------------------------


def _all(model: ir.Model, *ops: str) -> Iterator[ir.Node]:
    return (n for n in model.graph.all_nodes() if n.op_type in ops)


def _codes(model: ir.Model) -> Iterator[ir.Node]:
    return _all(model, "QuantizeLinear", "DequantizeLinear")


def _name(node: ir.Node) -> str:
    return str(node.name or (node.outputs[0].name if node.outputs else node.op_type))


def _codes_type(node: ir.Node) -> ir.DataType | None:
    return None if node.inputs[0] is None else node.inputs[0].dtype


def _block(node: ir.Node) -> int:
    return node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0


def _elements(node: ir.Node) -> int | None:
    first = node.inputs[0]
    return None if first is None or first.const_value is None else first.const_value.size


def _shape(value: ir.Value | None) -> list[int | ir.SymbolicDim] | None:
    return None if value is None or value.shape is None else list(value.shape)


def _size(dim: int | ir.SymbolicDim, dims: Dims) -> int | None:
    return dim if isinstance(dim, int) else dims.get(str(dim.value))


def _same(a: ir.Value | None, b: ir.Value | None) -> bool:
    if a is None or b is None or a.const_value is None or b.const_value is None:
        return a is b
    return bool(np.array_equal(a.const_value.numpy().reshape(-1).astype(np.float32), b.const_value.numpy().reshape(-1).astype(np.float32)))


def _channel_axis(user: ir.Node, index: int, rank: int) -> int | None:
    """The axis of output channels in operand ``index`` of a product; None where the node is none."""
    if index != 1:
        return None
    if user.op_type == "Conv":
        return 0
    if user.op_type == "ConvTranspose":
        return 1
    if user.op_type == "Gemm":
        return 0 if "transB" in user.attributes and user.attributes["transB"].as_int() == 1 else 1
    return rank - 1 if user.op_type == "MatMul" else None


def _comes_from_product(value: ir.Value) -> bool:
    """Whether an int8 product makes a value, with nothing but its bias and casts between."""
    node = value.producer()
    while node is not None and (node.op_type == "Cast" or (node.op_type == "Add" and _adds_constant(node))):
        first = next(v for v in node.inputs if v is not None and v.const_value is None)
        node = first.producer()
    return node is not None and is_product_of_codes(node)


def _adds_constant(node: ir.Node) -> bool:
    return sum(v is not None and v.const_value is None for v in node.inputs) == 1


def _reaches_codes(value: ir.Value, depth: int = 4) -> bool:
    """Whether a QuantizeLinear follows within a few pointwise nodes."""
    for user, _ in value.uses():
        if user.op_type == "QuantizeLinear":
            return True
        if depth and user.op_type in ("Relu", "Clip", "Cast", "LeakyRelu") and _reaches_codes(user.outputs[0], depth - 1):
            return True
    return False
