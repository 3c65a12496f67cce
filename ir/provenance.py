"""Where a weight's rows come from, found by deriving it from marked numbers instead of real ones.

A derivation that only moves rows yields the marks as they were, each telling where it stood; one that
computes yields other numbers, and is known by that.  Two columns stand for all of them, so this is quick for
weights of any size.

>>> sources = {"q": torch.empty(2, 5, device="meta"), "k": torch.empty(3, 5, device="meta")}
>>> rearranged(lambda q, k: torch.cat((q.flip(0), k)), sources, torch.empty(5, 5, device="meta")).runs()
[Run(source='q', start=1, step=-1, at=0, rows=2), Run(source='k', start=0, step=1, at=2, rows=3)]
>>> rearranged(lambda q, k: torch.cat((q, 2 * k)), sources, torch.empty(5, 5, device="meta")) is None
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .program import Weights

ZEROS = ""  # the source of rows that are zero, whatever the model
_MARKS = 1 << 24  # whole numbers that fp32 tells apart
_COLUMNS = 2  # of a matrix that are marked


class Run(NamedTuple):
    """``rows`` rows of a weight, from ``at`` on, are rows start, start + step, ... of ``source``."""

    source: str
    start: int
    step: int
    at: int
    rows: int


@dataclass(frozen=True)
class Rows:
    """Of each row of a weight ``[..., N, K]``, leading dims counted out, its source and its place there.

    ``owner [R]`` numbers ``sources``, ``row [R]`` their rows.  If ``transposed``, rows of the weight are
    columns of the sources, counted as rows of their transpose.  A vector has one number to a row.
    """

    sources: tuple[str, ...]
    owner: Tensor
    row: Tensor
    transposed: bool = False

    @classmethod
    def whole(cls, source: str, like: Tensor) -> Rows:
        """All rows of one tensor in their order."""
        count = _rows(like)
        return cls((source,), torch.zeros(count, dtype=torch.int64), torch.arange(count))

    @classmethod
    def joined(cls, sources: Mapping[str, Tensor]) -> Rows:
        """All rows of several tensors, one after the other."""
        counts = [_rows(like) for like in sources.values()]
        owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return cls(tuple(sources), owner, torch.cat([torch.arange(n) for n in counts]))

    @classmethod
    def of(cls, runs: Iterable[Sequence[str | int]], transposed: bool = False) -> Rows:
        """The inverse of :meth:`runs`."""
        known = [Run(*run) for run in runs]  # type: ignore[arg-type]
        sources = tuple(dict.fromkeys(run.source for run in known))
        owner = [torch.full((r.rows,), sources.index(r.source)) for r in known]
        row = [r.start + r.step * torch.arange(r.rows) for r in known]
        return cls(sources, torch.cat(owner), torch.cat(row), transposed)

    def runs(self) -> list[Run]:
        """The same in as few words as rows that follow one another allow."""
        owner, row = self.owner, self.row
        step = row[1:] - row[:-1]
        joined = owner[1:] == owner[:-1]
        changes = torch.ones(len(step), dtype=torch.bool)
        changes[1:] = (step[1:] != step[:-1]) | (joined[1:] != joined[:-1])
        begins = changes.nonzero().flatten().tolist()
        found: list[Run] = []
        at = 0

        def add(end: int) -> None:
            nonlocal at
            width = int(step[at]) if end - at > 1 else 1
            found.append(Run(self.sources[int(owner[at])], int(row[at]), width, at, end - at))
            at = end

        # Between two changes rows have one step; the row where they meet goes to the first that it extends.
        for begin, last in pairwise([*begins, len(step)]):
            while at < begin:
                add(at + 1)
            if joined[begin] and last > at:
                add(last + 1)
        while at < len(row):
            add(at + 1)
        return found

    @property
    def all_of_one(self) -> bool:
        """Whether these are rows of one source in their order, from its first on."""
        count = len(self.row)
        return len(self.sources) == 1 and torch.equal(self.row, torch.arange(count))


def trace(weights: Weights, name: str, known: dict[str, Rows | None] | None = None) -> Rows | None:
    """The rows of a weight in terms of :meth:`.Weights.roots`; None if it is computed from them.

    A weight that takes the place of another (``weights.stands_for``) has the rows of that one.  ``known``
    keeps what is found for the next call.
    """
    known = {} if known is None else known
    if name not in known:
        known[name] = _trace(weights, name, known)
    return known[name]


def _trace(weights: Weights, name: str, known: dict[str, Rows | None]) -> Rows | None:
    like = weights.like(name)
    derivation = weights.derivation(name)
    if derivation is None:
        return Rows.whole(name, like)
    if (replaced := weights.stands_for(name)) is not None:
        return (
            trace(weights, replaced, known) if weights.like(replaced).shape == like.shape else None
        )
    function, sources = derivation
    moved = rearranged(function, {s: weights.like(s) for s in sources}, like)
    return moved and compose(moved, lambda source: trace(weights, source, known))


def compose(outer: Rows, inner: Callable[[str], Rows | None]) -> Rows | None:
    """``outer`` in terms of what its sources are made of; None if that cannot be said by rows."""
    parts = {s: inner(s) if s != ZEROS else _zeros() for s in outer.sources}
    if any(p is None for p in parts.values()):
        return None
    found: dict[str, Rows] = {s: p for s, p in parts.items() if p is not None}
    if outer.transposed and not all(p.all_of_one for p in found.values()):
        return None
    turned = {p.transposed for s, p in found.items() if s != ZEROS}
    if len(turned) > 1:
        return None
    names = tuple(dict.fromkeys(n for p in found.values() for n in p.sources))
    inner_rows = [found[s] for s in outer.sources]
    first = torch.tensor([0, *(len(p.row) for p in inner_rows)]).cumsum(0)
    if outer.transposed:
        owner = torch.tensor([names.index(p.sources[0]) for p in inner_rows])[outer.owner]
        return Rows(names, owner, outer.row, True not in turned)
    owners = [torch.tensor([names.index(n) for n in p.sources])[p.owner] for p in inner_rows]
    at = first[outer.owner] + outer.row
    row = torch.cat([p.row for p in inner_rows])
    return Rows(names, torch.cat(owners)[at], row[at], True in turned)


def _zeros() -> Rows:
    return Rows((ZEROS,), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def rearranged(
    function: Callable[..., Tensor], sources: Mapping[str, Tensor], like: Tensor
) -> Rows | None:
    """The rows of ``function(*sources)`` if it only moves rows, or columns to be rows, or makes zeros.

    ``sources`` and ``like``, the result, are meta tensors.
    """
    for transposed in (False, True):
        found = [_moved(function, sources, like, transposed, seed) for seed in (0, 1)]
        if found[0] is not None and found[1] is not None and _same(found[0], found[1]):
            return found[0]
    return None


def _same(a: Rows, b: Rows) -> bool:
    return a.sources == b.sources and torch.equal(a.owner, b.owner) and torch.equal(a.row, b.row)


def _moved(
    function: Callable[..., Tensor],
    sources: Mapping[str, Tensor],
    like: Tensor,
    transposed: bool,
    seed: int,
) -> Rows | None:
    """The rows according to one choice of marks."""
    thin = [_thin(s.shape, transposed) for s in sources.values()]
    sizes = [shape.numel() for shape in thin]
    if sum(sizes) >= _MARKS or any(not s.is_floating_point() for s in sources.values()):
        return None
    marks = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed)) + 1
    given = [m.float().view(shape) for m, shape in zip(marks.split(sizes), thin, strict=True)]
    try:
        with torch.no_grad():
            made = function(*(g.clone() for g in given))
    except (
        RuntimeError,
        IndexError,
        ValueError,
        TypeError,
    ):  # it wants the columns that are not there
        return None
    width = given[0].shape[-2 if transposed else -1] if like.dim() > 1 else 1
    if made.shape != (*like.shape[:-1], width) and like.dim() > 1:
        return None
    if made.shape != like.shape and like.dim() < 2:
        return None
    return _read(
        made.reshape(-1, width), [_by_row(g, transposed) for g in given], tuple(sources), transposed
    )


def _thin(shape: torch.Size, transposed: bool) -> torch.Size:
    """The shape with few columns, or few rows."""
    sizes = list(shape)
    if len(sizes) > 1:
        at = -2 if transposed else -1
        sizes[at] = min(sizes[at], _COLUMNS)
    return torch.Size(sizes)


def _by_row(marks: Tensor, transposed: bool) -> Tensor:
    """``[R, columns]`` of the marks of one source."""
    if marks.dim() < 2:
        return marks.reshape(-1, 1)
    return (marks.mT if transposed else marks).flatten(0, -2)


def _read(
    made: Tensor, given: list[Tensor], names: tuple[str, ...], transposed: bool
) -> Rows | None:
    """Which row of which source each row of ``made`` is; None if one is none, and not zero."""
    table = torch.cat([g[:, 0] for g in given])
    order = table.argsort()
    place = torch.searchsorted(table[order], made[:, 0].contiguous()).clamp(max=len(table) - 1)
    found = order[place]
    width = max(made.shape[1], *(g.shape[1] for g in given))
    marks = torch.cat([F.pad(g, (0, width - g.shape[1])) for g in given])[found]
    zero = (made == 0).all(-1)
    if not bool(((F.pad(made, (0, width - made.shape[1])) == marks).all(-1) | zero).all()):
        return None
    owner = torch.cat([torch.full((len(g),), i) for i, g in enumerate(given)])[found]
    row = torch.cat([torch.arange(len(g)) for g in given])[found]
    if zero.any():
        names = (*names, ZEROS)
        owner[zero], row[zero] = len(names) - 1, 0
    used = owner.unique().tolist()
    renumbered = torch.zeros(len(names), dtype=torch.int64)
    renumbered[used] = torch.arange(len(used))
    return Rows(tuple(names[i] for i in used), renumbered[owner], row, transposed)


def _rows(like: Tensor) -> int:
    return like.numel() if like.dim() < 2 else like.shape[:-1].numel()
