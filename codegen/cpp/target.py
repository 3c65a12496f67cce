"""CPU targets: an instruction set level, the flags that select it, and what a machine must offer.

>>> parse_target("cpu-x86-64-v3").vector_bytes
32
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import BadRecipe


@dataclass(frozen=True)
class CpuTarget:
    """``flags`` are those of g++ and clang++, ``features`` the words /proc/cpuinfo must list.

    ``vector_bytes`` is the width of the emitted vectors, ``isa`` what ``tm_isa()`` answers.  The clang
    of ziglang names processors in its own way, and compiles for any machine.
    """

    name: str
    machine: str
    vector_bytes: int
    flags: tuple[str, ...]
    zig_cpu: str
    features: tuple[str, ...] = ()

    @property
    def device(self) -> Literal["cpu"]:
        return "cpu"

    @property
    def isa(self) -> str:
        return self.name.removeprefix("cpu-")

    @property
    def zig_flags(self) -> tuple[str, ...]:
        return ("-target", f"{self.machine}-linux-gnu", f"-mcpu={self.zig_cpu}")


_V3 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_V4_VNNI = (*_V4, "avx512_vnni")

# Best first within one machine; the last of each machine runs anywhere on it.  What comes on top of a level
# multiplies INT8 (vnni, dot) and also BF16 (bf16) in one instruction.
TARGETS: dict[str, CpuTarget] = {
    t.name: t
    for t in (
        CpuTarget(
            "cpu-x86-64-v4-bf16",
            "x86_64",
            64,
            ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
            "x86_64_v4+avx512vnni+avx512bf16",
            (*_V4_VNNI, "avx512_bf16"),
        ),
        CpuTarget(
            "cpu-x86-64-v4-vnni",
            "x86_64",
            64,
            ("-march=x86-64-v4", "-mavx512vnni"),
            "x86_64_v4+avx512vnni",
            _V4_VNNI,
        ),
        CpuTarget("cpu-x86-64-v4", "x86_64", 64, ("-march=x86-64-v4",), "x86_64_v4", _V4),
        CpuTarget(
            "cpu-x86-64-v3-vnni",
            "x86_64",
            32,
            ("-march=x86-64-v3", "-mavxvnni"),
            "x86_64_v3+avxvnni",
            (*_V3, "avx_vnni"),
        ),
        CpuTarget("cpu-x86-64-v3", "x86_64", 32, ("-march=x86-64-v3",), "x86_64_v3", _V3),
        CpuTarget("cpu-x86-64", "x86_64", 16, ("-march=x86-64",), "x86_64"),
        CpuTarget(
            "cpu-aarch64-bf16",
            "aarch64",
            16,
            ("-march=armv8.2-a+dotprod+i8mm+bf16",),
            "generic+v8_2a+dotprod+i8mm+bf16",
            ("asimddp", "i8mm", "bf16"),
        ),
        CpuTarget(
            "cpu-aarch64-dot",
            "aarch64",
            16,
            ("-march=armv8.2-a+dotprod",),
            "generic+v8_2a+dotprod",
            ("asimddp",),
        ),
        CpuTarget("cpu-aarch64", "aarch64", 16, ("-march=armv8-a",), "generic"),
    )
}
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


def cpu_features() -> frozenset[str]:
    """The feature words of this machine's first core; empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, words = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(words.split())
    return frozenset()


def host_target() -> CpuTarget:
    """The best target that this machine runs."""
    machine = platform.machine().lower()
    machine = _ALIASES.get(machine, machine)
    have = cpu_features()
    for target in TARGETS.values():
        if target.machine == machine and have.issuperset(target.features):
            return target
    raise BadRecipe(
        where="target",
        reason=f"no CPU target for machine {machine!r}",
        advice=f"name one of {', '.join(TARGETS)}",
    )


def parse_target(name: str) -> CpuTarget:
    """A target by name; ``cpu`` is this machine's best."""
    if name == "cpu":
        return host_target()
    if name in TARGETS:
        return TARGETS[name]
    raise BadRecipe(
        where="target",
        reason=f"unknown CPU target {name!r}",
        advice=f"use cpu or one of {', '.join(TARGETS)}",
    )
