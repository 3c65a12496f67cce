"""Recognise routers."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

import torch
from torch import Tensor, fx

from ..ir.ops import dump_router
from ..ir.program import Program, is_weight, shape
from ..ir.router import RouterSpec, route
from .base import Pass, ancestors, aten, calls, is_call, mill, sweep
from .region import Region

_PROBES = 256
_SCORES = get_args(get_type_hints(RouterSpec)["score"])
_AFTER = get_args(get_type_hints(RouterSpec)["after"])
_GROUP_SCORES = get_args(get_type_hints(RouterSpec)["group_score"])


@dataclass
class FuseRouter(Pass):
    """ids, weights = route(x W_gate^T, spec): scores, groups, choice and weights as one declared op

    The spec is found by running the traced router on random logits next to the reference with every spec
    that its constants admit; one that agrees on all of them is taken, otherwise the router stays as it is.
    """

    name = "fuse_router"

    def run(self, program: Program) -> int:
        matches = 0
        for node in calls(program, mill.experts):
            ids, weights = node.args[1:3]
            if is_call(getattr(ids, "args", (None,))[0], mill.route):
                continue
            found = _recognize(program, ids, weights, experts=int(shape(node.args[3][0])[0]))
            if found is None:
                continue
            logits, bias, spec = found
            with program.graph.inserting_before(node):
                routed = program.call(
                    mill.route.default, logits, bias, dump_router(spec), like=node
                )
                chosen = [program.call(operator.getitem, routed, i, like=node) for i in (0, 1)]
            node.args = (node.args[0], *chosen, *node.args[3:])
            matches += 1
        sweep(program)
        return matches


def _recognize(
    program: Program, ids: fx.Node, weights: fx.Node, experts: int
) -> tuple[fx.Node, fx.Node | None, RouterSpec] | None:
    region = ancestors(ids, _is_gate) | ancestors(weights, _is_gate)
    gates = [n for n in region if _is_gate(n)]
    biases = [n for n in region if is_weight(n) and shape(n) == (experts,)]
    if len(gates) != 1 or shape(gates[0])[-1] != experts or len(biases) > 1:
        return None
    logits = torch.randn(_PROBES, experts, generator=torch.Generator().manual_seed(0)) * 2
    value = logits.reshape([s if isinstance(s, int) else _PROBES for s in shape(gates[0])])
    actual = Region([ids, weights], gates)([value], _PROBES, program.weights)
    wanted = _by_expert(actual[0], actual[1])
    bias = program.weights[biases[0].target] if biases else None
    for spec in _candidates(list(region), wanted[0].shape[-1], experts, bool(biases)):
        if (scale := _agrees(wanted, _by_expert(*route(logits, bias, spec)))) is not None:
            exact = replace(spec, scale=_nearest(scale, _constants(list(region))))
            return gates[0], biases[0] if biases else None, exact
    return None


def _is_gate(node: fx.Node) -> bool:
    return is_call(node, aten.linear, mill.linear, aten.mm, aten.matmul)


def _by_expert(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both ``[T, k]``, ordered by expert: the order of the chosen does not matter."""
    ids = ids.reshape(-1, ids.shape[-1]).long()
    order = ids.argsort(-1)
    return ids.gather(-1, order), weights.reshape(ids.shape).float().gather(-1, order)


def _agrees(wanted: tuple[Tensor, Tensor], got: tuple[Tensor, Tensor]) -> float | None:
    """The factor between the weights if the choice is the same and the factor constant."""
    if wanted[0].shape != got[0].shape or not torch.equal(wanted[0], got[0]):
        return None
    ratio = wanted[1] / got[1]
    return float(ratio.median()) if torch.allclose(ratio, ratio.median(), rtol=1e-4) else None


def _candidates(
    region: list[fx.Node], top_k: int, experts: int, bias: bool
) -> Iterator[RouterSpec]:
    """Every spec that the constants and shapes in the region admit, the common ones first."""
    grouped = {
        int(s[-2]) for n in region
        if isinstance(n.meta.get("val"), Tensor) and len(s := shape(n)) >= 3
        and isinstance(s[-2], int) and isinstance(s[-1], int) and s[-2] * s[-1] == experts
    }  # fmt: skip
    tops = {int(n.args[1]) for n in region if is_call(n, aten.topk) and isinstance(n.args[1], int)}
    groups = [(1, 1)] + [(g, k) for g in sorted(grouped) if g > 1 for k in sorted(tops) if k <= g]
    epsilon = min((c for c in _constants(region) if 0 < c < 1e-6), default=0.0)
    for score, after, renormalize, (count, kept), best in itertools.product(
        _SCORES, _AFTER,
        (False, True), groups, _GROUP_SCORES,
    ):  # fmt: skip
        if count == 1 and best == "max":
            continue
        yield RouterSpec(
            top_k, score, bias, count, kept, best, after, renormalize,
            epsilon if renormalize else 0.0, 1.0,
        )  # fmt: skip


def _constants(region: list[fx.Node]) -> list[float]:
    return [float(a) for n in region for a in n.args if isinstance(a, int | float)]


def _nearest(value: float, constants: list[float]) -> float:
    """The constant of the code that the measured factor stands for."""
    return next((c for c in [1.0, *constants] if abs(c - value) < 1e-4 * abs(value)), value)
