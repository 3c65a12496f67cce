"""The Program: what a model is while it is compiled.

An FX graph, its weights by name, its caches, its stage.  Weights are ``get_attr`` nodes whose target is
the weight's name; they are read or computed only when somebody asks for the numbers, so a program of a
huge model stays small.  Every stage runs: :meth:`Program.run` executes the graph with torch.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from . import cache as kv
from . import ops  # noqa: F401  (registers the dialect)
from .cache import CacheSpec
from .infer import Memo


class Stage(IntEnum):
    """How far a program has come; what each stage may hold is in :mod:`.legal`."""

    ATEN = 0  # as traced
    CANONICAL = 1  # weight-only and position-only parts folded, attention opaque
    DIALECT = 2  # fused: every op that matters is a dialect op, tokens are proven independent
    CACHED = 3  # attention reads and writes caches; serves any ragged batch
    QUANTIZED = 4  # weights are in their formats
    FUSED = 5  # what the plan will hold, op by op


# --- weights ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Derived:
    function: Callable[..., Tensor]
    sources: tuple[str, ...]
    origins: tuple[str, ...]
    each: bool = False  # of every matrix of a stack alone
    replaces: bool = False  # its one origin, in the same model


class Weights:
    """Weights by name: given ones, and ones derived from others by pure functions, computed late.

    >>> weights = Weights({"a": torch.ones(2, 3)})
    >>> weights.derive("b", torch.t, "a")
    >>> weights.like("b").shape, weights["b"].shape  # the first computes nothing
    (torch.Size([3, 2]), torch.Size([3, 2]))
    """

    def __init__(self, given: dict[str, Tensor], memo_bytes: int = 1 << 30) -> None:
        """``memo_bytes`` bound the computed weights that are kept because they may be wanted again."""
        self.memo_bytes = memo_bytes
        self._given = dict(given)
        self._derived: dict[str, _Derived] = {}
        self._settled: dict[str, Callable[[], Tensor]] = {}
        self._readers: dict[str, Callable[[int], Tensor]] = {}
        self._meta: dict[str, Tensor] = {}
        self._by_row: dict[str, Callable[..., Tensor]] = {}
        self._shapes = Memo()
        # By derivation and not by name: copies share results, and may derive one name in different ways.
        self._memo: OrderedDict[_Derived, Tensor] = OrderedDict()

    def __contains__(self, name: object) -> bool:
        return name in self._given or name in self._derived

    def __iter__(self) -> Iterator[str]:
        yield from self._given
        yield from self._derived

    def add(self, name: str, value: Tensor) -> None:
        if name in self:
            raise ValueError(f"weight {name!r} exists")
        self._given[name] = value

    def derive(
        self,
        name: str,
        function: Callable[..., Tensor],
        *sources: str,
        origins: Sequence[str] | None = None,
        each: bool = False,
        rows: Callable[..., Tensor] | None = None,
    ) -> None:
        """Add ``name = function(*sources)``; the function must also run on meta tensors.

        ``origins`` are the sources that :meth:`roots` follows, all unless told: a matrix with a norm's
        weight folded in is still that matrix, and :meth:`stands_for` it.  With ``each`` the function treats
        the matrices of a stack ``[E, N, K]`` one like the other, so it is given one at a time and its
        temporaries stay small.
        ``rows(index, *sources)`` yields the same as ``function(*sources)[index]``, at less cost.
        """
        if name in self:
            raise ValueError(f"weight {name!r} exists")
        followed = sources if origins is None else tuple(origins)
        replaces = origins is not None and len(followed) == 1
        self._derived[name] = _Derived(function, sources, followed, each, replaces)
        if rows is not None:
            self._by_row[name] = rows

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows of a weight, without the others where that was said to be possible."""
        known = name in self._given or name in self._settled or self._derived[name] in self._memo
        if known or name not in self._by_row:
            return self[name][index]
        with torch.no_grad():
            return self._by_row[name](index, *(self[s] for s in self.sources(name)))

    def read(
        self,
        name: str,
        like: Tensor,
        source: Callable[[], Tensor],
        member: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Add a weight that ``source`` yields whenever it is wanted; ``like`` is a meta tensor.

        Of a stack, ``member`` yields one matrix.
        """
        self.derive(name, source)
        self._meta[name] = like
        if member is not None:
            self._readers[name] = member

    def settle(self, name: str, source: Callable[[], Tensor]) -> None:
        """Let a weight be what ``source`` yields, instead of what was given or would be computed."""
        if name not in self:
            raise ValueError(f"there is no weight {name!r}")
        self._settled[name] = source
        self._memo = OrderedDict()  # what was computed from the name is void, but not for copies

    def fresh(self, name: str) -> str:
        """``name``, or the first of name.1, name.2, ... that is free."""
        if name not in self:
            return name
        return next(n for i in range(1, 1 << 30) if (n := f"{name}.{i}") not in self)

    def like(self, name: str) -> Tensor:
        """A meta tensor of the weight's shape and dtype."""
        if name not in self._meta:
            if name in self._given:
                self._meta[name] = self._given[name].to("meta")
            else:
                self._meta[name] = self._inferred(name)
        return self._meta[name]

    def _inferred(self, name: str) -> Tensor:
        """Of a stack only one matrix is looked at: a function may take them apart itself."""
        derived = self._derived[name]
        sources = [self.like(s) for s in derived.sources]
        count = len(sources[0]) if self._is_stack(name) else 0
        with torch.no_grad():
            value = self._shapes.call(derived.function, [s[0] if count else s for s in sources])
        value = value.to("meta")
        return value.new_empty([count, *value.shape]) if count else value

    def __getitem__(self, name: str) -> Tensor:
        if name in self._settled:
            return self._settled[name]()
        if name in self._given:
            return self._given[name]
        derived = self._derived[name]
        if derived in self._memo:
            self._memo.move_to_end(derived)
            return self._memo[derived]
        with torch.no_grad():
            value = self._stacked(name) if self._is_stack(name) else self._computed(name)
        self._memo[derived] = value
        self._trim()
        return value

    def _computed(self, name: str) -> Tensor:
        derived = self._derived[name]
        sources = [self[s] for s in derived.sources]
        self._trim(self.like(name).nbytes)
        return derived.function(*sources)

    def _is_stack(self, name: str) -> bool:
        """Whether a derived weight can be computed matrix by matrix."""
        derived = self._derived[name]
        return derived.each and all(self.like(s).dim() > 2 for s in derived.sources)

    def _stacked(self, name: str) -> Tensor:
        like = self.like(name)
        self._trim(like.nbytes)
        value, member = torch.empty(like.shape, dtype=like.dtype), self.matrices(name)
        for i in range(len(value)):
            value[i] = member(i)
        return value

    def matrices(self, name: str) -> Callable[[int], Tensor]:
        """What yields one matrix of a stack ``[E, N, K]``, of the whole if there is no other way."""
        known = name in self._given or name in self._settled
        if not known and self._derived[name] not in self._memo:
            if name in self._readers:
                return self._readers[name]
            if self._is_stack(name):
                function = self._derived[name].function
                members = [self.matrices(s) for s in self._derived[name].sources]
                return lambda i: function(*(m(i) for m in members))
        whole = self[name]
        return lambda i: whole[i]

    def _trim(self, coming: int = 0) -> None:
        """Forget the oldest results until those that stay, with ``coming`` bytes more, fit the memo."""
        kept = sum(t.nbytes for t in self._memo.values()) + coming
        while kept > self.memo_bytes and len(self._memo) > (not coming):
            kept -= self._memo.popitem(last=False)[1].nbytes

    def sources(self, name: str) -> tuple[str, ...]:
        """The weights that ``name`` is computed from; none if it came with the model."""
        return self._derived[name].sources if name in self._derived else ()

    def derivation(self, name: str) -> tuple[Callable[..., Tensor], tuple[str, ...]] | None:
        """What ``name`` is computed by, and from which weights; None if it came with the model."""
        if not (sources := self.sources(name)):
            return None
        return self._derived[name].function, sources

    def stands_for(self, name: str) -> str | None:
        """The weight whose place ``name`` took, by a pass that changed others so that the model stays."""
        derived = self._derived.get(name)
        return derived.origins[0] if derived is not None and derived.replaces else None

    def roots(self, name: str) -> list[str]:
        """The weights that ``name`` comes from in the end; itself if it comes from no other."""
        if name in self._given or not self._derived[name].origins:
            return [name]
        found = [r for s in self._derived[name].origins for r in self.roots(s)]
        return list(dict.fromkeys(found))

    def copy(self) -> Weights:
        twin = Weights(self._given, self.memo_bytes)
        twin._derived, twin._settled = dict(self._derived), dict(self._settled)
        twin._readers, twin._meta, twin._memo = dict(self._readers), dict(self._meta), self._memo
        twin._by_row, twin._shapes = dict(self._by_row), self._shapes
        return twin


# --- the program ------------------------------------------------------------------------------------

INPUTS = ("ids", "positions", "rows")
BATCH_INPUTS = ("starts", "block_table")


@dataclass
class Program:
    """``ids [1, T]``, ``positions [1, T]`` and ``rows [R]`` in, logits ``[1, R, V]`` out.

    After cache insertion the batch metadata ``starts`` and ``block_table`` and one placeholder per cache
    come in too.  ``vocab`` and ``positions`` are limits that the runtime enforces.
    """

    graph: fx.Graph
    weights: Weights
    vocab: int
    positions: int
    stage: Stage = Stage.ATEN
    caches: list[CacheSpec] = field(default_factory=list)
    name: str = "model"
    parameters: int = 0  # of the model as it came, tied ones counted once
    _shapes: Memo = field(default_factory=Memo, init=False, repr=False, compare=False)
    _found: dict[str, fx.Node] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def fake_mode(self) -> FakeTensorMode:
        return self.input("ids").meta["val"].fake_mode

    def input(self, name: str) -> fx.Node:
        return self.first(name, lambda n: n.op == "placeholder" and n.target == name)

    def first(self, key: str, wanted: Callable[[fx.Node], bool]) -> fx.Node:
        """The first node that is wanted; known under ``key`` as long as it is in the graph."""
        node = self._found.get(key)
        if node is None or node._erased or not wanted(node):
            node = self._found[key] = next(n for n in self.graph.nodes if wanted(n))
        return node

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    def copy(self) -> Program:
        """A program that shares tensors but can be rewritten on its own."""
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(self.graph, values)
        graph.output(result)
        for old, new in values.items():
            new.meta = dict(old.meta)
        twin = Program(
            graph, self.weights.copy(), self.vocab, self.positions, self.stage,
            copy.copy(self.caches), self.name, self.parameters,
        )  # fmt: skip
        twin._shapes = self._shapes
        return twin

    def adopt(self, other: Program) -> None:
        """Become what a rewritten copy is, which is not to be used any more."""
        self.graph, self.weights, self.stage = other.graph, other.weights, other.stage
        self._found.clear()

    def used_weights(self) -> list[str]:
        return list(dict.fromkeys(n.target for n in self.graph.nodes if n.op == "get_attr"))

    # --- building ---

    def weight(self, name: str) -> fx.Node:
        """A node for a weight, at the insertion point."""
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = self.fake(self.weights.like(name))
        return node

    def call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """Add a call at the insertion point, with its shape inferred; ``like`` lends its origin."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self.infer(node)
        if like is not None:
            for key in ("nn_module_stack", "stack_trace"):
                if key in like.meta:
                    node.meta[key] = like.meta[key]
        return node

    def infer(self, node: fx.Node) -> Any:
        """What the node yields, on fake tensors."""
        args, kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: a.meta["val"] if isinstance(a, fx.Node) else a
        )
        with self.fake_mode, torch.no_grad():
            return self._shapes.call(node.target, args, kwargs)

    def fake(self, like: Tensor) -> Tensor:
        with self.fake_mode:
            return self._shapes.call(torch.empty, [tuple(like.shape)], {"dtype": like.dtype})

    # --- running ---

    def inputs(self, ids: Tensor, batch: kv.Batch, rows: Tensor) -> dict[str, Tensor]:
        """The values of all placeholders for one step over a ragged batch, with empty caches."""
        pages = int(batch.block_table.max()) + 1
        return {
            "ids": ids[None],
            "positions": batch.positions[None].long(),
            "rows": rows,
            "starts": batch.starts,
            "block_table": batch.block_table,
            **{spec.name: kv.allocate(spec, pages) for spec in self.caches},
        }

    def run(
        self,
        ids: Sequence[int] | Tensor,
        rows: Sequence[int] | None = None,
        runner: Runner | None = None,
    ) -> Tensor:
        """Logits ``[R, V]`` of one sequence from position 0, with fresh caches; rows default to all."""
        tokens = torch.as_tensor(ids, dtype=torch.int64).reshape(-1)
        batch = kv.single_sequence(len(tokens))
        keep = torch.arange(len(tokens)) if rows is None else torch.tensor(rows)
        return self.execute(tokens, batch, keep, {}, runner)

    def execute(
        self,
        ids: Tensor,
        batch: kv.Batch,
        rows: Tensor,
        caches: Mapping[str, Tensor],
        runner: Runner | None = None,
    ) -> Tensor:
        """One step over a ragged batch: logits ``[R, V]``; the caches are written in place, and empty
        ones stand for those that are not given.
        """
        inputs = self.inputs(ids, batch, rows) | dict(caches)
        placeholders = [n.target for n in self.graph.nodes if n.op == "placeholder"]
        runner = runner or Runner(self.graph, self.weights)
        with torch.no_grad():
            out = runner.run(*(inputs[name] for name in placeholders))
        logits = out[0] if isinstance(out, tuple) else out
        return logits.reshape(-1, logits.shape[-1])


class Runner(fx.Interpreter):
    """Runs a graph whose weights are looked up by name instead of in a module."""

    def __init__(self, graph: fx.Graph, weights: Weights | Mapping[str, Tensor]) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self.weights = weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.weights[target]


# --- reading graphs ---------------------------------------------------------------------------------


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The node's shape; sizes that depend on the step are SymInts."""
    return tuple(node.meta["val"].shape)


def is_weight(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def where(node: fx.Node) -> str:
    """The place in the user's model: module path and source line, as far as tracing kept them."""
    file, code = _source(node)
    source = f"{file}: {code}" if code else file
    return ", ".join(p for p in (module_path(node), source) if p) or f"node {node.name}"


def source_line(node: fx.Node) -> tuple[str, str]:
    """The innermost frame, ``File "name.py", line 3, in forward``, and its code; empty if unknown.

    Of the file it says the name alone, which is the same on every machine.
    """
    file, code = _source(node)
    return _DIRECTORY.sub('"', file), code


_DIRECTORY = re.compile(r'"[^"]*[/\\](?=[^"/\\]*")')


def _source(node: fx.Node) -> tuple[str, str]:
    trace = (node.meta.get("stack_trace") or "").strip().splitlines()
    files = [i for i, line in enumerate(trace) if line.lstrip().startswith("File ")]
    if not files:
        return "", ""
    last = files[-1]
    return trace[last].strip(), trace[last + 1].strip() if last + 1 < len(trace) else ""


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that the node was traced in, without our wrapper's prefix."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [p for p, _ in stack.values() if p and not p.startswith("_empty_nn_module")]
    return paths[-1].removeprefix("model.") if paths else ""
