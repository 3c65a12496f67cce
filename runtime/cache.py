"""Pages of the KV cache: who holds which.

A page is the space of :data:`PAGE` tokens in every layer's cache, so one list of page numbers per
sequence serves all layers.

>>> pool = PagePool(3)
>>> held = pool.take(tokens=65)
>>> held, pool.free
([0, 1], 1)
>>> pool.release(held)
>>> held, pool.free
([], 3)
"""

from __future__ import annotations

from .. import errors

PAGE = 64  # tokens; the kernels are compiled for it (ir/cache.py)


def pages_for(tokens: int) -> int:
    """Pages that hold ``tokens`` tokens."""
    return -(-tokens // PAGE)


class PagePool:
    """``pages`` pages; the last ones released, whose memory is warm, are handed out first."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages))[::-1]

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, tokens: int) -> list[int]:
        """Pages for a new sequence of ``tokens`` tokens; raises OutOfCache."""
        held: list[int] = []
        self.grow(held, tokens)
        return held

    def grow(self, held: list[int], tokens: int) -> None:
        """Extend ``held`` to room for ``tokens`` tokens; raises OutOfCache and changes nothing."""
        more = pages_for(tokens) - len(held)
        if more > self.free:
            raise errors.OutOfCache(needed=tokens, available=(len(held) + self.free) * PAGE)
        held.extend(self._free.pop() for _ in range(more))

    def release(self, held: list[int]) -> None:
        """Give all pages of ``held`` back, and empty it."""
        self._free.extend(reversed(held))
        held.clear()
