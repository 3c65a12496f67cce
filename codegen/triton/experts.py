"""Experts: gate and up products, the activation between, down products, their weighted sum per token.

Few tokens (a step of decoding): two launches, by pair of token and choice.  The time is that of reading
weights, and every SM should do that all the time: a program takes 16 to 64 rows of one expert's matrix with
all of their inputs.  They meet a tile of tokens in which one is alive.  So the weights of every format come
through shared memory in wide copies, several steps ahead of the tensor cores, for which one token or eight
are the same; products by element would hold as many loads in registers, and decode with more instructions.
The last program to finish a token's columns sums its choices.

Many tokens: four launches, by expert.  Pairs are sorted by expert into tiles; the two products gather and
scatter rows by pair; the last launch sums.  With so many pairs that arithmetic takes longer than reading
weights, FP8 weights meet activations that are rounded to E4M3, 128 numbers to a scale: x once per token,
beside the sort, and what is between the products where it comes into being.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...ir import quant
from ...ir.plan import Experts
from ..text import fill, format_name
from . import tiles
from .expr import triton_code
from .launch import Constant, Group, Launch, Site, Source, ceil_div, dtype_bytes, power_of_2
from .linear import ROUND_GROUPS, rounded
from .target import GpuTarget
from .tiles import Gemm

FEW = 2  # experts per pair of token and choice, from which on sorting pairs does not pay
LONE = 8  # rows of the tile that holds one token
E4M3_PAIRS = 128  # of an expert on average, from which on FP8 weights meet activations in E4M3
LANE = 16  # rows of scratch are padded to a multiple of it
SORT = 2048  # pairs that a program of the sort looks at together
THREADS = 128  # of a program of the sort
SUM = 1024  # columns that a program of the sum adds up
# A parameter that products of E4M3 do not have.
NO_BLOCK_K = {"block_k": "", "pass_block_k": ""}
BLOCK_K = {"block_k": ", BLOCK_K: tl.constexpr", "pass_block_k": ", BLOCK_K"}


def symbol(spec: Experts) -> str:
    up, down = format_name(spec.gate_up_format), format_name(spec.down_format)
    formats = up if up == down else f"{up}_{down}"
    biased = "_biased" if spec.biased else ""
    return f"experts_e{spec.experts}_top{spec.top_k}_h{spec.hidden}_i{spec.inter}_{formats}{biased}"


def emit(spec: Experts, name: str) -> str:
    up, down = _matrix(spec, "gate_up"), _matrix(spec, "down")
    residual = "residual[t] + " if spec.residual else ""
    names = {
        "symbol": name,
        "residual_term": residual,
        "activation": spec.activation,
        "value": triton_code(spec.activation),
        "experts": spec.experts,
        "experts_block": power_of_2(spec.experts),
        "top_k": spec.top_k,
        "hidden": spec.hidden,
        "inter": spec.inter,
        "y_pitch": _padded(spec.hidden),
        "parts": up.parts,
        "lone": LONE,
        "accs": "acc0, acc1" if spec.gated else "acc0",
        "up_offset": up.offset,
        "up_pointers": ", ".join((*up.pointers, *["gate_up_bias_ptr"] * spec.biased)),
        "up_pair": ", ".join((*(up.pointers * 2)[:2], *["gate_up_bias_ptr"] * spec.biased)),
        "down_offset": down.offset,
        "down_pointers": ", ".join((*down.pointers, *["down_bias_ptr"] * spec.biased)),
        "down_pair": ", ".join((*(down.pointers * 2)[:2], *["down_bias_ptr"] * spec.biased)),
        "bias_pointer": "bias_ptr, " * spec.biased,
        "up_bias": "\n".join(fill(UP_BIAS, part=p, parts=up.parts) for p in range(up.parts))
        if spec.biased
        else "",
        "down_bias": DOWN_BIAS if spec.biased else "",
        "residual_pointer": "residual_ptr, " * spec.residual,
        "residual_pitch": "RESIDUAL_PITCH, " * spec.residual,
        "residual_constant": "RESIDUAL_PITCH: tl.constexpr, " * spec.residual,
        "start": "tl.load(residual_ptr + token * RESIDUAL_PITCH + cols, inside, 0.0).to(tl.float32)"
        if spec.residual
        else "tl.zeros(cols.shape, tl.float32)",
    }
    texts = [fill(TEMPLATE, **names)]
    for variant in ("", "_e4m3") if up.fp8 or down.fp8 else ("",):
        x, inner = (bool(variant) and matrix.fp8 for matrix in (up, down))
        form = _up_form(up, x) | _inner_form(spec, inner)
        texts.append(fill(UP, variant=variant, **names, **form))
        if inner or not variant:
            form = _down_form(down, inner) | _inner_form(spec, inner)
            texts.append(fill(DOWN, variant=variant, **names, **form))
        if x:
            texts.append(fill(SORT_E4M3, **names))
    return "\n\n".join(texts)


def _up_form(up: Matrix, e4m3: bool) -> dict[str, str]:
    """What differs if x comes as ``round_e4m3`` leaves it."""
    product = "product_pair" if up.parts == 2 else "product"
    if e4m3:
        return {
            "x": "x_ptr, x_scale_ptr", "x_sizes": "", "x_pass": "", **NO_BLOCK_K,
            "product": f"{product}_e4m3", "form": "INTER, HIDDEN, BLOCK_N",
        }  # fmt: skip
    return {
        "x": "x_ptr", "x_sizes": "X_PITCH: tl.constexpr, ", "x_pass": "X_PITCH, ", **BLOCK_K,
        "product": product, "form": f"X_PITCH, INTER, HIDDEN, {up.arguments}, BLOCK_N, BLOCK_K",
    }  # fmt: skip


def _down_form(down: Matrix, e4m3: bool) -> dict[str, str]:
    """What differs if ``store_e4m3`` left what is between the products."""
    if e4m3:
        return {"product": "product_e4m3", "form": "HIDDEN, INTER, BLOCK_N", **NO_BLOCK_K}
    form = f"INNER_PITCH, HIDDEN, INTER, {down.arguments}, BLOCK_N, BLOCK_K"
    return {"product": "product", "form": form, **BLOCK_K}


def _inner_form(spec: Experts, e4m3: bool) -> dict[str, str]:
    if e4m3:
        return {"inner": "inner_ptr, inner_scale_ptr", "inner_pitch": "", "store": STORE_E4M3}
    pitch = f"INNER_PITCH: tl.constexpr = {_padded(spec.inter)}"
    return {"inner": "inner_ptr", "inner_pitch": pitch, "store": STORE}


@dataclass(frozen=True)
class Matrix:
    """One of the two matrices of an expert: ``parts`` times ``n`` rows of ``k`` inputs."""

    name: str
    format: quant.Format
    n: int
    k: int
    parts: int

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_{part}" for part in self.format.parts)

    @property
    def pointers(self) -> tuple[str, ...]:
        return tuple(f"{param}_ptr" for param in self.params)

    @property
    def fp8(self) -> bool:
        return self.format.name == "fp8"

    @property
    def arguments(self) -> str:
        """What ``product`` wants to know about the format."""
        return f'"{"int4" if self.format.group else self.format.name}", {self.format.group}'

    @property
    def offset(self) -> str:
        """Statements that move the pointers to those of one expert."""
        n, k, group = self.parts * self.n, self.k, self.format.group
        values = n * (ceil_div(k, 128) * 64 if group else k)
        scales = {
            "int8": n,
            "fp8": ceil_div(n, 128) * ceil_div(k, 128),
            **({self.format.name: n * ceil_div(k, group)} if group else {}),
        }
        lines = [f"w_ptr += expert * {values}"]
        if self.format.name in scales:
            lines.append(f"scale_ptr += expert * {scales[self.format.name]}")
        return "\n".join(lines)


def _matrix(spec: Experts, name: str) -> Matrix:
    if name == "down":
        return Matrix(name, quant.parse(spec.down_format), spec.hidden, spec.inter, 1)
    parts = 2 if spec.gated else 1
    return Matrix(name, quant.parse(spec.gate_up_format), spec.inter, spec.hidden, parts)


def _padded(width: int) -> int:
    """Elements from one row of scratch to the next."""
    return ceil_div(width, LANE) * LANE


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, Experts)
    few = site.rows == 1 or FEW * site.rows * spec.top_k <= spec.experts
    return _few(site, spec) if few else _many(site, spec)


def _few(site: Site, spec: Experts) -> Group:
    up, down = _matrix(spec, "gate_up"), _matrix(spec, "down")
    inner, y = _scratch_types(site, spec)
    pairs = site.rows * spec.top_k
    up_tile = _lone(site, up, "", _bytes(site, "x"))
    down_tile = _lone(site, down, "_finish", _bytes(site, inner))
    blocks = ceil_div(down.n, down_tile.block_n)
    summed = _summed(spec)
    return Group(
        (
            site.launch(
                site.symbol,
                (pairs, ceil_div(up.n, up_tile.block_n)),
                ["x", "ids", *_weights(site, up), inner, site.count],
                site.pitches("x", "ids") | _constants(up_tile),
                up_tile.warps,
                up_tile.stages,
            ),
            site.launch(
                f"{site.symbol}_finish",
                (pairs, blocks),
                [
                    *(inner, "ids", *_weights(site, down), y, ("scratch.arrived_zero", "*i32")),
                    *(*summed, site.count),
                ],
                site.pitches("ids", *summed) | _constants(down_tile),
                down_tile.warps,
                down_tile.stages,
            ),
        ),
        _scratch(site, spec) | {"arrived_zero": 4 * site.rows * blocks},
    )


def rounds(spec: Experts, target: GpuTarget, tokens: int) -> bool:
    """Whether FP8 weights meet activations in E4M3, where there may be so many ``tokens``."""
    fp8 = target.fp8 and "fp8" in (spec.gate_up_format, spec.down_format)
    return fp8 and tokens * spec.top_k >= E4M3_PAIRS * spec.experts


def _many(site: Site, spec: Experts) -> Group:
    up, down = _matrix(spec, "gate_up"), _matrix(spec, "down")
    e4m3 = rounds(spec, site.target, site.rows)
    x_e4m3, inner_e4m3 = e4m3 and up.fp8, e4m3 and down.fp8
    inner, y = _scratch_types(site, spec)
    order, found = ("scratch.order", "*i32"), ("scratch.tiles", "*i32")
    pairs = site.rows * spec.top_k
    scratch = _scratch(site, spec)
    xs: list[Source] = ["x"]
    inners: list[Source] = [inner]
    if x_e4m3:
        xs, sizes = rounded("x", site.rows, spec.hidden)
        scratch |= sizes
    if inner_e4m3:
        inners, sizes = rounded("inner", pairs, spec.inter)
        scratch |= sizes
    rows = min(_pairs_of_tile(site, up), _pairs_of_tile(site, down))
    x_bytes, inner_bytes = _bytes(site, "x"), _bytes(site, inner)
    # A scale of what is between the products is that of 128 columns, which one program computes.
    columns = quant.FP8_BLOCK if inner_e4m3 else 1
    up_name = "_sorted_up" + "_e4m3" * (x_e4m3 or inner_e4m3)
    down_name = "_sorted_down" + "_e4m3" * inner_e4m3
    up_tile = _sorted(site, up, up_name, rows, x_bytes, x_e4m3, columns)
    down_tile = _sorted(
        site, down, down_name, rows, inner_bytes, inner_e4m3, block_m=up_tile.block_m
    )
    # Every expert may leave its last tile unfinished.
    most = (pairs + min(spec.experts, pairs) * (up_tile.block_m - 1)) // up_tile.block_m

    def product(
        name: str,
        tile: Gemm,
        matrix: Matrix,
        sources: Sequence[Source],
        out: Sequence[Source],
        constants: Mapping[str, Constant],
    ) -> Launch:
        band = min(tile.group_m, most)
        return site.launch(
            site.symbol + name,
            (band, ceil_div(matrix.n, tile.block_n), ceil_div(most, band)),
            [*sources, order, found, *_weights(site, matrix), *out],
            {**constants, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
            tile.warps,
            tile.stages,
        )

    return Group(
        (
            _sort(site, spec, up_tile.block_m, x_e4m3),
            product(
                up_name, up_tile, up, xs, inners,
                {} if x_e4m3 else site.pitches("x") | {"BLOCK_K": up_tile.block_k},
            ),
            product(
                down_name, down_tile, down, inners, [y],
                {} if inner_e4m3 else {"BLOCK_K": down_tile.block_k},
            ),
            _sum(site, spec, y),
        ),
        scratch | {"order": 4 * pairs, "tiles": 4 * (1 + 3 * most)},
    )  # fmt: skip


def _sort(site: Site, spec: Experts, block_m: int, e4m3: bool) -> Launch:
    """A program per expert; and, if x is rounded to E4M3, others that do that."""
    # No thread of the sort stands twice for a pair.
    block = min(SORT, max(THREADS, power_of_2(site.rows * spec.top_k)))
    args: list[Source] = ["ids", ("scratch.order", "*i32"), ("scratch.tiles", "*i32"), site.count]
    constants = site.pitches("ids") | {"BLOCK_M": block_m, "BLOCK": block}
    programs, function = spec.experts, f"{site.symbol}_sort"
    if e4m3:
        xs, _ = rounded("x", site.rows, spec.hidden)
        groups = ceil_div(spec.hidden, quant.FP8_BLOCK)
        together = min(ROUND_GROUPS, power_of_2(groups))
        args = ["x", *xs, *args]
        constants |= site.pitches("x") | {"GROUPS": together}
        programs += site.rows * ceil_div(groups, together)
        function += "_e4m3"
    return site.launch(function, (programs,), args, constants, warps=THREADS // 32)


def _sum(site: Site, spec: Experts, y: Source) -> Launch:
    columns = min(SUM, power_of_2(spec.hidden))
    summed = _summed(spec)
    return site.launch(
        f"{site.symbol}_sum",
        (site.rows, ceil_div(spec.hidden, columns)),
        [y, *summed, site.count],
        site.pitches(*summed) | {"BLOCK_N": columns},
    )


def _weights(site: Site, matrix: Matrix) -> list[Source]:
    """Where the architecture does not know E4M3, its bits."""
    biased = isinstance(site.spec, Experts) and site.spec.biased
    return [
        (param, "*u8") if site.views[param].dtype == "e4m3" and not site.target.fp8 else param
        for param in matrix.params
    ] + [f"{matrix.name}_bias"] * biased


def _summed(spec: Experts) -> list[str]:
    return ["weights", *(["residual"] if spec.residual else []), "out"]


def _scratch_types(site: Site, spec: Experts) -> tuple[tuple[str, str], tuple[str, str]]:
    """What is between the products is rounded as the second one rounds it, answers as activations are."""
    wide = "*fp32" if site.views["x"].dtype == "f32" else "*bf16"
    inner = "*fp32" if spec.down_format == "fp32" else "*bf16"
    return ("scratch.inner", inner), ("scratch.y", wide)


def _bytes(site: Site, source: Source) -> int:
    if isinstance(source, str):
        return dtype_bytes(site.views[source].dtype)
    return 4 if source[1] == "*fp32" else 2


def _scratch(site: Site, spec: Experts) -> dict[str, int]:
    pairs = site.rows * spec.top_k
    inner, y = _scratch_types(site, spec)
    return {
        "inner": pairs * _padded(spec.inter) * _bytes(site, inner),
        "y": pairs * _padded(spec.hidden) * _bytes(site, y),
    }


def _constants(tile: Gemm) -> dict[str, Constant]:
    return {"BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}


def _lone(site: Site, matrix: Matrix, name: str, x_bytes: int) -> Gemm:
    """Unless measured, a warp per 16 rows of weights, and as many rows as leave each SM two programs.

    Up to three of them share its memory.
    """
    spec = site.spec
    assert isinstance(spec, Experts)
    pairs, wanted = site.rows * spec.top_k, 2 * site.target.sms
    n = next((n for n in (64, 32) if pairs * ceil_div(matrix.n, n) >= wanted), 16)
    k = min(128, 1024 // matrix.format.bits)
    step = k * (matrix.parts * n * matrix.format.bits // 8 + LONE * x_bytes)
    stages = max(2, min(6, site.target.shared_bytes // 3 // step))
    return tiles.gemm(
        site.tiles,
        site.symbol + name,
        site.rows,
        _problem(matrix, 1, pairs, x_bytes),
        Gemm(LONE, n, k, warps=n // 16, stages=stages),
        fixed=("block_m", "group_m"),
    )


def _pairs_of_tile(site: Site, matrix: Matrix) -> int:
    """Twice the average of an expert, so that most have all of their pairs in one tile."""
    spec = site.spec
    assert isinstance(spec, Experts)
    most = 128
    if site.target.capability == 100 and matrix.format.group:
        # Groups that are summed apart share the 512 columns of tensor memory, and so do decoded weights.
        most = 2 * matrix.format.group // matrix.parts
    return max(16, min(most, power_of_2(2 * site.rows * spec.top_k // spec.experts)))


def _sorted(
    site: Site,
    matrix: Matrix,
    name: str,
    rows: int,
    x_bytes: int,
    e4m3: bool,
    columns: int = 1,
    block_m: int | None = None,
) -> Gemm:
    """A tile for at most ``rows`` pairs of one expert, or for those of the first product."""
    spec = site.spec
    assert isinstance(spec, Experts)
    batch = min(spec.experts, site.rows * spec.top_k)
    problem = _problem(matrix, rows, batch, x_bytes, e4m3, columns)
    default = tiles.rule(site.target, problem)
    if not e4m3:
        default = _beside_weights(site, matrix, default)
    fixed = []
    if block_m is not None:
        default, fixed = replace(default, block_m=block_m), ["block_m"]
    tile = tiles.gemm(site.tiles, site.symbol + name, site.rows, problem, default, fixed)
    return default if block_m not in (None, tile.block_m) else tile


def _problem(
    matrix: Matrix, rows: int, batch: int, x_bytes: int, e4m3: bool = False, columns: int = 1
) -> tiles.Problem:
    return tiles.Problem(
        m=rows,
        n=matrix.n,
        k=matrix.k,
        format=matrix.format,
        parts=matrix.parts,
        batch=batch,
        x_bytes=x_bytes,
        e4m3=e4m3,
        splittable=False,
        columns=columns,
    )


def _beside_weights(site: Site, matrix: Matrix, tile: Gemm) -> Gemm:
    """Decoded weights want registers beside those of the sums."""
    sums = tile.block_m * tile.block_n * matrix.parts
    if matrix.format.name == "bf16" or tile.warps == 8 or sums <= 64 * 64:
        return tile
    if site.target.capability in (90, 100):  # whose tensor cores take 64 rows of weights at once
        return replace(tile, warps=8)
    return replace(tile, block_n=tile.block_n // 2)


UP_BIAS = """
acc$part += tl.load(bias_ptr + (expert * $parts + $part) * INTER + cols, cols < INTER, 0.0)[None, :]
"""
DOWN_BIAS = """
acc0 += tl.load(bias_ptr + expert * HIDDEN + cols, cols < HIDDEN, 0.0)[None, :]
"""
TEMPLATE = '''
# out[t] = ${residual_term}sum_j weights[t, j] y[t, j],  y[t, j] = down_e(inner[t, j]),  e = ids[t, j]
# inner[t, j] = $activation,  $accs = gate_up_e(x[t])
# x, out [T, $hidden]; ids, weights [T, $top_k]
# gate_up [$experts, $parts * $inter, $hidden], down [$experts, $hidden, $inter]
#
# A pair t * $top_k + j of token and choice is a row of inner and y.  Few tokens: a program per pair
# (${symbol}, _finish).
# Many: a program per tile of pairs that chose one expert (_sort, _sorted_up, _sorted_down, _sum).
# Those whose names end in _e4m3 have activations in E4M3.


@triton.jit
def $symbol(
    x_ptr, ids_ptr, $up_pointers, inner_ptr, count_ptr,
    X_PITCH: tl.constexpr, IDS_PITCH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """inner of one pair, a block of columns."""
    wait_for_launches()
    TOP_K: tl.constexpr = $top_k
    TILE: tl.constexpr = $lone  # pairs, of which the first exists
    pair = tl.program_id(0)
    token = (pair // TOP_K).to(tl.int64)
    if token >= tl.load(count_ptr):
        return
    expert = tl.load(ids_ptr + token * IDS_PITCH + pair % TOP_K).to(tl.int64)
    pairs = tl.full([TILE], 0, tl.int32) + pair
    inside = tl.arange(0, TILE) == 0
    ${symbol}_up(
        x_ptr, $up_pair, inner_ptr, expert, pairs, inside,
        X_PITCH, BLOCK_N, BLOCK_K,
    )


@triton.jit
def ${symbol}_finish(
    inner_ptr, ids_ptr, $down_pointers, y_ptr, arrived_ptr,
    weights_ptr, ${residual_pointer}out_ptr, count_ptr,
    IDS_PITCH: tl.constexpr, WEIGHTS_PITCH: tl.constexpr,
    ${residual_constant}OUT_PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y of one pair, a block of columns; and out, by the last of a token's choices to arrive."""
    wait_for_launches()
    TOP_K: tl.constexpr = $top_k
    TILE: tl.constexpr = $lone  # pairs, of which the first exists
    pair = tl.program_id(0)
    token = (pair // TOP_K).to(tl.int64)
    if token >= tl.load(count_ptr):
        return
    expert = tl.load(ids_ptr + token * IDS_PITCH + pair % TOP_K).to(tl.int64)
    pairs = tl.full([TILE], 0, tl.int32) + pair
    inside = tl.arange(0, TILE) == 0
    ${symbol}_down(
        inner_ptr, $down_pair, y_ptr, expert, pairs, inside, BLOCK_N, BLOCK_K
    )
    tl.debug_barrier()  # what all threads stored comes before the count
    arrived = arrived_ptr + token * tl.num_programs(1) + tl.program_id(1)
    if tl.atomic_add(arrived, 1, sem="acq_rel") == TOP_K - 1:
        tl.store(arrived, 0)
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        ${symbol}_out(
            y_ptr, weights_ptr, ${residual_pointer}out_ptr, token, cols,
            WEIGHTS_PITCH, ${residual_pitch}OUT_PITCH,
        )


@triton.jit
def ${symbol}_sort(
    ids_ptr, order_ptr, tiles_ptr, count_ptr,
    IDS_PITCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):
    """order [pairs]: by expert, those of one as they come.  tiles: how many, then (expert, begin, end) of
    each, up to BLOCK_M pairs order[begin:end] of one expert.  A program per expert, which counts all.
    """
    wait_for_launches()
    TOP_K: tl.constexpr = $top_k
    EXPERTS: tl.constexpr = $experts_block  # a power of two
    expert = tl.program_id(0)
    count = tl.load(count_ptr) * TOP_K
    counts = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, count, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        chosen = ${symbol}_choice(ids_ptr, pair, count, IDS_PITCH)
        counts += tl.histogram(chosen, EXPERTS, pair < count)
    each = tl.arange(0, EXPERTS)
    needed = (counts + BLOCK_M - 1) // BLOCK_M
    begin = tl.sum(tl.where(each < expert, counts, 0))
    end = begin + tl.sum(tl.where(each == expert, counts, 0))
    tile_ptr = tiles_ptr + 1 + 3 * tl.sum(tl.where(each < expert, needed, 0))
    if expert == 0:
        tl.store(tiles_ptr, tl.sum(needed))
    for first in range(begin, end, BLOCK_M):
        tl.store(tile_ptr, expert)
        tl.store(tile_ptr + 1, first)
        tl.store(tile_ptr + 2, tl.minimum(first + BLOCK_M, end))
        tile_ptr += 3
    if begin < end:
        for start in range(0, count, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            chosen = ${symbol}_choice(ids_ptr, pair, count, IDS_PITCH)
            mine = chosen == expert
            place = begin + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(order_ptr + place, pair, mine)
            begin += tl.sum(mine.to(tl.int32))


@triton.jit
def ${symbol}_sum(
    y_ptr, weights_ptr, ${residual_pointer}out_ptr, count_ptr,
    WEIGHTS_PITCH: tl.constexpr, ${residual_constant}OUT_PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out of one token, a block of columns."""
    wait_for_launches()
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(count_ptr):
        return
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ${symbol}_out(
        y_ptr, weights_ptr, ${residual_pointer}out_ptr, token, cols,
        WEIGHTS_PITCH, ${residual_pitch}OUT_PITCH,
    )


@triton.jit
def ${symbol}_choice(ids_ptr, pair, count, IDS_PITCH: tl.constexpr):
    """The experts of pairs, -1 from ``count`` on."""
    TOP_K: tl.constexpr = $top_k
    at = ids_ptr + (pair // TOP_K).to(tl.int64) * IDS_PITCH + pair % TOP_K
    return tl.load(at, pair < count, -1)


@triton.jit
def ${symbol}_tile(order_ptr, tiles_ptr, tile, BLOCK_M: tl.constexpr):
    """The expert of a tile, its pairs, and which of them there are."""
    tiles_ptr += 1 + 3 * tile
    at = tl.load(tiles_ptr + 1) + tl.arange(0, BLOCK_M)
    inside = at < tl.load(tiles_ptr + 2)
    return tl.load(tiles_ptr).to(tl.int64), tl.load(order_ptr + at, inside, 0), inside


@triton.jit
def ${symbol}_out(
    y_ptr, weights_ptr, ${residual_pointer}out_ptr, token, cols,
    WEIGHTS_PITCH: tl.constexpr, ${residual_constant}OUT_PITCH: tl.constexpr,
):
    """out[token, cols], in order of choice; other programs of this launch may have written y."""
    TOP_K: tl.constexpr = $top_k
    HIDDEN: tl.constexpr = $hidden
    Y_PITCH: tl.constexpr = $y_pitch
    inside = cols < HIDDEN
    total = $start
    for choice in tl.static_range(TOP_K):
        weight = tl.load(weights_ptr + token * WEIGHTS_PITCH + choice).to(tl.float32)
        at = y_ptr + (token * TOP_K + choice) * Y_PITCH + cols
        total += weight * tl.load(at, inside, 0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(out_ptr + token * OUT_PITCH + cols, to(total, out_ptr), inside)
'''
UP = '''
@triton.jit
def ${symbol}_sorted_up$variant(
    $x, order_ptr, tiles_ptr, $up_pointers, $inner,
    ${x_sizes}BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr$block_k,
):
    """inner of a tile of pairs, a block of columns."""
    wait_for_launches()
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    if tile >= tl.load(tiles_ptr):
        return
    expert, pairs, inside = ${symbol}_tile(order_ptr, tiles_ptr, tile, BLOCK_M)
    ${symbol}_up$variant(
        $x, $up_pair, $inner, expert, pairs, inside,
        ${x_pass}BLOCK_N$pass_block_k,
    )


@triton.jit
def ${symbol}_up$variant(
    $x, w_ptr, scale_ptr, ${bias_pointer}$inner, expert, pairs, inside,
    ${x_sizes}BLOCK_N: tl.constexpr$block_k,
):
    """inner[pairs] of one expert, a block of columns."""
    TOP_K: tl.constexpr = $top_k
    HIDDEN: tl.constexpr = $hidden
    INTER: tl.constexpr = $inter
    $inner_pitch
    $up_offset
    col = tl.program_id(1) * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    $accs = $product(
        $x, (pairs // TOP_K).to(tl.int64), inside, w_ptr, scale_ptr, col, 0, HIDDEN,
        $form,
    )
    $up_bias
    value = $value
    $store
'''
STORE = """\
at = inner_ptr + pairs.to(tl.int64)[:, None] * INNER_PITCH + cols[None, :]
tl.store(at, to(value, inner_ptr), inside[:, None] & (cols < INTER)[None, :])
"""
STORE_E4M3 = """\
store_e4m3(value, pairs.to(tl.int64), inside, col, inner_ptr, inner_scale_ptr, INTER)
"""
DOWN = '''
@triton.jit
def ${symbol}_sorted_down$variant(
    $inner, order_ptr, tiles_ptr, $down_pointers, y_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr$block_k,
):
    """y of a tile of pairs, a block of columns."""
    wait_for_launches()
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    if tile >= tl.load(tiles_ptr):
        return
    expert, pairs, inside = ${symbol}_tile(order_ptr, tiles_ptr, tile, BLOCK_M)
    ${symbol}_down$variant(
        $inner, $down_pair, y_ptr, expert, pairs, inside, BLOCK_N$pass_block_k
    )


@triton.jit
def ${symbol}_down$variant(
    $inner, w_ptr, scale_ptr, ${bias_pointer}y_ptr, expert, pairs, inside,
    BLOCK_N: tl.constexpr$block_k,
):
    """y[pairs] of one expert, a block of columns."""
    HIDDEN: tl.constexpr = $hidden
    INTER: tl.constexpr = $inter
    $inner_pitch
    Y_PITCH: tl.constexpr = $y_pitch
    $down_offset
    col = tl.program_id(1) * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    pairs = pairs.to(tl.int64)
    acc0 = $product(
        $inner, pairs, inside, w_ptr, scale_ptr, col, 0, INTER,
        $form,
    )
    $down_bias
    at = y_ptr + pairs[:, None] * Y_PITCH + cols[None, :]
    tl.store(at, to(acc0, y_ptr), inside[:, None] & (cols < HIDDEN)[None, :])
'''
SORT_E4M3 = '''
@triton.jit
def ${symbol}_sort_e4m3(
    x_ptr, rounded_ptr, x_scale_ptr, ids_ptr, order_ptr, tiles_ptr, count_ptr,
    IDS_PITCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    X_PITCH: tl.constexpr, GROUPS: tl.constexpr,
):
    """As _sort; programs beyond the experts round x to E4M3, GROUPS times 128 inputs of a token each."""
    wait_for_launches()
    HIDDEN: tl.constexpr = $hidden
    PARTS: tl.constexpr = (HIDDEN + 128 * GROUPS - 1) // (128 * GROUPS)
    part = tl.program_id(0) - $experts
    if part < 0:
        ${symbol}_sort(ids_ptr, order_ptr, tiles_ptr, count_ptr, IDS_PITCH, BLOCK_M, BLOCK)
    elif part // PARTS < tl.load(count_ptr):
        groups = part % PARTS * GROUPS + tl.arange(0, GROUPS)
        token = (part // PARTS).to(tl.int64)
        round_e4m3(x_ptr, token, groups, rounded_ptr, x_scale_ptr, X_PITCH, HIDDEN)
'''
