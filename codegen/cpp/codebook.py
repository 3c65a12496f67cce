"""Codebooks: weight formats of the user's own, decoded by table."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir import quant
from ...ir.plan import Experts, Linear, Plan
from ..text import call, fill
from .expr import literal
from .text import codebook_type


def used(plan: Plan) -> list[quant.Codebook]:
    """The codebooks that weights of a plan are in, in order of first use."""
    names: list[str] = []
    for spec in plan.specs:
        match spec:
            case Linear():
                names.append(spec.format)
            case Experts():
                names += [spec.gate_up_format, spec.down_format]
    formats = map(quant.parse, dict.fromkeys(names))
    return [f for f in formats if isinstance(f, quant.Codebook)]


def emit(books: Sequence[quant.Codebook]) -> str:
    """The text of codebooks.h."""
    return fill(HEADER, books="\n".join(map(_book, books)))


def _book(book: quant.Codebook) -> str:
    size = max(16, 2**book.bits)  # a vector register at least
    padded = [*book.values, *[0.0] * (size - len(book.values))]
    return fill(
        BOOK,
        name=book.name,
        type=codebook_type(book.name),
        count=len(book.values),
        bits=book.bits,
        group=book.group,
        values=call("  static constexpr float VALUES[] = {", list(map(literal, padded)), "};"),
    )


BOOK = """
// $name: $count values, a scale per $group inputs
struct ${type}_table {
$values
};
using $type = Coded<${type}_table, $bits, $group>;
"""
HEADER = """
// Weight formats of the user's own: codes, 32 inputs in BITS words of 16 rows each, of entries of a table.
#pragma once
#include "weights.h"

namespace mill {

// value = VALUES[code] * scale, one bf16 scale per row and GROUP inputs; activations stay fp32.
template <class Table, int BITS, int GROUP>
struct Coded : Weight {
  using Inputs = FloatInputs;
  static constexpr bool INTEGER = false;
  static constexpr size_t STEP_BYTES = BITS * PANEL * 4;
  static constexpr int SCALE_BYTES = 2;
  static constexpr int scales(int k) { return ceil_div(k, GROUP); }
  static TM_INLINE vf entries(vi code) {
#if defined(__AVX512F__) && TM_VECTOR_BYTES == 64
    if (BITS <= 4) return (vf)_mm512_permutexvar_ps((__m512i)code, (__m512)load(Table::VALUES));
    return (vf)_mm512_i32gather_ps((__m512i)code, Table::VALUES, 4);
#elif defined(__AVX2__) && TM_VECTOR_BYTES == 32
    return (vf)_mm256_i32gather_ps(Table::VALUES, (__m256i)code, 4);
#else
    vf x = {};
    for (int i = 0; i < LANES; i++) x[i] = Table::VALUES[code[i]];
    return x;
#endif
  }
  template <int T>
  static TM_INLINE void multiply(Sums<T> &sums, const uint8_t *q, const void *scale, int step,
                                 const uint8_t *const *x) {
    const uint16_t *s = (const uint16_t *)scale + step * STEP / GROUP * PANEL;
    vi plane[VECS][BITS];
    vf scales[VECS];
    for (int v = 0; v < VECS; v++) {
      scales[v] = load_bf16(s + v * LANES);
      for (int b = 0; b < BITS; b++) plane[v][b] = words(q + b * PANEL * 4 + v * TM_VECTOR_BYTES);
    }
    for (int i = 0; i < STEP; i += 2)
      TM_UNROLL for (int half = 0; half < 2; half++) {
        vf w[VECS];
        for (int v = 0; v < VECS; v++) {
          vi code = {};
          TM_UNROLL for (int b = 0; b < BITS; b++) code |= ((plane[v][b] >> (i + half)) & 1) << b;
          w[v] = entries(code) * scales[v];
        }
        TM_UNROLL for (int t = 0; t < T; t++) {
          const float a = ((const float *)x[t])[step * STEP + i + half];
          for (int v = 0; v < VECS; v++) sums[half][t][v] += w[v] * a;
        }
      }
  }
};

$books

}  // namespace mill
"""
