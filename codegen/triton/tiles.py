"""Sizes that matrix products are cut into, per target: the one place to change them.

``tiles/<target>.json`` has those that were measured, by kernel and by the most rows of a launch:

    {"linear_n2112_k7168_fp8": {"16": {"block_m": 16, "block_n": 64, "block_k": 128, "splits": 4}}}

For all others :func:`gemm` works them out.  Few rows: what counts is how fast the weights stream, so blocks
are narrow, many, and have many loads in flight.  Many rows: what counts is reuse, so tiles are large, as long
as there are enough of them for every multiprocessor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from ...ir import quant
from .launch import ceil_div, power_of_2
from .target import GpuTarget

STREAMED_ROWS = 64  # up to so many rows a product is bound by reading its weights
LEAST_INPUTS = 512  # of one split
RESERVED = 2048  # bytes of shared memory beside the buffers, and what the system takes
WARPS = 8  # of a multiprocessor, with as many registers as large tiles want
JOIN = 400  # joining splits takes about as long as multiplying so many inputs
# Tiles for many rows, and about what share of its speed a tensor core reaches with them.
LARGE = {(128, 256): 1.0, (128, 128): 0.9, (64, 128): 0.75, (64, 64): 0.55}
WIDE = {(64, 256): 0.8}  # where so many columns must stay together


@dataclass(frozen=True)
class Gemm:
    """One block computes [block_m rows, block_n columns] of each part, ``block_k`` inputs at a time.

    ``splits`` blocks share the inputs of one tile; ``group_m`` row blocks run together (``tile_of``).
    With ``persistent``, so many blocks per multiprocessor compute one tile after the other; with ``flatten``
    a block loads what is next while it stores what was last.  With ``descriptors``, tiles of operands are
    copied by tensor descriptors.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int = 1
    group_m: int = 8
    warps: int = 4
    stages: int = 3
    persistent: int = 0
    flatten: bool = False
    descriptors: bool = False

    def tiles(self, m: int, n: int) -> int:
        """How many tiles cover [m, n]."""
        return ceil_div(m, self.block_m) * ceil_div(n, self.block_n)

    def span(self, k: int) -> int:
        """Inputs of one split, whole blocks of them."""
        return ceil_div(ceil_div(k, self.block_k), self.splits) * self.block_k


@dataclass(frozen=True)
class Problem:
    """x [m, k] times the transpose of ``parts`` matrices [n, k], for ``batch`` such problems in one launch.

    ``x_bytes`` is the size of a number of x in memory; ``e4m3`` says that it is rounded to E4M3 before.
    A tile has whole groups of ``columns`` of each part.  ``tiled`` says that tensor descriptors can describe
    both operands.
    """

    m: int
    n: int
    k: int
    format: quant.Format
    parts: int = 1
    batch: int = 1
    x_bytes: int = 2
    e4m3: bool = False
    splittable: bool = True
    columns: int = 1
    tiled: bool = False

    def blocks(self, tile: Gemm) -> int:
        return self.batch * tile.tiles(self.m, self.n) * tile.splits


def gemm(target: GpuTarget, symbol: str, problem: Problem) -> Gemm:
    """The measured tile of a kernel, or a default."""
    measured = _table(target.name).get(symbol, {}).get(str(problem.m))
    if measured:
        tile = Gemm(**measured)
        return replace(tile, descriptors=tile.descriptors and problem.tiled and target.tma)
    if problem.m <= STREAMED_ROWS or _most_rows(problem, target) < STREAMED_ROWS:
        return _streamed(problem, target)
    return _reused(problem, target)


@cache
def _table(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        files(__package__).joinpath("tiles", f"{name}.json").read_text()
    )
    return found


def _streamed(problem: Problem, target: GpuTarget) -> Gemm:
    """Two blocks or so on every multiprocessor, the same number on each."""
    rows = min(max(16, power_of_2(problem.m)), _most_rows(problem, target))
    if _mma(target):
        rows = min(rows, 64 // problem.parts)
    warps = 8 if problem.parts * rows > 64 else 4
    columns = max(problem.columns, 32 if problem.format.name == "fp32" else 64)
    tile = Gemm(rows, columns, _block_k(problem), warps=warps)
    tile = replace(tile, stages=_stages(tile, problem, target, resident=2))

    def cost(tile: Gemm) -> tuple[float, int]:
        blocks = problem.blocks(tile)
        idle = ceil_div(blocks, target.sms) * target.sms / blocks
        return idle, abs(blocks - 2 * target.sms)

    options = _split(tile, problem, most=max(1, 4 * target.sms // problem.blocks(tile)))
    return min(options, key=cost)


def _reused(problem: Problem, target: GpuTarget) -> Gemm:
    """The tile that finishes soonest: how many rounds of blocks there are, and how long each takes."""

    def cost(tile: Gemm) -> float:
        rounds = ceil_div(problem.blocks(tile), target.sms)
        size = tile.block_m, tile.block_n * problem.parts
        inputs = tile.span(problem.k) + JOIN * (tile.splits > 1)
        return rounds * size[0] * size[1] * inputs / sizes[size]

    sizes = WIDE if problem.parts * problem.columns > 128 else LARGE
    # Joining what splits left takes registers that the largest tiles do not have.
    options = [
        tile
        for size in sizes
        if _fits(size, problem, target)
        for tile in _split(_large(size, problem), problem, most=4 if size[0] == 64 else 1)
    ]
    tile = min(options, key=cost)
    tile = replace(tile, stages=_stages(tile, problem, target, resident=1))
    if problem.tiled and target.tma and tile.splits == 1:
        # Sums that are scaled as they grow leave no registers for what is loaded ahead, and mma no memory.
        flatten = not problem.e4m3 and not _mma(target)
        memory = target.shared_bytes // (tile.stages * _buffer(tile, problem) + RESERVED)
        persistent = max(1, min(memory, WARPS // tile.warps))
        return replace(tile, persistent=persistent, flatten=flatten, descriptors=True)
    return tile


def _large(size: tuple[int, int], problem: Problem) -> Gemm:
    """``size`` counts the columns of all parts."""
    rows, columns = size
    block_k = _block_k(problem)
    if problem.format.name == "fp8" and not problem.e4m3:
        block_k //= 2  # so that decoded weights fit in registers beside two sets of sums
    warps = 4 if size == min(LARGE) else 8
    return Gemm(rows, columns // problem.parts, block_k, warps=warps)


def _fits(size: tuple[int, int], problem: Problem, target: GpuTarget) -> bool:
    """Whether a tensor core is filled, 64 rows of a weight at a time, and registers are not overfilled.

    The largest tile leaves no room for weights that are decoded or have scales; with mma, that of two parts
    and 128 rows does not either.
    """
    rows, columns = size
    if columns < max(64, problem.columns) * problem.parts or rows > _most_rows(problem, target):
        return False
    if problem.format.name == "bf16":
        return size != max(LARGE) or target.shared_bytes >= 160 * 1024
    return size != max(LARGE) and not (_mma(target) and problem.parts == 2 and rows == 128)


def _most_rows(problem: Problem, target: GpuTarget) -> int:
    """Rows of a tile whose sums have room in registers, or on sm_100 in tensor memory, which holds one set
    of them for each group of inputs."""
    group = problem.format.group
    if problem.format.name == "fp32":  # no tensor cores: operands are in registers too
        return 32
    return 2 * group // problem.parts if group and target.capability == 100 else 128


def _block_k(problem: Problem) -> int:
    """128 bytes of a row of weights, a line of the cache, but at most 128 inputs, for they share a scale."""
    return min(128, 1024 // problem.format.bits)


def _stages(tile: Gemm, problem: Problem, target: GpuTarget, resident: int) -> int:
    """As many as fit with ``resident`` blocks on a multiprocessor."""
    buffers = (target.shared_bytes // resident - RESERVED) // _buffer(tile, problem)
    return max(2, min(6, buffers + _mma(target)))


def _buffer(tile: Gemm, problem: Problem) -> int:
    """Bytes of one block of inputs, of x and of weights."""
    x_bytes = 1 if problem.e4m3 else problem.x_bytes
    weights = problem.parts * tile.block_n * tile.block_k * problem.format.bits // 8
    return weights + tile.block_m * tile.block_k * x_bytes


def _mma(target: GpuTarget) -> bool:
    """Tensor cores read registers: those hold decoded weights too, and buffers are one less than stages."""
    return target.capability not in (90, 100)


def _split(tile: Gemm, problem: Problem, most: int) -> list[Gemm]:
    """The tile in up to ``most`` splits, none of them without inputs."""
    steps = ceil_div(problem.k, tile.block_k)
    most = max(1, min(most, problem.k // LEAST_INPUTS)) if problem.splittable else 1
    counts = {ceil_div(steps, ceil_div(steps, count)) for count in range(1, most + 1)}
    return [replace(tile, splits=count) for count in sorted(counts)]
