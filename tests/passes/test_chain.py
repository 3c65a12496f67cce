"""Steps that work on every token by itself are joined, and nothing else changes."""

from __future__ import annotations

import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.codegen import reference
from tokenmill.ir import cache
from tokenmill.ir.cache import Part
from tokenmill.ir.plan import (
    Buffer,
    CacheWrite,
    Capacity,
    Chain,
    KernelSpec,
    Linear,
    Norm,
    Operand,
    Plan,
    Pointwise,
    Rope,
    Step,
    dump,
    load,
)
from tokenmill.passes.chain import chain
from tokenmill.passes.lower import lower
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.recipe import Recipe
from torch import Tensor

from ..codegen.harness import batch_of, weights_of
from ..models import CONFIGS

HALF, WIDTH = 8, 16
NAMES = ("a", "b", "c")
NORM, ROPE, LINEAR = Norm(HALF, 1e-6), Rope(1, HALF, 4), Linear(HALF, WIDTH, "fp32")
WRITE = CacheWrite("fp32", (Part("key", HALF, HALF), Part("value", HALF, HALF)))
ADD = Pointwise(HALF, "x0 + tanh(x1)", ("row", "row"))
SPECS: tuple[KernelSpec, ...] = (NORM, ROPE, LINEAR, WRITE, ADD)

halves = st.builds(Operand, st.sampled_from(NAMES), st.sampled_from((0, HALF)))
wholes = st.builds(Operand, st.sampled_from(NAMES))
DRAWN = {
    NORM: {"x": halves, "out": halves},
    ROPE: {"x": halves, "out": halves},
    LINEAR: {"x": wholes, "out": halves},
    WRITE: {"p0": halves, "p1": halves},
    ADD: {"x0": halves, "x1": halves, "out": halves},
}
BOUND = {
    ROPE: {"cos": Operand("cos"), "sin": Operand("sin")},
    WRITE: {"cache": Operand("cache")},
}
WEIGHTS = {
    f"{spec.kind}.{name}": value
    for spec in SPECS
    for name, value in weights_of(spec, torch.Generator().manual_seed(1)).items()
}


@st.composite
def steps(draw: st.DrawFn) -> Step:
    spec = draw(st.sampled_from(SPECS))
    bind = {name: draw(operands) for name, operands in DRAWN[spec].items()}
    weights = {n: Operand(f"{spec.kind}.{n}") for n in spec.params if f"{spec.kind}.{n}" in WEIGHTS}
    return Step(spec, {**bind, **BOUND.get(spec, {}), **weights}, "tokens", "model.0.attn")


def plan_of(drawn: list[Step]) -> Plan:
    """The steps after some that fill the buffers."""
    buffers = {
        **{n: Buffer(n, "input", "f32", width=WIDTH) for n in ("x0", "x1", "x2")},
        **{n: Buffer(n, "input", "f32", width=2) for n in ("cos", "sin")},
        **{n: Buffer(n, "weight", "f32", shape=tuple(w.shape)) for n, w in WEIGHTS.items()},
        **{n: Buffer(n, "arena", "f32", "tokens", WIDTH) for n in NAMES},
        "cache": Buffer("cache", "cache", "u8", width=WRITE.cache.row_bytes),
    }
    copy = Pointwise(WIDTH, "x0", ("row",))
    fill = [
        Step(copy, {"x0": Operand(f"x{i}"), "out": Operand(name)}, "tokens", "fill")
        for i, name in enumerate(NAMES)
    ]
    caches = (cache.CacheSpec("cache", "fp32", WRITE.parts),)
    return Plan(buffers, (*fill, *drawn), caches, Capacity(8, 8), 0, "a", 1, 64)


def results(plan: Plan) -> list[Tensor]:
    """All that a plan leaves in its buffers and its cache."""
    batch = batch_of((0, 3), (60, 5))
    rng = torch.Generator().manual_seed(2)
    given = {n: torch.randn(8, WIDTH, generator=rng) for n in ("x0", "x1", "x2")}
    given |= {n: torch.randn(8, 2, generator=rng) for n in ("cos", "sin")}
    found = []
    for name in NAMES:
        rows = cache.allocate(plan.caches[0], 24)
        ids = torch.zeros(8, dtype=torch.int32)
        values = {**WEIGHTS, **given}
        out = reference.run_plan(
            Plan(**{**vars(plan), "output": name}), values, {"cache": rows}, ids, ids[:0], batch
        )
        found += [out, rows]
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(steps(), max_size=12))
def test_a_chained_plan_computes_the_same(drawn: list[Step]) -> None:
    plan = plan_of(drawn)
    chained = chain(plan)
    for got, want in zip(results(chained), results(plan), strict=True):
        assert torch.equal(got, want)
    links = [link.spec for step in chained.steps for link in step.links]
    assert sorted(map(str, links)) == sorted(str(step.spec) for step in plan.steps)
    assert load(dump(chained)) == chained


@settings(max_examples=200, deadline=None)
@given(st.lists(steps(), max_size=12))
def test_branches_share_nothing_that_one_of_them_writes(drawn: list[Step]) -> None:
    for step in chain(plan_of(drawn)).steps:
        if not isinstance(step.spec, Chain):
            continue
        links = iter(step.links)
        touched = [[next(links) for _ in branch] for branch in step.spec.branches]
        uses = [
            {
                (at.buffer, at.column + c, param in ("out", "cache"))
                for link in branch
                for param, at in link.bind.items()
                for c in ((0, HALF) if link.spec is LINEAR and param == "x" else (0,))
            }
            for branch in touched
        ]
        for i, mine in enumerate(uses):
            for other in uses[:i]:
                for buffer, column, written in mine:
                    assert (buffer, column, True) not in other
                    assert not written or (buffer, column, False) not in other


def kinds(name: str) -> list[str]:
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).float().eval()
    program = capture_pretrained(model, name)
    run_passes(program, pipeline(Recipe(weights="fp32")))
    return [
        " | ".join(" ".join(link.kind for link in branch) for branch in step.spec.branches)
        for step in chain(lower(program)).steps
        if isinstance(step.spec, Chain)
    ]


def test_what_is_between_a_product_and_attention_is_one_launch() -> None:
    assert set(kinds("deepseek_v2")) == {"rope | norm rope cache_write"}
    assert set(kinds("qwen3_moe")) == {"norm rope | norm rope cache_write"}
    assert set(kinds("llama")) == {"rope | rope cache_write"}
    assert set(kinds("deepseek_v3")) == {"norm | norm", "rope | rope cache_write"}


def test_a_chain_is_where_its_links_are() -> None:
    plan = plan_of([])
    places = ("model.layers.3.attn.q_norm", "model.layers.3.attn", "model.layers.3.mlp")
    steps = [
        Step(ROPE, {"x": Operand(n), "out": Operand(n), **BOUND[ROPE]}, "tokens", where)
        for n, where in zip(NAMES, places, strict=True)
    ]
    for count, where in ((2, "model.layers.3.attn"), (3, "model.layers.3")):
        chained = chain(Plan(**{**vars(plan), "steps": tuple(steps[:count])}))
        assert [step.where for step in chained.steps] == [where]
