"""Recognise experts, however a token's choice is carried out.

People loop over experts with where, masks or one-hot rows, let every expert see every token, copy tokens to
experts and back by einsum, or gather the weights of the chosen.  All of them compute

    out[t] = sum_j weights[t, j] f(x[t]; W[ids[t, j]])

from three values: x, ids and weights.  So the block is cut out between these and its result, the matrices and
what lies between them are read off the graph, and what was read is compared with the block on random tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from ..ir import expr
from ..ir.expr import Const, Expr, Ref
from ..ir.ops import experts as experts_reference
from ..ir.program import Program, Weights, is_weight, shape
from .base import (
    Pass,
    ancestors,
    aten,
    behind_reshapes,
    calls,
    is_call,
    mill,
    replace,
    sweep,
    token_count,
    tokens_outermost,
)
from .contractions import Contraction
from .region import Region, dataflow, is_token_count
from .scalar import RULES
from .views import features

_TOKENS = 33  # of a comparison
# How many candidates are tried for the end of a block, and for its beginning.
_RESULTS, _CUTS = 4, 12


@dataclass
class FuseExperts(Pass):
    """sum over chosen e of w_e f_e(x) = experts(x, ids, weights, stacked weights)"""

    name = "fuse_experts"

    def run(self, program: Program) -> int:
        routed = _routed(program)
        chosen = [n for n in _choices(program) if n not in routed]
        if not chosen:
            return 0
        ends = _Ends(program)
        matches = 0
        for ids in chosen:
            block = next(_blocks(program, ids, ends), None)
            if block is not None:
                block.fuse(program)
                matches += 1
        sweep(program)
        return matches


# --- where a block begins and ends ------------------------------------------------------------------


def _routed(program: Program) -> set[fx.Node]:
    """The routers of experts that are one op already."""
    return {
        n
        for node in calls(program, mill.experts)
        for operand in node.args[1:3]
        for n in ancestors(operand, lambda n: is_call(n, aten.linear))
    }


def _choices(program: Program) -> Iterator[fx.Node]:
    """Ids of chosen experts: whatever says at which place of a row its largest numbers are."""
    for node in calls(program, aten.topk, aten.max, aten.sort):
        if isinstance(node.meta["val"], tuple | list):
            yield from (u for u in node.users if u.args[1:] == (1,))
    yield from calls(program, aten.argmax, aten.argsort)


class _Ends:
    """Through which nodes everything that a node computes reaches the output."""

    def __init__(self, program: Program) -> None:
        flow = dataflow(program).reverse(copy=False)
        self.next = nx.immediate_dominators(flow, program.output)

    def after(self, node: fx.Node) -> Iterator[fx.Node]:
        while node in self.next and (after := self.next[node]) is not node:
            node = after
            yield node


def _blocks(program: Program, ids: fx.Node, ends: _Ends) -> Iterator[_Block]:
    results = [n for n in ends.after(ids) if _is_rows(program, n)]
    tried = 0
    for result in results:
        if is_call(result, aten.reshape):  # the same numbers as before it
            continue
        tried += 1
        if tried > _RESULTS:
            return
        for cut in _cuts(program, ids, result):
            yield from _readings(program, cut)


def _is_rows(program: Program, node: fx.Node, width: int | None = None) -> bool:
    """Whether the node is one vector per token (of that width)."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if node.op != "call_function" or not tokens_outermost(program, node):
        return False
    row = features(node) or ()
    return len(row) == 1 and width in (None, row[0])


def _between(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """``start`` and what depends on it, up to ``end``."""
    seen, stack = {start}, [start]
    while stack:
        for user in stack.pop().users:
            if user not in seen and not end < user:
                seen.add(user)
                stack.append(user)
    return seen


@dataclass
class _Cut:
    """A block as a function of these; ``shares`` are ``[T, k]``, ``[T, E]`` where ``ids`` is None."""

    result: fx.Node
    x: fx.Node
    ids: fx.Node | None
    shares: fx.Node | None
    base: fx.Node | None  # what the sum begins with
    top_k: int

    @property
    def inputs(self) -> list[fx.Node]:
        found = (self.x, self.ids, self.shares, self.base)
        return [n for n in found if n is not None]


def _cuts(program: Program, ids: fx.Node, result: fx.Node) -> Iterator[_Cut]:
    """Ways to cut a block out so that nothing of the router is left inside."""
    hidden = (features(result) or (0,))[-1]
    top_k = prod(features(ids) or ())
    chosen = _between(ids, result)
    # Rows that were there before the choice need no look at what they come from.
    above = ancestors(
        result, lambda n: is_token_count(n) or (n < ids and _is_rows(program, n, hidden))
    )
    base = _base(result, chosen)
    rows = [n for n in sorted(above, reverse=True) if _is_rows(program, n, hidden)]
    inputs = [n for n in rows if n not in chosen and n is not base]
    scores = _between(ids.args[0], result)
    widths = {prod(features(ids) or ()), 1}
    shares = [
        n for n in sorted(above, reverse=True)
        if n in scores and _is_shares(program, n) and (prod(features(n) or ())) in widths
    ]  # fmt: skip
    dense = [
        n for n in sorted(above, reverse=True)
        if n in chosen and _is_shares(program, n) and prod(features(n) or ()) > top_k
    ]  # fmt: skip
    ways: list[tuple[fx.Node | None, fx.Node | None]] = [
        (ids, None), *((ids, s) for s in shares), *((None, s) for s in dense),
    ]  # fmt: skip
    for x in inputs[:_CUTS]:
        for which, share in ways[: 2 * _CUTS]:
            cut = _Cut(result, x, which, share, base, top_k)
            if _separates(program, cut):
                yield cut


def _separates(program: Program, cut: _Cut) -> bool:
    """Whether the block needs the cut's inputs, all of them, and nothing else but weights."""
    stops = set(cut.inputs)
    inside = ancestors(cut.result, lambda n: n in stops or is_token_count(n))
    wanted = [n for n in stops if n is not cut.base]
    return all(n in inside for n in wanted) and all(n.op != "placeholder" for n in inside)


def _is_shares(program: Program, node: fx.Node) -> bool:
    value = node.meta.get("val")
    fits = isinstance(value, Tensor) and value.is_floating_point() and node.op == "call_function"
    if fits and value.dim() == 1:
        return isinstance(value.shape[0], torch.SymInt)
    return fits and tokens_outermost(program, node)


def _base(result: fx.Node, chosen: set[fx.Node]) -> fx.Node | None:
    """What a running sum over experts begins with, unless that is zeros."""
    at = result
    while is_call(at, aten.index_add, aten.index_put, aten.add, aten.reshape) and at in chosen:
        inner = at.args[0]
        if is_call(at, aten.add) and inner not in chosen:
            inner = at.args[1]
        if not isinstance(inner, fx.Node):
            return None
        at = inner
    zeros = (aten.zeros_like, aten.zeros, aten.new_zeros, aten.full)
    return None if at is result or at in chosen or is_call(at, *zeros) else at


# --- what is inside ---------------------------------------------------------------------------------


@dataclass
class _Map:
    """A product of activations with weights; the bias is that of the sum after it, if one follows."""

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None = None


class _Unreadable(Exception):
    """A block that is no block of experts, or one written in a way that is not known."""


class _Inside:
    """The maps of a block, first and second ones, in the order in which they are computed."""

    def __init__(self, program: Program, cut: _Cut) -> None:
        self.program, self.cut = program, cut
        stops = set(cut.inputs)
        self.nodes = ancestors(cut.result, lambda n: n in stops or is_token_count(n))
        found = [
            m for n in sorted(self.nodes) if n not in stops and (m := self._map(n)) is not None
        ]
        self.maps = {m.node: m for m in found}
        self.first = [m for m in found if not self._above(m.x)]
        self.second = [m for m in found if m not in self.first]
        if not self.first or any(
            set(self._above(m.x)) - {f.node for f in self.first} for m in self.second
        ):
            raise _Unreadable

    def _above(self, node: fx.Node) -> list[fx.Node]:
        """The maps that a value comes from, the next ones only."""
        stops = {*self.cut.inputs, *self.maps}
        inner = ancestors(node, lambda n: n in stops or is_token_count(n))
        return [n for n in sorted(inner) if n in self.maps]

    def _map(self, node: fx.Node) -> _Map | None:
        if is_call(node, aten.linear):
            x, weight, bias = (*node.args, None)[:3]
            name, offset = self._weight(weight), bias and self._weight(bias)
            return _Map(node, x, name, offset) if name else None
        product = Contraction.read(node)
        if product is None:
            return None
        for x, weight in ((product.left, product.right), (product.right, product.left)):
            if name := self._weight(weight):
                return _Map(node, x, name)
        return None

    def _weight(self, node: Any) -> str | None:
        """The weight that a node is, or gathers rows of, or shows in another shape."""
        while isinstance(node, fx.Node) and not is_weight(node):
            gathers = is_call(node, aten.index, aten.index_select, aten.embedding, mill.embed)
            if not gathers and not is_call(node, *_VIEWS):
                return None
            node = node.args[0]
            node = node[0] if isinstance(node, list) else node
        return node.target if isinstance(node, fx.Node) else None

    def read(self) -> tuple[list[_Expert], bool]:
        """Each expert's maps and what is between them; whether all experts are in one tensor."""
        found = []
        for second in self.second:
            first = [self.maps[n] for n in self._above(second.x)]
            if len(first) not in (1, 2):
                raise _Unreadable
            walk = _Walk(self, first)
            found.append(_Expert(walk.expression(second.x), first, second, walk.halves))
        if not found:
            raise _Unreadable
        for one in found:
            one.second.bias = one.second.bias or self._bias_after(one.second)
        return found, len(found) == 1

    def _bias_after(self, map: _Map) -> str | None:
        """What is added to a map's result next."""
        node = map.node
        while len(node.users) == 1:
            user = next(iter(node.users))
            if is_call(user, aten.add) and node in user.args:
                other = user.args[1] if user.args[0] is node else user.args[0]
                return self._weight(other)
            if not is_call(user, *_VIEWS):
                return None
            node = user
        return None


_VIEWS = (
    aten.reshape, aten.view, aten.permute, aten.transpose, aten.t, aten.expand, aten.clone,
    aten.unsqueeze, aten.squeeze, aten.contiguous, aten.select, aten.repeat, aten._to_copy,
)  # fmt: skip
_CUTTING = (aten.slice, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind)


@dataclass
class _Expert:
    """``down(activation(up(x)))``; an accumulator is a range of columns of one of the first maps."""

    activation: Expr
    first: list[_Map]
    second: _Map
    halves: list[_Columns]  # of the accumulators, in order


@dataclass(frozen=True)
class _Columns:
    """Columns start, start + step, ... of a first map, ``size`` of them."""

    map: int
    start: int
    size: int
    step: int = 1


class _Walk:
    """From what a second map reads back to the first maps, collecting the scalar expression."""

    def __init__(self, inside: _Inside, first: list[_Map]) -> None:
        self.inside, self.first = inside, first
        self.places = {m.node: i for i, m in enumerate(first)}
        self.halves: list[_Columns] = []

    def expression(self, node: Any) -> Expr:
        if isinstance(node, int | float):
            return Const(float(node))
        if (columns := self._columns(node)) is not None:
            if columns not in self.halves:
                self.halves.append(columns)
            return Ref(f"acc{self.halves.index(columns)}")
        if not isinstance(node, fx.Node):
            raise _Unreadable
        if is_call(node, *_VIEWS):
            return self.expression(node.args[0])
        if is_call(node, aten.mul):
            mine = [a for a in node.args if self._reaches(a) or not isinstance(a, fx.Node)]
            if len(mine) == 1 and isinstance(mine[0], fx.Node):  # a share, or a mask
                return self.expression(mine[0])
        rule = RULES.get(getattr(node.target, "overloadpacket", None))
        if rule is None:
            raise _Unreadable
        names = {"min": "low", "max": "high", "negative_slope": "slope"}
        options = {names.get(k, k): self._argument(v) for k, v in node.kwargs.items()}
        try:
            found = rule(*map(self._argument, node.args), **options)
        except TypeError as error:
            raise _Unreadable from error
        if found is None:
            raise _Unreadable
        return found

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node) or (
            isinstance(value, int | float) and not isinstance(value, bool)
        ):
            return self.expression(value)
        return value

    def _reaches(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and bool(self.inside._above(node))

    def _columns(self, node: Any) -> _Columns | None:
        """The columns of a first map that a node is, with or without the bias."""
        if not isinstance(node, fx.Node):
            return None
        if node in self.places:
            return _Columns(self.places[node], 0, int(shape(node)[-1]))
        if is_call(node, aten.add) and not node.kwargs:
            for value, other in (node.args, node.args[::-1]):
                source = self._columns(value) if isinstance(other, fx.Node) else None
                name = source and self.inside._weight(other)
                if source is not None and name and source.size == int(shape(value)[-1]):
                    self.first[source.map].bias = name
                    return source
            return None
        if is_call(node, aten.select):
            return None
        if is_call(node, *_VIEWS):
            source = self._columns(node.args[0])
            return source if source and _same_last(node, node.args[0]) else None
        if is_call(node, aten.index):  # rows of tokens
            source = self._columns(node.args[0])
            return source if source and _same_last(node, node.args[0]) else None
        if is_call(node, aten.slice):
            return self._cut(node)
        if getattr(node.target, "__name__", "") == "getitem" and is_call(node.args[0], *_CUTTING):
            return self._piece(node.args[0], node.args[1])
        return None

    def _cut(self, node: fx.Node) -> _Columns | None:
        source = self._columns(node.args[0])
        rank = len(shape(node))
        defaults: tuple[Any, ...] = (None, 0, None, None, 1)
        _, dim, start, end, step = tuple(node.args) + defaults[len(node.args) :]
        if source is None or dim % rank != rank - 1:
            return None
        places = range(source.size)[slice(start, end, step)]
        return _Columns(
            source.map, source.start + places.start * source.step, len(places), source.step * step
        )

    def _piece(self, split: fx.Node, index: int) -> _Columns | None:
        source = self._columns(split.args[0])
        pieces = split.meta["val"]
        rank = pieces[index].dim()
        place = 1 if is_call(split, aten.unbind) else 2
        dim = split.args[place] if len(split.args) > place else split.kwargs.get("dim", 0)
        if source is None or is_call(split, aten.unbind) or dim % rank != rank - 1:
            return None
        before = sum(int(p.shape[-1]) for p in pieces[:index])
        size = int(pieces[index].shape[-1])
        return _Columns(source.map, source.start + before * source.step, size, source.step)


def _same_last(a: fx.Node, b: fx.Node) -> bool:
    return bool(shape(a)) and str(shape(a)[-1]) == str(shape(b)[-1])


# --- the op -----------------------------------------------------------------------------------------


def _readings(program: Program, cut: _Cut) -> Iterator[_Block]:
    """Blocks that compute what the cut does."""
    try:
        experts, stacked = _Inside(program, cut).read()
        layouts = list(_layouts(program.weights, cut, experts, stacked))
    except _Unreadable:
        return
    for layout in layouts:
        block = _Block(cut, experts[0], layout)
        if block.verified(program):
            yield block


@dataclass
class _Layout:
    """How the op's weights come from the model's: names, and what is done to them."""

    gate_up: tuple[list[str], Callable[..., Tensor]]
    down: tuple[list[str], Callable[..., Tensor]]
    biases: list[tuple[list[str], Callable[..., Tensor]]]
    count: int
    inter: int


def _layouts(
    weights: Weights, cut: _Cut, experts: list[_Expert], stacked: bool
) -> Iterator[_Layout]:
    """All ways to read the matrices that their sizes admit: two if a matrix is square."""
    one = experts[0]
    halves = one.halves
    hidden = int(shape(cut.result)[-1])
    if len(halves) not in (1, 2) or len({h.size for h in halves}) != 1:
        raise _Unreadable
    inter = halves[0].size
    alike = [(e.activation, e.halves, len(e.first)) for e in experts]
    if any(a != alike[0] for a in alike):
        raise _Unreadable
    names = [m.weight for e in experts for m in (*e.first, e.second)]
    if any(weights.like(n).dim() != (3 if stacked else 2) for n in names):
        raise _Unreadable
    count = int(weights.like(one.second.weight).shape[0]) if stacked else len(experts)
    ups = [[m.weight for m in e.first] for e in experts]
    downs = [e.second.weight for e in experts]
    if len(set(downs)) != len(downs):
        raise _Unreadable
    for up_turned in (False, True):
        for down_turned in (False, True):
            sizes = [tuple(weights.like(name).shape) for name in ups[0]]
            wide = [s[-1] if up_turned else s[-2] for s in sizes]
            deep = {s[-2] if up_turned else s[-1] for s in sizes}
            down = tuple(weights.like(downs[0]).shape)
            if down_turned:
                down = (*down[:-2], down[-1], down[-2])
            if deep != {hidden} or down[-2:] != (hidden, inter):
                continue
            if max(h.start + (h.size - 1) * h.step for h in halves) >= max(wide):
                continue
            yield _Layout(
                _stack(ups, halves, up_turned, stacked),
                _stack([[d] for d in downs], [_Columns(0, 0, hidden)], down_turned, stacked),
                _biases(weights, experts, halves, stacked, count, inter, hidden),
                count,
                inter,
            )


def _stack(
    names: list[list[str]], columns: list[_Columns], turned: bool, stacked: bool
) -> tuple[list[str], Callable[..., Tensor]]:
    """``[E, N, K]`` of matrices ``[N, K]`` (or, turned, ``[K, N]``), rows in the accumulators' order."""
    width = len(names[0])

    def one(*matrices: Tensor) -> Tensor:
        rows = [m.transpose(-1, -2) if turned else m for m in matrices]
        return torch.cat(
            [rows[c.map][..., c.start : c.start + c.size * c.step : c.step, :] for c in columns], -2
        )

    def all_(*matrices: Tensor) -> Tensor:
        groups = range(0, len(matrices), width)
        return torch.stack([one(*matrices[i : i + width]) for i in groups])

    if stacked:
        return names[0], lambda *w: one(*w).contiguous()
    return [n for group in names for n in group], all_


def _biases(
    weights: Weights, experts: list[_Expert], halves: list[_Columns], stacked: bool, count: int,
    inter: int, hidden: int,
) -> list[tuple[list[str], Callable[..., Tensor]]]:  # fmt: skip
    """``[E, 2I]`` and ``[E, H]`` if there are biases anywhere, zeros where there are none."""
    maps = [m for e in experts for m in (*e.first, e.second)]
    if not any(m.bias for m in maps):
        return []
    per_first = max(h.start + h.size * h.step for h in halves)

    def rows(groups: list[list[_Map]], columns: list[_Columns]) -> tuple[list[str], Any]:
        names = [[m.bias for m in group] for group in groups]
        given = [n for group in names for n in group if n is not None]
        sources = given or [maps[0].bias or maps[-1].bias or ""]

        def stack(*values: Tensor) -> Tensor:
            left = iter(values if given else ())
            found = []
            for group in names:
                parts = [
                    values[0].new_zeros(count if stacked else 1, per_first if columns is halves else hidden)
                    if n is None else next(left).reshape(count if stacked else 1, -1)
                    for n in group
                ]  # fmt: skip
                found.append(
                    torch.cat(
                        [
                            parts[c.map][:, c.start : c.start + c.size * c.step : c.step]
                            for c in columns
                        ],
                        -1,
                    )
                )
            return torch.cat(found).contiguous()

        return sources, stack

    return [
        rows([e.first for e in experts], halves),
        rows([[e.second] for e in experts], [_Columns(0, 0, hidden)]),
    ]


@dataclass
class _Block:
    """A block of experts as the op's operands."""

    cut: _Cut
    expert: _Expert
    layout: _Layout
    inward: bool = False  # the one share weighs what the expert sees, not what it answers

    @property
    def gated(self) -> bool:
        return len(self.expert.halves) == 2

    @property
    def activation(self) -> str:
        return expr.text(self.expert.activation)

    def weights(self, weights: Weights) -> list[str]:
        """Derive the stacked weights, and biases if there are any."""
        layout = self.layout
        parts = [("gate_up", layout.gate_up), ("down", layout.down)]
        parts += list(zip(("gate_up_bias", "down_bias"), layout.biases, strict=False))
        found = []
        for suffix, (sources, function) in parts:
            name = weights.fresh(f"{_common(sources[0], sources[-1])}.{suffix}")
            weights.derive(name, function, *sources)
            found.append(name)
        return found

    def verified(self, program: Program) -> bool:
        """Whether the block and the op agree on random tokens."""
        cut, rng = self.cut, torch.Generator().manual_seed(0)
        count, top_k = self.layout.count, cut.top_k
        if top_k > count:
            return False
        x = torch.randn(_TOKENS, int(shape(cut.x)[-1]), generator=rng)
        ids = torch.rand(_TOKENS, count, generator=rng).argsort(-1)[:, :top_k]
        share = torch.rand(_TOKENS, top_k, generator=rng)
        dense = torch.zeros(_TOKENS, count).scatter(1, ids, share)
        given = {cut.x: x, cut.base: torch.zeros(_TOKENS, int(shape(cut.result)[-1])), cut.ids: ids}
        given[cut.shares] = share if cut.ids is not None else dense
        try:
            values = [_shaped(given[n], n) for n in cut.inputs]
            actual = Region([cut.result], cut.inputs)(values, _TOKENS, program.weights)[0]
        except (RuntimeError, IndexError):
            return False
        scratch = program.weights.copy()
        gate_up, down, *biases = (scratch[n] for n in self.weights(scratch))
        if cut.shares is None:
            share = torch.ones_like(share)

        def run(x: Tensor, share: Tensor) -> Tensor:
            return experts_reference(
                x, ids, share, [gate_up], [down], None, "fp32", "fp32", self.activation, self.gated,
                *biases,
            )  # fmt: skip

        wanted = run(x, share)
        actual = actual.reshape(wanted.shape)
        if not _near(actual, wanted) and top_k == 1 and cut.shares is not None:
            self.inward = True
            wanted = run(x * share, torch.ones_like(share))
        return _near(actual, wanted)

    def choice(self, program: Program, count: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """ids and shares ``[T, k]``: the largest of a row where the block has all shares of it."""
        cut, result = self.cut, self.cut.result
        if cut.ids is None:
            rows = _two_dim(program, cut.shares, count, self.layout.count)
            both = program.call(aten.topk.default, rows, cut.top_k, like=result)
            share, ids = (program.call(operator.getitem, both, i, like=result) for i in (0, 1))
            return ids, share
        ids = _two_dim(program, cut.ids, count, cut.top_k)
        return ids, cut.shares and _two_dim(program, cut.shares, count, cut.top_k)

    def fuse(self, program: Program) -> None:
        cut, result = self.cut, self.cut.result
        names = self.weights(program.weights)
        with program.graph.inserting_before(result):
            count = token_count(program)
            x = _two_dim(program, cut.x, count, int(shape(cut.x)[-1]))
            ids, share = self.choice(program, count)
            if self.inward:
                x = program.call(aten.mul.Tensor, x, share, like=result)
            if self.inward or share is None:
                sizes = [count, cut.top_k]
                share = program.call(aten.ones.default, sizes, dtype=torch.float32, like=result)
            gate_up, down, *biases = (program.weight(n) for n in names)
            new = program.call(
                mill.experts.default, x, ids, share, [gate_up], [down], None, "fp32", "fp32",
                self.activation, self.gated, *biases, like=result,
            )  # fmt: skip
            sizes = [count if isinstance(s, torch.SymInt) else s for s in shape(result)]
            if len(sizes) != 2:
                new = program.call(aten.reshape.default, new, sizes, like=result)
            if cut.base is not None:
                new = program.call(aten.add.Tensor, new, cut.base, like=result)
        replace(program, result, new)


def _near(actual: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(actual, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def _shaped(value: Tensor, node: fx.Node) -> Tensor:
    """A value ``[T, F]`` in the shape and dtype of a node."""
    sizes = [_TOKENS if isinstance(s, torch.SymInt) else s for s in shape(node)]
    return value.reshape(sizes).to(node.meta["val"].dtype)


def _two_dim(program: Program, node: fx.Node, count: fx.Node, width: int) -> fx.Node:
    inner = behind_reshapes(node)
    if len(shape(inner)) == 2 and shape(inner)[-1] == width:
        return inner
    if len(shape(node)) == 2 and shape(node)[-1] == width:
        return node
    return program.call(aten.reshape.default, node, [count, width], like=node)


def _common(first: str, last: str) -> str:
    """``layers.0.moe.experts`` of ``layers.0.moe.experts.0.w1.weight`` and ``...experts.7.w1.weight``."""
    pairs = zip(first.split("."), last.split("."), strict=False)
    kept: list[str] = []
    for a, b in pairs:
        if a != b:
            break
        kept.append(a)
    return ".".join(kept) or "experts"
