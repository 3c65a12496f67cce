"""Route: which experts a token visits, with what weights (ir/router.py is the meaning)."""

from __future__ import annotations

from ...ir.plan import Route
from ...ir.router import RouterSpec
from ..text import fill
from .expr import literal
from .text import signature

HEADER = "route.h"


def symbol(spec: Route) -> str:
    r = spec.router
    groups = f"_g{r.groups}_{r.group_score}" if r.groups > 1 else ""
    return f"route_e{spec.experts}_top{r.top_k}_{r.score}{groups}"


def emit(spec: Route, name: str) -> str:
    r = spec.router
    rank = "best + second" if r.group_score == "top2" else "best"
    return fill(
        TEMPLATE,
        symbol=name,
        meaning=_meaning(r),
        experts=spec.experts,
        top_k=r.top_k,
        groups=r.groups,
        top_groups=r.top_groups,
        epsilon=literal(r.epsilon),
        scale=literal(r.scale),
        signature=signature(
            "Rows<float> logits",
            *(["const void *bias"] if r.bias else []),
            *("Rows<int32_t> ids", "Rows<float> weights"),
        ),
        score=_scores(r.score, "score", "logits[t]", "EXPERTS"),
        after=_scores(r.after, "chosen", "chosen", "TOP_K") if r.after != "identity" else "",
        add_bias=ADD_BIAS if r.bias else "",
        groups_code=fill(GROUPS, rank=rank) if r.groups > 1 else "",
        renormalize=RENORMALIZE if r.renormalize else "",
    )


def _meaning(r: RouterSpec) -> str:
    bias = " (+ bias to choose)" if r.bias else ""
    best = f", the best {r.top_groups} of {r.groups} groups by {r.group_score}"
    groups = best if r.groups > 1 else ""
    after = f" -> {r.after}" if r.after != "identity" else ""
    norm = " / sum" if r.renormalize else ""
    return f"{r.score}{bias}{groups} -> top {r.top_k}{after}{norm} * {r.scale}"


def _scores(score: str, out: str, source: str, n: str) -> str:
    """Statements that fill ``out`` with the scores of ``n`` logits."""
    if score == "softmax":
        return f"softmax({source}, {n}, {out});"
    value = {"sigmoid": "sigmoid(v)", "sqrt_softplus": "sqrt(softplus(v))", "identity": "v"}[score]
    return fill(EACH_SCORE, out=out, source=source, n=n, value=value)


ADD_BIAS = "for (int i = 0; i < EXPERTS; i++) choice[i] += ((const float *)bias)[i];"
EACH_SCORE = """
for (int i = 0; i < $n; i += LANES) {
  const vf v = load_n($source + i, $n - i);
  store($out + i, $value);
}
"""
GROUPS = """
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
  rank[g] = $rank;
}
int kept[TOP_GROUPS];
top(rank, GROUPS, TOP_GROUPS, kept, taken);
for (int g = 0; g < GROUPS; g++)
  if (!taken[g])
    for (int i = g * SIZE; i < (g + 1) * SIZE; i++) choice[i] = -__builtin_inff();
""".strip()
RENORMALIZE = """
float sum = 0.0f;
for (int j = 0; j < TOP_K; j++) sum += chosen[j];
factor /= sum + EPSILON;
""".strip()

TEMPLATE = """
// ids, weights [rows, $top_k] of logits [rows, $experts]:
// $meaning
namespace $symbol {
constexpr int EXPERTS = $experts, TOP_K = $top_k, GROUPS = $groups, TOP_GROUPS = $top_groups;
constexpr float EPSILON = $epsilon, SCALE = $scale;
constexpr int PADDED = round_up(EXPERTS, LANES);
constexpr size_t SHARED = 0;
constexpr size_t LOCAL = 2 * Scratch::bytes<float>(PADDED) + Scratch::bytes<uint8_t>(EXPERTS);

$signature
  Scratch scratch{th.local};
  float *score = scratch.take<float>(PADDED), *choice = scratch.take<float>(PADDED);
  uint8_t *taken = scratch.take<uint8_t>(EXPERTS);
  alignas(64) float chosen[round_up(TOP_K, LANES)];
  for (int t = th.share(rows, 0); t < th.share(rows, 1); t++) {
    $score
    memcpy(choice, score, EXPERTS * sizeof(float));
    $add_bias
    $groups_code
    top(choice, EXPERTS, TOP_K, ids[t], taken);
    for (int j = 0; j < TOP_K; j++) chosen[j] = score[ids[t][j]];
    $after
    float factor = SCALE;
    $renormalize
    for (int j = 0; j < TOP_K; j++) weights[t][j] = chosen[j] * factor;
  }
}
}  // namespace $symbol
"""
