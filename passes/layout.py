"""Permutations of dims move down, until they meet their inverses."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from ..ir.program import Program, shape
from .base import aten, calls, is_call, replace, same_size, token_count, tokens_outermost


def settle(program: Program) -> None:
    """permute(permute(x)) = permute(x); reshape(permute(x)) = permute(reshape(x)) if tokens are inner."""
    for node in calls(program, aten.permute, aten.transpose, aten.reshape):
        if is_call(node, aten.reshape):
            _below_reshape(program, node)
        else:
            _compose(program, node)


def order(node: Any) -> list[int] | None:
    """The permutation that a node applies to the dims of its first argument."""
    if is_call(node, aten.permute):
        rank = len(shape(node))
        return [d % rank for d in node.args[1]]
    if is_call(node, aten.transpose):
        rank = len(shape(node))
        places = list(range(rank))
        a, b = (d % rank for d in node.args[1:])
        places[a], places[b] = places[b], places[a]
        return places
    return None


def permuted(program: Program, x: fx.Node, places: list[int], like: fx.Node) -> fx.Node:
    if places == sorted(places):
        return x
    return program.call(aten.permute.default, x, places, like=like)


def _compose(program: Program, node: fx.Node) -> None:
    inner = node.args[0]
    outer, first = order(node), order(inner)
    if outer is None or first is None:
        return
    with program.graph.inserting_before(node):
        places = [first[d] for d in outer]
        replace(program, node, permuted(program, inner.args[0], places, node))


def _below_reshape(program: Program, node: fx.Node) -> None:
    inner = node.args[0]
    places = order(inner)
    if places is None or tokens_outermost(program, inner):
        return
    runs = _runs(list(shape(inner)), list(shape(node)))
    if runs is None:
        return
    found: list[tuple[int, list[int]]] = []
    for old, new in runs:
        source = [places[i] for i in old]
        first = source[0] if source else -1
        if source != list(range(first, first + len(source))):
            return
        found.append((first, new))
    ordered = [d for _, new in sorted(found, key=lambda f: f[0]) for d in new]
    count = token_count(program)
    sizes = [count if isinstance(s, torch.SymInt) else s for s in (shape(node)[d] for d in ordered)]
    with program.graph.inserting_before(node):
        moved = program.call(aten.reshape.default, inner.args[0], sizes, like=node)
        back = [ordered.index(d) for d in range(len(ordered))]
        replace(program, node, permuted(program, moved, back, node))


def _runs(old: list[Any], new: list[Any]) -> list[tuple[list[int], list[int]]] | None:
    """Which dims of a reshape's input become which of its output; dims of size 1 come from nowhere."""
    left = [i for i, s in enumerate(old) if not same_size(s, 1)]
    runs: list[tuple[list[int], list[int]]] = []
    j = 0
    while j < len(new):
        if same_size(new[j], 1):
            runs.append(([], [j]))
            j += 1
            continue
        if not left:
            return None
        mine, theirs = [left.pop(0)], [j]
        j += 1
        if isinstance(old[mine[0]], torch.SymInt) or isinstance(new[theirs[0]], torch.SymInt):
            if not same_size(old[mine[0]], new[theirs[0]]):
                return None
        else:
            while (a := _product(old, mine)) != (b := _product(new, theirs)):
                if a < b and left and isinstance(old[left[0]], int):
                    mine.append(left.pop(0))
                elif a > b and j < len(new) and isinstance(new[j], int):
                    theirs.append(j)
                    j += 1
                else:
                    return None
        runs.append((mine, theirs))
    return None if left else runs


def _product(sizes: list[Any], dims: list[int]) -> int:
    return prod(sizes[d] for d in dims)
