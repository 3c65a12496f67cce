"""The loss of a program on a text, against the program that it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ir import cache as kv
from ..ir.loss import Loss, Sums, divergence, sums
from ..ir.program import Program

__all__ = ["Loss", "Yardstick", "batch", "divergence", "run", "together"]

STEP_TOKENS = 2048  # that are run together, in whole sequences
KEPT_BYTES = 1 << 30  # of the original's logits; past it they are computed again


@dataclass
class Yardstick:
    """Measures programs against ``original`` on ``text``, sequences of token ids ``[T]``."""

    original: Program
    text: Sequence[Tensor]
    _kept: dict[int, Tensor] = field(default_factory=dict)

    def loss(self, program: Program) -> Loss:
        """What ``program`` loses; it must have the same vocabulary."""
        rows: list[Sums] = []
        for i, sequences in enumerate(together(self.text, STEP_TOKENS)):
            expected, actual = self._expected(i, sequences), run(program, sequences)
            lengths = [len(ids) for ids in sequences]
            pairs = zip(sequences, expected.split(lengths), actual.split(lengths), strict=True)
            rows += [sums(*pair) for pair in pairs]
        return Loss.of(rows)

    def _expected(self, i: int, sequences: Sequence[Tensor]) -> Tensor:
        if i in self._kept:
            return self._kept[i]
        logits = run(self.original, sequences)
        if sum(t.nbytes for t in self._kept.values()) + logits.nbytes <= KEPT_BYTES:
            self._kept[i] = logits
        return logits


def together(text: Sequence[Tensor], tokens: int) -> Iterator[list[Tensor]]:
    """The sequences in order, as many at a time as have so many tokens; at least one.

    >>> [list(map(len, s)) for s in together([torch.zeros(n) for n in (3, 3, 9, 2)], 6)]
    [[3, 3], [9], [2]]
    """
    group: list[Tensor] = []
    for ids in text:
        if group and sum(map(len, group)) + len(ids) > tokens:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group


def batch(lengths: Sequence[int]) -> kv.Batch:
    """Metadata of whole sequences that are run in one step."""
    pages = [-(-n // kv.PAGE) for n in lengths]
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    for row, count, end in zip(table, pages, _ends(pages), strict=True):
        row[:count] = torch.arange(end - count, end)
    starts = torch.tensor([0, *_ends(lengths)], dtype=torch.int32)
    return kv.Batch(torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]), starts, table)


def _ends(counts: Sequence[int]) -> list[int]:
    return torch.tensor(counts).cumsum(0).tolist()


def run(program: Program, sequences: Sequence[Tensor]) -> Tensor:
    """Logits of all tokens, one sequence after the other."""
    ids = torch.cat(list(sequences))
    metadata = batch([len(s) for s in sequences])
    return program.execute(ids, metadata, torch.arange(len(ids)), {})
