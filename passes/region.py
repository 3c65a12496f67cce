"""Regions of a graph as functions: cut out, run on numbers, or fold into weights.

Many passes recognise what a piece of graph computes by running it (lifting by verification) instead of by
matching every way in which somebody may have written it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import networkx as nx
import torch
from torch import Tensor, fx

from ..ir.program import Program, Runner, Weights
from .base import aten, is_call

TOKENS = "tokens"
_ORIGIN = "origin"  # feeds all roots of a search


def is_token_count(node: fx.Node) -> bool:
    """Whether the node is the step's token count, the size that all rows have in common.

    Sizes of selections (tokens of one expert, say) are others.
    """
    return is_call(node, aten.sym_size.int) and node.args[0].op == "placeholder"


class Region:
    """``outputs`` as a function of ``inputs``; the token count is an argument, weights may stay inside."""

    def __init__(self, outputs: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> None:
        self.graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        count = self.graph.placeholder(TOKENS)
        for i, node in enumerate(inputs):
            values[node] = self.graph.placeholder(f"in{i}")
        for node in _ordered(outputs, inputs):
            if is_token_count(node):
                values[node] = count
            elif node.op == "get_attr":
                values[node] = self.graph.create_node("get_attr", node.target)
            else:
                values[node] = self.graph.node_copy(node, values.__getitem__)
        self.graph.output(tuple(values[o] for o in outputs))
        self.weights = [n.target for n in self.graph.nodes if n.op == "get_attr"]

    @property
    def structure(self) -> Hashable:
        """Equal for regions that do the same with their inputs and weights, whatever these are."""
        weights = list(dict.fromkeys(self.weights))
        labels = {node: _Label(f"%{i}") for i, node in enumerate(self.graph.nodes)}
        lines = []
        for node in self.graph.nodes:
            target = weights.index(node.target) if node.op == "get_attr" else node.target
            arguments = fx.map_arg((node.args, node.kwargs), labels.__getitem__)
            lines.append((node.op, str(target), repr(arguments)))
        return tuple(lines)

    def __call__(
        self, inputs: Sequence[Tensor], tokens: int, weights: Weights | dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(Runner(self.graph, weights).run(tokens, *inputs))


class _Label(str):
    """A node's place in a region; its repr is no string's."""

    def __repr__(self) -> str:
        return str(self)


def _ordered(outputs: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes between inputs and outputs, in the order of their graph."""
    needed: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in needed or node in inputs:
            continue
        needed.add(node)
        if not is_token_count(node):
            stack.extend(node.all_input_nodes)
    return sorted(needed)


def dataflow(program: Program) -> nx.DiGraph:
    """Who feeds whom.  Token counts feed nobody: every reshape takes one, and it says nothing."""
    graph = nx.DiGraph()
    for node in program.graph.nodes:
        graph.add_node(node)
        graph.add_edges_from((n, node) for n in node.all_input_nodes if not is_token_count(n))
    return graph


def dependents(program: Program, roots: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The roots, and all that depends on one of them other than through the token count."""
    graph = dataflow(program)
    found = [n for n in program.graph.nodes if roots(n)]
    graph.add_edges_from((_ORIGIN, n) for n in found)
    reached = nx.descendants(graph, _ORIGIN) if found else set()
    return {n for n in reached if not is_token_count(n)}


def fold(program: Program, node: fx.Node, name: str) -> str:
    """Derive a weight that holds what ``node`` computes from weights alone; returns its name."""
    region = Region([node], [])
    fresh = program.weights.fresh(name)
    sources = list(dict.fromkeys(region.weights))

    def compute(*values: Tensor) -> Tensor:
        return region([], 0, dict(zip(sources, values, strict=True)))[0].contiguous()

    program.weights.derive(fresh, compute, *sources)
    return fresh
