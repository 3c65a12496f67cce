// Linear: a matrix product whose epilogue runs on the accumulators, weights read as they are packed.
#pragma once
#include "pool.h"
#include "matmul.h"

namespace mill {

// out[t, n] = acc0,  acc_p = w[p N + n, :] . x[t, :] + bias[p N + n]
// x [rows, 40], w [1 * 128, 40], out [rows, 128]
namespace linear_n128_k40_int8_bias {
constexpr int N = 128, K = 40, PARTS = 1, PANELS = panels(N);
using W = Int8;
using Inputs = W::Inputs;
constexpr size_t ROW = Inputs::bytes(K);
constexpr int TOKENS = block_tokens(ROW);
constexpr size_t SHARED = Scratch::sizes<uint8_t>(MAX_ROWS * ROW);
constexpr size_t LOCAL = Scratch::sizes<uint8_t>(ALONE_TOKENS * ROW) +
                         PARTS * Scratch::sizes<float>(TOKENS * PANEL);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *q, const void *scale,
                     const void *bias, Rows<float> out) {
  const W weight{{q, scale, PARTS * N, K}};
  Scratch shared{th.shared}, scratch{th.local};
  uint8_t *together = shared.take<uint8_t>(MAX_ROWS * ROW);
  uint8_t *alone = scratch.take<uint8_t>(ALONE_TOKENS * ROW);
  float *y0 = scratch.take<float>(TOKENS * PANEL);
  const uint8_t *packed = pack_rows<Inputs>(th, x, rows, K, together, alone);

  // A job is one panel of output columns for one block of tokens.
  const int blocks = ceil_div(rows, TOKENS);
  for (Jobs jobs(th, blocks * PANELS); jobs.next();) {
    const int t0 = jobs.at / PANELS * TOKENS, tokens = min(TOKENS, rows - t0);
    const int panel = jobs.at % PANELS, n0 = panel * PANEL, count = min(PANEL, N - n0);
    const uint8_t *xs[TOKENS];
    for (int t = 0; t < tokens; t++) xs[t] = packed + (t0 + t) * ROW;
    product(weight, PARTS * panel + 0, xs, tokens, y0, PANEL);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf bias0 = load_n((const float *)bias + 0 * N + n0 + i, count - i);
        const vf acc0 = load(y0 + t * PANEL + i) + bias0;
        store_n(out[t0 + t] + n0 + i, acc0, count - i);
      }
  }
}
}  // namespace linear_n128_k40_int8_bias

// out[t, n] = acc0 + e0,  acc_p = w[p N + n, :] . x[t, :]
// x [rows, 64], w [1 * 40, 64], out [rows, 40]
namespace linear_n40_k64_bf16_fused {
constexpr int N = 40, K = 64, PARTS = 1, PANELS = panels(N);
using W = Bf16;
using Inputs = W::Inputs;
constexpr size_t ROW = Inputs::bytes(K);
constexpr int TOKENS = block_tokens(ROW);
constexpr size_t SHARED = Scratch::sizes<uint8_t>(MAX_ROWS * ROW);
constexpr size_t LOCAL = Scratch::sizes<uint8_t>(ALONE_TOKENS * ROW) +
                         PARTS * Scratch::sizes<float>(TOKENS * PANEL);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *w, Rows<float> x0,
                     Rows<float> out) {
  const W weight{{w, nullptr, PARTS * N, K}};
  Scratch shared{th.shared}, scratch{th.local};
  uint8_t *together = shared.take<uint8_t>(MAX_ROWS * ROW);
  uint8_t *alone = scratch.take<uint8_t>(ALONE_TOKENS * ROW);
  float *y0 = scratch.take<float>(TOKENS * PANEL);
  const uint8_t *packed = pack_rows<Inputs>(th, x, rows, K, together, alone);

  // A job is one panel of output columns for one block of tokens.
  const int blocks = ceil_div(rows, TOKENS);
  for (Jobs jobs(th, blocks * PANELS); jobs.next();) {
    const int t0 = jobs.at / PANELS * TOKENS, tokens = min(TOKENS, rows - t0);
    const int panel = jobs.at % PANELS, n0 = panel * PANEL, count = min(PANEL, N - n0);
    const uint8_t *xs[TOKENS];
    for (int t = 0; t < tokens; t++) xs[t] = packed + (t0 + t) * ROW;
    product(weight, PARTS * panel + 0, xs, tokens, y0, PANEL);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf acc0 = load(y0 + t * PANEL + i);
        const vf e0 = load_n(x0[t0 + t] + n0 + i, count - i);
        store_n(out[t0 + t] + n0 + i, acc0 + e0, count - i);
      }
  }
}
}  // namespace linear_n40_k64_bf16_fused

// out[t, n] = acc0,  acc_p = w[p N + n, :] . x[t, :]
// x [rows, 40], w [1 * 60, 40], out [rows, 60]
namespace linear_n60_k40_fp8 {
constexpr int N = 60, K = 40, PARTS = 1, PANELS = panels(N);
using W = Fp8;
using Inputs = W::Inputs;
constexpr size_t ROW = Inputs::bytes(K);
constexpr int TOKENS = block_tokens(ROW);
constexpr size_t SHARED = Scratch::sizes<uint8_t>(MAX_ROWS * ROW);
constexpr size_t LOCAL = Scratch::sizes<uint8_t>(ALONE_TOKENS * ROW) +
                         PARTS * Scratch::sizes<float>(TOKENS * PANEL);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *q, const void *scale,
                     Rows<float> out) {
  const W weight{{q, scale, PARTS * N, K}};
  Scratch shared{th.shared}, scratch{th.local};
  uint8_t *together = shared.take<uint8_t>(MAX_ROWS * ROW);
  uint8_t *alone = scratch.take<uint8_t>(ALONE_TOKENS * ROW);
  float *y0 = scratch.take<float>(TOKENS * PANEL);
  const uint8_t *packed = pack_rows<Inputs>(th, x, rows, K, together, alone);

  // A job is one panel of output columns for one block of tokens.
  const int blocks = ceil_div(rows, TOKENS);
  for (Jobs jobs(th, blocks * PANELS); jobs.next();) {
    const int t0 = jobs.at / PANELS * TOKENS, tokens = min(TOKENS, rows - t0);
    const int panel = jobs.at % PANELS, n0 = panel * PANEL, count = min(PANEL, N - n0);
    const uint8_t *xs[TOKENS];
    for (int t = 0; t < tokens; t++) xs[t] = packed + (t0 + t) * ROW;
    product(weight, PARTS * panel + 0, xs, tokens, y0, PANEL);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf acc0 = load(y0 + t * PANEL + i);
        store_n(out[t0 + t] + n0 + i, acc0, count - i);
      }
  }
}
}  // namespace linear_n60_k40_fp8

// out[t, n] = acc0,  acc_p = w[p N + n, :] . x[t, :]
// x [rows, 40], w [1 * 32, 40], out [rows, 32]
namespace linear_n32_k40_fp32 {
constexpr int N = 32, K = 40, PARTS = 1, PANELS = panels(N);
using W = Fp32;
using Inputs = W::Inputs;
constexpr size_t ROW = Inputs::bytes(K);
constexpr int TOKENS = block_tokens(ROW);
constexpr size_t SHARED = Scratch::sizes<uint8_t>(MAX_ROWS * ROW);
constexpr size_t LOCAL = Scratch::sizes<uint8_t>(ALONE_TOKENS * ROW) +
                         PARTS * Scratch::sizes<float>(TOKENS * PANEL);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *w, Rows<float> out) {
  const W weight{{w, nullptr, PARTS * N, K}};
  Scratch shared{th.shared}, scratch{th.local};
  uint8_t *together = shared.take<uint8_t>(MAX_ROWS * ROW);
  uint8_t *alone = scratch.take<uint8_t>(ALONE_TOKENS * ROW);
  float *y0 = scratch.take<float>(TOKENS * PANEL);
  const uint8_t *packed = pack_rows<Inputs>(th, x, rows, K, together, alone);

  // A job is one panel of output columns for one block of tokens.
  const int blocks = ceil_div(rows, TOKENS);
  for (Jobs jobs(th, blocks * PANELS); jobs.next();) {
    const int t0 = jobs.at / PANELS * TOKENS, tokens = min(TOKENS, rows - t0);
    const int panel = jobs.at % PANELS, n0 = panel * PANEL, count = min(PANEL, N - n0);
    const uint8_t *xs[TOKENS];
    for (int t = 0; t < tokens; t++) xs[t] = packed + (t0 + t) * ROW;
    product(weight, PARTS * panel + 0, xs, tokens, y0, PANEL);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf acc0 = load(y0 + t * PANEL + i);
        store_n(out[t0 + t] + n0 + i, acc0, count - i);
      }
  }
}
}  // namespace linear_n32_k40_fp32

// out[t, n] = acc0,  acc_p = w[p N + n, :] . x[t, :]
// x [rows, 30], w [1 * 40, 30], out [rows, 40]
namespace linear_n40_k30_int4_g32 {
constexpr int N = 40, K = 30, PARTS = 1, PANELS = panels(N);
using W = Int4<32>;
using Inputs = W::Inputs;
constexpr size_t ROW = Inputs::bytes(K);
constexpr int TOKENS = block_tokens(ROW);
constexpr size_t SHARED = Scratch::sizes<uint8_t>(MAX_ROWS * ROW);
constexpr size_t LOCAL = Scratch::sizes<uint8_t>(ALONE_TOKENS * ROW) +
                         PARTS * Scratch::sizes<float>(TOKENS * PANEL);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *q, const void *scale,
                     Rows<float> out) {
  const W weight{{q, scale, PARTS * N, K}};
  Scratch shared{th.shared}, scratch{th.local};
  uint8_t *together = shared.take<uint8_t>(MAX_ROWS * ROW);
  uint8_t *alone = scratch.take<uint8_t>(ALONE_TOKENS * ROW);
  float *y0 = scratch.take<float>(TOKENS * PANEL);
  const uint8_t *packed = pack_rows<Inputs>(th, x, rows, K, together, alone);

  // A job is one panel of output columns for one block of tokens.
  const int blocks = ceil_div(rows, TOKENS);
  for (Jobs jobs(th, blocks * PANELS); jobs.next();) {
    const int t0 = jobs.at / PANELS * TOKENS, tokens = min(TOKENS, rows - t0);
    const int panel = jobs.at % PANELS, n0 = panel * PANEL, count = min(PANEL, N - n0);
    const uint8_t *xs[TOKENS];
    for (int t = 0; t < tokens; t++) xs[t] = packed + (t0 + t) * ROW;
    product(weight, PARTS * panel + 0, xs, tokens, y0, PANEL);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf acc0 = load(y0 + t * PANEL + i);
        store_n(out[t0 + t] + n0 + i, acc0, count - i);
      }
  }
}
}  // namespace linear_n40_k30_int4_g32

// out[t, n] = acc0,  acc_p = w[p N + n, :] . x[t, :]
// x [rows, 40], w [1 * 6, 40], out [rows, 6]
namespace linear_n6_k40_fp32 {
constexpr int N = 6, K = 40, PARTS = 1, PANELS = panels(N);
using W = Fp32;
using Inputs = W::Inputs;
constexpr size_t ROW = Inputs::bytes(K);
constexpr int TOKENS = block_tokens(ROW);
constexpr size_t SHARED = Scratch::sizes<uint8_t>(MAX_ROWS * ROW);
constexpr size_t LOCAL = Scratch::sizes<uint8_t>(ALONE_TOKENS * ROW) +
                         PARTS * Scratch::sizes<float>(TOKENS * PANEL);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *w, Rows<float> out) {
  const W weight{{w, nullptr, PARTS * N, K}};
  Scratch shared{th.shared}, scratch{th.local};
  uint8_t *together = shared.take<uint8_t>(MAX_ROWS * ROW);
  uint8_t *alone = scratch.take<uint8_t>(ALONE_TOKENS * ROW);
  float *y0 = scratch.take<float>(TOKENS * PANEL);
  const uint8_t *packed = pack_rows<Inputs>(th, x, rows, K, together, alone);

  // A job is one panel of output columns for one block of tokens.
  const int blocks = ceil_div(rows, TOKENS);
  for (Jobs jobs(th, blocks * PANELS); jobs.next();) {
    const int t0 = jobs.at / PANELS * TOKENS, tokens = min(TOKENS, rows - t0);
    const int panel = jobs.at % PANELS, n0 = panel * PANEL, count = min(PANEL, N - n0);
    const uint8_t *xs[TOKENS];
    for (int t = 0; t < tokens; t++) xs[t] = packed + (t0 + t) * ROW;
    product(weight, PARTS * panel + 0, xs, tokens, y0, PANEL);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf acc0 = load(y0 + t * PANEL + i);
        store_n(out[t0 + t] + n0 + i, acc0, count - i);
      }
  }
}
}  // namespace linear_n6_k40_fp32

// out[t, n] = acc0,  acc_p = w[p N + n, :] . x[t, :]
// x [rows, 40], w [1 * 50, 40], out [rows, 50]
namespace linear_n50_k40_int8 {
constexpr int N = 50, K = 40, PARTS = 1, PANELS = panels(N);
using W = Int8;
using Inputs = W::Inputs;
constexpr size_t ROW = Inputs::bytes(K);
constexpr int TOKENS = block_tokens(ROW);
constexpr size_t SHARED = Scratch::sizes<uint8_t>(MAX_ROWS * ROW);
constexpr size_t LOCAL = Scratch::sizes<uint8_t>(ALONE_TOKENS * ROW) +
                         PARTS * Scratch::sizes<float>(TOKENS * PANEL);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const void *q, const void *scale,
                     Rows<float> out) {
  const W weight{{q, scale, PARTS * N, K}};
  Scratch shared{th.shared}, scratch{th.local};
  uint8_t *together = shared.take<uint8_t>(MAX_ROWS * ROW);
  uint8_t *alone = scratch.take<uint8_t>(ALONE_TOKENS * ROW);
  float *y0 = scratch.take<float>(TOKENS * PANEL);
  const uint8_t *packed = pack_rows<Inputs>(th, x, rows, K, together, alone);

  // A job is one panel of output columns for one block of tokens.
  const int blocks = ceil_div(rows, TOKENS);
  for (Jobs jobs(th, blocks * PANELS); jobs.next();) {
    const int t0 = jobs.at / PANELS * TOKENS, tokens = min(TOKENS, rows - t0);
    const int panel = jobs.at % PANELS, n0 = panel * PANEL, count = min(PANEL, N - n0);
    const uint8_t *xs[TOKENS];
    for (int t = 0; t < tokens; t++) xs[t] = packed + (t0 + t) * ROW;
    product(weight, PARTS * panel + 0, xs, tokens, y0, PANEL);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        const vf acc0 = load(y0 + t * PANEL + i);
        store_n(out[t0 + t] + n0 + i, acc0, count - i);
      }
  }
}
}  // namespace linear_n50_k40_int8

}  // namespace mill
