"""Executing an artifact on a GPU: memory, launches in the order of the plan, and recorded graphs.

Launches take addresses that never change, and read the sizes of a batch from memory; so the launches of a
bucket are recorded once, and a step is a copy of the batch's integers, one replay, and a copy of the logits.
What a card does is behind runtime.device.Device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from .. import errors
from .artifact import PLANS, Artifact
from .batch import Batch
from .cache import PAGE, pages_for
from .device import Device, Image, Inputs, Region, Work, region_bytes
from .extern import ExternRunner
from .gpu_target import choose_target
from .layout import ExternStep, Layout, bind_weights
from .sampling import Choices
from .schedule import COUNTS, SCHEDULE, Binary, Bind, Bucket, Group, Launch, Schedule
from .tensors import Tensor

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

# Of the memory that is left for the cache; the rest is for torch's steps and other programs.
CACHE_SHARE = 0.8
VECTOR = 16  # bytes: what kernels take an aligned address to be a multiple of
_TORCH = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "e4m3": "float8_e4m3fn",
    "i8": "int8",
    "u8": "uint8",
    "i32": "int32",
    "i64": "int64",
    "bool": "bool",
}


class GpuExecutor:
    """Runs batches of a model on ``device``, with a cache of ``cache_tokens`` tokens.

    By default the cache has room for a full batch of the longest sequences, if memory allows.  Raises
    ForeignTarget or DriverTooOld if no kernels of the artifact run on the device, ArtifactDamaged if its
    parts do not fit each other, and GpuMemoryShort, all before memory is taken.
    """

    def __init__(self, artifact: Artifact, device: Device, cache_tokens: int | None = None) -> None:
        self.layout = layout = Layout.parse(artifact.gpu_plan, PLANS["cuda"])
        self.target, image = choose_target(artifact, device)
        self._schedule = schedule = Schedule.load(artifact, self.target, layout)
        weights = bind_weights(layout, artifact.weights(), PLANS["cuda"])
        self._device = device
        self._inputs = Inputs(schedule.buckets[-1], schedule.table_pitch)
        self._programs: dict[Bucket, Program] = {}
        self._uploading = False
        sizes = {
            "weights": {name: tensor.array.nbytes for name, tensor in weights.items()},
            "activations": {"arena": layout.arena_bytes},
            "scratch": {**schedule.areas, "kernels": schedule.kernel_scratch},
            "inputs": self._inputs.sizes,
            "chosen": {"tokens": 4 * layout.rows},
        }
        with device.stream():
            self._kernels = {b.name: self._load(artifact, image, b) for b in schedule.binaries}
            left = device.free_bytes() - sum(map(region_bytes, sizes.values()))
            self.pages = pages_for(cache_tokens or default_cache_tokens(layout, left))
            sizes["cache"] = {c.name: self.pages * PAGE * c.row_bytes for c in layout.caches}
            self._memory = _allocate(device, sizes)
            for name, tensor in weights.items():
                self._memory["weights"][name].copy_(_bytes(tensor))
            self._memory["scratch"]["zero"].zero_()
            device.wait()
        self._staging = device.pinned(region_bytes(self._inputs.sizes))
        self._logits = device.pinned(4 * layout.rows * layout.output.width)
        self._tokens = device.pinned(4 * layout.rows)
        self._externs = ExternRunner(layout, self._view) if layout.externs else None

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits ``[rows, vocab]`` of the batch, a view that is valid until the next run.

        Raises KernelFailed if the device reports an error.
        """
        rows, output = batch.rows.size, self.layout.output
        with self._reporting(), self._device.stream():
            self._compute(batch, None)
            logits = self._memory["activations"]["arena"][output.offset :]
            found = self._fetch(logits, self._logits, rows * output.width).view(np.float32)
        return found.reshape(rows, output.width)[:, : self.layout.vocab]

    def choose(self, batch: Batch, choices: Choices) -> NDArray[np.int32]:
        """A token ``[rows]`` from the logits of each row, chosen on the device.

        As :meth:`run` otherwise, with much less to copy.
        """
        with self._reporting(), self._device.stream():
            program = self._compute(batch, choices)
            program.sample.run()
            return self._fetch(self._memory["chosen"]["tokens"], self._tokens, batch.rows.size)

    def time_steps(self, batch: Batch) -> list[float]:
        """Seconds of every step of the plan by itself, on the device."""
        bucket = self._bucket(batch)
        with self._reporting(), self._device.stream():
            self._upload(batch, None)
            works = [self._step(bucket, index, batch) for index in range(self.layout.steps)]
            return self._device.time(works)

    def close(self) -> None:
        """Let go of memory, kernels and graphs; harmless when repeated."""
        if self._memory:
            with suppress(*self._device.failures), self._device.stream():
                self._device.wait()
        self._programs.clear()
        self._kernels.clear()
        self._memory.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- a batch

    def _bucket(self, batch: Batch) -> Bucket:
        """The smallest that holds the batch."""
        for bucket in self._schedule.buckets:
            if bucket.holds(batch):
                return bucket
        raise errors.BadRequest(
            reason=f"a step of {batch.ids.size} tokens and {batch.rows.size} rows is too large",
            advice=f"send at most {self.layout.tokens} tokens and {self.layout.rows} rows at once",
        )

    def _compute(self, batch: Batch, choices: Choices | None) -> Program:
        """Start the steps of a batch."""
        program = self._program(self._bucket(batch))
        self._upload(batch, choices)
        for part in program.parts:
            if isinstance(part, Segment):
                part.run()
            elif self._externs:
                self._externs.run(part, batch)
        return program

    def _fetch(self, source: TorchTensor, target: TorchTensor, count: int) -> NDArray[np.int32]:
        """``count`` numbers of 4 bytes, when the device has computed them."""
        if count:  # else there is nothing to wait for
            target[: 4 * count].copy_(source[: 4 * count], non_blocking=True)
            self._wait()
        found: NDArray[np.int32] = target[: 4 * count].numpy().view(np.int32)
        return found

    def _upload(self, batch: Batch, choices: Choices | None) -> None:
        if self._uploading:  # the staging memory may still be read
            self._wait()
        end = 4 * self._inputs.pack(batch, choices, self._staging.numpy().view(np.int32))
        self._memory["inputs"].bytes[:end].copy_(self._staging[:end], non_blocking=True)
        self._uploading = True

    def _wait(self) -> None:
        self._device.wait()
        self._uploading = False

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns what the device raises into KernelFailed."""
        try:
            yield
        except self._device.failures as error:
            code = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise errors.KernelFailed(
                target=self.target.name, code=code, first=0, last=self.layout.steps
            ) from error

    # --- steps

    def _program(self, bucket: Bucket) -> Program:
        """What a bucket runs, with all addresses known."""
        if bucket not in self._programs:
            parts: list[Segment | ExternStep] = []
            first = 0
            for step in [*self.layout.externs, None]:
                last = step.index if step else self.layout.steps
                launches = [
                    launch for i in range(first, last) for launch in self._launches(bucket, i)
                ]
                parts += [Segment(self._device, launches)] if launches else []
                parts += [step] if step else []
                first = last + 1
            sample = self._bound(bucket.sample, self._schedule.bind_sample, "sampling")
            self._programs[bucket] = Program(parts, Segment(self._device, sample))
        return self._programs[bucket]

    def _step(self, bucket: Bucket, index: int, batch: Batch) -> Work:
        """One step by itself."""
        for step in self.layout.externs:
            if step.index == index and self._externs:
                return partial(self._externs.run, step, batch)
        return Segment(self._device, self._launches(bucket, index)).run

    def _launches(self, bucket: Bucket, index: int) -> list[Work]:
        return self._bound(bucket.steps[index] or (), self._schedule.bind[index], f"step {index}")

    def _bound(self, group: Group, bind: Bind, who: str) -> list[Work]:
        """The launches of a group, on the operands of ``bind``."""
        return [
            self._device.launcher(
                self._kernels[launch.binary.name],
                launch,
                [*self._operands(launch, bind, who), *self._kernel_scratch(launch)],
            )
            for launch in group
        ]

    def _operands(self, launch: Launch, bind: Bind, who: str) -> Iterator[int]:
        for arg, aligned in zip(launch.args, launch.binary.aligned, strict=True):
            address = self._address(arg, bind)
            if aligned and address % VECTOR:
                reason = f"{arg} of {who} is not aligned"
                file = f"{self.target.directory}/{SCHEDULE}"
                raise errors.ArtifactDamaged(file=file, reason=reason)
            yield address

    def _kernel_scratch(self, launch: Launch) -> Iterator[int]:
        """Addresses of what its binary asks for besides."""
        start = self._memory["scratch"].address("kernels")
        for scratch, place in zip(launch.binary.scratch, launch.scratch_places(), strict=False):
            yield start + place if scratch.bytes else 0

    def _address(self, arg: str, bind: Bind) -> int:
        memory = self._memory
        if arg in bind:
            buffer, column = bind[arg]
            if activation := self.layout.activations.get(buffer):
                at = activation.offset + column * activation.carrier.itemsize
                return memory["activations"].address("arena") + at
            region = next(r for r in ("weights", "cache", "inputs") if buffer in memory[r])
            return memory[region].address(buffer)
        area, _, start = arg.partition(":")
        if start:
            return memory["scratch"].address(area) + int(start)
        kind, _, name = arg.rpartition(".")
        if kind == "count":
            return memory["inputs"].address("counts") + 4 * COUNTS.index(name)
        return memory["inputs" if name in memory["inputs"] else "chosen"].address(name)

    # --- memory

    def _load(self, artifact: Artifact, image: Image, binary: Binary) -> Any:
        name = f"{self.target.directory}/{binary.name}.{image}"
        file = artifact.file(name)
        if file is None:
            raise errors.ArtifactDamaged(file=name, reason="it is missing")
        return self._device.load(file, image, binary)

    def _view(self, buffer: str, batch: Batch) -> TorchTensor:
        """A buffer for a step of torch: the rows in use of an activation, a weight, or an input."""
        import torch

        shape: tuple[int, ...]
        if activation := self.layout.activations.get(buffer):
            dtype, shape = activation.dtype, (batch.extent(activation.over), activation.width)
            data = self._memory["activations"]["arena"][activation.offset :]
        elif buffer in self._memory["weights"]:
            spec = next(weight for weight in self.layout.weights if weight.name == buffer)
            dtype, shape, data = spec.dtype, spec.shape, self._memory["weights"][buffer]
        else:
            dtype, shape, data = "i32", getattr(batch, buffer).shape, self._memory["inputs"][buffer]
            if buffer == "block_table":
                shape = (shape[0], self._inputs.table_pitch)
        torch_dtype = getattr(torch, _TORCH[dtype])
        return data[: math.prod(shape) * torch_dtype.itemsize].view(torch_dtype).view(shape)


class Segment:
    """Launches between the steps of torch.

    The first time they run one by one, so that the driver loads all it needs; then they are recorded.
    """

    def __init__(self, device: Device, launches: Sequence[Work]) -> None:
        self._device = device
        self._launches = launches
        self._ran = False
        self._graph: Work | None = None

    def run(self) -> None:
        if self._ran and self._graph is None:
            self._graph = self._device.record(self._launch)
        (self._graph or self._launch)()
        self._ran = True

    def _launch(self) -> None:
        for launch in self._launches:
            launch()


class Program(NamedTuple):
    """A bucket's launches and, between them, the steps of torch; and how it chooses tokens."""

    parts: list[Segment | ExternStep]
    sample: Segment


def default_cache_tokens(layout: Layout, free: int) -> int:
    """Room for a full batch of the longest sequences, in most of the ``free`` bytes at most.

    One sequence of the longest kind always has room.
    """
    affordable = int(CACHE_SHARE * free) // max(layout.bytes_per_token, 1)
    return max(layout.positions, min(layout.positions * layout.rows, affordable))


def _allocate(device: Device, sizes: Mapping[str, Mapping[str, int]]) -> dict[str, Region]:
    """A region per purpose; raises GpuMemoryShort, if possible before any is there."""
    needs = {purpose: region_bytes(arrays) for purpose, arrays in sizes.items()}
    free = device.free_bytes()
    try:
        if sum(needs.values()) > free:
            raise MemoryError
        return {purpose: Region(device, arrays) for purpose, arrays in sizes.items()}
    except MemoryError as error:
        raise errors.GpuMemoryShort(
            name=device.name,
            needed=sum(needs.values()) / 1e9,
            parts=", ".join(f"{purpose} {size / 1e9:.2f}" for purpose, size in needs.items()),
            free=free / 1e9,
        ) from error


def _bytes(tensor: Tensor) -> TorchTensor:
    """The bytes of a mapped tensor."""
    import torch

    with warnings.catch_warnings():  # it is read-only, which torch dislikes
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(tensor.array.reshape(-1).view(np.uint8))
