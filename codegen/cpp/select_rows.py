"""SelectRows: the rows that go through the head."""

from __future__ import annotations

from ...ir.plan import SelectRows
from ..text import fill

HEADER = "simd.h"


def symbol(spec: SelectRows) -> str:
    return f"select_rows_w{spec.width}"


def emit(spec: SelectRows, name: str) -> str:
    return fill(TEMPLATE, symbol=name, width=spec.width)


TEMPLATE = """
// out[r] = x[index[r]]
namespace $symbol {
constexpr int WIDTH = $width;
constexpr size_t SHARED = 0, LOCAL = 0;

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const int32_t *index,
                     Rows<float> out) {
  for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
    memcpy(out[r], x[index[r]], WIDTH * sizeof(float));
}
}  // namespace $symbol
"""
