"""GPU targets: an architecture, and what a kernel may count on there.

>>> parse_target("sm_90").capability
90
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import BadRecipe


@dataclass(frozen=True)
class GpuTarget:
    """``shared_bytes`` is the most that one block may use; ``sms`` those of a typical card, which the
    default tiles are chosen for.  ``fp8`` says that the tensor cores multiply E4M3."""

    name: str
    capability: int
    sms: int
    shared_bytes: int
    fp8: bool

    @property
    def tma(self) -> bool:
        """Whether one instruction copies a tile that a tensor descriptor says the place of."""
        return self.capability >= 90

    @property
    def dependent_launch(self) -> bool:
        """Whether a launch may take its place on the card before those that it waits for have ended."""
        return self.capability >= 90

    @property
    def device(self) -> Literal["cuda"]:
        return "cuda"

    @property
    def machine(self) -> str:
        """Empty: the processor beside the card does not matter."""
        return ""

    @property
    def features(self) -> tuple[str, ...]:
        return ()


TARGETS: dict[str, GpuTarget] = {
    t.name: t
    for t in (
        GpuTarget("sm_80", 80, 108, 163 * 1024, fp8=False),
        GpuTarget("sm_89", 89, 128, 99 * 1024, fp8=True),
        GpuTarget("sm_90", 90, 132, 227 * 1024, fp8=True),
        GpuTarget("sm_100", 100, 148, 227 * 1024, fp8=True),
        GpuTarget("sm_120", 120, 170, 99 * 1024, fp8=True),
    )
}


def parse_target(name: str) -> GpuTarget:
    """A target by name."""
    if name in TARGETS:
        return TARGETS[name]
    raise BadRecipe(
        where="target",
        reason=f"unknown GPU target {name!r}",
        advice=f"use one of {', '.join(TARGETS)}",
    )
