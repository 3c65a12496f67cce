"""Grouped-query attention under the interpreter: ragged batches, splits, caches with garbage around."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.codegen.triton import attend
from tokenmill.codegen.triton.attend import Tile
from tokenmill.codegen.triton.launch import Bucket
from tokenmill.ir.cache import Batch
from tokenmill.ir.plan import Attend

from ..harness import batch_of, inputs_of
from ..test_kernels import ATTENDS, BATCHES, assert_close
from .interpreter import Interpreted

# What is empty or idle is 0 / 0 here as on a GPU, and is not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
WIDE = Attend(
    20, 1, 16, 16, 0.25, "bf16", sinks=True
)  # more heads of a kv head than a tile has rows
SPECS = (*ATTENDS, WIDE)
FP8 = tuple(spec for spec in ATTENDS if spec.cache_format == "fp8")


def column_of(dtype: str) -> int:
    """Odd columns in fp32; in bf16 those where a kernel may count on aligned rows."""
    return 3 if dtype == "f32" else 0


@pytest.fixture(scope="module", params=["f32", "bf16"])
def kernels(request: pytest.FixtureRequest) -> Interpreted:
    return Interpreted(SPECS, dtype=request.param, column=column_of(request.param))


@pytest.fixture(scope="module")
def without_fp8() -> Interpreted:
    """Where E4M3 is read by its bits."""
    return Interpreted(FP8, "sm_80", column=0)


@pytest.fixture(scope="module")
def split() -> Interpreted:
    """Splits of one block or more: contexts of some hundred keys are shared out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "LEAST_KEYS", 64)
        return Interpreted(SPECS, dtype="bf16", column=0)


def check(kernels: Interpreted, spec: Attend, *sequences: tuple[int, int], seed: int = 0) -> None:
    batch = batch_of(*sequences)
    inputs = inputs_of(kernels, spec, batch, seed)
    got = kernels.run(spec, batch, inputs)["out"].float()
    assert not got.isnan().any()
    want = kernels.expected(spec, batch, inputs)["out"]
    if kernels.dtype == "bf16" and spec.cache_format == "fp32":  # exact but for how it is stored
        torch.testing.assert_close(got, want, rtol=2.0**-8, atol=2.0**-8)
    else:
        assert_close(spec, got, want)


@pytest.mark.parametrize(
    "name", ["none", "an empty sequence", "one token", "decode", "over a page boundary"]
)
@pytest.mark.parametrize("spec", ATTENDS, ids=str)
def test_matches_reference(kernels: Interpreted, spec: Attend, name: str) -> None:
    check(kernels, spec, *BATCHES[name])


@pytest.mark.parametrize("spec", FP8, ids=str)
def test_fp8_by_its_bits_matches_too(without_fp8: Interpreted, spec: Attend) -> None:
    check(without_fp8, spec, *BATCHES["decode"])


@pytest.mark.parametrize("spec", [ATTENDS[2], ATTENDS[4], FP8[1]], ids=str)
def test_prompts_and_decode_go_together(split: Interpreted, spec: Attend) -> None:
    """In a bucket whose tiles are tall, and which walks whole blocks without masks."""
    check(split, spec, (0, 64), (130, 1), (63, 2), (0, 0), (70, 9))


@pytest.mark.parametrize("spec", [ATTENDS[0], ATTENDS[2], ATTENDS[4], WIDE], ids=str)
def test_splits_are_joined(split: Interpreted, spec: Attend) -> None:
    check(split, spec, (300, 1), (5, 1))
    assert_used(split, spec, 2)


def assert_used(kernels: Interpreted, spec: Attend, tokens: int) -> None:
    """A batch of so many tokens has launches that join splits."""
    bucket = next(b for b in kernels.schedule["buckets"] if b["tokens"] >= tokens)
    group = kernels.schedule["groups"][bucket["steps"][kernels.index(spec)]]
    binaries = {b["name"]: b for b in kernels.schedule["binaries"]}
    assert all(binaries[launch["binary"]]["constants"]["SPLITS"] > 1 for launch in group)


def test_a_long_context(split: Interpreted) -> None:
    check(split, ATTENDS[5], (1030, 2))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    sequences=st.lists(
        st.tuples(st.sampled_from((0, 1, 63, 64, 130)), st.integers(0, 5)), max_size=3
    ),
    seed=st.integers(0, 9),
)
def test_any_batch(split: Interpreted, sequences: list[tuple[int, int]], seed: int) -> None:
    check(split, ATTENDS[4], *sequences, seed=seed)


@pytest.mark.parametrize("spec", [ATTENDS[1], ATTENDS[4]], ids=str)
def test_a_token_is_the_same_alone(kernels: Interpreted, spec: Attend) -> None:
    whole = batch_of((60, 7))
    inputs = inputs_of(kernels, spec, whole)
    want = kernels.run(spec, whole, inputs)["out"]
    starts = torch.tensor([0, 1], dtype=torch.int32)
    piece = Batch(whole.positions[5:6].clone(), starts, whole.block_table)
    got = kernels.run(spec, piece, {"q": inputs["q"][5:6]})["out"]
    torch.testing.assert_close(got[0].float(), want[5].float(), rtol=2.0**-7, atol=2.0**-7)


@given(
    tokens=st.lists(st.integers(0, 40), max_size=9),
    rows=st.sampled_from((16, 64)),
    sharing=st.integers(1, 80),
)
def test_there_is_room_for_every_tile(tokens: list[int], rows: int, sharing: int) -> None:
    """The arithmetic of ``query_tile``: sequences do not meet, and the grid has all of them."""
    tile = Tile.of(rows, sharing)
    starts = [sum(tokens[:b]) for b in range(len(tokens) + 1)]
    begins = [(start + b * (tile.queries - 1)) // tile.queries for b, start in enumerate(starts)]
    for b, count in enumerate(tokens):
        assert begins[b] + -(-count // tile.queries) <= begins[b + 1]
    assert begins[-1] <= tile.most(Bucket(sum(tokens), len(tokens), len(tokens)))
