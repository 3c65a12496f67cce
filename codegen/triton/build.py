"""From emitted Triton text to cubins, on a machine that needs no GPU.

The same text and the same Triton give the same bytes: neither cubin nor PTX holds a path or a time, and no
variable of the environment that would change them reaches the compiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from threading import Timer
from typing import Any, TypeAlias

from ...errors import KernelBuildFailed, KernelTooLarge, MissingExtra, TokenmillError
from .binary import ptx_header, read_cubin, tensor_cores, traps, waits_first
from .emit import SCHEDULE
from .target import GpuTarget

BINARIES = "binaries.json"
BINARIES_VERSION = 1
WORKER = Path(__file__).with_name("compile.py")
WORKERS_MOST = 32  # each takes some 200 MB
LOG_LINES = 40
MAX_REGISTERS = 255
MAX_TENSOR_MEMORY = 512

# Variables that Triton, LLVM and ptxas listen to; those that only say where something is may stay.
_SWITCHES = ("TRITON_", "MLIR_", "LLVM_", "NVPTX_", "PTXAS_", "DISABLE_", "ALLOW_", "USE_IR_LOC")
_PLACES = (
    "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH",
)  # fmt: skip

Entry: TypeAlias = dict[str, Any]  # of the schedule's ``binaries``


@dataclass(frozen=True)
class Binary:
    """What the runtime needs to launch a cubin, and what became of a kernel: an entry of binaries.json.

    After the pointers of the schedule a kernel takes one for each of ``scratch``: memory of so many bytes
    per block of the grid, at such an alignment; null where there are none.  One that ``waits`` for the
    launches before it may begin while they still run.
    """

    kernel: str  # its symbol in the cubin
    threads: int
    shared_bytes: int  # to ask for at launch
    scratch: list[dict[str, int]]
    registers: int
    local_bytes: int  # per thread: what was spilled
    tensor_memory: int  # columns
    tensor_cores: list[str]  # instructions, with the type that they multiply
    waits: bool
    ptx: str
    ptx_target: str
    cuda: str  # version of the toolkit whose ptxas it was


Outcome: TypeAlias = Binary | KernelBuildFailed | KernelTooLarge


@dataclass(frozen=True)
class GpuBuild:
    """``files`` belong beside the sources: NAME.cubin and NAME.ptx of every binary, and binaries.json."""

    schedule: Mapping[str, Any]
    binaries: Mapping[str, Binary]
    files: Mapping[str, bytes]

    def facts(self) -> list[dict[str, Any]]:
        """A row per binary, in the order of the schedule; ``buckets`` are those that launch it."""
        serves = _serves(self.schedule)
        return [
            {
                "binary": (name := entry["name"]),
                "function": entry["function"],
                "buckets": serves.get(name, []),
                "threads": self.binaries[name].threads,
                "registers": self.binaries[name].registers,
                "shared_kb": round(self.binaries[name].shared_bytes / 1024, 1),
                "local_bytes": self.binaries[name].local_bytes,
                "tensor_cores": ", ".join(self.binaries[name].tensor_cores),
                "cubin_kb": round(len(self.files[f"{name}.cubin"]) / 1024, 1),
            }
            for entry in self.schedule["binaries"]
        ]


def _serves(schedule: Mapping[str, Any]) -> dict[str, list[int]]:
    """Binary -> tokens of the buckets whose steps launch it."""
    serves: dict[str, list[int]] = {}
    for bucket in schedule["buckets"]:
        groups = {group for group in bucket["steps"] if group >= 0}
        launched = {launch["binary"] for g in groups for launch in schedule["groups"][g]}
        for name in launched:
            serves.setdefault(name, []).append(bucket["tokens"])
    return serves


@lru_cache
def toolchain() -> str:
    """Name and version of the compiler, for the manifest."""
    try:
        return f"triton {import_module('triton').__version__}"
    except (ImportError, AttributeError) as error:
        raise MissingExtra(
            package="triton", purpose="kernels for NVIDIA GPUs", extra="triton"
        ) from error


def build_gpu(
    files: Mapping[str, str],
    target: GpuTarget,
    progress: Callable[[int, int], None] | None = None,
) -> GpuBuild:
    """The binaries of emitted ``files``; ``progress`` hears how many of how many are done."""
    toolchain()
    schedule = json.loads(files[SCHEDULE])
    entries: list[Entry] = schedule["binaries"]
    say = progress or (lambda done, total: None)
    with tempfile.TemporaryDirectory(prefix="tokenmill-") as directory:
        root = Path(directory)
        built: dict[str, bytes] = {}
        binaries: dict[str, Binary] = {}
        say(0, len(entries))
        with compiler(root, files, target, len(entries)) as compiled:
            for entry, outcome in zip(entries, compiled(entries), strict=True):
                if isinstance(outcome, TokenmillError):
                    raise outcome
                name = entry["name"]
                for file in (f"{name}.cubin", f"{name}.ptx"):
                    built[file] = (root / file).read_bytes()
                binaries[name] = outcome
                say(len(binaries), len(entries))
    built[BINARIES] = _dump(target, binaries)
    return GpuBuild(schedule, binaries, built)


def _binary(entry: Entry, answer: Mapping[str, Any], root: Path, target: GpuTarget) -> Binary:
    """What Triton says of a kernel, joined with what the binary says; raises if it is too large."""
    cubin = read_cubin((root / f"{entry['name']}.cubin").read_bytes())
    ptx = (root / f"{entry['name']}.ptx").read_text()
    version, ptx_target = ptx_header(ptx)
    if traps(ptx):
        raise KernelBuildFailed(
            function=entry["function"],
            file=entry["file"],
            target=target.name,
            log=f"its tiles do not fit, and it became a trap: {entry['constants']}",
        )
    extra = len(cubin.params) - len(entry["params"])
    assert 0 <= extra <= len(answer["scratch"]), f"{entry['name']} takes {cubin.params}"
    # The runtime passes addresses and nothing else.
    assert cubin.params == tuple((8 * i, 8) for i in range(len(cubin.params))), entry["name"]
    assert cubin.threads in (0, answer["threads"]), f"{entry['name']}: {cubin.threads} threads"
    binary = Binary(
        kernel=answer["kernel"],
        threads=answer["threads"],
        shared_bytes=answer["shared_bytes"],
        scratch=answer["scratch"][:extra],
        registers=cubin.registers,
        local_bytes=cubin.local_bytes,
        tensor_memory=answer["tensor_memory"],
        tensor_cores=tensor_cores(ptx),
        waits=waits_first(ptx),
        ptx=version,
        ptx_target=ptx_target,
        cuda=cubin.cuda,
    )
    for need, limit, unit in (
        (binary.shared_bytes, target.shared_bytes, "bytes of shared memory"),
        (binary.registers, MAX_REGISTERS, "registers per thread"),
        (binary.tensor_memory, MAX_TENSOR_MEMORY, "columns of tensor memory"),
    ):
        if need > limit:
            raise KernelTooLarge(
                function=entry["function"],
                need=f"{need} {unit}",
                limit=limit,
                target=target.name,
                constants=", ".join(f"{k}={v}" for k, v in entry["constants"].items()),
            )
    return binary


def _dump(target: GpuTarget, binaries: Mapping[str, Binary]) -> bytes:
    data = {
        "version": BINARIES_VERSION,
        "target": target.name,
        "binaries": {name: asdict(binary) for name, binary in binaries.items()},
    }
    return (json.dumps(data, sort_keys=True, separators=(",", ":")) + "\n").encode()


# --- workers ----------------------------------------------------------------------------------------


@contextmanager
def compiler(
    root: Path,
    files: Mapping[str, str],
    target: GpuTarget,
    jobs: int,
    limit: float | None = None,
) -> Iterator[Callable[[Sequence[Entry]], Iterator[Outcome]]]:
    """A function that compiles entries of emitted ``files`` on all cores and answers in their order.

    NAME.cubin and NAME.ptx are in ``root`` when it answers; an entry that takes more than ``limit`` seconds
    has failed.  A worker takes one job after the other, so that Triton is imported once for many.  However
    the caller leaves, what is under way is finished, what is not begun is dropped, and no worker stays.
    """
    package = root / "emitted"
    package.mkdir()
    for name, text in {**files, "__init__.py": ""}.items():
        (package / name).write_text(text)
    count = max(1, min(len(os.sched_getaffinity(0)), jobs, WORKERS_MOST))
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def compile_one(entry: Entry) -> Outcome:
        worker = idle.get()
        try:
            return _binary(entry, worker.compile(entry, limit), root, target)
        except (KernelBuildFailed, KernelTooLarge) as error:
            return error
        finally:
            idle.put(worker)

    with ExitStack() as stack:
        for i in range(count):
            worker = _Worker(root, target, i)
            stack.callback(worker.stop)
            idle.put(worker)
        pool = ThreadPoolExecutor(count)
        stack.callback(pool.shutdown, cancel_futures=True)
        yield lambda entries: pool.map(compile_one, entries)


class _Worker:
    """A process of compile.py."""

    def __init__(self, root: Path, target: GpuTarget, number: int) -> None:
        self.root, self.target = root, target
        self.log = root / f"{number}.log"
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", str(WORKER), str(self.root), str(self.target.capability)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(self.root),
                text=True,
            )

    def compile(self, entry: Entry, limit: float | None = None) -> dict[str, Any]:
        if self.process.poll() is not None:  # the kernel before was too much for it
            self.stop()
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = Timer(limit or 0, self.process.kill)
        if limit is not None:
            timer.start()
        try:
            print(json.dumps(entry), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            line = json.dumps({"error": f"the compiler ended with status {self.process.wait()}"})
        answer: dict[str, Any] = json.loads(line)
        if error := answer.get("error"):
            # Passes explain themselves on the error stream, and so does a crash.
            more = self.log.read_text("utf-8", "replace")
            log = [*error.strip().splitlines(), *more.splitlines()]
            raise KernelBuildFailed(
                function=entry["function"],
                file=entry["file"],
                target=self.target.name,
                log="\n".join(log[:LOG_LINES]).replace(f"{self.root}{os.sep}", ""),
            )
        return answer

    def stop(self) -> None:
        with suppress(BrokenPipeError), self.process:
            """Its input ends, and with it the process."""


def _environment(root: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _PLACES or not name.startswith(_SWITCHES)
    }
    return {
        **kept,
        "TRITON_DISABLE_LINE_INFO": "1",  # it would hold paths
        "TMPDIR": str(root),  # where a failing ptxas leaves its input
    }
