// Linear: a matrix product whose epilogue runs on the accumulators, weights read as they are packed.
#pragma once
#include "pool.h"
#include "matmul.h"

namespace mill {

// out[t, n] = acc0,  acc_p = w[p N + n, :] . x[t, :] + bias[p N + n]
// x [rows, 40], w [1 * 128, 40], out [rows, 128]
namespace linear_n128_k40_int8_bias {
constexpr int N = 128, K = 40, PARTS = 1, TOKENS = block_tokens(K);
using W = Int8;
constexpr size_t SHARED = 0;
constexpr size_t LOCAL =
    Scratch::sizes<float>(TOKENS * packed(K), PANEL_ROWS * packed(K), PARTS * TOKENS * CHUNK);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *q, const void *scale,
                     const void *bias, Rows<float> out) {
  const W weight{{q, scale, PARTS * N, K}};
  Scratch scratch{th.local};
  float *pack_at = scratch.take<float>(TOKENS * packed(K));
  float *panel = scratch.take<float>(PANEL_ROWS * packed(K));
  float *y0 = scratch.take<float>(TOKENS * CHUNK);
  const float *xs[TOKENS];
  for (int t = 0; t < TOKENS; t++) xs[t] = pack_at + t * packed(K);

  // A job is CHUNK output columns of one block of tokens; a thread packs a block when it meets it.
  const int chunks = ceil_div(N, CHUNK), jobs = ceil_div(rows, TOKENS) * chunks;
  int in_pack = -1;
  for (int job = th.first_job(); job < jobs; job = th.next_job()) {
    const int t0 = job / chunks * TOKENS, n0 = job % chunks * CHUNK;
    const int tokens = min(TOKENS, rows - t0), count = min(CHUNK, N - n0);
    if (in_pack != t0) {
      for (int t = 0; t < tokens; t++) pack<W>(pack_at + t * packed(K), x[t0 + t], K);
      in_pack = t0;
    }
    matmul(weight, 0 * N + n0, count, xs, tokens, panel, y0);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf bias0 = load_n((const float *)bias + 0 * N + n0 + i, count - i);
        const vf acc0 = load(y0 + t * CHUNK + i) + bias0;
        store_n(out[t0 + t] + n0 + i, acc0, count - i);
      }
  }
}
}  // namespace linear_n128_k40_int8_bias

// out[t, n] = acc0 + e0,  acc_p = w[p N + n, :] . x[t, :]
// x [rows, 64], w [1 * 40, 64], out [rows, 40]
namespace linear_n40_k64_bf16_fused {
constexpr int N = 40, K = 64, PARTS = 1, TOKENS = block_tokens(K);
using W = Bf16;
constexpr size_t SHARED = 0;
constexpr size_t LOCAL =
    Scratch::sizes<float>(TOKENS * packed(K), PANEL_ROWS * packed(K), PARTS * TOKENS * CHUNK);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *w, Rows<float> x0,
                     Rows<float> out) {
  const W weight{{w, nullptr, PARTS * N, K}};
  Scratch scratch{th.local};
  float *pack_at = scratch.take<float>(TOKENS * packed(K));
  float *panel = scratch.take<float>(PANEL_ROWS * packed(K));
  float *y0 = scratch.take<float>(TOKENS * CHUNK);
  const float *xs[TOKENS];
  for (int t = 0; t < TOKENS; t++) xs[t] = pack_at + t * packed(K);

  // A job is CHUNK output columns of one block of tokens; a thread packs a block when it meets it.
  const int chunks = ceil_div(N, CHUNK), jobs = ceil_div(rows, TOKENS) * chunks;
  int in_pack = -1;
  for (int job = th.first_job(); job < jobs; job = th.next_job()) {
    const int t0 = job / chunks * TOKENS, n0 = job % chunks * CHUNK;
    const int tokens = min(TOKENS, rows - t0), count = min(CHUNK, N - n0);
    if (in_pack != t0) {
      for (int t = 0; t < tokens; t++) pack<W>(pack_at + t * packed(K), x[t0 + t], K);
      in_pack = t0;
    }
    matmul(weight, 0 * N + n0, count, xs, tokens, panel, y0);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf acc0 = load(y0 + t * CHUNK + i);
        const vf e0 = load_n(x0[t0 + t] + n0 + i, count - i);
        store_n(out[t0 + t] + n0 + i, acc0 + e0, count - i);
      }
  }
}
}  // namespace linear_n40_k64_bf16_fused

// out[t, n] = acc0,  acc_p = w[p N + n, :] . x[t, :]
// x [rows, 40], w [1 * 60, 40], out [rows, 60]
namespace linear_n60_k40_fp8 {
constexpr int N = 60, K = 40, PARTS = 1, TOKENS = block_tokens(K);
using W = Fp8;
constexpr size_t SHARED = 0;
constexpr size_t LOCAL =
    Scratch::sizes<float>(TOKENS * packed(K), PANEL_ROWS * packed(K), PARTS * TOKENS * CHUNK);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *q, const void *scale,
                     Rows<float> out) {
  const W weight{{q, scale, PARTS * N, K}};
  Scratch scratch{th.local};
  float *pack_at = scratch.take<float>(TOKENS * packed(K));
  float *panel = scratch.take<float>(PANEL_ROWS * packed(K));
  float *y0 = scratch.take<float>(TOKENS * CHUNK);
  const float *xs[TOKENS];
  for (int t = 0; t < TOKENS; t++) xs[t] = pack_at + t * packed(K);

  // A job is CHUNK output columns of one block of tokens; a thread packs a block when it meets it.
  const int chunks = ceil_div(N, CHUNK), jobs = ceil_div(rows, TOKENS) * chunks;
  int in_pack = -1;
  for (int job = th.first_job(); job < jobs; job = th.next_job()) {
    const int t0 = job / chunks * TOKENS, n0 = job % chunks * CHUNK;
    const int tokens = min(TOKENS, rows - t0), count = min(CHUNK, N - n0);
    if (in_pack != t0) {
      for (int t = 0; t < tokens; t++) pack<W>(pack_at + t * packed(K), x[t0 + t], K);
      in_pack = t0;
    }
    matmul(weight, 0 * N + n0, count, xs, tokens, panel, y0);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf acc0 = load(y0 + t * CHUNK + i);
        store_n(out[t0 + t] + n0 + i, acc0, count - i);
      }
  }
}
}  // namespace linear_n60_k40_fp8

// out[t, n] = acc0,  acc_p = w[p N + n, :] . x[t, :]
// x [rows, 40], w [1 * 32, 40], out [rows, 32]
namespace linear_n32_k40_fp32 {
constexpr int N = 32, K = 40, PARTS = 1, TOKENS = block_tokens(K);
using W = Fp32;
constexpr size_t SHARED = 0;
constexpr size_t LOCAL =
    Scratch::sizes<float>(TOKENS * packed(K), PANEL_ROWS * packed(K), PARTS * TOKENS * CHUNK);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *w, Rows<float> out) {
  const W weight{{w, nullptr, PARTS * N, K}};
  Scratch scratch{th.local};
  float *pack_at = scratch.take<float>(TOKENS * packed(K));
  float *panel = scratch.take<float>(PANEL_ROWS * packed(K));
  float *y0 = scratch.take<float>(TOKENS * CHUNK);
  const float *xs[TOKENS];
  for (int t = 0; t < TOKENS; t++) xs[t] = pack_at + t * packed(K);

  // A job is CHUNK output columns of one block of tokens; a thread packs a block when it meets it.
  const int chunks = ceil_div(N, CHUNK), jobs = ceil_div(rows, TOKENS) * chunks;
  int in_pack = -1;
  for (int job = th.first_job(); job < jobs; job = th.next_job()) {
    const int t0 = job / chunks * TOKENS, n0 = job % chunks * CHUNK;
    const int tokens = min(TOKENS, rows - t0), count = min(CHUNK, N - n0);
    if (in_pack != t0) {
      for (int t = 0; t < tokens; t++) pack<W>(pack_at + t * packed(K), x[t0 + t], K);
      in_pack = t0;
    }
    matmul(weight, 0 * N + n0, count, xs, tokens, panel, y0);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf acc0 = load(y0 + t * CHUNK + i);
        store_n(out[t0 + t] + n0 + i, acc0, count - i);
      }
  }
}
}  // namespace linear_n32_k40_fp32

// out[t, n] = acc0,  acc_p = w[p N + n, :] . x[t, :]
// x [rows, 30], w [1 * 40, 30], out [rows, 40]
namespace linear_n40_k30_int4_g32 {
constexpr int N = 40, K = 30, PARTS = 1, TOKENS = block_tokens(K);
using W = Int4<32>;
constexpr size_t SHARED = 0;
constexpr size_t LOCAL =
    Scratch::sizes<float>(TOKENS * packed(K), PANEL_ROWS * packed(K), PARTS * TOKENS * CHUNK);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *q, const void *scale,
                     Rows<float> out) {
  const W weight{{q, scale, PARTS * N, K}};
  Scratch scratch{th.local};
  float *pack_at = scratch.take<float>(TOKENS * packed(K));
  float *panel = scratch.take<float>(PANEL_ROWS * packed(K));
  float *y0 = scratch.take<float>(TOKENS * CHUNK);
  const float *xs[TOKENS];
  for (int t = 0; t < TOKENS; t++) xs[t] = pack_at + t * packed(K);

  // A job is CHUNK output columns of one block of tokens; a thread packs a block when it meets it.
  const int chunks = ceil_div(N, CHUNK), jobs = ceil_div(rows, TOKENS) * chunks;
  int in_pack = -1;
  for (int job = th.first_job(); job < jobs; job = th.next_job()) {
    const int t0 = job / chunks * TOKENS, n0 = job % chunks * CHUNK;
    const int tokens = min(TOKENS, rows - t0), count = min(CHUNK, N - n0);
    if (in_pack != t0) {
      for (int t = 0; t < tokens; t++) pack<W>(pack_at + t * packed(K), x[t0 + t], K);
      in_pack = t0;
    }
    matmul(weight, 0 * N + n0, count, xs, tokens, panel, y0);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf acc0 = load(y0 + t * CHUNK + i);
        store_n(out[t0 + t] + n0 + i, acc0, count - i);
      }
  }
}
}  // namespace linear_n40_k30_int4_g32

// out[t, n] = acc0,  acc_p = w[p N + n, :] . x[t, :]
// x [rows, 40], w [1 * 6, 40], out [rows, 6]
namespace linear_n6_k40_fp32 {
constexpr int N = 6, K = 40, PARTS = 1, TOKENS = block_tokens(K);
using W = Fp32;
constexpr size_t SHARED = 0;
constexpr size_t LOCAL =
    Scratch::sizes<float>(TOKENS * packed(K), PANEL_ROWS * packed(K), PARTS * TOKENS * CHUNK);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *w, Rows<float> out) {
  const W weight{{w, nullptr, PARTS * N, K}};
  Scratch scratch{th.local};
  float *pack_at = scratch.take<float>(TOKENS * packed(K));
  float *panel = scratch.take<float>(PANEL_ROWS * packed(K));
  float *y0 = scratch.take<float>(TOKENS * CHUNK);
  const float *xs[TOKENS];
  for (int t = 0; t < TOKENS; t++) xs[t] = pack_at + t * packed(K);

  // A job is CHUNK output columns of one block of tokens; a thread packs a block when it meets it.
  const int chunks = ceil_div(N, CHUNK), jobs = ceil_div(rows, TOKENS) * chunks;
  int in_pack = -1;
  for (int job = th.first_job(); job < jobs; job = th.next_job()) {
    const int t0 = job / chunks * TOKENS, n0 = job % chunks * CHUNK;
    const int tokens = min(TOKENS, rows - t0), count = min(CHUNK, N - n0);
    if (in_pack != t0) {
      for (int t = 0; t < tokens; t++) pack<W>(pack_at + t * packed(K), x[t0 + t], K);
      in_pack = t0;
    }
    matmul(weight, 0 * N + n0, count, xs, tokens, panel, y0);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf acc0 = load(y0 + t * CHUNK + i);
        store_n(out[t0 + t] + n0 + i, acc0, count - i);
      }
  }
}
}  // namespace linear_n6_k40_fp32

// out[t, n] = acc0,  acc_p = w[p N + n, :] . x[t, :]
// x [rows, 40], w [1 * 50, 40], out [rows, 50]
namespace linear_n50_k40_int8 {
constexpr int N = 50, K = 40, PARTS = 1, TOKENS = block_tokens(K);
using W = Int8;
constexpr size_t SHARED = 0;
constexpr size_t LOCAL =
    Scratch::sizes<float>(TOKENS * packed(K), PANEL_ROWS * packed(K), PARTS * TOKENS * CHUNK);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *q, const void *scale,
                     Rows<float> out) {
  const W weight{{q, scale, PARTS * N, K}};
  Scratch scratch{th.local};
  float *pack_at = scratch.take<float>(TOKENS * packed(K));
  float *panel = scratch.take<float>(PANEL_ROWS * packed(K));
  float *y0 = scratch.take<float>(TOKENS * CHUNK);
  const float *xs[TOKENS];
  for (int t = 0; t < TOKENS; t++) xs[t] = pack_at + t * packed(K);

  // A job is CHUNK output columns of one block of tokens; a thread packs a block when it meets it.
  const int chunks = ceil_div(N, CHUNK), jobs = ceil_div(rows, TOKENS) * chunks;
  int in_pack = -1;
  for (int job = th.first_job(); job < jobs; job = th.next_job()) {
    const int t0 = job / chunks * TOKENS, n0 = job % chunks * CHUNK;
    const int tokens = min(TOKENS, rows - t0), count = min(CHUNK, N - n0);
    if (in_pack != t0) {
      for (int t = 0; t < tokens; t++) pack<W>(pack_at + t * packed(K), x[t0 + t], K);
      in_pack = t0;
    }
    matmul(weight, 0 * N + n0, count, xs, tokens, panel, y0);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf acc0 = load(y0 + t * CHUNK + i);
        store_n(out[t0 + t] + n0 + i, acc0, count - i);
      }
  }
}
}  // namespace linear_n50_k40_int8

}  // namespace mill
