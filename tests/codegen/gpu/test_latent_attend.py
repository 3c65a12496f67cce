"""Multi-head latent attention under the interpreter: ragged batches, splits, caches with garbage around."""

from __future__ import annotations

from dataclasses import replace

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
# Kernels for a GPU absorb however many queries there are.
SPECS = LATENTS
FP8 = tuple(spec for spec in SPECS if spec.cache_format == "fp8")
TILED = LatentAttend(
    3, 16, 8, 300, 16, 0.2, "int8", "int8", absorb_below=1000
)  # three scales a row


@pytest.fixture(scope="module", params=["f32", "bf16"])
def kernels(request: pytest.FixtureRequest) -> Interpreted:
    column = 3 if request.param == "f32" else 0
    return Interpreted((*SPECS, TILED), dtype=request.param, column=column)


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
    check(without_fp8, spec, *BATCHES["decode"])


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
        st.tuples(st.sampled_from((0, 1, 63, 64, 130)), st.integers(0, 5)), max_size=3
    ),
    seed=st.integers(0, 9),
)
def test_any_batch(split: Interpreted, sequences: list[tuple[int, int]], seed: int) -> None:
    check(split, SPECS[4], *sequences, seed=seed)
