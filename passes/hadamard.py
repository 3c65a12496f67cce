"""Rotations that spread what stands out, as functions of weights.

``Q = D (H ⊗ C)`` turns runs of ``block`` numbers: random signs ``D``, then a Hadamard matrix ``H`` over the
power of two in ``block`` and, over the odd rest, ``C_ij = (cos + sin)(2 pi i j / m)``, the discrete Hartley
transform (Bracewell 1983), which is orthogonal for every ``m``.  Divided by its norm no entry of ``Q``
exceeds ``sqrt(2 / block)``, so that one large number becomes ``block`` small ones; the signs keep what the
numbers had in common from adding up.  Seeds are fixed: a size has one rotation.

>>> x = torch.eye(6)
>>> torch.allclose(turn(x, 6) @ turn(x, 6).T, x, atol=1e-6)
True
>>> float(turn(x, 6).abs().max()) <= (2 / 6) ** 0.5
True
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def turn(x: Tensor, block: int) -> Tensor:
    """Every run of ``block`` numbers in the last dim times Q: ``[..., n * block]``, computed in fp64."""
    if x.is_meta:
        return torch.empty_like(x)
    odd = block // (block & -block)
    y = x.double().unflatten(-1, (-1, block)) * _signs(block)
    y = y.unflatten(-1, (-1, odd)) @ _hartley(odd)
    size = 1
    while size < block // odd:
        a, b = y.unflatten(-2, (-1, 2, size)).unbind(-3)
        y = torch.stack((a + b, a - b), -3).flatten(-4, -2)
        size *= 2
    return (y / math.sqrt(block)).flatten(-3).to(x.dtype)


def turn_columns(block: int, weight: Tensor, gain: Tensor | None = None) -> Tensor:
    """``W diag(gain) Q`` of ``[..., N, K]``: a map for inputs that are turned, and scaled no more."""
    if weight.dim() > 2:  # matrix by matrix: experts are too many for fp64 copies of all
        return torch.stack([turn_columns(block, one, gain) for one in weight])
    scaled = weight
    if gain is not None:
        scaled = (weight.double().unflatten(-1, (-1, len(gain))) * gain.double()).flatten(-2)
    return turn(scaled, block).to(weight.dtype)


def turn_rows(block: int, weight: Tensor) -> Tensor:
    """``Q^T W`` of ``[..., N, K]``: a map whose outputs come turned."""
    if weight.dim() > 2:
        return torch.stack([turn_rows(block, one) for one in weight])
    return turn(weight.T, block).T.contiguous()


def turn_bias(block: int, bias: Tensor) -> Tensor:
    return turn(bias, block)


def _signs(block: int) -> Tensor:
    coins = torch.randint(0, 2, (block,), generator=torch.Generator().manual_seed(block))
    return coins.double() * 2.0 - 1.0


def _hartley(size: int) -> Tensor:
    at = torch.arange(size, dtype=torch.float64)
    angle = torch.outer(at, at).remainder(size) * (2.0 * math.pi / size)
    return angle.cos() + angle.sin()
