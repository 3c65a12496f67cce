"""Experts: tokens grouped by expert, two products, the activation between, a race-free sum."""

from __future__ import annotations

from ...ir.plan import Experts
from ..text import fill, format_name
from .expr import vector_code
from .text import signature, weight_params, weight_parts, weight_type

HEADER = "matmul.h"


def symbol(spec: Experts) -> str:
    up, down = format_name(spec.gate_up_format), format_name(spec.down_format)
    formats = up if up == down else f"{up}_{down}"
    biased = "_biased" if spec.biased else ""
    return f"experts_e{spec.experts}_top{spec.top_k}_h{spec.hidden}_i{spec.inter}_{formats}{biased}"


def emit(spec: Experts, name: str) -> str:
    parts = 2 if spec.gated else 1
    start = "load_n(residual[t] + n0 + i, width - i)" if spec.residual else "vf{}"
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
            *(["const void *up_bias", "const void *down_bias"] if spec.biased else []),
            *(["Rows<float> residual"] if spec.residual else []),
            "Rows<float> out",
        ),
        up_members=weight_parts(spec.gate_up_format, "up_"),
        down_members=weight_parts(spec.down_format, "down_"),
        tiles="\n".join(f"float *y{p} = scratch.take<float>(TOKENS * STEP);" for p in range(parts)),
        products="\n".join(
            f"product(w, PARTS * panel + {p}, xs, tokens, y{p} + half * PANEL, STEP);"
            for p in range(parts)
        ),
        loads="\n".join(
            f"const vf acc{p} = load(y{p} + t * STEP + i)"
            + (UP_BIAS.replace("$part", str(p)) if spec.biased else "")
            + ";"
            for p in range(parts)
        ),
        answer=DOWN_BIAS if spec.biased else "load(y0 + t * PANEL + i)",
        value=vector_code(spec.activation),
        start=start,
    )


UP_BIAS = (
    " + load_n((const float *)up_bias + (e * PARTS + $part) * INTER + step * STEP + i, count - i)"
)
DOWN_BIAS = """(load(y0 + t * PANEL + i) +
                                load_n((const float *)down_bias + e * HIDDEN + panel * PANEL + i, count - i))"""
TEMPLATE = """
// out[t] = ${residual_term}sum_j weights[t, j] down_e(act(gate_up_e(x[t]))),  e = ids[t, j]
// act = $activation
// x, out [rows, $hidden], gate_up [$experts, $parts * $inter, $hidden], down [$experts, $hidden, $inter]
//
// 1. pack the tokens' activations, sort (token, choice) pairs by expert;
// 2. per active expert and step of inner columns: gate/up product, activation, packed for step 3;
// 3. per group of output panels: for active experts in rising order, down product, weighted sum.
// A job of step 3 owns its columns of all tokens, so sums need no atomics and have one order.
namespace $symbol {
constexpr int EXPERTS = $experts, TOP_K = $top_k, SLOTS = MAX_ROWS * TOP_K;
constexpr int HIDDEN = $hidden, INTER = $inter, PARTS = $parts;
constexpr int INNER_PANELS = panels(INTER), PANELS = panels(HIDDEN);
using Up = $up;
using Down = $down;
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

$signature
  Scratch shared{th.shared}, scratch{th.local};
  uint8_t *packed = shared.take<uint8_t>(MAX_ROWS * ROW);
  uint8_t *inner = shared.take<uint8_t>(SLOTS * INNER_ROW);
  int32_t *pairs = shared.take<int32_t>(SLOTS);
  int32_t *begin = shared.take<int32_t>(EXPERTS + 1);
  int32_t *active = shared.take<int32_t>(EXPERTS + 1);
  $tiles
  int32_t *next = scratch.take<int32_t>(EXPERTS);

  if (th.id == 0) sort_by_expert(rows, ids, pairs, begin, active, next);
  for (int t = th.share(rows, 0); t < th.share(rows, 1); t++)
    Up::Inputs::pack(packed + t * ROW, x[t], HIDDEN);
  th.barrier();

  const int inner_steps = steps(INTER);
  for (Jobs jobs(th, active[0] * inner_steps); jobs.next();) {
    const int e = active[1 + jobs.at / inner_steps], step = jobs.at % inner_steps;
    const int count = min(STEP, INTER - step * STEP);
    const Up w{expert_weight<Up>($up_members, PARTS * INNER_PANELS, PARTS * INTER, HIDDEN, e)};
    for (int s0 = begin[e]; s0 < begin[e + 1]; s0 += TOKENS) {
      const int tokens = min(TOKENS, begin[e + 1] - s0);
      const uint8_t *xs[TOKENS];
      for (int t = 0; t < tokens; t++) xs[t] = packed + pairs[s0 + t] / TOP_K * ROW;
      for (int half = 0; half * PANEL < count; half++) {
        const int panel = step * (STEP / PANEL) + half;
        $products
      }
      for (int t = 0; t < tokens; t++) {
        alignas(64) float value[STEP];
        for (int i = 0; i < count; i += LANES) {
          $loads
          store(value + i, $value);
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
        store_n(out[t] + n0 + i, $start, width - i);
    for (int a = 1; a <= active[0]; a++) {
      const int e = active[a];
      const Down w{expert_weight<Down>($down_members, PANELS, HIDDEN, INTER, e)};
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
              const vf y = weights[token][choice] * $answer;
              store_n(sum + i, load_n(sum + i, count - i) + y, count - i);
            }
          }
        }
      }
    }
  }
}
}  // namespace $symbol
"""
