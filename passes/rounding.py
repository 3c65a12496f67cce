"""Which stored numbers stand for a weight best, given what it is multiplied with.

All functions take one matrix ``w [N, K]`` in fp32.  ``hessian [K, K]`` is ``X^T X`` over the rows ``x [K]``
that the matrix is applied to: ``tr((W - Q) H (W - Q)^T)`` is the squared error of the outputs ``x W^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir import quant
from ..ir.quant import Format

# Shares of the range that a group's scale may span: clipping the extremes refines all other values.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
DAMPING = 0.01  # of the mean diagonal, as published
_BLOCK = 128


def gptq(w: Tensor, hessian: Tensor, fmt: Format) -> dict[str, Tensor]:
    """The parts of ``w`` by GPTQ (Frantar et al. 2022): columns are rounded one after the other, and
    those that are left make up for the error.

    Columns go in the order of their energy (act-order), but scales are chosen per group beforehand, in the
    stored order: nothing has to be reordered when the weight is read.  The scales clip nothing, since what
    makes up for errors must not be clipped either: with those of :func:`clip` the bundled model loses 10%
    more.
    """
    scale = quant.scales(w, fmt)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])
    divisors = quant.divisors(scale, fmt, w.shape)[:, order]
    left, snapped = w[:, order], torch.empty_like(w)
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        errors = torch.empty(w.shape[0], stop - start)
        block, steps = left[:, start:stop].clone(), divisors[:, start:stop]
        for i in range(stop - start):
            row = factor[start + i, start:stop]
            value = quant.snap(block[:, i] / steps[:, i], fmt)
            snapped[:, start + i] = value
            errors[:, i] = (block[:, i] - value * steps[:, i]) / row[i]
            block[:, i + 1 :].addr_(errors[:, i], row[i + 1 :], alpha=-1)
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    stored = torch.empty_like(snapped)
    stored[:, order] = snapped
    return {"q": quant.pack(stored, fmt), "scale": scale}


def clip(w: Tensor, energy: Tensor, fmt: Format) -> dict[str, Tensor]:
    """The parts of ``w`` rounded to the nearest, with the scale of each INT4 group that makes the least
    error where inputs have mean squares ``energy [K]``; other formats have no values worth clipping.
    """
    best = full = quant.scales(w, fmt)
    if fmt.bits == 4:
        least = torch.full(full.shape, torch.inf)
        for share in CLIPS:
            scale = (full.float() * share).to(full.dtype)
            steps = quant.divisors(scale, fmt, w.shape)
            error = (quant.snap(w / steps, fmt) * steps - w).square_().mul_(energy)
            error = quant.int4_groups(error, fmt.group).sum(-1)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    steps = quant.divisors(best, fmt, w.shape)
    return {"q": quant.pack(quant.snap(w / steps, fmt), fmt), "scale": best}


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with ``U^T U = H^-1``; more damping where rounding made H indefinite.

    Inputs that are always zero get a unit diagonal: their weights are rounded by themselves.
    """
    silent = hessian.diagonal() == 0
    hessian = hessian + torch.diag(silent.float())
    mean = hessian.diagonal().mean()
    damping = DAMPING
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * mean * torch.eye(len(hessian)))
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 10
