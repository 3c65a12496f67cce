// Rope: rotate pairs of columns of each head; the rest of the head is copied.
#pragma once
#include "pool.h"
#include "simd.h"

namespace mill {

// (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + 4) of columns
// 0 + [0, 8) of each head
namespace rope_half_h4_d16_r8 {
constexpr int HEADS = 4, DIM = 16, OFFSET = 0, ROTARY = 8, HALF = ROTARY / 2;
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
      for (int i = 0; i < HALF; i += LANES) {
        const int n = HALF - i;
        const vf a = load_n(from + i, n), b = load_n(from + HALF + i, n);
        const vf c = load_n(cos[r] + i, n), s = load_n(sin[r] + i, n);
        store_n(to + i, a * c - b * s, n);
        store_n(to + HALF + i, b * c + a * s, n);
      }
    }
}
}  // namespace rope_half_h4_d16_r8

// (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + 4) of columns
// 0 + [0, 8) of each head
namespace rope_half_h2_d16_r8 {
constexpr int HEADS = 2, DIM = 16, OFFSET = 0, ROTARY = 8, HALF = ROTARY / 2;
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
      for (int i = 0; i < HALF; i += LANES) {
        const int n = HALF - i;
        const vf a = load_n(from + i, n), b = load_n(from + HALF + i, n);
        const vf c = load_n(cos[r] + i, n), s = load_n(sin[r] + i, n);
        store_n(to + i, a * c - b * s, n);
        store_n(to + HALF + i, b * c + a * s, n);
      }
    }
}
}  // namespace rope_half_h2_d16_r8

}  // namespace mill
