"""Pointwise: one expression over columns of rows."""

from __future__ import annotations

from ...ir.plan import Pointwise
from ..text import fill
from . import rows
from .expr import triton_code
from .launch import Group, Site, ceil_div, power_of_2


def symbol(spec: Pointwise) -> str:
    return f"pointwise_w{spec.width}"


def emit(spec: Pointwise, name: str) -> str:
    return rows.emit(name, row_kernel(spec))


def row_kernel(spec: Pointwise) -> rows.RowKernel:
    kinds = list(enumerate(spec.inputs))
    body = fill(
        BODY,
        width=spec.width,
        loads="\n".join(f"x{i} = {_LOADS[kind].format(i=i)}.to(tl.float32)" for i, kind in kinds),
        value=triton_code(spec.expr),
    )
    pitches = (f"X{i}_PITCH" for i, kind in kinds if kind != "channel")
    return rows.RowKernel(
        about=f"out = {spec.expr}; a block of {spec.width} columns.",
        pointers=tuple(f"{p}_ptr" for p in spec.params),
        constants=(*pitches, "OUT_PITCH", "BLOCK"),
        body=body,
    )


_LOADS = {
    "row": "tl.load(x{i}_ptr + row * X{i}_PITCH + cols, cols < WIDTH)",
    "scalar": "tl.load(x{i}_ptr + row * X{i}_PITCH)",
    "channel": "tl.load(x{i}_ptr + cols, cols < WIDTH)",
}


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, Pointwise)
    inputs = [f"x{i}" for i in range(len(spec.inputs))]
    pitches = [x for x, kind in zip(inputs, spec.inputs, strict=True) if kind != "channel"]
    block = min(1024, power_of_2(spec.width))
    grid = (site.rows, ceil_div(spec.width, block))
    constants = site.pitches(*pitches, "out") | {"BLOCK": block}
    return Group((site.launch(site.symbol, grid, [*inputs, "out", site.count], constants),))


BODY = """
WIDTH: tl.constexpr = $width
cols = block * BLOCK + tl.arange(0, BLOCK)
$loads
value = $value + tl.zeros([BLOCK], tl.float32)
tl.store(out_ptr + row * OUT_PITCH + cols, to(value, out_ptr), cols < WIDTH)
"""
