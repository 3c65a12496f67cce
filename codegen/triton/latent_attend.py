"""LatentAttend: multi-head latent attention, absorbed: the heads share the cached latents.

Three launches: q_lat = q_nope w_uk per head; mixed = sum p c with p = softmax(q_lat . c + q_pe . k_pe);
out = w_uv mixed per head.  Where splits share the keys, a fourth joins what they found.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ...ir import quant
from ...ir.cache import FORMATS
from ...ir.plan import LatentAttend
from ..text import fill
from .attend import LEAST_KEYS, LOG2_E, Shape, Tile, fit, padded, splits, walk, warp_groups
from .cache_write import Arg, cache_args, cache_pointers, pitch, pointer_to
from .launch import Group, Launch, Site, ceil_div, power_of_2


def symbol(spec: LatentAttend) -> str:
    dims = f"h{spec.heads}_n{spec.nope}_r{spec.rope}_l{spec.latent}_v{spec.value}"
    return f"latent_attend_{dims}_{spec.cache_format}"


@dataclass(frozen=True)
class Piece:
    """Columns [at, at + width) of the latents or rotary keys of a row, as one tile of the kernel.

    All of them, or of INT8 and FP8 those that share a scale.  Then the scale need not be multiplied out:
    q . (s c) = s (q . c), and p (s c) = (p s) c.
    """

    name: str  # l0, l1, ... of the latents, r0 of the rotary keys
    at: int
    width: int
    rows: str  # what points at the row in the format of these numbers
    column: int  # of this row
    scale: int | None  # of the row read as floats


def pieces_of(spec: LatentAttend) -> tuple[list[Piece], list[Piece]]:
    """The latents' and the rotary keys'."""
    found: list[list[Piece]] = []
    for place in spec.cache.places:
        part, scale = place.part, place.scales
        first = place.values // FORMATS[place.format]
        size = part.width if scale is None else part.tile
        found.append([
            Piece(
                f"{part.name[0]}{i}",
                at,
                min(size, part.width - at),
                _rows(pointer_to(spec.cache, place)),
                first + at,
                None if scale is None else scale // 4 + i,
            )
            for i, at in enumerate(range(0, part.width, size))
        ])  # fmt: skip
    return found[0], found[1]


def _rows(pointer: str) -> str:
    """The name of the rows of a block of keys that a pointer to the cache leads to."""
    return f"{pointer.removesuffix('_ptr')}_row"


def emit(spec: LatentAttend, name: str) -> str:
    latents, ropes = pieces_of(spec)
    pointers, scaled_up = cache_pointers(spec.cache), spec.up_format == "int8"

    def each(pieces: list[Piece], line: str, scaled_line: str | None = None, **names: str) -> str:
        chosen = [line if p.scale is None or scaled_line is None else scaled_line for p in pieces]
        lines = zip(pieces, chosen, strict=True)
        return "\n".join(fill(text, **asdict(piece), **names).rstrip() for piece, text in lines)

    def listed(prefix: str, pieces: list[Piece]) -> str:
        return ", ".join(prefix + piece.name for piece in pieces)

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
        queries=listed("q_", latents + ropes),
        sums=listed("sum_", latents),
        load_queries=each(latents, LOAD_LATENT_QUERY) + "\n" + each(ropes, LOAD_ROPE_QUERY),
        zero_sums=each(latents, ZERO_SUM),
        find_rows="\n".join(
            f"{_rows(name)} = {name} + rows * {pitch(spec.cache, fmt)}"
            for name, fmt in pointers.items()
        ),
        load_keys=each(latents, LOAD, block="LATENT_BLOCK")
        + "\n"
        + each(ropes, LOAD, block="ROPE_BLOCK"),
        load_scales=each([p for p in latents + ropes if p.scale is not None], LOAD_SCALE),
        add_scores=each(ropes + latents, ADD_SCORE, ADD_SCALED_SCORE),
        add_values=each(latents, ADD_VALUE, ADD_SCALED_VALUE),
        store_sums=each(latents, STORE_SUM),
        w_uk_scale="w_uk_scale_ptr, " if scaled_up else "",
        w_uv_scale="w_uv_scale_ptr, " if scaled_up else "",
        fold_scale=FOLD_SCALE if scaled_up else "",
        apply_scale=APPLY_SCALE if scaled_up else "",
    )


def _math(fmt: str) -> str:
    """What products of a format are computed in."""
    return "tl.float32" if fmt == "fp32" else "tl.bfloat16"


def shape_of(site: Site) -> Shape:
    spec = site.spec
    assert isinstance(spec, LatentAttend)
    width = sum(padded(place.part.width) for place in spec.cache.places)
    # The heads of one query, and more queries where a bucket may hold long prompts.
    rows = max(16, power_of_2(spec.heads)) if site.bucket.tokens < 64 else 64
    rows = min(rows, 64 if width <= 320 or site.target.shared_bytes > 128 * 1024 else 32)
    blocks: tuple[int, ...] = (64, 32, 16) if warp_groups(site.target, rows) else (32, 16)
    if spec.cache_format == "fp32":
        rows, blocks = 16, (16,)  # no tensor cores for such products
    for block in blocks:
        stages, resident = fit(site.target, rows, *_bytes(spec, rows, block))
        if stages >= 2:
            break
    warps = max(4, min(8, rows // 4))
    return Shape(Tile.of(rows, spec.heads), block, warps, max(1, stages), resident)


def _bytes(spec: LatentAttend, rows: int, block: int) -> tuple[int, int]:
    """What a tile of ``rows`` holds in shared memory, and what a block of latents and keys takes."""
    columns = [padded(place.part.width) for place in spec.cache.places]
    sizes = [FORMATS[place.format] for place in spec.cache.places]
    held = rows * sum(columns) * max(2, FORMATS[spec.cache_format])
    # Bytes are widened to bf16 before they are multiplied.
    held += block * sum(2 * n for n, each in zip(columns, sizes, strict=True) if each == 1)
    return held, block * sum(n * each for n, each in zip(columns, sizes, strict=True))


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, LatentAttend)
    latents, ropes = pieces_of(spec)
    exact, shape = spec.cache_format == "fp32", shape_of(site)
    programs = shape.tile.most(site.bucket) * ceil_div(spec.heads, shape.tile.heads)
    columns = sum(padded(piece.width) for piece in latents)
    sizes = walk(
        site,
        shape,
        splits(site, programs, shape),
        lambda rows, block: _bytes(spec, rows, block),
        columns,
        exact,
    )
    tile, shares = Tile.of(sizes.rows, spec.heads), sizes.splits
    most, parts = tile.most(site.bucket), ceil_div(spec.heads, tile.heads)
    latent_q = ("scratch.q", "*fp32" if exact else "*bf16")
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
        "LATENT_BLOCK": padded(latents[0].width),
        "ROPE_BLOCK": padded(ropes[0].width),
        "SPLITS": shares,
        "LEAST": ceil_div(LEAST_KEYS, sizes.block),
        "UNMASKED": tile.queries > 1,
    }
    args: list[Arg] = [
        "q", latent_q, *cache_args(spec.cache, site.target), mixed if shares == 1 else partial, lse,
        "positions", "starts", "block_table", "count.sequences",
    ]  # fmt: skip
    attend = site.launch(
        site.symbol, (most, parts, shares), args, constants, sizes.warps, sizes.stages
    )
    pairs = site.rows * spec.heads
    scratch = {
        "q": pairs * spec.latent * (4 if exact else 2),
        "mixed": 0 if mixed is latent_q else pairs * spec.latent * (2 if exact else 4),
        "partial": pairs * shares * spec.latent * 4 if shares > 1 else 0,
        "lse": pairs * shares * 4 if shares > 1 else 0,
    }
    columns = min(128, padded(spec.latent))
    join = site.launch(
        f"{site.symbol}_join",
        (site.rows, spec.heads, ceil_div(spec.latent, columns)),
        [partial, lse, mixed, site.count],
        {"SPLITS": shares, "SPLITS_BLOCK": power_of_2(shares), "LATENT_BLOCK": columns},
    )
    joins = (join,) if shares > 1 else ()
    return Group((_lower(site, latent_q), attend, *joins, _raise(site, mixed)), scratch)


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
    args: list[Arg] = ["q", *_weights(spec, "w_uk"), latent_q, site.count]
    return site.launch(f"{site.symbol}_lower", grid, args, constants, 4, 2)


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
    args: list[Arg] = [mixed, *_weights(spec, "w_uv"), "out", site.count]
    return site.launch(f"{site.symbol}_raise", grid, args, constants, 4, 3)


def _product_block(site: Site, spec: LatentAttend) -> tuple[int, int]:
    """Tokens of a product with w_uk or w_uv, and inputs that a step reads: the fewer tokens, the more."""
    if spec.up_format == "fp32":
        return 16, 32  # no tensor cores
    return (16, 128) if site.rows <= 16 else (min(64, power_of_2(site.rows)), 64)


def _weights(spec: LatentAttend, name: str) -> list[str]:
    return [f"{name}_{part}" for part in quant.parse(spec.up_format).parts]


# Lines of the kernel that stand once for each piece.
LOAD_LATENT_QUERY = """
q_$name = load_rows(latent_q_ptr + pair * LATENT + $at, real, $width, LATENT_BLOCK, True)
"""
LOAD_ROPE_QUERY = """
q_$name = load_rows(q_pe_ptr + $at, real, $width, ROPE_BLOCK, True).to(MATH)
"""
ZERO_SUM = "sum_$name = tl.zeros([ROWS, LATENT_BLOCK], tl.float32)"
LOAD = "$name = widened(load_rows($rows + $column, inside, $width, $block, MASKED), MATH)"
LOAD_SCALE = "scale_$name = tl.load(scales_row + $scale, inside, 0.0)[None, :]"
ADD_SCORE = 'score = tl.dot(q_$name, tl.trans($name), score, input_precision="ieee")'
ADD_SCALED_SCORE = "score += tl.dot(q_$name, tl.trans($name)) * scale_$name"
ADD_VALUE = """
sum_$name = tl.dot(weight.to(MATH), $name, sum_$name * shrink[:, None], input_precision="ieee")
"""
ADD_SCALED_VALUE = """
sum_$name = tl.dot((weight * scale_$name).to(MATH), $name, sum_$name * shrink[:, None])
"""
STORE_SUM = """
tl.store(mixed_ptr + at + $at, to(sum_$name / total[:, None], mixed_ptr), inside & (cols < $width))
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
    SPLITS: tl.constexpr, LEAST: tl.constexpr, UNMASKED: tl.constexpr,
):
    """mixed[t, h] = softmax_j($scale * (q_lat[t, h] . c[j] + q_pe[t, h] . k_pe[j])) c[j], j <= p
    for a query at position p; q [tokens, $heads, $nope + $rope], q_lat, mixed [tokens, $heads, $latent],
    cache row: c [$latent], k_pe [$rope].

    One program: QUERIES of a sequence with HEADS_TILE heads, one split of their keys.
    """
    HEADS: tl.constexpr = $heads
    NOPE: tl.constexpr = $nope
    ROPE: tl.constexpr = $rope
    LATENT: tl.constexpr = $latent
    MATH: tl.constexpr = $math
    sequence, first, queries = tile_of(
        tl.program_id(0), starts_ptr, tl.load(sequences_ptr), QUERIES, SEQUENCES
    )
    if queries <= 0:
        return
    split = tl.program_id(2)
    row = tl.arange(0, ROWS)
    query = row // HEADS_TILE
    head = tl.program_id(1) * HEADS_TILE + row % HEADS_TILE
    real = (query < queries) & (head < HEADS)
    token = (first + query).to(tl.int64)
    pair = token * HEADS + head
    result = pair * SPLITS + split

    position = tl.load(positions_ptr + first)
    last = position + queries - 1
    begin, end = blocks_of(position, last, split, 0, BLOCK, SPLITS, LEAST)
    if begin >= end:
        tl.store(lse_ptr + result, tl.full([ROWS], NOTHING, tl.float32), real)
        return
    q_pe_ptr = q_ptr + token * Q_PITCH + head * (NOPE + ROPE) + NOPE
    $load_queries
    peak = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    $zero_sums
    table_ptr += sequence * TABLE_PITCH
    positions = position + query
    if UNMASKED:
        # Blocks that all queries see whole come first.
        whole = tl.minimum((position + 1) // BLOCK, end)
        peak, total, $sums = ${symbol}_blocks(
            $queries, $sums, peak, total,
            $pointers, table_ptr, positions, last, begin, whole,
            ROWS, BLOCK, LATENT_BLOCK, ROPE_BLOCK, False,
        )
        begin = tl.maximum(begin, whole)
    peak, total, $sums = ${symbol}_blocks(
        $queries, $sums, peak, total,
        $pointers, table_ptr, positions, last, begin, end,
        ROWS, BLOCK, LATENT_BLOCK, ROPE_BLOCK, True,
    )

    cols = tl.arange(0, LATENT_BLOCK)[None, :]
    inside = real[:, None]
    if SPLITS > 1:
        tl.store(lse_ptr + result, log_total(peak, total), real)
        inside &= (total != 0.0)[:, None]
    at = result[:, None] * LATENT + cols
    $store_sums


@triton.jit
def ${symbol}_blocks(
    $queries, $sums, peak, total,
    $pointers, table_ptr, positions, last, begin, end,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LATENT_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Blocks [begin, end) of keys joined to a tile's softmax; a latent, loaded once, is key and value."""
    MATH: tl.constexpr = $math
    page = page_of(table_ptr, begin, end, BLOCK)
    for block in range(begin, end):
        keys = block * BLOCK + tl.arange(0, BLOCK)
        inside = keys <= last
        rows = cache_rows(page, block, BLOCK)
        page = page_of(table_ptr, block + 1, end, BLOCK)
        $find_rows
        $load_keys
        $load_scales
        score = tl.zeros([ROWS, BLOCK], tl.float32)
        $add_scores
        score *= $log2_scale
        if MASKED:
            score = visible(score, keys, positions, 0)
        peak, total, weight, shrink = softmax_step(score, peak, total, MASKED)
        $add_values
    return peak, total, $sums


@triton.jit
def ${symbol}_lower(
    q_ptr, w_uk_ptr, ${w_uk_scale}latent_q_ptr, count_ptr,
    Q_PITCH: tl.constexpr, TOKENS: tl.constexpr, NOPE_BLOCK: tl.constexpr, LATENT_BLOCK: tl.constexpr,
):
    """q_lat[t, h] = q_nope[t, h] w_uk[h], w_uk [$heads, $nope, $latent]; a block of tokens and latents."""
    HEADS: tl.constexpr = $heads
    NOPE: tl.constexpr = $nope
    ROPE: tl.constexpr = $rope
    LATENT: tl.constexpr = $latent
    count = tl.load(count_ptr)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    if tl.program_id(0) * TOKENS >= count:
        return
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
def ${symbol}_join(
    partial_ptr, lse_ptr, mixed_ptr, count_ptr,
    SPLITS: tl.constexpr, SPLITS_BLOCK: tl.constexpr, LATENT_BLOCK: tl.constexpr,
):
    """mixed[t, h], the splits' results weighted by what each saw.

    One program: a token, a head, a block of latents.
    """
    LATENT: tl.constexpr = $latent
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(count_ptr):
        return
    pair = token * $heads + tl.program_id(1)
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
def ${symbol}_raise(
    mixed_ptr, w_uv_ptr, ${w_uv_scale}out_ptr, count_ptr,
    OUT_PITCH: tl.constexpr, TOKENS: tl.constexpr, LATENT_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):
    """out[t, h] = w_uv[h] mixed[t, h], w_uv [$heads, $value, $latent]; a block of tokens and values."""
    HEADS: tl.constexpr = $heads
    LATENT: tl.constexpr = $latent
    VALUE: tl.constexpr = $value
    count = tl.load(count_ptr)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    if tl.program_id(0) * TOKENS >= count:
        return
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
'''
