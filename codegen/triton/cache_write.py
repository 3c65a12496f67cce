"""CacheWrite: store each token's parts in its row of the paged cache."""

from __future__ import annotations

from ...ir.cache import FORMATS, LARGEST, PAGE, CacheSpec, Place
from ...ir.plan import CacheWrite
from ..text import fill
from . import rows
from .launch import Group, Site, Source, power_of_2
from .target import GpuTarget

# What numbers of a format are read as.
POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "int8": "*i8", "fp8": "*fp8e4nv"}


def cache_pointers(cache: CacheSpec) -> dict[str, str]:
    """Names of a kernel's pointers to a cache, and the formats that they point at.

    ``cache_ptr`` to what most of a row is, ``bf16_ptr`` to parts in another format, ``scales_ptr`` to scales.
    """
    found = {"cache_ptr": cache.format}
    for place in cache.places:
        found[pointer_to(cache, place)] = place.format
    scaled = any(place.scales is not None for place in cache.places)
    return found | ({"scales_ptr": "fp32"} if scaled else {})


def pointer_to(cache: CacheSpec, place: Place) -> str:
    """Which of the pointers to a cache reads the values of a part."""
    return "cache_ptr" if place.format == cache.format else f"{place.format}_ptr"


def cache_args(cache: CacheSpec, target: GpuTarget) -> list[Source]:
    """What these pointers point at; E4M3 by its bits, where the architecture does not know it."""
    formats = cache_pointers(cache).values()
    bits = {} if target.fp8 else {"fp8": "*u8"}
    return [("cache", (POINTERS | bits)[fmt]) for fmt in formats]


def pitch(cache: CacheSpec, fmt: str) -> int:
    """Numbers of a format from one row of a cache to the next."""
    return cache.row_bytes // FORMATS[fmt]


def symbol(spec: CacheWrite) -> str:
    parts = "_".join(f"{p.name}{p.width}" for p in spec.parts)
    return f"cache_write_{parts}_{spec.format}"


def emit(spec: CacheWrite, name: str) -> str:
    return rows.emit(name, row_kernel(spec))


def row_kernel(spec: CacheWrite) -> rows.RowKernel:
    inputs = [f"p{i}" for i in range(len(spec.parts))]
    pointers = cache_pointers(spec.cache)
    body = fill(
        BODY,
        page=PAGE,
        moves="\n".join(
            f"{name} += place * {pitch(spec.cache, fmt)}" for name, fmt in pointers.items()
        ),
        writes="\n".join(_write(spec.cache, i, place) for i, place in enumerate(spec.cache.places)),
    )
    parts = ", ".join(f"{p.name} [{p.width}]" for p in spec.parts)
    batch = ("positions_ptr", "starts_ptr", "table_ptr", "sequences_ptr")
    return rows.RowKernel(
        about=f"{PLACE} = {parts} of a token at position p of sequence b.",
        pointers=(*(f"{p}_ptr" for p in inputs), *pointers, *batch),
        constants=(*(f"{p.upper()}_PITCH" for p in inputs), "TABLE_PITCH", "SEQUENCES"),
        body=body,
    )


def _write(cache: CacheSpec, i: int, place: Place) -> str:
    part, size = place.part, FORMATS[place.format]
    names = {
        "i": i,
        "name": part.name,
        "pointer": pointer_to(cache, place),
        "column": place.values // size,
        "width": part.width,
        "block": power_of_2(part.width),
    }
    if place.scales is None:
        return fill(PLAIN, **names).rstrip()
    tiles = {
        "tile": part.tile,
        "tiles": part.tiles,
        "tile_block": power_of_2(min(part.tile, part.width)),
        "tiles_block": power_of_2(part.tiles),
        "inside": f"(i < {part.tile}) & (tile * {part.tile} + i < {part.width})",
        "largest": LARGEST[place.format],
        "scale": place.scales // 4,
    }
    return fill(SCALED, **names, **tiles).rstrip()


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, CacheWrite)
    inputs = [f"p{i}" for i in range(len(spec.parts))]
    constants = site.pitches(*inputs) | {
        "TABLE_PITCH": site.table_pitch,
        "SEQUENCES": site.sequences,
    }
    args: list[Source] = [
        *inputs, *cache_args(spec.cache, site.target),
        "positions", "starts", "block_table", "count.sequences", site.count,
    ]  # fmt: skip
    return Group((site.launch(site.symbol, (site.rows,), args, constants),))


PLAIN = """
i = tl.arange(0, $block)  # $name
x = tl.load(p${i}_ptr + row * P${i}_PITCH + i, i < $width).to(tl.float32)
tl.store($pointer + $column + i, to(x, $pointer), i < $width)
"""
SCALED = """
tile = tl.arange(0, $tiles_block)[:, None]  # $name: one scale for $tile values
i = tl.arange(0, $tile_block)[None, :]
inside = $inside
x = tl.load(p${i}_ptr + row * P${i}_PITCH + tile * $tile + i, inside, 0.0).to(tl.float32)
x, scale = scaled(x, $largest)
tl.store($pointer + $column + tile * $tile + i, rounded(x, $pointer), inside)
tl.store(scales_ptr + $scale + tile, scale, tile < $tiles)
"""
PLACE = f"cache[block_table[b, p // {PAGE}], p % {PAGE}]"
BODY = """
PAGE: tl.constexpr = $page
sequence = sequence_of(row, starts_ptr, tl.load(sequences_ptr), SEQUENCES)
position = tl.load(positions_ptr + row)
page = tl.load(table_ptr + sequence * TABLE_PITCH + position // PAGE).to(tl.int64)
place = page * PAGE + position % PAGE
$moves
$writes
"""
