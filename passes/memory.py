"""Memory planning: buffers that are never needed at the same time share bytes of the arena."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import networkx as nx

from ..ir.plan import Plan

ALIGN = 64


def memory(plan: Plan) -> Plan:
    """Give every arena buffer its place, by first fit over the interference graph.

    ``plan.meta["arena"]`` tells ``bytes``, what they would be ``unshared``, and ``live``, the most
    that any step needs at once, which no placement can beat.
    """
    spans = lifetimes(plan)
    sizes = {name: _aligned(plan.buffers[name].bytes(plan.capacity)) for name in spans}
    graph = interference(spans)
    placements = [place(graph, sizes, order) for order in orders(spans, sizes)]
    offsets = min(placements, key=lambda placed: _end(placed, sizes))
    total = _end(offsets, sizes)
    grows = [0] * (len(plan.steps) + 2)
    for name, (first, last) in spans.items():
        grows[first] += sizes[name]
        grows[last + 1] -= sizes[name]
    live = [*accumulate(grows)][: len(plan.steps)]
    report = {"bytes": total, "unshared": sum(sizes.values()), "live": max(live, default=0)}
    buffers = {
        name: replace(b, offset=offsets[name]) if b.kind == "arena" else b
        for name, b in plan.buffers.items()
        if b.kind != "arena" or name in spans
    }
    meta = {**plan.meta, "arena": report}
    return replace(plan, buffers=buffers, arena_bytes=total, meta=meta)


def lifetimes(plan: Plan) -> dict[str, tuple[int, int]]:
    """First and last step that touch each arena buffer; the output outlives the last one."""
    names = {name for name, buffer in plan.buffers.items() if buffer.kind == "arena"}
    spans: dict[str, tuple[int, int]] = {}
    for index, step in enumerate(plan.steps):
        for name in names & {operand.buffer for operand in step.bind.values()}:
            spans[name] = (spans.get(name, (index, index))[0], index)
    if plan.output in spans:
        spans[plan.output] = (spans[plan.output][0], len(plan.steps))
    return spans


def interference(spans: dict[str, tuple[int, int]]) -> nx.Graph:
    """Buffers that are alive at the same time are neighbours."""
    graph = nx.Graph()
    alive: list[str] = []
    for name in sorted(spans, key=lambda n: (spans[n], n)):
        first = spans[name][0]
        alive = [other for other in alive if spans[other][1] >= first]
        graph.add_node(name)
        graph.add_edges_from((name, other) for other in alive)
        alive.append(name)
    return graph


def orders(spans: dict[str, tuple[int, int]], sizes: dict[str, int]) -> list[list[str]]:
    """Orders of placement worth trying: by size, size times lifetime, lifetime, and start."""
    length = {name: last - first + 1 for name, (first, last) in spans.items()}
    return [
        sorted(spans, key=lambda n: (-sizes[n], -length[n], n)),
        sorted(spans, key=lambda n: (-sizes[n] * length[n], n)),
        sorted(spans, key=lambda n: (-length[n], -sizes[n], n)),
        sorted(spans, key=lambda n: (spans[n], -sizes[n], n)),
    ]


def place(graph: nx.Graph, sizes: dict[str, int], order: list[str]) -> dict[str, int]:
    """Give each buffer in turn the lowest offset at which it meets no neighbour."""
    offsets: dict[str, int] = {}
    for name in order:
        taken = sorted((offsets[n], offsets[n] + sizes[n]) for n in graph[name] if n in offsets)
        offset = 0
        for start, end in taken:
            if offset + sizes[name] <= start:
                break
            offset = max(offset, end)
        offsets[name] = offset
    return offsets


def _end(offsets: dict[str, int], sizes: dict[str, int]) -> int:
    return max((offset + sizes[name] for name, offset in offsets.items()), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
