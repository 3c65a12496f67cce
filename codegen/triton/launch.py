"""What a step launches: which function of the emitted text, with what bound, on how many blocks.

An emitter is a module with three functions.  ``symbol(spec)`` names a kernel, ``emit(spec, name)`` is its
Triton source, and ``launches(site)`` says how one step of it runs where it stands: at most so many tokens,
operands of these dtypes and pitches, that architecture.

Counts of tokens, rows and sequences are read from memory (``count``), and a grid is made for the most that a
bucket admits; so one recorded CUDA graph serves every batch up to its bucket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from ...ir.plan import DTYPE_BYTES, KernelSpec, Rows
from .target import GpuTarget

if TYPE_CHECKING:
    from .tiles import Tiles

# Plan dtype -> what Triton calls it.
TYPES = {
    "f32": "fp32",
    "f16": "fp16",
    "bf16": "bf16",
    "e4m3": "fp8e4nv",
    "i8": "i8",
    "u8": "u8",
    "i32": "i32",
}
Constant = int | float | bool
# An operand, an input or a count by its name; or that and the type of what its bytes are, for scratch.
Source: TypeAlias = str | tuple[str, str]


@dataclass(frozen=True)
class Param:
    """A pointer that a kernel takes; ``aligned`` promises an address that 16 divides."""

    type: str  # as Triton writes it: "*bf16"
    aligned: bool = True


@dataclass(frozen=True)
class Kernel:
    """One binary to be: a function of an emitted file with its ``tl.constexpr`` parameters bound.

    The function takes ``params`` in this order, then the constants by name.
    """

    file: str
    function: str
    params: tuple[Param, ...]
    constants: tuple[tuple[str, Constant], ...]
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """``args`` say where each parameter of the kernel points.

    A parameter of the spec by its name; ``ids``, ``positions``, ``rows``, ``starts``, ``block_table``;
    ``count.tokens``, ``count.rows``, ``count.sequences``, ``count.fixed``; or ``scratch.NAME``.
    ``per_sm`` programs on every multiprocessor are enough in the first dimension of the grid; if it is not
    0, they go on until all is done.
    """

    kernel: Kernel
    args: tuple[str, ...]
    grid: tuple[int, int, int]
    per_sm: int = 0


@dataclass(frozen=True)
class Group:
    """The launches of one step, in order, and the bytes of scratch that they share.

    Scratch holds anything when a group begins, unless its name ends in ``_zero``: such bytes are zero, and
    the group leaves them so.
    """

    launches: tuple[Launch, ...]
    scratch: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Bucket:
    """The most that a launch must cope with."""

    tokens: int
    rows: int
    sequences: int


@dataclass(frozen=True)
class View:
    """An operand as a kernel sees it: ``pitch`` elements from one row to the next (0: not rows)."""

    dtype: str
    pitch: int = 0
    aligned: bool = True

    @property
    def type(self) -> str:
        return f"*{TYPES[self.dtype]}"


@dataclass(frozen=True)
class Site:
    """Where a kernel runs.  ``positions`` bounds a sequence; ``table_pitch`` is a row of block_table;
    ``tiles`` has the sizes that the work is cut into."""

    spec: KernelSpec
    symbol: str
    tiles: Tiles
    bucket: Bucket
    over: Rows
    views: Mapping[str, View]
    positions: int
    table_pitch: int

    @property
    def target(self) -> GpuTarget:
        return self.tiles.target

    @property
    def rows(self) -> int:
        """The most rows there may be."""
        return {"tokens": self.bucket.tokens, "rows": self.bucket.rows, "fixed": 1}[self.over]

    @property
    def sequences(self) -> int:
        """A power of two that sequences do not exceed, the same for most buckets: they share kernels."""
        return max(64, power_of_2(self.bucket.sequences))

    @property
    def count(self) -> str:
        """The argument that holds the number of rows."""
        return f"count.{self.over}"

    def pitches(self, *names: str) -> dict[str, int]:
        """Constants ``X_PITCH`` of operands ``x``."""
        return {f"{name.upper()}_PITCH": self.views[name].pitch for name in names}

    def launch(
        self,
        function: str,
        grid: Sequence[int],
        args: Sequence[Source],
        constants: Mapping[str, Constant],
        warps: int = 4,
        stages: int = 2,
        per_sm: int = 0,
    ) -> Launch:
        """Launch ``function`` of this kind's file.

        ``args`` says what the function's pointers point at, in its order: an operand, an input or a count by
        name, or ``(name, type)`` for scratch and for memory that is read as another type than the plan says.
        """
        params, sources = [], []
        for arg in args:
            source, type_ = arg if isinstance(arg, tuple) else (arg, self._type(arg))
            aligned = self.views[source].aligned if source in self.views else True
            params.append(Param(type_, aligned and not source.startswith("count.")))
            sources.append(source)
        kernel = Kernel(
            file=f"{self.spec.kind}_kernels.py",
            function=function,
            params=tuple(params),
            constants=tuple(constants.items()),
            warps=warps,
            stages=stages,
        )
        padded = (*grid, 1, 1, 1)
        return Launch(kernel, tuple(sources), (padded[0], padded[1], padded[2]), per_sm)

    def _type(self, source: str) -> str:
        return self.views[source].type if source in self.views else "*i32"


def dtype_bytes(dtype: str) -> int:
    return DTYPE_BYTES[dtype]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is not below ``n``.

    >>> [power_of_2(n) for n in (0, 1, 5, 64)]
    [1, 1, 8, 64]
    """
    return 1 << max(0, n - 1).bit_length()
