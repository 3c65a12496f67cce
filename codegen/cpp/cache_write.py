"""CacheWrite: store each token's parts in its row of the paged cache."""

from __future__ import annotations

from ...ir.cache import CacheSpec
from ...ir.plan import CacheWrite
from ..text import fill
from .text import signature

HEADER = "cache.h"


def cache_type(fmt: str) -> str:
    """The row codec of a cache format in cache.h."""
    return {"fp32": "CacheFp32", "bf16": "CacheBf16", "int8": "CacheInt8", "fp8": "CacheFp8"}[fmt]


def math_type(fmt: str) -> str:
    """The arithmetic of attention.h over a cache of this format."""
    return "Fp32Math" if fmt == "fp32" else "ShortMath"


def spans(cache: CacheSpec) -> list[str]:
    """The ``Span`` of each part of a row."""
    return [
        f"Span<{cache_type(at.format)}>"
        f"{{{at.values}, {at.part.width}, {at.part.tile}, {at.scales or 0}}}"
        for at in cache.places
    ]


def symbol(spec: CacheWrite) -> str:
    parts = "_".join(f"{p.name}{p.width}" for p in spec.parts)
    return f"cache_write_{parts}_{spec.format}"


def emit(spec: CacheWrite, name: str) -> str:
    return fill(
        TEMPLATE,
        symbol=name,
        parts=", ".join(f"{p.name} [{p.width}]" for p in spec.parts),
        row_bytes=spec.cache.row_bytes,
        signature=signature(*(f"Rows<float> p{i}" for i in range(len(spec.parts))), "void *cache"),
        writes="\n".join(
            f"{span}.encode(row, p{i}[t]);" for i, span in enumerate(spans(spec.cache))
        ),
    )


TEMPLATE = """
// cache[block_table[b, p / 64], p % 64] = $parts of token t, at position p of sequence b
namespace $symbol {
constexpr int ROW_BYTES = $row_bytes;
constexpr size_t SHARED = 0, LOCAL = 0;

$signature
  const tm_args &a = *th.args;
  int b = 0;
  for (int t = th.share(rows, 0); t < th.share(rows, 1); t++) {
    b = sequence_of(a.starts, t, b);
    uint8_t *row = cache_row(a, cache, ROW_BYTES, b, a.positions[t]);
    $writes
  }
}
}  // namespace $symbol
"""
