// Norm: RMS norm or layer norm per row and head, with the residual sum that precedes it.
#pragma once
#include "pool.h"
#include "simd.h"

namespace mill {

// out = x / rms(x) * weight,  per row and head of [rows, 1, 40]
namespace rms_norm_w40 {
constexpr int HEADS = 1, WIDTH = 40;
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
}  // namespace rms_norm_w40

// out = (x + residual) / rms(x + residual) * weight,  per row and head of [rows, 1, 40]
namespace rms_norm_w40_residual {
constexpr int HEADS = 1, WIDTH = 40;
constexpr float EPS = 1e-06f;
constexpr size_t SHARED = 0, LOCAL = 0;

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, Rows<float> residual, const void *weight,
                     Rows<float> sum, Rows<float> out) {
  for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
    for (int h = 0; h < HEADS; h++) {
      float *kept = sum[r] + h * WIDTH;
      const float *a = x[r] + h * WIDTH, *b = residual[r] + h * WIDTH;
      for (int i = 0; i < WIDTH; i += LANES)
        store_n(kept + i, load_n(a + i, WIDTH - i) + load_n(b + i, WIDTH - i), WIDTH - i);
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
}  // namespace rms_norm_w40_residual

// out = (x - mean) / std * weight + bias,  per row and head of [rows, 1, 40]
namespace layer_norm_w40 {
constexpr int HEADS = 1, WIDTH = 40;
constexpr float EPS = 1e-06f;
constexpr size_t SHARED = 0, LOCAL = 0;

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *weight, const void *bias,
                     Rows<float> out) {
  for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
    for (int h = 0; h < HEADS; h++) {
      float *kept = x[r] + h * WIDTH;
      vf total = {};
      for (int i = 0; i < WIDTH; i += LANES) total += load_n(kept + i, WIDTH - i);
      const float mean = mill::sum(total) / WIDTH;
      vf squares = {};
      for (int i = 0; i < WIDTH; i += LANES) {
        const vf v = load_n(kept + i, WIDTH - i);
        const vf centered = select(iota() + (float)i < (float)WIDTH, v - mean, vf{});
        squares += centered * centered;
      }
      const float scale = 1.0f / __builtin_sqrtf(mill::sum(squares) / WIDTH + EPS);
      for (int i = 0; i < WIDTH; i += LANES) {
        const vf v = load_n(kept + i, WIDTH - i) - mean;
        const vf w = load_n((const float *)weight + i, WIDTH - i);
        const vf b = load_n((const float *)bias + i, WIDTH - i);
        store_n(out[r] + h * WIDTH + i, v * scale * w + b, WIDTH - i);
      }
    }
}
}  // namespace layer_norm_w40

}  // namespace mill
