"""Linear: a matrix product whose epilogue runs on the accumulators, for few rows and for many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...ir import quant
from ...ir.plan import Linear
from ..text import fill, format_name
from . import tiles
from .expr import triton_code
from .launch import Group, Launch, Site, Source, ceil_div, dtype_bytes, power_of_2
from .target import GpuTarget

E4M3_ROWS = 128  # beyond so many rows, FP8 weights meet activations that are rounded to E4M3
ROUND_GROUPS = 8  # groups of 128 inputs that one program rounds


def symbol(spec: Linear) -> str:
    parts = f"_p{spec.parts}" if spec.parts > 1 else ""
    fused = "_fused" if spec.epilogue != "acc0" else ""
    bias = "_bias" if spec.bias else ""
    return f"linear_n{spec.n}_k{spec.k}_{format_name(spec.format)}{parts}{bias}{fused}"


def emit(spec: Linear, name: str) -> str:
    fmt = quant.parse(spec.format)
    channels, rows = _operands(spec)
    parts = range(spec.parts)
    product = "product_pair" if spec.parts == 2 else "product"
    names = {
        "symbol": name,
        "equation": f"out[t, n] = {spec.epilogue}",
        "sums": "\n".join(_sum(spec, part) for part in parts),
        "n": spec.n,
        "k": spec.k,
        "rows": spec.parts * spec.n,
        "size": f"{spec.parts} * BLOCK_M * BLOCK_N" if spec.parts > 1 else "BLOCK_M * BLOCK_N",
        "operands": "".join(f"{p}_ptr, " for p in (*channels, *rows)),
        "pitches": "".join(f"{p.upper()}_PITCH: tl.constexpr, " for p in rows),
        "pass_pitches": "".join(f"{p.upper()}_PITCH, " for p in rows),
        "accs": ", ".join(f"acc{part}" for part in parts),
        "keeps": "\n".join(KEEP.format(part=p, at=" + SIZE // 2" * p) for p in parts),
        "zeros": "\n".join(ZERO.format(part=p) for p in parts),
        "joins": "\n".join(JOIN.format(part=p, at=" + SIZE // 2" * p) for p in parts),
        "loads": "\n".join([*_biases(spec), *_extras(spec)]),
        "value": triton_code(spec.epilogue),
    }
    whole = {
        "variant": "",
        "x_sizes": "X_PITCH: tl.constexpr, BLOCK_K: tl.constexpr, ",
        "pass_sizes": "X_PITCH, BLOCK_K, ",
        "product": product,
        "form": f'X_PITCH, N, K, "{fmt.name.partition("-")[0]}", {fmt.group}, BLOCK_N, BLOCK_K',
        "inputs": f"x [rows, {spec.k}]",
        **_operands_of(spec, tiled=spec.format == "bf16"),
        "width": spec.k,
        "pitch": "X_PITCH",
        "block_k": "BLOCK_K",
    }
    padded = ceil_div(spec.k, quant.FP8_BLOCK) * quant.FP8_BLOCK
    rounded = {
        "variant": "_e4m3",
        "x_sizes": "",
        "pass_sizes": "",
        "product": f"{product}_e4m3",
        "form": "N, K, BLOCK_N",
        "inputs": f"x [rows, {spec.k}] as {name}_round leaves it",
        **_operands_of(spec, tiled=True, x_scale="x_scale_ptr, "),
        "width": padded,
        "pitch": padded,
        "block_k": quant.FP8_BLOCK,
    }
    texts = [_product_text(names | whole)]
    if spec.format == "fp8":
        texts += [fill(ROUND, **names), _product_text(names | rounded)]
    return "\n\n".join([*texts, fill(STORE, **names)])


def _operands_of(spec: Linear, *, tiled: bool, x_scale: str = "") -> dict[str, object]:
    """What a kernel calls x and the weight, and a tile of it, which may get descriptors if ``tiled``."""
    values, *scale = quant.parse(spec.format).parts
    scales = "".join(f"{name}_ptr, " for name in scale)
    return {
        "x": f"x_ptr, {x_scale}",
        "weight": f"{values}_ptr, {scales}",
        "values": f"{values}_ptr",
        "tile_x": f"x, {x_scale}",
        "tile_weight": f"w, {scales}",
        "matrix": f"w, {scales or 'w, '}",
        "first": "m * BLOCK_M if DESCRIPTORS else rows" if tiled else "rows",
        "tiled": "DESCRIPTORS: tl.constexpr," * tiled,
        "pass_tiled": " DESCRIPTORS," * tiled,
        "pass_operands": f"x, {x_scale}w, {scales}" if tiled else f"x_ptr, {values}_ptr, {scales}",
    }


def _product_text(names: Mapping[str, object]) -> str:
    descriptors = fill(DESCRIPTORS, **names) if names["tiled"] else ""
    return fill(PRODUCT, **names, descriptors=descriptors, tile=fill(TILE, **names))


def _sum(spec: Linear, part: int) -> str:
    row = f"{part * spec.n} + n" if part else "n"
    bias = f" + bias[{row}]" if spec.bias else ""
    return f"acc{part} = w[{row}] . x[t]{bias}"


def _operands(spec: Linear) -> tuple[list[str], list[str]]:
    """Operands of the epilogue: those per column, and those per row and column."""
    extras = [(f"e{i}", kind) for i, kind in enumerate(spec.extras)]
    channels = [name for name, kind in extras if kind == "channel"]
    return [*(["bias"] if spec.bias else []), *channels], [n for n, k in extras if k == "row"]


def _biases(spec: Linear) -> list[str]:
    if not spec.bias:
        return []
    load = "acc{part} += tl.load(bias_ptr + {start}cols, there).to(tl.float32)[None, :]"
    return [load.format(part=p, start=f"{p * spec.n} + " if p else "") for p in range(spec.parts)]


def _extras(spec: Linear) -> list[str]:
    loads = {
        "row": "e{i} = tl.load(e{i}_ptr + row * E{i}_PITCH + cols[None, :], mask).to(tl.float32)",
        "channel": "e{i} = tl.load(e{i}_ptr + cols, there).to(tl.float32)[None, :]",
    }
    return [loads[kind].format(i=i) for i, kind in enumerate(spec.extras)]


def rounds(spec: Linear, target: GpuTarget, rows: int) -> bool:
    """Whether weights meet activations in E4M3, where there may be so many ``rows``."""
    return spec.format == "fp8" and target.fp8 and rows > E4M3_ROWS


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, Linear)
    e4m3 = rounds(spec, site.target, site.rows)
    x_bytes = dtype_bytes(site.views["x"].dtype)
    fmt, tiled = quant.parse(spec.format), _tiled(site, spec, e4m3)
    problem = tiles.Problem(
        site.rows, spec.n, spec.k, fmt, spec.parts, x_bytes=x_bytes, e4m3=e4m3, tiled=tiled
    )
    tile = tiles.gemm(site.tiles, site.symbol, site.rows, problem)
    count = tile.tiles(site.rows, spec.n) if tile.splits > 1 else 0
    scratch = {
        "partial": 4 * count * tile.splits * spec.parts * tile.block_m * tile.block_n,
        "done_zero": 4 * count,
    }
    if e4m3:
        x, sizes = rounded("x", site.rows, spec.k)
        steps = (_round(site, x), _product(site, spec, tile, "_e4m3", x, {}))
        return Group(steps, scratch | sizes)
    constants = site.pitches("x") | {"BLOCK_K": tile.block_k}
    return Group((_product(site, spec, tile, "", ["x"], constants),), scratch)


def _tiled(site: Site, spec: Linear, e4m3: bool) -> bool:
    """Whether tensor descriptors may say where x and the weight are: rows begin at multiples of 16 bytes."""
    if e4m3:
        return spec.k % 16 == 0
    x = site.views["x"]
    return spec.format == x.dtype == "bf16" and x.aligned and spec.k % 8 == 0


def rounded(name: str, rows: int, k: int) -> tuple[list[Source], dict[str, int]]:
    """Where ``round_e4m3`` leaves a matrix [rows, k], and the scratch that it takes."""
    groups = ceil_div(k, quant.FP8_BLOCK)
    values, scale = f"scratch.{name}", f"scratch.{name}_scale"
    sizes = {
        name: rows * groups * quant.FP8_BLOCK,
        f"{name}_scale": 4 * ceil_div(rows, 128) * 128 * groups,
    }
    return [(values, "*fp8e4nv"), (scale, "*fp32")], sizes


def _round(site: Site, x: Sequence[Source]) -> Launch:
    assert isinstance(site.spec, Linear)
    groups = ceil_div(site.spec.k, quant.FP8_BLOCK)
    block = min(ROUND_GROUPS, power_of_2(groups))
    grid = (site.rows, ceil_div(groups, block))
    constants = site.pitches("x") | {"BLOCK": block}
    return site.launch(f"{site.symbol}_round", grid, ["x", *x, site.count], constants)


def _product(
    site: Site,
    spec: Linear,
    tile: tiles.Gemm,
    variant: str,
    x: Sequence[Source],
    constants: Mapping[str, int],
) -> Launch:
    channels, rows = _operands(spec)
    args = [
        *x, *_weight(site, spec), *channels, *rows,
        ("scratch.partial", "*fp32"), ("scratch.done_zero", "*i32"), "out", site.count,
    ]  # fmt: skip
    grid = (tile.tiles(site.rows, spec.n), tile.splits)
    sizes = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "GROUP_M": tile.group_m,
        "SPLITS": tile.splits,
        "SPAN": tile.span(spec.k),
        "PERSISTENT": tile.persistent > 0,
        "FLATTEN": tile.flatten,
    }
    if variant or spec.format == "bf16":
        sizes["DESCRIPTORS"] = tile.descriptors
    assert tile.splits == 1 or not tile.persistent, "programs that share a tile run once"
    return site.launch(
        site.symbol + variant,
        grid,
        args,
        {**constants, **site.pitches(*rows, "out"), **sizes},
        tile.warps,
        tile.stages,
        tile.persistent,
    )


def _weight(site: Site, spec: Linear) -> list[Source]:
    """Where the architecture does not know E4M3, its bits."""
    bits = spec.format == "fp8" and not site.target.fp8
    return [
        (part, "*u8") if bits and part == "q" else part for part in quant.parse(spec.format).parts
    ]


PRODUCT = '''
@triton.jit
def $symbol$variant(
    ${x}${weight}${operands}partial_ptr, done_ptr, out_ptr, count_ptr,
    ${x_sizes}${pitches}OUT_PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr, SPAN: tl.constexpr,
    PERSISTENT: tl.constexpr, FLATTEN: tl.constexpr,
    $tiled
):
    """$equation

    $sums
    $inputs, w [$rows, $k].
    One tile of BLOCK_M rows and BLOCK_N columns per program, or per SPLITS programs, SPAN inputs each; if
    PERSISTENT, one after the other in every program, the next loaded while the last is stored if FLATTEN.
    """
    wait_for_launches()
    count = tl.load(count_ptr)
    tiles = tl.cdiv(count, BLOCK_M) * tl.cdiv($n, BLOCK_N)
    tile = tl.program_id(0)
    if tile >= tiles:
        return
    $descriptors
    if PERSISTENT:
        for tile in tl.range(tile, tiles, tl.num_programs(0), flatten=FLATTEN):
            ${symbol}_tile$variant(
                $tile
            )
    else:
        ${symbol}_tile$variant(
            $tile
        )


@triton.jit
def ${symbol}_tile$variant(
    ${tile_x}${tile_weight}${operands}partial_ptr, done_ptr, out_ptr, tile, count,
    ${x_sizes}${pitches}OUT_PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr, SPAN: tl.constexpr,
    $tiled
):
    """A tile of out, or what one of SPLITS programs adds to it."""
    N: tl.constexpr = $n
    K: tl.constexpr = $k
    m, n = tile_of(tile, count, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < count
    begin = tl.program_id(1) * SPAN if SPLITS > 1 else 0
    end = tl.minimum(begin + SPAN, K) if SPLITS > 1 else K
    $accs = $product(
        ${tile_x}$first, inside, ${matrix}n * BLOCK_N, begin, end, $form
    )
    if SPLITS > 1:
        # Sums of all splits meet in memory; the program that is done last adds them up, in their order.
        SIZE: tl.constexpr = $size
        sums = partial_ptr + tile.to(tl.int64) * (SPLITS * SIZE)
        sums += tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        mine = sums + tl.program_id(1) * SIZE
        $keeps
        tl.debug_barrier()  # what any thread stored comes before the count
        if tl.atomic_add(done_ptr + tile, 1) == SPLITS - 1:
            tl.store(done_ptr + tile, 0)
            $zeros
            for split in tl.range(0, SPLITS, loop_unroll_factor=SPLITS if SIZE <= 4096 else 1):
                theirs = sums + split * SIZE
                $joins
            ${symbol}_store(
                $accs, rows, inside, cols, ${operands}out_ptr, ${pass_pitches}OUT_PITCH, BLOCK_N
            )
    else:
        ${symbol}_store(
            $accs, rows, inside, cols, ${operands}out_ptr, ${pass_pitches}OUT_PITCH, BLOCK_N
        )
'''
DESCRIPTORS = """\
if DESCRIPTORS:
    x = tl.make_tensor_descriptor(x_ptr, [count, $width], [$pitch, 1], [BLOCK_M, $block_k])
    w = tl.make_tensor_descriptor($values, [$rows, $k], [$k, 1], [BLOCK_N, $block_k])
else:
    x = x_ptr
    w = $values
"""
TILE = """\
${pass_operands}${operands}partial_ptr, done_ptr, out_ptr, tile, count,
${pass_sizes}${pass_pitches}OUT_PITCH, BLOCK_M, BLOCK_N, GROUP_M, SPLITS, SPAN,$pass_tiled
"""
KEEP = "tl.store(mine{at}, acc{part}, inside[:, None])"
ZERO = "acc{part} = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)"
# Not by way of the nearest cache, which does not see what others store.
JOIN = 'acc{part} += tl.load(theirs{at}, inside[:, None], 0.0, cache_modifier=".cg")'
ROUND = '''
@triton.jit
def ${symbol}_round(
    x_ptr, rounded_ptr, scale_ptr, count_ptr, X_PITCH: tl.constexpr, BLOCK: tl.constexpr
):
    """x as E4M3 with one scale per row and 128 inputs; one row, BLOCK such groups per program."""
    wait_for_launches()
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(count_ptr):
        return
    groups = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    round_e4m3(x_ptr, row, groups, rounded_ptr, scale_ptr, X_PITCH, $k)
'''
STORE = '''
@triton.jit
def ${symbol}_store(
    $accs, rows, inside, cols, ${operands}out_ptr,
    ${pitches}OUT_PITCH: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """out[rows, cols] = $value."""
    there = below(cols, $n, BLOCK_N)
    mask = inside[:, None] & there[None, :]
    row = rows[:, None]
    $loads
    value = $value
    tl.store(out_ptr + row * OUT_PITCH + cols[None, :], to(value, out_ptr), mask)
'''
