"""Mixtures of experts under the interpreter: few tokens, which go by pair, and many, which are sorted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.codegen.triton import experts
from tokenmill.codegen.triton.target import TARGETS
from tokenmill.ir import quant
from tokenmill.ir.plan import Experts
from torch import Tensor

from ..harness import batch_of, inputs_of
from ..test_kernels import BATCHES, EXPERTS, IN_PLACE
from .interpreter import Interpreted

PLACED = {s: p for s, p in IN_PLACE.items() if s.kind == "experts"}
# So many experts that four tokens go by pair.
SPARSE = (
    Experts(17, 2, 40, 23, "fp32", "fp32", "silu(acc0)", gated=False),
    Experts(17, 2, 70, 45, "bf16", "int8", residual=True),
    Experts(16, 2, 130, 40, "int4-g128", "fp8"),
    Experts(16, 2, 40, 70, "fp8", "int4-g64"),
)
# So few that 200 tokens bring FP8 weights together with E4M3 activations, where those are fp8.
DENSE = (
    Experts(3, 2, 150, 200, "fp8", "fp8"),
    Experts(2, 2, 256, 256, "fp8", "fp8", residual=True),
    Experts(1, 1, 130, 33, "fp8", "fp8", "relu(acc0) + 0.1", gated=False, biased=True),
    Experts(3, 2, 70, 260, "fp8", "fp8", "min(acc0, 1.0) * acc1 + 0.1", biased=True),
    Experts(3, 2, 40, 70, "int8", "fp8"),
    Experts(3, 2, 140, 70, "fp8", "bf16"),
)
SPECS = (*EXPERTS, *PLACED, *SPARSE, *DENSE)
NAMES = ("none", "an empty sequence", "one token", "decode", "over a page boundary")
# Of a row's largest value: by the order of sums, by bf16 between the products, by bf16 around them.
EXACT, ROUNDED, NARROW = 1e-5, 2.0**-8, 2.0**-6
# Of all values' spread: a number is rounded to E4M3 by up to 1/16 of it, before each of two products.
COARSE, COARSEST = 2.0**-8, 2.0**-4


@pytest.fixture(scope="module", params=["f32", "bf16"])
def kernels(request: pytest.FixtureRequest) -> Interpreted:
    column = 3 if request.param == "f32" else 0
    return Interpreted(SPECS, in_place=PLACED, dtype=request.param, column=column)


@pytest.fixture(scope="module")
def wide() -> Interpreted:
    return Interpreted(SPECS, in_place=PLACED, dtype="f32")


def launched(kernels: Interpreted, spec: Experts, tokens: int) -> int:
    batch = batch_of((0, tokens))
    none = torch.zeros(0, dtype=torch.int32)
    return len(kernels.schedule["groups"][kernels._group(kernels.index(spec), batch, none)])


def rounds(kernels: Interpreted, spec: Experts, tokens: int) -> bool:
    bucket = next(b["tokens"] for b in kernels.schedule["buckets"] if b["tokens"] >= tokens)
    return experts.rounds(spec, TARGETS[kernels.target], bucket)


def check(kernels: Interpreted, spec: Experts, inputs: dict[str, Tensor]) -> Tensor:
    batch = batch_of((0, len(inputs["x"])))
    e4m3 = rounds(kernels, spec, len(inputs["x"]))
    got = kernels.run(spec, batch, inputs)["out"].float()
    want = kernels.expected(spec, batch, inputs, e4m3=e4m3)["out"]
    assert got.shape == want.shape
    if len(want):
        exact = ROUNDED if spec.down_format != "fp32" else EXACT
        most = exact if kernels.dtype == "f32" and not e4m3 else NARROW
        error = (got - want).abs().amax(-1) / want.abs().amax(-1)
        assert error.max() < most
    return got


def random(kernels: Interpreted, spec: Experts, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    return inputs_of(kernels, spec, batch_of((0, tokens)), seed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", SPECS, ids=experts.symbol)
def test_experts_match_the_reference(kernels: Interpreted, spec: Experts, name: str) -> None:
    check(kernels, spec, inputs_of(kernels, spec, batch_of(*BATCHES[name])))


def test_few_tokens_take_two_launches_and_many_four(wide: Interpreted) -> None:
    for spec in SPECS:
        assert launched(wide, spec, 1) == 2
        assert launched(wide, spec, 4) == (2 if spec in SPARSE else 4)
        assert launched(wide, spec, 200) == 4


@pytest.mark.parametrize("tokens", [3, 130])
@pytest.mark.parametrize("spec", [EXPERTS[1], SPARSE[0]], ids=experts.symbol)
def test_all_tokens_on_the_same_experts(wide: Interpreted, spec: Experts, tokens: int) -> None:
    inputs = random(wide, spec, tokens)
    inputs["ids"][:] = torch.arange(spec.top_k).flip(0) + spec.experts - spec.top_k
    check(wide, spec, inputs)


@pytest.mark.parametrize("tokens", [1, 2, 12])
def test_weights_of_idle_experts_are_not_read(wide: Interpreted, tokens: int) -> None:
    """Idle experts hold NaN; a kernel that multiplied by zero would show it."""
    spec = SPARSE[1]
    weights = wide.weights[wide.index(spec)]
    saved = {name: weights[name].clone() for name in ("gate_up_w", "down_scale")}
    for name in saved:
        weights[name][1:-1] = torch.nan
    inputs = random(wide, spec, tokens)
    inputs["ids"][:] = torch.tensor([16, 0])
    got = wide.run(spec, batch_of((0, tokens)), inputs)["out"]
    for name, value in saved.items():
        weights[name].copy_(value)
    assert got.isfinite().all()
    assert torch.equal(got, check(wide, spec, inputs))


@pytest.mark.parametrize("tokens", [3, 7])
@pytest.mark.parametrize("spec", SPARSE[1:], ids=experts.symbol)
def test_what_is_not_finite_stays_in_its_token(
    wide: Interpreted, spec: Experts, tokens: int
) -> None:
    inputs = random(wide, spec, tokens)
    batch = batch_of((0, tokens))
    whole = wide.run(spec, batch, inputs)["out"]
    inputs["x"][1, 7] = torch.nan
    got = wide.run(spec, batch, inputs)["out"]
    assert not got[1].isfinite().any()
    others = torch.arange(tokens) != 1
    assert torch.equal(got[others], whole[others])


@pytest.mark.parametrize("spec", DENSE, ids=experts.symbol)
def test_many_pairs_meet_fp8_weights_in_e4m3(kernels: Interpreted, spec: Experts) -> None:
    """As the rounding says, and not much farther from what is meant without it."""
    assert rounds(kernels, spec, 149)
    assert launched(kernels, spec, 149) == 4
    inputs = random(kernels, spec, 149)
    inputs["x"][7, 1:] = 0.0
    got = check(kernels, spec, inputs)
    want = kernels.expected(spec, batch_of((0, 149)), inputs)["out"]
    error = (got - want).square().mean().sqrt() / want.std()
    assert COARSE < error < COARSEST


@pytest.mark.parametrize("tokens", [129, 200])
@pytest.mark.parametrize("spec", DENSE[:4], ids=experts.symbol)
def test_experts_without_pairs_in_e4m3(wide: Interpreted, spec: Experts, tokens: int) -> None:
    inputs = random(wide, spec, tokens)
    inputs["ids"][:] = torch.arange(spec.top_k).flip(0) + spec.experts - spec.top_k
    check(wide, spec, inputs)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("spec", DENSE[:2], ids=experts.symbol)
def test_what_is_not_finite_stays_in_its_token_in_e4m3(
    wide: Interpreted, spec: Experts, bad: float
) -> None:
    inputs = random(wide, spec, 140)
    batch = batch_of((0, 140))
    whole = wide.run(spec, batch, inputs)["out"]
    inputs["x"][1, 7] = bad
    got = wide.run(spec, batch, inputs)["out"]
    assert not got[1].isfinite().any()
    others = torch.arange(140) != 1
    assert torch.equal(got[others], whole[others])


def test_where_the_architecture_lacks_e4m3_activations_stay_bf16() -> None:
    kernels = Interpreted(DENSE[:1], target="sm_80")
    assert not rounds(kernels, DENSE[0], 140)
    check(kernels, DENSE[0], random(kernels, DENSE[0], 140))


def test_pairs_keep_their_order_over_blocks_of_the_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 pairs, of which one expert has three; the sort goes through the pairs in steps."""
    monkeypatch.setattr(experts, "SORT", 16)
    spec = Experts(24, 3, 32, 16, "fp32", "fp32")
    kernels = Interpreted((spec,), dtype="f32")
    inputs = random(kernels, spec, 60)
    inputs["ids"][:40, 1] = 5
    inputs["ids"][:40, 0] = 23
    inputs["ids"][:40, 2] = 0
    check(kernels, spec, inputs)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9), "experts")
    spec = Experts(
        count,
        data.draw(st.integers(1, min(4, count)), "top_k"),
        data.draw(st.integers(1, 150), "hidden"),
        data.draw(st.integers(1, 70), "inter"),
        data.draw(st.sampled_from(quant.NAMES), "gate_up_format"),
        data.draw(st.sampled_from(quant.NAMES), "down_format"),
        gated=(gated := data.draw(st.booleans(), "gated")),
        activation="silu(acc0) * acc1" if gated else "relu(acc0) + 0.1",
        residual=data.draw(st.booleans(), "residual"),
    )
    kernels = Interpreted(
        (spec,), dtype=data.draw(st.sampled_from(("f32", "bf16", "f16")), "dtype")
    )
    for tokens in (1, data.draw(st.integers(2, 20), "tokens")):
        check(kernels, spec, random(kernels, spec, tokens))
