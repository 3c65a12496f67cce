"""Rope: rotate pairs of columns of each head; the rest of the head is copied."""

from __future__ import annotations

from ...ir.plan import Rope
from ..text import fill

HEADER = "simd.h"


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
        rotate=INTERLEAVED if spec.interleaved else HALF_SPLIT,
    )


HALF_SPLIT = """
for (int i = 0; i < HALF; i += LANES) {
  const int n = HALF - i;
  const vf a = load_n(from + i, n), b = load_n(from + HALF + i, n);
  const vf c = load_n(cos[r] + i, n), s = load_n(sin[r] + i, n);
  store_n(to + i, a * c - b * s, n);
  store_n(to + HALF + i, b * c + a * s, n);
}
""".strip()
INTERLEAVED = """
for (int i = 0; i < HALF; i++) {
  const float a = from[2 * i], b = from[2 * i + 1], c = cos[r][i], s = sin[r][i];
  to[2 * i] = a * c - b * s;
  to[2 * i + 1] = b * c + a * s;
}
""".strip()

TEMPLATE = """
// (a, b) -> (a cos - b sin, b cos + a sin) for the pairs $pairs of columns
// $offset + [0, $rotary) of each head
namespace $symbol {
constexpr int HEADS = $heads, DIM = $dim, OFFSET = $offset, ROTARY = $rotary, HALF = ROTARY / 2;
constexpr size_t SHARED = 0, LOCAL = 0;

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, Rows<float> cos, Rows<float> sin,
                     Rows<float> out) {
  for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
    for (int h = 0; h < HEADS; h++) {
      const float *head = x[r] + h * DIM, *from = head + OFFSET;
      float *head_out = out[r] + h * DIM, *to = head_out + OFFSET;
      if (head != head_out) {
        memcpy(head_out, head, OFFSET * sizeof(float));
        memcpy(to + ROTARY, from + ROTARY, (DIM - OFFSET - ROTARY) * sizeof(float));
      }
      $rotate
    }
}
}  // namespace $symbol
"""
