"""Rope: rotate pairs of columns of each head; the rest of the head is copied."""

from __future__ import annotations

from ...ir.plan import Rope
from ..text import fill
from . import rows
from .launch import Group, Site, ceil_div, power_of_2

TILE = 2048  # numbers that one program holds


def symbol(spec: Rope) -> str:
    kind = "interleaved" if spec.interleaved else "half"
    at = f"_at{spec.offset}" if spec.offset else ""
    return f"rope_{kind}_h{spec.heads}_d{spec.head_dim}_r{spec.rotary}{at}"


def emit(spec: Rope, name: str) -> str:
    return rows.emit(name, row_kernel(spec))


def row_kernel(spec: Rope) -> rows.RowKernel:
    where = f" from column {spec.offset} on" if spec.offset else ""
    pairs = "(2i, 2i + 1)" if spec.interleaved else f"(i, i + {spec.rotary // 2})"
    body = fill(
        BODY,
        heads=spec.heads,
        dim=spec.head_dim,
        rotary=spec.rotary,
        offset=spec.offset,
        copy=COPY.strip() if spec.rotary < spec.head_dim else "",
        rotate=(INTERLEAVED if spec.interleaved else HALF_SPLIT).strip(),
    )
    pitches = (f"{p.upper()}_PITCH" for p in spec.params)
    return rows.RowKernel(
        about=f"(a, b) -> (a cos - b sin, b cos + a sin) for pairs {pairs}{where}; a block of heads.",
        pointers=tuple(f"{p}_ptr" for p in spec.params),
        constants=(*pitches, "HEADS_BLOCK", "HALF_BLOCK", "DIM_BLOCK"),
        body=body,
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
BODY = """
HEADS: tl.constexpr = $heads
DIM: tl.constexpr = $dim
ROTARY: tl.constexpr = $rotary
HALF: tl.constexpr = ROTARY // 2
OFFSET: tl.constexpr = $offset
x_ptr += row * X_PITCH
out_ptr += row * OUT_PITCH
heads = (block * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK))[:, None]
$copy
pairs = tl.arange(0, HALF_BLOCK)[None, :]
inside = (heads < HEADS) & (pairs < HALF)
at = heads * DIM + OFFSET
cos = tl.load(cos_ptr + row * COS_PITCH + pairs, pairs < HALF, 0.0).to(tl.float32)
sin = tl.load(sin_ptr + row * SIN_PITCH + pairs, pairs < HALF, 0.0).to(tl.float32)
$rotate
"""
