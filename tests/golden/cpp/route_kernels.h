// Route: which experts a token visits, with what weights (ir/router.py is the meaning).
#pragma once
#include "pool.h"
#include "route.h"

namespace mill {

// ids, weights [rows, 2] of logits [rows, 6]:
// sigmoid (+ bias to choose), the best 1 of 2 groups by top2 -> top 2 / sum * 2.0
namespace route_e6_top2_sigmoid_g2_top2 {
constexpr int EXPERTS = 6, TOP_K = 2, GROUPS = 2, TOP_GROUPS = 1;
constexpr float EPSILON = 0.0f, SCALE = 2.0f;
constexpr int PADDED = round_up(EXPERTS, LANES);
constexpr size_t SHARED = 0;
constexpr size_t LOCAL = 2 * Scratch::bytes<float>(PADDED) + Scratch::bytes<uint8_t>(EXPERTS);

TM_NOINLINE void run(Thread &th, int rows, Rows<float> logits, const void *bias, Rows<int32_t> ids,
                     Rows<float> weights) {
  Scratch scratch{th.local};
  float *score = scratch.take<float>(PADDED), *choice = scratch.take<float>(PADDED);
  uint8_t *taken = scratch.take<uint8_t>(EXPERTS);
  alignas(64) float chosen[round_up(TOP_K, LANES)];
  for (int t = th.share(rows, 0); t < th.share(rows, 1); t++) {
    for (int i = 0; i < EXPERTS; i += LANES) {
      const vf v = load_n(logits[t] + i, EXPERTS - i);
      store(score + i, sigmoid(v));
    }
    memcpy(choice, score, EXPERTS * sizeof(float));
    for (int i = 0; i < EXPERTS; i++) choice[i] += ((const float *)bias)[i];
    constexpr int SIZE = EXPERTS / GROUPS;
    float rank[GROUPS];
    for (int g = 0; g < GROUPS; g++) {
      float best = -__builtin_inff(), second = -__builtin_inff();
      for (int i = g * SIZE; i < (g + 1) * SIZE; i++) {
        const float x = choice[i];
        second = x > best ? best : (x > second ? x : second);
        best = x > best ? x : best;
      }
      if (SIZE == 1) second = 0.0f;
      rank[g] = best + second;
    }
    int kept[TOP_GROUPS];
    top(rank, GROUPS, TOP_GROUPS, kept, taken);
    for (int g = 0; g < GROUPS; g++)
      if (!taken[g])
        for (int i = g * SIZE; i < (g + 1) * SIZE; i++) choice[i] = -__builtin_inff();
    top(choice, EXPERTS, TOP_K, ids[t], taken);
    for (int j = 0; j < TOP_K; j++) chosen[j] = score[ids[t][j]];
    float factor = SCALE;
    float sum = 0.0f;
    for (int j = 0; j < TOP_K; j++) sum += chosen[j];
    factor /= sum + EPSILON;
    for (int j = 0; j < TOP_K; j++) weights[t][j] = chosen[j] * factor;
  }
}
}  // namespace route_e6_top2_sigmoid_g2_top2

}  // namespace mill
