"""Experts: tokens grouped by expert, two products, the activation between, a race-free sum."""

from __future__ import annotations

from ...ir.plan import Experts
from .expr import vector_code
from .text import fill, format_name, signature, weight_params, weight_parts, weight_type

HEADER = "matmul.h"


def symbol(spec: Experts) -> str:
    up, down = format_name(spec.gate_up_format), format_name(spec.down_format)
    formats = up if up == down else f"{up}_{down}"
    return f"experts_e{spec.experts}_top{spec.top_k}_h{spec.hidden}_i{spec.inter}_{formats}"


def emit(spec: Experts, name: str) -> str:
    parts = 2 if spec.gated else 1
    start = "load_n(residual[t] + n0 + i, count - i)" if spec.residual else "vf{}"
    residual = "residual[t] + " if spec.residual else ""
    return fill(
        TEMPLATE,
        symbol=name,
        residual_term=residual,
        activation=spec.activation,
        experts=spec.experts,
        top_k=spec.top_k,
        hidden=spec.hidden,
        inter=spec.inter,
        parts=parts,
        up=weight_type(spec.gate_up_format),
        down=weight_type(spec.down_format),
        signature=signature(
            *("Rows<float> x", "Rows<int32_t> ids", "Rows<float> weights"),
            *weight_params(spec.gate_up_format, "up_"),
            *weight_params(spec.down_format, "down_"),
            *(["Rows<float> residual"] if spec.residual else []),
            "Rows<float> out",
        ),
        up_members=weight_parts(spec.gate_up_format, "up_"),
        down_members=weight_parts(spec.down_format, "down_"),
        tiles="\n".join(
            f"float *y{p} = scratch.take<float>(TOKENS * CHUNK);" for p in range(parts)
        ),
        products="\n".join(
            f"matmul(w, {p} * INTER + i0, count, rows_of, tokens, panel, y{p});"
            for p in range(parts)
        ),
        loads="\n".join(f"const vf acc{p} = load(y{p} + t * CHUNK + i);" for p in range(parts)),
        value=vector_code(spec.activation),
        start=start,
    )


TEMPLATE = """
// out[t] = ${residual_term}sum_j weights[t, j] down_e(act(gate_up_e(x[t]))),  e = ids[t, j]
// act = $activation
// x, out [rows, $hidden], gate_up [$experts, $parts * $inter, $hidden], down [$experts, $hidden, $inter]
//
// 1. pack the tokens' activations, sort (token, choice) pairs by expert;
// 2. per active expert and chunk of inner columns: gate/up product, activation, packed for step 3;
// 3. per chunk of output columns: for active experts in rising order, down product, weighted sum.
// A job of step 3 owns its columns of all tokens, so sums need no atomics and have one order.
namespace $symbol {
constexpr int EXPERTS = $experts, TOP_K = $top_k, SLOTS = MAX_ROWS * TOP_K;
constexpr int HIDDEN = $hidden, INTER = $inter, PARTS = $parts;
constexpr int WIDEST = max(HIDDEN, INTER), TOKENS = block_tokens(WIDEST);
using Up = $up;
using Down = $down;
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

$signature
  const Up up{{$up_members, PARTS * INTER, HIDDEN}};
  const Down down{{$down_members, HIDDEN, INTER}};
  Scratch shared{th.shared}, scratch{th.local};
  float *xs = shared.take<float>(XS), *inner = shared.take<float>(INNER);
  int32_t *pairs = shared.take<int32_t>(SLOTS);
  int32_t *begin = shared.take<int32_t>(EXPERTS + 1);
  int32_t *active = shared.take<int32_t>(EXPERTS + 1);
  float *panel = scratch.take<float>(PANEL_ROWS * packed(WIDEST));
  $tiles
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
      $products
      for (int t = 0; t < tokens; t++) {
        alignas(64) float value[CHUNK];
        for (int i = 0; i < count; i += LANES) {
          $loads
          store(value + i, $value);
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
        store_n(out[t] + n0 + i, $start, count - i);
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
}  // namespace $symbol
"""
