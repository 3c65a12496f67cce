"""Triton's interpreter as a machine: emitted text runs on the CPU, one program after the other.

It needs ``TRITON_INTERPRET=1`` before triton is imported (tests/conftest.py).  As it comes, it truncates
where a GPU rounds to bf16 and E4M3, and computes with the bits of bf16 as if they were integers: :func:`mend`
puts that right, so that 16-bit kernels can be judged here.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from tokenmill.ir.cache import Batch
from tokenmill.ir.plan import DTYPE_BYTES, Device, Plan
from tokenmill.passes.narrow import narrow
from torch import Tensor
from triton.language.extra import cuda
from triton.runtime import interpreter

from ..harness import Kernels

TORCH = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "i8": torch.int8,
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
}
SMS = 3  # of the machine that this stands for: few, so that a persistent program has several tiles
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@dataclass
class Interpreted(Kernels):
    """Kernels of a GPU target under the interpreter; activations in ``dtype`` where a plan narrows them."""

    device: ClassVar[Device] = "cuda"

    target: str = "sm_90"
    dtype: Literal["f32", "bf16", "f16"] = "bf16"

    def __post_init__(self) -> None:
        mend()
        super().__post_init__()
        self.schedule = json.loads(self.files["schedule.json"])
        self.modules = load_sources(self.files)
        self.scratch = torch.full((self.schedule["scratch_bytes"],), 255, dtype=torch.uint8)
        self.zero = torch.zeros(self.schedule["zero_bytes"], dtype=torch.uint8)

    def planned(self, plan: Plan) -> Plan:
        return plan if self.dtype == "f32" else narrow(plan, self.dtype)

    def execute(self, index: int, batch: Batch, ids: Tensor, rows: Tensor, threads: int) -> None:
        step = self.plan.steps[index]
        memory: dict[str, Tensor] = {**inputs(batch, ids, rows, self.schedule["table_pitch"])}
        weights = self.weights[index]
        for param, operand in step.bind.items():
            buffer = self.plan.buffers[operand.buffer]
            if param in weights:
                memory[param] = weights[param]
            elif buffer.kind == "cache":
                memory[param] = self.caches[buffer.name]
            elif buffer.kind == "arena":
                at = buffer.offset + operand.column * DTYPE_BYTES[buffer.dtype]
                memory[param] = self.arena[at:]
            else:
                memory[param] = memory[buffer.name]
        self.scratch.fill_(255)
        run_group(self.schedule, self.modules, self._group(index, batch, rows), memory, self)
        assert not self.zero.any(), "scratch that must stay zero is not"

    def _group(self, index: int, batch: Batch, rows: Tensor) -> int:
        """Of the smallest bucket that the batch fits in."""
        return next(
            bucket["steps"][index]
            for bucket in self.schedule["buckets"]
            if len(batch.positions) <= bucket["tokens"]
            and len(rows) <= bucket["rows"]
            and len(batch.starts) - 1 <= bucket["sequences"]
        )


def inputs(batch: Batch, ids: Tensor, rows: Tensor, table_pitch: int) -> dict[str, Tensor]:
    """What the runtime fills for every step, by the names of launch arguments."""
    table = torch.full((len(batch.block_table), table_pitch), -1, dtype=torch.int32)
    width = min(table_pitch, batch.block_table.shape[1])
    table[:, :width] = batch.block_table[:, :width]
    counts = {
        "tokens": len(batch.positions),
        "rows": len(rows),
        "sequences": len(batch.starts) - 1,
        "fixed": 1,
    }
    return {
        "ids": ids.int().contiguous(),
        "rows": rows.int().contiguous(),
        "positions": batch.positions.int().contiguous(),
        "starts": batch.starts.int().contiguous(),
        "block_table": table,
        **{f"count.{name}": torch.tensor([n], dtype=torch.int32) for name, n in counts.items()},
    }


def run_group(
    schedule: Mapping[str, Any],
    modules: Mapping[str, ModuleType],
    group: int,
    memory: Mapping[str, Tensor],
    areas: Any,
) -> None:
    """Run a group's launches; ``areas`` has the ``scratch`` and ``zero`` bytes."""
    binaries = {b["name"]: b for b in schedule["binaries"]}
    for launch in schedule["groups"][group]:
        binary = binaries[launch["binary"]]
        function = getattr(modules[binary["file"]], binary["function"])
        pointers = []
        for arg, (type_, aligned) in zip(launch["args"], binary["params"], strict=True):
            area, _, start = arg.partition(":")
            data = getattr(areas, area)[int(start) :] if start else memory[arg]
            pointer = _typed(data, TORCH[type_.removeprefix("*")])
            assert not aligned or pointer.data_ptr() % 16 == 0 or not pointer.numel(), arg
            pointers.append(pointer)
        x, *rest = launch["grid"]
        grid = (min(x, SMS * launch.get("per_sm", x)), *rest)
        function[grid](*pointers, **binary["constants"])


def _typed(data: Tensor, dtype: torch.dtype) -> Tensor:
    if data.dtype == dtype:
        return data
    flat = data.flatten().view(torch.uint8)
    return flat[: len(flat) // dtype.itemsize * dtype.itemsize].view(dtype)


def load_sources(files: Mapping[str, str]) -> dict[str, ModuleType]:
    """The emitted modules by file name, imported as a package that nothing else knows."""
    folder = tempfile.TemporaryDirectory(prefix="tokenmill-emitted-")
    _FOLDERS.append(folder)  # triton reads the sources again when a kernel is first called
    root = Path(folder.name)
    name = f"tokenmill_emitted_{root.name.rpartition('-')[2]}"
    for file, text in {**files, "__init__.py": ""}.items():
        (root / file).write_text(text)
    spec = importlib.util.spec_from_file_location(
        name, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return {
        file: importlib.import_module(f"{name}.{file.removesuffix('.py')}")
        for file in files
        if file.endswith("_kernels.py")
    }


# --- mending the interpreter ------------------------------------------------------------------------

_FLOATS = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_NARROW = (tl.bfloat16, tl.float8e4nv, tl.float8e5)  # stored as integers by the interpreter


def _convert(data: NDArray[Any], source: Any, target: Any) -> NDArray[Any]:
    """Round to nearest even; E4M3 saturates, as a GPU's conversion does."""
    bits = np.ascontiguousarray(data)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[bits.itemsize]
    raw = torch.from_numpy(bits.view(f"i{bits.itemsize}" if bits.itemsize > 1 else "u1").copy())
    x = raw.to(integer).view(_FLOATS[source]).float()
    if target == tl.float8e4nv:
        x = x.clamp(-448.0, 448.0)
    y = x.to(_FLOATS[target])
    unsigned = np.dtype(f"u{y.element_size()}")
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[y.element_size()]
    found: NDArray[Any] = y.view(signed).numpy().view(unsigned).reshape(data.shape)
    return found


def mend() -> None:
    """Replace the interpreter's conversions, and its arithmetic on bf16; once is enough."""
    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    if hasattr(builder, "mended"):  # by a copy of this module: pytest may import it under two names
        return
    builder.mended = True

    def convert_float(data: Any, source: Any, target: Any, mode: Any) -> NDArray[Any]:
        return _convert(data, source.scalar, target.scalar)

    plain_cast = builder.cast_impl

    def widened(x: Any) -> Any:
        if x.dtype.scalar not in _NARROW:
            return x
        return handle(_convert(x.data, x.dtype.scalar, tl.float32).view(np.float32), tl.float32)

    def cast(self: Any, x: Any, target: Any) -> Any:
        source, goal = x.dtype.scalar, target.scalar
        if source not in _NARROW and goal not in _NARROW:
            return plain_cast(self, x, target)
        wide = widened(x)
        if goal not in _NARROW:
            return wide if goal == tl.float32 else plain_cast(self, wide, target)
        if wide.dtype.scalar != tl.float32:
            wide = plain_cast(self, wide, tl.float32)
        return handle(_convert(wide.data, tl.float32, goal), goal)

    def arithmetic(plain: Any) -> Any:
        def wrapped(self: Any, *operands: Any, **named: Any) -> Any:
            goal = operands[0].dtype.scalar
            if goal not in _NARROW:
                return plain(self, *operands, **named)
            wide = [widened(x) if isinstance(x, handle) else x for x in operands]
            result = plain(self, *wide, **named)
            boolean = result.data.dtype == np.bool_
            return result if boolean else cast(self, result, goal)

        return wrapped

    plain_dot = builder.create_dot

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), d, *rest)

    # Launches run one after the other.
    for name in ("gdc_wait", "gdc_launch_dependents"):
        setattr(cuda, name, lambda: None)
    interpreter._convert_float = convert_float
    builder.cast_impl = cast
    builder.create_dot = dot
    builder.binary_op = arithmetic(builder.binary_op)
    builder.unary_op = arithmetic(builder.unary_op)
    # What is written for one element means the same for all.
    tl.map_elementwise = lambda function, *operands: function(*operands)
