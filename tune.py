"""Tuning: the sizes with which an artifact's kernels are fastest on the card that is here.

The steps of the model run in order on a batch that fills a bucket, so a kernel meets what it meets in use:
activations, routes and a cache of the model's own.  Where sizes may be chosen (codegen/triton/tiles.py),
the step stops, and others are compiled, compared with what the sizes in force compute, and timed in turns
with them.  What is faster by more than the noise goes into a table, which `optimize --tiles` takes.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from . import api
from .codegen import check_table, emit, parse_target
from .codegen.reference import row_error
from .codegen.text import symbols
from .codegen.triton import launch
from .codegen.triton.build import Entry, Outcome, compiler, toolchain
from .codegen.triton.emit import EMITTERS, Schedule
from .codegen.triton.target import GpuTarget
from .codegen.triton.tiles import OPTIONS_MOST, Gemm, T, Table, Tiles, Walk
from .errors import ArtifactDamaged, BadRecipe, OtherKernels, OutputFailed, TokenmillError
from .ir.plan import Extern, KernelSpec, Plan, operand_width
from .recipe import TileTable
from .runtime import Artifact
from .runtime.batch import Batch
from .runtime.cache import pages_for
from .runtime.cuda import CudaDevice
from .runtime.device import Device, Region, Work, recorded, region_bytes
from .runtime.gpu import GpuExecutor
from .runtime.gpu_target import choose_target
from .runtime.schedule import Binary, Bind, Bucket, Group, read_binary, read_launch

if TYPE_CHECKING:
    from torch import Tensor

    from .api import Progress

SEED = 0
CONTEXT = 2048  # tokens before the one that a sequence decodes
COLD_BYTES = 384 << 20  # that works in turn read, so that none finds its operands in a cache
COPIES_MOST = 16
SCREENED, FINALISTS, ROUNDS = 3, 3, 9
LEAST_GAIN = 0.02
ROUNDING = 2.0**-6  # of a row's largest value: what the order of sums and bf16 may change
COMPILE_SECONDS = 60.0  # that sizes may cost before they are given up
TUNED = "tuned."  # how the names of binaries begin that are not the artifact's

Sizes: TypeAlias = Gemm | Walk
Compile: TypeAlias = Callable[[Sequence[Entry]], Iterator[Outcome]]


@dataclass(frozen=True)
class Problem:
    """A kernel's launches for at most ``rows`` rows, first met in step ``step`` of bucket ``bucket``."""

    kernel: str
    rows: int
    bucket: int
    step: int

    def entry(self, sizes: Sizes) -> Table:
        """A table that says ``sizes`` of it."""
        return {self.kernel: {str(self.rows): asdict(sizes)}}


@dataclass(frozen=True)
class Found:
    """What came of a problem; ``seconds`` are of the step's launches, with the sizes in force and the best.

    Of the ``tried`` sizes some ``failed`` (to compile, to fit, to run), and some were ``wrong``.
    """

    kernel: str
    rows: int
    before: Sizes
    best: Sizes
    seconds: tuple[float, float]
    tried: int
    failed: int
    wrong: int

    def describe(self) -> dict[str, Any]:
        before, best = self.seconds
        return asdict(self) | {
            "seconds": {"before": before, "best": best},
            "speedup": before / best,
        }


def tune(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    only: str | None = None,
    seconds: float | None = None,
    extensions: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tune the kernels of an artifact whose names hold ``only``, for about so many ``seconds``.

    The table at ``output`` (``tiles-TARGET.json``) is written after every improvement, and has what the
    artifact was compiled with too; entries that it has before are kept, and not measured again.  Without
    improvements no file is written.  Raises NoGpu or MissingExtra where there is no card or no Triton, what
    running the artifact raises, BadRecipe for a table that is damaged or for another target, OutputFailed.
    """
    deadline = None if seconds is None else monotonic() + seconds
    artifact = Artifact.open(directory)
    toolchain()
    device: Device = CudaDevice()
    target, _ = choose_target(artifact, device)
    plan = api.open_plans(artifact, extensions)[target.device]
    if api.differing_sources(artifact, target, plan):
        raise OtherKernels(path=str(directory), built_by=artifact.manifest.tokenmill)
    path = Path(output or f"tiles-{target.name}.json")
    if not path.parent.is_dir():
        raise OutputFailed(path=str(path), reason="there is no such directory")
    kept = _read(path, target.name)
    table = _joined(api.tiles_of(artifact, target.name), kept)
    parsed = parse_target(target.name)
    assert isinstance(parsed, GpuTarget)
    say = progress or (lambda what, done, total: None)
    say("load", 0, 1)
    found: list[Found] = []
    with Bench(artifact, device, plan, Tiles(parsed, table)) as bench:
        problems = [
            p
            for p in bench.problems()
            if (only or "") in p.kernel and str(p.rows) not in kept.get(p.kernel, {})
        ]
        for result in bench.measure(problems, deadline):
            found.append(result)
            say(f"tune {result.kernel}", len(found), len(problems))
            if result.best != result.before:
                _write(path, target.name, bench.tiles.table)
    better = [f.describe() for f in found if f.best != f.before]
    return {
        "target": target.name,
        "card": device.name,
        "path": str(path) if better else None,
        "measured": len(found),
        "left": len(problems) - len(found),
        "tried": sum(f.tried for f in found),
        "failed": sum(f.failed for f in found),
        "wrong": sum(f.wrong for f in found),
        "better": better,
    }


# --- the table ------------------------------------------------------------------------------------


def _read(path: Path, target: str) -> Table:
    """What a table of earlier says; nothing if there is none."""
    if not path.exists():
        return {}
    found = TileTable.load(path)
    if found.target != target:
        raise BadRecipe(
            where=path, reason=f"is for {found.target}, and this card is tuned for {target}",
            advice="pass another file with -o",
        )  # fmt: skip
    check_table(target, found.tiles)
    return found.tiles


def _write(path: Path, target: str, table: Table) -> None:
    """All of it or nothing."""
    text = json.dumps({"target": target, "tiles": table}, indent=1, sort_keys=True) + "\n"
    stage = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        stage.write_text(text)
        stage.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputFailed(path=str(path), reason=reason) from error
    finally:
        stage.unlink(missing_ok=True)


def _joined(table: Table, other: Table) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Entries of both, those of ``other`` where both have one."""
    return {name: {**table.get(name, {}), **other.get(name, {})} for name in {**table, **other}}


# --- what may be chosen ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked(Tiles):
    """Tiles that remember what they were asked for: the sizes in force, and others worth measuring."""

    questions: dict[tuple[str, int], Callable[[], list[Sizes]]] = field(default_factory=dict)

    def choose(self, kernel: str, rows: int, rule: T, options: Callable[[], list[T]]) -> T:
        chosen: T = super().choose(kernel, rows, rule, options)
        self.questions[kernel, rows] = lambda: [chosen, *(o for o in options() if o != chosen)]
        return chosen


@dataclass
class Trials:
    """Compiles in ``folder`` until the time is over; ``made`` has what became of binaries, by name."""

    folder: Path
    compile: Compile
    deadline: float | None
    made: dict[str, Binary | TokenmillError] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return self.deadline is not None and monotonic() >= self.deadline

    def launches(self, schedule: Schedule, groups: Sequence[int]) -> dict[int, Group]:
        """The launches of those groups whose binaries could be built in time, the first among them."""
        used = {index: schedule.group(index) for index in groups}
        names = dict.fromkeys(launch["binary"] for group in used.values() for launch in group)
        entries = {entry["name"]: entry for entry in schedule.entries}
        wanted = [entries[name] for name in names if name not in self.made]
        needed = {launch["binary"] for launch in used[groups[0]]}
        for entry, outcome in zip(wanted, self.compile(wanted), strict=True):
            name = entry["name"]
            self.made[name] = outcome if isinstance(outcome, TokenmillError) else (
                read_binary({**entry, "name": TUNED + name}, asdict(outcome))
            )  # fmt: skip
            if name in needed and isinstance(outcome, TokenmillError):
                raise outcome
            if self.over and needed <= self.made.keys():
                break
        built = {name: made for name, made in self.made.items() if isinstance(made, Binary)}
        return {
            index: tuple(read_launch(launch, built) for launch in group)
            for index, group in used.items()
            if all(launch["binary"] in built for launch in group)
        }


class Bench(GpuExecutor):
    """A model on a card, and its kernels in sizes that the artifact does not have.

    ``tiles`` are those in force, with what has been found so far.
    """

    def __init__(self, artifact: Artifact, device: Device, plan: Plan, tiles: Tiles) -> None:
        super().__init__(artifact, device)
        _, self._image = choose_target(artifact, device)
        self.plan, self.tiles = plan, tiles
        self._emitted = Schedule(plan, tiles, symbols(plan, EMITTERS))
        self._copies: Region | None = None

    def problems(self) -> list[Problem]:
        """Each once; those of the least bucket first, which decodes alone, then of the largest."""
        last = len(self._schedule.buckets) - 1
        steps: dict[KernelSpec, int] = {}
        for index, spec in enumerate(step.spec for step in self.plan.steps):
            steps.setdefault(spec, index)
        found: dict[tuple[str, int], Problem] = {}
        for bucket in dict.fromkeys((0, last, *range(last))):
            for step in steps.values():
                for kernel, rows in self._ask(bucket, step):
                    found.setdefault((kernel, rows), Problem(kernel, rows, bucket, step))
        return list(found.values())

    def measure(
        self, problems: Sequence[Problem], deadline: float | None = None
    ) -> Iterator[Found]:
        """What comes of each problem, in this order, until the time is over.

        Raises KernelFailed if the card reports an error that outlives the kernel that caused it, and
        KernelBuildFailed if sizes in force cannot be compiled.
        """
        if not problems:
            return
        target = self.tiles.target
        with (
            tempfile.TemporaryDirectory(prefix="tokenmill-") as folder,
            compiler(
                Path(folder), emit(self.plan, target.name), target, OPTIONS_MOST, COMPILE_SECONDS
            ) as compile_,
            self._reporting(),
            self._device.stream(),
        ):
            trials = Trials(Path(folder), compile_, deadline)
            self._fill_cache()
            for bucket, wanted in groupby(problems, lambda problem: problem.bucket):
                yield from self._walk(self._schedule.buckets[bucket], list(wanted), trials)

    def _walk(self, bucket: Bucket, problems: Sequence[Problem], trials: Trials) -> Iterator[Found]:
        """Run a bucket's steps, and tune what is met on the way."""
        batch = self._full(bucket)
        self._upload(batch, None)
        for step in range(1 + max(problem.step for problem in problems)):
            for problem in (p for p in problems if p.step == step):
                if trials.over:
                    return
                yield self._tuned(problem, batch, trials)
            self._step(bucket, step, batch)()

    def _tuned(self, problem: Problem, batch: Batch, trials: Trials) -> Found:
        groups = self._groups(problem)
        first = next(iter(groups))
        launches = trials.launches(self._emitted, list(groups))
        self._make_areas(launches.values())
        binds = self._binds(problem.step)
        start = self._memory["activations"]["arena"].clone()
        right: dict[int, list[Work]] = {}
        failed, want = len(groups) - len(launches), None
        refusals: tuple[type[Exception], ...] = (ArtifactDamaged, *self._device.failures)
        for index, group in launches.items():
            try:
                works = [self._work(group, bind, trials.folder) for bind in binds]
                got = self._result(works[0], problem.step, batch, start)
            except refusals:
                if index == first:
                    raise
                failed += 1
                continue
            want = got if want is None else want
            if row_error(got, want) <= ROUNDING:
                right[index] = works
        best, seconds = self._fastest(right)
        self._memory["activations"]["arena"].copy_(start)
        self._copies = None
        for name in [name for name in self._kernels if name.startswith(TUNED)]:
            del self._kernels[name]
        if best != first:
            table = _joined(self.tiles.table, problem.entry(groups[best]))
            self.tiles = Tiles(self.tiles.target, table)
        return Found(
            problem.kernel, problem.rows, groups[first], groups[best], seconds, len(groups),
            failed, len(groups) - failed - len(right),
        )  # fmt: skip

    # --- sizes

    def _ask(self, bucket: int, step: int) -> dict[tuple[str, int], Callable[[], list[Sizes]]]:
        """What a step's launches want to be told, and the answers worth measuring."""
        asked = Asked(self.tiles.target, self.tiles.table)
        if not isinstance(self.plan.steps[step].spec, Extern):
            self._emit(bucket, step, asked)
        return asked.questions

    def _groups(self, problem: Problem) -> dict[int, Sizes]:
        """Groups that differ, by index, with the sizes that give them; those in force first."""
        found: dict[int, Sizes] = {}
        for sizes in self._ask(problem.bucket, problem.step)[problem.kernel, problem.rows]():
            table = _joined(self.tiles.table, problem.entry(sizes))
            group = self._emit(problem.bucket, problem.step, Tiles(self.tiles.target, table))
            found.setdefault(group, sizes)
        return found

    def _emit(self, bucket: int, step: int, tiles: Tiles) -> int:
        """Index of a step's launches in ``_emitted``."""
        size = self._schedule.buckets[bucket]
        most = launch.Bucket(size.tokens, size.rows, size.sequences)
        return self._emitted.launch(self.plan.steps[step], most, tiles)

    # --- what kernels meet

    def _fill_cache(self) -> None:
        """The keys of a prompt in the first pages, and the same ones in all others."""
        context = min(CONTEXT, self.layout.positions)
        pages = list(range(pages_for(context)))
        ids = np.random.default_rng(SEED).integers(self.layout.vocab, size=context).tolist()
        for first in range(0, context, self.layout.tokens):
            self.run(Batch.of([(ids[first : first + self.layout.tokens], first, pages)], rows=[]))
        for name in (cache.name for cache in self.layout.caches):
            rows = self._memory["cache"][name].view(self.pages, -1)
            for at in range(len(pages), self.pages, len(pages)):
                part = rows[at : at + len(pages)]
                part.copy_(rows[: len(part)])

    def _full(self, bucket: Bucket) -> Batch:
        """A token of each sequence after its context; where there are more tokens than that, prompts."""
        tokens, positions = bucket.tokens, self.layout.positions
        decoding = tokens == bucket.sequences
        count = tokens if decoding else -(-tokens // positions)
        each, first = -(-tokens // count), min(CONTEXT, positions) - 1 if decoding else 0
        ids = np.random.default_rng(SEED).integers(self.layout.vocab, size=tokens).tolist()
        per = pages_for(first + each)
        chunks = [
            (
                ids[each * i : each * (i + 1)],
                first,
                [(per * i + page) % self.pages for page in range(per)],
            )
            for i in range(count)
        ]
        return Batch.of(chunks, rows=list(range(tokens - bucket.rows, tokens)))

    def _binds(self, step: int) -> list[Bind]:
        """A step's operands, with weights and caches of other layers in their place, then copies of weights
        until what is read has left the card's cache when its turn comes again.
        """
        mine, spec = self._schedule.bind[step], self.plan.steps[step].spec
        weights, caches = self._memory["weights"], self._memory["cache"]

        def lasting(bind: Bind) -> dict[str, tuple[str, int]]:
            return {p: at for p, at in bind.items() if at[0] in weights or at[0] in caches}

        read = {buffer: weights[buffer].numel() for buffer, _ in mine.values() if buffer in weights}
        size = sum(read.values()) + sum(caches[b].numel() for b, _ in mine.values() if b in caches)
        twins = [i for i, s in enumerate(self.plan.steps) if s.spec == spec and i != step]
        binds = [mine, *({**mine, **lasting(self._schedule.bind[i])} for i in twins)][:COPIES_MOST]
        more = range(min(COPIES_MOST, -(-COLD_BYTES // max(size, 1))) - len(binds))
        names = {f"{b}#{i}": b for i in more for b in read}
        sizes = {name: read[b] for name, b in names.items()}
        if not sizes or 2 * region_bytes(sizes) > self._device.free_bytes():
            return binds
        self._copies = Region(self._device, sizes)
        for name, buffer in names.items():
            self._copies[name].copy_(weights[buffer])
        return binds + [
            {p: (f"{b}#{i}" if b in read else b, column) for p, (b, column) in mine.items()}
            for i in more
        ]

    def _make_areas(self, groups: Iterable[Group]) -> None:
        """Room for what launches share, where that of the artifact's own is too small."""
        kernels = (each.scratch_places()[-1] for group in groups for each in group)
        needs = {
            "scratch": self._emitted.scratch_bytes,
            "zero": self._emitted.zero_bytes,
            "kernels": max(kernels, default=0),
        }
        have = self._memory["scratch"]
        if any(size > have[name].numel() for name, size in needs.items()):
            most = {name: max(size, have[name].numel()) for name, size in needs.items()}
            self._programs.clear()  # they know the old addresses
            self._memory["scratch"] = Region(self._device, most)
            self._memory["scratch"]["zero"].zero_()

    def _address(self, arg: str, bind: Bind) -> int:
        buffer, _ = bind.get(arg, ("", 0))
        if self._copies is not None and buffer in self._copies:
            return self._copies.address(buffer)
        return super()._address(arg, bind)

    # --- runs

    def _work(self, group: Group, bind: Bind, folder: Path) -> Work:
        """What launches a group on the operands of ``bind``."""
        for binary in (each.binary for each in group):
            if binary.name not in self._kernels:
                file = folder / f"{binary.name.removeprefix(TUNED)}.{self._image}"
                self._kernels[binary.name] = self._device.load(file, self._image, binary)
        launches = self._bound(group, bind, "a step that is tuned")

        def run() -> None:
            for each in launches:
                each()

        return run

    def _result(self, work: Work, step: int, batch: Batch, start: Tensor) -> Tensor:
        """``out`` of a step that finds the arena as it was at the ``start``; NaN if it leaves a mess."""
        operand, spec = self.plan.steps[step].bind["out"], self.plan.steps[step].spec
        self._memory["activations"]["arena"].copy_(start)
        work()
        self._device.wait()
        rows = self._view(operand.buffer, batch).float()
        zero = self._memory["scratch"]["zero"]
        if zero.any():
            zero.zero_()
            rows = rows * float("nan")
        return rows[:, operand.column : operand.column + operand_width(spec, "out")].clone()

    def _fastest(self, works: Mapping[int, Sequence[Work]]) -> tuple[int, tuple[float, float]]:
        """The key of what is faster than the first by more than the noise, or the first's; and the seconds
        of both."""
        first, *others = works
        graphs = {index: recorded(self._device, works[index]) for index in works}
        screened = self._times(graphs, [first, *others], SCREENED)
        others = sorted(others, key=lambda index: statistics.median(screened[index]))[:FINALISTS]
        times = self._times(graphs, [first, *others], ROUNDS)
        best = min(times, key=lambda index: statistics.median(times[index]))
        before, after = statistics.median(times[first]), statistics.median(times[best])
        low, _, high = statistics.quantiles(times[first], n=4)
        gains = after < before * (1 - LEAST_GAIN) and after < before - (high - low)
        return (best, (before, after)) if gains else (first, (before, before))

    def _times(
        self, graphs: Mapping[int, tuple[Work, int]], wanted: Sequence[int], rounds: int
    ) -> dict[int, list[float]]:
        """Seconds of a work of each graph, in every round; they take turns."""
        taken = self._device.time([graphs[index][0] for index in wanted] * rounds)
        return {
            index: [seconds / graphs[index][1] for seconds in taken[at :: len(wanted)]]
            for at, index in enumerate(wanted)
        }
