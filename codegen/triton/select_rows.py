"""SelectRows: the rows that go through the head, gathered."""

from __future__ import annotations

from ...ir.plan import SelectRows
from ..text import fill
from .launch import Group, Site, ceil_div, power_of_2


def symbol(spec: SelectRows) -> str:
    return f"select_rows_w{spec.width}"


def emit(spec: SelectRows, name: str) -> str:
    return fill(TEMPLATE, symbol=name, width=spec.width)


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, SelectRows)
    block = min(1024, power_of_2(spec.width))
    grid = (site.rows, ceil_div(spec.width, block))
    constants = site.pitches("x", "out") | {"BLOCK": block}
    return Group((site.launch(site.symbol, grid, ["x", "index", "out", site.count], constants),))


TEMPLATE = '''
@triton.jit
def $symbol(
    x_ptr, index_ptr, out_ptr, count_ptr,
    X_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, BLOCK: tl.constexpr,
):
    """out[r] = x[index[r]], rows of $width columns; one row, one block of columns per program."""
    wait_for_launches()
    WIDTH: tl.constexpr = $width
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row >= tl.load(count_ptr):
        return
    at = tl.load(index_ptr + row).to(tl.int64)
    value = tl.load(x_ptr + at * X_PITCH + cols, cols < WIDTH).to(tl.float32)
    tl.store(out_ptr + row * OUT_PITCH + cols, to(value, out_ptr), cols < WIDTH)
'''
