"""Device functions that the kernels over the paged cache share.

A tile of attention is some consecutive queries of one sequence with some heads that read the same keys: its
rows are the pairs (query, head).  A sequence's keys are walked in blocks; where a launch has SPLITS > 1,
several programs share the blocks of a tile, each leaves what it found with the log-sum-exp of its scores
(to base 2), and a second kernel joins them.

Latent attention treats a sequence by the number of its new tokens.  Of LONG or more the keys and values are
expanded and attended by themselves, and what stands before them in the cache, if anything, is attended
absorbed, as all keys of other sequences are.  Then only some sequences need a kernel, and its programs pass
over tiles and tokens of others.
"""

import triton
import triton.language as tl

from .support import decode_fp8, to

NOTHING: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def sequence_of(token, starts_ptr, sequences, SEQUENCES: tl.constexpr):
    """The sequence of a token: as many end at it or before."""
    b = tl.arange(0, SEQUENCES)
    ends = tl.load(starts_ptr + 1 + b, b < sequences, 0)
    return tl.sum(((b < sequences) & (ends <= token)).to(tl.int32), 0)


@triton.jit
def query_tile(at, starts_ptr, sequences, QUERIES: tl.constexpr, SEQUENCES: tl.constexpr):
    """The sequence of tile ``at``, the tile's first token, and how many it has (none or less: no such tile).

    The tiles of sequence b begin at (starts[b] + b (QUERIES - 1)) // QUERIES: there is room before the next
    sequence for its ceil(tokens / QUERIES), whatever comes before, and no prefix sum is needed.
    """
    b = tl.arange(0, SEQUENCES)
    begin = (tl.load(starts_ptr + b, b < sequences, 0) + b * (QUERIES - 1)) // QUERIES
    sequence = tl.sum(((b < sequences) & (begin <= at)).to(tl.int32), 0) - 1
    start = tl.load(starts_ptr + sequence, sequence >= 0, 0)
    end = tl.load(starts_ptr + sequence + 1, sequence >= 0, 0)
    first = start + (at - (start + sequence * (QUERIES - 1)) // QUERIES) * QUERIES
    return sequence, first, tl.minimum(end - first, QUERIES)


@triton.jit
def spans_of(positions_ptr, starts_ptr, sequences_ptr, SEQUENCES: tl.constexpr):
    """First token of each sequence, the one after its last, and how many keys it had before: [SEQUENCES]."""
    b = tl.arange(0, SEQUENCES)
    there = b < tl.load(sequences_ptr)
    begin = tl.load(starts_ptr + b, there, 0)
    end = tl.load(starts_ptr + 1 + b, there, 0)
    return begin, end, tl.load(positions_ptr + begin, begin < end, 0)


@triton.jit
def absorbs(begin, end, before, LONG: tl.constexpr):
    """Whether keys of a sequence are attended absorbed."""
    return (begin < end) & ((end - begin < LONG) | (before > 0))


@triton.jit
def any_token(first, COUNT: tl.constexpr, begin, end, chosen):
    """Whether one of COUNT tokens from ``first`` on is of a chosen sequence."""
    inside = chosen & (begin < first + COUNT) & (end > first)
    return tl.max(inside.to(tl.int32), 0) > 0


@triton.jit
def tiles_until(begin, end, chosen, QUERIES: tl.constexpr):
    """How many tiles of QUERIES tokens the chosen sequences have, each with those before it: [SEQUENCES]."""
    return tl.cumsum(tl.where(chosen, tl.cdiv(end - begin, QUERIES), 0), 0)


@triton.jit
def chosen_tile(at, tiles, starts_ptr, QUERIES: tl.constexpr):
    """Tile ``at`` of ``tiles_until``: its sequence, that one's first token and the one after its last, the
    tile's first token, and how many it has (none: no such tile)."""
    there = at < tl.max(tiles, 0)
    sequence = tl.sum((tiles <= at).to(tl.int32), 0)
    start = tl.load(starts_ptr + sequence, there, 0)
    end = tl.load(starts_ptr + sequence + 1, there, 0)
    first = start + (at - tl.max(tl.where(tiles <= at, tiles, 0), 0)) * QUERIES
    return sequence, start, end, first, tl.where(there, tl.minimum(end - first, QUERIES), 0)


@triton.jit
def pairs_of(queries, part, HEADS: tl.constexpr, ROWS: tl.constexpr, HEADS_TILE: tl.constexpr):
    """Query and head of each row of a tile with part ``part`` of the heads, and whether they are real."""
    row = tl.arange(0, ROWS)
    query = row // HEADS_TILE
    head = part * HEADS_TILE + row % HEADS_TILE
    return query, head, (query < queries) & (head < HEADS)


@triton.jit
def blocks_of(
    first,
    last,
    split,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """The blocks of keys [begin, end) of one split of a tile with queries at positions first .. last.

    Splits take equal shares of LEAST blocks or more, so of a short context only some have any.
    """
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0) // BLOCK
    end = last // BLOCK + 1
    if SPLITS > 1:
        share = tl.maximum(tl.cdiv(end - begin, SPLITS), LEAST)
        begin += split * share
        end = tl.minimum(begin + share, end)
    return begin, end


@triton.jit
def page_of(table_ptr, block, end, BLOCK: tl.constexpr):
    """The page of a block of keys.  A loop asks for that of its next block, so as never to wait for it."""
    return tl.load(table_ptr + block * BLOCK // 64, block < end, 0)


@triton.jit
def cache_rows(page, block, BLOCK: tl.constexpr):
    """Rows of the cache that hold the BLOCK keys of a block, all on one page of 64."""
    return page.to(tl.int64) * 64 + block % (64 // BLOCK) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def load_rows(
    row_ptr, inside, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """Tile [rows, WIDTH_BLOCK] of the WIDTH numbers at each pointer, with zeros outside."""
    cols = tl.arange(0, WIDTH_BLOCK)[None, :]
    at = row_ptr[:, None] + cols
    if MASKED and WIDTH < WIDTH_BLOCK:
        tile = tl.load(at, inside[:, None] & (cols < WIDTH), 0.0)
    elif MASKED:
        tile = tl.load(at, inside[:, None], 0.0)
    elif WIDTH < WIDTH_BLOCK:
        tile = tl.load(at, cols < WIDTH, 0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_rows(row_ptr, tile, inside, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr):
    """The first WIDTH columns of ``tile`` [rows, WIDTH_BLOCK] to where each pointer points."""
    cols = tl.arange(0, WIDTH_BLOCK)[None, :]
    tl.store(row_ptr[:, None] + cols, to(tile, row_ptr), inside[:, None] & (cols < WIDTH))


@triton.jit
def visible(score, keys, positions, WINDOW: tl.constexpr):
    """``score`` [rows, keys] where a query at its position sees the key, else -inf."""
    seen = keys[None, :] <= positions[:, None]
    if WINDOW > 0:
        seen &= keys[None, :] > positions[:, None] - WINDOW
    return tl.where(seen, score, NOTHING)


@triton.jit
def softmax_step(score, peak, total, MASKED: tl.constexpr):
    """One block of an online softmax to base 2: newest peak and total, the weights of the block's keys, and
    the factor on sums so far.  MASKED: a row may not have seen any key yet."""
    newest = tl.maximum(peak, tl.max(score, 1))
    base = newest
    if MASKED:
        base = tl.where(newest == NOTHING, 0.0, newest)
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(peak - base)
    return newest, total * shrink + tl.sum(weight, 1), weight, shrink


@triton.jit
def log_total(peak, total):
    """Log-sum-exp of the scores of each row, -inf where it saw no key."""
    return tl.where(total == 0.0, NOTHING, peak + tl.log2(total))


@triton.jit
def log_joined(lse):
    """Log-sum-exp of what the splits [rows, splits] of each row saw."""
    peak = tl.max(lse, 1)
    base = tl.where(peak == NOTHING, 0.0, peak)
    return log_total(base, tl.sum(tl.exp2(lse - base[:, None]), 1))


@triton.jit
def widened(x, MATH: tl.constexpr):
    """Values of a cache in the type that they are multiplied in; u8 are the bits of E4M3."""
    if x.dtype == tl.uint8 or x.dtype == tl.float8e4nv:
        return decode_fp8(x, MATH)
    else:
        return x.to(MATH)


@triton.jit
def dequantized(x, scales, MATH: tl.constexpr):
    """Values of a cache [keys, width] times their scales [keys, tiles], one for width / tiles columns, in the
    type of the products."""
    shape: tl.constexpr = (x.shape[0], scales.shape[1], x.shape[1] // scales.shape[1])
    values = tl.reshape(widened(x, tl.float32), shape) * scales[:, :, None]
    return settled(tl.reshape(values.to(MATH), x.shape))


@triton.jit
def settled(x):
    """x as one tile, for products that read it in another order than it was loaded in, or in two.

    Triton moves the conversion of an operand up to its load, past all that it knows to be elementwise.  Bytes
    would then be gathered one by one, and for two orders they would be decoded twice and not be loaded ahead.
    It moves nothing past map_elementwise.
    """
    return tl.map_elementwise(_same, x)


@triton.jit
def _same(x):
    return x


@triton.jit
def scaled(x, LARGEST: tl.constexpr):
    """Tiles [tiles, width] in units of their scales [tiles, 1], so that none exceeds LARGEST, and those."""
    # NaN counts as infinity here, for tl.max would skip it: of either nothing finite is left in the tile.
    most = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1, keep_dims=True)
    scale = tl.div_rn(most, LARGEST)
    ratio = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale))
    return tl.clamp(ratio, -LARGEST, LARGEST), scale


@triton.jit
def rounded(x, pointer):
    """The nearest numbers, halves to even, that a cache holds where ``pointer`` points: INT8, or E4M3, whose
    bits are u8 where the architecture does not know it."""
    if pointer.dtype.element_ty == tl.int8:
        # The sum has no bits for a fraction.
        return ((x + 12582912.0) - 12582912.0).to(tl.int8)
    elif pointer.dtype.element_ty == tl.float8e4nv:
        return x.to(tl.float8e4nv)
    else:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # Below 2^-6 they are the multiples of 2^-9; from there on, three bits of fraction are kept.
        low = ((tl.abs(x) * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
        high = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        return (tl.where(size < 0x3C800000, low, high) | ((bits >> 24) & 0x80)).to(tl.uint8)
