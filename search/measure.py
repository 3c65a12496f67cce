"""The loss of a program on a text, against the program that it was made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ir import cache as kv
from ..ir.program import Program

STEP_TOKENS = 2048  # that are run together, in whole sequences
KEPT_BYTES = 1 << 30  # of the original's logits; past it they are computed again


@dataclass(frozen=True)
class Loss:
    """Of ``tokens`` predicted tokens: the ``rise`` of the mean negative log likelihood and the mean
    ``kl`` divergence KL(original || other), in nats per token, each with its standard error.

    The errors are over sequences, because neighbouring tokens are not independent.
    """

    tokens: int
    rise: float
    rise_error: float
    kl: float
    kl_error: float

    @property
    def perplexity_percent(self) -> float:
        return 100 * math.expm1(self.rise)


@dataclass
class Yardstick:
    """Measures programs against ``original`` on ``text``, sequences of token ids ``[T]``."""

    original: Program
    text: Sequence[Tensor]
    _kept: dict[int, Tensor] = field(default_factory=dict)

    def loss(self, program: Program) -> Loss:
        """What ``program`` loses; it must have the same vocabulary."""
        rows = []
        for i, sequences in enumerate(together(self.text, STEP_TOKENS)):
            expected, actual = self._expected(i, sequences), run(program, sequences)
            lengths = [len(ids) for ids in sequences]
            pairs = zip(sequences, expected.split(lengths), actual.split(lengths), strict=True)
            rows += [_sums(*pair) for pair in pairs]
        tokens, rise, kl = torch.tensor(rows, dtype=torch.float64).T
        return Loss(int(tokens.sum()), *_mean(rise, tokens), *_mean(kl, tokens))

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


def divergence(original: Tensor, other: Tensor) -> Tensor:
    """KL(original || other) of each row of logits.

    Summed as p (d + exp(-d) - 1) with d = log p - log q: no term is negative, and small ones keep
    their digits, while those of p d cancel.

    >>> f"{divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.001]])).item():.3g}"  # 1e-6 / 8
    '1.25e-07'
    """
    p, q = original.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q + torch.expm1(q - p))).sum(-1)


def _sums(ids: Tensor, original: Tensor, other: Tensor) -> tuple[float, float, float]:
    """Predicted tokens of one sequence, and the sums of their rise and divergence."""
    original, other, targets = original[:-1], other[:-1], ids[1:, None]
    rise = original.log_softmax(-1).gather(-1, targets) - other.log_softmax(-1).gather(-1, targets)
    kl = divergence(original, other)
    return len(targets), float(rise.double().sum()), float(kl.double().sum())


def _mean(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """The mean per token and its standard error, by the spread of sequences of unequal lengths."""
    mean = sums.sum() / counts.sum()
    left = (sums - mean * counts).square().sum()
    n = len(sums)
    error = (left * n / (n - 1)).sqrt() / counts.sum() if n > 1 else torch.tensor(torch.inf)
    return float(mean), float(error)
