"""Recognise normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.program import Program, is_weight, shape
from . import layout
from .base import Pass, aten, calls, is_call, mill, replace, sweep, tokens_outermost


@dataclass
class FuseNorm(Pass):
    """x / sqrt(mean(x^2) + eps) * w = rms_norm(x, w, eps), and layer_norm likewise"""

    name = "fuse_norm"

    def run(self, program: Program) -> int:
        matches = 0
        for node in calls(program, aten.mul, aten.rms_norm, aten.layer_norm):
            match = _spelled_out(node) or _composite_rms(node) or _layer(node)
            if match is None:
                continue
            target, x, operands, eps = match
            with program.graph.inserting_before(node):
                if target is mill.rms_norm.default and operands == (None,):
                    operands = (ones(program, shape(x)[-1]),)
                rows, back = _rows_outermost(program, x, node)
                normed = program.call(target, rows, *operands, eps, like=node)
                replace(program, node, layout.permuted(program, normed, back, node))
            matches += 1
        layout.settle(program)
        sweep(program)
        return matches


def _rows_outermost(program: Program, x: fx.Node, like: fx.Node) -> tuple[fx.Node, list[int]]:
    """x with its tokens outermost, and the permutation that undoes it: a norm sees the last dim alone."""
    rank = len(shape(x))
    steps = [d for d, s in enumerate(shape(x)) if isinstance(s, torch.SymInt)]
    if tokens_outermost(program, x) or len(steps) != 1 or steps[0] == rank - 1:
        return x, list(range(rank))
    lone = [
        d for d in range(rank) if isinstance(shape(x)[d], int) and shape(x)[d] == 1 and d < steps[0]
    ]
    places = [*lone, steps[0], *(d for d in range(rank) if d not in (*lone, steps[0]))]
    return layout.permuted(program, x, places, like), [places.index(d) for d in range(rank)]


_Match = tuple[object, fx.Node, tuple[fx.Node | None, ...], float]


def _spelled_out(node: fx.Node) -> _Match | None:
    """w * (x * rsqrt(mean(x^2, -1) + eps)), factors in any order; w may be missing."""
    if not is_call(node, aten.mul):
        return None
    for weight, inner in (node.args, reversed(node.args)):
        if is_weight(weight) and len(shape(weight)) == 1 and (core := _normalized(inner)):
            return _of_core(*core, weight)
    weighed = any(
        is_call(u, aten.mul) and any(is_weight(a) and len(shape(a)) == 1 for a in u.args)
        for u in node.users
    )
    core = _normalized(node)
    return None if core is None or weighed else _of_core(*core, None)


def _of_core(x: fx.Node, eps: float, weight: fx.Node | None) -> _Match:
    """A norm of x, a layer norm if x is another value less its mean."""
    if is_call(x, aten.sub) and len(x.args) == 2 and not x.kwargs:
        source, mean = x.args
        if is_call(mean, aten.mean) and mean.args[0] is source and _is_last(mean):
            return mill.layer_norm.default, source, (weight, None), eps
    return mill.rms_norm.default, x, (weight,), eps


def _normalized(node: Any) -> tuple[fx.Node, float] | None:
    """(x, eps) of x * rsqrt(mean(x^2, -1, keepdim) + eps)."""
    if not is_call(node, aten.mul):
        return None
    for x, factor in (node.args, reversed(node.args)):
        if not is_call(factor, aten.rsqrt) or not is_call(total := factor.args[0], aten.add):
            continue
        mean, eps = total.args
        if (
            isinstance(eps, float)
            and is_call(mean, aten.mean)
            and _is_last(mean)
            and _squares(mean.args[0], x)
        ):
            return x, eps
    return None


def _squares(node: Any, x: Any) -> bool:
    if is_call(node, aten.pow):
        return node.args == (x, 2)
    return (is_call(node, aten.square) and node.args[0] is x) or (
        is_call(node, aten.mul) and node.args == (x, x)
    )


def _is_last(mean: fx.Node) -> bool:
    rank = len(shape(mean.args[0]))
    return len(mean.args) == 3 and mean.args[1] in ([-1], [rank - 1]) and mean.args[2] is True


def _composite_rms(node: fx.Node) -> _Match | None:
    if not is_call(node, aten.rms_norm) or len(node.args[1]) != 1:
        return None
    x, _, weight, eps = (*node.args, None, None)[:4]
    value = torch.finfo(torch.float32).eps if eps is None else eps
    return mill.rms_norm.default, x, (weight,), value


def _layer(node: fx.Node) -> _Match | None:
    if not is_call(node, aten.layer_norm) or len(node.args[1]) != 1:
        return None
    x, _, weight, bias, eps = (*node.args, None, None, None)[:5]
    return mill.layer_norm.default, x, (weight, bias), 1e-5 if eps is None else eps


def ones(program: Program, width: int) -> fx.Node:
    """The weight of a norm that has none, one node for each use at the insertion point."""
    name = f"ones.{width}"
    if name not in program.weights:
        program.weights.add(name, torch.ones(width))
    return program.weight(name)
