"""Pointwise: one expression over columns of rows."""

from __future__ import annotations

from ...ir.plan import Pointwise
from ..text import fill
from .expr import triton_code
from .launch import Group, Site, ceil_div, power_of_2


def symbol(spec: Pointwise) -> str:
    return f"pointwise_w{spec.width}"


def emit(spec: Pointwise, name: str) -> str:
    kinds = list(enumerate(spec.inputs))
    return fill(
        TEMPLATE,
        symbol=name,
        width=spec.width,
        equation=spec.expr,
        params="".join(f"x{i}_ptr, " for i, _ in kinds),
        pitches=" ".join(f"X{i}_PITCH: tl.constexpr," for i, kind in kinds if kind != "channel"),
        loads="\n".join(f"x{i} = {_LOADS[kind].format(i=i)}.to(tl.float32)" for i, kind in kinds),
        value=triton_code(spec.expr),
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
    rows = [x for x, kind in zip(inputs, spec.inputs, strict=True) if kind != "channel"]
    block = min(1024, power_of_2(spec.width))
    grid = (site.rows, ceil_div(spec.width, block))
    constants = site.pitches(*rows, "out") | {"BLOCK": block}
    return Group((site.launch(site.symbol, grid, [*inputs, "out", site.count], constants),))


TEMPLATE = '''
@triton.jit
def $symbol(
    ${params}out_ptr, count_ptr,
    $pitches
    OUT_PITCH: tl.constexpr, BLOCK: tl.constexpr,
):
    """out = $equation over rows of $width columns; one row, one block of columns per program."""
    wait_for_launches()
    WIDTH: tl.constexpr = $width
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row >= tl.load(count_ptr):
        return
    $loads
    value = $value + tl.zeros([BLOCK], tl.float32)
    tl.store(out_ptr + row * OUT_PITCH + cols, to(value, out_ptr), cols < WIDTH)
'''
