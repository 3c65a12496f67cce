"""Embed: rows of a table, chosen by token id or position."""

from __future__ import annotations

from ...ir import quant
from ...ir.plan import Embed
from ..text import fill
from .launch import Group, Site, ceil_div, power_of_2


def symbol(spec: Embed) -> str:
    return f"embed_w{spec.width}_{spec.format}"


def emit(spec: Embed, name: str) -> str:
    parts = quant.parse(spec.format).parts
    return fill(
        TEMPLATE,
        symbol=name,
        vocab=spec.vocab,
        width=spec.width,
        pointers=", ".join(f"{part}_ptr" for part in parts),
        table=f"{parts[0]}_ptr",
        scaled=" * scale[index[t]]" if "scale" in parts else "",
        apply_scale="value *= tl.load(scale_ptr + at)" if "scale" in parts else "",
    )


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, Embed)
    block = min(1024, power_of_2(spec.width))
    grid = (site.rows, ceil_div(spec.width, block))
    constants = site.pitches("out") | {"BLOCK": block}
    args = ["index", *quant.parse(spec.format).parts, "out", site.count]
    return Group((site.launch(site.symbol, grid, args, constants),))


TEMPLATE = '''
@triton.jit
def $symbol(
    index_ptr, $pointers, out_ptr, count_ptr,
    OUT_PITCH: tl.constexpr, BLOCK: tl.constexpr,
):
    """out[t] = table[index[t]]$scaled, table [$vocab, $width]; one row, one block of columns per program."""
    wait_for_launches()
    WIDTH: tl.constexpr = $width
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row >= tl.load(count_ptr):
        return
    at = tl.load(index_ptr + row).to(tl.int64)
    value = tl.load($table + at * WIDTH + cols, cols < WIDTH).to(tl.float32)
    $apply_scale
    tl.store(out_ptr + row * OUT_PITCH + cols, to(value, out_ptr), cols < WIDTH)
'''
