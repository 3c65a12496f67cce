"""Step one of quantization: weights are stored in their formats, and read back before use."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import ClassVar

from torch import Tensor, fx

from ..ir import quant
from ..ir.program import Program, Stage
from ..recipe import Recipe, Role
from .base import Pass, mill, sweep
from .weight_slots import role, slots


@dataclass(frozen=True)
class Decision:
    """One weight as it will be stored; ``originals`` are the parameters that it comes from."""

    weight: str
    role: Role
    format: str
    parameters: int
    bytes: int
    originals: tuple[str, ...]


@dataclass
class Quantize(Pass):
    """W => dequantize(q, scale), in the format that the recipe gives the weight's role and names

    ``decisions`` tells what was decided for every weight, also for those that stay in fp32.
    """

    recipe: Recipe = field(default_factory=Recipe)
    decisions: list[Decision] = field(default_factory=list, init=False)

    name = "quantize"
    produces: ClassVar[Stage | None] = Stage.QUANTIZED
    tolerance: ClassVar[float | None] = None

    def run(self, program: Program) -> int:
        decisions = _vectors(program)
        for slot in slots(program):
            names = [parts[0].target for parts in slot.weights]
            if (purpose := role(program, slot.node)) is None:
                continue
            originals = [o for name in names for o in program.weights.roots(name)]
            format = self.recipe.format_for(originals, purpose)
            for name in names:
                decisions[name, format] = _decide(program, name, purpose, format)
            if format != "fp32":
                with program.graph.inserting_before(slot.node):
                    slot.fill([[stored(program, name, format)] for name in names], slot.format)
        self.decisions = list(decisions.values())
        sweep(program)
        return sum(d.format != "fp32" for d in self.decisions)

    @property
    def notes(self) -> list[str]:
        """The share of the parameters that each format has, so that none is skipped silently."""
        shares: Counter[str] = Counter()
        for decision in self.decisions:
            shares[decision.format] += decision.parameters
        return [f"{name}: {n / shares.total():.2%} of the parameters" for name, n in shares.items()]


def _decide(program: Program, name: str, purpose: Role, format: str) -> Decision:
    weight = program.weights.like(name)
    rows, inputs = (1, 1, *weight.shape)[-2:]
    matrices = weight.numel() // max(rows * inputs, 1)
    size = matrices * quant.parse(format).bytes(rows, inputs)
    originals = tuple(program.weights.roots(name))
    return Decision(name, purpose, format, weight.numel(), size, originals)


def _vectors(program: Program) -> dict[tuple[str, str], Decision]:
    """Vectors (of norms, biases, routers) stay as they are."""
    names = [n for n in program.used_weights() if program.weights.like(n).dim() < 2]
    return {(n, "fp32"): _decide(program, n, "norm", "fp32") for n in names}


def stored(program: Program, name: str, format: str) -> fx.Node:
    """A node that reads the weight back from its parts, computed when they are asked for."""
    parts = []
    for part in quant.parse(format).parts:
        full = f"{name}.{format}.{part}"
        if full not in program.weights:
            program.weights.derive(full, partial(_part, format, part), name)
        parts.append(program.weight(full))
    inputs = program.weights.like(name).shape[-1]
    return program.call(mill.dequantize.default, parts, format, inputs)


def _part(format: str, part: str, weight: Tensor) -> Tensor:
    return _parts(format, weight)[part]


@lru_cache(maxsize=1)  # the parts of a weight are asked for one after the other
def _parts(format: str, weight: Tensor) -> dict[str, Tensor]:
    return quant.quantize(weight, quant.parse(format))
