"""Paged caches: what is written is read, whatever the pages."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.ir import cache as kv
from tokenmill.ir.cache import PAGE, Batch, CacheSpec, Part
from tokenmill.ir.plan import latent_cache

LOSS = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127 + 1e-6, "fp8": 2**-4 + 1e-6}


@settings(max_examples=30, deadline=None)
@given(
    fmt=st.sampled_from(sorted(kv.FORMATS)),
    own=st.sampled_from((None, *sorted(kv.FORMATS))),
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    widths=st.tuples(st.integers(1, 150), st.integers(1, 40)),
    seed=st.integers(0, 99),
)
def test_rows_come_back(
    fmt: str, own: str | None, lengths: list[int], widths: tuple[int, int], seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    spec = CacheSpec("c", fmt, (Part("a", widths[0], 64), Part("b", widths[1], 16, own)))
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
        found_parts = kv.read(spec, cache, batch, b, n)
        for part, found, place in zip(parts, found_parts, spec.places, strict=True):
            wanted = part[starts[b] : starts[b + 1]]
            assert found.shape == wanted.shape
            limit = LOSS[place.format] * wanted.abs().max() if n else 0.0
            assert (found - wanted).abs().le(limit).all()


def test_row_bytes() -> None:
    parts = (Part("latent", 512, 128), Part("rope", 64, 128))
    sizes = [CacheSpec("", f, parts).row_bytes for f in ("fp32", "bf16", "int8", "fp8")]
    assert sizes == [2304, 1152, 608, 608]
    assert latent_cache("", "fp8", 512, 64).row_bytes == 656


@given(
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    formats=st.lists(st.sampled_from((None, *kv.FORMATS)), min_size=4, max_size=4),
    fmt=st.sampled_from(sorted(kv.FORMATS)),
)
def test_places_are_aligned_and_apart(
    widths: list[int], formats: list[str | None], fmt: str
) -> None:
    parts = tuple(
        Part(str(i), n, 16, own) for i, (n, own) in enumerate(zip(widths, formats, strict=False))
    )
    spec = CacheSpec("", fmt, parts)
    ranges = []
    for place in spec.places:
        ranges.append((place.values, place.values + place.bytes))
        assert place.values % kv.FORMATS[place.format] == 0
        if place.scales is not None:
            assert place.scales % 4 == 0
            ranges.append((place.scales, place.scales + 4 * place.part.tiles))
    ranges.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))
    assert 0 <= spec.row_bytes - ranges[-1][1] < 16
    assert spec.row_bytes % 16 == 0


def test_what_fp8_stores() -> None:
    """The largest number of a tile is 448 in units of its scale, halves go to even, small ones vanish."""
    spec = CacheSpec("", "fp8", (Part("a", 6, 4),))
    x = torch.tensor([[448.0, 17.0, 19.0, 2.0**-10], [0.0, 0.0, 0.0, 0.0]]).flatten()[None, :6]
    (back,) = kv.decode(spec, kv.encode(spec, [x / 4]))
    assert (4 * back).tolist() == [[448.0, 16.0, 20.0, 0.0, 0.0, 0.0]]
