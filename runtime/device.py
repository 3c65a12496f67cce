"""What executing on a GPU needs of the card, and how memory is laid out there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .batch import Batch
from .sampling import Choices
from .schedule import COUNTS, Binary, Bucket, Launch, ceil_to

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

Image: TypeAlias = Literal["cubin", "ptx"]
Work: TypeAlias = Callable[[], None]

ALIGN = 256  # bytes: where arrays begin
GRAPH_SECONDS, REPEATS_MOST = 3e-3, 128  # of a graph that is timed


class Device(Protocol):
    """A card with one stream of work on it; its memory is torch's.

    ``capability`` is 90 for 9.0, ``shared_bytes`` the most shared memory that a block may have, ``cuda``
    the version of CUDA that the driver knows; ``failures`` are raised when work that was launched went wrong.
    """

    name: str
    capability: int
    shared_bytes: int
    cuda: tuple[int, int]
    failures: tuple[type[Exception], ...]

    def free_bytes(self) -> int:
        """Memory that can be had; what was let go of counts."""

    def alloc(self, nbytes: int) -> TorchTensor:
        """Bytes on the card, holding anything; raises MemoryError."""

    def pinned(self, nbytes: int) -> TorchTensor:
        """Bytes of this machine that copy fast."""

    def load(self, file: Path, image: Image, binary: Binary) -> Any:
        """The kernel of a file; raises ArtifactDamaged if the driver refuses it."""

    def launcher(self, kernel: Any, launch: Launch, addresses: Sequence[int]) -> Work:
        """What launches ``kernel`` with these arguments."""

    def stream(self) -> AbstractContextManager[None]:
        """Within, this thread's work goes to the stream: launches, and what torch does."""

    def record(self, work: Work) -> Work:
        """A graph of what ``work`` launches; nothing of it runs yet."""

    def wait(self) -> None:
        """Until the stream has done all its work."""

    def time(self, works: Sequence[Work]) -> list[float]:
        """Seconds that each takes on the card, one after the other."""


def recorded(
    device: Device, works: Sequence[Work], record: Callable[[Work], Work] | None = None
) -> tuple[Work, int]:
    """A graph of ``works`` in turn, long enough to be timed, and how many of them it runs.

    They differ in their operands only, so that no operand need be in a cache when it is read again.
    ``record`` makes the graph; by default the device does.  All of it has run once afterwards.
    """

    def round_robin(count: int) -> None:
        for i in range(count):
            works[i % len(works)]()

    for work in works:  # what is loaded or chosen on first use is there afterwards
        work()
    once = statistics.median(device.time([works[0]] * 3))
    wanted = min(REPEATS_MOST, math.ceil(GRAPH_SECONDS / max(once, 1e-7)))
    repeats = math.ceil(wanted / len(works)) * len(works)
    graph = (record or device.record)(lambda: round_robin(repeats))
    graph()
    device.wait()
    return graph, repeats


class Region:
    """Named arrays in one block of a device's memory; each begins at a multiple of ALIGN."""

    def __init__(self, device: Device, sizes: Mapping[str, int]) -> None:
        self.bytes = device.alloc(region_bytes(sizes))
        starts = accumulate((ceil_to(size, ALIGN) for size in sizes.values()), initial=0)
        self._spans = {
            name: (at, at + sizes[name]) for name, at in zip(sizes, starts, strict=False)
        }

    def __getitem__(self, name: str) -> TorchTensor:
        start, end = self._spans[name]
        return self.bytes[start:end]

    def __contains__(self, name: str) -> bool:
        return name in self._spans

    def address(self, name: str) -> int:
        return int(self.bytes.data_ptr()) + self._spans[name][0]


def region_bytes(sizes: Mapping[str, int]) -> int:
    """Bytes that a region of such arrays takes.

    >>> region_bytes({"a": 1, "b": 257})
    768
    """
    return max(ALIGN, sum(ceil_to(size, ALIGN) for size in sizes.values()))


class Inputs:
    """The numbers of a batch as they lie in a region of ``sizes``, to be copied there at once.

    Block tables come last: of them only the rows in use are copied.
    """

    def __init__(self, bucket: Bucket, table_pitch: int) -> None:
        self.table_pitch = table_pitch
        self.sizes = {
            "counts": 4 * len(COUNTS),
            "ids": 4 * bucket.tokens,
            "positions": 4 * bucket.tokens,
            "rows": 4 * bucket.rows,
            "starts": 4 * (bucket.sequences + 1),
            **dict.fromkeys(Choices._fields, 4 * bucket.rows),
            "block_table": 4 * bucket.sequences * table_pitch,
        }
        ends = accumulate(ceil_to(size, ALIGN) // 4 for size in self.sizes.values())
        self._starts = dict(zip(self.sizes, [0, *ends], strict=False))

    def pack(self, batch: Batch, choices: Choices | None, out: NDArray[np.int32]) -> int:
        """Write a batch to ``out``, as int32 or the bits of fp32; how many numbers hold it."""
        sequences, pages = batch.block_table.shape
        table = np.full((sequences, self.table_pitch), -1, np.int32)
        table[:, :pages] = batch.block_table
        arrays = {
            "counts": np.array([batch.ids.size, batch.rows.size, sequences, 1], np.int32),
            **batch._asdict(),
            **(choices._asdict() if choices else {}),
            "block_table": table,
        }
        for name, array in arrays.items():
            start = self._starts[name]
            out[start : start + array.size] = array.reshape(-1).view(np.int32)
        return self._starts["block_table"] + table.size
