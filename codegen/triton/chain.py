"""Chain: kernels that work on every token by itself, in one launch; a program per token and branch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

from ...ir.plan import Chain, Link
from ..text import chain_symbol, fill
from . import cache_write, norm, pointwise, rope, rows
from .launch import Group, Launch, Site, Source

EMITTERS: dict[str, ModuleType] = {
    "norm": norm,
    "pointwise": pointwise,
    "rope": rope,
    "cache_write": cache_write,
}

symbol = chain_symbol


def emit(spec: Chain, name: str) -> str:
    links = dict.fromkeys(spec.links)
    kernels = {link: _kernel(link) for link in links}
    names = {link: f"{name}_{link.kind}_{i}" for i, link in enumerate(links)}
    pointers, constants = [], []
    for i, link in enumerate(spec.links):
        pointers += [f"{p}_{i}" for p in kernels[link].pointers]
        constants += [f"{c}_{i}" for c in (*kernels[link].constants, "BLOCKS")]
    chain = fill(
        TEMPLATE,
        symbol=name,
        pointers=rows.parameters([*pointers, "count_ptr"]),
        constants=rows.parameters(constants, rows.CONSTANT),
        branches="\n".join(_branches(spec, names)),
    )
    return "\n\n".join([*(rows.function(names[link], kernels[link]) for link in links), chain])


def _kernel(link: Link) -> rows.RowKernel:
    kernel: rows.RowKernel = EMITTERS[link.kind].row_kernel(link)
    return kernel


def _branches(spec: Chain, names: dict[Link, str]) -> Iterator[str]:
    """A link alone has a program for each of its blocks; several take turns in one program."""
    before: list[str] = []  # programs of other branches
    first = 0
    for branch in spec.branches:
        alone = len(branch) == 1
        programs = [*before, f"BLOCKS_{first}" if alone else "1"]
        yield f"{'elif' if before else 'if'} part < {' + '.join(programs)}:"
        for i, link in enumerate(branch, first):
            names_of = (*_kernel(link).pointers, *_kernel(link).constants)
            block = " - ".join(["part", *before]) if alone else "block"
            given = ["row", block, *(f"{n}_{i}" for n in names_of)]
            if i > first:
                yield "    tl.debug_barrier()  # any thread may read what others have stored"
            if not alone:
                yield f"    for block in range(BLOCKS_{i}):"
            indent = "    " if alone else "        "
            lines = rows.call(f"{names[link]}_row", given).split("\n")
            yield from (indent + line for line in lines)
        before, first = programs, first + len(branch)


def launches(site: Site) -> Group:
    spec = site.spec
    assert isinstance(spec, Chain)
    args: list[Source] = []
    constants: dict[str, int | float | bool] = {}
    programs, warps, i = 0, 1, 0
    for branch in spec.branches:
        for link in branch:
            launch = _launch(site, link, i)
            constants |= {f"{name}_{i}": value for name, value in launch.kernel.constants}
            constants[f"BLOCKS_{i}"] = launch.grid[1]
            for arg, param in zip(launch.args[:-1], launch.kernel.params[:-1], strict=True):
                args.append((f"{arg}_{i}" if arg in link.params else arg, param.type))
            warps = max(warps, launch.kernel.warps)
            i += 1
        programs += launch.grid[1] if len(branch) == 1 else 1
    grid = (site.rows, programs)
    return Group((site.launch(site.symbol, grid, [*args, site.count], constants, warps),))


def _launch(site: Site, link: Link, i: int) -> Launch:
    """That of a link, were it a step; its last argument is the count of rows."""
    views = {p: site.views[f"{p}_{i}"] for p in link.params}
    (launch,) = EMITTERS[link.kind].launches(replace(site, spec=link, views=views)).launches
    found: Launch = launch
    return found


TEMPLATE = '''
@triton.jit
def $symbol(
    $pointers
    $constants
):
    """Branches that share nothing; links of one see what those before them have stored."""
    wait_for_launches()
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if row >= tl.load(count_ptr):
        return
    $branches
'''
