"""Rounding by what the inputs are: against the nearest, against brute force, on hostile shapes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.ir import quant
from tokenmill.passes.rounding import clip, gptq
from torch import Tensor

ROUNDED = [name for name in quant.NAMES if quant.parse(name).bits < 16]


def _problem(n: int, k: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight ``[n, k]`` and correlated inputs ``[rows, k]``, channels of very different sizes."""
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, k, generator=rng) @ torch.randn(k, k, generator=rng) / k**0.5
    sizes = torch.logspace(0, 1, k)[torch.randperm(k, generator=rng)]
    return torch.randn(n, k, generator=rng), mixed * sizes


def _loss(parts: dict[str, Tensor], fmt: quant.Format, w: Tensor, hessian: Tensor) -> float:
    error = quant.dequantize(parts, fmt, w.shape[1]) - w
    return float((error @ hessian * error).sum())


@pytest.mark.parametrize("name", ROUNDED)
def test_outputs_change_less_than_by_rounding_to_the_nearest(name: str) -> None:
    fmt = quant.parse(name)
    w, x = _problem(48, 160, 1000)
    hessian = x.T @ x
    nearest, best = quant.quantize(w, fmt), gptq(w, hessian, fmt)
    assert _loss(best, fmt, w, hessian) < 0.75 * _loss(nearest, fmt, w, hessian)


def test_clipping_pays_where_the_range_is_wide() -> None:
    fmt = quant.parse("int4-g128")
    w, x = _problem(48, 256, 1000)
    hessian = torch.diag((x * x).sum(0))
    clipped, nearest = clip(w, hessian.diagonal(), fmt), quant.quantize(w, fmt)
    assert _loss(clipped, fmt, w, hessian) < 0.97 * _loss(nearest, fmt, w, hessian)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 200),
    rows=st.integers(1, 40),
    name=st.sampled_from(ROUNDED),
    seed=st.integers(0, 99),
)
def test_parts_are_laid_out_like_any_others(
    n: int, k: int, rows: int, name: str, seed: int
) -> None:
    fmt = quant.parse(name)
    w, x = _problem(n, k, rows, seed)  # fewer rows than inputs: the Hessian is singular
    x[:, ::3] = 0.0
    plain = quant.quantize(w, fmt)
    for parts in (gptq(w, x.T @ x, fmt), clip(w, x.square().sum(0), fmt)):
        assert {p: (v.shape, v.dtype) for p, v in parts.items()} == {
            p: (v.shape, v.dtype) for p, v in plain.items()
        }
        assert quant.dequantize(parts, fmt, k).isfinite().all()
        assert all(v.is_contiguous() for v in parts.values())


@pytest.mark.parametrize("name", ROUNDED)
def test_without_correlations_the_nearest_is_best(name: str) -> None:
    """INT4 may clip; the numbers are the nearest with the scales that it takes."""
    fmt = quant.parse(name)
    w, _ = _problem(7, 130, 1)
    parts = gptq(w, torch.eye(130), fmt)
    steps = quant.divisors(parts["scale"], fmt, w.shape)
    nearest = quant.pack(quant.snap(w / steps, fmt), fmt)
    assert torch.equal(parts["q"].float(), nearest.float())
    if fmt.bits > 4:
        assert torch.equal(parts["scale"], quant.scales(w, fmt))


@pytest.mark.parametrize("name", ROUNDED)
def test_many_rows_are_rounded_as_few_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = quant.parse(name)
    w, x = _problem(300, 70, 200)
    whole = gptq(w, x.T @ x, fmt)
    monkeypatch.setattr("tokenmill.passes.rounding._ROWS", 128)
    for part, value in gptq(w, x.T @ x, fmt).items():
        assert (value.float() != whole[part].float()).float().mean() < 0.01  # sums in another order


def test_zeros_stay_zero() -> None:
    for name in ROUNDED:
        fmt = quant.parse(name)
        w, energy = torch.zeros(3, 40), torch.ones(40)
        for parts in (gptq(w, energy.diag(), fmt), clip(w, energy, fmt)):
            assert quant.dequantize(parts, fmt, 40).eq(0).all()


def test_small_problems_are_solved_nearly_as_well_as_by_trying_all() -> None:
    fmt = quant.parse("int4-g32")
    for seed in range(5):
        w, x = _problem(1, 3, 50, seed)
        hessian = x.T @ x
        parts = gptq(w, hessian, fmt)
        scale = float(parts["scale"].float())
        grid = torch.tensor(list(product(range(-8, 8), repeat=3)), dtype=torch.float32) * scale - w
        best = float((grid @ hessian * grid).sum(-1).min())
        assert best <= _loss(parts, fmt, w, hessian) <= max(2.5 * best, 1e-3)
