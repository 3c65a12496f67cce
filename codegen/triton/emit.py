"""From a plan to Triton text: shared device functions, one file per kernel kind, and ``schedule.json``.

Pure: the same plan and target give the same bytes.  The schedule says which functions of the text become
binaries, with what bound, and which of them every step launches; ``codegen/ABI.md`` has its form.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from itertools import accumulate
from types import ModuleType
from typing import Any

from ...ir.cache import PAGE
from ...ir.plan import DTYPE_BYTES, KINDS, Capacity, Extern, KernelSpec, Operand, Plan, Step
from ..text import fill, symbols
from . import (
    attend,
    cache_write,
    chain,
    custom,
    embed,
    experts,
    latent_attend,
    linear,
    norm,
    pointwise,
    rope,
    route,
    sample,
    select_rows,
)
from .launch import Bucket, Group, Kernel, Launch, Site, View, ceil_div
from .target import GpuTarget
from .tiles import Table, Tiles

EMITTERS: dict[str, ModuleType] = {
    "embed": embed,
    "select_rows": select_rows,
    "norm": norm,
    "linear": linear,
    "pointwise": pointwise,
    "rope": rope,
    "cache_write": cache_write,
    "attend": attend,
    "latent_attend": latent_attend,
    "route": route,
    "experts": experts,
    "custom": custom,
    "chain": chain,
}
# Files of device functions that are copied as they are, and which kinds of kernels call them.
SUPPORT = {
    "support": frozenset(KINDS),
    "matmul": frozenset(("linear", "experts", "latent_attend")),
    "attention": frozenset(("attend", "cache_write", "chain", "latent_attend")),
}
SCHEDULE = "schedule.json"
SCHEDULE_VERSION = 1
ALIGN = 256  # bytes: scratch arrays begin at multiples of it


def emit(plan: Plan, target: GpuTarget, table: Table | None = None) -> dict[str, str]:
    """File name -> text; sizes that ``table`` has come before those of tiles.py."""
    names = symbols(plan, EMITTERS)
    kinds = {spec.kind for spec in names}
    sources = {
        f"{support}.py": files(__package__).joinpath(f"{support}.py").read_text()
        for support, users in SUPPORT.items()
        if users & kinds
    }
    for kind in (kind for kind in EMITTERS if kind in kinds):
        kernels = {spec: name for spec, name in names.items() if spec.kind == kind}
        sources[f"{kind}_kernels.py"] = _kind_file(kind, kernels)
    if output := plan.buffers.get(plan.output):
        sources |= sampling_file(plan.vocab, output.width)
    sources |= launches_file(target)
    schedule = Schedule(plan, Tiles(target, table or {}), names).dump()
    sources[SCHEDULE] = (
        json.dumps(schedule, indent=None, separators=(",", ":"), sort_keys=True) + "\n"
    )
    return sources


def sampling_file(vocab: int, pitch: int) -> dict[str, str]:
    """The sources of the kernel that chooses tokens from logits [rows, vocab]."""
    return {
        sample.FILE: fill(
            KIND_FILE,
            about=(sample.__doc__ or "").strip().split("\n")[0],
            imports="",
            body=sample.emit(vocab, pitch),
        )
    }


def launches_file(target: GpuTarget) -> dict[str, str]:
    """How kernels of a target wait for each other."""
    body = DEPENDENT if target.dependent_launch else INDEPENDENT
    return {"launches.py": fill(LAUNCHES, body=body.strip())}


def _kind_file(kind: str, kernels: Mapping[KernelSpec, str]) -> str:
    module = EMITTERS[kind]
    imports = [f"from .{name} import *" for name, users in SUPPORT.items() if kind in users]
    body = "\n\n".join(module.emit(spec, name) for spec, name in kernels.items())
    about = (module.__doc__ or "").strip().split("\n")[0]
    return fill(KIND_FILE, about=about, imports="\n".join(imports), body=body)


def buckets(capacity: Capacity) -> list[Bucket]:
    """Powers of two up to the capacity, which is the last.

    >>> [b.tokens for b in buckets(Capacity(tokens=12, rows=4))]
    [1, 2, 4, 8, 12]
    """
    sizes = [1 << i for i in range(capacity.tokens.bit_length()) if 1 << i < capacity.tokens]
    return [
        Bucket(tokens, min(tokens, capacity.rows), min(tokens, capacity.rows))
        for tokens in (*sizes, capacity.tokens)
    ]


@dataclass
class Schedule:
    """Binaries and groups of launches, each but once however many steps share it."""

    plan: Plan
    tiles: Tiles
    names: Mapping[KernelSpec, str]
    binaries: dict[Kernel, str] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    known: dict[Hashable, int] = field(default_factory=dict)  # groups, by what decides on them
    scratch_bytes: int = 0
    zero_bytes: int = 0

    def dump(self) -> dict[str, Any]:
        """The JSON form, schedule.json."""
        lists = [
            asdict(bucket)
            | {"steps": [self._step(step, bucket) for step in self.plan.steps]}
            | {"sample": self._sample(bucket)}
            for bucket in buckets(self.plan.capacity)
        ]
        return {
            "version": SCHEDULE_VERSION,
            "target": self.tiles.target.name,
            "table_pitch": self._table_pitch,
            "scratch_bytes": self.scratch_bytes,
            "zero_bytes": self.zero_bytes,
            "binaries": self.entries,
            "groups": [json.loads(text) for text in self.groups],
            "buckets": lists,
        }

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The binaries in their JSON form."""
        return [_binary(kernel, name) for kernel, name in self.binaries.items()]

    @property
    def _table_pitch(self) -> int:
        return ceil_div(self.plan.positions, PAGE)

    def _step(self, step: Step, bucket: Bucket) -> int:
        """Index of the step's group; -1 for a step that torch runs."""
        if isinstance(step.spec, Extern):
            return -1
        views = {param: _view(self.plan, operand) for param, operand in step.bind.items()}
        key = step.spec, bucket, step.rows, tuple(views.items())
        if key not in self.known:
            self.known[key] = self.launch(step, bucket, self.tiles)
        return self.known[key]

    def launch(self, step: Step, bucket: Bucket, tiles: Tiles) -> int:
        """Index of a step's group, its work cut as ``tiles`` has it."""
        assert not isinstance(step.spec, Extern)
        views = {param: _view(self.plan, operand) for param, operand in step.bind.items()}
        site = Site(
            step.spec, self.names[step.spec], tiles, bucket, step.rows, views,
            self.plan.positions, self._table_pitch,
        )  # fmt: skip
        return self._group(EMITTERS[step.spec.kind].launches(site))

    def group(self, index: int) -> list[dict[str, Any]]:
        """The launches of a group in their JSON form."""
        found: list[dict[str, Any]] = json.loads([*self.groups][index])
        return found

    def _sample(self, bucket: Bucket) -> int:
        """Index of the group that chooses tokens from the logits; -1 if the plan has none."""
        if self.plan.output not in self.plan.buffers:
            return -1
        return self._group(Group((sample.launch(bucket.rows, self.plan.vocab),)))

    def _group(self, group: Group) -> int:
        places = dict(self._scratch(group))
        text = json.dumps([self._launch(launch, places) for launch in group.launches])
        return self.groups.setdefault(text, len(self.groups))

    def _scratch(self, group: Group) -> Iterator[tuple[str, str]]:
        """Where each scratch array begins: ``scratch:BYTES`` or ``zero:BYTES``."""
        for area, zeroed in (("scratch", False), ("zero", True)):
            sizes = {n: b for n, b in group.scratch.items() if n.endswith("_zero") == zeroed}
            ends = list(accumulate(ceil_div(max(b, 1), ALIGN) * ALIGN for b in sizes.values()))
            yield from zip(
                (f"scratch.{name}" for name in sizes),
                (f"{area}:{start}" for start in (0, *ends)),
                strict=False,
            )
            total = ends[-1] if ends else 0
            if zeroed:
                self.zero_bytes = max(self.zero_bytes, total)
            else:
                self.scratch_bytes = max(self.scratch_bytes, total)

    def _launch(self, launch: Launch, places: Mapping[str, str]) -> dict[str, Any]:
        kernel = launch.kernel
        if kernel not in self.binaries:
            twins = sum(k.function == kernel.function for k in self.binaries)
            self.binaries[kernel] = f"{kernel.function}.{twins}"
        return {
            "binary": self.binaries[kernel],
            "grid": launch.grid,
            "args": [places.get(arg, arg) for arg in launch.args],
            **({"per_sm": launch.per_sm} if launch.per_sm else {}),
        }


def _binary(kernel: Kernel, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "file": kernel.file,
        "function": kernel.function,
        "params": [[param.type, param.aligned] for param in kernel.params],
        "constants": dict(kernel.constants),
        "warps": kernel.warps,
        "stages": kernel.stages,
    }


def _view(plan: Plan, operand: Operand) -> View:
    buffer = plan.buffers[operand.buffer]
    if buffer.kind != "arena":
        return View(buffer.dtype, buffer.width if buffer.kind == "cache" else 0)
    size = DTYPE_BYTES[buffer.dtype]
    aligned = (buffer.offset + operand.column * size) % 16 == 0 and buffer.width * size % 16 == 0
    return View(buffer.dtype, buffer.width, aligned)


KIND_FILE = '''
"""$about"""

import triton
import triton.language as tl

from .launches import wait_for_launches
$imports


$body
'''
LAUNCHES = '''
"""How a kernel meets those that were launched before it."""

import triton
import triton.language as tl


@triton.jit
def wait_for_launches():
    $body
'''
INDEPENDENT = '''
"""Nothing: on this architecture a launch begins when those before it have ended."""
'''
DEPENDENT = '''
"""Wait for what the launches before have written, and then let the next one take its place on the card.

Every kernel begins with it, so whoever has waited for one launch has waited for all before that.
"""
tl.extra.cuda.gdc_wait()
tl.extra.cuda.gdc_launch_dependents()
'''
