"""What a GPU launches: a target's schedule.json and binaries.json, checked against the plan.

codegen/ABI.md has their form.  A step is a group of launches per bucket, the sizes of batches that
kernels were made for; steps that are the same share one group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from .. import errors
from .artifact import Artifact, Target
from .batch import Batch
from .cache import PAGE
from .layout import Layout

SCHEDULE, SCHEDULE_VERSION = "schedule.json", 1
BINARIES, BINARIES_VERSION = "binaries.json", 1
COUNTS = ("tokens", "rows", "sequences", "fixed")
INPUTS = ("ids", "positions", "rows", "starts", "block_table")
SAMPLING = ("temperature", "top_k", "top_p", "uniform", "tokens")
AREAS = ("scratch", "zero")
GRID_MOST = (2**31 - 1, 65535, 65535)
EXTERN = -1


class Scratch(NamedTuple):
    """Memory that a kernel asks for besides its operands, so many bytes per block; often none."""

    bytes: int
    align: int


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: ``symbol`` in the file ``name`` + ``.cubin`` or ``.ptx``.

    ``aligned`` says of each parameter whether its address must be a multiple of 16; a pointer for each
    of ``scratch`` follows them.  One that ``waits`` for the launches before it may begin while they run.
    """

    name: str
    symbol: str
    aligned: tuple[bool, ...]
    threads: int
    shared: int
    scratch: tuple[Scratch, ...]
    waits: bool = False


@dataclass(frozen=True)
class Launch:
    """A kernel on ``grid`` blocks; ``args`` are names of what its parameters point to.

    ``per_sm`` blocks on every multiprocessor are enough for the first dimension, if it is not 0.
    """

    binary: Binary
    args: tuple[str, ...]
    grid: tuple[int, int, int]
    per_sm: int = 0

    def blocks(self, sms: int) -> tuple[int, int, int]:
        """The blocks to launch on a card of so many multiprocessors."""
        x, y, z = self.grid
        return min(x, self.per_sm * sms) if self.per_sm else x, y, z

    def scratch_places(self) -> list[int]:
        """Where the memory of each of the binary's ``scratch`` begins, and last where all of it ends."""
        places, end = [], 0
        for scratch in self.binary.scratch:
            places.append(ceil_to(end, scratch.align))
            end = places[-1] + scratch.bytes * math.prod(self.grid)
        return [*places, end]


Group: TypeAlias = tuple[Launch, ...]
Bind: TypeAlias = Mapping[str, tuple[str, int]]


@dataclass(frozen=True, eq=False)
class Bucket:
    """Launches of every step for batches of at most this size; None where torch runs the step.

    ``sample`` chooses a token from each row of logits.
    """

    tokens: int
    rows: int
    sequences: int
    steps: tuple[Group | None, ...]
    sample: Group

    def holds(self, batch: Batch) -> bool:
        return (
            batch.ids.size <= self.tokens
            and batch.rows.size <= self.rows
            and batch.starts.size - 1 <= self.sequences
        )


@dataclass(frozen=True)
class Build:
    """For what a target's binaries were made: the architecture as PTX names it, the CUDA version, and the
    shared memory of a block, as the greediest of them needs it."""

    architecture: str
    cuda: tuple[int, int]
    shared: int


@dataclass(frozen=True)
class Schedule:
    """``bind`` has the buffer and first column of every step's operands, ``bind_sample`` those of sampling.

    Buckets are in ascending order.
    ``areas`` are the bytes of memory that launches name ``scratch:N`` and ``zero:N``, and ``kernel_scratch``
    those that binaries ask for.  A row of block_table has ``table_pitch`` entries.
    """

    binaries: tuple[Binary, ...]
    groups: tuple[Group, ...]
    buckets: tuple[Bucket, ...]
    bind: tuple[Bind, ...]
    bind_sample: Bind
    areas: Mapping[str, int]
    table_pitch: int

    @property
    def kernel_scratch(self) -> int:
        ends = (launch.scratch_places()[-1] for group in self.groups for launch in group)
        return max(ends, default=0)

    @staticmethod
    def load(artifact: Artifact, target: Target, layout: Layout) -> Schedule:
        """The schedule of a target; raises ArtifactTooNew, or ArtifactDamaged naming the file."""
        built = _read(artifact, target, BINARIES, BINARIES_VERSION)
        with _Checking(f"{target.directory}/{BINARIES}"):
            made = {name: _made(facts) for name, facts in built["binaries"].items()}
        data = _read(artifact, target, SCHEDULE, SCHEDULE_VERSION)
        with _Checking(f"{target.directory}/{SCHEDULE}"):
            return _parse(data, made, artifact.gpu_plan, layout)


def builds(artifact: Artifact, target: Target) -> set[Build]:
    """What a target's binaries were made for: one, or none if there are no binaries."""
    data = _read(artifact, target, BINARIES, BINARIES_VERSION)
    with _Checking(f"{target.directory}/{BINARIES}"):
        made = data["binaries"].values()
        shared = max((_natural(facts["shared_bytes"]) for facts in made), default=0)
        return {Build(str(facts["ptx_target"]), _version(facts["cuda"]), shared) for facts in made}


class _Checking:
    """Turns what goes wrong in reading ``file`` into ArtifactDamaged."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyError | TypeError | ValueError | AttributeError | IndexError):
            reason = f"malformed: {error!r}"
            raise errors.ArtifactDamaged(file=self._file, reason=reason) from error


def _read(artifact: Artifact, target: Target, name: str, known: int) -> dict[str, Any]:
    file = f"{target.directory}/{name}"
    data = artifact.json(file)
    version = data.get("version")
    if not isinstance(version, int):
        raise errors.ArtifactDamaged(file=file, reason="it is missing, or has no version")
    if version > known:
        raise errors.ArtifactTooNew(found=f"({name}) {version}", known=known)
    if data.get("target") != target.name:
        reason = f"it is for {data.get('target')} instead of {target.name}"
        raise errors.ArtifactDamaged(file=file, reason=reason)
    return data


def _made(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Binary that binaries.json tells."""
    scratch = tuple(
        Scratch(_natural(s["bytes"]), _natural(s["align"], 1)) for s in facts["scratch"]
    )
    return {
        "symbol": str(facts["kernel"]),
        "threads": _natural(facts["threads"], 1),
        "shared": _natural(facts["shared_bytes"]),
        "scratch": scratch,
        "waits": bool(facts.get("waits", False)),
    }


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def _parse(
    data: Mapping[str, Any],
    made: Mapping[str, Mapping[str, Any]],
    plan: Mapping[str, Any],
    layout: Layout,
) -> Schedule:
    binaries = {
        b["name"]: Binary(b["name"], aligned=tuple(p[1] for p in b["params"]), **made[b["name"]])
        for b in data["binaries"]
    }
    areas = {area: _natural(data[f"{area}_bytes"]) for area in AREAS}
    groups = tuple(tuple(read_launch(launch, binaries) for launch in g) for g in data["groups"])
    bind = tuple(
        {param: (at[0], at[1]) for param, at in step["bind"].items()} for step in plan["steps"]
    )
    schedule = Schedule(
        binaries=tuple(binaries.values()),
        groups=groups,
        buckets=tuple(
            Bucket(
                tokens=_natural(b["tokens"], 1),
                rows=_natural(b["rows"], 1),
                sequences=_natural(b["sequences"], 1),
                steps=tuple(_group(groups, index) for index in b["steps"]),
                sample=groups[_natural(b["sample"])],
            )
            for b in data["buckets"]
        ),
        bind=bind,
        bind_sample={"logits": (plan["output"], 0)},
        areas=areas,
        table_pitch=_natural(data["table_pitch"], 1),
    )
    _check(schedule, layout)
    return schedule


def read_binary(entry: Mapping[str, Any], made: Mapping[str, Any]) -> Binary:
    """A binary from what schedule.json and binaries.json say of it."""
    return Binary(entry["name"], aligned=tuple(p[1] for p in entry["params"]), **_made(made))


def read_launch(data: Mapping[str, Any], binaries: Mapping[str, Binary]) -> Launch:
    """A launch as schedule.json has it."""
    x, y, z = (_natural(blocks, 1) for blocks in data["grid"])
    per_sm = _natural(data.get("per_sm", 0))
    launch = Launch(binaries[data["binary"]], tuple(data["args"]), (x, y, z), per_sm)
    if any(blocks > most for blocks, most in zip(launch.grid, GRID_MOST, strict=True)):
        raise ValueError(f"a grid of {launch.grid}")
    if len(launch.args) != len(launch.binary.aligned):
        raise ValueError(f"{launch.binary.name} gets {len(launch.args)} arguments")
    return launch


def _group(groups: Sequence[Group], index: int) -> Group | None:
    return None if index == EXTERN else groups[_natural(index)]


def _check(schedule: Schedule, layout: Layout) -> None:
    if schedule.table_pitch * PAGE < layout.positions:
        raise ValueError("a row of block_table is too short for the longest sequence")
    sizes = [(b.tokens, b.rows, b.sequences) for b in schedule.buckets]
    if not sizes or sizes != sorted(set(sizes)):
        raise ValueError("buckets do not ascend")
    most = (layout.tokens, layout.rows, min(layout.tokens, layout.rows))
    if any(have < want for have, want in zip(sizes[-1], most, strict=True)):
        raise ValueError(f"no bucket for {most[0]} tokens and {most[1]} rows")
    externs = {step.index for step in layout.externs}
    for bucket in schedule.buckets:
        if len(bucket.steps) != layout.steps:
            raise ValueError(f"{len(bucket.steps)} steps, the plan has {layout.steps}")
        for index, group in enumerate(bucket.steps):
            if (group is None) != (index in externs):
                raise ValueError(f"step {index} is for torch in one of plan and schedule only")
    widths = {name: a.width for name, a in layout.activations.items()}
    widths |= dict.fromkeys([*INPUTS, *(w.name for w in layout.weights)], 1)
    widths |= dict.fromkeys([c.name for c in layout.caches], 1)
    for bucket in schedule.buckets:
        for index, group in enumerate(bucket.steps):
            _check_args(group or (), f"step {index}", schedule.bind[index], schedule, widths)
        _check_args(bucket.sample, "sampling", schedule.bind_sample, schedule, widths)


def _check_args(
    group: Group, who: str, bind: Bind, schedule: Schedule, widths: Mapping[str, int]
) -> None:
    """Raise ValueError unless all arguments of a group say where they point."""
    names = {*INPUTS, *(f"count.{n}" for n in COUNTS)}
    if bind is schedule.bind_sample:
        names |= {f"sampling.{n}" for n in SAMPLING}
    for arg in {arg for launch in group for arg in launch.args} - (names - bind.keys()):
        area, _, start = arg.partition(":")
        if arg in bind:
            buffer, column = bind[arg]
            if column not in range(widths.get(buffer, 0)):
                raise ValueError(f"{who} has {arg!r} at column {column} of {buffer!r}")
        elif not start:
            raise ValueError(f"{who} has no {arg!r}")
        elif int(start) not in range(schedule.areas[area]):
            raise ValueError(f"{arg} is beyond {schedule.areas[area]} bytes")


def ceil_to(size: int, unit: int) -> int:
    """``size`` rounded up to a multiple of ``unit``."""
    return -(-size // unit) * unit


def _natural(value: Any, least: int = 0) -> int:
    """A whole number of JSON that is ``least`` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{value!r} is not a whole number from {least} on")
    return value
