// Attention over a block of keys: scores, softmax, weighted sum, and how the results of blocks are joined.
//
// 16 query rows (tokens and heads) stand in the lanes, as a panel of a weight that multiplies the keys; or
// where rows are few, 16 keys do, and multiply the rows: either way the same products in the same order.
// Keys and values are read as the cache has them.  A block's result depends on its own keys only, and
// results are joined in one order, so a row's bits depend neither on the rows beside it, nor on threads,
// nor on how a prompt was cut into steps.
#pragma once
#include "cache.h"
#include "matmul.h"

namespace mill {

constexpr int KEYS = 2 * PAGE;  // of a block; blocks start at multiples of it
constexpr int SPAN = 8;         // blocks that are joined before they join the rest
constexpr float LOG2_E = 1.44269504088896341f;

// --- arithmetic -------------------------------------------------------------------------------------
// Of queries, keys, probabilities and values: fp32, or bf16 with fp32 sums.  `Panel` is the format of
// panels and packed rows.  Probabilities [keys / UNIT][16] are words of UNIT keys each.

struct Fp32Math {
  using Value = float;
  using Panel = Fp32;
  static constexpr int UNIT = 1;
  static TM_INLINE void put(uint8_t *panel, int i, int v, vf a, vf b) {
    store((float *)panel + i * PANEL + v * LANES, a);
    store((float *)panel + (i + 1) * PANEL + v * LANES, b);
  }
  static TM_INLINE void put_row(float *to, vf x) { store(to, x); }
  // sums[half][t] += p[t] . values[0][32 columns]
  template <int T>
  static TM_INLINE void mix(Sums<T> &sums, const uint8_t *const *values, int column, const void *p) {
    const float *row = (const float *)values[0] + column;
    vf w[2 * VECS];
    for (int v = 0; v < 2 * VECS; v++) w[v] = load(row + v * LANES);
    TM_UNROLL for (int t = 0; t < T; t++) {
      const float x = ((const float *)p)[t];
      for (int v = 0; v < 2 * VECS; v++) sums[v / VECS][t][v % VECS] += w[v] * x;
    }
  }
};

struct Bf16Math {
  using Value = uint16_t;
  using Panel = Bf16;
  static constexpr int UNIT = 2;
  static TM_INLINE void put(uint8_t *panel, int i, int v, vf a, vf b) {
    *(vi_at *)(panel + i * PANEL * 2 + v * TM_VECTOR_BYTES) = pair_bf16(a, b);
  }
  static TM_INLINE void put_row(uint16_t *to, vf x) { store_bf16(to, x); }
  // The same for pairs of keys, whose values are brought side by side here.
  template <int T>
  static TM_INLINE void mix(Sums<T> &sums, const uint8_t *const *values, int column, const void *p) {
    const uint8_t *a = values[0] + column * 2, *b = values[1] + column * 2;
    vi w[2 * VECS];
    for (int v = 0; v < VECS; v++) {
      const vi even = words(a + v * TM_VECTOR_BYTES), odd = words(b + v * TM_VECTOR_BYTES);
      w[2 * v] = zip_halves<0>(even, odd);
      w[2 * v + 1] = zip_halves<1>(even, odd);
    }
    TM_UNROLL for (int t = 0; t < T; t++) {
      const int32_t x = ((const int32_t *)p)[t];
      for (int v = 0; v < 2 * VECS; v++) {
        vf &sum = sums[v / VECS][t][v % VECS];
        sum = dot2(sum, w[v], x);
      }
    }
  }
};

// Where bf16 is not multiplied in one instruction, fp32 is faster than to imitate it.
#if defined(TM_BF16_DOT)
using ShortMath = Bf16Math;
#else
using ShortMath = Fp32Math;
#endif

constexpr size_t larger(size_t a, size_t b) { return a > b ? a : b; }

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// Rows some KiB apart all compete for the same few lines of the nearest cache.
constexpr bool compete(int row_bytes) { return row_bytes % 1024 == 0; }

// Rows of COUNT keys as Math reads them: in the cache where it holds just that, else decoded, or copied.
template <class Math, class Cache, int WIDTH, bool COPY, int COUNT = KEYS>
struct KeyRows {
  using Value = typename Math::Value;
  static constexpr bool DIRECT = same<typename Cache::Value, Value> && WIDTH % STEP == 0 && !COPY;
  static constexpr int PITCH = steps(WIDTH) * STEP;
  static constexpr size_t BYTES = DIRECT ? 0 : Scratch::bytes<Value>(COUNT * PITCH);
  const uint8_t *at[COUNT + 1];  // one more, for an odd count
  Value *decoded;

  explicit KeyRows(Scratch &scratch) : decoded(scratch.take<Value>(DIRECT ? 0 : COUNT * PITCH)) {
    if (!DIRECT && WIDTH % STEP) memset(decoded, 0, BYTES);
  }
  // Row j: these parts of a row of the cache, one behind the other.
  template <class First, class... Parts>
  TM_INLINE void set(int j, const uint8_t *row, const First &first, const Parts &...more) {
    Value *to = decoded + (size_t)j * PITCH;
    if (!DIRECT) decode(to, row, first, more...);
    at[j] = DIRECT ? row + first.at : (const uint8_t *)to;
    at[j + 1] = at[j];
  }

 private:
  static TM_INLINE void decode(Value *, const uint8_t *) {}
  template <class First, class... Parts>
  static TM_INLINE void decode(Value *to, const uint8_t *row, const First &first, const Parts &...more) {
    first.decode(row, to);
    decode(to + first.width, row, more...);
  }
};

// Input i of the 16 rows of a stored panel, without its scale.
template <class W>
TM_INLINE vf input_of(const uint8_t *panel, int i, int v) {
  if constexpr (same<W, Fp32>) {
    return load((const float *)panel + i * PANEL + v * LANES);
  } else if constexpr (same<W, Bf16>) {
    const vi word = words(panel + i / 2 * PANEL * 4 + v * TM_VECTOR_BYTES);
    return (vf)(i % 2 ? word & (int32_t)0xffff0000 : word << 16);
  } else {
    const vi word = words(panel + i / 4 * PANEL * 4 + v * TM_VECTOR_BYTES);
    return to_float(((word >> (i % 4 * 8)) & 255) - 128);
  }
}

// INT8 whose scales belong to the inputs, which were multiplied with them.
struct Unscaled : Int8 {
  static constexpr int scales(int) { return 0; }
  static TM_INLINE vf scale_at(const void *, int, int) { return splat(1.0f); }
};

// 16 rows of packed inputs side by side, four bytes of each at a time.
inline void panel_of_rows(const uint8_t *const *rows, size_t row_bytes, uint8_t *panel) {
  const int count = (int)(row_bytes / 4);
  for (int c = 0; c < count; c += LANES)
    for (int r = 0; r < PANEL; r += LANES)
      transpose(rows + r, (size_t)c * 4, (float *)panel + (size_t)c * PANEL + r, PANEL);
}
inline void panel_of_rows(const uint8_t *rows, size_t row_bytes, uint8_t *panel) {
  const uint8_t *at[PANEL];
  for (int r = 0; r < PANEL; r++) at[r] = rows + r * row_bytes;
  panel_of_rows(at, row_bytes, panel);
}

// --- results ----------------------------------------------------------------------------------------

// What rows know after some keys: the highest score (base 2), and relative to it the sum of probabilities
// and the sums of values [rows, pitch].  No keys: -inf and zeros.
struct Partial {
  float *peak, *total, *sums;
  int pitch;
  TM_INLINE Partial row(int r) const { return {peak + r, total + r, sums + (size_t)r * pitch, pitch}; }
  static constexpr size_t bytes(size_t rows, int pitch) {
    return Scratch::sizes<float>(rows, rows, rows * pitch);
  }
  static Partial take(Scratch &scratch, size_t rows, int pitch) {
    float *peak = scratch.take<float>(rows), *total = scratch.take<float>(rows);
    return {peak, total, scratch.take<float>(rows * pitch), pitch};
  }
};

inline void clear(const Partial &p, int rows) {
  for (int r = 0; r < rows; r++) {
    p.peak[r] = -__builtin_inff();
    p.total[r] = 0.0f;
  }
  memset(p.sums, 0, (size_t)rows * p.pitch * sizeof(float));
}

// `to` joins what later keys say.  Nothing joined to something leaves its bits, on either side.
TM_NOINLINE void merge(const Partial &to, const Partial &later, int rows) {
  for (int r = 0; r < rows; r++) {
    const float a = to.peak[r], b = later.peak[r], peak = a > b ? a : b;
    if (b == -__builtin_inff()) continue;
    const vf keep = exp2(splat(a - peak)), add = exp2(splat(b - peak));
    float *x = to.sums + (size_t)r * to.pitch;
    const float *y = later.sums + (size_t)r * later.pitch;
    for (int i = 0; i < to.pitch; i += LANES) store(x + i, load(x + i) * keep + load(y + i) * add);
    to.total[r] = to.total[r] * keep[0] + later.total[r] * add[0];
    to.peak[r] = peak;
  }
}

// The result of blocks [from, to) in `all`; attend(block, partial) computes one.
template <class F>
TM_INLINE void join_blocks(int from, int to, const Partial &all, const Partial &span, const Partial &block,
                           int rows, F &&attend) {
  if (from >= to) clear(all, rows);
  for (int at = from; at < to; at++) {
    const bool first = at == from || at % SPAN == 0, last = at + 1 == to || (at + 1) % SPAN == 0;
    const bool lone = at / SPAN == from / SPAN;
    const Partial &open = lone ? all : span;
    attend(at, first ? open : block);
    if (!first) merge(open, block, rows);
    if (last && !lone) merge(all, span, rows);
  }
}

// The same of results that jobs left: slots[i] holds `grain` blocks.  They end in slots[0].
template <class F>
TM_INLINE void join_slots(int count, int grain, int rows, F &&slot) {
  const int inner = grain == 1 ? SPAN : 1;
  for (int i = 0; i < count; i++)
    if (i % inner) merge(slot(i - i % inner), slot(i), rows);
  for (int i = inner; i < count; i += inner) merge(slot(0), slot(i), rows);
}

// 1 / denominator.  A sink is one more logit that owns no value; it may exceed the peak.
TM_INLINE float inverse_total(float peak, float total) { return 1.0f / total; }
TM_INLINE float inverse_total(float peak, float total, float sink) {
  const float logit = sink * LOG2_E;
  if (logit <= peak) return 1.0f / (total + exp2(splat(logit - peak))[0]);
  const float shrink = exp2(splat(peak - logit))[0];
  return shrink / (total * shrink + 1.0f);
}

// --- one block --------------------------------------------------------------------------------------

// Memory that is read next, fetched line by line while arithmetic leaves the bus idle: more at a time would
// be dropped, as a core keeps few in flight.
struct Ahead {
  const uint8_t *at = nullptr, *end = nullptr;
  TM_INLINE void fetch() {
    prefetch(at, 64);
    at += at < end ? 64 : 0;
  }
};

// What becomes of the scores of a panel of 16 query rows.
struct Logits {
  int count, rows;      // keys; query rows that exist
  const float *newest;  // [16] the last key in the block that a row sees
  float scale, softcap = 0.0f;
  int window = 0;
  const float *slopes = nullptr;  // [16] of ALiBi, per row
};

struct Block {
  const uint8_t *q;                            // a panel of 16 query rows
  const uint8_t *const *keys, *const *values;  // rows; one more than there are keys if that is odd
  int k, columns;                              // values per key, and to sum
  Logits logits;
  Ahead *ahead = nullptr;  // rows of a later block
};

// For one or more panels of query rows.
struct BlockScratch {
  float *scores, *shrink;
  uint8_t *p;
  static constexpr size_t bytes(int panels) {
    return Scratch::sizes<float>(panels * KEYS * PANEL, PANEL, (panels * KEYS + 1) * PANEL);
  }
  static BlockScratch take(Scratch &s, int panels) {
    float *scores = s.take<float>(panels * KEYS * PANEL), *shrink = s.take<float>(PANEL);
    // A tile reads on behind the last of its rows, so behind the last key as well.
    return {scores, shrink, s.take<uint8_t>((panels * KEYS + 1) * PANEL * 4)};
  }
  TM_INLINE BlockScratch panel(int i) const {
    return {scores + i * KEYS * PANEL, shrink, p + i * KEYS * PANEL * 4};
  }
};

// p = exp2(scores - peak); the highest so far shrinks what was summed before.
template <class Math>
TM_NOINLINE void softmax(const Logits &b, const BlockScratch &scratch, const Partial &to, bool fresh) {
  constexpr int WAYS = 4;  // independent chains of maxima and sums
  const int count = round_up(b.count, WAYS);
  for (int v = 0; v < VECS && v * LANES < b.rows; v++) {
    const int n = b.rows - v * LANES;
    float *s = scratch.scores + v * LANES;
    const vf newest = load(b.newest + v * LANES);
    const vf oldest = b.window ? newest - (float)(b.window - 1) : vf{};
    const vf slope = b.slopes ? load(b.slopes + v * LANES) * LOG2_E : vf{};
    vf best[WAYS], sums[WAYS] = {};
    for (int w = 0; w < WAYS; w++) best[w] = splat(-__builtin_inff());
    for (int j = 0; j < count; j += WAYS)
      for (int w = 0; w < WAYS; w++) {
        const vf key = splat((float)(j + w));
        vf x = load(s + (j + w) * PANEL) * (b.scale * LOG2_E);
        if (b.softcap != 0.0f) x = b.softcap * LOG2_E * tanh(load(s + (j + w) * PANEL) * b.scale / b.softcap);
        if (b.slopes) x += slope * (key - newest);
        x = select((key <= newest) & (key >= oldest), x, splat(-__builtin_inff()));
        best[w] = x > best[w] ? x : best[w];
        store(s + (j + w) * PANEL, x);
      }
    best[0] = best[0] > best[1] ? best[0] : best[1];
    best[2] = best[2] > best[3] ? best[2] : best[3];
    const vf here = best[0] > best[2] ? best[0] : best[2];
    const vf before = fresh ? splat(-__builtin_inff()) : load_n(to.peak + v * LANES, n);
    const vf peak = here > before ? here : before;
    const vf base = select(peak == -__builtin_inff(), vf{}, peak);  // all hidden: -inf - 0 is still -inf
    for (int j = 0; j < count; j += WAYS) {
      vf e[WAYS];
      for (int w = 0; w < WAYS; w++) {
        e[w] = exp2(load(s + (j + w) * PANEL) - base);
        sums[w] += e[w];
      }
      for (int w = 0; w < WAYS; w += 2) Math::put(scratch.p, j + w, v, e[w], e[w + 1]);
    }
    const vf shrink = exp2(before - base);
    const vf sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const vf total = fresh ? vf{} : load_n(to.total + v * LANES, n);
    store(scratch.shrink + v * LANES, shrink);
    store_n(to.peak + v * LANES, peak, n);
    store_n(to.total + v * LANES, total * shrink + sum, n);
  }
}

// sums[t] += p[t] . values for `rows` of T rows and 32 columns, key by key; `fresh` ones start from zero.
template <class Math, int T>
TM_NOINLINE void mix_tile(const uint8_t *const *values, int count, const uint8_t *p, int column, int rows,
                          const Partial &to, bool fresh, Ahead *later) {
  float *at = to.sums + column;
  Sums<T> sums = {};
  TM_UNROLL for (int t = 0; t < T; t++)
    if (!fresh && t < rows)
      TM_UNROLL for (int half = 0; half < 2; half++)
        for (int v = 0; v < VECS; v++)
          sums[half][t][v] = load(at + (size_t)t * to.pitch + half * PANEL + v * LANES);
  Ahead ahead = later ? *later : Ahead{};
  for (int j = 0; j < count; j += Math::UNIT, p += PANEL * 4) {
    if (later) ahead.fetch();
    Math::template mix<T>(sums, values + j, column, p);
  }
  if (later) *later = ahead;
  TM_UNROLL for (int t = 0; t < T; t++)
    if (t < rows)
      TM_UNROLL for (int half = 0; half < 2; half++)
        for (int v = 0; v < VECS; v++)
          store(at + (size_t)t * to.pitch + half * PANEL + v * LANES, sums[half][t][v]);
}

// The same for any number of rows and columns.  USUAL rows are one tile if one holds them.
template <class Math, int USUAL = 0>
TM_INLINE void mix(const uint8_t *const *values, int count, const uint8_t *p, int columns, int rows,
                   const Partial &to, bool fresh, Ahead *later = nullptr) {
  for (int c = 0; c < columns; c += STEP) {
    if constexpr (0 < USUAL && USUAL <= TILE_TOKENS)
      if (rows == USUAL) {
        mix_tile<Math, USUAL>(values, count, p, c, rows, to, fresh, later);
        continue;
      }
    for (int r = 0; r < rows; r += TILE_TOKENS) {
      const int n = min(TILE_TOKENS, rows - r);
#define TM_TILE(T) \
  if (n <= T) {    \
    mix_tile<Math, T>(values, count, p + r * 4, c, n, to.row(r), fresh, later); \
    continue;      \
  }
      TM_TILES(TM_TILE)
#undef TM_TILE
    }
  }
}

// One block's result; or, not `fresh`, joined to what is there.
template <class Math>
inline void attend_block(const Block &b, const BlockScratch &scratch, const Partial &to, bool fresh) {
  const typename Math::Panel q{{b.q, nullptr, PANEL, b.k}};
  const int count = b.logits.count, rows = b.logits.rows;
  product(q, 0, b.keys, count, scratch.scores, PANEL);
  softmax<Math>(b.logits, scratch, to, fresh);
  if (!fresh)
    for (int r = 0; r < rows; r++) {
      float *x = to.row(r).sums;
      for (int i = 0; i < b.columns; i += LANES) store(x + i, load(x + i) * scratch.shrink[r]);
    }
  mix<Math>(b.values, count, scratch.p, b.columns, rows, to, fresh, b.ahead);
}

// --- work -------------------------------------------------------------------------------------------

// Some tokens of one sequence; `row` counts the tokens of its batch before it.
struct Tile {
  int sequence, first, tokens, row;
};

struct TileBatch {
  static constexpr int MOST = 64;
  Tile at[MOST];
  int count, tokens, longest, blocks;  // tiles, tokens in all, in the largest; most blocks of keys of one
};

// The queries of a step in tiles of up to `size` tokens, and those in batches of up to `limit` tokens, of
// sequences that have from `least` to `most` of them.
struct Queries {
  const tm_args &a;
  int size, limit, least, most, window;
  int sequence = 0, done = 0;

  bool next(TileBatch &b) {
    b.count = b.tokens = b.longest = b.blocks = 0;
    for (; sequence < a.sequences; sequence++, done = 0) {
      const int first = a.starts[sequence], n = a.starts[sequence + 1] - first;
      if (n < least || n > most) continue;
      while (done < n) {
        if (b.count == TileBatch::MOST || b.tokens == limit) return true;
        const Tile tile{sequence, first + done, min(min(size, n - done), limit - b.tokens), b.tokens};
        b.at[b.count++] = tile;
        b.tokens += tile.tokens;
        b.longest = max(b.longest, tile.tokens);
        b.blocks = max(b.blocks, end_of(tile) - begin_of(tile));
        done += tile.tokens;
      }
    }
    return b.count > 0;
  }
  // Blocks that the tile sees, from the start of a span on.
  int oldest_of(const Tile &t) const {
    return window ? max(0, a.positions[t.first] - window + 1) / KEYS : 0;
  }
  int begin_of(const Tile &t) const { return oldest_of(t) / SPAN * SPAN; }
  int end_of(const Tile &t) const { return ceil_div(a.positions[t.first] + t.tokens, KEYS); }
};

// How many blocks a job takes: all that its tile sees, or where threads would go idle a span or just one,
// if that makes at most `most` parts.
inline int grain_of(int tiles, int blocks, int most, int threads) {
  const int finer[] = {SPAN, 1};
  int grain = max(1, blocks);
  for (int size : finer)
    if (threads > 1 && tiles * ceil_div(blocks, grain) < 4 * threads && size < grain &&
        ceil_div(blocks, size) <= most)
      grain = size;
  return grain;
}

}  // namespace mill
