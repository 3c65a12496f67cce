"""Embed: one row of a table per token."""

from __future__ import annotations

from ...ir.plan import Embed
from ..text import fill
from .text import storage_type

HEADER = "simd.h"


def symbol(spec: Embed) -> str:
    return f"embed_v{spec.vocab}_w{spec.width}_{spec.format}"


def emit(spec: Embed, name: str) -> str:
    return fill(
        TEMPLATE, symbol=name, vocab=spec.vocab, width=spec.width, type=storage_type(spec.format)
    )


TEMPLATE = """
// out[t] = table[index[t]],  table [$vocab, $width]
namespace $symbol {
constexpr int WIDTH = $width;
constexpr size_t SHARED = 0, LOCAL = 0;

TM_NOINLINE void run(Thread &th, int rows, const int32_t *index, const void *table,
                     Rows<float> out) {
  for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
    widen(out[r], (const $type *)table + (size_t)index[r] * WIDTH, WIDTH);
}
}  // namespace $symbol
"""
