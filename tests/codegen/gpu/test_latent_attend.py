"""Multi-head latent attention under the interpreter: ragged batches, splits, caches with garbage around."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.codegen.triton import attend, latent_attend
from tokenmill.ir.plan import LatentAttend

from ..harness import batch_of, inputs_of
from ..test_kernels import BATCHES, LATENTS, assert_close
from .interpreter import Interpreted

# What is empty or idle is 0 / 0 here as on a GPU, and is not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FP8 = tuple(spec for spec in LATENTS if spec.cache_format == "fp8")
TILED = LatentAttend(3, 16, 8, 300, 16, 0.2, "int8", "int8", absorb_below=9)  # three scales a row
SPECS = (*LATENTS, TILED)
BELOW = 9  # of most


@pytest.fixture(scope="module", params=["f32", "bf16"])
def kernels(request: pytest.FixtureRequest) -> Interpreted:
    column = 3 if request.param == "f32" else 0
    return Interpreted(SPECS, dtype=request.param, column=column)


@pytest.fixture(scope="module")
def without_fp8() -> Interpreted:
    """Where E4M3 is read by its bits."""
    return Interpreted(FP8, "sm_80", column=0)


@pytest.fixture(scope="module")
def split() -> Interpreted:
    """Splits of one block or more: contexts of some hundred keys are shared out."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (attend, latent_attend):
            patch.setattr(module, "LEAST_KEYS", 64)
        return Interpreted(SPECS, dtype="bf16", column=0)


def check(
    kernels: Interpreted, spec: LatentAttend, *sequences: tuple[int, int], seed: int = 0
) -> None:
    batch = batch_of(*sequences)
    inputs = inputs_of(kernels, spec, batch, seed)
    got = kernels.run(spec, batch, inputs)["out"].float()
    assert not got.isnan().any()
    want = kernels.expected(spec, batch, inputs)["out"]
    if kernels.dtype == "bf16" and spec.cache_format == spec.up_format == "fp32":
        torch.testing.assert_close(got, want, rtol=2.0**-8, atol=2.0**-8)
    else:
        assert_close(spec, got, want)


@pytest.mark.parametrize("name", ["none", "an empty sequence", "decode"])
@pytest.mark.parametrize("spec", [*SPECS[:5], TILED, *FP8], ids=str)
def test_matches_reference(kernels: Interpreted, spec: LatentAttend, name: str) -> None:
    check(kernels, spec, *BATCHES[name])


@pytest.mark.parametrize("spec", SPECS[1:5], ids=str)
def test_several_queries_of_a_sequence(kernels: Interpreted, spec: LatentAttend) -> None:
    check(kernels, spec, *BATCHES["over a page boundary"])


@pytest.mark.parametrize("spec", FP8, ids=str)
def test_fp8_by_its_bits_matches_too(without_fp8: Interpreted, spec: LatentAttend) -> None:
    check(without_fp8, spec, (5, 1), (63, 1), (64, 1), (60, 9), (200, 1))


@pytest.mark.parametrize("spec", [SPECS[0], *SPECS[3:5], SPECS[8], TILED], ids=str)
def test_long_chunks_are_expanded(kernels: Interpreted, spec: LatentAttend) -> None:
    """One query too few, enough and one more, beside a token; keys before a chunk stay absorbed."""
    few, enough, more = BELOW - 1, BELOW, BELOW + 1
    check(
        kernels, spec, (3, few), (130, 1), (0, enough), (0, 0), (62, more), (0, few), (64, enough)
    )


def test_a_chunk_of_several_tiles(split: Interpreted) -> None:
    """With keys that a tile sees whole, and splits of what stands before it."""
    check(split, SPECS[4], (200, 140), (0, 7), (63, 40))


def test_single_tokens_may_be_expanded_too(split: Interpreted) -> None:
    check(split, SPECS[5], (63, 1), (0, 3))


def test_steps_that_hold_no_long_chunk_are_spared(kernels: Interpreted) -> None:
    """Buckets below the threshold launch what absorbs, and no more; others the same for some tokens."""
    step = kernels.index(SPECS[1])
    groups, binaries = kernels.schedule["groups"], kernels.schedule["binaries"]
    functions = {binary["name"]: binary["function"] for binary in binaries}
    for bucket in kernels.schedule["buckets"]:
        names = [functions[launch["binary"]] for launch in groups[bucket["steps"][step]]]
        ends = [name.partition(f"_{SPECS[1].cache_format}")[2] for name in names]
        ends = [end for end in ends if "join" not in end]
        if bucket["tokens"] < BELOW:
            assert ends == ["_lower", "", "_raise"]
        else:
            absorbed = ["_lower_some", "_some", "_raise_some"]
            assert ends == [*absorbed, "_gather", "_expand", "_expand", "_expanded"]


@pytest.mark.parametrize("spec", [SPECS[1], FP8[0]], ids=str)
def test_a_prompt_takes_nothing_absorbed(
    split: Interpreted, spec: LatentAttend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that absorb write something only if a sequence had keys before its chunk."""
    functions = {binary["name"]: binary["function"] for binary in split.schedule["binaries"]}
    absorbing = [
        [launch for launch in group if functions[launch["binary"]].endswith("_some")]
        for group in split.schedule["groups"]
    ]
    monkeypatch.setattr(split, "schedule", {**split.schedule, "groups": absorbing})
    for past in (0, 5):
        batch = batch_of((past, BELOW), (0, 33))
        split.run(spec, batch, inputs_of(split, spec, batch))
        assert bool((split.scratch != 255).any()) == (past > 0)


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[4], FP8[1]], ids=str)
def test_prompts_and_decode_go_together(split: Interpreted, spec: LatentAttend) -> None:
    """In a bucket whose tiles are tall, and which walks whole blocks without masks."""
    check(split, spec, (0, 64), (130, 1), (63, 2), (0, 0), (70, 9))


@pytest.mark.parametrize("spec", [*SPECS[2:4], *SPECS[5:8], FP8[0]], ids=str)
def test_splits_are_joined(split: Interpreted, spec: LatentAttend) -> None:
    check(split, spec, (300, 1), (5, 1))


def test_a_long_context(split: Interpreted) -> None:
    check(split, SPECS[1], (1030, 2))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    sequences=st.lists(
        st.tuples(st.sampled_from((0, 1, 63, 64, 130)), st.sampled_from((0, 1, 5, 8, 9, 12))),
        max_size=3,
    ),
    seed=st.integers(0, 9),
)
def test_any_batch(split: Interpreted, sequences: list[tuple[int, int]], seed: int) -> None:
    check(split, SPECS[4], *sequences, seed=seed)
