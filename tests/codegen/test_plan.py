"""A whole plan: compiled and in torch, prompts whole and in pieces, one by one and in a batch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from tokenmill import codegen
from tokenmill.codegen import reference
from tokenmill.codegen.cpp import build
from tokenmill.codegen.cpp.target import host_target
from tokenmill.ir import cache
from tokenmill.ir.cache import Batch
from tokenmill.ir.plan import dump, load
from torch import Tensor

from .decoder import VOCAB, decoder_plan
from .harness import PAGES, Args, aligned, batch_of, load_library, pointers, weights_of

PLAN = load(dump(decoder_plan()))
EXTERN = next(i for i, step in enumerate(PLAN.steps) if step.spec.kind == "extern")


class Model:
    """The compiled plan with random weights; its extern step is done here."""

    def __init__(self, binary: bytes, threads: int) -> None:
        rng = torch.Generator().manual_seed(3)
        self.weights: dict[str, Tensor] = {}
        for step in (link for each in PLAN.steps for link in each.links):
            for param, value in weights_of(step.spec, rng).items():
                self.weights[step.bind[param].buffer] = value
        self.library = load_library(binary)
        self.pool = ctypes.c_void_p(self.library.tm_pool_create(threads))
        self.workspace = aligned(self.library.tm_workspace_bytes(threads))
        self.arena = aligned(PLAN.arena_bytes)

    def caches(self) -> dict[str, Tensor]:
        return {c.name: cache.allocate(c, PAGES) for c in PLAN.caches}

    def run(self, ids: Tensor, rows: Tensor, batch: Batch, caches: dict[str, Tensor]) -> Tensor:
        order = [b.name for b in PLAN.buffers.values() if b.kind == "weight"]
        weights = pointers([self.weights[name] for name in order])
        stored = pointers(list(caches.values()))
        self.arena.fill_(255)
        args = Args(
            len(ids), len(batch.starts) - 1, len(rows), batch.block_table.shape[1],
            ids.data_ptr(), batch.positions.data_ptr(), rows.data_ptr(), batch.starts.data_ptr(),
            batch.block_table.data_ptr(), ctypes.cast(weights, ctypes.c_void_p),
            ctypes.cast(stored, ctypes.c_void_p), self.arena.data_ptr(), self.workspace.data_ptr(),
        )  # fmt: skip
        steps = self.library.tm_run
        assert steps(self.pool, ctypes.byref(args), 0, EXTERN) == 0
        self.view("sq", len(ids)).copy_(self.view("x1", len(ids)).square())
        assert steps(self.pool, ctypes.byref(args), EXTERN + 1, len(PLAN.steps)) == 0
        assert steps(self.pool, ctypes.byref(args), 0, len(PLAN.steps)) == 1  # extern inside
        return self.view(PLAN.output, len(rows)).clone()

    def view(self, name: str, rows: int) -> Tensor:
        buffer = PLAN.buffers[name]
        flat = self.arena[buffer.offset :].view(torch.float32)[: rows * buffer.width]
        return flat.view(rows, buffer.width)


@pytest.fixture(scope="module")
def binary() -> bytes:
    return build.build_cpu(codegen.emit(PLAN, "cpu"), host_target())


@pytest.fixture(scope="module", params=[1, 3])
def model(binary: bytes, request: pytest.FixtureRequest) -> Iterator[Model]:
    built = Model(binary, request.param)
    yield built
    built.library.tm_pool_destroy(built.pool)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def prompt(length: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (length,), generator=rng, dtype=torch.int32)


def piece(whole: Batch, sequence: int, lo: int, hi: int) -> Batch:
    """Tokens [lo, hi) of one sequence of a batch that starts at position 0, as a step of its own."""
    table = whole.block_table[sequence : sequence + 1].contiguous()
    return Batch(torch.arange(lo, hi, dtype=torch.int32), ints(0, hi - lo), table)


def assert_near(got: Tensor, want: Tensor) -> None:
    """Activations are rounded to BF16 and INT8 on the way, where the last bit of a sum decides."""
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert (error < 0.02).all(), error


@pytest.mark.parametrize("sequences", [(), ((0, 1),), ((0, 75),), ((0, 30), (0, 1), (0, 40))])
def test_logits_are_the_references(model: Model, sequences: tuple[tuple[int, int], ...]) -> None:
    batch = batch_of(*sequences)
    ids = prompt(len(batch.positions))
    rows = (batch.starts[1:] - 1).contiguous()
    ours, theirs = model.caches(), model.caches()
    got = model.run(ids, rows, batch, ours)
    want = reference.run_plan(PLAN, model.weights, theirs, ids, rows, batch)
    assert_near(got, want.view_as(got))


def test_batched_generation_equals_one_by_one(model: Model) -> None:
    lengths = (3, 17, 9)
    whole = batch_of(*((0, n + 4) for n in lengths))
    prompts = [prompt(n + 4, seed=n) for n in lengths]
    alone, together = model.caches(), model.caches()
    for step in range(4):
        at = [(0, n) if step == 0 else (n + step - 1, n + step) for n in lengths]
        one = [
            model.run(p[lo:hi], ints(hi - lo - 1), piece(whole, i, lo, hi), alone)
            for i, (p, (lo, hi)) in enumerate(zip(prompts, at, strict=True))
        ]
        ends = torch.tensor([hi - lo for lo, hi in at]).cumsum(0).int()
        batch = Batch(
            torch.cat([torch.arange(lo, hi, dtype=torch.int32) for lo, hi in at]),
            torch.cat([ints(0), ends]),
            whole.block_table,
        )
        ids = torch.cat([p[lo:hi] for p, (lo, hi) in zip(prompts, at, strict=True)])
        assert torch.equal(model.run(ids, ends - 1, batch, together), torch.cat(one))


def test_a_prompt_may_come_in_pieces(model: Model) -> None:
    """Pieces shorter than absorb_below take the same path, so the bits are the same too."""
    ids, whole = prompt(70), batch_of((0, 70))
    cuts = [0, 19, 20, 38, 39, 57, 70]
    caches = model.caches()
    for lo, hi in pairwise(cuts):
        last = model.run(ids[lo:hi], ints(hi - lo - 1), piece(whole, 0, lo, hi), caches)
    by_token = model.caches()
    for at in range(70):
        single = model.run(ids[at : at + 1], ints(0), piece(whole, 0, at, at + 1), by_token)
    assert torch.equal(last, single)
    at_once = model.run(ids, ints(69), whole, model.caches())  # 70 >= absorb_below: expanded
    assert_near(at_once, last)


def test_library_says_what_it_is(model: Model) -> None:
    assert model.library.tm_abi_version() == 1
    assert model.library.tm_isa().decode() == host_target().isa
    assert model.library.tm_workspace_bytes(2) > model.library.tm_workspace_bytes(1) > 0
    assert model.library.tm_pool_create(0) is None
