"""Executing an artifact on the CPU: its step library, through the C ABI of codegen/ABI.md."""

from __future__ import annotations

import ctypes
import os
import platform
import tempfile
import time
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import errors
from .artifact import Artifact, Target
from .batch import Batch
from .cache import PAGE, pages_for
from .extern import ExternRunner, host_view
from .layout import ExternStep, Layout, bind_weights
from .memory import Arena, allocate
from .tensors import Tensor

ABI_VERSION = 1
MOST_THREADS = 4 * max(os.cpu_count() or 1, 16)  # more is a slip: they only wait for each other
# Microseconds of processor time, and the period that they are for.
QUOTA = Path("/sys/fs/cgroup/cpu.max")
WEIGHT_ALIGN = 16

# Names that differ between systems for the same machine.
_MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}


class _Args(ctypes.Structure):
    """``tm_args``."""

    _fields_ = (
        ("tokens", c_int32),
        ("sequences", c_int32),
        ("rows", c_int32),
        ("table_stride", c_int32),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("row_index", c_void_p),
        ("starts", c_void_p),
        ("block_table", c_void_p),
        ("weights", c_void_p),
        ("caches", c_void_p),
        ("arena", c_void_p),
        ("workspace", c_void_p),
    )


class CpuExecutor:
    """Runs batches of a model on ``threads`` threads, with a cache of ``cache_tokens`` tokens.

    By default it takes all cores that the process may use, and cache for the longest sequence or
    more (:func:`default_cache_tokens`).  Raises ForeignTarget if no kernels of the artifact run on
    this machine, ArtifactDamaged if its parts do not fit each other, BadRequest for threads without sense.
    """

    def __init__(
        self, artifact: Artifact, threads: int | None = None, cache_tokens: int | None = None
    ) -> None:
        if threads and threads > MOST_THREADS:
            raise errors.BadRequest(
                reason=f"{threads} threads, on a machine with {os.cpu_count()} cores",
                advice="pass as many as there are cores, or leave it out",
            )
        self.target = choose_target(artifact.targets)
        self.layout = layout = Layout.parse(artifact.plan)
        self.threads = threads or available_cores()
        self.pages = pages_for(cache_tokens or default_cache_tokens(layout))
        self._library = _load(artifact, self.target)
        weights = bind_weights(layout, artifact.weights())
        self._weights = {name: _aligned(tensor) for name, tensor in weights.items()}
        self._caches = [
            allocate(self.pages * PAGE * cache.row_bytes, "the cache") for cache in layout.caches
        ]
        self._arena = Arena(layout)
        scratch = self._library.tm_workspace_bytes(self.threads)
        self._workspace = allocate(scratch, "kernel scratch")
        self._segments = _segments(layout)
        self._externs = (
            ExternRunner(layout, host_view(self._arena, self._weights)) if layout.externs else None
        )
        self._tables = (
            _pointers([weight.array for weight in self._weights.values()]),
            _pointers(self._caches),
        )
        self._pool = c_void_p(self._library.tm_pool_create(self.threads))
        self._arguments = _Args(
            weights=self._tables[0].ctypes.data,
            caches=self._tables[1].ctypes.data,
            arena=self._arena.bytes.ctypes.data,
            workspace=self._workspace.ctypes.data,
        )

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits ``[rows, vocab]`` of the batch, a view that is valid until the next run.

        Raises KernelFailed if the library reports an error.
        """
        args = self._args(batch)
        for segment in self._segments:
            if isinstance(segment, range):
                self._run_kernels(args, segment)
            elif self._externs:
                self._externs.run(segment, batch)
        return self._arena.view(self.layout.output, batch.rows.size)[:, : self.layout.vocab]

    def time_steps(self, batch: Batch) -> list[float]:
        """Seconds of every step of the plan by itself, waking the threads for it included."""
        args, seconds = self._args(batch), []
        for segment in self._segments:
            for step in [segment] if isinstance(segment, ExternStep) else segment:
                start = time.perf_counter()
                if isinstance(step, int):
                    self._run_kernels(args, range(step, step + 1))
                elif self._externs:
                    self._externs.run(step, batch)
                seconds.append(time.perf_counter() - start)
        return seconds

    def close(self) -> None:
        """Stop the threads and let go of the memory; harmless when repeated."""
        if self._pool:
            self._library.tm_pool_destroy(self._pool)
        self._pool = c_void_p()
        self._weights.clear()
        self._caches.clear()

    def __enter__(self) -> CpuExecutor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _args(self, batch: Batch) -> _Args:
        args = self._arguments
        args.tokens = batch.ids.size
        args.sequences = batch.starts.size - 1
        args.rows = batch.rows.size
        args.table_stride = batch.block_table.shape[1]
        args.ids = batch.ids.ctypes.data
        args.positions = batch.positions.ctypes.data
        args.row_index = batch.rows.ctypes.data
        args.starts = batch.starts.ctypes.data
        args.block_table = batch.block_table.ctypes.data
        return args

    def _run_kernels(self, args: _Args, steps: range) -> None:
        code = self._library.tm_run(self._pool, ctypes.byref(args), steps.start, steps.stop)
        if code:
            raise errors.KernelFailed(
                target=self.target.name, code=code, first=steps.start, last=steps.stop
            )


def available_cores() -> int:
    """Cores that this process may run on, as many as a container's quota pays for."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
    except (OSError, ValueError):  # no control group, or one of another version
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def default_cache_tokens(layout: Layout) -> int:
    """Room for a full batch of the longest sequences, in a quarter of the memory at most.

    One sequence of the longest kind always has room.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    affordable = memory // 4 // max(layout.bytes_per_token, 1)
    return max(layout.positions, min(layout.positions * layout.rows, affordable))


def machine() -> str:
    """What this processor is, spelled as Linux does: ``x86_64``, ``aarch64``."""
    name = platform.machine()
    return _MACHINES.get(name, name)


def cpu_features() -> frozenset[str] | None:
    """The flags of /proc/cpuinfo, or None where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())


def choose_target(targets: tuple[Target, ...]) -> Target:
    """The CPU target with the most features among those that run here; raises ForeignTarget."""
    here, features = machine(), cpu_features()
    reasons, fitting = [], []
    for target in targets:
        missing = sorted(set(target.needs) - features) if features is not None else []
        if target.device != "cpu":
            reasons.append(f"{target.name} is not for a CPU")
        elif target.machine and target.machine != here:
            reasons.append(f"{target.name} is for {target.machine}, this is {here}")
        elif missing:
            reasons.append(f"{target.name} needs {', '.join(missing)}")
        else:
            fitting.append(target)
    if not fitting:
        raise _foreign(targets, "; ".join(reasons) or "it has no kernels at all")
    return max(fitting, key=lambda target: len(target.needs))


def _foreign(targets: tuple[Target, ...], reason: str) -> errors.ForeignTarget:
    names = ", ".join(target.name for target in targets) or "none"
    return errors.ForeignTarget(targets=names, reason=reason, target="cpu")


def _load(artifact: Artifact, target: Target) -> ctypes.CDLL:
    """The step library of ``target`` with its functions typed, if it is what the manifest says."""
    file = (artifact.path / target.entry).resolve()
    try:
        library = _open(file)
        _declare(library)
    except (OSError, AttributeError) as error:
        raise _foreign((target,), str(error)) from error
    if (version := library.tm_abi_version()) != ABI_VERSION:
        raise errors.ArtifactTooNew(found=f"(ABI) {version}", known=ABI_VERSION)
    isa = library.tm_isa().decode()
    if f"cpu-{isa}" != Path(target.directory).name:
        raise errors.ArtifactDamaged(file=target.entry, reason=f"it was built for {isa}")
    return library


def _open(file: Path) -> ctypes.CDLL:
    """The library as it is now: by its own name the loader would yield the one that it opened there before,
    even if an artifact was compiled anew since.
    """
    with tempfile.TemporaryDirectory(prefix="tokenmill-") as folder:
        link = Path(folder) / file.name
        link.symlink_to(file)
        return ctypes.CDLL(str(link))


def _declare(library: ctypes.CDLL) -> None:
    signatures = {
        "tm_abi_version": (c_int32, ()),
        "tm_isa": (c_char_p, ()),
        "tm_pool_create": (c_void_p, (c_int32,)),
        "tm_pool_destroy": (None, (c_void_p,)),
        "tm_workspace_bytes": (c_int64, (c_int32,)),
        "tm_run": (c_int32, (c_void_p, POINTER(_Args), c_int32, c_int32)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it lies badly in its file."""
    aligned = tensor.array.ctypes.data % WEIGHT_ALIGN == 0
    return tensor if aligned else Tensor(tensor.dtype, tensor.array.copy())


def _pointers(arrays: list[NDArray[Any]]) -> NDArray[np.uintp]:
    return np.array([array.ctypes.data for array in arrays], np.uintp)


def _segments(layout: Layout) -> list[range | ExternStep]:
    """The plan as runs of kernel steps between extern steps."""
    segments: list[range | ExternStep] = []
    first = 0
    for step in layout.externs:
        segments += [range(first, step.index), step]
        first = step.index + 1
    segments.append(range(first, layout.steps))
    return [s for s in segments if isinstance(s, ExternStep) or s]
