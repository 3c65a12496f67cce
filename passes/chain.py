"""Chains: neighbouring steps that work on every token by itself run in one launch.

Norms of queries and keys, RoPE and the write to the cache take less time than a launch does, or a barrier.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..ir.plan import Chain, Extern, Link, Plan, Step, operand_width

WRITTEN = ("out", "sum", "cache", "ids", "weights")  # parameters, by some kernels at least


def chain(plan: Plan) -> Plan:
    """``plan``, whose arena is not laid out yet, with runs of such steps joined.

    A step that needs nothing of a run that is before it goes ahead of the run, which may grow then.
    """
    steps: list[Step] = []
    run: list[Step] = []
    for step in plan.steps:
        links = isinstance(step.spec, Link)
        if run and (
            step.rows != run[0].rows
            or isinstance(step.spec, Extern)  # nobody says which of its rows meet
            or (not links and any(_meet(step, earlier) for earlier in run))
        ):
            steps += join(run)
            run = []
        (run if links else steps).append(step)
    return replace(plan, steps=(*steps, *join(run)))


def join(run: Sequence[Step]) -> Iterator[Step]:
    """One step for all of a run, or its only one."""
    if len(run) < 2:
        yield from run
        return
    branches = _branches(run)
    links = [step for branch in branches for step in branch]
    spec = Chain(tuple(tuple(map(_link, branch)) for branch in branches))
    bind = {f"{p}_{i}": s.bind[p] for i, s in enumerate(links) for p in s.spec.params}
    yield Step(spec, bind, run[0].rows, _place(run))


def _link(step: Step) -> Link:
    assert isinstance(step.spec, Link)
    return step.spec


def _branches(run: Sequence[Step]) -> list[list[Step]]:
    """Steps that meet, each with all before it that it depends on."""
    branches: list[list[Step]] = []
    for step in run:
        mine = [b for b in branches if any(_meet(step, earlier) for earlier in b)]
        rest = [b for b in branches if b not in mine]
        branches = [*rest, [*(s for b in mine for s in b), step]]
    return branches


@dataclass(frozen=True)
class _Use:
    """Columns of a buffer that a step reads or writes."""

    buffer: str
    columns: range
    written: bool

    def meets(self, other: _Use) -> bool:
        return (
            self.buffer == other.buffer
            and (self.written or other.written)
            and self.columns.start < other.columns.stop
            and other.columns.start < self.columns.stop
        )


def _meet(a: Step, b: Step) -> bool:
    """Whether their order matters."""
    return any(x.meets(y) for x in _uses(a) for y in _uses(b))


def _uses(step: Step) -> list[_Use]:
    uses = []
    for param, operand in step.bind.items():
        width = operand_width(step.spec, param) or sys.maxsize  # unknown: to the end
        columns = range(operand.column, operand.column + width)
        uses.append(_Use(operand.buffer, columns, param in WRITTEN))
    return uses


def _place(run: Sequence[Step]) -> str:
    """The module that all of a run belong to, or that of the first."""
    paths = [step.where.split(".") for step in run]
    shared = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared) or run[0].where
