"""Pointwise: one expression per element."""

from __future__ import annotations

from ...ir.plan import Pointwise
from ..text import fill
from .expr import vector_code
from .text import signature

HEADER = "simd.h"

_PARAM = {"row": "Rows<float> in{i}", "scalar": "Rows<float> in{i}", "channel": "const void *in{i}"}
_LOAD = {
    "row": "load_n(in{i}[r] + i, WIDTH - i)",
    "scalar": "splat(in{i}[r][0])",
    "channel": "load_n((const float *)in{i} + i, WIDTH - i)",
}


def symbol(spec: Pointwise) -> str:
    return f"pointwise_w{spec.width}"


def emit(spec: Pointwise, name: str) -> str:
    kinds = list(enumerate(spec.inputs))
    return fill(
        TEMPLATE,
        symbol=name,
        expr=spec.expr,
        width=spec.width,
        signature=signature(*(_PARAM[kind].format(i=i) for i, kind in kinds), "Rows<float> out"),
        loads="\n".join(f"const vf x{i} = {_LOAD[kind].format(i=i)};" for i, kind in kinds),
        value=vector_code(spec.expr),
    )


TEMPLATE = """
// out[r, i] = $expr
namespace $symbol {
constexpr int WIDTH = $width;
constexpr size_t SHARED = 0, LOCAL = 0;

$signature
  for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
    for (int i = 0; i < WIDTH; i += LANES) {
      $loads
      store_n(out[r] + i, $value, WIDTH - i);
    }
}
}  // namespace $symbol
"""
