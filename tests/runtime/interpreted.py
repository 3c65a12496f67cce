"""A card that is none: its memory is this machine's, and Triton's interpreter runs what is launched.

Artifacts for it hold the emitted sources and, for binaries, files that only name the kernel.
"""

import contextlib
import json
import math
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenmill import codegen
from tokenmill.ir import plan as plans
from tokenmill.ir.plan import (
    Attend,
    Buffer,
    CacheWrite,
    Capacity,
    Embed,
    Extern,
    Norm,
    Operand,
    Plan,
    Pointwise,
    SelectRows,
    Step,
)
from tokenmill.runtime.artifact import ArtifactWriter, Target, TensorSpec

from ..codegen.gpu.interpreter import SMS, TORCH, load_sources, mend

DIRECTORY = "kernels/sm_90"
DTYPES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
}


class CardLost(Exception):
    """What the driver would say."""


class InterpretedDevice:
    """See runtime.device.Device; ``total`` bytes of memory, of which it counts what was ever ``taken``."""

    failures = (CardLost,)

    def __init__(self, total=1 << 26, capability=90, cuda=(13, 0), shared_bytes=227 << 10):
        mend()
        self.name, self.capability, self.cuda = "Test card", capability, cuda
        self.shared_bytes = shared_bytes
        self.total = total
        self.launches = self.replays = self.waits = self.taken = 0
        self.images = set()
        self.fails = False
        self._blocks = []
        self._modules = {}
        self._recording = None

    def free_bytes(self):
        return self.total - sum(block.numel() for block in self._live())

    def alloc(self, nbytes):
        if nbytes > self.free_bytes():
            raise MemoryError
        space = torch.full((nbytes + 256,), 255, dtype=torch.uint8)
        block = space[-space.data_ptr() % 256 :][:nbytes]
        self._blocks.append(weakref.ref(block))
        self.taken += nbytes
        return block

    def pinned(self, nbytes):
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def load(self, file, image, binary):
        # A binary that was built, or one of write_artifact's.
        data = file.read_bytes()
        assert data[:4] == b"\x7fELF" or data == f"{image} of {binary.symbol}".encode()
        self.images.add(image)
        schedule = json.loads((file.parent / "schedule.json").read_text())
        entry = next(b for b in schedule["binaries"] if b["name"] == binary.name)
        return entry, self._module(file.parent, entry["file"])

    def launcher(self, kernel, launch, addresses):
        entry, module = kernel
        count = len(entry["params"])
        assert len(addresses) == count + len(launch.binary.scratch)
        for address, scratch in zip(addresses[count:], launch.binary.scratch, strict=True):
            assert (address == 0) == (scratch.bytes == 0)
            if address:
                assert address % scratch.align == 0
                assert self._at(address).numel() >= scratch.bytes * math.prod(launch.grid)
        types = [TORCH[type_.removeprefix("*")] for type_, _ in entry["params"]]

        def run():
            self.launches += 1
            tensors = []
            for address, dtype in zip(addresses, types, strict=False):
                data = self._at(address)
                tensors.append(data[: data.numel() // dtype.itemsize * dtype.itemsize].view(dtype))
            grid = launch.blocks(SMS)
            getattr(module, entry["function"])[grid](*tensors, **entry["constants"])

        return lambda: run() if self._recording is None else self._recording.append(run)

    @contextlib.contextmanager
    def stream(self):
        yield

    def record(self, work):
        assert self._recording is None
        self._recording = recorded = []
        work()
        self._recording = None

        def replay():
            self.replays += 1
            for run in recorded:
                run()

        return replay

    def wait(self):
        self.waits += 1
        if self.fails:
            raise CardLost("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal address\nand more")

    def time(self, works):
        times = []
        for work in works:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return times

    def _live(self):
        return [block for ref in self._blocks if (block := ref()) is not None]

    def _at(self, address):
        """The memory from ``address`` to the end of its block."""
        for block in self._live():
            if 0 <= address - block.data_ptr() < block.numel():
                return block[address - block.data_ptr() :]
        raise AssertionError(f"{address} is not on the card")

    def _module(self, directory, file):
        if directory not in self._modules:
            sources = {path.name: path.read_text() for path in directory.glob("*.py")}
            self._modules[directory] = load_sources(sources)
        return self._modules[directory][file]


def write_artifact(path, plan, weights, architecture="sm_90a", edit=None):
    """An artifact of ``plan`` that InterpretedDevice runs.

    ``edit`` may change what is in schedule.json and binaries.json, by file.
    """
    files = codegen.emit(plan, "sm_90")
    schedule = json.loads(files.pop("schedule.json"))
    binaries = {
        b["name"]: {
            "kernel": b["function"],
            "threads": 32 * b["warps"],
            "shared_bytes": 0,
            "scratch": [{"bytes": 0, "align": 1}, {"bytes": 24, "align": 128}][: i % 3],
            "ptx_target": architecture,
            "cuda": "12.9",
        }
        for i, b in enumerate(schedule["binaries"])
    }
    data = {
        "schedule.json": schedule,
        "binaries.json": {"version": 1, "target": "sm_90", "binaries": binaries},
    }
    symbols = {name: made["kernel"] for name, made in binaries.items()}
    if edit:
        edit(data)
    with ArtifactWriter(path) as writer:
        writer.json("plan.cuda.json", plans.dump(plan))
        index = [TensorSpec(n, DTYPES[w.dtype], tuple(w.shape)) for n, w in weights.items()]
        writer.weights(index, ((name, _raw(weight)) for name, weight in weights.items()))
        for file, text in files.items():
            writer.text(f"{DIRECTORY}/{file}", text)
        for name, symbol in symbols.items():
            for image in ("cubin", "ptx"):
                writer.text(f"{DIRECTORY}/{name}.{image}", f"{image} of {symbol}")
        for file, value in data.items():
            writer.json(f"{DIRECTORY}/{file}", value)
        writer.describe(targets=[Target("sm_90", DIRECTORY)], tokenmill="0.1.0")
    return Path(path)


def _raw(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy()


# --- models by hand ---------------------------------------------------------------------------------

VOCAB, POSITIONS, PITCH, EPS = 40, 200, 48, 1e-6


class TinyModel:
    """Logits of each token by itself: norm(2 table[id] factor + places[position]) weight + shift.

    With ``extern`` torch computes the doubling, else a kernel.
    """

    positions = POSITIONS

    def __init__(self, extern=False):
        rng = torch.Generator().manual_seed(0)
        self.weights = {
            "table": torch.randn(VOCAB, VOCAB, generator=rng).bfloat16(),
            "places": torch.randn(POSITIONS, VOCAB, generator=rng),
            **{n: torch.randn(VOCAB, generator=rng) for n in ("factor", "weight", "shift")},
        }
        x0 = {"operand": "x0", "columns": VOCAB, "shape": [1, -1, VOCAB], "dtype": "float32"}
        args = json.dumps({"args": [x0, 2.0], "kwargs": {}})
        double = (
            Extern("aten.mul.Tensor", ("x0",), args, "float32", (1, -1, VOCAB))
            if extern
            else Pointwise(VOCAB, "2 * x0", ("row",))
        )
        steps = [
            (Embed(VOCAB, VOCAB, "bf16"), "tokens", ["ids", "table", "h"]),
            (Embed(POSITIONS, VOCAB, "fp32"), "tokens", ["positions", "places", "place"]),
            (Pointwise(VOCAB, "x0 * x1", ("row", "channel")), "tokens", ["h", "factor", "a"]),
            (double, "tokens", ["a", "b"]),
            (
                Norm(VOCAB, EPS, residual=True),
                "tokens",
                ["b", "place", "weight", "sum", "n"],
            ),
            (SelectRows(VOCAB), "rows", ["n", "rows", "r"]),
            (Pointwise(VOCAB, "x0 + x1", ("row", "channel")), "rows", ["r", "shift", "logits"]),
        ]
        self.plan = _plan_of(steps, self.weights, Capacity(tokens=12, rows=4), self.positions)

    def logits(self, ids, positions):
        """What the artifact must say: a row per token."""
        w = {name: weight.float() for name, weight in self.weights.items()}
        h, place = w["table"][np.asarray(ids)], w["places"][np.asarray(positions)]
        x = 2 * (h * w["factor"]) + place
        return (
            x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * w["weight"] + w["shift"]
        ).numpy()


class AttendingModel:
    """Logits 4 attention(x, x, x) + shift of x = table[id], over a sequence."""

    positions = 600  # enough to split the keys, which takes scratch

    def __init__(self):
        rng = torch.Generator().manual_seed(1)
        self.weights = {
            "table": torch.randn(VOCAB, VOCAB, generator=rng).bfloat16(),
            "shift": torch.randn(VOCAB, generator=rng),
        }
        attend = Attend(1, 1, VOCAB, VOCAB, VOCAB**-0.5, "bf16")
        write = CacheWrite("bf16", attend.cache.parts)
        steps = [
            (Embed(VOCAB, VOCAB, "bf16"), "tokens", ["ids", "table", "x"]),
            (write, "tokens", ["x", "x", "cache"]),
            (attend, "tokens", ["x", "cache", "y"]),
            (SelectRows(VOCAB), "rows", ["y", "rows", "r"]),
            (
                Pointwise(VOCAB, "4 * x0 + x1", ("row", "channel")),
                "rows",
                ["r", "shift", "logits"],
            ),
        ]
        cache = replace(attend.cache, name="cache")
        self.plan = _plan_of(
            steps, self.weights, Capacity(tokens=4, rows=2), self.positions, (cache,)
        )

    def logits(self, ids):
        x = self.weights["table"][torch.as_tensor(ids)].float()
        scores = (x @ x.T * VOCAB**-0.5).masked_fill(torch.ones(len(x), len(x)).triu(1) > 0, -1e9)
        return (4 * scores.softmax(-1) @ x + self.weights["shift"]).numpy()

    def greedy(self, prompt, new):
        tokens = list(prompt)
        for _ in range(new):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def _plan_of(steps, weights, capacity, positions, caches=()):
    """Steps of (spec, rows, buffers of its parameters); activations are fp32 and share no memory."""
    buffers = [Buffer(name, "input", "i32") for name in ("ids", "positions", "rows")]
    buffers += [
        Buffer(n, "weight", DTYPES[w.dtype], shape=tuple(w.shape)) for n, w in weights.items()
    ]
    buffers += [Buffer(c.name, "cache", "u8", width=c.row_bytes) for c in caches]
    found, offset = {b.name: b for b in buffers}, 0
    for _, rows, names in steps:
        for name in names:
            if name not in found:
                found[name] = Buffer(name, "arena", "f32", rows, PITCH, offset=offset)
                offset += -(-found[name].bytes(capacity) // 64) * 64
    column = {"a": 4}  # rows may begin within their buffer
    return Plan(
        buffers=found,
        steps=tuple(
            Step(
                spec,
                {p: Operand(n, column.get(n, 0)) for p, n in zip(spec.params, names, strict=True)},
                rows,
                f"layer {i}",
            )
            for i, (spec, rows, names) in enumerate(steps)
        ),
        caches=caches,
        capacity=capacity,
        arena_bytes=offset,
        output="logits",
        vocab=VOCAB,
        positions=positions,
        device="cuda",
    )
