"""Single kernels on a card against their meaning in torch, on the hostile shapes of the tests."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from _gpu_rig import Memory, Rig, counts
from tokenmill.codegen.reference import WRONG, row_error
from tokenmill.codegen.triton import experts, linear
from tokenmill.codegen.triton.target import TARGETS
from tokenmill.ir import cache
from tokenmill.ir.cache import Batch
from tokenmill.ir.plan import (
    DTYPE_BYTES,
    Attend,
    CacheWrite,
    Device,
    Experts,
    KernelSpec,
    LatentAttend,
    Linear,
    Plan,
    SelectRows,
)
from tokenmill.passes.narrow import narrow
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.codegen.harness import DTYPES, Kernels, batch_of, inputs_of

MOST = 200  # tokens
# Of a row's largest value: by the order of sums, by bf16 between two products, by bf16 around them.
EXACT, ROUNDED, NARROW = 1e-4, 2.0**-8, 2.0**-6
ROWS = [0, 7, 3, 3]  # that SelectRows takes


@dataclass
class Checked(Kernels):
    """The kernels of the tests, run by a rig; without one they are only emitted."""

    device: ClassVar[Device] = "cuda"

    dtype: Literal["f32", "bf16"] = "bf16"
    rig: Rig | None = None

    def planned(self, plan: Plan) -> Plan:
        return plan if self.dtype == "f32" else narrow(plan, self.dtype)

    def execute(self, index: int, batch: Batch, ids: Tensor, rows: Tensor, threads: int) -> None:
        rig, step = self.rig, self.plan.steps[index]
        assert rig is not None
        there = Memory(rig.device)
        with rig.device.stream():
            arena = there.put(self.arena)
            memory = self._inputs(there, batch, ids, rows, rig.table_pitch)
            written = []
            for param, operand in step.bind.items():
                buffer = self.plan.buffers[operand.buffer]
                if param in self.weights[index]:
                    memory[param] = there.put(self.weights[index][param].contiguous())
                elif buffer.kind == "cache":
                    memory[param] = there.put(self.caches[buffer.name])
                    written.append((self.caches[buffer.name], memory[param]))
                elif buffer.kind == "arena":
                    memory[param] = arena[
                        buffer.offset + operand.column * DTYPE_BYTES[buffer.dtype] :
                    ]
                else:
                    memory[param] = memory[buffer.name]
            bucket = rig.bucket(len(batch.positions), len(rows), len(batch.starts) - 1)
            for work in rig.works(index, bucket, memory):
                work()
            rig.device.wait()
            self.arena.copy_(arena)
            for ours, theirs in written:
                ours.copy_(theirs)
        assert rig.clean, "scratch that must stay zero is not"

    def _inputs(
        self, there: Memory, batch: Batch, ids: Tensor, rows: Tensor, pitch: int
    ) -> dict[str, Tensor]:
        table = torch.full((max(1, len(batch.block_table)), pitch), -1, dtype=torch.int32)
        width = min(pitch, batch.block_table.shape[1])
        table[: len(batch.block_table), :width] = batch.block_table[:, :width]
        ints = {
            "ids": ids, "rows": rows, "positions": batch.positions, "starts": batch.starts,
            "block_table": table,
        }  # fmt: skip
        found = {name: there.put(values.int().contiguous()) for name, values in ints.items()}
        return found | counts(there, len(batch.positions), len(rows), len(batch.starts) - 1)


def load(folder: Path, rig: Rig) -> Checked:
    about = rig.about
    specs = [step.spec for step in rig.plan.steps]
    in_place = {specs[index]: param for index, param in about["in_place"]}
    target = rig.schedule["target"]
    return Checked(specs, target, in_place, about["column"], dtype=about["dtype"], rig=rig)


def check(kernels: Checked, index: int, batches: dict[str, Any]) -> dict[str, Any]:
    """The largest error of one kernel over all batches, and its bound."""
    spec = kernels.specs[index]
    worst, where, bound, passed = 0.0, "", 0.0, 0
    for name, sequences in batches.items():
        batch = batch_of(*(tuple(s) for s in sequences))
        if len(batch.positions) > MOST:
            continue
        error, most = _error(kernels, spec, batch), _bound(kernels, spec, batch)
        passed += error <= most
        if not error / most <= worst / (bound or 1.0) or not where:
            worst, where, bound = error, name, most
    tried = sum(len(batch_of(*map(tuple, s)).positions) <= MOST for s in batches.values())
    return {
        "error": worst, "bound": bound, "worst": where, "batches": tried, "passed": passed == tried,
    }  # fmt: skip


def _error(kernels: Checked, spec: KernelSpec, batch: Batch) -> float:
    inputs = inputs_of(kernels, spec, batch)
    if isinstance(spec, CacheWrite):
        return _cache_error(kernels, spec, batch, inputs)
    rows = None
    if isinstance(spec, SelectRows):
        rows = torch.tensor([r for r in ROWS if r < len(batch.positions)], dtype=torch.int32)
    got = kernels.run(spec, batch, inputs, rows=rows)
    e4m3 = _rounds(kernels, spec, batch)
    want = kernels.expected(spec, batch, inputs, rows, e4m3)
    return max(row_error(got[name], value) for name, value in want.items())


def rounds(rig: Rig, spec: KernelSpec, tokens: int) -> bool:
    """Whether activations of so many tokens are rounded to E4M3, which FP8 weights multiply."""
    target, most = TARGETS[rig.schedule["target"]], rig.bucket(tokens)["tokens"]
    match spec:
        case Linear():
            return linear.rounds(spec, target, most)
        case Experts():
            return experts.rounds(spec, target, most)
    return False


def _rounds(kernels: Checked, spec: KernelSpec, batch: Batch) -> bool:
    assert kernels.rig is not None
    return rounds(kernels.rig, spec, len(batch.positions))


def _cache_error(
    kernels: Checked, spec: CacheWrite, batch: Batch, inputs: dict[str, Tensor]
) -> float:
    """Of rows in the units of the cache; rows that are not the batch's must not change."""
    got = kernels.cache_of(spec)
    got.fill_(7)
    want = got.clone()
    kernels.run(spec, batch, inputs)
    given = {
        n: x.to(DTYPES["f32" if kernels.dtype == "f32" else "bf16"]).float()
        for n, x in inputs.items()
    }
    cache.write(spec.cache, want, batch, list(given.values()))
    if torch.equal(got, want):
        return 0.0
    touched = (want != 7).any(-1)
    if not torch.equal(got[~touched], want[~touched]):
        return WRONG
    pairs = zip(
        cache.decode(spec.cache, got[touched]), cache.decode(spec.cache, want[touched]), strict=True
    )
    return max(row_error(a, b) for a, b in pairs)


def _bound(kernels: Checked, spec: KernelSpec, batch: Batch) -> float:
    match spec:
        case Linear() | Experts() if _rounds(kernels, spec, batch):
            return NARROW
        case Attend() | LatentAttend() if spec.cache_format != "fp32":
            return NARROW
        case LatentAttend(up_format="bf16" | "int8"):
            return NARROW
        case CacheWrite():
            return {"fp32": 1e-30, "bf16": 2.0**-7, "int8": 1 / 126, "fp8": 2.0**-3}[spec.format]
        case _ if kernels.dtype == "bf16":
            return NARROW
        case Experts() if spec.down_format != "fp32":
            return ROUNDED
    return EXACT
