// Products of packed weight rows with activations, one summation order for every batch size.
//
// A dot product keeps one vector accumulator: lane j adds the inputs of its stream position in order, and
// sum4 folds the lanes.  Neither the tile shape nor the path (weights decoded in registers for few tokens,
// into a panel of fp32 rows for many) changes that order, so a token's result has the same bits alone and
// in any batch.
#pragma once
#include "weights.h"

namespace mill {

constexpr int CHUNK = 32;        // output rows of one job
constexpr int PANEL_ROWS = 8;    // decoded rows kept in L1/L2 while all tokens pass
constexpr int DIRECT_TOKENS = 4; // up to here weights are decoded in registers

// Floats of one packed activation row.
constexpr int packed(int k) { return round_up(k, BLOCK); }
// Tokens whose packed activations stay in L2 (half a MiB).
constexpr int block_tokens(int k) { return max(8, min(64, 131072 / packed(k) / 8 * 8)); }
// Rows of the accumulator tile of `tokens`: kernels write whole register tiles.
constexpr int padded_tokens(int tokens) { return round_up(tokens, TILE); }

// k activations in the stream order of W, zero-padded to a whole block.
template <class W>
TM_INLINE void pack(float *dst, const float *src, int k) {
  for (int i = 0; i < k; i += BLOCK) {
    const vf a = load_n(src + i, k - i);
    const vf b = k - i > LANES ? load_n(src + i + LANES, k - i - LANES) : vf{};
    store(dst + i, W::INTERLEAVED ? evens(a, b) : a);
    store(dst + i + LANES, W::INTERLEAVED ? odds(a, b) : b);
  }
}

// y[t][r] = w[first + r] . x[t] for a ROWS x TOKENS tile; y has row pitch CHUNK.
// Rows past the end are computed from the last one, and ignored by the caller.
template <class W, int ROWS, int TOKENS>
TM_NOINLINE void dot_tile(const W &w, int first, const float *const *x, float *y) {
  const int blocks = w.k / BLOCK, tail = w.k % BLOCK;
  WeightRow rows[ROWS];
  vf acc[ROWS][TOKENS] = {};
  for (int r = 0; r < ROWS; r++) rows[r] = w.row(min(first + r, w.n - 1));
  for (int i = 0; i < blocks; i++) {
    for (int r = 0; r < ROWS; r++) {
      vf a, b;
      W::decode(rows[r], i, a, b);
      for (int t = 0; t < TOKENS; t++) acc[r][t] += a * load(x[t] + i * BLOCK);
      for (int t = 0; t < TOKENS; t++) acc[r][t] += b * load(x[t] + i * BLOCK + LANES);
    }
  }
  if (tail) {
    for (int r = 0; r < ROWS; r++) {
      vf a, b;
      decode_tail<W>(rows[r], blocks, tail, a, b);
      for (int t = 0; t < TOKENS; t++) acc[r][t] += a * load(x[t] + blocks * BLOCK);
      for (int t = 0; t < TOKENS; t++) acc[r][t] += b * load(x[t] + blocks * BLOCK + LANES);
    }
  }
  for (int t = 0; t < TOKENS; t++)
    for (int r = 0; r < ROWS; r += 4)
      *(v4_at *)(y + t * CHUNK + r) = sum4(acc[r][t], acc[r + 1][t], acc[r + 2][t], acc[r + 3][t]);
}

// Rows [first, first + PANEL_ROWS) as fp32, in stream order.
template <class W>
TM_NOINLINE void decode_panel(const W &w, int first, float *panel) {
  const int blocks = w.k / BLOCK, tail = w.k % BLOCK, pitch = packed(w.k);
  for (int r = 0; r < PANEL_ROWS; r++) {
    const WeightRow row = w.row(min(first + r, w.n - 1));
    float *out = panel + r * pitch;
    vf a, b;
    for (int i = 0; i < blocks; i++) {
      W::decode(row, i, a, b);
      store(out + i * BLOCK, a);
      store(out + i * BLOCK + LANES, b);
    }
    if (tail) {
      decode_tail<W>(row, blocks, tail, a, b);
      store(out + blocks * BLOCK, a);
      store(out + blocks * BLOCK + LANES, b);
    }
  }
}

// Up to TILE tokens from t on; the last one stands in for those that are missing.
TM_INLINE void token_tile(const float *const *x, int t, int tokens, const float **tile) {
  for (int i = 0; i < TILE; i++) tile[i] = x[min(t + i, tokens - 1)];
}

// y[t][r] = w[first + r] . x[t], r < count <= CHUNK, for `tokens` packed rows x[t].
// y holds padded_tokens(tokens) rows of CHUNK floats; panel holds PANEL_ROWS packed rows.
template <class W>
inline void matmul(const W &w, int first, int count, const float *const *x, int tokens, float *panel,
                   float *y) {
  const float *tile[TILE];
  if (tokens == 1) {
    for (int r = 0; r < count; r += 8) dot_tile<W, 8, 1>(w, first + r, x, y + r);
  } else if (tokens <= 2) {
    for (int r = 0; r < count; r += 4) dot_tile<W, 4, 2>(w, first + r, x, y + r);
  } else if (tokens <= DIRECT_TOKENS) {
    for (int t = 0; t < tokens; t += TILE) {
      token_tile(x, t, tokens, tile);
      for (int r = 0; r < count; r += 4) dot_tile<W, 4, TILE>(w, first + r, tile, y + t * CHUNK + r);
    }
  } else {
    const Fp32 rows{{panel, nullptr, PANEL_ROWS, packed(w.k)}};
    for (int p = 0; p < count; p += PANEL_ROWS) {
      decode_panel(w, first + p, panel);
      for (int t = 0; t < tokens; t += TILE) {
        token_tile(x, t, tokens, tile);
        for (int r = 0; r < PANEL_ROWS; r += 4)
          dot_tile<Fp32, 4, TILE>(rows, r, tile, y + t * CHUNK + p + r);
      }
    }
  }
  if constexpr (W::ROW_SCALE) {
    const float *scale = (const float *)w.scale + first;
    for (int t = 0; t < tokens; t++)
      for (int r = 0; r < count; r++) y[t * CHUNK + r] *= scale[r];
  }
}

}  // namespace mill
