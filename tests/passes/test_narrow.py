"""Which activations of a GPU plan are 16 bits wide."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenmill
from tokenmill.ir.plan import Experts, Linear, Norm, Plan, Route
from tokenmill.recipe import Recipe


@pytest.fixture(scope="module")
def plan(tiny_deepseek: Path) -> Plan:
    recipe = Recipe(weights="int4", targets=("sm_90",))
    return tokenmill.optimize(tiny_deepseek, recipe=recipe, dry_run=True).plans["cuda"]


def test_sums_and_routing_stay_wide(plan: Plan) -> None:
    for step in plan.steps:
        dtypes = {param: plan.buffers[at.buffer].dtype for param, at in step.bind.items()}
        match step.spec:
            case Norm(residual=True):
                assert dtypes["residual"] == dtypes["sum"] == "f32"
            case Route():
                assert dtypes["logits"] == dtypes["weights"] == "f32"
            case Experts(residual=True):
                assert dtypes["residual"] == dtypes["out"] == "f32"
    assert plan.buffers[plan.output].dtype == "f32"


def test_products_read_16_bits(plan: Plan) -> None:
    inputs = [s for s in plan.steps if isinstance(s.spec, Linear | Experts)]
    assert inputs
    for step in inputs:
        assert plan.buffers[step.bind["x"].buffer].dtype == "bf16", step.where


def test_the_arena_shrinks(plan: Plan, tiny_deepseek: Path) -> None:
    recipe = Recipe(weights="int4")
    on_cpu = tokenmill.optimize(tiny_deepseek, recipe=recipe, dry_run=True).plans["cpu"]
    assert plan.arena_bytes < on_cpu.arena_bytes


def test_matrices_keep_their_rows(plan: Plan) -> None:
    for step in plan.steps:
        if isinstance(step.spec, Linear):
            part = "q" if "q" in step.spec.params else "w"
            shape = plan.buffers[step.bind[part].buffer].shape
            assert shape[0] == step.spec.parts * step.spec.n
