"""Sampling on the card, against the runtime's own sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.codegen.triton.emit import launches_file, sampling_file
from tokenmill.codegen.triton.target import TARGETS
from tokenmill.runtime.sampling import Sampling, candidates

from .interpreter import load_sources, mend

VOCAB, PITCH, BLOCK = 150, 152, 64


@pytest.fixture(scope="module")
def kernel():
    mend()
    files = sampling_file(VOCAB, PITCH) | launches_file(TARGETS["sm_90"])
    return load_sources(files)["sample_kernels.py"].sample


def chosen(kernel, logits: torch.Tensor, how: list[Sampling], uniform: list[float]) -> list[int]:
    rows = len(how)
    padded = torch.full((rows, PITCH), float("nan"))
    padded[:, :VOCAB] = logits
    tokens = torch.full((rows + 2,), -7, dtype=torch.int32)
    kernel[(rows + 2,)](
        padded,
        torch.tensor([h.temperature for h in how]),
        torch.tensor([h.top_k for h in how], dtype=torch.int32),
        torch.tensor([h.top_p for h in how]),
        torch.tensor(uniform),
        tokens,
        torch.tensor([rows], dtype=torch.int32),
        BLOCK=BLOCK,
    )
    assert tokens[rows:].tolist() == [-7, -7]
    return tokens[:rows].tolist()


def expected(logits: np.ndarray, how: Sampling, uniform: float) -> int:
    if how.temperature == 0:
        return int(logits.argmax())
    ids, weights = candidates(logits, how)
    order = np.argsort(ids)
    below = np.cumsum(weights[order])
    at = np.searchsorted(below, uniform * below[-1], side="right")
    return int(ids[order][min(at, len(ids) - 1)])


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 7, VOCAB, VOCAB + 9]),
    top_p=st.sampled_from([0.05, 0.6, 0.95, 1.0]),
    coarse=st.booleans(),
)
def test_as_the_sampler_chooses(kernel, seed, temperature, top_k, top_p, coarse):
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, VOCAB, generator=rng)
    if coarse:  # many equals
        logits = logits.round()
    how = Sampling(temperature, top_k, top_p)
    uniform = torch.rand(2, generator=rng).tolist()
    want = [expected(row.numpy(), how, u) for row, u in zip(logits, uniform, strict=True)]
    assert chosen(kernel, logits, [how, how], uniform) == want


def test_hostile_rows(kernel):
    peak = torch.full((4, VOCAB), -1e30)
    peak[0, VOCAB - 1] = 5.0
    peak[1] = 0.0  # all equal: the lowest ids stay
    peak[2, 3], peak[2, 9] = float("inf"), 1.0
    peak[3, 70] = -0.0
    peak[3, 71] = 0.0
    how = [Sampling(0.7, 5, 0.5), Sampling(1.0, 3), Sampling(0.0), Sampling(0.0)]
    assert chosen(kernel, peak, how, [0.99, 0.999, 0.5, 0.5]) == [VOCAB - 1, 2, 3, 70]


def test_rows_have_their_own_settings(kernel):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5))
    how = [Sampling(0.0), Sampling(1.0, top_k=2), Sampling(0.8, top_p=0.3)]
    got = chosen(kernel, logits, how, [0.1, 0.9, 0.4])
    want = [expected(r.numpy(), h, u) for r, h, u in zip(logits, how, [0.1, 0.9, 0.4], strict=True)]
    assert got == want
