// Products of panels of weights with activations, one summation order for every batch size.
//
// An output is one lane of one register tile: its inputs are added in order, whatever the number of
// tokens beside it, so a token's result has the same bits alone and in any batch.
#pragma once
#include "pool.h"
#include "tiles.h"
#include "weights.h"

namespace mill {

// y[t][0:16] = w[16 panel : 16 panel + 16] . x[t] for the first `tokens` of T packed rows.
template <class W, int T>
TM_NOINLINE void tile(const W &w, int panel, const uint8_t *const *x, int tokens, float *y, int pitch) {
  const int count = steps(w.k);
  const uint8_t *q = (const uint8_t *)w.q + (size_t)panel * count * W::STEP_BYTES;
  const void *scale = (const uint8_t *)w.scale + (size_t)panel * W::scales(w.k) * PANEL * W::SCALE_BYTES;
  vf sums[T][VECS] = {};
  if constexpr (W::INTEGER) {
    for (int step = 0; step < count; step++, q += W::STEP_BYTES) {
      vi acc[T][VECS];
      TM_UNROLL for (int t = 0; t < T; t++)
        for (int v = 0; v < VECS; v++) acc[t][v] = splat(W::Inputs::starts(x[t], w.k)[step]);
      for (int j = 0; j < STEP / 8; j++) {
        vi low[VECS], high[VECS];
        W::load(q, j, low, high);
        TM_UNROLL for (int t = 0; t < T; t++) {
          const int32_t *a = (const int32_t *)(x[t] + step * STEP + j * 8);
          for (int v = 0; v < VECS; v++) acc[t][v] = dot4<W::SMALL>(acc[t][v], low[v], a[0]);
        }
        TM_UNROLL for (int t = 0; t < T; t++) {
          const int32_t *a = (const int32_t *)(x[t] + step * STEP + j * 8);
          for (int v = 0; v < VECS; v++) acc[t][v] = dot4<W::SMALL>(acc[t][v], high[v], a[1]);
        }
      }
      for (int v = 0; v < VECS; v++) {
        const vf row_scale = W::STEP_SCALES ? W::scale_at(scale, step, v) : vf{};
        TM_UNROLL for (int t = 0; t < T; t++) {
          const float s = W::Inputs::scales(x[t], w.k)[step];
          sums[t][v] += to_float(acc[t][v]) * (W::STEP_SCALES ? row_scale * s : splat(s));
        }
      }
    }
    if constexpr (!W::STEP_SCALES)
      TM_UNROLL for (int t = 0; t < T; t++)
        for (int v = 0; v < VECS; v++) sums[t][v] *= W::scale_at(scale, 0, v);
  } else {
    Sums<T> halves = {};
    for (int step = 0; step < count; step++, q += W::STEP_BYTES)
      W::template multiply<T>(halves, q, scale, step, x);
    TM_UNROLL for (int t = 0; t < T; t++)
      for (int v = 0; v < VECS; v++) sums[t][v] = halves[0][t][v] + halves[1][t][v];
  }
  TM_UNROLL for (int t = 0; t < T; t++)
    if (t < tokens)
      for (int v = 0; v < VECS; v++) store(y + (size_t)t * pitch + v * LANES, sums[t][v]);
}

// The same for any number of tokens, in tiles of the sizes that tiles.h lists.  USUAL tokens are one tile if
// one holds them.
template <class W, int USUAL = 0>
TM_INLINE void product(const W &w, int panel, const uint8_t *const *x, int tokens, float *y, int pitch) {
  if constexpr (0 < USUAL && USUAL <= TILE_TOKENS)
    if (tokens == USUAL) return tile<W, USUAL>(w, panel, x, tokens, y, pitch);
  for (int t = 0; t < tokens; t += TILE_TOKENS) {
    const int n = min(TILE_TOKENS, tokens - t);
    const uint8_t *rows[TILE_TOKENS];
    for (int i = 0; i < TILE_TOKENS; i++) rows[i] = x[t + min(i, n - 1)];
    float *to = y + (size_t)t * pitch;
#define TM_TILE(T) \
  if (n <= T) {    \
    tile<W, T>(w, panel, rows, n, to, pitch); \
    continue;      \
  }
    TM_TILES(TM_TILE)
#undef TM_TILE
  }
}

// Tokens of one job, so many that their packed rows stay in the cache nearest to a core.
constexpr int block_tokens(size_t row_bytes) {
  return max(TILE_TOKENS, (int)(BLOCK_BYTES / row_bytes) / TILE_TOKENS * TILE_TOKENS);
}

// The rows of x, packed: by every thread for itself if they are few, else by all together.
template <class Inputs>
inline const uint8_t *pack_rows(Thread &th, Rows<float> x, int rows, int k, uint8_t *shared, uint8_t *local) {
  const bool alone = rows <= ALONE_TOKENS;
  uint8_t *to = alone ? local : shared;
  for (int t = alone ? 0 : th.share(rows, 0); t < (alone ? rows : th.share(rows, 1)); t++)
    Inputs::pack(to + t * Inputs::bytes(k), x[t], k);
  if (!alone) th.barrier();
  return to;
}

}  // namespace mill
