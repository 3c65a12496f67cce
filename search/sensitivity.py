"""What each unit loses by itself in each format, measured by running the rest of the graph from there on.

The graph is executed once; before the first node that reads a unit's weights it is forked for every candidate
of the unit, and only what follows runs again, with the rounded weights in place.  Values that no later node
reads are let go as in any run, so memory holds one small step of the text, not all of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..ir import quant
from ..ir.program import Program, Runner, Weights, is_weight
from .measure import batch, divergence, run, together
from .units import CACHE, Candidate, Unit

STEP_TOKENS = 512
PRECISE = 0.1  # the standard error, relative to the losses around, at which no more text is needed
HARMLESS = 0.05  # of a unit's equal share of the budget


@dataclass
class Sensitivity:
    """Measures units; ``caches`` are the program with each cache format, its weights untouched.

    ``budget`` (nats) is what may be lost in all: of a unit, formats with more bytes than one that hardly
    matters to it are not measured, and left out.  ``say`` hears of how many forks, at most, how many are
    done; ``forks`` counts them.
    """

    program: Program
    caches: Mapping[str, Program]
    units: Sequence[Unit]
    budget: float
    say: Callable[[int, int], None] = lambda done, total: None
    forks: int = 0
    _tallies: dict[tuple[int, str], _Tally] = field(
        default_factory=lambda: defaultdict(_Tally), init=False
    )

    def measure(self, text: Sequence[Tensor]) -> list[Unit]:
        """The units with the losses of their candidates, those left out that lose no less for more."""
        steps = list(together(text, STEP_TOKENS))
        self._most = len(steps) * sum(len(u.candidates) for u in self.units)
        self.say(0, self._most)
        for step in steps:
            self._step(step)
        self.say(self._most, self._most)
        return [self._measured(i) for i in range(len(self.units))]

    def _step(self, sequences: Sequence[Tensor]) -> None:
        expected = run(self.program, sequences)
        self._typical = sum(map(self._most_lost, range(len(self.units)))) / len(self.units)
        walk = Walk(self.program, sequences)
        first = _first_readers(self.program.graph, self.units)
        for node in walk.nodes:
            for i in first.get(node, ()):
                self._weights(i, walk, expected)
            walk.advance()
        for i, unit in enumerate(self.units):
            if unit.role == CACHE:
                for format, program in self.caches.items():
                    self._add(i, format, divergence(expected, run(program, sequences)))

    def _weights(self, i: int, walk: Walk, expected: Tensor) -> None:
        enough = PRECISE * max(self._most_lost(i), self._typical)
        for candidate in self.units[i].candidates:
            tally = self._tallies[i, candidate.format]
            if not tally.count or tally.error > enough:
                changed = _rounded(self.program.weights, self.units[i], candidate.format)
                if changed:
                    self._add(i, candidate.format, divergence(expected, walk.fork(changed)))
                else:
                    tally.add(torch.zeros(len(expected)))
            if tally.below(HARMLESS * self.budget / len(self.units)):
                break

    def _most_lost(self, i: int) -> float:
        """The largest loss of the unit's candidates so far: only differences beside it decide anything."""
        tallies = (self._tallies[i, c.format] for c in self.units[i].candidates)
        return max((t.mean for t in tallies if t.count), default=0.0)

    def _add(self, i: int, format: str, values: Tensor) -> None:
        self._tallies[i, format].add(values)
        self.forks += 1
        self.say(min(self.forks, self._most), self._most)

    def _measured(self, i: int) -> Unit:
        kept: list[Candidate] = []
        for candidate in self.units[i].candidates:
            tally = self._tallies[i, candidate.format]
            if tally.count and (not kept or tally.mean < kept[-1].loss):
                kept.append(replace(candidate, loss=tally.mean))
        return replace(self.units[i], candidates=tuple(kept))


@dataclass
class _Tally:
    """Divergences of one candidate, token by token; they count as independent, so errors are a guide."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        values = values.double()
        self.count += values.numel()
        self.total += float(values.sum())
        self.squares += float(values.square().sum())

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def error(self) -> float:
        variance = max(0.0, self.squares / self.count - self.mean**2)
        return math.sqrt(variance / self.count)

    def below(self, limit: float) -> bool:
        return self.count > 0 and self.mean + 2 * self.error <= limit


class Walk(Runner):
    """A run that stops before every node, where it can be continued with other weights."""

    def __init__(self, program: Program, sequences: Sequence[Tensor]) -> None:
        super().__init__(program.graph, program.weights)
        ids, metadata = torch.cat(list(sequences)), batch([len(s) for s in sequences])
        inputs = program.inputs(ids, metadata, torch.arange(len(ids)))
        self.nodes = list(program.graph.nodes)
        self.env: dict[fx.Node, Any] = {
            n: inputs[n.target] for n in self.nodes if n.op == "placeholder"
        }
        self._at = 0
        self._changed: Mapping[str, Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._changed[target] if target in self._changed else self.weights[target]

    def advance(self) -> None:
        """Execute the next node."""
        node = self.nodes[self._at]
        self._at += 1
        with torch.no_grad():
            if node not in self.env:
                self.env[node] = self.run_node(node)
        for dead in self.user_to_last_uses.get(node, ()):
            self.env.pop(dead, None)

    def fork(self, changed: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[T, V]`` that the rest gives with these weights instead; then all is as before.

        Caches are written anew by every layer that reads them, so forks may share them.
        """
        kept, self._changed = (self._at, self.env), changed
        self.env = {
            n: changed[n.target] if is_weight(n) and n.target in changed else value
            for n, value in self.env.items()
        }
        while self._at < len(self.nodes):
            self.advance()
        out = self.env[self.nodes[-1]]
        (self._at, self.env), self._changed = kept, {}
        logits = out[0] if isinstance(out, tuple | list) else out
        return logits.reshape(-1, logits.shape[-1])


def _first_readers(graph: fx.Graph, units: Sequence[Unit]) -> dict[fx.Node, list[int]]:
    """The units by the first node that reads one of their weights."""
    owner = {name: i for i, unit in enumerate(units) for name in unit.names}
    first: dict[int, fx.Node] = {}
    for node in graph.nodes:
        for weight in filter(is_weight, node.all_input_nodes):
            if weight.target in owner:
                first.setdefault(owner[weight.target], node)
    found: dict[fx.Node, list[int]] = defaultdict(list)
    for i, node in first.items():
        found[node].append(i)
    return found


def _rounded(weights: Weights, unit: Unit, format: str) -> dict[str, Tensor]:
    """What the unit's weights are in a format, to the nearest; nothing if they are the same numbers."""
    if format == "fp32":
        return {}
    fmt = quant.parse(format)
    rounded = {}
    for name in unit.names:
        weight = weights[name]
        value = quant.dequantize(quant.quantize(weight, fmt), fmt, weight.shape[-1])
        if not torch.equal(value, weight):
            rounded[name] = value
    return rounded
