// SelectRows: the rows that go through the head.
#pragma once
#include "pool.h"
#include "simd.h"

namespace mill {

// out[r] = x[index[r]]
namespace select_rows_w40 {
constexpr int WIDTH = 40;
constexpr size_t SHARED = 0, LOCAL = 0;

TM_NOINLINE void run(Thread &th, int rows, Rows<float> x, const int32_t *index,
                     Rows<float> out) {
  for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
    memcpy(out[r], x[index[r]], WIDTH * sizeof(float));
}
}  // namespace select_rows_w40

}  // namespace mill
