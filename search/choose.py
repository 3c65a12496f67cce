"""One candidate for every unit: a knapsack with groups, solved along convex hulls.

Losses are taken to add up.  Of each unit only candidates on the lower convex hull of (cost, loss) matter to a
Lagrangian; starting with the cheapest of all, the step that saves most loss for its cost is taken again and
again.  Every state on that path is the best for its own cost; between two states units are exchanged one by
one while that helps.  (Sinha & Zoltners, 1979, give the hulls; the exchange is plain local search.)

>>> thin, fine = Candidate("thin", 1, 1, 1, loss=9.0), Candidate("fine", 3, 3, 3, loss=1.0)
>>> [c.format for c in least([(thin, fine), (thin, fine)], stored, loss, limit=10.0)]
['fine', 'thin']
>>> least([(thin, fine)], stored, loss, limit=0.5) is None
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

from .units import Candidate

Choice: TypeAlias = tuple[Candidate, ...]
Options: TypeAlias = Sequence[Sequence[Candidate]]
Measure: TypeAlias = Callable[[Candidate], float]


def stored(candidate: Candidate) -> float:
    return candidate.stored


def held(candidate: Candidate) -> float:
    return candidate.held


def read(candidate: Candidate) -> float:
    return candidate.read


def loss(candidate: Candidate) -> float:
    return candidate.loss


def total(choice: Choice, measure: Measure) -> float:
    return sum(map(measure, choice))


def least(options: Options, value: Measure, weight: Measure, limit: float) -> Choice | None:
    """The choice of (nearly) the least ``value`` whose ``weight`` is within the limit, if there is one."""
    fitting = (c for c in path(options, value, weight) if total(c, weight) <= limit)
    choice = next(fitting, None)
    return choice and _exchange(choice, options, value, weight, limit)


def path(options: Options, value: Measure, weight: Measure) -> Iterator[Choice]:
    """From the least value to the least weight, each step the one that sheds most weight for its value."""
    hulls = [_hull(candidates, value, weight) for candidates in options]
    steps = [
        ((weight(a) - weight(b)) / (value(b) - value(a)), unit, b)
        for unit, hull in enumerate(hulls)
        for a, b in pairwise(hull)
    ]
    choice = [hull[0] for hull in hulls]
    yield tuple(choice)
    for _, unit, candidate in sorted(steps, key=lambda step: -step[0]):  # stable: hulls in order
        choice[unit] = candidate
        yield tuple(choice)


def _hull(candidates: Sequence[Candidate], value: Measure, weight: Measure) -> list[Candidate]:
    """The candidates on the lower convex hull, value rising and weight falling."""
    hull: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (value(c), weight(c))):
        if hull and weight(c) >= weight(hull[-1]):
            continue  # another is no dearer and no heavier
        while len(hull) > 1 and not _bends(hull[-2], hull[-1], c, value, weight):
            hull.pop()
        hull.append(c)
    return hull


def _bends(a: Candidate, b: Candidate, c: Candidate, value: Measure, weight: Measure) -> bool:
    """Whether b is below the line from a to c."""
    ab = (weight(a) - weight(b)) * (value(c) - value(a))
    return ab > (weight(a) - weight(c)) * (value(b) - value(a))


def _exchange(
    choice: Choice, options: Options, value: Measure, weight: Measure, limit: float
) -> Choice:
    """Let single units use what is left below the limit, the largest gain first."""
    at, spare = list(choice), limit - total(choice, weight)
    while True:
        gains = [
            (value(at[unit]) - value(c), -unit, c)
            for unit, candidates in enumerate(options)
            for c in candidates
            if value(c) < value(at[unit]) and weight(c) - weight(at[unit]) <= spare
        ]
        if not gains:
            return tuple(at)
        _, unit, best = max(gains, key=lambda gain: gain[:2])
        spare -= weight(best) - weight(at[-unit])
        at[-unit] = best
