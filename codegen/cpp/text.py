"""What the kernel emitters share: templates, names of formats, comment headers."""

from __future__ import annotations

from collections.abc import Sequence
from string import Template
from textwrap import dedent

from ...ir import quant

WIDTH = 100  # columns of emitted text


def fill(template: str, **names: object) -> str:
    """Put ``names`` for ``$name`` in C++ text.

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


def signature(*params: str) -> str:
    """The head of a kernel with these operands."""
    return call("TM_NOINLINE void run(", ["Thread &th", "int rows", *params], ") {")


def weight_type(fmt: str) -> str:
    """The decoder of a weight format in weights.h."""
    spec = quant.parse(fmt)
    return (
        f"Int4<{spec.group}>"
        if spec.group
        else {"fp32": "Fp32", "bf16": "Bf16", "int8": "Int8", "fp8": "Fp8"}[fmt]
    )


def weight_params(fmt: str, prefix: str = "") -> list[str]:
    """Parameters of a kernel for the parts of a weight."""
    return [f"const void *{prefix}{p}" for p in quant.parse(fmt).parts]


def weight_parts(fmt: str, prefix: str = "") -> str:
    """The first two members of a ``Weight``: values, scale."""
    parts = quant.parse(fmt).parts
    return f"{prefix}{parts[0]}, " + (f"{prefix}{parts[1]}" if len(parts) > 1 else "nullptr")


def format_name(fmt: str) -> str:
    """A format in a symbol: ``int4-g32`` -> ``int4_g32``."""
    return fmt.replace("-", "_")


def storage_type(fmt: str) -> str:
    """The C type of one value of an unscaled format."""
    return {"fp32": "float", "bf16": "uint16_t"}[fmt]
