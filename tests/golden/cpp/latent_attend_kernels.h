// LatentAttend: multi-head latent attention, absorbed for few queries and expanded for long chunks.
#pragma once
#include "pool.h"
#include "attention.h"

namespace mill {

// out[t, h] = softmax_j(0.22f * (q_nope w_uk[h] . c[j] + q_pe . k_pe[j])) w_uv[h] c[j]
// over keys j <= position of t;  q [rows, 3, 12 + 8], out [rows, 3, 10],
// w_uk [3, 12, 24], w_uv [3, 10, 24], cache row: c [24], k_pe [8]
namespace latent_attend_h3_n12_r8_l24_v10_int8 {
constexpr int HEADS = 3, NOPE = 12, ROPE = 8, QUERY = NOPE + ROPE;
constexpr int LATENT = 24, VALUE = 10, ABSORB_BELOW = 20, ROW_BYTES = 40;
constexpr float SCALE = 0.22f;
constexpr int WIDTH = LATENT + ROPE, PITCH = round_up(WIDTH, LANES);
constexpr int LATENT_PITCH = round_up(LATENT, LANES), VALUE_PITCH = round_up(VALUE, LANES);
constexpr Span LATENT_AT = {0, 24, 128, 32}, ROPE_AT = {24, 8, 128, 36};
using Cache = CacheInt8;
using W = Bf16;
using Stored = uint16_t;

// Absorbed: a job is up to 4 queries of a sequence with up to 16 heads; row r is head r / tokens.
constexpr int TOKENS = 4, MAX_HEADS = 16, ROWS = TOKENS * MAX_HEADS;
constexpr size_t ABSORBED_LOCAL =
    Scratch::sizes<float>(PAGE * PITCH, PAGE * PITCH, ROWS * PITCH, ROWS * PAGE, ROWS * LATENT_PITCH,
                          ROWS, ROWS, ROWS, TOKENS * packed(LATENT), TOKENS * CHUNK);
// Expanded: a job is one head with all queries of a sequence, STRIDE at a time.
constexpr int STRIDE = 16;
constexpr size_t EXPANDED_LOCAL =
    Scratch::sizes<float>(PAGE * PITCH, PAGE * PITCH, (NOPE + VALUE) * LATENT, QUERY * PAGE,
                          VALUE_PITCH * PAGE, VALUE_PITCH * PAGE, STRIDE * PAGE,
                          (size_t)MAX_ROWS * VALUE_PITCH, MAX_ROWS, MAX_ROWS, STRIDE);
constexpr size_t SHARED = 0;
constexpr size_t LOCAL = ABSORBED_LOCAL > EXPANDED_LOCAL ? ABSORBED_LOCAL : EXPANDED_LOCAL;

// The page of keys from `base` on: tile [64, WIDTH] and its transpose [WIDTH, 64].
inline void load_latents(const tm_args &a, const void *cache, int sequence, int base, int count,
                         float *tile, float *transposed) {
  const uint8_t *page = cache_row(a, cache, ROW_BYTES, sequence, base);
  load_page<Cache>(page, ROW_BYTES, count, LATENT_AT, tile, PITCH);
  load_page<Cache>(page, ROW_BYTES, count, ROPE_AT, tile + LATENT, PITCH);
  transpose_page(tile, PITCH, PITCH, transposed);
}

// Queries [first, first + tokens) of one sequence, heads [h0, h0 + heads).
inline void absorbed(Thread &th, int sequence, int first, int tokens, int h0, int heads,
                     Rows<float> q, const void *w_uk, const void *w_uv, const void *cache,
                     Rows<float> out) {
  const tm_args &a = *th.args;
  const int rows = heads * tokens, p0 = a.positions[first], end = p0 + tokens;
  Scratch scratch{th.local};
  float *tile = scratch.take<float>(PAGE * PITCH), *keys = scratch.take<float>(PAGE * PITCH);
  float *qs = scratch.take<float>(ROWS * PITCH), *s = scratch.take<float>(ROWS * PAGE);
  float *sums = scratch.take<float>(ROWS * LATENT_PITCH);
  float *peak = scratch.take<float>(ROWS), *total = scratch.take<float>(ROWS);
  float *shrink = scratch.take<float>(ROWS);
  float *xs = scratch.take<float>(TOKENS * packed(LATENT));
  float *y = scratch.take<float>(TOKENS * CHUNK);

  for (int r = 0; r < rows; r++) {
    peak[r] = -__builtin_inff();
    total[r] = 0.0f;
    shrink[r] = 1.0f;
  }
  // q_lat = q_nope w_uk, 64 rows of w_uk at a time through the tile; q_pe follows it.
  memset(qs, 0, (size_t)rows * PITCH * sizeof(float));
  memset(sums, 0, (size_t)rows * LATENT_PITCH * sizeof(float));
  for (int h = 0; h < heads; h++) {
    float *q_lat = qs + (size_t)h * tokens * PITCH;
    const float *q_nope = q[first] + (h0 + h) * QUERY;
    for (int n = 0; n < NOPE; n += PAGE) {
      const int depth = min(PAGE, NOPE - n);
      const Stored *up = (const Stored *)w_uk + ((size_t)(h0 + h) * NOPE + n) * LATENT;
      for (int i = 0; i < depth; i++) widen(tile + i * PITCH, up + (size_t)i * LATENT, LATENT);
      outer<false>(q_nope + n, (int)q.pitch, tokens, tile, PITCH, depth, shrink, q_lat, PITCH,
                   LATENT_PITCH);
    }
    for (int t = 0; t < tokens; t++)
      memcpy(q_lat + t * PITCH + LATENT, q_nope + t * q.pitch + NOPE, ROPE * sizeof(float));
  }
  for (int base = 0; base < end; base += PAGE) {
    const int count = min(PAGE, end - base);
    load_latents(a, cache, sequence, base, count, tile, keys);
    scores(qs, PITCH, rows, keys, WIDTH, s);
    for (int r = 0; r < rows; r++)
      shrink[r] = softmax_page(s + r * PAGE, 0, min(count, p0 + r % tokens - base + 1), SCALE, 0.0f,
                               peak[r], total[r]);
    outer<false>(s, PAGE, rows, tile, PITCH, PAGE, shrink, sums, LATENT_PITCH, LATENT_PITCH);
  }
  // out = w_uv sums / total
  const W up{{w_uv, nullptr, HEADS * VALUE, LATENT}};
  const float *tokens_of[TOKENS];
  for (int t = 0; t < TOKENS; t++) tokens_of[t] = xs + t * packed(LATENT);
  for (int h = 0; h < heads; h++) {
    for (int t = 0; t < tokens; t++) {
      const int r = h * tokens + t;
      const float scale = inverse_total(peak[r], total[r]);
      for (int i = 0; i < LATENT_PITCH; i += LANES)
        store(sums + r * LATENT_PITCH + i, load(sums + r * LATENT_PITCH + i) * scale);
      pack<W>(xs + t * packed(LATENT), sums + r * LATENT_PITCH, LATENT);
    }
    for (int n = 0; n < VALUE; n += CHUNK) {
      const int count = min(CHUNK, VALUE - n);
      matmul(up, (h0 + h) * VALUE + n, count, tokens_of, tokens, nullptr, y);
      for (int t = 0; t < tokens; t++)
        memcpy(out[first + t] + (h0 + h) * VALUE + n, y + t * CHUNK, count * sizeof(float));
    }
  }
}

// All queries [first, first + tokens) of one sequence, head h.
inline void expanded(Thread &th, int sequence, int first, int tokens, int h, Rows<float> q,
                     const void *w_uk, const void *w_uv, const void *cache, Rows<float> out) {
  const tm_args &a = *th.args;
  const int p0 = a.positions[first], end = p0 + tokens;
  Scratch scratch{th.local};
  float *tile = scratch.take<float>(PAGE * PITCH), *latents = scratch.take<float>(PAGE * PITCH);
  float *uk = scratch.take<float>((NOPE + VALUE) * LATENT), *uv = uk + NOPE * LATENT;
  float *keys = scratch.take<float>(QUERY * PAGE);
  float *values_t = scratch.take<float>(VALUE_PITCH * PAGE);
  float *values = scratch.take<float>(VALUE_PITCH * PAGE);
  float *s = scratch.take<float>(STRIDE * PAGE);
  float *sums = scratch.take<float>((size_t)MAX_ROWS * VALUE_PITCH);
  float *peak = scratch.take<float>(MAX_ROWS), *total = scratch.take<float>(MAX_ROWS);
  float *shrink = scratch.take<float>(STRIDE);

  widen(uk, (const Stored *)w_uk + (size_t)h * NOPE * LATENT, NOPE * LATENT);
  widen(uv, (const Stored *)w_uv + (size_t)h * VALUE * LATENT, VALUE * LATENT);
  memset(sums, 0, (size_t)tokens * VALUE_PITCH * sizeof(float));
  for (int t = 0; t < tokens; t++) {
    peak[t] = -__builtin_inff();
    total[t] = 0.0f;
  }
  for (int base = 0; base < end; base += PAGE) {
    const int count = min(PAGE, end - base);
    load_latents(a, cache, sequence, base, count, tile, latents);
    scores(uk, LATENT, NOPE, latents, LATENT, keys);  // k^T = w_uk c^T, then the shared rotary key
    memcpy(keys + NOPE * PAGE, latents + LATENT * PAGE, ROPE * PAGE * sizeof(float));
    scores(uv, LATENT, VALUE, latents, LATENT, values_t);
    for (int v = 0; v < VALUE_PITCH; v += LANES)
      for (int j = 0; j < PAGE; j += LANES)
        transpose(values_t + v * PAGE + j, PAGE, values + j * VALUE_PITCH + v, VALUE_PITCH);
    // Queries before this page see none of it.
    for (int t0 = max(0, base - p0) / STRIDE * STRIDE; t0 < tokens; t0 += STRIDE) {
      const int rows = min(STRIDE, tokens - t0);
      scores(q[first + t0] + h * QUERY, (int)q.pitch, rows, keys, QUERY, s);
      for (int r = 0; r < rows; r++)
        shrink[r] = softmax_page(s + r * PAGE, 0, min(count, p0 + t0 + r - base + 1), SCALE, 0.0f,
                                 peak[t0 + r], total[t0 + r]);
      outer<false>(s, PAGE, rows, values, VALUE_PITCH, PAGE, shrink,
                   sums + (size_t)t0 * VALUE_PITCH, VALUE_PITCH, VALUE_PITCH);
    }
  }
  for (int t = 0; t < tokens; t++) {
    const float scale = inverse_total(peak[t], total[t]);
    float *to = out[first + t] + h * VALUE;
    for (int i = 0; i < VALUE; i += LANES)
      store_n(to + i, load(sums + (size_t)t * VALUE_PITCH + i) * scale, VALUE - i);
  }
}

TM_NOINLINE void run(Thread &th, int rows, Rows<float> q, const void *w_uk, const void *w_uv,
                     const void *cache, Rows<float> out) {
  const tm_args &a = *th.args;
  // Fewer heads a job while threads would go idle; a head's result does not depend on its company.
  int heads = MAX_HEADS;
  while (heads > 4 && ceil_div(rows, TOKENS) * ceil_div(HEADS, heads) < th.count) heads /= 2;
  const int blocks = ceil_div(HEADS, heads);
  int job = th.first_job(), before = 0;  // jobs of the sequences before b
  for (int b = 0; b < a.sequences; b++) {
    const int first = a.starts[b], tokens = a.starts[b + 1] - first;
    const int jobs = tokens < ABSORB_BELOW ? ceil_div(tokens, TOKENS) * blocks : HEADS;
    for (; job < before + jobs; job = th.next_job()) {
      const int at = job - before;
      if (tokens >= ABSORB_BELOW) {
        expanded(th, b, first, tokens, at, q, w_uk, w_uv, cache, out);
      } else {
        const int t0 = at / blocks * TOKENS, h0 = at % blocks * heads;
        absorbed(th, b, first + t0, min(TOKENS, tokens - t0), h0, min(heads, HEADS - h0), q, w_uk,
                 w_uv, cache, out);
      }
    }
    before += jobs;
  }
}
}  // namespace latent_attend_h3_n12_r8_l24_v10_int8

}  // namespace mill
