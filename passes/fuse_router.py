"""Recognise routers."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

import torch
from torch import Tensor, fx

from ..ir.ops import dump_router
from ..ir.program import Program, is_weight, shape
from ..ir.router import RouterSpec, route
from .base import Pass, ancestors, aten, behind_reshapes, calls, is_call, mill, sweep, token_count
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
        matches, known = 0, dict[Hashable, RouterSpec | None]()
        for node in calls(program, mill.experts):
            ids, weights = node.args[1:3]
            if is_call(getattr(ids, "args", (None,))[0], mill.route):
                continue
            found = _recognize(program, ids, weights, int(shape(node.args[3][0])[0]), known)
            if found is None:
                continue
            logits, bias, spec = found
            with program.graph.inserting_before(node):
                routed = program.call(
                    mill.route.default, logits, bias, dump_router(spec), like=node
                )
                chosen = [program.call(operator.getitem, routed, i, like=node) for i in (0, 1)]
            node.args = (node.args[0], *chosen, *node.args[3:])
            _weigh_inputs(program, node, ids, known)
            matches += 1
        sweep(program)
        return matches


def _weigh_inputs(
    program: Program, node: fx.Node, ids: fx.Node, known: dict[Hashable, RouterSpec | None]
) -> None:
    """experts(s x) where s is the router's weight of the one chosen: s too is from a route op."""
    scaled = behind_reshapes(node.args[0])
    if not is_call(scaled, aten.mul) or len(scaled.args) != 2:
        return
    shares = [a for a in scaled.args if isinstance(a, fx.Node) and shape(a)[-1:] == (1,)]
    if len(shares) != 1 or shape(ids)[-1:] != (1,):
        return
    found = _recognize(program, ids, shares[0], int(shape(node.args[3][0])[0]), known)
    if found is None:
        return
    logits, bias, spec = found
    with program.graph.inserting_before(shares[0]):
        routed = program.call(mill.route.default, logits, bias, dump_router(spec), like=node)
        share = program.call(operator.getitem, routed, 1, like=node)
        if len(shape(share)) != len(shape(shares[0])):
            sizes = [s if isinstance(s, int) else token_count(program) for s in shape(shares[0])]
            share = program.call(aten.reshape.default, share, sizes, like=node)
    scaled.replace_input_with(shares[0], share)


def _recognize(
    program: Program,
    ids: fx.Node,
    weights: fx.Node,
    experts: int,
    known: dict[Hashable, RouterSpec | None],
) -> tuple[fx.Node, fx.Node | None, RouterSpec] | None:
    """The gate, the bias and the spec; routers of one structure are tried once, and ``known`` then."""
    region = ancestors(ids, _is_gate) | ancestors(weights, _is_gate)
    gates = [n for n in region if _is_gate(n)]
    biases = [n for n in region if is_weight(n) and shape(n) == (experts,)]
    if len(gates) != 1 or shape(gates[0])[-1] != experts or len(biases) > 1:
        return None
    part = Region([ids, weights], gates)
    bias = biases[0] if biases else None
    others = {n: program.weights[n] for n in part.weights if bias is None or n != bias.target}
    key = experts, tuple(map(str, shape(gates[0]))), part.structure
    if key not in known or others:  # numbers make them different
        known[key] = _spec(part, list(region), gates[0], experts, bias, others)
    spec = known[key]
    return None if spec is None else (gates[0], bias, spec)


def _spec(
    part: Region,
    region: list[fx.Node],
    gate: fx.Node,
    experts: int,
    bias_node: fx.Node | None,
    others: dict[str, Tensor],
) -> RouterSpec | None:
    """The spec that agrees with the traced router, on random logits and a random bias."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(_PROBES, experts, generator=rng) * 2
    bias = None if bias_node is None else torch.randn(experts, generator=rng) / 4
    value = logits.reshape([s if isinstance(s, int) else _PROBES for s in shape(gate)])
    weights = others if bias_node is None else {**others, bias_node.target: bias}
    actual = part([value], _PROBES, weights)
    wanted = _by_expert(actual[0], actual[1])
    for spec in _candidates(region, wanted[0].shape[-1], experts, bias is not None):
        if (scale := _agrees(wanted, _by_expert(*route(logits, bias, spec)))) is not None:
            return replace(spec, scale=_nearest(scale, _constants(region)))
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
