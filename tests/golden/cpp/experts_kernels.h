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
// 2. per active expert and chunk of inner columns: gate/up product, activation, packed for step 3;
// 3. per chunk of output columns: for active experts in rising order, down product, weighted sum.
// A job of step 3 owns its columns of all tokens, so sums need no atomics and have one order.
namespace experts_e6_top2_h40_i24_int4_g32_fp8 {
constexpr int EXPERTS = 6, TOP_K = 2, SLOTS = MAX_ROWS * TOP_K;
constexpr int HIDDEN = 40, INTER = 24, PARTS = 2;
constexpr int WIDEST = max(HIDDEN, INTER), TOKENS = block_tokens(WIDEST);
using Up = Int4<32>;
using Down = Fp8;
constexpr size_t XS = (size_t)MAX_ROWS * packed(HIDDEN), INNER = (size_t)SLOTS * packed(INTER);
constexpr size_t SHARED =
    Scratch::sizes<float>(XS, INNER) + Scratch::sizes<int32_t>(SLOTS, EXPERTS + 1, EXPERTS + 1);
constexpr size_t LOCAL = Scratch::sizes<float>(PANEL_ROWS * packed(WIDEST), PARTS * TOKENS * CHUNK) +
                         Scratch::sizes<int32_t>(EXPERTS);

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
  const Up up{{up_q, up_scale, PARTS * INTER, HIDDEN}};
  const Down down{{down_q, down_scale, HIDDEN, INTER}};
  Scratch shared{th.shared}, scratch{th.local};
  float *xs = shared.take<float>(XS), *inner = shared.take<float>(INNER);
  int32_t *pairs = shared.take<int32_t>(SLOTS);
  int32_t *begin = shared.take<int32_t>(EXPERTS + 1);
  int32_t *active = shared.take<int32_t>(EXPERTS + 1);
  float *panel = scratch.take<float>(PANEL_ROWS * packed(WIDEST));
  float *y0 = scratch.take<float>(TOKENS * CHUNK);
  float *y1 = scratch.take<float>(TOKENS * CHUNK);
  int32_t *next = scratch.take<int32_t>(EXPERTS);
  const float *rows_of[TOKENS];

  if (th.id == 0) sort_by_expert(rows, ids, pairs, begin, active, next);
  for (int t = th.share(rows, 0); t < th.share(rows, 1); t++)
    pack<Up>(xs + (size_t)t * packed(HIDDEN), x[t], HIDDEN);
  th.barrier();

  const int inner_chunks = ceil_div(INTER, CHUNK), inner_jobs = active[0] * inner_chunks;
  for (int job = th.first_job(); job < inner_jobs; job = th.next_job()) {
    const int e = active[1 + job / inner_chunks], i0 = job % inner_chunks * CHUNK;
    const int count = min(CHUNK, INTER - i0);
    const Up w = up.expert(e);
    for (int s0 = begin[e]; s0 < begin[e + 1]; s0 += TOKENS) {
      const int tokens = min(TOKENS, begin[e + 1] - s0);
      for (int t = 0; t < tokens; t++)
        rows_of[t] = xs + (size_t)(pairs[s0 + t] / TOP_K) * packed(HIDDEN);
      matmul(w, 0 * INTER + i0, count, rows_of, tokens, panel, y0);
      matmul(w, 1 * INTER + i0, count, rows_of, tokens, panel, y1);
      for (int t = 0; t < tokens; t++) {
        alignas(64) float value[CHUNK];
        for (int i = 0; i < count; i += LANES) {
          const vf acc0 = load(y0 + t * CHUNK + i);
          const vf acc1 = load(y1 + t * CHUNK + i);
          store(value + i, silu(acc0) * acc1);
        }
        pack<Down>(inner + (size_t)(s0 + t) * packed(INTER) + i0, value, count);
      }
    }
  }
  th.barrier();

  const int jobs = rows ? ceil_div(HIDDEN, CHUNK) : 0;
  for (int job = th.first_job(); job < jobs; job = th.next_job()) {
    const int n0 = job * CHUNK, count = min(CHUNK, HIDDEN - n0);
    for (int t = 0; t < rows; t++)
      for (int i = 0; i < count; i += LANES)
        store_n(out[t] + n0 + i, load_n(residual[t] + n0 + i, count - i), count - i);
    for (int a = 1; a <= active[0]; a++) {
      const int e = active[a];
      const Down w = down.expert(e);
      for (int s0 = begin[e]; s0 < begin[e + 1]; s0 += TOKENS) {
        const int tokens = min(TOKENS, begin[e + 1] - s0);
        for (int t = 0; t < tokens; t++)
          rows_of[t] = inner + (size_t)(s0 + t) * packed(INTER);
        matmul(w, n0, count, rows_of, tokens, panel, y0);
        for (int t = 0; t < tokens; t++) {
          const int token = pairs[s0 + t] / TOP_K, choice = pairs[s0 + t] % TOP_K;
          float *sum = out[token] + n0;
          for (int i = 0; i < count; i += LANES) {
            const vf y = weights[token][choice] * load(y0 + t * CHUNK + i);
            store_n(sum + i, load_n(sum + i, count - i) + y, count - i);
          }
        }
      }
    }
  }
}
}  // namespace experts_e6_top2_h40_i24_int4_g32_fp8

}  // namespace mill
