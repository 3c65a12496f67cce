"""One emitter per op of a Program: how a call becomes ONNX nodes.

Activations keep the shapes that they have in the program, ``[1, T, ...]`` with T all tokens of the step, so
whatever treats each token alone is as it was; attention alone knows of sequences.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ..errors import Unsupported
from ..ir import ops
from ..ir.program import Program, is_weight, module_path, shape, where
from ._onnx_attention import Cache, Step
from ._onnx_experts import Block, experts, is_positive, route
from ._onnx_graph import Graph
from ._onnx_pointwise import evaluate, function
from ._onnx_weights import Matrix, gather, multiply, store

aten, mill = torch.ops.aten, torch.ops.tokenmill
Value = Any  # an ir.Value, or a list of them for an op of several results


@dataclass
class Emitter:
    """A program on its way into a graph.

    ``half`` lets experts compute in fp16, without which no GPU has kernels for them.  ``loops`` are the
    places of experts that no contrib op covers.
    """

    program: Program
    graph: Graph
    half: bool = False
    loops: list[str] = field(default_factory=list)
    values: dict[fx.Node, Value] = field(default_factory=dict)

    def run(self) -> None:
        g, program = self.graph, self.program
        self.step = Step(g)
        self.caches = {spec.name: Cache(i, spec) for i, spec in enumerate(program.caches)}
        for node in program.graph.nodes:
            if node.op == "call_function":
                g.place = module_path(node)
                self.values[node] = self._emit(node)
        result = program.output.args[0]
        logits = self.value(result[0] if isinstance(result, tuple | list) else result)
        logits = g.reshape(logits, self.step.batch, self.step.length, program.vocab)
        g.output(logits, "logits", ["batch", "length", program.vocab])

    def _emit(self, node: fx.Node) -> Value:
        packet = getattr(node.target, "overloadpacket", node.target)
        emit = EMITTERS.get(packet)
        if emit is None:
            raise Unsupported(
                reason=f"there is no ONNX form of {node.target}",
                where=where(node),
                advice="leave this op out of the model, or export --format hf",
            )
        return emit(self, node, arguments(node))

    # --- operands ---

    def value(self, node: fx.Node) -> Any:
        """What a node yields; a weight as a tensor of its own dtype, but bf16 as fp32."""
        if not is_weight(node):
            return self._input(node) if node.op == "placeholder" else self.values[node]
        name, weights = node.target, self.program.weights
        like = weights.like(name)
        stored = self.graph.weight(name, lambda: weights[name], like.dtype, like.shape)
        return self.graph.cast(stored, torch.float32) if like.dtype == torch.bfloat16 else stored

    def maybe(self, node: fx.Node | None) -> ir.Value | None:
        return None if node is None else self.value(node)

    def _input(self, node: fx.Node) -> ir.Value:
        if node.target == "ids":
            return self.step.tokens
        if node.target == "positions":
            return self.step.positions
        raise Unsupported(
            reason=f"the model reads its input {node.target!r} in a way that ONNX has no form for",
            where=where(node), advice="export --format hf",
        )  # fmt: skip

    def matrix(self, nodes: Sequence[fx.Node], format: str, k: int) -> Matrix:
        return Matrix.of(nodes, format, k, self.program.weights)

    def operand(self, x: Any, like: fx.Node) -> ir.Value:
        """An operand of arithmetic: a node, or a number of the other one's dtype."""
        if isinstance(x, fx.Node):
            value = self.value(x)
            return self.graph.cast(value, _dtype(like)) if _dtype(x) != _dtype(like) else value
        return self.graph.scalar(x, _dtype(like))

    def sizes(self, sizes: Sequence[Any]) -> ir.Value:
        """A shape; one size that is not known yet is what remains."""
        unknown = [s for s in sizes if not isinstance(s, int)]
        if len(unknown) == 1 and -1 not in sizes:
            return self.graph.shape(*(s if isinstance(s, int) else -1 for s in sizes))
        return self.graph.shape(*(s if isinstance(s, int) else self.value(s) for s in sizes))


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): a for i, a in enumerate(node.args)}
    found = {}
    for i, argument in enumerate(schema.arguments):
        given = node.args[i] if i < len(node.args) else None
        named = node.kwargs.get(argument.name, argument.default_value)
        found[argument.name] = given if i < len(node.args) else named
    return found


def _dtype(node: fx.Node) -> torch.dtype:
    value = node.meta["val"]
    return value.dtype if isinstance(value, torch.Tensor) else torch.int64


def _rank(node: fx.Node) -> int:
    return len(shape(node))


# --- the dialect ------------------------------------------------------------------------------------

Arguments = dict[str, Any]


def _embed(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    width = int(shape(a["table"][0])[-1])
    return gather(e.graph, e.value(a["index"]), e.matrix(a["table"], a["format"], width))


def _rms_norm(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    x, weight = e.value(a["x"]), e.value(a["weight"])
    return e.graph.op("RMSNormalization", x, weight, axis=-1, epsilon=a["eps"])


def _add_rms_norm(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    g = e.graph
    total = g.op("Add", e.value(a["x"]), e.value(a["residual"]))
    weight = e.value(a["weight"])
    return [total, g.op("RMSNormalization", total, weight, axis=-1, epsilon=a["eps"])]


def _layer_norm(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    g, width = e.graph, int(shape(a["x"])[-1])
    ones = g.weight(f"ones.{width}", lambda: torch.ones(width), torch.float32, [width])
    weight = ones if a["weight"] is None else e.value(a["weight"])
    x, bias = e.value(a["x"]), e.maybe(a["bias"])
    return g.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=a["eps"])


def _linear(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    g = e.graph
    m = e.matrix(a["weight"], a["format"], int(shape(a["x"])[-1]))
    y = multiply(g, e.value(a["x"]), m, store(g, m), e.maybe(a["bias"]))
    count = a["parts"]
    parts = g.ops("Split", count, y, axis=-1, num_outputs=count) if count > 1 else [y]
    operands = {f"acc{i}": part for i, part in enumerate(parts)}
    operands |= {f"e{i}": e.value(extra) for i, extra in enumerate(a["extras"])}
    return evaluate(g, a["epilogue"], operands)


def _pointwise(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    return evaluate(e.graph, a["expression"], {f"x{i}": e.value(x) for i, x in enumerate(a["xs"])})


def _select_rows(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    return e.value(a["x"])  # logits of all tokens


def _rope(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    """RotaryEmbedding turns the first columns of every head: others are cut off before, and put back."""
    g, (heads, dim) = e.graph, (int(s) for s in shape(node)[-2:])
    x, rotary, offset = e.value(a["x"]), 2 * int(shape(a["cos"])[-1]), a["offset"]
    cos, sin = (_rows(e, a[n], rotary // 2) for n in ("cos", "sin"))
    sizes = [offset, rotary, dim - offset - rotary]
    kept = [i for i, size in enumerate(sizes) if size]
    parts = [x]
    if len(kept) > 1:
        axis = _rank(node) - 1
        parts = list(g.ops("Split", len(kept), x, g.ints(*(sizes[i] for i in kept)), axis=axis))
    at = kept.index(1)
    flat = g.reshape(parts[at], 1, -1, heads * rotary)
    turned = g.op(
        "RotaryEmbedding", flat, cos, sin, num_heads=heads, interleaved=int(a["interleaved"])
    )
    parts[at] = g.reshape(turned, *[1] * (_rank(node) - 3), -1, heads, rotary)
    return parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=-1)


def _rows(e: Emitter, node: fx.Node, width: int) -> ir.Value:
    """A node as ``[1, T, width]``."""
    value = e.value(node)
    is_so = _rank(node) == 3 and shape(node)[0] == 1
    return value if is_so else e.graph.reshape(value, 1, -1, width)


def _cached_attention(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    (heads, dim), (shared, value_dim) = (tuple(map(int, shape(a[n])[-2:])) for n in ("q", "v"))
    q, k, v = (e.value(a[n]) for n in ("q", "k", "v"))
    sinks, slopes = e.maybe(a["sinks"]), e.maybe(a["slopes"])
    return e.step.attend(
        e.caches[a["cache"].target], q, k, v, sinks, slopes, (heads, shared, dim, value_dim),
        a["scale"], a["window"], a["softcap"],
    )  # fmt: skip


def _cached_latent_attention(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    rank = int(shape(a["latent"])[-1])
    w_uk, w_uv = (e.matrix(a[n], a["format"], rank) for n in ("w_uk", "w_uv"))
    q, latent, k_rope = (e.value(a[n]) for n in ("q", "latent", "k_rope"))
    cache = e.caches[a["cache"].target]
    return e.step.attend_latent(cache, q, latent, k_rope, w_uk, w_uv, a["scale"])


def _route(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    spec, logits = ops.load_router(a["spec"]), a["logits"]
    count = int(shape(logits)[-1])
    return list(route(e.graph, e.value(logits), e.maybe(a["bias"]), spec, count, _rank(logits)))


def _experts(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    if a["gate_up_bias"] is not None or a["down_bias"] is not None:
        raise Unsupported(
            reason="experts with biases have no ONNX form yet", where=where(node),
            advice="export --format hf",
        )  # fmt: skip
    g, hidden = e.graph, int(shape(a["x"])[-1])
    gated, top_k = a["gated"], int(shape(a["ids"])[-1])
    inter = int(shape(a["gate_up"][0])[-2]) // (2 if gated else 1)
    block = Block(
        e.matrix(a["gate_up"], a["gate_up_format"], hidden),
        e.matrix(a["down"], a["down_format"], inter),
        a["activation"], gated, top_k, is_positive(_router(a["weights"])),
    )  # fmt: skip
    if block.form == "Loop":
        e.loops.append(module_path(node))
    x = g.reshape(e.value(a["x"]), -1, hidden)
    ids, weights = (g.reshape(e.value(a[n]), -1, top_k) for n in ("ids", "weights"))
    y = experts(g, block, x, ids, weights, e.half)
    y = g.reshape(y, *(s if isinstance(s, int) else -1 for s in shape(node)))
    return y if a["residual"] is None else g.op("Add", y, e.value(a["residual"]))


def _router(weights: fx.Node) -> Any:
    """The spec of the router that weights come from, if nothing was done to them on the way."""
    while getattr(weights.target, "overloadpacket", weights.target) in (
        aten.reshape,
        operator.getitem,
    ):
        weights = weights.args[0]
    if getattr(weights.target, "overloadpacket", None) is not mill.route:
        return None
    return ops.load_router(arguments(weights)["spec"])


# --- what else may be left: views and arithmetic ----------------------------------------------------


def _same(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    return e.value(node.args[0])


def _reshape(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    sizes = a["shape"] if "shape" in a else a["size"]
    return e.graph.reshape_to(e.value(a["self"]), e.sizes(sizes))


def _resized(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    """A reshape whose result's shape says all."""
    known = [s if isinstance(s, int) else -1 for s in shape(node)]
    return e.graph.reshape(e.value(a["self"]), *known)


def _getitem(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    return e.value(a["0"])[a["1"]]


def _sym_size(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    dim = a["dim"] % _rank(a["self"])
    return e.graph.sizes(e.value(a["self"]), dim, dim + 1)


def _size_arithmetic(kind: str) -> Callable[[Emitter, fx.Node, Arguments], Value]:
    def emit(e: Emitter, node: fx.Node, a: Arguments) -> Value:
        operands = [e.value(x) if isinstance(x, fx.Node) else e.graph.ints(x) for x in a.values()]
        return e.graph.op(kind, *operands)

    return emit


def _slice(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    g = e.graph

    def bound(x: Any, otherwise: int) -> ir.Value:
        return e.value(x) if isinstance(x, fx.Node) else g.ints(otherwise if x is None else x)

    start, end = bound(a["start"], 0), bound(a["end"], 2**63 - 1)
    return g.op("Slice", e.value(a["self"]), start, end, g.ints(a["dim"]), g.ints(a["step"]))


def _select(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    return e.graph.op(
        "Gather", e.value(a["self"]), e.graph.scalar(a["index"], torch.int64), axis=a["dim"]
    )


def _transpose(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    order = list(range(_rank(node)))
    i, j = a.get("dim0", 0), a.get("dim1", 1)
    order[i], order[j] = order[j], order[i]
    return e.graph.transpose(e.value(a["self"]), *order)


def _permute(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    return e.graph.transpose(e.value(a["self"]), *(d % _rank(node) for d in a["dims"]))


def _expand(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    sizes = [1 if s == -1 else s for s in a["size"]]
    return e.graph.op(
        "Expand",
        e.value(a["self"]),
        e.graph.shape(*(s if isinstance(s, int) else e.value(s) for s in sizes)),
    )


def _cast(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    x = e.value(a["self"])
    return x if _dtype(node) == _dtype(a["self"]) else e.graph.cast(x, _dtype(node))


def _cat(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    return e.graph.op("Concat", *map(e.value, a["tensors"]), axis=a["dim"])


def _split(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    dim = a["dim"] % _rank(a["self"])
    sizes = [int(part.shape[dim]) for part in node.meta["val"]]
    return e.graph.ops("Split", len(sizes), e.value(a["self"]), e.graph.ints(*sizes), axis=dim)


def _unbind(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    dim = a["dim"] % _rank(a["self"])
    count = len(node.meta["val"])
    parts = e.graph.ops("Split", count, e.value(a["self"]), axis=dim, num_outputs=count)
    return [e.graph.op("Squeeze", part, e.graph.ints(dim)) for part in parts]


def _binary(name: str) -> Callable[[Emitter, fx.Node, Arguments], Value]:
    def emit(e: Emitter, node: fx.Node, a: Arguments) -> Value:
        right = e.operand(a["other"], node)
        if a.get("alpha", 1) != 1:
            right = e.graph.op("Mul", right, e.graph.scalar(a["alpha"], _dtype(node)))
        return function(e.graph, name, e.operand(a["self"], node), right)

    return emit


def _unary(name: str) -> Callable[[Emitter, fx.Node, Arguments], Value]:
    return lambda e, node, a: function(e.graph, name, e.value(a["self"]))


def _gelu(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    name = "gelu_tanh" if a["approximate"] == "tanh" else "gelu"
    return function(e.graph, name, e.value(a["self"]))


def _softmax(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    return e.graph.op("Softmax", e.value(a["self"]), axis=a["dim"])


def _reduced(kind: str) -> Callable[[Emitter, fx.Node, Arguments], Value]:
    def emit(e: Emitter, node: fx.Node, a: Arguments) -> Value:
        dims = a["dim"] if isinstance(a["dim"], list | tuple) else [a["dim"]]
        keep = int(a["keepdim"])
        return e.graph.op(kind, e.value(a["self"]), e.graph.ints(*dims), keepdims=keep)

    return emit


def _cumsum(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    return e.graph.op("CumSum", e.value(a["self"]), e.graph.scalar(a["dim"], torch.int64))


def _clamp(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    x, g = e.value(a["self"]), e.graph
    low, high = (None if a[n] is None else g.scalar(a[n], _dtype(node)) for n in ("min", "max"))
    return g.op("Clip", x, low, high)


def _power(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    return e.graph.op("Pow", e.value(a["self"]), e.graph.scalar(a["exponent"], _dtype(node)))


def _matmul(e: Emitter, node: fx.Node, a: Arguments) -> Value:
    right = a.get("other", a.get("mat2"))
    return e.graph.op("MatMul", e.value(a["self"]), e.value(right))


EMITTERS: dict[Any, Callable[[Emitter, fx.Node, Arguments], Value]] = {
    mill.embed: _embed,
    mill.rms_norm: _rms_norm,
    mill.add_rms_norm: _add_rms_norm,
    mill.layer_norm: _layer_norm,
    mill.linear: _linear,
    mill.pointwise: _pointwise,
    mill.select_rows: _select_rows,
    mill.rope: _rope,
    mill.cached_attention: _cached_attention,
    mill.cached_latent_attention: _cached_latent_attention,
    mill.route: _route,
    mill.experts: _experts,
    **dict.fromkeys((aten.reshape, aten.view, aten._unsafe_view), _reshape),
    **dict.fromkeys((aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten), _resized),
    **dict.fromkeys((aten.clone, aten.contiguous, aten.alias, aten.detach), _same),
    **dict.fromkeys((aten._to_copy, aten.to), _cast),
    **dict.fromkeys((aten.transpose, aten.t), _transpose),
    **dict.fromkeys((aten.split_with_sizes, aten.split, aten.chunk), _split),
    **dict.fromkeys((aten.matmul, aten.mm, aten.bmm), _matmul),
    **dict.fromkeys((aten.softmax, aten._softmax), _softmax),
    **{getattr(aten, n): _binary(n) for n in ("add", "sub", "mul", "div")},
    aten.minimum: _binary("min"),
    aten.maximum: _binary("max"),
    **{
        getattr(aten, n): _unary(n)
        for n in ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "square", "tanh", "sigmoid", "silu",
                  "relu", "softplus")
    },
    aten.gelu: _gelu,
    aten.mean: _reduced("ReduceMean"),
    aten.sum: _reduced("ReduceSum"),
    aten.amax: _reduced("ReduceMax"),
    aten.slice: _slice,
    aten.select: _select,
    aten.permute: _permute,
    aten.expand: _expand,
    aten.cat: _cat,
    aten.unbind: _unbind,
    aten.cumsum: _cumsum,
    aten.clamp: _clamp,
    aten.pow: _power,
    aten.sym_size: _sym_size,
    operator.getitem: _getitem,
    operator.add: _size_arithmetic("Add"),
    operator.sub: _size_arithmetic("Sub"),
    operator.mul: _size_arithmetic("Mul"),
    operator.floordiv: _size_arithmetic("Div"),
}  # fmt: skip
