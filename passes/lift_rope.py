"""Find out what lies between projections and attention: selections of columns, and RoPE.

There are as many spellings of rotary embedding as there are models (rotated halves, interleaved pairs,
complex products, partial, permuted), and as many ways to shuffle heads.  All of them are, per token, a
selection of columns followed by rotations whose angles come from tables.  So each attention input is taken
as a black box from its sources, run on probes that reveal the selection and the rotation, rewritten in the
one canonical form, and the rewrite is compared with the original on random numbers before it is kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor, fx

from ..errors import Unsupported
from ..ir.ops import rope as rope_reference
from ..ir.program import Program, is_weight, shape, where
from . import views
from .base import (
    Pass,
    aten,
    behind_reshapes,
    calls,
    is_call,
    mill,
    sweep,
    token_count,
    tokens_outermost,
)
from .canonicalize import rows_of
from .region import Region, is_token_count

# What may stand between a projection and attention: moving data about, and rotating it.
_MOVES = (
    aten.reshape, aten.transpose, aten.permute, aten.expand, aten.slice, aten.select, aten.split,
    aten.split_with_sizes, aten.chunk, aten.unbind, aten.cat, aten.stack, aten.clone, aten.new_empty,
    aten.copy, aten.slice_scatter, aten.view_as_complex, aten.view_as_real, aten.mul, aten.add, aten.sub,
    aten.neg, aten.index_select, aten.repeat_interleave, aten.unsqueeze, aten.squeeze,
    aten.view, aten.movedim, aten.to, aten._to_copy, aten.index, aten.roll, aten.flatten,
)  # fmt: skip
_TOLERANCE = 1e-4


@dataclass
class LiftRope(Pass):
    """q, k, v = rope(columns of a projection, table[position])"""

    name = "lift_rope"

    def run(self, program: Program) -> int:
        matches, tables = 0, dict[tuple[object, ...], tuple[fx.Node, fx.Node]]()
        known: _Known = {}
        for node in calls(program, mill.attention):
            _take_factors(program, node)
            lengths = [_take_length(program, node, i) for i in range(2)]
            for norm in _norms_of_rotated(program, node):
                matches += _lift(program, norm, [_probe(program, norm, 0, known)], tables)
            probed = [_probe(program, node, i, known) for i in range(3)]
            _share_heads(probed[1:])
            matches += _lift(program, node, probed, tables)
            _give_lengths(program, node, lengths)
        sweep(program)
        return matches


def _lift(
    program: Program,
    node: fx.Node,
    probed: list[_Input],
    tables: dict[tuple[object, ...], tuple[fx.Node, fx.Node]],
) -> int:
    """Put the canonical form of the first inputs in their places; how many are rotated."""
    args = list(node.args)
    for i, found in enumerate(probed):
        with program.graph.inserting_before(node):
            args[i] = _build(program, found, tables)
    node.args = tuple(args)
    return sum(any(p.rotary is not None for p in found.pieces) for found in probed)


def _norms_of_rotated(program: Program, attention: fx.Node) -> list[fx.Node]:
    """Norms between rotation and attention, ``[1, T, H, D]``."""
    norms = [n for i in range(3) for n in _leaves(program, attention.args[i])[0]]
    return [
        n for n in dict.fromkeys(norms)
        if is_call(n, mill.rms_norm, mill.layer_norm)
        and len(shape(n)) == 4 and _leaves(program, n.args[0])[1]
    ]  # fmt: skip


# What is only another view of the same numbers.
_VIEWS = (aten.reshape, aten.transpose, aten.permute, aten.expand, aten.clone, aten.contiguous)


def _take_length(program: Program, attention: fx.Node, index: int) -> fx.Node | None:
    """Take a factor s[position] off queries or keys, by which some models sharpen long contexts."""
    node = attention.args[index]
    while is_call(node, *_VIEWS) and len(node.users) == 1:
        node = node.args[0]
    if not is_call(node, aten.mul) or len(node.users) > 1 or len(node.all_input_nodes) != 2:
        return None
    for source, factor in (node.args, node.args[::-1]):
        table = behind_reshapes(factor)
        if (
            is_call(table, mill.embed)
            and table.args[1] is program.input("positions")
            and views.width(table) == 1
        ):
            node.replace_all_uses_with(source)
            return table
    return None


def _give_lengths(program: Program, attention: fx.Node, lengths: list[fx.Node | None]) -> None:
    args = list(attention.args)
    for i, length in enumerate(lengths):
        if length is not None:
            with program.graph.inserting_before(attention):
                sizes = [1, token_count(program), 1, 1]
                factor = program.call(aten.reshape.default, length, sizes, like=length)
                args[i] = program.call(aten.mul.Tensor, args[i], factor, like=attention)
    attention.args = tuple(args)


def _take_factors(program: Program, attention: fx.Node) -> None:
    """(c q) k^T = c (q k^T), and likewise for k; softmax(..) (c v) = c softmax(..) v"""
    for index in range(3):
        node = attention.args[index]
        while is_call(node, *_VIEWS) and len(node.users) == 1:
            node = node.args[0]
        if not is_call(node, aten.mul, aten.div) or len(node.users) > 1 or node.kwargs:
            continue
        source, number = node.args[:2]
        if not isinstance(source, fx.Node) or isinstance(number, fx.Node):
            continue
        factor = float(number) if is_call(node, aten.mul) else 1.0 / float(number)
        node.replace_all_uses_with(source)
        if index < 2:
            args = list(attention.args)
            args[4] *= factor
            attention.args = tuple(args)
        else:
            users = list(attention.users)
            with program.graph.inserting_after(attention):
                scaled = program.call(aten.mul.Tensor, attention, factor, like=attention)
            for user in users:
                user.replace_input_with(attention, scaled)


# --- probing ----------------------------------------------------------------------------------------


@dataclass
class _Rotary:
    """A rotation of columns begin:end of a head; ``tables`` says where each pair's cos and sin stand."""

    begin: int
    end: int
    interleaved: bool
    cos: tuple[int, ...]
    sin: tuple[int, ...]


@dataclass
class _Piece:
    """Columns begin:end of every head: those of one source, the same for ``group`` heads in a row."""

    source: fx.Node
    begin: int
    end: int
    columns: Tensor  # [H, end - begin]
    group: int
    rotary: _Rotary | None = None


# By how an attention input is computed: its sources, and the pieces that were found.
_Known: TypeAlias = dict[Hashable, tuple[list[fx.Node], list[_Piece]]]


@dataclass
class _Input:
    """One input of an attention, as understood."""

    node: fx.Node
    heads: int
    pieces: list[_Piece] = field(default_factory=list)
    tables: list[fx.Node] = field(default_factory=list)


def _probe(program: Program, attention: fx.Node, index: int, known: _Known) -> _Input:
    """What an attention input is; inputs that are computed alike are probed once, and ``known`` then."""
    target = attention.args[index]
    assert isinstance(target, fx.Node)
    sources, tables = _leaves(program, target)
    heads, width = (int(s) for s in shape(target)[-2:])
    probe = _Probe(program, target, sources, tables)
    if (key := probe.key) in known:
        twin, pieces = known[key]
        there = dict(zip(twin, sources, strict=True))
        found = _Input(target, heads, tables=tables)
        found.pieces = [replace(p, source=there[p.source]) for p in pieces]
        return found
    columns, factor = probe.selection()
    turned = probe.rotated(columns, factor)
    if not torch.all((factor.view(heads, width) == 1) | turned):
        raise _cannot(attention, "an attention input is scaled per column")
    found = _Input(target, heads, tables=tables)
    found.pieces = _pieces(sources, columns.view(heads, width))
    begins = turned.any(0).nonzero().flatten().tolist()
    if begins:
        _place_rotation(attention, probe, found, columns, begins[0], begins[-1] + 1)
    if not probe.region.weights:  # their numbers would count
        known[key] = sources, [replace(p) for p in found.pieces]
    return found


def _leaves(program: Program, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Sources (projections, norms) and angle tables that an attention input is made of."""
    sources: dict[fx.Node, None] = {}
    tables: dict[fx.Node, None] = {}
    seen, stack = set[fx.Node](), [node]
    while stack:
        at = stack.pop()
        if at in seen or is_token_count(at) or is_weight(at):
            continue
        seen.add(at)
        if is_call(at, mill.embed) and at.args[1] is program.input("positions"):
            tables[at] = None
        elif is_call(at, *_MOVES) or getattr(at.target, "__name__", "") == "getitem":
            stack.extend(at.all_input_nodes)
        elif isinstance(at.meta.get("val"), Tensor):
            sources[at] = None
    return sorted(sources), sorted(tables)


class _Probe:
    """Runs an attention input on chosen source values at chosen positions."""

    def __init__(
        self, program: Program, target: fx.Node, sources: list[fx.Node], tables: list[fx.Node]
    ) -> None:
        self.program, self.target, self.sources, self.tables = program, target, sources, tables
        for source in sources:
            if not tokens_outermost(program, source):
                raise _cannot(source, "a projection's tokens are not its outermost dim")
        self.widths = [views.width(s) for s in sources]
        self.region = Region([target], [*sources, *tables])
        self.rng = torch.Generator().manual_seed(0)

    @property
    def key(self) -> Hashable:
        """Equal for attention inputs that are computed alike, over the same tables."""
        sizes = tuple(tuple(map(str, shape(n))) for n in (self.target, *self.sources))
        return sizes, tuple(t.args[0][0].target for t in self.tables), self.region.structure

    def run(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x [T, sum of source widths]`` -> ``[T, H * D]``."""
        tokens = len(x)
        values = [
            part.reshape([s if isinstance(s, int) else tokens for s in shape(source)])
            for part, source in zip(x.split(self.widths, 1), self.sources, strict=True)
        ]
        angles = [self.table(t, positions)[None] for t in self.tables]
        return self.region([*values, *angles], tokens, self.program.weights)[0].reshape(tokens, -1)

    def table(self, node: fx.Node, positions: Tensor) -> Tensor:
        return self.program.weights.rows(node.args[0][0].target, positions)

    def random(self, tokens: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tokens, sum(self.widths), generator=self.rng)
        return x, torch.randint(1, self.program.positions, (tokens,), generator=self.rng)

    def selection(self) -> tuple[Tensor, Tensor]:
        """Per output column the source column it copies, and the factor, read at position 0.

        All angles are 0 there.  Ones show the factor, and 1, 2, 3, ... the column: exact in fp32.
        """
        total = sum(self.widths)
        x = torch.stack((torch.ones(total), torch.arange(1.0, total + 1)))
        ones, counted = self.run(x, torch.zeros(2, dtype=torch.int64))
        columns = (counted / ones).round().sub(1)
        if not torch.isfinite(columns).all() or columns.min() < 0 or columns.max() >= total:
            raise _cannot(
                self.target, "an attention input is more than moved and rotated projections"
            )
        x, _ = self.random(3)
        copied = self.run(x, torch.zeros(3, dtype=torch.int64))
        if not torch.allclose(copied, x[:, columns.long()] * ones, atol=_TOLERANCE):
            raise _cannot(
                self.target, "an attention input is more than moved and rotated projections"
            )
        return columns.long(), ones

    def rotated(self, columns: Tensor, factor: Tensor) -> Tensor:
        """Which output columns ``[H, D]`` change with the position."""
        x, positions = self.random(16)
        changed = (self.run(x, positions) != x[:, columns] * factor).any(0)
        return changed.view(int(shape(self.target)[-2]), -1)


def _pieces(sources: list[fx.Node], columns: Tensor) -> list[_Piece]:
    """Cut a head's columns where the source changes, or how many heads share it."""
    widths = torch.tensor([0] + [views.width(s) for s in sources]).cumsum(0)
    owner = torch.bucketize(columns, widths[1:], right=True)
    if not (owner == owner[:1]).all():
        raise _cannot(sources[0], "heads are taken from different projections")
    group = [_group(columns[:, d]) for d in range(columns.shape[1])]
    cuts = [0] + [
        d for d in range(1, len(group)) if owner[0, d] != owner[0, d - 1] or group[d] != group[d - 1]
    ]  # fmt: skip
    return [
        _Piece(sources[int(owner[0, a])], a, b, columns[:, a:b] - widths[owner[0, a]], group[a])
        for a, b in zip(cuts, [*cuts[1:], len(group)], strict=True)
    ]


def _group(column: Tensor) -> int:
    """How many heads in a row read the same source column."""
    heads = len(column)
    changes = (column[1:] != column[:-1]).nonzero().flatten() + 1
    group = int(changes[0]) if len(changes) else heads
    return group if torch.equal(column, column[::group].repeat_interleave(group)[:heads]) else 1


def _place_rotation(
    attention: fx.Node, probe: _Probe, found: _Input, columns: Tensor, begin: int, end: int
) -> None:
    """Attach the rotation of head columns begin:end to the piece that holds them."""
    rotary = _rotation(probe, columns, found.heads, begin, end)
    holders = [p for p in found.pieces if p.begin <= begin and end <= p.end]
    if rotary is None or not holders:
        raise _cannot(attention, "a position-dependent attention input is not a rotary embedding")
    rotary.begin, rotary.end = begin - holders[0].begin, end - holders[0].begin
    holders[0].rotary = rotary


def _rotation(probe: _Probe, columns: Tensor, heads: int, begin: int, end: int) -> _Rotary | None:
    """The pairing and the tables with which RoPE explains columns begin:end."""
    half = (end - begin) // 2
    x, positions = probe.random(24)
    actual = probe.run(x, positions).view(24, heads, -1)
    chosen = x[:, columns].view(24, heads, -1)
    known = _both_signs([probe.table(t, positions) for t in probe.tables])
    for interleaved in (False, True):
        first = slice(begin, end, 2) if interleaved else slice(begin, begin + half)
        second = slice(begin + 1, end, 2) if interleaved else slice(begin + half, end)
        cos, sin = _angles(actual[:, 0], chosen[:, 0], first, second)
        cos_at, sin_at = _match(cos, known), _match(sin, known)
        if cos_at is None or sin_at is None:
            continue
        expected = rope_reference(chosen, known[:, cos_at], known[:, sin_at], begin, interleaved)
        if torch.allclose(expected, actual, atol=_TOLERANCE, rtol=_TOLERANCE):
            return _Rotary(begin, end, interleaved, tuple(cos_at), tuple(sin_at))
    return None


def _angles(actual: Tensor, chosen: Tensor, first: slice, second: slice) -> tuple[Tensor, Tensor]:
    """Solve a' = a cos - b sin, b' = a sin + b cos for cos and sin, per token and pair."""
    a, b, turned_a, turned_b = (
        chosen[:, first],
        chosen[:, second],
        actual[:, first],
        actual[:, second],
    )
    norm = a.square() + b.square()
    return (turned_a * a + turned_b * b) / norm, (turned_b * a - turned_a * b) / norm


def _match(wanted: Tensor, known: Tensor) -> list[int] | None:
    """For each wanted column ``[T]`` the first known column that equals it, or None."""
    distance = (wanted[:, :, None] - known[:, None, :]).abs().amax(0)
    best = distance.min(-1)
    return best.indices.tolist() if bool((best.values < _TOLERANCE).all()) else None


# --- rewriting --------------------------------------------------------------------------------------


def _share_heads(inputs: Sequence[_Input]) -> None:
    """Keys and values that repeat for a group of query heads are kept once per group."""
    group = min(p.group for i in inputs for p in i.pieces)
    for found in inputs:
        found.heads //= group
        for piece in found.pieces:
            piece.columns = piece.columns[::group]
            piece.group = max(1, piece.group // group)


def _build(
    program: Program, found: _Input, tables: dict[tuple[object, ...], tuple[fx.Node, fx.Node]]
) -> fx.Node:
    """The canonical form, ``[1, T, H, D]``: pieces joined along the head."""
    parts = [_build_piece(program, found, piece, tables) for piece in found.pieces]
    if len(parts) == 1:
        return parts[0]
    return program.call(aten.cat.default, parts, -1, like=found.node)


def _build_piece(
    program: Program,
    found: _Input,
    piece: _Piece,
    tables: dict[tuple[object, ...], tuple[fx.Node, fx.Node]],
) -> fx.Node:
    if piece.group not in (1, found.heads):
        raise _cannot(found.node, "parts of a head are shared by different groups of heads")
    heads = found.heads // piece.group
    flat = _columns(program, piece.source, piece.columns[:: piece.group].flatten())
    count = token_count(program)
    x = program.call(
        aten.reshape.default, flat, [1, count, heads, piece.end - piece.begin], like=found.node
    )
    if piece.rotary is not None:
        cos, sin = _angle_tables(program, found, piece.rotary, tables)
        x = program.call(
            mill.rope.default,
            x,
            cos,
            sin,
            piece.rotary.begin,
            piece.rotary.interleaved,
            like=found.node,
        )
    if piece.group > 1:
        x = program.call(aten.expand.default, x, [-1, -1, found.heads, -1], like=found.node)
    return x


def _columns(program: Program, source: fx.Node, columns: Tensor) -> fx.Node:
    """Columns of a source: all of it, a projection with those rows of its weight, or a slice."""
    width = views.width(source)
    if torch.equal(columns, torch.arange(width)):
        return source
    if is_call(source, aten.linear):
        return rows_of(program, source, columns)
    begin = int(columns[0])
    if len(shape(source)) > 1 and torch.equal(columns, torch.arange(begin, begin + len(columns))):
        count = token_count(program)
        flat = program.call(aten.reshape.default, source, [1, count, width], like=source)
        return program.call(aten.slice.Tensor, flat, -1, begin, begin + len(columns), like=source)
    raise _cannot(
        source, "an attention input takes scattered columns of something that is no projection"
    )


def _angle_tables(
    program: Program,
    found: _Input,
    rotary: _Rotary,
    tables: dict[tuple[object, ...], tuple[fx.Node, fx.Node]],
) -> tuple[fx.Node, fx.Node]:
    """Nodes of cos and sin ``[1, T, pairs]``, made once per kind of rotation."""
    names = tuple(t.args[0][0].target for t in found.tables)
    key = (names, rotary.cos, rotary.sin)
    if key not in tables:
        positions = program.input("positions")
        with program.graph.inserting_before(_after_inputs(program)):
            tables[key] = tuple(
                program.call(
                    mill.embed.default, [_table(program, names, columns, kind)], positions, "fp32",
                    like=found.tables[0],
                )
                for kind, columns in (("cos", rotary.cos), ("sin", rotary.sin))
            )  # fmt: skip
    return tables[key]


def _table(
    program: Program, names: tuple[str, ...], columns: tuple[int, ...], kind: str
) -> fx.Node:
    name = program.weights.fresh(f"rope.{kind}")
    program.weights.derive(name, lambda *t: _both_signs(t)[:, list(columns)].contiguous(), *names)
    return program.weight(name)


def _both_signs(tables: Sequence[Tensor]) -> Tensor:
    """All columns, and all of them negated: of models that turn the other way."""
    joined = torch.cat(list(tables), -1)
    return torch.cat((joined, -joined), -1)


def _after_inputs(program: Program) -> fx.Node:
    return next(n for n in program.graph.nodes if n.op == "call_function")


def _cannot(node: fx.Node, what: str) -> Unsupported:
    return Unsupported(reason=what, where=where(node), advice="report this model's attention code")
