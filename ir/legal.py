"""What a program may hold at each stage, checked after every pass.

A stage adds to what the earlier ones forbid, except where an op only exists for a while
(``dequantize`` between introducing and fusing quantization).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..errors import IllegalProgram
from .program import Program, Stage

aten = torch.ops.aten
mill = torch.ops.tokenmill

# stage -> ops that are gone from it on, with what should have replaced them
FORBIDDEN: dict[Stage, dict[Any, str]] = {
    Stage.ATEN: {mill.dequantize: "quantization comes later"},
    Stage.CANONICAL: {
        aten.view: "reshape",
        aten._unsafe_view: "reshape",
        aten.dropout: "nothing",
        aten.detach: "nothing",
        aten.alias: "nothing",
    },
    Stage.DIALECT: {
        aten.scaled_dot_product_attention: "tokenmill.attention (lift_attention)",
        aten.embedding: "tokenmill.embed (canonicalize)",
    },
    Stage.CACHED: {
        mill.attention: "tokenmill.cached_attention (insert_cache)",
        mill.latent_attention: "tokenmill.cached_latent_attention (insert_cache)",
    },
    Stage.FUSED: {mill.dequantize: "packed operands (fuse_dequantize)"},
}


def verify(program: Program, pass_name: str) -> None:
    """Raise IllegalProgram unless the program is well formed and legal at its stage."""
    seen: set[fx.Node] = set()
    forbidden = {
        op: why
        for stage, ops in FORBIDDEN.items()
        if stage <= program.stage and not (stage is Stage.ATEN and program.stage >= Stage.QUANTIZED)
        for op, why in ops.items()
    }
    for node in program.graph.nodes:
        for problem in _problems(program, node, seen, forbidden):
            raise IllegalProgram(pass_name=pass_name, reason=problem, node=node.format_node())
        seen.add(node)
    if program.stage >= Stage.CACHED:
        _verify_caches(program, pass_name)


def _problems(
    program: Program, node: fx.Node, seen: set[fx.Node], forbidden: dict[Any, str]
) -> list[str]:
    problems = [
        f"{a.name} is used before it is computed" for a in node.all_input_nodes if a not in seen
    ]
    if node.op == "get_attr":
        problems += _weight_problems(program, node)
    elif node.op == "call_function":
        target = getattr(node.target, "overloadpacket", node.target)
        if target in forbidden:
            problems.append(
                f"{node.target} is not legal at {program.stage.name}: use {forbidden[target]}"
            )
        if "val" not in node.meta:
            problems.append("the node has no shape")
    elif node.op not in ("placeholder", "output"):
        problems.append(f"{node.op} nodes do not exist in a program")
    return problems


def _weight_problems(program: Program, node: fx.Node) -> list[str]:
    if node.target not in program.weights:
        return [f"there is no weight {node.target!r}"]
    real, value = program.weights.like(node.target), node.meta.get("val")
    if isinstance(value, Tensor) and real.shape == value.shape and real.dtype == value.dtype:
        return []
    return [f"weight {node.target!r} is {tuple(real.shape)} {real.dtype}, the node says otherwise"]


def _verify_caches(program: Program, pass_name: str) -> None:
    inputs = {n.target for n in program.graph.nodes if n.op == "placeholder"}
    for spec in program.caches:
        if spec.name not in inputs:
            raise IllegalProgram(
                pass_name=pass_name, reason=f"no attention uses {spec.name}", node="placeholders"
            )
