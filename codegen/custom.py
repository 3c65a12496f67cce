"""Templates of the kernels that users register; :mod:`tokenmill.extend` says how they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..errors import BadExtension
from ..ir import quant
from ..ir.ops import OPS
from ..ir.plan import Custom

Template: TypeAlias = str | Callable[[Custom], str]


@dataclass(frozen=True)
class Templates:
    """The body of a kernel in C++ and in Triton: text, or a function of the spec that writes it."""

    cpp: Template = ""
    triton: Template = ""


TEMPLATES: dict[str, Templates] = {}


def unknown(plan: Mapping[str, Any]) -> list[str]:
    """What a plan, as JSON, uses of extensions that are not loaded: ops and formats."""
    found: dict[str, None] = {}
    for spec in plan["specs"]:
        match spec:
            case {"kind": "custom", "op": str(op)} if op not in TEMPLATES:
                found[f"the kernel {op!r}"] = None
            case {"kind": "linear" | "experts"}:
                names = (spec.get(key) for key in ("format", "gate_up_format", "down_format"))
                found |= {f"the format {n!r}": None for n in names if n and not quant.known(n)}
    return list(found)


def symbol(spec: Custom) -> str:
    return f"{spec.op}_w{spec.out.width}"


def body(spec: Custom, language: Literal["cpp", "triton"]) -> str:
    """A kernel's body; raises BadExtension if the op has none."""
    template: Template = getattr(TEMPLATES.get(spec.op, Templates()), language)
    if not template:
        raise BadExtension(
            name=spec.op, reason=f"it has no {language} template",
            advice=f"pass {language}= to extend.kernel, or leave that target out",
        )  # fmt: skip
    return template if isinstance(template, str) else template(spec)


def about(spec: Custom) -> str:
    """What the op computes: the first line of its docstring."""
    return ((OPS[spec.op].reference.__doc__ or spec.op).strip().splitlines() or [spec.op])[0]


def constants(spec: Custom) -> dict[str, int | float | bool]:
    """Names in capitals that a template may use: widths, last dims, and attributes that are numbers."""
    sizes = {}
    for tensor in (*spec.operands, spec.out):
        sizes[f"{tensor.name.upper()}_WIDTH"] = tensor.width
        sizes[f"{tensor.name.upper()}_LAST"] = tensor.shape[-1] if tensor.shape else 1
    return sizes | {
        name.upper(): value
        for name, value in spec.attributes
        if isinstance(value, int | float | bool)
    }
