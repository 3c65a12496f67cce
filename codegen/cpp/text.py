"""What the C++ emitters share: how kernels take their operands, and the types of weights."""

from __future__ import annotations

from ...ir import quant
from ..text import call, format_name


def signature(*params: str) -> str:
    """The head of a kernel with these operands."""
    return call("TM_NOINLINE void run(", ["Thread &th", "int rows", *params], ") {")


def weight_type(fmt: str) -> str:
    """The decoder of a weight format in weights.h."""
    spec = quant.parse(fmt)
    if isinstance(spec, quant.Codebook):
        return codebook_type(fmt)
    return (
        f"Int4<{spec.group}>"
        if spec.group
        else {"fp32": "Fp32", "bf16": "Bf16", "int8": "Int8", "fp8": "Fp8"}[fmt]
    )


def codebook_type(fmt: str) -> str:
    """The decoder of a codebook in codebooks.h."""
    return f"Book_{format_name(fmt)}"


def weight_params(fmt: str, prefix: str = "") -> list[str]:
    """Parameters of a kernel for the parts of a weight."""
    return [f"const void *{prefix}{p}" for p in quant.parse(fmt).parts]


def weight_parts(fmt: str, prefix: str = "") -> str:
    """The first two members of a ``Weight``: values, scale."""
    parts = quant.parse(fmt).parts
    return f"{prefix}{parts[0]}, " + (f"{prefix}{parts[1]}" if len(parts) > 1 else "nullptr")


def storage_type(fmt: str) -> str:
    """The C type of one value of a table."""
    return {"fp32": "float", "bf16": "uint16_t", "int8": "int8_t"}[fmt]
