"""What one step computes on: tokens of several sequences, end to end, and where each belongs."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


class Batch(NamedTuple):
    """A ragged batch of B sequences, T tokens and R wanted rows, all int32.

    ``ids [T]`` and ``positions [T]``; sequence ``b`` owns tokens ``starts[b]:starts[b + 1]``, at
    consecutive positions; ``rows [R]`` are the tokens whose logits are wanted; token ``j`` of
    sequence ``b`` lives in page ``block_table[b, j // PAGE]`` of every cache.

    >>> batch = Batch.of([([7, 8], 0, [0]), ([9], 4, [1])], rows=[1, 2])
    >>> batch.ids.tolist(), batch.positions.tolist(), batch.starts.tolist()
    ([7, 8, 9], [0, 1, 4], [0, 2, 3])
    """

    ids: Ints
    positions: Ints
    rows: Ints
    starts: Ints
    block_table: Ints

    def extent(self, over: str) -> int:
        """Rows of an activation over ``tokens``, ``rows`` or ``fixed``."""
        return {"tokens": self.ids.size, "rows": self.rows.size, "fixed": 1}[over]

    @staticmethod
    def of(chunks: list[tuple[list[int], int, list[int]]], rows: list[int]) -> Batch:
        """Join chunks of (ids, first position, pages of the sequence)."""
        counts = [len(ids) for ids, _, _ in chunks]
        spans = [range(first, first + len(ids)) for ids, first, _ in chunks]
        table = np.zeros((len(chunks), max(len(pages) for _, _, pages in chunks)), np.int32)
        for row, (_, _, pages) in zip(table, chunks, strict=True):
            row[: len(pages)] = pages
        return Batch(
            ids=np.array([i for ids, _, _ in chunks for i in ids], np.int32),
            positions=np.array([p for span in spans for p in span], np.int32),
            rows=np.array(rows, np.int32),
            starts=np.array([0, *accumulate(counts)], np.int32),
            block_table=table,
        )
