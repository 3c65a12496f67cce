"""LatentAttend: multi-head latent attention, absorbed for few queries and expanded for long chunks.

Absorbed (the heads share the cached latents), three launches: q_lat = q_nope w_uk per head; mixed = sum p c
with p = softmax(q_lat . c + q_pe . k_pe); out = w_uv mixed per head.  Where splits share the keys, a fourth
joins what they found.

A bucket that may hold ``absorb_below`` new tokens of one sequence has four more: such tokens' latents are
gathered from the cache, expanded to k = w_uk c and v = w_uv c per head, and attended with k_pe.  What stood
before them in the cache is attended absorbed, and the softmax goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ...ir import quant
from ...ir.cache import FORMATS, LARGEST, Place
from ...ir.plan import LatentAttend
from ..text import fill
from . import tiles
from .attend import LEAST_KEYS, LOG2_E, Shape, Tile, fit, padded, splits, walk, warp_groups
from .cache_write import cache_args, cache_pointers, pitch, pointer_to
from .launch import Group, Launch, Site, Source, ceil_div, power_of_2
from .target import GpuTarget
from .tiles import SUMS_MOST

PROGRAMS = 8  # on a processor, of kernels whose programs take turns
WARPS = 8  # of an absorbing program at most
GATHERED = 16  # tokens of a program
UPS = "w_uk", "w_uv"


def symbol(spec: LatentAttend) -> str:
    dims = f"h{spec.heads}_n{spec.nope}_r{spec.rope}_l{spec.latent}_v{spec.value}"
    return f"latent_attend_{dims}_{spec.cache_format}"


def emit(spec: LatentAttend, name: str) -> str:
    pointers, scaled_up = cache_pointers(spec.cache), spec.up_format == "int8"
    find = [f"{_rows(to)} = {to} + rows * {pitch(spec.cache, fmt)}" for to, fmt in pointers.items()]
    load = [_load(spec, place).rstrip() for place in spec.cache.places]
    return fill(
        TEMPLATE,
        symbol=name,
        heads=spec.heads,
        nope=spec.nope,
        rope=spec.rope,
        latent=spec.latent,
        value=spec.value,
        scale=repr(spec.scale),
        log2_scale=repr(spec.scale * LOG2_E),
        pointers=", ".join(pointers),
        math=_math(spec.cache_format),
        up_math=_math(spec.up_format),
        load_keys="\n".join([*find, *load]),
        frames="\n\n".join(_frames(spec, name)),
        long=spec.absorb_below,
        expand_format=_expand_format(spec),
        scale_of_w="w_scale_ptr" if scaled_up else "w_ptr",
        w_scale="w_scale_ptr, " if scaled_up else "",
        w_uk_scale="w_uk_scale_ptr, " if scaled_up else "",
        w_uv_scale="w_uv_scale_ptr, " if scaled_up else "",
        fold_scale=FOLD_SCALE if scaled_up else "",
        apply_scale=APPLY_SCALE if scaled_up else "",
    )


def _rows(pointer: str) -> str:
    """The name of the rows of a block of keys that a pointer to the cache leads to."""
    return f"{pointer.removesuffix('_ptr')}_row"


def _load(spec: LatentAttend, place: Place) -> str:
    """Lines that load the latents or the rotary keys of a block."""
    part, row = place.part, _rows(pointer_to(spec.cache, place))
    names = {
        "name": part.name,
        "block": f"{part.name.upper()}_BLOCK",
        "width": part.width,
        "row": f"{row} + {place.values // FORMATS[place.format]}",
    }
    if place.scales is None:
        return fill(LOAD_BESIDE if spec.cache_format in LARGEST else LOAD, **names)
    tiles = ceil_div(part.width, part.tile)
    return fill(
        LOAD_SCALED,
        **names,
        scales=f"scales_row + {place.scales // 4}",
        tiles=tiles,
        tiles_block=power_of_2(tiles),
    )


def _frames(spec: LatentAttend, name: str) -> Iterator[str]:
    """The kernels of lower, join and raise: for all tokens, and for some."""
    scales = [", " + up + "_scale_ptr" if spec.up_format == "int8" else "" for up in UPS]
    works = {
        "lower": (
            f"q_ptr, w_uk_ptr{scales[0]}, latent_q_ptr",
            ("Q_PITCH", "TOKENS", "NOPE_BLOCK", "LATENT_BLOCK"),
        ),
        "join": ("partial_ptr, lse_ptr, mixed_ptr", ("SPLITS", "SPLITS_BLOCK", "LATENT_BLOCK")),
        "raise": (
            f"mixed_ptr, w_uv_ptr{scales[1]}, out_ptr",
            ("OUT_PITCH", "TOKENS", "LATENT_BLOCK", "VALUE_BLOCK"),
        ),
    }
    for work, (pointers, sizes) in works.items():
        blocks = "TOKENS" in sizes
        yield fill(
            FRAMES,
            symbol=name,
            work=work,
            long=spec.absorb_below,
            pointers=pointers,
            declared=", ".join(f"{size}: tl.constexpr" for size in sizes),
            tokens="TOKENS" if blocks else "1",
            given=", ".join([*(["count"] if blocks else []), pointers, *sizes]),
        )


def _expand_format(spec: LatentAttend) -> str:
    """How matmul.py multiplies latents with w_uk and w_uv: in the cache's arithmetic, if not with INT8."""
    exact = "fp32" if spec.cache_format == "fp32" else "bf16"
    return "int8" if spec.up_format == "int8" else exact


def _math(fmt: str) -> str:
    """What products of a format are computed in."""
    return "tl.float32" if fmt == "fp32" else "tl.bfloat16"


def shape_of(site: Site) -> Shape:
    spec = site.spec
    assert isinstance(spec, LatentAttend)
    width = sum(padded(place.part.width) for place in spec.cache.places)
    # The heads of one query, and more queries where a bucket may hold long prompts.
    most = max(16, power_of_2(spec.heads)) if site.bucket.tokens < 64 else 64
    most = min(most, 64 if width <= 320 or warp_groups(site.target, most) else 32)
    # No more than there are registers for sums, and memory for these on their way out.
    sums = min(SUMS_MOST * 32 * WARPS, site.target.shared_bytes // 4)
    while most > 16 and most * padded(spec.latent) > sums:
        most //= 2
    for rows, block in _sizes(site.target, most, spec.cache_format == "fp32"):
        stages, resident = fit(site.target, rows, *_bytes(spec, rows, block))
        if stages >= 2:
            break
    warps = max(4, min(WARPS, rows // 4))
    return Shape(Tile.of(rows, spec.heads), block, warps, max(1, stages), resident)


def _sizes(target: GpuTarget, rows: int, exact: bool) -> Iterator[tuple[int, int]]:
    """Rows of a tile and keys of a block, the largest first."""
    if exact:  # no tensor cores for such products
        yield 16, 16
        return
    while rows >= 16:
        for block in (64, 32, 16) if warp_groups(target, rows) else (32, 16):
            yield rows, block
        rows //= 2


def _bytes(spec: LatentAttend, rows: int, block: int) -> tuple[int, int]:
    """What a tile of ``rows`` holds in shared memory, and what a block of latents and keys takes."""
    columns = [padded(place.part.width) for place in spec.cache.places]
    sizes = [FORMATS[place.format] for place in spec.cache.places]
    held = rows * sum(columns) * max(2, FORMATS[spec.cache_format])
    # Bytes are widened to bf16 before they are multiplied.
    held += block * sum(2 * n for n, each in zip(columns, sizes, strict=True) if each == 1)
    return held, block * sum(n * each for n, each in zip(columns, sizes, strict=True))


def _blocks(spec: LatentAttend) -> dict[str, int]:
    return {"LATENT_BLOCK": padded(spec.latent), "ROPE_BLOCK": padded(spec.rope)}


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, LatentAttend)
    exact, shape = spec.cache_format == "fp32", shape_of(site)
    programs = shape.tile.most(site.bucket) * ceil_div(spec.heads, shape.tile.heads)
    sizes = walk(
        site,
        shape,
        splits(site, programs, shape),
        lambda rows, block: _bytes(spec, rows, block),
        padded(spec.latent),
        exact,
    )
    tile, shares = Tile.of(sizes.rows, spec.heads), sizes.splits
    most, parts = tile.most(site.bucket), ceil_div(spec.heads, tile.heads)
    some = site.bucket.tokens >= spec.absorb_below  # a sequence may be expanded
    # Of the absorbed path nothing is needed any more when keys are written: they take its place.
    latent_q = ("scratch.keys" if some else "scratch.q", "*fp32" if exact else "*bf16")
    mixed = ("scratch.mixed", "*fp32" if spec.up_format == "fp32" else "*bf16")
    if mixed[1] == latent_q[1]:
        mixed = latent_q  # a program reads its queries before it writes what they found, in the same rows
    partial, lse = ("scratch.partial", "*fp32"), ("scratch.lse", "*fp32")
    constants = site.pitches("q") | {
        "TABLE_PITCH": site.table_pitch,
        "SEQUENCES": site.sequences,
        "ROWS": tile.rows,
        "QUERIES": tile.queries,
        "HEADS_TILE": tile.heads,
        "BLOCK": sizes.block,
        **_blocks(spec),
        "SPLITS": shares,
        "LEAST": ceil_div(LEAST_KEYS, sizes.block),
    }
    args: list[Source] = [
        "q", latent_q, *cache_args(spec.cache, site.target), mixed if shares == 1 else partial, lse,
        "positions", "starts", "block_table", "count.sequences",
    ]  # fmt: skip
    programs = max(1, shape.resident * site.target.sms // (parts * shares)) if some else most
    attend = site.launch(
        site.symbol + "_some" * some,
        (min(programs, most), parts, shares),
        args,
        constants,
        sizes.warps,
        sizes.stages,
    )
    pairs, size = site.rows * spec.heads, 4 if exact else 2
    scratch = {
        "q": pairs * spec.latent * size,
        "mixed": 0 if mixed is latent_q else pairs * spec.latent * (2 if exact else 4),
        "partial": pairs * shares * spec.latent * 4 if shares > 1 else 0,
        "lse": pairs * shares * 4 if shares > 1 or some else 0,
    }
    if some:
        queries = scratch.pop("q")
        keys = pairs * spec.nope * size
        scratch = {
            "keys": keys,
            "values": max(pairs * spec.value * size, queries - keys),
            "latents": site.rows * spec.latent * size,
            "ropes": site.rows * spec.rope * size,
            **scratch,
        }
    columns = min(128, padded(spec.latent))
    join = _frame(
        site,
        "join",
        (site.rows, spec.heads, ceil_div(spec.latent, columns)),
        [partial, lse, mixed],
        {"SPLITS": shares, "SPLITS_BLOCK": power_of_2(shares), "LATENT_BLOCK": columns},
    )
    joins = (join,) if shares > 1 else ()
    absorbed = (_lower(site, latent_q), attend, *joins, _raise(site, mixed))
    return Group((*absorbed, *(_expanded(site, shares) if some else ())), scratch)


def _frame(
    site: Site,
    work: str,
    grid: tuple[int, int, int],
    args: list[Source],
    constants: Mapping[str, int],
    warps: int = 4,
    stages: int = 2,
) -> Launch:
    """A launch of lower, join or raise, with a block of tokens for each program or, where sequences may be
    expanded, with fewer programs that take turns: whatever is passed over should cost nothing."""
    spec = site.spec
    assert isinstance(spec, LatentAttend)
    function = f"{site.symbol}_{work}"
    if site.bucket.tokens >= spec.absorb_below:
        programs = ceil_div(PROGRAMS * site.target.sms, grid[1] * grid[2])
        function, grid = f"{function}_some", (min(grid[0], programs), *grid[1:])
        constants = {**constants, "SEQUENCES": site.sequences}
        args = [*args, "positions", "starts", "count.sequences"]
    return site.launch(function, grid, [*args, site.count], constants, warps, stages)


def _lower(site: Site, latent_q: tuple[str, str]) -> Launch:
    spec = site.spec
    assert isinstance(spec, LatentAttend)
    tokens, depth = _product_block(site, spec)
    columns = min(128, padded(spec.latent))
    constants = site.pitches("q") | {
        "TOKENS": tokens,
        "NOPE_BLOCK": min(depth, padded(spec.nope)),
        "LATENT_BLOCK": columns,
    }
    grid = (ceil_div(site.rows, tokens), spec.heads, ceil_div(spec.latent, columns))
    args: list[Source] = ["q", *_weights(spec, "w_uk"), latent_q]
    return _frame(site, "lower", grid, args, constants)


def _raise(site: Site, mixed: tuple[str, str]) -> Launch:
    spec = site.spec
    assert isinstance(spec, LatentAttend)
    tokens, depth = _product_block(site, spec)
    # With few heads there is work for all processors if each does a part of their values.
    programs = ceil_div(site.rows, tokens) * spec.heads
    columns = min(padded(spec.value), 128 if 2 * programs > site.target.sms else 32)
    constants = site.pitches("out") | {
        "TOKENS": tokens,
        "LATENT_BLOCK": min(depth, padded(spec.latent)),
        "VALUE_BLOCK": columns,
    }
    grid = (ceil_div(site.rows, tokens), spec.heads, ceil_div(spec.value, columns))
    args: list[Source] = [mixed, *_weights(spec, "w_uv"), "out"]
    return _frame(site, "raise", grid, args, constants, stages=3)


def _product_block(site: Site, spec: LatentAttend) -> tuple[int, int]:
    """Tokens of a product with w_uk or w_uv, and inputs that a step reads: the fewer tokens, the more."""
    if spec.up_format == "fp32":
        return 16, 32  # no tensor cores
    return (16, 128) if site.rows <= 16 else (min(64, power_of_2(site.rows)), 64)


def _weights(spec: LatentAttend, name: str) -> list[str]:
    return [f"{name}_{part}" for part in quant.parse(spec.up_format).parts]


def expanded_shape(site: Site) -> Shape:
    """A tile of queries of one head, tall where there are enough of them for every multiprocessor."""
    spec = site.spec
    assert isinstance(spec, LatentAttend)
    keys, value = padded(spec.nope) + padded(spec.rope), padded(spec.value)
    rows, size = 128 if site.rows * spec.heads >= 128 * site.target.sms else 64, 2
    # Of more keys the scores would have no room in registers beside the sums.
    blocks: tuple[int, ...] = (64, 32, 16) if warp_groups(site.target, rows) else (32, 16)
    if spec.cache_format == "fp32":
        rows, blocks, size = 16, (16,), 4  # no tensor cores for such products
    for block in blocks:
        stages, resident = fit(site.target, rows, rows * keys * size, block * (keys + value) * size)
        if stages >= 2:
            break
    return Shape(Tile(rows, rows, 1), block, max(4, rows // 16), max(1, stages), resident)


def _expanded(site: Site, shares: int) -> tuple[Launch, ...]:
    """Latents of the new tokens of long chunks, keys and values of all heads, and their attention."""
    spec = site.spec
    assert isinstance(spec, LatentAttend)
    math = "*fp32" if spec.cache_format == "fp32" else "*bf16"
    names = ("keys", "values", "latents", "ropes")
    keys, values, latents, ropes = ((f"scratch.{name}", math) for name in names)
    batch = ["positions", "starts", "count.sequences"]
    sequences = {"SEQUENCES": site.sequences}
    # So many sequences of a batch may be long, and have a tile that is not full.
    long = min(site.bucket.sequences, site.bucket.tokens // max(1, spec.absorb_below))
    bucket = replace(site.bucket, sequences=long)
    gather = site.launch(
        f"{site.symbol}_gather",
        (Tile(GATHERED, GATHERED, 1).most(bucket),),
        [*cache_args(spec.cache, site.target), latents, ropes, *batch[:2], "block_table", batch[2]],
        {"TABLE_PITCH": site.table_pitch, **sequences, "TOKENS": GATHERED, **_blocks(spec)},
    )
    expands = [
        _expand(site, latents, up, width, out, batch)
        for up, width, out in (("w_uk", spec.nope, keys), ("w_uv", spec.value, values))
    ]
    shape = expanded_shape(site)
    attend = site.launch(
        f"{site.symbol}_expanded",
        (shape.tile.most(bucket), spec.heads),
        ["q", keys, ropes, values, ("scratch.lse", "*fp32"), "out", *batch],
        site.pitches("q", "out")
        | sequences
        | {
            "QUERIES": shape.tile.queries,
            "BLOCK": shape.block,
            "NOPE_BLOCK": padded(spec.nope),
            "ROPE_BLOCK": padded(spec.rope),
            "VALUE_BLOCK": padded(spec.value),
            "SPLITS": shares,
            "SPLITS_BLOCK": power_of_2(shares),
        },
        shape.warps,
        shape.stages,
    )
    return (gather, *expands, attend)


def _expand(
    site: Site, latents: Source, up: str, width: int, out: Source, batch: list[str]
) -> Launch:
    spec = site.spec
    assert isinstance(spec, LatentAttend)
    n, exact = spec.heads * width, "fp32" in (spec.cache_format, spec.up_format)
    problem = tiles.Problem(
        site.rows,
        n,
        spec.latent,
        quant.parse("fp32" if exact else spec.up_format),
        x_bytes=4 if spec.cache_format == "fp32" else 2,
        splittable=False,
    )
    tile = tiles.rule(site.target, problem)
    return site.launch(
        f"{site.symbol}_expand",
        # Programs that run together share a block of weights.
        (ceil_div(site.rows, tile.block_m), ceil_div(n, tile.block_n)),
        [latents, *_weights(spec, up), out, *batch, site.count],
        {
            "N": n,
            "SEQUENCES": site.sequences,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        },
        tile.warps,
        tile.stages,
    )


LOAD = """
$name = load_rows($row, inside, $width, $block, True)
"""
# For the same barrier as decoded latents: scores begin with rotary keys, and queries that are read before it
# would stay in registers.
LOAD_BESIDE = """
$name = settled(load_rows($row, inside, $width, $block, True))
"""
LOAD_SCALED = """
$name = load_rows($row, inside, $width, $block, True)
scales = load_rows($scales, inside, $tiles, $tiles_block, True)
$name = dequantized($name, scales, MATH)
"""
FOLD_SCALE = "q *= tl.load(w_uk_scale_ptr + head * NOPE + nope, nope < NOPE, 0.0)[None, :]"
APPLY_SCALE = "acc *= tl.load(w_uv_scale_ptr + head * VALUE + value, value < VALUE, 0.0)[None, :]"
TEMPLATE = '''
@triton.jit
def $symbol(
    q_ptr, latent_q_ptr, $pointers, mixed_ptr, lse_ptr,
    positions_ptr, starts_ptr, table_ptr, sequences_ptr,
    Q_PITCH: tl.constexpr, TABLE_PITCH: tl.constexpr, SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, HEADS_TILE: tl.constexpr, BLOCK: tl.constexpr,
    LATENT_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr,
):
    """mixed[t, h] = softmax_j($scale * (q_lat[t, h] . c[j] + q_pe[t, h] . k_pe[j])) c[j], j <= p
    for a query at position p; q [tokens, $heads, $nope + $rope], q_lat, mixed [tokens, $heads, $latent],
    cache row: c [$latent], k_pe [$rope].

    One program: QUERIES of a sequence with HEADS_TILE heads, one split of their keys.
    """
    wait_for_launches()
    HEADS: tl.constexpr = $heads
    sequence, first, queries = query_tile(
        tl.program_id(0), starts_ptr, tl.load(sequences_ptr), QUERIES, SEQUENCES
    )
    if queries <= 0:
        return
    query, head, real = pairs_of(queries, tl.program_id(1), HEADS, ROWS, HEADS_TILE)
    position = tl.load(positions_ptr + first)
    last = position + queries - 1
    begin, end = blocks_of(position, last, tl.program_id(2), 0, BLOCK, SPLITS, LEAST)
    if begin >= end:
        token = (first + query).to(tl.int64)
        result = (token * HEADS + head) * SPLITS + tl.program_id(2)
        tl.store(lse_ptr + result, tl.full([ROWS], NOTHING, tl.float32), real)
        return
    ${symbol}_tile(
        q_ptr, latent_q_ptr, $pointers, mixed_ptr, lse_ptr,
        table_ptr + sequence * TABLE_PITCH,
        first.to(tl.int64), query, head, real, position + query, last, begin, end,
        Q_PITCH, ROWS, BLOCK, LATENT_BLOCK, ROPE_BLOCK, SPLITS, SPLITS > 1,
    )


@triton.jit
def ${symbol}_some(
    q_ptr, latent_q_ptr, $pointers, mixed_ptr, lse_ptr,
    positions_ptr, starts_ptr, table_ptr, sequences_ptr,
    Q_PITCH: tl.constexpr, TABLE_PITCH: tl.constexpr, SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, HEADS_TILE: tl.constexpr, BLOCK: tl.constexpr,
    LATENT_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr,
):
    """$symbol where sequences of $long new tokens or more are expanded:
    what those see here stood before them, and the log-sum-exp is left of all.

    One program: every so many tiles, of sequences that have keys to absorb.
    """
    wait_for_launches()
    LONG: tl.constexpr = $long
    HEADS: tl.constexpr = $heads
    begins, ends, before = spans_of(positions_ptr, starts_ptr, sequences_ptr, SEQUENCES)
    tiles = tiles_until(begins, ends, absorbs(begins, ends, before, LONG), QUERIES)
    count = tl.max(tiles, 0)
    for at in tl.range(tl.program_id(0), count, tl.num_programs(0), disable_licm=ROWS > 16):
        sequence, start, stop, first, queries = chosen_tile(at, tiles, starts_ptr, QUERIES)
        query, head, real = pairs_of(queries, tl.program_id(1), HEADS, ROWS, HEADS_TILE)
        position = tl.load(positions_ptr + first)
        context = position - (first - start)
        last = tl.where(stop - start < LONG, position + queries, context) - 1
        begin, end = blocks_of(position, last, tl.program_id(2), 0, BLOCK, SPLITS, LEAST)
        ${symbol}_tile(
            q_ptr, latent_q_ptr, $pointers, mixed_ptr, lse_ptr,
            table_ptr + sequence * TABLE_PITCH,
            first.to(tl.int64), query, head, real,
            tl.minimum(position + query, last), last, begin, end,
            Q_PITCH, ROWS, BLOCK, LATENT_BLOCK, ROPE_BLOCK, SPLITS, True,
        )


@triton.jit
def ${symbol}_tile(
    q_ptr, latent_q_ptr, $pointers, mixed_ptr, lse_ptr, table_ptr,
    first, query, head, real, positions, last, begin, end,
    Q_PITCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LATENT_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, LSE: tl.constexpr,
):
    """A tile of queries from token ``first`` on, each with the keys up to its entry in ``positions``, in
    blocks [begin, end) of them."""
    HEADS: tl.constexpr = $heads
    NOPE: tl.constexpr = $nope
    ROPE: tl.constexpr = $rope
    LATENT: tl.constexpr = $latent
    MATH: tl.constexpr = $math
    pair = query * HEADS + head
    result = pair * SPLITS + tl.program_id(2)
    q_ptr += first * Q_PITCH
    latent_q_ptr += first * (HEADS * LATENT)
    lse_ptr += first * (HEADS * SPLITS)
    mixed_ptr += first * (HEADS * SPLITS * LATENT)
    q_at = query * Q_PITCH + head * (NOPE + ROPE) + NOPE
    q_rope = load_rows(q_ptr + q_at, real, ROPE, ROPE_BLOCK, True).to(MATH)
    q_latent = load_rows(latent_q_ptr + pair * LATENT, real, LATENT, LATENT_BLOCK, True)
    peak = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, LATENT_BLOCK], tl.float32)
    page = page_of(table_ptr, begin, end, BLOCK)
    # Addresses that stay the same would take registers, of which tall tiles leave none.
    for block in tl.range(begin, end, disable_licm=ROWS > 16):
        keys = block * BLOCK + tl.arange(0, BLOCK)
        inside = keys <= last
        rows = cache_rows(page, block, BLOCK)
        page = page_of(table_ptr, block + 1, end, BLOCK)
        $load_keys
        score = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
        score = tl.dot(q_latent, tl.trans(latent), score, input_precision="ieee")
        score = visible(score * $log2_scale, keys, positions, 0)
        peak, total, weight, shrink = softmax_step(score, peak, total, True)
        # A latent, loaded once, is key and value.
        mixed = tl.dot(weight.to(MATH), latent, mixed * shrink[:, None], input_precision="ieee")

    if LSE:
        tl.store(lse_ptr + result, log_total(peak, total), real)
    if SPLITS > 1:
        real &= total != 0.0
    mixed *= (1.0 / total)[:, None]
    store_rows(mixed_ptr + result * LATENT, mixed, real, LATENT, LATENT_BLOCK)


@triton.jit
def ${symbol}_lower_block(
    block, count, q_ptr, w_uk_ptr, ${w_uk_scale}latent_q_ptr,
    Q_PITCH: tl.constexpr, TOKENS: tl.constexpr, NOPE_BLOCK: tl.constexpr, LATENT_BLOCK: tl.constexpr,
):
    """q_lat[t, h] = q_nope[t, h] w_uk[h], w_uk [$heads, $nope, $latent]; a block of tokens and latents."""
    HEADS: tl.constexpr = $heads
    NOPE: tl.constexpr = $nope
    ROPE: tl.constexpr = $rope
    LATENT: tl.constexpr = $latent
    token = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    head = tl.program_id(1)
    latent = tl.program_id(2) * LATENT_BLOCK + tl.arange(0, LATENT_BLOCK)
    real = (token < count)[:, None]
    acc = tl.zeros([TOKENS, LATENT_BLOCK], tl.float32)
    for at in range(0, NOPE, NOPE_BLOCK):
        nope = at + tl.arange(0, NOPE_BLOCK)
        q_at = (token * Q_PITCH + head * (NOPE + ROPE))[:, None] + nope[None, :]
        q = tl.load(q_ptr + q_at, real & (nope < NOPE)[None, :], 0.0).to(tl.float32)
        $fold_scale
        w_at = ((head * NOPE + nope) * LATENT)[:, None] + latent[None, :]
        w = tl.load(w_uk_ptr + w_at, (nope < NOPE)[:, None] & (latent < LATENT)[None, :], 0)
        acc = tl.dot(q.to($up_math), w.to($up_math), acc, input_precision="ieee")
    at = ((token * HEADS + head) * LATENT)[:, None] + latent[None, :]
    tl.store(latent_q_ptr + at, to(acc, latent_q_ptr), real & (latent < LATENT)[None, :])


@triton.jit
def ${symbol}_join_block(
    token, partial_ptr, lse_ptr, mixed_ptr,
    SPLITS: tl.constexpr, SPLITS_BLOCK: tl.constexpr, LATENT_BLOCK: tl.constexpr,
):
    """mixed[t, h], the splits' results weighted by what each saw; a token, a head, a block of latents."""
    LATENT: tl.constexpr = $latent
    pair = (token * $heads + tl.program_id(1)).to(tl.int64)
    split = tl.arange(0, SPLITS_BLOCK)
    lse = tl.load(lse_ptr + pair * SPLITS + split, split < SPLITS, NOTHING)
    weight = tl.exp2(lse - tl.max(lse, 0))
    cols = tl.program_id(2) * LATENT_BLOCK + tl.arange(0, LATENT_BLOCK)
    inside = cols < LATENT
    part_at = ((pair * SPLITS + split) * LATENT)[:, None] + cols[None, :]
    part = tl.load(partial_ptr + part_at, (weight > 0.0)[:, None] & inside[None, :], 0.0)
    mixed = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(mixed_ptr + pair * LATENT + cols, to(mixed, mixed_ptr), inside)


@triton.jit
def ${symbol}_raise_block(
    block, count, mixed_ptr, w_uv_ptr, ${w_uv_scale}out_ptr,
    OUT_PITCH: tl.constexpr, TOKENS: tl.constexpr, LATENT_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):
    """out[t, h] = w_uv[h] mixed[t, h], w_uv [$heads, $value, $latent]; a block of tokens and values."""
    HEADS: tl.constexpr = $heads
    LATENT: tl.constexpr = $latent
    VALUE: tl.constexpr = $value
    token = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    head = tl.program_id(1)
    value = tl.program_id(2) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    real = (token < count)[:, None]
    acc = tl.zeros([TOKENS, VALUE_BLOCK], tl.float32)
    for at in range(0, LATENT, LATENT_BLOCK):
        latent = at + tl.arange(0, LATENT_BLOCK)
        inside = (latent < LATENT)[None, :]
        mixed_at = ((token * HEADS + head) * LATENT)[:, None] + latent[None, :]
        mixed = tl.load(mixed_ptr + mixed_at, real & inside, 0.0)
        w_at = ((head * VALUE + value) * LATENT)[:, None] + latent[None, :]
        w = tl.load(w_uv_ptr + w_at, (value < VALUE)[:, None] & inside, 0)
        w = tl.trans(w.to($up_math))
        acc = tl.dot(mixed, w, acc, input_precision="ieee")
    $apply_scale
    at = (token * OUT_PITCH + head * VALUE)[:, None] + value[None, :]
    tl.store(out_ptr + at, to(acc, out_ptr), real & (value < VALUE)[None, :])


$frames


@triton.jit
def ${symbol}_gather(
    $pointers, latents_ptr, ropes_ptr,
    positions_ptr, starts_ptr, table_ptr, sequences_ptr,
    TABLE_PITCH: tl.constexpr, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr,
    LATENT_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
):
    """latents [tokens, $latent] and ropes [tokens, $rope] of sequences that are expanded, from their rows of
    the cache; TOKENS of one."""
    wait_for_launches()
    MATH: tl.constexpr = $math
    begins, ends, _ = spans_of(positions_ptr, starts_ptr, sequences_ptr, SEQUENCES)
    tiles = tiles_until(begins, ends, ends - begins >= $long, TOKENS)
    sequence, _, _, first, count = chosen_tile(tl.program_id(0), tiles, starts_ptr, TOKENS)
    if count <= 0:
        return
    token = tl.arange(0, TOKENS)
    inside = token < count
    position = tl.load(positions_ptr + first) + token
    page = tl.load(table_ptr + sequence * TABLE_PITCH + position // 64, inside, 0)
    rows = page.to(tl.int64) * 64 + position % 64
    $load_keys
    token = (first + token).to(tl.int64)
    store_rows(latents_ptr + token * $latent, latent, inside, $latent, LATENT_BLOCK)
    store_rows(ropes_ptr + token * $rope, rope, inside, $rope, ROPE_BLOCK)


@triton.jit
def ${symbol}_expand(
    latents_ptr, w_ptr, ${w_scale}out_ptr, positions_ptr, starts_ptr, sequences_ptr, count_ptr,
    N: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """out[t] = w latents[t] of sequences that are expanded, w [N, $latent]: keys or values of all heads."""
    wait_for_launches()
    LATENT: tl.constexpr = $latent
    first = tl.program_id(0) * BLOCK_M
    begins, ends, _ = spans_of(positions_ptr, starts_ptr, sequences_ptr, SEQUENCES)
    if not any_token(first, BLOCK_M, begins, ends, ends - begins >= $long):
        return
    token = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = token < tl.load(count_ptr)
    col = tl.program_id(1) * BLOCK_N
    acc = product(
        latents_ptr, token, inside, w_ptr, $scale_of_w, col, 0, LATENT,
        LATENT, N, LATENT, "$expand_format", 0, BLOCK_N, BLOCK_K,
    )
    cols = col + tl.arange(0, BLOCK_N)
    at = token[:, None] * N + cols[None, :]
    tl.store(out_ptr + at, to(acc, out_ptr), inside[:, None] & (cols < N)[None, :])


@triton.jit
def ${symbol}_expanded(
    q_ptr, keys_ptr, ropes_ptr, values_ptr, lse_ptr, out_ptr,
    positions_ptr, starts_ptr, sequences_ptr,
    Q_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, SEQUENCES: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr,
    NOPE_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_BLOCK: tl.constexpr,
):
    """out[t, h] = softmax_j($scale * (q_nope[t, h] . keys[j, h] + q_pe[t, h] . ropes[j])) values[j, h] over
    the new tokens j <= t of a sequence, joined to what out and lse hold of those before them;
    keys [tokens, $heads, $nope], ropes [tokens, $rope], values [tokens, $heads, $value].

    One program: QUERIES of a sequence, one head.
    """
    wait_for_launches()
    HEADS: tl.constexpr = $heads
    NOPE: tl.constexpr = $nope
    ROPE: tl.constexpr = $rope
    VALUE: tl.constexpr = $value
    MATH: tl.constexpr = $math
    begins, ends, _ = spans_of(positions_ptr, starts_ptr, sequences_ptr, SEQUENCES)
    tiles = tiles_until(begins, ends, ends - begins >= $long, QUERIES)
    # The last tiles of a sequence have most keys, and begin first.
    at = tl.num_programs(0) - 1 - tl.program_id(0)
    _, start, _, first, queries = chosen_tile(at, tiles, starts_ptr, QUERIES)
    if queries <= 0:
        return
    head = tl.program_id(1)
    row = tl.arange(0, QUERIES)
    real = row < queries
    token = first.to(tl.int64)
    place = first - start
    before = tl.load(positions_ptr + first) - place
    q_ptr += token * Q_PITCH + head * (NOPE + ROPE)
    q = load_rows(q_ptr + row * Q_PITCH, real, NOPE, NOPE_BLOCK, True).to(MATH)
    q_pe = load_rows(q_ptr + NOPE + row * Q_PITCH, real, ROPE, ROPE_BLOCK, True).to(MATH)

    earlier = row < tl.where(before > 0, queries, 0)
    out_ptr += token * OUT_PITCH + head * VALUE
    acc = load_rows(out_ptr + row * OUT_PITCH, earlier, VALUE, VALUE_BLOCK, True).to(tl.float32)
    split = tl.arange(0, SPLITS_BLOCK)[None, :]
    lse_ptr += (token * HEADS + head) * SPLITS
    lse_ptr += row[:, None] * (HEADS * SPLITS) + split
    peak = log_joined(tl.load(lse_ptr, earlier[:, None] & (split < SPLITS), NOTHING))
    total = tl.where(earlier, 1.0, 0.0)

    start = start.to(tl.int64)
    keys_ptr += (start * HEADS + head) * NOPE
    ropes_ptr += start * ROPE
    values_ptr += (start * HEADS + head) * VALUE
    whole = (place + 1) // BLOCK
    last = place + queries - 1
    peak, total, acc = ${symbol}_new_keys(
        q, q_pe, peak, total, acc, keys_ptr, ropes_ptr, values_ptr, place + row, last, 0, whole,
        BLOCK, NOPE_BLOCK, ROPE_BLOCK, VALUE_BLOCK, False,
    )
    peak, total, acc = ${symbol}_new_keys(
        q, q_pe, peak, total, acc, keys_ptr, ropes_ptr, values_ptr, place + row, last,
        whole, last // BLOCK + 1, BLOCK, NOPE_BLOCK, ROPE_BLOCK, VALUE_BLOCK, True,
    )
    store_rows(out_ptr + row * OUT_PITCH, acc / total[:, None], real, VALUE, VALUE_BLOCK)


@triton.jit
def ${symbol}_new_keys(
    q, q_pe, peak, total, acc, keys_ptr, ropes_ptr, values_ptr, places, last, begin, end,
    BLOCK: tl.constexpr, NOPE_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Blocks [begin, end) of a sequence's new tokens joined to the softmax of a tile."""
    HEADS: tl.constexpr = $heads
    NOPE: tl.constexpr = $nope
    ROPE: tl.constexpr = $rope
    VALUE: tl.constexpr = $value
    MATH: tl.constexpr = $math
    row = tl.arange(0, BLOCK)
    for block in range(begin, end):
        keys = block * BLOCK + row
        inside = keys <= last
        at = tl.cast(block, tl.int64) * BLOCK
        key_row = keys_ptr + at * (HEADS * NOPE) + row * (HEADS * NOPE)
        value_row = values_ptr + at * (HEADS * VALUE) + row * (HEADS * VALUE)
        key = load_rows(key_row, inside, NOPE, NOPE_BLOCK, MASKED)
        k_pe = load_rows(ropes_ptr + at * ROPE + row * ROPE, inside, ROPE, ROPE_BLOCK, MASKED)
        value = load_rows(value_row, inside, VALUE, VALUE_BLOCK, MASKED)
        score = tl.dot(q, tl.trans(key), input_precision="ieee")
        score = tl.dot(q_pe, tl.trans(k_pe), score, input_precision="ieee") * $log2_scale
        if MASKED:
            score = visible(score, keys, places, 0)
        peak, total, weight, shrink = softmax_step(score, peak, total, MASKED)
        acc = tl.dot(weight.to(MATH), value, acc * shrink[:, None], input_precision="ieee")
    return peak, total, acc
'''
# How programs of lower, join and raise come to their tokens.
FRAMES = '''
@triton.jit
def ${symbol}_$work(
    $pointers, count_ptr,
    $declared,
):
    """``${symbol}_${work}_block`` of all tokens."""
    wait_for_launches()
    count = tl.load(count_ptr)
    if tl.program_id(0) * $tokens >= count:
        return
    ${symbol}_${work}_block(tl.program_id(0), $given)


@triton.jit
def ${symbol}_${work}_some(
    $pointers, positions_ptr, starts_ptr, sequences_ptr, count_ptr,
    $declared, SEQUENCES: tl.constexpr,
):
    """``${symbol}_${work}_block`` where a token has keys to absorb; programs take turns."""
    wait_for_launches()
    count = tl.load(count_ptr)
    begins, ends, before = spans_of(positions_ptr, starts_ptr, sequences_ptr, SEQUENCES)
    chosen = absorbs(begins, ends, before, $long)
    for block in range(tl.program_id(0), tl.cdiv(count, $tokens), tl.num_programs(0)):
        if any_token(block * $tokens, $tokens, begins, ends, chosen):
            ${symbol}_${work}_block(block, $given)
'''
