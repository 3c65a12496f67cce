"""Program -> Plan: every op becomes a kernel over buffers, or a step that torch runs.

Views cost nothing: an operand is a buffer and the column where it begins.  Joins along columns cost
nothing either where the parts can be written in place of the whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, fx

from ..errors import NotLowered
from ..ir import stored
from ..ir.ops import custom_op
from ..ir.packing import pack_halves, pack_part
from ..ir.plan import Buffer, Capacity, Device, KernelSpec, Operand, Plan, Pointwise, Rows, Step
from ..ir.program import BATCH_INPUTS, INPUTS, Program, is_weight, module_path, shape, where
from ..ir.quant import parse
from . import views
from .base import aten, is_call, mill
from .lower_extern import extern, extern_dtype
from .lower_kernels import KERNELS, custom
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


def lower(program: Program, capacity: Capacity | None = None, device: Device = "cpu") -> Plan:
    """The program's steps over buffers whose place in the arena is not decided yet, activations in fp32.

    Weights that kernels want in another layout are derived in ``program.weights``, under the names
    of the plan's weight buffers.
    """
    lowering = Lowering(program, device)
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
        device=device,
    )


class Lowering:
    """Steps and buffers so far, and where each computed node lives."""

    def __init__(self, program: Program, device: Device) -> None:
        self.program = program
        self.device = device
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
            name = self._derived(stored.renamed(name), torch.clone, name)
        like = self.program.weights.like(name)
        sizes = tuple(like.shape)
        self.buffers[name] = Buffer(name, "weight", _DTYPES[like.dtype], shape=sizes)
        return Operand(name)

    def _derived(
        self, name: str, function: Callable[[Tensor], Tensor], source: str, each: bool = False
    ) -> str:
        if name not in self.program.weights:
            self.program.weights.derive(name, function, source, each=each)
        return name

    def matrix(
        self,
        node: fx.Node,
        part: str,
        format: str,
        rows: int,
        parts: int = 1,
        turned: bool = False,
    ) -> Operand:
        """One part of a weight of ``rows`` rows in the order of :mod:`ir.packing`.

        ``turned`` where a CPU reads it by columns.
        """
        if self.device == "cuda":
            if part == "q" and parse(format).group:
                name = f"{node.target}.{stored.HALVES}"
                return self.weight(self._derived(name, pack_halves, node.target, each=True))
            return self.weight(node.target)
        name = f"{node.target}.{stored.panels(parts, turned)}"
        fmt = parse(format)

        def pack(weight: Tensor) -> Tensor:
            if turned:
                weight = weight.transpose(-1, -2)
            return pack_part(part, weight, fmt, weight.shape[-2] if turned else rows, parts)

        return self.weight(self._derived(name, pack, node.target, each=True))

    def channel(self, node: fx.Node, like: fx.Node) -> Operand:
        """A weight that is broadcast over rows, one number per column of ``like``."""
        row, name = features(like) or (), node.target
        if shape(node) == (prod(row),):
            return self.weight(name)
        spread = f"{name}.{stored.over(row)}"
        return self.weight(self._derived(spread, lambda w: _per_channel(w, row), name))

    def out(self, node: fx.Node) -> Operand:
        """Where a node's result goes: its home in a join, or a buffer of its own."""
        place = self._home.get(node) or self._new(node)
        self._place[node] = place
        return place

    def out_over(self, source: fx.Node, node: fx.Node) -> Operand:
        """The place of the source itself if nobody needs it after ``node``, else one as by `out`."""
        if node in self._home or not self._dies(source, node):
            return self.out(node)
        self._place[node] = place = self.operand(source)
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
            member = self.program.call(operator.getitem, node, index, like=node)
        self._selected |= {member} if node in self._selected else set()
        return self.out(member)

    # --- joins ---

    def _plan_join(self, join: fx.Node) -> None:
        """Give the parts of a join homes in its buffer, if they are computed and have none yet."""
        if views.join_column(join) is None or extern_dtype(join) != "f32":
            return
        place, column = self.out(join), 0
        for source in join.args[0]:
            base, start, size = columns(source)
            whole = base.op == "call_function" and start == 0 and size == width(base)
            if whole and base not in self._home and extern_dtype(base) == "f32":
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
        spec = Pointwise(width(source), "x0", ("row",))
        self.emit(like, spec, x0=self.operand(source), out=target)

    # --- steps ---

    def step(self, node: fx.Node) -> None:
        if not isinstance(node.meta["val"], Tensor | tuple | list):
            return  # a size
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _MISSING_PASS:
            advice = f"run the pass {_MISSING_PASS[packet]} before lowering"
            raise NotLowered(op=node.target, where=where(node), advice=advice)
        if is_call(node, aten.cat):
            self.join(node)
        elif packet in KERNELS:
            KERNELS[packet](self, node)
        elif custom_op(node.target):
            custom(self, node)
        else:
            self.extern(node)

    def emit(self, node: fx.Node, spec: KernelSpec, **bind: Operand) -> None:
        written = next((bind[p] for p in ("out", "weights") if p in bind), None)
        of = self.buffers[written.buffer].rows if written else "tokens"
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

    def _dies(self, source: fx.Node, reader: fx.Node) -> bool:
        """Whether nobody reads the source after ``reader``, which may then overwrite it."""
        base, start, size = columns(source)
        joined = base in self._home or is_call(base, aten.cat)  # others may share the columns
        if joined or base.op != "call_function":
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
