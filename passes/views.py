"""Rows and columns: which part of whose rows a node is, without moving anything.

Activations are rows of numbers, one row a token, so reshapes and cuts along the last dim are only
other names for columns that exist already.  Passes look through them; :mod:`.lower` never computes
them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import fx

from ..ir.program import Program, shape
from .base import aten, is_call, same_shape, same_size

RESHAPES = (
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.unsqueeze,
    aten.squeeze,
    aten.flatten,
    aten.unflatten,
)
IDENTITIES = (
    aten.clone,
    aten.contiguous,
    aten.alias,
    aten.detach,
    aten.expand,
    aten._to_copy,
    aten.to,
)
PERMUTES = (aten.transpose, aten.permute, aten.t)


def row_size(size: Any) -> tuple[Any, int]:
    """A size that depends on the step, as (what counts rows, rows' multiple): 4 T -> (T, 4)."""
    times, count = size.node.expr.as_coeff_Mul()
    return count, int(times)


def row_dim(node: fx.Node) -> int | None:
    """The dim whose size depends on the step; None if none does, or several do."""
    steps = [i for i, size in enumerate(shape(node)) if isinstance(size, torch.SymInt)]
    return steps[0] if len(steps) == 1 else None


def rows(node: fx.Node) -> str:
    """What counts the node's rows; "1" for a tensor of fixed size."""
    dim = row_dim(node)
    return "1" if dim is None else str(row_size(shape(node)[dim])[0])


def features(node: fx.Node) -> tuple[int, ...] | None:
    """What one row holds: [1, T, H, D] -> (H, D), [4 T, D] -> (4, D).

    None unless rows are outermost.  A tensor of fixed size is one row of its whole shape.
    """
    sizes, dim = shape(node), row_dim(node)
    if dim is None:
        return None if any(isinstance(s, torch.SymInt) for s in sizes) else sizes
    if any(size != 1 for size in sizes[:dim]):
        return None
    times = row_size(sizes[dim])[1]
    return sizes[dim + 1 :] if times == 1 else (times, *sizes[dim + 1 :])


def width(node: fx.Node) -> int:
    """Numbers per row, wherever the dim that counts rows is."""
    dim, sizes = row_dim(node), shape(node)
    times = 1 if dim is None else row_size(sizes[dim])[1]
    return times * prod(size for size in sizes if isinstance(size, int))


# --- one node as columns of another --------------------------------------------------------------


class Columns(NamedTuple):
    """Columns ``start:start + width`` of every row of ``base``."""

    base: fx.Node
    start: int
    width: int


def columns(node: fx.Node) -> Columns:
    """Follow views to what is really computed: the node itself, if it is not a view."""
    base, start = node, 0
    while (step := alias(base)) is not None:
        base, start = step[0], start + step[1]
    return Columns(base, start, width(node))


def alias(node: fx.Node) -> tuple[fx.Node, int] | None:
    """``(source, column)`` if the node's rows are the source's from that column on, else None."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if is_call(node, operator.getitem):
        return _piece(node)
    source = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, fx.Node):
        return None
    if is_call(node, *RESHAPES) or _keeps(node, source) or _keeps_order(node, source):
        return source, 0
    if is_call(node, aten.slice, aten.select):
        return _cut(node, source)
    return None


def _keeps(node: fx.Node, source: fx.Node) -> bool:
    """Same numbers, same shape, same dtype: copies, casts and slices that change nothing."""
    if not is_call(node, *IDENTITIES, aten.slice) or not same_shape(node, source):
        return False
    step = node.args[4] if is_call(node, aten.slice) and len(node.args) > 4 else 1
    return step == 1 and bool(node.meta["val"].dtype == source.meta["val"].dtype)


def _keeps_order(node: fx.Node, source: fx.Node) -> bool:
    """A permutation that only moves dims of size 1."""
    if not is_call(node, *PERMUTES):
        return False
    before, after = ([s for s in shape(n) if not same_size(s, 1)] for n in (source, node))
    return len(before) < 2 or (len(set(map(str, before))) == len(before) and _equal(before, after))


def _equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def _cut(node: fx.Node, source: fx.Node) -> tuple[fx.Node, int] | None:
    """``x[..., start:end]`` or ``x[..., i]``."""
    args = list(node.args)
    _, dim, start, _, step = args + [None, 0, 0, None, 1][len(args) :]
    start = start or 0
    if step != 1 or not isinstance(start, int):
        return None
    column = _column(source, dim, start)
    return None if column is None else (source, column)


def _piece(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Part ``i`` of a split along columns."""
    split, index = node.args
    if not is_call(split, aten.split_with_sizes, aten.split, aten.chunk, aten.unbind):
        return None
    source, default = split.args[0], 0
    position = 1 if is_call(split, aten.unbind) else 2
    dim = split.args[position] if len(split.args) > position else split.kwargs.get("dim", default)
    parts = split.meta["val"]
    before = index if is_call(split, aten.unbind) else sum(p.shape[dim] for p in parts[:index])
    column = _column(source, dim, before) if isinstance(before, int) else None
    return None if column is None else (source, column)


def _column(source: fx.Node, dim: int, index: int) -> int | None:
    """The column at which ``index`` of ``dim`` begins, if a cut there leaves one run of columns."""
    sizes, row = shape(source), features(source)
    dim %= len(sizes)
    if row is None or not isinstance(sizes[dim], int):
        return None
    at = dim - (len(sizes) - len(row))
    if at < 0 or prod(row[:at]) != 1:
        return None
    index = max(index + sizes[dim], 0) if index < 0 else min(index, sizes[dim])
    return index * prod(row[at + 1 :])


def join_column(node: fx.Node) -> int | None:
    """The row position of ``aten.cat``'s dim if joining there puts runs of columns side by side."""
    inputs = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return _column(inputs[0], dim, 0) if all(features(i) is not None for i in inputs) else None


def readers(node: fx.Node) -> Iterator[tuple[fx.Node, Columns]]:
    """Who reads a computed node, and which of its columns, views looked through."""
    stack = [node]
    while stack:
        at = stack.pop()
        for user in at.users:
            if alias(user) is not None:
                stack.append(user)
            elif not _splits(user):
                yield user, columns(at)
            else:
                stack.extend(user.users)


def _splits(node: fx.Node) -> bool:
    """Whether the node is only there for the pieces that views take from it."""
    return bool(node.users) and all(
        is_call(u, operator.getitem) and alias(u) is not None for u in node.users
    )


# --- building views ------------------------------------------------------------------------------


def reshape(program: Program, node: fx.Node, sizes: list[Any]) -> fx.Node:
    """``node`` in a shape with one size that depends on the step; views of it are undone."""
    known = [-1 if isinstance(size, torch.SymInt) else size for size in sizes]
    while not _has_sizes(node, sizes) and is_call(node, *RESHAPES):
        node = node.args[0]
    if _has_sizes(node, sizes):
        return node
    return program.call(aten.reshape.default, node, known, like=node)


def _has_sizes(node: fx.Node, sizes: list[Any]) -> bool:
    return _equal(list(shape(node)), list(sizes))


def cut(program: Program, node: fx.Node, start: int, end: int) -> fx.Node:
    """Columns ``start:end`` of the last dim."""
    return program.call(aten.slice.Tensor, node, len(shape(node)) - 1, start, end, like=node)
