"""Linear maps of the same input become one."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import fx

from ..ir.program import Program, shape
from ..recipe import Recipe
from .base import Pass, calls, mill, replace, sweep
from .linears import Linear, plain_linear, stack
from .views import cut
from .weight_slots import role

_Group: TypeAlias = list[tuple[fx.Node, Linear]]


@dataclass
class MergeLinears(Pass):
    """x A^T, x B^T => columns of x [A; B]^T: the input is read once, and one kernel starts

    Only plain maps, with weights that the recipe gives one format; readers of columns pay nothing.
    """

    recipe: Recipe = field(default_factory=Recipe)

    name = "merge_linears"

    def run(self, program: Program) -> int:
        groups: dict[tuple[fx.Node, str], _Group] = defaultdict(list)
        for node in calls(program, mill.linear):
            linear = plain_linear(node)
            if linear is not None and role(program, node) == "linear":
                origins = program.weights.roots(linear.weight[0].target)
                format = self.recipe.format_for(origins, "linear")
                groups[linear.x, format].append((node, linear))
        shared = [group for group in groups.values() if len(group) > 1]
        for group in shared:
            _merge(program, group)
        sweep(program)
        return len(shared)


def _merge(program: Program, group: _Group) -> None:
    first = group[0][0]
    with program.graph.inserting_before(first):
        weight, bias = stack(program, [linear for _, linear in group])
        merged = Linear(group[0][1].x, [weight], bias).add(program, first)
        start = 0
        for node, _ in group:
            end = start + shape(node)[-1]
            replace(program, node, cut(program, merged, start, end))
            start = end
