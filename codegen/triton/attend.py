"""Attend: causal grouped-query attention over the paged cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ...ir.cache import FORMATS, LARGEST, PAGE
from ...ir.plan import Attend
from ..text import fill
from .cache_write import cache_args, cache_pointers, pitch
from .launch import Bucket, Group, Site, Source, ceil_div, power_of_2
from .target import GpuTarget
from .tiles import SUMS_MOST, Walk, nearest

LEAST_KEYS = 256  # of one split: fewer are not worth a partial result
MOST_SPLITS = 64
SPARE = 8 * 1024  # bytes of shared memory for reductions and the like
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """``rows`` pairs (query, head): ``queries`` of one sequence with ``heads`` of those that share keys."""

    rows: int
    queries: int
    heads: int

    @staticmethod
    def of(rows: int, sharing: int) -> Tile:
        """
        >>> Tile.of(16, 3), Tile.of(64, 128)
        (Tile(rows=16, queries=5, heads=3), Tile(rows=64, queries=1, heads=64))
        """
        heads = min(rows, sharing)
        return Tile(rows, rows // heads, heads)

    def most(self, bucket: Bucket) -> int:
        """Tiles of a bucket's queries; attention.py says how they are counted."""
        return max(1, (bucket.tokens + bucket.sequences * (self.queries - 1)) // self.queries)


def splits(site: Site, programs: int, shape: Shape, window: int = 0) -> int:
    """How many programs share the keys of a tile, where the tiles alone would leave processors idle."""
    wanted = max(1, shape.resident * site.target.sms // programs)
    keys = min(site.positions, window + shape.tile.queries) if window else site.positions
    return min(wanted, ceil_div(keys, LEAST_KEYS), MOST_SPLITS)


def padded(width: int) -> int:
    """Columns of a tile that tensor cores take."""
    return max(16, power_of_2(width))


def symbol(spec: Attend) -> str:
    window = f"_window{spec.window}" if spec.window else ""
    dims = f"h{spec.heads}_kv{spec.heads_kv}_d{spec.head_dim}_v{spec.value_dim}"
    alibi = "_alibi" if spec.slopes else ""
    return f"attend_{dims}_{spec.cache_format}{window}{alibi}"


def emit(spec: Attend, name: str) -> str:
    cache, scaled = spec.cache, spec.cache_format in LARGEST
    key_scale = cache.scale_offset // 4
    return fill(
        TEMPLATE,
        symbol=name,
        heads=spec.heads,
        heads_kv=spec.heads_kv,
        dim=spec.head_dim,
        value=spec.value_dim,
        window=spec.window,
        scale=repr(spec.scale),
        sees=f"p - {spec.window} < j <= p" if spec.window else "j <= p",
        pointers=", ".join(cache_pointers(cache)),
        sinks="sinks_ptr, " if spec.sinks else "",
        slopes="slopes_ptr, " if spec.slopes else "",
        slope="slope, " if spec.slopes else "",
        load_slopes=fill(LOAD_SLOPES, log2_e=LOG2_E) if spec.slopes else "",
        add_slopes=ADD_SLOPES if spec.slopes else "",
        bias=" + slopes[h] (j - p)" if spec.slopes else "",
        math="tl.float32" if spec.cache_format == "fp32" else "tl.bfloat16",
        pitch=pitch(cache, spec.cache_format),
        scales="scales_ptr, " if scaled else "",
        move_scales=f"scales_ptr += {key_scale} + kv" if scaled else "",
        scaled_score=SCALED_SCORE if scaled else "",
        scaled_weight=fill(SCALED_WEIGHT, heads_kv=spec.heads_kv) if scaled else "",
        value_tile="settled(widened(value, MATH))" if scaled else "widened(value, MATH)",
        score=_score(spec),
        add_sinks=fill(ADD_SINKS, log2_e=LOG2_E) if spec.sinks else "",
        join_sinks=fill(JOIN_SINKS, log2_e=LOG2_E) if spec.sinks else "",
        join_sink=" + tl.exp2(sink - peak)" if spec.sinks else "",
    )


def _score(spec: Attend) -> str:
    """The logit to base 2 of a product."""
    if spec.softcap:
        return f"{spec.softcap * LOG2_E!r} * tanh(score * {spec.scale / spec.softcap!r})"
    return f"score * {spec.scale * LOG2_E!r}"


@dataclass(frozen=True)
class Shape:
    """How a launch cuts the work: tiles, blocks of ``block`` keys, and what keeps their loads ahead."""

    tile: Tile
    block: int
    warps: int
    stages: int
    resident: int  # programs that a multiprocessor holds


def warp_groups(target: GpuTarget, rows: int) -> bool:
    """Whether warps multiply such tiles in groups, from shared memory."""
    return rows >= 64 and target.capability in (90, 100)


def kept(target: GpuTarget, rows: int, stages: int) -> int:
    """Blocks of keys in shared memory, of a loop of so many stages.

    For warp groups a block stays until its product is done; others read it into registers, and its place is
    free for the next.  On sm_100, Triton 3.6 takes a buffer more.
    """
    if not warp_groups(target, rows):
        return stages - 1
    return stages + (target.capability == 100)


def fit(target: GpuTarget, rows: int, held: int, block: int) -> tuple[int, int]:
    """Stages of a loop over blocks of ``block`` bytes beside ``held`` ones (0: no room), and how many such
    programs a multiprocessor holds."""
    for stages in (3, 2, 1):
        used = held + SPARE + kept(target, rows, stages) * block
        if used <= target.shared_bytes and kept(target, rows, stages):
            return stages, min(2, target.shared_bytes // used)
    return 0, 1


def shape_of(site: Site) -> Shape:
    spec = site.spec
    assert isinstance(spec, Attend)
    group, tokens = spec.heads // spec.heads_kv, site.bucket.tokens
    dim, value = padded(spec.head_dim), padded(spec.value_dim)
    # The rows of one query, and of more where a bucket may hold long prompts.
    rows = max(16, min(power_of_2(group), 64))
    if tokens >= 64:
        rows = 64 if tokens < 256 or dim + value > 256 else 128
    blocks: tuple[int, ...] = (64, 32, 16)
    if rows >= 64 and not warp_groups(site.target, rows):
        blocks = (32, 16)  # keys take registers too
    if spec.cache_format == "fp32":
        rows, blocks = 16, (32, 16)  # no tensor cores for such products
    for block in blocks:
        stages, resident = fit(site.target, rows, *_bytes(spec, rows, block))
        if stages >= 2 or block == 16:
            break
    warps = 8 if rows >= 128 or rows * value > 64 * 128 else 4
    return Shape(Tile.of(rows, group), block, warps, max(1, stages), resident)


def _bytes(spec: Attend, rows: int, block: int) -> tuple[int, int]:
    """What a tile of ``rows`` holds in shared memory, and what a block of keys and values takes."""
    size, width = FORMATS[spec.cache_format], padded(spec.head_dim) + padded(spec.value_dim)
    held = rows * padded(spec.head_dim) * max(2, size)
    if spec.cache_format in LARGEST:  # widened to bf16 before they are multiplied
        held += block * width * 2
    return held, block * width * size


def walk(
    site: Site,
    shape: Shape,
    shares: int,
    room: Callable[[int, int], tuple[int, int]],
    columns: int,
    exact: bool,
) -> Walk:
    """``shape`` in ``shares`` splits, unless other sizes were measured.

    ``room`` gives the bytes that some rows hold and a block of keys takes; a row has ``columns`` sums.  Exact
    products are not for tensor cores, whose tiles need no more rows than the least.
    """

    def settle(found: Walk) -> Walk | None:
        held, loaded = room(found.rows, found.block)
        buffers = kept(site.target, found.rows, found.stages)
        fits = (
            16 <= found.rows <= (16 if exact else 128)
            and 16 <= found.block <= PAGE
            and found.splits <= min(MOST_SPLITS, ceil_div(site.positions, LEAST_KEYS))
            and found.warps in (4, 8)
            and found.rows * columns <= SUMS_MOST * 32 * found.warps
            and 1 <= buffers <= 4
            and held + buffers * loaded + SPARE <= site.target.shared_bytes
            and found.rows * columns * 4 <= site.target.shared_bytes  # on their way to memory
        )
        return found if fits else None

    rule = Walk(shape.tile.rows, shape.block, shares, shape.warps, shape.stages)
    return site.tiles.choose(site.symbol, site.rows, rule, lambda: nearest(rule, settle))


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, Attend)
    sharing, shape = spec.heads // spec.heads_kv, shape_of(site)
    programs = shape.tile.most(site.bucket) * spec.heads_kv * ceil_div(sharing, shape.tile.heads)
    sizes = walk(
        site,
        shape,
        splits(site, programs, shape, spec.window),
        lambda rows, block: _bytes(spec, rows, block),
        padded(spec.value_dim),
        spec.cache_format == "fp32",
    )
    tile, shares = Tile.of(sizes.rows, sharing), sizes.splits
    most, parts = tile.most(site.bucket), ceil_div(sharing, tile.heads)
    value_block = padded(spec.value_dim)
    constants = site.pitches("q", "out") | {
        "TABLE_PITCH": site.table_pitch,
        "SEQUENCES": site.sequences,
        "ROWS": tile.rows,
        "QUERIES": tile.queries,
        "GROUP_TILE": tile.heads,
        "BLOCK": sizes.block,
        "DIM_BLOCK": padded(spec.head_dim),
        "VALUE_BLOCK": value_block,
        "SPLITS": shares,
        "LEAST": ceil_div(LEAST_KEYS, sizes.block),
        "UNMASKED": tile.rows >= 64 and not spec.window,
    }
    sinks = ["sinks"] if spec.sinks else []
    slopes = ["slopes"] if spec.slopes else []
    partial, lse = ("scratch.partial", "*fp32"), ("scratch.lse", "*fp32")
    args: list[Source] = [
        "q", *sinks, *slopes, *cache_args(spec.cache, site.target), "out", partial, lse,
        "positions", "starts", "block_table", "count.sequences",
    ]  # fmt: skip
    attend = site.launch(
        site.symbol,
        (most, spec.heads_kv * parts, shares),
        args,
        constants,
        sizes.warps,
        sizes.stages,
    )
    if shares == 1:
        return Group((attend,), {"partial": 0, "lse": 0})
    args = [partial, lse, *sinks, "out", site.count]
    constants = site.pitches("out") | {
        "SPLITS": shares,
        "SPLITS_BLOCK": power_of_2(shares),
        "VALUE_BLOCK": value_block,
    }
    join = site.launch(f"{site.symbol}_join", (site.rows, spec.heads), args, constants)
    results = site.rows * spec.heads * shares * 4
    return Group((attend, join), {"partial": results * spec.value_dim, "lse": results})


SCALED_SCORE = """
scales = scales_ptr + rows * (PITCH // 4)
score *= tl.load(scales, inside, 0.0)[None, :]
"""
SCALED_WEIGHT = """
weight *= tl.load(scales + $heads_kv, inside, 0.0)[None, :]
"""
LOAD_SLOPES = """
slope = tl.load(slopes_ptr + head, real, 0.0) * $log2_e
"""
ADD_SLOPES = """
score += slope[:, None] * (keys[None, :] - positions[:, None]).to(tl.float32)
"""
ADD_SINKS = """
total += tl.exp2(tl.load(sinks_ptr + head, real, 0.0) * $log2_e - peak)
"""
JOIN_SINKS = """
sink = tl.load(sinks_ptr + head) * $log2_e
peak = tl.maximum(peak, sink)
"""
TEMPLATE = '''
@triton.jit
def $symbol(
    q_ptr, $sinks$slopes$pointers, out_ptr, partial_ptr, lse_ptr,
    positions_ptr, starts_ptr, table_ptr, sequences_ptr,
    Q_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, TABLE_PITCH: tl.constexpr, SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, GROUP_TILE: tl.constexpr, BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr, UNMASKED: tl.constexpr,
):
    """out[t, h] = softmax_j(q[t, h] . key[j, h / GROUP] * $scale$bias) value[j, h / GROUP]
    over keys $sees for a query at position p; q [tokens, $heads, $dim], out [tokens, $heads, $value],
    cache row: keys [$heads_kv, $dim], values [$heads_kv, $value].

    One program: QUERIES of a sequence with GROUP_TILE heads of one kv head, one split of their keys.
    """
    wait_for_launches()
    HEADS: tl.constexpr = $heads
    GROUP: tl.constexpr = $heads // $heads_kv
    GROUP_TILES: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    DIM: tl.constexpr = $dim
    VALUE: tl.constexpr = $value
    sequence, first, queries = query_tile(
        tl.program_id(0), starts_ptr, tl.load(sequences_ptr), QUERIES, SEQUENCES
    )
    if queries <= 0:
        return
    kv = tl.program_id(1) // GROUP_TILES
    split = tl.program_id(2)
    row = tl.arange(0, ROWS)
    query = row // GROUP_TILE
    member = tl.program_id(1) % GROUP_TILES * GROUP_TILE + row % GROUP_TILE
    real = (query < queries) & (member < GROUP)
    token = (first + query).to(tl.int64)
    head = kv * GROUP + member
    result = (token * HEADS + head) * SPLITS + split

    position = tl.load(positions_ptr + first)
    last = position + queries - 1
    begin, end = blocks_of(position, last, split, $window, BLOCK, SPLITS, LEAST)
    if begin >= end:
        tl.store(lse_ptr + result, tl.full([ROWS], NOTHING, tl.float32), real)
        return
    q = load_rows(q_ptr + token * Q_PITCH + head * DIM, real, DIM, DIM_BLOCK, True).to($math)
    peak = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    key_ptr = cache_ptr + kv * DIM
    value_ptr = cache_ptr + $heads_kv * DIM + kv * VALUE
    $move_scales
    $load_slopes
    table_ptr += sequence * TABLE_PITCH
    positions = position + query
    if UNMASKED:
        # Blocks that all queries see whole come first.
        whole = tl.minimum((position + 1) // BLOCK, end)
        peak, total, acc = ${symbol}_blocks(
            q, ${slope}peak, total, acc, key_ptr, value_ptr, ${scales}table_ptr, positions, last,
            begin, whole, BLOCK, DIM_BLOCK, VALUE_BLOCK, False,
        )
        begin = tl.maximum(begin, whole)
    peak, total, acc = ${symbol}_blocks(
        q, ${slope}peak, total, acc, key_ptr, value_ptr, ${scales}table_ptr, positions, last,
        begin, end, BLOCK, DIM_BLOCK, VALUE_BLOCK, True,
    )

    cols = tl.arange(0, VALUE_BLOCK)[None, :]
    if SPLITS > 1:
        tl.store(lse_ptr + result, log_total(peak, total), real)
        inside = (real & (total != 0.0))[:, None] & (cols < VALUE)
        tl.store(partial_ptr + result[:, None] * VALUE + cols, acc / total[:, None], inside)
    else:
        $add_sinks
        at = (token * OUT_PITCH + head * VALUE)[:, None] + cols
        tl.store(out_ptr + at, to(acc / total[:, None], out_ptr), real[:, None] & (cols < VALUE))


@triton.jit
def ${symbol}_blocks(
    q, ${slope}peak, total, acc, key_ptr, value_ptr, ${scales}table_ptr, positions, last, begin, end,
    BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, MASKED: tl.constexpr,
):
    """Blocks [begin, end) of keys joined to the softmax of a tile."""
    DIM: tl.constexpr = $dim
    VALUE: tl.constexpr = $value
    PITCH: tl.constexpr = $pitch
    MATH: tl.constexpr = $math
    page = page_of(table_ptr, begin, end, BLOCK)
    for block in range(begin, end):
        keys = block * BLOCK + tl.arange(0, BLOCK)
        inside = keys <= last
        rows = cache_rows(page, block, BLOCK)
        page = page_of(table_ptr, block + 1, end, BLOCK)
        key = load_rows(key_ptr + rows * PITCH, inside, DIM, DIM_BLOCK, MASKED)
        value = load_rows(value_ptr + rows * PITCH, inside, VALUE, VALUE_BLOCK, MASKED)
        score = tl.dot(q, tl.trans(widened(key, MATH)), input_precision="ieee")
        $scaled_score
        score = $score
        $add_slopes
        if MASKED:
            score = visible(score, keys, positions, $window)
        peak, total, weight, shrink = softmax_step(score, peak, total, MASKED)
        $scaled_weight
        acc *= shrink[:, None]
        acc = tl.dot(weight.to(MATH), $value_tile, acc, input_precision="ieee")
    return peak, total, acc


@triton.jit
def ${symbol}_join(
    partial_ptr, lse_ptr, ${sinks}out_ptr, count_ptr,
    OUT_PITCH: tl.constexpr, SPLITS: tl.constexpr, SPLITS_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):
    """out[t, h], the splits' results weighted by what each saw; one token and head per program."""
    wait_for_launches()
    VALUE: tl.constexpr = $value
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(count_ptr):
        return
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS_BLOCK)
    result = (token * $heads + head) * SPLITS + split
    lse = tl.load(lse_ptr + result, split < SPLITS, NOTHING)
    peak = tl.max(lse, 0)
    $join_sinks
    weight = tl.exp2(lse - peak)
    total = tl.sum(weight, 0)$join_sink
    parts = load_rows(partial_ptr + result * VALUE, weight > 0.0, VALUE, VALUE_BLOCK, True)
    out = tl.sum(parts * weight[:, None], 0) / total
    cols = tl.arange(0, VALUE_BLOCK)
    tl.store(out_ptr + token * OUT_PITCH + head * VALUE + cols, to(out, out_ptr), cols < VALUE)
'''
