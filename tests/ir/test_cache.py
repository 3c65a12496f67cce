"""Paged caches: what is written is read, whatever the pages."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.ir import cache as kv
from tokenmill.ir.cache import PAGE, Batch, CacheSpec, Part

LOSS = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127 + 1e-6}


@settings(max_examples=30, deadline=None)
@given(
    fmt=st.sampled_from(sorted(kv.FORMATS)),
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    widths=st.tuples(st.integers(1, 150), st.integers(1, 40)),
    seed=st.integers(0, 99),
)
def test_rows_come_back(fmt: str, lengths: list[int], widths: tuple[int, int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    spec = CacheSpec("c", fmt, (Part("a", widths[0], 64), Part("b", widths[1], 16)))
    pages = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(pages) + 1, generator=rng).int()
    table = torch.zeros(len(lengths), max(*pages, 1), dtype=torch.int32)
    for b, (start, count) in enumerate(
        zip(torch.tensor([0, *pages]).cumsum(0), pages, strict=False)
    ):
        table[b, :count] = order[start : start + count]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths]).int()
    batch = Batch(positions, starts, table)
    cache = kv.allocate(spec, sum(pages) + 1)
    parts = [torch.randn(sum(lengths), w, generator=rng) for w in widths]
    kv.write(spec, cache, batch, parts)
    for b, n in enumerate(lengths):
        for part, found in zip(parts, kv.read(spec, cache, batch, b, n), strict=True):
            wanted = part[starts[b] : starts[b + 1]]
            assert found.shape == wanted.shape
            limit = LOSS[fmt] * wanted.abs().max() if n else 0.0
            assert (found - wanted).abs().le(limit).all()


def test_row_bytes() -> None:
    parts = (Part("latent", 512, 128), Part("rope", 64, 128))
    assert [CacheSpec("", f, parts).row_bytes for f in ("fp32", "bf16", "int8")] == [
        2304,
        1152,
        596,
    ]
