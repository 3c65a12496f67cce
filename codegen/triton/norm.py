"""Norm: RMS norm or layer norm per row and head, with the residual sum that precedes it."""

from __future__ import annotations

from ...ir.plan import Norm
from ..text import fill
from . import rows
from .launch import Group, Site, ceil_div, power_of_2

TILE = 8192  # numbers that one program holds


def symbol(spec: Norm) -> str:
    kind = "layer_norm" if spec.center else "rms_norm"
    heads = f"_h{spec.heads}" if spec.heads > 1 else ""
    return f"{kind}{heads}_w{spec.width}" + ("_residual" if spec.residual else "")


def emit(spec: Norm, name: str) -> str:
    return rows.emit(name, row_kernel(spec))


def row_kernel(spec: Norm) -> rows.RowKernel:
    channels = [p for p, there in (("weight", spec.weight), ("bias", spec.bias)) if there]
    kept = ["x", *(["residual"] if spec.residual else [])]
    pitches = [*kept, *(["sum"] if spec.residual else []), "out"]
    body = fill(
        BODY,
        heads=spec.heads,
        width=spec.width,
        eps=repr(spec.eps),
        add=ADD_RESIDUAL.strip() if spec.residual else "",
        center=CENTER.strip() if spec.center else "",
        channels="\n".join(
            f"{p} = tl.load({p}_ptr + cols, cols < WIDTH).to(tl.float32)" for p in channels
        ),
        value="x * scale" + " * weight" * spec.weight + " + bias" * spec.bias,
    )
    return rows.RowKernel(
        about=f"{_equation(spec)}; a block of heads.",
        pointers=tuple(f"{p}_ptr" for p in spec.params),
        constants=(*(f"{p.upper()}_PITCH" for p in pitches), "HEADS_BLOCK", "BLOCK"),
        body=body,
    )


def _equation(spec: Norm) -> str:
    x = "(x + residual)" if spec.residual else "x"
    body = f"({x} - mean) / std" if spec.center else f"{x} / rms({x.strip('()')})"
    return f"out = {body}" + (" * weight" if spec.weight else "") + (" + bias" if spec.bias else "")


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, Norm)
    block = power_of_2(spec.width)
    heads = min(power_of_2(spec.heads), max(1, TILE // 4 // block))
    pitches = [p for p in spec.params if p not in ("weight", "bias")]
    constants = site.pitches(*pitches) | {"HEADS_BLOCK": heads, "BLOCK": block}
    warps = max(1, min(16, heads * block // 512))
    grid = (site.rows, ceil_div(spec.heads, heads))
    return Group((
        site.launch(site.symbol, grid, [*spec.params, site.count], constants, warps=warps),
    ))  # fmt: skip


ADD_RESIDUAL = """
x += tl.load(residual_ptr + row * RESIDUAL_PITCH + at, inside, 0.0).to(tl.float32)
tl.store(sum_ptr + row * SUM_PITCH + at, to(x, sum_ptr), inside)
"""
CENTER = """
mean = tl.sum(x, 1, keep_dims=True) / WIDTH
x = tl.where(inside, x - mean, 0.0)
"""
BODY = """
HEADS: tl.constexpr = $heads
WIDTH: tl.constexpr = $width
heads = (block * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK))[:, None]
cols = tl.arange(0, BLOCK)[None, :]
at = heads * WIDTH + cols
inside = (heads < HEADS) & (cols < WIDTH)
x = tl.load(x_ptr + row * X_PITCH + at, inside, 0.0).to(tl.float32)
$add
$center
scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / WIDTH + $eps)
$channels
value = $value
tl.store(out_ptr + row * OUT_PITCH + at, to(value, out_ptr), inside)
"""
