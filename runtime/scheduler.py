"""Continuous batching: which tokens of which sequences go into the next step.

One plan serves prefill, decode and mixed batches, so a step simply takes as many pending tokens as
fit: first those of decoding sequences (one each), then chunks of prompts, in order of arrival.

A sequence starts when the cache has room for all that it may become, so one that runs never has to
wait for memory or be evicted; pages cost no memory before they are written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .. import errors
from .batch import Batch
from .cache import PAGE, PagePool, pages_for
from .requests import Logits, Request


class Chunk(NamedTuple):
    """The next ``size`` tokens of a request, and how many rows of logits they want."""

    request: Request
    size: int
    rows: int


class Scheduler:
    """Requests waiting and running; a step carries at most ``tokens`` tokens and ``rows`` rows."""

    def __init__(self, tokens: int, rows: int, pool: PagePool) -> None:
        self._tokens = tokens
        self._rows = rows
        self._pool = pool
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request; raises OutOfCache if it could never run."""
        if pages_for(request.limit) > self._pool.pages:
            raise errors.OutOfCache(needed=request.limit, available=self._pool.pages * PAGE)
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Forget a request, finished or not, and free its pages."""
        if request in self._running:
            self._running.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        self._pool.release(request.pages)

    def schedule(self) -> tuple[Batch, list[Chunk]]:
        """The next batch and whose it is; at least one request must be unfinished."""
        self._admit()
        chunks = self._choose()
        rows, start = [], 0
        for request, size, _ in chunks:
            rows += [start + row for row in request.rows(size)]
            start += size
        parts = [
            (r.tokens[r.computed : r.computed + size], r.computed, r.pages) for r, size, _ in chunks
        ]
        return Batch.of(parts, rows), chunks

    def postprocess(self, chunks: list[Chunk], logits: Logits) -> None:
        """Hand the rows ``[R, vocab]`` of a step to its requests; finished ones leave."""
        for request, rows in self._advance(chunks):
            request.take(logits[rows])

    def accept(self, chunks: list[Chunk], tokens: Sequence[int]) -> None:
        """The same where the step chose the tokens ``[R]``."""
        for request, rows in self._advance(chunks):
            request.accept(tokens[rows])

    def _advance(self, chunks: list[Chunk]) -> Iterator[tuple[Request, slice]]:
        """Each request of a step and its rows, which the caller hands to it."""
        start = 0
        for request, size, rows in chunks:
            request.computed += size
            yield request, slice(start, start + rows)
            start += rows
            if request.done:
                self.cancel(request)

    def _admit(self) -> None:
        # No more sequences than one step can serve: each decoding one then moves in every step.
        most = min(self._tokens, self._rows)
        while self._waiting and len(self._running) < most:
            request = self._waiting[0]
            if pages_for(request.limit) > self._pool.free:
                return
            self._pool.grow(request.pages, request.limit)
            self._running.append(self._waiting.popleft())

    def _choose(self) -> list[Chunk]:
        chunks = []
        tokens, rows = self._tokens, self._rows
        for request in sorted(self._running, key=lambda r: r.pending > 1):
            if size := request.fitting(tokens, rows):
                chunks.append(Chunk(request, size, len(request.rows(size))))
                tokens -= size
                rows -= chunks[-1].rows
        return chunks
