"""Rows that a GPU writes to the paged cache, under the interpreter: those of ir/cache.py, bit by bit."""

from __future__ import annotations

import pytest
import torch
from tokenmill.ir import cache
from tokenmill.ir.cache import Part
from tokenmill.ir.plan import CacheWrite

from ..harness import DTYPES, batch_of, inputs_of
from ..test_kernels import BATCHES, WRITES
from .interpreter import Interpreted

# Values that divide by 127 and by their scale to halves, which tell how a kernel rounds.
HALVES = CacheWrite("int8", (Part("key", 16, 8),))
SPECS = (*WRITES, HALVES)


@pytest.fixture(scope="module", params=["f32", "bf16"])
def kernels(request: pytest.FixtureRequest) -> Interpreted:
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
    if spec.format == "int8":  # the alignment gap before the scales means nothing
        gap = slice(spec.cache.width, spec.cache.scale_offset)
        got[..., gap] = want[..., gap]
    assert torch.equal(got, want)
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_its_tile_so(kernels: Interpreted, bad: float) -> None:
    batch = batch_of((0, 1))
    part = torch.ones(1, 16)
    part[0, 3] = bad
    kernels.run(HALVES, batch, {"p0": part})
    rows = kernels.cache_of(HALVES)[batch.block_table[0, 0].long(), :1]
    (back,) = cache.decode(HALVES.cache, rows)
    assert not back[0, :8].isfinite().any()
    assert torch.equal(back[0, 8:], torch.ones(8))
