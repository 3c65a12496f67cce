// Chain: kernels that work on every token by itself; they share out tokens alike, so no barrier parts them.
#pragma once
#include "pool.h"
#include "cache.h"

namespace mill {

namespace rope_and_rope_norm_cache_write {
constexpr size_t SHARED = 0, LOCAL = 0;

// (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (2i, 2i + 1) of columns
// 12 + [0, 8) of each head
namespace rope_0 {
constexpr int HEADS = 3, DIM = 20, OFFSET = 12, ROTARY = 8, HALF = ROTARY / 2;
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
      for (int i = 0; i < HALF; i++) {
        const float a = from[2 * i], b = from[2 * i + 1], c = cos[r][i], s = sin[r][i];
        to[2 * i] = a * c - b * s;
        to[2 * i + 1] = b * c + a * s;
      }
    }
}
}  // namespace rope_0

// (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (2i, 2i + 1) of columns
// 0 + [0, 8) of each head
namespace rope_1 {
constexpr int HEADS = 1, DIM = 8, OFFSET = 0, ROTARY = 8, HALF = ROTARY / 2;
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
      for (int i = 0; i < HALF; i++) {
        const float a = from[2 * i], b = from[2 * i + 1], c = cos[r][i], s = sin[r][i];
        to[2 * i] = a * c - b * s;
        to[2 * i + 1] = b * c + a * s;
      }
    }
}
}  // namespace rope_1

// out = x / rms(x) * weight,  per row and head of [rows, 1, 24]
namespace norm_2 {
constexpr int HEADS = 1, WIDTH = 24;
constexpr float EPS = 1e-06f;
constexpr size_t SHARED = 0, LOCAL = 0;

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *weight, Rows<float> out) {
  for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
    for (int h = 0; h < HEADS; h++) {
      float *kept = x[r] + h * WIDTH;
      vf squares = {};
      for (int i = 0; i < WIDTH; i += LANES) {
        const vf v = load_n(kept + i, WIDTH - i);
        squares += v * v;
      }
      const float scale = 1.0f / __builtin_sqrtf(mill::sum(squares) / WIDTH + EPS);
      for (int i = 0; i < WIDTH; i += LANES) {
        const vf v = load_n(kept + i, WIDTH - i);
        const vf w = load_n((const float *)weight + i, WIDTH - i);
        store_n(out[r] + h * WIDTH + i, v * scale * w, WIDTH - i);
      }
    }
}
}  // namespace norm_2

// cache[block_table[b, p / 64], p % 64] = latent [24], rope [8] of token t, at position p of sequence b
namespace cache_write_3 {
constexpr int ROW_BYTES = 48;
constexpr size_t SHARED = 0, LOCAL = 0;

TM_NOINLINE void run(Thread &th, int rows, Rows<float> p0, Rows<float> p1, void *cache) {
  const tm_args &a = *th.args;
  int b = 0;
  for (int t = th.share(rows, 0); t < th.share(rows, 1); t++) {
    b = sequence_of(a.starts, t, b);
    uint8_t *row = cache_row(a, cache, ROW_BYTES, b, a.positions[t]);
    Span<CacheFp8>{0, 24, 128, 40}.encode(row, p0[t]);
    Span<CacheBf16>{24, 8, 128, 0}.encode(row, p1[t]);
  }
}
}  // namespace cache_write_3
TM_NOINLINE void run(Thread &th, int rows, Rows<float> x_0, Rows<float> cos_0, Rows<float> sin_0,
                     Rows<float> out_0, Rows<float> x_1, Rows<float> cos_1, Rows<float> sin_1,
                     Rows<float> out_1, Rows<float> x_2, const void *weight_2, Rows<float> out_2,
                     Rows<float> p0_3, Rows<float> p1_3, void *cache_3) {
  rope_0::run(th, rows, x_0, cos_0, sin_0, out_0);
  rope_1::run(th, rows, x_1, cos_1, sin_1, out_1);
  norm_2::run(th, rows, x_2, weight_2, out_2);
  cache_write_3::run(th, rows, p0_3, p1_3, cache_3);
}
}  // namespace rope_and_rope_norm_cache_write

}  // namespace mill
