"""Route: which experts a token visits, with what weights (ir/router.py is the meaning)."""

from __future__ import annotations

from ...ir.plan import Route
from ...ir.router import RouterSpec
from ..text import fill
from .launch import Group, Site, ceil_div, power_of_2

TILE = 256  # scores that one warp holds


def symbol(spec: Route) -> str:
    r = spec.router
    groups = f"_g{r.groups}_{r.group_score}" if r.groups > 1 else ""
    return f"route_e{spec.experts}_top{r.top_k}_{r.score}{groups}"


def emit(spec: Route, name: str) -> str:
    r = spec.router
    kernel = fill(
        TEMPLATE,
        symbol=name,
        pointers=", ".join(f"{p}_ptr" for p in spec.params),
        meaning=_meaning(r),
        experts=spec.experts,
        top_k=r.top_k,
        slots=power_of_2(r.top_k),
        columns=_columns(spec),
        softmax=SOFTMAX.strip() if r.score == "softmax" else "",
        score=_SCORES[r.score],
        add_bias=ADD_BIAS.strip() if r.bias else "",
        groups=_groups(spec, name) if r.groups > 1 else "",
        after=_AFTER[r.after].strip(),
        renormalize=f"weight = weight / (tl.sum(weight, 1, keep_dims=True) + {r.epsilon!r})"
        * r.renormalize,
        scale=f" * {r.scale!r}" if r.scale != 1.0 else "",
    )
    return f"{kernel}\n\n{fill(INVERSE, symbol=name)}" if r.groups > 1 else kernel


def _meaning(r: RouterSpec) -> str:
    bias = " (+ bias to choose)" if r.bias else ""
    best = f", the best {r.top_groups} of {r.groups} groups by {r.group_score}"
    groups = best if r.groups > 1 else ""
    after = f" -> {r.after}" if r.after != "identity" else ""
    norm = " / sum" if r.renormalize else ""
    return f"{r.score}{bias}{groups} -> top {r.top_k}{after}{norm} * {r.scale}"


def _blocks(spec: Route) -> dict[str, int]:
    """Experts stand in ``span`` columns per group, of which ``size`` exist."""
    groups = spec.router.groups
    size = spec.experts // groups
    return {
        "groups": groups,
        "group_span": power_of_2(groups),
        "size": size,
        "span": power_of_2(size),
    }


def _columns(spec: Route) -> str:
    template = COLUMNS_GROUPED if spec.router.groups > 1 else COLUMNS
    return fill(template, experts=spec.experts, **_blocks(spec))


def _groups(spec: Route, name: str) -> str:
    by_two = spec.router.group_score == "top2" and _blocks(spec)["size"] > 1
    return fill(
        GROUPS,
        symbol=name,
        second=fill(SECOND, symbol=name) if by_two else "",
        top_groups=spec.router.top_groups,
        **_blocks(spec),
    )


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, Route)
    blocks = _blocks(spec)
    warps = max(1, min(16, blocks["group_span"] * blocks["span"] // TILE))
    rows = 4 if site.rows > site.target.sms // 2 and warps == 1 else 1
    constants = site.pitches("logits", "ids", "weights") | {"ROWS": rows}
    grid = (ceil_div(site.rows, rows),)
    return Group((
        site.launch(site.symbol, grid, [*spec.params, site.count], constants, warps=warps * rows),
    ))  # fmt: skip


_SCORES = {
    "softmax": "tl.exp(logit - top) / total",
    "sigmoid": "tl.sigmoid(logit)",
    "sqrt_softplus": "tl.sqrt(softplus(logit))",
    "identity": "logit",
}
_AFTER = {
    "identity": "",
    "sigmoid": "weight = tl.where(taken, tl.sigmoid(weight), 0.0)",
    "softmax": """
weight = tl.where(taken, weight, float("-inf"))
weight = tl.exp(weight - tl.max(weight, 1, keep_dims=True))
weight = weight / tl.sum(weight, 1, keep_dims=True)
""",
}
COLUMNS = """
expert = tl.arange(0, $span)[None, :]
exists = expert < $experts
"""
COLUMNS_GROUPED = """
col = tl.arange(0, $group_span * $span)[None, :]  # a group's $size experts in $span columns
expert = col // $span * $size + col % $span
exists = (col // $span < $groups) & (col % $span < $size)
"""
SOFTMAX = """
top = tl.max(logit, 1, keep_dims=True)
total = tl.sum(tl.exp(logit - top), 1, keep_dims=True)
"""
ADD_BIAS = """
score += tl.load(bias_ptr + expert, exists, 0.0).to(tl.float32)
"""
SECOND = """
second = tl.max(tl.where(members == first[:, :, None], NONE, members), 2)
group_score += ${symbol}_score(second)
"""
GROUPS = """
rank = tl.where(exists, ${symbol}_rank(score, expert), NONE)
members = tl.reshape(rank, [ROWS, $group_span, $span])
first = tl.max(members, 2)
group_score = ${symbol}_score(first)
$second
group = tl.arange(0, $group_span)[None, :]
rank = tl.where(group < $groups, ${symbol}_rank(group_score, group), NONE)
for _ in range($top_groups):
    rank = tl.where(rank == tl.max(rank, 1, keep_dims=True), NONE, rank)
kept = tl.broadcast_to((rank == NONE)[:, :, None], [ROWS, $group_span, $span])
score = tl.where(tl.reshape(kept, [ROWS, $group_span * $span]), score, float("-inf"))
"""
INVERSE = '''
@triton.jit
def ${symbol}_score(rank):
    """The ``x`` of a rank."""
    bits = (rank >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
'''
TEMPLATE = '''
@triton.jit
def $symbol(
    $pointers, count_ptr,
    LOGITS_PITCH: tl.constexpr, IDS_PITCH: tl.constexpr, WEIGHTS_PITCH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ids, weights [T, $top_k] of logits [T, $experts]; ROWS tokens per program.

    $meaning
    """
    wait_for_launches()
    TOP_K: tl.constexpr = $top_k
    NONE: tl.constexpr = -0x8000000000000000  # ranks below all experts
    count = tl.load(count_ptr)
    if tl.program_id(0) * ROWS >= count:
        return
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    $columns
    at = logits_ptr + row * LOGITS_PITCH
    logit = tl.load(at + expert, exists & (row < count), float("-inf")).to(tl.float32)
    $softmax
    score = $score
    $add_bias
    $groups
    rank = tl.where(exists, ${symbol}_rank(score, expert), NONE)
    slot = tl.arange(0, $slots)[None, :]
    ids = tl.zeros([ROWS, $slots], tl.int32)
    for choice in range(TOP_K):
        best = tl.max(rank, 1, keep_dims=True)
        ids = tl.where(slot == choice, (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32), ids)
        rank = tl.where(rank == best, NONE, rank)

    # Weights are scores without the bias: of the chosen ones, once more from their logits.
    taken = (slot < TOP_K) & (row < count)
    logit = tl.load(at + ids, taken, 0.0).to(tl.float32)
    weight = tl.where(taken, $score, 0.0)
    $after
    $renormalize
    tl.store(ids_ptr + row * IDS_PITCH + slot, ids, taken)
    tl.store(weights_ptr + row * WEIGHTS_PITCH + slot, to(weight$scale, weights_ptr), taken)


@triton.jit
def ${symbol}_rank(x, index):
    """int64 in the order of ``x`` (NaN beyond infinity), the lower index first: no two are equal."""
    bits = x.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index)
'''
