"""Choosing the next token from logits.

>>> import numpy as np
>>> Sampler(Sampling())(np.array([0.5, 2.0, 1.0], np.float32))
1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import errors


@dataclass(frozen=True)
class Sampling:
    """How to choose: temperature 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token.

    ``top_k`` applies first, then ``top_p`` keeps the fewest tokens whose probability reaches it.
    Raises BadRequest for values without meaning.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            _require(isinstance(v := getattr(self, name), Real), name, v, "that is a number")
        for name in ("top_k", "seed"):
            _require(
                isinstance(v := getattr(self, name), Integral), name, v, "that is a whole number"
            )
        finite = math.isfinite(self.temperature)
        _require(finite and self.temperature >= 0, "temperature", self.temperature, "from 0 on")
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 keeps all tokens)")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.seed >= 0, "seed", self.seed, "at least 0")


class Sampler:
    """Chooses the tokens of one sequence.

    The generator is seeded by (seed, ``index`` of the sequence in its request), so a sequence's
    choices do not depend on what else runs in its batches.
    """

    def __init__(self, sampling: Sampling, index: int = 0) -> None:
        self.how = sampling
        greedy = sampling.temperature == 0
        self._random = None if greedy else np.random.default_rng((sampling.seed, index))

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """A token id, given logits ``[vocab]``; the lowest of equally likely ones when greedy."""
        if self._random is None:
            return int(logits.argmax())
        ids, weights = candidates(logits, self.how)
        below = np.cumsum(weights)
        drawn = np.searchsorted(below, self.uniform() * below[-1], side="right")
        return int(ids[min(drawn, ids.size - 1)])  # the product may round up to the sum

    def uniform(self) -> float:
        """The next random number in [0, 1); 0 when greedy, which needs none."""
        return float(self._random.random()) if self._random else 0.0


class Choices(NamedTuple):
    """How to choose a token from each of several rows of logits; ``uniform`` holds their random numbers."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    uniform: NDArray[np.float32]

    @staticmethod
    def of(samplers: Sequence[Sampler]) -> Choices:
        """The next choice of each sampler."""
        hows = [sampler.how for sampler in samplers]
        return Choices(
            temperature=np.array([how.temperature for how in hows], np.float32),
            top_k=np.array([how.top_k for how in hows], np.int32),
            top_p=np.array([how.top_p for how in hows], np.float32),
            uniform=np.array([sampler.uniform() for sampler in samplers], np.float32),
        )


def candidates(
    logits: NDArray[np.float32], how: Sampling
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Token ids that may be chosen and their weights, likeliest first where top_k or top_p cut."""
    ids: NDArray[np.intp] = np.arange(logits.size)
    if 0 < how.top_k < logits.size:
        # Everything that ties with the k-th may enter; the stable sort then keeps the lowest ids.
        ids = np.flatnonzero(logits >= np.partition(logits, -how.top_k)[-how.top_k])
    if how.top_k or how.top_p < 1:
        ids = ids[np.argsort(-logits[ids], kind="stable")][: how.top_k or None]
    kept = logits[ids].astype(np.float64)
    weights = np.exp((kept - kept.max()) / how.temperature)
    if how.top_p < 1:
        below = np.cumsum(weights)
        keep = int(np.searchsorted(below, how.top_p * below[-1])) + 1
        ids, weights = ids[:keep], weights[:keep]
    return ids, weights


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise errors.BadRequest(reason=f"{name} is {value}", advice=f"give a {name} {allowed}")
