"""Rope: rotate pairs of columns of each head; the rest of the head is copied."""

from __future__ import annotations

from ...ir.plan import Rope
from ..text import fill
from .launch import Group, Site, ceil_div, power_of_2

TILE = 2048  # numbers that one program holds


def symbol(spec: Rope) -> str:
    kind = "interleaved" if spec.interleaved else "half"
    at = f"_at{spec.offset}" if spec.offset else ""
    return f"rope_{kind}_h{spec.heads}_d{spec.head_dim}_r{spec.rotary}{at}"


def emit(spec: Rope, name: str) -> str:
    return fill(
        TEMPLATE,
        symbol=name,
        pairs="(2i, 2i + 1)" if spec.interleaved else f"(i, i + {spec.rotary // 2})",
        heads=spec.heads,
        dim=spec.head_dim,
        rotary=spec.rotary,
        offset=spec.offset,
        copy=COPY if spec.rotary < spec.head_dim else "",
        rotate=INTERLEAVED if spec.interleaved else HALF_SPLIT,
    )


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, Rope)
    dim = power_of_2(spec.head_dim)
    heads = min(power_of_2(spec.heads), max(1, TILE // dim))
    constants = site.pitches(*spec.params) | {
        "HEADS_BLOCK": heads,
        "HALF_BLOCK": power_of_2(spec.rotary // 2),
        "DIM_BLOCK": dim,
    }
    grid = (site.rows, ceil_div(spec.heads, heads))
    return Group((site.launch(site.symbol, grid, [*spec.params, site.count], constants),))


COPY = """
if x_ptr.to(tl.int64) != out_ptr.to(tl.int64):
    cols = tl.arange(0, DIM_BLOCK)[None, :]
    kept = (cols < OFFSET) | ((cols >= OFFSET + ROTARY) & (cols < DIM))
    kept &= heads < HEADS
    rest = tl.load(x_ptr + heads * DIM + cols, kept).to(tl.float32)
    tl.store(out_ptr + heads * DIM + cols, to(rest, out_ptr), kept)
"""
HALF_SPLIT = """
a = tl.load(x_ptr + at + pairs, inside).to(tl.float32)
b = tl.load(x_ptr + at + HALF + pairs, inside).to(tl.float32)
tl.store(out_ptr + at + pairs, to(a * cos - b * sin, out_ptr), inside)
tl.store(out_ptr + at + HALF + pairs, to(b * cos + a * sin, out_ptr), inside)
"""
INTERLEAVED = """
# Both of a pair are loaded together, as [heads, pairs, 2].
both = (at + 2 * pairs)[:, :, None] + tl.arange(0, 2)[None, None, :]
a, b = tl.split(tl.load(x_ptr + both, inside[:, :, None]).to(tl.float32))
turned = tl.join(a * cos - b * sin, b * cos + a * sin)
tl.store(out_ptr + both, to(turned, out_ptr), inside[:, :, None])
"""
TEMPLATE = '''
@triton.jit
def $symbol(
    x_ptr, cos_ptr, sin_ptr, out_ptr, count_ptr,
    X_PITCH: tl.constexpr, COS_PITCH: tl.constexpr, SIN_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
):
    """(a, b) -> (a cos - b sin, b cos + a sin) for the pairs $pairs of columns
    $offset + [0, $rotary) of each head; x, out [rows, $heads, $dim].

    One program: a row, a block of its heads.
    """
    wait_for_launches()
    HEADS: tl.constexpr = $heads
    DIM: tl.constexpr = $dim
    ROTARY: tl.constexpr = $rotary
    HALF: tl.constexpr = ROTARY // 2
    OFFSET: tl.constexpr = $offset
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(count_ptr):
        return
    x_ptr += row * X_PITCH
    out_ptr += row * OUT_PITCH
    heads = (tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK))[:, None]
    $copy
    pairs = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (heads < HEADS) & (pairs < HALF)
    at = heads * DIM + OFFSET
    cos = tl.load(cos_ptr + row * COS_PITCH + pairs, pairs < HALF, 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * SIN_PITCH + pairs, pairs < HALF, 0.0).to(tl.float32)
    $rotate
'''
