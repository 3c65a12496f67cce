"""Custom: ops that a user registered, one row per program."""

from __future__ import annotations

from textwrap import dedent

from ...ir.plan import Custom
from .. import custom
from ..text import fill
from .launch import Group, Site, power_of_2

symbol = custom.symbol


def emit(spec: Custom, name: str) -> str:
    return fill(
        TEMPLATE,
        symbol=name,
        about=custom.about(spec),
        pointers=", ".join(f"{p}_ptr" for p in spec.params),
        pitches=" ".join(f"{p.upper()}_PITCH: tl.constexpr," for p in _rows(spec)),
        constants="\n".join(
            f"{n}: tl.constexpr = {v!r}" for n, v in custom.constants(spec).items()
        ),
        body=dedent(custom.body(spec, "triton")).strip("\n"),
    )


def _rows(spec: Custom) -> list[str]:
    """Parameters that are rows."""
    return [*(o.name for o in spec.operands if not o.weight), "out"]


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, Custom)
    block = power_of_2(max(o.width for o in (*spec.operands, spec.out) if not o.weight))
    constants = site.pitches(*_rows(spec)) | {"BLOCK": block}
    warps = max(1, min(16, block // 512))
    args = [*spec.params, site.count]
    return Group((site.launch(site.symbol, (site.rows,), args, constants, warps=warps),))


TEMPLATE = '''
@triton.jit
def $symbol(
    $pointers, count_ptr,
    $pitches
    BLOCK: tl.constexpr,
):
    """$about"""
    wait_for_launches()
    $constants
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(count_ptr):
        return
    cols = tl.arange(0, BLOCK)
    $body
'''
