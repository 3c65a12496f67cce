"""What is computed twice is computed once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.program import Program
from .base import Pass, replace, sweep, writes


@dataclass
class ShareCommon(Pass):
    """y = f(x), z = f(x) => y = z = f(x)"""

    name = "share_common"

    def run(self, program: Program) -> int:
        first: dict[Hashable, fx.Node] = {}
        matches = 0
        for node in list(program.graph.nodes):
            if node.op not in ("get_attr", "call_function") or writes(node) or _is_random(node):
                continue
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
            known = first.setdefault(key, node)
            if known is not node:
                replace(program, node, known)
                program.graph.erase_node(node)
                matches += node.op == "call_function"
        sweep(program)
        return matches


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _frozen(value: Any) -> Hashable:
    """Arguments as something to compare; 1, 1.0 and True stay apart."""
    match value:
        case list() | tuple():
            return tuple(map(_frozen, value))
        case dict():
            return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
        case slice():
            return (slice, _frozen((value.start, value.stop, value.step)))
        case fx.Node():
            return value
    return (type(value), repr(value))
