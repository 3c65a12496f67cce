"""Linear on a GPU, under the interpreter: hostile shapes, few rows and many, splits, E4M3 activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.codegen.triton import linear, tiles
from tokenmill.codegen.triton.target import TARGETS
from tokenmill.ir import quant
from tokenmill.ir.plan import Linear

from ..harness import CAPACITY, batch_of, inputs_of
from ..test_kernels import IN_PLACE, LINEARS, SWIGLU
from .interpreter import SMS, Interpreted

PLACED = {spec: param for spec, param in IN_PLACE.items() if isinstance(spec, Linear)}
SPLIT = (
    *(Linear(70, 1100, fmt) for fmt in ("fp32", "bf16", "int8", "int4-g32", "fp8")),
    Linear(64, 1024, "int4-g128", bias=True, parts=2, epilogue=SWIGLU),
)
SPECS = (*LINEARS, *PLACED, *SPLIT)
# Rows begin at multiples of 16 bytes; neither columns nor inputs are whole blocks.
TILED = (
    Linear(200, 200, "bf16"),
    Linear(70, 264, "bf16", bias=True, parts=2, epilogue=SWIGLU),
    Linear(131, 72, "bf16", bias=True, epilogue="gelu(acc0) * e1 + e0", extras=("row", "channel")),
    Linear(200, 208, "fp8"),
    Linear(140, 144, "fp8", bias=True, parts=2, epilogue=SWIGLU),
)
BATCHES: dict[str, tuple[tuple[int, int], ...]] = {
    "none": (),
    "an empty sequence": ((0, 0),),
    "one token": ((0, 1),),
    "three tokens": ((0, 2), (3, 1)),
}
MANY = ((0, CAPACITY.tokens - 51),)
TOLERANCE = {"f32": 2e-5, "f16": 2e-3, "bf16": 1e-2}


@pytest.fixture(scope="module", params=["f32", "bf16"])
def kernels(request: pytest.FixtureRequest) -> Interpreted:
    column = 3 if request.param == "f32" else 0
    return Interpreted(SPECS, in_place=PLACED, dtype=request.param, column=column)


def check(kernels: Interpreted, spec: Linear, sequences: tuple[tuple[int, int], ...]) -> None:
    batch = batch_of(*sequences)
    inputs = inputs_of(kernels, spec, batch)
    e4m3 = linear.rounds(spec, TARGETS[kernels.target], len(batch.positions))
    want = kernels.expected(spec, batch, inputs, e4m3=e4m3)["out"]
    got = kernels.run(spec, batch, inputs)["out"]
    tolerance = TOLERANCE[kernels.dtype]
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


def constants(kernels: Interpreted, spec: Linear, rows: int) -> list[dict[str, Any]]:
    """What the launches for at most ``rows`` rows are bound to."""
    bucket = next(b for b in kernels.schedule["buckets"] if b["tokens"] >= rows)
    binaries = {b["name"]: b for b in kernels.schedule["binaries"]}
    group = kernels.schedule["groups"][bucket["steps"][kernels.index(spec)]]
    return [binaries[launch["binary"]]["constants"] for launch in group]


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_few_rows(kernels: Interpreted, spec: Linear, name: str) -> None:
    check(kernels, spec, BATCHES[name])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_many_rows(kernels: Interpreted, spec: Linear) -> None:
    check(kernels, spec, MANY)


@pytest.mark.parametrize("spec", SPLIT, ids=str)
def test_splits_are_there(kernels: Interpreted, spec: Linear) -> None:
    assert constants(kernels, spec, 3)[0]["SPLITS"] == 2


@pytest.mark.parametrize("spec", [s for s in SPECS if s.format == "fp8"], ids=str)
@pytest.mark.parametrize("sequences", [((0, 3),), MANY], ids=["few", "many"])
def test_fp8_where_the_architecture_lacks_it(
    spec: Linear, sequences: tuple[tuple[int, int], ...]
) -> None:
    check(Interpreted([spec], target="sm_80"), spec, sequences)


# --- tensor descriptors and persistent programs -----------------------------------------------------


@pytest.fixture(scope="module", params=["sm_90", "sm_100", "sm_120"])
def tiled(request: pytest.FixtureRequest) -> Interpreted:
    return Interpreted(TILED, target=request.param, column=0)


def launch_of(kernels: Interpreted, spec: Linear) -> dict[str, Any]:
    """The product of the largest bucket."""
    group = kernels.schedule["buckets"][-1]["steps"][kernels.index(spec)]
    return kernels.schedule["groups"][group][-1]


@pytest.mark.parametrize("spec", TILED, ids=str)
def test_many_rows_are_read_through_descriptors(tiled: Interpreted, spec: Linear) -> None:
    bound = constants(tiled, spec, 200)[-1]
    assert bound["DESCRIPTORS"]
    assert bound["PERSISTENT"]
    launch = launch_of(tiled, spec)
    assert launch["grid"][0] > SMS * launch["per_sm"] > 0
    check(tiled, spec, MANY)


@pytest.mark.parametrize("count", [0, 1, 129])
@pytest.mark.parametrize("spec", TILED[1:4], ids=str)
def test_few_rows_of_many(
    tiled: Interpreted, spec: Linear, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there may be in no bucket but the largest."""
    last = tiled.schedule["buckets"][-1]["steps"]
    monkeypatch.setattr(tiled, "_group", lambda index, batch, rows: last[index])
    monkeypatch.setattr(linear, "E4M3_ROWS", -1)
    check(tiled, spec, ((0, count),))


@pytest.mark.parametrize("persistent", [0, 2])
@pytest.mark.parametrize("descriptors", [False, True])
def test_how_tiles_are_read_and_shared_out_changes_no_bit(
    descriptors: bool, persistent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Interpreted(TILED, column=0)
    default = tiles.gemm

    def other(*args: Any) -> tiles.Gemm:
        return replace(default(*args), descriptors=descriptors, persistent=persistent)

    monkeypatch.setattr(tiles, "gemm", other)
    kernels = Interpreted(TILED, column=0)
    batch = batch_of(*MANY)
    for spec in TILED:
        assert constants(kernels, spec, 200)[-1]["DESCRIPTORS"] == descriptors
        assert launch_of(kernels, spec).get("per_sm", 0) == persistent
        inputs = inputs_of(kernels, spec, batch)
        for part, values in usual.weights[usual.index(spec)].items():
            kernels.weights[kernels.index(spec)][part].copy_(values)
        found = [each.run(spec, batch, inputs)["out"] for each in (usual, kernels)]
        assert torch.equal(*found)


def test_what_descriptors_cannot_describe_is_read_by_pointers() -> None:
    odd, plain = Linear(130, 204, "bf16"), TILED[0]
    assert not constants(Interpreted([odd], column=0), odd, 200)[-1]["DESCRIPTORS"]
    for kernels in (
        Interpreted([plain], column=1),
        Interpreted([plain], column=0, dtype="f32"),
        Interpreted([plain], column=0, target="sm_80"),
    ):
        assert not constants(kernels, plain, 200)[-1]["DESCRIPTORS"]
        check(kernels, plain, MANY)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_fp8_value_is_exact(target: str) -> None:
    spec = Linear(256, 16, "fp8")
    kernels = Interpreted([spec], target=target, dtype="f32")
    bits = torch.arange(256, dtype=torch.uint8).masked_fill(torch.arange(256) % 128 == 127, 0)
    kernels.weights[0]["q"].copy_(bits.view(torch.float8_e4m3fn)[:, None])
    kernels.weights[0]["scale"].fill_(1.0)
    inputs = {"x": torch.eye(16)[:1]}
    got = kernels.run(spec, batch_of((0, 1)), inputs)["out"]
    assert torch.equal(got[0], kernels.weights[0]["q"][:, 0].float())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("spec", [*LINEARS[:7], SPLIT[-1]], ids=str)
def test_what_is_not_finite_stays_so_in_its_row(
    kernels: Interpreted, spec: Linear, bad: float
) -> None:
    batch = batch_of((0, 3))
    inputs = inputs_of(kernels, spec, batch)
    whole = kernels.run(spec, batch, inputs)["out"]
    inputs["x"][1, 7] = bad
    got = kernels.run(spec, batch, inputs)["out"]
    assert not got[1].isfinite().any()
    assert torch.equal(got[[0, 2]], whole[[0, 2]])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_in_e4m3(kernels: Interpreted, bad: float) -> None:
    spec = next(s for s in LINEARS if s.format == "fp8")
    batch = batch_of(*MANY)
    inputs = inputs_of(kernels, spec, batch)
    inputs["x"][1, 7] = bad
    inputs["x"][2] = 0.0
    got = kernels.run(spec, batch, inputs)["out"]
    assert not got[1].isfinite().any()
    assert not got[2].any()
    assert got[[0, *range(3, len(got))]].isfinite().all()


@pytest.mark.parametrize("spec", [LINEARS[5], SPLIT[1], SPLIT[4]], ids=str)
def test_a_token_has_the_same_bits_alone_and_in_a_batch(kernels: Interpreted, spec: Linear) -> None:
    inputs = inputs_of(kernels, spec, batch_of((0, 9)))
    whole = kernels.run(spec, batch_of((0, 9)), inputs)["out"]
    for token in (0, 8):
        alone = {name: x[token : token + 1] for name, x in inputs.items()}
        got = kernels.run(spec, batch_of((0, 1)), alone)["out"]
        assert torch.equal(got[0], whole[token])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 140),
    k=st.integers(1, 300),
    fmt=st.sampled_from(quant.NAMES),
    parts=st.sampled_from((1, 2)),
    dtype=st.sampled_from(("f32", "f16", "bf16")),
)
def test_any_size(m: int, n: int, k: int, fmt: str, parts: int, dtype: Any) -> None:
    spec = Linear(n, k, fmt, parts=parts, epilogue="acc0" if parts == 1 else SWIGLU)
    check(Interpreted([spec], dtype=dtype), spec, ((0, m),))
