"""Chain: kernels that work on every token by itself; they share out tokens alike, so no barrier parts them."""

from __future__ import annotations

from types import ModuleType

from ...ir.plan import Chain, Link, Norm, Pointwise
from ..text import call, chain_symbol, fill
from . import cache_write, norm, pointwise, rope
from .text import signature

HEADER = "cache.h"
EMITTERS: dict[str, ModuleType] = {
    "norm": norm,
    "pointwise": pointwise,
    "rope": rope,
    "cache_write": cache_write,
}

symbol = chain_symbol


def emit(spec: Chain, name: str) -> str:
    links = dict.fromkeys(spec.links)
    names = {link: f"{link.kind}_{i}" for i, link in enumerate(links)}
    params = [f"{_type(link, p)}{p}_{i}" for i, link in enumerate(spec.links) for p in link.params]
    return fill(
        TEMPLATE,
        symbol=name,
        links="\n".join(EMITTERS[link.kind].emit(link, names[link]) for link in links),
        signature=signature(*params),
        calls="\n".join(
            call(
                f"{names[link]}::run(", ["th", "rows", *(f"{p}_{i}" for p in link.params)], ");", 2
            )
            for i, link in enumerate(spec.links)
        ),
    )


def _type(link: Link, param: str) -> str:
    match link:
        case Norm() if param in ("weight", "bias"):
            return "const void *"
        case Pointwise() if param != "out" and link.inputs[int(param[1:])] == "channel":
            return "const void *"
    return "void *" if param == "cache" else "Rows<float> "


TEMPLATE = """
namespace $symbol {
constexpr size_t SHARED = 0, LOCAL = 0;

$links
$signature
  $calls
}
}  // namespace $symbol
"""
