// Attention over one page at a time: scores, online softmax, weighted sum.
//
// All three treat each query row alone and visit keys in order, so a row's result does not depend on the
// rows beside it nor on how a prompt was cut into steps.
#pragma once
#include "cache.h"
#include "matmul.h"

namespace mill {

constexpr int STRIP = 4;  // vectors per row of a register tile

// dst[c][0:64] = src[0:64][c], `columns` a multiple of LANES.
inline void transpose_page(const float *src, int columns, int pitch, float *dst) {
  for (int c = 0; c < columns; c += LANES)
    for (int j = 0; j < PAGE; j += LANES)
      transpose(src + (size_t)j * pitch + c, pitch, dst + (size_t)c * PAGE + j, PAGE);
}

// out[r][c] = shrink[r] out[r][c] + sum_i a[r][i] b[i][c] for ROWS rows, N vectors of columns.
template <int ROWS, int N, bool FRESH>
TM_INLINE void outer_tile(const float *a, int a_pitch, const float *b, int b_pitch, int depth,
                          const float *shrink, float *out, int out_pitch) {
  vf acc[ROWS][N];
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < N; c++)
      acc[r][c] = FRESH ? vf{} : load(out + (size_t)r * out_pitch + c * LANES) * shrink[r];
  for (int i = 0; i < depth; i++) {
    vf column[N];
    for (int c = 0; c < N; c++) column[c] = load(b + (size_t)i * b_pitch + c * LANES);
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < N; c++) acc[r][c] += a[(size_t)r * a_pitch + i] * column[c];
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < N; c++) store(out + (size_t)r * out_pitch + c * LANES, acc[r][c]);
}

template <int ROWS, bool FRESH>
TM_INLINE void outer_rows(const float *a, int a_pitch, const float *b, int b_pitch, int depth,
                          const float *shrink, float *out, int out_pitch, int columns) {
  int c = 0;
  for (; c + STRIP * LANES <= columns; c += STRIP * LANES)
    outer_tile<ROWS, STRIP, FRESH>(a, a_pitch, b + c, b_pitch, depth, shrink, out + c, out_pitch);
  for (; c < columns; c += LANES)
    outer_tile<ROWS, 1, FRESH>(a, a_pitch, b + c, b_pitch, depth, shrink, out + c, out_pitch);
}

// out = a b (FRESH) or diag(shrink) out + a b; a [rows, depth], b [depth, columns], columns % LANES == 0.
template <bool FRESH>
TM_NOINLINE void outer(const float *a, int a_pitch, int rows, const float *b, int b_pitch, int depth,
                       const float *shrink, float *out, int out_pitch, int columns) {
  int r = 0;
  for (; r + TILE <= rows; r += TILE)
    outer_rows<TILE, FRESH>(a + (size_t)r * a_pitch, a_pitch, b, b_pitch, depth, shrink + (FRESH ? 0 : r),
                            out + (size_t)r * out_pitch, out_pitch, columns);
  for (; r < rows; r++)
    outer_rows<1, FRESH>(a + (size_t)r * a_pitch, a_pitch, b, b_pitch, depth, shrink + (FRESH ? 0 : r),
                         out + (size_t)r * out_pitch, out_pitch, columns);
}

// The queries of a step in tiles of `size` tokens, each of one sequence, found by number in rising order.
struct QueryTiles {
  const tm_args &a;
  int size;
  int sequence = 0, before = 0;  // tiles of the sequences before `sequence`
  int first = 0, tokens = 0;     // the tile that seek() found

  QueryTiles(const tm_args &a, int size) : a(a), size(size) {}
  bool seek(int tile) {
    for (; sequence < a.sequences; sequence++) {
      const int start = a.starts[sequence], n = a.starts[sequence + 1] - start, tiles = ceil_div(n, size);
      if (tile < before + tiles) {
        first = start + (tile - before) * size;
        tokens = min(size, start + n - first);
        return true;
      }
      before += tiles;
    }
    return false;
  }
};

// s [rows, 64] = q [rows, depth] kt [depth, 64]
inline void scores(const float *q, int q_pitch, int rows, const float *kt, int depth, float *s) {
  outer<true>(q, q_pitch, rows, kt, PAGE, depth, nullptr, s, PAGE, PAGE);
}

// Online softmax of one row: scores of the page's keys [low, high) become exp(score - highest so far),
// all others 0.  Returns the factor by which earlier sums shrink.
TM_INLINE float softmax_page(float *s, int low, int high, float scale, float softcap, float &peak,
                             float &total) {
  if (low >= high) {
    memset(s, 0, PAGE * sizeof(float));
    return 1.0f;
  }
  vf x[PAGE / LANES], best = splat(-__builtin_inff()), sums = {};
  for (int v = 0; v < PAGE / LANES; v++) {
    const vf key = iota() + (float)(v * LANES);
    x[v] = load(s + v * LANES) * scale;
    if (softcap != 0.0f) x[v] = softcap * tanh(x[v] / softcap);
    x[v] = select((key >= (float)low) & (key < (float)high), x[v], splat(-__builtin_inff()));
    best = select(x[v] > best, x[v], best);
  }
  const float page_peak = highest(best), before = peak;
  peak = page_peak > before ? page_peak : before;
  for (int v = 0; v < PAGE / LANES; v++) {
    x[v] = exp(x[v] - peak);
    sums += x[v];
    store(s + v * LANES, x[v]);
  }
  const float shrink = exp(splat(before - peak))[0];
  total = total * shrink + sum(sums);
  return shrink;
}

// 1 / denominator.  A sink is one more logit that owns no value; it may exceed the peak.
TM_INLINE float inverse_total(float peak, float total) { return 1.0f / total; }
TM_INLINE float inverse_total(float peak, float total, float sink) {
  if (sink <= peak) return 1.0f / (total + exp(splat(sink - peak))[0]);
  const float shrink = exp(splat(peak - sink))[0];
  return shrink / (total * shrink + 1.0f);
}

}  // namespace mill
