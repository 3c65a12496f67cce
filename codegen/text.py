"""What the emitters share: templates, argument lists that fill lines, names of kernels and formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Template
from textwrap import dedent
from types import ModuleType

from ..ir.plan import Chain, Extern, KernelSpec, Plan

WIDTH = 100  # columns of emitted text


def fill(template: str, **names: object) -> str:
    """Put ``names`` for ``$name`` in ``template``.

    A name alone on its line may stand for several lines, which get its indentation, or for none, and
    then the line goes.
    """
    lines: list[str] = []
    for line in dedent(template).strip("\n").split("\n"):
        key = line.strip().removeprefix("$")
        if line.strip() == f"${key}" and key in names:
            indent = line[: len(line) - len(line.lstrip())]
            block = str(names[key]).rstrip("\n")
            lines += [indent + part if part else "" for part in block.split("\n")] if block else []
        else:
            lines.append(Template(line).substitute({k: str(v) for k, v in names.items()}))
    return "\n".join(lines) + "\n"


def call(head: str, args: Sequence[str], tail: str, indent: int = 0) -> str:
    """``head`` + comma-separated ``args`` + ``tail``, further lines aligned with the first argument.

    >>> print(call("f(", ["a" * 50, "b" * 50], ");"))
    f(aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa,
      bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb);
    """
    lines = [head]
    for arg, end in zip(args, [", "] * (len(args) - 1) + [tail], strict=True):
        full = len(lines[-1] + arg + end.rstrip()) + indent > WIDTH
        if full and len(lines[-1]) > len(head):
            lines[-1] = lines[-1].rstrip()
            lines.append(" " * len(head))
        lines[-1] += arg + end
    return "\n".join(lines)


def format_name(fmt: str) -> str:
    """A format in a symbol: ``int4-g32`` -> ``int4_g32``."""
    return fmt.replace("-", "_")


def chain_symbol(spec: Chain) -> str:
    """Kinds of links, branch by branch: ``rope_and_norm_rope_cache_write``."""
    return "_and_".join("_".join(link.kind for link in branch) for branch in spec.branches)


def symbols(plan: Plan, emitters: Mapping[str, ModuleType]) -> dict[KernelSpec, str]:
    """A readable name per kernel; specs that differ in something the name omits get a number."""
    named: dict[KernelSpec, str] = {}
    used: dict[str, int] = {}
    for spec in plan.specs:
        if isinstance(spec, Extern):
            continue
        base = emitters[spec.kind].symbol(spec)
        used[base] = used.get(base, 0) + 1
        named[spec] = base if used[base] == 1 else f"{base}_v{used[base]}"
    return named
