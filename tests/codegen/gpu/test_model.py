"""Whole models for a GPU, under the interpreter: each step against the torch meaning of its kernel.

Each step gets the reference's inputs, so that rounding to 16 bits, which may send a token to another expert,
does not add up over steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenmill import codegen
from tokenmill.api import plan_for
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.capture.module import capture
from tokenmill.codegen import reference
from tokenmill.ir import cache
from tokenmill.ir.cache import Batch
from tokenmill.ir.plan import DTYPE_BYTES, Capacity, Plan, Step
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.recipe import Recipe
from torch import Tensor

from ... import models
from ..harness import DTYPES, aligned, batch_of
from .interpreter import inputs, load_sources, mend, run_group

PAGES = 24


class Model:
    """A model lowered for a GPU: its emitted text, and memory for one step."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        mend()
        if name == "hand_written":
            program = capture(models.hand_written(), max_positions=128, name=name)
        else:
            program = capture_pretrained(models.pretrained(name), name)
        run_passes(program, pipeline(recipe))
        self.plan: Plan = plan_for(program, Capacity(tokens=16, rows=4), "cuda")
        buffers = self.plan.buffers.values()
        self.weights = {b.name: program.weights[b.name] for b in buffers if b.kind == "weight"}
        files = codegen.emit(self.plan, "sm_90")
        self.schedule = json.loads(files["schedule.json"])
        self.modules = load_sources(files)
        self.arena = aligned(self.plan.arena_bytes)
        self.scratch = aligned(self.schedule["scratch_bytes"])
        self.zero = torch.zeros(self.schedule["zero_bytes"], dtype=torch.uint8)

    def steps(self, batch: Batch, ids: Tensor, rows: Tensor) -> Iterator[tuple[Step, float]]:
        """Every step with its largest error, in units of the result's spread; 1 or more if it is wrong."""
        plan, counts = self.plan, {"tokens": len(ids), "rows": len(rows), "fixed": 1}
        given = {**inputs(batch, ids, rows, self.schedule["table_pitch"]), **self.weights}
        caches = {spec.name: cache.allocate(spec, PAGES) for spec in plan.caches}
        for spec in plan.caches:
            rng = torch.Generator().manual_seed(len(spec.name))
            parts = [torch.randn(PAGES * cache.PAGE, p.width, generator=rng) for p in spec.parts]
            caches[spec.name].view(-1, spec.row_bytes)[:] = cache.encode(spec, parts)
        values: dict[str, Tensor] = {
            b.name: torch.zeros(counts[b.rows], b.width, dtype=DTYPES[b.dtype])
            for b in plan.buffers.values()
            if b.kind == "arena"
        }
        bucket = next(b for b in self.schedule["buckets"] if b["tokens"] >= len(ids))
        for step, group in zip(plan.steps, bucket["steps"], strict=True):
            operands, places = {}, {}
            for param, at in step.bind.items():
                buffer = plan.buffers[at.buffer]
                if buffer.kind != "arena":
                    operands[param] = (given | caches)[buffer.name]
                    cached = buffer.kind == "cache"
                    places[param] = operands[param].clone() if cached else operands[param]
                    continue
                whole, size = values[buffer.name], DTYPE_BYTES[buffer.dtype]
                ours = self.arena[buffer.offset :][: whole.numel() * size]
                ours.copy_(whole.flatten().view(torch.uint8))
                width = reference.operand_width(step.spec, param) or buffer.width
                operands[param] = whole[:, at.column : at.column + width]
                places[param] = self.arena[buffer.offset + at.column * size :]
            run_group(self.schedule, self.modules, group, given | places, self)
            results = reference.run(step.spec, operands, batch, "cuda")
            for param, value in results.items():  # in place too: the last of a chain is what stays
                operands[param].copy_(value)
            error = 0.0
            for param in results:
                buffer, column = plan.buffers[step.bind[param].buffer], step.bind[param].column
                wanted, whole = operands[param].float(), values[buffer.name]
                ours = self.arena[buffer.offset :].view(whole.dtype)[: whole.numel()].view_as(whole)
                got = ours[:, column : column + wanted.shape[1]].float()
                spread = wanted.std() + 1e-6
                error = max(error, float(((got - wanted).abs().max() / spread).nan_to_num(99.0)))
            caches_of = [
                p for p, at in step.bind.items() if plan.buffers[at.buffer].kind == "cache"
            ]
            if not all(torch.equal(places[p], operands[p]) for p in caches_of):
                error = 1.0
            yield step, error


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("deepseek_v3", {"weights": "int4", "kv": "int8"}),
        ("deepseek_v2", {"weights": "fp8", "kv": "fp8"}),
        ("qwen3_moe", {"weights": "bf16"}),
        ("mixtral", {"weights": "int8", "kv": "int8"}),
        (
            "hand_written",
            {
                "weights": "bf16",
                "kv": "fp8",
                "rules": [{"match": "role:embedding", "format": "int8"}],
            },
        ),
    ],
)
def test_every_step_of_a_mixed_batch(name: str, recipe: dict[str, Any]) -> None:
    model = Model(name, Recipe(**recipe))
    batch = batch_of((0, 5), (0, 0), (70, 1))
    ids = torch.randint(90, (6,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    rows = torch.tensor([4, 5], dtype=torch.int32)
    for step, error in model.steps(batch, ids, rows):
        assert error < 0.06, f"{step.spec.kind} at {step.where}: {error}"
