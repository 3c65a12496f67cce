// Pieces of a router: the best of n, softmax over n.
#pragma once
#include "pool.h"

namespace mill {

// ids[0:k] = indices of the k largest of x[0:n], best first, the lower index first among equals.  An index
// is always valid, whatever x holds.  taken[i] tells whether i was chosen.
inline void top(const float *x, int n, int k, int32_t *ids, uint8_t *taken) {
  memset(taken, 0, (size_t)n);
  for (int j = 0; j < k; j++) {
    int best = -1;
    for (int i = 0; i < n; i++)
      if (!taken[i] && (best < 0 || x[i] > x[best])) best = i;
    ids[j] = best;
    taken[best] = 1;
  }
}

// out may be x; it is written in whole vectors.
inline void softmax(const float *x, int n, float *out) {
  float peak = x[0];
  for (int i = 1; i < n; i++) peak = x[i] > peak ? x[i] : peak;
  vf total = {};
  for (int i = 0; i < n; i += LANES) {
    vf e = exp(load_n(x + i, n - i) - peak);
    if (n - i < LANES) e = load_n((const float *)&e, n - i);
    store(out + i, e);
    total += e;
  }
  const float scale = 1.0f / sum(total);
  for (int i = 0; i < n; i += LANES) store(out + i, load(out + i) * scale);
}

}  // namespace mill
