"""Program -> Plan: every op becomes a kernel over buffers, or a step that torch runs.

Views cost nothing: an operand is a buffer and the column where it begins.  Joins along columns cost
nothing either where the parts can be written in place of the whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..errors import NotLowered
from ..ir import ops, plan
from ..ir.plan import (
    Buffer,
    Capacity,
    KernelSpec,
    Operand,
    Plan,
    Rows,
    Step,
    gqa_cache,
    latent_cache,
)
from ..ir.program import BATCH_INPUTS, INPUTS, Program, is_weight, module_path, shape, where
from ..ir.quant import parse
from . import views
from .base import aten, is_call, mill
from .linears import Linear
from .lower_extern import extern, extern_dtype
from .views import columns, features, width

_DTYPES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "e4m3",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}
# What would have turned an op that has no kernel into ones that have.
_MISSING_PASS = {
    mill.attention: "insert_cache",
    mill.latent_attention: "insert_cache",
    mill.dequantize: "fuse_dequantize",
}


def lower(program: Program, capacity: Capacity | None = None) -> Plan:
    """The program's steps over buffers whose place in the arena is not decided yet.

    Weights that kernels want in another layout are derived in ``program.weights``, under the names
    of the plan's weight buffers.
    """
    lowering = Lowering(program)
    for node in program.graph.nodes:
        if node.op == "call_function" and views.alias(node) is None:
            lowering.step(node)
    output = lowering.output()
    return Plan(
        buffers=lowering.buffers,
        steps=tuple(lowering.steps),
        caches=tuple(program.caches),
        capacity=capacity or Capacity(),
        arena_bytes=0,
        output=output,
        vocab=program.vocab,
        positions=program.positions,
    )


class Lowering:
    """Steps and buffers so far, and where each computed node lives."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.buffers: dict[str, Buffer] = {}
        self.steps: list[Step] = []
        self._place: dict[fx.Node, Operand] = {}  # computed nodes
        self._home: dict[fx.Node, Operand] = {}  # where a join wants its parts written
        self._order = {node: i for i, node in enumerate(program.graph.nodes)}
        self._tokens = views.rows(program.input("ids"))
        self._selected = _after_selection(program)
        for name in (*INPUTS, *BATCH_INPUTS):
            self.buffers[name] = Buffer(name, "input", "i32")
        for spec in program.caches:
            self.buffers[spec.name] = Buffer(spec.name, "cache", "u8", width=spec.row_bytes)
        for node in reversed(program.graph.nodes):
            if is_call(node, aten.cat):
                self._plan_join(node)

    # --- where things are ---

    def rows(self, node: fx.Node) -> Rows:
        """What counts a node's rows; selected rows share the symbol of tokens, not the count."""
        count = views.rows(node)
        if count not in ("1", self._tokens) or (count == "1" and not _fixed(node)):
            raise _refusal(node, "must have one dim that counts tokens or selected rows")
        return "fixed" if count == "1" else "rows" if node in self._selected else "tokens"

    def operand(self, node: fx.Node) -> Operand:
        """Where a kernel reads a node's rows."""
        if features(node) is None:
            raise _refusal(node, "must have tokens (or selected rows) as its outermost dim")
        return self.source(node)

    def source(self, node: fx.Node) -> Operand:
        """Where a node's numbers are, in whatever order of dims."""
        if is_weight(node):
            return self.weight(node.target)
        base, start, _ = columns(node)
        if base.op == "placeholder":
            return Operand(base.target)
        place = self._place[base]
        return Operand(place.buffer, place.column + start)

    def weight(self, name: str) -> Operand:
        if name in self.buffers and self.buffers[name].kind != "weight":
            name = self._derived(f"weight.{name}", torch.clone, name)
        like = self.program.weights.like(name)
        sizes = tuple(like.shape)
        self.buffers[name] = Buffer(name, "weight", _DTYPES[like.dtype], shape=sizes)
        return Operand(name)

    def _derived(self, name: str, function: Callable[[Tensor], Tensor], source: str) -> str:
        if name not in self.program.weights:
            self.program.weights.derive(name, function, source)
        return name

    def channel(self, node: fx.Node, like: fx.Node) -> Operand:
        """A weight that is broadcast over rows, one number per column of ``like``."""
        row, name = features(like) or (), node.target
        if shape(node) == (prod(row),):
            return self.weight(name)
        spread = f"{name}.over{list(row)}"
        return self.weight(self._derived(spread, lambda w: _per_channel(w, row), name))

    def out(self, node: fx.Node) -> Operand:
        """Where a node's result goes: its home in a join, or a buffer of its own."""
        place = self._home.get(node) or self._new(node)
        self._place[node] = place
        return place

    def _new(self, node: fx.Node) -> Operand:
        rows, dtype = self.rows(node), extern_dtype(node)
        name = next(n for n in (node.name, f"arena.{node.name}") if n not in self.program.weights)
        self.buffers[name] = Buffer(name, "arena", dtype, rows, width(node))
        return Operand(name)

    def results(self, node: fx.Node, count: int) -> list[Operand]:
        """Places for a tuple's members, those that nobody reads included."""
        found: dict[int, fx.Node] = {}
        for user in [u for u in node.users if is_call(u, operator.getitem)]:
            first = found.setdefault(user.args[1], user)
            self._place[user] = self._place.get(first) or self.out(first)
        return [
            self._place[found[i]] if i in found else self._scratch(node, i) for i in range(count)
        ]

    def _scratch(self, node: fx.Node, index: int) -> Operand:
        with self.program.graph.inserting_after(node):
            return self.out(self.program.call(operator.getitem, node, index, like=node))

    # --- joins ---

    def _plan_join(self, join: fx.Node) -> None:
        """Give the parts of a join homes in its buffer, if they are computed and have none yet."""
        if views.join_column(join) is None or extern_dtype(join) != "f32":
            return
        place, column = self.out(join), 0
        for source in join.args[0]:
            base, start, size = columns(source)
            whole = start == 0 and size == width(base)
            if whole and base.op == "call_function" and base not in self._home:
                self._home[base] = Operand(place.buffer, place.column + column)
            column += size

    def join(self, node: fx.Node) -> None:
        """Copy those parts of a join that could not be written in place."""
        if node not in self._place:
            return self.extern(node)
        place, column = self._place[node], 0
        for source in node.args[0]:
            target = Operand(place.buffer, place.column + column)
            if self.operand(source) != target:
                self.copy(source, target, node)
            column += width(source)

    def copy(self, source: fx.Node, target: Operand, like: fx.Node) -> None:
        spec = plan.Pointwise(width(source), "x0", ("row",))
        self.emit(like, spec, x0=self.operand(source), out=target)

    # --- steps ---

    def step(self, node: fx.Node) -> None:
        if not isinstance(node.meta["val"], Tensor | tuple | list):
            return  # a size
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _MISSING_PASS:
            advice = f"run the pass {_MISSING_PASS[packet]} before lowering"
            raise NotLowered(op=node.target, where=where(node), advice=advice)
        RULES.get(packet, Lowering.extern)(self, node)

    def emit(self, node: fx.Node, spec: KernelSpec, **bind: Operand) -> None:
        of = self.buffers[bind["out"].buffer].rows if "out" in bind else "tokens"
        self.steps.append(Step(spec, {p: bind[p] for p in spec.params}, of, module_path(node)))

    def extern(self, node: fx.Node) -> None:
        """What no kernel covers is torch's to run, and counted; a tuple, one member at a time."""
        if node in self._place or not isinstance(node.meta["val"], Tensor):
            return
        spec, inputs = extern(node, self.rows(node), self._tokens)
        bind = {name: self.source(n) for name, n in inputs.items()}
        self.emit(node, spec, **bind, out=self.out(node))

    def output(self) -> str:
        """The buffer of the logits, which has nothing else in it."""
        result = self.program.output.args[0]
        logits = result[0] if isinstance(result, tuple | list) else result
        if self.rows(logits) != "rows":
            advice = "run the pass select_rows before lowering"
            raise NotLowered(op="output", where=where(logits), advice=advice)
        place = self.operand(logits)
        if place != Operand(place.buffer) or self.buffers[place.buffer].width != width(logits):
            name = "logits"
            self.buffers[name] = Buffer(name, "arena", "f32", "rows", width(logits))
            self.copy(logits, place := Operand(name), logits)
        return place.buffer

    def dies(self, source: fx.Node, reader: fx.Node) -> bool:
        """Whether nobody reads the source after ``reader``, which may then overwrite it."""
        base, start, size = columns(source)
        if base.op != "call_function":
            return False
        return not any(
            self._order[user] > self._order[reader]
            and other.start < start + size
            and start < other.start + other.width
            for user, other in views.readers(base)
        )


def _fixed(node: fx.Node) -> bool:
    return not any(isinstance(size, torch.SymInt) for size in shape(node))


def _refusal(node: fx.Node, demand: str) -> NotLowered:
    found = f"its result, of shape {tuple(map(str, shape(node)))},"
    advice = f"{found} {demand}: rewrite it, or leave it out"
    return NotLowered(op=node.target, where=where(node), advice=advice)


def _after_selection(program: Program) -> set[fx.Node]:
    """Nodes with one row per selected token: ``rows``, and all that depends on it."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        is_input = node.op == "placeholder" and node.target == "rows"
        if is_input or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _per_channel(weight: Tensor, row: tuple[int, ...]) -> Tensor:
    while weight.dim() > len(row):
        weight = weight.squeeze(0)
    return weight.expand(row).reshape(-1).contiguous()


# --- one rule per op -----------------------------------------------------------------------------


def _embed(low: Lowering, node: fx.Node) -> None:
    (table,), index, format = node.args
    spec = plan.Embed(shape(table)[0], shape(table)[1], format)
    low.emit(node, spec, index=low.operand(index), w=low.operand(table), out=low.out(node))


def _select_rows(low: Lowering, node: fx.Node) -> None:
    x, index = node.args
    spec = plan.SelectRows(width(x))
    low.emit(node, spec, x=low.operand(x), index=low.operand(index), out=low.out(node))


def _heads(node: fx.Node) -> int:
    return prod((features(node) or (1,))[:-1])


def _rms_norm(low: Lowering, node: fx.Node) -> None:
    x, weight, eps = node.args
    spec = plan.Norm(shape(x)[-1], eps, _heads(x))
    low.emit(node, spec, x=low.operand(x), weight=low.operand(weight), out=low.out(node))


def _layer_norm(low: Lowering, node: fx.Node) -> None:
    x, weight, bias, eps = node.args
    affine = {k: w for k, w in (("weight", weight), ("bias", bias)) if w is not None}
    spec = plan.Norm(shape(x)[-1], eps, _heads(x), True, weight is not None, bias is not None)
    bind = {name: low.operand(w) for name, w in affine.items()}
    low.emit(node, spec, x=low.operand(x), **bind, out=low.out(node))


def _add_rms_norm(low: Lowering, node: fx.Node) -> None:
    x, residual, weight, eps = node.args
    spec = plan.Norm(shape(x)[-1], eps, _heads(x), residual=True)
    inputs = {"x": x, "residual": residual, "weight": weight}
    total, out = low.results(node, 2)
    bind = {name: low.operand(n) for name, n in inputs.items()}
    low.emit(node, spec, **bind, sum=total, out=out)


def _linear(low: Lowering, node: fx.Node) -> None:
    linear = Linear(*node.args)
    kinds: tuple[Literal["row", "channel"], ...] = tuple(
        "channel" if is_weight(e) else "row" for e in linear.extras
    )
    n, k, has_bias = width(node), width(linear.x), linear.bias is not None
    spec = plan.Linear(n, k, linear.format, has_bias, linear.parts, linear.epilogue, kinds)
    bind = {"x": low.operand(linear.x), **_parts(low, "", linear.format, linear.weight)}
    if linear.bias is not None:
        bind["bias"] = low.operand(linear.bias)
    for i, extra in enumerate(linear.extras):
        bind[f"e{i}"] = _broadcast(low, extra, node)
    low.emit(node, spec, **bind, out=low.out(node))


def _parts(low: Lowering, prefix: str, format: str, weight: list[fx.Node]) -> dict[str, Operand]:
    names = parse(format).parts
    return {f"{prefix}{p}": low.operand(n) for p, n in zip(names, weight, strict=True)}


def _broadcast(low: Lowering, source: fx.Node, like: fx.Node) -> Operand:
    return low.channel(source, like) if is_weight(source) else low.operand(source)


def _pointwise(low: Lowering, node: fx.Node) -> None:
    inputs, expression = node.args
    spec = plan.Pointwise(width(node), expression, tuple(_kind(i, node) for i in inputs))
    bind = {f"x{i}": _broadcast(low, n, node) for i, n in enumerate(inputs)}
    low.emit(node, spec, **bind, out=low.out(node))


def _kind(source: fx.Node, node: fx.Node) -> Literal["row", "scalar", "channel"]:
    if is_weight(source):
        return "channel"
    return "row" if width(source) == width(node) else "scalar"


def _rope(low: Lowering, node: fx.Node) -> None:
    x, cos, sin, offset, interleaved = node.args
    spec = plan.Rope(_heads(x), shape(x)[-1], 2 * width(cos), offset, interleaved)
    angles = {"cos": low.operand(cos), "sin": low.operand(sin)}
    source = low.operand(x)
    if node not in low._home and low.dies(x, node):
        low._place[node] = source
    else:
        low.out(node)
    low.emit(node, spec, x=source, **angles, out=low.operand(node))


def _cached_attention(low: Lowering, node: fx.Node) -> None:
    q, k, v, sinks, cache, _, _, _, scale, window, softcap, format = node.args
    heads, heads_kv, dims = _heads(q), _heads(k), (shape(k)[-1], shape(v)[-1])
    parts = gqa_cache("", format, heads_kv, *dims).parts
    _cache_write(low, node, plan.CacheWrite(format, parts), cache, k, v)
    spec = plan.Attend(heads, heads_kv, *dims, scale, format, window, softcap, sinks is not None)
    bind = {"sinks": low.operand(sinks)} if sinks is not None else {}
    low.emit(node, spec, q=low.operand(q), **bind, cache=low.operand(cache), out=low.out(node))


def _cached_latent_attention(low: Lowering, node: fx.Node) -> None:
    q, latent, k_rope, w_uk, w_uv, cache, _, _, _, format, scale, cache_format = node.args
    rank, rope = width(latent), width(k_rope)
    heads, nope, value = _heads(q), shape(w_uk[0])[-2], shape(w_uv[0])[-2]
    parts = latent_cache("", cache_format, rank, rope).parts
    _cache_write(low, node, plan.CacheWrite(cache_format, parts), cache, latent, k_rope)
    spec = plan.LatentAttend(heads, nope, rope, rank, value, scale, cache_format, format)
    inputs = {"q": q, "w_uk": w_uk[0], "w_uv": w_uv[0], "cache": cache}
    low.emit(node, spec, **{p: low.operand(n) for p, n in inputs.items()}, out=low.out(node))


def _cache_write(
    low: Lowering, node: fx.Node, spec: plan.CacheWrite, cache: fx.Node, *parts: fx.Node
) -> None:
    bind = {f"p{i}": low.operand(part) for i, part in enumerate(parts)}
    low.emit(node, spec, **bind, cache=low.operand(cache))


def _route(low: Lowering, node: fx.Node) -> None:
    logits, bias, router = node.args
    spec = plan.Route(width(logits), ops.load_router(router))
    bind = {"bias": low.operand(bias)} if bias is not None else {}
    ids, weights = low.results(node, 2)
    low.emit(node, spec, logits=low.operand(logits), **bind, ids=ids, weights=weights)


def _experts(low: Lowering, node: fx.Node) -> None:
    x, ids, weights, gate_up, down, residual, up_format, down_format, activation, gated = node.args
    count, rows, _ = shape(gate_up[0])
    spec = plan.Experts(
        count, width(ids), width(x), rows // (2 if gated else 1), up_format, down_format,
        activation, gated, residual is not None,
    )  # fmt: skip
    inputs = {"x": x, "ids": ids, "weights": weights}
    if residual is not None:
        inputs["residual"] = residual
    bind = {name: low.operand(n) for name, n in inputs.items()}
    bind |= _parts(low, "gate_up_", up_format, gate_up)
    bind |= _parts(low, "down_", down_format, down)
    low.emit(node, spec, **bind, out=low.out(node))


RULES: dict[Any, Callable[[Lowering, fx.Node], None]] = {
    aten.cat: Lowering.join,
    mill.embed: _embed,
    mill.select_rows: _select_rows,
    mill.rms_norm: _rms_norm,
    mill.layer_norm: _layer_norm,
    mill.add_rms_norm: _add_rms_norm,
    mill.linear: _linear,
    mill.pointwise: _pointwise,
    mill.rope: _rope,
    mill.cached_attention: _cached_attention,
    mill.cached_latent_attention: _cached_latent_attention,
    mill.route: _route,
    mill.experts: _experts,
}
