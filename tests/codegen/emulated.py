"""Kernels for another processor, in an emulator: the step and a driver as one program without libraries.

QEMU's user mode runs it, and ziglang compiles it; the driver is sent what kernels read, and answers with what
they wrote.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tokenmill.codegen.cpp import build
from tokenmill.codegen.cpp.target import CpuTarget, parse_target
from tokenmill.ir.cache import Batch
from tokenmill.ir.plan import Device
from torch import Tensor

from .harness import Kernels

DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include "step.cpp"

static void get(void *to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) exit(0);
}
static uint8_t *space(size_t bytes) { return (uint8_t *)aligned_alloc(64, (bytes + 127) / 64 * 64); }
static uint8_t *get_array(int64_t *size) {
  get(size, 8);
  uint8_t *data = space(*size);
  get(data, *size);
  return data;
}

int main() {
  int64_t counts[2], size, sizes[1024];
  get(counts, sizeof counts);
  const void *weights[1024];
  void *caches[1024];
  for (int i = 0; i < counts[0]; i++) weights[i] = get_array(&size);
  for (;;) {
    int32_t head[6];  // threads, step, tokens, sequences, rows, columns of the block table
    get(head, sizeof head);
    int32_t *ints[5];
    for (auto &array : ints) array = (int32_t *)get_array(&size);
    for (int i = 0; i < counts[1]; i++) caches[i] = get_array(&sizes[i]);
    int64_t arena_bytes;
    uint8_t *arena = get_array(&arena_bytes);
    const int64_t workspace_bytes = tm_workspace_bytes(head[0]);
    uint8_t *workspace = space(workspace_bytes);
    memset(workspace, 255, workspace_bytes);
    void *pool = tm_pool_create(head[0]);
    const tm_args args = {head[2], head[3], head[4], head[5], ints[0], ints[1], ints[2],
                          ints[3], ints[4], weights, caches, arena, workspace};
    const int32_t code = tm_run(pool, &args, head[1], head[1] + 1);
    tm_pool_destroy(pool);
    fwrite(&code, 4, 1, stdout);
    for (int i = 0; i < counts[1]; i++) fwrite(caches[i], 1, sizes[i], stdout), free(caches[i]);
    fwrite(arena, 1, arena_bytes, stdout);
    fflush(stdout);
    for (auto array : ints) free(array);
    free(arena), free(workspace);
  }
}
"""


def emulator(target: CpuTarget) -> str | None:
    """What runs programs for another machine, if all that it takes is there."""
    names = (f"qemu-{target.machine}", f"qemu-{target.machine}-static")
    found = next(filter(None, map(shutil.which, names)), None)
    return found if find_spec("ziglang") else None


@dataclass
class EmulatedKernels(Kernels):
    """A plan's library on a processor that is not here."""

    device: ClassVar[Device] = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        target = parse_target(self.target)
        command = emulator(target)
        assert command is not None
        self.folder = tempfile.TemporaryDirectory(prefix="tokenmill-")
        root = Path(self.folder.name)
        for name, text in {**self.files, "driver.cpp": DRIVER}.items():
            (root / name).write_text(text)
        flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
        zig = [sys.executable, "-m", "ziglang", "cc", "-x", "c++"]
        machine = ["-target", f"{target.machine}-linux-musl", f"-mcpu={target.zig_cpu}", "-static"]
        subprocess.run([*zig, *machine, *flags, "driver.cpp", "-o", "run"], cwd=root, check=True)
        self.process = subprocess.Popen(
            [command, "-cpu", "max", str(root / "run")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        weights = [tensor for parts in self.weights for tensor in parts.values()]
        self._send(np.array([len(weights), len(self.caches)], np.int64).tobytes())
        self._send_arrays(weights)

    def execute(self, index: int, batch: Batch, ids: Tensor, rows: Tensor, threads: int) -> None:
        tokens, sequences, columns = len(batch.positions), *batch.block_table.shape
        head = [threads, index, tokens, sequences, len(rows), columns]
        self._send(np.array(head, np.int32).tobytes())
        ints = [ids, batch.positions, rows, batch.starts, batch.block_table]
        self._send_arrays([*(t.int() for t in ints), *self.caches.values(), self.arena])
        assert int.from_bytes(self._receive(4), "little") == 0
        for tensor in (*self.caches.values(), self.arena):
            data = bytearray(self._receive(tensor.numel() * tensor.itemsize))
            tensor.copy_(torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(10) == 0
        self.folder.cleanup()

    def _send_arrays(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            self._send(len(data).to_bytes(8, "little") + data)

    def _send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def _receive(self, size: int) -> bytes:
        assert self.process.stdout is not None
        data = self.process.stdout.read(size)
        assert len(data) == size, f"the emulator ended with status {self.process.poll()}"
        return data
