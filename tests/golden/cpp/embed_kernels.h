// Embed: one row of a table per token.
#pragma once
#include "pool.h"
#include "simd.h"

namespace mill {

// out[t] = table[index[t]] * scale[index[t]],  table [50, 40]
namespace embed_v50_w40_int8 {
constexpr int WIDTH = 40;
constexpr size_t SHARED = 0, LOCAL = 0;

TM_NOINLINE void run(Thread &th, int rows, const int32_t *index, const void *q, const void *scale,
                     Rows<float> out) {
  for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
    widen(out[r], (const int8_t *)q + (size_t)index[r] * WIDTH, WIDTH, ((const float *)scale)[index[r]]);
}
}  // namespace embed_v50_w40_int8

// out[t] = table[index[t]],  table [256, 4]
namespace embed_v256_w4_fp32 {
constexpr int WIDTH = 4;
constexpr size_t SHARED = 0, LOCAL = 0;

TM_NOINLINE void run(Thread &th, int rows, const int32_t *index, const void *w, Rows<float> out) {
  for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
    widen(out[r], (const float *)w + (size_t)index[r] * WIDTH, WIDTH);
}
}  // namespace embed_v256_w4_fp32

}  // namespace mill
