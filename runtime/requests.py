"""What the scheduler works on: sequences of tokens that want logits."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from .sampling import Sampler
from .tokenizer import TextStream

Logits = NDArray[np.float32]


class Request(ABC):
    """A sequence in work: ``tokens[:computed]`` are in the cache, in ``pages``.

    It will never have more than ``limit`` tokens in the cache.  ``sampler`` chooses its tokens; without one
    it wants the logits themselves.
    """

    def __init__(self, tokens: Sequence[int], limit: int, sampler: Sampler | None = None) -> None:
        self.tokens = list(tokens)
        self.limit = limit
        self.sampler = sampler
        self.computed = 0
        self.pages: list[int] = []

    @property
    def pending(self) -> int:
        """Tokens that are known and not yet computed."""
        return len(self.tokens) - self.computed

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether no further step is wanted."""

    @abstractmethod
    def fitting(self, tokens: int, rows: int) -> int:
        """How many pending tokens go into a step with room for ``tokens`` and ``rows``."""

    @abstractmethod
    def rows(self, count: int) -> range:
        """Which of the next ``count`` tokens' logits are wanted."""

    @abstractmethod
    def take(self, logits: Logits) -> None:
        """Use the logits ``[len(rows), vocab]`` of tokens just computed; copy what is to stay."""

    @abstractmethod
    def accept(self, tokens: Sequence[int]) -> None:
        """Instead of the logits, the tokens that ``sampler`` would choose from them."""


class Completion(Request):
    """Generates up to ``new`` tokens; ``finish_reason`` is set when it has ended.

    ``pieces`` collects (text, token) as they come, with no text if there is no text stream;
    ``times`` are the moments of the first and of the latest token (time.perf_counter).
    """

    def __init__(
        self,
        prompt: Sequence[int],
        new: int,
        sampler: Sampler,
        ends: Collection[int],
        text: TextStream | None,
    ) -> None:
        # The last token is not fed back.
        super().__init__(prompt, len(prompt) + new - 1, sampler)
        self.prompt_tokens = len(prompt)
        self.text = text
        self.finish_reason = ""
        self.pieces: deque[tuple[str, int]] = deque()
        self.times = (0.0, 0.0)
        self._new = new
        self._ends = ends

    @property
    def done(self) -> bool:
        return bool(self.finish_reason)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    def fitting(self, tokens: int, rows: int) -> int:
        return min(self.pending if rows else self.pending - 1, tokens)

    def rows(self, count: int) -> range:
        return range(count - 1, count) if count == self.pending else range(0)

    def take(self, logits: Logits) -> None:
        assert self.sampler
        self.accept([self.sampler(row) for row in logits])

    def accept(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._append(int(token))

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        piece = self.text.push(token) if self.text else ""
        self.finish_reason = self._ending(token)
        if self.text and self.done:
            piece += self.text.flush()
        self.pieces.append((piece, token))
        now = time.perf_counter()
        self.times = (self.times[0] or now, now)

    def _ending(self, token: int) -> str:
        if token in self._ends or (self.text and self.text.stopped):
            return "stop"
        return "length" if len(self.tokens) == self.prompt_tokens + self._new else ""


class Scoring(Request):
    """Wants the logits of every token; collects them in ``logits [tokens, vocab]``."""

    def __init__(self, tokens: Sequence[int], vocab: int) -> None:
        super().__init__(tokens, limit=len(tokens))
        self.logits = np.empty((len(tokens), vocab), np.float32)
        self._filled = 0

    @property
    def done(self) -> bool:
        return self._filled == len(self.tokens)

    def fitting(self, tokens: int, rows: int) -> int:
        return min(self.pending, tokens, rows)

    def rows(self, count: int) -> range:
        return range(count)

    def take(self, logits: Logits) -> None:
        self.logits[self._filled : self._filled + len(logits)] = logits
        self._filled += len(logits)

    def accept(self, tokens: Sequence[int]) -> None:
        raise TypeError("scoring needs logits")
