"""Sizes that the work of a kernel is cut into, per target: the one place to change them.

``tiles/<target>.json``, and a table of the user's own before it, has those that were measured, by kernel and
by the most rows of a launch (``tokenmill tune`` writes such tables):

    {"linear_n2112_k7168_fp8": {"16": {"block_m": 16, "block_n": 64, "block_k": 128, "splits": 4}}}

All others are worked out.  For products :func:`rule` does it.  Few rows: what counts is how fast the weights
stream, so blocks are narrow, many, and have many loads in flight.  Many rows: what counts is reuse, so tiles
are large, as long as there are enough of them for every multiprocessor.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any, TypeAlias, TypeVar

from ...errors import BadRecipe
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

SUMS_MOST = 128  # fp32 sums that a thread holds
REGISTERS_MOST = (
    160  # of a thread, for sums, those of a group, and decoded weights, two to a register
)
OPTIONS_MOST = 40  # that are worth measuring for one launch
# How far a halving or a doubling leads away: less often these change much.
STEP, LESSER_STEP, LESSER = 2, 3, ("group_m", "stages")
BY_ONE, MAY_BE_NONE = ("stages", "persistent"), ("persistent",)


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
class Walk:
    """One block attends with ``rows`` pairs of query and head to ``block`` keys at a time.

    ``splits`` blocks share the keys of one tile.
    """

    rows: int
    block: int
    splits: int = 1
    warps: int = 4
    stages: int = 2


T = TypeVar("T", Gemm, Walk)
# Kernel -> the most rows of a launch -> fields of its Gemm or Walk.
Table: TypeAlias = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Tiles:
    """What was measured for a target: ``table``, and where it says nothing the one that comes along."""

    target: GpuTarget
    table: Table = field(default_factory=dict)

    def choose(self, kernel: str, rows: int, rule: T, options: Callable[[], list[T]]) -> T:
        """The sizes of a kernel's launches for at most ``rows`` rows, ``rule`` if none were measured.

        ``options`` are those worth measuring, the most promising first; whoever tunes asks for them.
        """
        for table in (self.table, _shipped(self.target.name)):
            if found := table.get(kernel, {}).get(str(rows)):
                return type(rule)(**found)
        return rule


@cache
def _shipped(name: str) -> Table:
    text = files(__package__).joinpath("tiles", f"{name}.json").read_text()
    found: Table = json.loads(text)["tiles"]
    return found


def check_table(target: str, table: Table) -> None:
    """Raise BadRecipe for the first entry that no kernel can be cut by."""
    for kernel, launches in table.items():
        for rows, entry in launches.items():
            kind = Walk if kernel.startswith(("attend_", "latent_attend_")) else Gemm
            if reason := _mistake(kind, rows, entry):
                names = ", ".join(f.name for f in fields(kind))
                raise BadRecipe(
                    where=f"tiles for {target}, {kernel}, {rows}",
                    reason=reason,
                    advice=f"its fields are {names}; `tokenmill tune` writes tables that fit",
                )


def _mistake(kind: type[Gemm | Walk], rows: str, entry: Mapping[str, Any]) -> str | None:
    if not rows.isdecimal() or rows != str(int(rows)) or rows == "0":
        return "the most rows of a launch are a number above 0"
    if unknown := sorted(entry.keys() - {f.name for f in fields(kind)}):
        return f"unknown field {unknown[0]!r}"
    try:
        found = asdict(kind(**entry))
    except TypeError as error:
        return str(error).replace(f"{kind.__name__}.__init__()", "it")
    for name, value in found.items():
        if isinstance(value, bool):
            continue
        power, least = name not in (*BY_ONE, "splits", "group_m"), int(name not in MAY_BE_NONE)
        if value < least or (power and value & (value - 1)):
            wanted = "a power of two" if power else f"{least} or more"
            return f"{name} is {value}, and must be {wanted}"
    return None


def nearest(start: T, settle: Callable[[T], T | None], fixed: Collection[str] = ()) -> list[T]:
    """``start`` and the sizes around it, in order of the halvings and doublings that lead to them.

    ``settle`` makes a change whole, or refuses it; the ``fixed`` fields stay.
    """
    queue, known = [(0, 0, start)], {start}
    found: list[T] = []
    while queue and len(found) < OPTIONS_MOST:
        distance, _, tile = heapq.heappop(queue)
        found.append(tile)
        for step, changed in _changes(tile, fixed):
            settled = settle(changed)
            if settled is not None and settled not in known:
                known.add(settled)
                heapq.heappush(queue, (distance + step, len(known), settled))
    return found


def _changes(tile: T, fixed: Collection[str]) -> Iterator[tuple[int, T]]:
    """How far it leads, and one field changed: a size halved or doubled, a count by one, a switch turned."""
    for name, value in asdict(tile).items():
        if name in fixed:
            continue
        if isinstance(value, bool):
            values = [not value]
        else:
            values = [value - 1, value + 1] if name in BY_ONE else [value // 2, value * 2]
            values = [new for new in values if new >= (name not in MAY_BE_NONE)]
        step = LESSER_STEP if name in LESSER else STEP
        yield from ((step, replace(tile, **{name: new})) for new in values)


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


def gemm(
    tiles: Tiles,
    kernel: str,
    rows: int,
    problem: Problem,
    default: Gemm | None = None,
    fixed: Collection[str] = (),
) -> Gemm:
    """The tile of a kernel's launches for at most ``rows`` rows, by default the rule's.

    Nobody measures tiles with other ``fixed`` fields than the default's.
    """
    target = tiles.target
    start = default or rule(target, problem)
    found = tiles.choose(kernel, rows, start, lambda: options(target, problem, start, fixed))
    if found.block_k not in _blocks_k(problem):
        raise BadRecipe(
            where=f"tiles for {target.name}, {kernel}, {rows}",
            reason=f"block_k is {found.block_k}, and its format needs one of {_blocks_k(problem)}",
            advice="mend the entry, or leave it out",
        )
    return replace(found, descriptors=found.descriptors and _describable(problem, target))


def rule(target: GpuTarget, problem: Problem) -> Gemm:
    """The tile of a product that nobody has measured."""
    if problem.m <= STREAMED_ROWS or _most_rows(problem, target) < STREAMED_ROWS:
        return _streamed(problem, target)
    return _reused(problem, target)


def options(
    target: GpuTarget, problem: Problem, start: Gemm, fixed: Collection[str] = ()
) -> list[Gemm]:
    """``start`` and the tiles around it that the architecture has room for."""
    rows = min(_most_rows(problem, target), max(16, power_of_2(problem.m)))
    columns = max(start.block_n, min(256, power_of_2(problem.n)))
    plain = problem.format.name == "bf16" or problem.e4m3
    grouped = problem.format.name == "fp8" or bool(problem.format.group)

    def settle(tile: Gemm) -> Gemm | None:
        """As many splits as have inputs, as many stages as have room, and loops that exist."""
        steps = ceil_div(problem.k, tile.block_k)
        splits = ceil_div(steps, ceil_div(steps, min(tile.splits, steps)))
        stages = min(tile.stages, _stages(tile, problem, target, resident=1))
        buffers = _buffer(tile, problem) * (stages - _mma(target))
        threads, weights = 32 * tile.warps, problem.parts * tile.block_n
        sums = weights * tile.block_m / threads
        decoded = 0.0 if plain else weights * tile.block_k / threads / 2
        fits = (
            ("block_m" in fixed or 16 <= tile.block_m <= rows)
            and 16 <= tile.block_n <= columns
            and tile.block_k in _blocks_k(problem)
            and tile.warps <= min(8, tile.block_n * problem.parts * tile.block_m // 128)
            and sums <= SUMS_MOST
            and sums * (1 + grouped) + decoded <= REGISTERS_MOST
            and (splits == 1 or problem.splittable)
            and (splits == 1 or tile.span(problem.k) > LEAST_INPUTS - tile.block_k)
            and (tile.group_m == start.group_m or problem.m > tile.block_m)
            and stages >= 2
            and max(1, tile.persistent) * (buffers + RESERVED) <= target.shared_bytes
            and (problem.columns == 1 or tile.block_n == problem.columns)
            # Programs that share a tile run once; only products that may have descriptors know how to go on.
            and (tile.persistent == 0 or (splits == 1 and problem.tiled))
            and tile.persistent * tile.warps <= WARPS
            and (not tile.descriptors or _describable(problem, target))
        )
        flatten = tile.flatten and tile.persistent > 0
        return replace(tile, splits=splits, stages=stages, flatten=flatten) if fits else None

    return nearest(start, settle, fixed)


def _blocks_k(problem: Problem) -> tuple[int, ...]:
    """Groups of inputs that share a scale are read whole, or in parts of a power of two."""
    whole = problem.format.group or problem.e4m3
    return (128,) if whole else (32, 64, 128)


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
    if _describable(problem, target) and tile.splits == 1:
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


def _describable(problem: Problem, target: GpuTarget) -> bool:
    """Whether tensor descriptors may say where the operands are."""
    return problem.tiled and target.tma


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
