"""Built kernels on a card: their memory, random operands, launches, and times.

All of it goes through runtime.device.Device, so that tests may put the interpreter there.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _gpu_cases import PAGE, Parts, weight_parts
from tokenmill.ir import plan as plans
from tokenmill.ir.cache import CacheSpec, encode
from tokenmill.ir.plan import KernelSpec
from tokenmill.runtime.device import Device, Work, recorded
from tokenmill.runtime.schedule import Binary, read_binary, read_launch
from torch import Tensor

L2_BYTES = 50 << 20  # what repeated reads must not find there
COPIES_MOST = 16
REPLAYS = 5
INT8_SPREAD, INT4_SPREAD, E4M3_SPREAD = 73.6, 4.6, 64.0  # standard deviations of random values
CHUNK = 1 << 26  # values that are drawn at once


@dataclass
class Memory:
    """Arrays on a card, which live as long as this; ``rng`` draws what is in them."""

    device: Device
    blocks: list[Tensor] = field(default_factory=list)

    @cached_property
    def rng(self) -> torch.Generator:
        return torch.Generator(self.bytes(1).device).manual_seed(0)

    def bytes(self, size: int) -> Tensor:
        self.blocks.append(self.device.alloc(max(256, size)))
        return self.blocks[-1][:size]

    def array(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))

    def put(self, values: Tensor) -> Tensor:
        """A copy on the card; of nothing too, there is an address."""
        if not values.numel():
            return self.bytes(1)
        there = self.array(values.shape, values.dtype)
        there.copy_(values)
        return there

    def normal(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, spread: float = 1.0
    ) -> Tensor:
        found = self.array(shape, dtype)
        self.draw(found, spread)
        return found

    def draw(self, values: Tensor, spread: float = 1.0) -> None:
        """Fill: floats with a normal distribution of that spread, integers with anything."""
        for part in values.view(-1).split(CHUNK):
            if part.dtype in (torch.int8, torch.uint8):
                part.view(torch.uint8).random_(0, 256, generator=self.rng)
            elif part.dtype == torch.float8_e4m3fn:
                wide = torch.empty(part.shape, dtype=torch.float32, device=part.device)
                part.copy_(wide.normal_(0, spread, generator=self.rng).clamp_(-448, 448))
            else:
                part.normal_(0, spread, generator=self.rng)

    def scales(self, values: Tensor, mean: float) -> None:
        """Fill with positive numbers around ``mean``."""
        wide = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        values.copy_(wide.uniform_(0.5 * mean, 1.5 * mean, generator=self.rng))

    def weights(self, spec: KernelSpec) -> dict[str, Tensor]:
        """Random weights whose products with inputs of spread 1 have spread 1."""
        shapes = weight_parts(spec)
        found = {name: self.array(*shape) for name, shape in shapes.items()}
        self.draw_weights(found, shapes, {name: inputs_of(spec, name) for name in shapes})
        return found

    def draw_weights(
        self, found: Mapping[str, Tensor], shapes: Parts, inputs: Mapping[str, int]
    ) -> None:
        """Fill; ``inputs`` is the K of the matrix that a tensor is part of."""
        for name, (_, dtype) in shapes.items():
            fraction = inputs[name] ** -0.5
            if name.endswith("scale"):
                values = shapes[name.removesuffix("scale") + "q"][1]
                unit = {torch.int8: INT8_SPREAD, torch.uint8: INT4_SPREAD}.get(values, E4M3_SPREAD)
                self.scales(found[name], fraction / unit)
            elif dtype == torch.float8_e4m3fn:
                self.draw(found[name], E4M3_SPREAD)
            else:
                self.draw(found[name], fraction)

    def cache(self, spec: CacheSpec, pages: int) -> Tensor:
        """``[pages, PAGE, row_bytes]`` of random rows."""
        rows = self.array((pages * PAGE, spec.row_bytes), torch.uint8)
        for part in rows.split(max(1, CHUNK // spec.row_bytes)):
            wide = [torch.empty(len(part), p.width, device=part.device) for p in spec.parts]
            part.copy_(encode(spec, [x.normal_(generator=self.rng) for x in wide]))
        return rows.view(pages, PAGE, spec.row_bytes)

    def clear(self) -> None:
        self.blocks.clear()
        self.__dict__.pop("rng", None)


def inputs_of(spec: KernelSpec, name: str) -> int:
    """K of the matrix that a weight is part of; 1 where it is none."""
    match spec.kind:
        case "linear":
            return int(spec.k)
        case "experts":
            return int(spec.hidden if name.startswith("gate_up") else spec.inter)
        case "latent_attend":
            return int(spec.nope if name.startswith("w_uk") else spec.latent)
    return 1


class Rig:
    """The kernels of a suite's directory on ``device``."""

    def __init__(self, folder: Path, device: Device) -> None:
        def read(name: str) -> Any:
            return json.loads((folder / name).read_text())

        self.folder, self.device, self.memory = folder, device, Memory(device)
        self.about = read("suite.json")
        self.plan = plans.load(self.about["plan"])
        self.schedule = read("schedule.json")
        self.table_pitch: int = self.schedule["table_pitch"]
        made = read("binaries.json")["binaries"]
        self._binaries = {
            b["name"]: read_binary(b, made[b["name"]]) for b in self.schedule["binaries"]
        }
        self._kernels: dict[str, Any] = {}
        self._areas = {
            area: self.memory.bytes(self.schedule[f"{area}_bytes"] + 1)
            for area in ("scratch", "zero")
        }
        self._areas["zero"].zero_()

    @property
    def clean(self) -> bool:
        """Whether what kernels must leave zero is zero."""
        return not bool(self._areas["zero"].any())

    def bucket(self, tokens: int, rows: int = 0, sequences: int = 0) -> dict[str, Any]:
        """The smallest that holds such a batch."""
        return next(
            b
            for b in self.schedule["buckets"]
            if b["tokens"] >= tokens and b["rows"] >= rows and b["sequences"] >= sequences
        )

    def works(
        self, step: int, bucket: Mapping[str, Any], memory: Mapping[str, Tensor]
    ) -> list[Work]:
        """The launches of a step on operands, inputs and counts by name."""
        works = []
        for entry in self.schedule["groups"][bucket["steps"][step]]:
            launch = read_launch(entry, self._binaries)
            addresses = [self._at(arg, memory).data_ptr() for arg in launch.args]
            for arg, address, aligned in zip(
                launch.args, addresses, launch.binary.aligned, strict=True
            ):
                assert not aligned or address % 16 == 0, f"{arg} of step {step} is not aligned"
            blocks = math.prod(launch.grid)
            for scratch in launch.binary.scratch:
                space = self.memory.bytes(scratch.bytes * blocks) if scratch.bytes else None
                addresses.append(0 if space is None else space.data_ptr())
            works.append(self.device.launcher(self._kernel(launch.binary), launch, addresses))
        return works

    def _at(self, arg: str, memory: Mapping[str, Tensor]) -> Tensor:
        area, _, start = arg.partition(":")
        return self._areas[area][int(start) :] if start else memory[arg]

    def _kernel(self, binary: Binary) -> Any:
        if binary.name not in self._kernels:
            file = self.folder / f"{binary.name}.cubin"
            self._kernels[binary.name] = self.device.load(file, "cubin", binary)
        return self._kernels[binary.name]


def counts(memory: Memory, tokens: int, rows: int = 0, sequences: int = 1) -> dict[str, Tensor]:
    """The counts of a batch by the names of arguments."""
    values = {"tokens": tokens, "rows": rows, "sequences": sequences, "fixed": 1}
    return {
        f"count.{name}": memory.put(torch.tensor([value], dtype=torch.int32))
        for name, value in values.items()
    }


def copies(nbytes: int) -> int:
    """How many copies of an operand it takes so that none is in the cache when it is read again."""
    return max(1, min(COPIES_MOST, math.ceil(3 * L2_BYTES / max(nbytes, 1))))


def seconds(
    device: Device, works: Sequence[Work], record: Callable[[Work], Work] | None = None
) -> float:
    """What one of ``works`` takes, which differ in their operands only: they run in turn, as one graph.

    ``record`` makes the graph; by default the device does.
    """
    with device.stream():
        graph, repeats = recorded(device, works, record)
        return statistics.median(device.time([graph] * REPLAYS)) / repeats
