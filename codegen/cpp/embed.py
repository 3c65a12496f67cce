"""Embed: one row of a table per token."""

from __future__ import annotations

from ...ir import quant
from ...ir.plan import Embed
from ..text import fill
from .text import signature, storage_type, weight_params

HEADER = "simd.h"


def symbol(spec: Embed) -> str:
    return f"embed_v{spec.vocab}_w{spec.width}_{spec.format}"


def emit(spec: Embed, name: str) -> str:
    values, *scale = quant.parse(spec.format).parts
    return fill(
        TEMPLATE,
        symbol=name,
        vocab=spec.vocab,
        width=spec.width,
        type=storage_type(spec.format),
        values=values,
        signature=signature("const int32_t *index", *weight_params(spec.format), "Rows<float> out"),
        scaled=" * scale[index[t]]" if scale else "",
        scale=", ((const float *)scale)[index[r]]" if scale else "",
    )


TEMPLATE = """
// out[t] = table[index[t]]$scaled,  table [$vocab, $width]
namespace $symbol {
constexpr int WIDTH = $width;
constexpr size_t SHARED = 0, LOCAL = 0;

$signature
  for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
    widen(out[r], (const $type *)$values + (size_t)index[r] * WIDTH, WIDTH$scale);
}
}  // namespace $symbol
"""
