// Experts: tokens grouped by expert, two products, the activation between, a race-free sum.
#pragma once
#include "pool.h"
#include "matmul.h"

namespace mill {

// out[t] = residual[t] + sum_j weights[t, j] down_e(act(gate_up_e(x[t]))),  e = ids[t, j]
// act = silu(acc0) * acc1
// x, out [rows, 40], gate_up [6, 2 * 24, 40], down [6, 40, 24]
//
// 1. pack the tokens' activations, sort (token, choice) pairs by expert;
// 2. per active expert and step of inner columns: gate/up product, activation, packed for step 3;
// 3. per group of output panels: for active experts in rising order, down product, weighted sum.
// A job of step 3 owns its columns of all tokens, so sums need no atomics and have one order.
namespace experts_e6_top2_h40_i24_int4_g32_fp8 {
constexpr int EXPERTS = 6, TOP_K = 2, SLOTS = MAX_ROWS * TOP_K;
constexpr int HIDDEN = 40, INTER = 24, PARTS = 2;
constexpr int INNER_PANELS = panels(INTER), PANELS = panels(HIDDEN);
using Up = Int4<32>;
using Down = Fp8;
constexpr size_t ROW = Up::Inputs::bytes(HIDDEN), INNER_ROW = Down::Inputs::bytes(INTER);
constexpr int TOKENS = block_tokens(ROW > INNER_ROW ? ROW : INNER_ROW);
constexpr size_t SHARED = Scratch::sizes<uint8_t>(MAX_ROWS * ROW, SLOTS * INNER_ROW) +
                          Scratch::sizes<int32_t>(SLOTS, EXPERTS + 1, EXPERTS + 1);
constexpr size_t LOCAL = PARTS * Scratch::sizes<float>(TOKENS * STEP) + Scratch::sizes<int32_t>(EXPERTS);

// Counting sort: the pairs[begin[e] : begin[e + 1]] chose expert e.  active[0] experts have any;
// active[1:] lists them.
inline void sort_by_expert(int rows, Rows<int32_t> ids, int32_t *pairs, int32_t *begin,
                           int32_t *active, int32_t *next) {
  memset(begin, 0, (EXPERTS + 1) * sizeof(int32_t));
  for (int t = 0; t < rows; t++)
    for (int j = 0; j < TOP_K; j++) begin[ids[t][j] + 1]++;
  active[0] = 0;
  for (int e = 0; e < EXPERTS; e++) {
    if (begin[e + 1]) active[++active[0]] = e;
    next[e] = begin[e];
    begin[e + 1] += begin[e];
  }
  for (int t = 0; t < rows; t++)
    for (int j = 0; j < TOP_K; j++) pairs[next[ids[t][j]]++] = t * TOP_K + j;
}

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, Rows<int32_t> ids, Rows<float> weights,
                     const void *up_q, const void *up_scale, const void *down_q,
                     const void *down_scale, Rows<float> residual, Rows<float> out) {
  Scratch shared{th.shared}, scratch{th.local};
  uint8_t *packed = shared.take<uint8_t>(MAX_ROWS * ROW);
  uint8_t *inner = shared.take<uint8_t>(SLOTS * INNER_ROW);
  int32_t *pairs = shared.take<int32_t>(SLOTS);
  int32_t *begin = shared.take<int32_t>(EXPERTS + 1);
  int32_t *active = shared.take<int32_t>(EXPERTS + 1);
  float *y0 = scratch.take<float>(TOKENS * STEP);
  float *y1 = scratch.take<float>(TOKENS * STEP);
  int32_t *next = scratch.take<int32_t>(EXPERTS);

  if (th.id == 0) sort_by_expert(rows, ids, pairs, begin, active, next);
  for (int t = th.share(rows, 0); t < th.share(rows, 1); t++)
    Up::Inputs::pack(packed + t * ROW, x[t], HIDDEN);
  th.barrier();

  const int inner_steps = steps(INTER);
  for (Jobs jobs(th, active[0] * inner_steps); jobs.next();) {
    const int e = active[1 + jobs.at / inner_steps], step = jobs.at % inner_steps;
    const int count = min(STEP, INTER - step * STEP);
    const Up w{expert_weight<Up>(up_q, up_scale, PARTS * INNER_PANELS, PARTS * INTER, HIDDEN, e)};
    for (int s0 = begin[e]; s0 < begin[e + 1]; s0 += TOKENS) {
      const int tokens = min(TOKENS, begin[e + 1] - s0);
      const uint8_t *xs[TOKENS];
      for (int t = 0; t < tokens; t++) xs[t] = packed + pairs[s0 + t] / TOP_K * ROW;
      for (int half = 0; half * PANEL < count; half++) {
        const int panel = step * (STEP / PANEL) + half;
        product(w, PARTS * panel + 0, xs, tokens, y0 + half * PANEL, STEP);
        product(w, PARTS * panel + 1, xs, tokens, y1 + half * PANEL, STEP);
      }
      for (int t = 0; t < tokens; t++) {
        alignas(64) float value[STEP];
        for (int i = 0; i < count; i += LANES) {
          const vf acc0 = load(y0 + t * STEP + i);
          const vf acc1 = load(y1 + t * STEP + i);
          store(value + i, silu(acc0) * acc1);
        }
        Down::Inputs::pack_step(inner + (s0 + t) * INNER_ROW, INTER, step, value, count);
      }
    }
  }
  th.barrier();

  // Four panels at a time, so that an expert's inner activations serve more than one; fewer where
  // threads would go idle.
  const int group = max(1, min(4, PANELS / (2 * th.count)));
  for (Jobs jobs(th, rows ? ceil_div(PANELS, group) : 0); jobs.next();) {
    const int first = jobs.at * group, last = min(first + group, PANELS);
    const int n0 = first * PANEL, width = min(last * PANEL, HIDDEN) - n0;
    for (int t = 0; t < rows; t++)
      for (int i = 0; i < width; i += LANES)
        store_n(out[t] + n0 + i, load_n(residual[t] + n0 + i, width - i), width - i);
    for (int a = 1; a <= active[0]; a++) {
      const int e = active[a];
      const Down w{expert_weight<Down>(down_q, down_scale, PANELS, HIDDEN, INTER, e)};
      for (int s0 = begin[e]; s0 < begin[e + 1]; s0 += TOKENS) {
        const int tokens = min(TOKENS, begin[e + 1] - s0);
        const uint8_t *xs[TOKENS];
        for (int t = 0; t < tokens; t++) xs[t] = inner + (s0 + t) * INNER_ROW;
        for (int panel = first; panel < last; panel++) {
          product(w, panel, xs, tokens, y0, PANEL);
          const int count = min(PANEL, HIDDEN - panel * PANEL);
          for (int t = 0; t < tokens; t++) {
            const int token = pairs[s0 + t] / TOP_K, choice = pairs[s0 + t] % TOP_K;
            float *sum = out[token] + panel * PANEL;
            for (int i = 0; i < count; i += LANES) {
              const vf y = weights[token][choice] * load(y0 + t * PANEL + i);
              store_n(sum + i, load_n(sum + i, count - i) + y, count - i);
            }
          }
        }
      }
    }
  }
}
}  // namespace experts_e6_top2_h40_i24_int4_g32_fp8

}  // namespace mill
