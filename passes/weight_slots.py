"""Where weights enter the graph and what they are for, told from structure alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import fx

from ..ir.program import Program
from ..recipe import Role
from .base import is_call, mill

# Per op: the position of a format among its arguments, and of the weights that are in this format.
_SLOTS: dict[Any, tuple[tuple[int, tuple[int, ...]], ...]] = {
    mill.linear: ((4, (1,)),),
    mill.embed: ((2, (0,)),),
    mill.experts: ((6, (3,)), (7, (4,))),
    mill.cached_latent_attention: ((9, (3, 4)),),
}
# Whatever passes one of these is no longer the result of the linear map before it.
_ENDS = (*_SLOTS, mill.route, mill.cached_attention)


class Slot(NamedTuple):
    """Weights of one node that share a format."""

    node: fx.Node
    format_at: int
    weights_at: tuple[int, ...]

    @property
    def format(self) -> str:
        return str(self.node.args[self.format_at])

    @property
    def weights(self) -> list[list[fx.Node]]:
        """The parts of each weight."""
        return [list(self.node.args[i]) for i in self.weights_at]

    def fill(self, weights: list[list[fx.Node]], format: str) -> None:
        args = list(self.node.args)
        for at, parts in zip(self.weights_at, weights, strict=True):
            args[at] = parts
        args[self.format_at] = format
        self.node.args = tuple(args)


def slots(program: Program) -> Iterator[Slot]:
    for node in list(program.graph.nodes):
        for format_at, weights_at in _SLOTS.get(getattr(node.target, "overloadpacket", None), ()):
            yield Slot(node, format_at, weights_at)


def role(program: Program, node: fx.Node) -> Role | None:
    """What the weights of a node are for; None for tables over positions."""
    if is_call(node, mill.embed):
        return "embedding" if node.args[1] is program.input("ids") else None
    if is_call(node, mill.experts):
        return "expert"
    if is_call(node, mill.cached_latent_attention):
        return "latent_up"
    reached = _reached(node)
    if any(is_call(n, mill.route) for n in reached):
        return "router"
    return "head" if program.output in reached else "linear"


def _reached(node: fx.Node) -> set[fx.Node]:
    """All that a linear map's result flows into, up to the next op with weights."""
    seen: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        at = stack.pop()
        if at not in seen:
            seen.add(at)
            stack.extend(() if is_call(at, *_ENDS) else at.users)
    return seen
