"""Routers under the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.codegen.triton import route
from tokenmill.ir.plan import Route
from tokenmill.ir.router import RouterSpec
from torch import Tensor

from ..harness import batch_of, inputs_of
from ..test_kernels import BATCHES, ROUTES
from .interpreter import Interpreted

DEEPSEEK_V3 = Route(
    256, RouterSpec(8, "sigmoid", True, 8, 4, renormalize=True, epsilon=1e-20, scale=2.5)
)
LONE_GROUPS = Route(6, RouterSpec(3, "sigmoid", True, 6, 4))  # groups of one expert
SPECS = (*ROUTES, DEEPSEEK_V3, LONE_GROUPS)
NAMES = ("none", "an empty sequence", "one token", "five tokens", "ragged")


@pytest.fixture(scope="module")
def kernels() -> Interpreted:
    return Interpreted(SPECS)


def check(kernels: Interpreted, spec: Route, inputs: dict[str, Tensor]) -> None:
    batch = batch_of((0, len(inputs["logits"])))
    got, want = kernels.run(spec, batch, inputs), kernels.expected(spec, batch, inputs)
    assert torch.equal(got["ids"], want["ids"])
    torch.testing.assert_close(got["weights"], want["weights"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", SPECS, ids=route.symbol)
def test_routes_match_the_reference(kernels: Interpreted, spec: Route, name: str) -> None:
    check(kernels, spec, inputs_of(kernels, spec, batch_of(*BATCHES[name])))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 9), seed=st.integers(0, 999), spread=st.sampled_from((0.1, 1.0, 20.0)))
def test_deepseek_v3_on_any_logits(
    kernels: Interpreted, tokens: int, seed: int, spread: float
) -> None:
    inputs = inputs_of(kernels, DEEPSEEK_V3, batch_of((0, tokens)), seed)
    check(kernels, DEEPSEEK_V3, {"logits": spread * inputs["logits"]})


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", SPECS, ids=route.symbol)
def test_ids_are_distinct_experts_whatever_the_logits(
    kernels: Interpreted, spec: Route, bad: float
) -> None:
    batch = batch_of((0, 4))
    inputs = inputs_of(kernels, spec, batch)
    whole = kernels.run(spec, batch, inputs)
    inputs["logits"][0] = bad
    inputs["logits"][1, ::2] = bad
    inputs["logits"][2, 3] = bad
    got = kernels.run(spec, batch, inputs)
    ids = got["ids"]
    assert int(ids.min()) >= 0
    assert int(ids.max()) < spec.experts
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    assert torch.equal(ids[3], whole["ids"][3])
    assert torch.equal(got["weights"][3], whole["weights"][3])


def test_equal_scores_go_to_the_first_experts(kernels: Interpreted) -> None:
    batch = batch_of((0, 2))
    for spec in ROUTES[0], ROUTES[2]:
        got = kernels.run(spec, batch, {"logits": torch.ones(2, spec.experts)})["ids"]
        assert got.tolist() == [list(range(spec.router.top_k))] * 2
