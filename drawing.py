"""Draw a graph from top to bottom as SVG, deterministically.

The classical layered method: nodes into rows by longest path, long edges cut by invisible nodes,
rows ordered by barycenters so that few edges cross, then each row pulled towards its neighbours
without overlaps.  Edges only run down, so the drawing needs no interaction to be read.

>>> graph = nx.DiGraph([("x", "norm"), ("norm", "q"), ("x", "add"), ("q", "add")])
>>> placed = layout(graph, dict.fromkeys(graph, 60.0))
>>> [len(row) for row in placed.rows], len(placed.routes[1])  # x -> add bends around two rows
([1, 2, 2, 1], 4)
>>> bends = [placed.x[node] for node in placed.routes[1][1:-1]]
>>> max(bends) - min(bends) < EDGE  # and hardly at all
True
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, floor, log10
from statistics import fmean
from typing import Any, TypeAlias
from xml.etree.ElementTree import Element

import networkx as nx

ROW = 44.0  # from one row's centre to the next
BOX = 24.0  # a box's height
GAP = 20.0  # between two boxes of a row
EDGE = 8.0  # the width that an edge takes where it passes a row
MARGIN = 10.0
CHARACTER = 6.7  # of the 11 px monospace font in report.css
SWEEPS = 24
PLOT = (760.0, 340.0)  # a plot's size, and the room for its labels
PLOT_LEFT, PLOT_ABOVE, PLOT_BELOW = 64.0, 26.0, 44.0

Node: TypeAlias = Hashable
Rows: TypeAlias = list[list[Node]]


def el(tag: str, *children: Element | str, **attributes: Any) -> Element:
    """An element of HTML or SVG; ``class_`` and ``stroke_width`` stand for class and stroke-width.

    Text goes in as text and is escaped when written, so nothing of a model's can become markup.
    """
    names = {k: k.rstrip("_").replace("_", "-") for k in attributes}
    node = Element(tag, {names[k]: str(v) for k, v in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            node.append(child)
        elif len(node):
            node[-1].tail = (node[-1].tail or "") + child
        else:
            node.text = (node.text or "") + child
    return node


def draw(nodes: Sequence[Mapping[str, str]], edges: Iterable[Sequence[str]], title: str) -> Element:
    """An ``<svg>`` of nodes ``{id, label, kind, where}`` and edges ``(from, to)``."""
    graph = nx.DiGraph()
    graph.add_nodes_from(node["id"] for node in nodes)
    graph.add_edges_from(edges)
    width: dict[Node, float] = {node["id"]: CHARACTER * len(node["label"]) + 18 for node in nodes}
    placed = layout(graph, width)
    rank = {node: i for i, row in enumerate(placed.rows) for node in row}
    left = min((x - width.get(n, EDGE) / 2 for n, x in placed.x.items()), default=0.0) - MARGIN
    right = max((x + width.get(n, EDGE) / 2 for n, x in placed.x.items()), default=0.0) + MARGIN

    def at(node: Node) -> tuple[float, float]:
        return placed.x[node] - left, MARGIN + BOX / 2 + ROW * rank[node]

    height = 2 * MARGIN + BOX + ROW * max(0, len(placed.rows) - 1)
    return el(
        "svg",
        el("title", title),
        *(_edge([at(node) for node in route]) for route in placed.routes),
        *(_box(node, at(node["id"]), width[node["id"]]) for node in nodes),
        viewBox=f"0 0 {right - left:.0f} {height:.0f}",
        width=f"{right - left:.0f}",
        height=f"{height:.0f}",
        role="img",
    )


def _box(node: Mapping[str, str], centre: tuple[float, float], width: float) -> Element:
    x, y = centre
    return el(
        "g",
        el("title", node["where"] or node["id"]),
        el("rect", x=f"{x - width / 2:.1f}", y=f"{y - BOX / 2:.1f}", width=f"{width:.1f}",
           height=f"{BOX:.0f}", rx="5"),
        el("text", node["label"], x=f"{x:.1f}", y=f"{y + 3.8:.1f}"),
        class_=f"node kind-{node['kind']}",
    )  # fmt: skip


def _edge(points: Sequence[tuple[float, float]]) -> Element:
    """A curve that passes each point vertically, with an arrowhead at the last."""
    path = ""
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        top = y0 + BOX / 2
        bottom = y1 - BOX / 2
        middle = (top + bottom) / 2
        path += f"M{x0:.1f} {top:.1f}" if i == 0 else f"V{top:.1f}"
        path += f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {bottom:.1f}"
    tip = "m-3 -5l3 5l3 -5"
    return el("path", d=path + tip, class_="edge")


# --- plots ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A measurement to plot, with an error in y; ``kind`` is its class in report.css, ``note`` its tip."""

    x: float
    y: float
    error: float
    kind: str
    note: str


@dataclass(frozen=True)
class Axis:
    """A quantity: its name, and how its values are written."""

    name: str
    text: Callable[[float], str]


def plot(
    title: str,
    axes: tuple[Axis, Axis],
    curve: Sequence[tuple[float, float]],
    points: Sequence[Point],
    limit: float | None,
) -> Element:
    """An ``<svg>`` of points with error bars, a curve that falls to the right, and a limit of y."""
    high = max([p.y + p.error for p in points] + ([] if limit is None else [1.5 * limit]))
    low = min(0.0, *(p.y - p.error for p in points))
    curve = _below(curve, high)
    flat = [x for x, y in curve if y < low + 0.04 * (high - low)]
    right = max([p.x for p in points] + (flat[:1] or [x for x, _ in curve[-1:]]))
    left = min([p.x for p in points] + [x for x, _ in curve[:1]])
    frame = _Frame(left, max(right, left * 1.02), low, high)
    shown = [(x, y) for x, y in curve if x <= frame.right]
    path = "L".join("{:.1f} {:.1f}".format(*frame.at(x, y)) for x, y in shown)
    return el(
        "svg",
        el("title", title),
        *frame.draw(*axes),
        *([el("path", d=f"M{path}", class_="curve")] if path else []),
        *([] if limit is None else frame.limit(limit, f"budget: {axes[1].text(limit)}")),
        *(mark for p in points for mark in frame.mark(p)),
        viewBox=f"0 0 {PLOT[0]:.0f} {PLOT[1]:.0f}",
        width=f"{PLOT[0]:.0f}",
        height=f"{PLOT[1]:.0f}",
        role="img",
        class_="plot",
    )


def _below(curve: Sequence[tuple[float, float]], high: float) -> list[tuple[float, float]]:
    """The part of a falling curve that is below ``high``, from where it comes in."""
    inside = [(x, y) for x, y in curve if y <= high]
    above = [(x, y) for x, y in curve if y > high]
    if inside and above:
        (x0, y0), (x1, y1) = above[-1], inside[0]
        inside.insert(0, (x1 + (x0 - x1) * (high - y1) / (y0 - y1), high))
    return inside


@dataclass(frozen=True)
class _Frame:
    """Where values are on the page; a little room is left on all sides."""

    left: float
    right: float
    low: float
    high: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = 0.03 + 0.94 * (x - self.left) / (self.right - self.left)
        up = 0.04 + 0.92 * (y - self.low) / ((self.high - self.low) or 1.0)
        width, height = PLOT[0] - PLOT_LEFT - MARGIN, PLOT[1] - PLOT_BELOW - PLOT_ABOVE
        return PLOT_LEFT + across * width, PLOT[1] - PLOT_BELOW - up * height

    def draw(self, across: Axis, up: Axis) -> list[Element]:
        bottom, end = PLOT[1] - PLOT_BELOW, PLOT[0] - MARGIN
        drawn = [
            el("text", up.name, x="4", y="14", class_="axis start"),
            el("text", across.name, x=f"{end:.0f}", y=f"{PLOT[1] - 6:.0f}", class_="axis end"),
        ]
        for value in ticks(self.low, self.high):
            _, y = self.at(self.left, value)
            drawn.append(_line(PLOT_LEFT, y, end, y, "grid"))
            text = el(
                "text", up.text(value), x=f"{PLOT_LEFT - 8:.0f}", y=f"{y + 4:.1f}", class_="end"
            )
            drawn.append(text)
        for value in ticks(self.left, self.right):
            x, _ = self.at(value, self.low)
            drawn.append(_line(x, bottom, x, bottom + 5, "tick"))
            drawn.append(el("text", across.text(value), x=f"{x:.1f}", y=f"{bottom + 18:.0f}"))
        return [*drawn, _line(PLOT_LEFT, bottom, end, bottom, "tick")]

    def limit(self, value: float, name: str) -> list[Element]:
        end = PLOT[0] - MARGIN
        _, y = self.at(self.left, value)
        text = el("text", name, x=f"{end:.0f}", y=f"{y - 6:.1f}", class_="end limit")
        return [_line(PLOT_LEFT, y, end, y, "limit"), text]

    def mark(self, point: Point) -> list[Element]:
        x, y = self.at(point.x, point.y)
        (_, top), (_, bottom) = (self.at(point.x, point.y + e) for e in (point.error, -point.error))
        dot = el("circle", el("title", point.note), cx=f"{x:.1f}", cy=f"{y:.1f}", r="5")
        return [el("g", _line(x, top, x, bottom, "error"), dot, class_=point.kind)]


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> Element:
    return el("path", d=f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}", class_=kind)


def ticks(low: float, high: float) -> list[float]:
    """Round values from ``low`` to ``high``, three to eight of them.

    >>> ticks(0.0, 1.3), ticks(5.7e6, 6.4e6)
    ([0.0, 0.5, 1.0], [5800000.0, 6000000.0, 6200000.0, 6400000.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** floor(log10(rough))
    step = power * next(f for f in (1, 2, 5, 10) if f * power >= rough)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


# --- layout ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Nodes by row, each node's centre, and for each edge the nodes that it passes through."""

    rows: Rows
    x: dict[Node, float]
    routes: list[list[Node]]


def layout(graph: nx.DiGraph, width: Mapping[Node, float]) -> Layout:
    """Place the nodes of an acyclic graph; ``width`` is each box's width."""
    ranks = _ranks(graph)
    proper, routes = _cut_long_edges(graph, ranks)
    rows = _order(proper, ranks)
    return Layout(rows, _positions(proper, rows, routes, width), routes)


def _ranks(graph: nx.DiGraph) -> dict[Node, int]:
    """Longest path from the sources; a source then moves down, next to its first user."""
    rank = {n: i for i, row in enumerate(nx.topological_generations(graph)) for n in row}
    for node in graph:
        if graph.in_degree(node) == 0 and graph.out_degree(node) > 0:
            rank[node] = min(rank[user] for user in graph.successors(node)) - 1
    return rank


def _cut_long_edges(
    graph: nx.DiGraph, ranks: dict[Node, int]
) -> tuple[nx.DiGraph, list[list[Node]]]:
    """A graph whose edges span one row: ``(from, to, row)`` nodes stand where an edge passes."""
    proper = nx.DiGraph()
    proper.add_nodes_from(graph)
    routes = []
    for a, b in graph.edges:
        bends = [(a, b, rank) for rank in range(ranks[a] + 1, ranks[b])]
        ranks.update((bend, bend[2]) for bend in bends)
        routes.append([a, *bends, b])
        nx.add_path(proper, routes[-1])
    return proper, routes


def _order(graph: nx.DiGraph, ranks: Mapping[Node, int]) -> Rows:
    """The rows, ordered by sweeps of barycenters down and up; the order with fewest crossings."""
    rows: Rows = [[] for _ in range(max(ranks.values(), default=-1) + 1)]
    for node in graph:
        rows[ranks[node]].append(node)
    best, fewest = rows, _crossings(graph, rows)
    for sweep in range(SWEEPS):
        if sweep % 2 == 0:
            rows = _barycenter(rows, graph.predecessors)
        else:
            rows = _barycenter(rows[::-1], graph.successors)[::-1]
        if (count := _crossings(graph, rows)) < fewest:
            best, fewest = rows, count
    return best


def _barycenter(rows: Rows, neighbours: Callable[[Node], Iterable[Node]]) -> Rows:
    """Each row sorted by the mean place of its nodes' neighbours in the row before."""
    done = rows[:1]
    for row in rows[1:]:
        place = {node: float(i) for i, node in enumerate(done[-1])}
        own = {node: float(i) for i, node in enumerate(row)}
        key = {n: fmean([place[m] for m in neighbours(n)] or [own[n]]) for n in row}
        done.append(sorted(row, key=key.__getitem__))
    return done


def _crossings(graph: nx.DiGraph, rows: Rows) -> int:
    """Pairs of edges between neighbouring rows whose ends are in opposite order."""
    count = 0
    for upper, lower in pairwise(rows):
        place = {node: i for i, node in enumerate(lower)}
        seen: list[int] = []
        for node in upper:
            ends = sorted(place[user] for user in graph.successors(node))
            count += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return count


def _positions(
    graph: nx.DiGraph, rows: Rows, routes: list[list[Node]], width: Mapping[Node, float]
) -> dict[Node, float]:
    """Centres that keep order and gaps, boxes near their neighbours and long edges straight."""
    near = {node: list(nx.all_neighbors(graph, node)) or [node] for node in graph}
    near |= {bend: route for route in routes for bend in route[1:-1]}
    weight = {node: 1.0 if node in width else 16.0 for node in graph}
    size = {node: width.get(node, EDGE) for node in graph}
    gaps = [[(size[a] + size[b]) / 2 + GAP for a, b in pairwise(row)] for row in rows]
    x: dict[Node, float] = {}
    for row, gap in zip(rows, gaps, strict=True):
        x.update(zip(row, accumulate(gap, initial=0.0), strict=True))
    spaced = list(zip(rows, gaps, strict=True))
    for sweep in range(SWEEPS):
        for row, gap in spaced if sweep % 2 == 0 else reversed(spaced):
            wanted = [fmean(x[other] for other in near[node]) for node in row]
            x.update(zip(row, _spread(wanted, gap, [weight[n] for n in row]), strict=True))
    return x


def _spread(
    wanted: Sequence[float], gaps: Sequence[float], weights: Sequence[float]
) -> list[float]:
    """The places closest to ``wanted`` (least squares) of which each is ``gaps`` after the last.

    With the gaps taken off this is isotonic regression, solved by pooling adjacent violators.

    >>> _spread([0.0, 0.0], [10.0], [1.0, 1.0])
    [-5.0, 5.0]
    """
    offsets = list(accumulate(gaps, initial=0.0))[: len(wanted)]
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for want, offset, weight in zip(wanted, offsets, weights, strict=True):
        mean, members = want - offset, 1
        while pools and pools[-1][0] > mean:
            before, mass, count = pools.pop()
            mean = (before * mass + mean * weight) / (mass + weight)
            weight, members = weight + mass, members + count
        pools.append((mean, weight, members))
    means = [mean for mean, _, members in pools for _ in range(members)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]
