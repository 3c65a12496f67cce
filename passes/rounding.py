"""Which stored numbers stand for a weight best, given what it is multiplied with.

All functions take one matrix ``w [N, K]`` in fp32.  ``hessian [K, K]`` is ``X^T X`` over the rows ``x [K]``
that the matrix is applied to: ``tr((W - Q) H (W - Q)^T)`` is the squared error of the outputs ``x W^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir import quant
from ..ir.quant import Format

# Shares of its range that a scale may span: clipping the extremes refines all other values.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
GPTQ_CLIPS = CLIPS[:4]  # fewer: what makes up for errors must not be clipped either
DAMPING = 0.01  # of the mean diagonal, as published
_BLOCK, _ROWS = 128, 4096


def gptq(w: Tensor, hessian: Tensor, fmt: Format) -> dict[str, Tensor]:
    """The parts of ``w`` by GPTQ (Frantar et al. 2022): columns are rounded one after the other, and
    those that are left make up for the error.

    Columns go in the order of their energy (act-order), but scales are chosen beforehand, in the stored
    order: nothing has to be reordered when the weight is read.  Rows do not depend on each other, so INT4
    tries several clips, and each row takes the one that costs its output least.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])
    found = [_best_rows(rows, hessian, order, factor, fmt) for rows in w.split(_ROWS)]
    return {part: torch.cat([parts[part] for parts in found]) for part in fmt.parts}


def _best_rows(
    w: Tensor, hessian: Tensor, order: Tensor, factor: Tensor, fmt: Format
) -> dict[str, Tensor]:
    shares = GPTQ_CLIPS if fmt.bits == 4 else (1.0,)
    full = quant.scales(w, fmt)
    scale = torch.cat([(full.float() * share).to(full.dtype) for share in shares])
    tried = w.repeat(len(shares), 1)
    steps = quant.divisors(scale, fmt, tried.shape)
    values = torch.empty_like(tried)
    values[:, order] = _by_columns(tried[:, order], steps[:, order], factor, fmt)
    if len(shares) > 1:
        error = values * steps - tried
        cost = (error @ hessian).mul_(error).sum(1).view(len(shares), -1)
        best = cost.argmin(0) * len(w) + torch.arange(len(w))
        values, scale = values[best], scale[best]
    return {"q": quant.pack(values, fmt), "scale": scale}


def _by_columns(left: Tensor, steps: Tensor, factor: Tensor, fmt: Format) -> Tensor:
    """Numbers in units of ``steps`` for the columns of ``left``, which is used up."""
    values = torch.empty_like(left)
    for start in range(0, left.shape[1], _BLOCK):
        stop = min(start + _BLOCK, left.shape[1])
        errors = torch.empty(len(left), stop - start)
        block = left[:, start:stop].clone()
        for i in range(stop - start):
            row, step = factor[start + i, start:stop], steps[:, start + i]
            value = quant.snap(block[:, i] / step, fmt)
            values[:, start + i] = value
            errors[:, i] = (block[:, i] - value * step) / row[i]
            block[:, i + 1 :].addr_(errors[:, i], row[i + 1 :], alpha=-1)
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return values


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
