"""From a float32 graph to a strongly typed one: float16 wherever float16 holds the values, float32 where it does not.

TensorRT 10.12 deprecated and 11 removed the flags that let the builder choose precisions; a strongly typed network computes in the types
that the graph states. So this file states them. A node stays in float32 for one of these reasons, in this order:

    codes        QuantizeLinear (and the smoothing before it), DequantizeLinear, their product and the bias behind it. TensorRT computes on
                 int8; float32 is only the type that their scales have. Training's scales are float32, and a scale rounded to float16 is
                 another grid. TensorRT-RTX 1.7 compiles both to the same int8 kernels, with the casts inside the neighbouring ones, but
                 from float16 scales it quantizes with the reciprocal rounded to float16, from float32 ones in float32.
    no float16   ONNX has no float16 form of the operator (Range), or of one input (Resize's scales)
    initializer  a constant beyond 65504
    data_max     an input or output that was seen beyond `data_max`: above 512 neighbouring float16 numbers are 0.5 apart. NVIDIA ModelOpt's
                 AutoCast has this rule and this default; here attention masks of -3e38 put the softmax in float32.
    sum          a sum whose terms could pass 65504 on the way though its result does not (ReduceMean, average pooling, …)

Everything else is float16, but for light nodes (elementwise, data movement): a group of them takes whichever type needs fewer casts, so
that a ReLU between two int8 convolutions is not cast to float16 and back. A value is cast at most once to each type, and a
DequantizeLinear of a weight alone is float16 only if its scales are float16 numbers, to the bit: then code * scale is rounded once, as
it would be by a cast.

Network inputs and outputs keep their types. What is not handled: control flow (`If`, `Loop`), float64, bfloat16.

Sources: NVIDIA TensorRT documentation, "Strongly Typed Networks" and "Migrating from TensorRT 10.x to 11.x"; NVIDIA ModelOpt
documentation, "AutoCast (ONNX)" (data_max 512, init_max 65504).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes


def operator_set(names: str) -> frozenset[str]:
    """Names of operators, given in one line."""
    return frozenset(names.split())


FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
HALF_MAX = 65504.0
"""The largest finite float16."""
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
"""Operators that TensorRT computes on codes where both operands are dequantized."""
CODES = ("QuantizeLinear", "DequantizeLinear")
MOVES = operator_set(
    "Reshape Transpose Squeeze Unsqueeze Flatten Concat Split Slice Gather GatherElements GatherND Expand Tile Pad Identity DepthToSpace "
    "SpaceToDepth Where MaxPool GlobalMaxPool Relu Neg Abs Max Min Dropout"
)
"""Operators whose outputs are among their inputs' values, up to sign and zero: they round nothing."""
PASSES = operator_set("Cast Reshape Transpose Squeeze Unsqueeze Flatten Slice Identity MaxPool DepthToSpace SpaceToDepth")
"""Operators behind which a value is still on the grid that it was on."""
LIGHT = MOVES | operator_set(
    "Add Sub Mul Div LeakyRelu PRelu Clip Sigmoid HardSigmoid HardSwish Mish Tanh Erf Gelu Elu Selu Celu Softplus Softsign Sqrt Reciprocal "
    "Pow Exp Log Floor Ceil Round Sign Sum Mean Cast AveragePool GlobalAveragePool ReduceMean Mod Trilu IsNaN IsInf Equal Greater "
    "GreaterOrEqual Less LessOrEqual ArgMax ArgMin"
)
"""Operators cheap enough that float32 costs less than two casts."""
SMOOTHING = ".inverse_smoothing"
"""End of the name of a constant that belongs to the quantized input of a layer."""
ANY_TYPE = ("Shape", "Size")
"""Operators that read no values, so that a cast before them would be for nothing."""
SUMS = dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceL1", "CumSum", "AveragePool", "GlobalAveragePool", "Mean", "Sum"), 1)
SUMS |= dict.fromkeys(("ReduceL2", "ReduceSumSquare", "LpNormalization", "InstanceNormalization", "GroupNormalization"), 2)
"""Operators that add up a power of their input, and the power. LayerNormalization adds up in float32 (its stash_type)."""


@dataclass(frozen=True)
class Kept:
    """A node that stays in float32."""

    node: str
    op: str
    why: str
    maximum: float | None = None
    """The largest magnitude that was seen, or that a sum could reach."""


@dataclass
class Report:
    """What became of the graph."""

    kept: list[Kept] = field(default_factory=list)
    """Nodes in float32 because float16 cannot hold their values; those on codes and light neighbours aside."""
    on_codes: int = 0
    """Nodes in float32 because they compute on codes."""
    halves: int = 0
    """Nodes in float16."""
    casts: int = 0
    underflow: dict[str, int] = field(default_factory=dict)
    """Initializer -> how many of its values are not zero but become zero in float16."""


@dataclass
class Measured:
    """What was seen while the float32 graph ran."""

    maximum: dict[str, float] = field(default_factory=dict)
    """Value name -> largest magnitude; inf where it was not finite."""
    terms: dict[str, float] = field(default_factory=dict)
    """Node name -> largest number of input values per output value, for the operators in `SUMS`."""


def normalize(model: ir.Model) -> None:
    """Give every node and value a name and a type, and hold constants as initializers; in place.

    Raises:
        ValueError: for control flow.
    """
    passes.LiftConstantsToInitializersPass()(model)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.NameFixPass()(model)
    passes.ShapeInferencePass()(model)
    for node in model.graph:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise ValueError(
                f"{node.name} is control flow ({node.op_type}), which export=tensorrt does not hold; trace a model without branches on data"
            )


def to_half(model: ir.Model, measured: Measured, data_max: float) -> Report:
    """Make a normalized float32 graph float16, in place."""
    return _Conversion(model, measured, data_max).run()


class _Conversion:
    """One conversion; `kept32` decides the type of every node, `light` nodes aside until `_settle`."""

    def __init__(self, model: ir.Model, measured: Measured, data_max: float) -> None:
        self.model, self.graph, self.opset = model, model.graph, model.opset_imports[""]
        self.measured, self.data_max = measured, data_max
        self.report = Report()
        self.kept32: set[ir.Node] = set()
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.halved: dict[ir.Value, ir.Value] = {}
        self.slots: dict[ir.Node, tuple[list[bool], list[bool]]] = {}

    def run(self) -> Report:
        nodes = [n for n in self.graph if any(is_float(v) for v in (*n.inputs, *n.outputs))]
        self.slots = {n: _half_slots(n, self.opset) for n in nodes}
        self._keep(nodes)
        self._settle(nodes)
        needs = {n: [self._needed(n, i) for i in range(len(n.inputs))] for n in nodes}
        gives = {o: self._given(n, i) for n in nodes for i, o in enumerate(n.outputs) if is_float(o)}
        for node in nodes:
            self._retype(node, gives)
        for node in nodes:
            for i, (value, needed) in enumerate(zip(node.inputs, needs[node], strict=True)):
                if value is not None and needed is not None:
                    node.replace_input_with(i, self._as(value, needed))
        self._outputs()
        passes.RemoveUnusedNodesPass()(self.model)
        self.report.halves = sum(any(gives.get(o) == HALF for o in n.outputs) for n in nodes)
        self.report.casts = len(self.casts)
        return self.report

    # -- which nodes stay --------------------------------------------------------------------------------------------

    def _keep(self, nodes: list[ir.Node]) -> None:
        for node in nodes:
            if self._on_codes(node):
                self.kept32.add(node)
                self.report.on_codes += 1
                continue
            why, maximum = self._why(node)
            if why:
                self.kept32.add(node)
                self.report.kept.append(Kept(str(node.name), node.op_type, why, maximum))

    def _on_codes(self, node: ir.Node) -> bool:
        if node.op_type == "DequantizeLinear" and is_weight_only(node):
            return not _halves_exactly(node.inputs[1])
        return node.op_type in CODES or is_product_of_codes(node) or is_bias_of_codes(node) or _smooths(node)

    def _why(self, node: ir.Node) -> tuple[str, float | None]:
        if not self._allows(node):
            return "ONNX has no float16 form of it", None
        for value in node.inputs:
            if value is not None and is_float(value) and value.const_value is not None and (beyond := _beyond(value)):
                return f"the constant {value.name} is beyond float16", beyond
        seen = [self.measured.maximum.get(str(v.name), 0.0) for v in _flowing(node)]
        largest = max(seen, default=0.0)
        if largest > self.data_max:
            return f"an input or output is beyond data_max={self.data_max:g}", largest
        power = SUMS.get(node.op_type, 2 if _sums_in_half(node) else 0)
        first = node.inputs[0] if node.inputs else None
        if power and first is not None:
            bound = self.measured.terms.get(str(node.name), 1.0) * self.measured.maximum.get(str(first.name), 0.0) ** power
            if bound > HALF_MAX:
                return "the sum in it could be beyond float16", bound
        return "", None

    def _allows(self, node: ir.Node) -> bool:
        inputs, outputs = self.slots[node]
        floats = [ok for v, ok in zip(node.inputs, inputs, strict=True) if is_float(v)]
        floats += [ok for v, ok in zip(node.outputs, outputs, strict=True) if is_float(v)]
        return any(floats)

    # -- light nodes take the cheaper side ---------------------------------------------------------------------------

    def _settle(self, nodes: list[ir.Node]) -> None:
        free = [n for n in nodes if n not in self.kept32 and (n.op_type in LIGHT or n.op_type == "DequantizeLinear")]
        for group in _groups(free):
            values = _touched(group)
            before = self._cost(values)
            self.kept32.update(group)
            if self._cost(values) >= before:
                self.kept32.difference_update(group)
        for _ in range(8):
            if sum(self._flip(node) for node in free) == 0:
                return

    def _flip(self, node: ir.Node) -> bool:
        values = _touched([node])
        before, was = self._cost(values), node in self.kept32
        (self.kept32.discard if was else self.kept32.add)(node)
        if self._cost(values) < before:
            return True
        (self.kept32.add if was else self.kept32.discard)(node)
        return False

    def _cost(self, values: Iterable[ir.Value]) -> int:
        """Casts that ``values`` need."""
        total = 0
        for value in values:
            producer = value.producer()
            has = FLOAT if producer is None else self._given(producer, value.index() or 0)
            needed = {self._needed(n, i) for n, i in value.uses()} | ({FLOAT} if value.is_graph_output() else set())
            total += len(needed - {has, None})
        return total

    def _needed(self, node: ir.Node, index: int) -> ir.DataType | None:
        """Type that the node needs of an input, None where that is no float."""
        if node.op_type in ANY_TYPE or not is_float(node.inputs[index]):
            return None
        if node not in self.slots or node in self.kept32:
            return FLOAT
        return HALF if self.slots[node][0][index] else FLOAT

    def _given(self, node: ir.Node, index: int) -> ir.DataType:
        return HALF if node in self.slots and node not in self.kept32 and self.slots[node][1][index] else FLOAT

    # -- the graph ---------------------------------------------------------------------------------------------------

    def _retype(self, node: ir.Node, gives: dict[ir.Value, ir.DataType]) -> None:
        for value in node.outputs:
            if gives.get(value) == HALF:
                value.type = ir.TensorType(HALF)
                if node.op_type in ("Cast", "EyeLike", "RandomNormal", "RandomUniform"):
                    key = "to" if node.op_type == "Cast" else "dtype"
                    node.attributes[key] = ir.AttrInt64(key, int(HALF))
                if node.op_type == "ConstantOfShape":
                    given = node.attributes.get("value")
                    fill = given.as_tensor().numpy() if given is not None else np.zeros(1, np.float32)
                    node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(fill.astype(np.float16)))

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` in ``dtype``: itself, a half initializer, or a cast made once."""
        if value.const_value is not None and value.producer() is None:
            return value if dtype == FLOAT else self._half_initializer(value)
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self.casts:
            suffix = "half" if dtype == HALF else "single"
            cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}.cast_{suffix}")
            out = cast.outputs[0]
            out.name, out.type, out.shape = f"{value.name}.{suffix}", ir.TensorType(dtype), value.shape
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], [cast])
            else:
                self.graph.insert_after(producer, [cast])
            self.casts[value, dtype] = out
        return self.casts[value, dtype]

    def _half_initializer(self, value: ir.Value) -> ir.Value:
        if value not in self.halved:
            assert value.const_value is not None
            single = value.const_value.numpy()
            with np.errstate(over="ignore"):
                half = single.astype(np.float16)
            lost = int(((half == 0) & (single != 0)).sum())
            if lost:
                self.report.underflow[str(value.name)] = lost
            everywhere = all(self._needed(n, i) == HALF for n, i in value.uses()) and not value.is_graph_output()
            name = str(value.name)
            if everywhere:
                self.graph.initializers.pop(name)
                value.name = None
            else:
                name += ".half"
            tensor = ir.Tensor(half, name=name)
            new = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(HALF))
            self.graph.register_initializer(new)
            self.halved[value] = new
        return self.halved[value]

    def _outputs(self) -> None:
        """Outputs keep name and type."""
        for i, value in enumerate(self.graph.outputs):
            if value.dtype != HALF:
                continue
            name = value.name
            value.name = f"{name}.half"
            out = self._as(value, FLOAT)
            out.name = name
            self.graph.outputs[i] = out


# -- what a node is ------------------------------------------------------------------------------------------------------


def is_float(value: ir.Value | None) -> bool:
    """Whether it is a float32 or float16 tensor."""
    return value is not None and value.dtype in (FLOAT, HALF)


def decoder(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes a value, with nothing between that changes one: TensorRT moves it behind those."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in PASSES and node.inputs:
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def dequantized(value: ir.Value | None) -> bool:
    """Whether a value is on a grid."""
    return decoder(value) is not None


def is_weight(dequantize: ir.Node) -> bool:
    """Whether a DequantizeLinear reads an initializer."""
    first = dequantize.inputs[0]
    return first is not None and first.const_value is not None


def is_product_of_codes(node: ir.Node) -> bool:
    """Whether both operands of a product are dequantized."""
    return node.op_type in PRODUCTS and dequantized(node.inputs[0]) and dequantized(node.inputs[1])


def is_bias_of_codes(node: ir.Node) -> bool:
    """Whether it adds a constant to nothing but a product of codes."""
    if node.op_type != "Add":
        return False
    constant = [v for v in node.inputs if v is not None and v.const_value is not None]
    rest = [v for v in node.inputs if v is not None and v.const_value is None]
    producer = rest[0].producer() if len(constant) == len(rest) == 1 else None
    return producer is not None and is_product_of_codes(producer) and len(rest[0].uses()) == 1


def is_weight_only(dequantize: ir.Node) -> bool:
    """Whether it decodes a weight that meets floats: no product of codes reads it."""
    users = [n for n, _ in dequantize.outputs[0].uses()]
    return is_weight(dequantize) and not any(is_product_of_codes(n) for n in users)


def _smooths(node: ir.Node) -> bool:
    return node.op_type == "Mul" and any(v is not None and str(v.name).endswith(SMOOTHING) for v in node.inputs)


def _halves_exactly(scale: ir.Value | None) -> bool:
    if scale is None or scale.const_value is None:
        return False
    values = scale.const_value.numpy().astype(np.float32)
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16).astype(np.float32) == values).all())


def _sums_in_half(node: ir.Node) -> bool:
    return node.op_type == "LayerNormalization" and "stash_type" in node.attributes and node.attributes["stash_type"].as_int() != int(FLOAT)


def _beyond(value: ir.Value) -> float:
    """The largest finite magnitude beyond float16 in a constant, or 0."""
    assert value.const_value is not None
    array = np.abs(value.const_value.numpy().astype(np.float32))
    largest = float(array[np.isfinite(array)].max(initial=0.0))
    return largest if largest > HALF_MAX else 0.0


def _flowing(node: ir.Node) -> Iterator[ir.Value]:
    """Float inputs that are no constants, and float outputs."""
    yield from (v for v in node.inputs if v is not None and is_float(v) and v.const_value is None)
    yield from (v for v in node.outputs if is_float(v))


def _half_slots(node: ir.Node, opset: int) -> tuple[list[bool], list[bool]]:
    """For each input and output, whether the operator has it in float16."""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    allowed = {c.type_param_str: "tensor(float16)" in c.allowed_type_strs for c in schema.type_constraints}

    def holds(formal: list[onnx.defs.OpSchema.FormalParameter], count: int) -> list[bool]:
        kinds = [formal[min(i, len(formal) - 1)].type_str for i in range(count)]
        return [allowed.get(k, k == "tensor(float16)") for k in kinds]

    return holds(list(schema.inputs), len(node.inputs)), holds(list(schema.outputs), len(node.outputs))


def _touched(group: Iterable[ir.Node]) -> dict[ir.Value, None]:
    """Float values that a group reads or makes, constants aside, in order."""
    return dict.fromkeys(v for n in group for v in _flowing(n))


def _groups(free: list[ir.Node]) -> list[list[ir.Node]]:
    """Free nodes joined by the values that they share."""
    parent = {n: n for n in free}

    def root(node: ir.Node) -> ir.Node:
        while parent[node] is not node:
            parent[node] = node = parent[parent[node]]
        return node

    first: dict[ir.Value, ir.Node] = {}
    for node in free:
        for value in _flowing(node):
            parent[root(node)] = root(first.setdefault(value, node))
    found: dict[ir.Node, list[ir.Node]] = defaultdict(list)
    for node in free:
        found[root(node)].append(node)
    return list(found.values())
