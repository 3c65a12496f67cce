"""CacheWrite: store each token's parts in its row of the paged cache."""

from __future__ import annotations

from typing import TypeAlias

from ...ir.cache import FORMATS, PAGE, CacheSpec, Part
from ...ir.plan import CacheWrite
from ..text import fill
from .launch import Group, Site, power_of_2

# What ``Site.launch`` takes for a pointer.
Arg: TypeAlias = str | tuple[str, str]
# What a cache row holds -> what it is read as.
POINTERS = {"fp32": ("*fp32",), "bf16": ("*bf16",), "int8": ("*i8", "*fp32")}


def cache_pointers(fmt: str) -> list[str]:
    """Names of a kernel's pointers to the cache: its values, then (INT8) its scales."""
    return ["cache_ptr", "scales_ptr"][: len(POINTERS[fmt])]


def cache_args(fmt: str) -> list[Arg]:
    """What these pointers point at."""
    return [("cache", type_) for type_ in POINTERS[fmt]]


def pitch(cache: CacheSpec) -> int:
    """Values from one row of the cache to the next; INT8 scales have a fourth of it."""
    return cache.row_bytes // FORMATS[cache.format]


def symbol(spec: CacheWrite) -> str:
    parts = "_".join(f"{p.name}{p.width}" for p in spec.parts)
    return f"cache_write_{parts}_{spec.format}"


def emit(spec: CacheWrite, name: str) -> str:
    inputs = [f"p{i}" for i in range(len(spec.parts))]
    pointers = [*(f"{p}_ptr" for p in inputs), *cache_pointers(spec.format)]
    return fill(
        TEMPLATE,
        symbol=name,
        parts=", ".join(f"{p.name} [{p.width}]" for p in spec.parts),
        pointers=", ".join(pointers),
        pitches=", ".join(f"{p.upper()}_PITCH: tl.constexpr" for p in inputs),
        page=PAGE,
        pitch=pitch(spec.cache),
        scales=SCALES if spec.format == "int8" else "",
        writes="\n".join(_writes(spec.cache)),
    )


def _writes(cache: CacheSpec) -> list[str]:
    found, column, scale = [], 0, cache.scale_offset // 4
    for i, part in enumerate(cache.parts):
        names = _names(part) | {"i": i, "column": column, "scale": scale}
        found.append(fill(INT8 if cache.format == "int8" else PLAIN, **names).rstrip())
        column += part.width
        scale += part.tiles
    return found


def _names(part: Part) -> dict[str, object]:
    return {
        "name": part.name,
        "width": part.width,
        "block": power_of_2(part.width),
        "tile": part.tile,
        "tiles": part.tiles,
        "tile_block": power_of_2(min(part.tile, part.width)),
        "tiles_block": power_of_2(part.tiles),
        "inside": f"(i < {part.tile}) & (tile * {part.tile} + i < {part.width})",
    }


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, CacheWrite)
    inputs = [f"p{i}" for i in range(len(spec.parts))]
    constants = site.pitches(*inputs) | {
        "TABLE_PITCH": site.table_pitch,
        "SEQUENCES": site.sequences,
    }
    args: list[Arg] = [
        *inputs, *cache_args(spec.format),
        "positions", "starts", "block_table", "count.sequences", "count.tokens",
    ]  # fmt: skip
    return Group((site.launch(site.symbol, (site.rows,), args, constants),))


SCALES = "scales_ptr += row * (PITCH // 4)"
PLAIN = """
i = tl.arange(0, $block)  # $name
x = tl.load(p${i}_ptr + token * P${i}_PITCH + i, i < $width).to(tl.float32)
tl.store(cache_ptr + $column + i, to(x, cache_ptr), i < $width)
"""
INT8 = """
tile = tl.arange(0, $tiles_block)[:, None]  # $name: one scale for $tile values
i = tl.arange(0, $tile_block)[None, :]
inside = $inside
x = tl.load(p${i}_ptr + token * P${i}_PITCH + tile * $tile + i, inside, 0.0).to(tl.float32)
q, scale = quantized(x)
tl.store(cache_ptr + $column + tile * $tile + i, q, inside)
tl.store(scales_ptr + $scale + tile, scale, tile < $tiles)
"""
TEMPLATE = '''
@triton.jit
def $symbol(
    $pointers,
    positions_ptr, starts_ptr, table_ptr, sequences_ptr, tokens_ptr,
    $pitches,
    TABLE_PITCH: tl.constexpr, SEQUENCES: tl.constexpr,
):
    """cache[block_table[b, p // $page], p % $page] = $parts of a token at position p of sequence b."""
    PAGE: tl.constexpr = $page
    PITCH: tl.constexpr = $pitch
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(tokens_ptr):
        return
    sequence = sequence_of(token, starts_ptr, tl.load(sequences_ptr), SEQUENCES)
    position = tl.load(positions_ptr + token)
    page = tl.load(table_ptr + sequence * TABLE_PITCH + position // PAGE).to(tl.int64)
    row = page * PAGE + position % PAGE
    cache_ptr += row * PITCH
    $scales
    $writes
'''
