"""Rows that a GPU writes to the paged cache, under the interpreter: those of ir/cache.py, bit by bit."""

from __future__ import annotations

import pytest
import torch
from tokenmill.ir import cache
from tokenmill.ir.cache import Part
from tokenmill.ir.plan import CacheWrite

from ..harness import DTYPES, batch_of, e4m3_ladder, inputs_of, used_bytes
from ..test_kernels import BATCHES, WRITES
from .interpreter import Interpreted

# Values that divide by 127 and by their scale to halves, which tell how a kernel rounds.
HALVES = CacheWrite("int8", (Part("key", 16, 8),))
LADDER = CacheWrite("fp8", (Part("key", 16, 16),))
SPECS = (*WRITES, HALVES, LADDER)


@pytest.fixture(scope="module", params=["f32", "bf16", "without fp8"])
def kernels(request: pytest.FixtureRequest) -> Interpreted:
    if request.param == "without fp8":  # E4M3 is rounded by its bits
        return Interpreted(SPECS, "sm_80", dtype="f32")
    column = 3 if request.param == "f32" else 0
    return Interpreted(SPECS, dtype=request.param, column=column)


def check(
    kernels: Interpreted, spec: CacheWrite, batch: cache.Batch, parts: list[torch.Tensor]
) -> torch.Tensor:
    """The rows written, which no other row may differ from the reference's either."""
    got = kernels.cache_of(spec)
    got.fill_(7)
    want = got.clone()
    kernels.run(spec, batch, {f"p{i}": part for i, part in enumerate(parts)})
    cache.write(spec.cache, want, batch, [p.to(DTYPES[kernels.dtype]).float() for p in parts])
    assert torch.equal(got.where(used_bytes(spec.cache), 0), want.where(used_bytes(spec.cache), 0))
    return got


@pytest.mark.parametrize(
    "name", ["none", "an empty sequence", "one token", "decode", "over a page boundary"]
)
@pytest.mark.parametrize("spec", WRITES, ids=str)
def test_cache_rows_are_the_references(kernels: Interpreted, spec: CacheWrite, name: str) -> None:
    batch = batch_of(*BATCHES[name])
    parts = list(inputs_of(kernels, spec, batch).values())
    if len(batch.positions):
        parts[0][0] = 0.0  # an all-zero tile has scale 0
    check(kernels, spec, batch, parts)


def test_int8_rounds_halves_to_even(kernels: Interpreted) -> None:
    ladder = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.0])
    parts = [torch.stack([ladder.repeat(2), ladder.repeat(2) * 2.0**-9])]
    rows = check(kernels, HALVES, batch := batch_of((0, 2)), parts)
    first = rows[batch.block_table[0, 0].long(), 0, :8].view(torch.int8)
    assert first.tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


def test_fp8_rounds_like_torch(kernels: Interpreted) -> None:
    """Tiles that hold 448 have scale 1."""
    rows = e4m3_ladder().view(-1, 15)[:: 1 if kernels.target == "sm_80" else 9]
    parts = [torch.cat([torch.full((len(rows), 1), 448.0), rows], 1)]
    check(kernels, LADDER, batch_of((0, len(rows))), parts)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", [HALVES, WRITES[-1]], ids=str)
def test_what_is_not_finite_makes_its_tile_so(
    kernels: Interpreted, spec: CacheWrite, bad: float
) -> None:
    batch, tile = batch_of((0, 1)), spec.parts[0].tile
    parts = [torch.ones(1, part.width) for part in spec.parts]
    parts[0][0, 3] = bad
    kernels.run(spec, batch, {f"p{i}": part for i, part in enumerate(parts)})
    rows = kernels.cache_of(spec)[batch.block_table[0, 0].long(), :1]
    back = cache.decode(spec.cache, rows)[0]
    assert not back[0, :tile].isfinite().any()
    assert torch.equal(back[0, tile:], torch.ones(spec.parts[0].width - tile))
