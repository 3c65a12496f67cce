"""What a model loses against another one on a text, with the error of the estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MARGIN = 2.0  # standard errors: the true loss is past it once in forty times


class Sums(NamedTuple):
    """Of one sequence: predicted tokens, and the sums over them of the loss's rise and of the divergence."""

    tokens: int
    rise: float
    kl: float


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

    @property
    def guarded(self) -> float:
        """The rise to hold against a budget: as measured, and two standard errors more.

        No less than the divergence, which is what the rise would be on text of the original's own, and known
        ten times better: on a few thousand tokens a rise can be near zero by luck.
        """
        return max(self.rise + MARGIN * self.rise_error, self.kl)

    @classmethod
    def of(cls, each: Sequence[Sums]) -> Loss:
        """The loss over sequences, of which there is at least one, with a token to predict."""
        tokens, rise, kl = torch.tensor(each, dtype=torch.float64).T
        return cls(int(tokens.sum()), *_mean(rise, tokens), *_mean(kl, tokens))


def divergence(original: Tensor, other: Tensor) -> Tensor:
    """KL(original || other) of each row of logits.

    Summed as p (d + exp(-d) - 1) with d = log p - log q: no term is negative, and small ones keep
    their digits, while those of p d cancel.

    >>> f"{divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.001]])).item():.3g}"  # 1e-6 / 8
    '1.25e-07'
    """
    p, q = original.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q + torch.expm1(q - p))).sum(-1)


def sums(ids: Tensor, original: Tensor, other: Tensor) -> Sums:
    """What ``other`` loses on one sequence ``[T]``, by logits ``[T, V]`` of both."""
    original, other, targets = original[:-1], other[:-1], ids[1:, None]
    rise = original.log_softmax(-1).gather(-1, targets) - other.log_softmax(-1).gather(-1, targets)
    kl = divergence(original, other)
    return Sums(len(targets), float(rise.double().sum()), float(kl.double().sum()))


def _mean(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """The mean per token and its standard error, by the spread of sequences of unequal lengths."""
    mean = sums.sum() / counts.sum()
    left = (sums - mean * counts).square().sum()
    n = len(sums)
    error = (left * n / (n - 1)).sqrt() / counts.sum() if n > 1 else torch.tensor(torch.inf)
    return float(mean), float(error)
